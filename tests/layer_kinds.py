"Kinds of layers, losses and networks made of them, and their Hessians by PyTorch alone."

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hessian_surgery_nb.foundations.training import FocalLoss

WIDTH = 16  # every block takes (N, 16) and gives (N, 16)
CLASSES = 3
FEATURES = 5  # of an input vector
WORDS = 7  # that inputs of whole numbers are drawn from


# Blocks -------------------------------------------------------------------------------------------


class Block(nn.Module):
    "(N, 16) in the shape of a layer; what the layer gives, projected to (N, 16) again."

    def __init__(self, shape, layer):
        super().__init__()
        self.shape, self.layer = shape, layer

    def forward(self, x):
        out = self.layer(x.reshape(len(x), *self.shape))
        if torch.is_tensor(out):
            flat = out.reshape(len(x), -1)
        else:
            flat = out[0].reshape(len(x), -1)  # recurrent layers and attention give a tuple
        return project(flat, WIDTH)


@functools.cache
def projection(rows, columns):
    "A fixed matrix (rows, columns) that keeps lengths about as they are."
    g = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64) / rows**0.5


def project(x, width):
    return x if x.shape[1] == width else x @ projection(x.shape[1], width)


class Call(nn.Module):
    "A function as a layer; its parameters are handed to it after the input."

    def __init__(self, f, *weights):
        super().__init__()
        self.f = f
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s) / 2) for s in weights])

    def forward(self, x):
        return self.f(x, *self.weights)


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


class Dense(nn.Module):
    "Each layer sees all that came before it."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cat([x, torch.tanh(self.a(x))], -1)
        return torch.cat([x, torch.tanh(self.b(x))], -1)


class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.body = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        t = torch.sigmoid(self.gate(x))
        return t * torch.tanh(self.body(x)) + (1 - t) * x


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.b(F.silu(self.a(F.adaptive_avg_pool2d(x, 1)))))


class Experts(nn.Module):
    "A soft mixture of two."

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x):
        w = self.gate(x).softmax(-1)
        return sum(w[..., i : i + 1] * torch.tanh(e(x)) for i, e in enumerate(self.experts))


class Adapter(nn.Module):
    "A frozen linear layer and a learned correction of rank one."

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))


class Attended(nn.Module):
    "Pooling by attention, with a weight that is a vector."

    def __init__(self):
        super().__init__()
        self.a, self.v = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return (F.linear(h, self.v).softmax(1)[..., None] * h).sum(1)


class Standardised(nn.Conv2d):
    "A convolution whose weight is brought to mean 0 and spread 1 on every call."

    def forward(self, x):
        w = self.weight
        axes = (1, 2, 3)
        w = (w - w.mean(axes, keepdim=True)) / (w.std(axes, keepdim=True) + 0.1)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Buffered(nn.Module):
    "Scale and shift, by parameters and by buffers."

    def __init__(self):
        super().__init__()
        self.scale, self.shift = (
            nn.Parameter(torch.rand(WIDTH) + 0.5),
            nn.Parameter(torch.randn(WIDTH) / 3),
        )
        self.register_buffer("mean", torch.randn(WIDTH))
        self.register_buffer("spread", torch.rand(WIDTH) + 0.5)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        return torch.tanh((x - self.mean) / self.spread * self.scale + self.shift / self.count)


class Positions(nn.Module):
    "Attention written out, with learned places."

    def __init__(self):
        super().__init__()
        self.place, self.qkv = nn.Parameter(torch.randn(4, 4) / 2), nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x + self.place).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[
            :, 0
        ]


class Checkpointed(nn.Module):
    "Its inner part is computed a second time in the backward pass; `mode` None: it is not."

    def __init__(self, layers, mode):
        super().__init__()
        self.body, self.mode = layers, mode

    def forward(self, x):
        if self.mode is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.mode == "reentrant")


class Swish(torch.autograd.Function):
    "x sigmoid(x), right in both derivatives; written the old way."

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))


class Cube(torch.autograd.Function):
    "x^3, right in both derivatives; written the new way."

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


class Scaled(torch.autograd.Function):
    "x w for a vector w, the new way, with a derivative in forward mode."

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)

    @staticmethod
    def jvp(ctx, dx, dw):
        x, w = ctx.saved_tensors
        return dx * w + x * dw


class Once(torch.autograd.Function):
    "tanh, with a backward pass that says it cannot be differentiated."

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Symmetric(nn.Module):
    "A parametrisation: the upper triangle, twice."

    def forward(self, w):
        return w.triu() + w.triu(1).T


class Tied(nn.Module):
    "One matrix in two places, once turned around."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x)))) @ self.a.weight


class PerDirection(nn.Module):
    "Cells of recurrent networks, unrolled by hand."

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class SelfAttention(nn.Module):
    def __init__(self, mask=False, **how):
        super().__init__()
        self.mask = mask
        self.body = nn.MultiheadAttention(4, 2, batch_first=True, **how)

    def forward(self, x):
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1) if self.mask else None
        return self.body(x, x, x, attn_mask=mask, need_weights=not self.mask)[0]


class Decoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.TransformerDecoderLayer(4, 1, 3, 0.0, batch_first=True)

    def forward(self, x):
        return self.body(x, x.flip(1))


class Quadratic(nn.Module):
    "A function transform inside a network: the gradient of an energy with respect to the input."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH) / 2)

    def forward(self, x):
        def energy(t):
            return (torch.tanh(t * self.w) ** 2).sum()

        return torch.func.grad(energy)(x)


class QuadraticByHand(Quadratic):
    def forward(self, x):
        t = torch.tanh(x * self.w)
        return 2 * t * (1 - t**2) * self.w


class Ensemble(nn.Module):
    "Three linear layers at once by `vmap`, or one after the other."

    def __init__(self, at_once):
        super().__init__()
        self.at_once, self.W = at_once, nn.Parameter(torch.randn(3, 4, 4) / 2)

    def forward(self, x):
        def one(w):
            return torch.tanh(F.linear(x, w))

        if self.at_once:
            return torch.vmap(one)(self.W).mean(0)
        return torch.stack([one(w) for w in self.W]).mean(0)


class Pushed(nn.Module):
    "A directional derivative inside a network."

    def __init__(self, by_hand=False):
        super().__init__()
        self.w, self.by_hand = nn.Parameter(torch.randn(WIDTH) / 2), by_hand

    def forward(self, x):
        if self.by_hand:
            return (1 - torch.tanh(x * self.w) ** 2) * self.w
        return torch.func.jvp(lambda t: torch.tanh(t * self.w), (x,), (torch.ones_like(x),))[1]


class HookedOut(nn.Module):
    "A forward hook that changes what a layer returns."

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.body.register_forward_hook(lambda m, args, out: torch.tanh(out) + args[0])

    def forward(self, x):
        return self.body(x)


class InPlace(nn.Module):
    "Changes what it made itself, never its input."

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        h += x
        h[..., 0].mul_(2)
        h[..., 1:3] = h[..., 1:3].sigmoid()
        return h.tanh_()


class Fixed(nn.Module):
    "Fractional pooling with its random numbers given."

    def forward(self, x):
        samples = torch.full((len(x), x.shape[1], 2), 0.3, dtype=x.dtype)
        return F.fractional_max_pool2d(x, 2, output_size=2, _random_samples=samples)


def hard_sigmoid(x):
    return F.relu6(x + 3) / 6


def norm_with_statistics(norm):
    "Statistics of a layer that has seen data: neither 0 nor 1."
    for name, b in norm.named_buffers():
        if name == "running_mean":
            b.copy_(torch.randn(b.shape) / 3)
        if name == "running_var":
            b.copy_(torch.rand(b.shape) + 0.5)
    return norm


def pruned(how, **options):
    def build():
        layer = nn.Linear(4, 4)
        how(layer, name="weight", **options)
        return layer

    return build


def spectral_old():
    layer = nn.utils.spectral_norm(nn.Linear(4, 4))
    layer.weight_u.copy_(F.normalize(torch.randn(4), dim=0))
    return layer


def spectral_conv():
    return parametrizations.spectral_norm(nn.Conv2d(1, 2, 2))


def masked_linear():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def fft_layer(x, w):
    return torch.fft.irfft(torch.fft.rfft(x) * torch.complex(w[0], w[1]), n=WIDTH)


def phases(x, w):
    return (torch.exp(1j * x * w)).real + torch.abs(torch.complex(x, x * w + 2))


def solved(x, A):
    return torch.linalg.solve(A @ A.T + torch.eye(4, dtype=x.dtype), x.transpose(1, 2)).transpose(
        1, 2
    )


def inverted(x, A):
    return x @ torch.linalg.inv(A @ A.T + torch.eye(4, dtype=x.dtype))


def cholesky(x, A):
    return x @ torch.linalg.cholesky(A @ A.T + torch.eye(4, dtype=x.dtype))


def exponential(x, A):
    return x @ torch.linalg.matrix_exp(A / 2)


def determinant(x, A):
    return x * torch.linalg.slogdet(A @ A.T + torch.eye(4, dtype=x.dtype))[1]


def eigenvalues(x, A):
    return x * torch.linalg.eigvalsh(A + A.T)


def q_of(x, A):
    return x @ torch.linalg.qr(A)[0]


def gathered(x, w):
    return (x * w).gather(1, torch.arange(WIDTH - 1, -1, -1).expand(len(x), -1)) * x


def sorted_(x, w):
    return (x * w).sort(1).values * torch.linspace(-1, 1, WIDTH, dtype=x.dtype)


def best(x, w):
    return (x * w).topk(5, 1).values


def picked(x, w):
    return (x * w)[:, torch.tensor([3, 3, 0, 7, 15])] * w[:5]


def added(x, w):
    return torch.zeros_like(x).index_add(1, torch.arange(WIDTH) % 5, torch.tanh(x * w))


def scattered(x, w):
    return torch.zeros_like(x).scatter_add(
        1, (torch.arange(WIDTH) % 7).expand(len(x), -1), torch.tanh(x * w)
    )


def chosen(x, w):
    return torch.where(x * w > 0, torch.exp(-x * w), 1 + torch.sin(x * w))


def summed(x, w):
    return torch.tanh(x * w).cumsum(1)


def multiplied(x, w):
    return (1 + torch.tanh(x * w) / 4).cumprod(1)


def log_sums(x, w):
    return torch.logcumsumexp(x * w, 1)


def reduced(x, w):
    h = x * w
    return torch.stack(
        [
            h.logsumexp(1),
            h.amax(1),
            h.prod(1),
            h.var(1),
            h.std(1),
            h.norm(dim=1),
            h.median(1).values,
        ],
        1,
    )


def turned(x, w):
    return torch.roll(x * w, 3, 1) * x.flip(1) + torch.tanh(x * w)


def contracted(x, A):
    return torch.einsum("nij,jk,nlk->nil", x, A, x) / 4


def special(x, w):
    return (
        torch.erf(x * w)
        + torch.special.expit(x) * torch.log1p((x * w) ** 2)
        + torch.atan2(x * w, 1 + x**2)
    )


def batched(x, A):
    return torch.baddbmm(x, x, A.expand(len(x), 4, 4))


def nearest(x, A):
    return torch.cdist(x, A.expand(len(x), 4, 4))


def nearest_by_hand(x, A):
    return (x[:, :, None] - A).norm(dim=-1)


def pair_distance(x, w):
    return F.pairwise_distance(x.view(len(x), 4, 4), w) * x.view(len(x), 4, 4).mean(2)


def alike(x, A):
    return F.cosine_similarity(x[:, None, :], A[None], dim=2)


def normalised(x, w):
    return F.normalize(x * w, dim=1) * 2


def strided(x, w):
    return torch.as_strided((x * w).contiguous(), (len(x), 5, 3), (WIDTH, 2, 1)).tanh()


def unfolded(x, w):
    return (x * w).unfold(1, 4, 2).tanh()


def sampled(x, w):
    grid = torch.stack(
        torch.meshgrid(torch.linspace(-0.7, 0.8, 3), torch.linspace(-0.6, 0.9, 3), indexing="ij"),
        -1,
    ).to(x)
    return F.grid_sample(torch.tanh(x * w), grid.expand(len(x), 3, 3, 2), align_corners=False)


def sampled_by_hand(x, w):
    "Bilinear interpolation at the same places: pixel = ((place + 1) * 4 - 1) / 2, zeros outside."
    h, out = torch.tanh(x * w), 0
    gy, gx = torch.meshgrid(
        torch.linspace(-0.7, 0.8, 3), torch.linspace(-0.6, 0.9, 3), indexing="ij"
    )  # the last axis: x, y
    px, py = ((gy.to(x) + 1) * 4 - 1) / 2, ((gx.to(x) + 1) * 4 - 1) / 2
    for dy in (0, 1):
        for dx in (0, 1):
            ix, iy = px.floor() + dx, py.floor() + dy
            weight = (1 - (px - ix).abs()) * (1 - (py - iy).abs())
            inside = (ix >= 0) & (ix < 4) & (iy >= 0) & (iy < 4)
            out = out + h[:, :, iy.clamp(0, 3).long(), ix.clamp(0, 3).long()] * weight * inside
    return out


def mask_filled(x, w):
    return (x * w).masked_fill(torch.arange(WIDTH) % 3 == 0, -1.0).softmax(1) * x


def complex_linear(x, A):
    x = x.view(len(x), 8, 2)
    return torch.view_as_real(
        torch.complex(x[..., 0], x[..., 1]) @ torch.complex(A[..., 0], A[..., 1])
    ).tanh()


def attention(x, A):
    q = (x @ A)[:, None]
    return F.scaled_dot_product_attention(q, x[:, None], torch.tanh(x)[:, None])


def attention_by_hand(x, A):
    q = x @ A
    return (q @ x.transpose(1, 2) / 2).softmax(-1) @ torch.tanh(x)


def weighted_conv(x, W):
    return F.conv2d(x, torch.tanh(W), padding=1)


def text_linear(x, w):
    return F.linear(x, w)


def through(function):
    return lambda x, w: function.apply(x * w)


def scaled(x, w):
    return torch.tanh(Scaled.apply(x, w)) * w


def checkpoints(body, mode):
    return [functools.partial(lambda m: Checkpointed(body(), m), m) for m in (mode, None)]


VEC, SEQ, TALL, GREY, IMAGE, VOLUME = (WIDTH,), (4, 4), (2, 8), (1, 4, 4), (4, 2, 2), (2, 2, 2, 2)
A44 = (4, 4)


def entry(shape, build, twin=None, *, smooth=True, crowd=False, hard=False, refusable=False):
    """A kind of layer.

    twin: the same function of the same parameters by other operations, where PyTorch has no second
    derivative of these, or a wrong one. smooth: without kinks, so that differences of gradients are
    good. crowd: images see each other. hard: some ways of differentiating it do not exist, so that
    a mode chosen by hand may be refused; refusable: `auto` may refuse it too.
    """
    return SimpleNamespace(
        shape=shape,
        build=build,
        twin=build if twin is None else twin,
        smooth=smooth,
        crowd=crowd,
        hard=hard or twin is not None,
        refusable=refusable,
    )


BLOCKS = {
    "linear": entry(VEC, lambda: nn.Linear(16, 3)),
    "linear without bias": entry(VEC, lambda: nn.Linear(16, 3, bias=False)),
    "linear on sequences": entry(SEQ, lambda: nn.Linear(4, 3)),
    "linear on images of four axes": entry(VOLUME, lambda: nn.Linear(2, 3)),
    "two linear": entry(SEQ, lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))),
    "bilinear": entry(SEQ, lambda: Pair(nn.Bilinear(4, 4, 3))),
    "identity": entry(VEC, nn.Identity),
    "linear by a vector": entry(SEQ, Attended),
    "functional linear": entry(SEQ, lambda: Call(text_linear, (3, 4))),
    # convolutions
    "conv1d": entry(TALL, lambda: nn.Conv1d(2, 3, 3)),
    "conv1d stride": entry(TALL, lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1)),
    "conv1d reflect": entry(TALL, lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect")),
    "conv1d circular": entry(TALL, lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")),
    "conv1d replicate": entry(
        TALL, lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="replicate")
    ),
    "conv1d dilated": entry(TALL, lambda: nn.Conv1d(2, 3, 3, dilation=2)),
    "conv1d groups": entry(TALL, lambda: nn.Conv1d(2, 4, 3, groups=2)),
    "conv1d same": entry(TALL, lambda: nn.Conv1d(2, 3, 4, padding="same")),
    "conv2d": entry(GREY, lambda: nn.Conv2d(1, 3, 3)),
    "conv2d without bias": entry(GREY, lambda: nn.Conv2d(1, 3, 2, bias=False)),
    "conv2d padded": entry(GREY, lambda: nn.Conv2d(1, 2, 3, padding=1)),
    "conv2d stride": entry(GREY, lambda: nn.Conv2d(1, 3, 3, stride=2, padding=1)),
    "conv2d stride two numbers": entry(
        GREY, lambda: nn.Conv2d(1, 3, (2, 3), stride=(2, 1), padding=(0, 1))
    ),
    "conv2d reflect": entry(GREY, lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")),
    "conv2d circular": entry(GREY, lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")),
    "conv2d replicate": entry(
        GREY, lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate")
    ),
    "conv2d dilated": entry(GREY, lambda: nn.Conv2d(1, 3, 2, dilation=2)),
    "conv2d depthwise": entry(IMAGE, lambda: nn.Conv2d(4, 4, 2, groups=4)),
    "conv2d groups": entry(IMAGE, lambda: nn.Conv2d(4, 6, 2, groups=2, padding=1)),
    "conv2d of one pixel": entry(IMAGE, lambda: nn.Conv2d(4, 3, 1)),
    "conv2d of one pixel, stride": entry(IMAGE, lambda: nn.Conv2d(4, 3, 1, stride=2)),
    "conv2d same": entry(GREY, lambda: nn.Conv2d(1, 2, 2, padding="same")),
    "conv2d separable": entry(
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.SiLU(), nn.Conv2d(4, 3, 1)
        ),
    ),
    "conv2d standardised": entry(GREY, lambda: Standardised(1, 3, 3, padding=1)),
    "conv2d of a computed weight": entry(GREY, lambda: Call(weighted_conv, (2, 1, 3, 3))),
    "conv3d": entry(VOLUME, lambda: nn.Conv3d(2, 2, 2)),
    "conv3d padded": entry(VOLUME, lambda: nn.Conv3d(2, 2, 2, padding=1, stride=2)),
    "conv3d circular": entry(
        VOLUME, lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="circular")
    ),
    "conv3d of one pixel": entry(VOLUME, lambda: nn.Conv3d(2, 3, 1)),
    "transposed conv1d": entry(TALL, lambda: nn.ConvTranspose1d(2, 3, 3, stride=2)),
    "transposed conv2d": entry(IMAGE, lambda: nn.ConvTranspose2d(4, 2, 2, stride=2)),
    "transposed conv2d, more": entry(
        IMAGE,
        lambda: nn.ConvTranspose2d(
            4, 4, 2, stride=2, padding=1, output_padding=1, groups=2, dilation=2
        ),
    ),
    "transposed conv3d": entry(VOLUME, lambda: nn.ConvTranspose3d(2, 1, 2)),
    "unfold": entry(GREY, lambda: nn.Sequential(nn.Unfold(2), Turn(), nn.Linear(4, 3), nn.Tanh())),
    "fold": entry(SEQ, lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Fold((3, 3), 2))),
    "pixel shuffle": entry(IMAGE, lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 2, 2))),
    "pixel unshuffle": entry(GREY, lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 2, 1))),
    "channel shuffle": entry(
        IMAGE, lambda: nn.Sequential(nn.ChannelShuffle(2), nn.Conv2d(4, 4, 1, groups=2))
    ),
    "zero padding": entry(
        GREY, lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(1, 2, 3))
    ),
    "reflection padding": entry(
        GREY, lambda: nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(1, 2, 3))
    ),
    "constant padding": entry(
        TALL, lambda: nn.Sequential(nn.ConstantPad1d(2, 0.5), nn.Conv1d(2, 2, 3))
    ),
    # recurrent, attention
    "rnn": entry(SEQ, lambda: nn.RNN(4, 3, batch_first=True)),
    "rnn relu": entry(
        SEQ, lambda: nn.RNN(4, 3, batch_first=True, nonlinearity="relu"), smooth=False
    ),
    "lstm": entry(SEQ, lambda: nn.LSTM(4, 2, batch_first=True)),
    "lstm both ways": entry(
        TALL, lambda: Turned(nn.LSTM(2, 1, batch_first=True, bidirectional=True))
    ),
    "lstm projected": entry(SEQ, lambda: nn.LSTM(4, 3, batch_first=True, proj_size=1)),
    "gru": entry(SEQ, lambda: nn.GRU(4, 2, batch_first=True)),
    "gru of two layers": entry(SEQ, lambda: nn.GRU(4, 2, 2, batch_first=True, bias=False)),
    "rnn cell": entry(SEQ, lambda: PerDirection(nn.RNNCell(4, 3))),
    "lstm cell": entry(SEQ, lambda: PerDirection(nn.LSTMCell(4, 2))),
    "gru cell": entry(SEQ, lambda: PerDirection(nn.GRUCell(4, 2))),
    "attention layer": entry(SEQ, SelfAttention),
    "attention layer, masked": entry(SEQ, lambda: SelfAttention(True)),
    "attention layer, more": entry(
        SEQ, lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True)
    ),
    "encoder": entry(
        SEQ, lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, batch_first=True), smooth=False
    ),
    "encoder, norm first": entry(
        SEQ,
        lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.1, F.gelu, norm_first=True, batch_first=True),
    ),
    "encoder of two": entry(
        SEQ,
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 1, 2, 0.0, batch_first=True, activation="gelu"),
            2,
            enable_nested_tensor=False,
        ),
    ),
    "decoder": entry(SEQ, Decoded, smooth=False),
    "fused attention": entry(
        SEQ, lambda: Call(attention, A44), lambda: Call(attention_by_hand, A44)
    ),
    "causal attention": entry(SEQ, Positions),
    # norms
    "layer norm": entry(SEQ, lambda: nn.LayerNorm(4)),
    "layer norm without weights": entry(
        SEQ, lambda: nn.Sequential(nn.LayerNorm((4, 4), elementwise_affine=False), nn.Linear(4, 3))
    ),
    "layer norm without bias": entry(SEQ, lambda: nn.LayerNorm(4, bias=False)),
    "group norm": entry(IMAGE, lambda: nn.GroupNorm(2, 4)),
    "instance norm 1d": entry(TALL, lambda: nn.InstanceNorm1d(2, affine=True)),
    "instance norm 2d": entry(
        IMAGE, lambda: nn.Sequential(nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1))
    ),
    "instance norm with statistics": entry(
        IMAGE,
        lambda: norm_with_statistics(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    ),
    "batch norm 1d": entry(VEC, lambda: norm_with_statistics(nn.BatchNorm1d(16))),
    "batch norm of sequences": entry(SEQ, lambda: norm_with_statistics(nn.BatchNorm1d(4))),
    "batch norm 2d": entry(IMAGE, lambda: norm_with_statistics(nn.BatchNorm2d(4))),
    "batch norm 2d without weights": entry(
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), norm_with_statistics(nn.BatchNorm2d(4, affine=False))
        ),
    ),
    "batch norm 3d": entry(VOLUME, lambda: norm_with_statistics(nn.BatchNorm3d(2))),
    "batch norm without statistics": entry(
        IMAGE, lambda: nn.BatchNorm2d(4, track_running_stats=False), crowd=True
    ),
    "sync batch norm": entry(IMAGE, lambda: norm_with_statistics(nn.SyncBatchNorm(4))),
    "local response norm": entry(
        IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.LocalResponseNorm(3, alpha=0.5))
    ),
    "rms norm": entry(SEQ, lambda: nn.RMSNorm(4)),
    "normalised": entry(VEC, lambda: Call(normalised, VEC)),
    # weights that are computed
    "weight norm, old": entry(SEQ, lambda: nn.utils.weight_norm(nn.Linear(4, 3))),
    "weight norm, whole": entry(SEQ, lambda: nn.utils.weight_norm(nn.Linear(4, 3), dim=None)),
    "weight norm": entry(SEQ, lambda: parametrizations.weight_norm(nn.Linear(4, 3))),
    "weight norm of a conv": entry(
        GREY, lambda: parametrizations.weight_norm(nn.Conv2d(1, 3, 2), dim=1)
    ),
    "weight norm of a conv, old": entry(GREY, lambda: nn.utils.weight_norm(nn.Conv2d(1, 3, 3))),
    "spectral norm, old": entry(SEQ, spectral_old),
    "spectral norm": entry(SEQ, lambda: parametrizations.spectral_norm(nn.Linear(4, 4))),
    "spectral norm of a conv": entry(GREY, spectral_conv),
    "orthogonal": entry(
        SEQ, lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")
    ),
    "symmetric": entry(SEQ, masked_linear),
    "pruned": entry(SEQ, pruned(prune.l1_unstructured, amount=0.4)),
    "pruned, rows": entry(SEQ, pruned(prune.ln_structured, amount=0.5, n=2, dim=0)),
    "tied": entry(SEQ, Tied),
    "adapter": entry(SEQ, Adapter),
    # pools
    "average pool 1d": entry(TALL, lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.AvgPool1d(2))),
    "average pool 2d": entry(
        GREY,
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 2, padding=1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        ),
    ),
    "average pool 3d": entry(VOLUME, lambda: nn.Sequential(nn.Conv3d(2, 3, 1), nn.AvgPool3d(2))),
    "max pool 1d": entry(
        TALL, lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.MaxPool1d(2)), smooth=False
    ),
    "max pool 2d": entry(
        GREY,
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2, padding=1), nn.MaxPool2d(3, 2, 1)),
        smooth=False,
    ),
    "max pool 3d": entry(
        VOLUME, lambda: nn.Sequential(nn.Conv3d(2, 3, 1), nn.MaxPool3d(2)), smooth=False
    ),
    "max pool and back": entry(
        GREY, lambda: nn.Sequential(nn.Conv2d(1, 1, 1), Unpooled()), smooth=False
    ),
    "adaptive average pool 1d": entry(
        TALL, lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.AdaptiveAvgPool1d(4))
    ),
    "adaptive average pool 2d": entry(
        GREY, lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.AdaptiveAvgPool2d((2, None)))
    ),
    "adaptive average pool 3d": entry(
        VOLUME, lambda: nn.Sequential(nn.Conv3d(2, 3, 1), nn.AdaptiveAvgPool3d((1, 2, 1)))
    ),
    "adaptive max pool 1d": entry(
        TALL, lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.AdaptiveMaxPool1d(4)), smooth=False
    ),
    "adaptive max pool 2d": entry(
        GREY, lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.AdaptiveMaxPool2d(2)), smooth=False
    ),
    "adaptive max pool 3d": entry(
        VOLUME, lambda: nn.Sequential(nn.Conv3d(2, 3, 1), nn.AdaptiveMaxPool3d(1)), smooth=False
    ),
    "power pool 1d": entry(
        TALL, lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Softplus(), nn.LPPool1d(2, 2))
    ),
    "power pool 2d": entry(
        GREY, lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Softplus(), nn.LPPool2d(3, 2))
    ),
    "fractional max pool": entry(
        GREY, lambda: nn.Sequential(nn.Conv2d(1, 2, 1), Fixed()), smooth=False
    ),
    "upsample nearest": entry(
        IMAGE,
        lambda: nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 2)),
    ),
    "upsample linear": entry(
        TALL, lambda: nn.Sequential(nn.Conv1d(2, 2, 2), nn.Upsample(size=11, mode="linear"))
    ),
    "upsample bilinear": entry(
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(4, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        ),
    ),
    "upsample bicubic": entry(
        IMAGE, lambda: nn.Sequential(nn.Conv2d(4, 2, 1), nn.Upsample(size=3, mode="bicubic"))
    ),
    "upsample trilinear": entry(
        VOLUME, lambda: nn.Sequential(nn.Conv3d(2, 2, 1), nn.Upsample(size=3, mode="trilinear"))
    ),
    # combinations
    "residual": entry(SEQ, lambda: Residual(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 4))),
    "dense": entry(SEQ, Dense),
    "highway": entry(SEQ, Highway),
    "squeeze and excite": entry(IMAGE, SqueezeExcite),
    "experts": entry(SEQ, Experts),
    "buffers": entry(VEC, Buffered),
    "flatten and unflatten": entry(
        SEQ, lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 2, 1))
    ),
    "forward hook": entry(SEQ, HookedOut),
    "in place": entry(SEQ, InPlace),
    "in-place ReLU": entry(
        SEQ, lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), smooth=False
    ),
    # functions
    "gather": entry(VEC, lambda: Call(gathered, VEC)),
    "sort": entry(VEC, lambda: Call(sorted_, VEC), smooth=False),
    "top k": entry(VEC, lambda: Call(best, VEC), smooth=False),
    "index": entry(VEC, lambda: Call(picked, VEC)),
    "index add": entry(VEC, lambda: Call(added, VEC)),
    "scatter": entry(VEC, lambda: Call(scattered, VEC)),
    "where": entry(VEC, lambda: Call(chosen, VEC), smooth=False),
    "cumulative sum": entry(VEC, lambda: Call(summed, VEC)),
    "cumulative product": entry(VEC, lambda: Call(multiplied, VEC)),
    "cumulative logsumexp": entry(VEC, lambda: Call(log_sums, VEC), hard=True),
    "reductions": entry(VEC, lambda: Call(reduced, VEC), smooth=False),
    "roll and flip": entry(VEC, lambda: Call(turned, VEC)),
    "einsum": entry(SEQ, lambda: Call(contracted, A44)),
    "special functions": entry(VEC, lambda: Call(special, VEC)),
    "baddbmm": entry(SEQ, lambda: Call(batched, A44)),
    "cdist": entry(SEQ, lambda: Call(nearest, A44), lambda: Call(nearest_by_hand, A44)),
    "pairwise distance": entry(VEC, lambda: Call(pair_distance, (4,))),
    "cosine similarity": entry(VEC, lambda: Call(alike, (3, 16))),
    "as_strided": entry(VEC, lambda: Call(strided, VEC)),
    "unfold of a tensor": entry(VEC, lambda: Call(unfolded, VEC)),
    "masked softmax": entry(VEC, lambda: Call(mask_filled, VEC)),
    "grid sample": entry(
        GREY, lambda: Call(sampled, (1, 4, 4)), lambda: Call(sampled_by_hand, (1, 4, 4))
    ),
    "solve": entry(SEQ, lambda: Call(solved, A44)),
    "inverse": entry(SEQ, lambda: Call(inverted, A44)),
    "cholesky": entry(SEQ, lambda: Call(cholesky, A44)),
    "matrix exponential": entry(SEQ, lambda: Call(exponential, A44)),
    "determinant": entry(SEQ, lambda: Call(determinant, A44)),
    "eigenvalues": entry(SEQ, lambda: Call(eigenvalues, A44)),
    "orthogonal factor": entry(SEQ, lambda: Call(q_of, A44)),
    "fft": entry(VEC, lambda: Call(fft_layer, (2, 9))),
    "complex phases": entry(VEC, lambda: Call(phases, VEC)),
    "complex linear": entry(VEC, lambda: Call(complex_linear, (8, 3, 2))),
    # computed twice, transformed, written by others
    "checkpoint": entry(
        SEQ,
        *checkpoints(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)), "plain"),
        refusable=True,
    ),
    "checkpoint of a conv": entry(
        GREY,
        *checkpoints(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()), "plain"),
        refusable=True,
    ),
    "checkpoint of a norm": entry(
        IMAGE,
        *checkpoints(
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm_with_statistics(nn.BatchNorm2d(4))),
            "plain",
        ),
        refusable=True,
    ),
    "reentrant checkpoint": entry(
        SEQ,
        *checkpoints(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), "reentrant"),
        refusable=True,
    ),
    "vmap": entry(SEQ, lambda: Ensemble(True), lambda: Ensemble(False)),
    "gradient inside": entry(VEC, Quadratic, QuadraticByHand),
    "forward derivative inside": entry(VEC, Pushed, lambda: Pushed(True)),
    "custom function, old": entry(
        VEC, lambda: Call(through(Swish), VEC), lambda: Call(lambda x, w: F.silu(x * w), VEC)
    ),
    "custom function, new": entry(
        VEC, lambda: Call(through(Cube), VEC), lambda: Call(lambda x, w: (x * w) ** 3, VEC)
    ),
    "custom function of two": entry(
        VEC, lambda: Call(scaled, VEC), lambda: Call(lambda x, w: torch.tanh(x * w) * w, VEC)
    ),
    "custom function, once": entry(
        VEC, lambda: Call(through(Once), VEC), lambda: Call(lambda x, w: torch.tanh(x * w), VEC)
    ),
}


class Pair(nn.Module):
    "A layer of two inputs, given neighbouring rows."

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.roll(1, 1).contiguous())


class Turn(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Turned(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2))[0]


class Unpooled(nn.Module):
    def forward(self, x):
        pooled, where = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled, where, 2)


ACTIVATIONS = {  # the class, and whether it is smooth
    "relu": (nn.ReLU, False),
    "relu6": (nn.ReLU6, False),
    "leaky relu": (nn.LeakyReLU, False),
    "prelu": (nn.PReLU, False),
    "prelu of channels": (lambda: nn.PReLU(4), False),
    "rrelu": (nn.RReLU, False),
    "elu": (nn.ELU, False),
    "celu": (nn.CELU, False),
    "selu": (nn.SELU, False),
    "gelu": (nn.GELU, True),
    "gelu by tanh": (lambda: nn.GELU("tanh"), True),
    "silu": (nn.SiLU, True),
    "mish": (nn.Mish, True),
    "softplus": (nn.Softplus, True),
    "softsign": (nn.Softsign, False),
    "tanh": (nn.Tanh, True),
    "tanhshrink": (nn.Tanhshrink, True),
    "softshrink": (lambda: nn.Softshrink(0.2), False),
    "hardshrink": (lambda: nn.Hardshrink(0.2), False),
    "hardtanh": (lambda: nn.Hardtanh(-0.7, 0.9), False),
    "hardswish": (nn.Hardswish, False),
    "sigmoid": (nn.Sigmoid, True),
    "log sigmoid": (nn.LogSigmoid, True),
    "softmax": (lambda: nn.Softmax(-1), True),
    "log softmax": (lambda: nn.LogSoftmax(-1), True),
    "softmin": (lambda: nn.Softmin(-1), True),
    "glu": (lambda: nn.GLU(-1), True),
    "threshold": (lambda: nn.Threshold(0.1, -0.3), False),
    "dropout": (lambda: nn.Dropout(0.5), True),
    "alpha dropout": (lambda: nn.AlphaDropout(0.5), True),
    "feature dropout": (lambda: nn.FeatureAlphaDropout(0.5), True),
}
for name, (make, smooth) in ACTIVATIONS.items():
    BLOCKS[name] = entry(
        SEQ,
        functools.partial(
            lambda make: nn.Sequential(
                nn.Linear(4, 4), make(), nn.Linear(2 if make().__class__ is nn.GLU else 4, 2)
            ),
            make,
        ),
        smooth=smooth,
    )
BLOCKS["hardsigmoid"] = entry(
    SEQ,
    lambda: nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid()),
    lambda: nn.Sequential(nn.Linear(4, 4), Call(hard_sigmoid)),
    smooth=False,
)
BLOCKS["dropout of channels"] = entry(
    IMAGE, lambda: nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(4, 2, 1))
)


# Fronts: from what a batch holds to (N, 16) -------------------------------------------------------


def vectors(n, g):
    return torch.randn(n, FEATURES, generator=g, dtype=torch.float64)


def words(n, g):
    return torch.randint(1, WORDS, (n, 4), generator=g)


def padded_words(n, g):
    w = words(n, g)
    return w.masked_fill(torch.arange(4) >= torch.randint(2, 5, (n, 1), generator=g), 0)


class Front(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return project(torch.tanh(self.layer(x)).flatten(1), WIDTH)


class Padded(nn.Module):
    "Padding is set to zero: its row of the embedding plays no part."

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 3, padding_idx=0)

    def forward(self, x):
        return project(
            torch.tanh(self.words(x).masked_fill((x == 0)[..., None], 0.0)).flatten(1), WIDTH
        )


class PaddedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 2, 0.0, F.gelu, batch_first=True), 1
        )

    def forward(self, x):
        out = self.body(self.words(x), src_key_padding_mask=x == 0)
        return project(out.masked_fill((x == 0)[..., None], 0.0).flatten(1), WIDTH)


class ByName(nn.Module):
    "Two inputs, given by name."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left, right):
        return project(torch.tanh(self.a(left) * self.b(right)), WIDTH)


class WrittenBag(nn.Module):
    "An embedding bag by plain indexing."

    def __init__(self, mode):
        super().__init__()
        self.weight, self.mode = nn.Parameter(torch.randn(WORDS, 4)), mode

    def forward(self, x):
        rows = self.weight[x]
        return rows.amax(1) if self.mode == "max" else getattr(rows, self.mode)(1)


def front(build, inputs, twin=None, *, smooth=True, refusable=False):
    "How inputs enter; the arguments mean what they mean for `entry`."
    return SimpleNamespace(
        build=build,
        twin=build if twin is None else twin,
        inputs=inputs,
        smooth=smooth,
        hard=twin is not None,
        refusable=refusable,
    )


def embedded(**how):
    return lambda: Front(nn.Embedding(WORDS, 3, **how))


def bagged(mode, sparse=False):
    bag = functools.partial(nn.EmbeddingBag, WORDS, 4, mode=mode, sparse=sparse)
    return front(
        lambda: Front(bag()),
        words,
        lambda: Front(WrittenBag(mode)),
        smooth=mode != "max",
        refusable=sparse,
    )


FRONTS = {
    "vectors": front(lambda: Front(nn.Linear(FEATURES, 4)), vectors),
    "frozen vectors": front(lambda: Front(nn.Linear(FEATURES, 4).requires_grad_(False)), vectors),
    "sequence": front(lambda: Front(nn.Conv1d(1, 2, 3)), lambda n, g: vectors(n, g)[:, None]),
    "images": front(
        lambda: Front(nn.Conv2d(2, 2, 3, padding=1)),
        lambda n, g: torch.randn(n, 2, 4, 4, generator=g, dtype=torch.float64),
    ),
    "images, channels last": front(
        lambda: Front(nn.Conv2d(2, 2, 3)),
        lambda n, g: torch.randn(n, 2, 5, 5, generator=g, dtype=torch.float64).contiguous(
            memory_format=torch.channels_last
        ),
    ),
    "embedding": front(embedded(), words),
    "embedding, padded": front(Padded, padded_words),
    "embedding, sparse": front(embedded(sparse=True), words, embedded(), refusable=True),
    "embedding, by frequency": front(
        embedded(scale_grad_by_freq=True), words, embedded(), refusable=True
    ),
    "embedding, padding masked": front(PaddedEncoder, padded_words),
    "bag of means": bagged("mean"),
    "bag of sums": bagged("sum"),
    "bag of maxima": bagged("max"),
    "sparse bag": bagged("mean", sparse=True),
    "names": front(
        ByName, lambda n, g: dict(left=vectors(n, g)[:, :3], right=vectors(n, g)[:, 3:])
    ),
    "tuple": front(ByName, lambda n, g: (vectors(n, g)[:, :3], vectors(n, g)[:, 3:])),
}


# Heads: from (N, 16) to logits (N, 3) -------------------------------------------------------------


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale = (
            nn.Parameter(torch.randn(CLASSES, 4)),
            nn.Parameter(torch.tensor(3.0)),
        )

    def forward(self, x):
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres, self.distance = nn.Parameter(torch.randn(CLASSES, 4)), nn.PairwiseDistance()

    def forward(self, x):
        return -self.distance(x[:, None], self.centres[None])


class Alike(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres, self.likeness = (
            nn.Parameter(torch.randn(CLASSES, 4)),
            nn.CosineSimilarity(dim=2),
        )

    def forward(self, x):
        return 4 * self.likeness(x[:, None], self.centres[None])


class ByPixel(nn.Module):
    "A convolution whose mean over the image is the logits."

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, CLASSES, 1)

    def forward(self, x):
        return self.conv(x.view(len(x), 1, 2, 2).sin()).mean((2, 3))


class Named(nn.Linear):
    "Returns an object whose logits are what counts."

    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x), other=None)


HEADS = {
    "linear": lambda: nn.Linear(4, CLASSES),
    "linear without bias": lambda: nn.Linear(4, CLASSES, bias=False),
    "hidden layer": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, CLASSES)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, CLASSES)),
    "cosine": Cosine,
    "prototypes": Prototypes,
    "cosine similarity": Alike,
    "conv": ByPixel,
    "object": lambda: Named(4, CLASSES),
}


class Network(nn.Module):
    "A front, blocks and a head; `twin`: the same function by other operations."

    def __init__(self, front_name, block_names, head_name, after=None, twin=False):
        super().__init__()
        which = "twin" if twin else "build"
        self.front = getattr(FRONTS[front_name], which)()
        self.blocks = nn.ModuleList(
            Block(BLOCKS[b].shape, getattr(BLOCKS[b], which)()) for b in block_names
        )
        self.head, self.after = HEADS[head_name](), after

    def forward(self, *inputs, **named):
        x = self.front(*inputs, **named)
        for block in self.blocks:
            x = block(x)
        out = self.head(project(x, 4))
        if self.after is None:
            return out
        return self.after(getattr(out, "logits", out))


def network(*parts, seed=0, twin=False, **more):
    "In float64 and evaluation mode; twins have the same weights."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(*parts, twin=twin, **more).double().eval()


# Losses -------------------------------------------------------------------------------------------


def labels(y, g):
    return y


def some_ignored(y, g):
    return y.masked_fill(torch.rand(len(y), generator=g) < 0.4, -100)


def soft(y, g):
    return torch.rand(len(y), CLASSES, generator=g, dtype=torch.float64).softmax(1)


def real(y, g):
    return (
        F.one_hot(y, CLASSES).double()
        + torch.randn(len(y), CLASSES, generator=g, dtype=torch.float64) / 2
    )


def several(y, g):
    return ((F.one_hot(y, CLASSES) + (torch.rand(len(y), CLASSES, generator=g) < 0.3)) > 0).double()


def signs(y, g):
    return several(y, g) * 2 - 1


def log_softmax(z):
    return z.log_softmax(1)


WEIGHT = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64)
POSITIVE = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)


def focal(z, y):
    ce = F.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def weighted(z, y):
    return F.cross_entropy(z, y, weight=WEIGHT)


def ignoring(z, y):
    return F.cross_entropy(z, y)


def summed_up(z, y):
    return F.cross_entropy(z, y, reduction="sum")


class OwnFocal(nn.CrossEntropyLoss):
    "Each image weighs by how wrong it is; the mean over images."

    def forward(self, z, y):
        ce = F.cross_entropy(z, y, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


class OwnWeighted(nn.CrossEntropyLoss):
    "Divides by the number of images, not by the sum of their weights."

    def forward(self, z, y):
        return F.cross_entropy(z, y, weight=self.weight, reduction="sum") / len(y)


class OwnSum(nn.CrossEntropyLoss):
    "Adds, although its reduction says mean."

    def forward(self, z, y):
        return F.cross_entropy(z, y, reduction="sum")


class OwnNothing(nn.CrossEntropyLoss):
    "A subclass that changes nothing."


def written_margin(p=1, margin=1.0, weight=None, reduction="mean"):
    "nn.MultiMarginLoss by plain operations."

    def f(z, y):
        gaps = (margin - z.gather(1, y[:, None]) + z).clamp(min=0) ** p
        if weight is not None:
            gaps = gaps * weight[y][:, None]
        each = (gaps * (1 - F.one_hot(y, z.shape[1]))).sum(1) / z.shape[1]
        return each.mean() if reduction == "mean" else each.sum()

    return f


def loss(make, targets, *, after=None, twin=None, told=None, unknown=False, smooth=True):
    """A kind of loss.

    after: what the network ends with; told: the `reduction` given to the operator; unknown: what it
    divides by cannot be known from the loss, so that several batches may be refused. The others
    mean what they mean for `entry`.
    """
    return SimpleNamespace(
        make=make,
        targets=targets,
        after=after,
        twin=make if twin is None else twin,
        told=told,
        unknown=unknown,
        smooth=smooth,
        hard=twin is not None,
        refusable=twin is not None,
    )


LOSSES = {
    "cross-entropy": loss(nn.CrossEntropyLoss, labels),
    "sum": loss(lambda: nn.CrossEntropyLoss(reduction="sum"), labels),
    "weights": loss(lambda: nn.CrossEntropyLoss(WEIGHT), labels),
    "weights, sum": loss(lambda: nn.CrossEntropyLoss(WEIGHT, reduction="sum"), labels),
    "ignored": loss(nn.CrossEntropyLoss, some_ignored),
    "ignored class": loss(lambda: nn.CrossEntropyLoss(ignore_index=1), labels),
    "weights, ignored": loss(lambda: nn.CrossEntropyLoss(WEIGHT), some_ignored),
    "a weight of zero": loss(
        lambda: nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)), labels
    ),
    "smoothed": loss(lambda: nn.CrossEntropyLoss(label_smoothing=0.2), labels),
    "smoothed, weights": loss(lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), labels),
    "smoothed, weights, ignored, sum": loss(
        lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1, reduction="sum"), some_ignored
    ),
    "smoothed, weights, ignored": loss(
        lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), some_ignored
    ),
    "soft targets": loss(nn.CrossEntropyLoss, soft),
    "soft targets, weights": loss(lambda: nn.CrossEntropyLoss(WEIGHT), soft),
    "soft targets, sum": loss(lambda: nn.CrossEntropyLoss(reduction="sum"), soft),
    "function": loss(lambda: F.cross_entropy, labels),
    "partial, weights": loss(lambda: functools.partial(F.cross_entropy, weight=WEIGHT), labels),
    "partial, ignored": loss(lambda: functools.partial(F.cross_entropy, ignore_index=2), labels),
    "partial, sum": loss(lambda: functools.partial(F.cross_entropy, reduction="sum"), labels),
    "nll": loss(nn.NLLLoss, labels, after=log_softmax),
    "nll, weights, ignored": loss(lambda: nn.NLLLoss(WEIGHT), some_ignored, after=log_softmax),
    "nll, sum": loss(lambda: nn.NLLLoss(reduction="sum"), labels, after=log_softmax),
    "squares": loss(nn.MSELoss, real),
    "squares, sum": loss(lambda: nn.MSELoss(reduction="sum"), real),
    "smooth l1": loss(lambda: nn.SmoothL1Loss(beta=0.7), real, smooth=False),
    "smooth l1, sum": loss(lambda: nn.SmoothL1Loss(reduction="sum"), real, smooth=False),
    "huber": loss(lambda: nn.HuberLoss(delta=0.6), real, smooth=False),
    "absolute": loss(nn.L1Loss, real, smooth=False),
    "binary": loss(nn.BCEWithLogitsLoss, several),
    "binary, weight": loss(lambda: nn.BCEWithLogitsLoss(weight=POSITIVE), several),
    "binary, positive weight": loss(lambda: nn.BCEWithLogitsLoss(pos_weight=POSITIVE), several),
    "binary, sum": loss(
        lambda: nn.BCEWithLogitsLoss(pos_weight=POSITIVE, reduction="sum"), several
    ),
    "binary of probabilities": loss(nn.BCELoss, several, after=torch.sigmoid),
    "soft margin": loss(nn.SoftMarginLoss, signs),
    "several labels": loss(nn.MultiLabelSoftMarginLoss, several),
    "several labels, weights, sum": loss(
        lambda: nn.MultiLabelSoftMarginLoss(POSITIVE, reduction="sum"), several
    ),
    "margin": loss(nn.MultiMarginLoss, labels, twin=written_margin, smooth=False),
    "margin, squared, weights": loss(
        lambda: nn.MultiMarginLoss(p=2, weight=WEIGHT),
        labels,
        twin=lambda: written_margin(2, weight=WEIGHT),
        smooth=False,
    ),
    "margin, sum": loss(
        lambda: nn.MultiMarginLoss(p=2, reduction="sum"),
        labels,
        twin=lambda: written_margin(2, reduction="sum"),
        smooth=False,
    ),
    "divergence": loss(lambda: nn.KLDivLoss(reduction="batchmean"), soft, after=log_softmax),
    "divergence, mean": loss(nn.KLDivLoss, soft, after=log_softmax),
    "divergence, sum": loss(lambda: nn.KLDivLoss(reduction="sum"), soft, after=log_softmax),
    "poisson": loss(nn.PoissonNLLLoss, several),
    "focal": loss(FocalLoss, labels),
    "focal function": loss(lambda: focal, labels),
    "focal function, told": loss(lambda: focal, labels, told="mean"),
    "own sum": loss(lambda: summed_up, labels),
    "own sum, told": loss(lambda: summed_up, labels, told="sum"),
    "own weights": loss(lambda: weighted, labels, unknown=True),
    "own weights, told": loss(lambda: weighted, labels, told="mean", unknown=True),
    "own ignoring": loss(lambda: ignoring, some_ignored, unknown=True),
    "subclass, focal": loss(OwnFocal, labels, unknown=True),
    "subclass, by images": loss(lambda: OwnWeighted(WEIGHT), labels, unknown=True),
    "subclass, adds": loss(OwnSum, labels, unknown=True),
    "subclass": loss(OwnNothing, labels, unknown=True),
}


# The truth ----------------------------------------------------------------------------------------


def call(net, state, X):
    if isinstance(X, dict):
        out = torch.func.functional_call(net, state, (), X)
    else:
        out = torch.func.functional_call(net, state, tuple(X) if isinstance(X, tuple) else (X,))
    return getattr(out, "logits", out)


class Written(TorchFunctionMode):
    """Formulas where PyTorch's own second derivative is wrong.

    That of the fused weight norm is not symmetric; that of instance norm is wrong for one image
    whose gradient lies with its channels last.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._weight_norm:
            return weight_norm_written(*args)
        if func is torch.instance_norm:
            return instance_norm_written(*args)
        return func(*args, **(kwargs or {}))


def weight_norm_written(v, g, dim):
    axes = list(range(v.ndim)) if dim == -1 else [i for i in range(v.ndim) if i != dim]
    return v * g / v.square().sum(axes, keepdim=True).sqrt()


def instance_norm_written(x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn):
    axes, shape = list(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    if use_input_stats:
        m = x.mean(axes, keepdim=True)
        s = (x - m).square().mean(axes, keepdim=True)
    else:
        m, s = mean.view(shape), var.view(shape)
    out = (x - m) / (s + eps).sqrt()
    if weight is not None:
        out = out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


class Truth:
    "Of all data as one batch, by PyTorch's double backward and nothing of ours."

    def __init__(self, net, loss_fn, X, y):
        self.net, self.loss_fn, self.X, self.y = net, loss_fn, X, y
        named = {k: p for k, p in net.named_parameters() if p.requires_grad}
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        self.theta = torch.cat([p.detach().flatten() for p in named.values()])

    def logits(self, theta):
        parts = theta.split([s.numel() for s in self.shapes])
        with sdpa_kernel(SDPBackend.MATH), Written():  # the fused kernels have no second derivative
            return call(
                self.net, {k: p.view(s) for k, p, s in zip(self.names, parts, self.shapes)}, self.X
            )

    def loss(self, theta):
        return self.loss_fn(self.logits(theta), self.y)

    def gradient(self, theta=None):
        t = (self.theta if theta is None else theta).clone().requires_grad_()
        value = self.loss(t)
        if not value.requires_grad:
            return torch.zeros_like(t)
        return torch.autograd.grad(value, t)[0]

    def hessian(self):
        t = self.theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(t), t, create_graph=True)
        if not g.requires_grad:
            return torch.zeros(len(t), len(t), dtype=t.dtype)

        def row(x):
            return torch.autograd.grad(
                x, t, retain_graph=True, allow_unused=True, materialize_grads=True
            )[0]

        return torch.stack([row(x) for x in g])

    def gauss_newton(self):
        "J'MJ: J the derivative of all logits, M the Hessian of the loss for them."
        t = self.theta.clone().requires_grad_()
        z = self.logits(t)
        J = torch.stack([torch.autograd.grad(x, t, retain_graph=True)[0] for x in z.flatten()])
        M = torch.autograd.functional.hessian(
            lambda flat: self.loss_fn(flat.view_as(z), self.y), z.detach().flatten()
        )
        return J.T @ M @ J

    def curvature(self, v, step=1e-7):
        "H v by differences of gradients: knows nothing of second derivatives."
        up, down = (self.gradient(self.theta + s * step * v) for s in (1, -1))
        return (up - down) / (2 * step)

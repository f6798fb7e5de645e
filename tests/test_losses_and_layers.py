"""What a loss divides by, and layers that are computed twice, compiled, transformed or by others.

Products are right, or refused with the reason.
"""

import functools
import warnings

import layer_kinds as kinds
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from hessian_surgery_nb.foundations.datasets import torchvision_part
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs

CE = nn.CrossEntropyLoss()
F64 = torch.float64
EXACT = 1e-8  # two ways of the same derivatives in float64
ROUGH = 1e-5  # differences of gradients in float64
WEIGHT = torch.tensor([1.0, 4.0, 10.0], dtype=F64)


def images(n=24, seed=0):
    return torch.randn(
        n, 6, generator=torch.Generator().manual_seed(seed), dtype=F64
    ), torch.arange(n) % 3


def made(build, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double().eval()


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def directions(n):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def off(a, b):
    return ((a - b).norm() / (b.norm() + 1e-12)).item()


def product(op):
    "With three vectors; None where it is refused, and then with a reason."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return op @ directions(op.shape[0])
        except InputError as e:
            assert len(str(e).split()) > 8 and ";" in str(e), e
            return None


# What a loss divides by ---------------------------------------------------------------------------


def by_weight(z, y):
    return F.cross_entropy(z, y, weight=WEIGHT)


def by_kept(z, y):
    return F.cross_entropy(z, y)


def by_images(z, y):
    return F.cross_entropy(z, y, weight=WEIGHT, reduction="sum") / len(y)


def added(z, y):
    return F.cross_entropy(z, y, reduction="sum")


def mean_of_each(z, y):
    return F.cross_entropy(z, y, reduction="none").mean()


def shifted(z, y):
    return F.cross_entropy(z, y) + 1.0


def tenth(z, y):
    return F.cross_entropy(z, y, reduction="sum") / 10


def by_own_weights(z, y):
    w = 1.0 + y.double()
    return (w * F.cross_entropy(z, y, reduction="none")).sum() / w.sum()


def by_positives(z, y):
    "As detectors do: divided by how many images are not of class 0."
    return F.cross_entropy(z, y, reduction="sum") / (y > 0).sum().clamp(min=1)


def by_masked(z, y):
    keep = (y != 2).double()
    return (keep * F.cross_entropy(z, y.clamp(max=1), reduction="none")).sum() / keep.sum().clamp(
        min=1
    )


def of_the_hardest(z, y):
    return F.cross_entropy(z, y, reduction="none").topk(max(1, len(y) // 2)).values.mean()


def with_mean_logit(z, y):
    return F.cross_entropy(z, y) + z.mean().square()


def root(z, y):
    return F.cross_entropy(z, y).sqrt()


def of_the_worst(z, y):
    return F.cross_entropy(z, y, reduction="none").max()


def spread(z, y):
    return F.cross_entropy(z, y) + z.softmax(1).mean(0).square().sum()


def by_confidence(z, y):
    w = z.detach().softmax(1).amax(1)
    return (w * F.cross_entropy(z, y, reduction="none")).sum() / w.sum()


def dice(z, y):
    p, t = z.softmax(1), F.one_hot(y, 3).to(z)
    return 1 - (2 * (p * t).sum(0) / (p + t).sum(0).clamp(min=1e-9)).mean()


class WithWeights(nn.Module):
    "A module of one's own around PyTorch's."

    def __init__(self):
        super().__init__()
        self.inner, self.reduction = nn.CrossEntropyLoss(weight=WEIGHT), "mean"

    def forward(self, z, y):
        return self.inner(z, y)


class Callable:
    def __call__(self, z, y):
        return by_weight(z, y)


class NllByImages(nn.NLLLoss):
    def forward(self, z, y):
        return F.nll_loss(z.log_softmax(1), y, weight=self.weight, reduction="sum") / len(y)


class CallsItself(nn.CrossEntropyLoss):
    "Changes the call, not the forward."

    def __call__(self, z, y):
        return F.cross_entropy(z, y, weight=WEIGHT, reduction="sum") / len(y)


class Focal(nn.CrossEntropyLoss):
    def forward(self, z, y):
        ce = F.cross_entropy(z, y, reduction="none", ignore_index=self.ignore_index)
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


class Smoothed(nn.CrossEntropyLoss):
    "Writes its own smoothing, and divides by all images, ignored ones too."

    def forward(self, z, y):
        kept = y != self.ignore_index
        log_p = z.log_softmax(1)
        own = -log_p.gather(1, y.clamp(min=0)[:, None])[:, 0]
        return ((0.9 * own - 0.1 * log_p.mean(1)) * kept).sum() / len(y)


class SubclassAsItIs(nn.CrossEntropyLoss):
    "Nothing of it is its own."


def hooked():
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    loss.register_forward_hook(lambda m, args, out: out * WEIGHT[args[1]].sum() / len(args[1]))
    return loss


def patched():
    loss = nn.CrossEntropyLoss()
    loss.forward = by_images
    return loss


LOSSES = {
    "weights": by_weight,
    "plain": by_kept,
    "by images": by_images,
    "adds": added,
    "each": mean_of_each,
    "shifted": shifted,
    "a tenth of the sum": tenth,
    "own weights": by_own_weights,
    "positives": by_positives,
    "masked": by_masked,
    "hardest": of_the_hardest,
    "mean logit": with_mean_logit,
    "root": root,
    "worst": of_the_worst,
    "spread": spread,
    "confidence": by_confidence,
    "dice": dice,
    "module": WithWeights(),
    "callable": Callable(),
    "partial": functools.partial(by_weight),
    "partial of PyTorch's": functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=-100),
    "subclass of nll": NllByImages(weight=WEIGHT),
    "subclass that calls itself": CallsItself(),
    "subclass, focal": Focal(),
    "subclass, smoothed": Smoothed(),
    "subclass": SubclassAsItIs(weight=WEIGHT),
    "hooked": hooked(),
    "patched": patched(),
    "PyTorch's": nn.CrossEntropyLoss(weight=WEIGHT),
}
MEANS = (
    "plain",
    "each",
    "shifted",
    "by images",
    "adds",
    "subclass",
    "PyTorch's",
    "partial of PyTorch's",
)  # no way to be unsure of these
IGNORING = {
    "weights",
    "plain",
    "module",
    "callable",
    "partial",
    "partial of PyTorch's",
    "subclass",
    "subclass, smoothed",
    "PyTorch's",
    "each",
}


def labels(how, y):
    if how == "mixed":
        return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    y = y.sort().values
    if how == "ignored later":
        y[-6:-1] = -100
    if how == "a batch ignored":
        y[8:16] = -100
    return y


def batches(X, y, *sizes):
    return list(zip(X.split(sizes), y.split(sizes)))


CASES = [
    (name, how)
    for name in LOSSES
    for how in ("mixed", "in order", "ignored later", "a batch ignored")
    if "ignored" not in how or name in IGNORING
]


@pytest.mark.parametrize("name, how", CASES, ids=[f"{n}, {h}" for n, h in CASES])
def test_what_a_loss_divides_by(name, how):
    "In batches, in pieces, from a loader, told or not: that of the loss taken whole, or none."
    loss, (X, y) = LOSSES[name], images()
    y = labels(how, y)
    truth = kinds.Truth(made(mlp), loss, X, y)
    expected = truth.hessian() @ directions(53)
    value = truth.loss(truth.theta).item()
    ways = [
        (batches(X, y, 8, 8, 8), {}),
        (batches(X, y, 11, 3, 10), {}),
        ((X, y), dict(micro_batch=8)),
        ((X, y), dict(memory=1.0)),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=7), {}),
    ]
    for data, options in ways:
        for told in (None, "mean", "sum"):
            op = HessianOperator(made(mlp), loss, data, reduction=told, **options)
            found = product(op)
            if found is None:
                assert name not in MEANS or told is not None or len(options) or "ignored" in how
            else:
                assert off(found, expected) < EXACT, (told, options)
                assert abs(op.gradient()[0] - value) < 1e-10 * max(1.0, abs(value))
    whole = product(HessianOperator(made(mlp), loss, (X, y)))  # in one piece nobody need know
    assert whole is not None and off(whole, expected) < EXACT


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("mode", ["cached", "recomputed", "forward", "difference"])
def test_every_mode_asks(mode, kind):
    X, y = images()
    y = y.sort().values
    for loss in (by_weight, by_images, Focal(), of_the_hardest, NllByImages(weight=WEIGHT)):
        truth = kinds.Truth(made(mlp), loss, X, y)
        M = truth.hessian() if kind == "hessian" else truth.gauss_newton()
        found = product(
            HessianOperator(made(mlp), loss, batches(X, y, 8, 8, 8), mode=mode, kind=kind)
        )
        assert found is None or off(found, M @ directions(53)) < (
            ROUGH if mode == "difference" else EXACT
        )


def test_targets_of_other_shapes():
    "A mean over places that are not ignored, and over entries of a table."
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(12, 2, 6, generator=g, dtype=F64), torch.randint(0, 3, (12, 6), generator=g)
    y[7:, 2:] = -100
    t = torch.rand(12, 3, 6, generator=g, dtype=F64)

    def net():
        return nn.Conv1d(2, 3, 3, padding=1)

    def weighted_squares(z, t):
        return ((z - t) ** 2 * torch.tensor([1.0, 2.0, 3.0], dtype=F64)[:, None]).mean()

    for loss, target in (
        (lambda z, y: F.cross_entropy(z, y), y),
        (CE, y),
        (nn.MSELoss(), t),
        (weighted_squares, t),
        (lambda z, t: F.mse_loss(z, t, reduction="sum"), t),
    ):
        H = kinds.Truth(made(net), loss, X, target).hessian()
        found = product(HessianOperator(made(net), loss, batches(X, target, 5, 4, 3)))
        assert found is None or off(found, H @ directions(len(H))) < EXACT
        assert found is not None or not isinstance(loss, nn.Module)


def test_a_refusal_can_be_followed():
    "The way out that it names works."
    X, y = images()
    y = y.sort().values
    loss = of_the_hardest
    with pytest.raises(InputError, match="single batch"):
        HessianOperator(made(mlp), loss, batches(X, y, 8, 8, 8)) @ directions(53)
    H = kinds.Truth(made(mlp), loss, X, y).hessian()
    assert (
        off(HessianOperator(made(mlp), loss, (X, y)) @ directions(53), H @ directions(53)) < EXACT
    )


# Computed a second time ---------------------------------------------------------------------------


class Twice(nn.Module):
    "A part of it is computed again in the backward pass, or, by hand, not."

    def __init__(self, how=None, inner=None):
        super().__init__()
        self.a, self.b, self.head, self.how = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), how
        self.inner = nn.Tanh() if inner is None else inner

    def part(self, t):
        return torch.tanh(self.b(self.inner(self.a(t))))

    def named(self, *, t):
        return self.part(t)

    def forward(self, x):
        if self.how is None:
            return self.head(self.part(x))
        if self.how == "plain":
            return self.head(checkpoint(self.part, x, use_reentrant=False))
        if self.how == "reentrant":
            return self.head(checkpoint(self.part, x, use_reentrant=True))
        if self.how == "by name":
            return self.head(checkpoint(self.named, t=x, use_reentrant=False))
        if self.how == "in a row":
            return self.head(
                torch.tanh(
                    checkpoint_sequential(
                        nn.Sequential(self.a, self.inner, self.b), 2, x, use_reentrant=False
                    )
                )
            )
        if self.how == "within another":
            return checkpoint(
                lambda t: self.head(checkpoint(self.part, t, use_reentrant=False)),
                x,
                use_reentrant=False,
            )
        if self.how == "without its random state":
            return self.head(
                checkpoint(self.part, x, use_reentrant=False, preserve_rng_state=False)
            )
        if self.how == "unchecked":
            return self.head(
                checkpoint(self.part, x, use_reentrant=False, determinism_check="none")
            )
        if self.how == "not stopped early":
            return self.head(self.whole(x))
        with torch.autograd.graph.save_on_cpu():
            return self.head(self.part(x))

    def whole(self, x):
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            return checkpoint(self.part, x, use_reentrant=False)


WAYS = [
    "plain",
    "reentrant",
    "by name",
    "in a row",
    "within another",
    "without its random state",
    "unchecked",
    "not stopped early",
    "saved elsewhere",
]


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("how", WAYS)
def test_computed_twice(how, kind):
    X, y = images()
    truth = kinds.Truth(made(Twice), CE, X, y)
    M = truth.hessian() if kind == "hessian" else truth.gauss_newton()
    for mode in ("auto", "cached", "recomputed", "forward", "difference"):
        for data in ((X, y), batches(X, y, 9, 15)):
            op = HessianOperator(made(lambda: Twice(how)), CE, data, mode=mode, kind=kind)
            found = product(op)
            rough = mode == "difference" or (found is not None and op.plan().mode == "difference")
            assert found is None or off(found, M @ directions(len(M))) < (
                ROUGH if rough else EXACT
            ), mode


class ConvNet(nn.Module):
    def __init__(self, how=None):
        super().__init__()
        self.body, self.head, self.how = (
            nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Softplus(), nn.Dropout(0.5)),
            nn.Linear(6, 3),
            how,
        )

    def forward(self, x):
        x = x.view(-1, 1, 2, 3)
        h = (
            self.body(x)
            if self.how is None
            else checkpoint(self.body, x, use_reentrant=self.how == "reentrant")
        )
        return self.head(h.flatten(1))


@pytest.mark.parametrize("how", ["plain", "reentrant"])
def test_convolutions_computed_twice(how):
    X, y = images()
    H = kinds.Truth(made(ConvNet), CE, X, y).hessian()
    for mode in ("auto", "cached", "recomputed", "forward", "difference"):
        found = product(
            HessianOperator(made(lambda: ConvNet(how)), CE, batches(X, y, 9, 15), mode=mode)
        )
        assert found is None or off(found, H @ directions(len(H))) < (
            ROUGH if mode == "difference" else EXACT
        ), mode


def test_a_dense_net_that_saves_memory():
    "torchvision's own use of checkpoints."

    def net(saves):
        return torchvision_part("models").DenseNet(
            growth_rate=2,
            block_config=(1, 1),
            num_init_features=4,
            bn_size=1,
            num_classes=3,
            memory_efficient=saves,
        )

    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(6, 3, 32, 32, generator=g, dtype=F64), torch.arange(6) % 3
    plain, saving = made(lambda: net(False)), made(lambda: net(True))
    truth = kinds.Truth(plain, CE, X, y)
    v = directions(len(truth.theta))[:, :1]
    theta = truth.theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(truth.loss(theta), theta, create_graph=True)
    (expected,) = torch.autograd.grad(slope @ v[:, 0], theta)
    assert off((HessianOperator(plain, CE, (X, y)) @ v)[:, 0], expected) < EXACT
    found = product_with(HessianOperator(saving, CE, (X, y)), v)
    assert found is None or off(found[:, 0], expected) < EXACT


def product_with(op, v):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return op @ v
        except InputError:
            return None


# Compiled -----------------------------------------------------------------------------------------


class CompiledPart(nn.Module):
    def __init__(self, compiled=True):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def act(t):
            return torch.tanh(t) * t

        self.act = torch.compile(act, backend="aot_eager") if compiled else act

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class CompiledMethod(CompiledPart):
    def __init__(self, compiled=True):
        super().__init__(False)
        if compiled:
            self.body = torch.compile(self.body, backend="aot_eager")

    def body(self, x):
        return self.act(self.a(x))

    def forward(self, x):
        return self.b(self.body(x))


class CompiledWithin(CompiledPart):
    "The call is compiled where it is made."

    def __init__(self, compiled=True):
        super().__init__(False)
        self.compiled = compiled

    def forward(self, x):
        return self.b(
            torch.compile(self.act, backend="aot_eager")(self.a(x))
            if self.compiled
            else self.act(self.a(x))
        )


def compiled_in_place(part=None):
    net = made(lambda: CompiledPart(False))
    (net if part is None else getattr(net, part)).compile(backend="aot_eager")
    return net


def compiled_layer():
    net = made(lambda: CompiledPart(False))
    net.a = torch.compile(net.a, backend="aot_eager")
    return net


COMPILED = {
    "in place": compiled_in_place,
    "a layer in place": lambda: compiled_in_place("a"),
    "a layer": compiled_layer,
    "a function": lambda: made(CompiledPart),
    "a method": lambda: made(CompiledMethod),
    "within forward": lambda: made(CompiledWithin),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    X, y = images()
    H = kinds.Truth(made(lambda: CompiledPart(False)), CE, X, y).hessian()
    for mode in ("auto", "cached", "forward"):
        net = COMPILED[name]()
        found = (
            product(HessianOperator(net, CE, (X, y), mode=mode))
            if name != "a layer"
            else refused_or(net, X, y, mode)
        )
        assert found is None or off(found, H @ directions(len(H))) < EXACT
        G = (
            product(HessianOperator(net, CE, (X, y), kind="gauss_newton"))
            if name != "a layer"
            else None
        )
        truth = kinds.Truth(made(lambda: CompiledPart(False)), CE, X, y)
        assert G is None or off(G, truth.gauss_newton() @ directions(len(H))) < EXACT


def refused_or(net, X, y, mode):
    try:
        op = HessianOperator(net, CE, (X, y), mode=mode)
    except InputError as e:
        assert "_orig_mod" in str(e)
        return None
    return product(op)


# Transforms inside --------------------------------------------------------------------------------


class Ensemble(nn.Module):
    def __init__(self, how=None):
        super().__init__()
        self.W, self.head, self.how = nn.Parameter(torch.randn(4, 5, 6) / 3), nn.Linear(5, 3), how

    def one(self, x, w):
        return torch.tanh(F.linear(x, w))

    def forward(self, x):
        if self.how == "of weights":
            h = torch.vmap(self.one, (None, 0))(x, self.W).mean(0)
        elif self.how == "of images":
            h = torch.stack(
                [torch.vmap(self.one, (0, None))(x[:, None], w)[:, 0] for w in self.W]
            ).mean(0)
        elif self.how == "of both":
            h = torch.vmap(lambda w: torch.vmap(lambda t: self.one(t[None], w)[0])(x))(self.W).mean(
                0
            )
        else:
            h = torch.stack([self.one(x, w) for w in self.W]).mean(0)
        return self.head(h)


class Convolved(nn.Module):
    "An ensemble of convolutions."

    def __init__(self, at_once=False):
        super().__init__()
        self.W, self.head, self.at_once = (
            nn.Parameter(torch.randn(3, 2, 1, 2, 2) / 2),
            nn.Linear(4, 3),
            at_once,
        )

    def forward(self, x):
        x = x.view(-1, 1, 2, 3)

        def one(w):
            return torch.tanh(F.conv2d(x, w)).flatten(1)

        h = torch.vmap(one)(self.W) if self.at_once else torch.stack([one(w) for w in self.W])
        return self.head(h.mean(0))


class Slope(nn.Module):
    "The derivative of a small function of the input, by torch.func or written out."

    def __init__(self, how=None):
        super().__init__()
        self.a, self.head, self.how = nn.Linear(6, 6), nn.Linear(6, 3), how

    def forward(self, x):
        h = self.a(x)

        def energy(t):
            return (torch.tanh(t) ** 2).sum()

        if self.how == "grad":
            return self.head(torch.func.grad(energy)(h))
        if self.how == "vjp":
            return self.head(torch.func.vjp(energy, h)[1](torch.ones((), dtype=h.dtype))[0])
        if self.how == "jvp":
            return self.head(
                torch.func.jvp(lambda t: torch.tanh(t) ** 2, (h,), (torch.ones_like(h),))[1]
            )
        if self.how == "jacobian":
            return self.head(torch.vmap(torch.func.jacrev(energy))(h))
        if self.how == "autograd":
            with torch.enable_grad():
                t = h if h.requires_grad else h.requires_grad_()
                return self.head(torch.autograd.grad(energy(t), t, create_graph=True)[0])
        t = torch.tanh(h)
        return self.head(2 * t * (1 - t**2))


class CallsFunctionally(nn.Module):
    "Calls a part of itself at other weights."

    def __init__(self, functional=False):
        super().__init__()
        self.body, self.scale, self.functional = (
            nn.Linear(6, 5),
            nn.Parameter(torch.tensor(1.3)),
            functional,
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        if not self.functional:
            return self.head(torch.tanh(F.linear(x, self.body.weight * self.scale, self.body.bias)))
        state = dict(weight=self.body.weight * self.scale, bias=self.body.bias)
        return self.head(torch.tanh(torch.func.functional_call(self.body, state, (x,))))


TRANSFORMS = {
    **{
        f"vmap {h}": (functools.partial(Ensemble, h), Ensemble)
        for h in ("of weights", "of images", "of both")
    },
    "vmap of convolutions": (lambda: Convolved(True), Convolved),
    **{
        h: (functools.partial(Slope, h), Slope)
        for h in ("grad", "vjp", "jvp", "jacobian", "autograd")
    },
    "functional_call": (lambda: CallsFunctionally(True), CallsFunctionally),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside(name):
    "By `auto` they are right; a mode chosen by hand may be refused."
    build, plain = TRANSFORMS[name]
    X, y = images()
    truth = kinds.Truth(made(plain), CE, X, y)
    H, G = truth.hessian(), truth.gauss_newton()
    V = directions(len(H))
    for data in ((X, y), batches(X, y, 9, 15)):
        for mode in ("auto", "cached", "recomputed", "forward", "difference"):
            op = HessianOperator(made(build), CE, data, mode=mode)
            found = product(op)
            assert found is not None or mode != "auto"
            assert found is None or off(found, H @ V) < (
                ROUGH if op.plan().mode == "difference" else EXACT
            ), mode
        found = product(HessianOperator(made(build), CE, data, kind="gauss_newton"))
        assert found is None or off(found, G @ V) < EXACT


# Functions by others ------------------------------------------------------------------------------


class ByAttribute(torch.autograd.Function):
    "Keeps its input as an attribute, and is right in both derivatives."

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        s = torch.sigmoid(ctx.x)
        return g * s * (1 + ctx.x * (1 - s))


class ByOutput(torch.autograd.Function):
    "Saves what it returns."

    @staticmethod
    def forward(x):
        return torch.exp(x / 3)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] / 3


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return torch.sin(x), torch.cos(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gs, gc):
        (x,) = ctx.saved_tensors
        return gs * torch.cos(x) - gc * torch.sin(x)


class Detached(torch.autograd.Function):
    "Right in the first derivative; its second takes what depends on x as fixed."

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)


class ByNumbers(torch.autograd.Function):
    "Its backward pass leaves PyTorch."

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(1 - torch.tanh(x.detach()).numpy() ** 2)


class Calls(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(6, 5), nn.Linear(5, 3), f

    def forward(self, x):
        return self.b(self.f(self.a(x)))


def twice_over(x):
    s, c = TwoOutputs.apply(x)
    return s * c + s


FUNCTIONS = {  # the function, the same by PyTorch, and whether its second derivative is right
    "by attribute": (ByAttribute.apply, F.silu, True),
    "by output": (ByOutput.apply, lambda x: torch.exp(x / 3), True),
    "two outputs": (twice_over, lambda x: torch.sin(x) * torch.cos(x) + torch.sin(x), True),
    "old": (kinds.Swish.apply, F.silu, True),
    "new": (kinds.Cube.apply, lambda x: x**3, True),
    "once": (kinds.Once.apply, torch.tanh, False),
    "detached": (Detached.apply, torch.tanh, False),
    "by NumPy": (ByNumbers.apply, torch.tanh, False),
}
SITUATIONS = {  # in some of these the curvature of the first images is 0
    "plain": CE,
    "no weight on two classes": nn.CrossEntropyLoss(
        weight=torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    ),
    "the first batch ignored": nn.CrossEntropyLoss(ignore_index=0),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_by_others(name, situation):
    f, by_torch, right = FUNCTIONS[name]
    loss, (X, y) = SITUATIONS[situation], images()
    y = y.sort().values
    truth = kinds.Truth(made(lambda: Calls(by_torch)), loss, X, y)
    H, V = truth.hessian(), directions(53)
    for mode in ("auto", "cached", "recomputed", "difference"):
        for data in ((X, y), batches(X, y, 8, 16)):
            op = HessianOperator(made(lambda: Calls(f)), loss, data, mode=mode)
            found = product(op)
            assert found is not None or mode != "auto" or not right
            assert found is None or off(found, H @ V) < (
                ROUGH if op.plan().mode == "difference" else EXACT
            ), mode
            assert found is None or not right or mode != "auto" or op.plan().mode != "difference", (
                "an exact way is there"
            )
    G = product(HessianOperator(made(lambda: Calls(f)), loss, (X, y), kind="gauss_newton"))
    assert G is None or off(G, truth.gauss_newton() @ V) < EXACT


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if FUNCTIONS[n][2]])
def test_functions_by_others_in_a_sure_network(name):
    "Float32 has little left of the curvature: no reason to doubt the function."
    f, by_torch, _ = FUNCTIONS[name]
    net, exact = made(lambda: Calls(f)).float(), made(lambda: Calls(by_torch))
    X, _ = images()
    for n in (net, exact):
        n.b.weight.data.mul_(100)
        n.b.bias.data.mul_(100)
    y = exact(X).argmax(1)
    H = kinds.Truth(exact, CE, X, y).hessian()
    found = HessianOperator(net, CE, (X.float(), y)) @ directions(53).float()
    # logits of hundreds have errors of 1e-4 in float32, probabilities below 1e-7 are lost beside 1
    assert (found.double() - H @ directions(53)).norm() < 1e-2 * (H @ directions(53)).norm() + 1e-4


# Layers -------------------------------------------------------------------------------------------


class Frequent(nn.Module):
    def __init__(self, bag=False, **how):
        super().__init__()
        self.e, self.h = (nn.EmbeddingBag if bag else nn.Embedding)(7, 4, **how), nn.Linear(4, 3)

    def forward(self, x):
        rows = self.e(x)
        return self.h(torch.tanh(rows if rows.ndim == 2 else rows.mean(1)))


class Bagged(Frequent):
    "A bag of sums by plain indexing."

    def forward(self, x):
        return self.h(torch.tanh(self.e.weight[x].sum(1)))


WORD_LAYERS = {
    "by frequency": (lambda: Frequent(scale_grad_by_freq=True), Frequent),
    "sparse": (lambda: Frequent(sparse=True), Frequent),
    "sparse bag": (lambda: Frequent(True, sparse=True, mode="sum"), Bagged),
    "bag by frequency": (lambda: Frequent(True, scale_grad_by_freq=True, mode="sum"), Bagged),
    "bag": (lambda: Frequent(True, mode="sum"), Bagged),
}


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("name", WORD_LAYERS)
def test_words(name, kind):
    "Gradients that are scaled by how often a word comes, or sparse, or of bags."
    build, plain = WORD_LAYERS[name]
    words, y = (
        torch.randint(0, 7, (24, 4), generator=torch.Generator().manual_seed(0)),
        torch.arange(24) % 3,
    )
    truth = kinds.Truth(made(plain), CE, words, y)
    M = truth.hessian() if kind == "hessian" else truth.gauss_newton()
    for mode in ("auto", "cached", "recomputed", "forward", "difference"):
        op = HessianOperator(made(build), CE, (words, y), mode=mode, kind=kind)
        found = product(op)
        rough = found is not None and op.plan().mode == "difference"
        assert found is None or off(found, M @ directions(len(M))) < (ROUGH if rough else EXACT), (
            mode
        )
        slope = refusable(op.gradient)
        assert slope is None or off(slope[1], truth.gradient()) < EXACT
    pairs = refusable(
        lambda: top_eigenpairs(HessianOperator(made(build), CE, (words, y), kind=kind), 2)
    )
    if pairs is not None and pairs.converged.all():
        assert (
            pairs.values - torch.linalg.eigvalsh(M).flip(0)[:2]
        ).abs().max() < 1e-2 * pairs.values[0]


def refusable(f):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return f()
        except InputError:
            return None


class ByVector(nn.Module):
    "Weights that are vectors, as torch.nn.functional.linear allows."

    def __init__(self, how):
        super().__init__()
        self.a, self.v, self.bias, self.head, self.how = (
            nn.Linear(2, 4),
            nn.Parameter(torch.randn(4)),
            nn.Parameter(torch.randn(())),
            nn.Linear(4, 3),
            how,
        )

    def score(self, h):
        if self.how == "vector":
            return F.linear(h, self.v)
        if self.how == "vector and bias":
            return F.linear(h, self.v, self.bias)
        if self.how == "vector of a row":
            return torch.stack([F.linear(row, self.v) for row in h])
        if self.how == "rows":
            return torch.stack([F.linear(row, self.v[None])[..., 0] for row in h])
        return (h * self.v).sum(-1) + (self.bias if self.how == "by hand, bias" else 0.0)

    def forward(self, x):
        h = torch.tanh(self.a(x.view(-1, 3, 2)))
        return self.head(
            (self.score(h).softmax(1)[..., None] * h).sum(1)
            + self.score(h).square().mean(1, keepdim=True)
        )


@pytest.mark.parametrize("how", ["vector", "vector and bias", "vector of a row", "rows"])
def test_linear_by_a_vector(how):
    X, y = images()
    try:
        made(lambda: ByVector(how))(X)
    except RuntimeError as error:  # a vector with a bias: since PyTorch 2.9
        pytest.skip(f"PyTorch {torch.__version__} itself refuses it: {error}")
    H = kinds.Truth(
        made(lambda: ByVector("by hand, bias" if "bias" in how else "by hand")), CE, X, y
    ).hessian()
    for mode in ("auto", "cached", "recomputed", "forward", "difference"):
        found = product(HessianOperator(made(lambda: ByVector(how)), CE, (X, y), mode=mode))
        assert found is not None and off(found, H @ directions(len(H))) < (
            ROUGH if mode == "difference" else EXACT
        )


class Hard(nn.Module):
    "Hard sigmoids as a layer, as functions, and written out."

    def __init__(self, f):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(6, 5), nn.Linear(5, 3), f

    def forward(self, x):
        return self.b(self.f(self.a(x) * 3))


HARD = {
    "layer": nn.Hardsigmoid(),
    "function": F.hardsigmoid,
    "in place": lambda t: F.hardsigmoid(t.clone(), inplace=True),
    "of torch": torch._C._nn.hardsigmoid,
    "hard swish": F.hardswish,
}


@pytest.mark.parametrize("name", HARD)
def test_hard_sigmoids(name):
    "Exact in every mode that differentiates, where the formula with relu6 is."
    X, y = images()

    def written(t):
        return F.relu6(t + 3) / 6 * (t if name == "hard swish" else 1.0)

    H = kinds.Truth(made(lambda: Hard(written)), CE, X, y).hessian()
    for mode in ("auto", "cached", "recomputed"):
        op = HessianOperator(made(lambda: Hard(HARD[name])), CE, batches(X, y, 9, 15), mode=mode)
        found = product(op)
        assert found is not None or (mode != "auto" and name == "of torch")
        assert found is None or off(found, H @ directions(len(H))) < (
            ROUGH if op.plan().mode == "difference" else EXACT
        )


def test_instance_norm_of_one_image():
    "One image at a time, before a convolution, is where PyTorch's own second derivative is wrong."
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(3, 2, 4, 4, generator=g, dtype=F64), torch.arange(3)

    def net():
        return nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.InstanceNorm2d(3, affine=True),
            nn.Conv2d(3, 2, 3),
            nn.Flatten(),
            nn.Linear(8, 3),
        )

    H = kinds.Truth(made(net), CE, X, y).hessian()
    for mode in ("auto", "cached", "recomputed", "forward"):
        for data in (batches(X, y, 1, 1, 1), batches(X, y, 1, 2)):
            assert (
                off(
                    HessianOperator(made(net), CE, data, mode=mode) @ directions(len(H)),
                    H @ directions(len(H)),
                )
                < EXACT
            )


def solved(x, A):
    return torch.linalg.solve(A @ A.T + torch.eye(6, dtype=x.dtype), x.T).T


def determined(x, A):
    return x * torch.linalg.slogdet(A @ A.T + torch.eye(6, dtype=x.dtype))[1]


class Algebra(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.A, self.head, self.f = nn.Parameter(torch.randn(6, 6) / 3), nn.Linear(6, 3), f

    def forward(self, x):
        return self.head(torch.tanh(self.f(x, self.A)))


@pytest.mark.parametrize("f", [solved, determined])
def test_linear_algebra_in_forward_mode(f):
    "PyTorch's forward derivative of their backward passes is wrong: noticed, or taken another way."
    X, y = images()
    H = kinds.Truth(made(lambda: Algebra(f)), CE, X, y).hessian()
    for mode in ("auto", "cached", "recomputed", "forward"):
        found = product(
            HessianOperator(made(lambda: Algebra(f)), CE, batches(X, y, 9, 15), mode=mode)
        )
        assert found is not None or mode == "forward"
        assert found is None or off(found, H @ directions(len(H))) < EXACT, mode


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_squares_in_forward_mode(how):
    "Tangents that PyTorch keeps as symbolic zeros are added like others."
    X, _ = images()
    t = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    loss = nn.MSELoss(reduction=how)
    H = kinds.Truth(made(mlp), loss, X, t).hessian()
    for options in (dict(micro_batch=5), {}):
        data = (X, t) if options else batches(X, t, 9, 15)
        assert (
            off(
                HessianOperator(made(mlp), loss, data, mode="forward", **options) @ directions(53),
                H @ directions(53),
            )
            < EXACT
        )

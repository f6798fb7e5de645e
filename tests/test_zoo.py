"""Networks that break naive code: each works, judged by dense Hessians, or is refused with the
reason.
"""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate

loss = nn.CrossEntropyLoss()


def mlp(*more):
    return nn.Sequential(nn.Linear(6, 5), *more, nn.Tanh(), nn.Linear(5, 3))


class Wrapped(nn.Module):
    def __init__(self, body, after):
        super().__init__()
        self.body, self.after = body, after

    def forward(self, x):
        return self.after(self.body(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(2, 4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.embed(x.view(-1, 3, 2))).chunk(3, -1)
        return self.head(
            F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1)
        )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Linear(2, 4),
            nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        return self.head(self.body(self.embed(x.view(-1, 3, 2))).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x.view(-1, 3, 2))[0][:, -1])


class Picked(nn.Module):
    "Registers whole numbers as a parameter, before the others."

    def __init__(self):
        super().__init__()
        self.which, self.body = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False), mlp()

    def forward(self, x):
        return self.body(x)[:, self.which]


class Mixed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 5).to(kind), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.to(self.kind))).to(self.b.weight.dtype))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head((x.to(torch.complex64) @ self.w).abs())


def frozen():
    net = mlp()
    return net[0].requires_grad_(False) and net


def batch_norm():
    net = mlp(nn.BatchNorm1d(5))
    net(torch.randn(20, 6))
    return net


WORK = {
    "batch norm": batch_norm,
    "dropout": lambda: mlp(nn.Dropout(0.5)),
    "tied weights": Tied,
    "frozen parameters": frozen,
    "fused attention": Attention,
    "encoder layer": Encoder,
    "in-place ReLU": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "whole-number parameter": Picked,
    "recurrent": Recurrent,
    "spectral norm": lambda: nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    "DataParallel": lambda: nn.DataParallel(mlp()),
}


def data(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(90, 6, generator=g, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=g, dtype=torch.float64)).argmax(1)
    return [(x[i : i + 30].to(dtype), y[i : i + 30]) for i in (0, 30, 60)]


def dense(net, x, y):
    "By PyTorch's own double backward, attention written out."
    names, ps = zip(
        *((k, p.detach().clone()) for k, p in net.named_parameters() if p.requires_grad)
    )
    split = [p.numel() for p in ps]

    def f(flat):
        return loss(
            torch.func.functional_call(
                net, {k: v.view_as(p) for k, v, p in zip(names, flat.split(split), ps)}, (x,)
            ),
            y,
        )

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(f, torch.cat([p.flatten() for p in ps]))


@pytest.mark.parametrize("name", WORK)
def test_it_works_and_is_left_as_it_was(name):
    torch.manual_seed(0)
    net = WORK[name]().double().eval()
    before, sets = copy.deepcopy(net.state_dict()), data(torch.float64)
    H = HessianOperator(net, loss, sets[0])
    columns = torch.stack([H @ e for e in torch.eye(H.shape[0], dtype=torch.float64)], 1)
    torch.testing.assert_close(
        columns, dense(getattr(net, "module", net), *sets[0]), rtol=1e-8, atol=1e-10
    )
    r = operate(
        net,
        loss,
        sets[0],
        sets[1],
        held_out=sets[2],
        config=SurgeryConfig(iterations=2, eps=0.3),
        progress=False,
    )
    assert list(net.state_dict()) == list(r.model.state_dict()) and all(
        torch.equal(before[k], v) and v.dtype == r.model.state_dict()[k].dtype
        for k, v in net.state_dict().items()
    )
    still = {k for k, p in net.named_parameters(remove_duplicate=False) if not p.requires_grad}
    assert all(torch.equal(before[k], v) for k, v in r.model.state_dict().items() if k in still)
    if name == "tied weights":
        assert r.model.a.weight is r.model.b.weight


def compiled():
    net = torch.compile(mlp(), backend="eager")
    return net.eval()


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp().eval(), {nn.Linear}, dtype=torch.qint8)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(mlp().eval(), torch.zeros(2, 6))


def of_inference():
    with torch.inference_mode():
        return mlp().eval()


REFUSED = {
    "batch norm in training": (
        lambda: batch_norm().train(),
        "batch norm in training mode; call model.eval",
    ),
    "dropout in training": (
        lambda: mlp(nn.Dropout(0.5)).train(),
        "active dropout; call model.eval",
    ),
    "complex": (Complex, r"must be real floating point\. w is torch.complex64"),
    "mixed types": (lambda: Mixed(torch.float64), "must share one dtype"),
    "half of it in bfloat16": (lambda: Mixed(torch.bfloat16), "must share one dtype"),
    "tuple": (lambda: Wrapped(mlp(), lambda z: (z, z)), "Got a tuple; pass forward="),
    "dict": (lambda: Wrapped(mlp(), lambda z: dict(logits=z)), "Got a dict; pass forward="),
    "compiled": (compiled, "pass its ._orig_mod"),
    "a compiled part": (lambda: Wrapped(compiled(), nn.Identity()), "Module 'body' is compiled"),
    "quantised": (quantised, "quantised weights cannot take small steps"),
    "scripted": (scripted, "pass the network that it was made from"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)), "run the network once"),
    "on no device": (lambda: nn.Linear(6, 3, device="meta"), "load a checkpoint"),
    "of inference mode": (of_inference, "outside of it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name):
    torch.manual_seed(0)
    make, says = REFUSED[name]
    net, sets = make(), data(torch.float32)
    if "in training" not in name:
        net.eval()
    with pytest.raises(InputError, match=says):
        operate(
            net,
            loss,
            sets[0],
            sets[1],
            held_out=sets[2],
            config=SurgeryConfig(iterations=1),
            progress=False,
        )


def test_what_a_refusal_advises_works():
    torch.manual_seed(0)
    sets = data(torch.float32)

    def run(net, **kw):
        return operate(
            net,
            loss,
            *sets[:2],
            held_out=sets[2],
            config=SurgeryConfig(iterations=1),
            progress=False,
            **kw,
        )

    run(compiled()._orig_mod)
    run(Wrapped(mlp(), lambda z: (z, z)).eval(), forward=lambda model, x: model(x)[0])
    run(
        Wrapped(mlp(), lambda z: dict(logits=z)).eval(), forward=lambda model, x: model(x)["logits"]
    )
    part = operate(
        Mixed(torch.float64).eval(),
        loss,
        *sets[:2],
        config=SurgeryConfig(iterations=1, params="b.*"),
        progress=False,
    )
    assert part.model.a.weight.dtype == torch.float64


class Sentences(nn.Module):
    "Takes words and a mask by name, and returns an object, as those of Hugging Face do."

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 5), nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask):
        x, mask = self.embed(input_ids), attention_mask[..., None]
        return SimpleNamespace(logits=self.head((x * mask).sum(1) / mask.sum(1)))


def test_dictionaries_of_words_from_a_loader():
    torch.manual_seed(0)
    rows = [
        (
            dict(input_ids=torch.randint(20, (6,)), attention_mask=(torch.arange(6) < n).long()),
            n % 3,
        )
        for n in torch.randint(1, 7, (90,)).tolist()
    ]
    sets = [torch.utils.data.DataLoader(rows[i : i + 30], batch_size=11) for i in (0, 30, 60)]
    net = Sentences().double().eval()

    def forward(model, x):
        return model(**x).logits

    H = HessianOperator(net, loss, sets[0], forward=forward)
    columns = torch.stack([H @ e for e in torch.eye(H.shape[0], dtype=torch.float64)], 1)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(*x).logits

    one = next(iter(torch.utils.data.DataLoader(rows[:30], batch_size=30)))
    torch.testing.assert_close(
        columns, dense(Whole(), tuple(one[0].values()), one[1]), rtol=1e-8, atol=1e-10
    )
    before = copy.deepcopy(net.state_dict())
    r = operate(
        net,
        loss,
        *sets[:2],
        held_out=sets[2],
        forward=forward,
        config=SurgeryConfig(iterations=2, eps=0.3),
        progress=False,
    )
    assert (
        all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        and r.history[0].moved > 0
    )

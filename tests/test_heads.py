"Which layer is the head, and what its rows are: found by what the forward pass does, or refused."

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import hessian_surgery_nb.comparison as comparison
from hessian_surgery_nb.baselines import head_of, post_hoc, tau_norm_state, tau_norm_sweep
from hessian_surgery_nb.comparison import compare
from hessian_surgery_nb.foundations.datasets import torchvision_part
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.networks import find_head
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.foundations.accuracy import class_report_of, predict

X = torch.randn(150, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(150) % 3
HESSIAN, TUNE, REPORT = ((X[i:j], Y[i:j]) for i, j in ((0, 30), (30, 90), (90, 150)))


class Net(nn.Module):
    "Two layers and whatever a test makes of them; `spare` is registered last and idle."

    def __init__(self, head=None, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.spare = nn.Linear(6, 5), head or nn.Linear(5, 3), nn.Linear(5, 3)
        self.after = after or nn.Identity()
        self.double().eval()

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        return self.after(self.head(self.features(x)))


class Twice(Net):
    def forward(self, x):
        return self.head(self.features(x)) + self.head(self.features(-x))


class TwiceFirst(Net):
    def forward(self, x):
        return self.head(self.features(x) + self.head(self.features(x)).mean(1, keepdim=True))


class Ensemble(Net):
    def forward(self, x):
        return self.head(self.features(x)) + self.spare(self.features(x))


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.spare.weight = self.head.weight

    def forward(self, x):
        return self.head(torch.tanh(self.spare(self.features(x)) @ self.spare.weight))


class TiedInTheForward(Net):
    def forward(self, x):
        return self.head(
            torch.tanh(F.linear(self.features(x), self.head.weight) @ self.head.weight)
        )


class Adapter(Net):
    def forward(self, x):
        return self.head(self.features(x)) + 0.1 * self.spare(self.features(x))


class Pooled(Net):
    def forward(self, x):
        return self.head(torch.stack([self.features(x), self.features(2 * x)], 1)).mean(1)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Functional(Net):
    def forward(self, x):
        return F.linear(self.features(x), self.head.weight)


def ln(dim):
    return lambda m: prune.ln_structured(m, "weight", 0.4, n=2, dim=dim)


def bias_pruned(m):
    return prune.l1_unstructured(m, "bias", 0.4)


SCALED = {
    "plain": lambda: Net(),
    "no bias": lambda: Net(nn.Linear(5, 3, bias=False)),
    "log-softmax": lambda: Net(after=nn.LogSoftmax(1)),
    "pruned": lambda: Net(prune.l1_unstructured(nn.Linear(5, 3), "weight", 0.3)),
    "pruned in columns": lambda: Net(ln(1)(nn.Linear(5, 3))),
    "pruned bias": lambda: Net(bias_pruned(nn.Linear(5, 3))),
    "pruned twice": lambda: Net(prune.random_unstructured(ln(1)(nn.Linear(5, 3)), "weight", 0.2)),
    "weight norm": lambda: Net(weight_norm(nn.Linear(5, 3))),
    "new weight norm": lambda: Net(parametrizations.weight_norm(nn.Linear(5, 3))),
    "frozen": lambda: frozen(Net()),
}
REFUSED = {
    "spectral": lambda: Net(spectral_norm(nn.Linear(5, 3))),
    "new spectral": lambda: Net(parametrizations.spectral_norm(nn.Linear(5, 3))),
    "orthogonal": lambda: Net(parametrizations.orthogonal(nn.Linear(5, 3))),
    "weight norm of all": lambda: Net(weight_norm(nn.Linear(5, 3), dim=None)),
    "weight norm of columns": lambda: Net(parametrizations.weight_norm(nn.Linear(5, 3), dim=1)),
    "twice": Twice,
    "twice, one after the other": TwiceFirst,
    "ensemble": Ensemble,
    "tied": Tied,
    "tied in the forward": TiedInTheForward,
    "adapter": Adapter,
    "pooled": Pooled,
    "temperature": lambda: Net(after=Scale(2.0)),
    "softmax": lambda: Net(after=nn.Softmax(1)),
    "clamped": lambda: Net(after=nn.Hardtanh(-20, 20)),
    "relu far off": lambda: Net(after=Shifted()),
    "cosine": lambda: Net(Cosine(5, 3)),
    "functional": Functional,
}


def frozen(m):
    return m.requires_grad_(False)


class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, z):
        return z * self.by


class Shifted(nn.Module):
    "Active far from where the logits of these images are."

    def forward(self, z):
        return torch.relu(z + 15) - 15


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_rows_are_scaled_as_the_network_uses_them(name, tau):
    net = SCALED[name]()
    with torch.no_grad():
        z = net(TUNE[0])
    W, b = net.head.weight.detach(), net.head.bias
    by_hand = net.features(TUNE[0]).detach() @ (
        W / W.norm(dim=1, keepdim=True).clamp(min=1e-12) ** tau
    ).T + (0.0 if b is None else b.detach())
    if name == "log-softmax":
        by_hand = by_hand.log_softmax(1)
    state = tau_norm_state(net, 3, tau, TUNE)
    assert torch.allclose(predict(net, TUNE, state=state)[0], by_hand, rtol=1e-9, atol=1e-9)
    assert torch.allclose(tau_norm_sweep(net, TUNE, z, [tau])[0][0], by_hand, rtol=1e-9, atol=1e-9)
    assert torch.equal(net(TUNE[0]), z)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_head_or_has_no_rows_is_refused(name):
    net = REFUSED[name]()
    z = predict(net, TUNE)[0]
    with pytest.raises(InputError, match="leave that method out"):
        head_of(net, 3, TUNE)
        tau_norm_sweep(net, TUNE, z, [1.0])
    assert "tau-norm" not in [r.name for r in post_hoc(net, TUNE, REPORT)]  # and the others go on


@pytest.mark.parametrize("name", SCALED)
def test_the_rival_reports_what_it_does(name):
    net = SCALED[name]()
    found = {r.name: r for r in post_hoc(net, TUNE, REPORT, steps=5)}
    tau = float(found["tau-norm"].setting.split()[-1])
    state = tau_norm_state(net, 3, tau, TUNE)
    for data, report in (
        (TUNE, found["tau-norm"].tuned_report),
        (REPORT, found["tau-norm"].report),
    ):
        assert torch.equal(
            class_report_of(*predict(net, data, state=state)).accuracy, report.accuracy
        )


def test_without_images_only_one_layer_may_be_meant():
    with pytest.raises(InputError, match="head, spare have 3 outputs; pass data"):
        find_head(Net(), 3)
    assert (
        find_head(Net(), 3, TUNE)[0] == "head"
        and find_head(nn.Sequential(nn.Linear(6, 3)), 3)[0] == "0"
    )
    with pytest.raises(InputError, match="the head's alone. head shares some with spare"):
        find_head(Tied(), 3, TUNE)


def test_an_alias_is_not_a_second_layer():
    net = Net()
    net.classifier = net.head
    assert find_head(net, 3, TUNE)[0] == "head"


def test_inputs_of_any_form_and_a_forward_of_ones_own():
    net = Net()
    data = [
        dict(x=x, y=y) and (dict(x=x), y)
        for x, y in ((TUNE[0][:7], TUNE[1][:7]), (TUNE[0][7:], TUNE[1][7:]))
    ]
    assert find_head(net, 3, data)[0] == "head"
    assert find_head(net, 3, TUNE, forward=lambda m, x: m.spare(m.features(x)))[0] == "spare"
    with pytest.raises(InputError, match="leave that method out"):
        find_head(net, 3, TUNE, forward=lambda m, x: 2 * m(x))


def test_googlenet_has_three_layers_of_ten_outputs_and_one_head():
    net = torchvision_part("models").googlenet(num_classes=10, init_weights=False).eval()
    data = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    assert find_head(net, 10, data)[0] == "fc"
    with pytest.raises(InputError, match="aux1.fc2, aux2.fc2, fc have 10 outputs|fc2"):
        find_head(net, 10)


@pytest.mark.parametrize(
    "net, has",
    [
        (Net, True),
        (functools.partial(Net, spectral_norm(nn.Linear(5, 3))), True),
        (Twice, False),
        (Adapter, False),
        (Tied, False),
    ],
)
def test_the_head_alone_moves_the_head_and_nothing_else(net, has, monkeypatch):
    moved, operate = [], comparison.operate

    def watched(model, *args, config, **kw):
        r = operate(model, *args, config=config, **kw)
        moved.append(
            (
                config.params,
                {
                    k.split(".")[0]
                    for (k, p), q in zip(model.named_parameters(), r.model.parameters())
                    if not torch.equal(p, q)
                },
            )
        )
        return r

    monkeypatch.setattr(comparison, "operate", watched)
    names = [
        r.name
        for r in compare(
            net(),
            nn.CrossEntropyLoss(),
            HESSIAN,
            TUNE,
            REPORT,
            config=SurgeryConfig(iterations=1, eps=0.3),
            controls=True,
            draws=1,
            progress=False,
        ).rivals
    ]
    assert ("head alone" in names) == has and [
        m <= {"head"} for p, m in moved if p == "head.*"
    ] == [True] * has


def test_a_run_of_another_network_is_not_compared():
    run = functools.partial(
        compare,
        loss_fn=nn.CrossEntropyLoss(),
        hessian_data=HESSIAN,
        sensitivity_data=TUNE,
        held_out=REPORT,
        config=SurgeryConfig(iterations=1, eps=0.3),
        controls=False,
        progress=False,
    )
    other = Net()
    with torch.no_grad():
        other.head.weight.neg_()
    surgery = run(Net()).surgery
    assert run(Net(), surgery=surgery).surgery is surgery
    with pytest.raises(InputError, match="a run of operate with these arguments"):
        run(other, surgery=surgery)

"The logit Jacobian on networks of every kind, and the front from end to end."

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from test_zoo import WORK
from torch import nn

from hessian_surgery_nb.baselines import class_accuracies
from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs
from hessian_surgery_nb.best_step import cross_fitted
from hessian_surgery_nb.linearised import linearised_operate
from hessian_surgery_nb.predicted_logits import LogitJacobian, logit_jacobian
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.foundations.accuracy import predict


class Squashed(torch.autograd.Function):
    "A function of one's own, without a forward derivative."

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class WithSquashed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(Squashed.apply(self.a(x)))


def test_without_a_forward_derivative_differences_are_taken():
    torch.manual_seed(0)
    net, (X, y) = (
        WithSquashed().double().eval(),
        (torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3),
    )
    V = torch.linalg.qr(torch.randn(53, 2, dtype=torch.float64))[0]
    with pytest.warns(UserWarning, match="forward derivative"):
        fell = logit_jacobian(net, V, (X, y), scheme="jvp", eps=1e-7)
    assert fell.scheme == "logits" and torch.equal(
        fell.jacobian, logit_jacobian(net, V, (X, y), eps=1e-7).jacobian
    )


@pytest.mark.parametrize("name", WORK)
def test_forward_mode_and_differences_agree(name):
    torch.manual_seed(0)
    net = WORK[name]().double().eval()
    X, y = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3
    before = copy.deepcopy(net.state_dict())
    pairs = top_eigenpairs(
        HessianOperator(net, nn.CrossEntropyLoss(), [(X[:23], y[:23]), (X[23:], y[23:])]),
        3,
        tol=1e-4,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exact = logit_jacobian(
            net, pairs, (X, y), scheme="jvp", eps=1e-7
        )  # the step counts only after a fall
    small = logit_jacobian(net, pairs, [(X[:7], y[:7]), (X[7:], y[7:])], eps=1e-7)
    fell = exact.scheme == "logits"
    assert fell == any("forward derivative" in str(w.message) for w in caught)
    assert (exact.jacobian - small.jacobian).abs().max() <= 1e-6 * small.jacobian.abs().max()
    assert (
        not fell
    )  # the encoder layer's fused evaluation, which has no forward derivative, is not taken
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


def test_a_price_that_is_overdrawn_stays_where_it_is():
    g = torch.Generator().manual_seed(0)
    for seed in range(6):
        z, J, y = (
            torch.randn(1500, 3, generator=g, dtype=torch.float64),
            torch.randn(1500, 3, 2, generator=g, dtype=torch.float64),
            torch.arange(1500) % 3,
        )
        step = cross_fitted(
            LogitJacobian(
                logits=z,
                jacobian=J,
                curvature=None,
                labels=y,
                eps=0.1,
                scheme="logits",
                num_passes=5,
            ),
            torch.tensor([0.01, 0.0], dtype=torch.float64),
            -0.0007,
            0.02,
            count=2,
            seed=seed,
        )
        assert 0 <= step.shrink <= 1


def test_a_front_is_what_it_says(digits):
    net, s = digits
    before = copy.deepcopy(net.state_dict())
    run = lambda **how: linearised_operate(
        net,
        nn.CrossEntropyLoss(),
        s.hessian.pair,
        s.sensitivity.pair,
        held_out=s.held_out.pair,
        prices=(0.0, 0.01, 0.03),
        progress=False,
        **how,
    )
    for how in (
        dict(rounds=2),
        dict(rounds=0),
        dict(rounds=1, config=SurgeryConfig(directions="class_means")),
        dict(rounds=1, config=SurgeryConfig(params="*.weight")),
    ):
        a, b = run(**how), run(**how)
        assert [p.alpha.tolist() for p in a.points] == [
            p.alpha.tolist() for p in b.points
        ]  # the same seed, the same result
        assert all(torch.equal(u, v) for u, v in zip(before.values(), net.state_dict().values()))
        start = a.points[0].sensitivity
        assert a.points[-1].sensitivity.sigma < start.sigma
        for p, q in zip(a.points, a.points[1:]):
            assert (
                q.sensitivity.overall >= start.overall - q.price - 1e-9
                and q.sensitivity.sigma <= p.sensitivity.sigma + 1e-12
                and q.passes >= p.passes
            )
            assert q.prediction_error <= max(0.005, 2 / 50 / 10**0.5) or torch.equal(
                p.alpha, q.alpha
            )
            z, y = predict(a.network(q.price), s.held_out.pair)
            with pytest.raises(InputError, match="0 or more"):
                a.at(-0.1)
            torch.testing.assert_close(class_accuracies(z, y), q.held_out.accuracy)
            assert torch.equal((z.argmax(1) == y).cpu(), q.correct)


def test_directions_of_ones_own(digits):
    net, s = digits
    sets, how = (
        (net, nn.CrossEntropyLoss(), s.hessian.pair, s.sensitivity.pair),
        dict(prices=(0.01,), rounds=1, progress=False),
    )
    found = top_eigenpairs(HessianOperator(net, nn.CrossEntropyLoss(), s.hessian.pair), 9, tol=1e-2)
    own, default = (
        linearised_operate(*sets, directions=found, **how),
        linearised_operate(*sets, **how),
    )
    assert (
        torch.equal(own.points[-1].alpha, default.points[-1].alpha)
        and own.points[-1].alpha.norm() > 0
    )
    with pytest.raises(InputError, match="a row for each of the"):
        linearised_operate(*sets, directions=found, config=SurgeryConfig(params="*.weight"), **how)


def test_the_command(lay_out, tmp_path, capsys):
    place = lay_out("front", train=40, test=40)
    flags = [
        "front",
        "--model",
        f"{place}/mine.py:net",
        "--weights",
        str(place / "w.safetensors"),
        "--data",
        str(place / "toys"),
        "--hessian",
        "60",
        "--rounds",
        "1",
        "--folds",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*flags, "--max-global-drop", "5"]) == 0
    said = capsys.readouterr().out
    r = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "At a price of 5 pp" in said and {f.name for f in (tmp_path / "out").iterdir()} == {
        "weights.safetensors",
        "result.json",
        "report.html",
    }
    assert [p["price_pp"] for p in r["points"]] == pytest.approx([0, 0, 0.25, 0.5, 1, 2, 5]) and r[
        "max_global_drop_pp"
    ] == 5
    assert (
        load_file(tmp_path / "out" / "weights.safetensors").keys()
        == load_file(place / "w.safetensors").keys()
    )
    assert main(flags) == 2 and "files are not replaced unasked" in capsys.readouterr().err
    assert (
        main([*flags, "--force", "--json"]) == 0
        and json.loads(capsys.readouterr().out)["max_global_drop_pp"] == 0.5
    )
    assert (
        main([*flags, "--force", "--prices", "-1"]) == 2
        and "percentage points, in 0..100" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "limit", [dict(protect={"0": 0.01}), dict(floors={"0": 0.5}), dict(max_global_drop=0.01)]
)
def test_a_front_refuses_limits_that_it_would_not_keep(digits, limit):
    net, s = digits
    sets = net, nn.CrossEntropyLoss(), s.hessian.pair, s.sensitivity.pair
    with pytest.raises(InputError, match="one limit, its prices"):
        linearised_operate(*sets, config=SurgeryConfig(**limit), progress=False)

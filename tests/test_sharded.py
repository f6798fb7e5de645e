"""Weights that are cut among processes: the numbers of one process, nothing whole anywhere, the
caller's network as it was, and an end where a process dies.
"""

import json
import signal
import time

import pytest
from test_distributed import by_hand

PATIENCE = 60  # seconds, from the death of a process to the end of the run

NETWORK = """
import copy
import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hessian_surgery_nb as hs
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.distributed import distributed
from hessian_surgery_nb.foundations.pieces import as_local, reshard

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def plain(width=12, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, width), *[Block(width) for _ in range(2)], nn.Linear(width, 4))
    return net.to(dtype).eval()


def cut(net, mesh):
    for block in net[1:3]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


generator = torch.Generator().manual_seed(0)
X = torch.randn(21, 5, generator=generator, dtype=torch.float64)
y = torch.randint(4, (21,), generator=generator)
ragged = [(X[:9], y[:9]), (X[9:10], y[9:10]), (X[10:], y[10:])]
"""

NUMBERS = (
    NETWORK
    + """
import json

from torch.utils._python_dispatch import TorchDispatchMode

from hessian_surgery_nb.foundations import krylov_basis


krylov_basis._DRAWN = 64  # random numbers at a time, fewer than the network has weights


class Longest(TorchDispatchMode):
    "The longest vector that anything gives back."

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.ndim:
                self.entries = max(self.entries, len(t))
        return out


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


weight = torch.linspace(0.5, 2, 4).double()
losses = dict(
    weighted=(nn.CrossEntropyLoss(weight=weight, ignore_index=3), None),
    sums=(nn.CrossEntropyLoss(reduction="sum"), None),
    own=(lambda z, y: nn.functional.cross_entropy(z, y), "mean"),
)
found = dict(products={}, gradients={}, modes={}, stated=[])
with distributed() as team:
    net = plain()
    mesh = init_device_mesh("cpu", (team.size,))
    shards = cut(plain(), mesh)
    before = [as_local(p).clone() for p in shards.parameters()]
    for p in shards.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in shards.parameters()]
    n = sum(p.numel() for p in net.parameters())
    v = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, (loss_fn, reduction) in losses.items():
        for mode in ("auto", "difference") if name == "weighted" else ("auto",):
            one = hs.HessianOperator(net, loss_fn, ragged, reduction=reduction)
            op = hs.HessianOperator(shards, loss_fn, ragged, mode=mode, reduction=reduction)
            assert one.shape == op.shape == (len(v), len(v))
            piece = op.team.shard(v)
            assert abs(len(piece) - n / team.size) < 60
            both = torch.stack([piece, 2 * piece], 1)
            product = op.team.gather(op @ piece, n)
            assert torch.equal((op @ both)[:, 0], op @ piece)
            found["products"][f"{name} {mode}"] = off(product, one @ v)
            found["modes"][f"{name} {mode}"] = op.plan().mode
            loss, gradient = op.gradient()
            expected_loss, expected = one.gradient()
            assert abs(loss - expected_loss) < 1e-12 * abs(expected_loss)
            found["gradients"][f"{name} {mode}"] = off(op.team.gather(gradient, n), expected)
            error = (product - one @ v).norm().item()
            found["stated"].append((error, op.product_error * v.norm().item()))
    one = hs.HessianOperator(net, losses["weighted"][0], ragged)
    values = hs.top_eigenpairs(one, 2, tol=1e-5)
    density = hs.spectral_density(one, num_probes=2, num_matvecs=5)
    longest = 0
    for mode in ("auto", "difference"):
        op = hs.HessianOperator(shards, losses["weighted"][0], ragged, mode=mode)
        with Longest() as seen:
            pairs = hs.top_eigenpairs(op, 2, tol=1e-5)
            again = hs.spectral_density(op, num_probes=2, num_matvecs=5)
        longest = max(longest, seen.entries)
        assert pairs.converged.all() and len(pairs.vectors) == op.team.local_size(n)
        whole = op.team.gather(pairs.vectors, n)
        residuals = (torch.stack([one @ column for column in whole.T], 1) - whole * pairs.values)
        true = residuals.norm(dim=0)
        found[f"pairs {mode}"] = dict(
            values=(pairs.values - values.values).abs().tolist(),
            allowed=(pairs.residuals + values.residuals).tolist(),
            true=true.tolist(),
            stated=pairs.residuals.tolist(),
            vectors=(whole - team.gather(values.vectors, n)).norm(dim=0).tolist(),
            nodes=(again.nodes - density.nodes).abs().max().item(),
            weights=(again.weights - density.weights).abs().max().item(),
        )
    warm = hs.top_eigenpairs(op, 2, tol=1e-5, v0=pairs)
    assert warm.converged.all()
    found["longest"] = longest / n
    check = hs.HessianOperator(shards, losses["weighted"][0], ragged).check()
    found["check"] = [check.symmetry, check.finite_difference]
    after = [as_local(p) for p in shards.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.grad is g for p, g in zip(shards.parameters(), kept))
    assert not any(type(m._parameters) is not dict for m in shards.modules())
    rows = team.rows(21)
    for p in shards.parameters():
        p.grad = None
    nn.functional.cross_entropy(shards(X[rows]), y[rows]).backward()  # it trains as before
    assert all(p.grad is not None for p in shards.parameters())
    if team.rank == 0:
        open(sys.argv[1], "w").write(json.dumps(found))
"""
)

REFUSED = (
    NETWORK
    + """
from hessian_surgery_nb.foundations.accuracy import predict


class Odd(nn.Linear):
    def forward(self, x):
        if len(x) == 3:
            raise ValueError("three are too many")
        return super().forward(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(5, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x[:, None])[0][:, 0]


class Together(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class Sines(nn.Linear):
    def forward(self, x):
        return Once.apply(super().forward(x))


def refused(words, call):
    try:
        call()
    except InputError as e:
        assert words in str(e), e
    else:
        raise AssertionError(f"not refused: {words}")


loss_fn = nn.CrossEntropyLoss()
with distributed() as team:
    mesh = init_device_mesh("cpu", (team.size,))
    net = cut(plain(), mesh)

    def operator(net, data=(X, y), **options):
        return hs.HessianOperator(net, loss_fn, data, **options)

    def product(net, data=(X, y), **options):
        op = operator(net, data, **options)
        return op @ torch.ones(op.team.local_size(op.shape[0]), dtype=op.dtype)

    refused("mode='recomputed' (exact)", lambda: operator(net, mode="cached"))
    refused("kind='hessian'", lambda: operator(net, kind="gauss_newton"))
    refused("precision='bf16'", lambda: operator(net, precision="bf16"))
    refused("takes it as it is", lambda: predict(net, (X, y)))
    refused("take pieces", lambda: operator(net).to_scipy())
    refused("entries", lambda: operator(net) @ torch.ones(3))
    together = fully_shard(Together(5, 4).double().eval(), mesh=mesh)
    refused("do not see each other", lambda: product(together))
    recurrent = fully_shard(Recurrent().double().eval(), mesh=mesh)
    refused("keeps a list", lambda: product(recurrent))
    short = (X[: 20 + team.rank], y[: 20 + team.rank])
    refused("the same data", lambda: product(net, [short]))
    more = [(X, y)] * (1 + team.rank)
    refused("the data have ended", lambda: product(net, more))

    torch.manual_seed(0)
    odd = fully_shard(Odd(5, 4).double().eval(), mesh=mesh)
    before = as_local(odd.weight).clone()
    refused("three are too many", lambda: product(odd, [(X[:12], y[:12]), (X[:6], y[:6])]))
    assert torch.equal(as_local(odd.weight), before) and type(odd._parameters) is dict
    product(odd, [(X[:12], y[:12])])
    odd(X[:4])

    torch.manual_seed(0)
    sines = fully_shard(Sines(5, 4).double().eval(), mesh=mesh)
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        op = operator(sines)
        op @ torch.ones(op.team.local_size(24), dtype=torch.float64)
    assert op.plan().mode == "difference" and 0 < op.product_error < 1e-6
    assert any("differences of gradients instead" in str(w.message) for w in said)
    refused("use mode='difference'", lambda: product(sines, mode="recomputed"))

    torch.manual_seed(0)
    layers = [nn.Linear(5, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 4)]
    kinks = nn.Sequential(*layers).eval()
    many = torch.randn(200, 5, generator=generator)
    fully_shard(kinks, mesh=mesh)
    refused("good to 10%", lambda: product(kinks, (many, many.argmax(1) % 4), mode="difference"))
refused("`with distributed():`", lambda: operator(net))
"""
)

DIES = (
    NETWORK
    + """
with distributed() as team:
    net = cut(plain(), init_device_mesh("cpu", (team.size,)))
    op = hs.HessianOperator(net, nn.CrossEntropyLoss(), ragged)
    piece = torch.ones(op.team.local_size(op.shape[0]), dtype=op.dtype)
    op @ piece
    open(f"{sys.argv[1]}/{team.rank}", "w").close()
    while True:
        op @ piece
"""
)


def finished(processes, timeout=400):
    said = [p.communicate(timeout=timeout) for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), said


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "job.py").write_text(NUMBERS)
    finished(
        by_hand(
            2,
            (
                folder / "job.py",
                folder / "found.json",
            ),
            start=(),
        )
    )
    return json.loads((folder / "found.json").read_text())


def test_products_and_gradients_are_those_of_one_process(found):
    assert max(found["gradients"].values()) < 1e-13
    assert len(found["products"]) == 4
    for name, error in found["products"].items():
        exact = name.endswith("auto")
        assert error < (1e-13 if exact else 1e-7), name
        assert found["modes"][name] == ("recomputed" if exact else "difference")
    for error, stated in found["stated"]:
        assert stated == 0 or error < 3 * stated
    symmetry, finite_difference = found["check"]
    assert symmetry < 1e-13 and finite_difference < 1e-6


@pytest.mark.parametrize("mode, close", [("auto", 1e-9), ("difference", 1e-5)])
def test_eigenpairs_and_densities_are_those_of_one_process(found, mode, close):
    pairs = found[f"pairs {mode}"]
    for name in ("values", "true"):
        allowed = "allowed" if name == "values" else "stated"
        assert all(a <= 1.1 * b + 1e-9 for a, b in zip(pairs[name], pairs[allowed])), name
    assert max(pairs["vectors"]) < close
    assert pairs["nodes"] < close and pairs["weights"] < close


def test_no_process_holds_a_whole_vector(found):
    assert found["longest"] < 0.6


def test_refusals_and_the_way_out(tmp_path):
    (tmp_path / "job.py").write_text(REFUSED)
    finished(by_hand(2, (tmp_path / "job.py",), start=()))


def test_a_process_that_dies_ends_the_run(tmp_path):
    (tmp_path / "job.py").write_text(DIES)
    processes = by_hand(
        2,
        (
            tmp_path / "job.py",
            tmp_path,
        ),
        start=(),
    )
    until = time.monotonic() + 120
    while not all((tmp_path / str(rank)).exists() for rank in (0, 1)):
        assert all(p.poll() is None for p in processes), [p.stderr.read() for p in processes]
        assert time.monotonic() < until
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    said = processes[0].communicate(timeout=PATIENCE)[1]
    assert processes[0].returncode != 0 and "needs all its processes to the end" in said

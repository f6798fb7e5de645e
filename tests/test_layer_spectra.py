"""Spectra of layers: blocks of the dense matrix, and a pass a step."""

import pytest
import torch
from torch import nn

from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.testbed import (
    dense_hessian,
    relative_error,
    tiny_data,
    tiny_mlp,
)
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.layer_spectra import BlockProducts, layer_spectra

LOSS = nn.CrossEntropyLoss()


class Counted:
    "Batches, and how often somebody began to read them."

    def __init__(self, batches):
        self.batches = batches
        self.visits = 0

    def __iter__(self):
        self.visits += 1
        return iter(self.batches)


def ragged():
    X, y = tiny_data(40)
    return X, y, [(X[:33], y[:33]), (X[33:], y[33:])]


def test_all_layers_share_a_pass():
    net = tiny_mlp((6, 7, 5, 3))
    X, y, batches = ragged()
    data = Counted(batches)
    op = HessianOperator(net, LOSS, data, mode="recomputed")
    op.observe()
    before = data.visits
    found = layer_spectra(op, num_probes=2, num_matvecs=6)
    assert found.num_passes == 12
    assert len(found) == 3
    # plan, and looks at what the network is before and after, come on top
    assert data.visits - before <= 12 + 8


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_complete_recurrences_have_every_eigenvalue(kind):
    net = tiny_mlp((6, 4, 3))
    X, y, batches = ragged()
    op = HessianOperator(net, LOSS, batches, kind=kind)
    full = op @ torch.eye(op.shape[0], dtype=torch.float64)
    if kind == "hessian":
        assert relative_error(full, dense_hessian(net, LOSS, X, y)) < 1e-13
    found = layer_spectra(op, num_probes=1, num_matvecs=100)
    start = 0
    for name, size in (("0", 28), ("2", 15)):
        block = full[start : start + size, start : start + size]
        truth = torch.linalg.eigvalsh(block)
        density = found[name]
        assert abs(density.edges[1] - truth[-1]) < 1e-10
        assert abs(density.edges[0] - truth[0]) < 1e-10
        # every node is an eigenvalue, and the largest of them all are there
        gaps = (density.nodes[0][:, None] - truth).abs().min(1).values
        assert gaps[density.weights[0] > 1e-8].max() < 1e-8
        start += size


def test_tied_frozen_and_named_blocks():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.head = nn.Linear(6, 3)
            self.head.bias.requires_grad_(False)

        def forward(self, x):
            return self.head(self.b(self.a(x).tanh()))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Tied().double().eval()
    X, y, batches = ragged()
    op = HessianOperator(net, LOSS, batches)
    products = BlockProducts(op)
    assert products.sizes == {"a": 42, "b": 6, "head": 18}
    H = dense_hessian(net, LOSS, X, y)
    v = torch.linspace(-1, 1, 42, dtype=torch.float64)
    assert relative_error(products.multiply({"a": v})["a"], H[:42, :42] @ v) < 1e-13
    by_glob = BlockProducts(op, {"biases": "*.bias"})
    assert by_glob.sizes == {"biases": 12}
    with pytest.raises(InputError, match="holds none"):
        BlockProducts(op, {"frozen": "head.bias"})


def test_the_same_seed_gives_the_same():
    net = tiny_mlp()
    _, _, batches = ragged()
    runs = [layer_spectra(HessianOperator(net, LOSS, batches), num_matvecs=5) for _ in range(2)]
    for name in runs[0].densities:
        assert torch.equal(runs[0][name].nodes, runs[1][name].nodes)
    other = layer_spectra(HessianOperator(net, LOSS, batches), num_matvecs=5, seed=1)
    assert not torch.equal(runs[0]["0"].nodes, other["0"].nodes)
    assert all(p.grad is None for p in net.parameters())

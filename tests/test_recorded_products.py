"""Products that are recorded, replayed and compiled, against those of the graph they came from."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import hessian_surgery_nb.foundations.compiled_products as compiled_products
import hessian_surgery_nb.foundations.recorded_products as recorded_products
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.compiled_products import CannotCompile
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.foundations.recorded_products import NotRecordable, record
from hessian_surgery_nb.foundations.testbed import dense_hessian, relative_error, tiny_data
from hessian_surgery_nb.foundations.testbed import tiny_mlp
from hessian_surgery_nb.hvp import HessianOperator

LOSS = nn.CrossEntropyLoss()
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


class Attention(nn.Module):
    "One of the layers whose second derivative has in-place steps and views."

    def __init__(self):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, words):
        return self.head(self.body(words).mean(1))


def problems():
    torch.manual_seed(0)
    y = torch.arange(12) % 3
    yield "transformer", Attention(), torch.randn(12, 5, 8), y
    yield "convolutions", digits_net(classes=3, width=2), torch.randn(12, 1, 8, 8), y
    yield "LSTM", Recurrent(), torch.randn(12, 5, 4), y
    table = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    yield "embedding", table, torch.randint(9, (12, 3)), y


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, words):
        return self.head(self.body(words)[0][:, -1])


def test_a_search_leaves_the_graph_and_a_density_gets_the_list(monkeypatch):
    monkeypatch.setattr(recorded_products, "RECORD_AT", 33)
    net, (X, y) = tiny_mlp(), tiny_data()
    op = HessianOperator(net, LOSS, (X, y), mode="cached")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    first = op @ v
    (product,) = op._mode().graphs.products
    for _ in range(2, recorded_products.RECORD_AT):
        assert torch.equal(op @ v, first)
    assert product.recording is None
    assert torch.equal(op @ v, first) and product.recording is not None
    assert torch.equal(op @ v, first)


@pytest.mark.parametrize("kind", ["transformer", "convolutions", "LSTM", "embedding"])
def test_a_replay_has_the_bits_of_the_graph(kind):
    net, X, y = next(p[1:] for p in problems() if p[0] == kind)
    net = net.double().eval()
    X = X.double() if X.is_floating_point() else X
    data = [(X[:7], y[:7]), (X[7:], y[7:])]
    op = HessianOperator(net, LOSS, data, mode="cached")
    vectors = torch.randn(op.shape[0], 4, dtype=torch.float64)
    found = [op @ v for v in vectors.T]
    kept = op._mode().graphs.products
    assert all(
        product.recording is not None for product in kept
    )  # from the second on in tests: conftest
    for v, product in zip(vectors.T, found):
        fresh = HessianOperator(net, LOSS, data, mode="cached") @ v  # by the graph
        assert torch.equal(product, fresh)


def test_the_product_follows_weights_and_data():
    net, (X, y) = tiny_mlp(), tiny_data()
    op = HessianOperator(net, LOSS, (X, y), mode="cached")
    v = torch.randn(op.shape[0], dtype=torch.float64)

    def follows():
        for _ in range(3):
            off = relative_error(op @ v, dense_hessian(net, LOSS, X, y) @ v)
            assert off < 1e-12

    follows()
    with torch.no_grad():
        net[0].weight.add_(0.1)
    follows()
    net[2].weight.data.mul_(1.1)
    follows()
    X.mul_(1.2)
    follows()


def test_weights_that_change_during_a_search_are_refused():
    net, (X, y) = tiny_mlp(), tiny_data()
    op = HessianOperator(net, LOSS, (X, y), mode="cached")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    for _ in range(3):
        op @ v
    with op.objective.hold(), torch.no_grad():
        net[2].weight.add_(0.1)
        with pytest.raises(InputError, match="must stay as it is meanwhile"):
            op @ v


def test_a_small_memory_keeps_the_graph():
    net, (X, y) = tiny_mlp(), tiny_data()
    op = HessianOperator(net, LOSS, (X, y), mode="cached", memory=100.0)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    first = op @ v
    for _ in range(3):
        assert torch.equal(op @ v, first)
    (product,) = op._mode().graphs.products
    assert product.recording is None and "does not fit" in product.reason


def test_zeros_that_are_filled_by_parts_begin_as_zeros_in_each_replay():
    def fills(v):
        total = torch.zeros(4)
        total[1:3].add_(v[0])
        total[2:].mul_(3.0)
        return [total + 1.0]

    recording, first = record(fills, [torch.tensor([1.0, 2.0])])
    for factor in (1.0, 5.0, -2.0):
        v = [factor * torch.tensor([1.0, 2.0])]
        assert torch.equal(recording(v)[0], fills(v)[0])
    assert torch.equal(first[0], fills([torch.tensor([1.0, 2.0])])[0])


def test_what_is_kept_and_then_written_to_is_not_recorded():
    scale = torch.ones(2)

    def product(v):
        out = v[0] * scale
        scale.add_(1.0)  # does not read the direction
        return [out]

    with pytest.raises(NotRecordable, match="is written to"):
        record(product, [torch.ones(2)])


@needs_compiler
def test_compiled_products_are_those_of_the_graph_and_follow_the_weights():
    net, (X, y) = tiny_mlp(), tiny_data()
    op = HessianOperator(net, LOSS, (X, y), mode="compiled")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in (0.0, 0.1):
            with torch.no_grad():
                net[0].weight.add_(step)
            for _ in range(2):
                assert relative_error(op @ v, dense_hessian(net, LOSS, X, y) @ v) < 1e-12
    assert op.plan().mode == "compiled"
    (product,) = op._mode().graphs.products
    assert product.compiled is not None and len(product.compiler._programs) == 1


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_compiler_that_fails_is_told_and_not_used(monkeypatch, fault):
    def compile(self, recording, directions):
        if fault == "raises":
            raise CannotCompile("no working C++ compiler found")
        return lambda *given: [1.01 * part for part in recording(given[: len(directions)])]

    monkeypatch.setattr(compiled_products.Compiler, "_compile", compile)
    net, (X, y) = tiny_mlp(), tiny_data()
    op = HessianOperator(net, LOSS, [(X[:20], y[:20]), (X[20:], y[20:])], mode="compiled")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    said = "no working C" if fault == "raises" else "where rounding allows"
    with pytest.warns(UserWarning, match=f"products are not compiled.*{said}"):
        product = op @ v
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once
        assert torch.equal(op @ v, product)
    assert op.plan().mode == "cached"
    assert relative_error(product, dense_hessian(net, LOSS, X, y) @ v) < 1e-12


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(kind="gauss_newton"), "multiplies with kind='hessian'"),
        (dict(micro_batch=3), "keeps whole batches"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options, said):
    net, (X, y) = tiny_mlp(), tiny_data()
    with pytest.raises(InputError, match=said):
        HessianOperator(net, LOSS, (X, y), mode="compiled", **options)


def test_nothing_of_the_compiler_is_imported_before_it_is_asked_for():
    code = (
        "import hessian_surgery_nb.hvp, sys; assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

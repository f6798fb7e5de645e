"""Logits in chunks: the same Gauss-Newton products, for every network that allows it, and a refusal
or a warning for every other.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessian_surgery_nb.foundations import plans, vocabulary
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.testbed import relative_error
from hessian_surgery_nb.hvp import HessianOperator

WORDS, WIDTH = 13, 4


class Tiny(nn.Module):
    "A language model with everything that can be different about its head."

    def __init__(self, *, tied=False, bias=True, shift=True):
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.table.weight
        self.shift = shift

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits = self.head(self.norm(x))
        return logits[:, :-1].transpose(1, 2) if self.shift else logits.transpose(1, 2)


def made(seed=0, texts=5, length=6, **how):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Tiny(**how).double().eval()
        tokens = torch.randint(0, WORDS, (texts, length))
    labels = tokens[:, 1:] if how.get("shift", True) else tokens
    return net, tokens, labels.contiguous()


@pytest.fixture
def small_chunks(monkeypatch):
    "Three rows a chunk."
    monkeypatch.setattr(vocabulary, "CHUNK", 3 * WORDS)
    monkeypatch.setattr(plans, "CHUNK", 3 * WORDS)


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "all at once": nn.CrossEntropyLoss(
        weight=torch.linspace(0.2, 2, WORDS, dtype=torch.float64),
        ignore_index=3,
        label_smoothing=0.1,
    ),
}
NETWORKS = {
    "own head": {},
    "tied": {"tied": True},
    "tied, no bias": {"tied": True, "bias": False},
    "all tokens": {"shift": False},
}


def matrix(net, loss_fn, data, **how):
    op = HessianOperator(net, loss_fn, data, kind="gauss_newton", **how)
    return op @ torch.eye(op.shape[0], dtype=torch.float64), op


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_matrix_is_that_of_whole_logits(small_chunks, network, loss):
    net, tokens, labels = made(**NETWORKS[network])
    data = [(tokens[:3], labels[:3]), (tokens[3:], labels[3:])]
    whole, _ = matrix(net, LOSSES[loss], data, mode="recomputed")
    chunks, op = matrix(net, LOSSES[loss], data)
    assert op.plan().mode == "chunked"
    assert relative_error(chunks, whole) < 1e-13
    assert relative_error(chunks, chunks.T) < 1e-13
    for one, other in zip(op.gradient(), HessianOperator(net, LOSSES[loss], data).gradient()):
        assert relative_error(one, other) < 1e-13


@pytest.mark.parametrize(
    "params", ["head.weight", "head.bias", "head.*", "norm.*", ["table.weight", "head.bias"]]
)
def test_some_parameters(small_chunks, params):
    net, tokens, labels = made()
    how = {"params": params}
    whole, _ = matrix(net, LOSSES["all at once"], (tokens, labels), mode="recomputed", **how)
    chunks, op = matrix(net, LOSSES["all at once"], (tokens, labels), mode="chunked", **how)
    assert relative_error(chunks, whole) < 1e-13


def test_images_in_pieces_and_plain_classifiers(small_chunks):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, WORDS)).double()
        X = torch.randn(9, 5, dtype=torch.float64)
    y = torch.arange(9) % WORDS
    whole, _ = matrix(net, nn.CrossEntropyLoss(), (X, y), mode="recomputed")
    for micro_batch in (None, 2):
        chunks, op = matrix(net, nn.CrossEntropyLoss(), (X, y), micro_batch=micro_batch)
        assert op.plan().mode == "chunked"
        assert relative_error(chunks, whole) < 1e-13


def test_a_layer_without_forward_mode(small_chunks):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 4), nn.Linear(4, WORDS)

        def forward(self, x):
            return self.head(Square.apply(self.first(x)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().double()
        X = torch.randn(9, 5, dtype=torch.float64)
    y = torch.arange(9) % WORDS
    whole, _ = matrix(net, nn.CrossEntropyLoss(), (X, y), mode="recomputed")
    chunks, op = matrix(net, nn.CrossEntropyLoss(), (X, y))
    assert op.plan().mode == "chunked"
    assert relative_error(chunks, whole) < 1e-13


def test_no_logits_as_a_whole(small_chunks):
    "Once the plan is made, no tensor with an entry a word is larger than head or chunk."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if torch.is_tensor(tensor) and WORDS in tensor.shape and tensor.numel() > 1:
                    if tensor.stride() == (0,) * tensor.ndim:
                        continue  # expanded from one number
                    Largest.entries = max(Largest.entries, tensor.numel())
            return out

    net, tokens, labels = made(texts=40)
    op = HessianOperator(net, LOSSES["mean"], (tokens, labels), kind="gauss_newton")
    op.plan()
    v = torch.ones(op.shape[0], dtype=torch.float64)
    with Largest():
        op @ v
        op.gradient()
    assert Largest.entries == WORDS * WIDTH
    whole = HessianOperator(
        net, LOSSES["mean"], (tokens, labels), kind="gauss_newton", mode="recomputed"
    )
    with Largest():
        whole @ v
    assert Largest.entries >= labels.numel() * WORDS


class Capped(Tiny):
    def forward(self, tokens):
        return 30 * (super().forward(tokens) / 30).tanh()


def my_loss(logits, labels):
    return F.cross_entropy(logits, labels)


def test_what_does_not_allow_it_is_made_whole_and_said(small_chunks):
    net, tokens, labels = made()
    capped = Capped().double().eval()
    probabilities = F.one_hot(labels, WORDS).double().transpose(1, 2)
    cases = [
        (capped, LOSSES["mean"], labels, "MulBackward0"),
        (net, my_loss, labels, "own cross-entropy"),
        (net, LOSSES["mean"], probabilities, "probabilities"),
    ]
    for model, loss_fn, targets, reason in cases:
        data = (tokens, targets)
        op = HessianOperator(model, loss_fn, data, kind="gauss_newton")
        with pytest.warns(UserWarning, match="made whole") as said:
            assert op.plan().mode == "recomputed"
        assert reason in str(said[0].message)
        op = HessianOperator(model, loss_fn, data, kind="gauss_newton", mode="chunked")
        with pytest.raises(InputError, match="use mode='recomputed'"):
            op.plan()


def test_small_logits_are_made_whole_without_a_word():
    net, tokens, labels = made()
    op = HessianOperator(net, my_loss, (tokens, labels), kind="gauss_newton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op.plan().mode == "recomputed"
    with pytest.raises(InputError, match="kind='gauss_newton'"):
        HessianOperator(net, my_loss, (tokens, labels), mode="chunked")


def test_wrong_labels_and_weights_are_named(small_chunks):
    net, tokens, labels = made()
    later = labels.clone()
    later[4, 0] = WORDS
    op = HessianOperator(net, LOSSES["mean"], (tokens, later), kind="gauss_newton", mode="chunked")
    with pytest.raises(InputError, match="labels must lie in 0..12"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)


def test_the_model_stays_and_moves(small_chunks):
    net, tokens, labels = made(tied=True)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    _, op = matrix(net, LOSSES["mean"], (tokens, labels))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        net.norm.weight.mul_(1.5)
    whole, _ = matrix(net, LOSSES["mean"], (tokens, labels), mode="recomputed")
    again = op @ torch.eye(op.shape[0], dtype=torch.float64)
    assert relative_error(again, whole) < 1e-13

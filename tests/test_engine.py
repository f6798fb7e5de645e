"Products and eigenpairs on every kind of network we promise, in float64, against the dense Hessian of the same loss taken whole."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessian_surgery_nb.hvp import HessianOperator, InputError
from hessian_surgery_nb.lanczos import eigen_residuals, top_eigenpairs
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.testbed import dense_hessian, planted_matrix, relative_error, seeded, tiny_data, tiny_mlp


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.emb.weight
    def forward(self, t): return self.out(self.mix(self.emb(t)).tanh())


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=.1, batch_first=True, activation="gelu")
        self.head = nn.Linear(8, 3)
    def forward(self, x): return self.head(self.layer(self.emb(x)).mean(1))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(2, 6)
        self.head = nn.Linear(6, 3)
    def forward(self, left, right): return self.head(torch.tanh(self.a(left) + self.b(right)))


class Sequence(nn.Module):
    "Logits (N, C, T) for targets (N, T)."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 4, 1))
    def forward(self, x): return self.net(x)


N = 25


def image(*shape): return lambda g: torch.randn(N, *shape, generator=g, dtype=torch.float64)


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), image(6)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)), image(1, 6, 6)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), image(6)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), image(6)),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)), image(2, 5, 5)),
    "tied": (Tied, lambda g: torch.randint(7, (N,), generator=g)),
    "transformer": (Transformer, image(4, 3)),
    "in-place relu": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), image(6)),
    "dict": (Keywords, lambda g: dict(left=image(4)(g), right=image(2)(g))),
    "sequence": (Sequence, image(3, 6)),
}


def problem(name, reduction):
    build, inputs = NETS[name]
    g = torch.Generator().manual_seed(1)
    with seeded(0): net = build().double().eval()
    X = inputs(g)
    C, shape = {"tied": (7, (N,)), "sequence": (4, (N, 6))}.get(name, (3, (N,)))
    y = torch.randint(C, shape, generator=g)
    y.view(-1)[::4] = 1  # the ignored label is present in every batch
    w = torch.linspace(.5, 3, C, dtype=torch.float64)
    return net, nn.CrossEntropyLoss(weight=w, ignore_index=1, reduction=reduction), X, y


def cut(X, y, at):
    part = lambda s: {k: v[s] for k, v in X.items()} if isinstance(X, dict) else X[s]
    return [(part(slice(0, at)), y[:at]), (part(slice(at, None)), y[at:])]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NETS)
def test_every_mode_on_ragged_batches(name, reduction):
    net, loss, X, y = problem(name, reduction)
    H = dense_hessian(net, loss, X, y)
    V = torch.randn(len(H), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for mode in ("kept", "rebuilt", "forward"):
        for data in ((X, y), cut(X, y, N - 3)):
            assert relative_error(HessianOperator(net, loss, data, mode=mode) @ V, H @ V) < 1e-10, (mode, type(data))


@pytest.mark.parametrize("name", NETS)
def test_gauss_newton_is_symmetric_positive_and_right_for_the_head(name):
    net, loss, X, y = problem(name, "mean")
    op = HessianOperator(net, loss, cut(X, y, 9), kind="gauss_newton")
    G = op @ torch.eye(op.shape[0], dtype=torch.float64)
    assert relative_error(G, G.T) < 1e-12 and torch.linalg.eigvalsh((G + G.T) / 2).min() > -1e-10
    last = list(op.params)[-1]  # the network is linear in its last layer, so there Hessian and Gauss-Newton agree
    if name == "tied": return  # but not where that layer is also the first
    H = HessianOperator(net, loss, (X, y), params=last) @ torch.eye(op.params[last].numel(), dtype=torch.float64)
    n = len(H)
    assert relative_error(G[-n:, -n:], H) < 1e-10


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=.1), nn.CrossEntropyLoss(label_smoothing=.1, weight=torch.tensor([1., 2., 4.], dtype=torch.float64)),
                                  lambda z, t: (1 - z.softmax(1).gather(1, t[:, None])).square().mean(), lambda z, t: F.cross_entropy(z, t, reduction="sum")], ids=["function", "smoothed", "smoothed, weighted", "custom mean", "custom sum"])
def test_other_losses(loss):
    net, (X, y) = tiny_mlp(), tiny_data(41)
    H = dense_hessian(net, loss, X, y)
    V = torch.eye(len(H), dtype=torch.float64)[:, ::9]
    assert relative_error(HessianOperator(net, loss, [(X[:30], y[:30]), (X[30:], y[30:])]) @ V, H @ V) < 1e-10


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="sum")])
def test_losses_with_real_targets(loss):
    net, (X, _) = tiny_mlp(), tiny_data(41)
    t = torch.rand(41, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = dense_hessian(net, loss, X, t)
    V = torch.eye(len(H), dtype=torch.float64)[:, ::9]
    assert relative_error(HessianOperator(net, loss, [(X[:30], t[:30]), (X[30:], t[30:])]) @ V, H @ V) < 1e-10


def test_loader_and_selection():
    net, (X, y) = tiny_mlp(), tiny_data(41)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=8)
    op = HessianOperator(net, nn.CrossEntropyLoss(), loader, params="2.*")
    H = dense_hessian(net, nn.CrossEntropyLoss(), X, y)
    assert relative_error(op @ torch.eye(27, dtype=torch.float64), H[-27:, -27:]) < 1e-10
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=8, shuffle=True, drop_last=True)
    with pytest.raises(InputError, match="same order on every pass"): HessianOperator(net, nn.CrossEntropyLoss(), shuffled)


def test_data_that_change_are_refused():
    net, (X, y) = tiny_mlp(), tiny_data(40)
    data = [(X[:20], y[:20]), (X[20:], y[20:])]
    op = HessianOperator(net, nn.CrossEntropyLoss(), data, mode="rebuilt")
    v = torch.ones(83, dtype=torch.float64)
    op @ v
    data.pop()
    with pytest.raises(InputError, match="went from 40 to 20"): op @ v


def test_a_layer_without_forward_mode_is_named():
    net, (X, y) = tiny_mlp(activation=nn.SiLU), tiny_data()
    v = torch.ones(83, dtype=torch.float64)
    with pytest.raises(InputError, match="silu_backward.*mode='rebuilt'"): HessianOperator(net, nn.CrossEntropyLoss(), (X, y), mode="forward") @ v
    assert relative_error(HessianOperator(net, nn.CrossEntropyLoss(), (X, y), mode="rebuilt") @ v, dense_hessian(net, nn.CrossEntropyLoss(), X, y) @ v) < 1e-10


def test_a_declared_reduction_is_not_trusted():
    class Focal(nn.Module):
        reduction = "mean"  # says so, but divides by the weights of the labels
        def forward(self, z, t):
            w = torch.tensor([1., 2., 9.], dtype=z.dtype)[t]
            return (w * F.cross_entropy(z, t, reduction="none")).sum() / w.sum()
    net, (X, y) = tiny_mlp(), tiny_data(40)
    with pytest.raises(InputError, match="mean or a sum over the first axis"): HessianOperator(net, Focal(), [(X[:33], y[:33]), (X[33:], y[33:])]) @ torch.ones(83, dtype=torch.float64)
    v = torch.ones(83, dtype=torch.float64)
    assert relative_error(HessianOperator(net, Focal(), (X, y)) @ v, dense_hessian(net, Focal(), X, y) @ v) < 1e-10


def test_whatever_moves_is_noticed():
    net, (X, y) = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().eval(), tiny_data()
    op, v = HessianOperator(net, nn.CrossEntropyLoss(), (X, y), params="3.*"), torch.randn(27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    def right(): return relative_error(op @ v, dense_hessian(net, nn.CrossEntropyLoss(), X, y)[-27:, -27:] @ v) < 1e-10
    assert right()
    net[0].weight.data.mul_(1.3); assert right()  # not selected, and behind autograd's back
    net[1].running_mean.add_(.7); assert right()  # a buffer
    net[3].bias = nn.Parameter(net[3].bias.detach() + 1); assert right()  # another object
    net.train()
    with pytest.raises(InputError, match="call model.eval"): op @ v


def test_modules_we_cannot_judge_must_be_in_evaluation_mode():
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(6, 3)
        def forward(self, x): return F.dropout(self.l(x), .5, self.training)
    with pytest.raises(InputError, match="cannot judge"): HessianOperator(Own().double(), nn.CrossEntropyLoss(), tiny_data())
    HessianOperator(nn.Sequential(nn.Linear(6, 3)).double(), nn.CrossEntropyLoss(), tiny_data())  # nothing random in it


def test_a_tied_alias_selects_the_shared_weight():
    assert list(HessianOperator(Tied().double().eval(), nn.CrossEntropyLoss(), (torch.arange(7), torch.arange(7)), params="out.weight").params) == ["emb.weight"]


@pytest.mark.parametrize("seed", range(10))
def test_verified_pairs_have_the_right_multiplicity(seed):
    D = torch.diag(torch.cat([torch.full((3,), 10.), torch.rand(200, generator=torch.Generator().manual_seed(seed))]).double())
    pairs = top_eigenpairs(D, 3, verify=True, seed=seed)
    assert pairs.converged.all() and (pairs.values - 10).abs().max() < 1e-2
    many = torch.diag(torch.cat([torch.full((9,), 3.), torch.rand(100, generator=torch.Generator().manual_seed(seed))]).double())
    pairs = top_eigenpairs(many, 6, verify=True, seed=seed, max_basis=12)
    assert pairs.converged.all() and (pairs.values - 3).abs().max() < 1e-2 and (eigen_residuals(many, pairs) <= pairs.residuals + 1e-9).all()


def test_memory_returns_without_the_collector():
    import gc
    import weakref
    net, (X, y) = tiny_mlp(), tiny_data()
    gc.collect(); gc.disable()
    try:
        op = HessianOperator(net, nn.CrossEntropyLoss(), (X, y), mode="kept")
        op @ torch.ones(83, dtype=torch.float64)
        gone = weakref.ref(op)
        del op
        assert gone() is None
    finally: gc.enable()


@pytest.mark.parametrize("values", [[1.] * 12, [0.] * 12, [5., 3.] + [0.] * 20, [4., 4., 4., 1., .5, .2, .1], [2., 2 - 1e-6, 2 - 2e-6] + [.1] * 9, list(1. / torch.arange(1., 30)),
                                    [-3., -2., -1., .5]], ids=["identity", "zero", "rank 2", "triple", "cluster", "decaying", "negative"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_hard_spectra(values, which):
    A, _ = planted_matrix(values, seed=4)
    order = {"LA": lambda t: -t, "SA": lambda t: t, "LM": lambda t: -t.abs()}[which]
    lam = torch.tensor(values, dtype=torch.float64)
    lam = lam[torch.argsort(order(lam), stable=True)]
    for k in (1, 3, len(values)):
        if k > len(values): continue
        pairs = top_eigenpairs(A, k, which=which, tol=1e-10, max_matvecs=2000)
        assert pairs.converged.all()
        scale = lam.abs().max().item() or 1.
        assert (order(pairs.values) - order(lam[:k])).abs().max() < 1e-8 * scale
        V = pairs.vectors
        assert (V.T @ V - torch.eye(k)).abs().max() < 1e-10
        assert eigen_residuals(A, pairs).max() < 1e-8 * scale


@pytest.mark.parametrize("seed", range(3))
def test_float32_against_dense(seed):
    net, (X, y) = tiny_mlp(seed=seed), tiny_data(seed=seed)
    lam = torch.linalg.eigvalsh(dense_hessian(net, nn.CrossEntropyLoss(), X, y)).flip(0)
    pairs = top_eigenpairs(HessianOperator(net.float(), nn.CrossEntropyLoss(), (X.float(), y)), 5, tol=1e-4)
    assert pairs.converged.all() and relative_error(pairs.values, lam[:5]) < 1e-4
    sd = spectral_density(HessianOperator(net.double(), nn.CrossEntropyLoss(), (X, y)), num_probes=12, num_matvecs=30, seed=seed)
    assert abs(sd.trace - lam.sum()) < 3 * sd.trace_stderr and (sd.weights.sum(1) - 1).abs().max() < 1e-12

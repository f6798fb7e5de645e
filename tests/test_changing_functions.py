"""Data and networks that are not a fixed function, or that change between two products.

What comes out is right, or refused, or said not to be certified; and what the caller passed is as
it was.
"""

import copy
import random
import warnings

import layer_kinds as kinds
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from hessian_surgery_nb.foundations.batches import as_batches
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import eigen_residuals, top_eigenpairs
from hessian_surgery_nb.sensitivity import sensitivity_matrix
from hessian_surgery_nb.spike_validation import count_spikes
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.foundations.accuracy import class_report, predict

CE = nn.CrossEntropyLoss()
F64 = torch.float64
EXACT = 1e-8  # two ways of the same derivatives in float64


@pytest.fixture(autouse=True)
def same_chance_every_time():
    "What is random here is the same in every run."
    random.seed(0)
    np.random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(n=24, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 6, generator=g, dtype=F64) + shift * F.one_hot(y, 6), y


def made(build, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double().eval()


class Plain(nn.Module):
    "What the others are variations of: 53 weights."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def directions(n):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def products(op):
    return op @ directions(op.shape[0])


def off(a, b):
    return ((a - b).norm() / (b.norm() + 1e-12)).item()


def apart(found, H):
    return off(found, H @ directions(len(H)))


def dense(net, X, y, loss=CE):
    return kinds.Truth(net, loss, X, y).hessian()


def attributes(net):
    "All that a module holds beside tensors, to compare."
    return {
        k: {
            a: copy.copy(v)
            for a, v in vars(m).items()
            if isinstance(v, (int, float, str, list, tuple, type(None)))
        }
        for k, m in net.named_modules()
    }


def state(net, *tensors):
    held = [t for m in net.modules() for t in vars(m).values() if torch.is_tensor(t)]
    every = [*net.state_dict().values(), *held, *tensors]
    return [t.detach().clone() for t in every], attributes(net)


def same(a, b):
    return (
        len(a[0]) == len(b[0])
        and all(torch.equal(s, t) for s, t in zip(a[0], b[0]))
        and a[1] == b[1]
    )


def quietly(f):
    "The result and the warnings; None where it is refused."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return f(), said
        except InputError as e:
            assert len(str(e).split()) > 8, e
            return None, said


def nothing_certified(*given, **options):
    "Of leading eigenpairs: refused, or said aloud, with no pair called converged."
    pairs, said = quietly(
        lambda: top_eigenpairs(HessianOperator(*given, **options), 2, max_matvecs=60)
    )
    if pairs is None:
        return True
    return not pairs.converged.any() and len(said) > 0


# No fixed function at all -------------------------------------------------------------------------


class Drops(Plain):
    "F.dropout drops in evaluation mode too."

    def forward(self, x):
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.5))


class Noisy(Plain):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) + 0.3 * torch.randn(5, dtype=F64))


class NoisyWeights(Plain):
    def forward(self, x):
        return F.linear(
            torch.tanh(self.a(x)),
            self.b.weight * (1 + 0.2 * torch.rand_like(self.b.weight)),
            self.b.bias,
        )


class ScaledByChance(Plain):
    "By Python's own generator."

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * (1 + random.random()))


class ByNumPy(Plain):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * float(np.random.rand()))


class TrainsItsDropout(Plain):
    "A dropout layer that is switched on within forward."

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.b(self.drop.train()(torch.tanh(self.a(x))))


class OwnGenerator(Plain):
    "Random numbers of a generator that the network keeps."

    def __init__(self):
        super().__init__()
        self.g = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) + 0.3 * torch.randn(5, generator=self.g, dtype=F64))


class RandomPool(Plain):
    "Fractional pooling draws its windows anew on every call."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3), nn.Linear(16, 3)

    def forward(self, x):
        wide = x.repeat(1, 8).view(-1, 1, 6, 8)
        return self.b(
            F.fractional_max_pool2d(torch.tanh(self.a(wide)), 2, output_size=(2, 4)).flatten(1)
        )


CALLS = []


class CountsElsewhere(Plain):
    "A counter that lies outside of the network."

    def forward(self, x):
        CALLS.append(1)
        return self.b(torch.tanh(self.a(x)) * (1 + 0.1 * len(CALLS)))


RANDOM_NETS = [
    Drops,
    Noisy,
    NoisyWeights,
    ScaledByChance,
    ByNumPy,
    TrainsItsDropout,
    OwnGenerator,
    RandomPool,
    CountsElsewhere,
]


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("build", RANDOM_NETS)
def test_nothing_is_certified_of_a_random_network(build, batches):
    X, y = images()
    net, data = made(build), list(zip(X.chunk(batches), y.chunk(batches)))
    before = state(net, X, y)
    assert nothing_certified(net, CE, data)
    assert same(before, state(net, X, y))


@pytest.mark.parametrize("mode", ["cached", "recomputed", "forward", "difference"])
def test_nothing_is_certified_in_any_mode(mode):
    X, y = images()
    assert nothing_certified(made(Noisy), CE, [(X[:9], y[:9]), (X[9:], y[9:])], mode=mode)
    assert nothing_certified(made(Drops), CE, (X, y), mode=mode)


@pytest.mark.parametrize("build", [Drops, Noisy, ScaledByChance, OwnGenerator])
def test_surgery_on_a_random_network_says_so(build):
    S = images(60, 1, 1.0)
    r, said = quietly(
        lambda: operate(
            made(build), CE, images(), S, config=SurgeryConfig(iterations=1), progress=False
        )
    )
    assert r is None or (said and not r.spikes.converged.any())
    S_eps, said = quietly(
        lambda: sensitivity_matrix(made(build), torch.eye(53, 2, dtype=F64), S, eps=0.1)
    )
    assert S_eps is None or said
    spikes, said = quietly(
        lambda: count_spikes(made(build), CE, images(), candidates=3, resamples=2)
    )
    assert spikes is None or said


class Loud(Dataset):
    "Images with noise that is new each time."

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.X[i] + torch.randn(6, dtype=F64), self.y[i]


class Mirrored(Loud):
    def __getitem__(self, i):
        return (self.X[i].flip(0) if random.random() < 0.5 else self.X[i]), self.y[i]


class Relabelled(Loud):
    "The images stay, some labels are drawn anew."

    def __getitem__(self, i):
        return self.X[i], self.y[i] if random.random() < 0.7 else torch.tensor(random.randrange(3))


class LoudStream(IterableDataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        return ((x + torch.randn(6, dtype=F64), t) for x, t in zip(self.X, self.y))


class OtherImages(Loud):
    "As many images of the same classes, but others."

    def __getitem__(self, i):
        j = random.choice(torch.nonzero(self.y == self.y[i]).flatten().tolist())
        return self.X[j], self.y[i]


class Batches:
    "Batches by a function of the number of the pass."

    def __init__(self, make):
        self.make, self.passes = make, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.make(self.passes))


def noisy_collate(rows):
    return torch.stack([x for x, _ in rows]) + torch.randn(len(rows), 6, dtype=F64), torch.stack(
        [t for _, t in rows]
    )


def drawn_with_replacement(X, y):
    return DataLoader(
        TensorDataset(X, y), sampler=WeightedRandomSampler(torch.ones(len(y)), len(y)), batch_size=8
    )


RANDOM_DATA = {
    "noise": lambda X, y: DataLoader(Loud(X, y), batch_size=8),
    "noise, one batch": lambda X, y: DataLoader(Loud(X, y), batch_size=24),
    "mirrored": lambda X, y: DataLoader(Mirrored(X, y), batch_size=8),
    "labels drawn anew": lambda X, y: DataLoader(Relabelled(X, y), batch_size=8),
    "other images": lambda X, y: DataLoader(OtherImages(X, y), batch_size=8),
    "a stream": lambda X, y: DataLoader(LoudStream(X, y), batch_size=8),
    "collated with noise": lambda X, y: DataLoader(
        TensorDataset(X, y), batch_size=8, collate_fn=noisy_collate
    ),
    "with replacement": drawn_with_replacement,
    "larger on every pass": lambda X, y: Batches(lambda n: [(X * (1 + n / 10), y)]),
    "other labels on every pass": lambda X, y: Batches(lambda n: [(X, y.roll(n))]),
    "fewer on every pass": lambda X, y: Batches(lambda n: [(X[:-n], y[:-n])]),
}


@pytest.mark.parametrize("name", RANDOM_DATA)
def test_nothing_is_certified_of_random_data(name):
    X, y = images()
    before = X.clone()
    data = RANDOM_DATA[name](X, y)
    assert nothing_certified(made(Plain), CE, data)
    assert torch.equal(X, before)


DRAWN_ONCE = {
    "batches with replacement": lambda X, y: DataLoader(
        TensorDataset(X, y),
        batch_sampler=BatchSampler(RandomSampler(y, replacement=True), 8, False),
    ),
    "the last batch is dropped": lambda X, y: DataLoader(
        TensorDataset(X, y), batch_sampler=BatchSampler(RandomSampler(y), 9, True)
    ),
}


@pytest.mark.parametrize("name", DRAWN_ONCE)
def test_what_a_sampler_draws_is_drawn_once(name):
    """Its images stay the same for as long as the loader lives: certified, and by a matrix that is
    there.
    """
    X, y = images()
    data = DRAWN_ONCE[name](X, y)
    op = HessianOperator(made(Plain), CE, data)
    pairs = top_eigenpairs(op, 2)
    again = HessianOperator(made(Plain), CE, data)
    assert pairs.converged.all() and (eigen_residuals(again, pairs) <= 2e-3 * pairs.values[0]).all()
    drawn = [torch.cat([t for t, _ in as_batches(data)]) for _ in range(2)]
    assert torch.equal(*drawn)


# The same images in another order on every pass ---------------------------------------------------


class OwnSampler(Sampler):
    def __init__(self, y):
        self.n = len(y)

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(random.sample(range(self.n), self.n))


class OwnBatches(OwnSampler):
    def __len__(self):
        return -(-self.n // 16)

    def __iter__(self):
        order = random.sample(range(self.n), self.n)
        return (order[i : i + 16] for i in range(0, self.n, 16))


class ShuffledStream(IterableDataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        return ((self.X[i], self.y[i]) for i in random.sample(range(len(self.y)), len(self.y)))


def shuffled(X, y, size=16):
    order = torch.randperm(len(y))
    return [(X[i], y[i]) for i in order.split(size)]


ORDERS = {
    "shuffle": lambda ds: DataLoader(ds, batch_size=16, shuffle=True),
    "random sampler": lambda ds: DataLoader(ds, batch_size=16, sampler=RandomSampler(ds)),
    "random subset": lambda ds: DataLoader(
        ds, batch_size=16, sampler=SubsetRandomSampler(range(len(ds)))
    ),
    "own sampler": lambda ds: DataLoader(ds, batch_size=16, sampler=OwnSampler(ds)),
    "batch sampler": lambda ds: DataLoader(
        ds, batch_sampler=BatchSampler(RandomSampler(ds), 16, False)
    ),
    "batch sampler around own": lambda ds: DataLoader(
        ds, batch_sampler=BatchSampler(OwnSampler(ds), 16, False)
    ),
    "own batch sampler": lambda ds: DataLoader(ds, batch_sampler=OwnBatches(ds)),
    "stream": lambda ds: DataLoader(ShuffledStream(*ds.tensors), batch_size=16),
    "own class": lambda ds: Batches(lambda n: shuffled(*ds.tensors)),
    "order of batches": lambda ds: Batches(
        lambda n: list(zip(*(t.split(15) for t in ds.tensors)))[:: (-1) ** n]
    ),
    "in order": lambda ds: DataLoader(
        ds, batch_sampler=BatchSampler(SequentialSampler(ds), 16, False)
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_labels_and_answers_of_one_pass_stay_together(name):
    X, y = images()
    S, O = images(60, 1, 1.0), images(60, 2, 1.0)

    def run(held):
        return operate(
            made(Plain),
            CE,
            (X, y),
            S,
            held_out=held,
            config=SurgeryConfig(iterations=2, eps=0.3),
            progress=False,
        )

    r, _ = quietly(lambda: run(ORDERS[name](TensorDataset(*O))))
    if r is None:
        assert name != "in order"
        return
    by_hand = torch.stack([r.correct[1][r.labels == c].double().mean() for c in range(3)])
    assert torch.allclose(by_hand, r.after.accuracy, atol=1e-12)
    truth = run(O)  # the same images in order: the same changes image by image, whatever the order
    assert torch.equal(r.after.accuracy, truth.after.accuracy) and torch.equal(
        r.before.accuracy, truth.before.accuracy
    )
    gained, lost = (
        ((r.correct[1] > r.correct[0]).sum(), (truth.correct[1] > truth.correct[0]).sum()),
        ((r.correct[1] < r.correct[0]).sum(), (truth.correct[1] < truth.correct[0]).sum()),
    )
    assert gained[0] == gained[1] and lost[0] == lost[1]


@pytest.mark.parametrize("name", ORDERS)
def test_sensitive_sets_in_any_order(name):
    "A sensitivity matrix subtracts answers of several passes image by image."
    S, V = (
        images(60, 1, 1.0),
        torch.linalg.qr(torch.randn(53, 2, generator=torch.Generator().manual_seed(0), dtype=F64))[
            0
        ],
    )

    def run(data):
        return sensitivity_matrix(made(Plain), V, data, eps=0.3, metric="probability")

    s, _ = quietly(lambda: run(ORDERS[name](TensorDataset(*S))))
    if s is None:
        assert name != "in order"
        return
    truth = run(S)
    assert off(s.matrix, truth.matrix) < EXACT and off(s.noise, truth.noise) < EXACT


@pytest.mark.parametrize("name", ORDERS)
def test_products_in_any_order(name):
    X, y = images(48)
    H = dense(made(Plain), X, y)
    found, _ = quietly(
        lambda: products(HessianOperator(made(Plain), CE, ORDERS[name](TensorDataset(X, y))))
    )
    assert found is None or apart(found, H) < EXACT
    assert found is not None or name != "in order"


def test_predictions_and_labels_come_from_one_pass():
    X, y = images(60, 1, 1.0)
    net = made(Plain)
    z, labels = predict(
        net,
        DataLoader(TensorDataset(X, y), batch_sampler=BatchSampler(RandomSampler(y), 16, False)),
    )
    key = {tuple(row.tolist()): t for row, t in zip(net(X).detach().round(decimals=9), y.tolist())}
    assert [key[tuple(row.tolist())] for row in z.round(decimals=9)] == labels.tolist()


# Networks and data that forward writes to ---------------------------------------------------------


class Counts(Plain):
    "A buffer that counts calls, and is part of the function."

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, x):
        out = super().forward(x) * (1 + self.calls)
        self.calls += 1
        return out


class CountsInPython(Plain):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Remembers(Plain):
    "A list that grows."

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().mean().item())
        return super().forward(x) * len(self.seen)


class RemembersByName(Plain):
    "A dictionary within a dictionary."

    def __init__(self):
        super().__init__()
        self.seen = dict(calls=dict(n=0))

    def forward(self, x):
        self.seen["calls"]["n"] += 1
        return super().forward(x) * self.seen["calls"]["n"]


class Carries(Plain):
    "A hidden state that goes from call to call."

    def __init__(self):
        super().__init__()
        self.state = torch.zeros(5, dtype=F64)

    def forward(self, x):
        h = torch.tanh(self.a(x) + self.state)
        self.state = h.detach().mean(0)
        return self.b(h)


class CarriesInPlace(Carries):
    def forward(self, x):
        h = torch.tanh(self.a(x) + self.state)
        self.state.copy_(h.detach().mean(0))
        return self.b(h)


class CarriesInItself(Carries):
    "The state is an entry of a list."

    def __init__(self):
        super().__init__()
        self.states = [torch.zeros(5, dtype=F64)]

    def forward(self, x):
        h = torch.tanh(self.a(x) + self.states[0])
        self.states[0] += h.detach().mean(0)
        return self.b(h)


class Statistics(Plain):
    "Running statistics that go on in evaluation mode."

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5, dtype=F64))

    def forward(self, x):
        h = self.a(x)
        out = self.b(torch.tanh(h - self.mean))
        self.mean.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return out


class StatisticsByData(Statistics):
    def forward(self, x):
        h = self.a(x)
        out = self.b(torch.tanh(h - self.mean))
        self.mean.data = self.mean.data * 0.5 + h.detach().mean(0) * 0.5
        return out


class StatisticsExchanged(Statistics):
    def forward(self, x):
        h = self.a(x)
        out = self.b(torch.tanh(h - self.mean))
        self.mean = self.mean * 0.5 + h.detach().mean(0) * 0.5
        return out


class Toggles(Plain):
    "One function on every second call."

    def __init__(self):
        super().__init__()
        self.odd = False

    def forward(self, x):
        self.odd = not self.odd
        return super().forward(x) if self.odd else super().forward(x) * 3


class Grows(Plain):
    "Exchanges a layer of its own."

    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x):
        h = self.b(self.act(self.a(x)))
        self.act = nn.ReLU()
        return h


class InputMoved(Plain):
    def forward(self, x):
        x -= 0.1
        return super().forward(x)


class InputRectified(Plain):
    def forward(self, x):
        return super().forward(x.relu_())


class InputRows(Plain):
    def forward(self, x):
        x[:, 0] = x[:, 0] * 2
        return super().forward(x)


class InputByData(Plain):
    def forward(self, x):
        x.data.mul_(1.5)
        return super().forward(x)


class InputByNumPy(Plain):
    "A write that PyTorch does not count."

    def forward(self, x):
        x.detach().numpy()[:] *= 1.5
        return super().forward(x)


class InputViewed(Plain):
    def forward(self, x):
        x.view(-1, 2, 3)[:, 1].add_(0.5)
        return super().forward(x)


class Of(Plain):
    "The function that the others are when they are called for the first time."

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(self, x)


def shifted(net, x, by=0.0, factor=1.0):
    return Plain.forward(net, x * factor + by)


def first_row(net, x):
    return Plain.forward(net, torch.cat([x[:, :1] * 2, x[:, 1:]], 1))


def viewed(net, x):
    return Plain.forward(net, x + 0.5 * (torch.arange(6) >= 3))


WRITERS = {
    Counts: Plain.forward,
    CountsInPython: Plain.forward,
    Remembers: Plain.forward,
    RemembersByName: Plain.forward,
    Carries: Plain.forward,
    CarriesInPlace: Plain.forward,
    CarriesInItself: Plain.forward,
    Statistics: Plain.forward,
    StatisticsByData: Plain.forward,
    StatisticsExchanged: Plain.forward,
    Toggles: Plain.forward,
    Grows: Plain.forward,
    InputMoved: lambda net, x: shifted(net, x, -0.1),
    InputRectified: lambda net, x: Plain.forward(net, x.relu()),
    InputRows: first_row,
    InputByData: lambda net, x: shifted(net, x, 0.0, 1.5),
    InputByNumPy: lambda net, x: shifted(net, x, 0.0, 1.5),
    InputViewed: viewed,
}


@pytest.mark.parametrize("mode", ["auto", "cached", "recomputed", "forward", "difference"])
@pytest.mark.parametrize("build", WRITERS)
def test_what_forward_writes(build, mode):
    "Every call is like the first, or nothing is certified. Nothing stays written."
    X, y = images()
    H = dense(made(lambda: Of(WRITERS[build])), X.clone(), y)
    net = made(build)
    for data in ((X, y), [(X[:10], y[:10]), (X[10:], y[10:])]):
        before = state(net, X, y)

        def run():
            op = HessianOperator(net, CE, data, mode=mode)
            return products(op), top_eigenpairs(op, 2), op.gradient()

        got, said = quietly(run)
        assert same(before, state(net, X, y)), (
            "weights, buffers, attributes and images are as they were"
        )
        if got is None:
            continue
        right = apart(got[0], H) < (1e-5 if mode == "difference" else EXACT)
        assert right or (not got[1].converged.any() and said)


@pytest.mark.parametrize("build", WRITERS)
def test_measurements_leave_no_trace(build):
    net, (X, y) = made(build), images(60, 1, 1.0)
    twin = made(lambda: Of(WRITERS[build]))
    before = state(net, X, y)
    z, _ = quietly(lambda: predict(net, (X, y)))
    assert same(before, state(net, X, y))
    if z is not None:
        assert torch.allclose(z[0], twin(X.clone()), rtol=1e-10, atol=1e-12)
    again, _ = quietly(lambda: predict(net, (X, y)))
    assert (z is None and again is None) or torch.equal(z[0], again[0])
    report, _ = quietly(lambda: class_report(net, (X, y)))
    s, _ = quietly(lambda: sensitivity_matrix(net, torch.eye(53, 2, dtype=F64), (X, y), eps=0.1))
    assert same(before, state(net, X, y))
    if report is not None:
        accuracy = torch.stack(
            [(twin(X.clone()).argmax(1) == y)[y == c].double().mean() for c in range(3)]
        )
        assert torch.equal(report.accuracy, accuracy)
    if s is not None:
        assert (
            off(
                s.matrix,
                sensitivity_matrix(twin, torch.eye(53, 2, dtype=F64), (X, y), eps=0.1).matrix,
            )
            < EXACT
        )


@pytest.mark.parametrize("build", [Counts, Remembers, Statistics, InputMoved, InputByNumPy])
def test_surgery_leaves_no_trace(build):
    net, (X, y), S, O = made(build), images(), images(60, 1, 1.0), images(60, 2, 1.0)
    before = state(net, X, y, *S, *O)
    r, _ = quietly(
        lambda: operate(
            net,
            CE,
            (X, y),
            S,
            held_out=O,
            config=SurgeryConfig(iterations=1, eps=0.2),
            progress=False,
        )
    )
    assert same(before, state(net, X, y, *S, *O))
    if r is not None:
        twin = made(lambda: Of(WRITERS[build]))
        expected = operate(
            twin,
            CE,
            (X, y),
            S,
            held_out=O,
            config=SurgeryConfig(iterations=1, eps=0.2),
            progress=False,
        )
        assert torch.equal(r.after.accuracy, expected.after.accuracy)


# Inputs in containers -----------------------------------------------------------------------------


class FromDict(Plain):
    def forward(self, x, scale):
        x *= scale[:, None]
        return super().forward(x)


class FromDictItself(Plain):
    "Writes into the dictionary that it is given."

    def forward(self, d):
        d["x"] = d["x"] * 2
        return super().forward(d["x"])


def test_inputs_in_containers_are_left_as_they_were():
    X, y = images()
    scale = torch.linspace(0.5, 2, len(y), dtype=F64)
    H = dense(made(Plain), X * scale[:, None], y)
    for inputs in (dict(x=X, scale=scale), (X, scale), [X, scale]):
        before = X.clone()
        found, _ = quietly(lambda: products(HessianOperator(made(FromDict), CE, [(inputs, y)])))
        assert torch.equal(X, before)
        assert found is None or apart(found, H) < EXACT
    d = dict(x=X)
    found, _ = quietly(
        lambda: products(
            HessianOperator(
                made(FromDictItself), CE, [(d, y)], forward=lambda model, inputs: model(inputs)
            )
        )
    )
    assert d["x"] is X and list(d) == ["x"]
    assert found is None or apart(found, dense(made(Plain), X * 2, y)) < EXACT


# Weights that forward writes ----------------------------------------------------------------------


class Clips(Plain):
    def forward(self, x):
        self.a.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class Decays(Plain):
    "Each call makes a weight smaller."

    def forward(self, x):
        with torch.no_grad():
            self.a.weight.mul_(0.9)
        return super().forward(x)


class Renormalises(Plain):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.div_(self.a.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


class ExchangesData(Plain):
    def forward(self, x):
        self.a.weight.data = self.a.weight.data.sign() * 0.3
        return super().forward(x)


class ByCopy(Plain):
    def forward(self, x):
        self.b.bias.detach().copy_(torch.ones(3, dtype=F64))
        return super().forward(x)


class Words(nn.Module):
    def __init__(self, max_norm=None):
        super().__init__()
        self.e, self.b = nn.Embedding(7, 4, max_norm=max_norm), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.e(x)).flatten(1))


class BagOfWords(Words):
    def __init__(self, max_norm=None):
        super().__init__(max_norm)
        self.e, self.b = nn.EmbeddingBag(7, 4, max_norm=max_norm, mode="sum"), nn.Linear(4, 3)


WEIGHT_WRITERS = {
    "clips": (Clips, Plain),
    "decays": (Decays, Plain),
    "renormalises": (Renormalises, Plain),
    "exchanges": (ExchangesData, Plain),
    "copies": (ByCopy, Plain),
    "max_norm": (lambda: Words(0.5), Words),
    "max_norm of a bag": (lambda: BagOfWords(0.5), BagOfWords),
}


def words_or_images(net, n=24):
    X, y = images(n)
    return (
        (torch.randint(0, 7, (n, 4), generator=torch.Generator().manual_seed(0)), y)
        if isinstance(net, Words)
        else (X, y)
    )


@pytest.mark.parametrize("mode", ["auto", "cached", "recomputed", "forward", "difference"])
@pytest.mark.parametrize("name", WEIGHT_WRITERS)
def test_weights_that_forward_writes(name, mode):
    build, plain = WEIGHT_WRITERS[name]
    net, twin, written = made(build), made(plain), made(build)
    X, y = words_or_images(net)
    written(X)
    twin.load_state_dict(written.state_dict())  # what the first call makes of the weights
    if isinstance(net, BagOfWords):
        H = dense(made_of_bag(twin), X, y)
    else:
        H = dense(twin, X, y)
    before = state(net, X, y)

    def run():
        op = HessianOperator(net, CE, (X, y), mode=mode)
        return products(op), top_eigenpairs(op, 2)

    got, said = quietly(run)
    assert same(before, state(net, X, y)), "the caller's weights are as they were"
    # forward mode and differences see through what is written: another derivative
    if got is None or mode in ("forward", "difference"):
        return
    right = apart(got[0], H) < (1e-5 if "bag" in name else EXACT)
    assert right or (not got[1].converged.any() and said)


def made_of_bag(net):
    "The bag as a sum of rows: PyTorch has no second derivative of bags."
    twin = made(Words)
    twin.e, twin.b = (
        nn.Embedding.from_pretrained(net.e.weight.detach().clone(), freeze=False),
        net.b,
    )
    twin.forward = lambda x: twin.b(torch.tanh(twin.e(x).sum(1)))
    return twin


@pytest.mark.parametrize("name", WEIGHT_WRITERS)
def test_measurements_leave_weights_as_they_were(name):
    build, _ = WEIGHT_WRITERS[name]
    net, written = made(build), made(build)
    X, y = words_or_images(net, 60)
    before = state(net, X, y)
    z, _ = quietly(lambda: predict(net, (X, y)))
    assert same(before, state(net, X, y))
    if z is not None:
        assert torch.allclose(z[0], written(X), rtol=1e-10, atol=1e-12)
    n = sum(p.numel() for p in net.parameters())
    quietly(lambda: sensitivity_matrix(net, torch.eye(n, 2, dtype=F64), (X, y), eps=0.1))
    quietly(
        lambda: operate(
            net,
            CE,
            (X[:24], y[:24]),
            (X[24:], y[24:]),
            config=SurgeryConfig(iterations=1, eps=0.1),
            progress=False,
        )
    )
    assert same(before, state(net, X, y))


# What is random in name only ----------------------------------------------------------------------


class Seeded(Plain):
    "Random numbers that are the same on every call: a fixed function."

    def forward(self, x):
        g = torch.Generator().manual_seed(7)
        return self.b(torch.tanh(self.a(x)) + 0.3 * torch.randn(5, generator=g, dtype=F64))


def test_a_fixed_function_is_not_refused():
    X, y = images()
    H = dense(made(Seeded), X, y)
    op = HessianOperator(made(Seeded), CE, [(X[:9], y[:9]), (X[9:], y[9:])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = top_eigenpairs(op, 2)
    assert apart(products(op), H) < EXACT and pairs.converged.all()
    assert (pairs.values - torch.linalg.eigvalsh(H).flip(0)[:2]).abs().max() < 1e-2 * pairs.values[
        0
    ]


# Changes between two products ---------------------------------------------------------------------


class Adjustable(Plain):
    def __init__(self):
        super().__init__()
        self.c, self.act, self.scale, self.parts, self.mask = (
            nn.Linear(5, 5),
            nn.Tanh(),
            1.0,
            [1.0, 1.0],
            torch.ones(5, dtype=F64),
        )
        self.register_buffer("mean", torch.zeros(6, dtype=F64))

    def forward(self, x):
        h = self.act(self.a(x - self.mean)) * self.scale
        return self.b(torch.tanh(self.c(h)) * self.mask * self.parts[0])


class Situation:
    "A network, a loss and data, of which something will change."

    def __init__(self, mode="auto"):
        self.net = made(Adjustable)
        self.array = np.random.default_rng(0).normal(size=(24, 6))
        self.X, self.y = torch.from_numpy(self.array), torch.arange(24) % 3
        self.weight = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
        self.loss = nn.CrossEntropyLoss(weight=self.weight)
        self.data, self.factor = [(self.X[:10], self.y[:10]), (self.X[10:], self.y[10:])], 1.0
        self.op = HessianOperator(
            self.net,
            self.loss,
            self.data,
            mode=mode,
            forward=lambda model, x: model(x) * self.factor,
        )

    def truth(self):
        X, y = torch.cat([b[0] for b in self.data]), torch.cat([b[1] for b in self.data])
        return kinds.Truth(Scaled(self.net, self.factor), self.loss, X.clone(), y.clone()).hessian()


class Scaled(nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.net(x) * self.factor


def rows_swapped(w):
    w.data = w.data[torch.arange(len(w)).roll(1)]


def rows_swapped_in_place(w):
    w.data.copy_(w.data.roll(1, 0))


def tensors_swapped(s):
    s.net.a.weight.data, s.net.a.weight.data[:5, :5] = (
        s.net.a.weight.data.flip(1),
        s.net.c.weight.data.clone(),
    )


def set_attribute(thing, name, value):
    setattr(thing, name, value)


def entry(w, i, by):
    w.data.view(-1)[i] += by


def numpy_write(w):
    w.detach().numpy()[0] *= -1


def tensor_set(s):
    s.net.a.weight.data = torch.linspace(-1, 1, 30, dtype=F64).view(5, 6)


def other_forward(s):
    def forward(x):
        return s.net.b(torch.sigmoid(s.net.a(x)))

    s.net.forward = forward


CHANGES = {
    "negated": lambda s: s.net.a.weight.data.neg_(),
    "negated, bias of the head": lambda s: s.net.b.bias.data.neg_(),
    "rows swapped": lambda s: rows_swapped(s.net.a.weight),
    "rows swapped in place": lambda s: rows_swapped_in_place(s.net.c.weight),
    "turned": lambda s: s.net.c.weight.data.copy_(s.net.c.weight.data.T.clone()),
    "one entry": lambda s: entry(s.net.a.weight, 3, 0.3),
    "two entries exchanged": lambda s: s.net.a.bias.data.copy_(s.net.a.bias.data[[1, 0, 2, 3, 4]]),
    "other data in a weight": tensor_set,
    "by NumPy": lambda s: numpy_write(s.net.a.weight),
    "under no_grad": lambda s: torch.no_grad()(lambda: s.net.a.weight.mul_(-1))(),
    "loaded": lambda s: s.net.load_state_dict(
        {k: v.roll(1, 0) for k, v in s.net.state_dict().items()}
    ),
    "another parameter": lambda s: set_attribute(
        s.net.c, "weight", nn.Parameter(s.net.c.weight.detach().flip(0))
    ),
    "buffer": lambda s: s.net.mean.add_(0.5),
    "buffer, negated": lambda s: s.net.mean.data.copy_(
        torch.tensor([0.1, -0.2, 0.3, 0, 0, 0], dtype=F64)
    ),
    "attribute": lambda s: set_attribute(s.net, "scale", 2.0),
    "entry of a list": lambda s: set_attribute(s.net, "parts", [3.0, 1.0]),
    "entry of a list in place": lambda s: s.net.parts.__setitem__(0, 3.0),
    "tensor that is no buffer": lambda s: s.net.mask.mul_(
        torch.tensor([1.0, -1.0, 2.0, 1.0, 1.0], dtype=F64)
    ),
    "layer": lambda s: set_attribute(s.net, "act", nn.Sigmoid()),
    "layer of the same kind": lambda s: set_attribute(s.net, "c", made(lambda: nn.Linear(5, 5), 8)),
    "forward hook": lambda s: s.net.act.register_forward_hook(lambda m, x, out: out * 2),
    "forward pre-hook": lambda s: s.net.c.register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "forward": other_forward,
    "forward of a layer": lambda s: set_attribute(s.net.act, "forward", torch.sigmoid),
    "what forward= reads": lambda s: set_attribute(s, "factor", 2.0),
    "class weight": lambda s: s.loss.weight.copy_(torch.tensor([5.0, 1.0, 1.0], dtype=F64)),
    "class weights swapped": lambda s: s.weight.copy_(s.weight.flip(0)),
    "smoothing": lambda s: set_attribute(s.loss, "label_smoothing", 0.3),
    "ignored class": lambda s: set_attribute(s.loss, "ignore_index", 1),
    "reduction": lambda s: set_attribute(s.loss, "reduction", "sum"),
    "images": lambda s: s.X.mul_(2),
    "images, negated": lambda s: s.X.neg_(),
    "two images exchanged for labels": lambda s: s.X.copy_(s.X[[1, 0, *range(2, 24)]]),
    "one image": lambda s: s.X[5].add_(0.5),
    "images by NumPy": lambda s: s.array.__imul__(-1),
    "labels": lambda s: s.y.copy_(s.y.roll(1)),
    "two labels": lambda s: s.y.copy_(s.y[[1, 0, *range(2, 24)]]),
    "a batch": lambda s: s.data.__setitem__(0, (s.X[:10] * 2, s.y[:10])),
    "one batch more": lambda s: s.data.append((s.X[:4] * 2, s.y[:4])),
    "one batch less": lambda s: s.data.pop(),
}


@pytest.mark.parametrize("mode", ["auto", "cached", "recomputed", "forward", "difference"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_two_products(name, mode):
    s = Situation(mode)
    tolerance = 1e-5 if mode == "difference" else EXACT
    first, old = products(s.op), s.truth()
    assert apart(first, old) < tolerance
    CHANGES[name](s)
    new = s.truth()
    assert new.shape != old.shape or off(new, old) > 1e-4, "the change matters"
    second, _ = quietly(lambda: products(s.op))
    assert second is None or apart(second, new) < tolerance
    slope, _ = quietly(lambda: s.op.gradient())
    if slope is not None:
        X, y = torch.cat([b[0] for b in s.data]), torch.cat([b[1] for b in s.data])
        assert abs(slope[0] - s.loss(s.net(X) * s.factor, y).item()) < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        "negated",
        "attribute",
        "layer",
        "images",
        "labels",
        "class weight",
        "one entry",
        "images by NumPy",
        "forward hook",
        "two labels",
    ],
)
def test_changes_in_the_midst_of_a_search(name):
    "Nothing is certified of a matrix that was another one at the start."
    s, count = Situation(), []

    class Meddling(HessianOperator):
        def __matmul__(self, v):
            count.append(1)
            if len(count) == 4:
                CHANGES[name](s)
            return super().__matmul__(v)

    op = Meddling(s.net, s.loss, s.data)
    pairs, said = quietly(lambda: top_eigenpairs(op, 3, tol=1e-6, max_matvecs=60))
    assert pairs is None or not pairs.converged.any()


def test_a_network_that_learns_between_products():
    "The ordinary case: an optimiser's step."
    s = Situation()
    products(s.op)
    opt = torch.optim.SGD(s.net.parameters(), lr=0.1)
    s.loss(s.net(s.X), s.y).backward()
    opt.step()
    assert apart(products(s.op), s.truth()) < EXACT


# One function for measuring and for differentiating -----------------------------------------------


class Padded(nn.Module):
    "Without gradients PyTorch's fast path of this encoder cuts padding off."

    def __init__(self, layers=1, norm_first=False, activation="relu"):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            4, 2, 6, 0.0, activation, batch_first=True, norm_first=norm_first
        )
        self.e, self.t, self.h = (
            nn.Embedding(9, 4),
            nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first),
            nn.Linear(4, 3),
        )

    def forward(self, i):
        return self.h(self.t(self.e(i), src_key_padding_mask=i == 0).mean(1))


class OneLayer(Padded):
    def __init__(self):
        super().__init__()
        self.t = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True)


class OnlyAttention(Padded):
    def __init__(self):
        super().__init__()
        self.t = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, i):
        x = self.e(i)
        return self.h(self.t(x, x, x, key_padding_mask=i == 0)[0].mean(1))


class ByGradMode(Plain):
    "Another function where gradients are off."

    def forward(self, x):
        return super().forward(x) * (1.0 if torch.is_grad_enabled() else 2.0)


def padded_words():
    words = torch.randint(1, 9, (24, 5), generator=torch.Generator().manual_seed(0))
    words[:, 4] = 0
    words[3:, 3] = 0
    return words


@pytest.mark.parametrize(
    "build",
    [
        Padded,
        lambda: Padded(2),
        lambda: Padded(1, True),
        lambda: Padded(1, False, "gelu"),
        OneLayer,
        OnlyAttention,
        ByGradMode,
    ],
    ids=["one", "two layers", "norm first", "gelu", "one layer", "only attention", "by grad mode"],
)
def test_logits_are_those_of_the_loss(build):
    net = made(build)
    X, y = images()
    if not isinstance(net, Plain):
        X = padded_words()
    with torch.enable_grad():
        z_true = net(X).detach()
    got, _ = quietly(
        lambda: (predict(net, (X, y))[0], HessianOperator(net, CE, (X, y)).gradient()[0])
    )
    if got is None:
        return
    z, value = got
    assert abs(value - CE(z, y).item()) < 1e-10
    assert torch.allclose(z, z_true, rtol=1e-8, atol=1e-10)

"""Products of networks drawn at random, against dense matrices by PyTorch alone.

Every product is right or refused. 50 networks are drawn here, always the same; `pytest --slow`
draws 500 others.
"""

import random
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import layer_kinds as kinds
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from torch.utils.data import DataLoader

from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator

EXACT = 1e-8  # two double backward passes in float64: rounding, which inverses enlarge
ROUGH = 1e-5  # central differences in float64: (2e-16)^(2/3) = 4e-11, times third derivatives
FLOOR = 1e-12  # where the matrix is 0
MODES = ("auto", "cached", "recomputed", "forward", "difference")


@dataclass(frozen=True)
class Drawn:
    "A network, a loss, data in batches, and a way to compute with them."

    front: str
    blocks: tuple
    head: str
    loss: str
    sizes: tuple  # images of each batch
    in_order: bool = False  # of classes
    kind: str = "hessian"
    mode: str = "auto"
    micro_batch: int | None = None
    params: str | None = None
    loader: bool = False
    memory: float | None = None
    seed: int = 0

    def parts(self):
        chosen = [kinds.BLOCKS[b] for b in self.blocks]
        return [kinds.FRONTS[self.front], *chosen, kinds.LOSSES[self.loss]]

    def known(self):
        "Is what the loss divides by PyTorch's rule, or told?"
        loss = kinds.LOSSES[self.loss]
        return type(loss.make()).__module__.startswith("torch.nn") or loss.told is not None

    def crowd(self):
        return any(kinds.BLOCKS[b].crowd for b in self.blocks)

    def cut(self):
        return len(self.sizes) > 1 or self.micro_batch is not None

    def may_be_refused(self):
        "Is there something that no rule could promise here?"
        parts = self.parts()
        if any(p.refusable for p in parts):
            return True
        by_hand = self.mode != "auto" or self.kind == "gauss_newton"
        if by_hand and any(p.hard for p in parts):
            return True
        loss, several = (
            kinds.LOSSES[self.loss],
            self.cut() or self.loader or self.memory is not None,
        )
        if loss.unknown and several:
            return True
        few = (
            min(self.sizes) < 3
            or (self.micro_batch is not None and self.micro_batch < 3)
            or self.memory is not None
        )
        return self.mode == "forward" or (not self.known() and several and few)


def rows(X, s):
    if isinstance(X, dict):
        return {k: t[s] for k, t in X.items()}
    return tuple(t[s] for t in X) if isinstance(X, tuple) else X[s]


def batches(X, y, sizes):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [(rows(X, slice(e - n, e)), y[e - n : e]) for n, e in zip(sizes, ends)]


def problem(d):
    "The network, its twin by other operations, and all data."
    g = torch.Generator().manual_seed(d.seed)
    loss, n = kinds.LOSSES[d.loss], sum(d.sizes)
    y = torch.arange(n) % kinds.CLASSES
    y = y.sort().values if d.in_order else y[torch.randperm(n, generator=g)]
    X, t = kinds.FRONTS[d.front].inputs(n, g), loss.targets(y, g)
    net, twin = (
        kinds.network(d.front, d.blocks, d.head, after=loss.after, seed=d.seed, twin=b)
        for b in (False, True)
    )
    return net, kinds.Truth(twin, loss.twin(), X, t), loss.make(), X, t


def chosen_rows(truth, net, pattern):
    "Which entries of all parameters belong to those whose names begin so."
    if pattern is None:
        return slice(None)
    wanted = [k.startswith(pattern[:-1]) for k, p in net.named_parameters() if p.requires_grad]
    return torch.cat([torch.full((s.numel(),), w) for w, s in zip(wanted, truth.shapes)])


def operator(d, net, loss_fn, X, y):
    data = batches(X, y, d.sizes)
    if d.loader:
        data = DataLoader(data, batch_size=None)
    return HessianOperator(
        net,
        loss_fn,
        data,
        params=d.params,
        kind=d.kind,
        mode=d.mode,
        micro_batch=d.micro_batch,
        memory=d.memory,
        reduction=kinds.LOSSES[d.loss].told,
    )


def has_rule_and_way_out(e):
    "Does a refusal say what must hold, what was found, and what to do?"
    rule, _, way_out = str(e).rpartition(";")
    return len(rule.split()) > 5 and len(way_out.split()) > 1


def outcome(d, truth_checked=False):
    "'right' or 'refused'; anything else is an assertion error."
    net, truth, loss_fn, X, y = problem(d)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    which = chosen_rows(truth, net, d.params)
    M = truth.gauss_newton() if d.kind == "gauss_newton" else truth.hessian()
    v = torch.randn(len(M), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if (
        truth_checked and d.kind == "hessian"
    ):  # the double backward that judges is judged by single ones
        assert off(M @ v[:, 0], truth.curvature(v[:, 0]), M) < 1e-4
    M, v = M[which][:, which], v[which]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            op = operator(d, net, loss_fn, X, y)
            product, mode = op @ v, op.plan().mode
        value, gradient = op.gradient()
    except InputError as e:
        assert has_rule_and_way_out(e), f"a refusal must name the rule and the way out: {e}"
        assert d.may_be_refused(), f"this is sound, and was refused: {e}"
        return "refused"
    if d.mode == "auto" and mode == "difference":
        assert any("difference" in str(w.message) for w in said), "differences are announced"
    error = off(product, M @ v, M)
    assert error < (ROUGH if mode == "difference" else EXACT), (error, mode)
    g = truth.gradient()[which]
    assert abs(value - truth.loss(truth.theta).item()) <= EXACT * max(abs(value), 1.0), "the loss"
    assert (gradient - g).norm() <= EXACT * max(g.norm().item(), 1e-3), "the gradient"
    after = net.state_dict()
    assert all(torch.equal(after[k], t) for k, t in before.items()), "the network is left as it was"
    return "right"


def off(a, b, M):
    "Distance of two products, relative to what a product with M is like."
    return ((a - b).norm() / (b.norm() + M.norm() * FLOOR + FLOOR)).item()


# Each kind alone ----------------------------------------------------------------------------------

EACH = (
    [("block", b) for b in kinds.BLOCKS]
    + [("front", f) for f in kinds.FRONTS]
    + [("head", h) for h in kinds.HEADS]
    + [("loss", name) for name in kinds.LOSSES]
)


def alone(what, name, **more):
    parts = (
        dict(
            front="vectors", blocks=("tanh",), head="linear", loss="cross-entropy", sizes=(4, 1, 5)
        )
        | more
    )
    parts[what if what != "block" else "blocks"] = name if what != "block" else (name,)
    if what == "block" and kinds.BLOCKS[name].crowd:
        parts["sizes"] = (10,)
    if what == "loss":
        parts["sizes"] = more.get("sizes", (4, 3, 3))
    return Drawn(**parts)


@pytest.mark.parametrize("what, name", EACH, ids=[f"{w}: {n}" for w, n in EACH])
def test_each_kind_alone(what, name):
    outcome(alone(what, name), truth_checked=True)
    outcome(alone(what, name, kind="gauss_newton", sizes=(10,)))


# Drawn together -----------------------------------------------------------------------------------


def from_number(number):
    """A network and all that goes with it.

    Hypothesis draws one number: drawn piece by piece, examples repeat each other. What no rule can
    promise (a mode chosen by hand for a layer that lacks it, a loss whose denominator cannot be
    known) is drawn less often than the rest.
    """
    pick = random.Random(number)

    def some(choices):
        return pick.choice(sorted(choices))

    def mostly_sure(choices):
        first = some(choices)
        doubtful = choices[first].refusable or getattr(choices[first], "unknown", False)
        return some(choices) if doubtful else first

    blocks = tuple(mostly_sure(kinds.BLOCKS) for _ in range(pick.choice([1, 2])))
    d = Drawn(
        mostly_sure(kinds.FRONTS),
        blocks,
        some(kinds.HEADS),
        mostly_sure(kinds.LOSSES),
        (1,),
        seed=number % 1000,
    )
    smooth, hard = all(p.smooth for p in d.parts()), any(p.hard for p in d.parts())
    modes = [m for m in MODES if smooth or m != "difference"] + ["auto"] * (30 if hard else 2)
    least = 1 if d.known() else 3  # images that a piece must hold
    sizes = tuple(pick.randint(least, 6) for _ in range(1 if d.crowd() else pick.randint(1, 4)))
    d = replace(
        d,
        sizes=sizes,
        in_order=pick.random() < 0.5,
        mode=pick.choice(modes),
        loader=pick.random() < 0.3,
        kind=pick.choice(["hessian"] * (9 if hard else 3) + ["gauss_newton"]),
        params=pick.choice([None, None, "head*"]),
    )
    if d.mode == "auto" and pick.random() < 0.3 and least == 1:
        d = replace(d, memory=1.0)
    if not d.crowd() and d.mode != "cached":
        d = replace(
            d,
            micro_batch=pick.choice(
                [None, None, 1, 2, 4] if least == 1 else [None, None, None, 3, 4]
            ),
        )
    return d


drawn = st.integers(0, 2**63 - 1).map(from_number)


def tally(examples, start=None):
    """How many networks came out right and refused, and the kinds of layers that were seen.

    With a start they are the same networks every time, whatever is edited here.
    """
    count, seen = Counter(), set()

    @settings(
        max_examples=examples,
        derandomize=False,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def each(d):
        truth = problem(d)[1]
        if not torch.isfinite(truth.loss(truth.theta)):
            return  # every label ignored: there is no loss
        count[outcome(d)] += 1
        seen.update(d.blocks + (d.front + " (front)", d.head + " (head)"))

    if start is not None:
        each = seed(start)(each)
    each()
    return count, seen


def judge(count, seen, examples):
    assert sum(count.values()) >= 0.9 * examples and len(seen) >= 60
    assert count["refused"] <= 0.1 * sum(count.values()), count


def test_fifty_networks():
    judge(*tally(50, start=0), 50)


@pytest.mark.slow
def test_five_hundred_networks():
    judge(*tally(500), 500)

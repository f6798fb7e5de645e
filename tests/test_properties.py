"Statements that must hold for any input, tried on many."

import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from hessian_surgery_nb.baselines import tune_biases, class_accuracies
from hessian_surgery_nb.foundations.intervals import paired_interval
from hessian_surgery_nb.effective_rank import effective_rank
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.amplitude import AdamControl, GammaDecay
from hessian_surgery_nb.coefficients import class_weights, solve_coefficients
from hessian_surgery_nb.foundations.testbed import (
    dense_hessian,
    relative_error,
    tiny_data,
    tiny_mlp,
)

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

accuracies = arrays(np.float64, st.integers(2, 8), elements=st.floats(0, 1))
finite = st.floats(-10, 10, allow_subnormal=False)


@st.composite
def problems(draw):
    a = draw(accuracies)
    return draw(arrays(np.float64, (len(a), draw(st.integers(1, 5))), elements=finite)), a


@given(accuracies, st.floats(0, 4))
def test_weights_are_a_distribution_ordered_by_error(a, p):
    w = class_weights(a, p).numpy()
    assert abs(w.sum() - 1) < 1e-12 and (w >= 0).all()
    order = np.argsort(a, kind="stable")
    assert (np.diff(w[order]) <= 1e-12).all()


@given(problems(), st.floats(1e-3, 10), st.floats(0, 0.1), st.booleans())
def test_coefficients_are_feasible_and_never_hurt(problem, eps, drop, boxed):
    S, a = problem
    box = np.linspace(0.5, 1.5, S.shape[1]) * eps if boxed else None
    alpha = solve_coefficients(S, a, eps, max_drop=drop, box=box).numpy()
    assert np.isfinite(alpha).all()
    assert (
        (np.abs(alpha) <= box * (1 + 1e-9)).all()
        if boxed
        else np.linalg.norm(alpha) <= eps * (1 + 1e-9)
    )
    assert (S[a >= a.mean()] @ alpha >= -drop - 1e-8).all()
    assert class_weights(a, 1).numpy() @ S @ alpha >= -1e-9 * max(1, eps)


@given(problems(), st.randoms(use_true_random=False))
def test_no_random_feasible_point_is_better(problem, random):
    S, a = problem
    alpha, c = solve_coefficients(S, a, 0.1).numpy(), class_weights(a, 1).numpy() @ S
    rng = np.random.default_rng(random.randrange(2**32))
    P = rng.normal(size=(500, S.shape[1]))
    P *= 0.1 * rng.random((500, 1)) / np.linalg.norm(P, axis=1, keepdims=True)
    ok = (P @ S[a >= a.mean() - 1e-9].T >= -0.01).all(1)
    assert (P[ok] @ c).max(initial=0) <= c @ alpha + 1e-6 * max(1, np.abs(c).max())


@given(problems())
def test_forbidding_any_loss_is_the_limit_of_allowing_a_little(problem):
    S, a = (
        problem[0].round(2),
        problem[1],
    )  # entries that are neither 0 nor a hundredth make the limit a cliff
    gain = lambda drop: (
        class_weights(a, 1).numpy() @ S @ solve_coefficients(S, a, 0.1, max_drop=drop).numpy()
    )
    assert gain(0.0) >= gain(1e-7) - 1e-4


@given(problems())
def test_turning_a_spike_around_changes_nothing(problem):
    S, a = problem
    flip = np.where(np.arange(S.shape[1]) % 2, -1.0, 1.0)
    gain = lambda S: class_weights(a, 1).numpy() @ S @ solve_coefficients(S, a, 0.05).numpy()
    assert abs(gain(S) - gain(S * flip)) < 1e-6


@given(st.lists(st.tuples(st.floats(-1, 1), st.booleans()), max_size=30), st.integers(1, 30))
def test_amplitudes_stay_within_bounds(steps, budget):
    decay, adam = GammaDecay(0.1), AdamControl(0.1, budget)
    decay = decay.started(0.2)
    for s, accepted in steps:
        before = decay.eps
        decay = decay.after_step(abs(s), s, accepted)
        adam = adam.after_step(abs(s), s, accepted)
        assert decay.eps <= before and 0.01 - 1e-12 <= adam.eps <= 0.1 + 1e-12


@given(
    arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=finite),
    st.sampled_from(["energy", "amplitude"]),
    st.floats(0.01, 100),
)
def test_effective_rank_is_between_one_and_the_rank_and_scale_free(S, weights, scale):
    r = effective_rank(S, weights=weights)
    assert 1 - 1e-12 <= r <= min(S.shape) + 1e-9
    assert abs(r - effective_rank(scale * S, weights=weights)) < 1e-6


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from(["mean", "sum"]),
    st.booleans(),
    st.sampled_from(["cached", "recomputed", "forward"]),
)
@settings(max_examples=25)
def test_any_cut_into_batches_gives_the_same_product(sizes, reduction, weighted, mode):
    net, (X, y) = tiny_mlp((4, 5, 3)), tiny_data(sum(sizes), 4)
    loss = nn.CrossEntropyLoss(
        reduction=reduction,
        ignore_index=2,
        weight=torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64) if weighted else None,
    )
    v = torch.randn(43, generator=torch.Generator().manual_seed(len(sizes)), dtype=torch.float64)
    out = HessianOperator(net, loss, list(zip(X.split(sizes), y.split(sizes))), mode=mode) @ v
    assert relative_error(out, dense_hessian(net, loss, X, y) @ v) < 1e-10


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_tuned_biases_never_hurt_where_they_were_tuned(seed):
    g = torch.Generator().manual_seed(seed)
    Z, y = torch.randn(60, 4, generator=g), torch.arange(60) % 4
    before, after = class_accuracies(Z, y), class_accuracies(Z + tune_biases(Z, y), y)
    assert (
        after.std(correction=0) <= before.std(correction=0) + 1e-12
        and after.mean() >= before.mean() - 1e-12
    )


def test_paired_interval_covers_the_truth():
    """Two classifiers with known class accuracies: the interval of the difference of sigma holds
    it in at least 85 of 100 draws of the test set.
    """
    y = torch.arange(10).repeat(200)
    pa, pb = torch.linspace(0.5, 0.95, 10), torch.linspace(0.7, 0.9, 10)
    truth, hits = (pb.std(correction=0) - pa.std(correction=0)).item(), 0
    for seed in range(100):
        u = torch.rand(2, len(y), generator=torch.Generator().manual_seed(seed))
        lo, hi = paired_interval(u[0] < pa[y], u[1] < pb[y], y, draws=400, seed=seed)
        hits += lo <= truth <= hi
    assert hits >= 85, hits

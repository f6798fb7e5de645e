"""One verdict of any change: what it never says, what it always names, how often its intervals
hold.
"""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.class_limits import class_limits
from hessian_surgery_nb.foundations.paired_shares import (
    discordant_p_value,
    paired_counts,
    paired_share_interval,
)
from hessian_surgery_nb.verdict import (
    DO_NOT_KEEP,
    KEEP,
    NO_CHANGE,
    TOLERATED,
    UNDECIDED,
    Change,
    held_out_verdict,
)


def pair(*classes):
    "Answers before and after, and labels, from (images, right before, gained, lost) of each."
    before, after, labels = [], [], []
    for row, (images, right, gained, lost) in enumerate(classes):
        was = torch.arange(images) < right
        is_now = was.clone()
        is_now[right : right + gained] = True
        is_now[:lost] = False
        before.append(was)
        after.append(is_now)
        labels.append(torch.full((images,), row))
    return torch.cat(before), torch.cat(after), torch.cat(labels)


# of an imbalanced table: 70, 20, 7 and 3 % of the rows, and the largest class pays
IMBALANCED = pair((2100, 1995, 10, 310), (600, 510, 20, 12), (210, 120, 9, 5), (90, 33, 5, 4))


@st.composite
def changes(draw):
    classes = []
    for _ in range(draw(st.integers(1, 5))):
        images = draw(st.integers(1, 300))
        right = draw(st.integers(0, images))
        gained = draw(st.integers(0, images - right))
        lost = draw(st.integers(0, right))
        classes.append((images, right, gained, lost))
    return pair(*classes)


def test_ten_points_of_global_accuracy_are_not_kept_though_the_spread_fell():
    verdict = held_out_verdict(*IMBALANCED, ["common", "usual", "seldom", "rare"])
    assert verdict.sigma.high < 0
    assert verdict.outcome == DO_NOT_KEEP and verdict.is_harmful
    assert "the price in global accuracy is 9.6 pp" in verdict.line
    assert "Largest loser: common -14.3 pp" in verdict.line
    assert verdict.line.startswith("Do not keep the new weights: ")


@settings(max_examples=60, deadline=None)
@given(changes(), st.sampled_from([None, 0.0, 0.005, 0.02]))
def test_it_never_keeps_what_cost_more_than_allowed(change, price):
    verdict = held_out_verdict(*change, price=price)
    allowed = TOLERATED if price is None else price
    lost = (change[0].double() - change[1].double()).mean().item()
    assert math.isclose(verdict.overall.change, -lost, abs_tol=1e-12)
    if lost > allowed + 1e-9:
        assert verdict.outcome in (UNDECIDED, DO_NOT_KEEP)
        assert "price in global accuracy" in verdict.line
    if verdict.outcome == KEEP:
        assert verdict.sigma.high < 0
    if torch.equal(change[0], change[1]):
        assert verdict.outcome == NO_CHANGE


@settings(max_examples=60, deadline=None)
@given(changes())
def test_it_names_the_class_that_lost_most_and_reads_as_json(change):
    before, after, labels = change
    verdict = held_out_verdict(*change)
    falls = [
        (before[labels == row].double() - after[labels == row].double()).mean().item()
        for row in range(int(labels.max()) + 1)
    ]
    loser = verdict.largest_loser
    if max(falls) > 0:
        assert math.isclose(-loser.change, max(falls), abs_tol=1e-12)
        assert f"Largest loser: {loser.name}" in verdict.line
    else:
        assert loser is None
    found = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert found["outcome"] == verdict.outcome and found["says"] == verdict.line
    for each in verdict.classes:  # what holds for all at once holds more than each by itself
        assert each.all_low <= each.low + 1e-9 and each.high - 1e-9 <= each.all_high
        assert each.low <= each.change + 1e-9 and each.change - 1e-9 <= each.high


@settings(max_examples=60, deadline=None)
@given(changes(), st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter_and_time_turns_around(change, random):
    before, after, labels = change
    order = list(range(len(labels)))
    random.shuffle(order)
    one = held_out_verdict(before, after, labels)
    other = held_out_verdict(before[order], after[order], labels[order])
    assert one.line == other.line
    back = held_out_verdict(after, before, labels)
    for name in ("overall", "balanced"):
        there, again = getattr(one, name), getattr(back, name)
        assert math.isclose(there.low, -again.high, abs_tol=1e-9)


def test_a_price_that_was_paid_more_dearly_is_said_with_its_interval():
    dear = pair((1000, 950, 5, 40), (1000, 600, 40, 20))
    verdict = held_out_verdict(*dear, price=0.005)
    assert verdict.outcome == UNDECIDED  # 0.75 pp for 0.5, by chance or not
    assert "the price in global accuracy is 0.8 pp [" in verdict.line
    assert "more than the 0.5 pp that were asked for at most, as counted" in verdict.line
    assert held_out_verdict(*dear, price=0.01).outcome == KEEP


def test_what_may_still_be_lost_is_said_of_weights_that_are_kept():
    few = pair((100, 95, 0, 1), (100, 50, 22, 1))
    verdict = held_out_verdict(*few, price=0.0)
    assert verdict.outcome == KEEP and verdict.warnings == ()
    even = pair((100, 95, 0, 12), (100, 50, 13, 1))
    verdict = held_out_verdict(*even, price=0.0)
    assert verdict.outcome == KEEP
    assert "is not excluded" in verdict.warnings[0] and verdict.warnings[0] in verdict.line


def test_the_largest_of_many_classes_is_no_loser_by_luck():
    rng = np.random.default_rng(1)
    called = 0
    for _ in range(150):
        cells = [(60, 50, rng.binomial(10, 0.3), rng.binomial(50, 0.06)) for _ in range(40)]
        verdict = held_out_verdict(*pair(*cells))
        called += verdict.largest_loser.beyond_chance
    # 5 % on either side at most, plus 3 standard errors of 150 trials
    assert called / 150 <= 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5


@pytest.mark.parametrize("figure", ["overall", "balanced"])
def test_intervals_of_the_figures_hold_as_often_as_they_say(figure):
    rng = np.random.default_rng(2)
    images = np.array([300, 120, 60, 30])
    right = np.array([0.95, 0.85, 0.7, 0.6])
    gain, loss = np.array([0.1, 0.2, 0.25, 0.3]), np.array([0.05, 0.03, 0.02, 0.02])
    change = (1 - right) * gain - right * loss
    truth = change.mean() if figure == "balanced" else (images * change).sum() / images.sum()
    held = []
    for _ in range(200):
        cells = []
        for size, share, up, down in zip(images, right, gain, loss):
            known = rng.binomial(size, share)
            cells.append((size, known, rng.binomial(size - known, up), rng.binomial(known, down)))
        found = getattr(held_out_verdict(*pair(*cells)), figure)
        held.append(found.low <= truth <= found.high)
    # three standard errors of 200 trials below 95 %
    assert np.mean(held) >= 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5, np.mean(held)


def test_no_sign_is_claimed_that_the_exact_test_does_not_claim():
    gained, lost = np.meshgrid(np.arange(30), np.arange(30))
    for level in (0.9, 0.95, 0.999):
        low, high = paired_share_interval(gained, lost, 200, level)
        claimed = (low > 0) | (high < 0)
        assert (discordant_p_value(gained, lost)[claimed] <= 1 - level).all()
        assert claimed.any()


def test_a_class_without_images_is_left_out():
    before, after, labels = pair((20, 15, 1, 2), (0, 0, 0, 0), (20, 10, 3, 1))
    counts = paired_counts(before, after, labels, 5)
    assert counts.images.tolist() == [20, 0, 20, 0, 0]
    verdict = held_out_verdict(before, after, labels, ["a", "b", "c", "d", "e"])
    assert [each.name for each in verdict.classes] == ["a", "c"]
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_another_aim_decides_where_it_is_given():
    worse_spread = pair((1000, 900, 60, 5), (1000, 700, 5, 20))
    assert held_out_verdict(*worse_spread).outcome == DO_NOT_KEEP
    better = Change(name="macro F1", before=0.8, after=0.82, low=0.01, high=0.03)
    verdict = held_out_verdict(*worse_spread, aim=better)
    assert verdict.outcome == KEEP and "macro F1 80.0 -> 82.0 %" in verdict.line


def test_protected_classes_and_floors_are_judged():
    change = pair((1000, 950, 5, 70), (1000, 600, 155, 15))
    names = ["cat", "dog"]
    assert held_out_verdict(*change, names).outcome == KEEP
    fell = held_out_verdict(*change, names, limits=class_limits(names, {"cat": 0.02}))
    assert fell.outcome == DO_NOT_KEEP and "cat fell by more than its limit of 2.0 pp" in fell.line
    held = held_out_verdict(*change, names, limits=class_limits(names, {"cat": 0.07}))
    assert held.outcome == KEEP
    floor = held_out_verdict(*change, names, limits=class_limits(names, None, {"cat": 0.94}))
    assert floor.outcome == DO_NOT_KEEP


def test_what_does_not_belong_together_is_refused():
    before, after, labels = IMBALANCED
    with pytest.raises(InputError, match="same images"):
        held_out_verdict(before, after[1:], labels)
    with pytest.raises(InputError, match="one at least"):
        held_out_verdict(before[:0], after[:0], labels[:0])
    with pytest.raises(InputError, match="not percent"):
        held_out_verdict(before, after, labels, price=1.5)
    with pytest.raises(InputError, match="one for each class"):
        held_out_verdict(before, after, labels, ["a", "b"])

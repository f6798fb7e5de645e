"""What a thousand classes ask for: the same answers as for ten, with other work behind them."""

import pytest
import torch

from hessian_surgery_nb import best_step
from hessian_surgery_nb.baselines import class_accuracies, tune_biases
from hessian_surgery_nb.best_step import margins, tuned_to_price
from hessian_surgery_nb.diagnosis import confused_pairs, confusion_counts
from hessian_surgery_nb.foundations import bias_search
from hessian_surgery_nb.foundations.bias_search import trial_accuracies


def drawn(images, classes, seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(images) % classes
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), y] += (2 + torch.randn(classes, generator=generator))[y]
    return (logits.round() if ties else logits), y


def every_trial(logits, labels, biases, step):
    "Each trial for itself, as tuned biases were found before."
    units = torch.eye(len(biases), dtype=biases.dtype)
    trials = [biases + sign * step * unit for unit in units for sign in (1, -1)]
    return torch.stack([class_accuracies(logits + trial, labels) for trial in trials])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 17])
def test_all_trials_in_one_pass_are_those_one_by_one(monkeypatch, classes, ties):
    monkeypatch.setattr(bias_search, "BLOCK", 5 * classes)
    for seed in range(3):
        logits, y = drawn(150, classes, seed, ties)
        biases = torch.linspace(-1, 1, classes, dtype=torch.float64)
        for step in (1.0, 0.25):
            found = trial_accuracies(logits, y, biases, step)
            assert torch.equal(found, every_trial(logits.double(), y, biases, step))


@pytest.mark.parametrize("classes", [3, 12])
def test_tuned_biases_do_not_depend_on_how_trials_are_counted(monkeypatch, classes):
    logits, y = drawn(40 * classes, classes, 0)
    found = tune_biases(logits, y)
    one_by_one = "hessian_surgery_nb.baselines.trial_accuracies"
    monkeypatch.setattr(one_by_one, lambda logits, *rest: every_trial(logits.double(), *rest))
    assert torch.equal(tune_biases(logits, y), found)


def test_tuned_biases_in_pieces(monkeypatch):
    logits, y = drawn(400, 8, 1)
    whole = tune_biases(logits, y)
    monkeypatch.setattr("hessian_surgery_nb.baselines._AT_ONCE", 1)
    monkeypatch.setattr(bias_search, "BLOCK", 8 * 50)
    assert torch.allclose(tune_biases(logits, y), whole, atol=1e-6)


@pytest.mark.parametrize("price", [0.0, 0.01])
@pytest.mark.parametrize("seed", [0, 1])
def test_biases_at_a_price_are_those_of_slsqp(monkeypatch, price, seed):
    logits, y = drawn(1200, 12, seed)
    slsqp = tuned_to_price(logits, y, price)
    monkeypatch.setattr(best_step, "_MANY", 11)
    monkeypatch.setattr(best_step, "_many_to_price", plain_radius(best_step._many_to_price))
    own = tuned_to_price(logits, y, price)
    before = class_accuracies(logits, y)
    # both stop near the optimum, and accuracies move by an image at a time
    spread = [step.predicted.std(correction=0) for step in (own, slsqp)]
    assert own.shrink == slsqp.shrink
    assert abs(spread[0] - spread[1]) < 0.02 * before.std(correction=0)
    assert own.predicted.mean() >= before.mean() - price - 2e-3
    assert torch.equal(tuned_to_price(logits, y, price).alpha, own.alpha)


def plain_radius(solve):
    "At 12 classes the radius is that of 12 classes, wherever the border to many lies."

    def solve_with(*given):
        step = None
        border = best_step._MANY
        best_step._MANY = 12
        try:
            step = solve(*given)
        finally:
            best_step._MANY = border
        return step

    return solve_with


def test_many_classes_take_the_other_way():
    logits, y = drawn(1300, 130, 0)
    step = tuned_to_price(logits, y, 0.0, count=2)
    before = class_accuracies(logits, y)
    radius = 4 * margins(logits, y)[0].abs().median()
    assert step.alpha.norm() <= radius * (130 / 128) ** 0.5 + 1e-5
    assert step.predicted.std() < before.std()


def test_confused_pairs_are_those_of_the_table():
    generator = torch.Generator().manual_seed(0)
    for classes, images in ((2, 9), (3, 40), (20, 300)):
        logits = torch.randn(images, classes, generator=generator)
        y = torch.randint(classes, (images,), generator=generator)
        table = confusion_counts(logits, y)
        errors = (table + table.T).triu(1).flatten()
        order = errors.argsort(descending=True, stable=True)[:4]
        truth = [(*divmod(int(place), classes), int(errors[place])) for place in order]
        found = confused_pairs(logits.argmax(1), y, 4)
        assert found == [pair for pair in truth if pair[2]]
    assert confused_pairs(y, y) == []

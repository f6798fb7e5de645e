"""What the diagnosis goes by: a trial on other images, not the share of a training loss."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hessian_surgery_nb.diagnosis import diagnose
from hessian_surgery_nb.foundations.accuracy import predict
from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.foundations.training import train
from hessian_surgery_nb.rest_trial import RestTrial, try_rest
from hessian_surgery_nb.settling import settledness

LOSS = nn.CrossEntropyLoss()
CLASSES = 4


def trial(gain=0.2, gain_error=0.02, beyond=0.3, beyond_error=0.03, newton=0.0):
    return RestTrial(
        gain=gain,
        gain_error=gain_error,
        newton_gain=newton,
        newton_gain_error=0.004,
        beyond=beyond,
        beyond_error=beyond_error,
        training_losses=(0.6, 0.5, 0.4),
        biases=torch.zeros(CLASSES, dtype=torch.float64),
        logits=torch.zeros(2, CLASSES),
        num_matvecs=0,
        num_images=2,
    )


def answers(images=4000, biases=(0.0, 0.0, 0.0, 0.0), seed=0):
    "Logits whose softmax is right, but for biases, and labels."
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, CLASSES, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits + torch.tensor(biases), labels


def named(found_trial, **how):
    return diagnose(*answers(**how), counts=[500] * CLASSES, trial=found_trial)


@pytest.mark.parametrize("beyond", [trial(), trial(beyond=0.1, newton=0.015)])
def test_a_gain_beyond_biases_is_an_unsettled_network(beyond):
    found = named(beyond)
    assert found.case == "unsettled" and found.advice.startswith("settle first")


@pytest.mark.parametrize(
    "other",
    [
        trial(gain=0.03, gain_error=0.005),  # memorised: nothing for other images
        trial(gain=-0.1, gain_error=0.02),
        trial(beyond=0.04),  # biases alone do it
        trial(beyond=0.04, newton=0.008),  # sure, but too small
        trial(beyond=None, beyond_error=None),  # the training loss does not fall
    ],
)
def test_without_either_it_is_not(other):
    assert named(other).case == "even"


def test_overlapping_intervals_are_undecided():
    near = named(trial(beyond=0.13))
    assert near.case == "undecided" and near.undecided == ("unsettled",)
    assert near.advice.startswith("settle first") and near.line.startswith("undecided")
    scattered = named(trial(gain=0.06, gain_error=0.04))
    assert scattered.case == "undecided" and "more images" in scattered.advice


def test_wrong_biases_are_named():
    found = named(trial(beyond=0.04), biases=(1.5, -1.5, 0.0, 0.0))
    assert found.case == "biased"
    assert found.bias_gain > 0.05


def test_a_bias_that_is_sure_but_gains_next_to_nothing_is_none():
    "So was a CIFAR-10 network called that biases did not help."
    found = named(trial(gain=0.0), images=60_000, biases=(0.3, 0.0, 0.0, 0.0))
    assert found.bias > 0.05 and found.bias_chance < 0.01
    assert found.case == "even" and found.bias_gain < 0.05


def test_an_undecided_case_does_not_hide_rare_classes():
    logits, labels = answers(biases=(1.5, 0.5, -0.5, -1.5))
    found = diagnose(logits, labels, counts=[800, 300, 100, 40], trial=trial(beyond=0.13))
    assert found.case == "rare" and found.undecided == ("unsettled",)


def test_a_memorised_long_tail_is_not_unsettled():
    "Its training loss is next to nothing, and a Newton step takes a large share of that."
    splits = long_tail_splits(load_digits(), seed=0, head=70, ratio=30.0)
    network = digits_net(width=3, seed=0)
    recipe = dict(epochs=12, lr=0.1, optimizer="sgd", batch_size=8, weight_decay=0.0)
    train(network, splits.train.pair, schedule="cosine", seed=0, **recipe)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))
    images = splits.train[order]
    curvature = dict(hessian_data=splits.hessian.pair)
    assert not settledness(network, LOSS, images.batches(16), **curvature).settled
    tried = try_rest(network, LOSS, images.batches(64), splits.sensitivity.pair, **curvature)
    logits, labels = predict(network, splits.sensitivity.pair)
    found = diagnose(logits, labels, counts=splits.train.counts, trial=tried)
    assert "unsettled" not in found.cases
    assert found.case == "rare"


def test_the_gain_does_not_depend_on_the_order_of_images():
    logits, labels = answers()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    one = diagnose(logits, labels)
    other = diagnose(logits[order], labels[order])
    assert abs(one.bias_gain - other.bias_gain) < one.bias_gain_error + 1e-3
    assert replace(one, bias_gain=0.0, bias_gain_error=0.0).sigma == pytest.approx(other.sigma)

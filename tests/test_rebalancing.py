"Goals, fits, the choice and `rebalance` on inputs that the notebooks do not show."

import warnings

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator
from torch import nn

from hessian_surgery_nb.app.own_network import OwnBatches
from hessian_surgery_nb.fits import Tuned, Tuning, by_class, by_counts, limit_confidence
from hessian_surgery_nb.foundations.accuracy import predict
from hessian_surgery_nb.foundations.adjusted import Adjusted
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.networks import resnet20
from hessian_surgery_nb.foundations.preparation import Preparation
from hessian_surgery_nb.foundations.stored_rows import DiskRows
from hessian_surgery_nb.goals import Goal, Scoring
from hessian_surgery_nb.rebalancer import Rebalancer
from hessian_surgery_nb.rebalancing import rebalance
from hessian_surgery_nb.settling_methods import settle
from hessian_surgery_nb.shifts import ScaleAndShift, Shift, solve_change

OBJECTIVES = ("spread", "worst", "weakest:2", "balanced", "f1", ["a", "c"], "cost")
NAMES = tuple("abcd")


def drawn(images: int, classes: int, seed: int, preference: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images * classes) % classes
    logits = torch.randn(len(labels), classes, generator=generator)
    logits += preference * torch.randn(classes, generator=generator)
    logits[torch.arange(len(labels)), labels] += 2.0
    return logits, labels


def costs(classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(classes, classes, generator=generator).double().fill_diagonal_(0)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(OBJECTIVES),
    st.integers(0, 10_000),
    st.sampled_from([None, 0.0, 0.01, 0.1]),
    st.sampled_from([{}, {"b": 0.0}, {"b": 0.0, "d": 0.02}]),
    st.sampled_from([None, 0.0, 0.05]),
    st.sampled_from([Shift, ScaleAndShift]),
)
def test_limits_hold_to_the_image_and_nothing_gets_worse(
    objective, seed, drop, protect, class_drop, change
):
    logits, labels = drawn(30, 4, seed)
    objective = costs(4) if objective == "cost" else objective
    goal = Goal(
        objective=objective, max_global_drop=drop, protect=protect, max_class_drop=class_drop
    )
    before = logits.argmax(1)
    scoring = Scoring(goal, labels, before, NAMES)
    moved = change(4, 1.0)
    answers = moved.of_all(solve_change(logits, scoring, moved), logits).argmax(1)
    assert scoring.of_answers(answers)[0] >= scoring.of_answers(before)[0] - 1e-12
    right_before, right_after = before == labels, answers == labels
    if drop is not None:
        assert right_after.double().mean() >= right_before.double().mean() - drop - 1e-9
    for number, name in enumerate(NAMES):
        allowed = min(protect.get(name, 1.0), 1.0 if class_drop is None else class_drop)
        inside = labels == number
        fall = right_before[inside].double().mean() - right_after[inside].double().mean()
        assert fall <= allowed + 1e-9


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.integers(40, 60))
def test_few_candidates_stand_for_many_classes(seed, classes):
    "What is returned keeps to the limits among all classes, not among the candidates."
    logits, labels = drawn(6, classes, seed, preference=2.0)
    names = [str(number) for number in range(classes)]
    scoring = Scoring(Goal(objective="balanced"), labels, logits.argmax(1), names)
    change = Shift(classes, 1.0)
    answers = change.of_all(solve_change(logits, scoring, change), logits).argmax(1)
    assert scoring.holds(answers)
    assert scoring.of_answers(answers)[0] >= scoring.of_answers(scoring.before)[0]


def test_a_fit_sees_only_its_rows():
    logits, labels = drawn(40, 4, 0)
    other = logits.clone()
    rows = torch.arange(0, 160, 2)
    other[1::2] = torch.randn(80, 4)
    fits = []
    for given_logits in (logits, other):
        scoring = Scoring(Goal(), labels, given_logits.argmax(1), NAMES)
        tuning = Tuning(scoring=scoring)
        shift = by_class(Shift, tuning, given_logits)
        fits.append(Tuned("biases", 2, tuning, given_logits, shift).fit(rows))
    assert torch.equal(fits[0].shift, fits[1].shift)


@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.9])
def test_limits_hold_on_tuning_images_whatever_the_confidence(confidence):
    logits, labels = drawn(40, 4, 4, preference=0.0)
    goal = Goal(objective=["a"], max_global_drop=0.0)
    scoring = Scoring(goal, labels, logits.argmax(1), NAMES)
    tuning = Tuning(scoring=scoring, confidence=confidence)
    rows = torch.arange(len(labels))
    biases = Tuned("biases", 2, tuning, logits, by_class(Shift, tuning, logits))
    for method in (biases, by_counts(tuning, logits, [5, 50, 500, 5000])):
        assert scoring.holds(method.fit(rows).logits(rows).argmax(1))


def test_a_limit_on_a_class_without_flips_is_not_certain():
    labels = torch.arange(400) % 4
    before = labels.clone()
    before[::7] = (labels[::7] + 1) % 4
    answers = before.clone()
    lost = ((labels == 0) & (before == labels)).nonzero().flatten()[:20]
    answers[lost] = 1
    scoring = Scoring(Goal(max_global_drop=None, protect={"c": 0.0}), labels, before, NAMES)
    assert limit_confidence(scoring, answers)[1] == 0.5  # as counted it holds, and no more is known


# --- the estimator


COLUMNS_ARE_CLASSES = "columns are classes, which these drawn features are not"
_NOT_FOR_LOGITS = (
    "check_estimators_overwrite_params",
    "check_estimators_fit_returns_self",
    "check_readonly_memmap_input",
    "check_n_features_in_after_fitting",
    "check_positive_only_tag_during_fit",
    "check_estimators_dtypes",
    "check_dtype_object",
    "check_pipeline_consistency",
    "check_estimators_nan_inf",
    "check_estimators_pickle",
    "check_classifiers_classes",
    "check_classifiers_train",
)


_OF_PARAMETERS = (
    "check_no_attributes_set_in_init",
    "check_dont_overwrite_parameters",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimators_unfitted",
    "check_estimator_sparse_tag",
)


def test_parameters_follow_scikit_learn():
    done = []
    for estimator, check in estimator_checks_generator(Rebalancer()):
        name = check.func.__name__
        if name in _OF_PARAMETERS:
            check(estimator)
            done.append(name)
    assert set(_OF_PARAMETERS) == set(done)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_estimator_follows_scikit_learn_wherever_columns_are_classes():
    expected = dict.fromkeys(_NOT_FOR_LOGITS, COLUMNS_ARE_CLASSES)
    check_estimator(Rebalancer(folds=2), expected_failed_checks=expected)


def test_frames_arrays_and_text_labels_agree():
    logits, labels = drawn(30, 4, 1)
    frame = pd.DataFrame(logits.numpy(), columns=list(NAMES))
    text = np.array(NAMES)[labels.numpy()]
    by_frame = Rebalancer(folds=2).fit(frame, text)
    by_array = Rebalancer(folds=2).fit(logits.numpy(), labels.numpy())
    assert by_frame.predict(frame).tolist() == [NAMES[n] for n in by_array.predict(logits.numpy())]


def test_columns_in_another_order_give_the_same_classes():
    logits, labels = drawn(60, 4, 2)
    frame = pd.DataFrame(logits.numpy(), columns=list(NAMES))
    text = np.array(NAMES)[labels.numpy()]
    turned = frame[list("dcba")]
    one = Rebalancer(folds=2).fit(frame, text).predict(frame)
    other = Rebalancer(folds=2).fit(turned, text).predict(turned)
    assert (one == other).mean() > 0.9


def test_groups_replace_classes():
    logits, labels = drawn(100, 4, 3)
    groups = np.where(labels.numpy() < 2, "north", "south")
    found = Rebalancer(objective="worst", folds=2).fit(logits.numpy(), labels.numpy(), groups)
    assert found.choice_.names[0] == "no change"
    with pytest.raises(InputError, match="one for each of the 400"):
        Rebalancer().fit(logits.numpy(), labels.numpy(), groups[:5])


# --- a network


class LogSoftmaxHead(nn.Module):
    "Scales cannot be folded into its head; biases can."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).tanh()).log_softmax(1)


def sets(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(700, 6, generator=generator)
    teacher = torch.randn(6, 4, generator=generator)
    y = (x @ teacher + torch.tensor([1.0, 0.0, 0.0, -1.0])).argmax(1)
    return (x[:100], y[:100]), (x[100:400], y[100:400]), (x[400:], y[400:])


@pytest.mark.parametrize("kind", ["plain", "log-softmax", "no bias"])
def test_every_methods_network_gives_what_is_reported(kind):
    torch.manual_seed(1)
    if kind == "log-softmax":
        net = LogSoftmaxHead()
    else:
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=kind != "no bias"))
    net.eval()
    curved, tuned, held_out = sets()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    result = rebalance(
        net,
        nn.CrossEntropyLoss(),
        curved,
        tuned,
        held_out=held_out,
        max_global_drop=None,
        objective="balanced",
        methods=["biases", "biases and scales", "tau-norm", "class means and biases"],
        folds=2,
        prices=(0.0, 0.01),
        progress=False,
    )
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    for outcome in result.outcomes:
        network = result.network(outcome.name)
        logits, labels = predict(network, held_out)
        assert torch.equal(logits.argmax(1) == labels, outcome.correct)
    around = isinstance(result.network("biases and scales"), Adjusted)
    assert around == (kind != "plain")
    assert isinstance(result.network("biases"), Adjusted) == (kind == "no bias")


def test_a_result_outlives_changes_of_the_callers_network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    curved, tuned, held_out = sets()
    result = rebalance(
        net,
        nn.CrossEntropyLoss(),
        curved,
        tuned,
        held_out=held_out,
        methods=["biases", "class means"],
        folds=2,
        prices=(),
        progress=False,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(-2)
    for outcome in result.outcomes:
        logits, labels = predict(result.network(outcome.name), held_out)
        assert torch.equal(logits.argmax(1) == labels, outcome.correct)


def test_held_out_images_have_no_say():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    _, tuned, (x, y) = sets()
    options = dict(methods=["biases"], folds=2, prices=(), progress=False, check_overlap=False)
    results = [
        rebalance(net, None, None, tuned, held_out=held_out, **options)
        for held_out in ((x, (y + 1) % 4), None)
    ]
    assert len({result.method for result in results}) == 1
    shifts = [result["biases"].fit.shift for result in results]
    assert torch.equal(shifts[0], shifts[1])


def test_wrong_wishes_are_refused_before_any_work():
    _, tuned, _ = sets()
    net = nn.Linear(6, 4).eval()
    for wish, says in (
        (dict(max_global_drop=0.5 * 100), "half a point is 0.005"),
        (dict(methods=["bias"]), "Got bias"),
        (dict(objective="sigma"), "Got 'sigma'"),
        (dict(protect={"9": 0.1}), "Got '9'"),
        (dict(confidence=1.0), "between 0 and 1"),
        (dict(folds=1), "folds"),
        (dict(groups=["a", "b"]), "one for each of the 300"),
    ):
        with pytest.raises(InputError, match=says):
            rebalance(net, None, None, tuned, progress=False, **wish)


@pytest.mark.parametrize("shares, warns", [((100, 100, 100, 100), 0), ((340, 20, 20, 20), 1)])
def test_another_mix_of_classes_in_the_held_out_images_is_told(shares, warns):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor(shares))
    held = torch.randn(len(labels), 4, generator=generator)
    held[torch.arange(len(labels)), labels] += 2.0
    few, few_labels = drawn(5, 4, 1)
    tuned = drawn(40, 4, 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = rebalance(
            nn.Linear(4, 4),
            nn.CrossEntropyLoss(),
            (few, few_labels),
            tuned,
            held_out=(held, labels),
            methods=["biases"],
            prices=(),
            names=NAMES,
            progress=False,
        )
    told = [str(each.message) for each in told if "mixed differently" in str(each.message)]
    assert len(told) == warns
    assert all("a is 25% of the images that decide and 85%" in text for text in told)
    assert result.choice.names == ("no change", "biases")


class CountedRows(DiskRows):
    "How many rows are read at a time."

    def read(self, rows, into=None):
        found = super().read(rows, into)
        self.most = max(getattr(self, "most", 0), len(found))
        return found


def test_an_anneal_reads_a_batch_at_a_time_and_ends_as_on_images_in_memory(tmp_path):
    images = torch.randint(
        0, 256, (300, 3, 8, 8), generator=torch.Generator().manual_seed(0)
    ).byte()
    images[:, 0] //= 1 + torch.arange(300)[:, None, None] % 3  # what tells classes apart
    labels = torch.arange(300) % 3
    file = tmp_path / "rows"
    file.write_bytes(images.numpy().tobytes())
    with file.open("rb") as opened:
        stored = CountedRows(opened, images.shape, torch.uint8)
        preparation = Preparation(mean=(0.5,) * 3, std=(0.25,) * 3)
        on_disk = OwnBatches(stored, labels, preparation, size=40)
        in_memory = list(OwnBatches(images, labels, preparation, size=40))
        net = resnet20(classes=3, width=4, blocks=1)
        ends = [
            settle(net, nn.CrossEntropyLoss(), data, steps=12, batch_size=16, lr=1e-3)
            for data in (in_memory, on_disk)
        ]
    assert ends[0].chosen > 0
    assert stored.most <= 16
    assert ends[0].losses == pytest.approx(ends[1].losses, rel=1e-5)
    for one, other in zip(ends[0].model.parameters(), ends[1].model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

"""The engine on a GPU, against dense algebra and against itself on the processor, in float64.

The device is HESSIAN_SURGERY_TEST_DEVICE; by default a GPU where there is one. Images stay on the
processor, as they do in experiments: the library moves each batch.
"""

import copy
import os
import tempfile

import pytest
import torch
from torch import nn

from hessian_surgery_nb.baselines import post_hoc
from hessian_surgery_nb.class_structure import class_subspace
from hessian_surgery_nb.comparison import compare
from hessian_surgery_nb.deflated_surgery import deflated_operate
from hessian_surgery_nb.deflation import SpikeStore
from hessian_surgery_nb.effective_rank import screen
from hessian_surgery_nb.foundations.accuracy import class_accuracy, predict
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.foundations.testbed import dense_hessian, relative_error
from hessian_surgery_nb.foundations.training import FocalLoss, effective_number_loss, train
from hessian_surgery_nb.foundations.weight_files import load_weights, weights_bytes
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import eigen_residuals, top_eigenpairs
from hessian_surgery_nb.linearised import linearised_operate
from hessian_surgery_nb.predicted_logits import logit_jacobian
from hessian_surgery_nb.sensitivity import sensitivity_matrix
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.settling import class_bias, settledness
from hessian_surgery_nb.settling_methods import newton_in_spikes, settle
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.spike_validation import bulk_walk, count_spikes, stability
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.walks import walk_to_losses

GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = os.environ.get("HESSIAN_SURGERY_TEST_DEVICE") or GPU
LOSS = nn.CrossEntropyLoss()
QUICK = SurgeryConfig(iterations=2, num_spikes=2, tau=0.9, scheme="forward")


def images(count, seed, dtype=torch.float64):
    "Three classes, told apart by where they are bright."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 1, 8, 8, generator=generator, dtype=dtype)
    noise[torch.arange(count), 0, 2 * labels] += 1.0
    return noise, labels


CURVATURE, TUNED, HELD = images(48, 0), images(90, 1), images(90, 2)


@pytest.fixture(scope="module")
def here():
    "A network that was trained a little, on the processor."
    network = digits_net(classes=3, width=2, seed=0).double()
    train(network, images(120, 3), epochs=3, lr=1e-2)
    return network


@pytest.fixture
def there(here):
    "The same on the device."
    return copy.deepcopy(here).to(DEVICE)


def is_there(tensor):
    return tensor.device.type == torch.device(DEVICE).type


def numbers(value):
    "All floats of a nested result, for comparison."
    if torch.is_tensor(value):
        return value.detach().double().cpu().reshape(-1).tolist()
    if isinstance(value, dict):
        return [number for key in value for number in numbers(value[key])]
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def assert_same(one, other, tolerance=1e-7):
    found, wanted = numbers(one), numbers(other)
    assert len(found) == len(wanted) > 0
    assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("mode", ["cached", "recomputed", "forward"])
def test_products(here, there, mode, kind):
    if kind == "gauss_newton" and mode != "cached":
        pytest.skip("one way only")
    options = dict(mode=mode) if kind == "hessian" else {}
    operator = HessianOperator(there, LOSS, CURVATURE, kind=kind, **options)
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(operator.shape[0], 3, generator=generator, dtype=torch.float64)
    product = operator @ vectors
    assert is_there(product)
    if kind == "hessian":
        truth = dense_hessian(here, LOSS, *CURVATURE) @ vectors
    else:
        truth = HessianOperator(here, LOSS, CURVATURE, kind=kind) @ vectors
    assert relative_error(product, truth) < 1e-10


def test_eigenpairs(here, there):
    operator = HessianOperator(there, LOSS, CURVATURE)
    pairs = top_eigenpairs(operator, 4, tol=1e-6)
    dense = torch.linalg.eigvalsh(dense_hessian(here, LOSS, *CURVATURE)).flip(0)
    assert pairs.converged.all() and is_there(pairs.vectors)
    assert pairs.values.tolist() == pytest.approx(dense[:4].tolist(), rel=1e-6)
    again = top_eigenpairs(operator, 4, tol=1e-6, v0=pairs)
    assert again.num_matvecs < pairs.num_matvecs
    assert (eigen_residuals(operator, pairs) <= 1.01 * pairs.residuals).all()


def test_density(here, there):
    options = dict(num_probes=3, num_matvecs=20)
    found = spectral_density(HessianOperator(there, LOSS, CURVATURE), **options)
    trace = dense_hessian(here, LOSS, *CURVATURE).trace().item()
    assert abs(found.trace - trace) < 6 * found.trace_stderr + 1e-6
    pairs = top_eigenpairs(HessianOperator(there, LOSS, CURVATURE), 2)
    spectral_density(HessianOperator(there, LOSS, CURVATURE), spikes=pairs, **options)


# what is computed of a network; each must come out as on the processor
MEASURED = {
    "accuracies": lambda net: class_accuracy(net, TUNED),
    "sensitivity": lambda net: [
        sensitivity_matrix(net, spikes(net), TUNED, eps=0.1, scheme=scheme, metric=metric).matrix
        for scheme in ("central", "forward")
        for metric in ("accuracy", "probability")
    ],
    "jacobian": lambda net: logit_jacobian(net, spikes(net), TUNED).accuracy(torch.ones(2) / 10),
    "class means": lambda net: class_subspace(net, CURVATURE, 2).values,
    "spikes": lambda net: count_spikes(net, LOSS, CURVATURE, candidates=4, resamples=2).count,
    "stability": lambda net: (
        stability(net, LOSS, CURVATURE, sizes=(16, 32), k=2, subspaces=(1, 2))
        .eigenvalues()
        .to_numpy()
        .tolist()
    ),
    "walk": lambda net: [
        bulk_walk(net, LOSS, CURVATURE, HELD, num_spikes=2, steps=2, within=within).accuracy
        for within in ("bulk", "spikes", "anywhere")
    ],
    "screening": lambda net: screen(net, LOSS, CURVATURE, TUNED, num_spikes=2).matvecs,
    "settledness": lambda net: settledness(net, LOSS, TUNED, num_pairs=2).share,
    "bias": lambda net: class_bias(*predict(net, HELD)).size,
    "surgery": lambda net: outcome(operate(net, LOSS, CURVATURE, TUNED, **SHOWN)),
    "adam surgery": lambda net: outcome(
        operate(net, LOSS, CURVATURE, TUNED, **changed(schedule="adam", rollback_errors=2.0))
    ),
    "random directions": lambda net: outcome(
        operate(net, LOSS, CURVATURE, TUNED, **changed(directions="random"))
    ),
    "surgery in phases": lambda net: outcome(
        deflated_operate(net, LOSS, CURVATURE, TUNED, phases=(2, 1), **SHOWN)
    ),
    "surgery in phases, kept in files": lambda net: in_a_directory(
        lambda run_dir: outcome(
            deflated_operate(net, LOSS, CURVATURE, TUNED, phases=(2, 1), run_dir=run_dir, **SHOWN)
        )
    ),
    "linearised": lambda net: (
        linearised_operate(net, LOSS, CURVATURE, TUNED, rounds=1, **SHOWN)
        .to_frame()
        .to_numpy()
        .tolist()
    ),
    "walks at equal loss": lambda net: (
        walk_to_losses(
            net,
            LOSS,
            {"batch": CURVATURE},
            HELD,
            leading=spikes(net).vectors,
            within="bulk",
            on="batch",
            rises=(0.01,),
        ).changes
    ),
    "biases, tau-norm": lambda net: [
        method.report.sigma for method in post_hoc(net, TUNED, HELD, [40, 40, 40], steps=5)
    ],
    "all methods": lambda net: (
        compare(net, LOSS, CURVATURE, TUNED, **SHOWN, controls=True, draws=1, steps=5)
        .to_frame()
        .select_dtypes("number")
        .to_numpy()
        .tolist()
    ),
    "Newton in spikes": lambda net: newton_in_spikes(net, LOSS, TUNED, num_pairs=2).losses,
    "a short anneal": lambda net: settle(net, LOSS, TUNED, steps=8, batch_size=16).losses,
}
SHOWN = dict(held_out=HELD, config=QUICK, progress=False)


def changed(**settings):
    return dict(SHOWN, config=SurgeryConfig(**{**vars(QUICK), **settings}))


def in_a_directory(work):
    with tempfile.TemporaryDirectory() as directory:
        return work(directory)


def spikes(net):
    return top_eigenpairs(HessianOperator(net, LOSS, CURVATURE), 2, tol=1e-8)


def outcome(result):
    return [result.before.sigma, result.after.sigma, result.after.overall]


@pytest.mark.parametrize("name", MEASURED)
def test_comes_out_as_on_the_processor(here, there, name):
    before = weights_bytes(there)
    found = MEASURED[name](there)
    assert weights_bytes(there) == before
    assert_same(found, MEASURED[name](here))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("loss_fn", [None, FocalLoss(2.0), "balanced"])
def test_training(loss_fn, precision, tmp_path):
    "It learns, keeps its state, and its weights come back from a file."
    network = digits_net(classes=3, width=2, seed=0).to(DEVICE)
    if loss_fn == "balanced":
        loss_fn = effective_number_loss([40, 50, 60]).to(DEVICE)
    data = images(150, 7, torch.float32)
    more = dict(loss_fn=loss_fn, lr=1e-2, shift=1, precision=precision, run_dir=tmp_path)
    log = train(network, data, epochs=4, **more)
    assert log.loss[-1] < log.loss[0] and is_there(next(network.parameters()))
    (tmp_path / "weights.safetensors").write_bytes(weights_bytes(network))
    other = digits_net(classes=3, width=2, seed=1).to(DEVICE)
    load_weights(other, tmp_path / "weights.safetensors")
    assert weights_bytes(other) == weights_bytes(network)


def test_training_within_the_bulk(there):
    directions = spikes(there).vectors
    before = nn.utils.parameters_to_vector(there.parameters()).detach().clone()
    data = images(60, 8)
    train(there, data, epochs=1, lr=1e-2, optimizer="sgd", project=lambda _: directions)
    moved = nn.utils.parameters_to_vector(there.parameters()).detach() - before
    decayed = directions.T @ moved
    assert is_there(moved) and moved.norm() > 0 and torch.isfinite(decayed).all()


def test_directions_in_a_file_are_found_again(tmp_path):
    options = dict(dtype=torch.float64, device=DEVICE, path=tmp_path / "directions.bin")
    store = SpikeStore(20, 4, **options)
    generator = torch.Generator().manual_seed(0)
    store.add(torch.randn(20, 3, generator=generator, dtype=torch.float64).to(DEVICE))
    again = SpikeStore(20, 4, count=3, **options)
    assert is_there(again.vectors) and torch.equal(again.vectors.cpu(), store.vectors.cpu())
    assert relative_error(again.vectors.T @ again.vectors, torch.eye(3)) < 1e-12

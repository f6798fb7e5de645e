"""Every public entry point, called from inside contexts that change what PyTorch does.

It returns the same bits as when called plainly, or refuses; and it leaves everything as it was.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import hessian_surgery_nb
from hessian_surgery_nb import (
    amplitude,
    baselines,
    class_structure,
    comparison,
    deflated_surgery,
    deflation,
    effective_rank,
    fits,
    hvp,
    lanczos,
    layer_spectra,
    linearised,
    matrices,
    network_methods,
    predicted_logits,
    rebalancing,
    rest_trial,
    sensitivity,
    settling,
    settling_methods,
    slq,
    spectrum_type,
    spike_validation,
    surgery,
    surgery_state,
    walks,
)
from hessian_surgery_nb.foundations import (
    accuracy,
    adjusted,
    fingerprints,
    forward,
    krylov_basis,
    losses,
    many_heads,
    networks as models,
    training as train,
    weights,
    weight_files,
)
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator

CE = nn.CrossEntropyLoss()
CLASSES = 3


def problem():
    "A network in single precision (autocast touches no other), and data."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)
        ).eval()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2.0)

    def some(n, seed):
        g = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % CLASSES
        centres = torch.tensor([[2.0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0]])
        return torch.randn(n, 6, generator=g) + centres[y], y

    return SimpleNamespace(net=net, hessian=some(24, 1), sensitive=some(60, 2), held=some(45, 3))


@functools.cache
def given():
    "Eigenpairs and logits made plainly, for entry points that take some."
    p = problem()
    op = HessianOperator(p.net, CE, p.hessian)
    pairs, z = lanczos.top_eigenpairs(op, 2), accuracy.predict(p.net, p.sensitive)[0]
    kind = spectrum_type.spectrum_type(op, num_probes=2, num_matvecs=8)
    return SimpleNamespace(
        pairs=pairs,
        z=z,
        kind=kind,
        v=torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0)),
    )


def operator(p, **options):
    return HessianOperator(p.net, CE, p.hessian, **options)


def directions():
    return given().pairs.vectors


def product(p, **options):
    op = operator(p, **options)
    first = op @ given().v
    return first, op @ given().v, op @ directions(), op.num_matvecs


def steadily(p):
    op = operator(p)
    with matrices.UnchangedDuring(op):
        return op @ given().v, op @ given().v


def trained(p):
    log = train.train(p.net, p.hessian, epochs=2, batch_size=8)
    return log, p.net.state_dict()


def leaves(p):
    return [q.detach().clone().requires_grad_() for q in p.net.parameters()]


def batch_loss(p, ts):
    state = {k: t for (k, _), t in zip(p.net.named_parameters(), ts)}
    return CE(forward.functional_logits(forward.Forward(p.net), state, p.hessian[0]), p.hessian[1])


def by_hand(p, how):
    "The functions that a `HessianOperator` is made of."
    ts = leaves(p)
    v = weights.unflatten(given().v, ts)
    if how == "forward":
        return hvp.forward_over_reverse(lambda t: batch_loss(p, t), ts, v)
    state = [k for k, _ in p.net.named_parameters()]
    net, (X, y) = forward.Forward(p.net), p.hessian

    def logits_of(t):
        return forward.functional_logits(net, dict(zip(state, t)), X)

    if how == "logits":
        return forward.logits_and_change(logits_of, ts, v)
    return hvp.gauss_newton(logits_of, lambda z: CE(z, y), ts, v)


def graph_and_back(p):
    ts = leaves(p)
    return hvp.backward_through(
        hvp.gradient_graph(lambda: batch_loss(p, ts), ts),
        ts,
        weights.unflatten(given().v, ts),
        False,
    )


def surgery_config(**more):
    return surgery.SurgeryConfig(iterations=2, num_spikes=2, eps=0.3, **more)


def proposed(p):
    operation = surgery_state.prepare_surgery(
        p.net, CE, p.hessian, p.sensitive, config=surgery_config()
    )
    proposal = surgery.propose_step(operation, operation.start)
    return proposal.alpha, proposal.sensitivity, proposal.state.directions


def deflated(p):
    return deflated_surgery.deflated_operate(
        p.net,
        CE,
        p.hessian,
        p.sensitive,
        phases=(1, 1),
        held_out=p.held,
        config=surgery.SurgeryConfig(iterations=1, eps=0.2),
        progress=False,
    )


def linear(p):
    return linearised.linearised_operate(
        p.net,
        CE,
        p.hessian,
        p.sensitive,
        held_out=p.held,
        folds=2,
        rounds=1,
        config=surgery_config(),
        prices=(0.01,),
        progress=False,
    )


ENTRIES = {
    **{
        f"product, {kind}, {mode}": functools.partial(product, kind=kind, mode=mode)
        for kind in ("hessian", "gauss_newton")
        for mode in ("auto", "cached", "recomputed", "forward", "difference")
        if kind == "hessian" or mode in ("auto", "recomputed")
    },
    "product in pieces": functools.partial(
        product, micro_batch=8
    ),  # whole cache lines: what lies elsewhere rounds differently
    "product, little memory": functools.partial(product, memory=1.0),
    "product, bf16": functools.partial(product, precision="bf16"),
    "product of a part": lambda p: (
        HessianOperator(p.net, CE, p.hessian, params="3.*") @ given().v[-18:]
    ),
    "gradient": lambda p: operator(p).gradient(),
    "check": lambda p: operator(p).check(),
    "check of bf16": lambda p: operator(p, precision="bf16").check(),
    "plan": lambda p: operator(p).plan().mode,
    "to_scipy": lambda p: operator(p).to_scipy() @ given().v.numpy(),
    "UnchangedDuring": steadily,
    "as_operator": lambda p: matrices.as_operator(operator(p)) @ given().v,
    "select_params": lambda p: weights.select_params(p.net),
    "functional_logits": lambda p: forward.functional_logits(
        forward.Forward(p.net), {}, p.hessian[0]
    ),
    "gradient_graph": graph_and_back,
    "forward_over_reverse": lambda p: by_hand(p, "forward"),
    "gauss_newton": lambda p: by_hand(p, "gauss_newton"),
    "logits_and_change": lambda p: by_hand(p, "logits"),
    "infer_reduction": lambda p: losses.infer_reduction(
        lambda z, y: CE(z, y), given().z, p.sensitive[1]
    ),
    "call_loss": lambda p: losses.call_loss(CE, given().z, p.sensitive[1]),
    "loss_denominator": lambda p: losses.loss_denominator(CE, given().z, p.sensitive[1]),
    "lanczos_tridiag": lambda p: lanczos.lanczos_tridiag(operator(p), 6),
    "matvec": lambda p: krylov_basis.matvec(operator(p), given().v),
    "top_eigenpairs": lambda p: lanczos.top_eigenpairs(operator(p), 2),
    "top_eigenpairs, verified": lambda p: lanczos.top_eigenpairs(operator(p), 2, verify=True),
    "eigen_residuals": lambda p: lanczos.eigen_residuals(operator(p), given().pairs),
    "probe_quadrature": lambda p: slq.probe_quadrature(operator(p), 6, seed=0),
    "layer_spectra": lambda p: layer_spectra.layer_spectra(
        operator(p), num_probes=2, num_matvecs=6
    ),
    "spectral_density": lambda p: slq.spectral_density(operator(p), num_probes=2, num_matvecs=8),
    "count_spikes": lambda p: spike_validation.count_spikes(
        p.net, CE, p.hessian, candidates=4, resamples=2
    ),
    "stability": lambda p: spike_validation.stability(
        p.net, CE, p.hessian, sizes=(12, 24), k=2, subspaces=(2,)
    ),
    "bulk_walk": lambda p: spike_validation.bulk_walk(
        p.net, CE, p.hessian, p.sensitive, num_spikes=2, steps=2
    ),
    "spike_walk": lambda p: spike_validation.bulk_walk(
        p.net, CE, p.hessian, p.sensitive, num_spikes=2, steps=2, within="spikes"
    ),
    "walk_to_losses": lambda p: walks.walk_to_losses(
        p.net,
        CE,
        {"hessian": p.hessian},
        p.sensitive,
        leading=given().pairs.vectors,
        within="leading",
        on="hessian",
        rises=(0.05,),
    ),
    "walk_to_lengths": lambda p: walks.walk_to_lengths(
        p.net,
        CE,
        {"hessian": p.hessian},
        p.sensitive,
        leading=given().pairs.vectors,
        within="bulk",
        lengths=(0.05,),
    ),
    "count_classes": lambda p: settling.count_classes(p.net, p.hessian),
    "settledness": lambda p: settling.settledness(p.net, CE, p.hessian, num_pairs=2, folds=3),
    "newton_in_spikes": lambda p: settling_methods.newton_in_spikes(
        p.net, CE, p.hessian, num_pairs=2
    ),
    "try_rest": lambda p: rest_trial.try_rest(p.net, CE, p.hessian, p.sensitive, num_pairs=2),
    "settle": lambda p: settling_methods.settle(p.net, CE, p.hessian, steps=3, checks=1),
    "spectrum_type": lambda p: spectrum_type.spectrum_type(
        operator(p), num_probes=2, num_matvecs=8
    ),
    "generalisation": lambda p: spectrum_type.generalisation(given().kind, given().kind),
    "predict": lambda p: accuracy.predict(p.net, p.sensitive),
    "predict many": lambda p: many_heads.predict_many(
        p.net, [copy.deepcopy(p.net)], p.sensitive, shape=(len(p.sensitive[1]), CLASSES)
    ),
    "predict elsewhere": lambda p: accuracy.predict(
        p.net,
        p.sensitive,
        state=dict(sensitivity.moved_state(weights.select_params(p.net), given().v / 9)),
    ),
    "class_accuracy": lambda p: accuracy.class_accuracy(p.net, p.sensitive),
    "class_report": lambda p: accuracy.class_report(p.net, p.sensitive),
    "train": trained,
    "class_gradients": lambda p: class_structure.class_gradients(p.net, p.hessian),
    "class_gradients, cross": lambda p: class_structure.class_gradients(
        p.net, p.hessian, cross=True
    ),
    "class_gradients of a loss": lambda p: class_structure.class_gradients(
        p.net, p.hessian, loss_fn=CE
    ),
    "class_subspace": lambda p: class_structure.class_subspace(p.net, p.hessian),
    "sensitivity_matrix": lambda p: sensitivity.sensitivity_matrix(
        p.net, directions(), p.sensitive, eps=0.1
    ),
    "sensitivity_matrix, forward": lambda p: sensitivity.sensitivity_matrix(
        p.net, directions(), p.sensitive, eps=0.1, scheme="forward", metric="probability"
    ),
    "logit_jacobian": lambda p: predicted_logits.logit_jacobian(p.net, given().pairs, p.sensitive),
    "logit_jacobian, jvp": lambda p: predicted_logits.logit_jacobian(
        p.net, given().pairs, p.sensitive, scheme="jvp"
    ),
    "choose_amplitude": lambda p: amplitude.choose_amplitude(p.net, given().pairs, p.sensitive),
    "operate": lambda p: surgery.operate(
        p.net, CE, p.hessian, p.sensitive, held_out=p.held, config=surgery_config(), progress=False
    ),
    "operate, class means": lambda p: surgery.operate(
        p.net,
        CE,
        p.hessian,
        p.sensitive,
        config=surgery_config(directions="class_means"),
        progress=False,
    ),
    "operate, gradients": lambda p: surgery.operate(
        p.net,
        CE,
        p.hessian,
        p.sensitive,
        config=surgery_config(directions="gradients"),
        progress=False,
    ),
    "prepare_surgery": lambda p: proposed(p),
    "evaluate": lambda p: surgery_state.evaluate(p.net, p.sensitive),
    "snapshot": lambda p: surgery_state.snapshot(p.net),
    "linearised_operate": linear,
    "compare": lambda p: comparison.compare(
        p.net, CE, p.hessian, p.sensitive, p.held, config=surgery_config(), draws=1, progress=False
    ),
    "deflated_operate": deflated,
    "deflated_eigenpairs": lambda p: list(deflation.deflated_eigenpairs(operator(p), (1, 1))),
    "DeflatedOperator": lambda p: deflation.DeflatedOperator(operator(p), directions()) @ given().v,
    "screen": lambda p: effective_rank.screen(p.net, CE, p.hessian, p.sensitive),
    "screen, rest": lambda p: effective_rank.screen(
        p.net, CE, p.hessian, p.sensitive, gradient_data=p.hessian
    ),
    "post_hoc": lambda p: list(
        baselines.post_hoc(p.net, p.sensitive, p.held, [8, 8, 8], scales=True, steps=5)
    ),
    "predict_both": lambda p: baselines.predict_both(p.net, p.sensitive, p.held),
    "tau_norm_state": lambda p: baselines.tau_norm_state(p.net, CLASSES, 0.5),
    "head_inputs": lambda p: baselines.head_inputs(p.net, p.sensitive, given().z),
    "tau_norm_sweep": lambda p: baselines.tau_norm_sweep(p.net, p.sensitive, given().z, [0.5, 1.0]),
    "Adjusted": lambda p: accuracy.predict(
        adjusted.Adjusted(p.net, bias=torch.ones(CLASSES)), p.sensitive
    ),
    "fold_into_head": lambda p: adjusted.fold_into_head(
        p.net,
        models.find_head(p.net, CLASSES)[0],
        torch.full((CLASSES,), 2.0),
        torch.ones(CLASSES),
        data=p.sensitive,
    ),
    "gives_raw_logits": lambda p: models.gives_raw_logits(
        p.net, models.find_head(p.net, CLASSES)[1], p.sensitive
    ),
    "rebalance": lambda p: dict(
        rebalancing.rebalance(
            p.net,
            CE,
            p.hessian,
            p.sensitive,
            held_out=p.held,
            objective="balanced",
            max_global_drop=None,
            methods=["class means"],
            folds=2,
            prices=(),
            progress=False,
        )
        .taking("class means")
        .model.state_dict()
    ),
    "network_of": lambda p: dict(
        network_methods.network_of(
            p.net,
            fits.Fit(
                setting="",
                logits=lambda rows: rows,
                weights=lambda: {name: w + 1 for name, w in p.net.named_parameters()},
            ),
            p.held,
        ).state_dict()
    ),
    "weights_bytes": lambda p: weight_files.weights_bytes(p.net),
    "num_params": lambda p: models.num_params(p.net),
    "find_head": lambda p: models.find_head(p.net, CLASSES)[0],
    "model_fingerprint": lambda p: fingerprints.model_fingerprint(p.net),
    "copy_model": lambda p: dict(models.copy_model(p.net).state_dict()),
    "state_tensors": lambda p: weight_files.state_tensors(p.net),
    "head_of": lambda p: baselines.head_of(p.net, CLASSES).weight,
}

# What takes a network or an operator and is not tried here: checks that return nothing, records of
# results, and parts of whole commands, which have tests of their own.
LEFT_OUT = {
    "Given",  # what methods are given, and what comes back
    "Rebalancing",
    "check_model",
    "check_mode",
    "shortfall_message",  # parts of top_eigenpairs, which is tried whole
    "requested_search",
    "changed_layer",  # of predict_many: two state dicts compared
    "call_network",  # parts of products, which are tried whole
    "lent_to",
    "gathered_logits",
    "trace_head",
    "WithoutHead",
    "check_head",
    "random_argument",
    "random_piece",
    "operator_floor",
    "BlockProducts",
    "parameter_blocks",
    "is_sharded",  # of networks that no process holds whole: test_sharded
    "blocks_of",
    "reshard",
    "ShardedObjective",
    "check_inputs",
    "check_batch",
    "as_loss_module",
    "known_reduction",
    "load_weights",
    "load_adjusted",
    "half_types",
    "frozen_beside_adapters",
    "has_adapters",
    "adapter_files",
    "dense_hessian",
    "Forward",  # a network: called by the caller, in the caller's context
    "undisturbed",
    # what a run writes down and takes up: no derivative is asked for, nothing is multiplied
    "set_tensors",
    "state_facts",
    "check_storable",
    "logit_moments",
    "check_logit_moments",
    "DeflatedResult",
    "DirectionSearch",  # a question: its model is looked at by what answers it
    "SurgeryOperation",  # made by prepare_surgery
    "move",  # changes the network it is given
    # parts of HessianOperator and of top_eigenpairs, which are tried
    "Objective",
    "WatchedObjective",
    "ModelWatch",
    "weights_fingerprint",
    "Search",
    "start_vector",
    "random_direction",
    "SurgeryResult",
    "Settled",
    "write_weights",
    "Front",
    "difference",
}
PARTS_OF_COMMANDS = {
    "paper",
    "runs",
    "isic",
    "testbed",
}


def test_every_entry_point_is_tried():
    tried = " ".join(ENTRIES) + " " + inspect.getsource(inspect.getmodule(problem))
    for info in pkgutil.walk_packages(hessian_surgery_nb.__path__, "hessian_surgery_nb."):
        short = info.name.rpartition(".")[2]
        parts = any(door in info.name for door in (".app.", ".evidence."))
        if info.ispkg or parts or short.startswith("_") or short in PARTS_OF_COMMANDS:
            continue
        module = importlib.import_module(info.name)
        for name in module.__all__:
            thing = getattr(module, name)
            if (
                name in LEFT_OUT
                or not (inspect.isclass(thing) or inspect.isroutine(thing))
                or (isinstance(thing, type) and issubclass(thing, Exception))
            ):
                continue
            takes = set(inspect.signature(thing).parameters) & {"model", "net", "op"}
            assert (
                not takes
                or f".{name}(" in tried
                or f"import {name}" in tried
                or name == "HessianOperator"
            ), f"{info.name}.{name} takes {takes}"


# What a result is made of -------------------------------------------------------------------------


def bits(x):
    "A result as nested tuples of plain things that are equal only if every bit is."
    if torch.is_tensor(x):
        x = x.detach().cpu().contiguous()
        return "tensor", str(x.dtype), tuple(x.shape), x.numpy().tobytes()
    if isinstance(x, np.ndarray):
        return "array", str(x.dtype), x.shape, x.tobytes()
    if isinstance(x, pd.DataFrame):
        return bits({k: x[k].tolist() for k in x if k != "seconds"})
    if isinstance(x, nn.Module):
        return bits(x.state_dict())
    if isinstance(x, float):
        return "float", np.float64(x).tobytes()
    if isinstance(x, dict):
        return tuple((str(k), bits(v)) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return tuple(bits(v) for v in x)
    if isinstance(x, (str, bytes, int, type(None), np.generic, torch.dtype)):
        return x
    if dataclasses.is_dataclass(x) or hasattr(x, "__dict__"):
        return type(x).__name__, bits(
            {k: v for k, v in vars(x).items() if "seconds" not in k and "time" not in k}
        )
    raise TypeError(f"{type(x).__name__}: say how its bits are read")


def surroundings(p):
    "All that must be the same afterwards."
    hooks = {
        k: [
            (len(v), list(v))
            for v in vars(m).values()
            if isinstance(v, dict) and v and callable(next(iter(v.values())))
        ]
        for k, m in p.net.named_modules()
    }
    return bits(
        dict(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=torch.is_autocast_enabled("cpu"),
            autocast_dtype=torch.get_autocast_dtype("cpu"),
            dtype=torch.get_default_dtype(),
            cache=torch.is_autocast_cache_enabled(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            anomaly=torch.is_anomaly_enabled(),
            random=torch.get_rng_state(),
            precision=[
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.allow_tf32,
                torch.backends.cudnn.enabled,
            ],
            sdpa=[
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.math_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
            ],
            hooks={k: str([n for n, _ in v]) for k, v in hooks.items()},
            training=[m.training for m in p.net.modules()],
            state=p.net.state_dict(),
            grads=[q.grad for q in p.net.parameters()],
            open=[q.requires_grad for q in p.net.parameters()],
            data=[p.hessian, p.sensitive, p.held],
            leaves=[t.requires_grad for t in (p.hessian[0], p.sensitive[0], p.held[0])],
            of_data=[t.grad for t in (p.hessian[0], p.sensitive[0])],
        )
    )


def called(name, p):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bits(ENTRIES[name](p))


@functools.cache
def plainly(name):
    return called(name, problem())


# Contexts -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def grad_off():
    "As one who calls torch.set_grad_enabled(False) at the top of a script."
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextlib.contextmanager
def default_double():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def short_products():
    "Products of float32 matrices in bfloat16, where a machine can; convolutions in TF32."
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients switched off": grad_off,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast and no_grad": lambda: both(torch.autocast("cpu", torch.bfloat16), torch.no_grad()),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved tensors copied": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(), lambda t: t
    ),
    "saved tensors in half precision": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.dtype, t.to(torch.bfloat16) if t.is_floating_point() else t),
        lambda kept: kept[1].to(kept[0]),
    ),
    "no saved-tensor hooks allowed": lambda: torch.autograd.graph.disable_saved_tensors_hooks(
        "none here"
    ),
    "double by default": default_double,
    "deterministic": deterministic,
    "short products": short_products,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "one thread backwards": lambda: torch.autograd.set_multithreading_enabled(False),
}


@contextlib.contextmanager
def both(a, b):
    with a, b:
        yield


def same_or_refused(name, p, context=contextlib.nullcontext, leaves_weights=True):
    given()  # made once, and not inside a context
    before = surroundings(p)
    inside = None
    try:
        with context():
            inside = surroundings(p)
            try:
                got = called(name, p)
            finally:
                assert surroundings(p) == inside or name == "train", "what was around is as it was"
    except InputError:
        got = None
    assert surroundings(p) == before or name == "train"
    assert got is None or got == plainly(name), f"{name} returned something else"
    return "refused" if got is None else "same"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ENTRIES)
def test_inside_a_context(name, context):
    same_or_refused(name, problem(), CONTEXTS[context])


# Data, gradients and hooks that were there before -------------------------------------------------


def of_inference(p):
    with torch.inference_mode():
        p.hessian, p.sensitive, p.held = (
            (X.clone(), y.clone()) for X, y in (p.hessian, p.sensitive, p.held)
        )


def wanting_gradients(p):
    for X, _ in (p.hessian, p.sensitive, p.held):
        X.requires_grad_()


def gradients_there(p):
    for q in p.net.parameters():
        q.grad = torch.ones_like(q)


def doubled(gradients):
    return tuple(None if g is None else 2 * g for g in gradients)


def backward_hooks(p):
    for m in p.net:
        m.register_full_backward_hook(lambda m, gi, go: doubled(gi))


def backward_pre_hooks(p):
    for m in p.net:
        m.register_full_backward_pre_hook(lambda m, go: doubled(go))


def parameter_hooks(p):
    for q in p.net.parameters():
        q.register_hook(lambda g: 2 * g)


def accumulation_hooks(p):
    for q in p.net.parameters():
        q.register_post_accumulate_grad_hook(lambda q: q.grad.mul_(2))


def forward_hooks(p):
    for m in p.net:
        m.register_forward_hook(lambda m, x, out: out)


def hooks_on_the_output(p):
    "Gradients changed by a hook on a tensor, as in gradient reversal."
    p.net[2].register_forward_hook(
        lambda m, x, out: out.register_hook(lambda g: 2 * g) and None if out.requires_grad else None
    )


PREPARED = {
    "data of inference mode": of_inference,
    "data that want gradients": wanting_gradients,
    "gradients there": gradients_there,
    "backward hooks": backward_hooks,
    "backward pre-hooks": backward_pre_hooks,
    "parameter hooks": parameter_hooks,
    "accumulation hooks": accumulation_hooks,
    "forward hooks": forward_hooks,
    "hooks on the output": hooks_on_the_output,
}
OWN_FUNCTION = {
    "gradient_graph",
    "forward_over_reverse",
    "gauss_newton",
    "logits_and_change",
}  # called on a function of the caller's
CHANGES_TRAINING = {
    "backward hooks",
    "backward pre-hooks",
    "parameter hooks",
    "accumulation hooks",
    "hooks on the output",
}


@pytest.mark.parametrize("prepare", PREPARED)
@pytest.mark.parametrize("name", ENTRIES)
def test_with_something_set_up_before(name, prepare):
    if name == "train" and prepare in CHANGES_TRAINING:
        pytest.skip("training is what such hooks are for")
    if name in OWN_FUNCTION and prepare == "data of inference mode":
        pytest.skip("the caller's own function keeps these data")
    p = problem()
    PREPARED[prepare](p)
    same_or_refused(name, p)


def in_threads(*calls):
    "The outcomes of calls that start at the same moment."
    start, out = threading.Barrier(len(calls)), [None] * len(calls)

    def one(i):
        start.wait()
        try:
            out[i] = calls[i]()
        except Exception as e:
            out[i] = e

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


@pytest.mark.parametrize("name", ENTRIES)
def test_from_a_second_thread(name):
    p = problem()
    before = surroundings(p)
    (got,) = in_threads(lambda: called(name, p))
    assert isinstance(got, InputError) or got == plainly(name)
    assert surroundings(p) == before or name == "train"


@pytest.mark.parametrize("name", ENTRIES)
def test_from_two_threads_at_once(name):
    "Each with its own network."
    plainly(name)
    ps = [problem(), problem()]
    before = surroundings(ps[0])
    for got in in_threads(*(functools.partial(called, name, p) for p in ps)):
        if isinstance(got, Exception) and not isinstance(got, InputError):
            raise got
        assert isinstance(got, InputError) or got == plainly(name)
    for p in ps:
        assert surroundings(p) == before or name == "train"

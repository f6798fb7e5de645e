"""A directory with a half-done run belongs to one loss, one network, one set of images in one
order, one way to call it.
"""

import contextlib
import copy
import functools
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import hessian_surgery_nb.app.commands as commands
from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.foundations.datasets import write_toy_images
from hessian_surgery_nb.deflated_surgery import deflated_operate
from hessian_surgery_nb.foundations.fingerprints import (
    data_fingerprint,
    fingerprint,
    model_fingerprint,
)
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.networks import resnet20
from hessian_surgery_nb.foundations.weight_files import weights_bytes, write_atomic
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.foundations.testbed import tiny_data, tiny_mlp
from hessian_surgery_nb.foundations.training import FocalLoss

X, Y = tiny_data(120)
H, S, O = ((X[i:j], Y[i:j]) for i, j in ((0, 30), (30, 75), (75, 120)))
CONFIG = SurgeryConfig(iterations=3, eps=0.3, num_spikes=2)
WEIGHT = torch.tensor([1.0, 30.0, 2.0], dtype=torch.float64)


def run(net=None, loss=None, hessian=H, sensitivity=S, held_out=O, config=CONFIG, **kw):
    return operate(
        net or tiny_mlp(),
        loss or nn.CrossEntropyLoss(),
        hessian,
        sensitivity,
        held_out=held_out,
        config=config,
        progress=False,
        **kw,
    )


def phases(net=None, loss=None, hessian=H, sensitivity=S, held_out=O, config=CONFIG, **kw):
    return deflated_operate(
        net or tiny_mlp(),
        loss or nn.CrossEntropyLoss(),
        hessian,
        sensitivity,
        phases=(1, 1),
        held_out=held_out,
        config=config,
        progress=False,
        **kw,
    )


def scaled(factor):
    return lambda z, y: factor * F.cross_entropy(z, y)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, z, y):
        return self.factor * F.cross_entropy(z, y)


class Callable:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, z, y):
        return self.factor * F.cross_entropy(z, y)


class Method:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, z, y):
        return self.factor * F.cross_entropy(z, y)


def with_default(factor):
    def loss(z, y, factor=factor):
        return factor * F.cross_entropy(z, y)

    return loss


LOSSES = {
    "class weights": (
        lambda: nn.CrossEntropyLoss(weight=WEIGHT),
        lambda: nn.CrossEntropyLoss(weight=WEIGHT.flip(0)),
    ),
    "smoothing": (
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
    ),
    "ignored": (nn.CrossEntropyLoss, lambda: nn.CrossEntropyLoss(ignore_index=2)),
    "reduction": (nn.CrossEntropyLoss, lambda: nn.CrossEntropyLoss(reduction="sum")),
    "class": (nn.CrossEntropyLoss, nn.MultiMarginLoss),
    "of this package": (lambda: FocalLoss(1.0), lambda: FocalLoss(2.0)),
    "closure": (lambda: scaled(1.0), lambda: scaled(3.0)),
    "module": (lambda: Scaled(1.0), lambda: Scaled(3.0)),
    "callable": (lambda: Callable(1.0), lambda: Callable(3.0)),
    "method": (lambda: Method(1.0).loss, lambda: Method(3.0).loss),
    "default": (lambda: with_default(1.0), lambda: with_default(3.0)),
    "partial": (
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.2),
    ),
    "tensor in a closure": (lambda: weighted(WEIGHT), lambda: weighted(WEIGHT.flip(0))),
    "code": (
        lambda: lambda z, y: F.cross_entropy(z, y),
        lambda: lambda z, y: F.cross_entropy(z, y) * 3,
    ),
}


def weighted(w):
    return lambda z, y: F.cross_entropy(z, y, w)


@pytest.mark.parametrize("name", LOSSES)
def test_another_loss_is_told_from_the_same(name):
    one, other = LOSSES[name]
    assert fingerprint(one()) == fingerprint(one()) != fingerprint(other())
    assert fingerprint(copy.deepcopy(one())) == fingerprint(one())


@pytest.mark.parametrize("name", LOSSES)
def test_the_run_of_another_loss_is_refused(name, tmp_path):
    one, other = LOSSES[name]
    options = dict(config=SurgeryConfig(iterations=1, eps=0.3, num_spikes=2))
    first = run(loss=one(), run_dir=tmp_path, **options)
    with pytest.raises(
        InputError,
        match=(
            r"goes on with what it began with.* differs in the loss; remove it, or name another "
            r"run_dir"
        ),
    ):
        run(loss=other(), run_dir=tmp_path, **options)
    again = run(loss=one(), run_dir=tmp_path, **options)
    assert torch.equal(again.spikes.values, first.spikes.values)


def nudged(net, by=1e-9):
    with torch.no_grad():
        net[0].weight[0, 0] += by
    return net


def buffered(net):
    net.register_buffer("seen", torch.ones(1), persistent=False)
    return net


def twice(model, x):
    return 2 * model(x)


def plain(model, x):
    return model(x)


perm = torch.randperm(30, generator=torch.Generator().manual_seed(0))
OTHERS = {
    "hessian images": (dict(hessian=(H[0] * 2, H[1])), "the hessian data"),
    "fewer": (dict(hessian=(H[0][:9], H[1][:9])), "the hessian data"),
    "order": (dict(hessian=(H[0][perm], H[1][perm])), "the hessian data"),
    "hessian labels": (dict(hessian=(H[0], H[1].flip(0))), "the hessian data"),
    "one pixel": (
        dict(sensitivity=(S[0] + torch.eye(45, 6, dtype=torch.float64) * 1e-12, S[1])),
        "the sensitivity data",
    ),
    "sensitivity labels": (dict(sensitivity=(S[0], S[1].flip(0))), "the sensitivity data"),
    "held out": (dict(held_out=(O[0] * 2, O[1])), "the held-out data"),
    "weights": (dict(net=nudged(tiny_mlp())), "the network, or weights"),
    "buffer": (dict(net=buffered(tiny_mlp())), "the network, or weights"),
    "layer": (
        dict(net=nn.Sequential(*tiny_mlp()[:1], nn.ReLU(), *tiny_mlp()[2:])),
        "the network, or weights",
    ),
    "forward": (dict(forward=twice), "the forward function"),
    "setting": (
        dict(config=SurgeryConfig(iterations=3, eps=0.4, num_spikes=2)),
        r"eps=0\.3 \(now 0\.4\)",
    ),
    "iterations": (
        dict(config=SurgeryConfig(iterations=4, eps=0.3, num_spikes=2)),
        r"iterations=3 \(now 4\)",
    ),
}


@pytest.mark.parametrize("how", [run, phases])
def test_what_differs_is_named(how, tmp_path):
    first, kept = how(run_dir=tmp_path), {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    for other, says in OTHERS.values():
        with pytest.raises(InputError, match=f"differs in .*{says}"):
            how(run_dir=tmp_path, **other)
    assert kept == {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    again = how(
        run_dir=tmp_path, hessian=[(H[0][:7], H[1][:7]), (H[0][7:], H[1][7:])]
    )  # cut into batches in another way, it is the same
    assert torch.equal(again.after.accuracy, first.after.accuracy)


def by(factor):
    return lambda model, x: factor * model(x)


@pytest.mark.parametrize("how", [run, phases])
def test_a_forward_that_does_something_else_with_the_same_code_is_refused(how, tmp_path):
    how(run_dir=tmp_path, forward=by(1.0))
    with pytest.raises(InputError, match="another forward function"):
        how(run_dir=tmp_path, forward=by(1.5))
    how(run_dir=tmp_path, forward=by(1.0))


@pytest.mark.parametrize(
    "how, file", [(run, "surgery.safetensors"), (phases, "phases.safetensors")]
)
def test_a_directory_of_an_earlier_version_is_refused(how, file, tmp_path):
    how(run_dir=tmp_path)
    with safe_open(tmp_path / file, "pt") as f:
        facts, tensors = (
            json.loads(f.metadata()["facts"]),
            {k: f.get_tensor(k).clone() for k in f.keys()},
        )
    del facts["request"]["made_from"], facts["answers"]
    save_file(tensors, tmp_path / file, dict(facts=json.dumps(facts)))
    with pytest.raises(InputError, match="made from, which it does not record"):
        how(run_dir=tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "surgery.safetensors").write_bytes(b"torn"),
        lambda d: (d / "start.safetensors").unlink(),
        lambda d: (d / "start.safetensors").write_bytes(
            (d / "start.safetensors").read_bytes()[:-20]
        ),
    ],
)
def test_a_damaged_directory_is_refused(damage, tmp_path):
    run(run_dir=tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match="must be whole"):
        run(run_dir=tmp_path)


def test_directions_that_are_gone_are_missed(tmp_path):
    phases(run_dir=tmp_path)
    (tmp_path / "directions.bin").unlink()
    with pytest.raises(InputError, match="directions.bin should hold"):
        phases(run_dir=tmp_path)


@pytest.mark.parametrize("how", [run, phases])
@pytest.mark.parametrize(
    "wrong",
    [
        dict(loss=lambda z, y: z),
        dict(hessian=(H[0] * float("nan"), H[1])),
        dict(config=SurgeryConfig(iterations=1, num_spikes=999, eps=0.1)),
    ],
)
def test_bad_input_makes_no_directory(how, wrong, tmp_path):
    if how is phases and "config" in wrong:
        wrong = dict(config=SurgeryConfig(iterations=1, eps=-1.0))
    with pytest.raises(InputError):
        how(run_dir=tmp_path / "run", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_what_operations_share_belongs_to_one_loss_and_one_set_of_images():
    cache = {}
    for other in (
        {},
        dict(loss=nn.CrossEntropyLoss(weight=WEIGHT)),
        dict(hessian=(H[0] * 2, H[1])),
        dict(sensitivity=(S[0] * 2, S[1])),
        dict(forward=twice),
        dict(forward=by(1.0)),
        dict(forward=by(1.5)),
        dict(net=nudged(tiny_mlp(), 0.5)),
    ):
        alone, shared = run(**other), run(**other, cache=cache)
        assert torch.equal(alone.spikes.values, shared.spikes.values) and torch.equal(
            alone.sensitivity.matrix, shared.sensitivity.matrix
        )
    before = len(cache)
    run(cache=cache)
    assert len(cache) == before  # the first of them again


@pytest.mark.parametrize("name", ["loss", "gradients"])
def test_directions_that_do_not_use_the_loss_share_by_it_too(name):
    cache, c = (
        {},
        SurgeryConfig(
            iterations=1, eps=0.3, directions="gradients" if name == "gradients" else "class_means"
        ),
    )
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.3)):
        assert torch.equal(
            run(loss=loss, config=c, cache=cache).spikes.vectors,
            run(loss=loss, config=c).spikes.vectors,
        )


def test_inputs_in_dicts_are_read_part_by_part():
    a, b = torch.arange(6.0).reshape(3, 2), torch.ones(3, 1)
    whole = data_fingerprint([(dict(a=a, b=b), torch.arange(3))])
    assert (
        data_fingerprint(
            [
                (dict(a=a[:1], b=b[:1]), torch.arange(1)),
                (dict(a=a[1:], b=b[1:]), torch.arange(1, 3)),
            ]
        )
        == whole
    )
    others = [dict(a=b, b=a), dict(a=a), [a, b], dict(a=a, b=b, c=torch.ones(7))]
    assert len({whole, *(data_fingerprint([(x, torch.arange(3))]) for x in others)}) == 5
    assert (
        len({model_fingerprint(nn.Linear(2, 2)) for _ in range(3)}) == 3
    )  # other weights each time


# --- commands


@pytest.fixture(scope="module")
def place(lay_out):
    return lay_out("belongs", train=12, test=10)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda d, f: Image.new("RGB", (16, 16)).save(
                d / "toys" / "test" / "colour0" / "000.png"
            ),
            "the (sensitivity|held-out) data",
        ),
        (lambda d, f: f.update(hessian="20"), "the hessian data"),
        (
            lambda d, f: f.update(mean=("0.4", "0.4", "0.4")),
            "the hessian data, the sensitivity data",
        ),
        (lambda d, f: new_weights(d), "the network, or weights"),
        (lambda d, f: f.update(eps="0.2"), r"eps=0\.1 \(now 0\.2\)"),
    ],
)
def test_resume_goes_on_with_the_same_images_and_weights(place, tmp_path, capsys, change, says):
    shutil.copytree(place, tmp_path / "place")
    d, flags = tmp_path / "place", dict(hessian="16", iterations="3", eps="0.1")

    def call(*more):
        return main(
            [
                "operate",
                "--model",
                f"{d}/mine.py:net",
                "--weights",
                str(d / "w.safetensors"),
                "--data",
                str(d / "toys"),
                "--out",
                str(tmp_path / "out"),
                *(
                    x
                    for k, v in flags.items()
                    for x in (f"--{k}", *([v] if isinstance(v, str) else v))
                ),
                *more,
            ]
        )

    interrupted(call)
    assert (tmp_path / "out" / "state" / "surgery.safetensors").exists()
    change(d, flags)
    capsys.readouterr()
    assert call("--resume") == 2
    out, err = capsys.readouterr()
    assert (
        re.search(f"differs in .*({says})", err)
        and out == ""
        and "Traceback" not in err
        and (tmp_path / "out" / "state").exists()
    )


def new_weights(d):
    write_atomic(d / "w.safetensors", weights_bytes(resnet20(classes=3, width=4, blocks=1, seed=5)))


def interrupted(call):
    "Ctrl-C after the first step."
    asked = commands.asked_to_stop

    @contextlib.contextmanager
    def at_once():
        yield lambda: True

    commands.asked_to_stop = at_once
    try:
        assert call() == 130
    finally:
        commands.asked_to_stop = asked


def test_stored_runs_belong_to_their_images_and_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HESSIAN_SURGERY_CACHE", str(tmp_path / "cache"))
    write_toy_images(tmp_path / "toys", train=20, test=12)

    def call(*more):
        return main(
            [
                "reproduce",
                str(tmp_path / "toys"),
                "--table",
                "1",
                "--quick",
                "--seeds",
                "1",
                "--tau",
                "mean",
                "--out",
                str(tmp_path / "runs"),
                *more,
            ]
        )

    assert call() == 0 and call() == 0 and ", 0 to do" in capsys.readouterr().err
    run = json.loads((stored := next((tmp_path / "runs").glob("*_network.json"))).read_text())
    assert list(run["made_from"]) == ["images"]
    shutil.copy(
        tmp_path / "toys" / "train" / "colour0" / "001.png",
        tmp_path / "toys" / "train" / "colour0" / "000.png",
    )
    assert call() == 2 and "is of other images" in capsys.readouterr().err
    del run["made_from"]
    stored.write_text(json.dumps(run))  # as an earlier version left it
    assert call() == 0 and "do not say which images" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "toys")
    assert call() == 0  # what is stored can be shown without them

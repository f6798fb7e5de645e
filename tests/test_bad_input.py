"""Labels without a class, numbers of the wrong kind, names in arrays, commands with bad input:
refused in words, and nothing left behind.
"""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hessian_surgery_nb.class_structure import class_gradients, class_subspace
from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.comparison import compare
from hessian_surgery_nb.foundations.checks import whole
from hessian_surgery_nb.foundations.datasets import torchvision_part
from hessian_surgery_nb.deflated_surgery import deflated_operate
from hessian_surgery_nb.deflation import check_phases
from hessian_surgery_nb.effective_rank import screen
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.linearised import linearised_operate
from hessian_surgery_nb.app.own_network import own_sets
from hessian_surgery_nb.foundations.preparation import Preparation
from hessian_surgery_nb.settings import SurgeryConfig, check_config
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.foundations.testbed import tiny_data, tiny_mlp
from hessian_surgery_nb.foundations.accuracy import class_accuracy, class_report

X, Y = tiny_data(120)
H, S, O = ((X[i:j], Y[i:j]) for i, j in ((0, 30), (30, 75), (75, 120)))
ONE = SurgeryConfig(iterations=1, eps=0.3)
loss = nn.CrossEntropyLoss()


def labelled(pair, value, count=1):
    y = pair[1].clone()
    y[:count] = value
    return pair[0], y


# --- gradients of classes


class Idle(nn.Module):
    "As GoogLeNet in evaluation: a part of it is not used."

    def __init__(self):
        super().__init__()
        self.net, self.aux, self.free = (
            tiny_mlp(),
            nn.Linear(4, 3).double(),
            nn.Parameter(torch.ones(2).double()),
        )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    "options", [{}, dict(cross=True), dict(loss_fn=loss), dict(loss_fn=nn.NLLLoss())]
)
def test_idle_parameters_have_gradient_zero(options):
    net = Idle().eval()
    rows = dict(
        zip(
            dict(net.named_parameters()),
            class_gradients(net, H, **options).split([p.numel() for p in net.parameters()]),
        )
    )
    plain = class_gradients(tiny_mlp(), H, **options)
    used = torch.cat([v for k, v in rows.items() if k.startswith("net.")])
    assert torch.equal(used, plain)
    assert all(not v.any() for k, v in rows.items() if not k.startswith("net."))


@pytest.mark.parametrize(
    "net",
    [Idle().eval(), torchvision_part("models").googlenet(num_classes=3, init_weights=False).eval()],
    ids=["idle", "googlenet"],
)
def test_operate_along_class_means_with_idle_parameters(net):
    sets = (H, S)
    config = SurgeryConfig(iterations=1, eps=0.01, directions="class_means")
    if not isinstance(net, Idle):
        images = (
            torch.randn(18, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
            torch.arange(18) % 3,
        )
        sets = tuple((images[0][s], images[1][s]) for s in (slice(0, 9), slice(9, 18)))
    r = operate(net, loss, *sets, config=config, progress=False)
    assert torch.isfinite(r.spikes.values).all()


@pytest.mark.parametrize("value", [-1, -100, 3, 99])
@pytest.mark.parametrize("options", [{}, dict(cross=True), dict(loss_fn=loss)])
def test_labels_without_a_class_are_refused(value, options):
    for call in (class_gradients, class_subspace):
        with pytest.raises(InputError, match=f"Got {value} in 2 of 30; leave those images out"):
            call(tiny_mlp(), labelled(H, value, 2), **options)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8, torch.int8])
def test_whole_numbers_of_any_size_are_labels(kind):
    for options in ({}, dict(loss_fn=loss)):
        assert torch.equal(
            class_gradients(tiny_mlp(), (H[0], H[1].to(kind)), **options),
            class_gradients(tiny_mlp(), H, **options),
        )
    for kw in (
        dict(hessian=(H[0], H[1].to(kind))),
        dict(sensitivity=(S[0], S[1].to(kind))),
        dict(held_out=(O[0], O[1].to(kind))),
    ):
        assert torch.equal(run(**kw).after.accuracy, run().after.accuracy)


@pytest.mark.parametrize(
    "y, says",
    [
        (H[1].double(), "torch.float64"),
        (H[1] > 0, "torch.bool"),
        (H[1][:, None], r"\(30, 1\)"),
        (torch.eye(3)[H[1]].long(), r"\(30, 3\)"),
    ],
)
def test_other_labels_are_refused(y, says):
    with pytest.raises(InputError, match=says):
        class_subspace(tiny_mlp(), (H[0], y))


@pytest.mark.parametrize(
    "loss_fn, says",
    [
        (nn.CrossEntropyLoss(reduction="none"), "must return one number"),
        (nn.CrossEntropyLoss(ignore_index=1), "for class 1: ignored, or of weight 0"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 0.0]).double()), "for class 2"),
        (nn.CrossEntropyLoss(weight=torch.ones(2).double()), "class weights"),
    ],
)
def test_losses_without_a_gradient_for_each_class_are_refused(loss_fn, says):
    with pytest.raises(InputError, match=says):
        class_subspace(tiny_mlp(), H, loss_fn=loss_fn)


def test_a_sum_is_the_mean_times_the_images():
    summed = class_gradients(tiny_mlp(), H, loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    assert torch.allclose(summed, class_gradients(tiny_mlp(), H, loss_fn=loss), rtol=1e-12, atol=0)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(20, 3, mode="mean").double()

    def forward(self, words, offsets):
        return self.bag(words, offsets)


class Table(nn.Module):
    "Every image against the same table, whose rows are no images."

    def __init__(self):
        super().__init__()
        self.net = tiny_mlp()

    def forward(self, x, table):
        return (
            self.net(x)
            + (x @ table.T).sum(1, keepdim=True) * torch.tensor([1.0, 0.0, -1.0]).double()
        )


def test_rows_that_cannot_be_told_apart_are_refused():
    bags = (
        dict(words=torch.arange(30) % 20, offsets=torch.arange(0, 30, 5)),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    with pytest.raises(InputError, match="images of one class must be told apart"):
        class_subspace(Bag().eval(), [bags])
    table = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).double()
    shared = class_gradients(Table().eval(), [(dict(x=H[0], table=table), H[1])])
    apart = class_gradients(
        Table().eval(), [(dict(x=x, table=table), y) for x, y in zip(H[0].split(8), H[1].split(8))]
    )
    assert torch.allclose(shared, apart, rtol=1e-10, atol=1e-12)
    with pytest.raises(InputError, match="a shared table happens to have as many rows"):
        class_gradients(
            Table().eval(),
            [(dict(x=x, table=table), y) for x, y in zip(H[0].split(7), H[1].split(7))],
        )


# --- measured sets


def run(hessian=H, sensitivity=S, held_out=O, config=ONE, **kw):
    return operate(
        tiny_mlp(),
        loss,
        hessian,
        sensitivity,
        held_out=held_out,
        config=config,
        progress=False,
        **kw,
    )


@pytest.mark.parametrize("value", [-1, -100, 3])
@pytest.mark.parametrize("which", ["sensitivity", "held_out"])
def test_measured_images_need_a_class(value, which):
    bad = labelled(dict(sensitivity=S, held_out=O)[which], value)
    with pytest.raises(InputError, match=r"labels.*must lie in 0\.\.2.*Got"):
        run(**{which: bad})
    with pytest.raises(InputError, match=r"labels.*must lie in 0\.\.2.*Got"):
        class_report(tiny_mlp(), bad)
    with pytest.raises(InputError, match=r"labels.*must lie in 0\.\.2.*Got"):
        class_accuracy(tiny_mlp(), bad)


def test_ignored_labels_are_left_out_of_the_curvature():
    y = H[1].clone()
    y[:5] = -100
    whole, part = (
        HessianOperator(tiny_mlp(), loss, d) @ torch.ones(83).double()
        for d in ((H[0], y), (H[0][5:], y[5:]))
    )
    assert torch.allclose(whole, part, rtol=1e-10, atol=1e-12)
    assert run(hessian=(H[0], y)).spikes.converged.all()


# --- names, seeds, counts


@pytest.mark.parametrize(
    "names",
    [
        np.array(["a", "b", "c"]),
        pd.Index(["a", "b", "c"]),
        pd.Series(["a", "b", "c"]),
        ["a", "b", "c"],
        ("a", "b", "c"),
        dict(a=0, b=1, c=2),
    ],
    ids=lambda n: type(n).__name__,
)
def test_names_may_be_anything_in_a_row(names):
    front = linearised_operate(
        tiny_mlp(),
        loss,
        H,
        S,
        held_out=O,
        config=ONE,
        prices=(0.01,),
        names=names,
        rounds=0,
        folds=2,
        progress=False,
    )
    phases = deflated_operate(
        tiny_mlp(), loss, H, S, phases=(1,), held_out=O, config=ONE, names=names, progress=False
    )
    compared = compare(
        tiny_mlp(), loss, H, S, O, config=ONE, names=names, controls=False, progress=False
    )
    screened = screen(tiny_mlp(), loss, H, S, names=names)
    found = [
        run(names=names).after,
        class_report(tiny_mlp(), S, names=names),
        front.points[0].held_out,
        phases.after,
        compared.rivals[0].report,
    ]
    assert all(r.names == ("a", "b", "c") for r in found) and screened.sigma > 0


@pytest.mark.parametrize("names", [np.array(["a", "b"]), pd.Index(list("abcd")), "ab"])
def test_names_must_be_one_for_each_output(names):
    says = "are a list" if isinstance(names, str) else f"each of the 3 outputs. Got {len(names)}"
    with pytest.raises(InputError, match=says):
        run(names=names)


@pytest.mark.parametrize(
    "settings",
    [
        dict(iterations=np.int64(1)),
        dict(seed=np.int32(3)),
        dict(num_spikes=np.uint8(2)),
        dict(eps=np.float32(0.25)),
        dict(box=np.bool_(True)),
        dict(params=["0.*", "2.*"]),
        dict(params=np.array(["0.*"])),
        dict(micro_batch=np.int64(8)),
    ],
    ids=str,
)
def test_numpys_numbers_are_numbers(settings, tmp_path):
    plain = {k: v.item() if isinstance(v, np.generic) else tuple(v) for k, v in settings.items()}
    given, same = (SurgeryConfig(**{"iterations": 1, "eps": 0.3} | s) for s in (settings, plain))
    assert given == same and all(
        type(v) in (int, float, bool, str, tuple, type(None)) for v in vars(given).values()
    )
    a, b = (
        run(config=given, run_dir=tmp_path / "run"),
        run(config=same, run_dir=tmp_path / "run"),
    )  # one goes on with the other
    assert torch.equal(a.after.accuracy, b.after.accuracy)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(iterations=1.5), "iterations must be a whole number. Got 1.5"),
        (dict(iterations=np.float64(2)), "whole number"),
        (dict(iterations=True), "whole number"),
        (dict(iterations=None), "whole number"),
        (dict(iterations=2**70), "iterations must be at least 1 and below"),
        (dict(iterations="3"), "whole number"),
        (dict(seed=1.0), "seed must be a whole number"),
        (dict(seed=2**70), "seed must be in"),
        (dict(seed=-(2**70)), "seed must be in"),
        (dict(seed=None), "seed"),
        (dict(num_spikes=2.0), "whole number"),
        (dict(micro_batch=2.5), "micro_batch must be a whole number"),
        (dict(micro_batch=0), "at least 1"),
        (dict(eps="0.1"), "eps must be a number"),
        (dict(eps=torch.tensor(0.1)), "eps must be a number"),
        (dict(p=None), "p must be a number"),
        (dict(p=float("inf")), "finite"),
        (dict(p="auto"), "the rule behind 'auto' is gone"),
        (dict(tol=None), "tol must be a number"),
        (dict(max_drop=None), "max_drop"),
        (dict(params=3), "params must be a name"),
        (dict(params=(1, 2)), "params must be a name"),
        (dict(precision="fp8"), "precision must be None or 'bf16'"),
        (dict(num_spikes=2**70), "k must lie in|num_spikes"),
    ],
    ids=str,
)
def test_numbers_of_the_wrong_kind_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        run(config=SurgeryConfig(**{"eps": 0.3} | settings))


@pytest.mark.parametrize("seed", [0, -1, 2**62, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("directions", ["spikes", "random", "class_means"])
def test_every_seed_that_is_allowed_works(seed, directions):
    assert (
        len(
            run(
                config=SurgeryConfig(iterations=1, eps=0.3, seed=seed, directions=directions)
            ).history
        )
        == 1
    )


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: compare(tiny_mlp(), loss, H, S, O, steps=2.5), "steps must be a whole number"),
        (lambda: compare(tiny_mlp(), loss, H, S, O, draws=0), "draws must be at least 1"),
        (lambda: compare(tiny_mlp(), loss, H, S, O, draws=2**40), "draws"),
        (
            lambda: linearised_operate(tiny_mlp(), loss, H, S, folds=1.5),
            "folds must be a whole number",
        ),
        (
            lambda: linearised_operate(tiny_mlp(), loss, H, S, rounds=-1),
            "rounds must be at least 0",
        ),
        (lambda: linearised_operate(tiny_mlp(), loss, H, S, prices=3), "prices must be fractions"),
        (
            lambda: linearised_operate(tiny_mlp(), loss, H, S, prices=[float("nan")]),
            "prices must be fractions",
        ),
        (lambda: check_phases(3, 10), "phases must be whole numbers"),
        (lambda: check_phases((1.5,), 10), "phases"),
        (lambda: check_phases((2**70,), 10), "phases"),
        (lambda: own_sets("nowhere", hessian=2.5), "hessian must be a whole number"),
        (lambda: own_sets("nowhere", seed=2**70), "seed must be"),
        (lambda: Preparation(std=(float("nan"),) * 3), "std positive"),
        (lambda: whole("n", "3"), "n must be a whole number"),
    ],
)
def test_counts_are_whole_numbers_in_a_range(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_numpys_counts_are_counts():
    assert check_phases(np.array([1, 2]), 10) == (1, 2) and whole("n", np.int64(4)) == 4
    front = linearised_operate(
        tiny_mlp(),
        loss,
        H,
        S,
        config=ONE,
        prices=np.array([0.01]),
        folds=np.int64(2),
        rounds=np.int64(0),
        progress=False,
    )
    assert len(front.points) == 2
    check_config(SurgeryConfig(seed=np.int64(5)))


# --- commands leave nothing

FACTORY = """
import sys, torch
class Asserts(torch.nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x):
        assert x.shape[-1] == 224, "Input height does not match"
        return self.net(x)
class Masked(Asserts):
    def forward(self, x, mask): return self.net(x)
class Keyed(Asserts):
    def forward(self, x): return {}["logits"]
class Divides(Asserts):
    def forward(self, x): return self.net(x) / (1 // 0)
class Stepped(Asserts):
    def forward(self, x): return self.net(x)
    def get_extra_state(self): return {1, 2}
    def set_extra_state(self, state): pass
def leaves(): sys.exit("not today")
"""


@pytest.fixture(scope="module")
def place(lay_out):
    d = lay_out("bad", FACTORY, train=6, test=6)
    (d / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (d / "torn.safetensors").write_bytes((d / "w.safetensors").read_bytes()[:200])
    torch.save(3, d / "three.pt")
    return d


OWN = {
    "no network": dict(model="mine.py:nowhere"),
    "asserts": dict(model="mine.py:Asserts", weights=None),
    "two arguments": dict(model="mine.py:Masked", weights=None),
    "a key": dict(model="mine.py:Keyed", weights=None),
    "divides": dict(model="mine.py:Divides", weights=None),
    "state that cannot be kept": dict(model="mine.py:Stepped", weights=None),
    "leaves": dict(model="mine.py:leaves", weights=None),
    "file that leaves": dict(model="leaves.py:net", weights=None),
    "no images": dict(data="nowhere"),
    "no weights": dict(weights="nowhere.pt"),
    "torn weights": dict(weights="torn.safetensors"),
    "no state dict": dict(weights="three.pt"),
    "seed": dict(seed=str(2**70)),
    "batch": dict(batch="0"),
    "hessian": dict(hessian="-1"),
    "device": dict(device="abacus"),
    "spikes": dict(spikes="0"),
    "params": dict(params="nothing.*"),
    "mean": dict(mean=("0.5", "0.5", "nan")),
    "order": dict(**{"class-order": "network"}),
    "micro-batch": dict(**{"micro-batch": "many"}),
    "detector": dict(model="torchvision:fasterrcnn_resnet50_fpn", weights="three.pt"),
}


@pytest.mark.parametrize("command", ["operate", "compare", "front", "screen", "spectrum"])
@pytest.mark.parametrize("fault", OWN)
def test_commands_for_own_networks_leave_nothing(
    place, tmp_path, monkeypatch, capsys, command, fault
):
    monkeypatch.chdir(tmp_path)
    flags = (
        dict(model="mine.py:net", weights="w.safetensors", data="toys", hessian="9") | OWN[fault]
    )
    flags = {
        k: v
        if v is None or k not in ("model", "weights", "data") or v.startswith("torchvision")
        else f"{place}/{v}"
        for k, v in flags.items()
    }
    argv = [
        command,
        *(
            x
            for k, v in flags.items()
            if v is not None
            for x in (f"--{k}", *([v] if isinstance(v, str) else v))
        ),
    ]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.splitlines()[-1].startswith("hessian-surgery: ")
        and "Traceback" not in err
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["front", "--prices", "-1"],
        ["front", "--rounds", "-1"],
        ["front", "--folds", "0"],
        ["front", "--max-global-drop", "nan"],
        ["compare", "--draws", "0"],
        ["compare", "--max-global-drop", "200"],
        ["compare", "--iterations", "0"],
        ["operate", "--tau", "0.85"],
        ["operate", "--eps", "nan"],
        ["operate", "--p", "-1"],
        ["operate", "--out", "w.safetensors/below"],
        ["screen", "--eps", "-1"],
        ["screen", "--spikes", "-2"],
        ["spectrum", "--spikes", "-2"],
        ["operate", "--class-order", "random"],
    ],
)
def test_flags_of_one_command_leave_nothing(place, tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    argv = [f"{place}/{a}" if a.startswith("w.safe") else a for a in argv]
    flags = [
        "--model",
        f"{place}/mine.py:net",
        "--weights",
        f"{place}/w.safetensors",
        "--data",
        f"{place}/toys",
        "--hessian",
        "9",
    ]
    assert main([argv[0], *flags, *argv[1:]]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "Traceback" not in err and list(tmp_path.iterdir()) == []
    # one line; before it, where images had to be read, what was about to be used
    assert lines[-1].startswith("hessian-surgery: ")
    assert len(lines) == 1 or any(line.startswith("accuracy  ") for line in lines)


REPRODUCE = {
    "unknown": ["nowhere"],
    "cifar": ["cifar10"],
    "cifar100": ["cifar100"],
    "isic": ["isic"],
    "seed": ["toys", "--seed", "-1"],
    "huge seed": ["toys", "--seed", str(2**70)],
    "no seeds": ["toys", "--seeds", "0"],
    "tau": ["toys", "--tau", "0.85"],
    "table": ["toys", "--table", "99"],
    "weights": ["toys", "--weights", "nowhere"],
    "torn weights": ["toys", "--weights", "torn.safetensors"],
    "init": ["toys", "--init", "three.pt"],
    "weights of another network": ["toys", "--weights", "w.safetensors", "--network", "resnet50"],
    "unknown network": ["toys", "--network", "resnet18"],
    "unknown named network": ["toys", "--network", "torchvision:resnet17"],
    "no such file of a network": ["toys", "--network", "nowhere.py:net"],
    "pretrained from nothing": ["toys", "--start", "pretrained"],
    "ten outputs for three classes": ["toys", "--network", "ten_outputs.py:net"],
    "features in place of logits": ["toys", "--network", "features.py:net"],
    "no pixels": ["toys", "--network", "torchvision:resnet18", "--pixels", "0"],
    "too few for a table": ["toys", "--table", "15"],
    "device": ["toys", "--device", "abacus"],
    "held back": ["toys", "--held-back", "99"],
    "damaged": ["damaged"],
    "linked": ["linked"],
    "one class only": ["lopsided"],
    "flat": ["toys/test"],
}


@pytest.fixture(scope="module")
def datasets(place):
    for name in ("damaged", "linked", "lopsided"):
        shutil.copytree(place / "toys", place / name)
    (place / "damaged" / "test" / "colour1" / "000.png").write_bytes(b"\x89PNG")
    os.symlink("/nowhere.png", place / "linked" / "train" / "colour1" / "zz.png")
    shutil.rmtree(place / "lopsided" / "test" / "colour1")
    (place / "ten_outputs.py").write_text(TEN_OUTPUTS)
    (place / "features.py").write_text("from torch import nn\ndef net(): return nn.Conv2d(3, 3, 1)")
    return place


TEN_OUTPUTS = """
from hessian_surgery_nb.foundations.networks import resnet20
def net(): return resnet20(classes=10, width=4, blocks=1)
"""


FILES_THERE = (
    "toys/test",
    "torn.safetensors",
    "three.pt",
    "w.safetensors",
    "ten_outputs.py:net",
    "features.py:net",
)


@pytest.mark.parametrize("fault", REPRODUCE)
def test_reproduce_leaves_nothing(datasets, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HESSIAN_SURGERY_DATA", str(datasets))
    monkeypatch.setenv("HESSIAN_SURGERY_CACHE", str(datasets / "cache"))
    argv = [str(datasets / a) if a in FILES_THERE else a for a in REPRODUCE[fault]]
    assert main(["reproduce", *argv, "--quick"]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and "hessian-surgery: " in err
        and "Traceback" not in err
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--seeds", "0"],
        ["--seed", "-1"],
        ["--seed", str(2**70)],
        ["--iterations", "0"],
        ["--iterations", "1.5"],
        ["--nothing"],
    ],
)
def test_demo_leaves_nothing(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["demo", *argv]) == 2
        and "Traceback" not in capsys.readouterr().err
        and list(tmp_path.iterdir()) == []
    )

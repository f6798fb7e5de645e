"""Two hundred faults, drawn by hypothesis: each ends with exit code 2 and one line that names the
value, and no file is changed.
"""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.foundations.networks import resnet20

FACTORY = """
import torch
def wide(): return resnet20(classes=5, width=4, blocks=1)
def broken(): raise RuntimeError("out of order")
def nothing(): pass
def grey(): return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 16), torch.nn.Flatten())
def deep(): return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 64), torch.nn.Flatten())
number = 3
"""

WEIGHT, BIAS = list(resnet20(classes=3, width=4, blocks=1).state_dict())[-2:]  # of the head


@pytest.fixture(scope="module")
def good(lay_out):
    return lay_out("good", FACTORY, train=12, test=8)


def tree(d):
    return {
        str(p.relative_to(d)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in sorted(d.rglob("*"))
        if "__pycache__" not in p.parts
    }


# A fault changes the flags or the files in `d`, and returns what the message must name.
def flag(name, value, says=None):
    def fault(d, flags):
        flags[name] = str(value)
        return says or str(value)

    return fault


def numbers(name, values):
    return values.map(lambda v: flag(name, v))


def words(*values):
    return st.sampled_from(values)


low, word = st.integers(-9, 0), st.from_regex(r"[b-z]{4,9}x", fullmatch=True)
FLAGS = st.one_of(
    *(
        numbers(n, low)
        for n in ("hessian", "batch", "spikes", "iterations", "resize", "crop", "micro-batch")
    ),
    *(
        numbers(n, word)
        for n in (
            "hessian",
            "spikes",
            "eps",
            "tau",
            "p",
            "precision",
            "schedule",
            "scheme",
            "metric",
            "params",
            "device",
            "micro-batch",
        )
    ),
    numbers("spikes", st.integers(5000, 10**6)),
    numbers("eps", st.floats(-5, 0)),
    numbers("eps", st.just("nan")),
    numbers("tau", st.floats(0.01, 1)),
    numbers("p", st.floats(-4, -0.1)),
    numbers("batch", st.floats(0.1, 0.9)),
    numbers("shape", word),
)


def config(text, says):
    def fault(d, flags):
        (d / "c.yaml").write_text(text)
        flags.pop(text.split(":")[0], None)  # flags given would win
        flags["config"] = str(d / "c.yaml")
        return says

    return fault


CONFIGS = st.one_of(
    word.map(lambda w: config(f"{w}: 3", w)),
    word.map(lambda w: config(f"hessian: {w}", w)),
    low.map(lambda n: config(f"batch: {n}", str(n))),
    word.map(lambda w: config(f"out: {w}", "out")),
    word.map(lambda w: config(f"model: {w}.py:net", w)),
    word.map(lambda w: config(f"- {w}", "list")),
    word.map(lambda w: config(f"{w}: [", "c.yaml")),
    words("json: 3", "force: true", "verbose: yes please").map(
        lambda t: config(t, t.split(":")[0])
    ),
)


def weights(change, says="w.safetensors"):
    def fault(d, flags):
        change(d / "w.safetensors")
        return says

    return fault


def state(change):
    def rewrite(path):
        tensors = resnet20(classes=3, width=4, blocks=1).state_dict()
        change(tensors)
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)

    return rewrite


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def noise(n):
    return lambda path: path.write_bytes(hashlib.sha256(str(n).encode()).digest() * 20)


def poison(value):
    return state(lambda t: t[WEIGHT].view(-1)[3:4].fill_(value))


def reshape(n):
    return state(lambda t: t.update({WEIGHT: torch.zeros(3, n)}))


def rename(w):
    return state(lambda t: t.update({w: t.pop(BIAS)}))


WEIGHTS = st.one_of(
    st.floats(0, 0.95).map(lambda s: weights(cut(s))),
    st.integers(0, 99).map(lambda n: weights(noise(n))),
    words(float("nan"), float("inf")).map(lambda v: weights(poison(v), WEIGHT)),
    st.integers(17, 99).map(lambda n: weights(reshape(n), WEIGHT)),
    word.map(lambda w: weights(rename(w), BIAS)),
    st.just(
        weights(
            state(
                lambda t: (
                    [t[k].fill_(70000) for k in t if k == WEIGHT]
                    and t.update({WEIGHT: t[WEIGHT].half()})
                )
            ),
            WEIGHT,
        )
    ),
    word.map(lambda w: flag("weights", f"{w}.safetensors")),
    st.just(flag("weights", "/")),
)


def images(change):
    def fault(d, flags):
        return change(d / "toys")

    return fault


def first(folder, part="train"):
    return sorted((folder / part / "colour1").iterdir())[0]


def damaged(share):
    def change(toys):
        p = first(toys, "test")
        p.write_bytes(p.read_bytes()[: int(share * p.stat().st_size)])
        return p.name

    return change


def other_size(n):
    def change(toys):
        from PIL import Image

        for p in (toys / "test" / "colour1").iterdir():
            Image.new("RGB", (n, n)).save(p)
        return str(n)

    return change


def emptied(part):
    def change(toys):
        for p in (toys / part / "colour1").iterdir():
            p.unlink()
        return "colour1"

    return change


def lone(toys):
    for p in sorted((toys / "test" / "colour2").iterdir())[1:]:
        p.unlink()
    return "colour2"


def more(part):
    def change(toys):
        shutil.copytree(toys / part / "colour0", toys / part / "colour9")
        return "colour9"

    return change


IMAGES = st.one_of(
    st.floats(0, 0.6).map(lambda s: images(damaged(s))),
    st.integers(17, 60).map(lambda n: images(other_size(n))),
    words("train", "test").map(lambda p: images(emptied(p))),
    words("train", "test").map(lambda p: images(more(p))),
    st.just(images(lone)),
    word.map(lambda w: flag("data", w)),
)
MODELS = st.one_of(
    word.map(lambda w: flag("model", f"torchvision:{w}", w)),
    word.map(lambda w: flag("model", w)),
    word.map(lambda w: flag("model", f"{w}.{w}:net")),
    word.map(lambda w: flag("model", f"{w}.py:net")),
    words("wide", "broken", "nothing", "grey", "deep", "number", "absent").map(
        lambda f: (
            lambda d, flags: (
                flags.update(model=f"{d}/mine.py:{f}") or flags.pop("weights") and "mine.py"
            )
        )
    ),
)


def taken(name):
    def fault(d, flags):
        (d / "out").mkdir()
        (d / "out" / name).write_text("somebody's")
        return name

    return fault


def a_file(d, flags):
    (d / "out").write_text("somebody's")
    return str(d / "out")


def below_a_file(d, flags):
    (d / "out").write_text("somebody's")
    flags["out"] = str(d / "out" / "deeper")
    return str(d / "out")


def interrupted(d, flags):
    (d / "out" / "state").mkdir(parents=True)
    return "--resume"


def closed(d, flags):
    (d / "closed").mkdir(mode=0o500)
    flags["out"] = str(d / "closed" / "out")
    return "closed"


PLACES = st.one_of(
    words("weights.safetensors", "result.json", "history.csv", "report.html").map(taken),
    *map(st.just, [a_file, below_a_file, interrupted] + [closed] * (os.geteuid() != 0)),
)
MISSING = words("model", "data").map(lambda n: lambda d, flags: flags.pop(n) and f"--{n}")


@settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(st.one_of(FLAGS, CONFIGS, WEIGHTS, IMAGES, MODELS, PLACES, MISSING))
def test_every_fault_is_one_line_and_changes_nothing(good, tmp_path_factory, capsys, fault):
    d = tmp_path_factory.mktemp("fault")
    shutil.copytree(good, d, dirs_exist_ok=True)
    flags = dict(
        model=f"{d}/mine.py:net",
        weights=f"{d}/w.safetensors",
        data=f"{d}/toys",
        hessian="16",
        batch="8",
        iterations="1",
        eps="0.1",
        out=f"{d}/out",
    )
    value = fault(d, flags)
    capsys.readouterr()
    note(f"{flags}: {value}")
    before, here = tree(d), set(Path.cwd().iterdir())
    assert main(["operate", *(f"--{k}={v}" for k, v in flags.items())]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.startswith("hessian-surgery: ")
        and err.count("\n") == 1
        and "Traceback" not in err
    )
    assert value in err, (value, err)
    assert tree(d) == before and set(Path.cwd().iterdir()) == here
    shutil.rmtree(d)

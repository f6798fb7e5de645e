"Surgery that is cut off at any moment ends, taken up again, as if it had not been."

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hessian_surgery_nb.app.results import OPERATE_FILES as OPERATED
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate

OPERATE = [
    sys.executable,
    "-c",
    (
        "import sys, torch; torch.set_num_threads(1); from hessian_surgery_nb.app.cli import "
        "main; sys.exit(main())"
    ),
    "operate",
]


class Cut(Exception):
    pass


def cutting(calls):
    def forward(model, x):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Cut
        return model(x)

    return forward


@pytest.mark.parametrize(
    "settings",
    [
        dict(eps=0.8),
        dict(eps=0.8, schedule="adam"),
        dict(directions="random", eps=3.0),
        dict(box=True, p=0.5),
    ],
    ids=str,
)
def test_cut_anywhere_it_ends_the_same(digits, tmp_path, settings):
    net, splits = digits

    def run(d, forward=None):
        return operate(
            net,
            nn.CrossEntropyLoss(),
            splits.hessian.pair,
            splits.sensitivity.pair,
            run_dir=d,
            forward=forward,
            config=SurgeryConfig(iterations=6, num_spikes=4, **settings),
            progress=False,
        )

    whole, rng, cuts = run(tmp_path / "whole"), random.Random(0), 0
    while True:
        try:
            again = run(tmp_path / "cut", cutting(rng.randint(14, 28) + 4 * cuts))
            break
        except Cut:
            cuts += 1
    assert cuts >= 2 and (
        settings.get("eps", 0) < 0.8 or not all(h.accepted for h in whole.history)
    )
    timeless = [
        repr([replace(h, seconds=0.0) for h in r.history]) for r in (again, whole)
    ]  # as text: random directions have NaN for eigenvalues
    assert timeless[0] == timeless[1] and again.best == whole.best
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values())
    )
    assert torch.equal(again.spikes.vectors, whole.spikes.vectors) and torch.equal(
        again.sensitivity.per_image, whole.sensitivity.per_image
    )


@pytest.fixture(scope="module")
def place(lay_out):
    return lay_out("resume", train=40, test=30)


def start(place, out, *more):
    flags = [
        "--model",
        f"{place}/mine.py:net",
        "--weights",
        str(place / "w.safetensors"),
        "--data",
        str(place / "toys"),
        "--hessian",
        "64",
        "--iterations",
        "12",
        "--eps",
        "0.3",
        "--batch",
        "10",
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        [*OPERATE, *flags, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def results(out):
    r = json.loads((out / "result.json").read_text())
    return {k: v for k, v in r.items() if k not in ("timing", "command")}, (
        out / "weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("times", [7, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_and_resumed(place, tmp_path, times):
    p = start(place, tmp_path / "whole")
    assert p.wait(timeout=300) == 0, p.stderr.read()
    whole, cut, rng, killed = results(tmp_path / "whole"), tmp_path / "cut", random.Random(0), 0
    while True:
        p, file, seen = start(place, cut, "--resume"), cut / "state" / "surgery.safetensors", None
        before = file.stat().st_mtime_ns if file.exists() else None
        while (
            killed < times and p.poll() is None and seen in (None, before)
        ):  # at least one more step each time
            seen = file.stat().st_mtime_ns if file.exists() else None
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        if killed < times and p.poll() is None:
            p.kill()
            p.communicate()
            killed += 1
            assert not set(OPERATED) & {f.name for f in cut.iterdir()} and all(
                read_whole(f) for f in file.parent.glob("*.safetensors")
            )
            continue
        assert p.wait(timeout=300) == 0, p.stderr.read()
        assert results(cut) == whole and not file.parent.exists()
        if killed == times:
            break
        shutil.rmtree(cut)  # it was done before it could be killed again


def read_whole(file):
    with safe_open(file, "pt") as f:
        return all(torch.is_tensor(f.get_tensor(k)) for k in f.keys())


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_last_good_state(place, tmp_path, small_disk):
    p = start(place, tmp_path / "whole")
    assert p.wait(timeout=300) == 0, p.stderr.read()
    p, file = start(place, small_disk / "out"), small_disk / "out" / "state" / "surgery.safetensors"
    while not file.exists() and p.poll() is None:
        time.sleep(0.002)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert p.wait(timeout=300) == 2
    error = p.stderr.read()
    assert (
        "No space left on device" in error
        and "Traceback" not in error
        and read_whole(file)
        and not set(OPERATED) & {f.name for f in (small_disk / "out").iterdir()}
    )
    (small_disk / "filler").unlink()
    p = start(place, small_disk / "out", "--resume")
    assert p.wait(timeout=300) == 0, p.stderr.read()
    assert results(small_disk / "out") == results(tmp_path / "whole")


def test_interrupted_it_leaves_the_best_so_far(place, tmp_path):
    p = start(place, tmp_path / "out")
    while not (tmp_path / "out" / "state" / "surgery.safetensors").exists() and p.poll() is None:
        time.sleep(0.002)
    p.send_signal(signal.SIGINT)
    _, errors = p.communicate(timeout=300)
    assert p.returncode == 130 and "ending after this step" in errors and "Traceback" not in errors
    steps = len(results(tmp_path / "out")[0]["history"])
    assert 1 <= steps < 12
    p = start(place, tmp_path / "out")
    assert p.wait(timeout=300) == 2 and "--resume" in p.stderr.read()
    p = start(place, tmp_path / "out", "--resume")
    assert p.wait(timeout=300) == 0, p.stderr.read()
    assert len(results(tmp_path / "out")[0]["history"]) == 12

"""The command `reproduce` on images drawn here: whole runs, killed runs, users' own folders with
faults.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from hessian_surgery_nb.app import reproduce
from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.foundations.datasets import write_toy_images
from hessian_surgery_nb.foundations.networks import resnet20
from hessian_surgery_nb.foundations.weight_files import weights_bytes
from hessian_surgery_nb.isic import write_toy_isic

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from hessian_surgery_nb.app.cli import main; sys.exit(main())",
    "reproduce",
]
SOME = [
    "--table",
    "1",
    "--table",
    "4",
    "--table",
    "9",
    "--figure",
    "5",
    "--seeds",
    "1",
    "--quick",
    "--tau",
    "mean",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    d = tmp_path_factory.mktemp("reproduce")
    write_toy_images(d / "toys")
    return d


def start(place, out, *more, **kw):
    env = os.environ | dict(
        HESSIAN_SURGERY_CACHE=str(place / "cache"),
        HESSIAN_SURGERY_DATA=str(place),
        OMP_NUM_THREADS="1",
    )
    return subprocess.Popen(
        [*COMMAND, "toys", *SOME, "--out", str(out), *more],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


def numbers(out):
    "Everything stored but the circumstances and the times."
    runs = {}
    for p in sorted(out.glob("*.json")):
        run = json.loads(p.read_text())
        for k in ("about", "seconds"):
            run.pop(k)
        run["results"].pop("timing", None)
        runs[p.name] = run
    return runs


@pytest.fixture(scope="module")
def whole(place):
    p = start(place, place / "whole")
    said, errors = p.communicate(timeout=600)
    assert p.returncode == 0, errors
    return said, errors, numbers(place / "whole")


def test_everything_asked_for_is_there(place, whole):
    said, errors, runs = whole
    assert (
        "Table 4" in said
        and "Table 2" not in said
        and "[1/" in errors
        and "begins" in errors
        and "0 runs are stored" in errors
    )
    names = {p.name for p in (place / "whole").iterdir()}
    assert {
        "toys_resnet20_table_1.csv",
        "toys_resnet20_figure_5.png",
        "toys_resnet20_report.html",
        "toys_resnet20_s0_network.json",
    } <= names
    assert not [n for n in names if n.endswith(".part")]


def test_nothing_is_run_twice(place, whole):
    p = start(place, place / "whole", "--json")
    said, errors = p.communicate(timeout=300)
    assert p.returncode == 0 and ", 0 to do" in errors and "Table 1" in json.loads(said)
    assert numbers(place / "whole") == whole[2]


def test_killed_in_every_run_it_ends_in_the_same_numbers(place, whole):
    rng, out = random.Random(0), place / "killed"
    for name in (
        "network",
        "linearisation",
        "surgery_gamma_p2",
        "bulk_finetune",
        "classic_finetune",
        "bulk_finetune_update",
        "classic_finetune_15",
    ):
        p = start(place, out)
        assert any(f"{name} begins" in line for line in p.stderr), f"{name} never began"
        time.sleep(rng.uniform(0, 0.05))
        p.kill()
        p.communicate()
        assert p.returncode == -signal.SIGKILL  # it was under way
        stored = {
            f.name: json.loads(f.read_text()) for f in out.glob("*.json")
        }  # each whole, or not there
        assert len(stored) < len(whole[2])
    p = start(place, out)
    _, errors = p.communicate(timeout=600)
    assert p.returncode == 0, errors
    assert numbers(out) == whole[2]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--table", "77"], "Table 77 is not"),
        (["--seeds", "0"], "at least 1"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors is not there"),
        (["--seed", "0", "--tau", "50"], "tau = None there, 0.5 now"),
    ],
)
def test_faults_are_named(place, whole, arguments, says):
    p = start(place, place / "whole", *arguments)
    _, errors = p.communicate(timeout=300)
    assert p.returncode == 2 and says in errors and "Traceback" not in errors
    assert numbers(place / "whole") == whole[2]


def test_a_dataset_that_is_not_there(place):
    p = subprocess.run(
        [*COMMAND, "cifar10", "--table", "1", "--out", str(place / "none"), "--data", str(place)],
        capture_output=True,
        text=True,
    )
    assert (
        p.returncode == 2
        and "--download" in p.stderr
        and not (place / "none" / "cifar10_resnet20_s0_network.json").exists()
    )


def test_a_full_disk_loses_nothing(place, whole):
    """Writes beyond a few kB fail, as on a disk that is full: one line says so, what was stored
    stays, nothing half written is left.
    """
    import resource

    out = place / "full"
    p = start(
        place, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    )
    _, errors = p.communicate(timeout=300)
    assert p.returncode == 2 and "free some space" in errors and "Traceback" not in errors
    assert not [f for f in out.rglob("*") if f.suffix == ".part"] and not list(out.glob("*.json"))
    assert numbers(place / "whole") == whole[2]


def test_a_corrupt_image_is_named(place):
    write_toy_images(place / "broken", train=4, test=4)
    (place / "broken" / "train" / "colour1" / "002.png").write_bytes(b"no image")
    p = subprocess.run(
        [*COMMAND, "broken", "--table", "1", "--quick", "--out", str(place / "none")],
        capture_output=True,
        text=True,
        env=os.environ | dict(HESSIAN_SURGERY_DATA=str(place)),
    )
    assert p.returncode == 2 and "002.png is not" in p.stderr and "Traceback" not in p.stderr


def test_seeds_side_by_side_give_the_same_numbers(place, whole):
    out = place / "seeds"
    env = os.environ | dict(
        HESSIAN_SURGERY_CACHE=str(place / "cache"),
        HESSIAN_SURGERY_DATA=str(place),
        OMP_NUM_THREADS="1",
    )
    p = subprocess.run(
        [
            *COMMAND,
            "toys",
            "--table",
            "1",
            "--quick",
            "--tau",
            "mean",
            "--seeds",
            "2",
            "--jobs",
            "2",
            "--out",
            str(out),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert p.returncode == 0, p.stderr
    runs = numbers(out)
    assert (
        len(runs) == 2
        and runs["toys_resnet20_s0_network.json"] == whole[2]["toys_resnet20_s0_network.json"]
    )


def test_experiments_by_name_bring_what_they_start_from(place, whole):
    out = place / "named"
    p = start(place, out, "--experiment", "surgery_gamma_p2", "random_same", "--dry-run")
    said, errors = p.communicate(timeout=300)
    assert p.returncode == 0, errors
    assert "random_same" in said and "bulk_finetune" in said  # tables and names together
    command = [*COMMAND, "toys", *SOME[8:], "--experiment", "surgery_gamma_p2"]
    p = subprocess.run(
        [*command, "--data", str(place), "--out", str(out)],
        env=os.environ | dict(HESSIAN_SURGERY_CACHE=str(place / "cache"), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert p.returncode == 0, p.stderr
    names = [f"toys_resnet20_s0_{name}.json" for name in ("network", "surgery_gamma_p2")]
    assert numbers(out) == {name: whole[2][name] for name in names}


def test_an_experiment_that_is_not_known_is_refused_with_those_that_are(place):
    p = start(place, place / "refused", "--experiment", "spectrum", "spectra")
    _, errors = p.communicate(timeout=300)
    assert p.returncode == 2 and "Traceback" not in errors
    assert "spectra: not known; known: network, structure, spectrum," in errors
    assert not (place / "refused").exists()


@pytest.mark.parametrize("workers, budget", [("1", "8"), ("2", "20")])
def test_what_is_under_way_ends_with_its_budget(place, workers, budget):
    "Training that would take hours is cut off, here or in a helper; nothing is half written."
    out = place / f"endless{workers}"
    more = ("--epochs", "1000000", "--budget", budget, "--jobs", workers)
    p = start(place, out, *more)
    _, errors = p.communicate(timeout=300)
    assert p.returncode == 0, errors
    assert "network begins" in errors and "Traceback" not in errors
    assert "Left are toys_resnet20_s0: network, " in errors
    assert "This goes on: hessian-surgery reproduce toys " in errors
    assert f"--budget {budget}" in errors
    assert not list(out.glob("*.json")) and not list(out.rglob("*.part"))


def test_reading_images_ends_with_the_budget_too(place, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "sources_of", lambda *_: time.sleep(200))
    out = place / "slow"
    flags = ["--quick", "--seeds", "1", "--experiment", "spectrum", "--budget", "1"]
    began = time.monotonic()
    assert main(["reproduce", str(place / "toys"), *flags, "--out", str(out)]) == 0
    assert time.monotonic() - began < 150
    assert "Left are toys_resnet20_s0: network, spectrum." in capsys.readouterr().err


def test_in_stretches_it_ends_in_the_same_numbers(place, whole):
    out, budget, stretches = place / "stretches", 1, 0
    while True:
        p = start(place, out, "--budget", str(budget), "--jobs", str(1 + stretches % 2))
        said, errors = p.communicate(timeout=300)
        assert p.returncode == 0, errors
        assert not list(out.rglob("*.part"))
        stretches += 1
        if "This goes on" not in errors:
            break
        assert "Table 4" not in said  # not before all is there
        budget *= 2
    assert stretches > 1 and "Table 4" in said
    assert numbers(out) == whole[2]


def helpers(of):
    "The processes that a command began."
    import psutil

    return [
        c
        for c in psutil.Process(of).children(recursive=True)
        if "spawn_main" in " ".join(c.cmdline())
    ]


def test_side_by_side_and_killed_it_ends_in_the_same_numbers(place, whole):
    """Runs of one seed in two processes; when the command is killed its helpers end too, and two
    commands at once share the work.
    """
    import psutil

    out = place / "both"
    p = start(place, out, "--jobs", "2")
    assert any("surgery_gamma_p2 begins" in line for line in p.stderr)
    until = time.monotonic() + 30
    while len(under_way := helpers(p.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(under_way) == 2
    p.kill()
    p.wait()
    assert not psutil.wait_procs(under_way, timeout=20)[1]
    assert len(list(out.glob("*.json"))) < len(whole[2])
    two = [start(place, out, "--jobs", "2") for _ in range(2)]
    for p in two:
        _, errors = p.communicate(timeout=300)
        assert p.returncode == 0, errors
    assert numbers(out) == whole[2]


def test_many_classes_hold_training_images_back(place):
    env = os.environ | dict(
        HESSIAN_SURGERY_CACHE=str(place / "cache"),
        HESSIAN_SURGERY_DATA=str(place),
        OMP_NUM_THREADS="1",
    )
    out = place / "many"
    p = subprocess.run(
        [*COMMAND, "toys", "--held-back", "10", "5", "--quick", "--seeds", "1", "--out", str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert p.returncode == 0, p.stderr
    assert all(
        f"Table {t}" in p.stdout for t in (10, 11, "12.", "12, noise", "7, by price")
    ) and all((out / f"toys_resnet20_{f}.png").exists() for f in ("figure_3", "figure_3_noise"))
    run = json.loads((out / "toys_resnet20_s0_network.json").read_text())["results"]
    assert (
        run["training_images"] == 75
        and sum(c["images"] for c in run["sensitivity"]["classes"]) == 30
        and len(run["labels"]) == 15
    )
    assert (
        len(run["other"]["labels"]) == 48 and "on test images of another kind" in p.stdout
    )  # reported apart


def test_nothing_to_report_without_something_to_tune_on(place):
    p = subprocess.run(
        [*COMMAND, "toys", "--held-back", "0", "5", "--out", str(place / "refused")],
        env=os.environ | dict(HESSIAN_SURGERY_DATA=str(place)),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (
        p.returncode == 2
        and "--held-back takes one number or two" in p.stderr
        and not (place / "refused").exists()
    )


def test_lesions_have_their_own_experiments(place):
    env = os.environ | dict(
        HESSIAN_SURGERY_CACHE=str(place / "cache"),
        HESSIAN_SURGERY_DATA=str(place),
        OMP_NUM_THREADS="1",
    )
    write_toy_isic(place / "isic2019", counts=(9, 12, 8, 8, 9, 8, 8, 8))
    command = [
        *COMMAND,
        "isic",
        "--quick",
        "--seeds",
        "1",
        "--table",
        "13",
        "--out",
        str(place / "skin"),
    ]
    p = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    assert (
        "class-balanced, surgery" in p.stdout
        and "VASC (" in p.stdout
        and "Table 1." not in p.stdout
    )
    run = json.loads((place / "skin" / "isic_resnet20_s0_cb_surgery.json").read_text())
    assert (
        run["config"]["pixels"] == 16
        and run["config"]["box"]
        and run["config"]["start"] == "cb_start"
    )
    path = place / "isic2019" / "ISIC_2019_Training_GroundTruth.csv"
    path.write_text(path.read_text().replace("TOY_00003,1.0,0.0", "TOY_00003,1.0,1.0"))
    p = subprocess.run(
        [*command, "--seed", "1"], env=env, capture_output=True, text=True, timeout=300
    )
    assert (
        p.returncode == 2
        and "TOY_00003 has MEL = 1.0, NV = 1.0" in p.stderr
        and "Traceback" not in p.stderr
    )


NETWORK = """
from hessian_surgery_nb.foundations.networks import resnet20
def small(classes): return resnet20(classes=classes, width=4, blocks=1)
"""


def test_a_network_of_ones_own_begins_from_given_weights(place, tmp_path):
    "Named by its function, on images that it scales; the head is for other classes."
    code = tmp_path / "mine.py"
    init = tmp_path / "five.safetensors"
    code.write_text(NETWORK)
    init.write_bytes(weights_bytes(resnet20(classes=5, width=4, blocks=1, seed=9)))
    out = tmp_path / "out"
    flags = [
        *("--network", f"{code}:small", "--start", "pretrained", "--init", str(init)),
        *("--pixels", "20", "--table", "1", "--quick", "--seeds", "1", "--tau", "mean"),
    ]

    def reproduce(*more):
        return subprocess.run(
            [*COMMAND, "toys", *flags, "--out", str(out), *more],
            env=os.environ | dict(HESSIAN_SURGERY_DATA=str(place), OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            timeout=300,
        )

    first = reproduce()
    assert first.returncode == 0, first.stderr
    run = json.loads((out / "toys_mine-small_pretrained_s0_network.json").read_text())
    asked = run["config"]
    assert (asked["network"], asked["seen_pixels"]) == ("mine.py:small", 20)
    assert (asked["start"], asked["epochs"], asked["init"]) == ("pretrained", 1, init.name)
    assert "width" not in asked
    assert set(run["made_from"]) == {"images", "init", "network"}
    assert "1 runs are stored" in reproduce("--dry-run").stderr
    assert "seen_pixels = 20 there, 24 now" in reproduce("--pixels", "24").stderr
    code.write_text(NETWORK + "# another network")
    assert "of other network" in reproduce().stderr

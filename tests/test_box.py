"""The script for a machine with a GPU, at small size on the processor: it is known to work."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_paper.sh"
ENGINE_SCRIPT = ROOT / "benchmarks" / "gpu.sh"
FEW = {
    "network",
    "surgery_gamma_p2",
    "surgery_adam_p2",
    "front_biases",
    "state_at_start",
    "spectrum",
    "surgery_paper_eps",
    "sensitivity",
    "structure",
    "balanced",
    "focal",
    "focal_surgery",
}


def run(out, size, script=SCRIPT, **variables):
    env = os.environ | dict(PYTHON=sys.executable, OMP_NUM_THREADS="1", JOBS="1") | variables
    command = ["bash", str(script), "cpu", str(out), size]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def experiments(folder):
    "Names of those that are stored there, each file whole."
    return {json.loads(file.read_text())["config"]["experiment"] for file in folder.glob("*.json")}


def test_at_small_size_it_stores_every_run_and_then_has_nothing_to_do(tmp_path):
    out = tmp_path / "out"
    done = run(out, "small", BUDGET="800")
    logs = "".join(file.read_text() for file in out.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert experiments(out / "few") == FEW
    assert experiments(out / "many") == {"network", "front_biases", "deflated"}
    assert "15 runs in" in done.stdout and "passed" in done.stdout
    assert not list(out.rglob("*.safetensors"))  # weights stay behind
    again = run(out, "small", BUDGET="20")  # no time for anything: what is there stays
    assert again.returncode == 0, again.stderr
    assert "15 runs in" in again.stdout


def test_another_size_is_refused(tmp_path):
    done = run(tmp_path / "out", "tiny")
    assert done.returncode == 2 and "benchmarks/gpu_paper.sh cuda OUT" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_engine_at_small_size(tmp_path):
    "Every part runs, and what other libraries are not here for is said."
    out = tmp_path / "out"
    done = run(out, "small", ENGINE_SCRIPT, BUDGET="800")
    logs = "".join(file.read_text() for file in out.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert "passed" in done.stdout and "failed: nothing" in done.stdout
    for name in ("scale", "engine"):
        found = json.loads((out / f"{name}.json").read_text())
        assert found["about"]["device"] == "cpu" and not any("failed" in r for r in found["rows"])
    rows = json.loads((out / "scale.json").read_text())["rows"]
    checks = {row["check"]: row for row in rows}
    assert checks["digits, 16 images, 8 px: ours, cached"]["off"] < 1e-4
    assert checks["top 3 eigenpairs, ours"]["worst_residual"] < 0.011
    assert checks["a process group of one rank"]["off"] < 1e-6
    assert "precision" in checks["bf16, its error"]
    told = {"seconds", "skipped", "plan", "precision", "off"}
    assert all(told & set(row) for row in rows)


def test_the_engine_without_time_does_nothing_and_says_so(tmp_path):
    done = run(tmp_path / "out", "small", ENGINE_SCRIPT, BUDGET="20")
    assert done.returncode == 0 and done.stdout.count("no time left") == 3
    assert run(tmp_path / "out", "tiny", ENGINE_SCRIPT).returncode == 2

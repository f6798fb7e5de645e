"""Several processes that share a run: the numbers of one, a part of the vectors each, and no hang
when one dies.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hessian_surgery_nb.app.cli import main

PATIENCE = 60  # seconds, from the death of a process to the end of the run

JOB = """
import sys
import torch
from torch import nn
from safetensors.torch import save_file
from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import eigen_residuals, lanczos_tridiag, top_eigenpairs
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.foundations.distributed import distributed
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.spectrum_type import spectrum_type
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.foundations.training import train

torch.set_num_threads(1)

splits = long_tail_splits(load_digits(), seed=0)
net = digits_net(seed=0)
train(net, splits.train.pair, epochs=10, seed=0)
net = net.double()


def ragged(part, sizes=(37, 64, 3, 1, 200)):
    (X, y), out = part.pair, []
    while len(y):
        n = sizes[len(out) % len(sizes)]
        out.append((X[:n].double(), y[:n]))
        X, y = X[n:], y[n:]
    return out


class Lazy:  # a loader of which nobody knows the length
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


weight, found = torch.linspace(0.5, 2, 10).double(), {}
losses = dict(
    weighted=nn.CrossEntropyLoss(weight=weight, ignore_index=3),
    sum=nn.CrossEntropyLoss(reduction="sum"),
    own=lambda z, y: nn.functional.cross_entropy(z, y),
)
with distributed() as t:
    for name, loss_fn in losses.items():
        for mode in ("auto", "recomputed", "difference"):
            data = ragged(
                splits.hessian, (37, 64, 3) if name == "weighted" else (30, 42)
            )  # a loss of one's own must show its reduction on each process's rows
            op = HessianOperator(
                net, loss_fn, Lazy(data) if mode == "recomputed" else data, mode=mode
            )
            v = torch.randn(
                op.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            found[f"product {name} {mode}"], found[f"gradient {name} {mode}"] = (
                op @ v,
                op.gradient()[1],
            )
    op = HessianOperator(net, losses["weighted"], ragged(splits.hessian))
    for how in (
        dict(k=9, tol=1e-9),
        dict(k=4, tol=1e-8, max_basis=14),
        dict(k=4, tol=1e-8, verify=True),
        dict(k=4, tol=1e-2, basis_dtype=torch.bfloat16),
    ):
        pairs = top_eigenpairs(op, seed=3, **how)
        assert (
            pairs.converged.all()
            and (eigen_residuals(op, pairs) <= 1.1 * pairs.residuals + 1e-12).all()
        )
        assert (
            len(pairs.vectors) == t.local_size(op.shape[0])
            and abs(len(pairs.vectors) - op.shape[0] / t.size) < 1
        )
        assert (
            pairs.vectors.untyped_storage().nbytes()
            <= pairs.vectors.element_size() * t.local_size(op.shape[0]) * (2 * how["k"] + 20)
        )  # the basis may have become the result; nothing whole is kept
        if "basis_dtype" not in how:
            found[f"values {how}"], found[f"vectors {how}"] = (
                pairs.values,
                t.gather(pairs.vectors, op.shape[0]).contiguous(),
            )
    for full in (True, False):
        found[f"tridiagonal {full}"] = lanczos_tridiag(op, 12, reorthogonalise=full, seed=1).T
    for name, known in (
        ("from nothing", None),
        ("from pairs", top_eigenpairs(op, 4, tol=1e-8)),
    ):
        sd = spectral_density(op, num_probes=3, num_matvecs=12, spikes=known)
        found |= {f"nodes {name}": sd.nodes, f"weights {name}": sd.weights}
    kind = spectrum_type(op)
    found["type"] = torch.tensor([kind.C_t, kind.K_H05, kind.K_error, kind.products])
    for directions in ("spikes", "class_means", "gradients", "random"):
        r = operate(
            net,
            nn.CrossEntropyLoss(),
            ragged(splits.hessian),
            ragged(splits.sensitivity),
            held_out=ragged(splits.held_out),
            config=SurgeryConfig(iterations=3, directions=directions, tol=1e-8),
            progress=False,
        )
        found[f"alpha {directions}"] = torch.tensor(
            [h.alpha for h in r.history], dtype=torch.float64
        )
        for mine in (*r.model.state_dict().values(), found[f"alpha {directions}"]):
            assert torch.equal(mine, t.broadcast(mine.clone()))  # the same bits on every rank
        found |= {f"weights {directions} {k}": p for k, p in r.model.state_dict().items()} | {
            f"accuracy {directions}": r.after.accuracy
        }
    if t.rank == 0:
        save_file({k: v.contiguous() for k, v in found.items()}, sys.argv[1])
"""


def torchrun(n, *what, **more):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(n),
            *map(str, what),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **more,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    d = tmp_path_factory.mktemp("ranks")
    (d / "job.py").write_text(JOB)
    subprocess.run(
        [sys.executable, d / "job.py", d / "1"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return d, load_file(d / "1")


def test_two_processes_find_what_one_does(alone):
    d, one = alone
    p = torchrun(2, d / "job.py", d / "2")
    said = p.communicate(timeout=240)
    assert p.returncode == 0, said
    several = load_file(d / "2")
    assert several.keys() == one.keys() and len(one) > 40
    for k, v in one.items():
        torch.testing.assert_close(
            several[k], v, rtol=1e-6, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}"
        )


@pytest.fixture(scope="module")
def place(lay_out):
    return lay_out("ranks", train=40, test=30)


def operate(place, out, *more, command="operate"):
    return [
        command,
        "--model",
        f"{place}/mine.py:net",
        "--weights",
        place / "w.safetensors",
        "--data",
        place / "toys",
        "--hessian",
        "64",
        "--eps",
        "0.3",
        "--batch",
        "10",
        "--device",
        "cpu",
        "--out",
        out,
        *more,
    ]


def by_hand(n, what, start=("-m", "hessian_surgery_nb")):
    "The processes as a cluster starts them, without torchrun to look after them."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if "TORCHELASTIC" not in k} | dict(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        OMP_NUM_THREADS="1",
    )
    return [
        subprocess.Popen(
            [sys.executable, *map(str, (*start, *what))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
        )
        for r in range(n)
    ]


def after_a_step(state, processes, more=0):
    seen, until = None, time.monotonic() + 120
    while time.monotonic() < until and more >= 0 and all(p.poll() is None for p in processes):
        now = (
            (state / "surgery.safetensors").stat().st_mtime_ns
            if (state / "surgery.safetensors").exists()
            else None
        )
        if now != seen:
            seen, more = now, more - 1
        time.sleep(0.002)
    assert all(p.poll() is None for p in processes), [p.stderr.read() for p in processes]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    d = tmp_path_factory.mktemp("whole") / "out"
    processes = by_hand(2, operate(place, d, "--iterations", "6"))
    said = [p.communicate(timeout=240) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert "change (pp)" in said[0][0] and not said[1][0]  # one voice
    return d


@pytest.mark.parametrize("dies, how", [(0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_process_that_dies_ends_the_run_and_loses_nothing(place, whole, tmp_path, dies, how):
    flags = operate(place, tmp_path / "cut", "--iterations", "6", "--resume")
    processes = by_hand(2, flags)
    after_a_step(tmp_path / "cut" / "state", processes, more=1)
    processes[dies].send_signal(how)
    start, left = time.monotonic(), processes[1 - dies]
    said = left.communicate(timeout=PATIENCE)[1]
    assert time.monotonic() - start < PATIENCE and left.returncode == 3
    assert (
        "needs all its processes to the end" in said
        and "--resume" in said
        and "Traceback" not in said
    )
    assert not (tmp_path / "cut" / "result.json").exists()

    again = by_hand(2, flags)
    said = [p.communicate(timeout=240) for p in again]
    assert [p.returncode for p in again] == [0, 0], said
    assert (tmp_path / "cut" / "weights.safetensors").read_bytes() == (
        whole / "weights.safetensors"
    ).read_bytes()
    steps = [
        json.loads((d / "result.json").read_text())["history"] for d in (tmp_path / "cut", whole)
    ]
    assert steps[0] == steps[1] and len(steps[0]) > 2


def test_torchrun_ends_when_a_worker_dies(place, tmp_path):
    p = torchrun(
        2, "-m", "hessian_surgery_nb", *operate(place, tmp_path / "out", "--iterations", "50")
    )
    after_a_step(tmp_path / "out" / "state", [p])
    workers = psutil.Process(p.pid).children(recursive=True)
    assert len(workers) == 2
    workers[1].kill()
    start = time.monotonic()
    p.communicate(timeout=PATIENCE)
    assert p.returncode != 0 and time.monotonic() - start < PATIENCE
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)


def test_an_error_of_one_ends_all(place, tmp_path):
    bad = (
        "import os, torch\nfrom mine import net as good\ndef net():\n    n = good()\n    if "
        "os.environ['RANK'] == '1': n.eval(); n.register_forward_hook(lambda m, i, o: o * "
        "float('nan') if len(i[0]) == 5 else o)\n    return n\n"
    )
    (place / "bad.py").write_text(
        bad.replace("from mine", f"import sys; sys.path.insert(0, {str(place)!r})\nfrom mine")
    )
    flags = operate(place, tmp_path / "out", "--iterations", "3")
    processes = by_hand(
        2, [f"{place}/bad.py:net" if str(f).endswith("mine.py:net") else f for f in flags]
    )
    said = [p.communicate(timeout=PATIENCE)[1] for p in processes]
    assert [p.returncode for p in processes] == [3, 2], said
    assert (
        "rank 1 of 2" in said[1] and "must be finite" in said[1] and not (tmp_path / "out").exists()
    )


SILENT = """
import sys, time, torch
from hessian_surgery_nb.foundations.distributed import distributed

with distributed(patience=3.0) as t:
    open(f"{sys.argv[1]}/{t.rank}", "w").close()
    for _ in range(1000):
        t.all_reduce(torch.ones(3))
        time.sleep(0.1)
"""


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_falls_silent_ends_the_run(tmp_path, stopped):
    (tmp_path / "job.py").write_text(SILENT)
    processes = by_hand(2, [tmp_path], start=[tmp_path / "job.py"])
    while not all((tmp_path / str(r)).exists() for r in (0, 1)):
        assert all(p.poll() is None for p in processes), [p.stderr.read() for p in processes]
        time.sleep(0.05)
    processes[stopped].send_signal(signal.SIGSTOP)  # alive, its connections open, and not a word
    try:
        said = processes[1 - stopped].communicate(timeout=PATIENCE)[1]
        assert (
            processes[1 - stopped].returncode == 3 and "needs all its processes to the end" in said
        )
    finally:
        processes[stopped].kill()
        processes[stopped].wait()


def test_a_group_of_your_own_is_used(tmp_path):
    (tmp_path / "job.py").write_text("""
import torch, torch.distributed as dist
from hessian_surgery_nb.foundations.distributed import current_team, distributed

dist.init_process_group("gloo")
with distributed() as t:
    total = t.all_reduce(torch.ones(2))
    assert t.size == 2 and total.tolist() == [2.0, 2.0]
assert current_team().size == 1
dist.barrier()
dist.destroy_process_group()
""")
    p = torchrun(2, tmp_path / "job.py")
    said = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0, said


def test_images_that_see_each_other_are_not_shared(tmp_path):
    (tmp_path / "job.py").write_text("""
import torch
from torch import nn
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.foundations.distributed import distributed
from hessian_surgery_nb.foundations.accuracy import predict


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x - x.mean(0))


X, y = torch.randn(20, 4), torch.arange(20) % 3
with distributed() as t:
    for what in (
        lambda: predict(Mixed().eval(), (X, y)),
        lambda: HessianOperator(Mixed().eval(), nn.CrossEntropyLoss(), (X, y)) @ torch.ones(15),
        lambda: (
            HessianOperator(nn.Linear(4, 3), nn.CrossEntropyLoss(), (X[:1], y[:1])).plan()
            if t.rank == 0
            else (_ for _ in ()).throw(InputError("every process needs an image"))
        ),
    ):
        try:
            what()
        except InputError as e:
            assert "images do not see each other" in str(
                e
            ) or "every process needs an image" in str(e), e
        else:
            raise AssertionError("not refused")
""")
    p = torchrun(2, tmp_path / "job.py")
    said = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0, said


def test_other_commands_want_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["demo"]) == 2
    assert "runs in one process. torchrun started 2" in capsys.readouterr().err


def test_screen_compare_and_front_are_shared(place, tmp_path):
    flags = [
        "screen",
        "--model",
        f"{place}/mine.py:net",
        "--weights",
        place / "w.safetensors",
        "--data",
        place / "toys",
        "--hessian",
        "64",
        "--gradient",
        "0",  # rest is tried in one process only
        "--device",
        "cpu",
        "--json",
    ]
    one = json.loads(
        subprocess.run(
            [sys.executable, "-m", "hessian_surgery_nb", *map(str, flags)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    p = torchrun(2, "-m", "hessian_surgery_nb", *flags)
    said, errors = p.communicate(timeout=240)
    assert p.returncode == 0, errors
    two = json.loads(said)
    assert two["diagnosis"]["unknown"] == ["rest"]
    assert two.keys() == one.keys() and (two["sigma"], two["matvecs"], two["passes"]) == (
        one["sigma"],
        one["matvecs"],
        one["passes"],
    )
    p = torchrun(
        2,
        "-m",
        "hessian_surgery_nb",
        *operate(
            place, tmp_path / "compared", "--iterations", "2", "--no-controls", command="compare"
        ),
    )
    said, errors = p.communicate(timeout=240)
    assert p.returncode == 0 and said.count("The smallest sigma is that of") == 1, errors
    assert {f.name for f in (tmp_path / "compared").iterdir()} == {"result.json", "report.html"}
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [
        "--rounds",
        "1",
        "--folds",
        "2",
        "--max-global-drop",
        "5",
        "--prices",
        "1",
        "--directions",
        "class_means",
    ]
    strip = lambda out: [
        f for f in operate(place, out, *flags, command="front") if f not in ("--eps", "0.3")
    ]
    assert main([str(f) for f in strip(one)]) == 0
    p = torchrun(2, "-m", "hessian_surgery_nb", *strip(two))
    said, errors = p.communicate(timeout=240)
    assert p.returncode == 0, errors
    points = [json.loads((d / "result.json").read_text())["points"] for d in (one, two)]
    assert [len(p["alpha"]) for p in points[0]] == [2, 2, 2] and [
        p["held_out"] for p in points[0]
    ] == [p["held_out"] for p in points[1]]
    for a, b in zip(
        load_file(one / "weights.safetensors").values(),
        load_file(two / "weights.safetensors").values(),
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

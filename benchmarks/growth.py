"""What `operate`, `rebalance` and `spectral_density` cost as images, classes and parameters grow, a
decade of each: processor time and peak memory, a process for each point, the fastest of a few.

Images are drawn: each class has a pattern of its own, seen through noise. A residual network is
trained on them first, which is not counted. `operate` makes three iterations along nine spikes
found on an eighth of the images, `rebalance` tries what costs little, `spectral_density` takes
thirty matvecs from each of two probes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from problem import about, arguments, peak_gb, table, write
from torch import nn
from torch.nn.functional import interpolate
from tqdm import tqdm

import hessian_surgery_nb as hs
from hessian_surgery_nb.foundations.networks import num_params, resnet20
from hessian_surgery_nb.foundations.training import train

IMAGES = (500, 1000, 2000, 3500, 5000)
CLASSES = (10, 20, 40, 70, 100)
WIDTHS = (8, 12, 16, 20, 28)
BASE = dict(images=2000, classes=10, width=8)
SMALL = dict(images=120, classes=3, width=2)
TRAINING = 4000  # images
SPIKES, ITERATIONS, PROBES, MATVECS = 9, 3, 2, 30


def drawn(count: int, classes: int, seed: int):  # (N, 3, 16, 16), (N,)
    "Images in the order of their classes by turns; half of the patterns are harder to see."
    patterns = torch.randn(classes, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = interpolate(patterns, size=16, mode="bilinear")
    y = torch.arange(count) % classes
    noise = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    contrast = 0.22 + 0.12 * (y % 2)
    return contrast[:, None, None, None] * patterns[y] + noise, y


@dataclass(frozen=True)
class Problem:
    "A trained network with its three sets."

    net: nn.Module
    hessian: tuple[torch.Tensor, torch.Tensor]
    sensitivity: tuple[torch.Tensor, torch.Tensor]
    held_out: tuple[torch.Tensor, torch.Tensor]


def prepared(args) -> Problem:
    net = resnet20(classes=args.classes, width=args.width, blocks=1)
    train(net, drawn(TRAINING, args.classes, 1), epochs=args.epochs, batch_size=64, seed=0)
    curved = max(64, args.images // 8)
    sets = [drawn(n, args.classes, s) for n, s in ((curved, 2), (args.images, 3), (args.images, 4))]
    return Problem(net, *sets)


def operate(problem, args) -> dict:
    config = hs.SurgeryConfig(iterations=ITERATIONS, num_spikes=min(SPIKES, args.spikes))
    result = hs.operate(
        problem.net,
        nn.CrossEntropyLoss(),
        problem.hessian,
        problem.sensitivity,
        held_out=problem.held_out,
        config=config,
        progress=False,
    )
    steps = result.history
    return dict(
        matvecs=result.spikes.num_matvecs + sum(step.matvecs for step in steps[1:]),
        passes=sum(step.passes for step in steps),
        iterations=len(steps),
    )


def rebalance(problem, args) -> dict:
    result = hs.rebalance(
        problem.net,
        nn.CrossEntropyLoss(),
        problem.hessian,
        problem.sensitivity,
        held_out=problem.held_out,
        progress=False,
    )
    return dict(method=result.method, methods=len(result.outcomes))


def density(problem, args) -> dict:
    op = hs.HessianOperator(problem.net, nn.CrossEntropyLoss(), problem.hessian)
    hs.spectral_density(op, num_probes=PROBES, num_matvecs=MATVECS)
    return dict(matvecs=op.num_matvecs)


TASKS = dict(operate=operate, rebalance=rebalance, spectral_density=density)


def measured(args) -> dict:
    "One point, in this process."
    problem = prepared(args)
    X, y = problem.held_out
    with torch.no_grad():
        accuracy = (problem.net(X).argmax(1) == y).float().mean().item()
    before, wall, processor = peak_gb(), time.perf_counter(), time.process_time()
    counts = TASKS[args.task](problem, args)
    return dict(
        parameters=num_params(problem.net),
        seconds=time.perf_counter() - wall,
        cpu_s=time.process_time() - processor,
        before_gb=before,
        peak_gb=peak_gb(),
        accuracy=accuracy,
        **counts,
    )


def in_own_process(task: str, against: str, args, **point) -> dict:
    given = dict(point, task=task, threads=args.threads, epochs=args.epochs, spikes=args.spikes)
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(task=task, against=against, **point) | json.loads(done.stdout.splitlines()[-1])


def points(args):
    "(task, what grows, the point), from the small to the large."
    base = SMALL if args.small else BASE
    growing = dict(images=IMAGES, classes=CLASSES, width=WIDTHS)
    if args.small:
        growing = dict(images=(120, 240), classes=(3, 6), width=(2, 4))
    for task in TASKS:
        for against, sizes in growing.items():
            for size in sizes:
                yield task, against, base | {against: size}


def main():
    p = arguments(__doc__, "nbs/runs/bench_growth.json")
    p.add_argument("--images", type=int, default=BASE["images"])
    p.add_argument("--classes", type=int, default=BASE["classes"])
    p.add_argument("--width", type=int, default=BASE["width"])
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--spikes", type=int, default=SPIKES)
    p.add_argument("--task", choices=TASKS, help="for the processes that this script starts")
    p.add_argument("--repeats", type=int, default=2, help="of each point; the fastest counts")
    p.add_argument("--small", action="store_true", help="to see that it runs")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.task:
        print(json.dumps(measured(args)))
        return
    rows = []
    for task, against, point in tqdm(list(points(args)), desc="points"):
        again = [in_own_process(task, against, args, **point) for _ in range(args.repeats)]
        rows.append(min(again, key=lambda row: row["cpu_s"]))
    facts = about(args, repeats=args.repeats)
    facts["data"] = "drawn images"
    command = "python benchmarks/growth.py --threads 1"
    write(args.out, dict(command=command, about=facts, rows=rows), table(rows))


if __name__ == "__main__":
    main()

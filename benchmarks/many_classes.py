"""A thousand classes, 50,000 images: time and peak memory of tuned biases, of biases at a price,
and of a Jacobian of all logits along nine directions.

Logits are drawn: every class has its own ease and its own bias. Every task runs in a process of its
own; `cpu_s` is what it computed, `seconds` what it took on a machine that may do other things. For
few classes biases at a price are found by SLSQP as well, which is what the package uses there;
both without cross-fitting.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch
from problem import about, arguments, peak_gb, table, write
from torch import nn

from hessian_surgery_nb import best_step
from hessian_surgery_nb.baselines import class_accuracies, tune_biases
from hessian_surgery_nb.best_step import margins, tuned_to_price
from hessian_surgery_nb.foundations.testbed import seeded
from hessian_surgery_nb.predicted_logits import logit_jacobian


def drawn(images: int, classes: int, seed: int = 0):
    "Logits and labels; the own logit is higher, by more for some classes."
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(images) % classes
    logits = torch.randn(images, classes, generator=generator)
    ease = 1.0 + torch.tensor(float(classes)).log() / 2
    ease = ease + 0.8 * torch.randn(classes, generator=generator)
    logits[torch.arange(images), y] += ease[y]
    return logits.add_(0.4 * torch.randn(classes, generator=generator)), y


def figures(accuracy: torch.Tensor) -> dict:
    return dict(sigma=accuracy.std(correction=0).item(), accuracy=accuracy.mean().item())


def biases(args):
    logits, y = drawn(args.images, args.classes)
    before = figures(class_accuracies(logits, y))
    ready = peak_gb()
    start = clocks()
    found = tune_biases(logits, y)
    took = since(start)
    after = figures(class_accuracies(logits + found, y))
    return dict(took, before_gb=ready, before=before, after=after)


def price(args):
    logits, y = drawn(args.images, args.classes, args.seed)
    before = figures(class_accuracies(logits, y))
    ready = peak_gb()
    start = clocks()
    if args.solver == "slsqp":
        best_step._MANY = args.classes
        step = tuned_to_price(logits, y, 0.005, count=args.folds)
    else:
        if args.classes < best_step._MANY:
            best_step._MANY = args.classes  # the radius of few classes
        margin, _ = margins(logits, y)
        radius = 4 * margin.abs().median().item() + 1e-6
        step = best_step._many_to_price(logits, y, 0.005, radius, args.folds, 0)
    took = since(start)
    return dict(
        took,
        before_gb=ready,
        before=before,
        after=figures(step.predicted),
        out_of_fold=figures(step.out_of_fold),
        shrink=step.shrink,
    )


def jacobian(args):
    with seeded(0):
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, args.classes)).eval()
        X = torch.randn(args.images, 64)
        size = sum(p.numel() for p in net.parameters())
        directions = torch.linalg.qr(torch.randn(size, 9))[0]
    y = torch.arange(args.images) % args.classes
    batches = list(zip(X.split(500), y.split(500)))
    ready = peak_gb()
    start = clocks()
    found = logit_jacobian(net, directions, batches, folder=args.folder)
    took = since(start)
    found.accuracy(torch.ones(9) / 10)
    sizes = found.jacobian.nbytes + found.curvature.nbytes
    return dict(
        took,
        before_gb=ready,
        size_gb=sizes / 1e9,
        in_file=found.in_file,
        read_gb=peak_gb(),  # once all of it was read
    )


def clocks():
    return time.perf_counter(), time.process_time()


def since(start):
    now = clocks()
    return dict(seconds=now[0] - start[0], cpu_s=now[1] - start[1], peak_gb=peak_gb())


TASKS = dict(biases=biases, price=price, jacobian=jacobian)


def run(args, task, **more):
    "A task in another process."
    given = dict(images=args.images, classes=args.classes, threads=args.threads) | more
    if args.folder:
        given["folder"] = args.folder
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--task", task, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(task, more, found, flush=True)
    facts = dict(task=task, images=given["images"], classes=given["classes"])
    return facts | more | found


def main():
    p = arguments(__doc__, "nbs/runs/bench_many_classes.json")
    p.add_argument("--images", type=int, default=50_000)
    p.add_argument("--classes", type=int, default=1000)
    p.add_argument("--folder", help="for the Jacobian's file")
    p.add_argument("--task", choices=TASKS, help="for the processes that this script starts")
    p.add_argument("--solver", default="own")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folds", type=int, default=5, help="of biases at a price; 1: none")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.task:
        print(json.dumps(TASKS[args.task](args)))
        return
    rows = [run(args, task) for task in TASKS]
    for classes in (10, 30, 100):
        for seed in (0, 1, 2):
            for solver in ("slsqp", "own"):
                how = dict(classes=classes, images=2000, seed=seed, solver=solver, folds=1)
                rows.append(run(args, "price", **how))
    facts = about(args, price=0.005)
    facts["data"] = "drawn logits"
    shown = [
        {key: row.get(key) for key in ("task", "images", "classes", "solver", "cpu_s", "peak_gb")}
        for row in rows
    ]
    result = dict(command="python benchmarks/many_classes.py", about=facts, rows=rows)
    write(args.out, result, table(shown))


if __name__ == "__main__":
    main()

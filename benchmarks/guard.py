"""What it costs to notice that a network or its data are not a fixed function: surgery with the guard and without, in turn.

Without means: no pass before and after a search for eigenpairs, no comparison of passes, no fingerprints of weights and
data before a product, no second look at two images before an evaluation, nothing set aside around a forward pass."""
from __future__ import annotations

import contextlib
import statistics
from unittest import mock

import torch
from problem import about, arguments, images, peak_gb, seconds, table, write
from torch import nn
from tqdm import trange

from hessian_surgery_nb import hvp, train
from hessian_surgery_nb.models import load_weights, resnet20
from hessian_surgery_nb.surgery import SurgeryConfig, operate


@contextlib.contextmanager
def unguarded():
    "The package as it would be without the guard."
    nothing = contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        def replace(place, name, new):
            stack.enter_context(mock.patch.object(place, name, new))
        replace(hvp.HessianOperator, "observe", lambda self: None)
        replace(hvp.HessianOperator, "unchanged", lambda self, since: True)
        replace(hvp.HessianOperator, "_compare", lambda self, trace, moved: None)
        replace(hvp.HessianOperator, "_present", lambda self, probes: "present")
        replace(hvp, "undisturbed", lambda model: nothing)
        replace(train, "_check_repeats", lambda *args: None)
        yield


def main():
    parser = arguments(__doc__, "nbs/runs/bench_guard.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sensitivity", type=int, default=2000, help="images")
    parser.add_argument("--iterations", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = resnet20().eval()
    if args.weights: load_weights(net, args.weights)
    curved = images(args.data, args.batch)
    judged = images(args.data, args.sensitivity, seed=1)
    config = SurgeryConfig(iterations=args.iterations, eps=.02)

    def surgery():
        operate(net, nn.CrossEntropyLoss(), curved, judged, config=config, check_overlap=False, progress=False)

    times = {"guarded": [], "unguarded": []}
    surgery()  # warm
    for turn in trange(args.rounds, desc="rounds"):
        for what in ("guarded", "unguarded") if turn % 2 == 0 else ("unguarded", "guarded"):
            with unguarded() if what == "unguarded" else contextlib.nullcontext():
                times[what].append(seconds(surgery))
    ratios = [g / u - 1 for g, u in zip(times["guarded"], times["unguarded"])]
    rows = [dict(what=k, seconds=statistics.median(t), fastest=min(t)) for k, t in times.items()]
    cost = dict(median=statistics.median(ratios), fastest=min(times["guarded"]) / min(times["unguarded"]) - 1, each=ratios)
    facts = about(args, rounds=args.rounds, sensitivity=args.sensitivity, iterations=args.iterations, network="resnet20")
    shown = f"{table(rows)}\ncost of the guard: {cost['median']:.2%} in the median of rounds, {cost['fastest']:.2%} of the fastest"
    write(args.out, dict(command="python benchmarks/guard.py", about=facts, rows=rows, cost=cost, times=times, peak_gb=peak_gb()), shown)


if __name__ == "__main__": main()

"""The loop of Algorithm 2 and the linearised search side by side: seconds, passes and the sigma
they end with, on one network.

Both see the same images and directions of the same kind. The search goes along its path of prices,
once with one set of probes for all of them and once with new ones for each step, and its clock
stops at the first price that buys the sigma which the loop ended with on the images that both are
tuned on.
"""

from __future__ import annotations

import time

import torch
from problem import about, arguments, table, write
from torch import nn

from hessian_surgery_nb.foundations.datasets import read_dataset
from hessian_surgery_nb.foundations.splits import image_splits
from hessian_surgery_nb.linearised import linearised_operate
from hessian_surgery_nb.foundations.networks import resnet20
from hessian_surgery_nb.foundations.weight_files import load_weights
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.foundations.accuracy import class_report


def main():
    p = arguments(__doc__, "nbs/runs/bench_linearised.json")
    p.add_argument("--images", type=int, default=2000, help="that decisions are made on")
    p.add_argument(
        "--prices",
        type=float,
        nargs="+",
        default=[0.0025, 0.005, 0.01, 0.02],
        help="falls of the global accuracy that the search may cost, fractions",
    )
    p.add_argument(
        "--iterations", type=int, default=10, help="of the loop; the paper's number on CIFAR-10"
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.weights is None or args.data is None:
        p.error(
            (
                "--weights (of resnet20(classes=10)) and --data (CIFAR-10 in folders) are "
                "needed: a network that knows nothing has no spread to trade"
            )
        )
    net = load_weights(resnet20(classes=10), args.weights).eval()
    s = image_splits(*read_dataset(args.data), seed=0, hessian=args.batch)

    def batches(part):
        return list(zip(part.x.split(250), part.y.split(250)))

    g = torch.Generator().manual_seed(0)
    some = s.sensitivity[torch.randperm(len(s.sensitivity), generator=g)[: args.images]]
    sets = net, nn.CrossEntropyLoss(), s.hessian.pair, batches(some)
    rows = []

    def row(method, sens, held, passes, products, took):
        rows.append(
            dict(
                method=method,
                seconds=took,
                passes=passes,
                products=products,
                sigma_pp=100 * sens.sigma,
                global_percent=100 * sens.overall,
                held_out_sigma_pp=100 * held.sigma,
                held_out_global_percent=100 * held.overall,
            )
        )
        print(rows[-1], flush=True)

    start = time.perf_counter()
    r = operate(
        *sets,
        held_out=None,
        config=SurgeryConfig(p=2.0, tau=0.85, scheme="forward", iterations=args.iterations),
        progress=False,
    )
    took = time.perf_counter() - start
    row("as it was", r.sensitivity_before, class_report(net, batches(s.held_out)), 0, 0, 0.0)
    row(
        f"Algorithm 2, {len(r.history)} iterations",
        r.sensitivity_after,
        class_report(r.model, batches(s.held_out)),
        sum(h.passes for h in r.history),
        sum(h.matvecs for h in r.history),
        took,
    )
    for rounds in (0, 2):
        start = time.perf_counter()
        f = linearised_operate(
            *sets, prices=args.prices, rounds=rounds, config=SurgeryConfig(), progress=False
        )
        ready = time.perf_counter() - start - f.points[-1].seconds  # the search for spikes
        p = next(
            (p for p in f.points if p.sensitivity.sigma <= r.sensitivity_after.sigma), f.points[-1]
        )
        row(
            (
                "linearised, "
                f"{'one set of probes' if not rounds else 'new probes for each step'}, price "
                f"{100 * p.price:g} pp"
            ),
            p.sensitivity,
            class_report(f.network(p.price), batches(s.held_out)),
            p.passes,
            f.num_matvecs,
            ready + p.seconds,
        )
    write(
        args.out,
        dict(
            command="python benchmarks/linearised.py",
            about=about(args, images=args.images),
            rows=rows,
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

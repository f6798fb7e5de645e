"""Time of one product against the number of images and against the number of parameters, over a
decade of each.
"""

from __future__ import annotations

import statistics

import torch
from contenders import ours
from problem import about, arguments, images, network, seconds, table, write
from tqdm import tqdm

from hessian_surgery_nb.foundations.networks import num_params, resnet50

BATCHES, WIDTHS = (16, 32, 64, 128, 192), (8, 16, 32, 48, 64, 96)


def measure(net, X, y, repeats):
    product, v = (
        ours(net, X, y),
        torch.randn(num_params(net), generator=torch.Generator().manual_seed(0)),
    )
    product(v)
    return statistics.median(seconds(lambda: product(v)) for _ in range(repeats))


def main():
    p = arguments(__doc__, "nbs/runs/bench_scaling.json")
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    net = network(args.weights)
    for b in tqdm(BATCHES, desc="images"):
        rows.append(
            dict(
                against="images",
                images=b,
                parameters=num_params(net),
                seconds=measure(net, *images(args.data, b), args.repeats),
            )
        )
    X, y = images(args.data, args.batch)
    for w in tqdm(WIDTHS, desc="parameters"):
        net = resnet50(width=w)
        rows.append(
            dict(
                against="parameters",
                images=args.batch,
                parameters=num_params(net),
                seconds=measure(net, X, y, args.repeats),
            )
        )
    write(
        args.out,
        dict(
            command="python benchmarks/scaling.py",
            about=about(args, repeats=args.repeats),
            rows=rows,
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

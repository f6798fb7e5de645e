"""The cost of one Hessian-vector product, vector in and vector out, in gradients, beside other
libraries.

All in one process, in turn, round after round; medians and their ratio to the gradient. Each
product is checked against the same product in double precision, so that a fast wrong answer does
not win.
"""

from __future__ import annotations

import copy
import statistics

import torch
from contenders import PRODUCTS
from problem import about, arguments, images, network, peak_gb, seconds, table, write
from torch import nn
from tqdm import trange


def plain(net, X, y, vs):
    "The product as PyTorch's own double backward gives it."
    ps = list(net.parameters())
    g = torch.autograd.grad(nn.functional.cross_entropy(net(X), y), ps, create_graph=True)
    return torch.cat([t.reshape(-1) for t in torch.autograd.grad(g, ps, vs)])


def main():
    p = arguments(__doc__, "nbs/runs/bench_products.json")
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    net, (X, y) = network(args.weights), images(args.data, args.batch)
    n = sum(p.numel() for p in net.parameters())
    v = torch.randn(n, generator=torch.Generator().manual_seed(0))
    ps, ce = list(net.parameters()), nn.CrossEntropyLoss()
    vs = [u.view(p.shape) for u, p in zip(v.split([p.numel() for p in ps]), ps)]
    truth = plain(copy.deepcopy(net).double(), X.double(), y, [u.double() for u in vs])
    graph = torch.autograd.grad(ce(net(X), y), ps, create_graph=True)
    runs = {
        "gradient": lambda: torch.autograd.grad(ce(net(X), y), ps),
        "bare double backward, graph kept": lambda: torch.autograd.grad(
            graph, ps, vs, retain_graph=True
        ),
    }
    products = {k: make(net, X, y) for k, make in PRODUCTS.items()}
    runs |= {k: lambda f=f: f(v) for k, f in products.items()}
    errors = {
        k: ((f(v).detach().double() - truth).norm() / truth.norm()).item()
        for k, f in products.items()
    }
    times = {k: [] for k in runs}
    for _ in trange(args.rounds, desc="rounds"):
        for k, f in runs.items():
            times[k].append(seconds(f))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        products["ours, graph kept"](v)
    work = sorted(
        ((e.key, e.self_cpu_time_total) for e in prof.key_averages()), key=lambda t: -t[1]
    )
    profile = {k: round(t / sum(t for _, t in work), 4) for k, t in work[:20]}
    unit = statistics.median(times["gradient"])
    rows = [
        dict(
            what=k,
            seconds=statistics.median(t),
            gradients=statistics.median(t) / unit,
            fastest=min(t) / min(times["gradient"]),
            relative_error=errors.get(k),
        )
        for k, t in times.items()
    ]
    write(
        args.out,
        dict(
            command="python benchmarks/products.py",
            about=about(args, rounds=args.rounds, parameters=n),
            rows=rows,
            times=times,
            profile=profile,
            peak_gb=peak_gb(),
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

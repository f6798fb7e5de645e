"""Memory and time of each process where 1, 2, 4, ... of them share products and an eigenvalue
search: nine spikes of a ResNet-50.

Each process has one thread, and all run on this machine (gloo), so times say something only while
there are as many cores. Products are timed on --batch images; the search, whose memory does not
depend on them, takes 8.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from problem import about, arguments, images, network, peak_gb, seconds, table, write
from torch import nn

from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs
from hessian_surgery_nb.foundations.distributed import distributed
from hessian_surgery_nb.foundations.accuracy import predict


def median(f, repeats=3):
    return statistics.median(seconds(f) for _ in range(repeats))


def work(args):
    "What one process does; the first writes what all found."
    torch.set_num_threads(1)
    with distributed() as t:
        net, (X, y) = network(args.weights).eval(), images(args.data, args.batch)
        op = HessianOperator(net, nn.CrossEntropyLoss(), (X, y), mode="recomputed")
        n, v = op.shape[0], torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))
        piece = t.shard(v)
        product = (op @ v, median(lambda: op @ v))[1]
        added, whole = median(lambda: t.all_reduce(v.clone())), median(lambda: t.gather(piece, n))
        evaluation = median(lambda: predict(net, (X, y)))
        before, start = peak_gb(), time.perf_counter()
        pairs = top_eigenpairs(
            HessianOperator(net, nn.CrossEntropyLoss(), (X[:8], y[:8]), mode="recomputed"),
            9,
            tol=1e-3,
            max_basis=args.basis,
        )
        took = time.perf_counter() - start
        mine = torch.zeros(t.size, 3, dtype=torch.float64)
        mine[t.rank] = torch.tensor([before, peak_gb(), args.basis * t.local_size(n) * 4 / 1e9])
        memory = t.all_reduce(mine)
        if t.rank == 0:
            facts = dict(
                processes=t.size,
                product_s=product,
                sum_s=added,
                whole_s=whole,
                evaluation_s=evaluation,
                search_s=took,
                products=pairs.num_matvecs,
                values=pairs.values.tolist(),
                before_gb=memory[:, 0].max().item(),
                peak_gb=memory[:, 1].max().item(),
                vectors_gb=(memory[:, 1] - memory[:, 0]).max().item(),
                basis_gb=memory[:, 2].max().item(),
                parameters=n,
            )
            with open(args.worker, "w") as f:
                json.dump(facts, f)


def main():
    p = arguments(__doc__, "nbs/runs/bench_ranks.json")
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    p.add_argument(
        "--basis", type=int, default=24, help="Lanczos vectors; few, so that all of them are used"
    )
    p.add_argument("--worker", help="for the processes themselves")
    args, rows, first = p.parse_args(), [], None
    if args.worker:
        return work(args)
    for n in args.processes:
        with tempfile.TemporaryDirectory() as d:
            run = [sys.executable] + (
                ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
                if n > 1
                else []
            )
            subprocess.run(
                [*run, __file__, *sys.argv[1:], "--worker", f"{d}/facts.json"],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            with open(f"{d}/facts.json") as f:
                rows.append(json.load(f))
        values = rows[-1].pop("values")
        first = first or values
        rows[-1]["off"] = max(abs(a / b - 1) for a, b in zip(values, first))
        print(rows[-1], flush=True)
    write(
        args.out,
        dict(
            command="python benchmarks/ranks.py",
            about=dict(about(args), threads=1, cores=os.cpu_count()),
            rows=rows,
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

"""Time and memory to the top 9 eigenpairs, beside other libraries.

Each contender runs in a process of its own, in turn, times its own gradients before and after, and
hands its vectors to one judge: residuals by independent products. A library that must be told how
many products to make is told what it needs. PyHessian runs with its defaults, whatever residuals
they reach.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from contenders import curvlinops, eigenthings, ours, pyhessian  # noqa: F401
from problem import about, arguments, gradient_seconds, images, network, peak_gb, table, write
from torch import nn

K, TOL = 9, 1e-2


def run_ours(net, X, y, args, verify=False):
    """As the others search: once. With verify also for copies that one start vector cannot see, as
    is the default.
    """
    from hessian_surgery_nb.hvp import HessianOperator
    from hessian_surgery_nb.lanczos import top_eigenpairs

    inside = [0.0]

    class Timed(HessianOperator):
        def __matmul__(self, v):
            start = time.perf_counter()
            product = super().__matmul__(v)
            inside[0] += time.perf_counter() - start
            return product

    op = Timed(net, nn.CrossEntropyLoss(), (X, y))
    pairs = top_eigenpairs(op, K, tol=TOL, verify=verify)
    return pairs.values, pairs.vectors.T, pairs.num_matvecs, inside[0]


def run_curvlinops(net, X, y, args):
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    H = HessianLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        [p for p in net.parameters()],
        [(X, y)],
        check_deterministic=False,
    )
    S, count = H.to_scipy(), [0]

    def matvec(v):
        count[0] += 1
        return S @ v

    values, vectors = eigsh(
        LinearOperator(S.shape, matvec=matvec, dtype=S.dtype), K, which="LA", tol=args.arpack_tol
    )
    return torch.tensor(values), torch.tensor(vectors.T), count[0], None


def run_eigenthings(net, X, y, args):
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    op = HessianOperator(net, [(X, y)], supervised_loss(nn.CrossEntropyLoss()))
    found = lanczos(op, k=K, max_iter=args.steps, which="LA", seed=0)
    return found.eigenvalues, found.eigenvectors, args.steps, None


def run_pyhessian(net, X, y, args):
    from pyhessian import hessian

    values, vectors = hessian(net, nn.CrossEntropyLoss(), data=(X, y), cuda=False).eigenvalues(
        top_n=K
    )
    return (
        torch.tensor(values),
        torch.stack([torch.cat([t.reshape(-1) for t in v]) for v in vectors]),
        None,
        None,
    )


def run_default(net, X, y, args):
    return run_ours(net, X, y, args, verify=True)


RUNS = {
    "ours": run_ours,
    "ours, copies looked for": run_default,
    "curvlinops + ARPACK": run_curvlinops,
    "hessian-eigenthings": run_eigenthings,
    "PyHessian, defaults": run_pyhessian,
}


def judge(net, X, y, values, rows):
    product = ours(net, X, y)
    residuals = torch.stack(
        [
            (product(v / v.norm()) - lam * v / v.norm()).norm()
            for lam, v in zip(values.float(), rows.float())
        ]
    )
    return (residuals / values.max()).tolist()


def child(name: str, args):
    torch.set_num_threads(args.threads)
    net, (X, y) = network(args.weights), images(args.data, args.batch)
    before, idle = gradient_seconds(net, X, y), peak_gb()
    start = time.perf_counter()
    values, rows, products, inside = RUNS[name](net, X, y, args)
    took, peak = time.perf_counter() - start, peak_gb()
    after = gradient_seconds(net, X, y)
    order = values.argsort(descending=True)
    residuals = judge(net, X, y, values[order], rows[order])
    return dict(
        what=name,
        seconds=took,
        gradient=(before + after) / 2,
        products=products,
        outside=None if inside is None else 1 - inside / took,
        worst_residual=max(residuals),
        peak_gb=peak,
        before_gb=idle,
        values=values[order].tolist(),
        residuals=residuals,
    )


def main():
    p = arguments(__doc__, "nbs/runs/bench_eigenpairs.json")
    p.add_argument(
        "--contenders",
        nargs="+",
        choices=RUNS,
        default=[*RUNS, "ours"],
        help=(
            "who runs, in this order; their runs are added to those in --out, where a newer "
            "commit replaces an older one"
        ),
    )
    p.add_argument("--arpack-tol", type=float, default=2e-2, help="tolerance given to ARPACK")
    p.add_argument(
        "--steps", type=int, default=26, help="products that hessian-eigenthings is told to make"
    )
    p.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.only:
        Path(args.out).write_text(json.dumps(child(args.only, args)))
        return
    results, circumstances = (
        json.loads(Path(args.out).read_text())["runs"] if Path(args.out).exists() else [],
        about(args, tolerance=TOL, k=K, arpack_tol=args.arpack_tol, steps=args.steps),
    )
    results = [
        r
        for r in results
        if r["commit"] == circumstances["commit"] or r["what"] not in args.contenders
    ]
    for name in args.contenders:
        with tempfile.TemporaryDirectory() as d:
            own = [
                f"--{k.replace('_', '-')}={v}"
                for k, v in vars(args).items()
                if v is not None and k not in ("only", "out", "contenders")
            ]
            subprocess.run(
                [sys.executable, __file__, *own, f"--only={name}", f"--out={d}/r.json"],
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            )
            results.append(
                json.loads(Path(d, "r.json").read_text())
                | {k: circumstances[k] for k in ("commit", "date")}
            )
        print(
            (
                f"{name}: {results[-1]['seconds']:.0f} s, worst residual "
                f"{results[-1]['worst_residual']:.2g}"
            ),
            flush=True,
        )
    rows = []
    for name in RUNS:
        mine = [r for r in results if r["what"] == name]
        if not mine:
            continue
        rows.append(
            dict(
                what=name,
                seconds=statistics.median(r["seconds"] for r in mine),
                gradients=statistics.median(r["seconds"] / r["gradient"] for r in mine),
                products=mine[-1]["products"],
                worst_residual=max(r["worst_residual"] for r in mine),
                outside_products=None
                if mine[0]["outside"] is None
                else statistics.median(r["outside"] for r in mine),
                peak_gb=max(r["peak_gb"] for r in mine),
            )
        )
    for r in rows:
        r["ours_over_this"] = rows[0]["gradients"] / r["gradients"]
    write(
        args.out,
        dict(
            command="python benchmarks/eigenpairs.py", about=circumstances, rows=rows, runs=results
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

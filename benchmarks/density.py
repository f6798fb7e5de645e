"""Spectral densities beside other libraries: Wasserstein-1 distance to the exact spectrum at the
same number of products.

Three matrices whose eigenvalues are known: five spikes over a bulk, the Hessian of a trained
network, and a Wigner matrix that has no spikes at all. Nodes and weights are compared as they
come, before any smoothing.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from problem import about, table, write
from scipy.stats import wasserstein_distance
from torch import nn
from tqdm import tqdm

from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.foundations.testbed import planted_matrix, spiked_spectrum
from hessian_surgery_nb.foundations.training import train


def ours(A, probes, m, seed, **options):
    d = spectral_density(A, num_probes=probes, num_matvecs=m, seed=seed, **options)
    return d.nodes.flatten(), d.weights.flatten()


def curvlinops(A, probes, m, seed):
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    torch.manual_seed(seed)
    runs = [fast_lanczos(A, m) for _ in range(probes)]
    return torch.cat([t for t, _ in runs]), torch.cat([U[0] ** 2 for _, U in runs])


def eigenthings(A, probes, m, seed):
    from hessian_eigenthings import LambdaOperator
    from hessian_eigenthings import spectral_density as theirs

    d = theirs(
        LambdaOperator(lambda v: A @ v, len(A), dtype=A.dtype, device=A.device),
        num_runs=probes,
        lanczos_steps=m,
        seed=1000 * seed,
    )
    keep = ~d.raw_eigenvalues.isnan()
    return d.raw_eigenvalues[keep], d.raw_weights[keep]


RUNS = {
    "ours": ours,
    "ours, plain quadrature": lambda *a: ours(*a, max_known=0),
    "curvlinops": curvlinops,
    "hessian-eigenthings": eigenthings,
}


def matrices():
    lam = spiked_spectrum(1000)
    yield "five spikes", planted_matrix(lam)[0]
    splits, net = long_tail_splits(load_digits(), seed=0), digits_net(width=8, seed=0)
    train(net, splits.train.pair, seed=0)
    X, y = splits.hessian.pair
    op = HessianOperator(net.double(), nn.CrossEntropyLoss(), (X.double(), y))
    H = op @ torch.eye(op.shape[0], dtype=torch.float64)
    yield "network", (H + H.T) / 2
    W = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    yield "Wigner", (W + W.T) / np.sqrt(2000)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--probes", type=int, default=10)
    p.add_argument("--products", type=int, default=40, help="of each probe")
    p.add_argument("--seeds", type=int, default=20)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", default="nbs/runs/bench_density.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    args.weights = args.data = args.batch = None
    rows, raw = [], {}
    for name, A in matrices():
        truth = torch.linalg.eigvalsh(A)
        raw[name] = {k: [] for k in RUNS}
        for seed in tqdm(range(args.seeds), desc=name):
            for k, f in RUNS.items():
                nodes, weights = f(A, args.probes, args.products, seed)
                raw[name][k].append(float(wasserstein_distance(truth, nodes, None, weights)))
        width = float(truth[-1] - truth[0])
        for k, d in raw[name].items():
            rows.append(
                dict(
                    matrix=name,
                    what=k,
                    distance=float(np.mean(d)),
                    stderr=float(np.std(d, ddof=1) / np.sqrt(len(d))),
                    of_width=float(np.mean(d)) / width,
                )
            )
        best = min(r["distance"] for r in rows[-2:])
        for r in rows[-len(RUNS) :]:
            r["over_best_peer"] = r["distance"] / best
    write(
        args.out,
        dict(
            command="python benchmarks/density.py",
            about=about(args, probes=args.probes, products=args.products, seeds=args.seeds),
            rows=rows,
            distances=raw,
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

"""Products to the top 9 eigenpairs after the weights have moved: cold, warm, and Rayleigh-Ritz
first.

Two moves from the given weights: a surgery step of length 0.02 within the space of the spikes, and
noise of 1 % on every weight. Rayleigh-Ritz first multiplies all nine old vectors, then, one at a
time, whichever residual is largest.
"""

from __future__ import annotations

import torch
from problem import about, arguments, images, network, table, write
from torch import nn
from tqdm import tqdm

from hessian_surgery_nb.foundations.weights import unflatten
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.foundations.krylov_basis import orthogonalise
from hessian_surgery_nb.lanczos import eigen_residuals, top_eigenpairs

K, TOL = 9, 1e-2


def rayleigh_ritz_first(op, V, limit=40) -> int:
    "Products until all residuals are small enough."
    Q, AQ = torch.empty(limit, len(V)), torch.empty(limit, len(V))
    Q[:K], m = torch.linalg.qr(V)[0].T, 0
    while True:
        for m in range(m + 1, max(K, m + 1) + 1):
            AQ[m - 1] = op @ Q[m - 1]
        T = (Q[:m] @ AQ[:m].T).double()
        theta, U = torch.linalg.eigh((T + T.T) / 2)
        theta, U = theta.flip(0)[:K], U.flip(1)[:, :K].float()
        R = U.T @ AQ[:m] - (theta[:, None].float() * U.T) @ Q[:m]
        norms = R.norm(dim=1) / theta[0]
        if (norms <= TOL).all() or m >= limit:
            return m
        r = R[norms.argmax()].clone()
        orthogonalise(r, Q[:m])
        Q[m] = r / r.norm()


def main():
    p = arguments(__doc__, "nbs/runs/bench_warm.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    net, (X, y) = network(args.weights), images(args.data, args.batch)
    ps = list(net.parameters())
    start, g = [p.detach().clone() for p in ps], torch.Generator().manual_seed(0)
    op = HessianOperator(net, nn.CrossEntropyLoss(), (X, y))
    old = top_eigenpairs(op, K, tol=TOL)
    within = old.vectors @ torch.randn(K, generator=g)
    moves = {
        "surgery step of 0.02": unflatten(0.02 * within / within.norm(), ps),
        "1 % noise on every weight": [0.01 * p * torch.randn(p.shape, generator=g) for p in start],
    }
    rows = []
    for name, move in tqdm(moves.items(), desc="moves"):
        with torch.no_grad():
            for p, s, d in zip(ps, start, move):
                p.copy_(s + d)
        cold, warm = top_eigenpairs(op, K, tol=TOL), top_eigenpairs(op, K, tol=TOL, v0=old)
        residuals = eigen_residuals(op, warm) / warm.values[0]
        rows.append(
            dict(
                move=name,
                loss=op.gradient()[0],
                cold=cold.num_matvecs,
                warm=warm.num_matvecs,
                ratio=warm.num_matvecs / cold.num_matvecs,
                worst_residual=residuals.max().item(),
                rayleigh_ritz_first=rayleigh_ritz_first(op, old.vectors),
            )
        )
    write(
        args.out,
        dict(
            command="python benchmarks/warm.py",
            about=about(args, tolerance=TOL, k=K, cold_at_start=old.num_matvecs),
            rows=rows,
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

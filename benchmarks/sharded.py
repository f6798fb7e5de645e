"""Sharded weights: leading eigenpairs of a transformer that `fully_shard` has cut among gloo
processes, beside one process that holds it whole.

Memory is the peak of the resident set over what the process had before the network was made: it
counts weights, vectors, basis, activations and messages. All processes start with
MALLOC_MMAP_THRESHOLD_, so that glibc gives freed blocks back; without it the peak counts those that
it keeps. Every process has one thread, and all run on this machine, so times say something only
while there are as many cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from problem import about, peak_gb, table, write
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from hessian_surgery_nb.foundations.distributed import distributed
from hessian_surgery_nb.foundations.pieces import is_dtensor
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import eigen_residuals, top_eigenpairs

CLASSES, WORDS, LENGTH = 10, 50, 16
THRESHOLD = str(1 << 20)  # bytes: larger blocks are given back when they are freed


class Block(nn.Module):
    "Attention, then two layers with GELU: smooth, so that differences see the same Hessian."

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.first = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.second = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        parts = (
            self.mix(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(*parts)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Parameter(torch.empty(LENGTH, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.words(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@torch.no_grad()
def fill(net: nn.Module):
    "The same weights however they are cut, one parameter at a time."
    for i, (name, p) in enumerate(net.named_parameters()):
        values = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        if p.ndim == 1:
            values = values * 0.1 + float("norm" in name or ".first" in name or ".second" in name)
        else:
            values = values / math.sqrt(p.shape[1])
        if is_dtensor(p):
            values = distribute_tensor(values, p.device_mesh, p.placements, src_data_rank=None)
            p.to_local().copy_(values.to_local())
        else:
            p.copy_(values)


def network(args, processes: int) -> nn.Module:
    "Whole, or never whole anywhere."
    with torch.device("meta"):
        net = Transformer(args.width, args.depth)
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    net.to_empty(device="cpu")
    fill(net)
    return net.eval()


def batches(args):
    "Ragged on purpose."
    generator = torch.Generator().manual_seed(1)
    X = torch.randint(WORDS, (args.texts, LENGTH), generator=generator)
    y = torch.randint(CLASSES, (args.texts,), generator=generator)
    first = args.texts // 2 + 1
    return [(X[:first], y[:first]), (X[first:], y[first:])]


def work(args):
    "What one process does; the first writes what all found."
    torch.set_num_threads(1)
    with distributed() as team:
        team.wait()
        before = psutil.Process().memory_info().rss / 1e9
        net = network(args, team.size)
        op = HessianOperator(net, nn.CrossEntropyLoss(), batches(args), mode=args.mode)
        start = time.perf_counter()
        pairs = top_eigenpairs(op, args.pairs, tol=args.tol, max_basis=args.basis)
        took = time.perf_counter() - start
        n = op.shape[0]
        peak = peak_gb()
        local = len(pairs.vectors)
        mine = torch.zeros(team.size, 3, dtype=torch.float64)
        kept = (1 + args.basis + args.pairs) * local * 4 / 1e9  # weights, basis, vectors
        mine[team.rank] = torch.tensor([before, peak - before, kept])
        memory = team.all_reduce(mine)
        start = time.perf_counter()
        residuals = eigen_residuals(op, pairs)  # k products
        product = (time.perf_counter() - start) / args.pairs
        vectors = [op.team.gather(column.contiguous(), n) for column in pairs.vectors.T]
        if team.rank == 0:
            torch.save(vectors, args.worker + ".vectors")
            facts = dict(
                processes=team.size,
                mode=op.plan().mode,
                parameters=n,
                peak_gb=memory[:, 1].max().item(),
                counted_gb=memory[:, 2].max().item(),
                before_gb=memory[:, 0].max().item(),
                search_s=took,
                product_s=product,
                products=pairs.num_matvecs,
                values=pairs.values.tolist(),
                residuals=pairs.residuals.tolist(),
                measured=residuals.tolist(),
                certified=int(pairs.converged.sum()),
                product_error=op.product_error,
            )
            Path(args.worker).write_text(json.dumps(facts))


def run(args, processes: int, mode: str, folder: str) -> dict:
    "One way, in processes of its own."
    out = f"{folder}/{processes}{mode}"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(processes)]
    told = [f"--{name}={getattr(args, name)}" for name in SIZES]
    subprocess.run(
        [*start, __file__, *told, "--mode", mode, "--worker", out],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": THRESHOLD},
    )
    facts = json.loads(Path(out).read_text())
    facts["vectors"] = torch.load(out + ".vectors")
    return facts


SIZES = "width", "depth", "texts", "pairs", "basis", "tol"


def compared(row: dict, alone: dict) -> dict:
    "Beside one process: memory, values, vectors."
    values = zip(row["values"], alone["values"])
    off = [abs(a - b) for a, b in values]
    allowed = [a + b for a, b in zip(row["residuals"], alone["residuals"])]
    angles = [
        1 - abs(torch.dot(a.double(), b.double())).item()
        for a, b in zip(row.pop("vectors"), alone["vectors"])
    ]
    return row | dict(
        memory_ratio=row["peak_gb"] / alone["peak_gb"],
        values_off=max(off),
        within=all(a <= b for a, b in zip(off, allowed)),
        vectors_off=max(angles),  # 1 - |cosine|
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--processes", type=int, default=4)
    p.add_argument("--width", type=int, default=384)
    p.add_argument("--depth", type=int, default=12)
    p.add_argument("--texts", type=int, default=7)
    p.add_argument("--pairs", type=int, default=3)
    p.add_argument("--basis", type=int, default=26, help="Lanczos vectors")
    p.add_argument("--tol", type=float, default=1e-3)
    p.add_argument("--out", default="nbs/runs/bench_sharded.json")
    p.add_argument("--mode", default="recomputed", help="for the processes themselves")
    p.add_argument("--worker", help="for the processes themselves")
    args = p.parse_args()
    if args.worker:
        return work(args)
    with tempfile.TemporaryDirectory() as folder:
        alone = run(args, 1, "recomputed", folder)
        rows = [dict(alone)]
        for mode in ("recomputed", "difference"):
            rows.append(run(args, args.processes, mode, folder))
    rows = [compared(row, alone) for row in rows]
    args.threads = 1
    args.weights = args.data = None
    args.batch = args.texts
    write(
        args.out,
        dict(
            command="python benchmarks/sharded.py",
            about=dict(about(args), cores=os.cpu_count(), malloc_mmap_threshold=int(THRESHOLD)),
            sizes={name: getattr(args, name) for name in SIZES},
            rows=rows,
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

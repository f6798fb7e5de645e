"""Gauss-Newton products of a small language model with a large vocabulary: time and peak memory.

Every way runs in processes of its own, in turn, so that peaks do not mix and a busy machine is busy
for all; `cpu_s` is what was computed in that time. The network is a transformer whose head is its
embedding; tokens are random, which changes no cost. Errors are relative to the product with whole
logits in double precision.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from problem import about, arguments, peak_gb, seconds, table, write
from torch import nn

from hessian_surgery_nb.foundations.testbed import relative_error, seeded
from hessian_surgery_nb.hvp import HessianOperator


class Block(nn.Module):
    "Attention to what came before, then a hidden layer, each added to its input."

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        texts, length, width = x.shape
        parts = self.qkv(self.first(x)).view(texts, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(texts, length, width))
        return x + self.hidden(self.second(x))


class LanguageModel(nn.Module):
    "Embedding, blocks that look back, and the embedding again as head; logits (N, V, T)."

    def __init__(self, words: int, width: int, blocks: int, length: int):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(length, width) / 10)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight
        with torch.no_grad():
            self.table.weight.div_(10)

    def forward(self, tokens):
        x = self.blocks(self.table(tokens) + self.places)
        return self.head(self.norm(x)).transpose(1, 2)


def problem(args):
    "The network and its tokens."
    with seeded(0):
        net = LanguageModel(args.words, args.width, args.blocks, args.length).eval()
        tokens = torch.randint(0, args.words, (args.batch, args.length + 1))
    return net, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(mode):
    def product(net, X, y):
        op = HessianOperator(net, nn.CrossEntropyLoss(), (X, y), kind="gauss_newton", mode=mode)
        assert mode != "auto" or op.plan().mode == "chunked"
        return op.__matmul__

    return product


def eigenthings(net, X, y):
    from hessian_eigenthings.operators.ggn import GGNOperator

    op = GGNOperator(
        net,
        [(X, y)],
        lambda model, batch: model(batch[0]),
        lambda logits, batch: nn.functional.cross_entropy(logits, batch[1]),
    )
    return op.matvec


def curvlinops(net, X, y):
    from curvlinops import GGNLinearOperator

    op = GGNLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        [(X, y)],
        check_deterministic=False,
    )
    return op.__matmul__


WAYS = {
    "ours, logits in chunks": ours("auto"),
    "ours, whole logits": ours("recomputed"),
    "hessian-eigenthings": eigenthings,
    "curvlinops": curvlinops,
}


def work(args):
    "One way in this process."
    torch.set_num_threads(args.threads)
    net, X, y = problem(args)
    size = sum(p.numel() for p in net.parameters())
    v = torch.randn(size, generator=torch.Generator().manual_seed(0))
    if args.double:
        net, v = net.double(), v.double()
    before = peak_gb()
    product = WAYS[args.way](net, X, y)
    Gv = product(v)
    times, cpu = [], []
    for _ in range(args.repeats):
        start = time.process_time()
        times.append(seconds(lambda: product(v)))
        cpu.append(time.process_time() - start)
    if args.save:
        torch.save(Gv, args.save)
    print(json.dumps(dict(before=before, peak=peak_gb(), times=times, cpu=cpu, parameters=size)))


def run(args, way, *more):
    "The same in another process."
    command = [sys.executable, __file__, "--way", way]
    for name in ("batch", "threads", "words", "width", "blocks", "length", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    command += more
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = arguments(__doc__, "nbs/runs/bench_vocabulary.json")
    p.add_argument("--words", type=int, default=50_000)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--blocks", type=int, default=4)
    p.add_argument("--length", type=int, default=128, help="tokens of a text")
    p.add_argument("--repeats", type=int, default=3, help="products in a process")
    p.add_argument("--rounds", type=int, default=3, help="processes of each way")
    p.add_argument("--ways", nargs="*", default=list(WAYS))
    p.add_argument("--way", help=argparse_hidden)
    p.add_argument("--save", help=argparse_hidden)
    p.add_argument("--double", action="store_true", help=argparse_hidden)
    p.set_defaults(batch=8)
    args = p.parse_args()
    if args.way:
        return work(args)
    found = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: str(Path(folder) / f"{i}.pt") for i, way in enumerate(args.ways)}
        truth = str(Path(folder) / "truth.pt")
        run(args, "ours, whole logits", "--double", "--repeats", "0", "--save", truth)
        for _ in range(args.rounds):
            for way in args.ways:
                found[way].append(run(args, way, "--save", files[way]))
                print(way, found[way][-1], flush=True)
        errors = {
            way: relative_error(torch.load(files[way]).double(), torch.load(truth))
            for way in args.ways
        }
    rows = []
    for way, runs in found.items():
        times = [time for one in runs for time in one["times"]]
        row = dict(
            what=way,
            seconds=statistics.median(times),
            cpu_s=statistics.median(time for one in runs for time in one["cpu"]),
            fastest=min(times),
            peak_gb=max(one["peak"] for one in runs),
            before_gb=max(one["before"] for one in runs),
            relative_error=errors[way],
        )
        rows.append(row)
    sizes = {name: getattr(args, name) for name in ("words", "width", "blocks", "length")}
    facts = about(args, **sizes, parameters=found[args.ways[0]][0]["parameters"])
    facts["data"] = "random tokens"
    result = dict(command="python benchmarks/vocabulary.py", about=facts, rows=rows)
    write(args.out, result, table(rows))


argparse_hidden = "for the processes that this script starts"

if __name__ == "__main__":
    main()

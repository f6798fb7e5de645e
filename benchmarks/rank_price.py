"""Does the effective rank of S bound what a price in global accuracy buys? Digit networks of three
tails, three losses and some seeds, those of `screening.py`.

The loop of surgery stops where its rules end it; the linearised search goes as far as the price
allows, so that what it reaches is not a matter of those rules.
"""

from __future__ import annotations

import itertools

import torch
from problem import about, arguments, table, write
from screening import LOSSES
from torch import nn
from tqdm import tqdm

from hessian_surgery_nb.effective_rank import screen
from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.foundations.training import train
from hessian_surgery_nb.linearised import linearised_operate

PRICES = 0.0, 0.005, 0.01


def one(seed: int, ratio: float, loss: str) -> dict:
    "A row: the rank beforehand, and held-out sigma and global accuracy at each price."
    splits = long_tail_splits(load_digits(), seed=seed, ratio=ratio)
    net = digits_net(seed=seed)
    train(net, splits.train.pair, loss_fn=LOSSES[loss](splits.train.counts), seed=seed)
    sets = nn.CrossEntropyLoss(), splits.hessian.pair, splits.sensitivity.pair
    screening = screen(net, *sets, seed=seed)
    front = linearised_operate(
        net, *sets, held_out=splits.held_out.pair, prices=PRICES, progress=False
    )
    before, *points = [point.held_out for point in front.points]
    row = dict(
        seed=seed,
        ratio=ratio,
        loss=loss,
        effective_rank=screening.effective_rank,
        sigma_pp=100 * before.sigma,
        global_percent=100 * before.overall,
    )
    for price, report in zip(PRICES, points):
        row[f"sigma_pp_at_{price:g}"] = 100 * report.sigma
        row[f"global_percent_at_{price:g}"] = 100 * report.overall
    return row


def main():
    parser = arguments(__doc__, "nbs/runs/bench_rank_price.json")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    grid = [
        cell
        for cell in itertools.product(range(args.seeds), (1.0, 5.0, 25.0), LOSSES)
        if cell[1:] != (1.0, "class-balanced")
    ]  # without a tail that is cross-entropy
    rows = [one(*cell) for cell in tqdm(grid, desc="networks")]
    facts = about(args, seeds=list(range(args.seeds)))
    facts |= dict(data="digits of scikit-learn", weights="trained here", batch=128)
    found = dict(command="python benchmarks/rank_price.py", about=facts, rows=rows)
    write(args.out, found, table(rows))


if __name__ == "__main__":
    main()

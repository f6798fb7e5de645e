"""What a look beforehand says, and what surgery then brings: digit networks of three tails, three
losses and some seeds.

Every network is screened, then operated on; the gain is measured on held-out images. The networks
of the paper's datasets have such pairs in their stored runs; these are the cheap ones.
"""

from __future__ import annotations

import itertools

import torch
from problem import about, arguments, table, write
from torch import nn
from tqdm import tqdm

from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.effective_rank import screen
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.foundations.training import FocalLoss, effective_number_loss, train

LOSSES = {
    "cross-entropy": lambda counts: nn.CrossEntropyLoss(),
    "focal": lambda counts: FocalLoss(2.0),
    "class-balanced": lambda counts: effective_number_loss(counts, 0.99),
}


def one(seed: int, ratio: float, loss: str) -> dict:
    s, net = long_tail_splits(load_digits(), seed=seed, ratio=ratio), digits_net(seed=seed)
    train(net, s.train.pair, loss_fn=LOSSES[loss](s.train.counts), seed=seed)
    sets = nn.CrossEntropyLoss(), s.hessian.pair, s.sensitivity.pair
    look = screen(net, *sets, seed=seed)
    r = operate(net, *sets, held_out=s.held_out.pair, progress=False)
    return dict(
        seed=seed,
        ratio=ratio,
        loss=loss,
        look=look.to_dict(),
        before=r.before.to_dict(),
        after=r.after.to_dict(),
        passes=sum(h.passes for h in r.history),
        matvecs=sum(h.matvecs for h in r.history),
    )


def main():
    p = arguments(__doc__, "nbs/runs/screening_digits.json")
    p.add_argument("--seeds", type=int, default=4)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    grid = [
        c
        for c in itertools.product(range(args.seeds), (1.0, 5.0, 25.0), LOSSES)
        if c[1:] != (1.0, "class-balanced")
    ]  # without a tail that is cross-entropy
    rows = [one(*c) for c in tqdm(grid, desc="networks")]
    shown = [
        dict(
            seed=r["seed"],
            ratio=r["ratio"],
            loss=r["loss"],
            rank=r["look"]["effective_rank"],
            promised=100 * r["look"]["predicted_sigma"],
            before=r["before"]["sigma_pp"],
            after=r["after"]["sigma_pp"],
        )
        for r in rows
    ]
    write(
        args.out,
        dict(
            command="python benchmarks/screening.py",
            about=dict(
                about(args, seeds=list(range(args.seeds))),
                data="digits of scikit-learn",
                weights="trained here",
                batch=128,
            ),
            rows=rows,
        ),
        table(shown),
    )


if __name__ == "__main__":
    main()

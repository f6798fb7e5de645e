"""All 99 leading eigenpairs of a ResNet-50 with 100 outputs, in bounded memory.

The network starts from the given weights, gets a new head, and is fine-tuned for a few hundred steps on 100 classes, so that
it has something to tell apart. Basis vectors are stored in bfloat16. What is measured: time, products, peak resident memory,
and, by independent products, every residual."""
from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import torch
from problem import about, arguments, gradient_seconds, images, network, peak_gb, table, write
from torch import nn
from tqdm import trange

from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs
from hessian_surgery_nb.models import load_weights, num_params, resnet50


def tuned(net, X, y, steps: int):
    "A short fine-tuning; frozen batch norm, so that the network stays in evaluation mode."
    opt, g = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9), torch.Generator().manual_seed(0)
    for i in (bar := trange(steps, desc="fine-tuning")):
        b = torch.randint(len(y), (128,), generator=g)
        for group in opt.param_groups: group["lr"] = .01 * (1 - i / steps)
        loss = nn.functional.cross_entropy(net(X[b]), y[b])
        opt.zero_grad(); loss.backward(); opt.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    opt.zero_grad(set_to_none=True)
    return net


def main():
    p = arguments(__doc__, "nbs/runs/bench_many.json")
    p.add_argument("--classes", type=int, default=100)
    p.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    p.add_argument("--tol", type=float, default=1e-2)
    p.add_argument("--max-basis", type=int, default=None, help="vectors kept")
    p.add_argument("--network", help="where the fine-tuned network is kept, so that it is made once")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    classes = sorted(f.name for f in (Path(args.data)/"train").iterdir()) if args.data else list(map(str, range(args.classes)))
    net = resnet50(classes=len(classes))
    X, y = images(args.data, args.batch, classes=classes)
    if args.network and Path(args.network).exists(): load_weights(net, args.network)
    else:
        if args.weights: net.load_state_dict({k: t for k, t in network(args.weights).state_dict().items() if not k.startswith("fc")}, strict=False)
        tuned(net, *images(args.data, 20_000, seed=1, classes=classes), args.steps)
        if args.network:
            from safetensors.torch import save_file
            save_file(net.state_dict(), args.network)
    unit, ready = gradient_seconds(net, X, y), peak_gb()
    op, curve, done = HessianOperator(net, nn.CrossEntropyLoss(), (X, y), mode="kept"), [], threading.Event()
    def watch():
        while not done.wait(5): curve.append((op.num_matvecs, psutil.Process().memory_info().rss / 1e9))
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    pairs = top_eigenpairs(op, len(classes) - 1, tol=args.tol, basis_dtype=torch.bfloat16, max_basis=args.max_basis, progress=True)
    took, peak = time.perf_counter() - start, max(m for _, m in curve)
    done.set()
    residuals = torch.stack([(op @ v.float() - lam.float() * v.float()).norm() for lam, v in zip(pairs.values, pairs.vectors.T)]) / pairs.values[0]
    row = dict(pairs=len(pairs), parameters=num_params(net), certified=int(pairs.converged.sum()), worst_claimed=(pairs.residuals.max() / pairs.values[0]).item(), worst_residual=residuals.max().item(),
               products=pairs.num_matvecs, minutes=took / 60, gradients=took / unit, peak_gb=peak, before_gb=ready)
    write(args.out, dict(command="python benchmarks/many.py", about=about(args, tolerance=args.tol, steps=args.steps, max_basis=args.max_basis, classes=len(classes)), rows=[row],
                         values=pairs.values.tolist(), residuals=residuals.tolist(), memory=curve), table([row]))


if __name__ == "__main__": main()

"""All 99 leading eigenpairs of a ResNet-50 with 100 outputs, in bounded memory.

The network starts from the given weights, gets a new head fitted to its features, and is
fine-tuned for some steps on 100 classes, so that it has something to tell apart. What is measured:
time, products, peak resident memory, and, by independent products, every residual.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import torch
from problem import about, arguments, gradient_seconds, images, network, peak_gb, table, write
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm, trange

from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs
from hessian_surgery_nb.foundations.networks import num_params, resnet50
from hessian_surgery_nb.foundations.weight_files import load_weights


def fit_head(net, X, y, epochs: int = 40):
    "Logistic regression on the features of the body."
    head, net.fc = net.fc, nn.Identity()
    with torch.no_grad():
        features = torch.cat([net(x) for x in tqdm(X.split(250), desc="features")])
    net.fc, opt, g = (
        head,
        torch.optim.Adam(head.parameters(), lr=1e-3, weight_decay=1e-4),
        torch.Generator().manual_seed(0),
    )
    for _ in trange(epochs, desc="head"):
        for b in torch.randperm(len(y), generator=g).split(500):
            opt.zero_grad()
            nn.functional.cross_entropy(head(features[b]), y[b]).backward()
            opt.step()
    opt.zero_grad(set_to_none=True)


def tuned(net, X, y, steps: int):
    """A new head, then a short fine-tuning of everything; frozen batch norm, so that the network
    stays in evaluation mode.
    """
    fit_head(net, X, y)
    opt, g = (
        torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
        torch.Generator().manual_seed(0),
    )
    for i in (bar := trange(steps, desc="fine-tuning")):
        b = torch.randint(len(y), (128,), generator=g)
        for group in opt.param_groups:
            group["lr"] = 0.01 * (1 - i / steps)
        loss = nn.functional.cross_entropy(net(X[b]), y[b])
        opt.zero_grad()
        loss.backward()
        opt.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    opt.zero_grad(set_to_none=True)
    return net


def prepared(args):  # the network, the names of its classes, the batch that shows the curvature
    "Ready to be looked at; kept in --network, so that it is made once."
    classes = (
        sorted(f.name for f in (Path(args.data) / "train").iterdir())
        if args.data
        else list(map(str, range(args.classes)))
    )
    net = resnet50(classes=len(classes))
    if args.network and Path(args.network).exists():
        load_weights(net, args.network)
    else:
        if args.weights:
            net.load_state_dict(
                {
                    k: t
                    for k, t in network(args.weights).state_dict().items()
                    if not k.startswith("fc")
                },
                strict=False,
            )
        tuned(net, *images(args.data, 20_000, seed=1, classes=classes), args.steps)
        if args.network:
            save_file(net.state_dict(), args.network)
    return net, classes, images(args.data, args.batch, classes=classes)


def parameters(text: str, out: str):
    p = arguments(text, out)
    p.add_argument("--classes", type=int, default=100)
    p.add_argument("--steps", type=int, default=50, help="of fine-tuning")
    p.add_argument("--bf16", action="store_true", help="store vectors in bfloat16: half the memory")
    p.add_argument(
        "--network", help="where the fine-tuned network is kept, so that it is made once"
    )
    return p


def main():
    p = parameters(__doc__, "nbs/runs/bench_many.json")
    p.add_argument("--tol", type=float, default=1e-2)
    p.add_argument("--max-basis", type=int, default=125, help="vectors kept")
    p.add_argument("--max-matvecs", type=int, default=1000, help="products at most")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    net, classes, (X, y) = prepared(args)
    unit, ready = gradient_seconds(net, X, y), peak_gb()
    op, curve, done = (
        HessianOperator(net, nn.CrossEntropyLoss(), (X, y), mode="cached"),
        [],
        threading.Event(),
    )

    def watch():
        while not done.wait(5):
            curve.append((op.num_matvecs, psutil.Process().memory_info().rss / 1e9))

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    pairs = top_eigenpairs(
        op,
        len(classes) - 1,
        tol=args.tol,
        basis_dtype=torch.bfloat16 if args.bf16 else None,
        max_basis=args.max_basis,
        max_matvecs=args.max_matvecs,
        progress=True,
    )
    took, peak = time.perf_counter() - start, max(m for _, m in curve)
    done.set()
    residuals = (
        torch.stack(
            [
                (op @ v.float() - lam.float() * v.float()).norm()
                for lam, v in zip(pairs.values, pairs.vectors.T)
            ]
        )
        / pairs.values[0]
    )
    row = dict(
        pairs=len(pairs),
        parameters=num_params(net),
        certified=int(pairs.converged.sum()),
        worst_claimed=(pairs.residuals.max() / pairs.values[0]).item(),
        worst_residual=residuals.max().item(),
        products=pairs.num_matvecs,
        minutes=took / 60,
        gradients=took / unit,
        peak_gb=peak,
        before_gb=ready,
    )
    write(
        args.out,
        dict(
            command="python benchmarks/many.py",
            about=about(
                args,
                tolerance=args.tol,
                steps=args.steps,
                max_basis=args.max_basis,
                bf16=args.bf16,
                classes=len(classes),
            ),
            rows=[row],
            values=pairs.values.tolist(),
            residuals=residuals.tolist(),
            memory=curve,
        ),
        table([row]),
    )


if __name__ == "__main__":
    main()

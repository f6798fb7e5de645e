"The problem that all benchmarks share: a trained ResNet-50, 128 images, and how one measures."

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from hessian_surgery_nb.foundations.networks import resnet50
from hessian_surgery_nb.foundations.weight_files import load_weights

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
PEERS = {
    "curvlinops": "curvlinops-for-pytorch",
    "hessian-eigenthings": "hessian-eigenthings",
    "PyHessian": "pyhessian",
}


def arguments(doc: str, out: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--weights",
        help="a .safetensors file for torchvision's resnet50(num_classes=10); none: random weights",
    )
    p.add_argument(
        "--data",
        help="a folder of CIFAR-10 images, train/<class>/*.jpg or *.png; none: Gaussian noise",
    )
    p.add_argument("--batch", type=int, default=128, help="images")
    p.add_argument("--threads", type=int, default=2, help="of the processor")
    p.add_argument("--out", default=out, help="JSON file with the results")
    return p


def images(
    folder: str | None, count: int, *, seed: int = 0, classes: list[str] = CLASSES
) -> tuple[torch.Tensor, torch.Tensor]:
    "Random training images, normalised, and labels."
    if folder is None:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, 32, 32, generator=g), torch.randint(
            len(classes), (count,), generator=g
        )
    files = [
        (f, i)
        for i, c in enumerate(classes)
        for f in sorted((Path(folder) / "train" / c).iterdir())
    ]
    chosen = [
        files[j] for j in np.random.default_rng(seed).choice(len(files), count, replace=False)
    ]
    x = (
        np.stack([np.asarray(Image.open(f).convert("RGB"), dtype=np.float32) for f, _ in chosen])
        / 255
    )
    return torch.tensor((x - MEAN) / STD, dtype=torch.float32).permute(
        0, 3, 1, 2
    ).contiguous(), torch.tensor([i for _, i in chosen])


def network(weights: str | None) -> nn.Module:
    net = resnet50(classes=10)
    return net if weights is None else load_weights(net, weights)


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def gradient_seconds(net, X, y, repeats: int = 5) -> float:
    "Median time of one gradient, the unit of everything here."
    ps, ce = list(net.parameters()), nn.CrossEntropyLoss()

    def gradient():
        torch.autograd.grad(ce(net(X), y), ps)

    gradient()
    return statistics.median(seconds(gradient) for _ in range(repeats))


def peak_gb() -> float:
    "Largest resident memory of this process so far."
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1024 if platform.system() != "Darwin" else 1)
        / 1e9
    )


def about(args, **more) -> dict:
    "Where, when and with what."

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def git(*what):
        return subprocess.run(
            ["git", "-C", Path(__file__).parents[1], *what], capture_output=True, text=True
        ).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "*.py") else ""
    )  # +: files had changed since
    return dict(
        date=str(date.today()),
        commit=commit,
        device="cpu",
        processor=processor(),
        threads=args.threads,
        torch=torch.__version__,
        weights=Path(args.weights).name if args.weights else "random",
        data=f"{Path(args.data).name}, training images" if args.data else "noise",
        batch=args.batch,
        peers={k: installed(v) for k, v in PEERS.items()},
        **more,
    )


def processor() -> str:
    try:
        return next(
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def write(path: str, result: dict, table: str):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
    print(table, f"\nwritten to {path}", sep="\n", flush=True)


def table(rows: list[dict]) -> str:
    keys = list(rows[0])
    cells = [keys] + [
        [
            "" if r.get(k) is None else f"{r[k]:.3g}" if isinstance(r[k], float) else str(r[k])
            for k in keys
        ]
        for r in rows
    ]
    widths = [max(len(c[i]) for c in cells) for i in range(len(keys))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)) for row in cells)

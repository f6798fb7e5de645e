"""The engine on a GPU: is everything right there, and how fast is it beside a gradient and other
libraries?

`python benchmarks/gpu.py cuda OUT.json`: two minutes on a large card. With `cpu` and `--small` it
runs anywhere, to see that the script itself works. A check that fails is recorded with its
reason, and the exit code is 1; what is timed is recorded in seconds and in gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from contenders import PRODUCTS
from problem import PEERS, processor
from torch import nn

from hessian_surgery_nb.comparison import compare
from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.networks import digits_net, resnet50
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.foundations.training import train
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import eigen_residuals, top_eigenpairs
from hessian_surgery_nb.linearised import linearised_operate
from hessian_surgery_nb.predicted_logits import logit_jacobian
from hessian_surgery_nb.sensitivity import sensitivity_matrix
from hessian_surgery_nb.settling import class_bias, settledness
from hessian_surgery_nb.settling_methods import newton_in_spikes, settle
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.surgery import operate

CROSS_ENTROPY = nn.CrossEntropyLoss()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_here() -> str:
    "Of this repository; where there is no git, what HESSIAN_SURGERY_COMMIT says."
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    told = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return os.environ.get("HESSIAN_SURGERY_COMMIT") or told or "unknown"


class Notebook:
    "What was found so far; written after every check, so that nothing is lost."

    def __init__(self, file: Path, device: str):
        self.file, self.device = file, device
        self.script = "benchmarks/gpu.py"
        card = torch.cuda.get_device_name() if device == "cuda" else None
        self.about = dict(
            date=str(date.today()),
            commit=commit_here(),
            device=device if card is None else f"{device}: {card}",
            processor=processor(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
            weights="random",
            data="noise, and digits",
            batch=None,
            peers={name: installed(package) for name, package in PEERS.items()},
        )
        self.rows: list[dict] = []

    @property
    def failed(self) -> list[str]:
        return [row["check"] for row in self.rows if "failed" in row]

    def check(self, name: str, make: Callable[[], dict]):
        "Record what a check returns, or why it failed."
        start = time.perf_counter()
        try:
            row = dict(check=name, **make())
        except Exception as error:
            traceback.print_exc()
            row = dict(check=name, failed=f"{type(error).__name__}: {str(error)[:400]}")
        row["took"] = time.perf_counter() - start
        print(row, flush=True)
        self.rows.append(row)
        command = f"python {self.script} {self.device} {self.file}"
        found = dict(command=command, about=self.about, rows=self.rows)
        self.file.write_text(json.dumps(found, indent=1) + "\n")

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        "The median."
        work()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak_gb(self, work: Callable[[], object]) -> float:
        "Largest memory of the card while this runs; 0 on a CPU."
        if self.device != "cuda":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9


class Recurrent(nn.Module):
    "An LSTM with a head."

    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs)[0][:, -1])


def small_networks() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    "One of each kind, with inputs."
    torch.manual_seed(0)
    yield (
        "mlp",
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)),
        torch.randn(40, 12),
    )
    convolutions = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    yield "convolutions", convolutions, torch.randn(40, 3, 9, 9)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    yield (
        "transformer",
        nn.Sequential(encoder, nn.Flatten(), nn.Linear(96, 5)),
        torch.randn(40, 6, 16),
    )
    yield "LSTM", Recurrent(), torch.randn(40, 7, 8)


def check_small(book: Notebook):
    "Products against differences of gradients; eigenpairs, density and S here and on the CPU."
    for name, net, inputs in small_networks():
        net = net.eval()
        labels = torch.arange(40) % 5
        there = copy.deepcopy(net).to(book.device), inputs.to(book.device), labels.to(book.device)
        for precision in (torch.float64, torch.float32):
            kind = str(precision).split(".")[1]
            here = copy.deepcopy(net).to(precision), inputs.to(precision), labels
            moved = there[0].to(precision), there[1].to(precision), there[2]
            book.check(f"product, {name}, {kind}", lambda: _product(moved, kind))
            book.check(f"as on the CPU, {name}, {kind}", lambda: _same(here, moved, kind))


def _operator(problem: tuple, **settings: object) -> HessianOperator:
    net, inputs, labels = problem
    data = [(inputs[:25], labels[:25]), (inputs[25:], labels[25:])]
    return HessianOperator(net, CROSS_ENTROPY, data, **settings)


def _product(problem: tuple, kind: str) -> dict:
    op = _operator(problem)
    found = op.check()
    v = torch.randn(op.shape[0], dtype=torch.float64, device=problem[1].device)
    exact = _operator((copy.deepcopy(problem[0]).double(), problem[1].double(), problem[2])) @ v
    off = ((op @ v.to(op.dtype)).double() - exact).norm() / exact.norm()
    rounding = 1e-12 if kind == "float64" else 1e-5
    assert found.symmetry < rounding and off < rounding, (found, off)
    return dict(symmetry=found.symmetry, off=off.item(), plan=repr(op.plan()))


def _same(here: tuple, moved: tuple, kind: str) -> dict:
    tol = 1e-6 if kind == "float64" else 1e-3
    first, second = _operator(here), _operator(moved)
    pairs = [top_eigenpairs(op, 4, tol=tol) for op in (first, second)]
    one, two = pairs[0].values.cpu(), pairs[1].values.cpu()
    loose = dict(rtol=1e-6, atol=1e-9) if kind == "float64" else dict(rtol=2e-3, atol=1e-4)
    assert torch.allclose(one, two, **loose), (one, two)
    dense = [spectral_density(op, num_probes=2, num_matvecs=10).trace for op in (first, second)]
    spikes = pairs[0].vectors
    jacobians = [
        logit_jacobian(net, spikes.to(inputs.device), (inputs, labels))
        for net, inputs, labels in (here, moved)
    ]
    off = (jacobians[0].jacobian.cpu() - jacobians[1].jacobian.cpu()).abs().max().item()
    assert off < (1e-8 if kind == "float64" else 1e-2), off
    seen = [
        sensitivity_matrix(net, spikes.to(inputs.device), (inputs, labels), eps=0.05)
        for net, inputs, labels in (here, moved)
    ]
    differing = (seen[0].matrix.cpu() - seen[1].matrix.cpu()).abs().max().item()
    return dict(
        values=two.tolist(), products=pairs[1].num_matvecs, trace=dense, jacobian_off=off,
        S_off=differing,
    )  # fmt: skip


def resnet_problem(book: Notebook, small: bool) -> tuple:
    "A ResNet-50 whose batch norm has seen its images, so that its outputs are of order one."
    side, batch = (32, 8) if small else (224, 64)
    torch.manual_seed(0)
    net = resnet50(classes=10).to(book.device).train()
    inputs = torch.randn(batch, 3, side, side, device=book.device)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches seen
        if name.endswith("bn3"):
            nn.init.constant_(layer.weight, 0.2)  # else a random network has far sharper curves
    with torch.no_grad():
        net(inputs)
    return net.eval(), inputs, torch.arange(batch, device=book.device) % 10


def check_products(book: Notebook, small: bool, compiled: bool):
    "A ResNet-50: products beside a gradient, by every mode and every library that is here."
    net, inputs, labels = resnet_problem(book, small)
    batch, side = len(inputs), inputs.shape[-1]
    params = list(net.parameters())
    v = torch.randn(sum(p.numel() for p in params), device=book.device)
    views = [u.view_as(p) for u, p in zip(v.split([p.numel() for p in params]), params)]

    def gradient() -> tuple:
        return torch.autograd.grad(CROSS_ENTROPY(net(inputs), labels), params)

    def plain() -> torch.Tensor:
        first = torch.autograd.grad(CROSS_ENTROPY(net(inputs), labels), params, create_graph=True)
        return torch.cat([t.reshape(-1) for t in torch.autograd.grad(first, params, views)])

    truth = in_double(net, inputs, labels, v)
    unit = {}
    for tf32 in (True, False):
        torch.backends.cudnn.allow_tf32 = tf32
        said = f"ResNet-50, {batch} images, {side} px, TF32 {'on' if tf32 else 'off'}"
        unit[tf32] = book.seconds(gradient)
        rows = {
            "gradient": gradient,
            "double backward": plain,
            **{f"ours, {mode}": _ours(net, inputs, labels, v, mode) for mode in MODES},
        }
        if tf32:
            rows["ours, bf16"] = _ours(net, inputs, labels, v, "recomputed", precision="bf16")
            if compiled:
                rows["gradient, compiled"] = torch.compile(gradient)
            peers = [name for name in PRODUCTS if not name.startswith("ours")]
            rows |= {name: _peer(name, net, inputs, labels, v) for name in peers}
        for name, work in rows.items():
            book.check(f"{said}: {name}", lambda: _row(book, work, unit[tf32], truth, name))
    torch.backends.cudnn.allow_tf32 = True


def in_double(net, inputs, labels, v) -> torch.Tensor:
    "The product by PyTorch's own double backward in float64, eight images at a time."
    exact = copy.deepcopy(net).double()
    params = list(exact.parameters())
    views = [u.view_as(p) for u, p in zip(v.double().split([p.numel() for p in params]), params)]
    total = torch.zeros_like(v, dtype=torch.float64)
    for some, their in zip(inputs.double().split(8), labels.split(8)):
        loss = CROSS_ENTROPY(exact(some), their) * len(their) / len(labels)
        first = torch.autograd.grad(loss, params, create_graph=True)
        total += torch.cat([t.reshape(-1) for t in torch.autograd.grad(first, params, views)])
    return total


MODES = "cached", "recomputed"


def _ours(net, inputs, labels, v, mode: str, **settings: object) -> Callable[[], torch.Tensor]:
    made = []

    def product() -> torch.Tensor:
        if not made:
            made.append(
                HessianOperator(net, CROSS_ENTROPY, (inputs, labels), mode=mode, **settings)
            )
        return made[0] @ v

    return product


def _peer(name: str, net, inputs, labels, v) -> Callable[[], torch.Tensor]:
    made = []

    def product() -> torch.Tensor:
        if not made:
            made.append(PRODUCTS[name](net, inputs, labels))
        return made[0](v)

    return product


def _row(book: Notebook, work: Callable, unit: float, truth: torch.Tensor, name: str) -> dict:
    taken = book.seconds(work)
    row = dict(seconds=taken, gradients=taken / unit, peak_gb=book.peak_gb(work))
    if not name.startswith("gradient"):
        row["off"] = ((work() - truth).norm() / truth.norm()).item()
    return row


def check_spectrum(book: Notebook, small: bool):
    "Leading eigenpairs and the density of that network."
    k = 3 if small else 9
    net, inputs, labels = resnet_problem(book, small)

    def leading() -> dict:
        op = HessianOperator(net, CROSS_ENTROPY, (inputs, labels))
        start = time.perf_counter()
        pairs = top_eigenpairs(op, k, tol=1e-2, max_matvecs=60 if small else 120)
        book.wait()
        taken = time.perf_counter() - start
        worst = eigen_residuals(op, pairs).max() / pairs.values.abs().max()
        return dict(
            seconds=taken, products=pairs.num_matvecs, certified=int(pairs.converged.sum()),
            worst=worst.item(), plan=repr(op.plan()),
        )  # fmt: skip

    def density() -> dict:
        op = HessianOperator(net, CROSS_ENTROPY, (inputs, labels))
        start = time.perf_counter()
        size = dict(num_probes=2, num_matvecs=8) if small else dict(num_probes=2, num_matvecs=30)
        found = spectral_density(op, **size)
        book.wait()
        return dict(
            seconds=time.perf_counter() - start, trace=found.trace, error=found.trace_stderr
        )

    book.check(f"top {k} eigenpairs, tol 1e-2", leading)
    book.check("density", density)


def check_methods(book: Notebook):
    "Everything a user calls, on digits, here and on the CPU."
    splits = long_tail_splits(load_digits(), seed=0)
    trained = digits_net(seed=0)
    train(trained, splits.train.pair, epochs=10, seed=0)

    def everywhere(work: Callable) -> dict:
        found = []
        for device in (book.device, "cpu"):
            net = copy.deepcopy(trained).to(device)
            sets = [
                tuple(part.to(device) for part in each.pair)
                for each in (splits.hessian, splits.sensitivity, splits.held_out, splits.train)
            ]
            found.append(work(net, *sets))
        return dict(here=found[0], cpu=found[1])

    def surgery(net, hessian, sensitivity, held_out, train_set):
        config = SurgeryConfig(iterations=3)
        sets = dict(held_out=held_out, config=config, progress=False)
        result = operate(net, CROSS_ENTROPY, hessian, sensitivity, **sets)
        return [result.before.sigma, result.after.sigma]

    def linear(net, hessian, sensitivity, held_out, train_set):
        found = linearised_operate(net, CROSS_ENTROPY, hessian, sensitivity, progress=False)
        return str(found)[:300]

    def settling(net, hessian, sensitivity, held_out, train_set):
        told = settledness(net, CROSS_ENTROPY, train_set, hessian_data=hessian)
        stepped = newton_in_spikes(net, CROSS_ENTROPY, train_set, hessian_data=hessian)
        cooled = settle(net, CROSS_ENTROPY, train_set, steps=20)
        return [told.share, told.predicted_fall, stepped.losses, cooled.losses]

    def bias(net, hessian, sensitivity, held_out, train_set):
        logits = net(sensitivity[0]).detach()
        return class_bias(logits, sensitivity[1]).size

    def rivals(net, hessian, sensitivity, held_out, train_set):
        sets = hessian, sensitivity, held_out
        found = compare(net, CROSS_ENTROPY, *sets, progress=False)
        return str(found)[:600]

    for name, work in dict(
        surgery=surgery, linearised=linear, settling=settling, class_bias=bias, compare=rivals
    ).items():
        book.check(f"digits, {name}", lambda: everywhere(work))


def check_training(book: Notebook, small: bool):
    "Seconds of an epoch of 25,600 images of 32 pixels, ResNet-50."
    count = 256 if small else 25600
    inputs, labels = torch.randn(count, 3, 32, 32), torch.arange(count) % 10
    for precision in ("float32", "bf16"):

        def epoch() -> dict:
            net = resnet50(classes=10).to(book.device)
            start = time.perf_counter()
            settings = dict(epochs=1, lr=1e-3, batch_size=128, optimizer="adam", shift=4)
            train(net, (inputs, labels), precision=precision, **settings)
            book.wait()
            return dict(seconds=time.perf_counter() - start)

        book.check(f"an epoch of training, {precision}", epoch)


CHECKS = dict(
    small=lambda book, args: check_small(book),
    products=lambda book, args: check_products(book, args.small, args.compiled),
    spectrum=lambda book, args: check_spectrum(book, args.small),
    training=lambda book, args: check_training(book, args.small),
    methods=lambda book, args: check_methods(book),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("out", type=Path, help="JSON file")
    parser.add_argument("--compiled", action="store_true", help="a compiled gradient too; a minute")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--small", action="store_true", help="to see that the script works")
    args = parser.parse_args()
    book = Notebook(args.out, args.device)
    for name in args.checks:
        CHECKS[name](book, args)
    print("failed:", ", ".join(book.failed) or "nothing")
    return int(bool(book.failed))


if __name__ == "__main__":
    sys.exit(main())

"""Products compiled and not, eigenpairs and densities on one device, beside other libraries.

`python benchmarks/gpu_scale.py cuda OUT.json`; with `cpu --small` it runs anywhere, to see that
the script itself works. A check for which no time is left is recorded as skipped, one that fails
with its reason, and then the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from contenders import curvlinops, curvlinops_compiled, eigenthings, pyhessian
from gpu import CROSS_ENTROPY, Notebook, Recurrent, in_double, resnet_problem
from problem import PEERS
from torch import nn

from hessian_surgery_nb.foundations.distributed import Team
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs
from hessian_surgery_nb.slq import spectral_density

Problem = tuple[nn.Module, torch.Tensor, torch.Tensor]


class Timed(Notebook):
    "Stops to begin checks when its time is over."

    def __init__(self, file: Path, device: str, budget: float):
        super().__init__(file, device)
        self.script = "benchmarks/gpu_scale.py"
        self.deadline = time.monotonic() + budget

    def check(self, name: str, make: Callable[[], dict]):
        if time.monotonic() > self.deadline:
            super().check(name, lambda: dict(skipped="no time left"))
        else:
            super().check(name, make)

    def peer(self, name: str, library: str, make: Callable[[], dict]):
        "A check of another library, where it is installed."
        if self.about["peers"][library] is None:
            self.check(name, lambda: dict(skipped=f"{PEERS[library]} is not installed"))
        else:
            self.check(name, make)


def digits_problem(book: Timed) -> Problem:
    "A small network of digits, in place of the ResNet-50."
    torch.manual_seed(0)
    net = digits_net(width=2).to(book.device).eval()
    return net, torch.randn(16, 1, 8, 8, device=book.device), torch.arange(16).to(book.device) % 10


def bf16_error(op: HessianOperator) -> dict:
    found = op.check()
    return dict(precision=found.precision, symmetry=found.symmetry)


def check_products(book: Timed, problem: Problem, compiled: bool):
    "A row for each way: seconds, gradients, peak memory, distance from the product in float64."
    net, inputs, labels = problem
    params = list(net.parameters())
    v = torch.randn(sum(p.numel() for p in params), device=book.device)
    truth = in_double(net, inputs, labels, v)
    faster = torch.compile(net)
    units = {}

    def gradient(of: nn.Module) -> Callable[[], tuple]:
        return lambda: torch.autograd.grad(CROSS_ENTROPY(of(inputs), labels), params)

    def row(name: str, work: Callable[[], torch.Tensor], **more: object) -> dict:
        start = time.perf_counter()
        work()
        book.wait()
        first = time.perf_counter() - start
        taken = book.seconds(work, repeats=5)
        if name.startswith("gradient"):
            units[name] = taken
        found = dict(seconds=taken, first_seconds=first, peak_gb=book.peak_gb(work), **more)
        found["gradients"] = taken / units["gradient"]
        if "gradient, compiled" in units:
            found["compiled_gradients"] = taken / units["gradient, compiled"]
        if not name.startswith("gradient"):
            found["off"] = ((work() - truth).norm() / truth.norm()).item()
        return found

    def of_ours(mode: str, **settings: object) -> dict:
        op = HessianOperator(net, CROSS_ENTROPY, (inputs, labels), mode=mode, **settings)
        found = row("ours", lambda: op @ v)
        return found | dict(plan=repr(op.plan()))

    def of_peer(make: Callable) -> dict:
        product = make(net, inputs, labels)
        return row("peer", lambda: product(v).detach())

    name = "ResNet-50" if inputs.shape[1] == 3 else "digits"
    size = f"{name}, {len(inputs)} images, {inputs.shape[-1]} px"
    torch.backends.cudnn.allow_tf32 = False  # with it a product is 12 % off
    book.check(f"{size}: gradient", lambda: row("gradient", gradient(net)))
    if compiled:
        book.check(
            f"{size}: gradient, compiled", lambda: row("gradient, compiled", gradient(faster))
        )
    for mode in ("cached", "recomputed") + ("compiled",) * compiled:
        book.check(f"{size}: ours, {mode}", lambda: of_ours(mode))
    book.check(f"{size}: ours, bf16", lambda: of_ours("recomputed", precision="bf16"))
    book.peer(f"{size}: PyHessian", "PyHessian", lambda: of_peer(pyhessian))
    book.peer(f"{size}: curvlinops", "curvlinops", lambda: of_peer(curvlinops))
    if compiled:
        name = f"{size}: curvlinops, compiled"
        book.peer(name, "curvlinops", lambda: of_peer(curvlinops_compiled))
    name = f"{size}: hessian-eigenthings"
    book.peer(name, "hessian-eigenthings", lambda: of_peer(eigenthings))
    torch.backends.cudnn.allow_tf32 = True


def check_eigenpairs(book: Timed, problem: Problem, k: int, small: bool):
    "Time to the leading pairs and the residuals that were reached; one judge measures them all."
    net, inputs, labels = problem
    exact = HessianOperator(net, CROSS_ENTROPY, (inputs, labels))

    def worst(values: torch.Tensor, rows: torch.Tensor) -> float:
        pairs = zip(values, rows.to(exact.device, exact.dtype))
        residuals = [(exact @ (v / v.norm()) - lam * v / v.norm()).norm() for lam, v in pairs]
        return (torch.stack(residuals).max() / values.abs().max()).item()

    def timed(find: Callable[[], tuple]) -> dict:
        start = time.perf_counter()
        values, rows, products = find()
        book.wait()
        taken = time.perf_counter() - start
        return dict(seconds=taken, products=products, worst_residual=worst(values, rows))

    def ours() -> tuple:
        op = HessianOperator(net, CROSS_ENTROPY, (inputs, labels))
        pairs = top_eigenpairs(op, k, tol=1e-2, verify=False)
        return pairs.values, pairs.vectors.T, pairs.num_matvecs

    def by_arpack() -> tuple:
        from scipy.sparse.linalg import LinearOperator, eigsh

        product, count = curvlinops(net, inputs, labels), [0]

        def matvec(v):
            count[0] += 1
            return product(torch.from_numpy(v).to(inputs)).cpu().numpy()

        shape = (exact.shape[0], exact.shape[0])
        whole = LinearOperator(shape, matvec=matvec, dtype="float32")
        values, vectors = eigsh(whole, k, which="LA", tol=2e-2)
        return torch.tensor(values), torch.tensor(vectors.T), count[0]

    def by_eigenthings() -> tuple:
        from hessian_eigenthings import HessianOperator as Theirs
        from hessian_eigenthings import lanczos, supervised_loss

        op = Theirs(net, [(inputs, labels)], supervised_loss(CROSS_ENTROPY))
        steps = 12 if small else 30
        found = lanczos(op, k=k, max_iter=steps, which="LA", seed=0)
        return found.eigenvalues.cpu(), found.eigenvectors, steps

    book.check(f"top {k} eigenpairs, ours", lambda: timed(ours))
    book.peer(f"top {k} eigenpairs, curvlinops + ARPACK", "curvlinops", lambda: timed(by_arpack))
    name = f"top {k} eigenpairs, hessian-eigenthings"
    book.peer(name, "hessian-eigenthings", lambda: timed(by_eigenthings))


def symmetric_eig(matrix: torch.Tensor, eigenvectors: bool) -> tuple:
    "As `torch.eig` was: values as pairs of real and imaginary part, and vectors."
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def check_density(book: Timed, problem: Problem, steps: int):
    "One probe, so many products: ours and PyHessian's."
    net, inputs, labels = problem

    def ours() -> dict:
        op = HessianOperator(net, CROSS_ENTROPY, (inputs, labels))
        start = time.perf_counter()
        found = spectral_density(op, num_probes=1, num_matvecs=steps)
        book.wait()
        return dict(seconds=time.perf_counter() - start, top=found.nodes.max().item())

    def theirs() -> dict:
        from pyhessian import hessian

        on_gpu = inputs.is_cuda
        of = hessian(net, CROSS_ENTROPY, data=(inputs, labels), cuda=on_gpu)
        start = time.perf_counter()
        with mock.patch.object(torch, "eig", symmetric_eig):  # it is gone from PyTorch
            values, _ = of.density(iter=steps, n_v=1)
        book.wait()
        return dict(seconds=time.perf_counter() - start, top=max(map(float, values[0])))

    book.check(f"density, {steps} products, ours", ours)
    book.peer(f"density, {steps} products, PyHessian", "PyHessian", theirs)


def check_layouts(book: Timed, problem: Problem):
    "The same product with images and kernels whose channels lie last, and for cuDNN's LSTM."
    net, inputs, labels = problem
    op = HessianOperator(net, CROSS_ENTROPY, (inputs, labels))
    v = torch.randn(op.shape[0], device=book.device)

    def channels_last() -> dict:
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        images = inputs.to(memory_format=torch.channels_last)
        other = HessianOperator(last, CROSS_ENTROPY, (images, labels))
        off = ((other @ v - op @ v).norm() / (op @ v).norm()).item()
        assert off < 1e-2, off
        return dict(seconds=book.seconds(lambda: other @ v), off=off)

    def recurrent() -> dict:
        torch.manual_seed(0)
        network = Recurrent().to(book.device).eval()
        text, words = torch.randn(40, 7, 8, device=book.device), torch.arange(40) % 5
        found = HessianOperator(network, CROSS_ENTROPY, (text, words.to(book.device)))
        checked = found.check()
        assert checked.finite_difference < 0.05, checked
        return dict(plan=repr(found.plan()), off=checked.finite_difference)

    def short() -> dict:
        return bf16_error(HessianOperator(net, CROSS_ENTROPY, (inputs, labels), precision="bf16"))

    book.check("channels_last", channels_last)
    book.check("LSTM", recurrent)
    book.check("bf16, its error", short)


def check_one_rank(book: Timed, problem: Problem):
    "A product inside a process group of one rank, and a sum over it."
    import torch.distributed as dist

    net, inputs, labels = problem
    backend = "cpu:gloo,cuda:nccl" if book.device == "cuda" else "gloo"

    def product() -> dict:
        op = HessianOperator(net, CROSS_ENTROPY, (inputs, labels))
        v = torch.randn(op.shape[0], device=book.device)
        alone = op @ v
        with tempfile.TemporaryDirectory() as folder:
            place = f"file://{folder}/store"
            dist.init_process_group(backend, init_method=place, rank=0, world_size=1)
            try:
                inside = HessianOperator(net, CROSS_ENTROPY, (inputs, labels)) @ v
                total = inside.clone()
                dist.all_reduce(total)
                book.wait()
                off = (total - alone).norm() / alone.norm()
            finally:
                dist.destroy_process_group()
        assert off < 1e-4, off
        return dict(backend=backend, team=repr(Team()), off=off.item())

    book.check("a process group of one rank", product)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("out", type=Path, help="JSON file")
    parser.add_argument("--budget", type=float, default=300, help="seconds; then no check begins")
    parser.add_argument("--compiled", action="store_true", help="compiled products too; minutes")
    parser.add_argument("--small", action="store_true", help="to see that the script works")
    args = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())  # nothing is warm
    book = Timed(args.out, args.device, args.budget)
    problem = digits_problem(book) if args.small else resnet_problem(book, small=False)
    check_eigenpairs(book, problem, 3 if args.small else 9, args.small)
    check_density(book, problem, 6 if args.small else 30)
    check_layouts(book, problem)
    check_one_rank(book, problem)
    check_products(book, problem, args.compiled)  # last: compiling takes longest
    print("failed:", ", ".join(book.failed) or "nothing")
    return int(bool(book.failed))


if __name__ == "__main__":
    sys.exit(main())

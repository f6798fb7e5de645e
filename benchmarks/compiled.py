"""One Hessian-vector product, compiled, beside the same with the graph kept and recomputed, in
gradients: a ResNet-18, a ResNet-50, a vision transformer and a small language model.

All in one process, in turn, round after round; medians. Eager products are counted in eager
gradients, the compiled one in compiled gradients too. Each product is compared with PyTorch's own
double backward in double precision. `--cpu-time` counts the processor's time instead of the
clock's, for a machine that others use as well: then one thread is the honest number.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from problem import about, table, write
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessian_surgery_nb.foundations.datasets import mend_torchvision
from hessian_surgery_nb.foundations.networks import resnet50
from hessian_surgery_nb.foundations.recorded_products import RECORD_AT
from hessian_surgery_nb.hvp import HessianOperator

CROSS_ENTROPY = nn.CrossEntropyLoss()
Problem = tuple[nn.Module, torch.Tensor, torch.Tensor]


class Block(nn.Module):
    "Attention that looks back only, and two layers; each after a layer norm."

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, words: torch.Tensor) -> torch.Tensor:  # (batch, length, width)
        shape = (*words.shape[:2], self.heads, -1)
        parts = self.project(self.norms[0](words)).chunk(3, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
        read = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        words = words + self.join(read.transpose(1, 2).flatten(2))
        return words + self.layers(self.norms[1](words))


class LanguageModel(nn.Module):
    "Predicts the next word."

    def __init__(self, vocabulary: int, width: int, depth: int, length: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (batch, vocabulary, length)
        places = self.places(torch.arange(text.shape[1], device=text.device))
        return self.head(self.norm(self.blocks(self.words(text) + places))).transpose(1, 2)


def settled(net: nn.Module, inputs: torch.Tensor) -> nn.Module:
    "A random network whose batch norm has seen its images, so that its outputs are of order one."
    for name, layer in net.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
        if name.endswith("bn3"):
            nn.init.constant_(layer.weight, 0.2)
    with torch.no_grad():
        net.train()(inputs)
    return net.eval()


def images(small: bool) -> tuple[torch.Tensor, torch.Tensor]:
    count = 4 if small else 64
    return torch.randn(count, 3, 32, 32), torch.arange(count) % 10


def small_resnet(small: bool) -> Problem:
    mend_torchvision()
    from torchvision.models import resnet18

    inputs, labels = images(small)
    return settled(resnet18(num_classes=10), inputs), inputs, labels


def large_resnet(small: bool) -> Problem:
    inputs, labels = images(small)
    return settled(resnet50(classes=10), inputs), inputs, labels


def vision_transformer(small: bool) -> Problem:
    mend_torchvision()
    from torchvision.models import VisionTransformer

    size = dict(num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    if not small:
        size = dict(num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536)
    net = VisionTransformer(image_size=64, patch_size=8, num_classes=10, **size)
    nn.init.normal_(net.heads[-1].weight, std=0.02)  # zeros otherwise
    count = 2 if small else 16
    return net.eval(), torch.randn(count, 3, 64, 64), torch.arange(count) % 10


def language_model(small: bool) -> Problem:
    vocabulary, width, depth, length, count = 4096, 256, 4, 128, 8
    if small:
        vocabulary, width, depth, length, count = 40, 64, 1, 8, 2
    net = LanguageModel(vocabulary, width, depth, length)
    text = torch.randint(vocabulary, (count, length + 1))
    return net.eval(), text[:, :-1], text[:, 1:]


NETWORKS = {
    "vision transformer": vision_transformer,
    "language model": language_model,
    "ResNet-18": small_resnet,
    "ResNet-50": large_resnet,
}
MODES = "cached", "recomputed", "compiled"


def in_double(net: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, v: torch.Tensor):
    "The product by PyTorch's own double backward in float64."
    exact = copy.deepcopy(net).double()
    params = list(exact.parameters())
    views = [u.view_as(p) for u, p in zip(v.double().split([p.numel() for p in params]), params)]
    if inputs.is_floating_point():
        inputs = inputs.double()
    with sdpa_kernel(SDPBackend.MATH):
        loss = CROSS_ENTROPY(exact(inputs), labels)
        first = torch.autograd.grad(loss, params, create_graph=True)
        return torch.cat([t.reshape(-1) for t in torch.autograd.grad(first, params, views)])


def measure(name: str, args: argparse.Namespace) -> list[dict]:
    "A row for each way."
    torch.manual_seed(0)
    net, inputs, labels = NETWORKS[name](args.small)
    params = list(net.parameters())
    v = torch.randn(sum(p.numel() for p in params))
    truth = in_double(net, inputs, labels, v)
    faster = torch.compile(net)
    ways: dict[str, Callable] = {
        "gradient": lambda: torch.autograd.grad(CROSS_ENTROPY(net(inputs), labels), params),
        "gradient, compiled": lambda: torch.autograd.grad(
            CROSS_ENTROPY(faster(inputs), labels), params
        ),
    }
    operators = {
        mode: HessianOperator(net, CROSS_ENTROPY, (inputs, labels), mode=mode) for mode in MODES
    }
    ways |= {f"ours, {mode}": lambda op=op: op @ v for mode, op in operators.items()}
    first = {}
    for what, work in ways.items():
        start = time.perf_counter()
        work()
        first[what] = time.perf_counter() - start
        for _ in range(RECORD_AT if "ours" in what else 1):
            work()  # until recordings are made
        print(f"{name}: {what}, first {first[what]:.1f} s", flush=True)
    auto = HessianOperator(net, CROSS_ENTROPY, (inputs, labels)).plan().mode
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = {what: [] for what in ways}
    for _ in range(args.rounds):
        for what, work in ways.items():
            start = clock()
            work()
            times[what].append(clock() - start)
    middle = {what: statistics.median(t) for what, t in times.items()}
    rows = []
    for what, work in ways.items():
        row = dict(
            network=name,
            what=what,
            seconds=middle[what],
            gradients=middle[what] / middle["gradient"],
            compiled_gradients=middle[what] / middle["gradient, compiled"],
            first_seconds=first[what],
        )
        if what.startswith("ours"):
            row["relative_error"] = ((work().double() - truth).norm() / truth.norm()).item()
            row["plan"] = operators[what.removeprefix("ours, ")].plan().mode
            row["chosen_by_auto"] = f"ours, {auto}" == what
        rows.append(row)
    return rows


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=1, help="of the processor")
    p.add_argument("--cpu-time", action="store_true")
    p.add_argument("--small", action="store_true", help="to see that the script works")
    p.add_argument("--out", default="nbs/runs/bench_compiled.json", help="JSON file")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.networks:
        rows += measure(name, args)
        said = argparse.Namespace(threads=args.threads, weights=None, data=None, batch=None)
        settings = dict(rounds=args.rounds, time="processor" if args.cpu_time else "clock")
        found = dict(command="python benchmarks/compiled.py", about=about(said, **settings))
        write(args.out, found | dict(rows=rows), table([_shown(row) for row in rows]))


def _shown(row: dict) -> dict:
    keys = "network", "what", "seconds", "gradients", "compiled_gradients", "relative_error"
    return {key: row.get(key) for key in keys}


if __name__ == "__main__":
    main()

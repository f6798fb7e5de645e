"""Peak memory of `hessian-surgery rebalance` on 50,000 images of 224 pixels, beyond the network.

The images of --data are enlarged to --size pixels first and written to --images, 2,000 for training
and the others in halves for deciding and reporting. The network averages blocks of pixels down to
32 and goes on as a ResNet-20, so that what is measured is the command, not a large network. Every
second the resident memory of the process and its children is read; where they hold the network and
nothing else stands beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image
from problem import MEAN, STD, about, arguments, table, write
from tqdm import tqdm

NET = """
from torch import nn
from hessian_surgery_nb.foundations.networks import resnet20


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d({block})
        self.body = resnet20(classes=10, width=16, blocks=3)

    def forward(self, x):
        return self.body(self.pool(x))


def build():
    return Averaged()
"""
ALONE = """
import sys
sys.path.insert(0, {folder!r})
from net import build
import torch, resource
from hessian_surgery_nb.foundations.weight_files import load_weights
net = load_weights(build(), {weights!r}).eval()
with torch.no_grad():
    net(torch.zeros({batch}, 3, {size}, {size}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_images(source: Path, target: Path, count: int, size: int):
    "A twenty-fifth for training, the others in halves; what is there stays."
    seen = Counter()
    for file in tqdm(sorted((source / "train").rglob("*.*"))[:count], desc="images"):
        name = file.parent.name
        turn = seen[name]
        seen[name] += 1
        part = "train" if turn % 25 == 0 else ("val" if turn % 2 else "test")
        place = target / part / name / f"{file.stem}.jpg"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(file).convert("RGB")
            image.resize((size, size), Image.BILINEAR).save(place, quality=70)


def of_tree(pid: int) -> list[int]:
    "A process and all that it started."
    found = [pid]
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue
        for child in children:
            found += of_tree(int(child))
    return found


def resident(pid: int) -> int:  # bytes
    "What a process and its children hold; pages that are shared count once for each."
    total = 0
    for one in of_tree(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    return total


def watched(command: list[str], folder: Path) -> tuple[list[tuple[float, float]], float]:
    "Seconds and GB, every second; and how long it took."
    started = time.perf_counter()
    trace = []
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log)
        while running.poll() is None:
            trace.append((time.perf_counter() - started, resident(running.pid) / 1e9))
            time.sleep(1)
    if running.returncode:
        raise SystemExit((folder / "log").read_text())
    return trace, time.perf_counter() - started


def main():
    p = arguments(__doc__, "nbs/runs/bench_memory.json")
    p.add_argument("--count", type=int, default=50_000, help="images")
    p.add_argument("--size", type=int, default=224, help="pixels, a multiple of 32")
    p.add_argument("--images", required=True, help="folder for the enlarged images")
    args = p.parse_args()
    target = Path(args.images)
    write_images(Path(args.data), target, args.count, args.size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.py").write_text(NET.format(block=args.size // 32))
        alone = ALONE.format(folder=name, weights=args.weights, batch=100, size=args.size)
        done = subprocess.run(
            [sys.executable, "-c", alone], capture_output=True, text=True, check=True
        )
        network = int(done.stdout) / 1e9
        command = [sys.executable, "-m", "hessian_surgery_nb", "rebalance", "--out", f"{name}/out"]
        command += ["--model", f"{name}/net.py:build", "--weights", args.weights]
        command += ["--data", args.images, "--device", "cpu"]
        command += ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
        trace, seconds = watched(command, folder)
        result = json.loads((folder / "out" / "result.json").read_text())
    peak = max(gb for _, gb in trace)
    row = dict(
        images=args.count,
        size=args.size,
        network_gb=network,
        peak_gb=peak,
        beyond_gb=peak - network,
        seconds=seconds,
        method=result["method"],
    )
    facts = about(args) | dict(weights=Path(args.weights).name)
    found = dict(
        command="python benchmarks/memory.py",
        about=facts,
        rows=[row],
        trace=[[round(at), round(gb, 3)] for at, gb in trace[::10]],
    )
    write(args.out, found, table([row]))


if __name__ == "__main__":
    main()

"""Time and memory that `operate --dry-run` announces, against what the run then takes, for three
networks.

Announcement and run are processes of their own, one after the other. A few images of each class of
--data are laid out in a directory of their own; the two small networks are trained on them for a
moment, so that there is something to trade.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from problem import about, arguments, table, write

from hessian_surgery_nb.foundations.datasets import torchvision_part, write_toy_images
from hessian_surgery_nb.foundations.networks import resnet20, resnet50
from hessian_surgery_nb.foundations.weight_files import weights_bytes, write_atomic
from hessian_surgery_nb.app.own_network import folder_data, own_sets
from hessian_surgery_nb.foundations.training import train

FACTORY = """
from hessian_surgery_nb.foundations.datasets import torchvision_part
from hessian_surgery_nb.foundations.networks import resnet20, resnet50
def small(): return resnet20(classes={c})
def middle(): return torchvision_part("models").resnet18(num_classes={c})
def large(): return resnet50(classes={c})
"""
PROGRAM = [
    sys.executable,
    "-c",
    (
        "import sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); from "
        "hessian_surgery_nb.app.cli import main; sys.exit(main())"
    ),
]


def some(data, out, train, test):
    "So many images of each class."
    for part, n in (("train", train), ("test", test)):
        for folder in sorted((Path(data) / part).iterdir()):
            (Path(out) / part / folder.name).mkdir(parents=True)
            for f in sorted(folder.iterdir())[:n]:
                (Path(out) / part / folder.name / f.name).symlink_to(f.resolve())


def weights(d, name, net, given, epochs):
    if given:
        write_atomic(Path(d) / f"{name}.safetensors", Path(given).read_bytes())
        return
    sets = own_sets(Path(d) / "images", hessian=10**9)  # all training images
    train(
        net,
        (torch.cat([x for x, _ in sets.hessian]), sets.hessian.y),
        epochs=epochs,
        lr=1e-3,
        progress=True,
    )
    write_atomic(Path(d) / f"{name}.safetensors", weights_bytes(net))


def main():
    p = arguments(__doc__, "nbs/runs/bench_plan.json")
    p.add_argument("--iterations", type=int, default=4)
    p.add_argument(
        "--images", type=int, default=60, help="of a class, for training and for testing"
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as d:
        if args.data:
            some(args.data, Path(d) / "images", args.images, args.images)
        else:
            write_toy_images(
                Path(d) / "images", classes=10, train=args.images, test=args.images, size=32
            )
        c = len(folder_data(Path(d) / "images").classes)
        (Path(d) / "nets.py").write_text(FACTORY.format(c=c))
        for name, net, given, epochs in (
            ("small", resnet20(classes=c), None, 10),
            ("middle", torchvision_part("models").resnet18(num_classes=c), None, 4),
            ("large", resnet50(classes=c), args.weights, 1),
        ):
            weights(d, name, net, given, epochs)
            command = [
                *PROGRAM,
                str(args.threads),
                "operate",
                "--model",
                f"{d}/nets.py:{name}",
                "--weights",
                f"{d}/{name}.safetensors",
                "--data",
                f"{d}/images",
                "--iterations",
                str(args.iterations),
                "--hessian",
                str(args.batch),
                "--out",
                f"{d}/{name}",
                "--json",
            ]
            said, took = (
                json.loads(
                    subprocess.run(
                        [*command, *more], check=True, capture_output=True, text=True
                    ).stdout
                )
                for more in (["--dry-run"], [])
            )
            spent, most = sum(took["timing"]["iteration_seconds"]), took["timing"]["peak_bytes"]
            rows.append(
                dict(
                    network=name,
                    parameters=said["parameters"],
                    iterations=len(took["history"]),
                    announced_s=said["seconds"],
                    took_s=spent,
                    time_ratio=spent / said["seconds"],
                    announced_gb=said["memory"] / 1e9,
                    took_gb=most / 1e9,
                    memory_ratio=most / said["memory"],
                    announced_products=said["products"] * args.iterations,
                    products=sum(h["matvecs"] for h in took["history"]),
                    kept=sum(h["accepted"] for h in took["history"]),
                )
            )
            print(rows[-1], flush=True)
    write(
        args.out,
        dict(
            command="python benchmarks/plan.py",
            about=dict(
                about(args, images=args.images, iterations=args.iterations),
                weights=f"{Path(args.weights).name} for the largest"
                if args.weights
                else "trained for a moment",
            ),
            rows=rows,
        ),
        table(rows),
    )


if __name__ == "__main__":
    main()

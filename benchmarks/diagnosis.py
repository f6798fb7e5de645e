"""What the diagnosis says of networks whose case is known from how they were made.

Digit networks: even classes, two long tails, and two classes whose labels were exchanged for a
quarter of the images; each trained with a learning rate that falls to 0 and with one that stays;
and even classes with wrong biases in the head. With --data, networks of CIFAR-10 from their files
as well, those at rest a second time with wrong biases. The limits of the rule were chosen on the
digit networks of seeds 0 to 15. Rows of other networks that --out has already stay in it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from problem import about, arguments, table, write
from torch import nn
from tqdm import tqdm

from hessian_surgery_nb.diagnosis import Diagnosis, diagnose
from hessian_surgery_nb.evidence.settling_experiments import gradient_images
from hessian_surgery_nb.evidence.spectrum_experiments import RECIPES
from hessian_surgery_nb.evidence.study import Study, build_network
from hessian_surgery_nb.foundations.accuracy import predict
from hessian_surgery_nb.foundations.datasets import Samples, load_digits
from hessian_surgery_nb.foundations.networks import digits_net, find_head
from hessian_surgery_nb.foundations.runs import RunStore
from hessian_surgery_nb.foundations.splits import (
    long_tail_counts,
    long_tail_splits,
    shuffled_rows,
)
from hessian_surgery_nb.foundations.training import train
from hessian_surgery_nb.foundations.weight_files import load_weights, weights_bytes, write_atomic
from hessian_surgery_nb.rest_trial import try_rest

KINDS = dict(balanced=1.0, tail10=10.0, tail30=30.0, confused=1.0, biased=1.0)
SCHEDULES = dict(annealed="cosine", constant="constant")
CHOSEN_ON = range(16)  # seeds of digit networks
WRONG = dict(digits=2.0, cifar10=1.0)  # standard deviation of the wrong biases, in logits
CONFUSED = 3, 8  # their labels are exchanged for a quarter of the images
RECIPE = dict(epochs=12, lr=0.1, optimizer="sgd", batch_size=8, weight_decay=0.0)


def digits(kind: str, seed: int) -> Samples:
    "Images and labels."
    samples = load_digits()
    if kind != "confused":
        return samples
    generator = torch.Generator().manual_seed(seed)
    exchanged = torch.rand(len(samples.y), generator=generator) < 0.25
    labels = samples.y.clone()
    for one, other in (CONFUSED, CONFUSED[::-1]):
        labels[exchanged & (samples.y == one)] = other
    return replace(samples, y=labels)


def truth(kind: str, schedule: str) -> list[str]:
    "The cases that hold by construction."
    cases = []
    if kind.startswith("tail"):
        cases.append("rare")
    if schedule == "constant":
        cases.append("unsettled")
    if kind == "biased":
        cases.append("biased")
    if kind == "confused":
        cases.append("confusable")
    return cases


def with_wrong_biases(net: nn.Module, size: float, seed: int) -> nn.Module:
    "A copy whose head is wrong."
    changed = copy.deepcopy(net)
    biases = find_head(changed, 10)[1].bias
    drawn = torch.randn(len(biases), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        biases += size * drawn
    return changed


def examined(
    net: nn.Module,
    gradient: list,  # batches of training images
    hessian: tuple,  # others, for the curvature
    judges: Samples,  # that it has not learned from
    counts: torch.Tensor,
    *,
    seed: int,
    tol: float,
) -> tuple[Diagnosis, float]:  # and accuracy on the judges
    images = judges.batches(64)
    trial = try_rest(
        net, nn.CrossEntropyLoss(), gradient, images, hessian_data=hessian, tol=tol, seed=seed
    )
    logits, labels = predict(net, images)
    found = diagnose(logits, labels, counts=counts, trial=trial, names=judges.classes)
    return found, (logits.argmax(1) == labels).double().mean().item()


def one_of_digits(kind: str, schedule: str, seed: int) -> dict:
    splits = long_tail_splits(digits(kind, seed), seed=seed, head=70, ratio=KINDS[kind])
    net = digits_net(width=3, seed=seed)
    train(net, splits.train.pair, schedule=SCHEDULES[schedule], seed=seed, **RECIPE)
    if kind == "biased":
        net = with_wrong_biases(net, WRONG["digits"], seed)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))
    both = splits.sensitivity, splits.held_out
    joined = {name: torch.cat([getattr(part, name) for part in both]) for name in ("x", "y", "ids")}
    judges = replace(both[0], **joined)
    found, accuracy = examined(
        net,
        splits.train[order].batches(64),
        splits.hessian.pair,
        judges,
        splits.train.counts,
        seed=seed,
        tol=1e-2,
    )
    return dict(
        network=f"digits, {kind}, {schedule}",
        seed=seed,
        truth=truth(kind, schedule),
        chosen_on=seed in CHOSEN_ON,
        global_percent=100 * accuracy,
        diagnosis=found.to_dict(),
    )


def cifar(folder: Path, root: Path, seed: int, network: str = "resnet20") -> Study:
    store = RunStore(folder, folder)
    return Study(
        store=store, seed=seed, dataset="cifar10", network=network, root=root, progress=False
    )


def cifar_tail(study: Study, ratio: float) -> Samples:
    "Training images of which one class has that many times more than another."
    images = study.splits.train
    generator = torch.Generator().manual_seed(study.seed)
    sizes = long_tail_counts(10, int(images.counts.min()), ratio)
    by_frequency = torch.randperm(10, generator=generator).tolist()
    drawn = [
        shuffled_rows(images.y, label, generator)[:size] for label, size in zip(by_frequency, sizes)
    ]
    return images[torch.cat(drawn)]


def of_cifar_tail(seed: int, root: Path, work: Path) -> dict:
    "A network that was trained on a tenth of the images of one class; its weights stay in work."
    study = cifar(work, root, seed)
    images = cifar_tail(study, 10.0)
    net = build_network(study)
    file = work / f"cifar10_resnet20_tail10_s{seed}_network.safetensors"
    if file.exists():
        load_weights(net, file)
    else:
        train(net, images.pair, epochs=10, seed=seed, progress=True, **RECIPES["annealed"])
        write_atomic(file, weights_bytes(net))
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    curved, further = rows[: study.scale.hessian], rows[study.scale.hessian :]
    found, accuracy = examined(
        net.eval(),
        images[further[: study.scale.gradient_images]].batches(64),
        images[curved].pair,
        study.splits.sensitivity,
        images.counts,
        seed=seed,
        tol=3e-2,
    )
    return dict(
        network="CIFAR-10, tail10, annealed",
        seed=seed,
        truth=truth("tail10", "annealed"),
        chosen_on=False,
        global_percent=100 * accuracy,
        diagnosis=found.to_dict(),
    )


def of_cifar(file: Path, root: Path) -> list[dict]:
    "The network, and where it is at rest the same with wrong biases."
    name = str(file)
    seed = int(re.search(r"_s(\d+)", name)[1])
    is_pretrained = "pretrained" in name
    network = "timm:tf_efficientnet_lite0" if is_pretrained else "resnet20"
    study = cifar(file.parent, root, seed, network)
    net = load_weights(build_network(study), file).eval()
    is_constant = any(word in name for word in ("constant", "hot", "pretrained"))
    schedule = "constant" if is_constant else "annealed"
    kinds = ["balanced"] if is_constant else ["balanced", "biased"]
    rows = []
    for kind in kinds:
        tried = with_wrong_biases(net, WRONG["cifar10"], seed) if kind == "biased" else net
        found, accuracy = examined(
            tried,
            gradient_images(study, study.scale.gradient_images),
            study.splits.hessian.pair,
            study.splits.sensitivity,
            study.splits.train.counts,
            seed=seed,
            tol=3e-2,
        )
        after = ", after 390 steps at a constant rate" if "hot" in name else ""
        after += ", EfficientNet-lite0, pretrained" if is_pretrained else ""
        row = dict(
            network=f"CIFAR-10, {kind}, {schedule}{after}",
            seed=seed,
            truth=truth(kind, schedule),
            chosen_on=False,
            global_percent=100 * accuracy,
            diagnosis=found.to_dict(),
        )
        rows.append(row)
    return rows


def in_brief(rows: list[dict]) -> list[dict]:
    "What was named, a row for each kind of network."
    found = []
    for name in dict.fromkeys(one["network"] for one in rows):
        for chosen_on in (True, False):
            same = [one for one in rows if (one["network"], one["chosen_on"]) == (name, chosen_on)]
            if not same:
                continue
            line = dict(network=name, chosen_on=chosen_on, networks=len(same))
            for case in ("rare", "unsettled", "biased", "confusable", "even", "undecided"):
                line[case] = sum(one["diagnosis"]["case"] == case for one in same)
            found.append(line)
    return found


def earlier_rows(out: str, rows: list[dict]) -> list[dict]:
    "Of other networks, from a file that is there already."
    if not Path(out).exists():
        return []
    made_again = {(row["network"], row["seed"]) for row in rows}
    stored = json.loads(Path(out).read_text())["rows"]
    return [row for row in stored if (row["network"], row["seed"]) not in made_again]


def main():
    parser: argparse.ArgumentParser = arguments(__doc__, "nbs/runs/diagnosis.json")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(32)))
    parser.add_argument("--networks", nargs="*", default=[], help="safetensors of CIFAR-10")
    parser.add_argument("--tails", type=int, nargs="*", default=[], help="seeds, CIFAR-10")
    parser.add_argument("--work", default=".", help="folder for the weights of those")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = itertools.product(KINDS, SCHEDULES, args.seeds)
    grid = [cell for cell in cells if cell[:2] != ("biased", "constant")]
    rows = [one_of_digits(*cell) for cell in tqdm(grid, desc="digits")]
    for file in args.networks:
        rows += of_cifar(Path(file), Path(args.data).parent)
        print(rows[-1]["network"], rows[-1]["seed"], rows[-1]["diagnosis"]["line"], flush=True)
    for seed in args.tails:
        rows.append(of_cifar_tail(seed, Path(args.data).parent, Path(args.work)))
    rows = earlier_rows(args.out, rows) + rows
    conditions = about(args, seeds=sorted({row["seed"] for row in rows}))
    conditions["data"] = "digits of scikit-learn, CIFAR-10"
    conditions["weights"] = "digits: trained here; CIFAR-10: stored"
    stored = dict(command="python benchmarks/diagnosis.py", about=conditions, rows=rows)
    write(args.out, stored, table(in_brief(rows)))


if __name__ == "__main__":
    main()

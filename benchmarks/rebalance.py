"""Is the method that `rebalance` takes as good as the best, judged on held-out images?

Networks of digits (some rare), a table (some classes rare) and texts (which package a docstring
is of) are trained here; those of CIFAR-10, of a hundred classes and of skin lesions are stored.
For each, all methods that cost little are tried; the table says which was taken, how far its
held-out objective is behind the best of all methods there that cross no limit by more than one
standard error, in standard errors of that objective (and of the difference, which are smaller),
and how far above no change. Rows of other networks
that --out has already stay in it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pkgutil
import re
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from problem import about, arguments, table, write
from sklearn.datasets import make_classification
from sklearn.feature_extraction.text import HashingVectorizer
from torch import nn
from tqdm import tqdm

from hessian_surgery_nb.evidence.settling_experiments import gradient_images
from hessian_surgery_nb.evidence.study import Study, build_network
from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.foundations.runs import RunStore
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.foundations.training import train
from hessian_surgery_nb.foundations.weight_files import load_weights
from hessian_surgery_nb.fits import holds_within_error, limit_errors
from hessian_surgery_nb.goals import Goal, Scoring, draws_of
from hessian_surgery_nb.rebalancing import rebalance

HALVES = 40  # draws of two halves of the held-out images
GOALS = (("spread", 0.005), ("worst", 0.01))
TABLE_SHARES = (0.365, 0.488, 0.062, 0.015, 0.017, 0.03, 0.023)  # about those of covertype
PACKAGES = (  # each with at least 200 docstrings
    "numpy",
    "scipy",
    "sklearn",
    "torch",
    "pandas",
    "matplotlib",
    "networkx",
    "fontTools",
)


def of_digits(seed: int) -> dict:
    splits = long_tail_splits(load_digits(), seed=seed)
    net = digits_net(seed=seed)
    train(net, splits.train.pair, seed=seed)
    return dict(
        model=net,
        hessian_data=splits.hessian.pair,
        sensitivity_data=splits.sensitivity.pair,
        held_out=splits.held_out.pair,
        counts=splits.train.counts,
        training_data=splits.train.pair,
    )


def small_net(inputs: int, classes: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))


def trained_on_rows(x: torch.Tensor, y: torch.Tensor, seed: int) -> dict:
    "A small network of half of the rows; a quarter each decides and reports."
    classes = int(y.max()) + 1
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    quarter = len(y) // 4
    learned, decide, report = order.split([len(y) - 2 * quarter, quarter, quarter])
    net = small_net(x.shape[1], classes, seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(30):
        shuffled = learned[torch.randperm(len(learned))]
        for rows in shuffled.split(64):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    curved, further = learned[:256], learned[256:]
    return dict(
        model=net.eval(),
        hessian_data=(x[curved], y[curved]),
        sensitivity_data=(x[decide], y[decide]),
        held_out=(x[report], y[report]),
        counts=torch.bincount(y[learned], minlength=classes),
        training_data=(x[further], y[further]),
    )


def of_table(seed: int) -> dict:
    x, y = make_classification(
        12000,
        24,
        n_informative=12,
        n_classes=len(TABLE_SHARES),
        weights=list(TABLE_SHARES),
        class_sep=1.2,
        random_state=seed,
    )
    return trained_on_rows(torch.tensor(x, dtype=torch.float32), torch.tensor(y), seed)


def docstrings() -> tuple[list[str], list[int]]:
    "First paragraphs of docstrings, and which package each is of; the package's name is left out."
    texts, labels = {}, []
    for number, package in enumerate(PACKAGES):
        root = import_module(package)
        names = [package]
        for info in pkgutil.iter_modules(root.__path__):
            if not info.name.startswith("_") and info.name not in ("tests", "conftest", "testing"):
                names.append(f"{package}.{info.name}")
        for name in names:
            try:
                module = import_module(name)
            except Exception:  # an optional part that is not installed
                continue
            for _, thing in inspect.getmembers(module):
                text = getattr(thing, "__doc__", None)
                if isinstance(text, str) and len(text) > 40:
                    plain = re.sub("|".join(PACKAGES), " ", text.split("\n\n")[0])
                    texts.setdefault(plain, number)
    for number in texts.values():
        labels.append(number)
    return list(texts), labels


def of_texts(seed: int) -> dict:
    texts, labels = docstrings()
    x = HashingVectorizer(n_features=1024, alternate_sign=False).transform(texts).toarray()
    _, first = np.unique(x, axis=0, return_index=True)  # texts of the same words count once
    rows = np.sort(first)
    features = torch.tensor(x[rows], dtype=torch.float32)
    return trained_on_rows(features, torch.tensor(labels)[rows], seed)


KINDS = {"digits, long tail": of_digits, "table": of_table, "texts": of_texts}


def of_study(file: Path, root: Path) -> dict:
    "A stored network: dataset, network, start and seed are in its name."
    dataset = file.name.split("_")[0]
    seed = int(re.search(r"_s(\d+)_", file.name)[1])
    store = RunStore(file.parent, file.parent)
    study = Study(
        store=store, seed=seed, dataset=dataset, network="resnet20", root=root, progress=False
    )
    net = load_weights(build_network(study), file).eval()
    splits = study.splits
    return dict(
        model=net,
        hessian_data=splits.hessian.pair,
        sensitivity_data=study.batches(splits.sensitivity),
        held_out=study.batches(splits.held_out),
        counts=splits.train.counts,
        training_data=gradient_images(study, study.scale.gradient_images),
        names=study.classes,
    )


def labels_of(data) -> torch.Tensor:  # (N,)
    if isinstance(data, tuple):
        return data[1]
    return torch.cat([labels for _, labels in data])


def sure_to_hold(result, goal: Goal, labels: torch.Tensor, there: Scoring, answers) -> float:
    "The confidence that the price holds on these held-out images, whose noise is counted as well."
    choice = result.choice
    here = Scoring(goal, labels, choice.answers[0], there.names)
    out_of_fold = choice.answers[choice.chosen]
    lacking = here.of_answers(out_of_fold)[1][0]
    errors = torch.stack([limit_errors(here, out_of_fold)[0], limit_errors(there, answers)[0]])
    return torch.special.ndtr(-lacking / errors.norm().clamp(min=1e-12)).item()


def best_of(scoring: Scoring, answers: torch.Tensor) -> tuple[int, torch.Tensor]:
    "Where the best stands that crosses no limit by more than an error, and all objectives."
    values = torch.tensor([scoring.of_answers(given)[0] for given in answers])
    kept = [place for place, given in enumerate(answers) if holds_within_error(scoring, given)]
    return max(kept or [0], key=values.__getitem__), values


def halves_of(
    labels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    "Places of the two halves, drawn class by class."
    mixed = torch.randperm(len(labels), generator=generator)
    grouped = mixed[torch.argsort(labels[mixed], stable=True)]
    return grouped[::2], grouped[1::2]


def near_in_halves(
    goal: Goal,
    labels: torch.Tensor,  # (M,) held-out
    answers: torch.Tensor,  # (methods, M)
    names: tuple[str, ...],
    taken: int,
) -> dict:
    """How often a method is within one standard error of the best on a half of the held-out images:
    the one that was taken, and the one that is best on the other half.
    """
    generator = torch.Generator().manual_seed(0)
    near_taken = near_other = 0
    for _ in range(HALVES):
        here, there = halves_of(labels, generator)
        other, _ = best_of(
            Scoring(goal, labels[there], answers[0, there], names), answers[:, there]
        )
        scoring = Scoring(goal, labels[here], answers[0, here], names)
        best, values = best_of(scoring, answers[:, here])
        error = draws_of(scoring, answers[best : best + 1, here], draws=100).std().item()
        near_taken += (values[best] - values[taken]).item() <= error + 1e-12
        near_other += (values[best] - values[other]).item() <= error + 1e-12
    return dict(taken_near_in_half=near_taken / HALVES, best_of_half_near=near_other / HALVES)


def judged(result, goal: Goal, tuning_labels: torch.Tensor) -> dict:
    "The held-out objective of every method, and how sure its distance is."
    labels, choice = result.labels, result.choice
    names = result.outcomes[0].held_out.names
    wrong = (labels + 1) % len(names)
    answers = torch.stack([torch.where(o.correct, labels, wrong) for o in result.outcomes])
    scoring = Scoring(goal, labels, answers[0], names)
    best, values = best_of(scoring, answers)
    draws = draws_of(scoring, answers, draws=400)
    taken = choice.chosen
    to_best = (draws[:, taken] - draws[:, best]).std().item()
    alone = draws[:, best].std().item()
    to_none = (draws[:, taken] - draws[:, 0]).std().item()
    lacking = scoring.of_answers(answers[taken])[1]
    return dict(
        taken=result.method,
        best=result.outcomes[best].name,
        behind=(values[best] - values[taken]).item(),
        behind_error=to_best,
        best_error=alone,
        gain=(values[taken] - values[0]).item(),
        gain_error=to_none,
        global_fall=(lacking[0] + goal.max_global_drop).item(),
        confidence=result.advice.confidence,
        confidence_there=sure_to_hold(result, goal, tuning_labels, scoring, answers[taken]),
        **near_in_halves(goal, labels, answers, names, taken),
        methods={o.name: value for o, value in zip(result.outcomes, values.tolist())},
        keeps={
            o.name: holds_within_error(scoring, given) for o, given in zip(result.outcomes, answers)
        },
        out_of_fold=[
            dict(method=name, objective=value, error=error, within=within)
            for name, value, error, within in zip(
                choice.names,
                choice.values.tolist(),
                choice.errors.tolist(),
                choice.within,
            )
        ],
    )


def run(name: str, seed: int, problem: dict) -> list[dict]:
    rows = []
    for objective, price in GOALS:
        started = time.perf_counter()
        result = rebalance(
            loss_fn=nn.CrossEntropyLoss(),
            objective=objective,
            max_global_drop=price,
            prices=(),
            seed=seed,
            progress=False,
            **problem,
        )
        goal = Goal(objective=objective, max_global_drop=price)
        row = dict(network=name, seed=seed, objective=objective, price=price)
        row |= judged(result, goal, labels_of(problem["sensitivity_data"]))
        row["seconds"] = time.perf_counter() - started
        row["advice"] = list(result.advice.lines)
        rows.append(row)
        print(name, seed, objective, row["taken"], "best", row["best"], f"{row['seconds']:.0f} s")
    return rows


def in_brief(rows: list[dict]) -> list[dict]:
    "A row for each kind of network and objective."
    found = []
    for name, objective in dict.fromkeys((row["network"], row["objective"]) for row in rows):
        same = [row for row in rows if (row["network"], row["objective"]) == (name, objective)]
        near = [row["behind"] <= row["best_error"] + 1e-12 for row in same]
        paired = [row["behind"] <= row["behind_error"] + 1e-12 for row in same]
        harm = [row["gain"] < -1.96 * row["gain_error"] for row in same]
        found.append(
            dict(
                network=name,
                objective=objective,
                runs=len(same),
                near_best=sum(near),
                near_best_paired=sum(paired),
                worse_than_none=sum(harm),
                gain_pp=100 * sum(row["gain"] for row in same) / len(same),
                behind_pp=100 * sum(row["behind"] for row in same) / len(same),
                taken=", ".join(dict.fromkeys(row["taken"] for row in same)),
            )
        )
    return found


def earlier_rows(out: str, rows: list[dict]) -> list[dict]:
    if not Path(out).exists():
        return []
    again = {(row["network"], row["seed"]) for row in rows}
    stored = json.loads(Path(out).read_text())["rows"]
    return [row for row in stored if (row["network"], row["seed"]) not in again]


def main():
    parser: argparse.ArgumentParser = arguments(__doc__, "nbs/runs/rebalance.json")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--networks", nargs="*", default=[], help="stored ones, safetensors")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    root = Path(args.data or ".").parent
    problems = [(name, seed, KINDS[name], seed) for name in args.kinds for seed in args.seeds]
    for file in map(Path, args.networks):
        start = "constant" if "constant" in file.name else "annealed"
        seed = int(re.search(r"_s(\d+)_", file.name)[1])
        label = f"{file.name.split('_')[0]}, {start}"
        problems.append((label, seed, partial(of_study, root=root), file))
    for name, seed, make, given in tqdm(problems):
        store(run(name, seed, make(given)), args)


def store(rows: list[dict], args: argparse.Namespace) -> None:
    "Beside those that are there, after each network: nothing is lost."
    rows = earlier_rows(args.out, rows) + rows
    conditions = about(args, seeds=sorted({row["seed"] for row in rows}))
    conditions["data"] = ", ".join(dict.fromkeys(row["network"] for row in rows))
    conditions["weights"] = "digits, table, texts: trained here; others: stored"
    stored = dict(command="python benchmarks/rebalance.py", about=conditions, rows=rows)
    write(args.out, stored, table(in_brief(rows)))


if __name__ == "__main__":
    main()

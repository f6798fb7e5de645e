"""Do updates stay out of the spikes when gradients do? A stored ResNet-20, thirty steps of
fine-tuning in five ways; how much of the squared change of weights lay along its spikes.

Adam divides every element of a gradient by a size of its own, so that a gradient that was kept
orthogonal to the spikes makes a step that is not.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from problem import about, arguments, table, write

from hessian_surgery_nb.evidence.spectrum_experiments import curvature
from hessian_surgery_nb.evidence.study import Study, build_network
from hessian_surgery_nb.evidence.training_experiments import FINETUNE
from hessian_surgery_nb.foundations.runs import RunStore
from hessian_surgery_nb.foundations.training import train
from hessian_surgery_nb.foundations.weight_files import load_weights
from hessian_surgery_nb.foundations.weights import flatten, inner
from hessian_surgery_nb.lanczos import top_eigenpairs

SGD = dict(optimizer="sgd", lr=3e-3)
WAYS = {  # how -> whether spikes are barred, settings of training
    "Adam": (False, {}),
    "Adam, gradients projected": (True, {}),
    "Adam, steps projected": (True, dict(removed_from="updates")),
    "SGD": (False, SGD),
    "SGD, gradients projected": (True, SGD),
}


def flat(model: torch.nn.Module) -> torch.Tensor:  # (n,)
    return flatten([p.detach() for p in model.parameters()])


def main():
    parser = arguments(__doc__, "nbs/runs/bench_projection.json")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = Path(__file__).parents[1] / "nbs" / "runs" / "cifar10"
    rows = []
    for start, seed in (("constant", 3), ("annealed", 3)):
        study = Study(store=RunStore(runs, runs), seed=seed, start=start, progress=False)
        net = load_weights(build_network(study), runs / f"{study.label}_network.safetensors")
        net.eval()
        spikes = top_eigenpairs(curvature(study, net), 9, tol=1e-2, seed=seed).vectors
        images, labels = study.splits.train.pair
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(labels), generator=generator)[: 128 * args.steps]
        data = images[drawn], labels[drawn]
        for how, (barred, settings) in WAYS.items():
            trained = copy.deepcopy(net)
            project = (lambda model: spikes) if barred else None
            train(trained, data, epochs=1, seed=seed, project=project, **(FINETUNE | settings))
            change = flat(trained) - flat(net)
            along = inner(spikes, change).square().sum().item()
            total = inner(change, change).item()
            rows.append(
                dict(start=start, seed=seed, how=how, share=along / total, moved=total**0.5)
            )
    facts = about(args, steps=args.steps, settings=FINETUNE, sgd=SGD)
    facts |= dict(data="cifar10", weights="stored networks", batch=128)
    found = dict(command="python benchmarks/projection.py", about=facts, rows=rows)
    write(args.out, found, table(rows))


if __name__ == "__main__":
    main()

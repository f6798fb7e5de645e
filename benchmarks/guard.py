"""What it costs to notice that a network or its data are not a fixed function: surgery with the
guard and without, in turn.

The machine's own scatter may be larger than the cost, so what is spent inside the guard is added
up, too, in the guarded runs. Without means: no pass before and after a search for eigenpairs, no
comparison of passes, no fingerprints of weights and data before a product, no second look at two
images before an evaluation, nothing set aside around a forward pass.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from unittest import mock

import torch
from problem import about, arguments, images, peak_gb, seconds, table, write
from torch import nn
from tqdm import trange

from hessian_surgery_nb.foundations import forward, modes, objective
from hessian_surgery_nb.foundations import accuracy
from hessian_surgery_nb.foundations.watched import WatchedObjective
from hessian_surgery_nb.foundations.networks import resnet20
from hessian_surgery_nb.foundations.weight_files import load_weights
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate


@contextlib.contextmanager
def unguarded():
    "The package as it would be without the guard."
    nothing = contextlib.nullcontext()
    with contextlib.ExitStack() as stack:

        def replace(place, name, new):
            stack.enter_context(mock.patch.object(place, name, new))

        replace(WatchedObjective, "observe", lambda self: None)
        replace(WatchedObjective, "unchanged", lambda self, since: True)
        replace(WatchedObjective, "_compare", lambda self, record, moved=False: None)
        replace(modes, "fingerprint_of", lambda objective, probes: ["present"])
        replace(forward, "undisturbed", lambda model: nothing)
        replace(accuracy, "_check_repeats", lambda *args: None)
        yield


class Clock:
    "Adds up what is spent inside some functions and blocks; one inside another counts once."

    def __init__(self):
        self.total, self.depth = 0.0, 0

    def __enter__(self):
        if not self.depth:
            self.start = time.perf_counter()
        self.depth += 1

    def __exit__(self, *exception):
        self.depth -= 1
        if not self.depth:
            self.total += time.perf_counter() - self.start

    def around(self, f):
        def timed(*args, **kwargs):
            with self:
                return f(*args, **kwargs)

        return timed

    @contextlib.contextmanager
    def ends(self, block):
        "Entering and leaving a block; what runs inside it is not counted."
        with self:
            block.__enter__()
        try:
            yield
        finally:
            with self:
                block.__exit__(None, None, None)


@contextlib.contextmanager
def watched(clock: Clock):
    "The package as it is, with a clock on the guard."
    with contextlib.ExitStack() as stack:

        def replace(place, name, new):
            stack.enter_context(mock.patch.object(place, name, new))

        for place, name in (
            (WatchedObjective, "observe"),
            (WatchedObjective, "unchanged"),
            (WatchedObjective, "_compare"),
            (modes, "fingerprint_of"),
            (objective, "record_row"),
            (forward, "_equal"),
            (accuracy, "_check_repeats"),
        ):
            replace(place, name, clock.around(getattr(place, name)))
        block = forward.undisturbed
        replace(forward, "undisturbed", lambda model: clock.ends(block(model)))
        yield


def main():
    parser = arguments(__doc__, "nbs/runs/bench_guard.json")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sensitivity", type=int, default=5000, help="images")
    parser.add_argument("--iterations", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = resnet20().eval()
    if args.weights:
        load_weights(net, args.weights)
    curved = images(args.data, args.batch)
    x, y = images(args.data, args.sensitivity, seed=1)
    judged = list(zip(x.split(250), y.split(250)))
    config = SurgeryConfig(iterations=args.iterations, eps=0.02)

    def surgery():
        operate(
            net,
            nn.CrossEntropyLoss(),
            curved,
            judged,
            config=config,
            check_overlap=False,
            progress=False,
        )

    times, shares = {"guarded": [], "unguarded": []}, []
    for _ in trange(args.rounds, desc="rounds"):
        clock = Clock()
        with watched(clock):
            times["guarded"].append(seconds(surgery))
        shares.append(clock.total / times["guarded"][-1])
        with unguarded():
            times["unguarded"].append(seconds(surgery))
    rows = [dict(what=k, seconds=statistics.median(t), fastest=min(t)) for k, t in times.items()]
    facts = about(
        args,
        rounds=args.rounds,
        sensitivity=args.sensitivity,
        iterations=args.iterations,
        network="resnet20",
    )
    shown = (
        f"{table(rows)}\nspent inside the guard: {', '.join(f'{share:.2%}' for share in shares)} "
        "of the run"
    )
    write(
        args.out,
        dict(
            command="python benchmarks/guard.py",
            about=facts,
            rows=rows,
            shares=shares,
            times=times,
            peak_gb=peak_gb(),
        ),
        shown,
    )


if __name__ == "__main__":
    main()

"""Surgery over all 99 spikes of a ResNet-50 with 100 outputs, in phases, and how much memory each
phase takes.

The network is that of `many.py`. Resident memory is sampled five times a second; directions lie in
a file that is mapped into memory, and the pages of it that are in use count.
"""

from __future__ import annotations

import tempfile
import threading
import time

import psutil
import torch
from many import parameters, prepared
from problem import about, images, peak_gb, table, write
from torch import nn

from hessian_surgery_nb.deflated_surgery import deflated_operate
from hessian_surgery_nb.evidence.deflation_experiments import phase_sizes
from hessian_surgery_nb.foundations.networks import num_params
from hessian_surgery_nb.settings import SurgeryConfig


class Heartbeat:
    "The largest resident memory between two marks."

    def __init__(self):
        self.process, self.top, self.marks, self.done = psutil.Process(), 0.0, [], threading.Event()

    def run(self):
        while not self.done.wait(0.2):
            self.top = max(self.top, self.process.memory_info().rss / 1e9)

    def mark(self, **facts):
        self.marks.append(dict(facts, peak_gb=max(self.top, self.process.memory_info().rss / 1e9)))
        self.top = 0.0

    def __enter__(self):
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.done.set()


def main():
    p = parameters(__doc__, "nbs/runs/bench_deflated.json")
    p.add_argument("--spikes", type=int, default=99)
    p.add_argument("--phase", type=int, default=15, help="spikes a phase")
    p.add_argument("--iterations", type=int, default=3, help="of surgery, a phase")
    p.add_argument(
        "--per-class",
        type=int,
        default=5,
        help="sensitivity images of each class; memory does not depend on it, time does",
    )
    p.add_argument(
        "--run-dir",
        help=(
            "where directions and state are kept, so that a run that was cut off goes on; none: "
            "a temporary folder"
        ),
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    net, classes, (X, y) = prepared(args)
    Xs, ys = images(args.data, 200 * len(classes), seed=2, classes=classes)
    rows = torch.cat([(ys == c).nonzero().flatten()[: args.per_class] for c in range(len(classes))])
    sensitivity = list(zip(Xs[rows].split(50), ys[rows].split(50)))
    del Xs
    sizes, start = phase_sizes(args.spikes, args.phase), time.perf_counter()
    config = SurgeryConfig(
        iterations=args.iterations, scheme="forward", rollback_drop=0.25, rollback_errors=2.0
    )  # of five images one may turn wrong

    def note(text, **found):
        write(
            args.out,
            dict(
                command="python benchmarks/deflated.py",
                about=about(
                    args,
                    phase=args.phase,
                    iterations=args.iterations,
                    sensitivity=len(rows),
                    bf16=args.bf16,
                    classes=len(classes),
                ),
                memory=watch.marks,
                **found,
            ),
            text,
        )

    with Heartbeat() as watch, tempfile.TemporaryDirectory() as d:
        watch.mark(phase=0, spikes=0, minutes=0.0, stored_gb=0.0)

        def after(record, model):
            stored = record.spikes * num_params(net) * (2 if args.bf16 else 4) / 1e9
            watch.mark(
                phase=record.phase,
                spikes=record.spikes,
                minutes=(time.perf_counter() - start) / 60,
                stored_gb=stored,
                products=record.matvecs,
                overlap=record.overlap,
                largest=record.largest,
                smallest=record.smallest,
                certified=record.certified,
                kept=sum(s.accepted for s in record.steps),
                sigma=100 * record.sigma,
            )
            note(
                f"phase {record.phase}: {record.spikes} spikes, {watch.marks[-1]['peak_gb']:.1f} GB"
            )

        r = deflated_operate(
            net,
            nn.CrossEntropyLoss(),
            (X, y),
            sensitivity,
            phases=sizes,
            config=config,
            basis_dtype=torch.bfloat16 if args.bf16 else None,
            run_dir=args.run_dir or d,
            check_overlap=False,
            after_phase=after,
        )
    row = dict(
        parameters=num_params(net),
        spikes=args.spikes,
        phases=len(sizes),
        minutes=(time.perf_counter() - start) / 60,
        peak_gb=peak_gb(),
        sigma_before=100 * r.sensitivity_before.sigma,
        sigma_after=100 * r.sensitivity_after.sigma,
    )
    note(table([row]), rows=[row])


if __name__ == "__main__":
    main()

"""Draw the pictures of README.md and of the site from stored runs (needs the `dev` extra).

    python .ci/pictures.py    writes nbs/images/before_after.png and nbs/images/card.png

`nbs/images/favicon.svg` is written by hand.
"""

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hessian_surgery_nb.evidence.reading import read_results
from hessian_surgery_nb.evidence.starts import settled_by
from hessian_surgery_nb.foundations.testbed import COLOURS

PICTURES = ROOT / "nbs" / "images"
INK = "#24292f"


def class_accuracies():
    "Class -> mean accuracies before and after, weakest first; networks whose rate stayed high."
    results = read_results(ROOT / "nbs" / "runs" / "cifar10", start="constant")
    pick = settled_by("short anneal, Adam", 0.005)
    before = [run.held_out.classes for run in results.of("network", "settling")]
    after = [pick(run).held_out.classes for run in results.of("settling", "network")]
    found = {}
    for place, entry in enumerate(before[0]):
        pair = []
        for reports in (before, after):
            values = [report[place].accuracy_percent for report in reports]
            pair.append(sum(values) / len(values))
        found[entry.name] = tuple(pair)
    return dict(sorted(found.items(), key=lambda item: item[1][0], reverse=True))


def draw_before_after(ax, size=9):
    "A line a class, from where it was to where it is."
    found = class_accuracies()
    for row, (name, (before, after)) in enumerate(found.items()):
        ax.plot([before, after], [row, row], color=COLOURS["sky"], lw=size / 4, zorder=1)
        ax.plot(before, row, "o", color=COLOURS["grey"], ms=size * 0.8, zorder=2)
        ax.plot(after, row, "o", color=COLOURS["blue"], ms=size * 0.8, zorder=3)
    ax.set_yticks(range(len(found)), found, fontsize=size, color=INK)
    ax.tick_params(axis="x", labelsize=size, colors=INK)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("accuracy of the class, held-out (%)", fontsize=size, color=INK)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", alpha=0.3, lw=0.6)
    weakest, (before, after) = list(found.items())[-1]
    top = len(found) - 0.35
    row = len(found) - 1
    ax.annotate("before", (before, row), (before, top), ha="center", fontsize=size, color="#5f5f5f")
    ax.annotate(
        "after", (after, row), (after, top), ha="center", fontsize=size, color=COLOURS["blue"]
    )
    ax.set_ylim(-0.6, len(found) - 0.1)


def store(figure, name):
    "In 64 colours, which nobody tells from all of them."
    raw = io.BytesIO()
    figure.savefig(raw, format="png", metadata={"Software": None})
    picture = Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(PICTURES / name, "png", optimize=True)
    plt.close(figure)


def draw_picture():
    figure, ax = plt.subplots(figsize=(6.6, 2.9), dpi=200, layout="constrained")
    draw_before_after(ax)
    store(figure, "before_after.png")


def draw_card():
    "What others show of a link to the site: 1200 by 630 pixels."
    figure = plt.figure(figsize=(12, 6.3), dpi=100)
    figure.text(0.05, 0.80, "hessian_surgery_nb", fontsize=36, weight="bold", color=INK)
    figure.text(
        0.05,
        0.70,
        "Lift the weak classes of a trained\nclassifier, see what it costs,\nand know when not to",
        fontsize=23,
        color=INK,
        va="top",
        linespacing=1.5,
    )
    figure.text(0.05, 0.08, "PyTorch · a course to run · Apache-2.0", fontsize=18, color="#5f5f5f")
    draw_before_after(figure.add_axes((0.66, 0.14, 0.31, 0.74)), size=14)
    store(figure, "card.png")


def main():
    PICTURES.mkdir(exist_ok=True)
    draw_picture()
    draw_card()


if __name__ == "__main__":
    main()

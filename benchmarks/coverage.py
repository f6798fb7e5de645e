"""How often the intervals of sigma and of its change hold the truth, in worlds whose truth is
known.

Class accuracies of a given sigma; a second method that flips some answers and changes sigma by a
known factor; seeds whose changes differ or not. Images are counted again and again, and an
interval of 95 % is made of each count. The percentile bootstrap, which draws the images once more,
stands beside.

Rows "mean as counted" ask something else of `mean_interval`: whether it holds the mean of sigma
over seeds as counted on sets of this size. How often it holds the sigma of the population stands
beside.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import numpy as np

from hessian_surgery_nb.foundations.intervals import (
    _change_ends,
    _pooled_ends,
    _sigma_ends,
    mean_interval,
)

LEVEL = 0.95
LESIONS = (30, 2500, 60, 100, 300, 700, 50, 1200)  # images a class, of 8
PAIRS = (
    (1.0, 0.05),
    (1.0, 0.15),
    (0.8, 0.1),
    (0.6, 0.15),
)  # factor of sigma, share of flipped answers


def accuracies(sigma, classes, rng):
    "Class accuracies with exactly this sigma (as a share of 1)."
    mean = 0.8 if sigma < 0.1 else 0.7
    while True:
        e = rng.standard_normal(classes) if classes < 20 else rng.uniform(-1, 1, classes)
        p = mean + sigma * (e - e.mean()) / e.std()
        if p.min() > 0.03 and p.max() < 0.99:
            return p


def second(p, factor, flips):
    """Shares (C, 4) of images on which neither, only b, only a and both are right; b has factor *
    sigma.
    """
    change = (factor - 1) * (p - p.mean())
    room = np.minimum(2 * p + change, 2 * (1 - p) - change)
    churn = np.maximum(np.minimum(np.maximum(flips, np.abs(change) + 0.01), room), np.abs(change))
    a, b = (churn - change) / 2, (churn + change) / 2
    return np.clip(np.stack([1 - p - b, b, a, p - a], -1), 0, None)


def counts(shares, images, repeats, rng):  # -> (repeats, C, 4)
    return np.stack([rng.multinomial(n, s / s.sum(), repeats) for n, s in zip(images, shares)], 1)


def seeds(p, factor, between, images, repeats, n, rng):  # -> (repeats, n, C, 4)
    "Each seed has a change of its own: its factor is drawn around the mean one."
    if not between:
        return counts(second(p, factor, 0.1), images, repeats * n, rng).reshape(
            repeats, n, len(p), 4
        )
    factors = np.clip(factor + between / p.std() * rng.standard_normal(repeats * n), 0.05, None)
    drawn = [counts(second(p, f, 0.1), images, 1, rng)[0] for f in factors]
    return np.stack(drawn).reshape(repeats, n, len(p), 4)


def alone(kinds):  # the first method by itself
    out = np.zeros_like(kinds)
    out[..., 0], out[..., 3] = kinds[..., :2].sum(-1), kinds[..., 2:].sum(-1)
    return out


def percentile(kinds, what, rng, draws=300):
    "The ends of a percentile bootstrap, seeds drawn again too."
    n = kinds.sum(-1)
    again = rng.multinomial(n, kinds / n[..., None], (draws, *n.shape)) / n[..., None]
    sigma = np.stack([again[..., 2:].sum(-1), again[..., 1::2].sum(-1)]).std(-1)
    value = sigma[0] if what == "single" else sigma[1] - sigma[0]
    if what == "pooled":
        S = value.shape[-1]
        value = np.take_along_axis(value, rng.integers(S, size=value.shape), -1).mean(-1)
    return np.quantile(value, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)


def ends(kinds, what, draws=500, size=100):
    "Of many intervals, some at a time."
    make = dict(
        single=lambda k: _sigma_ends(alone(k), LEVEL, draws, 0),
        paired=lambda k: _change_ends(k, LEVEL, draws, 0),
        pooled=lambda k: _pooled_ends(k, np.zeros(len(k)), LEVEL, draws, 0),
    )[what]
    parts = [make(kinds[i : i + size]) for i in range(0, len(kinds), size)]
    return np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])


def held(found, truth):
    return float(100 * np.mean((found[0] <= truth) & (truth <= found[1])))


def cell(
    sigma, images, what, repeats, seed, factor=1.0, flips=0.1, between=0.0, n=1, beside=0, draws=500
):
    "One row: how many intervals hold the truth, in percent."
    rng = np.random.default_rng(
        [seed, round(1e4 * sigma), sum(images), n, round(100 * factor), round(100 * flips)]
    )
    p = accuracies(sigma, len(images), rng)
    if what == "pooled":
        kinds = seeds(p, factor, between, images, repeats, n, rng)
    else:
        kinds = counts(second(p, factor, flips), images, repeats, rng)
    truth = sigma if what == "single" else (factor - 1) * sigma
    found = ends(kinds, what, draws)
    name = what if n == 1 else f"pooled over {n} seeds"
    row = {
        "interval": name,
        "sigma (pp)": round(100 * sigma),
        "images a class": min(images),
        "factor": factor,
        "flips": flips,
        "between seeds (pp)": 100 * between,
        "repeats": repeats,
        "classes": str(len(images)) + ("" if min(images) == max(images) else ", uneven"),
        "covered (%)": held(found, truth),
        "truth below (%)": float(100 * np.mean(truth < found[0])),
        "truth above (%)": float(100 * np.mean(truth > found[1])),
        "width (pp)": float(100 * np.mean(found[1] - found[0])),
    }
    if beside:
        row["percentile bootstrap (%)"] = held(percentile(kinds[:beside], what, rng), truth)
    return row


def mean_as_counted(sigma, images, repeats, seed, between, n):
    "One row: how many intervals of a mean over seeds hold the mean as counted on such sets."
    rng = np.random.default_rng([seed, round(1e4 * sigma), sum(images), n, round(1e4 * between)])
    p = accuracies(sigma, len(images), rng)

    def counted(number):  # (number,) sigmas, each of another network on images of its own
        kinds = seeds(p, 1.0, between, images, number, 1, rng)[:, 0]
        right = kinds[..., 1::2].sum(-1)
        return (right / kinds.sum(-1)).std(-1)

    expected = counted(20_000).mean()
    values = counted(repeats * n).reshape(repeats, n)
    _, low, high = np.transpose([mean_interval(row, LEVEL) for row in values])
    return {
        "interval": f"mean as counted over {n} seeds",
        "sigma (pp)": round(100 * sigma),
        "images a class": min(images),
        "between seeds (pp)": 100 * between,
        "repeats": repeats,
        "classes": str(len(images)) + ("" if min(images) == max(images) else ", uneven"),
        "mean as counted (pp)": float(100 * expected),
        "covered (%)": held((low, high), expected),
        "truth below (%)": float(100 * np.mean(expected < low)),
        "truth above (%)": float(100 * np.mean(expected > high)),
        "holds the population's (%)": held((low, high), sigma),
        "width (pp)": float(100 * np.mean(high - low)),
    }


def cells(sigma, images, repeats, seed, beside=0):
    "All kinds of intervals in one world."
    yield cell(sigma, images, "single", repeats, seed, beside=beside)
    for factor, flips in PAIRS:
        yield cell(sigma, images, "paired", repeats, seed, factor, flips, beside=beside)
    for n in (3, 6):
        for between, factor in ((0.0, 1.0), (0.0, 0.7), (0.005, 0.8)):
            yield cell(
                sigma, images, "pooled", repeats, seed, factor, between=between, n=n, beside=beside
            )
        for between in (0.0, 0.005):
            yield mean_as_counted(sigma, images, repeats, seed, between, n)


def commit():
    root = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="worlds: each draws other class accuracies",
    )
    parser.add_argument("--out", default="coverage_sigma.json")
    args = parser.parse_args()
    start, rows = time.time(), []
    worlds = [
        ((n,) * C, R)
        for C, n, R in (
            (10, 50, args.repeats),
            (10, 500, args.repeats),
            (100, 50, args.repeats // 4),
        )
    ]
    worlds.append((LESIONS, args.repeats // 4))
    for images, repeats in worlds:
        for sigma in (0.02, 0.07, 0.19):
            if len(images) == 100 and sigma > 0.1:
                sigma = 0.16  # as far apart as a hundred accuracies with room for flips
            for seed in args.seeds:
                for row in cells(
                    sigma,
                    images,
                    repeats,
                    seed,
                    beside=min(repeats, 400) if len(images) == 10 else 0,
                ):
                    rows.append(row | {"seed": seed})
                    print(json.dumps(row), flush=True)
    about = dict(
        date=time.strftime("%Y-%m-%d"),
        commit=commit(),
        python=platform.python_version(),
        numpy=np.__version__,
        repeats=args.repeats,
        seeds=args.seeds,
        level=LEVEL,
        seconds=time.time() - start,
    )
    Path(args.out).write_text(
        json.dumps(dict(about=about, cells=rows), indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()

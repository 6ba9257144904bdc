#!/usr/bin/env python3
"""The linear probe's choice of settings: what the grid of 20 costs beside one setting, and what the
cheap choice loses.

    python eval_knn.py --weights output/backbone.pth --data_path DATA --features features.npz
    python tests/bench_probe.py features.npz --labels 500 5000 --seeds 0 1 2

Every setting is also trained to the end, and by whole batches on the labels that are not held out,
for choices that spare nothing: by squared error of the probabilities, as the cheap choice, and by
accuracy. Accuracies are those on up to 10,000 training images beside the labelled ones; the test
images stay out.
"""

import argparse
import itertools
import statistics
import time

import torch
from bench_speed import show  # this import first: it makes the scripts importable

import eval_linear
from lowdino import classification, evaluate, linear, probe

COLUMNS = {
    "labels": "labels",
    "one_s": "one setting, s",
    "grid_s": "grid of 20, s",
    "ratio": "ratio",
    "best": "best, %",
    "worst": "worst, %",
    "lost": "points lost by the choice",
    "lost_by_whole": "by one that spares nothing",
    "lost_by_accuracy": "and goes by accuracy",
}


def accuracies(inputs: linear.ProbeInputs, weights: torch.Tensor, indices: torch.Tensor):
    """Of classifiers (D + 1, G, C) on the images at `indices`: (G,), in percent."""
    logits = torch.einsum("nd,dgc->gnc", inputs.x[indices], weights)
    return 100 * (logits.argmax(dim=2) == inputs.labels[indices]).float().mean(dim=1)


def timed_choice(args, inputs: linear.ProbeInputs, indices: torch.Tensor, seed: int, **grid):
    """Seconds of a choice from a grid, and the classifier (D + 1, C)."""
    args = argparse.Namespace(**vars(args) | grid)
    start = time.perf_counter()
    weights, _ = linear.choose_and_fit(args, None, inputs, indices, seed)
    return time.perf_counter() - start, weights


def measure(args, inputs: linear.ProbeInputs, labels: int, seed: int) -> dict:
    indices = probe.label_subset(inputs.labels, labels / len(inputs.labels), seed)
    rest = torch.ones(len(inputs.labels), dtype=torch.bool)
    rest[indices] = False
    rest = rest.nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:10000]]
    one_s, _ = timed_choice(args, inputs, indices, seed, lr=[10.0], weight_decay=[1e-4])
    grid_s, chosen = timed_choice(args, inputs, indices, seed)
    grid = list(itertools.product(args.lr, args.weight_decay))
    found = accuracies(inputs, linear.fit(args, None, inputs, indices, grid, seed), rest)
    parts = probe.hold_out(inputs.labels[indices], args.val_fraction, seed)
    inner, held = (indices[part] for part in parts)
    whole = linear.fit(args, None, inputs, inner, grid, seed)
    by_error = probe.brier_scores(inputs.x[held], inputs.labels[held], whole).argmin()
    by_accuracy = accuracies(inputs, whole, held).argmax()
    best = found.max()
    return {
        "labels": len(indices),
        "seed": seed,
        "one_s": one_s,
        "grid_s": grid_s,
        "ratio": grid_s / one_s,
        "best": best.item(),
        "worst": found.min().item(),
        "lost": (best - accuracies(inputs, chosen[:, None], rest)).item(),
        "lost_by_whole": (best - found[by_error]).item(),
        "lost_by_accuracy": (best - found[by_accuracy]).item(),
    }


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("features", help="an .npz that eval_knn.py --features wrote")
    parser.add_argument("--labels", nargs="+", type=int, default=[500, 2000, 5000, 15000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return parser


def main() -> None:
    parser = get_parser()
    given = parser.parse_args()
    args = eval_linear.get_parser().parse_args(["--from_features", given.features])
    classification.settle(args)
    title, train, _ = evaluate.load_features(given.features)
    if max(given.labels) >= len(train.labels):
        parser.error(f"--labels must leave some of the {len(train.labels)} images to measure on")
    scaler, classes = probe.Scaler(train.features), int(train.labels.max()) + 1
    inputs = linear.ProbeInputs(scaler, scaler(train.features), train.labels, classes)
    rows = []
    for labels in given.labels:
        found = [measure(args, inputs, labels, seed) for seed in given.seeds]
        means = {name: statistics.mean(row[name] for row in found) for name in found[0]}
        ratio = statistics.median(row["ratio"] for row in found)
        rows.append(means | {"labels": found[0]["labels"], "ratio": ratio})
        print(rows[-1], flush=True)
    print(f"\n{title}, means over seeds {given.seeds}, ratio: median\n")
    show(rows, COLUMNS)


if __name__ == "__main__":
    main()

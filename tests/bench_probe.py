#!/usr/bin/env python3
"""The linear probe's choice of settings: the cost of the grid of 20 beside one setting, and the
accuracy that the cheap choice loses.

    python eval_knn.py --weights output/backbone.pth --data_path DATA --features features.npz
    python tests/bench_probe.py features.npz --labels 500 5000 --seeds 0 1 2

Every setting is also trained to the end, and by full batches on the labels that are not held out,
for two full choices: by squared error of the probabilities, as the cheap choice, and by accuracy.
Accuracies are those on up to 10,000 training images beside the labelled ones; the test images stay
out.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import replace

import torch
from bench_speed import show  # this import first: it makes the scripts importable

import eval_linear
from lowdino import distributed, evaluate, linear, probe

COLUMNS = {
    "labels": "labels",
    "one_s": "one setting, s",
    "grid_s": "grid of 20, s",
    "ratio": "ratio",
    "best": "best, %",
    "worst": "worst, %",
    "lost": "points lost by the choice",
    "lost_by_full_batches": "by one that spares nothing",
    "lost_by_accuracy": "and goes by accuracy",
}


def accuracies(inputs: linear.ProbeInputs, weights: torch.Tensor, indices: torch.Tensor):
    """Of classifiers (D + 1, G, C) on the images at `indices`: (G,), in percent."""
    logits = torch.einsum("nd,dgc->gnc", inputs.x[indices], weights)
    return 100 * (logits.argmax(dim=2) == inputs.labels[indices]).float().mean(dim=1)


def timed_choice(subject, inputs: linear.ProbeInputs, indices: torch.Tensor, seed: int, **grid):
    """Seconds of a choice from a grid, and the classifier (D + 1, C)."""
    subject = replace(subject, args=subject.args.replace(**grid))
    start = time.perf_counter()
    weights, _ = linear.choose_and_fit(subject, inputs, indices, seed)
    return time.perf_counter() - start, weights


def measure(subject, inputs: linear.ProbeInputs, labels: int, seed: int) -> dict:
    indices = probe.label_subset(inputs.labels, labels / len(inputs.labels), seed)
    rest = torch.ones(len(inputs.labels), dtype=torch.bool)
    rest[indices] = False
    rest = rest.nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:10000]]
    one_s, _ = timed_choice(subject, inputs, indices, seed, lr=[10.0], weight_decay=[1e-4])
    grid_s, chosen = timed_choice(subject, inputs, indices, seed)
    grid = list(itertools.product(subject.args.lr, subject.args.weight_decay))
    by_setting = accuracies(inputs, linear.fit(subject, inputs, indices, grid, seed), rest)
    split = probe.split_for_choice(inputs.labels[indices], subject.args.val_fraction, seed)
    inner, held_out = (indices[part] for part in split)
    full_batches = linear.fit(subject, inputs, inner, grid, seed)
    x, held_out_labels = inputs.x[held_out], inputs.labels[held_out]
    by_error = probe.brier_scores(x, held_out_labels, full_batches).argmin()
    by_accuracy = accuracies(inputs, full_batches, held_out).argmax()
    best = by_setting.max()
    return {
        "labels": len(indices),
        "seed": seed,
        "one_s": one_s,
        "grid_s": grid_s,
        "ratio": grid_s / one_s,
        "best": best.item(),
        "worst": by_setting.min().item(),
        "lost": (best - accuracies(inputs, chosen[:, None], rest)).item(),
        "lost_by_full_batches": (best - by_setting[by_error]).item(),
        "lost_by_accuracy": (best - by_setting[by_accuracy]).item(),
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
    flags = ["--from_features", given.features, "--device", "cpu"]
    args = eval_linear.with_defaults(eval_linear.get_parser().parse(flags, eval_linear.check))
    (subject,) = eval_linear.open_subjects(args, distributed.Ranks(0, 1, torch.device("cpu")))
    title, train, _ = evaluate.load_features(given.features)
    if max(given.labels) >= len(train.labels):
        parser.error(f"--labels must leave some of the {len(train.labels)} images to measure on")
    whitening, classes = probe.HalfWhitening(train.features), int(train.labels.max()) + 1
    inputs = linear.ProbeInputs(whitening, whitening(train.features), train.labels, classes)
    rows = []
    for labels in given.labels:
        of_seeds = [measure(subject, inputs, labels, seed) for seed in given.seeds]
        means = {name: statistics.mean(row[name] for row in of_seeds) for name in of_seeds[0]}
        ratio = statistics.median(row["ratio"] for row in of_seeds)
        rows.append(means | {"labels": of_seeds[0]["labels"], "ratio": ratio})
        print(rows[-1], flush=True)
    print(f"\n{title}, means over seeds {given.seeds}, ratio: median\n")
    show(rows, COLUMNS)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The linear probe's choice of settings: what the grid of 20 costs beside one setting, and what the cheap choice loses.

    python eval_knn.py --weights output/backbone.pth --data_path DATA --features features.npz
    python tests/bench_probe.py features.npz --labels 500 5000 --seeds 0 1 2

Every setting is also trained to the end, and by whole batches on the labels that are not held out, for choices that spare
nothing: by squared error of the probabilities, as the cheap choice, and by accuracy. Accuracies are those on up to 10,000
training images beside the labelled ones; the test images stay out.
"""

import argparse
import itertools
import statistics
import time

import torch
from bench_speed import table  # this import first: it makes the scripts importable

import eval_linear
from lowdino import evaluate, probe


def measure(args: argparse.Namespace, frozen: eval_linear.Frozen, labels: int, seed: int) -> dict:
    def accuracies(weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(D + 1, G, C) weights -> (G,), in percent."""
        scores = torch.einsum("nd,dgc->gnc", frozen.inputs[places], weights)
        return 100 * (scores.argmax(dim=2) == frozen.labels[places]).float().mean(dim=1)

    def seconds(**grid) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        weights, _ = eval_linear.probe_weights(
            argparse.Namespace(**vars(args) | grid), None, frozen, places, seed
        )
        return time.perf_counter() - start, weights

    places = probe.label_subset(frozen.labels, labels / len(frozen.labels), seed)
    rest = torch.ones(len(frozen.labels), dtype=torch.bool)
    rest[places] = False
    rest = rest.nonzero()[:, 0]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:10000]]
    one_s, _ = seconds(lr=[10.0], weight_decay=[1e-4])
    grid_s, chosen = seconds()
    settings = list(itertools.product(args.lr, args.weight_decay))
    all_settings = accuracies(eval_linear.fit(args, None, frozen, places, settings, seed), rest)
    inner, held = (
        places[part] for part in probe.hold_out(frozen.labels[places], args.val_fraction, seed)
    )
    whole = eval_linear.fit(args, None, frozen, inner, settings, seed)
    by_error = probe.brier_scores(frozen.inputs[held], frozen.labels[held], whole).argmin()
    return {
        "labels": len(places),
        "seed": seed,
        "one_s": one_s,
        "grid_s": grid_s,
        "ratio": grid_s / one_s,
        "best": all_settings.max().item(),
        "worst": all_settings.min().item(),
        "lost": (all_settings.max() - accuracies(chosen[:, None], rest)).item(),
        "lost_by_whole": (all_settings.max() - all_settings[by_error]).item(),
        "lost_by_accuracy": (
            all_settings.max() - all_settings[accuracies(whole, held).argmax()]
        ).item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("features", help="an .npz that eval_knn.py --features wrote")
    parser.add_argument("--labels", nargs="+", type=int, default=[500, 2000, 5000, 15000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    args = eval_linear.get_parser().parse_args(["--from_features", asked.features])
    args.lr, args.weight_decay = eval_linear.PROBE_LR, eval_linear.PROBE_WEIGHT_DECAY
    title, train, _ = evaluate.load_features(asked.features)
    if max(asked.labels) >= len(train.labels):
        parser.error(f"--labels must leave some of the {len(train.labels)} images to measure on")
    scaler = probe.Scaler(train.features)
    frozen = eval_linear.Frozen(
        scaler, scaler(train.features), train.labels, int(train.labels.max()) + 1
    )
    rows = []
    for labels in asked.labels:
        found = [measure(args, frozen, labels, seed) for seed in asked.seeds]
        rows.append(
            {name: statistics.mean(row[name] for row in found) for name in found[0]}
            | {"labels": found[0]["labels"]}
        )
        rows[-1]["ratio"] = statistics.median(row["ratio"] for row in found)
        print(rows[-1], flush=True)
    print(f"\n{title}, means over seeds {asked.seeds}, ratio: median\n")
    print(
        table(
            rows,
            {
                "labels": "labels",
                "one_s": "one setting, s",
                "grid_s": "grid of 20, s",
                "ratio": "ratio",
                "best": "best, %",
                "worst": "worst, %",
                "lost": "points lost by the choice",
                "lost_by_whole": "by one that spares nothing",
                "lost_by_accuracy": "and goes by accuracy",
            },
        )
    )


if __name__ == "__main__":
    main()

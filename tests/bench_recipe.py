#!/usr/bin/env python3
"""What a recipe gives: k-NN before and after training, for several networks and seeds, beside raw pixels.

    python tests/bench_recipe.py --archs resnet5m mobilevit_xxs --seeds 0 1 2 --data_path DATA --output_dir runs/recipe -- --epochs 5

Trains `train.py --preset small` once for each network and seed, with the flags behind `--`, and prints a Markdown table.
The accuracy is the teacher's at the last epoch, k = 20, and the test images are looked at only then and before the first
step. A run that was stopped goes on, one that is finished is read from its log, so the command may be given again.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lowdino


def run(script: str, *flags: str) -> str:
    """Run a script, show what it prints, and return that."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags], stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(process.returncode)
    return "".join(lines)


def read(folder: Path) -> tuple[float, float, float]:
    """k-NN before the first step and after the last, and minutes of training, from a finished run's log."""
    settings = json.loads((folder / "args.json").read_text())
    batch = settings["batch_size_per_gpu"] * settings["world"]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seconds, step = 0.0, 0
    for record in records:
        if "images_per_s" in record:
            seconds += (record["step"] - step) * batch / record["images_per_s"]
            step = record["step"]
    knn = [record["knn"] for record in records if "knn" in record]
    return knn[0], knn[-1], seconds / 60


def spread(values: list[float], digits: int = 3) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def compare(ways: dict[str, list[str]], seeds: list[int], folder: str, *flags: str) -> None:
    """Train once for each way, the name and flags of a script, and each seed, in folders of its own; print a table.

    Of `flags`, common to all, later ones win. A run that was stopped goes on, one that is finished is read from its log.
    """
    rows = [
        "| | seeds | k-NN before | k-NN after | minutes of training a run |",
        "|---|---|---|---|---|",
    ]
    for number, (name, way) in enumerate(ways.items()):
        results = []
        for seed in seeds:
            output = Path(folder) / f"way{number}_seed{seed}"
            run(
                *way,
                "--seed",
                str(seed),
                "--output_dir",
                str(output),
                "--knn_freq",
                str(10**6),
                *flags,
            )
            results.append(read(output))
        before, after, minutes = zip(*results)
        rows.append(
            f"| {name} | {' '.join(map(str, seeds))} | {spread(before)} | {spread(after)} | {spread(minutes, 0)} |"
        )
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archs", nargs="+", default=["resnet5m", "mobilevit_xxs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--output_dir", default="runs/recipe")
    parser.add_argument("flags", nargs="*", help="train.py's, behind --")
    args = parser.parse_args()
    rows = [
        "| network | parameters | seeds | k-NN before | k-NN after | gain | minutes of training a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for arch in args.archs:
        results = []
        for seed in args.seeds:
            folder = Path(args.output_dir) / f"{arch}_seed{seed}"
            run(
                "train.py",
                "--preset",
                "small",
                "--arch",
                arch,
                "--seed",
                str(seed),
                "--data_path",
                args.data_path,
                "--output_dir",
                str(folder),
                "--knn_freq",
                str(10**6),
                *args.flags,
            )
            results.append(read(folder))
        before, after, minutes = zip(*results)
        millions = sum(p.numel() for p in lowdino.build_backbone(arch).parameters()) / 1e6
        gain = [b - a for a, b in zip(before, after)]
        rows.append(
            f"| `{arch}` | {millions:.2f}M | {' '.join(map(str, args.seeds))} | {spread(before)} | {spread(after)} "
            f"| {spread(gain)} | {spread(minutes, 0)} |"
        )
    side = json.loads((folder / "args.json").read_text())["global_crops_size"]
    printed = run(
        "eval_knn.py",
        "--pixels",
        "--data_path",
        args.data_path,
        "--nb_knn",
        "20",
        "--image_size",
        str(side),
    )
    pixels = float(re.search(r"\(k=20\) top-1 ([\d.]+)", printed)[1])
    rows.append(f"| raw pixels | | | {pixels:.3f} | | | |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

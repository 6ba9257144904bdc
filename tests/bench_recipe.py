#!/usr/bin/env python3
"""What a recipe gives: k-NN before and after training, for several networks and seeds, beside raw
pixels.

    python tests/bench_recipe.py --archs resnet5m mobilevit_xxs --seeds 0 1 2 --data_path DATA \
        --output_dir runs/recipe -- --epochs 5

Trains `train.py --preset small` once for each network and seed, with the flags behind `--`, and
prints a Markdown table. The accuracy is the teacher's at the last epoch, k = 20. The test images
are looked at only then and before the first step. A run that was stopped goes on, one that is
finished is read from its log, so the command may be given again.
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

import lowdino  # noqa: E402


def run(script: str, *flags: str) -> str:
    """Run a script, show what it prints, and return that."""
    command = [sys.executable, str(ROOT / script), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(process.returncode)
    return "".join(lines)


def read(folder: Path) -> tuple[float, float, float]:
    """From a finished run's log: k-NN before the first step and after the last, and minutes of
    training."""
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


def trained(way: list[str], seed: int, folder: Path, *flags: str) -> tuple[float, float, float]:
    """Train once, or go on, by a script and its flags; what `read` finds then.

    The k-NN is measured before the first step and after the last alone.
    """
    ends = ["--output_dir", str(folder), "--knn_freq", str(10**6)]
    run(*way, "--seed", str(seed), *ends, *flags)
    return read(folder)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def compare(ways: dict[str, list[str]], seeds: list[int], folder: str, *flags: str) -> None:
    """Train once for each way and each seed, in folders of their own; print a table.

    A run that was stopped goes on, one that is finished is read from its log.

    Args:
        ways: name -> a script and its flags.
        flags: common to all; later ones win.
    """
    rows = [
        "| | seeds | k-NN before | k-NN after | minutes of training a run |",
        "|---|---|---|---|---|",
    ]
    names = " ".join(map(str, seeds))
    for number, (name, way) in enumerate(ways.items()):
        results = [
            trained(way, seed, Path(folder) / f"way{number}_seed{seed}", *flags) for seed in seeds
        ]
        before, after, minutes = zip(*results)
        rows.append(row(name, names, spread(before), spread(after), spread(minutes, 0)))
    print("\n".join(rows))


def row_of_arch(arch: str, args: argparse.Namespace) -> str:
    """Train a network once for each seed: its row of the table."""
    way = ["train.py", "--preset", "small", "--arch", arch, "--data_path", args.data_path]
    folder = Path(args.output_dir)
    results = [
        trained(way, seed, folder / f"{arch}_seed{seed}", *args.flags) for seed in args.seeds
    ]
    before, after, minutes = zip(*results)
    millions = sum(p.numel() for p in lowdino.build_backbone(arch).parameters()) / 1e6
    accuracies = before, after, [b - a for a, b in zip(before, after)]
    seeds = " ".join(map(str, args.seeds))
    cells = [seeds, *map(spread, accuracies), spread(minutes, 0)]
    return row(f"`{arch}`", f"{millions:.2f}M", *cells)


def row_of_pixels(args: argparse.Namespace) -> str:
    """k-NN on raw pixels, of views as large as those of the training."""
    folder = Path(args.output_dir) / f"{args.archs[-1]}_seed{args.seeds[-1]}"
    side = json.loads((folder / "args.json").read_text())["global_crops_size"]
    flags = ["--data_path", args.data_path, "--nb_knn", "20", "--image_size", str(side)]
    printed = run("eval_knn.py", "--pixels", *flags)
    pixels = float(re.search(r"\(k=20\) top-1 ([\d.]+)", printed)[1])
    return f"| raw pixels | | | {pixels:.3f} | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--archs", nargs="+", default=["resnet5m", "mobilevit_xxs"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--output_dir", default="runs/recipe")
    parser.add_argument("flags", nargs="*", help="train.py's, behind --")
    args = parser.parse_args()
    rows = [
        "| network | parameters | seeds | k-NN before | k-NN after | gain "
        "| minutes of training a run |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [row_of_arch(arch, args) for arch in args.archs]
    rows.append(row_of_pixels(args))
    print("\n".join(rows))


if __name__ == "__main__":
    main()

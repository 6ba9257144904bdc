"""What the comparisons share: train by a script, read its log, print a table."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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

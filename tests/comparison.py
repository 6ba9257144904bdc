"""What the comparisons share: train by a script, read its log, probe, print a table."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # scripts of tests/ find the library once they have imported this

from lowdino import report  # noqa: E402


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


def settings(folder: Path) -> dict:
    """The settings of a run."""
    return report.read_settings(folder / "args.json")


def read(folder: Path) -> tuple[float, float, float]:
    """From a finished run's log: k-NN before the first step and after the last, and minutes of
    training."""
    found = report.RunRecord(folder)
    knn = [record["knn"] for record in found.records if "knn" in record]
    return knn[0], knn[-1], found.seconds() / 60


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


def file_name(title: str) -> str:
    return re.sub(r"[^\w.]+", "_", title).strip("_")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


class Probe(NamedTuple):
    """What is measured beside k-NN: by a linear classifier or by fine-tuning, at fractions of the
    labels.
    """

    label_fractions: list[str] = []
    finetune: bool = False
    flags: list[str] = []  # more, of eval_linear.py

    def headings(self) -> list[str]:
        kind = "fine-tuned" if self.finetune else "linear"
        return [f"{kind} {100 * float(fraction):g} %" for fraction in self.label_fractions]

    def accuracies(self, model: str, source: list[str], seed: int, folder: Path) -> list[float]:
        """Of a backbone file, a network at random weights or pixels, at each fraction.

        Random weights are trained from scratch where others are fine-tuned, by the same steps.
        """
        if not self.label_fractions:
            return []
        random = not Path(model).is_file()
        way = (["--from_scratch"] if random else ["--finetune"]) if self.finetune else []
        way += ["--label_fraction", *self.label_fractions, "--seeds", str(seed), *self.flags]
        folder = folder / file_name(" ".join(way))
        if not (folder / "table.json").exists():
            run("eval_linear.py", model, *way, *source, "--output_dir", str(folder))
        (found,) = json.loads((folder / "table.json").read_text())["rows"]
        return [cell["top1"][0] for cell in found["trained"]]


def source_of(folder: Path) -> list[str]:
    """Flags of the images and the device of a run, for scripts that evaluate."""
    given = settings(folder)
    names = ("data_path", "data_root", "device")
    return [word for name in names for word in (f"--{name}", str(given[name]))]


def knn_of(subject: list[str], source: list[str], side: int) -> float:
    """k-NN accuracy of random weights or raw pixels, k = 20, of images as large as the views."""
    printed = run("eval_knn.py", *subject, *source, "--nb_knn", "20", "--image_size", str(side))
    return float(re.search(r"\(k=20\) top-1 ([\d.]+)", printed)[1])


def compare(
    ways: dict[str, list[str]], seeds: list[int], folder: str, probe: Probe, *flags: str
) -> None:
    """Train once for each way and each seed, in folders of their own; print a table.

    Its last rows are the floors, random weights and raw pixels. A run that was stopped goes on, one
    that is finished is read from its log.

    Args:
        ways: name -> a script and its flags.
        flags: common to all; later ones win.
    """
    headings = ["", "seeds", "k-NN before", "k-NN after", *probe.headings(), "minutes a run"]
    rows, names = [row(*headings), "|---" * len(headings) + "|"], " ".join(map(str, seeds))
    for name, way in ways.items():
        found = []
        for seed in seeds:
            run_folder = Path(folder) / file_name(f"{name} seed{seed}")
            before, after, minutes = trained(way, seed, run_folder, *flags)
            of_run = source_of(run_folder), seed, run_folder / "probe"
            probed = probe.accuracies(str(run_folder / "backbone.pth"), *of_run)
            found.append((before, after, *probed, minutes))
        *accuracies, minutes = zip(*found)
        rows.append(row(name, names, *map(spread, accuracies), spread(minutes, 0)))
    rows += floors(run_folder, seeds, probe)
    print("\n".join(rows))


def floors(folder: Path, seeds: list[int], probe: Probe) -> list[str]:
    """Rows of random weights, where more than k-NN is measured, and raw pixels, for a run's images
    and network."""
    known, source, rows = settings(folder), source_of(folder), []
    arch, side, names = known["arch"], known["global_crops_size"], " ".join(map(str, seeds))
    size = [*source, "--image_size", str(side)]
    if probe.label_fractions:
        places = [(seed, folder.parent / f"{arch}_seed{seed}") for seed in seeds]
        found = zip(*(probe.accuracies(arch, size, *place) for place in places))
        rows.append(row(f"`{arch}`, random weights", names, "", "", *map(spread, found), ""))
    pixels = []
    if not probe.finetune:
        pixels = probe.accuracies("pixels", size, seeds[0], folder.parent / "pixels")
    knn = knn_of(["--pixels"], source, side)
    cells = pixels or [""] * len(probe.label_fractions)
    cells = [f"{value:.3f}" if value else "" for value in (knn, *cells)]
    return [*rows, row("raw pixels", "", "", *cells, "")]

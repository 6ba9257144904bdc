#!/usr/bin/env python3
"""What a recipe gives for the time: k-NN after so many minutes, as a table and a picture.

    python tests/bench_recipe.py --minutes 1 3 15 --archs resnet5m resnet5m:mobilevit_s \
        --recipes "" "--preset small" --seeds 0 1 2 --data_path DATA --output_dir runs/recipe

Trains by `train.py --minutes M` once for each network, recipe, number of minutes and seed, with the
flags behind `--`, on a CPU or a GPU, and prints a Markdown table. TEACHER:STUDENT trains
one network and then teaches another by `distill.py`, in the same minutes all told; both scripts
must then know the flags. The curves are drawn into curves.svg. Accuracies are those of the last
step, k = 20, beside random weights and raw pixels. A run that was stopped goes on, one that is
finished is read from its log, so the command may be given again.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

from comparison import read, row, run, spread

# Of the minutes of TEACHER:STUDENT: a student of cached features needs few, see RESULTS.md.
TEACHERS_SHARE = 0.65

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#555555")


def trained(arch: str, recipe: str, minutes: float, seed: int, args) -> float:
    """k-NN accuracy of a network trained for so many minutes."""
    teacher, _, student = arch.rpartition(":")
    words = [*recipe.split(), *args.flags, *source(args), "--seed", str(seed)]
    name = re.sub(r"[^\w.]+", "_", f"{arch} {recipe} {minutes:g} {seed}").strip("_")
    folder = Path(args.output_dir) / name
    if teacher:
        first = TEACHERS_SHARE * minutes
        before = ["--arch", teacher, "--minutes", str(first), "--output_dir", f"{folder}/teacher"]
        run("train.py", *words, *before)
        words += ["--teacher", f"{folder}/teacher/backbone.pth"]
        words += ["--cache_teacher", f"{folder}/features.npy"]
        minutes -= first
    script = "distill.py" if teacher else "train.py"
    own = ["--arch", student, "--minutes", f"{minutes:g}", "--output_dir", str(folder)]
    run(script, *words, *own)
    return read(folder)[1]


def source(args) -> list[str]:
    """Flags of the images and of the device."""
    flags = ("--data_path", args.data_path, "--data_root", args.data_root)
    return [*flags, "--device", args.device]


def floor(args, *of: str) -> float:
    """k-NN accuracy of random weights or raw pixels, of images as large as the views."""
    folder = next(Path(args.output_dir).glob("*/args.json")).parent
    side = json.loads((folder / "args.json").read_text())["global_crops_size"]
    flags = ["--nb_knn", "20", "--image_size", str(side)]
    printed = run("eval_knn.py", *of, *source(args), *flags)
    return float(re.search(r"\(k=20\) top-1 ([\d.]+)", printed)[1])


def drawn(curves: dict[str, dict[float, float]]) -> str:
    """Curves as SVG, name -> minutes -> accuracy, minutes on a logarithmic axis."""
    minutes = sorted({m for curve in curves.values() for m in curve})
    values = [v for curve in curves.values() for v in curve.values()]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values) + 1e-9) / 10
    span = math.log(minutes[-1] / minutes[0]) or 1.0

    def at(m: float, v: float) -> tuple[float, float]:
        x = 60 + 480 * math.log(m / minutes[0]) / span
        return round(x, 1), round(340 - 300 * (v - low) / (high - low), 1)

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{words}</text>'

    def line(points: list[tuple[float, float]], colour: str) -> str:
        path = " ".join(f"{x},{y}" for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'

    parts = [text(300, 385, "minutes", 'text-anchor="middle"'), text(60, 25, "k-NN accuracy")]
    for tenth in range(round(10 * low), round(10 * high) + 1):
        x, y = at(minutes[0], tenth / 10)
        parts.append(line([(x, y), (540, y)], "#dddddd"))
        parts.append(text(x - 8, y + 4, f"{tenth / 10:.1f}", 'text-anchor="end"'))
    for m in minutes:
        parts.append(text(at(m, low)[0], 362, f"{m:g}", 'text-anchor="middle"'))
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [at(m, v) for m, v in sorted(curve.items())]
        parts.append(line(points, colour))
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(text(560, 50 + 22 * i, name, f'fill="{colour}"'))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="400" font-size="14" '
        'font-family="sans-serif"><rect width="860" height="400" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 3, 15])
    help = "networks, or TEACHER:STUDENT"
    parser.add_argument("--archs", nargs="+", default=["resnet5m", "mobilevit_xxs"], help=help)
    help = "flags of train.py and distill.py in quotes; an empty one is the default recipe"
    parser.add_argument("--recipes", nargs="+", default=[""], help=help)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output_dir", default="runs/recipe")
    parser.add_argument("flags", nargs="*", help="of every run, behind --")
    args = parser.parse_args()

    heading = ("network", "recipe", "minutes", "seeds", "k-NN")
    rows, curves = [row(*heading), "|---" * len(heading) + "|"], {}
    seeds = " ".join(map(str, args.seeds))
    for arch in args.archs:
        for recipe in args.recipes:
            curve = curves[f"{arch} {recipe}".strip()] = {}
            for minutes in args.minutes:
                found = [trained(arch, recipe, minutes, seed, args) for seed in args.seeds]
                curve[minutes] = statistics.mean(found)
                cells = f"`{arch}`", recipe or "default", f"{minutes:g}", seeds
                rows.append(row(*cells, spread(found)))
    students = dict.fromkeys(arch.rpartition(":")[2] for arch in args.archs)
    floors = {f"{arch}, random weights": floor(args, "--arch", arch) for arch in students}
    floors["raw pixels"] = floor(args, "--pixels")
    for name, value in floors.items():
        rows.append(row(name, "", "", "", f"{value:.3f}"))
        curves[name] = dict.fromkeys(args.minutes, value)
    picture = Path(args.output_dir) / "curves.svg"
    picture.write_text(drawn(curves))
    print("\n".join([*rows, f"\npicture: {picture}"]))


if __name__ == "__main__":
    sys.exit(main())

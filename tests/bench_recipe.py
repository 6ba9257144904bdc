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
import statistics
import sys
from pathlib import Path

from comparison import file_name, knn_of, read, row, run, settings, spread

from lowdino.pictures import draw_curves

# Of the minutes of TEACHER:STUDENT: a student of cached features needs few, see RESULTS.md.
TEACHERS_SHARE = 0.65


def trained(arch: str, recipe: str, minutes: float, seed: int, args) -> float:
    """k-NN accuracy of a network trained for so many minutes."""
    teacher, _, student = arch.rpartition(":")
    words = [*recipe.split(), *args.flags, *source(args), "--seed", str(seed)]
    folder = Path(args.output_dir) / file_name(f"{arch} {recipe} {minutes:g} {seed}")
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


def get_parser() -> argparse.ArgumentParser:
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
    return parser


def main() -> None:
    args = get_parser().parse_args()

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
    side = settings(next(Path(args.output_dir).glob("*/args.json")).parent)["global_crops_size"]
    subjects = {f"{arch}, random weights": ["--arch", arch] for arch in students}
    subjects["raw pixels"] = ["--pixels"]
    floors = {name: knn_of(flags, source(args), side) for name, flags in subjects.items()}
    for name, value in floors.items():
        rows.append(row(name, "", "", "", f"{value:.3f}"))
        curves[name] = dict.fromkeys(args.minutes, value)
    picture = Path(args.output_dir) / "curves.svg"
    picture.write_text(draw_curves(curves, "minutes", "k-NN accuracy", logarithmic=True))
    print("\n".join([*rows, f"\npicture: {picture}"]))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What each objective of distillation gives, beside training without a teacher: k-NN of the student, same steps.

    python tests/bench_distill.py --teacher T.pth --arch resnet5m --seeds 0 1 2 --data_path DATA --output_dir runs -- --epochs 2

Trains the student once for each objective and seed with `--preset small` and the flags behind `--`, its teacher's features
cached, and once for each seed by train.py; prints a Markdown table. The accuracy is that of the last epoch, k = 20, and the
test images are looked at only then and before the first step. A run that was stopped goes on, one that is finished is read
from its log, so the command may be given again. A teacher with a classifier (as eval_linear.py --from_scratch writes it) is
also tried by its softened answers.
"""

import argparse
from pathlib import Path

from bench_recipe import read, run, spread

OBJECTIVES = {
    "kd, features through a projector": ["--objective", "kd"],
    "kd, the classifier's answers": ["--objective", "kd", "--teacher_head", "file"],
    "simkd": ["--objective", "simkd"],
    "similarity": ["--objective", "similarity"],
    "simkd and similarity": ["--objective", "simkd", "similarity"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True, help="as distill.py takes it")
    parser.add_argument("--arch", default="resnet5m")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="rows of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--output_dir", default="runs")
    parser.add_argument("flags", nargs="*", help="of both scripts, behind --")
    args = parser.parse_args()
    rows = ["| objective | seeds | k-NN before | k-NN after | minutes of training a run |", "|---|---|---|---|---|"]
    cache = str(Path(args.output_dir) / "teacher.npy")
    for name in ["none, train.py", *args.objectives]:
        results = []
        for seed in args.seeds:
            folder = Path(args.output_dir) / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}"
            how = (["train.py"] if name == "none, train.py" else
                   ["distill.py", "--teacher", args.teacher, "--cache_teacher", cache, *OBJECTIVES[name]])  # fmt: skip
            run(*how, "--preset", "small", "--arch", args.arch, "--seed", str(seed), "--data_path", args.data_path,
                "--output_dir", str(folder), "--knn_freq", str(10**6), *args.flags)  # fmt: skip
            results.append(read(folder))
        before, after, minutes = zip(*results)
        rows.append(f"| {name} | {' '.join(map(str, args.seeds))} | {spread(before)} | {spread(after)} | {spread(minutes, 0)} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

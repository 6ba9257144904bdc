#!/usr/bin/env python3
"""What each objective of distillation gives, beside training without a teacher: k-NN of the
student after the same steps.

    python tests/bench_distill.py --teacher T.pth --arch resnet5m --seeds 0 1 2 --data_path DATA \
        --output_dir runs/distill -- --epochs 2

Trains the student once for each objective and seed with `--preset small` and the flags behind `--`,
its teacher's features cached, and once for each seed by train.py. The accuracy is that of the last
epoch, k = 20. The test images are looked at only then and before the first step. The command may be
given again, and goes on. A teacher whose file has a classifier, as eval_linear.py --from_scratch
writes it, is also tried by its softened logits: name that row, kd_answers, in --objectives.
"""

import argparse
from pathlib import Path

from comparison import compare

OBJECTIVES = {
    "kd": ["--objective", "kd"],
    "kd_answers": ["--objective", "kd", "--teacher_head", "file"],
    "simkd": ["--objective", "simkd"],
    "similarity": ["--objective", "similarity"],
    "mvmr": ["--objective", "mvmr"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--teacher", required=True, help="as distill.py takes it")
    parser.add_argument("--arch", default="resnet5m")
    default = ["kd", "simkd", "similarity", "mvmr"]
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=default, help="rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--output_dir", default="runs/distill")
    parser.add_argument("flags", nargs="*", help="of both scripts, behind --")
    args = parser.parse_args()
    cache = str(Path(args.output_dir) / "teacher.npy")
    distill = ["distill.py", "--teacher", args.teacher, "--cache_teacher", cache]
    ways = {"no teacher, train.py": ["train.py"]}
    ways |= {name: distill + OBJECTIVES[name] for name in args.objectives}
    common = ["--preset", "small", "--arch", args.arch, "--data_path", args.data_path]
    ways = {name: way + common for name, way in ways.items()}
    compare(ways, args.seeds, args.output_dir, *args.flags)


if __name__ == "__main__":
    main()

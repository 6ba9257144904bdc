#!/usr/bin/env python3
"""MV-MR's ablations: its three terms, alone, in pairs and together, and its descriptors one by one; k-NN after the same steps.

    python tests/bench_mvmr.py --arch resnet5m --seeds 0 1 2 --data_path DATA --output_dir runs/mvmr -- --epochs 3

Trains by `--preset mvmr_small` with the flags behind `--` and prints a Markdown table; Kinakh et al. have theirs in Tables 5
and 6. The command may be given again, and goes on.
"""

import argparse
import itertools

from bench_recipe import compare

TERMS = {
    "L1": ["--invariance_weight", "0", "--variance_weight", "0"],
    "L2": ["--dependence_weight", "0"],
    "L3": ["--representation_weight", "0"],
}  # what leaves a term out
DESCRIPTORS = ["pixels", "augmented", "local_std", "hog", "scattering"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="resnet5m")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--output_dir", default="runs/mvmr")
    parser.add_argument("flags", nargs="*", help="of train.py, behind --")
    args = parser.parse_args()
    kept = [terms for n in (1, 2, 3) for terms in itertools.combinations(TERMS, n)]
    ways = {
        " + ".join(terms): sum((TERMS[t] for t in TERMS if t not in terms), []) for terms in kept
    }
    ways |= {f"all terms, {name} alone": ["--descriptors", name] for name in DESCRIPTORS}
    common = [
        "train.py",
        "--preset",
        "mvmr_small",
        "--arch",
        args.arch,
        "--data_path",
        args.data_path,
    ]
    compare(
        {name: common + way for name, way in ways.items()}, args.seeds, args.output_dir, *args.flags
    )


if __name__ == "__main__":
    main()

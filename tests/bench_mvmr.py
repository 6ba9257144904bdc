#!/usr/bin/env python3
"""MV-MR's ablations, k-NN after the same steps: its three terms, alone, in pairs and together, and
its descriptors one by one.

    python tests/bench_mvmr.py --arch resnet5m --seeds 0 1 2 --data_path DATA \
        --output_dir runs/mvmr -- --epochs 3

Trains by `--preset mvmr_small` with the flags behind `--` and prints a Markdown table. Kinakh et
al. have theirs in Tables 5 and 6. The command may be given again, and goes on.
"""

import argparse
import itertools

from comparison import compare

# What leaves a term out.
TERMS = {
    "L1": ["--invariance_weight", "0", "--variance_weight", "0"],
    "L2": ["--dependence_weight", "0"],
    "L3": ["--representation_weight", "0"],
}
DESCRIPTORS = ["pixels", "augmented", "local_std", "hog", "scattering"]


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--arch", default="resnet5m")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--output_dir", default="runs/mvmr")
    parser.add_argument("flags", nargs="*", help="of train.py, behind --")
    args = parser.parse_args()
    ways = {}
    for kept in (terms for n in (1, 2, 3) for terms in itertools.combinations(TERMS, n)):
        left_out = [flags for term, flags in TERMS.items() if term not in kept]
        ways[" + ".join(kept)] = list(itertools.chain(*left_out))
    ways |= {f"all terms, {name} alone": ["--descriptors", name] for name in DESCRIPTORS}
    common = ["train.py", "--preset", "mvmr_small"]
    common += ["--arch", args.arch, "--data_path", args.data_path]
    ways = {name: common + way for name, way in ways.items()}
    compare(ways, args.seeds, args.output_dir, *args.flags)


if __name__ == "__main__":
    main()

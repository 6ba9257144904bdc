#!/usr/bin/env python3
"""The papers' tables at any size, on a CPU or a GPU: k-NN, and accuracy with few labels.

    python tests/bench_papers.py --table methods --arch resnet5m --epochs 12 --seeds 0 1 2 \
        --label_fraction 0.1 0.3 --data_path DATA --output_dir runs/methods

| table | what differs | source |
|---|---|---|
| methods | --method | LowDINO, tables 1 and 3 |
| teachers | what DINO's teacher is, with and without local views | DINO, figure 6 |
| batches | batches of 32 to 256 images, DINO | DINO, table 9 |
| balance | SSLight's --alpha, for DINO, SwAV and MoCo v2 | SSLight, its tables |
| scales | the part of the image that local and global views show | SSLight, its two plots |
| terms | MV-MR's terms | MV-MR, table 5 |
| descriptors | MV-MR's descriptors | MV-MR, table 6 |
| projectors | MV-MR's projector | MV-MR, table 8 |
| distillation | distill.py's objectives, with --teacher | LowDINO, figure 6 |

All rows of a table cost the same passes of images through the network, as nearly as whole epochs
allow: a forward pass counts 1, a backward pass 2. --epochs are those of a method that sees two
views and has no teacher, 6 passes an image; a row of other passes has more or fewer in proportion.
Local views are counted as if they had the side of the global ones; give --local_crops_size that
side. Flags behind `--` are those of every training, such as `--amp none`. Prints a Markdown table.
The command may be given again, and goes on.
"""

import argparse
import itertools
from pathlib import Path

from comparison import Probe, compare

# Passes an image by the default recipe: 3 for each view of the student, 1 for each of a teacher.
PASSES = dict(dino=8, emp=12, mvmr=6, byol=8, moco=4, swav=6, simclr=6, vicreg=6, barlow=6)

LOCAL = 4  # local views of a row that has them; of the side of the global ones


def epochs(passes: int, of_two_views: int) -> list[str]:
    return ["--epochs", str(max(round(6 * of_two_views / passes), 1))]


def methods(args: argparse.Namespace) -> dict[str, list[str]]:
    ways = {
        f"`{name}`": ["--method", name, *epochs(passes, args.epochs)]
        for name, passes in PASSES.items()
    }
    return ways | {"`dino`, Muon": ["--optimizer", "muon", *ways["`dino`"]]}


def local_views(low: float, high: float, side: int) -> list[str]:
    flags = f"--local_crops_number {LOCAL} --local_crops_scale {low} {high} --local_crops_size"
    return [*flags.split(), str(side)]


def teachers(args: argparse.Namespace) -> dict[str, list[str]]:
    updates = {"EMA": "momentum", "student of the epoch before": "epoch"}
    updates["student of the step before"] = "step"
    crops = {
        "two views": epochs(8, args.epochs),
        f"and {LOCAL} local ones": [
            *epochs(8 + 3 * LOCAL, args.epochs),
            *local_views(0.05, 0.2, args.local_crops_size),
        ],
    }
    return {
        f"{teacher}, {views}": ["--preset", "small", "--teacher_update", update, *flags]
        for teacher, update in updates.items()
        for views, flags in crops.items()
    }


def batches(args: argparse.Namespace) -> dict[str, list[str]]:
    flags = ["--preset", "small", *epochs(8, args.epochs)]
    sizes = (32, 64, 128, 256)
    return {f"batches of {n}": [*flags, "--batch_size_per_gpu", str(n)] for n in sizes}


def balance(args: argparse.Namespace) -> dict[str, list[str]]:
    views = ["--global_crops_scale", "0.3", "1", *local_views(0.05, 0.3, args.local_crops_size)]
    passes = {"dino": 8 + 3 * LOCAL, "swav": 6 + 3 * LOCAL, "moco": 4 + 3 * LOCAL}
    kinds = {"mean over pairs": ["--alpha", "none"], "balanced": ["--alpha", str(args.alpha)]}
    return {
        f"`{method}`, {kind}": ["--method", method, *views, *flags, *epochs(n, args.epochs)]
        for method, n in passes.items()
        for kind, flags in kinds.items()
    }


def scales(args: argparse.Namespace) -> dict[str, list[str]]:
    """Local views of 0.05 to s of the image beside global ones from 0.3, and both split at s."""
    common = ["--method", "dino", *epochs(8 + 3 * LOCAL, args.epochs)]
    ways = {}
    for low, s in itertools.chain(
        ((0.3, s) for s in (0.1, 0.2, 0.3, 0.5, 1.0)), ((s, s) for s in (0.1, 0.2, 0.5))
    ):
        views = [*local_views(0.05, s, args.local_crops_size), "--global_crops_scale", str(low)]
        ways[f"local to {s:g}, global from {low:g}"] = [*common, *views, "1"]
    return ways


MVMR = ["--preset", "mvmr_small"]


def terms(args: argparse.Namespace) -> dict[str, list[str]]:
    left_out = {
        "L1": ["--invariance_weight", "0", "--variance_weight", "0"],
        "L2": ["--dependence_weight", "0"],
        "L3": ["--representation_weight", "0"],
    }
    ways = {}
    for kept in (names for n in (1, 2, 3) for names in itertools.combinations(left_out, n)):
        flags = itertools.chain(*(left_out[name] for name in left_out if name not in kept))
        ways[" + ".join(kept)] = [*MVMR, *epochs(6, args.epochs), *flags]
    return ways


def descriptors(args: argparse.Namespace) -> dict[str, list[str]]:
    names = ["pixels", "augmented", "local_std", "hog", "scattering"]
    ways = {name: [name] for name in names} | {"all five": names}
    common = [*MVMR, *epochs(6, args.epochs), "--descriptors"]
    return {name: [*common, *chosen] for name, chosen in ways.items()}


def projectors(args: argparse.Namespace) -> dict[str, list[str]]:
    shapes = [[512] * 3, [2048] * 3, [8192] * 3, [8192] * 2, [8192]]
    ways = {"-".join(map(str, shape)): [*map(str, shape)] for shape in shapes}
    common = [*MVMR, *epochs(6, args.epochs), "--projector"]
    return {name: [*common, *widths] for name, widths in ways.items()}


def distillation(args: argparse.Namespace) -> dict[str, list[str]]:
    """The teacher's features are cached, so that it costs nothing. One whose file has a classifier,
    as eval_linear.py --from_scratch writes it, is tried by its softened logits too."""
    cache = str(Path(args.output_dir) / "teacher.npy")
    objectives = {name: [name] for name in ("kd", "simkd", "similarity", "mvmr")}
    if args.teacher_head:
        objectives["kd, the classifier's logits"] = ["kd", "--teacher_head", "file"]
    ways = {"no teacher": ["train.py", *epochs(8, args.epochs)]}
    common = ["distill.py", "--teacher", args.teacher, "--cache_teacher", cache, "--objective"]
    for name, flags in objectives.items():  # of two views; mvmr's student sees the image too
        ways[name] = [*common, *flags, *epochs(9 if name == "mvmr" else 6, args.epochs)]
    return {name: [*way, "--preset", "small"] for name, way in ways.items()}


TABLES = {
    table.__name__: table
    for table in (methods, teachers, batches, balance, scales)
    + (terms, descriptors, projectors, distillation)
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--table", choices=TABLES, required=True)
    add("--arch", default="resnet5m")
    add("--rows", nargs="+", type=int, metavar="N", help="of the table, from 0; default: all")
    add("--epochs", type=int, default=12, help="of two views and no teacher")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    help = "for a linear classifier, or for --finetune; default: k-NN alone"
    add("--label_fraction", nargs="+", default=[], help=help)
    help = "the whole network, in place of the linear classifier; beside it one from scratch"
    add("--finetune", action="store_true", help=help)
    add("--finetune_epochs", type=int, default=30, help="of --finetune")
    add("--local_crops_size", type=int, default=32)
    add("--alpha", type=float, default=0.4, help="of the table balance")
    add("--teacher", help="of the table distillation, as distill.py takes it")
    add("--teacher_head", action="store_true", help="its file has a classifier")
    add("--data_path", default="demo")
    add("--device", default="auto")
    add("--output_dir", default="runs/papers")
    add("flags", nargs="*", help="of every training, behind --")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if args.table == "distillation" and not args.teacher:
        parser.error("the table distillation needs --teacher")
    ways = list(TABLES[args.table](args).items())
    chosen = dict(ways if args.rows is None else [ways[n] for n in args.rows])
    common = ["--arch", args.arch, "--data_path", args.data_path, "--device", args.device]
    ways = {
        name: [*([] if way[0].endswith(".py") else ["train.py"]), *way, *common]
        for name, way in chosen.items()
    }
    more = ["--epochs", str(args.finetune_epochs)] if args.finetune else []
    probe = Probe(args.label_fraction, args.finetune, more)
    compare(ways, args.seeds, args.output_dir, probe, *args.flags)


if __name__ == "__main__":
    main()

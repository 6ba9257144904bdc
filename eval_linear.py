#!/usr/bin/env python3
"""Accuracy of a linear classifier on frozen features, or of the fine-tuned network, at fractions of
the labels.

    python eval_linear.py output/backbone.pth --data_path /path/with/train/and/val
    python eval_linear.py pixels resnet5m output/backbone.pth --label_fraction 0.01 0.1 1
    python eval_linear.py output/backbone.pth --finetune --label_fraction 0.2
    python eval_linear.py mobilevit_s --from_scratch --label_fraction 0.2    the supervised rival
    python eval_linear.py output/backbone.pth --task detection --data_path demo_scenes

A MODEL is a backbone.pth of train.py, a state dict of DINO's or DINOv2's ViT, an architecture's
name (random weights), ARCH=FILE for a plain state dict such as timm's or torchvision's, or pixels.
Several models give one table.
"""

import argparse
import json

from lowdino import classification, detection, distributed, flags, linear, segmentation, settings
from lowdino.features import open_network

# Each offers FLAGS, check, defaults, protocol, measure and columns.
TASKS = {"classification": classification, "segmentation": segmentation, "detection": detection}


def get_parser() -> argparse.ArgumentParser:
    parser = flags.parser_of(__doc__)
    help = "backbone.pth, architecture, ARCH=FILE or pixels"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=help)
    help = "instead of a MODEL: an .npz of features, as eval_knn.py --features writes it"
    parser.add_argument("--from_features", metavar="FILE", help=help)
    help = (
        "classification of images; segmentation of a folder with images/ and masks/ of class "
        "indices (255: ignored), with or without train/ and val/, of voc2012 or demo_scenes; "
        "detection in a folder in COCO's form, voc2007 or demo_scenes"
    )
    parser.add_argument("--task", choices=TASKS, default="classification", help=help)
    title = "what is trained (default: a linear classifier on features computed once)"
    add_training_flags(parser.add_argument_group(title).add_argument)
    add = parser.add_argument_group("--task detection").add_argument
    help = "mask_rcnn needs masks, as in demo_scenes and most folders in COCO's form"
    add("--detector", choices=detection.NAMES, default="faster_rcnn", help=help)
    help = "training steps, the same at every --label_fraction; default: 300"
    add("--steps", type=int, help=help)
    add_label_flags(parser.add_argument_group("labels").add_argument)
    add = parser.add_argument_group("data and output").add_argument
    settings.add_evaluation_flags(add)
    help = (
        "input of segmentation's linear layer: the last feature map, or all maps of the "
        "backbone's pyramid, resized to the finest"
    )
    add("--maps", choices=["last", "pyramid"], default="last", help=help)
    add("--nb_knn", type=int, default=20, help="number of neighbours of the k-NN")
    help = "folder for table.md, table.json, lists of the labelled images, and trained networks"
    add("--output_dir", default="output_linear", help=help)
    return parser


def add_training_flags(add) -> None:
    help = "DINO's protocol: new crops and flips in every epoch"
    add("--augment", action="store_true", help=help)
    add("--finetune", action="store_true", help="train the whole network")
    add("--from_scratch", action="store_true", help="train the whole network from random weights")
    help = "solver of the linear classifier; lbfgs: logistic regression to its optimum"
    add("--solver", choices=["sgd", "lbfgs"], default="sgd", help=help)
    help = (
        "learning rates to choose from, per 256 images for the linear classifier; default: a grid "
        "for it, 0.3 for segmentation's linear layer, 0.001 for networks"
    )
    add("--lr", type=float, nargs="+", help=help)
    help = (
        "weight decays to choose from; default: a grid for the linear classifier, 0 for "
        "segmentation's linear layer, 0.05 for networks"
    )
    add("--weight_decay", type=float, nargs="+", help=help)
    help = (
        "learning rate of a block divided by that of the block above; default: 0.75 with "
        "--finetune, else 1"
    )
    add("--layer_decay", type=float, help=help)
    add("--epochs", type=int, help="default: 100; segmentation: 20")
    help = "batch size per process; default: 256; segmentation: 16; detection: 8"
    add("--batch_size_per_gpu", type=int, help=help)


def add_label_flags(add) -> None:
    help = "fractions of each class's training labels; segmentation, detection: of the pictures"
    add("--label_fraction", type=float, nargs="+", default=[1.0], help=help)
    help = (
        "seeds of the choice of labels and of the training; several give mean and standard "
        "deviation; the first is --test_fraction's too"
    )
    add("--seeds", type=int, nargs="+", default=[0], help=help)
    help = "fraction of the training labels in use that is held out to choose settings by"
    add("--val_fraction", type=float, default=0.2, help=help)


def check(args: argparse.Namespace) -> str | None:
    """The first error in the flags, in one sentence, or None."""
    if error := foreign_flag(args) or TASKS[args.task].check(args):
        return error
    for name in ("lr", "weight_decay"):
        values = getattr(args, name) or []
        # AdamW's first step is ten times the rate, and must be a float32.
        if not all(0 <= value <= 1e30 for value in values):
            return f"--{name} must be 0 or more, 1e30 at most, not {values}"
    if not all(0 < fraction <= 1 for fraction in args.label_fraction):
        return f"--label_fraction must lie above 0, up to 1, not {args.label_fraction}"
    if not all(0 <= seed < 2**63 for seed in args.seeds):
        return f"--seeds must lie between 0 and 2^63, not {args.seeds}"
    return flags.out_of_range(args, at_least_one=("epochs", "batch_size_per_gpu"))


def foreign_flag(args: argparse.Namespace) -> str | None:
    """The first flag of another task that is given, in one sentence, or None."""
    for name, default in vars(get_parser().parse_args([])).items():
        owners = [task for task, module in TASKS.items() if name in module.FLAGS]
        if owners and args.task not in owners and getattr(args, name) != default:
            return f"--{name} goes with --task {' or '.join(owners)}, not with {args.task}"
    return None


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with the task's defaults for those that are not given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | TASKS[args.task].defaults(args) | given)


def table(args: argparse.Namespace, rows: list[dict]) -> str:
    """The rows in Markdown."""
    columns = {"model": lambda row: row["model"]} | TASKS[args.task].columns(args)
    lines = [[*columns], ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def open_subjects(args: argparse.Namespace, ranks: distributed.Ranks) -> list[linear.Subject]:
    """All models, at the first seed's random weights where they have no others.

    A training of the whole network starts from random weights of every seed, so the title of its
    row names none.
    """
    if args.from_features:
        return [linear.Subject(args, ranks, 1, args.from_features, args.from_features)]
    every_seed = linear.trains_network(args) or args.task == "detection"
    subjects = []
    for number, name in enumerate(args.models, start=1):
        title, backbone = open_network(name, args.seeds[0])
        title = title.removesuffix(f", seed {args.seeds[0]}") if every_seed else title
        subjects.append(linear.Subject(args, ranks, number, name, title, backbone))
    return subjects


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    output, task = settings.make_output_folder(args.output_dir), TASKS[args.task]
    args = with_defaults(args)
    if ranks.first:
        print(f"protocol: {task.protocol(args)}", flush=True)
    rows = []
    for subject in open_subjects(args, ranks):  # all are opened before the first is measured
        rows.append(task.measure(subject))
        if ranks.first:  # after every model: a stopped run keeps its rows
            content = {"protocol": task.protocol(args), "settings": vars(args), "rows": rows}
            (output / "table.md").write_text(table(args, rows))
            (output / "table.json").write_text(json.dumps(content, indent=2) + "\n")
    if ranks.first:
        print(f"\n{table(args, rows)}\nalso in {output}/table.md and {output}/table.json")


def main() -> None:
    args = get_parser().parse_args()
    distributed.launch("eval_linear.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Accuracy of a linear classifier on frozen features, or of the whole network fine-tuned, at
fractions of the labels.

    python eval_linear.py output/backbone.pth --data_path /path/with/train/and/val
    python eval_linear.py pixels resnet5m output/backbone.pth --label_fraction 0.01 0.1 1
    python eval_linear.py output/backbone.pth --finetune --label_fraction 0.2
    python eval_linear.py mobilevit_s --from_scratch --label_fraction 0.2    the supervised rival
    python eval_linear.py output/backbone.pth --task detection --data_path demo_scenes

A MODEL is a backbone.pth of train.py, a state dict of DINO's or DINOv2's ViT, an architecture's
name (at random weights), ARCH=FILE for a plain state dict such as timm's or torchvision's, or
pixels. Several give one table.
"""

import argparse
import json

from torch import nn

from lowdino import classification, detection, distributed, flags, segmentation, settings
from lowdino.features import open_network

# Each offers FLAGS, check, settle, protocol, measure, headings and cells.
TASKS = {"classification": classification, "segmentation": segmentation, "detection": detection}


def get_parser() -> argparse.ArgumentParser:
    parser = flags.parser_of(__doc__)
    help = "backbone.pth, architecture, ARCH=FILE or pixels"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=help)
    help = "probe an .npz of features, as eval_knn.py --features writes, instead"
    parser.add_argument("--from_features", metavar="FILE", help=help)
    help = (
        "what the labels name: images; pixels, of a folder with images/ and masks/ of class "
        "indices (255: ignored), perhaps in train/ and val/, of voc2012 or demo_scenes; or boxes, "
        "of a folder in COCO's form, voc2007 or demo_scenes"
    )
    parser.add_argument("--task", choices=TASKS, default="classification", help=help)
    title = "what is trained (default: a linear classifier on features computed once)"
    add_training_flags(parser.add_argument_group(title).add_argument)
    add_detection_flags(parser.add_argument_group("--task detection").add_argument)
    add_label_flags(parser.add_argument_group("labels").add_argument)
    add = parser.add_argument_group("data and output").add_argument
    settings.add_evaluation_flags(add)
    help = (
        "of --task segmentation, what the linear layer sees: the last feature map, or all maps of "
        "the backbone's pyramid, resized to the finest"
    )
    add("--maps", choices=["last", "pyramid"], default="last", help=help)
    add("--nb_knn", type=int, default=20, help="neighbours of the k-NN that is printed beside")
    help = (
        "for table.md, table.json, the images chosen at each fraction, and networks that were "
        "trained whole"
    )
    add("--output_dir", default="output_linear", help=help)
    return parser


def add_training_flags(add) -> None:
    help = "the original's protocol: crops and flips anew in every epoch"
    add("--augment", action="store_true", help=help)
    add("--finetune", action="store_true", help="train the whole network")
    add("--from_scratch", action="store_true", help="train the whole network from random weights")
    help = "of the probe: lbfgs is logistic regression to its optimum"
    add("--solver", choices=["sgd", "lbfgs"], default="sgd", help=help)
    help = (
        "learning rates to choose from, of the probe per 256 images; default: a grid for the "
        "probe, 0.3 for segmentation's linear layer, 0.001 for the whole network"
    )
    add("--lr", type=float, nargs="+", help=help)
    help = (
        "to choose from; default: a grid for the probe, 0 for segmentation's linear layer, 0.05 "
        "for the whole network"
    )
    add("--weight_decay", type=float, nargs="+", help=help)
    help = (
        "learning rate of a block over that of the block above; default: 0.75 with --finetune, "
        "else 1, as in --task detection; random weights have no such order"
    )
    add("--layer_decay", type=float, help=help)
    help = "default: 100; 20 of --task segmentation"
    add("--epochs", type=int, help=help)
    help = "images a process and step; default: 256; 16 of --task segmentation, 8 of detection"
    add("--batch_size_per_gpu", type=int, help=help)


def add_detection_flags(add) -> None:
    help = "mask_rcnn needs masks, as demo_scenes and most folders in COCO's form have them"
    add("--detector", choices=detection.NAMES, default="faster_rcnn", help=help)
    help = "of the training, the same at every --label_fraction; default: 300"
    add("--steps", type=int, help=help)


def add_label_flags(add) -> None:
    help = "fractions of each class's training labels to use; of the dense tasks, of the pictures"
    add("--label_fraction", type=float, nargs="+", default=[1.0], help=help)
    help = (
        "of the choice of labels and of the training; several give mean and standard deviation; "
        "the first is that of --test_fraction too"
    )
    add("--seeds", type=int, nargs="+", default=[0], help=help)
    help = "of the training labels in use, held out to choose settings by"
    add("--val_fraction", type=float, default=0.2, help=help)


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    if wrong := foreign_flag(args) or TASKS[args.task].check(args):
        return wrong
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
    """A flag of other tasks that differs from its default, in one sentence, or None."""
    parser = get_parser()
    for name, value in vars(args).items():
        owners = [task for task, module in TASKS.items() if name in module.FLAGS]
        if owners and args.task not in owners and value != parser.get_default(name):
            return f"--{name} goes with --task {' or '.join(owners)}, not with {args.task}"
    return None


def table(args: argparse.Namespace, rows: list[dict]) -> str:
    """The rows in Markdown."""
    task = TASKS[args.task]
    heads = ["model", *task.headings(args)]
    lines = [heads, ["---"] * len(heads)]
    lines += [[row["model"], *task.cells(args, row)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def open_model(args: argparse.Namespace, name: str) -> tuple[str, nn.Module]:
    """A model in words and as a module, at the first seed's random weights if it has no others.

    Networks that are trained whole start from random weights of every seed, so none is named.
    """
    title, model = open_network(name, args.seeds[0])
    if args.finetune or args.from_scratch or args.task == "detection":
        title = title.removesuffix(f", seed {args.seeds[0]}")
    return title, model


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    output = settings.make_output_folder(args.output_dir)
    task = TASKS[args.task]
    task.settle(args)
    if ranks.first:
        print(f"protocol: {task.protocol(args)}", flush=True)
    # All models first: a wrong one is said before anything is computed.
    opened = [(name, open_model(args, name)) for name in args.models]
    rows = []
    for number, (name, model) in enumerate(opened or [(args.from_features, None)], start=1):
        rows.append(task.measure(args, name, model, number, ranks))
        if ranks.first:  # after every model: a stopped run keeps what it has
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

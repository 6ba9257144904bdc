#!/usr/bin/env python3
"""Accuracy of a linear classifier on frozen features, or of the fine-tuned network, at fractions of
the labels.

    python eval_linear.py output/backbone.pth --data_path /path/with/train/and/val
    python eval_linear.py pixels resnet5m output/backbone.pth --label_fraction 0.01 0.1 1
    python eval_linear.py output/backbone.pth --finetune --label_fraction 0.2
    python eval_linear.py mobilevit_s --from_scratch --label_fraction 0.2    the supervised rival
    python eval_linear.py output/backbone.pth --task detection --data_path demo_scenes

A MODEL is a backbone.pth of train.py, a state dict of DINO's or DINOv2's ViT, an architecture's
name (random weights), ARCH=FILE for a plain state dict such as timm's or torchvision's, or a floor:
pixels, or patches for a dictionary of patches. Several models give one table.
"""

import json

from lowdino import classification, detection, distributed, linear, segmentation, settings
from lowdino.features import open_network
from lowdino.methods import Flag
from lowdino.settings import Settings

# Each offers FLAGS, check, defaults, protocol, measure and columns.
TASKS = {"classification": classification, "segmentation": segmentation, "detection": detection}

LAYER_DECAY = "learning rate of a block over that above; default: 0.75 with --finetune, else 1"
FRACTIONS = "fractions of each class's training labels; of the pictures with boxes or masks"
SEEDS = "seeds of the choice of labels and of the training; the first is --test_fraction's too"
TASK = (
    "classification of images; segmentation of a folder with images/ and masks/ of class indices "
    "(255: ignored), with or without train/ and val/, or of demo_scenes; detection in a folder in "
    "COCO's form, or of demo_scenes"
)
FEATURES = "instead of a MODEL: an .npz that eval_knn.py --features wrote"
MAPS = "input of segmentation's linear layer: the last map, or all maps resized to the finest"
FLAGS = {
    "what is trained (default: a linear classifier on features computed once)": (
        Flag("task", TASK, default="classification", choices=(*TASKS,)),
        Flag("from_features", FEATURES, metavar="FILE"),
        Flag("augment", "DINO's protocol: new crops and flips in every epoch", bool),
        Flag("finetune", "train the whole network", bool),
        Flag("from_scratch", "train the whole network from random weights", bool),
        Flag(
            "solver",
            "lbfgs: logistic regression to its optimum",
            default="sgd",
            choices=("sgd", "lbfgs"),
        ),
        Flag("lr", "learning rates to choose from; default: the task's", float, nargs="+"),
        Flag("weight_decay", "weight decays to choose from; default: the task's", float, nargs="+"),
        Flag("layer_decay", LAYER_DECAY, float),
        Flag("epochs", "default: 100; segmentation: 20", int, ">= 1"),
        Flag("batch_size_per_gpu", "per process; default: 256, 16 or 8, by task", int, ">= 1"),
        Flag("maps", MAPS, str, "", "last", ("last", "pyramid")),
        Flag("steps", "steps of a detector, whatever --label_fraction; default: 300", int, ">= 1"),
    ),
    "labels": (
        Flag("label_fraction", FRACTIONS, float, "> 0", [1.0], nargs="+"),
        Flag("seeds", SEEDS, int, default=[0], nargs="+"),
        Flag("val_fraction", "fraction of the labels to choose settings by", float, default=0.2),
    ),
    "data and output": (
        *settings.EVALUATION_FLAGS,
        Flag("nb_knn", "number of neighbours of the k-NN", int, ">= 1", 20),
        Flag("output_dir", "folder of the table and of trained networks", default="output_linear"),
    ),
}


def get_parser() -> settings.Parser:
    help = "backbone.pth, architecture, ARCH=FILE, pixels or patches"
    models = Flag("models", help, default=(), nargs="*")
    return settings.Parser("eval_linear.py", __doc__, FLAGS, [models])


def check(args: Settings) -> str | None:
    """The first error in the flags, in one sentence, or None."""
    for name in sorted(args.typed):
        owners = [task for task, module in TASKS.items() if name in module.FLAGS]
        if owners and args.task not in owners:
            return f"--{name} goes with --task {' or '.join(owners)}, not with {args.task}"
    if error := TASKS[args.task].check(args):
        return error
    for name in ("lr", "weight_decay"):
        values = getattr(args, name) or []
        # AdamW's first step is ten times the rate, and must be a float32.
        if not all(0 <= value <= 1e30 for value in values):
            return f"--{name} must be 0 or more, 1e30 at most, not {values}"
    if max(args.label_fraction) > 1:
        return f"--label_fraction must lie above 0, up to 1, not {args.label_fraction}"
    if not all(0 <= seed < 2**63 for seed in args.seeds):
        return f"--seeds must lie between 0 and 2^63, not {args.seeds}"
    return settings.check_data(args)


def with_defaults(args: Settings) -> Settings:
    """The flags with the task's defaults for those that are not given."""
    defaults = TASKS[args.task].defaults(args).items()
    return args.replace(**{name: v for name, v in defaults if getattr(args, name) is None})


def table(args: Settings, rows: list[dict]) -> str:
    """The rows in Markdown."""
    columns = {"model": lambda row: row["model"]} | TASKS[args.task].columns(args)
    lines = [[*columns], ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def open_subjects(args: Settings, ranks: distributed.Ranks) -> list[linear.Subject]:
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


def run(args: Settings, ranks: distributed.Ranks) -> None:
    output, task = settings.make_output_folder(args.output_dir), TASKS[args.task]
    args = with_defaults(args)
    if ranks.first:
        print(f"protocol: {task.protocol(args)}", flush=True)
    rows = []
    for subject in open_subjects(args, ranks):  # all are opened before the first is measured
        rows.append(task.measure(subject))
        if ranks.first:  # after every model: a stopped run keeps its rows
            content = {"protocol": task.protocol(args), "settings": args.values, "rows": rows}
            (output / "table.md").write_text(table(args, rows))
            (output / "table.json").write_text(json.dumps(content, indent=2) + "\n")
    if ranks.first:
        print(f"\n{table(args, rows)}\nalso in {output}/table.md and {output}/table.json")


def main() -> None:
    distributed.launch("eval_linear.py", lambda: get_parser().parse(None, check), run)


if __name__ == "__main__":
    main()

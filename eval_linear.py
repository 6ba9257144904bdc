#!/usr/bin/env python3
"""Accuracy of a linear classifier on frozen features, or of the whole network fine-tuned, at
fractions of the labels.

    python eval_linear.py output/backbone.pth --data_path /path/with/train/and/val
    python eval_linear.py pixels resnet5m output/backbone.pth --label_fraction 0.01 0.1 1
    python eval_linear.py output/backbone.pth --finetune --label_fraction 0.2
    python eval_linear.py mobilevit_s --from_scratch --label_fraction 0.2    the supervised rival

A MODEL is a backbone.pth of train.py, a state dict of DINO's or DINOv2's ViT, an architecture's
name (at random weights), ARCH=FILE for a plain state dict such as timm's or torchvision's, or
pixels. Several give one table.
"""

import argparse
import json
import math
import statistics
import time
from functools import partial

import torch
from torch import nn

import lowdino
from lowdino import distributed, evaluate, flags, frozen, linear, probe, settings
from lowdino.evaluate import Features


def get_parser() -> argparse.ArgumentParser:
    parser = flags.parser_of(__doc__)
    help = "backbone.pth, architecture, ARCH=FILE or pixels"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=help)
    help = "probe an .npz of features, as eval_knn.py --features writes, instead"
    parser.add_argument("--from_features", metavar="FILE", help=help)
    title = "what is trained (default: a linear classifier on features computed once)"
    add_training_flags(parser.add_argument_group(title).add_argument)
    add_label_flags(parser.add_argument_group("labels").add_argument)
    add = parser.add_argument_group("data and output").add_argument
    settings.add_evaluation_flags(add)
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
        "probe, 0.001 for the whole network"
    )
    add("--lr", type=float, nargs="+", help=help)
    help = "to choose from; default: a grid for the probe, 0.05 for the network"
    add("--weight_decay", type=float, nargs="+", help=help)
    help = (
        "learning rate of a block over that of the block above; default: 0.75 with --finetune, 1 "
        "with --from_scratch, where no block knows more than another"
    )
    add("--layer_decay", type=float, help=help)
    add("--epochs", type=int, default=100)
    add("--batch_size_per_gpu", type=int, default=256)


def add_label_flags(add) -> None:
    help = "fractions of each class's training labels to use"
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
    if wrong := check_training(args) or settings.check_evaluation(args):
        return wrong
    for name in ("lr", "weight_decay"):
        values = getattr(args, name) or []
        if not all(0 <= value < math.inf for value in values):
            return f"--{name} must be 0 or more, not {values}"
    if not all(0 < fraction <= 1 for fraction in args.label_fraction):
        return f"--label_fraction must lie above 0, up to 1, not {args.label_fraction}"
    if not all(0 <= seed < 2**63 for seed in args.seeds):
        return f"--seeds must lie between 0 and 2^63, not {args.seeds}"
    if not 0 < args.val_fraction < 1:
        return f"--val_fraction must lie between 0 and 1, not {args.val_fraction}"
    return flags.out_of_range(args, at_least_one=("epochs", "batch_size_per_gpu", "nb_knn"))


def check_training(args: argparse.Namespace) -> str | None:
    """As `check`, of what is trained."""
    whole, views = args.finetune or args.from_scratch, "--augment, --finetune and --from_scratch"
    if bool(args.models) == bool(args.from_features):
        return "give one MODEL or more, or --from_features FILE"
    if args.augment + args.finetune + args.from_scratch > 1:
        return f"{views} are three ways of training; give one"
    if args.from_features and (args.augment or whole):
        return f"{views} need the images, which --from_features does without"
    if args.solver == "lbfgs" and (args.augment or whole):
        return (
            "--solver lbfgs needs features that stay the same: not with --augment, --finetune or "
            "--from_scratch"
        )
    if args.solver == "lbfgs" and args.lr:
        return "--solver lbfgs has no learning rate; leave --lr out"
    if whole and len(args.lr or [0]) * len(args.weight_decay or [0]) > 1:
        return "the whole network is trained with one --lr and one --weight_decay"
    if whole and (args.pool != "default" or "pixels" in args.models):
        return "the whole network is trained as it is: no --pool, no pixels"
    if "pixels" in args.models and (args.augment or args.pool != "default"):
        return "--augment and --pool need backbones; pixels has none"
    if args.layer_decay is not None and not (whole and 0 < args.layer_decay <= 1):
        return "--layer_decay goes with --finetune or --from_scratch and lies above 0, up to 1"
    if args.from_scratch and not all(model in lowdino.ARCHS for model in args.models):
        return f"--from_scratch takes names of architectures: {', '.join(lowdino.ARCHS)}"
    return None


def settle(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on what is trained."""
    if args.finetune or args.from_scratch:
        lr, weight_decay = [1e-3], [0.05]
    elif args.solver == "lbfgs":
        lr, weight_decay = [0.0], linear.LBFGS_WEIGHT_DECAY
    else:
        lr, weight_decay = linear.PROBE_LR, linear.PROBE_WEIGHT_DECAY
    args.lr, args.weight_decay = args.lr or lr, args.weight_decay or weight_decay
    args.layer_decay = args.layer_decay or (0.75 if args.finetune else 1.0)


def protocol(args: argparse.Namespace) -> str:
    """What was done, in a sentence for people who compare."""
    if args.finetune or args.from_scratch:
        return (
            f"whole network {'from random weights' if args.from_scratch else 'fine-tuned'}: "
            f"AdamW, learning rate {args.lr[0]:g}, x {args.layer_decay:g} a block downwards, "
            f"weight decay {args.weight_decay[0]:g}, {args.epochs} epochs of crops and flips; the "
            "last epoch"
        )
    sgd, grid = args.solver == "sgd", f"{len(args.weight_decay)} weight decays"
    if sgd:
        grid = f"{len(args.lr)} learning rates x {grid}"
    if len(args.lr) * len(args.weight_decay) > 1:
        grid += (
            f", chosen by squared error of probabilities on {args.val_fraction:g} of the training "
            "labels in use"
        )
        grid += " after a training on a sixteenth of the batch; then" if sgd else ", then"
        grid += " fitted to all of them"
    views = "features of crops and flips" if args.augment else "features"
    solver = f"SGD, {args.epochs} epochs" if sgd else "logistic regression to its optimum"
    return f"linear classifier on {views}, half-whitened by all training images: {solver}; {grid}"


# ---------------------------------------------------------------------------------------------
# A row of the table
# ---------------------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace,
    name: str,
    opened: tuple[str, nn.Module] | None,
    number: int,
    ranks: distributed.Ranks,
) -> dict:
    """All figures of one model: row `number` of the table.

    Args:
        opened: what `frozen.open_network` gave for `name`; None where that is a file of features.
    """
    subject = None
    if opened:
        subject, row, train, test = features_of_images(args, *opened, ranks)
        if ranks.first and number == 1 and subject.source.notes:
            print("\n".join(subject.source.notes), flush=True)
    else:
        title, train, test = evaluate.load_features(name, ranks.device)
        row = {"model": title}
    classes, last = int(train.labels.max()) + 1, int(test.labels.max())
    if last >= classes:
        raise linear.UserError(
            f"the test images have class {last}, the training images none above {classes - 1}"
        )
    row["knn"] = evaluate.knn_accuracy(train, test, args.nb_knn, classes)
    if ranks.first:
        k = min(args.nb_knn, len(train.labels))
        print(f"  k-NN (k={k}) top-1 {row['knn']:.4f}", flush=True)
    if args.finetune or args.from_scratch:
        learn = partial(linear.learn_whole, args, subject, name, number)
    else:
        scaler = probe.Scaler(train.features)
        inputs = linear.ProbeInputs(scaler, scaler(train.features), train.labels, classes)
        learn = partial(linear.learn_probe, args, subject, inputs, scaler(test.features))
    row["trained"] = linear.results(args, learn, train.labels, test.labels, ranks)
    return row


def features_of_images(
    args: argparse.Namespace, title: str, backbone: nn.Module, ranks: distributed.Ranks
) -> tuple[linear.Subject, dict, Features, Features]:
    """The images, the row so far, and training and test features of a network."""
    source, size, workers = settings.open_data(args, backbone, ranks)
    backbone = backbone.to(ranks.device, memory_format=torch.channels_last)
    row = {"model": title, "image_size": size, **linear.cost(backbone, size, ranks.device)}
    start = time.perf_counter()
    train, test = (
        frozen.features(backbone, images, size, ranks, workers=workers, pool=args.pool)
        for images in (source.train, source.test)
    )
    if ranks.first:
        seconds, width = time.perf_counter() - start, train.features.shape[1]
        print(
            f"{title}: {len(train.labels)} training and {len(test.labels)} test images, {size} px, "
            f"{width} features in {seconds:.0f} s",
            flush=True,
        )
    return linear.Subject(backbone, source, size, workers, ranks), row, train, test


def table(args: argparse.Namespace, rows: list[dict]) -> str:
    """The rows in Markdown, accuracies in percent."""
    costs = {
        "parameters (M)": lambda row: f"{row['parameters_M']:.2f}",
        "multiply-adds (M)": lambda row: f"{row['multiply_adds_M']:.1f}",
        "ms an image": lambda row: f"{row['ms_an_image']:.2f}",
        "pixels": lambda row: f"{row['image_size']}",
    }
    if args.from_features:
        costs = {}
    kind = "scratch" if args.from_scratch else "fine-tuned" if args.finetune else "linear"
    trained = [f"{kind} {100 * fraction:g} %" for fraction in args.label_fraction]
    heads = ["model", *costs, f"k-NN (k={args.nb_knn})", *trained]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        accuracies = [[row["knn"]], *(cell["top1"] for cell in row["trained"])]
        numbers = [cost(row) for cost in costs.values()] + [percent(a) for a in accuracies]
        lines.append([row["model"], *numbers])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(values: list[float]) -> str:
    """Mean in percent and, of several, the standard deviation."""
    text = f"{100 * statistics.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.2f}"


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    output = settings.make_output_folder(args.output_dir)
    settle(args)
    if ranks.first:
        print(f"protocol: {protocol(args)}", flush=True)
    # All models first: a wrong one is said before anything is computed.
    opened = [(name, frozen.open_network(name, args.seeds[0])) for name in args.models]
    rows = []
    for number, (name, model) in enumerate(opened or [(args.from_features, None)], start=1):
        rows.append(measure(args, name, model, number, ranks))
        if ranks.first:  # after every model: a stopped run keeps what it has
            content = {"protocol": protocol(args), "settings": vars(args), "rows": rows}
            (output / "table.md").write_text(table(args, rows))
            (output / "table.json").write_text(json.dumps(content, indent=2) + "\n")
    if ranks.first:
        print(f"\n{table(args, rows)}\nalso in {output}/table.md and {output}/table.json")


def main() -> None:
    args = get_parser().parse_args()
    distributed.launch("eval_linear.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

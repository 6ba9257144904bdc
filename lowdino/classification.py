"""Classes of images from a backbone's features, as `eval_linear.py` learns them by default.

    flags            what is trained
    (none)           20 linear classifiers as one, by SGD on features computed once; learning rate
                     and weight decay are chosen on a fifth of the training labels in use, after a
                     training on a sixteenth of the batch, by the squared error of the
                     probabilities; then that one is fitted to all of them
    --solver lbfgs   logistic regression to its optimum, its weight decay chosen likewise
    --augment        the same grid on features of crops and flips, anew in every epoch, as in DINO
    --finetune       the whole network, lower blocks with smaller learning rates; kept as
                     networkROW_FRACTION_seedSEED.pth, a backbone.pth with its classifier
    --from_scratch   the whole network from random weights, kept likewise: the supervised rival

--label_fraction takes as many of each class's images, the same for every model and among those of a
larger fraction. --pool default+mean puts the mean patch token beside the class token, as DINOv2 is
probed. Within a run, test labels choose nothing.
"""

import argparse
import time
from functools import partial

import torch
from torch import nn

from lowdino import distributed, evaluate, flags, linear, probe, settings
from lowdino.distributed import user_errors
from lowdino.evaluate import Features
from lowdino.features import compute_features

# The flags of eval_linear.py that this task has beside those of every task.
FLAGS = (
    "from_features",
    "augment",
    "finetune",
    "from_scratch",
    "solver",
    "layer_decay",
    "epochs",
    "val_fraction",
    "labels",
    "test_fraction",
    "pool",
    "nb_knn",
)


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of what is trained, in one sentence, or None."""
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
    if not 0 < args.val_fraction < 1:
        return f"--val_fraction must lie between 0 and 1, not {args.val_fraction}"
    wrong = linear.check_whole(args) or flags.out_of_range(args, at_least_one=("nb_knn",))
    return wrong or settings.check_evaluation(args)


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
    args.epochs, args.batch_size_per_gpu = args.epochs or 100, args.batch_size_per_gpu or 256


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


def measure(
    args: argparse.Namespace,
    name: str,
    opened: tuple[str, nn.Module] | None,
    number: int,
    ranks: distributed.Ranks,
) -> dict:
    """All figures of one model: row `number` of the table.

    Args:
        opened: what `open_network` gave for `name`; None where that is a file of features.
    """
    subject = None
    if opened:
        subject, row, train, test = features_of_images(args, *opened, ranks)
        if ranks.first and number == 1 and subject.source.notes:
            print("\n".join(subject.source.notes), flush=True)
    else:
        with user_errors():
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
        compute_features(backbone, images, size, ranks, args.batch_size_per_gpu, workers, args.pool)
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


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

COSTS = {
    "parameters (M)": lambda row: f"{row['parameters_M']:.2f}",
    "multiply-adds (M)": lambda row: f"{row['multiply_adds_M']:.1f}",
    "ms an image": lambda row: f"{row['ms_an_image']:.2f}",
    "pixels": lambda row: f"{row['image_size']}",
}


def headings(args: argparse.Namespace) -> list[str]:
    """The columns behind the model's name."""
    costs = [] if args.from_features else [*COSTS]
    way = linear.way_of(args)
    trained = [f"{way} {100 * fraction:g} %" for fraction in args.label_fraction]
    return [*costs, f"k-NN (k={args.nb_knn})", *trained]


def cells(args: argparse.Namespace, row: dict) -> list[str]:
    """What a row has in these columns, accuracies in percent."""
    costs = [] if args.from_features else [cost(row) for cost in COSTS.values()]
    accuracies = [[row["knn"]], *(cell["top1"] for cell in row["trained"])]
    return [*costs, *map(linear.percent, accuracies)]

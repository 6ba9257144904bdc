"""Classes of images from a backbone's features, the default task of `eval_linear.py`.

    flags            what is trained
    (none)           20 linear classifiers at once, by SGD on features computed once; learning rate
                     and weight decay are chosen on a fifth of the training labels in use, after a
                     training on a sixteenth of the batch, by the squared error of the
                     probabilities; then the chosen one is fitted to all of them
    --solver lbfgs   logistic regression to its optimum, its weight decay chosen likewise
    --augment        the same grid on features of new crops and flips in every epoch, as in DINO
    --finetune       the whole network, lower blocks with smaller learning rates; saved as
                     networkROW_FRACTION_seedSEED.pth, a backbone.pth with its classifier
    --from_scratch   the whole network from random weights, saved likewise: the supervised rival

--label_fraction takes the same images of each class for every model, which a larger fraction has
too. --pool default+mean pools as DINOv2's probe does. Test labels choose nothing.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowdino import evaluate, linear, probe, settings
from lowdino.distributed import UserError, user_errors
from lowdino.evaluate import Features
from lowdino.features import FLOORS, compute_features, compute_splits, open_images
from lowdino.settings import Settings

# The flags of eval_linear.py that belong to this task and not to every task.
FLAGS = (
    "from_features augment finetune from_scratch solver layer_decay epochs val_fraction labels "
    "test_fraction pool nb_knn"
).split()


def check(args: Settings) -> str | None:
    """The first error in the flags of this task, in one sentence, or None."""
    network, views = linear.trains_network(args), "--augment, --finetune and --from_scratch"
    if bool(args.models) == bool(args.from_features):
        return "give one MODEL or more, or --from_features FILE"
    if args.augment + args.finetune + args.from_scratch > 1:
        return f"{views} are three ways of training; give one"
    if args.from_features and (args.augment or network):
        return f"{views} need the images, which --from_features does without"
    if args.solver == "lbfgs" and (args.augment or network):
        return f"--solver lbfgs needs features that stay the same; {views} change them"
    if args.solver == "lbfgs" and args.lr:
        return "--solver lbfgs has no learning rate; leave --lr out"
    if network and len(args.lr or [0]) * len(args.weight_decay or [0]) > 1:
        return "the whole network is trained with one --lr and one --weight_decay"
    floors = " and ".join(sorted(FLOORS & {*args.models}))
    if network and (args.pool != "default" or floors):
        return f"the whole network is trained without --pool, and {floors or 'it'} has none"
    if floors and (args.augment or args.pool != "default"):
        return f"--augment and --pool need backbones; {floors} has none"
    if not 0 < args.val_fraction < 1:
        return f"--val_fraction must lie between 0 and 1, not {args.val_fraction}"
    return linear.check_network_training(args) or settings.check_evaluation(args)


def defaults(args: Settings) -> dict:
    """Values of the flags that are not given."""
    lr, weight_decay = linear.PROBE_LR, linear.PROBE_WEIGHT_DECAY
    if linear.trains_network(args):
        lr, weight_decay = [1e-3], [0.05]
    elif args.solver == "lbfgs":
        lr, weight_decay = [0.0], linear.LBFGS_WEIGHT_DECAY
    values = dict(lr=lr, weight_decay=weight_decay, layer_decay=0.75 if args.finetune else 1.0)
    return values | dict(epochs=100, batch_size_per_gpu=256)


def protocol(args: Settings) -> str:
    """The training and its settings, in one sentence for people who compare."""
    if linear.trains_network(args):
        start = "from random weights" if args.from_scratch else "fine-tuned"
        rates = f"learning rate {args.lr[0]:g}, x {args.layer_decay:g} per block downwards"
        rest = f"weight decay {args.weight_decay[0]:g}, {args.epochs} epochs of crops and flips"
        return f"whole network {start}: AdamW, {rates}, {rest}; the last epoch"
    sgd, grid = args.solver == "sgd", f"{len(args.weight_decay)} weight decays"
    grid = f"{len(args.lr)} learning rates x {grid}" if sgd else grid
    if len(args.lr) * len(args.weight_decay) > 1:
        labels = f"{args.val_fraction:g} of the training labels in use"
        labels += " after a training on a sixteenth of the batch" if sgd else ""
        grid += f", chosen by squared error of probabilities on {labels}"
        grid += "; then fitted to all of them"
    views = "features of crops and flips" if args.augment else "features"
    solver = f"SGD, {args.epochs} epochs" if sgd else "logistic regression to its optimum"
    return f"linear classifier on {views}, half-whitened by all training images: {solver}; {grid}"


def measure(subject: linear.Subject) -> dict:
    """All figures of one model: its row of the table."""
    args, ranks = subject.args, subject.ranks
    if subject.backbone is not None:
        subject, row, train, test = features_of_images(subject)
    else:
        with user_errors():
            title, train, test = evaluate.load_features(subject.name, ranks.device)
        row = {"model": title}
    classes, last = int(train.labels.max()) + 1, int(test.labels.max())
    if last >= classes:
        raise UserError(f"a test image has class {last}, no training image one above {classes - 1}")
    row["knn"] = evaluate.knn_accuracy(train, test, args.nb_knn, classes)
    if ranks.first:
        k = min(args.nb_knn, len(train.labels))
        print(f"  k-NN (k={k}) top-1 {row['knn']:.4f}", flush=True)
    if not linear.trains_network(args):
        whitening = probe.HalfWhitening(train.features)
        x, test_x = whitening(train.features), whitening(test.features)
        inputs = linear.ProbeInputs(whitening, x, train.labels, classes)
    subsets = linear.subsets_of(args, partial(probe.label_subset, train.labels))

    def learn(indices: Tensor, seed: int, subset: str) -> tuple[dict, str]:
        if ranks.first:
            lines = "".join(f"{i}\n" for i in indices.tolist())
            (Path(args.output_dir) / f"labels_{subset}.txt").write_text(lines)
        indices, setting = indices.to(ranks.device), ""
        if linear.trains_network(args):
            network = linear.finetune(subject, indices, seed)
            test_images, options = subject.source.test, (args.batch_size_per_gpu, args.num_workers)
            logits = compute_features(network, test_images, subject.size, ranks, *options).features
            if ranks.first:
                path = Path(args.output_dir) / f"network{subject.number}_{subset}.pth"
                linear.save_network(path, network, subject.size, args.epochs)
        else:
            weights, setting = linear.choose_and_fit(subject, inputs, indices, seed)
            logits = test_x @ weights
            linear.refuse_divergence(logits, "trained logits are not finite")
        tops = (1, 5) if logits.shape[1] > 5 else (1,)
        figures = {f"top{top}": evaluate.accuracy(logits, test.labels, top) for top in tops}
        words = " ".join(f"top-{top} {figures[f'top{top}']:.4f}" for top in tops)
        return figures | {"chosen": setting}, f"{words}, {setting}" if setting else words

    return row | {"trained": linear.measure_subsets(subject, subsets, learn, "labels")}


def features_of_images(subject: linear.Subject) -> tuple[linear.Subject, dict, Features, Features]:
    """The subject with its images, its row so far, and its training and test features."""
    args, ranks = subject.args, subject.ranks
    source, size, workers = open_images(args, subject.backbone, ranks)
    backbone = subject.backbone.to(ranks.device, memory_format=torch.channels_last)
    row = {"model": subject.title, "image_size": size, **linear.cost(backbone, size, ranks.device)}
    start = time.perf_counter()
    options = dict(batch_size=args.batch_size_per_gpu, pool=args.pool)
    train, test = compute_splits(backbone, source, size, ranks, workers, **options)
    if ranks.first:
        counts = f"{len(train.labels)} training and {len(test.labels)} test images"
        seconds, width = time.perf_counter() - start, train.features.shape[1]
        print(f"{subject.title}: {counts}, {size} px, {width} features in {seconds:.0f} s")
        print("".join(f"{note}\n" for note in source.notes * (subject.number == 1)), end="")
    return replace(subject, backbone=backbone, source=source, size=size), row, train, test


COSTS = {
    "parameters (M)": lambda row: f"{row['parameters_M']:.2f}",
    "multiply-adds (M)": lambda row: f"{row['multiply_adds_M']:.1f}",
    "ms per image": lambda row: f"{row['ms_per_image']:.2f}",
    "pixels": lambda row: f"{row['image_size']}",
}


def columns(args: Settings) -> dict:
    """Columns after the model's name: headings, and functions from a row to its text."""
    knn = {f"k-NN (k={args.nb_knn})": lambda row: linear.percent([row["knn"]])}
    trained = linear.figure_columns(args, {linear.training_name(args): "top1"})
    return ({} if args.from_features else COSTS) | knn | trained

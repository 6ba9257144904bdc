#!/usr/bin/env python3
"""Distil a big frozen teacher into a small network, without labels or with them (LowDINO, figure 3;
DINOv2, section 5).

    python distill.py --teacher dinov2_vits14_pretrain.pth --arch mobilevit_s --data_path pictures
    python distill.py --teacher resnet50=dino_resnet50_pretrain.pth --arch resnet5m \
        --objective simkd --cache_teacher t.npy
    python distill.py --teacher dino/checkpoint.pth --arch mobilevit_xxs --objective dino

A teacher is a backbone.pth, a state dict of DINO's or DINOv2's ViT, ARCH=FILE for another plain
state dict, a checkpoint.pth of train.py (of --method dino with its head), MODULE:FUNCTION that
returns a network, or a .npy or .npz of its features.
"""

import argparse
from pathlib import Path

import torch

import lowdino
from lowdino import (
    datasets,
    distillation,
    distributed,
    engine,
    evaluate,
    flags,
    settings,
)
from lowdino.distillation import Distillation
from lowdino.features import cached_features, compute_features

OBJECTIVES = ("kd", "simkd", "similarity", "dino", "mvmr")


def get_parser() -> argparse.ArgumentParser:
    parser = flags.parser_of(__doc__)
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", help="what to learn from, see below")
    help = "side of the teacher's input; default: the teacher file's, or that of the global views"
    add("--teacher_size", type=int, help=help)
    help = (
        "keep the teacher's features of the whole images here and look them up, instead of running "
        "it on every view"
    )
    add("--cache_teacher", metavar="FILE.npy", help=help)
    help = (
        "the teacher's linear classifier: the one in its file, or one trained on its features and "
        "the labels before anything else"
    )
    add("--teacher_head", choices=["none", "file", "train"], default="none", help=help)
    help = (
        "kd: softened logits (LowDINO, equation 4), the default where a flag of it is given; "
        "simkd: features; similarity: to a queue of images; dino: the teacher's prototypes; mvmr: "
        "distance correlation"
    )
    add("--objective", nargs="+", choices=OBJECTIVES, default=["similarity"], help=help)
    help = "a weight for each objective; default: 1"
    add("--objective_weight", type=float, nargs="+", help=help)
    add("--temperature", type=float, default=3.0, help="of kd")
    help = "weight of kd against the cross-entropy on labels, which has 1 - kd_weight"
    add("--kd_weight", type=float, default=1.0, help=help)
    help = (
        "how kd without a classifier brings features to one width: a learned linear map of the "
        "student's, or pooling both to the smaller"
    )
    add("--match", choices=["projector", "pool"], default="projector", help=help)
    help = (
        "vectors in similarity's queue, one an image from a cache or file, else one a view; 0: "
        "those of the batch alone"
    )
    add("--queue_size", type=int, default=4096, help=help)
    help = "of mvmr: widths of the projector's layers"
    add("--projector", type=int, nargs="+", default=[512] * 3, metavar="WIDTH", help=help)
    help = "of dino: temperature of the student's softmax"
    add("--student_temp", type=float, default=0.1, help=help)
    help = "of dino: temperature of the teacher's softmax"
    add("--teacher_temp", type=float, default=0.04, help=help)
    help = (
        "of dino: momentum of the student's average, which is kept; rises to 1 on a cosine; "
        "default: 1 - 1/(2 sqrt(steps))"
    )
    add("--momentum_teacher", type=flags.number_or_none, help=help)
    settings.add_training_flags(parser)
    # DINOv2 distils without stochastic depth.
    parser.set_defaults(local_crops_number=0, drop_path_rate=0.0)
    return parser


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    if not args.teacher:
        return "--teacher names what to learn from, and is not given"
    weights = args.objective_weight
    if len(set(args.objective)) < len(args.objective):
        return f"--objective names one twice: {' '.join(args.objective)}"
    if weights and not (
        len(weights) == len(args.objective) and all(0 < w < float("inf") for w in weights)
    ):
        objectives = " ".join(args.objective)
        return f"--objective_weight needs a number above 0 for each of {objectives}, not {weights}"
    if args.kd_weight < 1 and ("kd" not in args.objective or args.teacher_head == "none"):
        return (
            "--kd_weight below 1 weighs labels against kd's logits: it needs --objective kd and a "
            "--teacher_head"
        )
    if args.match == "pool" and ("kd" not in args.objective or args.teacher_head != "none"):
        return (
            "--match pool goes with --objective kd and --teacher_head none: a classifier's logits "
            "have one width"
        )
    if args.global_crops_number != 2 and "dino" in args.objective:
        return f"--objective dino takes --global_crops_number 2, not {args.global_crops_number}"
    if args.teacher_head != "none" and not {"kd", "simkd"} & set(args.objective):
        return "--teacher_head is used by --objective kd and simkd, and neither is given"
    if min(args.projector) < 1:
        return f"--projector needs widths of at least 1, not {args.projector}"
    return (
        check_teacher(args)
        or flags.out_of_range(
            args,
            not_negative=("queue_size",),
            above_zero=("temperature", "student_temp", "teacher_temp"),
            fractions=("kd_weight", "momentum_teacher"),
        )
        or settings.check_training(args)
    )


def check_teacher(args: argparse.Namespace) -> str | None:
    """As `check`, of the flags about the teacher."""
    features = args.teacher.endswith((".npy", ".npz"))
    if args.teacher in lowdino.ARCHS:
        name = args.teacher
        return f"--teacher {name} would have random weights: give {name}=FILE"
    if features and args.teacher_head == "file":
        return "--teacher_head file needs a teacher's file of weights, not one of features"
    if features and args.teacher_head == "train" and "kd" not in args.objective:
        return "--teacher_head train with a file of features is of use to --objective kd alone"
    if features and "dino" in args.objective:
        return (
            "--objective dino needs the teacher's head: give a checkpoint.pth of train.py --method "
            "dino, not a file of features"
        )
    if "dino" in args.objective and args.cache_teacher:
        return (
            "--objective dino needs the teacher's logits of every view, which --cache_teacher does "
            "without"
        )
    if features and (args.cache_teacher or args.teacher_size):
        return (
            "--cache_teacher and --teacher_size need a teacher that is a network, not a file of "
            "features"
        )
    if args.cache_teacher and not args.cache_teacher.endswith(".npy"):
        return f"--cache_teacher should end in .npy, not {args.cache_teacher}"
    if args.teacher_size is not None and args.teacher_size < 32:
        return f"--teacher_size must be at least 32 pixels, not {args.teacher_size}"
    return None


class TeacherAccuracy:
    """The teacher's k-NN accuracy in words, measured when first asked for."""

    def __init__(self, args, teacher: distillation.Teacher, source: datasets.Source, ranks):
        self.args, self.teacher, self.source, self.ranks = args, teacher, source, ranks
        self.said = None if teacher.backbone else ""

    def __call__(self) -> str:
        if self.said is None:
            splits = self.source.train, self.source.test
            workers, k = self.args.num_workers, self.args.nb_knn
            train, test = (self.teacher.features_of(s, workers, self.ranks) for s in splits)
            accuracy = evaluate.knn_accuracy(train, test, k, self.source.classes)
            self.said = f", of the teacher {accuracy:.4f}"
        return self.said


def classifier_accuracy(
    args, method: Distillation, source: datasets.Source, ranks: distributed.Ranks
) -> str | None:
    """Accuracy of the teacher's classifier on its own features and, through simkd's projector, on
    the student's; and of the student's own."""
    teacher = method.teacher
    if not teacher.classifier or teacher.backbone is None or source.test is None:
        return None
    test = teacher.features_of(source.test, args.num_workers, ranks)
    accuracy = evaluate.accuracy(teacher.classifier(test.features), test.labels)
    said = f"the teacher's classifier: {accuracy:.4f} on its features"
    network = getattr(method, method.evaluated).eval()
    distributed.broadcast_buffers(network)
    size, workers = args.global_crops_size, args.num_workers
    own = compute_features(network.backbone, source.test, size, ranks, workers=workers)
    if "simkd" in args.objective:
        logits = teacher.classifier(network.heads["simkd"](own.features))
        accuracy = evaluate.accuracy(logits, own.labels)
        said += f", {accuracy:.4f} on the student's through simkd's projector"
    if "kd" in args.objective:
        accuracy = evaluate.accuracy(network.heads["kd"](own.features), own.labels)
        said += f"; the student's own: {accuracy:.4f}"
    return said


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    source = settings.settle(args, ranks)
    teacher = distillation.open_teacher(args, source, ranks)
    same = {"teacher's weights": teacher.fingerprint, "cached": bool(args.cache_teacher)}

    def build(backbone, args, **steps) -> Distillation:
        if args.cache_teacher:
            path, teacher.images = Path(args.cache_teacher), source.pretrain
            teacher.features = cached_features(
                teacher, teacher.images, path, args.num_workers, ranks
            )
        distillation.add_classifier(teacher, args, source, ranks)
        return Distillation(backbone, args, teacher, **steps)

    note = TeacherAccuracy(args, teacher, source, ranks)
    method = engine.train(args, ranks, source, build, same, note)
    with torch.no_grad():
        said = classifier_accuracy(args, method, source, ranks)
    if said and ranks.first:
        print(said, flush=True)


def main() -> None:
    args = settings.parse(get_parser())
    distributed.launch("distill.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

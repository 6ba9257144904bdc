#!/usr/bin/env python3
"""Pre-train a small backbone without labels, by self-distillation with a momentum teacher (DINO, LowDINO, SSLight).

python train.py --arch mobilevit_xxs                                  demo images, one process
torchrun --nproc_per_node=8 train.py --arch mobilevit_s --data_path /path/to/pictures
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import eval_knn
import lowdino
from lowdino import (
    augment,
    checkpoint,
    data,
    descriptors,
    distributed,
    ema,
    evaluate,
    monitor,
    optim,
    schedules,
    vit,
)
from lowdino.heads import DINOHead, ManyHeads, MultiViewNetwork, Projector
from lowdino.losses import DINOLoss, InfoNCELoss, KoLeoLoss, MVMRLoss

# A preset replaces the defaults of the flags it names; a flag given by hand wins over both.
PRESETS = {
    # One small machine, thousands of pictures, random weights: two views, a head of LowDINO's size with batch norm, and
    # InfoNCE beside DINO's loss, fading. Chosen by runs of minutes on the demo images and CIFAR-10; see the README.
    # AdamW's learning rate is one for batches of 64 to 256; the teacher's momentum follows from the number of steps.
    "small": dict(
        epochs=30,
        batch_size_per_gpu=64,
        lr=2e-3,
        lr_reference_batch=0,
        min_lr=1e-6,
        warmup_epochs=0.3,
        optimizer="adamw",
        weight_decay=0.04,
        weight_decay_end=0.04,
        clip_grad=3.0,
        out_dim=1024,
        hidden_dim=512,
        norm_last_layer=True,
        use_bn_in_head=True,
        momentum_teacher=None,
        teacher_temp=0.04,
        warmup_teacher_temp=0.04,
        warmup_teacher_temp_epochs=0,
        student_temp=0.1,
        freeze_last_layer=0,
        infonce_weight=1.0,
        global_crops_scale=[0.2, 1.0],
        local_crops_number=0,
    ),
    # Table 2 of Prathapaneni and Shashank (2023); resnet5m takes 10 crops, see `parse`. hidden_dim is that of the authors'
    # code, the flip's probability ours; blur, solarisation and a warm-up from 0 are DINO's, where their text has a blur of up
    # to 0.5 pixels for local views and a warm-up from min_lr.
    "lowdino": dict(
        epochs=100,
        batch_size_per_gpu=64,
        lr=5e-4,
        lr_reference_batch=64,
        min_lr=1e-6,
        warmup_epochs=10,
        optimizer="sgd",
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_grad=2.0,
        out_dim=1024,
        hidden_dim=512,
        norm_last_layer=False,
        use_bn_in_head=False,
        momentum_teacher=0.9995,
        teacher_temp=0.04,
        warmup_teacher_temp=0.04,
        warmup_teacher_temp_epochs=0,
        student_temp=0.1,
        freeze_last_layer=0,
        global_crops_size=224,
        global_crops_scale=[0.4, 1.0],
        local_crops_number=2,
        local_crops_size=224,
        local_crops_scale=[0.05, 0.4],
        vertical_flip=0.5,
    ),
    # Caron et al. (2021): the defaults of the authors' main_dino.py.
    "dino": dict(
        epochs=100,
        batch_size_per_gpu=64,
        lr=5e-4,
        lr_reference_batch=256,
        min_lr=1e-6,
        warmup_epochs=10,
        optimizer="adamw",
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_grad=3.0,
        out_dim=65536,
        hidden_dim=2048,
        norm_last_layer=True,
        use_bn_in_head=False,
        momentum_teacher=0.996,
        teacher_temp=0.04,
        warmup_teacher_temp=0.04,
        warmup_teacher_temp_epochs=0,
        student_temp=0.1,
        freeze_last_layer=1,
        global_crops_size=224,
        global_crops_scale=[0.4, 1.0],
        local_crops_number=8,
        local_crops_size=96,
        local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0,
    ),
    # Kinakh et al., MV-MR on STL-10: learning rate, decay, batch and projector of the authors' configuration, the epochs of their
    # paper; with AdamW for Adam, a warm-up from 0, and DINO's augmentation of both views.
    "mvmr": dict(
        method="mvmr",
        epochs=1000,
        batch_size_per_gpu=64,
        lr=1e-4,
        lr_reference_batch=0,
        min_lr=0.0,
        warmup_epochs=10,
        optimizer="adamw",
        weight_decay=1e-6,
        weight_decay_end=1e-6,
        clip_grad=0.0,
        projector=[8192, 8192, 8192],
        global_crops_scale=[0.08, 1.0],
        local_crops_number=0,
        vertical_flip=0.0,
    ),
    # The same for one small machine: the projector and AdamW's settings of "small".
    "mvmr_small": dict(
        method="mvmr",
        epochs=30,
        batch_size_per_gpu=64,
        lr=2e-3,
        lr_reference_batch=0,
        min_lr=1e-6,
        warmup_epochs=0.3,
        optimizer="adamw",
        weight_decay=0.04,
        weight_decay_end=0.04,
        clip_grad=3.0,
        projector=[512, 512, 512],
        global_crops_scale=[0.2, 1.0],
        local_crops_number=0,
    ),
    # Tan et al. (2023), DINO with re-balanced views on ConvNets: the authors' configuration; SSLIGHT_VIT has that of ViTs.
    "sslight": dict(
        epochs=200,
        batch_size_per_gpu=128,
        lr=0.48,
        lr_reference_batch=256,
        min_lr=4.8e-3,
        warmup_epochs=10,
        optimizer="lars",
        weight_decay=1e-6,
        weight_decay_end=1e-6,
        clip_grad=0.0,
        out_dim=4096,
        hidden_dim=2048,
        norm_last_layer=True,
        use_bn_in_head=True,
        momentum_teacher=0.996,
        teacher_temp=0.07,
        warmup_teacher_temp=0.04,
        warmup_teacher_temp_epochs=50,
        student_temp=0.1,
        freeze_last_layer=1,
        alpha=0.4,
        global_crops_size=224,
        global_crops_scale=[0.3, 1.0],
        local_crops_number=6,
        local_crops_size=128,
        local_crops_scale=[0.05, 0.3],
        vertical_flip=0.0,
    ),
}
SSLIGHT_VIT = dict(
    optimizer="adamw",
    lr=5e-4,
    min_lr=1e-5,
    weight_decay=0.04,
    weight_decay_end=0.4,
    out_dim=65536,
    norm_last_layer=False,
    use_bn_in_head=False,
    warmup_teacher_temp_epochs=30,
    local_crops_number=10,
)

DESCRIPTORS = ("pixels", "augmented", "local_std", "hog", "scattering")

LEAST_SCALE = (
    2.0**-10
)  # of float16's losses: GradScaler halves it in a step whose gradients overflow, and starts from 2^16
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}

# Settings that a resumed run may change, because they do not change what it computes.
# A teacher (of distill.py) is compared by its weights, wherever its files lie.
FREE_SETTINGS = {
    "teacher",
    "cache_teacher",
    "output_dir",
    "data_path",
    "data_root",
    "download",
    "device",
    "num_workers",
    "cache",
    "compile",
    "log_freq",
    "knn_freq",
    "saveckp_freq",
    "save_every_steps",
    "accept_changes",
    "skip_nonfinite",
    "max_bad_fraction",
}


def bool_flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        formatter_class=eval_knn.HelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="settings of a paper; flags given by hand win over it")

    add("--method", choices=METHODS, default="dino", help="self-distillation (DINO), or MV-MR")

    add = parser.add_argument_group("self-distillation").add_argument
    add(
        "--out_dim",
        type=int,
        default=1024,
        help="number of prototypes, the width K of the head's output",
    )
    add("--hidden_dim", type=int, default=2048, help="width of the head's hidden layers")
    add(
        "--use_bn_in_head",
        type=bool_flag,
        default=False,
        metavar="BOOL",
        help="batch norm in the head",
    )
    add(
        "--norm_last_layer",
        type=bool_flag,
        default=True,
        metavar="BOOL",
        help="keep all prototypes at length 1: steadier; without it often a little better",
    )
    add(
        "--freeze_last_layer",
        type=int,
        default=1,
        help="epochs during which the prototypes stay as they are",
    )

    add(
        "--momentum_teacher",
        type=number_or_none,
        default=0.996,
        help="EMA momentum at the start; rises to 1 on a cosine. Higher for small batches, such as 0.9995; none: "
        "1 - 1/(2 sqrt(steps))",
    )
    add("--student_temp", type=float, default=0.1, help="temperature of the student's softmax")
    add(
        "--warmup_teacher_temp",
        type=float,
        default=0.04,
        help="teacher's temperature at the start of its warm-up, if it has one",
    )
    add("--teacher_temp", type=float, default=0.04, help="teacher's temperature after its warm-up")
    add("--warmup_teacher_temp_epochs", type=int, default=0, help="epochs of that warm-up")
    add(
        "--centering",
        choices=["softmax", "sinkhorn"],
        default="softmax",
        help="what keeps the teacher's output even",
    )
    add(
        "--center_momentum",
        type=float,
        default=0.9,
        help="EMA momentum of the centre, with softmax centering",
    )
    add(
        "--alpha",
        type=number_or_none,
        help="weight of the global against the local views (SSLight); none: mean over all pairs",
    )
    add(
        "--koleo_weight",
        type=float,
        default=0.0,
        help="weight of the KoLeo regulariser (DINOv2 uses 0.1)",
    )

    add(
        "--infonce_weight",
        type=float,
        default=0.0,
        help="weight of InfoNCE between the global views at the start, falling to 0 on a cosine: it teaches a network "
        "whose own teacher knows nothing yet; 1 with random weights and few steps",
    )

    add = parser.add_argument_group("MV-MR").add_argument
    add(
        "--projector",
        type=int,
        nargs="+",
        default=[8192, 8192, 8192],
        metavar="WIDTH",
        help="widths of the projector's layers",
    )
    add(
        "--descriptors",
        nargs="+",
        choices=DESCRIPTORS,
        default=list(DESCRIPTORS),
        help="fixed representations of the plain image",
    )
    add(
        "--invariance_weight",
        type=float,
        default=1.0,
        help="of the mean square between the embeddings, in L1",
    )
    add(
        "--variance_weight",
        type=float,
        default=1.0,
        help="of the hinge on their standard deviation, in L1",
    )
    add(
        "--dependence_weight",
        type=float,
        default=1.0,
        help="of L2, 1 - distance correlation between the embeddings",
    )
    add(
        "--representation_weight",
        type=float,
        default=1.0,
        help="of L3, the same between embedding and each descriptor",
    )
    add_training_flags(parser)
    return parser


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every training, whatever its method: network, optimisation, views, data and output."""
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="mobilevit_s", help=f"backbone: {', '.join(lowdino.ARCHS)}")
    add("--patch_size", type=int, default=16, help="side of a ViT's patches in pixels")
    add(
        "--drop_path_rate",
        type=float,
        default=0.1,
        help="share of images for which a ViT's last block drops a branch; the "
        "first drops none, the others between",
    )
    add(
        "--init",
        metavar="FILE",
        help="backbone file to start from: ours, or a state dict such as timm's MobileViT",
    )

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=["adamw", "sgd", "lars"], default="adamw")
    add("--epochs", type=int, default=100)
    add("--batch_size_per_gpu", type=int, default=64, help="images a process and step")
    add(
        "--lr",
        type=float,
        default=5e-4,
        help="peak learning rate, for a total batch of --lr_reference_batch",
    )
    add(
        "--lr_reference_batch",
        type=int,
        default=256,
        help="--lr scales in proportion to total batch / this; 0: never",
    )
    add(
        "--warmup_epochs",
        type=float,
        default=10,
        help="epochs over which the learning rate rises, perhaps a part of one",
    )
    add("--min_lr", type=float, default=1e-6, help="learning rate at the end of its cosine")
    add("--weight_decay", type=float, default=0.04, help="weight decay at the start")
    add("--weight_decay_end", type=float, default=0.4, help="weight decay at the end of its cosine")
    add(
        "--clip_grad",
        type=float,
        default=3.0,
        help="limit of each parameter's gradient norm; 0: none",
    )
    add(
        "--amp",
        choices=["bf16", "fp16", "none"],
        help="autocast type; default: bf16 on CUDA, none elsewhere",
    )

    add = parser.add_argument_group("views").add_argument
    add(
        "--global_crops_size",
        type=int,
        help="side of global views; default: suits the images, 224 at most",
    )
    add(
        "--global_crops_scale",
        type=float,
        nargs=2,
        default=[0.4, 1.0],
        metavar=("MIN", "MAX"),
        help="area of global crops as a fraction of the image's",
    )
    add("--local_crops_number", type=int, default=8, help="local views an image")
    add(
        "--local_crops_size",
        type=int,
        help="side of local views; default: 3/7 of the global ones, 32 at least",
    )
    add(
        "--local_crops_scale",
        type=float,
        nargs=2,
        default=[0.05, 0.4],
        metavar=("MIN", "MAX"),
        help="area of local crops as a fraction of the image's",
    )
    add("--vertical_flip", type=float, default=0.0, help="probability of a top-bottom flip")

    add = parser.add_argument_group("data and output").add_argument
    add(
        "--data_path",
        default="demo",
        help="folder (with or without sub-folders), text file with one path a line, cifar10, cifar100, stl10 or demo",
    )
    add("--data_root", default="data", help="where cifar10, cifar100 and stl10 are kept")
    add(
        "--download",
        action="store_true",
        help="fetch cifar10, cifar100 or stl10 where --data_root lacks it",
    )
    add(
        "--output_dir",
        default="output",
        help="where all is written; a run that was stopped goes on from here",
    )
    add(
        "--saveckp_freq",
        type=int,
        default=20,
        help="keep a numbered checkpoint every so many epochs; 0: none",
    )
    add(
        "--save_every_steps",
        type=int,
        default=0,
        help="also save a checkpoint every so many steps; 0: at the end of an epoch",
    )
    add(
        "--accept_changes",
        action="store_true",
        help="go on with the run in --output_dir though the settings have changed",
    )
    add(
        "--skip_nonfinite",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N steps in a row whose loss or gradients are infinite or no numbers, instead of stopping",
    )
    add(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        help="of the images that may be unreadable, others standing in for them; they are named in bad_images.txt",
    )
    add(
        "--knn_freq",
        type=int,
        default=10,
        help="k-NN accuracy every so many epochs, where there are labels; 0: never",
    )
    add("--nb_knn", type=int, default=20, help="neighbours of that k-NN")
    add("--log_freq", type=int, default=10, help="a log line every so many steps")
    add("--seed", type=int, default=0)
    add(
        "--num_workers",
        type=int,
        help="loader processes a rank; default: 0 for images in memory, else up to 10",
    )
    add(
        "--cache",
        choices=["auto", "device", "host", "none"],
        default="auto",
        help="decode each image once and keep it there; none: in every epoch; auto: on a GPU, if a quarter of it is enough, "
        "else on the host, if 2 GiB a rank are, else not",
    )
    add(
        "--compile",
        action="store_true",
        help="compile student and teacher by torch.compile: a slow start, faster steps",
    )
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, skip: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Flags, over the preset's settings, over the defaults; of a preset what the parser knows, less what is to `skip`."""
    args = parser.parse_known_args(argv)[0]
    if preset := args.preset:
        settings = dict(PRESETS[preset])
        if preset == "lowdino" and args.arch == "resnet5m":
            settings |= {"local_crops_number": 8}
        if preset == "sslight" and args.arch in vit.ARCHS:
            settings |= SSLIGHT_VIT
        parser.set_defaults(
            **{
                name: value
                for name, value in settings.items()
                if hasattr(args, name) and name not in skip
            }
        )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    if args.out_dim < 2:
        return f"--out_dim must be at least 2, not {args.out_dim}"
    if args.hidden_dim < 1:
        return f"--hidden_dim must be at least 1, not {args.hidden_dim}"
    mvmr_weights = (
        "invariance_weight",
        "variance_weight",
        "dependence_weight",
        "representation_weight",
    )
    not_negative = (
        "warmup_teacher_temp_epochs",
        "freeze_last_layer",
        "koleo_weight",
        "infonce_weight",
        *mvmr_weights,
    )
    above_zero = ("student_temp", "warmup_teacher_temp", "teacher_temp")
    fractions = ("momentum_teacher", "center_momentum", "alpha")
    if wrong := check_ranges(args, not_negative, above_zero, fractions) or check_training(args):
        return wrong
    if args.warmup_teacher_temp_epochs > args.epochs:
        return (
            f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} is longer than the training, "
            f"--epochs {args.epochs}"
        )
    if args.method == "mvmr":
        if args.local_crops_number:
            return f"--method mvmr has one augmented view: give --local_crops_number 0, not {args.local_crops_number}, or --preset mvmr"
        if min(args.projector) < 1:
            return f"--projector needs widths of at least 1, not {args.projector}"
        if len(set(args.descriptors)) < len(args.descriptors):
            return f"--descriptors names one twice: {' '.join(args.descriptors)}"
        if not any(getattr(args, name) for name in mvmr_weights):
            return "--method mvmr has nothing to learn: all four of its weights are 0"
    if args.alpha is not None and args.local_crops_number == 0:
        return "--alpha balances global against local views, and --local_crops_number is 0"
    return None


def check_ranges(
    args: argparse.Namespace,
    not_negative: tuple[str, ...],
    above_zero: tuple[str, ...],
    fractions: tuple[str, ...],
) -> str | None:
    for name in not_negative:
        if not 0 <= getattr(args, name) < math.inf:
            return f"--{name} must be 0 or more, not {getattr(args, name)}"
    for name in above_zero:
        if not 0 < getattr(args, name) < math.inf:
            return f"--{name} must be above 0, not {getattr(args, name)}"
    for name in fractions:
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            return f"--{name} must lie between 0 and 1, not {value}"
    return None


def check_training(args: argparse.Namespace) -> str | None:
    """As `check`, of the flags of `add_training_flags`."""
    if args.batch_size_per_gpu < 2:
        return f"--batch_size_per_gpu must be at least 2, for batch norm's sake, not {args.batch_size_per_gpu}"
    if args.seed >= 2**63:
        return f"--seed must be below 2^63, not {args.seed}"
    for name in ("epochs", "log_freq", "nb_knn"):
        if getattr(args, name) < 1:
            return f"--{name} must be at least 1, not {getattr(args, name)}"
    not_negative = (
        "local_crops_number",
        "lr_reference_batch",
        "warmup_epochs",
        "min_lr",
        "weight_decay",
        "weight_decay_end",
        "clip_grad",
        "saveckp_freq",
        "save_every_steps",
        "skip_nonfinite",
        "knn_freq",
        "seed",
        "lr",
    )
    if wrong := check_ranges(
        args, not_negative, (), ("vertical_flip", "drop_path_rate", "max_bad_fraction")
    ):
        return wrong
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            return f"--{name} needs 0 < MIN <= MAX <= 1, fractions of the image's area, not {low} {high}"
    for name in ("global_crops_size", "local_crops_size"):
        if getattr(args, name) is not None and getattr(args, name) < 32:
            return f"--{name} must be at least 32 pixels, not {getattr(args, name)}"
    if args.arch not in lowdino.ARCHS:
        return f"--arch {args.arch} is unknown; choose from {', '.join(lowdino.ARCHS)}"
    if not 1 <= args.patch_size <= 32:
        return f"--patch_size must lie between 1 and 32 pixels, the smallest view, not {args.patch_size}"
    if args.num_workers is not None and args.num_workers < 0:
        return f"--num_workers must be 0 or more, not {args.num_workers}"
    if args.warmup_epochs > args.epochs:
        return f"--warmup_epochs {args.warmup_epochs} is longer than the training, --epochs {args.epochs}"
    if args.init is not None and not os.path.isfile(args.init):
        return f"--init {args.init} does not exist"
    return None


def settle(args: argparse.Namespace, ranks: distributed.Ranks) -> data.Data:
    """Open the data and fill in what depends on it and on the machine.

    Raises:
        ValueError: in one sentence, where data and settings do not go together.
    """
    if args.amp == "fp16" and ranks.device.type != "cuda":
        raise ValueError(
            f"--amp fp16 needs a CUDA device, and this is {ranks.device.type}; use bf16 or none"
        )
    if args.amp is None:
        args.amp = "bf16" if ranks.device.type == "cuda" else "none"

    source = data.load_on_ranks(args.data_path, args.data_root, args.download, ranks.rank)
    if args.global_crops_size is None:
        args.global_crops_size = data.suitable_size(source.pretrain)
    if args.local_crops_size is None:
        args.local_crops_size = max(round(args.global_crops_size * 3 / 7 / 16) * 16, 32)
    source.pretrain.replace_bad = True
    source.limit_side(
        2 * args.global_crops_size
    )  # a crop of a quarter of the area still fills its view
    if args.num_workers is None:
        args.num_workers = data.default_workers(source.pretrain)

    total = args.batch_size_per_gpu * ranks.world
    if len(source.pretrain) < total:
        raise ValueError(
            f"{source.name}: {len(source.pretrain)} images are fewer than one batch of {total} "
            f"({ranks.world} x --batch_size_per_gpu {args.batch_size_per_gpu})"
        )
    if args.momentum_teacher is None:
        # 0.98 at 600 steps, 0.99 at 2,500, as runs on the demo images and CIFAR-10 wanted it; DINO's 0.996 at 16,000.
        args.momentum_teacher = 1 - 0.5 / math.sqrt(args.epochs * (len(source.pretrain) // total))
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {args.output_dir} cannot be made: {error.strerror}"
        ) from error
    return source


def build_backbone(args: argparse.Namespace) -> nn.Module:
    """The backbone to train, from random weights or from --init, the same on every rank."""
    torch.manual_seed(args.seed)
    is_vit = args.arch in vit.ARCHS
    if args.init:
        backbone = lowdino.load_backbone(args.init, args.arch).train()
        if is_vit and backbone.patch_size != args.patch_size:
            raise ValueError(
                f"--init {args.init} has patches of {backbone.patch_size} pixels; give --patch_size {backbone.patch_size}"
            )
    else:
        options = (
            dict(patch_size=args.patch_size, image_size=args.global_crops_size) if is_vit else {}
        )
        backbone = lowdino.build_backbone(args.arch, **options)
    if is_vit:
        backbone.set_drop_path_rate(args.drop_path_rate)
    return backbone


def build_views(args: argparse.Namespace) -> augment.MultiCrop:
    # DINO blurs by up to 2 pixels at 224; smaller views get less in proportion, or the blur would erase them.
    return augment.MultiCrop(
        args.global_crops_size,
        args.local_crops_size,
        args.local_crops_number,
        args.global_crops_scale,
        args.local_crops_scale,
        args.vertical_flip,
        blur_sigma=(0.1, 2 * args.global_crops_size / 224),
    )


def build_optimizer(
    args: argparse.Namespace, student: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    groups = optim.parameter_groups(student)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=device.type in ("cuda", "cpu"))
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return optim.LARS(groups)


def knn_accuracy(
    args: argparse.Namespace, backbone: nn.Module, source: data.Data, ranks: distributed.Ranks
) -> float:
    """Top-1 accuracy of weighted k-NN on the test images, the training images being the memory."""
    train, test = (
        eval_knn.features(backbone, images, args.global_crops_size, ranks, workers=args.num_workers)
        for images in (source.train, source.test)
    )
    return evaluate.knn_accuracy(train, test, args.nb_knn, source.classes)


def compare_settings(
    saved: dict, settings: dict, output: Path, accept: bool, log: monitor.Log
) -> None:
    """Name each setting that differs from the saved run's: in a ValueError, or, where one may `accept` them, in the log."""
    if "settings" not in saved:
        raise ValueError(
            f"{output}/checkpoint.pth is not a checkpoint of a training; give another --output_dir"
        )
    theirs = saved["settings"]
    changed = [f"{k} {theirs.get(k)}, not {v}" for k, v in settings.items() if theirs.get(k) != v]
    if changed and not accept:
        raise ValueError(
            f"{output} holds a run with {'; '.join(changed)}: give the same settings to go on with it, "
            "another --output_dir, or --accept_changes"
        )
    if changed:
        log.say(f"accepted: {output} held a run with {'; '.join(changed)}")


def culprits(
    attempt: Callable,
    model: nn.Module,
    batch: data.Batch,
    images: data.ImageArray | data.ImageFiles,
    ranks: distributed.Ranks,
) -> str:
    """On which ranks a step's loss or gradients are not finite, and for which images.

    The step is attempted again, for what its backward pass left is a mean over all ranks.
    """
    model.zero_grad(set_to_none=True)
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        _, objective = attempt()
        objective.backward()
    files = getattr(images, "paths", None)
    names = [files[i] if files else f"number {i}" for i in batch.indices[:8].tolist()]
    where = f"on rank {ranks.rank} for images {', '.join(names)}{' and others' if len(batch.indices) > 8 else ''}"
    losses = gradients = None
    if not objective.isfinite():
        losses = f"it is {objective.item():.4g} {where}"
    elif not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        gradients = f"it is {objective.item():.4g}, but its gradients are not finite {where}"
    # A loss over the images of all ranks spreads bad gradients: they count where every loss is a number.
    for found in zip(*distributed.gather_objects((losses, gradients))):
        if any(found):
            return "; ".join(filter(None, found))
    return "it was finite when it was computed again"


class SelfDistillation:
    """The method of DINO: the student answers to each view as its teacher, its moving average, does to others of the image.

    A method is an object that `train` asks for these:
        network      what is trained
        backbone     what is evaluated and kept, the backbone of the `kept` network
        parts        name -> whatever has a state to be saved, the network among them
        settings     what a resumed run must share beside the flags
        out_dim      K where the answers are distributions over K prototypes, else None
        objective(model, views, batch, step, logging) -> the loss, and what to differentiate; `model` is the network as DDP
                     wraps it, and the batch's images are on the device
        after_backward(step), after_step(step)
        signs()      numbers for the log and for `monitor.Health`, of the step that was last `logging`
        beside()     words to print after a k-NN accuracy
    """

    kept = "teacher"

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: distributed.Ranks,
        source: data.Data,
        total_steps: int,
    ):
        self.args, self.total_steps, self.epoch_steps = (
            args,
            total_steps,
            total_steps // args.epochs,
        )
        backbone = build_backbone(args)
        head = DINOHead(
            backbone.embed_dim,
            args.out_dim,
            args.use_bn_in_head,
            args.norm_last_layer,
            args.hidden_dim,
        )
        self.network = distributed.on_device(MultiViewNetwork(backbone, head), ranks)
        self.teacher = ema.make_teacher(self.network)
        self.pairs = ema.paired_parameters(self.teacher, self.network)
        self.stem = None
        self.backbone = self.teacher.backbone
        self.out_dim, self.settings = args.out_dim, {}
        self.criterion = DINOLoss(
            args.out_dim, args.student_temp, args.center_momentum, args.centering, args.alpha
        ).to(ranks.device)
        self.koleo, self.infonce = KoLeoLoss(), InfoNCELoss()
        self.parts = {"student": self.network, "teacher": self.teacher, "loss": self.criterion}

    def objective(
        self, model: nn.Module, views: list[Tensor], batch: data.Batch, step: int, logging: bool
    ) -> tuple[Tensor, Tensor]:
        args = self.args
        with torch.no_grad():
            _, _, teacher_logits = self.teacher(views[:2])
        features, embeddings, student_logits = model(views)
        self.teacher_temp = schedules.linear(
            step,
            args.warmup_teacher_temp_epochs * self.epoch_steps,
            args.warmup_teacher_temp,
            args.teacher_temp,
        )
        if logging:  # before the centre moves
            self.seen = self.criterion.targets(teacher_logits, self.teacher_temp), features
        loss = self.criterion(
            student_logits.chunk(len(views)), teacher_logits.chunk(2), self.teacher_temp
        )
        objective = loss
        if args.infonce_weight:
            weight = schedules.cosine(step, self.total_steps, args.infonce_weight, 0.0)
            objective = objective + weight * self.infonce(*embeddings.chunk(len(views))[:2])
        if args.koleo_weight:
            objective = objective + args.koleo_weight * sum(
                self.koleo(f) for f in features.chunk(len(views))[:2]
            )
        return loss, objective

    def after_backward(self, step: int) -> None:
        if step < self.args.freeze_last_layer * self.epoch_steps:
            for parameter in self.network.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, step: int) -> None:
        """The teacher follows."""
        self.momentum = schedules.cosine(step, self.total_steps, self.args.momentum_teacher, 1.0)
        ema.update(*self.pairs, self.momentum)

    def signs(self) -> dict[str, float | bool]:
        """The teacher's answers over all ranks, the spread of one view's features on this one, the teacher's move."""
        targets, features = self.seen
        entropy = distributed.mean_over_ranks(monitor.mean_entropy(targets)).item()
        of_mean = monitor.mean_entropy(
            distributed.mean_over_ranks(targets.mean(dim=0))[None]
        ).item()
        std, rank = monitor.spread(features[: len(targets) // 2])
        # One weight tells whether any moved. Towards the end of a long run the schedule lets none.
        before, self.stem = self.stem, self.pairs[0][0].clone()
        moved = (
            before is None
            or not torch.equal(before, self.stem)
            or self.momentum > 1 - 1e-6 > self.args.momentum_teacher
        )
        return {
            "momentum": self.momentum,
            "teacher_temp": self.teacher_temp,
            "entropy": entropy,
            "entropy_of_mean": of_mean,
            "feature_std": std.item(),
            "effective_rank": rank.item(),
            "teacher_moved": moved,
        }

    def beside(self) -> str:
        return ""


def plain_view(batch: data.Batch, size: int) -> Tensor:
    """The whole images, resized and normalised."""
    x = augment.central_view(
        batch.images, batch.sizes, size, augment.IMAGENET_MEAN, augment.IMAGENET_STD
    )
    return x.contiguous(memory_format=torch.channels_last)


class MVMR:
    """MV-MR (Kinakh et al.): embeddings of a plain and of an augmented view depend on each other, and the latter on fixed
    descriptors of the plain view. A method for `train`, see `SelfDistillation`.

    The second augmented view serves as the descriptor "augmented".
    """

    kept, out_dim = "network", None

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: distributed.Ranks,
        source: data.Data,
        total_steps: int,
    ):
        self.args, self.settings = args, {}
        backbone = build_backbone(args)
        projector = Projector(backbone.embed_dim, *args.projector)
        self.network = distributed.on_device(ManyHeads(backbone, {"projector": projector}), ranks)
        self.backbone = backbone
        self.criterion = MVMRLoss(
            args.invariance_weight,
            args.variance_weight,
            args.dependence_weight,
            args.representation_weight,
        )
        self.parts = {"student": self.network}
        self.scattering = None
        if "scattering" in args.descriptors:
            self.scattering = descriptors.Scattering(
                args.global_crops_size, args.global_crops_size
            ).to(ranks.device)

    def representations(self, plain: Tensor, augmented: Tensor) -> list[Tensor]:
        ways = {
            "pixels": descriptors.pixels,
            "augmented": lambda _: descriptors.pixels(augmented),
            "local_std": descriptors.local_std,
            "hog": descriptors.hog,
            "scattering": self.scattering,
        }
        return [ways[name](plain) for name in self.args.descriptors]

    def objective(
        self, model: nn.Module, views: list[Tensor], batch: data.Batch, step: int, logging: bool
    ) -> tuple[Tensor, Tensor]:
        plain = plain_view(batch, self.args.global_crops_size)
        features, outputs = model([plain, views[0]])
        known = self.representations(plain, views[1]) if self.args.representation_weight else []
        terms = self.criterion(*outputs["projector"].chunk(2), known)
        if logging:
            self.seen = features.chunk(2)[0].detach(), [term.detach() for term in terms]
        loss = sum(terms)
        return loss, loss

    def after_backward(self, step: int) -> None:
        pass

    def after_step(self, step: int) -> None:
        pass

    def signs(self) -> dict[str, float]:
        features, terms = self.seen
        std, rank = monitor.spread(features)
        return {f"L{i}": term.item() for i, term in enumerate(terms, start=1)} | {
            "feature_std": std.item(),
            "effective_rank": rank.item(),
        }

    def beside(self) -> str:
        return ""


def train(
    args: argparse.Namespace, ranks: distributed.Ranks, source: data.Data, make_method: type
) -> object:
    """Run and return a method, `make_method(args, ranks, source, total_steps)`, from where --output_dir is or from the start.

    Raises:
        SystemExit: with status `distributed.STOPPED` after a signal; the same call goes on.
    """
    device, first = ranks.device, ranks.first
    signals = distributed.StopSignals()
    output = Path(args.output_dir)
    log = monitor.Log(output, active=first)
    log.say(
        f"data: {source.name}, {len(source.pretrain)} images; global views {args.global_crops_size} px, "
        f"{args.local_crops_number} local views {args.local_crops_size} px"
    )

    total_batch = args.batch_size_per_gpu * ranks.world
    epoch_steps = len(source.pretrain) // total_batch
    total_steps = args.epochs * epoch_steps
    warmup_steps = round(args.warmup_epochs * epoch_steps)
    peak_lr = args.lr * (total_batch / args.lr_reference_batch if args.lr_reference_batch else 1)

    # What a resumed run must share with the one that stopped; compared before a method may work for hours.
    settings = {k: v for k, v in vars(args).items() if k not in FREE_SETTINGS}
    settings |= {"world": ranks.world, "images": source.pretrain.fingerprint()}
    saved = checkpoint.load_checkpoint(
        output, warn=lambda text: log.say(f"{'!' * 80}\nWARNING: {text}\n{'!' * 80}")
    )
    if saved:
        compare_settings(saved, settings, output, args.accept_changes, log)

    method = make_method(args, ranks, source, total_steps)
    parameters = [p for p in method.network.parameters() if p.requires_grad]
    optimizer = build_optimizer(args, method.network, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    multicrop = build_views(args).to(device)

    # All that has a state. The loss is summed between log lines, on each rank.
    parts = method.parts | {"optimizer": optimizer, "scaler": scaler}
    step, first_knn, skipped = 0, None, 0
    loss_sum, loss_steps = torch.zeros((), device=device), 0
    if saved:
        compare_settings(saved, method.settings, output, args.accept_changes, log)
        try:
            if saved["settings"]["optimizer"] != args.optimizer:
                raise ValueError("another --optimizer has no use for its state")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            step, first_knn = saved["step"], saved["first_knn"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{output} holds a run that these settings cannot go on with: {' '.join(str(error).split())}"
            ) from error
        if step > total_steps:
            raise ValueError(
                f"{output} holds a run that has made {step} steps, and now {total_steps} are asked for"
            )
        skipped, loss_sums = saved.get("skipped", 0), saved.get("loss_sums", ())
        if len(loss_sums) == ranks.world:
            loss_sum, loss_steps = loss_sums[ranks.rank].to(device), saved["loss_steps"]
        log.say(f"going on from {output} after step {step}")
    settings |= method.settings
    if first:
        log.rewind(step)
        with checkpoint.atomic(output / "args.json") as file:
            file.write(json.dumps(vars(args) | {"world": ranks.world}, indent=2).encode() + b"\n")
        log.say("settings: " + " ".join(f"{k}={v}" for k, v in vars(args).items()))

    if args.compile:  # whole networks, so that an evaluation, of the backbone alone and in other batches, is as ever
        for part in ("student", "teacher"):
            if part in method.parts:
                method.parts[part].compile(dynamic=False)
    model = distributed.data_parallel(method.network, device)
    batches = data.TrainingBatches(
        len(source.pretrain),
        args.batch_size_per_gpu,
        args.seed,
        step,
        total_steps,
        ranks.rank,
        ranks.world,
    )
    where, start = "none" if step == total_steps else args.cache, time.perf_counter()
    if where == "auto":
        where = data.where_to_cache(source.pretrain, device)
    images = data.cached(source.pretrain, where, device, args.num_workers)
    if images is not source.pretrain:
        log.say(f"images decoded and kept on the {where} in {time.perf_counter() - start:.1f} s")
    loader = data.training_loader(
        images, batches, args.num_workers, pin_memory=device.type == "cuda" and where != "device"
    )
    remembered = replace(source, train=images if source.train is source.pretrain else source.train)
    bad_images = monitor.BadImages(
        output, len(source.pretrain), args.max_bad_fraction, active=first
    )

    def evaluate_knn() -> float | None:
        """The accuracy at an end of an epoch, or before the first one, where it is due."""
        epoch = step // epoch_steps
        if (
            source.test is None
            or not args.knn_freq
            or (epoch % args.knn_freq and step < total_steps)
        ):
            return None
        distributed.broadcast_buffers(method.backbone)
        accuracy = knn_accuracy(args, method.backbone, remembered, ranks)
        log.say(
            f"epoch {epoch}: k-NN (k={args.nb_knn}) of the {method.kept} {accuracy:.4f}{method.beside()}"
        )
        log.record(step=step, epoch=epoch, knn=accuracy)
        return accuracy

    def save() -> None:
        loss_sums = distributed.gather_strided(loss_sum[None], ranks.world)
        if not first:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {
            "step": step,
            "first_knn": first_knn,
            "skipped": skipped,
            "loss_sums": loss_sums,
            "loss_steps": loss_steps,
            "settings": settings,
        }
        epoch, within = divmod(step, epoch_steps)
        if not within:
            checkpoint.save_backbone(
                output / "backbone.pth",
                method.backbone,
                args.arch,
                augment.IMAGENET_MEAN,
                augment.IMAGENET_STD,
                args.global_crops_size,
                epoch,
            )
            if args.saveckp_freq and epoch % args.saveckp_freq == 0:
                checkpoint.save_atomic(output / f"checkpoint{epoch:04}.pth", state)
        log.sync()
        checkpoint.save_checkpoint(
            output, state
        )  # last: a run that is killed before it does these steps again

    accuracy = None
    if step == total_steps:
        log.say(f"already finished: {args.epochs} epochs; give another --output_dir to train anew")
    # A run that was stopped while it evaluated has this to do yet.
    if step % epoch_steps == 0 and distributed.gather_objects(log.find("knn", step))[0] is None:
        accuracy = evaluate_knn()
        first_knn = accuracy if step == 0 else first_knn

    for part in method.parts.values():
        part.train()
    # What a forward pass changes by itself, batch norm's statistics and centres, to be undone where a step may be left out.
    buffers = (
        [b for part in method.parts.values() for b in part.buffers()] if args.skip_nonfinite else []
    )
    buffers_before = [b.clone() for b in buffers]
    clock = monitor.Clock()
    health = monitor.Health(method.out_dim)
    signals.held = True
    for batch in data.on_device(loader, device):
        clock.waited()
        epoch = step // epoch_steps
        end_of_epoch = (step + 1) % epoch_steps == 0
        logging = (step + 1) % args.log_freq == 0 or end_of_epoch

        # Schedules: functions of the step.
        lr = schedules.cosine(step, total_steps, peak_lr, args.min_lr, warmup_steps)
        weight_decay = schedules.cosine(step, total_steps, args.weight_decay, args.weight_decay_end)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

        # Views.
        generator = augment.seeded_generator(
            device, 1, args.seed, step, ranks.rank
        )  # stream 0 is the order, 4 bad images
        views = multicrop(batch.images, batch.sizes, generator)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        if step == 0 and first:
            with checkpoint.atomic(output / "crops.png") as file:
                monitor.save_views(file, views, augment.IMAGENET_MEAN, augment.IMAGENET_STD)

        # Teacher, student, loss.
        def attempt() -> tuple[Tensor, Tensor]:
            # For stochastic depth. On a CPU its generator alone: to look for every other kind takes half a millisecond.
            seed = (
                torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
            )
            seed(augment.derived_seed(3, args.seed, step, ranks.rank))
            with torch.autocast(device.type, AUTOCAST[args.amp], enabled=args.amp != "none"):
                return method.objective(model, views, batch, step, logging)

        if buffers:
            torch._foreach_copy_(buffers_before, buffers)
        loss, objective = attempt()

        # Backward, clip.
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(objective).backward()
        scaler.unscale_(optimizer)
        method.after_backward(step)
        norms = optim.clip_gradients_by_parameter(parameters, args.clip_grad)

        # Does any rank object? Gradients that float16 cannot hold are GradScaler's to deal with.
        sound = (objective if scaler.is_enabled() else objective + norms.sum()).isfinite()
        unsound, stopping, bad = distributed.any_rank(
            [~sound, signals.seen, bool(bad_images.unknown(batch.bad))], device
        )
        if bad:
            bad_images.add(sum(distributed.gather_objects(list(batch.bad)), []))
        if unsound:
            found = culprits(attempt, model, batch, source.pretrain, ranks)
            skipped += 1
            if skipped > args.skip_nonfinite:
                raise FloatingPointError(
                    f"diverging loss at step {step + 1}: {found}; a lower --lr or a longer --warmup_epochs may "
                    f"help, --skip_nonfinite leaves such steps out; {output} keeps what was saved before"
                )
            log.say(f"diverging loss at step {step + 1}: {found}; left out, {skipped} in a row")
            if buffers:
                torch._foreach_copy_(buffers, buffers_before)
            optimizer.zero_grad(set_to_none=True)
            scaler.update(scaler.get_scale())  # which is not to blame
        else:
            # Step.
            skipped = 0
            scaler.step(optimizer)
            scaler.update()
            method.after_step(step)
            loss_sum, loss_steps = loss_sum + loss.detach(), loss_steps + 1

        # Log, save, evaluate.
        step += 1
        clock.stepped(total_batch)
        if logging and scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
            raise FloatingPointError(
                f"diverging gradients at step {step}: at no scale does float16 hold them; --amp bf16 or none, a lower "
                f"--lr or a longer --warmup_epochs may help; {output} keeps what was saved before"
            )
        if logging and not unsound:
            mean_loss = distributed.mean_over_ranks(loss_sum / loss_steps).item()
            loss_sum, loss_steps = torch.zeros((), device=device), 0
            signs, speed = method.signs(), clock.read(total_steps - step)
            values = {"loss": mean_loss}
            if method.out_dim:
                values["loss_over_lnk"] = mean_loss / math.log(method.out_dim)
            values |= {
                "lr": lr,
                "weight_decay": weight_decay,
                "memory_mb": monitor.memory_mb(device),
                **signs,
            }
            log.say(
                f"epoch {epoch} step {step}/{total_steps} "
                + " ".join(f"{k} {v:.5g}" for k, v in values.items())
                + f" {speed['images_per_s']:.0f} images/s wait {speed['data_wait']:.0%} eta {monitor.duration(speed['eta_s'])}"
            )
            log.record(step=step, epoch=epoch, **values, **speed)
            for news in health.read(step, loss=mean_loss, **signs):
                log.say(f"health: {news}")
        if (
            end_of_epoch
            or stopping
            or (args.save_every_steps and step % args.save_every_steps == 0)
        ):
            save()
        if stopping:
            log.say(
                f"stopped by a signal after step {step}, which is saved: the same command goes on from there"
            )
            sys.exit(distributed.STOPPED)
        if end_of_epoch:
            with signals.at_once():
                accuracy = evaluate_knn()
            clock.restart()
    signals.held = False
    if accuracy is not None:
        before = "" if first_knn is None else f", {first_knn:.4f} before the first"
        log.say(
            f"k-NN (k={args.nb_knn}) accuracy: {accuracy:.4f} after {args.epochs} epochs{before}{method.beside()}"
        )
    if clock.steps:
        log.say(f"health: {health.verdict()}")
        if bad_images.known:
            log.say(f"{len(bad_images.known)} images could not be read; see {bad_images.path}")
    log.say(f"backbone: {output / 'backbone.pth'}")
    return method


METHODS = {"dino": SelfDistillation, "mvmr": MVMR}


def main() -> None:
    args = parse(get_parser())
    distributed.launch(
        "train.py",
        check(args),
        args.device,
        lambda ranks: train(args, ranks, settle(args, ranks), METHODS[args.method]),
    )


if __name__ == "__main__":
    main()

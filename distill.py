#!/usr/bin/env python3
"""Distil a big frozen teacher into a small network, without labels or with them (LowDINO, figure 3; DINOv2, section 5).

    python distill.py --teacher dinov2_vits14_pretrain.pth --arch mobilevit_s --data_path /path/to/pictures
    python distill.py --teacher resnet50=dino_resnet50_pretrain.pth --arch resnet5m --objective simkd --cache_teacher t.npy
    python distill.py --teacher output/checkpoint.pth --arch mobilevit_xxs --objective dino

A teacher is a backbone.pth, a state dict of DINO's or DINOv2's ViT, ARCH=FILE for another plain state dict, a checkpoint.pth of
train.py (with its head, for --objective dino), MODULE:FUNCTION that returns a network, or a .npy or .npz of its features.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

import eval_knn
import lowdino
import train
from lowdino import augment, checkpoint, data, distributed, ema, evaluate, monitor, probe, schedules
from lowdino.heads import DINOHead, ManyHeads, MultiViewNetwork, Projector
from lowdino.losses import DINOLoss, KDLoss, MVMRLoss, SimilarityLoss, SimKDLoss

OBJECTIVES = ("kd", "simkd", "similarity", "dino", "mvmr")
SKIPPED = ("alpha",)  # what presets mean by it is the balance of SSLight's views
CHUNK = 8192  # images whose features are computed and written to a cache at once


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=" ".join(__doc__.split("\n\n")[2].split()),
        allow_abbrev=False,
        formatter_class=eval_knn.HelpFormatter,
    )
    parser.add_argument(
        "--preset",
        choices=train.PRESETS,
        help="settings of a paper; flags given by hand win over it",
    )
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", required=True, help="what to learn from, see below")
    add(
        "--teacher_size",
        type=int,
        help="side of the teacher's input; default: the teacher file's, or that of the global views",
    )
    add(
        "--cache_teacher",
        metavar="FILE.npy",
        help="keep the teacher's features of the whole images here and look them up, instead "
        "of running it on every view",
    )
    add(
        "--teacher_head",
        choices=["none", "file", "train"],
        default="none",
        help="the teacher's linear classifier: the one in its "
        "file, or one trained on its features and the labels before anything else",
    )
    add(
        "--objective",
        nargs="+",
        choices=OBJECTIVES,
        default=["kd"],
        help="kd: softened answers (LowDINO, equation 4); simkd: "
        "features; similarity: to a queue of images; dino: the teacher's prototypes; mvmr: distance correlation",
    )
    add("--objective_weight", type=float, nargs="+", help="a weight for each objective; default: 1")
    add("--temperature", type=float, default=3.0, help="of kd")
    add(
        "--alpha",
        type=float,
        default=1.0,
        help="weight of kd against the cross-entropy on labels, which has 1 - alpha",
    )
    add(
        "--match",
        choices=["projector", "pool"],
        default="projector",
        help="how kd without a classifier brings features to one "
        "width: a learned linear map of the student's, or pooling both to the smaller",
    )
    add(
        "--queue_size",
        type=int,
        default=4096,
        help="vectors in similarity's queue, one an image from a cache or file, else one a view; "
        "0: those of the batch alone",
    )
    add(
        "--projector",
        type=int,
        nargs="+",
        default=[512, 512, 512],
        metavar="WIDTH",
        help="of mvmr: widths of the projector's layers",
    )
    add(
        "--student_temp",
        type=float,
        default=0.1,
        help="of dino: temperature of the student's softmax",
    )
    add(
        "--teacher_temp",
        type=float,
        default=0.04,
        help="of dino: temperature of the teacher's softmax",
    )
    add(
        "--momentum_teacher",
        type=train.number_or_none,
        help="of dino: momentum of the student's average, which is kept; rises to 1 on "
        "a cosine; default: 1 - 1/(2 sqrt(steps))",
    )
    train.add_training_flags(parser)
    parser.set_defaults(
        local_crops_number=0, drop_path_rate=0.0
    )  # DINOv2 distils without stochastic depth
    return parser


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    if len(set(args.objective)) < len(args.objective):
        return f"--objective names one twice: {' '.join(args.objective)}"
    weights = args.objective_weight
    if weights and (
        len(weights) != len(args.objective) or not all(0 < w < float("inf") for w in weights)
    ):
        return f"--objective_weight needs a number above 0 for each of {' '.join(args.objective)}, not {weights}"
    if args.alpha < 1 and ("kd" not in args.objective or args.teacher_head == "none"):
        return "--alpha below 1 weighs labels against kd's answers: it needs --objective kd and a --teacher_head"
    if args.match == "pool" and ("kd" not in args.objective or args.teacher_head != "none"):
        return "--match pool goes with --objective kd and --teacher_head none: a classifier's answers have one width"
    if args.teacher_head != "none" and not {"kd", "simkd"} & set(args.objective):
        return "--teacher_head is used by --objective kd and simkd, and neither is given"
    features = args.teacher.endswith((".npy", ".npz"))
    if features and args.teacher_head == "file":
        return "--teacher_head file needs a teacher's file of weights, not one of features"
    if features and args.teacher_head == "train" and "kd" not in args.objective:
        return "--teacher_head train with a file of features is of use to --objective kd alone"
    if features and "dino" in args.objective:
        return "--objective dino needs the teacher's head: give a checkpoint.pth of train.py, not a file of features"
    if "dino" in args.objective and args.cache_teacher:
        return "--objective dino needs the teacher's answers to every view, which --cache_teacher does without"
    if args.teacher in lowdino.ARCHS:
        return f"--teacher {args.teacher} would have random weights: give {args.teacher}=FILE"
    if features and (args.cache_teacher or args.teacher_size):
        return "--cache_teacher and --teacher_size need a teacher that is a network, not a file of features"
    if args.cache_teacher and not args.cache_teacher.endswith(".npy"):
        return f"--cache_teacher should end in .npy, not {args.cache_teacher}"
    if min(args.projector) < 1:
        return f"--projector needs widths of at least 1, not {args.projector}"
    if args.teacher_size is not None and args.teacher_size < 32:
        return f"--teacher_size must be at least 32 pixels, not {args.teacher_size}"
    return train.check_ranges(
        args,
        ("queue_size",),
        ("temperature", "student_temp", "teacher_temp"),
        ("alpha", "momentum_teacher"),
    ) or train.check_training(args)


# ---------------------------------------------------------------------------------------------------------------------
# The teacher: a frozen network, or its features in a file
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Teacher:
    """A frozen network with its classifier and DINO head, where it has them; or features alone."""

    name: str
    fingerprint: str
    backbone: nn.Module | None = None
    size: int = 0
    classifier: nn.Linear | None = None
    head: DINOHead | None = None
    center: Tensor | None = None
    features: np.ndarray | None = None  # (N, D), of the images to train on, in their order

    @torch.no_grad()
    def __call__(self, view: Tensor) -> Tensor:
        """Features of a view that is normalised for the student: (B, 3, H, W) -> (B, D) float32."""
        students, own = (
            (augment.IMAGENET_MEAN, augment.IMAGENET_STD),
            eval_knn.normalisation(self.backbone),
        )
        if tuple(map(tuple, own)) != students:
            student_mean, student_std, mean, std = (
                torch.tensor(v, device=view.device).view(1, 3, 1, 1) for v in (*students, *own)
            )
            view = (view * student_std + student_mean - mean) / std
        if view.shape[-1] != self.size:
            view = F.interpolate(
                view,
                size=(self.size, self.size),
                mode="bicubic",
                align_corners=False,
                antialias=True,
            )
        return self.backbone(view).float()


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and values of all weights, in 16 digits."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().flatten().clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def open_teacher(args: argparse.Namespace, source: data.Data, ranks: distributed.Ranks) -> Teacher:
    """The teacher that --teacher names.

    Raises:
        ValueError: in one sentence, where it cannot be used.
    """
    if args.teacher.endswith((".npy", ".npz")):
        return features_of_file(args.teacher, source)
    arch, _, path = args.teacher.partition("=")
    path = path if arch in lowdino.ARCHS else args.teacher
    if not os.path.isfile(path) and ":" in path:
        name, backbone = path, imported(path)
        content: dict = {}
    else:
        content = checkpoint.load(path)
        name, backbone = (
            (path, None) if "settings" in content else eval_knn.open_model(args.teacher)
        )
    head = center = None
    if backbone is None:
        backbone, head, center = teacher_of_run(path, content)
    elif "dino" in args.objective:
        raise ValueError(
            f"--objective dino needs the teacher's head: give a checkpoint.pth of train.py, not {path}"
        )
    backbone = frozen(backbone, ranks)
    size = args.teacher_size or getattr(backbone, "image_size", None) or args.global_crops_size
    if not isinstance(size, int):
        raise ValueError(
            f"{name} takes images of {size} pixels; give one --teacher_size for both sides"
        )
    teacher = Teacher(
        name,
        fingerprint(backbone),
        backbone,
        size,
        head=head and frozen(head, ranks),
        center=center,
    )
    if args.teacher_head == "file":
        try:
            weights = content["classifier"]
            classifier = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
            classifier.load_state_dict(weights)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{path} holds no classifier, with weight and bias; eval_linear.py --finetune writes such a file, "
                "--teacher_head train trains one"
            ) from error
        teacher.classifier = frozen(classifier, ranks)
    return teacher


def frozen(module: nn.Module, ranks: distributed.Ranks) -> nn.Module:
    return module.to(ranks.device, memory_format=torch.channels_last).eval().requires_grad_(False)


def imported(path: str) -> nn.Module:
    module, _, function = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        backbone = getattr(importlib.import_module(module), function)()
    except Exception as error:  # somebody else's code fails in any way there is
        raise ValueError(f"--teacher {path}: cannot import and call it: {error}") from error
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"--teacher {path} returns a {type(backbone).__name__}, where a network was expected"
        )
    return backbone


def teacher_of_run(path: str, content: dict) -> tuple[nn.Module, DINOHead, Tensor]:
    """Backbone, head and centre of the teacher in a checkpoint of train.py."""
    settings = content["settings"]
    if "out_dim" not in settings or "teacher" not in content:
        raise ValueError(f"{path} is a checkpoint without a DINO head")
    arch, prefix = settings["arch"], "backbone."
    weights = {
        name.removeprefix(prefix): value
        for name, value in content["teacher"].items()
        if name.startswith(prefix)
    }
    backbone = (
        lowdino.vit.like(weights) if arch in lowdino.vit.ARCHS else lowdino.build_backbone(arch)
    )
    head = DINOHead(
        backbone.embed_dim,
        settings["out_dim"],
        settings["use_bn_in_head"],
        settings["norm_last_layer"],
        settings["hidden_dim"],
    )
    network = MultiViewNetwork(backbone, head)
    network.load_state_dict(content["teacher"])
    backbone.image_size = settings["global_crops_size"]
    return backbone, head, content["loss"]["center"]


def features_of_file(path: str, source: data.Data) -> Teacher:
    """Features of the images to train on, (N, D), as an array of an .npy or the `train` of an .npz of eval_knn.py --features."""
    try:
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)
        files = None
        if isinstance(arrays, np.lib.npyio.NpzFile):
            with arrays:
                files = arrays["train_files"] if "train_files" in arrays else None
                arrays = arrays["train"]
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}") from error
    except Exception as error:  # a damaged file makes zipfile and numpy fail in any way there is
        raise ValueError(
            f"cannot read {path}: it is damaged, or not a file of features, (N, D), `train` in an .npz"
        ) from error
    if arrays.ndim != 2 or arrays.dtype.kind != "f":
        raise ValueError(
            f"{path}: features should be (N, D) floating-point numbers, not {arrays.shape} {arrays.dtype}"
        )
    paths = getattr(source.pretrain, "paths", None)
    names = (
        files is None
        or paths is None
        or [os.path.basename(str(f)) for f in files] == [os.path.basename(p) for p in paths]
    )
    if len(arrays) != len(source.pretrain) or not names:
        raise ValueError(
            f"{path} holds features of {len(arrays)} other images than the {len(source.pretrain)} of {source.name}"
        )
    if not all(np.isfinite(arrays[i : i + CHUNK]).all() for i in range(0, len(arrays), CHUNK)):
        raise ValueError(f"{path} has values that are not finite numbers")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return Teacher(path, digest.hexdigest()[:16], features=arrays)


def features_of_images(
    teacher: Teacher,
    images: data.ImageArray | data.ImageFiles,
    places: range,
    workers: int,
    ranks: distributed.Ranks,
) -> evaluate.Features:
    """The teacher's features of whole images, read at twice its input's side whatever the student's views need."""
    files = isinstance(images, data.ImageFiles)
    if files:
        images.max_side, before = 2 * teacher.size, images.max_side
    found = eval_knn.features(
        teacher.backbone, Subset(images, places), teacher.size, ranks, 256, workers
    )
    if files:
        images.max_side = before
    return found


def rows_done(path: Path, done: int, total: int) -> int:
    """`done`, where that many rows of a cache are there.

    Raises:
        ValueError, TypeError, OSError: where they are not.
    """
    if type(done) is not int or not 0 <= done <= total:
        raise ValueError(f"{done} of {total} rows")
    if done:
        stored = np.load(path, mmap_mode="r")
        if (
            stored.ndim != 2
            or len(stored) != total
            or stored.dtype != np.float16
            or not np.isfinite(stored[:done]).all()
        ):
            raise ValueError(f"{stored.shape} {stored.dtype}")
    return done


def cached_features(
    teacher: Teacher,
    images: data.ImageArray | data.ImageFiles,
    path: Path,
    workers: int,
    ranks: distributed.Ranks,
) -> np.ndarray:
    """The teacher's features of the whole images: (N, D) float16, in a memory-mapped file that is made where it is missing.

    Beside it, PATH.json says which weights and images it belongs to and how many rows are done, so that a stopped run goes on.

    Raises:
        ValueError: where the file cannot be written, is damaged, belongs to other weights or images, or a feature does not fit
            float16.
    """
    notes, total = Path(f"{path}.json"), len(images)
    own = {"teacher": teacher.fingerprint, "images": images.fingerprint(), "size": teacher.size}
    done = 0
    if notes.exists():
        try:
            theirs = json.loads(notes.read_text())
            others = [
                (what, theirs[key], own[key])
                for key, what in (("teacher", "weights"), ("images", "images"), ("size", "sizes"))
                if theirs[key] != own[key]
            ]
            if not others:
                done = rows_done(path, theirs["done"], total)
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            raise ValueError(
                f"--cache_teacher {path} is damaged: delete it and {notes.name}"
            ) from error
        if others:
            what, theirs, ours = others[0]
            raise ValueError(
                f"--cache_teacher {path} belongs to other {what} ({theirs}, not {ours}): give another file, or delete it "
                f"and {notes.name}"
            )
        if done:
            places = range(min(total, max(8, ranks.world)))
            first = features_of_images(teacher, images, places, workers, ranks).features.cpu()
            stored = np.load(path, mmap_mode="r")[: len(first)]
            if stored.shape != first.shape or not np.allclose(
                stored, first, rtol=0.02, atol=0.02 * first.std().item()
            ):
                raise ValueError(
                    f"--cache_teacher {path} holds other features of the first images than this teacher gives: they, or how "
                    f"it sees them, have changed; give another file, or delete it and {notes.name}"
                )
    elif path.exists():
        raise ValueError(
            f"--cache_teacher {path} exists without {notes.name}, which would say whose it is: give another file"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if done < total and not os.access(path.parent, os.W_OK):
            raise OSError(0, "it cannot be written to")
    except OSError as error:
        raise ValueError(
            f"--cache_teacher {path}: folder {path.parent}: {error.strerror}"
        ) from error
    if dist.is_initialized():
        dist.barrier()  # all have read what the first rank is going to change

    def note(rows: int) -> None:
        with checkpoint.atomic(notes) as file:
            file.write(json.dumps(own | {"done": rows}).encode())

    replaced, images.replace_bad = (
        images.replace_bad,
        False,
    )  # no substitute's features in a file that outlives its images
    while done < total:
        stop = (
            done + CHUNK if total - done - CHUNK >= ranks.world else total
        )  # no rank is left without an image
        rows = features_of_images(
            teacher, images, range(done, stop), workers, ranks
        ).features.half()
        if not rows.isfinite().all():
            raise ValueError(
                f"features of {teacher.name} exceed float16's range, 65,504: --cache_teacher cannot hold them"
            )
        if ranks.first:
            if done == 0:
                note(0)
            file = np.lib.format.open_memmap(
                path, "r+" if done else "w+", np.float16, (total, rows.shape[1])
            )
            file[done:stop] = rows.cpu().numpy()
            file.flush()
            note(stop)
            print(f"teacher: features of {stop} of {total} images in {path}", flush=True)
        done = stop
    images.replace_bad = replaced
    if dist.is_initialized():
        dist.barrier()
    return np.load(path, mmap_mode="r")


def trained_classifier(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Logistic regression on a teacher's features, with the weight decay 1e-4 on scaled ones, as a layer for them as they are."""
    scaler = probe.Scaler(features)
    weights = probe.logistic_regression(scaler(features), labels, classes, [1e-4])[
        :, 0
    ]  # (D + 1, C)
    layer = nn.Linear(features.shape[1], classes).to(features.device).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_((scaler.matrix @ weights[:-1]).T)
        layer.bias.copy_(weights[-1] - scaler.mean @ scaler.matrix @ weights[:-1])
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class Distillation:
    """A student learns to answer as a frozen teacher does; a method for `train.train`, see `train.SelfDistillation`.

    The teacher sees the student's global views, and its mean over them stands for the local ones; or, from a cache or a file,
    the whole image, which then stands for all views. The objective mvmr, which is about the plain image, has the student see it too.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: distributed.Ranks,
        source: data.Data,
        total_steps: int,
    ):
        self.args, self.ranks, self.source, self.total_steps = args, ranks, source, total_steps
        self.weights = dict(
            zip(args.objective, args.objective_weight or [1.0] * len(args.objective))
        )
        self.teacher = teacher = open_teacher(args, source, ranks)
        width = self.teacher_width()
        if args.cache_teacher:
            teacher.features = cached_features(
                teacher, source.pretrain, Path(args.cache_teacher), args.num_workers, ranks
            )
        known = [module for module in (teacher.head, teacher.classifier) if module]
        self.settings = {
            "teacher's weights": "-".join([teacher.fingerprint, *map(fingerprint, known)]),
            "cached": bool(args.cache_teacher),
        }
        self.teacher_knn = None
        if args.teacher_head == "train":
            if source.train is None:
                raise ValueError(f"--teacher_head train needs labels, and {source.name} has none")
            train_features = self.features_of_teacher(source.train)
            teacher.classifier = trained_classifier(
                train_features.features, train_features.labels, source.classes
            )
        if teacher.classifier and teacher.classifier.in_features != width:
            raise ValueError(
                f"{teacher.name}: its classifier takes {teacher.classifier.in_features} features, its network gives {width}"
            )
        if args.alpha < 1 and source.train is not source.pretrain:
            raise ValueError(
                f"--alpha {args.alpha} needs labels, and {source.name} has none for the images to train on"
            )
        if teacher.classifier and source.classes not in (0, teacher.classifier.out_features):
            raise ValueError(
                f"{teacher.name}: its classifier knows {teacher.classifier.out_features} classes, {source.name} has {source.classes}; "
                "--teacher_head train trains another"
            )

        backbone = train.build_backbone(args)
        self.network = distributed.on_device(
            ManyHeads(backbone, self.heads(backbone.embed_dim, width)), ranks
        )
        self.losses = nn.ModuleDict({"kd": KDLoss(args.temperature), "simkd": SimKDLoss()})
        if "mvmr" in self.weights:
            self.losses["mvmr"] = MVMRLoss()
        if "similarity" in self.weights:
            self.losses["similarity"] = SimilarityLoss(width, args.queue_size)
        self.parts = {"student": self.network, "loss": self.losses}
        self.backbone, self.kept, self.out_dim, self.average = backbone, "student", None, None
        if "dino" in self.weights:
            self.losses["dino"] = DINOLoss(len(teacher.head.last_layer.weight), args.student_temp)
            self.losses["dino"].center.copy_(teacher.center)
            self.parts["average"] = self.average = ema.make_teacher(self.network)
            self.pairs = ema.paired_parameters(self.average, self.network)
            self.buffers = ema.paired_buffers(self.average, self.network)
            self.backbone, self.kept = self.average.backbone, "student's average"
        self.losses.to(ranks.device)

    def teacher_width(self) -> int:
        """Number of the teacher's features."""
        if self.teacher.features is not None:
            return self.teacher.features.shape[1]
        size = self.teacher.size
        try:
            features = self.teacher.backbone(
                torch.zeros(1, 3, size, size, device=self.ranks.device)
            )
        except Exception as error:  # somebody else's code fails in any way there is
            raise ValueError(
                f"{self.teacher.name} cannot take an image of {size} x {size} pixels, see --teacher_size: {error}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            given = (
                tuple(features.shape)
                if isinstance(features, Tensor)
                else f"a {type(features).__name__}"
            )
            raise ValueError(
                f"{self.teacher.name} gives {given} for an image, where a tensor (1, features) was expected"
            )
        return features.shape[1]

    def heads(self, own: int, width: int) -> dict[str, nn.Module]:
        """What the student's features of `own` numbers pass through for each objective."""
        heads: dict[str, nn.Module] = {}
        if "kd" in self.weights:
            if self.teacher.classifier:
                heads["kd"] = nn.Linear(own, self.teacher.classifier.out_features)
            elif self.args.match == "pool":
                heads["kd"] = nn.AdaptiveAvgPool1d(min(own, width))
            else:
                heads["kd"] = nn.Linear(own, width)
        for name in ("simkd", "similarity"):  # in this order on all ranks and in all runs
            if name in self.weights:
                heads[name] = Projector(own, max(own, width), width)
        if "mvmr" in self.weights:
            heads["mvmr"] = Projector(own, *self.args.projector)
        if "dino" in self.weights:
            theirs = self.teacher.head
            hidden = theirs.mlp[0].out_features
            heads["dino"] = DINOHead(
                own,
                len(theirs.last_layer.weight),
                any(isinstance(m, nn.BatchNorm1d) for m in theirs.mlp),
                theirs.last_layer.gain is None,
                hidden,
            )
        return heads

    def targets(self, views: list[Tensor], indices: Tensor) -> Tensor:
        """The teacher's features for each view of the student: (V * B, D)."""
        if self.teacher.features is not None:
            rows = torch.from_numpy(
                np.asarray(self.teacher.features[indices.numpy()], dtype=np.float32)
            )
            return rows.to(self.ranks.device).repeat(len(views), 1)
        whole = [self.teacher(view) for view in views[:2]]
        return torch.cat(whole + [(whole[0] + whole[1]) / 2] * (len(views) - 2))

    def objective(
        self, model: nn.Module, views: list[Tensor], batch: data.Batch, step: int, logging: bool
    ) -> tuple[Tensor, Tensor]:
        seen, images = views, len(batch.labels)
        if "mvmr" in self.weights:
            seen = [*views, train.plain_view(batch, self.args.global_crops_size)]
        features, outputs = model(seen)
        targets = self.targets(views, batch.indices)
        terms = {}
        for name, answers in outputs.items():
            answers, plain = answers[: len(targets)], answers[len(targets) :]
            if name == "kd":
                terms[name] = self.kd_term(answers, targets, batch.labels.repeat(len(views)))
            elif name == "mvmr":
                known = (
                    self.teacher(seen[-1]) if self.teacher.features is None else targets[:images]
                )
                terms[name] = sum(self.losses[name](plain, answers[:images], [known]))
            elif name == "dino":
                with torch.no_grad():
                    prototypes = self.teacher.head(targets[: 2 * images])
                terms[name] = self.losses[name](
                    answers.chunk(len(views)), prototypes.chunk(2), self.args.teacher_temp
                )
            elif name == "similarity":
                terms[name] = self.losses[name](
                    answers, targets if self.teacher.features is None else targets[:images]
                )
            else:
                terms[name] = self.losses[name](answers, targets)
        if logging:
            self.seen = (
                features[:images].detach(),
                {name: term.detach() for name, term in terms.items()},
            )
        loss = sum(self.weights[name] * term for name, term in terms.items())
        return loss, loss

    def kd_term(self, answers: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        if self.teacher.classifier:
            with torch.no_grad():
                targets = self.teacher.classifier(targets)
        elif targets.shape[1] > answers.shape[1]:  # --match pool
            targets = F.adaptive_avg_pool1d(targets, answers.shape[1])
        kd = self.losses["kd"](answers, targets)
        if self.args.alpha == 1:
            return kd
        return self.args.alpha * kd + (1 - self.args.alpha) * F.cross_entropy(
            answers.float(), labels.to(answers.device)
        )

    def after_backward(self, step: int) -> None:
        pass

    def after_step(self, step: int) -> None:
        if self.average:
            momentum = schedules.cosine(step, self.total_steps, self.args.momentum_teacher, 1.0)
            ema.update(*self.pairs, momentum)
            ema.update(*self.buffers, momentum)

    def signs(self) -> dict[str, float]:
        features, terms = self.seen
        std, rank = monitor.spread(features)
        values = {
            name: distributed.mean_over_ranks(term.clone()).item() for name, term in terms.items()
        }
        return (values if len(values) > 1 else {}) | {
            "feature_std": std.item(),
            "effective_rank": rank.item(),
        }

    def features_of_teacher(self, images: data.ImageArray | data.ImageFiles) -> evaluate.Features:
        """Of the whole images, from the cache or a file where they are in it."""
        if self.teacher.features is not None and images is self.source.pretrain:
            found = torch.from_numpy(np.asarray(self.teacher.features, dtype=np.float32))
            return evaluate.Features(
                found.to(self.ranks.device),
                torch.as_tensor(images.labels).to(self.ranks.device),
                [],
            )
        if self.teacher.backbone is None:
            raise ValueError(
                f"{self.teacher.name} holds features of the images to train on alone, and others are needed"
            )
        return features_of_images(
            self.teacher, images, range(len(images)), self.args.num_workers, self.ranks
        )

    def beside(self) -> str:
        """The teacher's accuracy, measured once."""
        if self.teacher.backbone is None:
            return ""
        if self.teacher_knn is None:
            memory, asked = (
                self.features_of_teacher(images) for images in (self.source.train, self.source.test)
            )
            self.teacher_knn = evaluate.knn_accuracy(
                memory, asked, self.args.nb_knn, self.source.classes
            )
        return f", of the teacher {self.teacher_knn:.4f}"

    def classifier_accuracy(self) -> str | None:
        """How well the teacher's classifier does on its own features and, through simkd's projector, on the student's."""
        if not self.teacher.classifier or self.teacher.backbone is None or self.source.test is None:
            return None
        asked = self.features_of_teacher(self.source.test)
        said = f"the teacher's classifier: {evaluate.accuracy(self.teacher.classifier(asked.features), asked.labels):.4f} on its features"
        network = (self.average or self.network).eval()
        distributed.broadcast_buffers(network)
        own = eval_knn.features(
            network.backbone,
            self.source.test,
            self.args.global_crops_size,
            self.ranks,
            256,
            self.args.num_workers,
        )
        if "simkd" in self.weights:
            answers = self.teacher.classifier(network.heads["simkd"](own.features))
            said += f", {evaluate.accuracy(answers, own.labels):.4f} on the student's through simkd's projector"
        if "kd" in self.weights:
            said += f"; the student's own: {evaluate.accuracy(network.heads['kd'](own.features), own.labels):.4f}"
        return said


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    method = train.train(args, ranks, train.settle(args, ranks), Distillation)
    with torch.no_grad():
        if (said := method.classifier_accuracy()) and ranks.first:
            print(said, flush=True)


def main() -> None:
    args = train.parse(get_parser(), skip=SKIPPED)
    distributed.launch("distill.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

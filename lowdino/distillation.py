"""Distillation: a student learns from a frozen teacher (LowDINO, figure 3; DINOv2, section 5).

--objective  the student's
kd           logits, softened by --temperature, follow the teacher's by KL (LowDINO, equation 4)
             times T^2 (Hinton et al., 2015): of a classifier, the one in the teacher's file
             (--teacher_head file) or one trained first (train); without one, features, through
             a learned linear map or --match pool. --kd_weight below 1 adds the labels
simkd        pooled features, through a projector, match the teacher's by mean squared error;
             the teacher's classifier, where it has one, is tried on them at the end
similarity   similarities to a queue of images follow the teacher's (CompRess, SEED)
mvmr         embedding of an augmented view depends on that of the plain image and on the
             teacher's features, of any width, by distance correlation (MV-MR)
dino         distributions of all views over the teacher's prototypes follow the teacher's for
             the global ones, as DINOv2 distils but without its loss on patches; the student's
             average is kept

A teacher is a backbone.pth, a state dict of DINO's or DINOv2's ViT, ARCH=FILE for another plain
state dict, a checkpoint.pth of train.py (with its head, where its method is dino), MODULE:FUNCTION
that returns a network, a .npy or .npz of its features, or "patches", a dictionary of the images'
patches. It sees the student's global views; or --cache_teacher FILE.npy keeps its features of the
whole images, see `features.cached_features`.
"""

import hashlib
import importlib
import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowdino
from lowdino import checkpoint, data, datasets, distributed, ema, evaluate, losses, methods, probe
from lowdino.distributed import UserError, user_errors
from lowdino.features import (
    CHUNK,
    compute_teacher_features,
    fit_dictionaries,
    normalisation,
    open_network,
)
from lowdino.heads import DINOHead, ManyHeads, MultiViewNetwork, Projector
from lowdino.methods import Flag, Method, feature_metrics, mean_terms, plain_view, shared

# -- The teacher -----------------------------------------------------------------------------------


@dataclass
class Teacher:
    """A frozen network with its classifier and DINO head, where it has them; or features alone."""

    name: str
    fingerprint: str  # of all its weights, or of its file of features
    width: int  # D, of its features
    device: torch.device
    backbone: nn.Module | None = None
    size: int = 0  # side of its input in pixels
    classifier: nn.Linear | None = None
    head: DINOHead | None = None
    center: Tensor | None = None
    features: np.ndarray | None = None  # (N, D), of these images, in their order
    images: data.ImageArray | data.ImageFiles | None = None

    @torch.no_grad()
    def __call__(self, view: Tensor, student: nn.Module) -> Tensor:
        """Features of a view that is normalised for the student: (B, 3, H, W) -> (B, D) float32."""
        mine = tuple(map(tuple, normalisation(self.backbone)))
        if normalisation(student) != mine:
            values = (*normalisation(student), *mine)
            student_mean, student_std, mean, std = (
                torch.tensor(v, device=view.device).view(1, -1, 1, 1) for v in values
            )
            view = (view * student_std + student_mean - mean) / std
        if view.shape[-1] != self.size:
            side = (self.size, self.size)
            view = F.interpolate(view, side, mode="bicubic", align_corners=False, antialias=True)
        return self.backbone(view).float()

    def targets(
        self, views: list[Tensor], indices: Tensor, student: nn.Module, global_views: int = 2
    ) -> Tensor:
        """The teacher's features for each of V views of the images at `indices`: (V * B, D).

        Where they are looked up, those of the whole image stand for every view. Else the teacher
        sees the global views, which come first; their mean stands for every local view.
        """
        if self.features is not None:
            rows = np.asarray(self.features[indices.cpu().numpy()], dtype=np.float32)
            return torch.from_numpy(rows).to(self.device).repeat(len(views), 1)
        seen = [self(view, student) for view in views[:global_views]]
        return torch.cat(seen + [sum(seen) / len(seen)] * (len(views) - len(seen)))

    def features_of(self, images, workers: int, ranks: distributed.Ranks) -> evaluate.Features:
        """Features of whole images, looked up or computed over all ranks.

        A UserError where the teacher is a file of features of other images.
        """
        if self.features is not None and images is self.images:
            rows = torch.from_numpy(np.asarray(self.features, dtype=np.float32))
            labels = torch.as_tensor(images.labels)
            return evaluate.Features(rows.to(self.device), labels.to(self.device), [])
        if self.backbone is None:
            raise UserError(f"{self.name} has features of the training images alone, not of others")
        return compute_teacher_features(self, images, range(len(images)), workers, ranks)


def fingerprint(*modules: nn.Module | None) -> str:
    """SHA-256 over names and values of all weights, in 16 digits for each module."""
    digests = []
    for module in filter(None, modules):
        digest = hashlib.sha256()
        for name, value in sorted(module.state_dict().items()):
            values = value.detach().cpu().flatten().clone().view(torch.uint8).numpy()
            digest.update(name.encode() + values.tobytes())
        digests.append(digest.hexdigest()[:16])
    return "-".join(digests)


# -- Opening a teacher -----------------------------------------------------------------------------


def open_teacher(s, source: datasets.Source, ranks: distributed.Ranks) -> Teacher:
    """The teacher that --teacher names, or a UserError."""
    if s.teacher.endswith((".npy", ".npz")):
        return features_of_file(s.teacher, source, ranks)
    arch, _, path = s.teacher.partition("=")
    path = path if arch in lowdino.ARCHS else s.teacher
    content: dict = {}
    head = center = None
    if path == "patches":
        name, backbone = open_network(path)
        fit_dictionaries(backbone, source.pretrain, ranks, s.num_workers, s.seed)
    elif not os.path.isfile(path) and ":" in path:
        name, backbone = path, imported(path)
    else:
        with user_errors():
            content = checkpoint.load(path)
        if "settings" in content:
            name, (backbone, head, center) = path, teacher_of_run(path, content)
        else:
            name, backbone = open_network(s.teacher)
    if head is None and "dino" in s.objective:
        given = f"give a checkpoint.pth of train.py, not {path}"
        raise UserError(f"--objective dino needs the teacher's head: {given}")
    size = s.teacher_size or getattr(backbone, "image_size", None) or s.global_crops_size
    if not isinstance(size, int):
        raise UserError(f"{name} takes images of {size} pixels: give one --teacher_size")
    classifier = classifier_of_file(path, content) if s.teacher_head == "file" else None
    for module in filter(None, (backbone, head, classifier)):
        module.to(ranks.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    channels = len(normalisation(backbone)[0])
    if channels != s.in_chans:
        raise UserError(f"{name} sees {channels} channels, and --in_chans is {s.in_chans}")
    width, key = width_of(name, backbone, size, ranks), fingerprint(backbone, head, classifier)
    parts = dict(backbone=backbone, size=size, classifier=classifier, head=head, center=center)
    return Teacher(name, key, width, ranks.device, **parts)


def width_of(name: str, backbone: nn.Module, size: int, ranks: distributed.Ranks) -> int:
    """The number of features that a network gives for an image."""
    channels = len(normalisation(backbone)[0])
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, channels, size, size, device=ranks.device))
    except Exception as error:  # somebody else's code fails in any way there is
        raise UserError(
            f"{name} cannot take an image of {size} x {size} pixels, see --teacher_size: {error}"
        ) from error
    is_tensor = isinstance(features, Tensor)
    if not is_tensor or features.ndim != 2:
        given = tuple(features.shape) if is_tensor else f"a {type(features).__name__}"
        raise UserError(f"{name} gives {given} for an image, not a tensor (1, features)")
    return features.shape[1]


def imported(path: str) -> nn.Module:
    """The network that MODULE:FUNCTION returns; MODULE may lie in the current folder."""
    module, _, function = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        backbone = getattr(importlib.import_module(module), function)()
    except Exception as error:  # somebody else's code fails in any way there is
        raise UserError(f"--teacher {path}: cannot import and call it: {error}") from error
    if not isinstance(backbone, nn.Module):
        raise UserError(f"--teacher {path} returns a {type(backbone).__name__}, not a network")
    return backbone


def teacher_of_run(path: str, content: dict) -> tuple[nn.Module, DINOHead, Tensor]:
    """Backbone, head and centre of the momentum teacher in a checkpoint of train.py."""
    settings, state = content["settings"], content.get("method", {})
    weights = under("teacher.", state)
    if "loss.center" not in state or not weights:
        raise UserError(f"{path} has no DINO head, as a checkpoint of train.py --method dino has")
    if settings["arch"] in lowdino.vit.ARCHS:
        backbone = lowdino.vit.like(under("backbone.", weights))
    else:
        backbone = lowdino.build_backbone(settings["arch"])
    lowdino.models.set_in_chans(backbone, settings.get("in_chans", 3))
    names = "out_dim", "use_bn_in_head", "norm_last_layer", "hidden_dim"
    head = DINOHead(backbone.embed_dim, *(settings[name] for name in names))
    MultiViewNetwork(backbone, head).load_state_dict(weights)
    backbone.mean, backbone.std = map(tuple, content["normalisation"])
    backbone.image_size = settings["global_crops_size"]
    return backbone, head, state["loss.center"]


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict below a prefix, which is taken off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def classifier_of_file(path: str, content: dict) -> nn.Linear:
    try:
        weights = content["classifier"]
        classifier = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
        classifier.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        others = "eval_linear.py --finetune writes one, --teacher_head train trains one"
        raise UserError(f"{path} holds no classifier, with weight and bias; {others}") from error
    return classifier


def features_of_file(path: str, source: datasets.Source, ranks: distributed.Ranks) -> Teacher:
    """A teacher that is an array (N, D): an .npy, or `train` of eval_knn.py --features."""
    try:
        arrays = np.load(path, mmap_mode="r", allow_pickle=False)
        files = None
        if isinstance(arrays, np.lib.npyio.NpzFile):
            with arrays:
                files = arrays["train_files"] if "train_files" in arrays else None
                arrays = arrays["train"]
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # a damaged file makes zipfile and numpy fail in any way there is
        kind = "a file of features, (N, D), `train` in an .npz"
        raise UserError(f"cannot read {path}: it is damaged, or not {kind}") from error
    if arrays.ndim != 2 or arrays.dtype.kind != "f":
        given = f"{arrays.shape} {arrays.dtype}"
        raise UserError(f"{path}: features should be (N, D) floating-point numbers, not {given}")
    images = source.pretrain
    same, paths = len(arrays) == len(images), getattr(images, "paths", None)
    if files is not None and paths is not None:
        same = same and [os.path.basename(str(f)) for f in files] == [*map(os.path.basename, paths)]
    if not same:
        others = f"{len(arrays)} other images than the {len(images)} of {source.name}"
        raise UserError(f"{path} holds features of {others}")
    if not all(np.isfinite(arrays[i : i + CHUNK]).all() for i in range(0, len(arrays), CHUNK)):
        raise UserError(f"{path} has values that are not finite numbers")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    key = digest.hexdigest()[:16]
    return Teacher(path, key, arrays.shape[1], ranks.device, features=arrays, images=images)


# -- The teacher's classifier ----------------------------------------------------------------------


def add_classifier(teacher: Teacher, s, source: datasets.Source, ranks) -> None:
    """Train the classifier of --teacher_head train; a UserError where a classifier does not fit."""
    if s.teacher_head == "train":
        if source.train is None:
            raise UserError(f"--teacher_head train needs labels, and {source.name} has none")
        x, y, _ = teacher.features_of(source.train, s.num_workers, ranks)
        teacher.classifier = trained_classifier(x, y, source.classes)
    if classifier := teacher.classifier:
        inputs, outputs, classes = classifier.in_features, classifier.out_features, source.classes
        if inputs != teacher.width:
            what = f"its classifier takes {inputs} features, its network gives {teacher.width}"
            raise UserError(f"{teacher.name}: {what}")
        if classes not in (0, outputs):
            what = f"its classifier knows {outputs} classes, {source.name} has {classes}"
            raise UserError(f"{teacher.name}: {what}; --teacher_head train trains another")
    if s.kd_weight < 1 and source.train is not source.pretrain:
        raise UserError(f"--kd_weight {s.kd_weight} needs labels of {source.name}, which has none")


def trained_classifier(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Logistic regression on features (N, D), decay 1e-4 on half-whitened ones, as a layer."""
    scaler = probe.HalfWhitening(features)
    weights = probe.logistic_regression(scaler(features), labels, classes, [1e-4])[:, 0]  # (D+1, C)
    layer = nn.Linear(features.shape[1], classes).to(features.device).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_((scaler.matrix @ weights[:-1]).T)
        layer.bias.copy_(weights[-1] - scaler.mean @ scaler.matrix @ weights[:-1])
    return layer


# -- The method ------------------------------------------------------------------------------------


OBJECTIVES = ("kd", "simkd", "similarity", "dino", "mvmr")
HEADS = ("none", "file", "train")
# Flags of one objective, refused where it is not given.
OF_OBJECTIVE = {
    "kd": ("temperature", "kd_weight", "match"),
    "similarity": ("queue_size",),
    "mvmr": ("projector",),
    "dino": ("student_temp", "teacher_temp", "momentum_teacher"),
}


class Distillation(Method):
    """A student learns from a frozen teacher by a sum of objectives.

    The student also sees the plain image where `mvmr` is an objective. The teacher is no
    sub-module, so no checkpoint holds it.
    """

    name = "distillation"
    whitens = True
    flags = (
        Flag("teacher", "the network or features to learn from"),
        Flag("objective", "what to match, see below", choices=OBJECTIVES, nargs="+"),
        Flag("objective_weight", "a weight per objective; default: 1", float, "> 0", nargs="+"),
        Flag("teacher_size", "side of the teacher's input; default: its file's", int, ">= 32"),
        Flag("cache_teacher", "file of the teacher's features of whole images", metavar="FILE.npy"),
        Flag("teacher_head", "its classifier, for kd and simkd", default="none", choices=HEADS),
        Flag("kd_weight", "weight of kd; labels have 1 - kd_weight", float, "0 to 1"),
        Flag("match", "how kd without a classifier matches widths", choices=("projector", "pool")),
        *shared("temperature", "queue_size", "projector"),
        *shared("student_temp", "teacher_temp", "momentum_teacher"),
    )

    def __init__(
        self, backbone, args, teacher, total_steps: float = math.inf, epoch_steps: int = 0
    ):
        super().__init__(args, total_steps, epoch_steps)
        self.teacher = teacher
        weights = args.objective_weight or [1.0] * len(args.objective)
        self.objectives = dict(zip(args.objective, weights))
        heads = distillation_heads(backbone.embed_dim, args, teacher)
        self.student = ManyHeads(backbone, heads)
        self.losses = nn.ModuleDict(distillation_losses(args, teacher))
        if "dino" in self.objectives:  # as in DINOv2, the student's moving average is kept
            self.evaluated = "average_student"
            self.average_student = ema.make_teacher(self.student)
            self.weights = ema.paired_parameters(self.average_student, self.student)

    def forward(self, views, batch=None, step=0):
        seen = views
        if "mvmr" in self.objectives:
            seen = [*views, plain_view(batch, views[0].shape[-1], self.backbone)]
        features, outputs = self.student(seen)  # (V B, D), and of each head (V B, ...)
        number = self.args.global_crops_number
        t = self.teacher.targets(views, batch.indices, self.backbone, number)  # (V B, D_t)
        terms = {name: self.term(name, s, t, seen, batch) for name, s in outputs.items()}
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.last = features.detach()[: len(views[0])]
        return sum(self.objectives[name] * term for name, term in terms.items())

    def term(self, name: str, s: Tensor, t: Tensor, views: list[Tensor], batch) -> Tensor:
        """One objective, from the student's outputs s (V B, ...) and the teacher's features t."""
        loss, B = self.losses[name], len(views[0])
        once = t if self.teacher.features is None else t[:B]  # one row for each that it saw
        s, s_plain = s[: len(t)], s[len(t) :]
        if name == "kd":
            return kd_term(self, s, t, batch.labels.repeat(len(t) // B))
        if name == "dino":
            with torch.no_grad():
                logits = self.teacher.head(t[: 2 * B])
                P_t = loss.targets(logits, self.args.teacher_temp).chunk(2)
            value = loss.pairs(s.split(B), P_t)
            loss.update_center(logits)
            return value
        if name == "mvmr":
            if self.teacher.features is None:
                once = self.teacher(views[-1], self.backbone)
            return sum(loss(s_plain, s[:B], [once]))
        return loss(s, once if name == "similarity" else t)

    def after_step(self, step=0):
        if self.evaluated == "average_student":
            momentum = methods.teacher_momentum(self, step)
            ema.update(*self.weights, momentum)
            # Paired anew, because a move to a device replaces buffers, unlike parameters.
            ema.update(*ema.paired_buffers(self.average_student, self.student), momentum)

    def metrics(self):
        return mean_terms(self) | feature_metrics(self.last)

    @classmethod
    def fit(cls, s):
        if s.cache_teacher or s.teacher.endswith((".npy", ".npz")):
            area = [0.9, 1.0]
            s = s.fit("global_crops_scale", area, "the teacher's features are of whole images")
        if "dino" in s.objective:
            s = s.fit("global_crops_number", 2, "--objective dino pairs two views")
        return s

    @classmethod
    def check(cls, s):
        weights, objectives = s.objective_weight, " ".join(s.objective)
        if not s.teacher:
            return "--teacher names the network or features to learn from: give it"
        if len(set(s.objective)) < len(s.objective):
            return f"--objective names one twice: {objectives}"
        if weights and len(weights) != len(s.objective):
            return f"--objective_weight needs a number for each of {objectives}, not {weights}"
        return check_objectives(s) or check_teacher(s)


def check_objectives(s) -> str | None:
    """What is wrong between the flags of the objectives, in one sentence, or None."""
    for objective, names in OF_OBJECTIVE.items():
        if objective not in s.objective and (foreign := s.typed & {*names}):
            given = f"not of {' '.join(s.objective)}"
            return f"--{min(foreign)} is a flag of --objective {objective}, {given}"
    number = s.global_crops_number
    if "dino" in s.objective and {"preset", "global_crops_number"} & s.typed and number != 2:
        return f"--objective dino takes --global_crops_number 2, not {number}"
    no_classifier = s.teacher_head == "none"
    if s.kd_weight < 1 and no_classifier:
        return "--kd_weight below 1 weighs labels against kd's logits: it needs a --teacher_head"
    if s.match == "pool" and not no_classifier:
        return "--match pool goes with --teacher_head none: a classifier's logits have one width"
    if not no_classifier and not {"kd", "simkd"} & {*s.objective}:
        return "--teacher_head is used by --objective kd and simkd, and neither is given"
    return None


def check_teacher(s) -> str | None:
    """What is wrong between the flags of the teacher, in one sentence, or None."""
    is_file, head = s.teacher.endswith((".npy", ".npz")), s.teacher_head
    if s.teacher in lowdino.ARCHS:
        return f"--teacher {s.teacher} would have random weights: give {s.teacher}=FILE"
    if is_file and head == "file":
        return "--teacher_head file needs a teacher's file of weights, not one of features"
    if is_file and head == "train" and "kd" not in s.objective:
        return "--teacher_head train with a file of features is of use to --objective kd alone"
    if is_file and "dino" in s.objective:
        return "--objective dino needs the teacher's head: give a checkpoint.pth of --method dino"
    if "dino" in s.objective and s.cache_teacher:
        return "--objective dino needs the teacher's logits for every view: no --cache_teacher"
    if is_file and (s.cache_teacher or s.teacher_size):
        return "--cache_teacher and --teacher_size need a teacher that is a network, not a file"
    if s.cache_teacher and not s.cache_teacher.endswith(".npy"):
        return f"--cache_teacher should end in .npy, not {s.cache_teacher}"
    return None


def kd_term(method: Distillation, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """KL between softened logits (LowDINO, equation 4), perhaps with the labels' cross-entropy."""
    if method.teacher.classifier:
        with torch.no_grad():
            t = method.teacher.classifier(t)
    elif t.shape[1] > s.shape[1]:  # --match pool
        t = F.adaptive_avg_pool1d(t, s.shape[1])
    loss, weight = method.losses["kd"](s, t), method.args.kd_weight
    if weight == 1:
        return loss
    return weight * loss + (1 - weight) * F.cross_entropy(s.float(), labels.to(s.device))


def distillation_heads(dim: int, args, teacher: Teacher) -> dict[str, nn.Module]:
    """A head on the student's features (B, dim) for each objective, always in one order."""
    heads: dict[str, nn.Module] = {}
    width = teacher.width
    if "kd" in args.objective:
        if teacher.classifier:
            heads["kd"] = nn.Linear(dim, teacher.classifier.out_features)
        elif args.match == "pool":
            heads["kd"] = nn.AdaptiveAvgPool1d(min(dim, width))
        else:
            heads["kd"] = nn.Linear(dim, width)
    for name in ("simkd", "similarity"):
        if name in args.objective:
            heads[name] = Projector(dim, max(dim, width), width)
    if "mvmr" in args.objective:
        heads["mvmr"] = Projector(dim, *args.projector)
    if "dino" in args.objective:
        mlp, last = teacher.head.mlp, teacher.head.last_layer
        use_bn = any(isinstance(module, nn.BatchNorm1d) for module in mlp)
        norm_last_layer, hidden_dim = last.gain is None, mlp[0].out_features
        heads["dino"] = DINOHead(dim, len(last.weight), use_bn, norm_last_layer, hidden_dim)
    return heads


def distillation_losses(args, teacher: Teacher) -> dict[str, nn.Module]:
    build = {
        "kd": lambda: losses.KDLoss(args.temperature),
        "simkd": losses.SimKDLoss,
        "similarity": lambda: losses.SimilarityLoss(teacher.width, args.queue_size),
        "mvmr": losses.MVMRLoss,
        "dino": lambda: losses.DINOLoss(len(teacher.head.last_layer.weight), args.student_temp),
    }
    by_name = {name: build[name]() for name in args.objective}
    if "dino" in by_name:
        by_name["dino"].center.copy_(teacher.center)
    return by_name

"""Every way to learn, one class a method. Each is a module that fits any training loop:

    method = DINO(backbone, options("dino", out_dim=1024), total_steps=1000)
    optimizer = torch.optim.AdamW(method.parameters())
    for step, views in enumerate(loader):  # a list of (B, 3, H, W), the global views first
        loss = method(views, step=step)
        optimizer.zero_grad()
        loss.backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)

MV-MR and distillation take the batch that the views are of, too: method(views, batch, step).
A new method is one class, the function that adds its flags, and one line in METHODS.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowdino import augment, baselines, data, descriptors, distributed, ema, losses, schedules
from lowdino.base import (
    Method,
    Projecting,
    check_pairs,
    feature_metrics,
    mean_terms,
    prototype_metrics,
    teacher_metrics,
    teacher_momentum,
)
from lowdino.flags import bool_flag, number_or_none, out_of_range
from lowdino.heads import DINOHead, MultiViewNetwork

# ---------------------------------------------------------------------------------------------
# DINO
# ---------------------------------------------------------------------------------------------


class DINO(Method):
    """Self-distillation with no labels (Caron et al., 2021, algorithm 1).

    The student's distribution over K prototypes, of every view, is to be the momentum teacher's P_t
    of another, global, view of the same image.
    """

    evaluated = "teacher"

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__()
        self.args, self.out_dim = args, args.out_dim
        self.total_steps, self.epoch_steps = total_steps, epoch_steps
        self.student = MultiViewNetwork(backbone, dino_head(backbone.embed_dim, args))
        self.teacher = ema.make_teacher(self.student)  # a copy without gradients
        self.weights = ema.paired_parameters(self.teacher, self.student)  # theta_t, theta_s
        self.loss = losses.DINOLoss(
            args.out_dim, args.student_temp, args.center_momentum, args.centering, args.alpha
        )

    def forward(self, views, batch=None, step=0):
        with torch.no_grad():
            _, _, t = self.teacher(views[:2])  # logits (2 B, K)
            P_t = self.loss.targets(t, teacher_temperature(self, step))  # centred and sharpened
        features, z, s = self.student(views)  # (V B, D), unit (V B, 256), logits (V B, K)
        loss = self.loss.pairs(s.chunk(len(views)), P_t.chunk(2))  # equation 3
        self.loss.update_center(t)  # equation 4
        self.terms, self.last = {"cross_entropy": loss.detach()}, (step, features.detach(), P_t)
        return loss + regularizers(self, features.chunk(len(views)), z.chunk(len(views)), step)

    def before_step(self, step=0):
        if step < self.args.freeze_last_layer * self.epoch_steps:
            self.student.head.last_layer.zero_grad()

    def after_step(self, step=0):
        ema.update(*self.weights, teacher_momentum(self, step))  # theta_t follows theta_s

    def metrics(self):
        return dino_metrics(self, *self.last)


def dino_head(in_dim: int, args: argparse.Namespace) -> DINOHead:
    return DINOHead(
        in_dim, args.out_dim, args.use_bn_in_head, args.norm_last_layer, args.hidden_dim
    )


def teacher_temperature(method: Method, step: int) -> float:
    """T_t, linear over its warm-up."""
    args = method.args
    warmup = round(args.warmup_teacher_temp_epochs * method.epoch_steps)
    return schedules.linear(step, warmup, args.warmup_teacher_temp, args.teacher_temp)


def regularizers(method: Method, features: tuple, z: tuple, step: int) -> Tensor | float:
    """InfoNCE between the global views, which fades, and KoLeo; by default there is neither."""
    args, total = method.args, 0.0
    if args.infonce_weight:
        weight = schedules.cosine(step, method.total_steps, args.infonce_weight, 0.0)
        total = weight * losses.InfoNCELoss()(z[0], z[1])
    if args.koleo_weight:
        koleo = losses.KoLeoLoss()
        total = total + args.koleo_weight * (koleo(features[0]) + koleo(features[1]))
    return total


def dino_metrics(method: Method, step: int, features: Tensor, P_t: Tensor) -> dict[str, float]:
    """Entropies of the teacher's distributions, spread of one view's features, state of the EMA."""
    return {
        **mean_terms(method),
        **prototype_metrics(P_t),
        **feature_metrics(features[: len(P_t) // 2]),
        **teacher_metrics(method, step),
        "teacher_temp": teacher_temperature(method, step),
    }


def add_dino_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("self-distillation").add_argument
    add("--out_dim", type=int, default=1024, help="number of prototypes K, the width of the logits")
    add("--hidden_dim", type=int, default=2048, help="width of the head's hidden layers")
    add("--use_bn_in_head", type=bool_flag, default=False, metavar="BOOL", help="batch norm there")
    help = "keep all prototypes at length 1: steadier; without it often a little better"
    add("--norm_last_layer", type=bool_flag, default=True, metavar="BOOL", help=help)
    help = "epochs during which the prototypes stay as they are"
    add("--freeze_last_layer", type=float, default=1, help=help)
    help = (
        "EMA momentum at the start; rises to 1 on a cosine. Higher for small batches, such as "
        "0.9995; none: 1 - 1/(2 sqrt(steps))"
    )
    add("--momentum_teacher", type=number_or_none, default=0.996, help=help)
    help = "the teacher: an EMA of the student, or the student of the epoch or the step before"
    updates = ["momentum", "epoch", "step"]
    add("--teacher_update", choices=updates, default="momentum", help=help)
    add("--student_temp", type=float, default=0.1, help="temperature of the student's softmax")
    add("--teacher_temp", type=float, default=0.04, help="teacher's temperature after its warm-up")
    help = "teacher's temperature at the start of its warm-up, if it has one"
    add("--warmup_teacher_temp", type=float, default=0.04, help=help)
    add("--warmup_teacher_temp_epochs", type=float, default=0, help="epochs of that warm-up")
    help = "what keeps the teacher's distribution over the prototypes even"
    add("--centering", choices=["softmax", "sinkhorn"], default="softmax", help=help)
    help = "EMA momentum of the centre, with softmax centering"
    add("--center_momentum", type=float, default=0.9, help=help)
    help = "weight of the global against the local views (SSLight); none: mean over all pairs"
    add("--alpha", type=number_or_none, help=help)
    help = "weight of the KoLeo regulariser (DINOv2 uses 0.1)"
    add("--koleo_weight", type=float, default=0.0, help=help)
    help = (
        "weight of InfoNCE between the global views at the start, falling to 0 on a cosine: it "
        "teaches a network whose own teacher knows nothing yet; 1 with random weights and few steps"
    )
    add("--infonce_weight", type=float, default=0.0, help=help)


def check_dino(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of DINO, in one sentence, or None."""
    if args.out_dim < 2:
        return f"--out_dim must be at least 2, not {args.out_dim}"
    return check_pairs(args) or out_of_range(
        args,
        not_negative=(
            "warmup_teacher_temp_epochs",
            "freeze_last_layer",
            "koleo_weight",
            "infonce_weight",
        ),
        above_zero=("student_temp", "warmup_teacher_temp", "teacher_temp"),
        fractions=("momentum_teacher", "center_momentum", "alpha"),
        at_least_one=("hidden_dim",),
    )


# ---------------------------------------------------------------------------------------------
# MV-MR
# ---------------------------------------------------------------------------------------------


class MVMR(Projecting):
    """Multi-view, multi-representation learning (Kinakh et al.), without a teacher or contrast.

    The embedding z' of an augmented view is to depend, by distance correlation, on z of the plain
    image and on fixed descriptors r_m of it. The second augmented view is one, "augmented".
    """

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        self.loss = losses.MVMRLoss(
            args.invariance_weight,
            args.variance_weight,
            args.dependence_weight,
            args.representation_weight,
        )
        if "scattering" in args.descriptors:
            size = args.global_crops_size
            with distributed.user_errors():
                self.scattering = descriptors.Scattering(size, size)

    def forward(self, views, batch=None, step=0):
        plain = plain_view(batch, views[0].shape[-1], self.backbone)
        features, outputs = self.student([plain, views[0]])  # (2 B, D)
        z, z_augmented = outputs["projector"].chunk(2)  # (B, E)
        r = self.representations(plain, views[1]) if self.args.representation_weight else []
        terms = self.loss(z, z_augmented, r)  # L1, L2 and L3, equations 4 to 9
        self.terms = {f"L{i}": term.detach() for i, term in enumerate(terms, start=1)}
        self.last = features.detach().chunk(2)[0]
        return sum(terms)  # equation 10

    def representations(self, plain: Tensor, augmented: Tensor) -> list[Tensor]:
        describe = {
            "pixels": lambda: descriptors.pixels(plain),
            "augmented": lambda: descriptors.pixels(augmented),
            "local_std": lambda: descriptors.local_std(plain),
            "hog": lambda: descriptors.hog(plain),
            "scattering": lambda: self.scattering(plain),
        }
        return [describe[name]() for name in self.args.descriptors]

    def metrics(self):
        return mean_terms(self) | feature_metrics(self.last)


def plain_view(batch: data.Batch, size: int, backbone: nn.Module) -> Tensor:
    """The whole images of a batch, resized and normalised: (B, 3, size, size)."""
    x = augment.central_view(batch.images, batch.sizes, size, backbone.mean, backbone.std)
    return x.contiguous(memory_format=torch.channels_last)


DESCRIPTORS = ("pixels", "augmented", "local_std", "hog", "scattering")
MVMR_WEIGHTS = (
    "invariance_weight",
    "variance_weight",
    "dependence_weight",
    "representation_weight",
)


def add_mvmr_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("MV-MR").add_argument
    help = "fixed representations of the plain image"
    add("--descriptors", nargs="+", choices=DESCRIPTORS, default=list(DESCRIPTORS), help=help)
    help = "of the mean square between the embeddings, in L1"
    add("--invariance_weight", type=float, default=1.0, help=help)
    help = "of the hinge on their standard deviation, in L1"
    add("--variance_weight", type=float, default=1.0, help=help)
    help = "of L2, 1 - distance correlation between the embeddings"
    add("--dependence_weight", type=float, default=1.0, help=help)
    help = "of L3, the same between embedding and each descriptor"
    add("--representation_weight", type=float, default=1.0, help=help)


def check_mvmr(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of MV-MR, in one sentence, or None."""
    if args.local_crops_number:
        return (
            "--method mvmr has one augmented view: give --local_crops_number 0, not "
            f"{args.local_crops_number}, or --preset mvmr"
        )
    if wrong := check_pairs(args):
        return wrong
    if len(set(args.descriptors)) < len(args.descriptors):
        return f"--descriptors names one twice: {' '.join(args.descriptors)}"
    if wrong := out_of_range(args, not_negative=MVMR_WEIGHTS):
        return wrong
    if not any(getattr(args, name) for name in MVMR_WEIGHTS):
        return "--method mvmr has nothing to learn: all four of its weights are 0"
    return None


# ---------------------------------------------------------------------------------------------
# EMP
# ---------------------------------------------------------------------------------------------


class EMP(Projecting):
    """Extreme multi-patch learning (EMP-SSL; Tong et al., 2023): many views of few images.

    The embeddings of an image's views are to be near their mean, while those of the batch have the
    largest coding rate. There is no teacher and no contrast.
    """

    remedy = "lower --cosine_weight, or --lr"

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        self.loss = losses.CodingRateLoss(args.cosine_weight, args.rate_eps)

    def forward(self, views, batch=None, step=0):
        features, outputs = self.student(views)
        z = outputs["projector"].unflatten(0, (len(views), -1))  # (V, B, d)
        cosine, rate = self.loss(z)
        self.keep(step, features, outputs["projector"], views, cosine=cosine, coding_rate=rate)
        return self.loss.total(cosine, rate)


def add_emp_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("EMP").add_argument
    help = "widths of the projector's layers; default: the method's"
    add("--projector", type=int, nargs="+", metavar="WIDTH", help=help)
    help = "weight of the cosine between an embedding and the mean of its image's"
    add("--cosine_weight", type=float, default=200.0, help=help)
    help = "squared precision of the coding rate"
    add("--rate_eps", type=float, default=0.2, help=help)


def check_emp(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of EMP, in one sentence, or None."""
    if args.global_crops_number + args.local_crops_number < 2:
        return "--method emp compares views of an image: give --global_crops_number 2 or more"
    return out_of_range(args, not_negative=("cosine_weight",), above_zero=("rate_eps",))


# ---------------------------------------------------------------------------------------------
# The table of train.py --method
# ---------------------------------------------------------------------------------------------


def no_flags(parser: argparse.ArgumentParser) -> None:
    """Of a method that only shares those of others."""


class Entry(NamedTuple):
    """A method's class, the function that adds its flags, the one that checks them, the names of
    its flags that another method adds, and its own defaults where they differ from a flag's."""

    build: Callable[..., Method]
    add_flags: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], str | None]
    shared: Sequence[str] = ()
    defaults: dict = {}


METHODS = {
    "dino": Entry(DINO, add_dino_flags, check_dino),
    "emp": Entry(EMP, add_emp_flags, check_emp, defaults=dict(projector=[512, 512, 256])),
    "mvmr": Entry(
        MVMR,
        add_mvmr_flags,
        check_mvmr,
        shared=("projector",),
        defaults=dict(projector=[8192] * 3),
    ),
    "byol": Entry(
        baselines.BYOL,
        no_flags,
        baselines.check_byol,
        shared=("projector", "momentum_teacher", "alpha"),
        defaults=dict(projector=[4096, 256]),
    ),
    "moco": Entry(
        baselines.MoCo,
        baselines.add_moco_flags,
        baselines.check_moco,
        shared=("projector", "momentum_teacher", "alpha"),
        defaults=dict(projector=[2048, 128], momentum_teacher=0.999),
    ),
    "swav": Entry(
        baselines.SwAV,
        baselines.add_swav_flags,
        baselines.check_swav,
        shared=(
            "projector queue_size out_dim student_temp teacher_temp freeze_last_layer alpha".split()
        ),
        defaults=dict(projector=[2048, 128], out_dim=3000, teacher_temp=0.05, queue_size=3840),
    ),
    "simclr": Entry(
        baselines.SimCLR,
        no_flags,
        baselines.check_simclr,
        shared=("projector", "temperature"),
        defaults=dict(projector=[2048, 128], temperature=0.5),
    ),
    "vicreg": Entry(
        baselines.VICReg,
        baselines.add_vicreg_flags,
        baselines.check_vicreg,
        shared=("projector", "invariance_weight", "variance_weight"),
        defaults=dict(projector=[8192] * 3, invariance_weight=25.0, variance_weight=25.0),
    ),
    "barlow": Entry(
        baselines.BarlowTwins,
        baselines.add_barlow_flags,
        baselines.check_barlow,
        shared=("projector",),
        defaults=dict(projector=[8192] * 3),
    ),
}


def options(method: str, **given) -> argparse.Namespace:
    """Settings of a method for one's own loop: the defaults of its flags, but for those given.

    MV-MR with the descriptor "scattering" needs `global_crops_size`, the side of its views.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    parser = argparse.ArgumentParser()
    for entry in METHODS.values():  # of all methods, for some share a flag
        entry.add_flags(parser)
    known = vars(parser.parse_args([]))
    return argparse.Namespace(**known | METHODS[method].defaults | given)

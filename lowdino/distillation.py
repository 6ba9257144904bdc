"""Distillation: a student learns from a frozen teacher.

--objective  the student's
kd           logits, softened by --temperature, follow the teacher's by KL (LowDINO, equation 4)
             times T^2 (Hinton et al., 2015): of a classifier, the one in the teacher's file
             (--teacher_head file) or one trained first (train); without one, features, through
             a learned linear map or --match pool. --kd_weight below 1 adds the labels
simkd        features, through a projector, are the teacher's by mean squared error; the
             teacher's classifier, where it has one, is tried on them at the end (of pooled
             features, where SimKD takes maps)
similarity   similarities to a queue of images follow the teacher's (CompRess, SEED)
mvmr         embedding of an augmented view depends on that of the plain image and on the
             teacher's features, of any width, by distance correlation (MV-MR)
dino         distributions of all views over the teacher's prototypes follow the teacher's of
             the global ones, as DINOv2 distils but without its loss on patches; the student's
             average is kept
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowdino import ema, losses
from lowdino.base import Method, feature_metrics, mean_terms, teacher_momentum
from lowdino.heads import DINOHead, ManyHeads, Projector
from lowdino.methods import plain_view


class Distillation(Method):
    """A student learns from a frozen teacher (LowDINO, figure 3), by a sum of objectives.

    The teacher sees the student's global views, and its mean over them stands for the local ones;
    or, from a cache or a file, it saw the whole image, which then stands for all views. `mvmr` is
    about the plain image, which the student then sees too.

    Args:
        teacher: `teachers.Teacher`. It is no sub-module: no checkpoint holds it.
    """

    def __init__(
        self, backbone, args, teacher, total_steps: float = math.inf, epoch_steps: int = 0
    ):
        super().__init__()
        self.args, self.teacher, self.total_steps = args, teacher, total_steps
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
        """One objective, of the student's outputs s (V B, ...) and the teacher's features t."""
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
            momentum = teacher_momentum(self, step)
            ema.update(*self.weights, momentum)
            # Paired anew, because a move to a device replaces buffers, unlike parameters.
            ema.update(*ema.paired_buffers(self.average_student, self.student), momentum)

    def metrics(self):
        return mean_terms(self) | feature_metrics(self.last)


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


def distillation_heads(own: int, args: argparse.Namespace, teacher) -> dict[str, nn.Module]:
    """What the student's features (B, own) pass through for each objective, in one order always."""
    heads: dict[str, nn.Module] = {}
    width = teacher.width
    if "kd" in args.objective:
        if teacher.classifier:
            heads["kd"] = nn.Linear(own, teacher.classifier.out_features)
        elif args.match == "pool":
            heads["kd"] = nn.AdaptiveAvgPool1d(min(own, width))
        else:
            heads["kd"] = nn.Linear(own, width)
    for name in ("simkd", "similarity"):
        if name in args.objective:
            heads[name] = Projector(own, max(own, width), width)
    if "mvmr" in args.objective:
        heads["mvmr"] = Projector(own, *args.projector)
    if "dino" in args.objective:
        mlp, last = teacher.head.mlp, teacher.head.last_layer
        heads["dino"] = DINOHead(
            own,
            len(last.weight),
            use_bn=any(isinstance(module, nn.BatchNorm1d) for module in mlp),
            norm_last_layer=last.gain is None,
            hidden_dim=mlp[0].out_features,
        )
    return heads


def distillation_losses(args: argparse.Namespace, teacher) -> dict[str, nn.Module]:
    build = {
        "kd": lambda: losses.KDLoss(args.temperature),
        "simkd": losses.SimKDLoss,
        "similarity": lambda: losses.SimilarityLoss(teacher.width, args.queue_size),
        "mvmr": losses.MVMRLoss,
        "dino": lambda: losses.DINOLoss(len(teacher.head.last_layer.weight), args.student_temp),
    }
    found = {name: build[name]() for name in args.objective}
    if "dino" in found:
        found["dino"].center.copy_(teacher.center)
    return found

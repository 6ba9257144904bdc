"""What every method has: its base class, the numbers that it logs, its momentum teacher."""

import argparse
import math

import torch
from torch import Tensor, nn

from lowdino import data, distributed, health, schedules
from lowdino.heads import ManyHeads, Projector


class Method(nn.Module):
    """Base of all methods. Its `state_dict()` is all that a checkpoint needs of it.

    Subclasses are built of (backbone, args, total_steps, epoch_steps). Without the number of steps
    their schedules stay at the start; without that of an epoch there is no warm-up in epochs.
    """

    evaluated = "student"  # the network whose backbone is evaluated and kept
    out_dim: int | None = None  # K, where outputs are distributions over K prototypes
    remedy = "lower --lr"  # against embeddings that collapse, for `health.Health`
    momentum_rises = True  # that of a teacher, from --momentum_teacher to 1
    terms: dict[str, Tensor] = {}  # scalars in the last loss, for metrics() and the log

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.evaluated).backbone

    def forward(
        self, views: list[Tensor], batch: data.Batch | None = None, step: int = 0
    ) -> Tensor:
        """The loss, a scalar, of V views (B, 3, H, W), global ones first, cut from a batch."""
        raise NotImplementedError

    def before_step(self, step: int = 0) -> None:
        """What comes between the backward pass and the optimizer: gradients to drop."""

    def after_step(self, step: int = 0) -> None:
        """What follows the optimizer: a momentum teacher."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the last forward pass, for the log and for `health.Health`.

        Losses and entropies are over all ranks, spread and rank are those of this rank's images.
        All ranks must call it together.
        """
        return {}


class Projecting(Method):
    """Base of methods with a projector, whose embeddings a loss compares."""

    projector = Projector

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__()
        self.args, self.total_steps, self.epoch_steps = args, total_steps, epoch_steps
        projector = self.projector(backbone.embed_dim, *args.projector)
        self.student = ManyHeads(backbone, {"projector": projector})

    def keep(self, step: int, features: Tensor, z: Tensor, views: list, **terms: Tensor) -> None:
        """What `metrics` reads: of the first view features and embeddings, and the terms."""
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.last = (step, *(x.detach()[: len(views[0])] for x in (features, z)))

    def metrics(self):
        step, features, z = self.last
        teacher = teacher_metrics(self, step) if hasattr(self, "teacher") else {}
        return mean_terms(self) | embedding_metrics(z) | feature_metrics(features) | teacher


def check_pairs(args: argparse.Namespace) -> str | None:
    """What is wrong with the numbers of views of a method that pairs two global ones, or None."""
    if args.global_crops_number != 2:
        given = args.global_crops_number
        return f"--method {args.method} takes --global_crops_number 2, not {given}"
    if getattr(args, "alpha", None) is not None and not args.local_crops_number:
        return "--alpha balances global against local views, and --local_crops_number is 0"
    return None


def teacher_momentum(method: Method, step: int) -> float:
    """The EMA's momentum, lambda in DINO, on a cosine from --momentum_teacher to 1, or fixed.

    With --teacher_update step the teacher is the student after the step before, with epoch the
    student at the end of the epoch before (DINO, figure 6): momentum 0, and 1 in between.
    """
    update = getattr(method.args, "teacher_update", "momentum")
    if update != "momentum":
        due = update == "step" or (step + 1) % max(method.epoch_steps, 1) == 0
        return 0.0 if due else 1.0
    start = method.args.momentum_teacher
    if start is None:  # in one's own loop; the scripts have filled it in before
        start = default_momentum(method.total_steps)
    if not method.momentum_rises:
        return start
    return schedules.cosine(step, method.total_steps, start, 1.0)


def default_momentum(total_steps: float) -> float:
    """1 - 1 / (2 sqrt(steps)): 0.98 at 600 steps, 0.99 at 2,500, as runs on the demo images and
    CIFAR-10 wanted it. It is DINO's 0.996 at 16,000, and where the number is not known."""
    if total_steps == math.inf:
        return 0.996
    return 1 - 0.5 / math.sqrt(total_steps)


def mean_terms(method: Method) -> dict[str, float]:
    """The terms of the last loss, over all ranks."""
    means = {k: distributed.mean_over_ranks(v.clone()) for k, v in method.terms.items()}
    return {name: value.item() for name, value in means.items()}


def prototype_metrics(P_t: Tensor) -> dict[str, float]:
    """Entropies of the teacher's distributions (n, K), in nats."""
    mean = distributed.mean_over_ranks(P_t.mean(dim=0))
    return {
        "entropy": distributed.mean_over_ranks(health.mean_entropy(P_t)).item(),
        "entropy_of_mean": health.mean_entropy(mean[None]).item(),
    }


def feature_metrics(features: Tensor) -> dict[str, float]:
    """Spread and effective rank of one view's features (B, D) on this rank."""
    std, rank = health.spread(features)
    return {"feature_std": std.item(), "effective_rank": rank.item()}


def embedding_metrics(z: Tensor) -> dict[str, float]:
    """The same of the embeddings (B, E) that a loss compares."""
    std, rank = health.spread(z)
    return {"embedding_std": std.item(), "embedding_rank": rank.item()}


def teacher_metrics(method: Method, step: int) -> dict[str, float]:
    """State of the momentum teacher, and whether it still moves."""
    momentum = teacher_momentum(method, step)
    theta_t, theta_s = (weights[0] for weights in method.weights)
    # Towards the end of a long run the schedule lets the teacher stand still, as it should.
    nearly_one = 1 - 1e-6
    by_schedule = momentum > nearly_one and teacher_momentum(method, 0) < nearly_one
    is_copy = getattr(method.args, "teacher_update", "momentum") != "momentum"
    if by_schedule or is_copy:
        moved = True
    else:  # one weight tells whether any moves
        moved = not torch.equal(theta_t, theta_t.lerp(theta_s.detach(), 1 - momentum))
    return {"momentum": momentum, "teacher_moved": moved}

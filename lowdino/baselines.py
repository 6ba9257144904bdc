"""Methods that LowDINO, SSLight and MV-MR are compared with, one class a method, its loss above it.

They are used as those of `methods.py`, whose table has them. All views of one size are one batch
for the backbone's batch norm, and all views one for the projector's, as in the code of SwAV and
SimCLR; that of BYOL, VICReg and Barlow Twins has each view as a batch of its own. Embeddings and
losses are those of the batch of all ranks. `heads.Projector` tells of the projectors' last layers.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowdino import ema, health, losses
from lowdino.base import Projecting, check_pairs, teacher_momentum
from lowdino.flags import out_of_range
from lowdino.heads import Projector, WeightNormLinear
from lowdino.losses import autocast_off, balanced, own_rows, rows_of_all_ranks, variance_hinge

# ---------------------------------------------------------------------------------------------
# BYOL
# ---------------------------------------------------------------------------------------------


class BYOL(Projecting):
    """Bootstrap your own latent (Grill et al., 2020): no prototypes and no negatives.

    The student's prediction q(z), of every view, is to be the EMA teacher's projection z' of
    another, global, view of the same image: 2 - 2 cos(q(z), z'), equation 2, the mean over all
    pairs, where the paper adds its two. Local views and `alpha` are ours, after SSLight.
    """

    remedy = "raise --momentum_teacher, or lower --lr"

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        hidden, width = args.projector[0], args.projector[-1]
        self.predictor = Projector(width, hidden, width)
        self.teacher = ema.make_teacher(self.student)  # a copy without gradients
        self.weights = ema.paired_parameters(self.teacher, self.student)

    def forward(self, views, batch=None, step=0):
        with torch.no_grad():
            _, z_t = self.teacher(views[:2])
            z_t = F.normalize(z_t["projector"].float(), dim=1).chunk(2)
        features, z = self.student(views)
        q = self.predictor(z["projector"])  # (V B, E)
        q_views = F.normalize(q.float(), dim=1).chunk(len(views))
        cosine = losses.mean_over_pairs(mean_dot, q_views, z_t, self.args.alpha)
        self.keep(step, features, z["projector"], views, cosine=cosine)
        return 2 - 2 * cosine

    def after_step(self, step=0):
        ema.update(*self.weights, teacher_momentum(self, step))


def mean_dot(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the rows of (n, E) of their inner products."""
    return (a * b).sum(dim=1).mean()


def check_byol(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of BYOL, in one sentence, or None."""
    return check_pairs(args) or out_of_range(args, fractions=("momentum_teacher", "alpha"))


# ---------------------------------------------------------------------------------------------
# MoCo v2
# ---------------------------------------------------------------------------------------------


class MoCoLoss(nn.Module):
    """A query must find its key among a queue of earlier ones (He et al., 2020, equation 1).

        L_q = - log exp(q . k / T) / [exp(q . k / T) + sum_j exp(q . k_j / T)]

    with the unit key k of the first global view, and queries q of the other views: P_gg = 1 pair of
    global views and P_gl = V - 2 with a local one, see `losses.balanced`. The queue starts at
    random.

    forward(queries, k): V - 1 tensors (B, D), the global one first, and (B, D). Returns a scalar;
    gradient to the queries alone. In training mode the keys of all ranks then enter the queue.
    """

    queue: Tensor

    def __init__(
        self, dim: int, queue_size: int, temperature: float = 0.2, alpha: float | None = None
    ):
        super().__init__()
        self.temperature, self.alpha = temperature, alpha
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))

    def forward(self, queries: Sequence[Tensor], k: Tensor) -> Tensor:
        with autocast_off(k):
            k = F.normalize(k.detach().float(), dim=1)
            queue = self.queue.clone()  # the backward pass needs it as it was
            units = (F.normalize(q.float(), dim=1) for q in queries)
            loss_g, *local = (self.contrast(q, k, queue) for q in units)
            loss = balanced(loss_g, sum(local), 1, len(local), self.alpha)
            if self.training:
                self.queue.copy_(enqueued(self.queue, rows_of_all_ranks(k)))
        return loss

    def contrast(self, q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1)
        first = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return F.cross_entropy(logits / self.temperature, first)


def enqueued(queue: Tensor, rows: Tensor) -> Tensor:
    """The queue (L, D), newest first, after rows (n, D) came in."""
    return torch.cat([rows, queue])[: len(queue)]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [nn.Linear(*widths[:2])]
    for before, after in zip(widths[1:], widths[2:]):
        layers += [nn.ReLU(inplace=True), nn.Linear(before, after)]
    return nn.Sequential(*layers)


def joined(parts: Sequence[Tensor], views: int) -> Tensor:
    """Rows of parts of a batch, each part view by view, as those of the batch, view by view."""
    by_part = [part.chunk(views) for part in parts]
    return torch.cat([rows for of_view in zip(*by_part) for rows in of_view])


class MoCo(Projecting):
    """Momentum contrast with a projector, MoCo v2 (He et al., 2020; Chen et al., 2020).

    The key is of the first global view, by the EMA teacher, whose momentum is fixed; the second
    global view and the local ones are queries, as in SSLight. The projector has no batch norm.

    Batch norm would tell a query which key is its own: the one that was in its batch, for those in
    the queue are older. So MoCo keeps each GPU's statistics apart, and shuffles the keys over the
    GPUs. Here a rank's queries come in `parts`, each a batch of its own for batch norm, and its
    keys in parts of another order, as in the authors' demonstration on one GPU.
    """

    remedy = "lower --temperature, or --lr"
    momentum_rises = False
    projector = staticmethod(mlp)

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        self.teacher = ema.make_teacher(self.student)
        self.weights = ema.paired_parameters(self.teacher, self.student)
        self.loss = MoCoLoss(args.projector[-1], args.queue_size, args.temperature, args.alpha)

    def forward(self, views, batch=None, step=0):
        k = self.keys(views[0], step)
        features, q = self.queries(views[1:])
        loss = self.loss(q.chunk(len(views) - 1), k)
        self.keep(step, features, q, views, contrast=loss)
        return loss

    def parts(self, view: Tensor) -> Sequence[Tensor]:
        """A view (B, 3, H, W) in 2 to 8 parts, each of 32 images over all ranks where it can be.

        Each of MoCo's eight GPUs has 32. A rank has two or more in a part.
        """
        wanted = min(max(len(view) * losses.world_size() // 32, 2), 8)
        return view.tensor_split(max(min(wanted, len(view) // 2), 1))

    def queries(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """V views (B, 3, H, W) -> features (V B, D) and embeddings (V B, E), view by view."""
        outputs = [self.student(list(part)) for part in zip(*map(self.parts, views))]
        features = joined([features for features, _ in outputs], len(views))
        return features, joined([heads["projector"] for _, heads in outputs], len(views))

    @torch.no_grad()
    def keys(self, view: Tensor, step: int) -> Tensor:
        """(B, 3, H, W) -> (B, E), in parts of an order that the step draws."""
        generator = torch.Generator().manual_seed(step)
        order = torch.randperm(len(view), generator=generator).to(view.device)
        keys = [self.teacher([part])[1]["projector"] for part in self.parts(view[order])]
        return torch.cat(keys)[order.argsort()]

    def after_step(self, step=0):
        ema.update(*self.weights, teacher_momentum(self, step))


def add_moco_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("MoCo and SimCLR").add_argument
    help = "of the softmax over keys"
    add("--temperature", type=float, default=0.2, help=help)
    help = "keys that are kept; of swav embeddings of each view, 0: none"
    add("--queue_size", type=int, default=65536, help=help)


def check_moco(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of MoCo, in one sentence, or None."""
    if wrong := check_queue(args) or check_pairs(args):
        return wrong
    if args.batch_size_per_gpu < 4:
        batch = args.batch_size_per_gpu
        return f"--batch_size_per_gpu must be at least 4, as moco splits it, not {batch}"
    if args.momentum_teacher is None:
        return "--method moco has a fixed --momentum_teacher, such as 0.999, not none"
    fractions = ("momentum_teacher", "alpha")
    return out_of_range(args, above_zero=("temperature",), fractions=fractions)


def check_queue(args: argparse.Namespace) -> str | None:
    batch, size = args.batch_size_per_gpu, args.queue_size
    if size < batch:
        return f"--queue_size {size} is smaller than a batch, --batch_size_per_gpu {batch}"
    return None


# ---------------------------------------------------------------------------------------------
# SwAV
# ---------------------------------------------------------------------------------------------


class SwAV(Projecting):
    """Swapped assignments between views (Caron et al., 2020): the codes of one view of an image are
    to be predicted from another.

        L = mean of H(q_i, softmax(s_j / T)) over global views i, views j != i    (equations 1, 2)

    with s = z C^T of unit embeddings z and K unit prototypes C, and codes q from Sinkhorn-Knopp
    with --teacher_temp as its epsilon, over the batch and, from --queue_epochs on, a queue.
    """

    remedy = "lower --teacher_temp, raise --freeze_last_layer, or lower --lr"

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        self.prototypes = WeightNormLinear(args.projector[-1], args.out_dim, learn_gain=False)
        self.register_buffer("queue", torch.zeros(2, args.queue_size, args.projector[-1]))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))  # rows of either
        # Whether the queue is full. It stays so, and the host need not wait for `filled` any more.
        self.full = False
        self.register_load_state_dict_post_hook(SwAV.ask_again)

    def ask_again(self, _keys) -> None:
        """Another state may have a queue that is not full."""
        self.full = False

    def forward(self, views, batch=None, step=0):
        self.full = self.full or bool(self.filled >= self.args.queue_size)
        features, outputs = self.student(views)
        z = F.normalize(outputs["projector"].float(), dim=1)  # (V B, E)
        s = self.prototypes(z).chunk(len(views))
        codes = [self.codes(s[i].detach(), i, step) for i in (0, 1)]
        predict = partial(cross_entropy, temperature=self.args.student_temp)
        loss = losses.mean_over_pairs(predict, s, codes, self.args.alpha)
        if self.training and self.args.queue_size:
            for queue, rows in zip(self.queue, z.detach().chunk(len(views))):
                queue.copy_(enqueued(queue, rows_of_all_ranks(rows)))
            self.filled += len(views[0]) * losses.world_size()
        self.keep(step, features, z, views, swapped=loss)
        self.terms |= {"code_entropy": health.mean_entropy(torch.cat(codes))}
        return loss

    @torch.no_grad()
    def codes(self, s: Tensor, i: int, step: int) -> Tensor:
        """q of global view i: logits (B, K) -> (B, K)."""
        rows = s
        if self.full and step >= self.args.queue_epochs * self.epoch_steps:
            share = self.queue[i][losses.rank() :: losses.world_size()]
            rows = torch.cat([s, self.prototypes(share)])
        return losses.sinkhorn_knopp(rows, self.args.teacher_temp)[: len(s)]

    def before_step(self, step=0):
        if step < self.args.freeze_last_layer * self.epoch_steps:
            self.prototypes.zero_grad()


def cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of - target . log softmax(logits / T), for targets of any sum."""
    return F.cross_entropy(logits / temperature, target)


def add_swav_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SwAV").add_argument
    help = "epochs before the queue takes part in the codes"
    add("--queue_epochs", type=float, default=15, help=help)


def check_swav(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of SwAV, in one sentence, or None."""
    if args.out_dim < 2:
        return f"--out_dim must be at least 2, not {args.out_dim}"
    if args.queue_size > 0 and (wrong := check_queue(args)):  # 0 is none
        return wrong
    return check_pairs(args) or out_of_range(
        args,
        above_zero=("student_temp", "teacher_temp"),
        not_negative=("freeze_last_layer", "queue_size", "queue_epochs"),
        fractions=("alpha",),
    )


# ---------------------------------------------------------------------------------------------
# SimCLR, VICReg, Barlow Twins
# ---------------------------------------------------------------------------------------------


class TwoViews(Projecting):
    """One network sees two views, and a loss compares their embeddings."""

    def forward(self, views, batch=None, step=0):
        features, outputs = self.student(views)
        terms = self.compare(*outputs["projector"].chunk(2))
        self.keep(step, features, outputs["projector"], views, **terms)
        return sum(terms.values())

    def compare(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The terms of the loss of embeddings (B, E) and (B, E)."""
        raise NotImplementedError


class SimCLR(TwoViews):
    """Contrast with all other views of the batch (Chen et al., 2020)."""

    remedy = "lower --temperature, or --lr"

    def compare(self, a, b):
        return {"contrast": nt_xent(a, b, self.args.temperature)}


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Each view must find the other of its image among all views (SimCLR's equation 1).

        l_i = - log exp(z_i . z_p(i) / T) / sum_{k != i} exp(z_i . z_k / T),    L = mean_i l_i

    over the 2n unit embeddings z of both views of the images of all ranks, p(i) being the other
    view of i: (n, D), (n, D) -> a scalar. `losses.InfoNCELoss` has no negatives of the same view.
    """
    with autocast_off(a):
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
        all_a, all_b, own = rows_of_all_ranks(a), rows_of_all_ranks(b), own_rows(a)
        N = len(all_a)
        logits = torch.cat([a, b]) @ torch.cat([all_a, all_b]).T / temperature  # (2n, 2N)
        itself, other = torch.cat([own, own + N]), torch.cat([own + N, own])
        return F.cross_entropy(logits.scatter(1, itself[:, None], -torch.inf), other)


class VICReg(TwoViews):
    """Variance, invariance, covariance (Bardes et al., 2022), no negatives and no teacher."""

    remedy = "raise --variance_weight, or lower --lr"

    def compare(self, a, b):
        args = self.args
        weights = (args.invariance_weight, args.variance_weight, args.covariance_weight)
        names = ("invariance", "variance", "covariance")
        return {n: w * term for n, w, term in zip(names, weights, vicreg(a, b))}


def vicreg(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """VICReg's terms s, v and c (equations 1 to 5), which are weighted and added (equation 6).

        s = mean (z - z')^2,  v = [v(z) + v(z')] / 2,  c = c(z) + c(z')
        v(z) = mean_d max(0, 1 - sqrt(var(z_d) + eps)),  c(z) = 1/D sum_{d != e} Cov(z)_de^2

    over the rows of all ranks: (n, D), (n, D) -> scalars. They are scaled as in the authors' code:
    s is a mean over dimensions too, and v is halved.
    """
    with autocast_off(a):
        a, b = rows_of_all_ranks(a.float()), rows_of_all_ranks(b.float())
        c = sum(off_diagonal(covariance(z)).square().sum() / z.shape[1] for z in (a, b))
        return F.mse_loss(a, b), (variance_hinge(a) + variance_hinge(b)) / 2, c


def add_vicreg_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("VICReg").add_argument
    help = "of VICReg's covariances"
    add("--covariance_weight", type=float, default=1.0, help=help)


def check_vicreg(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of VICReg, in one sentence, or None."""
    weights = ("invariance_weight", "variance_weight", "covariance_weight")
    if not any(getattr(args, name) for name in weights):
        return "--method vicreg has nothing to learn: all three of its weights are 0"
    return check_two_views(args) or out_of_range(args, not_negative=weights)


class BarlowTwins(TwoViews):
    """Equal components agree between views, different ones do not (Zbontar et al., 2021)."""

    remedy = "raise --redundancy_weight, or lower --lr"

    def compare(self, a, b):
        diagonal, off = barlow_twins(a, b)
        return {"invariance": diagonal, "redundancy": self.args.redundancy_weight * off}


def barlow_twins(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Barlow Twins' terms (equation 1), of which the second is weighted by lambda.

        sum_d (1 - C_dd)^2,  sum_{d != e} C_de^2,   C_de the correlation of z_d with z'_e

    over the rows of all ranks: (n, D), (n, D) -> two scalars.
    """
    with autocast_off(a):
        a, b = (standardized(rows_of_all_ranks(z.float())) for z in (a, b))
        C = a.T @ b / len(a)  # (D, D)
        return (1 - C.diagonal()).square().sum(), off_diagonal(C).square().sum()


def standardized(z: Tensor) -> Tensor:
    """Each column with mean 0 and standard deviation 1, as batch norm without gains does."""
    z = z - z.mean(dim=0)
    return z / (z.var(dim=0, correction=0) + 1e-5).sqrt()


def covariance(z: Tensor) -> Tensor:
    """Of the columns of (n, D): (D, D)."""
    z = z - z.mean(dim=0)
    return z.T @ z / (len(z) - 1)


def off_diagonal(C: Tensor) -> Tensor:
    return C - C.diagonal().diag()


def add_barlow_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Barlow Twins").add_argument
    help = "of the correlations between different components, lambda"
    add("--redundancy_weight", type=float, default=0.0051, help=help)


def check_barlow(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of Barlow Twins, in one sentence, or None."""
    return check_two_views(args) or out_of_range(args, not_negative=("redundancy_weight",))


def check_simclr(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of SimCLR, in one sentence, or None."""
    return check_two_views(args) or out_of_range(args, above_zero=("temperature",))


def check_two_views(args: argparse.Namespace) -> str | None:
    if args.local_crops_number:
        given = args.local_crops_number
        return (
            f"--method {args.method} compares two views: give --local_crops_number 0, not {given}"
        )
    return check_pairs(args)

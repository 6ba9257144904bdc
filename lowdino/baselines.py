"""Methods that LowDINO, SSLight and MV-MR are compared with, with their losses.

They are used as those of `methods.py`. For the backbone's batch norm all views of one size are one
batch, for the projector's all views are, as in the code of SwAV and SimCLR; in the code of BYOL,
VICReg and Barlow Twins each view is a batch. Losses compare the embeddings of all ranks.
`heads.Projector` says how the projectors' last layers differ from the authors'.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MLP

from lowdino import augment, ema, health, losses, schedules
from lowdino.heads import Projector, WeightNormLinear
from lowdino.losses import autocast_off, balanced, own_rows, rows_of_all_ranks, variance_hinge
from lowdino.methods import Flag, ProjectionMethod, shared, teacher_momentum

# -- BYOL ------------------------------------------------------------------------------------------


class BYOL(ProjectionMethod):
    """Bootstrap your own latent (Grill et al., 2020): no prototypes and no negatives.

    The student's prediction q(z), for every view, should match the EMA teacher's projection z' of
    another, global, view of the same image: 2 - 2 cos(q(z), z'), equation 2. The loss is the mean
    over all pairs, where the paper adds its two. Local views and `alpha` are ours, after SSLight.
    """

    name = "byol"
    flags = shared("projector", "momentum_teacher", "alpha")
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


# -- MoCo v2 ---------------------------------------------------------------------------------------


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


def joined(parts: Sequence[Tensor], views: int) -> Tensor:
    """Rows of parts of a batch, each part view by view, as those of the batch, view by view."""
    by_part = [part.chunk(views) for part in parts]
    return torch.cat([rows for of_view in zip(*by_part) for rows in of_view])


class MoCo(ProjectionMethod):
    """Momentum contrast with a projector, MoCo v2 (He et al., 2020; Chen et al., 2020).

    The key is of the first global view, by the EMA teacher, whose momentum is fixed; the second
    global view and the local ones are queries, as in SSLight. The projector has no batch norm.

    Batch norm would tell a query which key is its own: the one that was in its batch, for those in
    the queue are older. So MoCo keeps each GPU's statistics apart, and shuffles the keys over the
    GPUs. Here a rank's queries come in `parts`, each a batch for batch norm, and its keys in parts
    of another order, as in the authors' demonstration on one GPU.
    """

    name = "moco"
    flags = shared("projector", "queue_size", "temperature", "momentum_teacher", "alpha")
    remedy = "lower --temperature, or --lr"
    momentum_rises = False
    projector = staticmethod(lambda *widths: MLP(widths[0], [*widths[1:]]))

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
        """(B, 3, H, W) -> (B, E), in parts of an order that seed and step draw."""
        seed = getattr(self.args, "seed", 0)  # unknown in one's own loop
        generator = augment.seeded_generator("cpu", schedules.Stream.KEY_ORDER, seed, step)
        order = torch.randperm(len(view), generator=generator).to(view.device)
        keys = [self.teacher([part])[1]["projector"] for part in self.parts(view[order])]
        return torch.cat(keys)[order.argsort()]

    def after_step(self, step=0):
        ema.update(*self.weights, teacher_momentum(self, step))

    @classmethod
    def check(cls, s):
        if s.batch_size_per_gpu < 4:
            batch = s.batch_size_per_gpu
            return f"--batch_size_per_gpu must be at least 4, as moco splits it, not {batch}"
        if s.momentum_teacher is None:
            return "--method moco has a fixed --momentum_teacher, such as 0.999, not none"
        return check_queue(s) or super().check(s)


def check_queue(s) -> str | None:
    """Whether the queue holds a batch: a batch that did not fit would lose keys."""
    batch, size = s.batch_size_per_gpu, s.queue_size
    if size < batch:
        return f"--queue_size {size} is smaller than a batch, --batch_size_per_gpu {batch}"
    return None


# -- SwAV ------------------------------------------------------------------------------------------


class SwAV(ProjectionMethod):
    """Swapped assignments between views (Caron et al., 2020): the codes of one view of an image are
    to be predicted from another.

        L = mean of H(q_i, softmax(s_j / T)) over global views i, views j != i    (equations 1, 2)

    with s = z C^T of unit embeddings z and K unit prototypes C, and codes q from Sinkhorn-Knopp
    with --teacher_temp as its epsilon, over the batch and, from --queue_epochs on, a queue.
    """

    name = "swav"
    flags = (
        *shared("projector", "out_dim", "student_temp", "teacher_temp", "freeze_last_layer"),
        *shared("queue_size", "alpha"),
        Flag("queue_epochs", "epochs before the queue takes part", float, ">= 0"),
    )
    remedy = "lower --teacher_temp, raise --freeze_last_layer, or lower --lr"

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        self.prototypes = WeightNormLinear(args.projector[-1], args.out_dim, learn_gain=False)
        self.register_buffer("queue", torch.zeros(2, args.queue_size, args.projector[-1]))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))  # rows of either
        self.full = False  # kept, so that the host need not wait for `filled`
        self.register_load_state_dict_post_hook(SwAV.forget_full)

    def forget_full(self, _keys) -> None:
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

    @classmethod
    def check(cls, s):
        wrong = check_queue(s) if s.queue_size > 0 else None
        return wrong or super().check(s)


def cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of - target . log softmax(logits / T), for targets of any sum."""
    return F.cross_entropy(logits / temperature, target)


# -- SimCLR, VICReg, Barlow Twins ------------------------------------------------------------------


class TwoViews(ProjectionMethod):
    """One network sees two views, and a loss compares their embeddings."""

    def forward(self, views, batch=None, step=0):
        features, outputs = self.student(views)
        terms = self.compare(*outputs["projector"].chunk(2))
        self.keep(step, features, outputs["projector"], views, **terms)
        return sum(terms.values())

    def compare(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The terms of the loss of embeddings (B, E) and (B, E)."""
        raise NotImplementedError

    @classmethod
    def check(cls, s):
        if s.local_crops_number:
            number = s.local_crops_number
            return f"--method {cls.name} compares two views: --local_crops_number 0, not {number}"
        return super().check(s)


class SimCLR(TwoViews):
    """Contrast with all other views of the batch (Chen et al., 2020)."""

    name = "simclr"
    flags = shared("projector", "temperature")
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

    name = "vicreg"
    flags = (
        *shared("projector", "invariance_weight", "variance_weight"),
        Flag("covariance_weight", "weight of VICReg's covariances", float, ">= 0"),
    )
    remedy = "raise --variance_weight, or lower --lr"

    def compare(self, a, b):
        args = self.args
        weights = (args.invariance_weight, args.variance_weight, args.covariance_weight)
        names = ("invariance", "variance", "covariance")
        return {n: w * term for n, w, term in zip(names, weights, vicreg(a, b))}

    @classmethod
    def check(cls, s):
        if not any((s.invariance_weight, s.variance_weight, s.covariance_weight)):
            return "--method vicreg has nothing to learn: all three of its weights are 0"
        return super().check(s)


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


class BarlowTwins(TwoViews):
    """Equal components agree between views, different ones do not (Zbontar et al., 2021)."""

    name = "barlow"
    flags = (
        *shared("projector"),
        Flag("redundancy_weight", "weight lambda of different components", float, ">= 0"),
    )
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
        # Each column with mean 0 and standard deviation 1.
        a, b = (
            F.batch_norm(rows_of_all_ranks(z.float()), None, None, training=True) for z in (a, b)
        )
        C = a.T @ b / len(a)  # (D, D)
        return (1 - C.diagonal()).square().sum(), off_diagonal(C).square().sum()


def covariance(z: Tensor) -> Tensor:
    """Of the columns of (n, D): (D, D)."""
    z = z - z.mean(dim=0)
    return z.T @ z / (len(z) - 1)


def off_diagonal(C: Tensor) -> Tensor:
    return C - C.diagonal().diag()

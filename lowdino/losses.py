"""Objectives of self-distillation and of distillation. All of them work in float32, whatever autocast says, and are right across ranks:
two ranks with B images each get the centre, and through DDP's averaging the gradients, of one rank with 2B.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """log of the sum of exp over the rows of all ranks: (n, K) -> (1, K). No gradient."""
    highest = x.amax(dim=0, keepdim=True)
    if ranks() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    total = (x - highest).exp().sum(dim=0, keepdim=True)
    if ranks() > 1:
        dist.all_reduce(total)
    return highest + total.log()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets that use every prototype equally over the batch of all ranks: (n, K) logits -> (n, K) probabilities.

    Sinkhorn and Knopp's alternating normalisation of exp(logits / temperature), as SwAV (Caron et al., 2020) and DINOv2
    (Oquab et al., 2023) take it: columns to equal mass, rows to mass 1. Done on logarithms, so that no temperature
    overflows.
    """
    log_q = logits.float() / temperature
    for _ in range(iterations):
        log_q = log_q - logsumexp_over_ranks(log_q)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's distribution over all pairs of different views.

    With teacher logits t of the two global views, student logits s of all V views, centre c, temperatures T_t and T_s,
        P_t = softmax((t - c) / T_t),  P_s = softmax(s / T_s),  H(t, s) = - sum_k P_t[k] log P_s[k]
        L = mean of H(t_i, s_j) over i in {0, 1}, j in {0 .. V-1}, j != i            (Caron et al., 2021, equation 3)
        c <- m c + (1 - m) mean of t over the batch of all ranks                                         (equation 4)
    `centering="sinkhorn"` takes P_t from Sinkhorn-Knopp instead and leaves c alone. With `alpha`, the P_gg = 2 pairs of
    global views and the P_gl pairs with a local one have weights of their own (Tan et al., 2023, SSLight):
        L = alpha L_g / P_gg + (1 - alpha) L_l / P_gl,   the plain mean being alpha = P_gg / (P_gg + P_gl).

    forward(student, teacher, teacher_temp): lists of (B, out_dim) logits, globals first: V views of the student and the
    two global ones of the teacher. Returns the loss, a scalar. In training mode it then moves the centre.

    Args:
        out_dim: number of prototypes, K.
        student_temp: T_s.
        center_momentum: m.
        centering: "softmax" or "sinkhorn".
        alpha: SSLight's balance in [0, 1]; None for the mean over all pairs.

    Raises:
        ValueError: for another centering, an alpha out of range, an alpha without local views, other than two teacher
            views, fewer than two student views.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: str = "softmax",
        alpha: float | None = None,
    ):
        super().__init__()
        if centering not in ("softmax", "sinkhorn"):
            raise ValueError(f"centering must be 'softmax' or 'sinkhorn', not {centering!r}")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha balances two losses and must lie in [0, 1], not {alpha}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.centering = centering
        self.alpha = alpha
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: list[Tensor], teacher: list[Tensor], teacher_temp: float) -> Tensor:
        if len(teacher) != 2 or len(student) < 2:
            raise ValueError(
                f"needs 2 teacher and at least 2 student views, got {len(teacher)} and {len(student)}"
            )
        if self.alpha is not None and len(student) == 2:
            raise ValueError(
                f"alpha={self.alpha} balances global against local views, and there are no local ones"
            )
        with torch.autocast(device_type=student[0].device.type, enabled=False):
            logits = torch.cat(teacher)
            targets = self.targets(logits, teacher_temp).chunk(2)
            loss_g = self.cross_entropy(student[0], targets[1]) + self.cross_entropy(
                student[1], targets[0]
            )
            # H is linear in its target: a local view meets both at once.
            both = targets[0] + targets[1]
            loss_l = sum(self.cross_entropy(s, both) for s in student[2:])
        pairs_g, pairs_l = 2, 2 * (len(student) - 2)
        if self.training and self.centering == "softmax":
            self.update_center(logits)
        if self.alpha is None:
            return (loss_g + loss_l) / (pairs_g + pairs_l)
        return self.alpha * loss_g / pairs_g + (1 - self.alpha) * loss_l / pairs_l

    @torch.no_grad()
    def targets(self, logits: Tensor, teacher_temp: float) -> Tensor:
        """P_t of the teacher's logits, (n, K), those of both global views together: (n, K) float32."""
        if self.centering == "sinkhorn":
            return sinkhorn_knopp(logits, teacher_temp)
        return (logits.float() - self.center).div_(teacher_temp).softmax(dim=-1)

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch of - target . log softmax(logits / T_s); a target may sum to any mass."""
        return F.cross_entropy(logits.float() / self.student_temp, target)

    @torch.no_grad()
    def update_center(self, logits: Tensor) -> None:
        mean = logits.float().mean(dim=0, keepdim=True)
        if ranks() > 1:
            dist.all_reduce(mean)
            mean /= ranks()
        self.center.lerp_(mean, 1 - self.center_momentum)


class GatherRows(torch.autograd.Function):
    """Rows of all ranks, (n, D) -> (ranks * n, D); the gradient comes back summed over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(ranks())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(ranks())[dist.get_rank()]


def rows_of_all_ranks(x: Tensor) -> Tensor:
    """`GatherRows` where there are several: (n, D) -> (ranks * n, D)."""
    return GatherRows.apply(x) if ranks() > 1 else x


def own_rows(x: Tensor) -> Tensor:
    """Where this rank's n rows are among those of all: (n, D) -> (n,)."""
    return torch.arange(len(x), device=x.device) + (dist.get_rank() * len(x) if ranks() > 1 else 0)


class KoLeoLoss(nn.Module):
    """Spreads features evenly over the sphere: the Kozachenko-Leonenko estimate of their entropy, negated.

        L = - 1/n sum_i log min_{j != i} |z_i - z_j|,   z the unit features             (Sablayrolles et al., 2019)

    as DINOv2 uses it, on the features of one view of each image; but neighbours are sought in the batch of all ranks, there
    of one. Nearest neighbours come from the largest inner product, |z_i - z_j|^2 = 2 - 2 z_i . z_j, and only the distance to the chosen
    one is differentiated.

    forward(features): (n, D). Returns a scalar. ValueError where there are fewer than two rows over all ranks.
    """

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(device_type=features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=-1)
            everyone = rows_of_all_ranks(z)  # (N, D)
            if len(everyone) < 2:
                raise ValueError("KoLeo needs two images at least: one has no neighbour")
            with torch.no_grad():
                similarity = z @ everyone.T  # (n, N)
                similarity[torch.arange(len(z), device=z.device), own_rows(z)] = -2
                nearest = similarity.argmax(dim=1)
            distance = (z - everyone[nearest]).pow(2).sum(dim=-1).clamp_min(1e-16).sqrt()
            return -(distance + 1e-8).log().mean()


class InfoNCELoss(nn.Module):
    """Each view must find the other view of its image among those of the whole batch (van den Oord et al., 2018).

        L = - 1/2n sum_i [ log softmax_j(a_i . b_j / T)[i] + log softmax_j(b_i . a_j / T)[i] ]

    over the n images of all ranks, a and b the unit embeddings of the two global views; symmetric as in MoCo v3 (Chen,
    Xie and He, 2021), without its momentum branch. It needs no teacher, so it learns from the first step.

    forward(a, b): (n, D) unit vectors each. Returns a scalar.
    """

    def __init__(self, temperature: float = 0.2):
        super().__init__()
        self.temperature = temperature

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(device_type=a.device.type, enabled=False):
            a, b = a.float(), b.float()
            all_a, all_b = rows_of_all_ranks(a), rows_of_all_ranks(b)  # (N, D)
            own = own_rows(a)
            a_to_b, b_to_a = (
                a @ all_b.T / self.temperature,
                b @ all_a.T / self.temperature,
            )  # (n, N)
            return (F.cross_entropy(a_to_b, own) + F.cross_entropy(b_to_a, own)) / 2


class KDLoss(nn.Module):
    """Knowledge distillation: the student's softened answers follow the teacher's (Hinton et al., 2015; LowDINO, eq. 4).

        L = T^2 KL(softmax(t / T) || softmax(s / T)) = T^2 sum_k P_t[k] (log P_t[k] - log P_s[k]),   mean over the rows

    T^2 keeps the gradient's size whatever T is. t and s are logits of a classifier or, without labels, features of one
    width.

    forward(student, teacher): (n, K) each. Returns a scalar; gradient to the student alone.
    """

    def __init__(self, temperature: float = 3.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.autocast(device_type=student.device.type, enabled=False):
            log_s = (student.float() / self.temperature).log_softmax(dim=1)
            log_t = (teacher.detach().float() / self.temperature).log_softmax(dim=1)
            return self.temperature**2 * F.kl_div(
                log_s, log_t, reduction="batchmean", log_target=True
            )


class SimKDLoss(nn.Module):
    """The student's projected features are to be the teacher's (Chen et al., 2022, SimKD, equation 4).

        L = |s - t|^2 / D,   mean over the rows

    so that the teacher's own classifier can be put on them. SimKD's are maps, and its projector convolutions; here both are
    pooled before.

    forward(student, teacher): (n, D) each. Returns a scalar; gradient to the student alone.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.autocast(device_type=student.device.type, enabled=False):
            return F.mse_loss(student.float(), teacher.detach().float())


class SimilarityLoss(nn.Module):
    """The student's similarities to a set of images follow the teacher's (CompRess, Abbasi Koohpayegani et al., 2020; SEED,
    Fang et al., 2021).

        p_t = softmax_j(t_i . q_j / T_t),  p_s = softmax_j(s_i . q_j / T_s),   L = - mean_i sum_j p_t[j] log p_s[j]

    with unit vectors s_i, t_i and q_j: the teacher's vectors of the batch of all ranks, its own among them, and the last
    `queue_size` before it. SEED's code has of the batch the image's own vector alone, and a queue of 65,536.

    forward(student, teacher): (V * n, D), already projected to the teacher's width, and (n, D): V views in a row of what the
    teacher saw once. Returns a scalar; gradient to the student alone. In training mode the teacher's vectors then enter the queue.

    Args:
        dim: D. queue_size: number of vectors kept; 0 for the batch alone.
        student_temp, teacher_temp: T_s and T_t; SEED's 0.2 and 0.01 by default.
    """

    queue: Tensor

    def __init__(
        self,
        dim: int,
        queue_size: int = 4096,
        student_temp: float = 0.2,
        teacher_temp: float = 0.01,
    ):
        super().__init__()
        self.queue_size, self.student_temp, self.teacher_temp = (
            queue_size,
            student_temp,
            teacher_temp,
        )
        self.register_buffer("queue", torch.zeros(queue_size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.autocast(device_type=student.device.type, enabled=False):
            s, t = F.normalize(student.float(), dim=1), F.normalize(teacher.detach().float(), dim=1)
            with torch.no_grad():
                batch = rows_of_all_ranks(t)  # (N, D)
                anchors = torch.cat([batch, self.queue])  # (N + queue, D), newest first
                # Places of the queue that have no vector yet take no part.
                empty = torch.arange(len(anchors), device=t.device) >= len(batch) + self.filled
                target = (
                    (t @ anchors.T / self.teacher_temp)
                    .masked_fill(empty, -torch.inf)
                    .softmax(dim=1)
                )
            log_s = (
                (s @ anchors.T / self.student_temp)
                .masked_fill(empty, -torch.inf)
                .log_softmax(dim=1)
            )
            loss = (
                -(target.repeat(len(s) // len(t), 1) * log_s.masked_fill(empty, 0.0))
                .sum(dim=1)
                .mean()
            )
            if self.training:
                self.queue.copy_(anchors[: self.queue_size])
                self.filled.copy_((self.filled + len(batch)).clamp(max=self.queue_size))
        return loss


def centred_distances(x: Tensor) -> Tensor:
    """Distances between the rows of (n, D), less the means of their row and column, plus the mean of all: (n, n)."""
    # Not by inner products, which lose the small distances and their gradients to rounding.
    d = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist")
    return d - d.mean(dim=0, keepdim=True) - d.mean(dim=1, keepdim=True) + d.mean()


class DistanceCorrelation(nn.Module):
    """How much two sets of features of the same images depend on each other (Szekely, Rizzo and Bakirov, 2007).

        dCor(x, y)^2 = <A, B> / (|A| |B|),   A and B the centred distances between the rows of x and of y

    from 0 for independent features to 1 where distances are proportional; widths and scales may differ. It is MV-MR's equations
    2 and 3, with the biased (V-statistic) mean. Over several ranks the rows are those of all.

    forward(x, y): (n, D) and (n, E). Returns a scalar; 0, with no gradient, where all rows of one are the same.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            return correlation(*(centred_distances(rows_of_all_ranks(rows)) for rows in (x, y)))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """dCor of two matrices of centred distances."""
    squared = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-20)
    # The root has no gradient at 0, nor may a nought of rounding below it.
    return torch.where(squared > 1e-12, squared.clamp(1e-12, 1.0).sqrt(), 0.0)


class MVMRLoss(nn.Module):
    """Multi-view, multi-representation learning (Kinakh et al.): no contrast, no teacher, no stop-gradient.

    With z the embeddings of the plain views, z' those of the augmented ones and r_1 .. r_M fixed descriptors of the plain views,
        L1 = invariance * mean (z - z')^2 + variance * [v(z) + v(z')],   v(z) = mean_d max(0, margin - sqrt(var(z_d) + eps))   (4-7)
        L2 = dependence * (1 - dCor(z, z'))                                                                                    (8)
        L3 = representation * sum_m (1 - dCor(z', r_m))                                                                        (9)
        L = L1 + L2 + L3                                                                                                      (10)
    The authors' code adds dCor(z', r_m) where this and their paper have one minus it: it unlearns what the paper learns.

    forward(plain, augmented, representations): (n, D), (n, D) and M tensors (n, E_m). Returns L1, L2 and L3; rows are those of
    all ranks, so that every rank has the loss of all.

    Args:
        invariance, variance, dependence, representation: weights; 1 each, as in the authors' code.
        margin, eps: of the standard deviation.
    """

    def __init__(
        self,
        invariance: float = 1.0,
        variance: float = 1.0,
        dependence: float = 1.0,
        representation: float = 1.0,
        margin: float = 1.0,
        eps: float = 1e-4,
    ):
        super().__init__()
        self.invariance, self.variance, self.dependence, self.representation = (
            invariance,
            variance,
            dependence,
            representation,
        )
        self.margin, self.eps = margin, eps

    def forward(
        self, plain: Tensor, augmented: Tensor, representations: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device_type=plain.device.type, enabled=False):
            z, z_augmented = rows_of_all_ranks(plain.float()), rows_of_all_ranks(augmented.float())
            l1 = self.invariance * F.mse_loss(z, z_augmented) + self.variance * (
                self.hinge(z) + self.hinge(z_augmented)
            )
            distances = centred_distances(z_augmented)
            l2 = self.dependence * (1 - correlation(centred_distances(z), distances))
            l3 = distances.new_zeros(())
            for r in representations:
                l3 = l3 + self.representation * (
                    1
                    - correlation(
                        distances, centred_distances(rows_of_all_ranks(r.detach().float()))
                    )
                )
            return l1, l2, l3

    def hinge(self, z: Tensor) -> Tensor:
        return F.relu(self.margin - (z.var(dim=0) + self.eps).sqrt()).mean()

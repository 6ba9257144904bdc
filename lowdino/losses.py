"""Losses of DINO, EMP-SSL, MV-MR and distillation, in float32 whatever autocast says.

They are exact across ranks: the mean gradient of two ranks with B images each is that of one rank
with 2 B images.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def autocast_off(x: Tensor) -> AbstractContextManager:
    """Turn autocast off on the device of x. MPS in torch 2.4 has none, and refuses the request."""
    kind = x.device.type
    if not torch.amp.autocast_mode.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """log of the sum of exp over the rows of all ranks: (n, K) -> (1, K). No gradient."""
    highest = x.amax(dim=0, keepdim=True)
    if world_size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    total = (x - highest).exp().sum(dim=0, keepdim=True)
    if world_size() > 1:
        dist.all_reduce(total)
    return highest + total.log()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets that use every prototype equally over the batch of all ranks: (n, K) -> (n, K).

    Columns of exp(logits / temperature) are normalised to equal sums and rows to 1 in turn, as in
    SwAV (Caron et al., 2020) and DINOv2 (Oquab et al., 2023); by logarithms, so none overflows.
    """
    log_q = logits.float() / temperature
    for _ in range(iterations):
        log_q = log_q - logsumexp_over_ranks(log_q)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


def balanced(
    loss_g: Tensor, loss_l: Tensor | float, pairs_g: int, pairs_l: int, alpha: float | None
) -> Tensor:
    """Mean of two sums of losses: over P_gg pairs of global views and P_gl pairs with a local view.

        L = alpha L_g / P_gg + (1 - alpha) L_l / P_gl     (Tan et al., 2023, SSLight)
    alpha None, or P_gg / (P_gg + P_gl), means the mean over all pairs.
    """
    if alpha is None:
        return (loss_g + loss_l) / (pairs_g + pairs_l)
    if not pairs_l:
        raise ValueError(f"alpha={alpha} needs local views to balance, and there are none")
    return alpha * loss_g / pairs_g + (1 - alpha) * loss_l / pairs_l


def mean_over_pairs(
    loss: Callable[[Tensor, Tensor], Tensor],
    student: Sequence[Tensor],
    targets: Sequence[Tensor],
    alpha: float | None = None,
) -> Tensor:
    """Mean of loss(s_j, t_i) over all views j and the two global views i != j, see `balanced`.

    `student` has all views, global ones first, `targets` two. The loss is linear in its second
    argument, so that a local view takes the sum of both targets.
    """
    if len(targets) != 2 or len(student) < 2:
        got = f"{len(targets)} and {len(student)}"
        raise ValueError(f"needs 2 teacher and at least 2 student views, got {got}")
    loss_g = loss(student[0], targets[1]) + loss(student[1], targets[0])
    both = targets[0] + targets[1]
    loss_l = sum(loss(s, both) for s in student[2:])
    return balanced(loss_g, loss_l, 2, 2 * (len(student) - 2), alpha)


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student probabilities over all pairs of different views.

    With teacher logits t of the two global views, student logits s of all V views, centre c and
    temperatures T_t and T_s:
        P_t = softmax((t - c) / T_t),  P_s = softmax(s / T_s),  H(t, s) = - sum_k P_t[k] log P_s[k]
        L = mean of H(t_i, s_j) over i in {0, 1}, j in {0 .. V-1}, j != i                    (eq. 3)
        c <- m c + (1 - m) mean of t over the batch of all ranks                             (eq. 4)
    (Caron et al., 2021). `forward` calls `targets`, `pairs` and `update_center`.

    Args:
        out_dim: number of prototypes, K. student_temp: T_s. center_momentum: m.
        centering: "softmax", or "sinkhorn", which computes P_t by Sinkhorn-Knopp and has no c.
        alpha: balance in [0, 1] of global and local views, see `balanced`; None for the mean.
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
        """The loss of logits (B, K) of V and 2 views, global first. Training moves the centre."""
        logits = torch.cat(teacher)  # (2 B, K)
        targets = self.targets(logits, teacher_temp)
        loss = self.pairs(student, targets.chunk(len(teacher)))
        if self.training:
            self.update_center(logits)
        return loss

    @torch.no_grad()
    def targets(self, logits: Tensor, teacher_temp: float) -> Tensor:
        """P_t, centred and sharpened, for both global views in one batch: (2 B, K) -> (2 B, K)."""
        with autocast_off(logits):
            if self.centering == "sinkhorn":
                return sinkhorn_knopp(logits, teacher_temp)
            return (logits.float() - self.center).div_(teacher_temp).softmax(dim=-1)

    def pairs(self, student: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of logits and `targets`, (B, K) each, a scalar; see `mean_over_pairs`."""
        with autocast_off(student[0]):
            return mean_over_pairs(self.cross_entropy, student, targets, self.alpha)

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch of - target . log softmax(logits / T_s); targets have any sum."""
        return F.cross_entropy(logits.float() / self.student_temp, target)

    @torch.no_grad()
    def update_center(self, logits: Tensor) -> None:
        """Move the centre towards the mean of the teacher's logits, (n, K), of all ranks."""
        if self.centering == "sinkhorn":
            return
        mean = logits.float().mean(dim=0, keepdim=True)
        if world_size() > 1:
            dist.all_reduce(mean)
            mean /= world_size()
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)


class GatherRows(torch.autograd.Function):
    """Rows of all ranks, (n, D) -> (ranks * n, D). The gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()  # NCCL needs contiguous tensors to send and to fill
        gathered = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(gathered, x)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # A copy, because autograd may pass the same tensor to another function, as a + b does.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, for the same loss on each; gradients are scaled for DDP's mean."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * world_size()


def rows_of_all_ranks(x: Tensor) -> Tensor:
    """`GatherRows` where there are several ranks: (n, D) -> (ranks * n, D)."""
    return GatherRows.apply(x) if world_size() > 1 else x


def own_rows(x: Tensor) -> Tensor:
    """Indices of this rank's n rows among those of all ranks: (n, D) -> (n,)."""
    return torch.arange(len(x), device=x.device) + rank() * len(x)


class KoLeoLoss(nn.Module):
    """Spread features evenly over the sphere: minus the Kozachenko-Leonenko estimate of entropy.

        L = - 1/n sum_i log min_{j != i} |z_i - z_j|,   z the unit features
    (Sablayrolles et al., 2019), as in DINOv2, but with neighbours in the batch of all ranks. The
    nearest one has the largest inner product; only the distance to it is differentiated.
    forward(features): (n, D), one view per image -> a scalar; a ValueError for fewer than two rows.
    """

    def forward(self, features: Tensor) -> Tensor:
        with autocast_off(features):
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
    """Each view must find the other view of its image in the batch (van den Oord et al., 2018).

        L = - 1/2n sum_i [ log softmax_j(a_i . b_j / T)[i] + log softmax_j(b_i . a_j / T)[i] ]
    over the images of all ranks; as in MoCo v3 (Chen, Xie and He, 2021), but without a teacher.
    forward(a, b): unit embeddings (n, D) of the two global views -> a scalar.
    """

    def __init__(self, temperature: float = 0.2):
        super().__init__()
        self.temperature = temperature

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with autocast_off(a):
            a, b = a.float(), b.float()
            all_a, all_b = rows_of_all_ranks(a), rows_of_all_ranks(b)  # (N, D)
            positives = own_rows(a)
            a_to_b = a @ all_b.T / self.temperature  # (n, N)
            b_to_a = b @ all_a.T / self.temperature
            return (F.cross_entropy(a_to_b, positives) + F.cross_entropy(b_to_a, positives)) / 2


class CodingRateLoss(nn.Module):
    """Views agree with their image's mean, and a batch fills space (EMP-SSL, Tong et al., 2023).

    With unit embeddings z of V views of the n images of all ranks, Z_v (n, d) those of view v:
        C = mean over views v and images i of cos(z_vi, mean_v z_vi)
        R = mean over v of 1/2 log det(I + d / (n eps) Z_v^T Z_v)             the total coding rate
        L = - weight C - R
    The rate replaces negatives and needs no large batch. `weight` is the paper's, `eps` its code's.
    forward(z): this rank's embeddings (V, B, d) of any length -> C and R; `total(C, R)` is L.
    """

    def __init__(self, weight: float = 200.0, eps: float = 0.2):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_off(z):
            z = F.normalize(z.float(), dim=-1)
            cosine = F.cosine_similarity(z, z.mean(dim=0, keepdim=True), dim=-1).mean()
            return cosine, self.coding_rate(z).mean()

    def coding_rate(self, z: Tensor) -> Tensor:
        """R of each view: (V, B, d) -> (V,)."""
        n, d = z.shape[1] * world_size(), z.shape[2]
        if world_size() > 1:
            gram = SumOverRanks.apply(z.mT @ z)  # (V, d, d)
        else:  # the smaller of two products that have the same determinant
            gram = z @ z.mT if n < d else z.mT @ z
        eye = torch.eye(gram.shape[-1], device=z.device)
        # Not checked at once, because that would make a GPU wait. NaN embeddings give NaN.
        factor, info = torch.linalg.cholesky_ex(eye + gram * (d / (n * self.eps)))
        rate = factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        return rate.where(info == 0, torch.nan)

    def total(self, cosine: Tensor, rate: Tensor) -> Tensor:
        return -self.weight * cosine - rate


class KDLoss(nn.Module):
    """Knowledge distillation with softened probabilities (Hinton et al., 2015; LowDINO, eq. 4).

        L = T^2 KL(softmax(t / T) || softmax(s / T)) = T^2 sum_k P_t[k] (log P_t[k] - log P_s[k])
    averaged over the rows. T^2 keeps the size of the gradient independent of T.
    forward(student, teacher): logits, or features (n, K) -> a scalar, with the student's gradient.
    """

    def __init__(self, temperature: float = 3.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with autocast_off(student):
            log_s = (student.float() / self.temperature).log_softmax(dim=1)
            log_t = (teacher.detach().float() / self.temperature).log_softmax(dim=1)
            return self.temperature**2 * F.kl_div(
                log_s, log_t, reduction="batchmean", log_target=True
            )


class SimKDLoss(nn.Module):
    """The student's projected features imitate the teacher's, for whose classifier they then serve.

        L = |s - t|^2 / D,   mean over the rows     (Chen et al., 2022, SimKD, eq. 4)
    SimKD projects and compares feature maps; here both are pooled first.
    forward(student, teacher): (n, D) each -> a scalar, with the student's gradient.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with autocast_off(student):
            return F.mse_loss(student.float(), teacher.detach().float())


class SimilarityLoss(nn.Module):
    """The student's similarities to a set of images follow the teacher's (CompRess, SEED).

        p_t = softmax_j(t_i . q_j / T_t),  p_s = softmax_j(s_i . q_j / T_s)
        L = - mean_i sum_j p_t[j] log p_s[j]  (Abbasi Koohpayegani et al., 2020; Fang et al., 2021)
    with unit vectors s_i, t_i and q_j, the teacher's of the batch of all ranks and the last
    `queue_size` before. SEED's code has only t_i of the batch, and a queue of 65,536.
    forward(student, teacher): (V * n, D) projected, V views, view by view, and (n, D) -> a scalar
    with the student's gradient. In training mode the teacher's vectors then enter the queue.
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
        self.queue_size = queue_size
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.register_buffer("queue", torch.zeros(queue_size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with autocast_off(student):
            s, t = F.normalize(student.float(), dim=1), F.normalize(teacher.detach().float(), dim=1)
            with torch.no_grad():
                batch = rows_of_all_ranks(t)  # (N, D)
                anchors = torch.cat([batch, self.queue])  # (N + queue, D), newest first
                # Rows of the queue that are still empty do not count.
                empty = torch.arange(len(anchors), device=t.device) >= len(batch) + self.filled
                target = t @ anchors.T / self.teacher_temp  # (n, N + queue)
                target = target.masked_fill(empty, -torch.inf).softmax(dim=1)
                target = target.repeat(len(s) // len(t), 1)  # (V n, N + queue)
            log_s = s @ anchors.T / self.student_temp
            log_s = log_s.masked_fill(empty, -torch.inf).log_softmax(dim=1).masked_fill(empty, 0.0)
            loss = -(target * log_s).sum(dim=1).mean()
            if self.training:
                self.queue.copy_(anchors[: self.queue_size])
                self.filled.copy_((self.filled + len(batch)).clamp(max=self.queue_size))
        return loss


def centred_distances(x: Tensor) -> Tensor:
    """Distances of rows, minus the means of row and column, plus the mean: (n, D) -> (n, n)."""
    # Not from inner products: their rounding spoils small distances and their gradients.
    d = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist")
    return d - d.mean(dim=0, keepdim=True) - d.mean(dim=1, keepdim=True) + d.mean()


class DistanceCorrelation(nn.Module):
    """The dependence of two sets of features of the same images (Szekely et al., 2007).

        dCor(x, y)^2 = <A, B> / (|A| |B|),   A and B the centred distances of the rows of x and y
    It is 0 for independent features and 1 for proportional distances. `correlation` is MV-MR's
    equation 2, `centred_distances` A of equation 3, with the biased (V-statistic) mean.
    `MVMRLoss` uses these two, to compute each matrix of distances once.
    forward(x, y): (n, D), (n, E) -> dCor over all ranks; 0, without gradient, if rows are equal.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with autocast_off(x):
            return correlation(*(centred_distances(rows_of_all_ranks(rows)) for rows in (x, y)))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """dCor of two matrices of centred distances (MV-MR, equation 2)."""
    squared = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-20)
    # The square root has no gradient at 0, and rounding may bring its argument below 0.
    return torch.where(squared > 1e-12, squared.clamp(1e-12, 1.0).sqrt(), 0.0)


def variance_hinge(z: Tensor, margin: float = 1.0, eps: float = 1e-4) -> Tensor:
    """v(z): the mean shortfall of the columns' standard deviations below the margin."""
    return F.relu(margin - (z.var(dim=0) + eps).sqrt()).mean()


class MVMRLoss(nn.Module):
    """Multi-view, multi-representation learning (Kinakh et al.), without negatives or a teacher.

    With z the embeddings of the plain views, z' those of the augmented views and r_1 .. r_M fixed
    descriptors of the plain views:
        L1 = invariance * mean (z - z')^2 + variance * [v(z) + v(z')]                  (eq. 4, 7)
             v(z) = mean_d max(0, margin - sqrt(var(z_d) + eps))                       (eq. 5, 6)
        L2 = dependence * (1 - dCor(z, z'))                                               (eq. 8)
        L3 = representation * sum_m (1 - dCor(z', r_m))                                   (eq. 9)
        L = L1 + L2 + L3                                                                  (eq. 10)
    The weights are 1, as in the authors' code. That adds dCor(z', r_m), where their paper and this
    file add 1 - dCor(z', r_m); to minimise the former unlearns what the paper learns. Rows are
    gathered, so every rank has the loss of all ranks.
    forward(plain, augmented, representations): (n, D), (n, D), M of (n, E_m) -> L1, L2 and L3.
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
        self.invariance, self.variance = invariance, variance
        self.dependence, self.representation = dependence, representation
        self.margin, self.eps = margin, eps

    def forward(
        self, plain: Tensor, augmented: Tensor, representations: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        with autocast_off(plain):
            z, z_augmented = rows_of_all_ranks(plain.float()), rows_of_all_ranks(augmented.float())
            l1 = self.invariance * F.mse_loss(z, z_augmented)
            l1 = l1 + self.variance * (self.v(z) + self.v(z_augmented))
            distances = centred_distances(z_augmented)
            l2 = self.dependence * (1 - correlation(centred_distances(z), distances))
            l3 = distances.new_zeros(())
            for r in representations:
                r = centred_distances(rows_of_all_ranks(r.detach().float()))
                l3 = l3 + self.representation * (1 - correlation(distances, r))
            return l1, l2, l3

    def v(self, z: Tensor) -> Tensor:
        return variance_hinge(z, self.margin, self.eps)

"""Linear classifiers on frozen features: a grid of settings trained together, or L-BFGS.

Both minimise the mean cross-entropy plus weight_decay / 2 * |W|^2, without the bias, on features
that `HalfWhitening` has prepared. So a learning rate or a weight decay means the same for every
network.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Settings = Sequence[tuple[float, float]]  # learning rate and weight decay of each classifier


class HalfWhitening:
    """Centre features (N, D), half-whiten them and scale their mean squared length to 1.

    A principal direction with a fraction v of the variance is divided by (v + 1e-5)^power. With raw
    or standardised features SGD is far from the optimum after 100 epochs on random networks, whose
    variance lies in a few directions; with full whitening it fits the noise of the weak directions
    when labels are few. Half-whitening was best or near it at 500 and 5,000 labels (CIFAR-10, one
    network), and was not tuned.

    Rounding rotates principal directions of nearly equal variances. SGD does not mind; an optimizer
    that scales each coordinate, such as AdamW, needs `symmetric` (D, D), which does not rotate.
    """

    def __init__(self, features: Tensor, power: float = 0.25):
        self.mean = features.mean(dim=0)
        centred = features - self.mean
        covariance = centred.T @ centred / len(features)
        solver = "cpu" if features.device.type == "mps" else features.device  # MPS has no eigh
        variance, directions = torch.linalg.eigh(covariance.to(solver))
        variance, directions = variance.to(self.mean).clamp_min(0), directions.to(self.mean)
        share = variance / variance.sum().clamp_min(1e-12)
        stretch = (share + 1e-5) ** -power
        length = (variance * stretch**2).sum().sqrt().clamp_min(1e-12)
        self.matrix, self.directions = directions * (stretch / length), directions

    @property
    def symmetric(self) -> Tensor:
        return self.matrix @ self.directions.T

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D + 1); the last column is 1, so that the bias is a row of the weights."""
        return F.pad((features - self.mean) @ self.matrix, (0, 1), value=1.0)


class Probes:
    """G linear classifiers on the same features, one per setting: SGD with momentum 0.9.

    Their weights are one matrix (C * G, D + 1), so that a step costs two matrix products whatever G
    is. The gradient of the cross-entropy with respect to the logits, softmax - one-hot, is written
    out, because autograd would keep copies. Images are the last dimension of the logits, because a
    softmax over the first one is many times as fast as a softmax over ten numbers in a row.
    `inputs` is D + 1, the width of the half-whitened features.
    """

    def __init__(self, settings: Settings, inputs: int, classes: int, device="cpu"):
        self.classes = classes
        lr, decay = torch.tensor(settings, device=device).repeat(classes, 1).T  # (C * G,) each
        self.lr, self.decay = (values[:, None].repeat(1, inputs) for values in (lr, decay))
        self.decay[:, -1] = 0  # the bias
        self.weight = torch.zeros(len(lr), inputs, device=device)
        self.velocity = torch.zeros_like(self.weight)

    def step(self, x: Tensor, labels: Tensor, factor: float) -> None:
        """One step on (B, D + 1) inputs and (B,) labels at `factor` times the learning rates."""
        logits = (self.weight @ x.T).view(self.classes, -1, len(x))  # (C, G, B)
        # A confident classifier has denormal probabilities, on which a CPU is many times slower.
        error = logits.softmax(dim=0).clamp_min_(1e-20)
        error[labels, :, torch.arange(len(x), device=x.device)] -= 1
        self.velocity.addmm_(error.flatten(0, 1), x, beta=0.9, alpha=1 / len(x))
        self.velocity.addcmul_(self.weight, self.decay)
        self.weight.addcmul_(self.velocity, self.lr, value=-factor)

    def classifiers(self) -> Tensor:
        """(D + 1, G, C)."""
        return self.weight.view(self.classes, -1, self.weight.shape[1]).permute(2, 1, 0)


def train_probes(
    x: Tensor, labels: Tensor, classes: int, settings: Settings, steps: int, batch_size=256, seed=0
) -> Tensor:
    """Train `Probes` on half-whitened (N, D + 1) and labels (N,): (D + 1, G, C) weights.

    The learning rates follow a cosine to 0. Each epoch leaves out images that fill no batch.
    """
    probes = Probes(settings, x.shape[1], classes, x.device)
    generator, batch_size = torch.Generator().manual_seed(seed), min(batch_size, len(x))
    batches = []
    for step in range(steps):
        if not batches:
            order = torch.randperm(len(x), generator=generator).to(x.device)
            batches = list(order[: len(x) // batch_size * batch_size].split(batch_size))
        rows = batches.pop()
        probes.step(x[rows], labels[rows], 0.5 * (1 + math.cos(math.pi * step / steps)))
    return probes.classifiers()


def logistic_regression(
    x: Tensor, labels: Tensor, classes: int, weight_decays: Sequence[float], iterations: int = 300
) -> Tensor:
    """Multinomial logistic regression to its optimum by L-BFGS on all data: (D + 1, G, C) weights.

    scikit-learn's `LogisticRegression(C)` on the same inputs has weight_decay = 1 / (C N). The
    strongest decay is solved first, and each one starts from the solution of the one before.
    """
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    optima = {}
    for decay in sorted(set(weight_decays), reverse=True):
        minimise(weight, x, labels, decay, iterations)
        optima[decay] = weight.detach().clone()
    return torch.stack([optima[decay] for decay in weight_decays], dim=1)


def minimise(weight: Tensor, x: Tensor, labels: Tensor, decay: float, iterations: int) -> None:
    """Move one classifier's weights, (D + 1, C), to the minimum for one weight decay."""
    options = dict(history_size=20, tolerance_grad=1e-6, tolerance_change=1e-9)
    options |= dict(max_iter=iterations, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS([weight], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight, labels) + 0.5 * decay * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def brier_scores(x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean squared distance of softmax from one-hot, from 0 to 2; lower is better (Brier, 1950).

    (N, D + 1), (N,), (D + 1, G, C) -> (G,). On a few hundred images it compares settings with less
    noise than accuracy. Each is scored at the best of nine temperatures: it may be overconfident.
    """
    scales = [2.0**i for i in range(-5, 4)]
    totals = torch.zeros(len(scales), weights.shape[1], device=x.device)
    # In chunks: with many classes the logits of all images would not fit in memory.
    for rows, row_labels in zip(x.split(1000), labels.split(1000)):
        logits = torch.einsum("nd,dgc->gnc", rows, weights)
        target = F.one_hot(row_labels, weights.shape[2])
        for total, scale in zip(totals, scales):
            total += (scale * logits).softmax(dim=2).sub_(target).square_().sum(dim=(1, 2))
    return totals.amin(dim=0) / len(x)


def shuffled_classes(labels: Tensor, seed: int) -> list[Tensor]:
    """Indices of each class's images, shuffled by `seed`: (N,) labels -> C tensors."""
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    classes = ((labels == label).nonzero()[:, 0] for label in range(int(labels.max()) + 1))
    return [indices[torch.randperm(len(indices), generator=generator)] for indices in classes]


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices of a random `fraction`, rounded, of each class's images, from (N,) labels.

    The same for every model; a smaller fraction is a subset of a larger one. A ValueError where a
    class has no image, or would keep none.
    """
    chosen = []
    for label, indices in enumerate(shuffled_classes(labels, seed)):
        keep = round(fraction * len(indices))
        if len(indices) == 0:
            raise ValueError(f"class {label} has no training image")
        if keep == 0:
            words = f"leaves class {label}, of {len(indices)} images, without one"
            raise ValueError(f"a fraction of {fraction:g} of the labels {words}")
        chosen.append(indices[:keep])
    return torch.cat(chosen).sort().values


def split_for_choice(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on, and to choose settings by: a random `fraction`, rounded down, per class.

    A ValueError where no class has enough images to hold one out.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for indices in shuffled_classes(labels, seed):
        held[indices[: int(fraction * len(indices))]] = True
    if not held.any():
        few = f"{len(labels)} labels are too few to hold {fraction:g} of each class out"
        advice = "give one --lr and one --weight_decay, or more labels"
        raise ValueError(f"{few} for choosing the settings: {advice}")
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]

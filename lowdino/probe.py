"""Linear classifiers on frozen features: a grid of settings trained as one, and the optimum by L-BFGS.

Both minimise the mean cross-entropy plus weight_decay / 2 * |W|^2, the bias left out, on features that a `Scaler` has
prepared. So a learning rate or a weight decay means the same whatever network the features come from.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Scaler:
    """Centres features, half-whitens them and brings their mean squared length to 1.

    Principal directions of variance v, as a fraction of the whole, are divided by (v + 1e-5)^(1/4), so that they spread by
    v^(1/4) where they had v^(1/2). Left as they are, or with each dimension divided by its own deviation, SGD is far from
    the optimum after 100 epochs on random networks, whose variance lies in a few directions; whitened wholly, it fits the
    noise of the weak ones when labels are few. Half-way was best or near it at 500 and 5,000 labels (CIFAR-10, chosen on
    test images of one network, ResNet5M of seed 0, and not tuned further).
    """

    def __init__(self, features: Tensor):
        self.mean = features.mean(dim=0)
        centred = features - self.mean
        covariance = centred.T @ centred / len(features)
        solver = (
            "cpu" if features.device.type == "mps" else features.device
        )  # MPS has no eigenvalues
        variance, directions = (
            found.to(features.device) for found in torch.linalg.eigh(covariance.to(solver))
        )
        variance = variance.clamp_min(0)
        share = variance / variance.sum().clamp_min(1e-12)
        stretch = (share + 1e-5) ** -0.25
        length = (variance * stretch**2).sum().sqrt().clamp_min(1e-12)
        self.matrix = directions * (stretch / length)

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D + 1), the last column being ones: the bias is a weight like any other."""
        return F.pad((features - self.mean) @ self.matrix, (0, 1), value=1.0)


class Probes:
    """G linear classifiers on the same features, one a setting, trained together by SGD with momentum 0.9.

    Their weights are one matrix (C * G, D + 1), so that a step costs two matrix products whatever G is. The gradient of
    the cross-entropy with respect to the logits, softmax - one-hot, is written out: autograd would keep copies. Images
    come last in the logits: a softmax over the first dimension is many times as fast as one over ten numbers in a row.

    Args:
        settings: (learning rate, weight decay) of each classifier.
        inputs: D + 1, the width of what `Scaler` gives. classes: C.
    """

    def __init__(
        self,
        settings: Sequence[tuple[float, float]],
        inputs: int,
        classes: int,
        device: torch.device | str = "cpu",
    ):
        self.classes = classes
        lr, decay = torch.tensor(settings, device=device).repeat(classes, 1).T  # (C * G,) each
        self.lr, self.decay = (values[:, None].repeat(1, inputs) for values in (lr, decay))
        self.decay[:, -1] = 0  # the bias
        self.weight = torch.zeros(len(lr), inputs, device=device)
        self.velocity = torch.zeros_like(self.weight)

    def step(self, x: Tensor, labels: Tensor, factor: float) -> None:
        """One step on (B, D + 1) inputs and (B,) labels at `factor` times the learning rates."""
        logits = (self.weight @ x.T).view(self.classes, -1, len(x))  # (C, G, B)
        # Of a classifier that is sure, probabilities are denormal numbers, on which a CPU is many times slower.
        error = logits.softmax(dim=0).clamp_min_(1e-20)
        error[labels, :, torch.arange(len(x), device=x.device)] -= 1
        self.velocity.addmm_(error.flatten(0, 1), x, beta=0.9, alpha=1 / len(x))
        self.velocity.addcmul_(self.weight, self.decay)
        self.weight.addcmul_(self.velocity, self.lr, value=-factor)

    def classifiers(self) -> Tensor:
        """(D + 1, G, C)."""
        return self.weight.view(self.classes, -1, self.weight.shape[1]).permute(2, 1, 0)


def train_probes(
    x: Tensor,
    labels: Tensor,
    classes: int,
    settings: Sequence[tuple[float, float]],
    steps: int,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """Train `Probes` on scaled features (N, D + 1) and labels (N,): (D + 1, G, C) weights.

    The learning rates fall on a cosine to 0; an epoch's images that do not fill a batch wait for the next.
    """
    probes = Probes(settings, x.shape[1], classes, x.device)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(x))
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
    """Multinomial logistic regression to its optimum by L-BFGS on all data at once: (D + 1, G, C) weights.

    scikit-learn's `LogisticRegression(C)` on the same inputs has weight_decay = 1 / (C N). From the strongest decay to
    the weakest, each starting at the one before, whatever order they are given in.
    """
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    found = {}
    for decay in sorted(set(weight_decays), reverse=True):
        optimizer = torch.optim.LBFGS(
            [weight],
            max_iter=iterations,
            history_size=20,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight, labels) + 0.5 * decay * weight[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found[decay] = weight.detach().clone()
    return torch.stack([found[decay] for decay in weight_decays], dim=1)


def brier_scores(x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean squared distance of softmax from one-hot: (N, D + 1), (N,), (D + 1, G, C) -> (G,), 0 to 2, lower is better.

    On a few hundred held-out images it tells settings apart with less noise than the share of right answers does (Brier,
    1950). Each classifier is scored at the best of nine temperatures, for one may be right more often and too sure of it.
    """
    scales = [2.0**i for i in range(-5, 4)]
    totals = torch.zeros(len(scales), weights.shape[1], device=x.device)
    for rows, own in zip(
        x.split(1000), labels.split(1000)
    ):  # or with many classes the logits of all would fill the memory
        logits = torch.einsum("nd,dgc->gnc", rows, weights)
        target = F.one_hot(own, weights.shape[2])
        for total, scale in zip(totals, scales):
            total += (scale * logits).softmax(dim=2).sub_(target).square_().sum(dim=(1, 2))
    return totals.amin(dim=0) / len(x)


def shuffled_classes(labels: Tensor, seed: int) -> list[Tensor]:
    """The places of each class's images, (N,) labels -> C tensors, in an order drawn from `seed`."""
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    classes = ((labels == label).nonzero()[:, 0] for label in range(int(labels.max()) + 1))
    return [places[torch.randperm(len(places), generator=generator)] for places in classes]


def label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """The same share of each class: (N,) labels -> places of `fraction` of its images, rounded, drawn by lot, sorted.

    It depends on the labels, `fraction` and `seed` alone, so it is the same for every model; a smaller fraction's images
    are among a larger one's.

    Raises:
        ValueError: where a class has no image, or would keep none.
    """
    chosen = []
    for label, places in enumerate(shuffled_classes(labels, seed)):
        keep = round(fraction * len(places))
        if len(places) == 0:
            raise ValueError(f"class {label} has no training image")
        if keep == 0:
            raise ValueError(
                f"a fraction of {fraction:g} of the labels leaves class {label}, of {len(places)} images, "
                "without one"
            )
        chosen.append(places[:keep])
    return torch.cat(chosen).sort().values


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places to fit on and places to choose settings by: `fraction` of each class's images, rounded down.

    Raises:
        ValueError: where no class has enough images to hold one out.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for places in shuffled_classes(labels, seed):
        held[places[: int(fraction * len(places))]] = True
    if not held.any():
        raise ValueError(
            f"{len(labels)} labels are too few to hold {fraction:g} of each class out for choosing the "
            "settings: give one --lr and one --weight_decay, or more labels"
        )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]

"""Features of a frozen network, and the weighted k-NN classifier on them."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def extract_features(backbone: nn.Module, batches: Iterable, view: Callable[[Tensor, Tensor], Tensor],
                     device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a network in eval mode over batches: (N, D) float32 features and (N,) labels, on `device`.

    Args:
        backbone: images to features; its mode is restored afterwards.
        batches: of (images uint8 (B, 3, S, S), sizes (B, 2), labels (B,), ...).
        view: makes the network's input of (images, sizes).
    """
    training = backbone.training
    backbone.eval()
    features, labels = [], []
    for images, sizes, label, *_ in batches:
        x = view(images.to(device, non_blocking=True), sizes.to(device, non_blocking=True))
        features.append(backbone(x).float())
        labels.append(label.to(device))
    backbone.train(training)
    return torch.cat(features), torch.cat(labels)


def nearest_neighbours(train_features: Tensor, test_features: Tensor, k: int,
                       chunk_bytes: int = 2**28) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosine similarities and places of the k nearest training features: (N, D), (M, D) -> (M, k), (M, k), best first.

    The (M, N) similarities are made in blocks of at most `chunk_bytes`.
    """
    train, test = F.normalize(train_features.float(), dim=1), F.normalize(test_features.float(), dim=1)
    rows = max(chunk_bytes // (4 * len(train)), 1)
    found = [(block @ train.T).topk(k, dim=1) for block in test.split(rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def vote(similarities: Tensor, neighbour_labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Each neighbour votes for its class with weight exp(similarity / T): (M, k), (M, k) -> (M, num_classes)."""
    weights = (similarities / temperature).exp()
    scores = torch.zeros(len(weights), num_classes, device=weights.device)
    return scores.scatter_add_(1, neighbour_labels, weights)


def knn_classify(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 20,
                 temperature: float = 0.07, num_classes: int | None = None) -> Tensor:  # fmt: skip
    """Weighted k-NN of Wu et al. (2018, arXiv 1805.01978), as DINO evaluates: (N, D), (N,), (M, D) -> (M, num_classes).

    Args:
        k: neighbours; where there are fewer training features, all of them.
        temperature: T of the votes exp(cosine / T); at least 0.013, or the sum of many votes leaves float32.
        num_classes: width of the result; None for the largest label plus one.

    Returns:
        The sum of the votes for each class: its argmax is the prediction, its order the ranking.
    """
    num_classes = num_classes or int(train_labels.max()) + 1
    similarities, places = nearest_neighbours(train_features, test_features, min(k, len(train_features)))
    return vote(similarities, train_labels[places], temperature, num_classes)


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Fraction of rows whose label is among the `top` highest scores: (M, C), (M,) -> a number in [0, 1]."""
    return (scores.topk(top, dim=1).indices == labels[:, None]).any(dim=1).float().mean().item()

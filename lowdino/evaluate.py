"""Features of a frozen network, in memory and as a file, and the weighted k-NN classifier on them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Features(NamedTuple):
    """Of one split: (N, D) features, (N,) labels (-1 where there is none), and N names of files or places."""

    features: Tensor
    labels: Tensor
    files: list[str]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    batches: Iterable,
    view: Callable[[Tensor, Tensor], Tensor],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
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


def save_features(path: str, name: str, splits: dict[str, Features]) -> None:
    """Write an .npz of plain arrays: `model`, and of each split ("train", "test") NAME, NAME_labels and NAME_files."""
    arrays = {"model": np.array(name)}
    for split, (x, labels, files) in splits.items():
        arrays |= {
            split: x.cpu().numpy(),
            f"{split}_labels": labels.cpu().numpy(),
            f"{split}_files": np.array(files),
        }
    with open(path, "wb") as file:  # np.savez would add .npz to another name
        np.savez(file, **arrays)


def load_features(path: str, device: torch.device | str = "cpu") -> tuple[str, Features, Features]:
    """The name, the training and the test features of a file of `save_features`, or of anybody's with the same arrays.

    Raises:
        ValueError: where the file is damaged, lacks labels, or its arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}") from error
    except Exception as error:  # a damaged file makes zipfile and numpy fail in any way there is
        raise ValueError(
            f"cannot read {path}: it is damaged, or not an .npz file of plain arrays"
        ) from error
    splits = []
    for split in ("train", "test"):
        lacking = [key for key in (split, f"{split}_labels") if key not in arrays]
        if lacking:
            raise ValueError(
                f"{path} lacks the array {lacking[0]!r}; it has {', '.join(sorted(arrays))}"
            )
        x, labels = arrays[split], arrays[f"{split}_labels"]
        if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
            raise ValueError(
                f"{path}: {split} should be (N, D) with N labels, not {x.shape} with labels {labels.shape}"
            )
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(
                f"{path}: {split}_labels should be whole numbers from 0; a file of unlabelled images has none"
            )
        if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
            raise ValueError(f"{path}: {split} has values that are not finite numbers")
        names = arrays.get(f"{split}_files", np.arange(len(x)))
        splits.append(
            Features(
                torch.from_numpy(x).float().to(device),
                torch.from_numpy(labels).long().to(device),
                [str(n) for n in names],
            )
        )
    train, test = splits
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"{path}: train has {train.features.shape[1]} features an image, test {test.features.shape[1]}"
        )
    return str(arrays.get("model", path)), train, test


def nearest_neighbours(
    train_features: Tensor, test_features: Tensor, k: int, chunk_bytes: int = 2**28
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and places of the k nearest training features: (N, D), (M, D) -> (M, k), (M, k), best first.

    The (M, N) similarities are made in blocks of at most `chunk_bytes`. k is N at most.
    """
    train, test = (
        F.normalize(train_features.float(), dim=1),
        F.normalize(test_features.float(), dim=1),
    )
    rows = max(chunk_bytes // (4 * len(train)), 1)
    found = [(block @ train.T).topk(k, dim=1) for block in test.split(rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def vote(
    similarities: Tensor, neighbour_labels: Tensor, temperature: float, num_classes: int
) -> Tensor:
    """Each neighbour votes for its class with weight exp(similarity / T): (M, k), (M, k) -> (M, num_classes)."""
    weights = (similarities / temperature).exp()
    scores = torch.zeros(len(weights), num_classes, device=weights.device)
    return scores.scatter_add_(1, neighbour_labels, weights)


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Weighted k-NN of Wu et al. (2018, arXiv 1805.01978), as DINO evaluates: (N, D), (N,), (M, D) -> (M, num_classes).

    Args:
        k: neighbours; where there are fewer training features, all of them.
        temperature: T of the votes exp(cosine / T); at least 0.013, or the sum of many votes leaves float32.
        num_classes: width of the result; None for the largest label plus one.

    Returns:
        The sum of the votes for each class: its argmax is the prediction, its order the ranking.
    """
    num_classes = num_classes or int(train_labels.max()) + 1
    similarities, places = nearest_neighbours(
        train_features, test_features, min(k, len(train_features))
    )
    return vote(similarities, train_labels[places], temperature, num_classes)


def knn_accuracy(train: Features, test: Features, k: int, num_classes: int) -> float:
    """Top-1 accuracy of `knn_classify` on the test features, the training features being the memory."""
    return accuracy(
        knn_classify(train.features, train.labels, test.features, k, num_classes=num_classes),
        test.labels,
    )


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Fraction of rows whose label is among the `top` highest scores: (M, C), (M,) -> a number in [0, 1]."""
    return (scores.topk(top, dim=1).indices == labels[:, None]).any(dim=1).float().mean().item()

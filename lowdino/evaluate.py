"""Features of a frozen network, in memory and as a file, and their weighted k-NN classifier."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


class Features(NamedTuple):
    """Of one split: (N, D) features, (N,) labels or -1 for none, and N file names or indices."""

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
    """Run a network in eval mode over batches: (N, D) float32 features, (N,) labels, on `device`.

    On CUDA the network runs under bfloat16 autocast.

    Args:
        backbone: images to features; its mode is restored afterwards.
        batches: of (images uint8 (B, 3, H, W), sizes (B, 2), labels (B,), ...).
        view: makes the network's input from (images, sizes).
    """
    device = torch.device(device)
    training = backbone.training
    backbone.eval()
    features, labels = [], []
    for images, sizes, label, *_ in batches:
        x = view(images.to(device, non_blocking=True), sizes.to(device, non_blocking=True))
        # Named "cuda" on every device: torch 2.4 knows no autocast on MPS, not even one turned off.
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            features.append(backbone(x).float())
        labels.append(label.to(device))
    backbone.train(training)
    return torch.cat(features), torch.cat(labels)


def save_features(path: str, name: str, splits: dict[str, Features]) -> None:
    """Write an .npz of plain arrays: `model`, and NAME, NAME_labels, NAME_files of each split.

    The splits' names are "train" and "test".
    """
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
    """Model name, training and test features of a file of `save_features`, or one with its arrays.

    Raises:
        UserError: where the file is damaged, lacks labels, or its arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # on a damaged file zipfile and numpy raise any kind of exception
        raise UserError(
            f"cannot read {path}: it is damaged, or not an .npz file of plain arrays"
        ) from error
    train, test = (checked_split(path, arrays, split, device) for split in ("train", "test"))
    if train.features.shape[1] != test.features.shape[1]:
        raise UserError(
            f"{path}: train has {train.features.shape[1]} features an image, "
            f"test {test.features.shape[1]}"
        )
    return str(arrays.get("model", path)), train, test


def checked_split(
    path: str, arrays: dict[str, np.ndarray], split: str, device: torch.device | str
) -> Features:
    """The arrays of one split as tensors on `device`; a UserError, which names `path`, if unfit."""
    lacking = [key for key in (split, f"{split}_labels") if key not in arrays]
    if lacking:
        raise UserError(
            f"{path} lacks the array {lacking[0]!r}; it has {', '.join(sorted(arrays))}"
        )
    x, labels = arrays[split], arrays[f"{split}_labels"]
    if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
        raise UserError(
            f"{path}: {split} should be (N, D) with N labels, "
            f"not {x.shape} with labels {labels.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"{path}: {split}_labels should be whole numbers from 0; "
            "a file of unlabelled images has none"
        )
    if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
        raise UserError(f"{path}: {split} has values that are not finite numbers")
    names = arrays.get(f"{split}_files", np.arange(len(x)))
    return Features(
        torch.from_numpy(x).float().to(device),
        torch.from_numpy(labels).long().to(device),
        [str(name) for name in names],
    )


def nearest_neighbours(
    train_features: Tensor, test_features: Tensor, k: int, chunk_bytes: int = 2**28
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices of the k nearest training features, best first.

    (N, D), (M, D) -> (M, k), (M, k). The (M, N) similarities are computed in blocks of at most
    `chunk_bytes`. k is N at most.
    """
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    rows = max(chunk_bytes // (4 * len(train)), 1)
    found = [(block @ train.T).topk(k, dim=1) for block in test.split(rows)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def vote(
    similarities: Tensor, neighbour_labels: Tensor, temperature: float, num_classes: int
) -> Tensor:
    """Each neighbour votes for its class with weight exp(similarity / T).

    (M, k), (M, k) -> (M, num_classes): the sum of the votes, and -inf for a class without a vote.
    """
    weights = (similarities / temperature).exp()
    scores = torch.zeros(len(weights), num_classes, device=weights.device)
    scores.scatter_add_(1, neighbour_labels, weights)
    return scores.masked_fill_(scores == 0, -torch.inf)


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Weighted k-NN of Wu et al. (2018, arXiv 1805.01978), as in DINO's evaluation.

    (N, D), (N,), (M, D) -> (M, num_classes).

    Args:
        k: neighbours; where there are fewer training features, all of them.
        temperature: T of the votes exp(cosine / T); at least 0.013, or the sum of many votes
            overflows float32.
        num_classes: width of the result; None for the largest label plus one.

    Returns:
        The sum of the votes for each class, -inf where there is none. Its argmax is the prediction.
    """
    num_classes = num_classes or int(train_labels.max()) + 1
    k = min(k, len(train_features))
    similarities, indices = nearest_neighbours(train_features, test_features, k)
    return vote(similarities, train_labels[indices], temperature, num_classes)


def knn_accuracy(train: Features, test: Features, k: int, num_classes: int) -> float:
    """Top-1 accuracy of `knn_classify`, the training features being the memory."""
    scores = knn_classify(train.features, train.labels, test.features, k, num_classes=num_classes)
    return accuracy(scores, test.labels)


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Fraction of rows whose label is among the `top` highest scores: (M, C), (M,) -> [0, 1].

    A score of -inf is never among them: k-NN gives it to a class without a vote.
    """
    highest = scores.topk(top, dim=1)
    hits = (highest.indices == labels[:, None]) & (highest.values > -torch.inf)
    return hits.any(dim=1).float().mean().item()


def retrieval_map(train: Features, test: Features, chunk: int = 256) -> float:
    """Mean average precision of retrieval: each test image ranks all training images by cosine.

    Those of its own class are the relevant ones. The average precision of a query is the mean, over
    its relevant images, of the share of relevant ones among all down to that rank. Queries of a
    class without training images are left out.

    Args:
        chunk: queries ranked at a time, which bounds the memory.
    """
    memory = F.normalize(train.features.float(), dim=1)
    ranks = torch.arange(1, len(memory) + 1, dtype=torch.float64)
    found = []
    for queries, labels in zip(test.features.split(chunk), test.labels.split(chunk)):
        order = (F.normalize(queries.float(), dim=1) @ memory.T).argsort(dim=1, descending=True)
        relevant = (train.labels[order] == labels[:, None]).cpu()  # MPS has no float64
        precision = relevant.cumsum(dim=1).double() / ranks
        counts = relevant.sum(dim=1)
        found.append(((precision * relevant).sum(dim=1) / counts)[counts > 0])
    return torch.cat(found).mean().item()

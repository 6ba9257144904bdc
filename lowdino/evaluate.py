"""Measures: k-NN and retrieval by a frozen network's features, and the AP of detections."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- Features --------------------------------------------------------------------------------------


class Features(NamedTuple):
    """Features (N, D) of one split, labels (N,), -1 for none, and N file names or indices."""

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

    On CUDA it runs under bfloat16 autocast. Its mode is restored afterwards.

    Args:
        batches: (images uint8 (B, C, H, W), sizes (B, 2), labels (B,), ...) each.
        view: (images, sizes) -> the network's input.
    """
    device, training = torch.device(device), backbone.training
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
    """Write an .npz of plain arrays: `model`, and SPLIT, SPLIT_labels, SPLIT_files by split."""
    arrays = {"model": np.array(name)}
    for split, (x, labels, files) in splits.items():
        arrays |= {split: x.cpu().numpy(), f"{split}_labels": labels.cpu().numpy()}
        arrays[f"{split}_files"] = np.array(files)
    with open(path, "wb") as file:  # np.savez would add .npz to another name
        np.savez(file, **arrays)


def load_features(path: str, device: torch.device | str = "cpu") -> tuple[str, Features, Features]:
    """Model name, training and test features from a file with the arrays of `save_features`.

    A ValueError where it is damaged, lacks labels, or its arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}") from error
    except Exception as error:  # on a damaged file zipfile and numpy raise any kind of exception
        reason = "it is damaged, or not an .npz file of plain arrays"
        raise ValueError(f"cannot read {path}: {reason}") from error
    train, test = (checked_split(path, arrays, split, device) for split in ("train", "test"))
    widths = train.features.shape[1], test.features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"{path}: train has {widths[0]} features per image, test {widths[1]}")
    return str(arrays.get("model", path)), train, test


def checked_split(
    path: str, arrays: dict[str, np.ndarray], split: str, device: torch.device | str
) -> Features:
    """The arrays of one split as tensors on `device`; a ValueError on unfit ones names `path`."""
    for key in (split, f"{split}_labels"):
        if key not in arrays:
            raise ValueError(f"{path} lacks the array {key!r}; it has {', '.join(sorted(arrays))}")
    x, labels = arrays[split], arrays[f"{split}_labels"]
    if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
        shapes = f"{x.shape} with labels {labels.shape}"
        raise ValueError(f"{path}: {split} should be (N, D) with N labels, not {shapes}")
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        words = "should be integers from 0; a file of unlabelled images has none"
        raise ValueError(f"{path}: {split}_labels {words}")
    if x.dtype.kind not in "fiu" or not np.isfinite(x).all():
        raise ValueError(f"{path}: {split} has values that are not finite numbers")
    files = [str(name) for name in arrays.get(f"{split}_files", np.arange(len(x)))]
    features, labels = torch.from_numpy(x).float(), torch.from_numpy(labels).long()
    return Features(features.to(device), labels.to(device), files)


# -- k-NN and retrieval ----------------------------------------------------------------------------


def nearest_neighbours(
    train_features: Tensor, test_features: Tensor, k: int, chunk_bytes: int = 2**28
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and indices of the k nearest training features, best first.

    (N, D), (M, D) -> (M, k), (M, k), in blocks of at most `chunk_bytes`. k is at most N.
    """
    train, test = (F.normalize(x.float(), dim=1) for x in (train_features, test_features))
    rows = max(chunk_bytes // (4 * len(train)), 1)
    nearest = [(block @ train.T).topk(k, dim=1) for block in test.split(rows)]
    return torch.cat([n.values for n in nearest]), torch.cat([n.indices for n in nearest])


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Weighted k-NN of Wu et al. (2018, arXiv 1805.01978), as in DINO's evaluation.

    (N, D), (N,), (M, D) -> (M, num_classes): the sum of the votes exp(cosine / temperature) of the
    k nearest, or of all features, for each class; -inf where there is none. Its argmax is the
    prediction.

    Args:
        temperature: at least 0.013, or the sum of many votes overflows float32.
        num_classes: None for the largest label plus one.
    """
    num_classes = num_classes or int(train_labels.max()) + 1
    k = min(k, len(train_features))
    similarities, indices = nearest_neighbours(train_features, test_features, k)
    scores = torch.zeros(len(indices), num_classes, device=indices.device)
    scores.scatter_add_(1, train_labels[indices], (similarities / temperature).exp())
    return scores.masked_fill_(scores == 0, -torch.inf)


def knn_accuracy(train: Features, test: Features, k: int, num_classes: int) -> float:
    """Top-1 accuracy of `knn_classify` on the test features."""
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

    Images of the query's class are relevant. The average precision of a query is the mean, over its
    relevant images, of the share of relevant images down to that rank. Queries of a class without
    training images are left out. `chunk` queries are ranked at a time, which bounds the memory.
    """
    memory = F.normalize(train.features.float(), dim=1)
    ranks = torch.arange(1, len(memory) + 1, dtype=torch.float64)
    average_precisions = []
    for queries, labels in zip(test.features.split(chunk), test.labels.split(chunk)):
        order = (F.normalize(queries.float(), dim=1) @ memory.T).argsort(dim=1, descending=True)
        relevant = (train.labels[order] == labels[:, None]).cpu()  # MPS has no float64
        precision = relevant.cumsum(dim=1).double() / ranks
        counts = relevant.sum(dim=1)
        average_precisions.append(((precision * relevant).sum(dim=1) / counts)[counts > 0])
    return torch.cat(average_precisions).mean().item()


# -- Average precision of detections ---------------------------------------------------------------

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections that count per class and picture, those of the highest scores


class Matches(NamedTuple):
    """The detections of one picture after matching, at T IoU thresholds."""

    scores: np.ndarray  # (D,) float64, falling within each class
    labels: np.ndarray  # (D,) int64
    correct: np.ndarray  # (T, D) bool, matched to an object that counts
    ignored: np.ndarray  # (T, D) bool, matched to one that does not count: neither right nor wrong
    objects: np.ndarray  # (G,) int64, labels of the objects that count


class Score(NamedTuple):
    """Average precision, a mean over classes; NaN where no picture has an object that counts."""

    ap50: float  # at IoU 0.5
    ap: float  # mean over all thresholds
    by_class: dict[int, np.ndarray]  # (T,) for each class that has objects


def box_iou(detected: np.ndarray, true: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of boxes (left, top, right, bottom): (D, 4), (G, 4), (G,) bool -> (D, G) float64.

    In a crowd it is the intersection over the detection's area.
    """
    detected, true = (np.asarray(boxes, dtype=np.float64) for boxes in (detected, true))
    low = np.maximum(detected[:, None, :2], true[:, :2])
    high = np.minimum(detected[:, None, 2:], true[:, 2:])
    intersection = (high - low).clip(min=0).prod(axis=2)
    area, true_area = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (detected, true))
    union = np.where(crowd, area[:, None], area[:, None] + true_area - intersection)
    return np.divide(intersection, union, out=np.zeros(union.shape), where=intersection > 0)


def match(prediction: Mapping[str, np.ndarray], target: Mapping[str, np.ndarray]) -> Matches:
    """Match one picture's detections to its objects, class by class.

    Args:
        prediction: scores (D,), labels (D,), and boxes (D, 4).
        target: labels (G,), and boxes (G, 4). `crowd` (G,) bool, where there is one, marks crowds:
            a detection that lies in one meets it, and does not count; and a crowd needs none. That
            is COCO's rule.

    Tensors must be on the CPU. A ValueError where scores are not finite: they have no order.
    """
    scores = np.asarray(prediction["scores"], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores of detections are not finite numbers: the detector has diverged")
    labels, true = np.asarray(prediction["labels"]), np.asarray(target["labels"])
    crowd = np.asarray(target.get("crowd", np.zeros(len(true))), dtype=bool)
    detected, boxes = np.asarray(prediction["boxes"]), np.asarray(target["boxes"])
    orders, matched = [np.zeros(0, dtype=int)], [np.zeros((2, len(IOU_THRESHOLDS), 0), dtype=bool)]
    for label in np.unique(labels):
        order = by_score(scores, labels == label)[:MOST]
        objects = np.flatnonzero(true == label)
        objects = objects[np.argsort(crowd[objects], kind="stable")]  # crowds are last
        overlaps = box_iou(detected[order], boxes[objects], crowd[objects])
        orders.append(order)
        matched.append(match_class(overlaps, crowd[objects]))
    order, matched = np.concatenate(orders), np.concatenate(matched, axis=2)
    return Matches(scores[order], labels[order], *matched, true[~crowd])


def by_score(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Indices of the `chosen` (D,) bool by falling score, the first ones first where equal."""
    indices = np.flatnonzero(chosen)
    return indices[np.argsort(-scores[indices], kind="stable")]


def match_class(overlaps: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Greedy matching: `Matches.correct` and `.ignored` of one class, (2, T, D) bool.

    Each detection in turn takes the free object that it overlaps most, the last of equal ones. Only
    without one does it take a crowd, which many detections may take. Overlaps are (D, G):
    detections by falling score, objects with each `crowd`, (G,) bool, last.
    """
    correct, ignored = matched = np.zeros((2, len(IOU_THRESHOLDS), len(overlaps)), dtype=bool)
    single = int((~crowd).sum())
    free = np.ones((len(IOU_THRESHOLDS), single), dtype=bool)
    enough = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    for d in np.flatnonzero(overlaps.max(axis=1, initial=0) >= enough[0]):
        row = overlaps[d]
        if single:
            candidates = np.where(free & (row[:single] >= enough[:, None]), row[:single], -1)
            best = single - 1 - candidates[:, ::-1].argmax(axis=1)  # the last of the largest
            taken = np.flatnonzero(candidates[np.arange(len(best)), best] >= 0)
            correct[taken, d] = True
            free[taken, best[taken]] = False
        ignored[:, d] = ~correct[:, d] & (row[single:].max(initial=-1) >= enough)
    return matched


def average_precision(pictures: Sequence[Matches]) -> Score:
    """COCO's average precision; detections of equal score count in the order of the pictures."""
    scores, labels, objects = (
        np.concatenate([np.zeros(0, dtype=int), *(getattr(picture, name) for picture in pictures)])
        for name in ("scores", "labels", "objects")
    )
    if not len(objects):
        return Score(math.nan, math.nan, {})
    correct, ignored = np.concatenate([(p.correct, p.ignored) for p in pictures], axis=2)
    by_class = {}
    for label, count in zip(*np.unique(objects, return_counts=True)):
        order = by_score(scores, labels == label)
        at_thresholds = zip(correct[:, order], ignored[:, order])
        precisions = [mean_precision(right[~out], count) for right, out in at_thresholds]
        by_class[int(label)] = np.array(precisions)
    values = np.stack([*by_class.values()])  # (classes, T)
    return Score(float(values[:, 0].mean()), float(values.mean()), by_class)


def mean_precision(correct: np.ndarray, objects: int) -> float:
    """Mean over 101 recalls of the best precision there or beyond; `correct` by falling score."""
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(correct) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(hits / objects, RECALLS)  # the first detection that reaches a recall
    return float(np.append(precision, 0.0)[first].mean())

"""Average precision of detections, as COCO defines it, in float64.

    matches = [match(prediction, target) for each picture]
    score = average_precision(matches)
    score.ap50, score.ap            at IoU 0.5, and the mean over IoU 0.5, 0.55, ..., 0.95

It follows pycocotools' COCOeval (areas "all", 100 detections) rule by rule. Pictures are matched
one by one, so nothing large is kept of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of a class and picture that count, the most certain ones


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


class Matches(NamedTuple):
    """What became of one picture's detections, sorted by class and falling score.

    T is the number of IoU thresholds, D that of detections, G that of objects that count.
    """

    scores: np.ndarray  # (D,) float64
    labels: np.ndarray  # (D,) int64
    correct: np.ndarray  # (T, D) bool, matched to an object that counts
    ignored: np.ndarray  # (T, D) bool, matched to what does not count: neither right nor wrong
    objects: np.ndarray  # (G,) int64, labels of the objects to be found


class Score(NamedTuple):
    """Average precision, NaN where no picture has an object that counts.

    Attributes:
        ap50: at IoU 0.5. ap: the mean over all thresholds. Both are means over the classes that
            have objects.
        by_class: (T,) of each such class.
    """

    ap50: float
    ap: float
    by_class: dict[int, np.ndarray]


# --------------------------------------------------------------------------------------------------
# Overlap
# --------------------------------------------------------------------------------------------------


def ratio(intersection: np.ndarray, found: np.ndarray, true: np.ndarray, crowd) -> np.ndarray:
    """Intersection over union; over the detection's own area where the object is a crowd.

    Args:
        intersection: (D, G). found: areas (D,). true: areas (G,). crowd: (G,) bool.
    """
    union = np.where(crowd, found[:, None], found[:, None] + true - intersection)
    return np.divide(intersection, union, out=np.zeros(union.shape), where=intersection > 0)


def box_iou(found: np.ndarray, true: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Overlaps of boxes (left, top, right, bottom): (D, 4), (G, 4), (G,) bool -> (D, G) float64."""
    found, true = (np.asarray(boxes, dtype=np.float64) for boxes in (found, true))
    low = np.maximum(found[:, None, :2], true[:, :2])
    high = np.minimum(found[:, None, 2:], true[:, 2:])
    intersection = (high - low).clip(min=0).prod(axis=2)
    areas = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (found, true))
    return ratio(intersection, *areas, crowd)


def mask_iou(found: np.ndarray, true: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Overlaps of masks: (D, H, W), (G, H, W), (G,) bool -> (D, G) float64. What is not 0 is on."""
    found, true = (np.asarray(masks) != 0 for masks in (found, true))
    found, true = (m.reshape(len(m), math.prod(m.shape[1:])) for m in (found, true))
    intersection = np.zeros((len(found), len(true)))
    for g, mask in enumerate(true):
        intersection[:, g] = found[:, mask].sum(axis=1)
    return ratio(intersection, found.sum(axis=1), true.sum(axis=1), crowd)


# --------------------------------------------------------------------------------------------------
# Matching and counting
# --------------------------------------------------------------------------------------------------


def match(
    prediction: Mapping[str, np.ndarray], target: Mapping[str, np.ndarray], kind: str = "boxes"
) -> Matches:
    """Match one picture's detections to its objects, class by class.

    Args:
        prediction: scores (D,), labels (D,), and boxes (D, 4) or masks (D, H, W).
        target: labels (G,), and boxes (G, 4) or masks (G, H, W); crowd (G,) bool where some of the
            objects are crowds, and difficult (G,) bool where some are VOC's difficult ones.
            Detections on either do not count, and nobody need find it. A crowd is met by what lies
            in it, COCO's rule, and a difficult object by what has its place and size, VOC's.
        kind: "boxes" or "masks", what overlap is measured by.

    Both may hold torch's tensors, on a CPU.

    Raises:
        UserError: where scores are not finite: no order would be right.
    """
    scores = np.asarray(prediction["scores"], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise UserError("scores of detections are not finite numbers: the detector has diverged")
    found, true = np.asarray(prediction["labels"]), np.asarray(target["labels"])
    crowd, difficult = (
        np.asarray(target.get(name, np.zeros(len(true))), dtype=bool)
        for name in ("crowd", "difficult")
    )
    left_out = crowd | difficult
    iou = {"boxes": box_iou, "masks": mask_iou}[kind]
    orders, correct, ignored = [], [], []
    for label in np.unique(found):
        of_class = np.flatnonzero(found == label)
        order = of_class[np.argsort(-scores[of_class], kind="stable")][:MOST]
        objects = np.flatnonzero(true == label)
        objects = objects[np.argsort(left_out[objects], kind="stable")]  # those last
        overlaps = iou(
            np.asarray(prediction[kind])[order], np.asarray(target[kind])[objects], crowd[objects]
        )
        orders.append(order)
        for parts, part in zip((correct, ignored), match_class(overlaps, left_out[objects])):
            parts.append(part)
    none = np.zeros((len(IOU_THRESHOLDS), 0), dtype=bool)
    order = np.concatenate([np.zeros(0, dtype=int), *orders])
    matched = (np.concatenate([none, *parts], axis=1) for parts in (correct, ignored))
    return Matches(scores[order], found[order], *matched, true[~left_out])


def match_class(overlaps: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy matching: `Matches.correct` and `.ignored` of one class's (D, G) overlaps.

    Each detection in turn takes the free object that it overlaps most, of several alike the last.
    Only where there is none does it take what is left out, and many may take the same.

    Args:
        overlaps: of detections by falling score, and of objects with those left out last.
        left_out: (G,) bool.
    """
    correct, ignored = np.zeros((2, len(IOU_THRESHOLDS), len(overlaps)), dtype=bool)
    single = int((~left_out).sum())
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
    return correct, ignored


def average_precision(pictures: Sequence[Matches]) -> Score:
    """COCO's average precision over pictures, in whose order detections of equal score count."""
    labels, objects = (
        np.concatenate([np.zeros(0, dtype=int), *(getattr(picture, name) for picture in pictures)])
        for name in ("labels", "objects")
    )
    if not len(objects):
        return Score(math.nan, math.nan, {})
    scores = np.concatenate([picture.scores for picture in pictures])
    correct = np.concatenate([picture.correct for picture in pictures], axis=1)
    ignored = np.concatenate([picture.ignored for picture in pictures], axis=1)
    by_class = {}
    for label, count in zip(*np.unique(objects, return_counts=True)):
        of_class = np.flatnonzero(labels == label)
        order = of_class[np.argsort(-scores[of_class], kind="stable")]
        by_class[int(label)] = np.array(
            [
                mean_precision(right[~left_out], count)
                for right, left_out in zip(correct[:, order], ignored[:, order])
            ]
        )
    values = np.stack([*by_class.values()])  # (classes, T)
    return Score(float(values[:, 0].mean()), float(values.mean()), by_class)


def mean_precision(correct: np.ndarray, objects: int) -> float:
    """Mean over 101 recalls of the best precision at that recall or a higher one.

    Args:
        correct: (D,) bool of detections by falling score. objects: how many there are to find.
    """
    found = np.cumsum(correct)
    precision = found / np.arange(1, len(correct) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / objects, RECALLS)  # the first detection that reaches a recall
    return float(np.append(precision, 0.0)[at].mean())

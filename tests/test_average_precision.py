"""Average precision: cases worked out by hand, and results of pycocotools."""

import math

import numpy as np
import pytest
import torch

from lowdino.evaluate import average_precision, box_iou, match


def detections(*rows):
    """(score, label, box) each."""
    scores, labels, boxes = zip(*rows) if rows else ((), (), ())
    return {
        "scores": np.array(scores),
        "labels": np.array(labels, dtype=int),
        "boxes": np.array(boxes, dtype=float).reshape(-1, 4),
    }


def objects(*rows):
    """(label, box) or (label, box, crowd) each."""
    return {
        "labels": np.array([row[0] for row in rows], dtype=int),
        "boxes": np.array([row[1] for row in rows], dtype=float).reshape(-1, 4),
        "crowd": np.array([len(row) > 2 and row[2] for row in rows], dtype=bool),
    }


def score(*pictures):
    return average_precision([match(detected, true) for detected, true in pictures])


A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)


def test_by_hand():
    """The first and the third detection are right: precision 1 to recall 1/2, then 2/3."""
    detected = detections((0.9, 1, A), (0.8, 1, C), (0.7, 1, B))
    wanted = (51 * 1 + 50 * 2 / 3) / 101  # recalls 0, 0.01, ..., 0.5, and the 50 others
    got = score((detected, objects((1, A), (1, B))))
    assert got.ap50 == pytest.approx(wanted, abs=1e-12)
    assert got.ap == pytest.approx(wanted, abs=1e-12)


def test_what_is_never_found_counts_as_precision_0():
    got = score((detections((0.9, 1, A)), objects((1, A), (1, B))))
    assert got.ap50 == pytest.approx(51 / 101, abs=1e-12)


def test_thresholds_of_overlap():
    """A box of 10 x 7 in one of 10 x 10 has an IoU of 0.7: right at 0.5 to 0.7, 5 of 10."""
    got = score((detections((0.9, 1, (0, 0, 10, 7))), objects((1, A))))
    assert (got.ap50, got.ap) == (1, 0.5)
    np.testing.assert_array_equal(got.by_class[1], [1] * 5 + [0] * 5)
    # IoU 0.5 exactly is enough.
    assert score((detections((0.9, 1, (0, 0, 10, 5))), objects((1, A)))).ap50 == 1


def test_a_second_detection_of_an_object_is_wrong():
    detected = detections((0.9, 1, A), (0.8, 1, A), (0.7, 1, B))
    wanted = (51 + 50 * 2 / 3) / 101
    assert score((detected, objects((1, A), (1, B)))).ap50 == pytest.approx(wanted, abs=1e-12)


def test_the_mean_is_over_classes_that_have_objects():
    detected = detections((0.9, 1, A), (0.9, 7, B))  # nothing is of class 7
    got = score((detected, objects((1, A), (2, C))))
    assert got.ap50 == 0.5 and set(got.by_class) == {1, 2}


def test_detections_on_a_crowd_do_not_count():
    crowd = (20, 0, 60, 10)
    true = objects((1, A), (1, crowd, True))
    # Both lie in the crowd wholly, which by IoU they would not match.
    detected = detections((0.9, 1, B), (0.8, 1, C), (0.7, 1, A))
    assert score((detected, true)).ap50 == 1
    assert score((detected, objects((1, A)))).ap50 == pytest.approx(1 / 3)
    # An object is taken before a crowd that overlaps more.
    both = objects((1, (0, 0, 10, 6)), (1, A, True))
    assert score((detections((0.9, 1, A)), both)).ap50 == 1


def test_a_class_of_crowds_alone_has_no_ap():
    got = score((detections((0.9, 1, A)), objects((1, A, True))))
    assert math.isnan(got.ap) and got.by_class == {}


def test_no_pictures_and_empty_pictures():
    assert math.isnan(score().ap50)
    assert math.isnan(score((detections(), objects())).ap50)
    assert score((detections(), objects((1, A)))).ap == 0
    # A picture without objects can only give wrong detections.
    got = score((detections((0.9, 1, B)), objects()), (detections((0.8, 1, A)), objects((1, A))))
    assert got.ap50 == pytest.approx(0.5)


def test_only_a_hundred_detections_of_a_class_count():
    wrong = [(0.9 - i / 1000, 1, C) for i in range(100)]
    last = (0.1, 1, A)
    assert score((detections(*wrong, last), objects((1, A)))).ap50 == 0
    assert score((detections(*wrong[1:], last), objects((1, A)))).ap50 == pytest.approx(1 / 100)


def test_of_equal_scores_the_earlier_picture_comes_first():
    right, wrong = (
        (detections((0.5, 1, A)), objects((1, A))),
        (detections((0.5, 1, B)), objects()),
    )
    assert score(right, wrong).ap50 == 1
    assert score(wrong, right).ap50 == pytest.approx(0.5)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="scores of detections are not finite"):
        match(detections((math.nan, 1, A)), objects((1, A)))


def random_picture(rng, side=40, classes=4, most=9):
    """Objects of which some are crowds, and detections near some of them, scores often equal."""

    def boxes(count):
        corner, size = rng.randint(0, side - 12, (count, 2)), rng.randint(1, 13, (count, 2))
        return np.concatenate([corner, corner + size], axis=1).astype(float)

    count = rng.randint(0, most)
    true = objects(
        *zip(rng.randint(1, classes + 1, count), boxes(count), rng.random_sample(count) < 0.2)
    )
    detected = []
    for label, box in zip(true["labels"], true["boxes"]):
        for _ in range(rng.randint(0, 4)):
            near = box + rng.randint(-2, 3, 4)
            near[:2] = near[:2].clip(0)
            near[2:] = np.maximum(near[2:], near[:2] + 1).clip(max=side)
            detected.append((rng.randint(0, 6) / 5, label, near))
    for box in boxes(rng.randint(0, 4)):
        detected.append((rng.randint(0, 6) / 5, rng.randint(1, classes + 1), box))
    return detections(*detected), true


# By seed: AP of the four classes, and the mean AP50.
PYCOCOTOOLS = {
    0: ([0.044641, 0.018664, 0.045191, 0.049272], 0.148874),
    1: ([0.017462, 0.049302, 0.030053, 0.052753], 0.138737),
    2: ([0.073220, 0.013985, 0.013054, 0.032169], 0.129592),
    3: ([0.006197, 0.072856, 0.069579, 0.039734], 0.150680),
    4: ([0.016084, 0.042863, 0.088518, 0.037453], 0.167278),
}


@pytest.mark.parametrize("seed", PYCOCOTOOLS)
def test_equals_pycocotools(seed):
    """COCOeval of pycocotools 2.0.11 on the same 30 pictures, its `eval["precision"]` of areas
    "all" and 100 detections averaged over the 101 recalls, and for AP over the IoU thresholds.

    It was given the areas of the boxes, crowds by `iscrowd`, and detections in the order of the
    pictures. Unrounded, all agreed to 1e-12.
    """
    rng = np.random.RandomState(seed)  # whose numbers no version of NumPy will change
    pictures = [random_picture(rng) for _ in range(30)]
    got = score(*pictures)
    by_class, ap50 = PYCOCOTOOLS[seed]
    assert got.ap50 == pytest.approx(ap50, abs=1e-6)
    assert got.ap == pytest.approx(np.mean(by_class), abs=1e-6)
    assert sorted(got.by_class) == [1, 2, 3, 4]
    means = [got.by_class[label].mean() for label in (1, 2, 3, 4)]
    np.testing.assert_allclose(means, by_class, atol=1e-6)


def test_overlaps_by_hand():
    detected, true = [[0, 0, 4, 4]], [[0, 0, 2, 4], [2, 2, 6, 6], [8, 8, 9, 9]]
    no, all_crowd = np.zeros(3, dtype=bool), np.ones(3, dtype=bool)
    np.testing.assert_allclose(box_iou(detected, true, no), [[1 / 2, 4 / 28, 0]])
    np.testing.assert_allclose(box_iou(detected, true, all_crowd), [[1 / 2, 4 / 16, 0]])


def test_boxes_without_area_overlap_nothing():
    point, no = np.array([[3.0, 3, 3, 3]]), np.zeros(1, dtype=bool)
    assert box_iou(point, point, no) == 0


def test_takes_tensors():
    detected, true = detections((0.9, 1, A)), objects((1, A))
    tensors = [{k: torch.from_numpy(v) for k, v in part.items()} for part in (detected, true)]
    assert score(tensors).ap == 1

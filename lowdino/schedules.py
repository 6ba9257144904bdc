"""Schedules and random streams: functions of the step, so that a resumed run needs only its step.

`augment.derived_seed` makes a seed of a stream, --seed and what else decides: see `Stream`. Initial
weights follow from --seed alone.
"""

import math
from enum import IntEnum


class Stream(IntEnum):
    """The one table of random streams: what each draws, and the numbers that decide it."""

    ORDER = 0  # of the images in an epoch: seed, epoch
    VIEWS = 1  # of a training without labels: seed, step, rank
    LABELLED_VIEWS = 2  # of a training with labels: seed, step, rank
    DROP_PATH = 3  # stochastic depth: seed, step, rank
    REPLACEMENT = 4  # images in place of an unreadable one: its index
    HELD_OUT = 5  # test images of --test_fraction: seed, class
    PROPOSALS = 6  # anchors and proposals that a detector learns from: seed, step, rank
    KEY_ORDER = 7  # MoCo's keys in a batch: seed, step
    SAMPLE = 8  # images that a patch dictionary is fitted to: seed
    CROPS = 9  # of the score without labels: its seed


def cosine(
    step: int,
    total_steps: float,
    start: float,
    end: float,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """Linear warm-up from `warmup_start` to `start`, then half a cosine down (or up) towards `end`.

    The values are those of DINO's `cosine_scheduler`. The last warm-up step and the first step
    after it have `start`. The last step is one cosine step short of `end`. A warm-up of a single
    step has `warmup_start`.

    Args:
        step: from 0; from `total_steps` on the value is `end`.
        total_steps: infinity holds the value at `start`.
        warmup_steps: number of warm-up steps, which are part of `total_steps`.
    """
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / max(warmup_steps - 1, 1)
    if step >= total_steps:
        return end
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(step: int, steps: int, start: float, end: float) -> float:
    """A straight line from `start` at step 0 to `end` at step `steps`, then `end`."""
    return end if step >= steps else start + (end - start) * step / steps

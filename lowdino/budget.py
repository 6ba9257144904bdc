"""How fast a run is: the faster autocast of a CPU, and the steps that fit into --minutes.

A few steps are timed and taken back. The number of steps is such that training, evaluation and
saving end within the minutes; at every tenth of the time the plan is corrected, should the machine
have become slower or faster. k-NN is evaluated as often as a twentieth of the time allows, and at
the end; in a short run only then. The plan is kept in the checkpoint: a run that was stopped makes
the steps that are left of it, however long they take. --epochs is for a run that can be repeated,
and so is --amp bf16 or none: `auto` times both, says what it found, and a resumed run keeps it.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowdino import distributed, evaluate
from lowdino.features import compute_rank_features

# bf16 rounds to 8 bits. It has to be worth it.
LEAST_GAIN = 1.05

# Seconds of --minutes for what a run cannot time: to import torch, and to leave.
AROUND = 4.0

# Evaluations beside the loss take at most this share of --minutes.
EVALUATIONS = 1 / 20

# To foresee the time of an evaluation, its memory and its queries are tried for this share each.
SAMPLE = 1 / 200

# A plan is corrected where its end would be late or early by more than these shares of --minutes.
LATE, EARLY = 0.002, 0.02


@contextmanager
def put_back(parts: dict[str, object]):
    """Let modules and optimizers work, then give them the state that they had."""
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    yield
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            part.zero_grad(set_to_none=True)
        part.load_state_dict(before[name])


def seconds(
    work: Callable[[], object], device: torch.device, times: int = 2, enough: float = math.inf
) -> float:
    """Least time of some calls after a first that is not counted, of the slowest rank.

    Where the first takes longer than `enough`, it is the only one.
    """
    found = []
    for i in range(1 + times):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        found.append(time.perf_counter() - start)
        if i == 0 and max(distributed.gather_objects(found[0])) > enough:
            break
    return max(distributed.gather_objects(min(found[1:] or found)))


def faster_amp(args, step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Set the autocast type, bf16 or none, in which a step is faster; the seconds in each.

    Many CPUs have instructions for bf16, and in some of them it is slower all the same: that
    depends on the network and the views' size.

    Args:
        args: of which `amp` is set.
    """
    found, enough = {}, math.inf
    for args.amp in ("none", "bf16"):
        found[args.amp] = seconds(step, device, enough=enough)
        enough = 3 * found["none"]  # without instructions for it bf16 can take ten times as long
    args.amp = "bf16" if found["none"] > LEAST_GAIN * found["bf16"] else "none"
    return found


class Sample:
    """Lets the first batches of a loader pass, and tells how long all of them would take.

    The first batches, one of each process of the loader, tell how long it takes to start, the
    others how long an image does.

    Args:
        limit: seconds after the first batches. workers: processes of the loader.
    """

    def __init__(self, limit: float, workers: int = 0):
        self.limit, self.starting = limit, max(workers, 1)
        self.started = self.ended = 0.0
        self.first = self.images = 0  # images in the first batches, and in those after them

    def __call__(self, batches: Iterable) -> Iterator:
        start = time.perf_counter()
        for batch in batches:
            yield batch
            self.ended = time.perf_counter() - start
            if self.starting:
                self.starting -= 1
                self.first, self.started = self.first + len(batch[0]), self.ended
            else:
                self.images += len(batch[0])
            if self.ended - self.started > self.limit:
                break

    def seconds(self, images: float) -> float:
        """Time that so many images take."""
        each = (self.ended - self.started) / max(self.images, 1)
        return self.started + each * max(images - self.first, 0)


def seconds_of_evaluation(backbone: nn.Module, args, source, ranks) -> float:
    """What an evaluation by k-NN will take, by that of its first images."""
    total, kept = 0.0, []
    for images in (source.train, source.test):
        size, workers = args.global_crops_size, args.num_workers
        sample = Sample(SAMPLE * 60 * args.minutes, workers)
        own = compute_rank_features(backbone, images, size, ranks, workers=workers, through=sample)
        kept.append(evaluate.Features(*own, []))
        total += sample.seconds(len(images) / ranks.world)

    def knn() -> None:
        evaluate.knn_accuracy(*kept, args.nb_knn, source.classes)

    share = len(kept[0].labels) * len(kept[1].labels) / (len(source.train) * len(source.test))
    return total + seconds(knn, ranks.device) / share


class Budget:
    """How many steps fit into so many minutes.

    The first plan rests on a few steps that were timed. Later ones rest on the steps made since
    the plan before, with all that they waited for: a machine that others share changes its pace.

    Args:
        started: `time.perf_counter()` when the minutes began.
        every: steps from one evaluation to the next; None for as many as keep their share.
    """

    def __init__(self, minutes: float, started: float, every: int | None = None):
        self.seconds, self.evaluation = 60 * minutes, 0.0  # of one evaluation, 0 without labels
        self.report = 0.0  # seconds that the report at the end takes
        self.end = started + self.seconds - AROUND
        self.every = every
        self.mark: tuple[int, float] | None = None  # step and time of the last plan

    def evaluated(self, seconds: float) -> None:
        """An evaluation has taken so long, which belongs to no step."""
        self.evaluation = seconds
        self.leave_out(seconds)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Around the writing of a report, the last of which belongs to the minutes."""
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self.report = max(self.report, taken)  # one may leave the pictures as they are
        self.leave_out(taken)

    def leave_out(self, seconds: float) -> None:
        """Seconds that no step has taken."""
        if self.mark:
            self.mark = self.mark[0], self.mark[1] + seconds

    def plan(self, step: int, pace: float) -> tuple[int, int]:
        """The number of steps in all, and every how many of them k-NN is evaluated; 0: at the end.

        Args:
            pace: seconds a step.
        """
        now = time.perf_counter()
        self.mark = step, now
        left = self.end - now - 1.1 * (self.evaluation + self.report)
        every = self.every or round(self.evaluation / EVALUATIONS / pace)
        if not self.every and not 0 < self.evaluation / EVALUATIONS < left / 2:
            every = 0
        if every and step == 0:
            left -= self.evaluation
        steps = left / (pace + (self.evaluation / every if every else 0.0))
        return step + max(int(steps), 1), every

    def is_due(self) -> bool:
        """Whether a tenth of the minutes has passed since the last plan."""
        return time.perf_counter() - self.mark[1] > self.seconds / 10

    def correction(self, step: int, total: int) -> tuple[int, int] | None:
        """Another plan, where by that of `total` steps the end would be late, or much too early."""
        pace = (time.perf_counter() - self.mark[1]) / (step - self.mark[0])
        better = self.plan(step, pace)
        gained = (better[0] - total) * pace
        return None if -LATE < gained / self.seconds < EARLY else better

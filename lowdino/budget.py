"""The time of a run: the faster autocast type of a CPU, and the steps that fit into --minutes.

A few steps are timed and taken back. --minutes plans as many steps as end in time with evaluation
and saving; after every tenth of the time the plan is corrected, in case the speed has changed. k-NN
is evaluated as often as a twentieth of the time allows, and at the end; in a short run only then.
The plan is kept in the checkpoint: a run that was stopped makes the steps that are left of it,
however long they take. A run that can be repeated has --epochs, and --amp bf16 or none: `auto`
times both, and a resumed run keeps its choice.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowdino import distributed, evaluate, settings
from lowdino.features import compute_rank_features

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}
LEAST_GAIN = 1.05  # bf16 rounds to 8 bits, so it has to be worth it
UNTIMED = 4.0  # seconds of --minutes that cannot be timed: to import torch, and to leave
EVALUATION_SHARE = 1 / 20  # largest share of --minutes for evaluations along the way
SAMPLE = 1 / 200  # share of --minutes for trying each half of an evaluation
LATE, EARLY = 0.002, 0.02  # shares of --minutes by which a plan may be wrong


def amp_of(amp: str, device: torch.device, saved: dict | None = None) -> str:
    """Resolve --amp auto; on a CPU without a checkpoint it stays auto, to be timed."""
    if amp == "auto":
        # Before Ampere, compute capability 8.0, GPUs have tensor cores for fp16 alone.
        amp = "auto" if device.type == "cpu" else "none"
        if device.type == "cuda":
            amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        amp = saved["settings"].get("amp", amp) if saved else amp
    return amp


# -- Timing ----------------------------------------------------------------------------------------


@contextmanager
def put_back(parts: dict[str, object]):
    """Restore the states of modules and optimizers at the end."""
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
    taken = []
    for i in range(1 + times):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        taken.append(time.perf_counter() - start)
        if i == 0 and max(distributed.gather_objects(taken[0])) > enough:
            break
    return max(distributed.gather_objects(min(taken[1:] or taken)))


def time_steps(t, step: Callable[[], object]) -> float:
    """Seconds that a step of `engine.Training` takes; --amp auto becomes the faster of two types.

    Many CPUs have instructions for bf16, and on some of them it is slower all the same: that
    depends on the network and the views' size. The steps are taken back.
    """
    s, device, taken, enough = t.settings, t.ranks.device, {}, math.inf
    with put_back(t.states()):
        for amp in ("none", "bf16") if s.amp == "auto" else (s.amp,):
            t.settings = s.replace(amp=amp)
            taken[amp] = seconds(step, device, enough=enough)
            enough = 3 * taken[amp]  # without instructions for it bf16 can take ten times as long
    if s.amp == "auto":
        amp = "bf16" if taken["none"] > LEAST_GAIN * taken["bf16"] else "none"
        t.settings = s.replace(amp=amp)
        timed = "{none:.3g} s in float32, {bf16:.3g} s in bf16".format(**taken)
        t.log.say(f"--amp {amp}: a step takes {timed}")
    return taken[amp]


class Sample:
    """Lets batches of a loader pass for a while, and tells how long all of them would take.

    The first batch of each of its `workers` tells how long the loader takes to start, those of the
    next `limit` seconds how long an image takes.
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
        each = (self.ended - self.started) / max(self.images, 1)
        return self.started + each * max(images - self.first, 0)


def seconds_of_evaluation(backbone: nn.Module, s, source, ranks) -> float:
    """Time of an evaluation by k-NN, foreseen from its first images."""
    total, sampled = 0.0, []
    for images in (source.train, source.test):
        size, workers = s.global_crops_size, s.num_workers
        sample = Sample(SAMPLE * 60 * s.minutes, workers)
        rows = compute_rank_features(backbone, images, size, ranks, workers=workers, through=sample)
        sampled.append(evaluate.Features(*rows, []))
        total += sample.seconds(len(images) / ranks.world)

    def knn() -> None:
        evaluate.knn_accuracy(*sampled, s.nb_knn, source.classes)

    pairs = len(sampled[0].labels) * len(sampled[1].labels)
    return total + seconds(knn, ranks.device) * len(source.train) * len(source.test) / pairs


# -- The plan --------------------------------------------------------------------------------------


class Budget:
    """How many steps fit into --minutes, and how often to evaluate.

    The first plan rests on a few steps that were timed. Later ones rest on the steps made since
    the last plan, with all that they waited for: a machine that others share changes its pace.

    A run whose length is given has no `minutes` and never plans. They began at `started`, by
    `time.perf_counter()`. There are `every` steps between evaluations, or as many as fit.
    """

    def __init__(self, minutes: float | None, started: float, every: int | None = None):
        self.planning, self.seconds = minutes is not None, 60 * (minutes or 0)
        self.evaluation = self.report = 0.0  # seconds of one evaluation, and of the last report
        self.end = started + self.seconds - UNTIMED
        self.every = every
        self.mark: tuple[int, float] | None = None  # step and time of the last plan

    def evaluated(self, seconds: float) -> None:
        """Note how long an evaluation takes, and leave it out of the steps' time."""
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
        """Do not count these seconds as the time of steps."""
        if self.mark:
            self.mark = self.mark[0], self.mark[1] + seconds

    def plan(self, step: int, pace: float) -> tuple[int, int]:
        """The total number of steps at `pace` seconds each, and the steps between evaluations.

        0 steps between evaluations: only at the end.
        """
        now = time.perf_counter()
        self.mark = step, now
        left = self.end - now - 1.1 * (self.evaluation + self.report)
        every = self.every or round(self.evaluation / EVALUATION_SHARE / pace)
        if not self.every and not 0 < self.evaluation / EVALUATION_SHARE < left / 2:
            every = 0
        if every and step == 0:
            left -= self.evaluation
        steps = left / (pace + (self.evaluation / every if every else 0.0))
        return step + max(int(steps), 1), every

    def is_due(self) -> bool:
        """Whether a tenth of the minutes has passed since the last plan."""
        return self.planning and time.perf_counter() - self.mark[1] > self.seconds / 10

    def correction(self, step: int, total: int) -> tuple[int, int] | None:
        """Another plan, where `total` steps would end late, or much too early."""
        pace = (time.perf_counter() - self.mark[1]) / (step - self.mark[0])
        better = self.plan(step, pace)
        gained = (better[0] - total) * pace
        return None if -LATE < gained / self.seconds < EARLY else better

    def replan(self, t, progress) -> None:
        """Take a correction over, the first rank's on all ranks."""
        better = self.correction(progress.step, progress.total_steps)
        better = distributed.gather_objects(better)[0]
        if better is not None:
            adopt(t, progress, *better)


def adopt(t, progress, total_steps: int, knn_steps: int) -> None:
    """Make this the length of an `engine.Training`, and fit to it what counts in epochs."""
    epochs = total_steps / progress.epoch_steps
    progress.total_steps, progress.knn_steps = total_steps, knn_steps
    t.settings = settings.fit_epochs(t.settings, epochs)
    t.method.total_steps, t.method.args = total_steps, t.settings
    t.log.say(f"plan: {total_steps} step{'s' * (total_steps > 1)} ({epochs:.3g} epochs)")


def describe_length(s, progress) -> str:
    """The length of a run in words."""
    if s.epochs:
        return f"{s.epochs} epoch{'s' * (s.epochs != 1)}"
    return f"{progress.total_steps / progress.epoch_steps:.3g} epochs in {s.minutes:g} minutes"

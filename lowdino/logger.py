"""The log of a run: a table for people, JSONL for programs, its clock, and its bad images.

file in --output_dir                 content
backbone.pth                         the backbone that is kept, the teacher's in DINO: weights,
                                     arch, mean, std, image size, epoch
checkpoint.pth, checkpoint.prev.pth  all that is needed to resume, and the one before;
                                     checkpoint0020.pth and so on every --saveckp_freq epochs
log.jsonl                            the numbers of every log line, one JSON object per line
args.json                            all settings
bad_images.txt                       images that could not be read, and why
report.html                          the run on one page, which needs no other file
crops.png                            the views of the first images: look at it first
neighbours.png, maps.png             images and those nearest to them; the last feature map
attention.png                        where the heads of a ViT attend
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


class Log:
    """Prints lines and appends records to `folder/log.jsonl`, where it is `active`: on one rank.

    On a terminal `progress` keeps a bar below the last line.
    """

    BAR, EVERY = 30, 0.2  # columns of the bar, seconds from one to the next

    def __init__(self, folder: str | Path, active: bool = True):
        self.path = Path(folder) / "log.jsonl"
        self.active = active
        self.bar, self.drawn = "", -self.EVERY  # on the cursor's line; when it was drawn

    def say(self, *lines: str) -> None:
        if self.active and lines:
            self.show("")
            print(*lines, sep="\n", flush=True)

    def warn(self, text: str) -> None:
        self.say(f"{'!' * 80}\nWARNING: {text}\n{'!' * 80}")

    def progress(self, done: int, total: int, seconds_left: float) -> None:
        """Show how much is done and the time left."""
        now = time.perf_counter()
        if self.active and sys.stdout.isatty() and now - self.drawn >= self.EVERY:
            full = round(self.BAR * done / total)
            bar = "#" * full + "." * (self.BAR - full)
            self.show(f"[{bar}] {done / total:4.0%}  {duration(seconds_left)} left")
            self.drawn = now

    def show(self, bar: str) -> None:
        """Draw a bar over the last one; the cursor waits at the start of the line."""
        if bar or self.bar:
            blank = " " * (len(self.bar) - len(bar))
            print(f"{bar}{blank}", end="\r", flush=True)
            self.bar = bar

    def rewind(self, step: int) -> None:
        """Cut off the records of steps after `step`, and a last line that is not complete."""
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            kept = 0
            for line in file if step else ():
                try:
                    if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                        break
                except (ValueError, KeyError, TypeError):
                    break
                kept += len(line)
            file.truncate(kept)

    def find(self, key: str, step: int) -> float | None:
        """The value recorded as `key` at `step`, or None."""
        if not self.path.exists():
            return None
        records = (json.loads(line) for line in self.path.read_text().splitlines())
        return next((r[key] for r in records if r["step"] == step and key in r), None)

    def sync(self) -> None:
        """Make all records durable."""
        if self.active and self.path.exists():
            with open(self.path, "a") as file:
                os.fsync(file.fileno())

    def record(self, **values) -> None:
        if self.active:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")


class Table:
    """Rows of a training's numbers, at most WIDTH columns wide, below a header.

    The header is repeated every REPEAT rows. As many of the method's metrics are shown as fit, the
    TELLING ones first.
    """

    WIDTH, REPEAT = 120, 40
    TELLING = ("effective_rank", "embedding_rank", "loss_over_lnk", "entropy", "entropy_of_mean")
    GENERAL = ("lr", "weight_decay", "memory_mb", "loss", "images_per_s", "data_wait", "eta_s")

    rows = 0

    def lines(self, step: str, epoch: int, values: Mapping[str, float]) -> list[str]:
        """The row of a step such as "12/100", after the header where it is due.

        `values` has loss, lr, memory_mb, images_per_s, data_wait, eta_s and the method's metrics.
        """
        digits = len(step.partition("/")[2])
        widths = {"step": max(2 * digits + 1, 9), "epoch": 5, "loss": 8, "lr": 8}
        widths |= {"images/s": 8, "wait": 4, "memory": 7, "left": 9}
        room = self.WIDTH - sum(1 + width for width in widths.values()) + 1
        metrics = [name for name in values if name not in self.GENERAL]
        fits = {}
        for name in sorted(metrics, key=(*self.TELLING, *metrics).index):
            if (width := max(len(name), 7)) < room:
                fits[name], room = width, room - 1 - width
        widths |= {name: fits[name] for name in metrics if name in fits}
        memory = values["memory_mb"]
        cells = dict(values) | {
            "step": step,
            "epoch": str(epoch),
            "images/s": f"{values['images_per_s']:.0f}",
            "wait": f"{values['data_wait']:.0%}",
            "memory": f"{memory:.0f} MB" if memory < 1e4 else f"{memory / 1024:.0f} GB",
            "left": duration(values["eta_s"]),
        }
        rows = [" ".join(cell(cells[name], width) for name, width in widths.items())]
        if self.rows % self.REPEAT == 0:
            rows.insert(0, " ".join(f"{name:>{width}}" for name, width in widths.items()))
        self.rows += 1
        return rows


def cell(value: float | str, width: int) -> str:
    """A text, or a number with up to four digits, right-aligned in `width` columns."""
    if not isinstance(value, str):
        texts = (f"{float(value):.{digits}g}" for digits in (4, 3, 2, 1))
        value = next((text for text in texts if len(text) <= width), "")
    return f"{value:>{width}}"


class BadImages:
    """Images that could not be read, one line each with the reason, in `folder/bad_images.txt`.

    A ValueError where more than `max_fraction` of so many `images` are bad.
    """

    ENCODING = dict(encoding="utf-8", errors="surrogateescape")  # names of files are bytes

    def __init__(self, folder: str | Path, images: int, max_fraction: float, active: bool = True):
        self.path = Path(folder) / "bad_images.txt"
        self.images, self.max_fraction, self.active = images, max_fraction, active
        self.known: dict[str, None] = {}
        if self.path.exists():
            self.known = dict.fromkeys(self.path.read_text(**self.ENCODING).splitlines())
            self.check()

    def unknown(self, lines: Sequence[str]) -> list[str]:
        """The lines that the file does not have yet."""
        return [line for line in (" ".join(s.split()) for s in lines) if line not in self.known]

    def add(self, lines: Sequence[str]) -> None:
        news = self.unknown(dict.fromkeys(lines))
        self.known |= dict.fromkeys(news)
        if self.active:
            with open(self.path, "a", **self.ENCODING) as file:
                file.writelines(line + "\n" for line in news)
        self.check()

    def check(self) -> None:
        if len(self.known) > self.max_fraction * self.images:
            raise ValueError(
                f"{len(self.known)} of {self.images} images cannot be read, more than "
                f"--max_bad_fraction {self.max_fraction}; {self.path} lists them: repair them, "
                f"then delete it; the last: {list(self.known)[-1]}"
            )


class Clock:
    """Times a loop of steps: throughput, share of time spent waiting for data, time left.

    Call `waited()` when a batch has arrived, `stepped(images)` when its step is done, `read` at log
    steps and `restart()` after time that belongs to no step.
    """

    def __init__(self):
        self.stepping, self.steps = 0.0, 0
        self.restart()

    def restart(self) -> None:
        self.window = self.mark = time.perf_counter()
        self.waiting, self.images = 0.0, 0

    def waited(self) -> None:
        self.waiting += time.perf_counter() - self.mark

    def stepped(self, images: int) -> None:
        self.images += images
        self.steps += 1
        self.mark = time.perf_counter()

    def seconds_left(self, steps_left: int) -> float:
        stepping = self.stepping + time.perf_counter() - self.window
        return stepping / self.steps * steps_left

    def read(self, steps_left: int) -> dict[str, float]:
        """Images per second and share of waiting since the last reading, and seconds left."""
        span = time.perf_counter() - self.window
        values = {
            "images_per_s": self.images / span,
            "data_wait": self.waiting / span,
            "eta_s": self.seconds_left(steps_left),
        }
        self.stepping += span
        self.restart()
        return values


class Logger(Log):
    """The log of a training: table, records, clock, health, and mean losses between log lines.

    `loss_sum` is of the loss and its terms since the last log line, over `loss_steps` steps;
    `health` a `health.Health`.
    """

    def __init__(self, folder: str | Path, active: bool, device: torch.device | str = "cpu"):
        super().__init__(folder, active)
        self.table, self.clock, self.device, self.health = Table(), Clock(), device, None
        self.restore(torch.zeros(()), 0)

    def restore(self, loss_sum: Tensor, loss_steps: int) -> None:
        self.loss_sum, self.loss_steps = loss_sum.to(self.device), loss_steps

    def add(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Add a step's loss and its terms; the host does not wait for the device."""
        values = torch.stack([loss.detach(), *terms.values()]).float()
        self.restore(self.loss_sum + values, self.loss_steps + 1)

    def mean_losses(self, method) -> dict[str, float]:
        """Mean loss and terms since the last log line over all ranks, and the method's metrics."""
        means = self.loss_sum / self.loss_steps
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self.restore(torch.zeros_like(self.loss_sum), 0)
        losses = dict(zip(["loss", *method.terms], means.tolist()))
        if method.out_dim:
            losses["loss_over_lnk"] = losses["cross_entropy"] / math.log(method.out_dim)
        return losses | {k: v for k, v in method.metrics().items() if k not in losses}

    def step(self, progress, t) -> None:
        """Count a step; a log line after every --log_freq steps and at the end of an epoch.

        `progress` is an `engine.Progress`, `t` an `engine.Training`.
        """
        group, every = t.optimizer.param_groups[0], t.settings.log_freq
        self.clock.stepped(t.settings.batch_size_per_gpu * t.ranks.world)
        left = progress.total_steps - progress.step
        self.progress(progress.step, progress.total_steps, self.clock.seconds_left(left))
        if progress.skipped or (progress.step % every and not progress.epoch_ended):
            return
        metrics, speed = self.mean_losses(t.method), self.clock.read(left)
        values = metrics | {name: group[name] for name in ("lr", "weight_decay")}
        values["memory_mb"] = memory_mb(torch.device(self.device))
        epoch = (progress.step - 1) // progress.epoch_steps
        steps = f"{progress.step}/{progress.total_steps}"
        self.say(*self.table.lines(steps, epoch, values | speed))
        self.record(step=progress.step, epoch=epoch, **values, **speed)
        for text in self.health.read(progress.step, **metrics):
            self.say(f"health: {text}")


def memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, else resident in this process.

    On Windows, whose Python cannot tell the latter, it is 0.0: NaN would make the log invalid JSON.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # here, because Windows lacks it
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB


def machine(device: torch.device) -> str:
    """The machine that a run computes on, in words."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    name = f"{cpu}, {os.cpu_count()} cores, threads per process: {torch.get_num_threads()}"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{name}; {system}, torch {torch.__version__}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""What a run tells: log lines for people, JSONL for programs, the first views as a picture."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


class Log:
    """Prints lines and appends records to `folder/log.jsonl`.

    Args:
        active: False on ranks other than the first, where it does neither.
    """

    def __init__(self, folder: str | Path, active: bool = True):
        self.path = Path(folder) / "log.jsonl"
        self.active = active

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def rewind(self, step: int) -> None:
        """Cut off the records of steps after `step`, which will be made again.

        A last line that is not whole goes with them.
        """
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
        """What was recorded as `key` at `step`; None where nothing was."""
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


class BadImages:
    """Images that could not be read, each once, in `folder/bad_images.txt`.

    A line says which and why.

    Args:
        images: how many there are in all. max_fraction: how many of them may be bad.

    Raises:
        UserError: where the file names too many already.
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
        """Those of the lines that the file does not have yet."""
        return [line for line in (" ".join(s.split()) for s in lines) if line not in self.known]

    def add(self, lines: Sequence[str]) -> None:
        """Append what is new.

        Raises:
            UserError: where they are too many.
        """
        news = self.unknown(dict.fromkeys(lines))
        self.known |= dict.fromkeys(news)
        if self.active:
            with open(self.path, "a", **self.ENCODING) as file:
                file.writelines(line + "\n" for line in news)
        self.check()

    def check(self) -> None:
        if len(self.known) > self.max_fraction * self.images:
            raise UserError(
                f"{len(self.known)} of {self.images} images cannot be read, more than "
                f"--max_bad_fraction {self.max_fraction}; they are named in {self.path}, to be "
                f"deleted once they are mended; the last: {list(self.known)[-1]}"
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

    def read(self, steps_left: int) -> dict[str, float]:
        """Images a second and share of waiting since the last reading, and seconds left.

        The time left is that at the mean pace so far.
        """
        span = time.perf_counter() - self.window
        self.stepping += span
        values = {
            "images_per_s": self.images / span,
            "data_wait": self.waiting / span,
            "eta_s": self.stepping / self.steps * steps_left,
        }
        self.restart()
        return values


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


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def save_views(
    file: BinaryIO,
    views: list[Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    images: int = 8,
) -> None:
    """Write a PNG of the first images' views: a row an image, a column a view.

    Small views are framed in grey. `mean` and `std` are those that the views are normalised by.
    """
    side = max(view.shape[-1] for view in views)
    scale, shift = (torch.tensor(v).view(1, 3, 1, 1) for v in (std, mean))
    columns = []
    for view in views:
        view = view[:images].float().cpu() * scale + shift
        room = side - view.shape[-1]
        before = room // 2
        columns.append(F.pad(view, (before, room - before, before, room - before), value=0.5))
    save_image(
        torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1),
        file,
        format="png",
        nrow=len(views),
        pad_value=1.0,
    )

"""What a run tells: log lines for people, JSONL for programs, the first views as a picture."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image


class Log:
    """Prints lines and appends records to `folder/log.jsonl`; on ranks other than the first it does neither."""

    def __init__(self, folder: str | Path, active: bool = True):
        self.path = Path(folder) / "log.jsonl"
        self.active = active

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)

    def rewind(self, step: int) -> None:
        """Forget records of steps after `step`, which will be made again, and a last line that was cut off."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break
        self.path.write_text("".join(kept) if step else "")

    def record(self, **values) -> None:
        if self.active:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")


class Clock:
    """Times a loop of steps: throughput, the share of time spent waiting for data, the time that is left.

    Call `waited()` when a batch has arrived, `stepped(images)` when its step is done, `read` at log steps and
    `restart()` after time that belongs to no step.
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
        """Images a second and waiting share since the last reading, seconds left at the mean pace so far."""
        span = time.perf_counter() - self.window
        self.stepping += span
        values = {"images_per_s": self.images / span, "data_wait": self.waiting / span,
                  "eta_s": self.stepping / self.steps * steps_left}  # fmt: skip
        self.restart()
        return values


def memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB elsewhere


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def save_views(path: str | Path, views: list[Tensor], mean: tuple[float, ...], std: tuple[float, ...],
               images: int = 8) -> None:  # fmt: skip
    """Write a picture of the first images' views: a row an image, a column a view, small ones framed in grey."""
    side = max(view.shape[-1] for view in views)
    scale, shift = (torch.tensor(v).view(1, 3, 1, 1) for v in (std, mean))
    columns = []
    for view in views:
        view = view[:images].float().cpu() * scale + shift
        room = side - view.shape[-1]
        before = room // 2
        columns.append(F.pad(view, (before, room - before, before, room - before), value=0.5))
    save_image(torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1), path, nrow=len(views), pad_value=1.0)

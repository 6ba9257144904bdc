"""What a run tells: log lines for people, JSONL for programs, the first views as a picture, and whether it is well."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

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
        """Cut off the records of steps after `step`, which will be made again, and a last line that is not whole."""
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
    """Images that could not be read, each once, in `folder/bad_images.txt`: a line says which and why.

    Args:
        images: how many there are in all. max_fraction: how many of them may be bad.

    Raises:
        ValueError: where the file names too many already.
    """

    ENCODING = dict(encoding="utf-8", errors="surrogateescape")  # names of files are bytes

    def __init__(self, folder: str | Path, images: int, max_fraction: float, active: bool = True):
        self.path, self.images, self.max_fraction, self.active = (
            Path(folder) / "bad_images.txt",
            images,
            max_fraction,
            active,
        )
        self.known: dict[str, None] = {}
        if self.path.exists():
            self.known = dict.fromkeys(self.path.read_text(**self.ENCODING).splitlines())
            self.check()

    def unknown(self, said: Sequence[str]) -> list[str]:
        return [line for line in (" ".join(s.split()) for s in said) if line not in self.known]

    def add(self, said: Sequence[str]) -> None:
        """
        Raises:
            ValueError: where they are too many.
        """
        news = self.unknown(dict.fromkeys(said))
        self.known |= dict.fromkeys(news)
        if self.active:
            with open(self.path, "a", **self.ENCODING) as file:
                file.writelines(line + "\n" for line in news)
        self.check()

    def check(self) -> None:
        if len(self.known) > self.max_fraction * self.images:
            raise ValueError(
                f"{len(self.known)} of {self.images} images cannot be read, more than --max_bad_fraction {self.max_fraction}; "
                f"they are named in {self.path}, to be deleted once they are mended; the last: {list(self.known)[-1]}"
            )


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
        values = {
            "images_per_s": self.images / span,
            "data_wait": self.waiting / span,
            "eta_s": self.stepping / self.steps * steps_left,
        }
        self.restart()
        return values


def memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    )  # bytes on macOS, KiB elsewhere


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
    """Write a picture (PNG) of the first images' views: a row an image, a column a view, small ones framed in grey."""
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


@torch.no_grad()
def mean_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows of (n, K), in nats."""
    return torch.special.entr(probabilities).sum(dim=1).mean()


@torch.no_grad()
def spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """How far unit features (n, D) scatter about their mean, and over how many directions.

    Returns the root mean square distance from the mean, in [0, 1], and the effective rank (sum l)^2 / sum l^2 of their
    covariance's eigenvalues l (the participation ratio), from 1 to min(n - 1, D); 0 where all features are one.
    """
    z = F.normalize(features.float(), dim=1)
    z = z - z.mean(dim=0)
    gram = z @ z.T  # (n, n), of the covariance's non-zero eigenvalues
    total = gram.trace()
    return (total / len(z)).clamp_min(0).sqrt(), total**2 / gram.square().sum().clamp_min(1e-20)


class Health:
    """Judges without labels whether self-distillation is learning, and names the flag to change.

    A sign counts once it has held at every reading for `PATIENCE` steps, because a healthy run starts near some of them.
    The signs follow DINO (Caron et al., 2021, section 5.3 and figure 7): entropy and KL tell the collapses apart. All
    entropies are in nats, ln K being the entropy of the uniform answer over K prototypes.

    Args:
        out_dim: K; None for a method whose answers are no distributions, of which features and loss are judged alone.

    read(...): the sentences that are new at this step: a sign that has lasted, or one that is over.
    verdict(): one sentence on the state at the last reading.
    """

    PATIENCE = 200

    def __init__(self, out_dim: int | None):
        self.uniform = math.log(out_dim) if out_dim else math.inf
        self.since: dict[
            str, int
        ] = {}  # the step at which a sign was first seen, for those seen at the last reading
        self.told: dict[str, str] = {}

    def signs(
        self,
        loss: float,
        feature_std: float,
        effective_rank: float,
        entropy: float | None = None,
        entropy_of_mean: float | None = None,
        teacher_moved: bool = True,
        **others: float,
    ) -> dict[str, str]:
        """The signs of one reading, name and sentence; `others` say nothing of health."""
        if loss > 1.05 * self.uniform:  # whatever else is wrong follows from it
            return {
                "diverging loss": f"the loss {loss:.2f} is above that of a uniform answer, ln K = {self.uniform:.2f}: "
                "lower --lr, or lengthen --warmup_epochs"
            }
        signs = {}
        if not teacher_moved:
            signs["teacher stands still"] = (
                "its parameters are those of the reading before: lower --momentum_teacher, "
                "or raise --lr"
            )
        if feature_std < 0.01 or effective_rank < 1.5:
            signs["dead features"] = (
                f"the backbone's features are nearly a point or a line (std {feature_std:.4f}, "
                f"effective rank {effective_rank:.1f}): lower --lr, raise --infonce_weight where there is one, and look at "
                "crops.png, whether the pictures differ at all"
            )
        if entropy is None:
            return signs
        if entropy > 0.99 * self.uniform:
            signs["uniform collapse"] = (
                f"the teacher answers every image alike, all prototypes equally (entropy {entropy:.2f}, of the mean answer "
                f"{entropy_of_mean:.2f}, ln K {self.uniform:.2f}): raise --infonce_weight, or lower --teacher_temp"
            )
        elif (
            entropy_of_mean < 0.1 * self.uniform or entropy_of_mean - entropy < 0.01 * self.uniform
        ):
            signs["one-cluster collapse"] = (
                f"the teacher answers every image alike, with few prototypes (entropy {entropy:.2f}, of the mean answer "
                f"{entropy_of_mean:.2f}, ln K {self.uniform:.2f}): lower --center_momentum, raise --teacher_temp, or use "
                "--centering sinkhorn"
            )
        elif loss - entropy < 0.02 * self.uniform:
            signs["nothing left to learn"] = (
                f"the student already answers as the teacher (KL {loss - entropy:.3f}): raise --out_dim, widen "
                "--global_crops_scale, or add local views"
            )
        return signs

    def read(self, step: int, **values: float | bool) -> list[str]:
        signs = self.signs(**values)
        self.since = {name: self.since.get(name, step) for name in signs}
        lasting = {
            name: text for name, text in signs.items() if step - self.since[name] >= self.PATIENCE
        }
        news = [f"{name}: {text}" for name, text in lasting.items() if name not in self.told]
        news += [f"{name}: over" for name in self.told if name not in signs]
        self.told = {name: text for name, text in (self.told | lasting).items() if name in signs}
        return news

    def verdict(self) -> str:
        return (
            "; ".join(f"{name}: {text}" for name, text in self.told.items())
            or "no sign of collapse"
        )

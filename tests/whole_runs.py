"""train.py as a whole, stopped again and again for the bare passes that are its floor."""

import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from comparison import ROOT
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from lowdino import data, demo, distributed, recipes, settings  # noqa: E402
from lowdino.report import read_log  # noqa: E402

BLOCK = 5  # steps of train.py between two stops for as many bare passes


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def pictures(count: int, view: int) -> Tensor:
    """Demo images in the size for views of side `view`: (count, 3, side, side) uint8."""
    images, _ = demo.demo_images(range(count))
    side = view if view <= 64 else 2 * view
    options = dict(mode="bilinear", antialias=True)
    resized = nn.functional.interpolate(images.float(), (side, side), **options)
    return resized.round().to(torch.uint8)


class Repeated(data.ImageArray):
    """`count` images, which are always the same few: of the larger sizes so many would not fit."""

    def __init__(self, images: Tensor, count: int):
        super().__init__(images)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> data.Batch:
        return super().__getitems__([i % len(self.images) for i in indices])


class Interrupted:
    """A method whose training is stopped at every BLOCK-th step for as many bare passes."""

    def __init__(self, *args, **steps):
        super().__init__(*args, **steps)
        self.blocks: list[list[float]] = []  # seconds of bare passes, and of the steps behind them

    def forward(self, views, batch=None, step=0):
        if step % BLOCK == 0:
            device = views[0].device
            if step:
                self.blocks[-1].append(
                    time.perf_counter() - self.began + seconds(device, lambda: None)
                )
            passes = functools.partial(self.bare_passes, views)
            self.blocks.append([seconds(device, passes)])
            self.began = time.perf_counter()
        return super().forward(views, batch, step)

    def bare_passes(self, views: list[Tensor]) -> None:
        """Those of the student over all views and, where there is one, of the teacher over two."""
        for _ in range(BLOCK):
            if hasattr(self, "teacher"):
                with torch.no_grad():
                    self.teacher(views[:2])
            loss = sum(out.float().mean() for out in tensors(self.student(views)))
            self.zero_grad(set_to_none=True)
            with torch.autocast(views[0].device.type, enabled=False):
                loss.backward()


def tensors(outputs) -> list[Tensor]:
    """All that a network gives, in tuples and dicts."""
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return sum(map(tensors, parts), [])


def training_flags(
    arch: str,
    size: int,
    batch: int,
    folder: Path,
    device: torch.device,
    ranks: int = 1,
    epochs: int = 1,
    preset: str = "small",
    amp: str | None = None,
) -> list[str]:
    """Flags for train.py; the ranks share the batch."""
    flags = (
        f"--preset {preset} --arch {arch} --global_crops_size {size} --epochs {epochs} "
        f"--batch_size_per_gpu {batch // ranks} --warmup_epochs 0 --knn_freq 0 --saveckp_freq 0 "
        f"--device {device.type} --amp {amp or ('bf16' if device.type == 'cuda' else 'none')}"
    )
    return [*flags.split(), "--output_dir", str(folder)]


def logged(folder: Path) -> list[dict]:
    """What a training logged of its steps."""
    return [record for record in read_log(folder / "log.jsonl") if "images_per_s" in record]


def measure_train(flags: list[str], steps: int) -> dict:
    """Images/s of train.py's own loop, and of the bare passes that it is stopped for between blocks
    of steps: one machine for both.

    With the share of time that it waits for data, and its peak memory; to be called in a process of
    its own, with flags of `training_flags`, for an epoch of so many steps.
    """
    s, opened = settings.resolve(train.get_parser(), flags), settings.open_training_images
    batch = s.batch_size_per_gpu
    method = type("Stopped", (Interrupted, recipes.METHODS[s.method]), {})

    def repeated(s: settings.Settings, ranks: distributed.Ranks):
        source, s = opened(s, ranks)
        images = Repeated(pictures(4 * batch, s.global_crops_size), steps * batch)
        return replace(source, pretrain=images), s

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        patch.object(settings, "open_training_images", repeated),
        patch.object(train, "METHODS", {s.method: method}),
    ):
        blocks = train.run(s, distributed.start(s.device)).blocks
    records = logged(Path(s.output_dir))
    # A block of steps lies between two of bare passes. The first is a warm-up, the last has no end.
    pairs = [
        ((bare + bare_after) / 2, trained)
        for (bare, trained), (bare_after, *_) in zip(blocks[1:], blocks[2:])
    ]
    bare, trained = (statistics.median(times) for times in zip(*pairs))
    return {
        "floor_images_per_s": BLOCK * batch / bare,
        "train_images_per_s": BLOCK * batch / trained,
        "train_over_floor": statistics.median(bare / trained for bare, trained in pairs),
        "data_wait": statistics.median(record["data_wait"] for record in records),
        "memory_mb": records[-1]["memory_mb"],
    }

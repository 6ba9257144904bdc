"""Frozen networks: opened by name or file, and their features of a set of images over all ranks."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset

import lowdino
from lowdino import augment, checkpoint, data, distributed, evaluate
from lowdino.distributed import UserError, user_errors


def open_network(name: str, seed: int = 0) -> tuple[str, nn.Module]:
    """A network by name, in words and as a module.

    Args:
        name: "pixels"; an architecture, for its random initialisation; a file that
            `lowdino.load_backbone` takes; or ARCH=FILE, for a plain state dict of a ConvNet.
        seed: of a random initialisation.

    Raises:
        UserError: where there is no such file or architecture.
    """
    if name == "pixels":
        return "raw pixels", nn.Sequential(Shrink(), nn.Flatten())
    arch, equals, weights = name.partition("=")
    torch.manual_seed(seed)
    if arch in lowdino.ARCHS and not equals:
        return f"{arch} at random initialisation, seed {seed}", lowdino.build_backbone(arch)
    if arch not in lowdino.ARCHS:
        if not os.path.exists(name):
            known = ", ".join(lowdino.ARCHS)
            raise UserError(f"no file {name}, and no such architecture; there are {known}")
        arch, weights = None, name
    backbone = lowdino.load_backbone(weights, arch)
    epoch = f", epoch {backbone.epoch}" if hasattr(backbone, "epoch") else ""
    return f"{backbone.arch} of {weights}{epoch}", backbone


class Shrink(nn.Module):
    """Images of more than 32 x 32 pixels to 32 x 32, by the mean of areas.

    More pixels tell no more, and a probe's cost grows with the square of their number.
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 32) if x.shape[-1] > 32 else x


class Pooled(nn.Module):
    """A backbone with other pooling: mean or maximum of the last map, or beside the default."""

    def __init__(self, backbone: nn.Module, pool: str):
        super().__init__()
        self.backbone, self.pool = backbone, pool

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.forward_features(x).flatten(2)  # (B, C, h * w)
        features = features.amax(dim=2) if self.pool.endswith("max") else features.mean(dim=2)
        if self.pool.startswith("default+"):
            features = torch.cat([self.backbone(x), features], dim=1)
        return features  # (B, C) or (B, D + C)


def pooled(backbone: nn.Module, pool: str) -> nn.Module:
    return backbone if pool == "default" else Pooled(backbone, pool)


def normalisation(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std by channel that a network's inputs need; ImageNet's where it says none."""
    mean = getattr(network, "mean", augment.IMAGENET_MEAN)
    return mean, getattr(network, "std", augment.IMAGENET_STD)


def check_finite(found: Tensor, what: str) -> None:
    """Refuse what a network gives, named by `what`, where some of it is not finite."""
    if not found.isfinite().all():
        raise UserError(
            f"the network gives {what} that are not finite numbers: its weights are damaged, or "
            "diverged"
        )


def compute_own_features(
    backbone: nn.Module,
    images: data.ImageArray | data.ImageFiles,
    size: int,
    ranks: distributed.Ranks,
    batch_size: int = 256,
    workers: int = 0,
    pool: str = "default",
    through: Callable[[Iterable], Iterable] = iter,
) -> tuple[Tensor, Tensor]:
    """Features and labels of this rank's share of the images, as `features` has those of all.

    Args:
        through: what the batches pass through on their way.
    """
    mean, std = normalisation(backbone)

    def view(canvas: Tensor, sizes: Tensor) -> Tensor:
        x = augment.central_view(canvas, sizes, size, mean, std)
        return x.contiguous(memory_format=torch.channels_last)

    batches = data.evaluation_loader(images, batch_size, workers, ranks.rank, ranks.world)
    network = pooled(backbone, pool)
    return evaluate.extract_features(network, through(batches), view, ranks.device)


def compute_features(
    backbone: nn.Module,
    images: data.ImageArray | data.ImageFiles,
    size: int,
    ranks: distributed.Ranks,
    batch_size: int = 256,
    workers: int = 0,
    pool: str = "default",
) -> evaluate.Features:
    """Features of the central view of all images, on every rank, each having done its share.

    Returns:
        float32 features (N, D), labels (N,) and names of files.

    Raises:
        UserError: where some are not finite.
    """
    own = compute_own_features(backbone, images, size, ranks, batch_size, workers, pool)
    names = getattr(images, "paths", None) or [str(i) for i in range(len(images))]
    rows = (distributed.gather_strided(part, len(images)) for part in own)
    found = evaluate.Features(*rows, names)
    check_finite(found.features, "features")
    return found


# --------------------------------------------------------------------------------------------------
# Features of whole images, kept in a file
# --------------------------------------------------------------------------------------------------


CHUNK = 8192  # images whose features are computed, checked or written at once


def features_of_images(
    teacher,
    images: data.ImageArray | data.ImageFiles,
    indices: range,
    workers: int,
    ranks: distributed.Ranks,
) -> evaluate.Features:
    """Features of whole images, read at twice the teacher's side whatever the views need."""
    files = isinstance(images, data.ImageFiles)
    if files:
        images.max_side, before = 2 * teacher.size, images.max_side
    part = Subset(images, indices)
    found = compute_features(teacher.backbone, part, teacher.size, ranks, workers=workers)
    if files:
        images.max_side = before
    return found


def cached_features(
    teacher,
    images: data.ImageArray | data.ImageFiles,
    path: Path,
    workers: int,
    ranks: distributed.Ranks,
) -> np.ndarray:
    """The teacher's features of the whole images: (N, D) float16, in a memory-mapped file.

    The file is made where it is missing. Beside it, PATH.json says which weights and images it
    belongs to and how many rows are done, so that a stopped run goes on.

    Raises:
        UserError: where the file cannot be written, is damaged, belongs to other weights or images,
            or a feature does not fit float16.
    """
    notes = Path(f"{path}.json")
    weights = teacher.fingerprint.split("-")[0]  # the backbone's: heads change no feature
    own = {"teacher": weights, "images": images.fingerprint(), "size": teacher.size}
    done = rows_in_cache(path, notes, own, len(images))
    if done:
        compare_first_rows(teacher, images, path, workers, ranks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if done < len(images) and not os.access(path.parent, os.W_OK):
            raise OSError(0, "it cannot be written to")
    except OSError as error:
        raise UserError(
            f"--cache_teacher {path}: folder {path.parent}: {error.strerror}"
        ) from error
    if dist.is_initialized():
        dist.barrier()  # all have read what the first rank is going to change
    # The file outlives this run: no other image may stand in for one that cannot be read.
    replaced, images.replace_bad = images.replace_bad, False
    fill_cache(teacher, images, path, own, done, workers, ranks)
    images.replace_bad = replaced
    if dist.is_initialized():
        dist.barrier()
    return np.load(path, mmap_mode="r")


def rows_in_cache(path: Path, notes: Path, own: dict, total: int) -> int:
    """How many rows of a cache are done, which must be one of the same teacher and images."""
    if not notes.exists():
        if path.exists():
            raise UserError(
                f"--cache_teacher {path} exists without {notes.name}, which would say whose it is: "
                "give another file"
            )
        return 0
    try:
        theirs = json.loads(notes.read_text())
        known = (("teacher", "weights"), ("images", "images"), ("size", "sizes"))
        others = [(what, theirs[key], own[key]) for key, what in known if theirs[key] != own[key]]
        done = 0 if others else check_rows(path, theirs["done"], total)
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise UserError(f"--cache_teacher {path} is damaged: delete it and {notes.name}") from error
    if others:
        what, theirs, ours = others[0]
        raise UserError(
            f"--cache_teacher {path} belongs to other {what} ({theirs}, not {ours}): give another "
            f"file, or delete it and {notes.name}"
        )
    return done


def check_rows(path: Path, done: int, total: int) -> int:
    """`done`, where that many rows of a cache are there.

    Raises:
        ValueError, TypeError, OSError: where they are not.
    """
    if type(done) is not int or not 0 <= done <= total:
        raise ValueError(f"{done} of {total} rows")
    if done:
        stored = np.load(path, mmap_mode="r")
        fits = stored.ndim == 2 and len(stored) == total and stored.dtype == np.float16
        if not fits or not np.isfinite(stored[:done]).all():
            raise ValueError(f"{stored.shape} {stored.dtype}")
    return done


def compare_first_rows(teacher, images, path: Path, workers: int, ranks) -> None:
    """Refuse a cache whose first features are not those that the teacher gives now."""
    few = range(min(len(images), max(8, ranks.world)))
    first = features_of_images(teacher, images, few, workers, ranks).features.cpu()
    stored = np.load(path, mmap_mode="r")[: len(first)]
    near = 0.02 * first.std().item()
    if stored.shape != first.shape or not np.allclose(stored, first, rtol=0.02, atol=near):
        raise UserError(
            f"--cache_teacher {path} holds other features of the first images than this teacher "
            "gives: they, or how it sees them, have changed; give another file, or delete it and "
            f"{path.name}.json"
        )


def fill_cache(teacher, images, path: Path, own: dict, done: int, workers: int, ranks) -> None:
    """Compute the rows that are missing, CHUNK at a time; the first rank writes them."""

    def note(rows: int) -> None:
        with user_errors(), checkpoint.atomic(f"{path}.json") as file:
            file.write(json.dumps(own | {"done": rows}).encode())

    total = len(images)
    while done < total:
        # The last chunk takes in what would leave a rank without an image.
        stop = done + CHUNK if total - done - CHUNK >= ranks.world else total
        rows = features_of_images(teacher, images, range(done, stop), workers, ranks)
        rows = rows.features.half()
        if not rows.isfinite().all():
            raise UserError(
                f"features of {teacher.name} exceed float16's range, 65,504: --cache_teacher "
                "cannot hold them"
            )
        if ranks.first:
            if done == 0:
                note(0)
            mode, shape = "r+" if done else "w+", (total, rows.shape[1])
            file = np.lib.format.open_memmap(path, mode, np.float16, shape)
            file[done:stop] = rows.cpu().numpy()
            file.flush()
            note(stop)
            print(f"teacher: features of {stop} of {total} images in {path}", flush=True)
        done = stop

"""Files that survive: atomic writes, safe reads, and the clean backbone file.

A checkpoint holds tensors and plain Python types only and is read with `weights_only=True`, so that opening one never
runs code from it.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

# What files may hold that a backbone has not: the classifiers of torchvision and timm, DINOv2's mask token.
LEFT_OUT = ("fc.", "classifier.", "head.fc.", "mask_token")


@contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` once the block ends well: `path` is, at every moment, complete or absent.

    tmp -> flush -> fsync -> rename -> fsync(folder): a rename is atomic, but only what was flushed to the disk before it
    survives a power cut, and the rename itself is kept by the folder.

    Raises:
        OSError: where the disk is full or the folder cannot be written to; an earlier `path` is then as it was.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException as error:
        tmp.unlink(missing_ok=True)
        # torch.save hides a full disk behind an error of its own, and an error in writing does not know the file.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def save_atomic(path: str | Path, content: Any) -> None:
    """torch.save by `atomic`."""
    with atomic(path) as file:
        torch.save(content, file)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: str | Path, content: dict) -> None:
    """Write `folder/checkpoint.pth`; the one before becomes `checkpoint.prev.pth`."""
    new, latest, previous = checkpoint_paths(folder)
    save_atomic(new, content)
    if latest.exists():
        os.replace(latest, previous)
    os.replace(new, latest)
    sync_folder(latest.parent)


def checkpoint_paths(folder: str | Path) -> list[Path]:
    """The three names of a checkpoint, newest first; the first is complete where it is there, between two renames."""
    return [Path(folder) / f"checkpoint{which}.pth" for which in (".new", "", ".prev")]


def load_checkpoint(folder: str | Path, warn: Callable[[str], None] = print) -> dict | None:
    """The latest whole checkpoint in `folder`, on the CPU, or None where there is none.

    Args:
        warn: told, in one sentence, of a newer one that is damaged.

    Raises:
        ValueError: where all of them are damaged.
    """
    damaged = []
    for path in (path for path in checkpoint_paths(folder) if path.exists()):
        try:
            content = load(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warn(f"{'; '.join(damaged)}: going back to {path}")
        return content
    if damaged:
        raise ValueError("; ".join(damaged))
    return None


def load(path: str | Path) -> dict:
    """Read a file of tensors and plain types, on the CPU, without running any code from it.

    torch.save writes a zip file with a CRC-32 of each record, which torch.load does not look at; here it is.

    Raises:
        ValueError: where the file is missing, damaged or holds anything else.
    """
    try:
        if zipfile.is_zipfile(path):  # else of torch before 1.6, as are some of the authors' files
            with zipfile.ZipFile(path) as records:
                if (bad := records.testzip()) is not None:
                    raise ValueError(f"checksum of {bad}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"no file {path or repr(path)}") from error
    except Exception as error:  # a damaged file makes the unpickler fail in any way there is
        raise ValueError(
            f"cannot read {path}: it is damaged, or not a file of plain tensors"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, where a dict of weights was expected"
        )
    return content


def save_backbone(
    path: str | Path,
    backbone: nn.Module,
    arch: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int,
    epoch: int,
    **more: Any,
) -> None:
    """Write the backbone alone, with clean names and all that is needed to use it, and what else the caller names."""
    weights = {name: value.cpu().contiguous() for name, value in backbone.state_dict().items()}
    save_atomic(
        path,
        {
            "arch": arch,
            "embed_dim": backbone.embed_dim,
            "mean": list(mean),
            "std": list(std),
            "image_size": image_size,
            "epoch": epoch,
            "state_dict": weights,
            **more,
        },
    )


def weights_of(content: dict, source: str) -> dict[str, Tensor]:
    """The state dict that a file's content is or holds.

    Raises:
        ValueError: where it is a checkpoint of a training, or no state dict.
    """
    if "settings" in content:
        raise ValueError(f"{source} is a training checkpoint; give the backbone.pth beside it")
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not all(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in weights.items()
    ):
        raise ValueError(f"{source} holds no state dict, names with a tensor each")
    return weights


def load_backbone_weights(backbone: nn.Module, content: dict, source: str) -> None:
    """Load a backbone file's content, ours or a plain state dict such as timm's, into `backbone`, strictly.

    A classifier or mask token in the file is left out by its name; everything else must fit.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    own = backbone.state_dict()
    weights = {
        k: v
        for k, v in weights_of(content, source).items()
        if k in own or not k.startswith(LEFT_OUT)
    }
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    problems = [
        f"{len(names)} {what} (first {names[0]})"
        for names, what in (
            (missing, "missing"),
            (extra, "unexpected"),
            (sorted(shapes), "of another shape"),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit this architecture: parameters {', '.join(problems)}"
        )
    backbone.load_state_dict(weights, strict=True)

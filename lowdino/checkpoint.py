"""Files that survive: atomic writes, safe reads, and the clean backbone file.

A checkpoint holds tensors and plain types. Read with `weights_only=True`, it never runs code.
"""

import argparse
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

# Left out where a backbone lacks them: classifiers of torchvision and timm, DINOv2's mask token.
LEFT_OUT = ("fc.", "classifier.", "head.fc.", "mask_token")

# Put before all names by DistributedDataParallel, by a wrapper around backbone and head, by both.
PREFIXES = ("module.backbone.", "module.", "backbone.")


@contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` once the block ends without an error.

    `path` is complete or absent at every moment: tmp, flush, fsync, rename, fsync of the folder.
    Only flushed data survive a power cut, and a rename only once its folder is flushed.
    A ValueError says that the disk is full or the folder read-only; an earlier `path` stays.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            tmp.unlink()
        # torch.save hides a full disk in the context of a RuntimeError.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError):
            raise ValueError(f"{path}: {reason.strerror or reason}") from error
        raise


def save_atomic(path: str | Path, content: Any) -> None:
    """Write `content` by torch.save and `atomic`."""
    with atomic(path) as file:
        torch.save(content, file)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, but not on Windows, which cannot open folders."""
    if os.name == "nt":
        return
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
    """The three names of a checkpoint, newest first; the first exists only between two renames."""
    return [Path(folder) / f"checkpoint{which}.pth" for which in (".new", "", ".prev")]


def load_checkpoint(folder: str | Path, warn: Callable[[str], None] = print) -> dict | None:
    """The latest intact checkpoint in `folder`, on the CPU, or None where there is no file.

    `warn` is called with one sentence on newer, damaged ones; a ValueError where all are damaged.
    """
    damaged = []
    for path in filter(Path.exists, checkpoint_paths(folder)):
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


@contextmanager
def namespaces_allowed() -> Iterator[None]:
    """Let torch.load read argparse.Namespace, in which DINO, DeiT and torchvision keep flags."""
    allowed = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def load(path: str | Path) -> dict:
    """Read a file of tensors and plain types, on the CPU, without running any code from it.

    The CRC-32 of each record is checked, which torch.load does not. A ValueError says that the file
    is missing, damaged or holds anything else.
    """
    try:
        if zipfile.is_zipfile(path):  # files of torch before 1.6, such as some of DINO's, are not
            with zipfile.ZipFile(path) as records:
                if (bad := records.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {bad}")
        with namespaces_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"no file {path or repr(path)}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # on a damaged file the unpickler raises any kind of exception
        reason = "it is damaged, or not a file of plain tensors"
        raise ValueError(f"cannot read {path}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def save_backbone(
    path: str | Path, backbone: nn.Module, arch: str, image_size: int, epoch: int, **more: Any
) -> None:
    """Write the backbone alone, with clean names and all that is needed to use it, and `more`.

    `image_size` is the side in pixels of the images that it was trained on.
    """
    weights = {name: value.cpu().contiguous() for name, value in backbone.state_dict().items()}
    content = {"arch": arch, "embed_dim": backbone.embed_dim}
    content |= {"mean": list(backbone.mean), "std": list(backbone.std)}
    content |= {"image_size": image_size, "epoch": epoch, "state_dict": weights}
    if getattr(backbone, "value_range", None):
        content["value_range"] = list(backbone.value_range)
    save_atomic(path, content | more)


def weights_of(content: dict, source: str) -> dict[str, Tensor]:
    """The state dict of a backbone, with clean names, in the content of the file `source`.

    The content is a state dict, plain or under `state_dict` or `model`, or a training checkpoint of
    DINO's official code, whose teacher's backbone is taken. A prefix of `PREFIXES` is removed where
    all names have it. Anything else, such as our training checkpoint, is a ValueError.
    """
    if "settings" in content:
        raise ValueError(f"{source} is a training checkpoint; give the backbone.pth beside it")
    holder = next((key for key in ("teacher", "state_dict", "model") if key in content), None)
    weights = content[holder] if holder else content
    if not isinstance(weights, dict) or not all(
        isinstance(v, Tensor) and isinstance(k, str) for k, v in weights.items()
    ):
        raise ValueError(f"{source} holds no state dict, names with a tensor each")
    if holder == "teacher":  # which has a projection head too
        backbones = "backbone.", "module.backbone."
        weights = {name: value for name, value in weights.items() if name.startswith(backbones)}
        if not weights:
            raise ValueError(f"{source} holds a teacher without a backbone")
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def load_backbone_weights(backbone: nn.Module, content: dict, source: str) -> None:
    """Load a file's content, as `weights_of` reads it, into `backbone`, strictly.

    All but a classifier or mask token must fit; else a ValueError names the parameters.
    """
    expected, weights = backbone.state_dict(), weights_of(content, source)
    weights = {k: v for k, v in weights.items() if k in expected or not k.startswith(LEFT_OUT)}
    common = expected.keys() & weights.keys()
    misfits = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "of another shape": {k for k in common if expected[k].shape != weights[k].shape},
    }
    problems = [f"{len(k)} {what} (first {min(k)})" for what, k in misfits.items() if k]
    if problems:
        parameters = ", ".join(problems)
        raise ValueError(f"{source} does not fit this architecture: parameters {parameters}")
    backbone.load_state_dict(weights, strict=True)

"""Which files below a folder are images, and what else is there."""

import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

# Pillow only tells what these are, or runs another program to read them.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# What systems put beside files; names that begin with a dot are left out too.
SYSTEM_FOLDERS = {"$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"}

# A training's folder holds the first and one of the others. Its pictures are no data.
RUN_SETTINGS = "args.json"
RUN_FILES = ("checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "log.jsonl", "crops.png")
RUN_PICTURES = ("crops.png", "neighbours.png", "maps.png", "attention.png")


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


@functools.cache
def suffixes() -> set[str]:
    """Of image files, in lower case: .npy, and all that Pillow reads."""
    known = Image.registered_extensions().items()
    return {".npy"} | {s for s, kind in known if kind in Image.OPEN and kind not in NOT_READ}


def find_images(folder: Path, left_out: Counter | None = None) -> list[str]:
    """All images below a folder, sorted; a UserError where there are none.

    Links are followed, but each folder is read once.

    Args:
        left_out: counts what is no image, see `read_folder`.
    """
    left_out = Counter() if left_out is None else left_out
    paths = sorted(walk(str(folder), left_out, set()))
    if not paths:
        said = f"; left out: {counted(left_out)}" if left_out else ""
        raise UserError(
            f"no images under {folder}; looked for {' '.join(IMG_EXTENSIONS)} .npy and what else "
            f"Pillow reads{said}"
        )
    return paths


def walk(folder: str, left_out: Counter, seen: set[str]) -> Iterator[str]:
    """The images of a folder and of those below it that are not in `seen`."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    # What is in the folder of a training is no data, unless it was asked for by name.
    if seen and is_run(folder):
        left_out["written by a run"] += 1
        return
    seen.add(real)
    images, folders = read_folder(folder, left_out)
    yield from images
    for inside in folders:
        yield from walk(inside, left_out, seen)


def read_folder(folder: str, left_out: Counter) -> tuple[list[str], list[str]]:
    """The images and the folders in a folder, sorted.

    Args:
        left_out: counts other files by suffix, names that begin with a dot, links to nothing, and
            what a training wrote.
    """
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}") from error
    names, of_run = {entry.name for entry in entries}, is_run(folder)
    images, folders = [], []
    for entry in entries:
        name, link = entry.name, entry.is_symlink()
        suffix = os.path.splitext(name)[1].lower()
        if name.startswith("."):
            left_out["hidden"] += 1
        elif os.path.isdir(entry.path) if link else entry.is_dir():  # which a loop of links raises
            folders += [entry.path] * (name not in SYSTEM_FOLDERS)
        elif suffix not in suffixes():
            left_out[suffix or "without suffix"] += 1
        elif of_run and name in RUN_PICTURES or suffix == ".npy" and f"{name}.json" in names:
            left_out["written by a run"] += 1  # the latter is a teacher's cache
        elif not (os.path.isfile(entry.path) if link else entry.is_file()):
            left_out["links to nothing" if link else "special files"] += 1
        else:
            images.append(entry.path)
    return images, folders


def is_run(folder: str | Path) -> bool:
    """Whether a training wrote its files into a folder."""
    files = (os.path.exists(os.path.join(folder, name)) for name in RUN_FILES)
    return os.path.exists(os.path.join(folder, RUN_SETTINGS)) and any(files)


def counted(left_out: Counter, most: int = 8) -> str:
    """What was left out, in words: the kinds of which there are most, and how many others."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in kinds[most:])
    return ", ".join(
        [f"{count} {kind}" for kind, count in kinds[:most]] + [f"{others} others"] * bool(others)
    )


def sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder that may have images of their own."""
    return [Path(path) for path in read_folder(str(folder), Counter())[1] if not is_run(path)]


def has_images(folder: Path) -> bool:
    """Whether there are images below a folder, or it cannot be read."""
    try:
        return any(walk(str(folder), Counter(), set()))
    except UserError:
        return True

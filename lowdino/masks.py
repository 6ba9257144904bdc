"""Pictures whose every pixel has a class: folders of pictures and masks, VOC 2012, demo scenes."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets

from lowdino import datasets, demo, image_io
from lowdino.distributed import UserError, user_errors

IGNORED = 255  # the class of pixels that count neither in training nor in evaluation


class MaskedImages(Dataset):
    """Pairs of an image (C, H, W) uint8 and its mask (H, W) uint8 of class indices.

    Args:
        images, masks: paths of the files, in the same order.
    """

    def __init__(self, images: list[str], masks: list[str], pixels: image_io.PixelFormat):
        self.images, self.masks, self.pixels = images, masks, pixels

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def item_bytes(self) -> int:
        """The most that a picture and its mask have, of an even sample's headers; see
        `data.lacks_shared_memory`."""
        sample = self.masks[:: max(len(self) // 64, 1)]
        return (self.pixels.channels + 1) * max(map(pixels_of, sample))

    @user_errors()
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = image_io.read_image(self.images[index], None, self.pixels)
        mask = read_mask(self.masks[index])
        if mask.shape != image.shape[1:]:
            (h, w), (height, width) = mask.shape, image.shape[1:]
            raise UserError(
                f"{self.masks[index]} is a mask of {w} x {h} pixels, its picture has {width} x "
                f"{height}"
            )
        return image, mask


def pixels_of(path: str) -> int:
    """How many pixels a picture has, from its header; 0 where it cannot be read."""
    with suppress(Exception), image_io.open_picture(path) as image:  # whoever reads it says why
        return math.prod(image.size)
    return 0


class MaskedArrays(Dataset):
    """As `MaskedImages`, in memory: (N, C, H, W) and (N, H, W) uint8."""

    in_memory = True

    def __init__(self, images: Tensor, masks: Tensor):
        self.images, self.masks = images, masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.masks[index]


LOSSY = ("JPEG", "JPEG2000", "MPO", "WEBP", "AVIF")
SCALED = {"L": 1, "L;2": 85, "L;4": 17}  # Pillow stretches grey of 2 and 4 bits to 255


def scale_of(image: Image.Image) -> int:
    """How often a file's values are in those that Pillow reads from it, before it does.

    Raises:
        UserError: where they become others that do not tell them any more.
    """
    advice = "a mask's values must be read as they are; save it as PNG"
    if getattr(image, "tag_v2", {}).get(262) == 0:
        raise UserError(f"it is a TIFF file whose 0 is white: {advice}")
    if image.mode != "L" or not image.tile:
        return 1
    options, raw = image.tile[0][3], image_io.raw_mode(image.tile[0])
    if image.format == "PPM" and options != raw and options[1] != 255:
        raise UserError(f"its greatest value is said to be {options[1]}, not 255: {advice}")
    if isinstance(raw, str) and raw not in SCALED:  # of GIF it is the number of bits
        raise UserError(f"its pixels are stored as {raw}: {advice}")
    return SCALED.get(raw, 1)


def read_mask(path: str) -> Tensor:
    """A mask (H, W) uint8: a picture's palette indices or grey values, upright as its picture."""
    try:
        with image_io.open_picture(path) as image:
            if image.format in LOSSY:
                raise UserError(f"a {image.format} file changes values; a mask has class indices")
            if image.mode not in ("P", "L", "1"):
                raise UserError(
                    f"its pixels are {image.mode}: a mask has class indices, one byte a pixel "
                    "(a PNG of a palette or of grey values)"
                )
            scale = scale_of(image)
            image.load()
            turn = image_io.turn_of(image)  # asked for after load(), as in reading.py
            image = image.transpose(turn) if turn is not None else image
            return torch.from_numpy(np.array(image, dtype=np.uint8) // scale)
    except Exception as error:  # on a damaged file Pillow's decoders raise any kind of exception
        raise UserError(f"cannot read mask {path}: {error}") from error


@dataclass
class Data:
    """A source of pictures with masks; `classes` includes the background, if class 0 is one."""

    name: str
    train: Dataset
    test: Dataset
    classes: int
    notes: list[str]


@user_errors()
def load(
    source: str,
    root: str,
    download: bool,
    pixels: image_io.PixelFormat,
    test_fraction: float | None = None,
    seed: int = 0,
    rank: int = 0,
) -> Data:
    """Open a source by name.

    Args:
        source: "demo_scenes"; "voc2012", stored under `root`; or a folder with images/ and masks/,
            or with such folders in its train/ and val/ (or test/), or these in both of them.
        download: fetch VOC where `root` lacks it. `rank` 0 does, and the others wait for it.
        test_fraction: of a folder without val/, the share of the pictures to test on, by `seed`.

    Raises:
        UserError: in one sentence, where there is nothing to read.
    """
    if source == "demo_scenes":
        train, test = map(demo_split, demo.splits(demo.SCENE_TRAIN, demo.SCENE_TEST))
        return Data("the built-in demo scenes", train, test, 1 + len(demo.SCENE_CLASSES), [])
    if source == "voc2012":
        if download and rank == 0:
            voc(root, "train", download, pixels)  # the file of both splits
        if download and dist.is_initialized():
            dist.barrier()
        train, test = (voc(root, split, False, pixels) for split in ("train", "val"))
        return Data("VOC 2012", train, test, 21, [])
    folder = Path(source)
    if not (source and folder.is_dir()):
        raise UserError(
            f"no data at {source or 'an empty path'}: --task segmentation takes a folder with "
            "images/ and masks/, voc2012 or demo_scenes"
        )
    places = split_places(folder)
    if len(places) == 2 and test_fraction is not None:
        raise UserError(f"--test_fraction is for pictures without a split, and {folder} has train/")
    notes: list[str] = []
    found = [pairs(images, of, pixels, notes) for images, of in places]
    if len(found) == 1:
        (whole,) = found
        if test_fraction is None:
            raise UserError(f"{folder} has no val/ to test on: give --test_fraction, such as 0.2")
        found = hold_out(whole, test_fraction, seed)
        notes.append(f"{len(found[1])} of {len(whole)} pictures are held out by seed {seed}")
    train, test = found
    return Data(f"folder {folder}", train, test, count_classes(train, test), notes)


def split_places(folder: Path) -> list[tuple[Path, Path]]:
    """Folders of pictures and of their masks: of training and test, or one pair without a split.

    Raises:
        UserError: where there is train/ alone.
    """
    for top in (folder, folder / "images"):
        inside = (
            {path.name.lower(): path for path in image_io.sub_folders(top)} if top.is_dir() else {}
        )
        train, test = (
            next((inside[name] for name in names if name in inside), None)
            for names in (datasets.TRAIN, datasets.TEST)
        )
        if train and top == folder:
            if not test:
                raise UserError(f"{folder} has train/ but no val/ or test/")
            return [(split / "images", split / "masks") for split in (train, test)]
        if train and test:
            return [(split, folder / "masks" / split.name) for split in (train, test)]
    return [(folder / "images", folder / "masks")]


def demo_split(indices: range) -> MaskedArrays:
    scenes, targets = demo.demo_scenes(indices)
    return MaskedArrays(scenes, torch.stack([demo.semantic_mask(target) for target in targets]))


def voc(root: str, split: str, download: bool, pixels: image_io.PixelFormat) -> MaskedImages:
    """PASCAL VOC 2012 through torchvision; its outline pixels (255) are ignored."""
    try:
        found = torchvision_datasets.VOCSegmentation(root, "2012", split)
    except (RuntimeError, OSError) as absent:
        if not download:
            hint = "not found; add --download, or name its folder by --data_root"
            raise UserError(f"voc2012 under {root}: {hint}") from absent
        try:
            found = torchvision_datasets.VOCSegmentation(root, "2012", split, download=True)
        except (RuntimeError, OSError) as failed:
            raise UserError(f"voc2012 under {root}: the download failed") from failed
    return MaskedImages(found.images, found.masks, pixels)


def pairs(pictures: Path, of: Path, pixels: image_io.PixelFormat, notes: list[str]) -> MaskedImages:
    """The pictures below a folder that have a mask of the same name `of` another, whatever the
    suffix."""
    for folder in (pictures, of):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: pictures lie in images/, masks in masks/")
    images, masks = map(by_stem, (pictures, of))
    both = sorted({*images} & {*masks})
    if not both:
        raise UserError(f"no picture in {pictures} has a mask of its name in {of}")
    for kind, own, others in (("pictures", images, masks), ("masks", masks, images)):
        if lone := sorted({*own} - {*others}):
            other = "mask" if kind == "pictures" else "picture"
            notes.append(f"{len(lone)} {kind} without a {other} are left out, such as {lone[0]}")
    return MaskedImages([images[name] for name in both], [masks[name] for name in both], pixels)


def by_stem(folder: Path) -> dict[str, str]:
    """The image files below a folder, by their names in it without the suffix.

    Raises:
        UserError: where two have the same.
    """
    found: dict[str, str] = {}
    for path in image_io.find_images(folder):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in found:
            raise UserError(
                f"{found[stem]} and {path} differ in their suffixes alone, and pictures and masks "
                "go together by the rest: rename or remove one"
            )
        found[stem] = path
    return found


def hold_out(whole: MaskedImages, fraction: float, seed: int) -> tuple[MaskedImages, MaskedImages]:
    """A random part of the pictures, at least one, to test on."""
    count = max(round(fraction * len(whole)), 1)
    if count >= len(whole):
        raise UserError(
            f"--test_fraction {fraction:g} of {len(whole)} pictures leaves none to train on"
        )
    order = np.random.default_rng(seed).permutation(len(whole))
    return tuple(
        MaskedImages([whole.images[i] for i in part], [whole.masks[i] for i in part], whole.pixels)
        for part in (sorted(order[count:]), sorted(order[:count]))
    )


def classes_in(path: str) -> Tensor:
    """Which of the classes 0 to 254 a mask has: (255,) bool."""
    return torch.bincount(read_mask(path).flatten(), minlength=256)[:IGNORED] > 0


def count_classes(train: MaskedImages, test: MaskedImages) -> int:
    """One more than the highest class of the training masks.

    Raises:
        UserError: where a test mask has a class that they lack, or all pixels are of one class.
    """
    known = torch.zeros(IGNORED, dtype=torch.bool)
    for path in train.masks:
        known |= classes_in(path)
    for path in test.masks:
        for name in (classes_in(path) & ~known).nonzero()[:, 0].tolist():
            raise UserError(
                f"{path} has class {name}, which no training mask has: make it {IGNORED}, which is "
                "ignored, or choose other pictures to test on"
            )
    highest = max(known.nonzero()[:, 0].tolist(), default=0)
    if highest < 1:
        raise UserError(
            "all pixels of the training masks are of class 0, or 255, which is ignored: a second "
            "class is 1, not 255"
        )
    return highest + 1

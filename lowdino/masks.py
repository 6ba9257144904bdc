"""Pictures whose every pixel has a class: folders of pictures and masks, VOC 2012, demo scenes."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from lowdino import demo, files, labels, reading

IGNORED = 255  # the class of pixels that count neither in training nor in evaluation


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


class MaskedImages(Dataset):
    """Pairs of an image (C, H, W) uint8 and its mask (H, W) uint8 of class indices.

    Args:
        images, masks: paths of the files, in the same order.
    """

    def __init__(self, images: list[str], masks: list[str], pixels: reading.Pixels):
        self.images, self.masks, self.pixels = images, masks, pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = reading.read_image(self.images[index], None, self.pixels)
        mask = read_mask(self.masks[index])
        if mask.shape != image.shape[1:]:
            (h, w), (height, width) = mask.shape, image.shape[1:]
            raise UserError(
                f"{self.masks[index]} is a mask of {w} x {h} pixels, its picture has {width} x "
                f"{height}"
            )
        return image, mask


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
    options, raw = image.tile[0][3], reading.raw_mode(image.tile[0])
    if image.format == "PPM" and options != raw and options[1] != 255:
        raise UserError(f"its greatest value is said to be {options[1]}, not 255: {advice}")
    if isinstance(raw, str) and raw not in SCALED:  # of GIF it is the number of bits
        raise UserError(f"its pixels are stored as {raw}: {advice}")
    return SCALED.get(raw, 1)


def read_mask(path: str) -> Tensor:
    """A mask (H, W) uint8: a picture's palette indices or grey values, upright as its picture."""
    try:
        with reading.open_picture(path) as image:
            if image.format in LOSSY:
                raise UserError(f"a {image.format} file changes values; a mask has class indices")
            if image.mode not in ("P", "L", "1"):
                raise UserError(
                    f"its pixels are {image.mode}: a mask has class indices, one byte a pixel "
                    "(a PNG of a palette or of grey values)"
                )
            scale = scale_of(image)
            image.load()
            turn = reading.turn_of(image)  # asked for after load(), as in reading.py
            image = image.transpose(turn) if turn is not None else image
            return torch.from_numpy(np.array(image, dtype=np.uint8) // scale)
    except Exception as error:  # on a damaged file Pillow's decoders raise any kind of exception
        raise UserError(f"cannot read mask {path}: {error}") from error


@dataclass
class Data:
    """A source of pictures with masks; `classes` counts the background, where 0 is that."""

    name: str
    train: Dataset
    test: Dataset
    classes: int
    notes: list[str]


def load(
    source: str,
    root: str,
    download: bool,
    pixels: reading.Pixels,
    test_fraction: float | None = None,
    seed: int = 0,
    rank: int = 0,
) -> Data:
    """Open a source by name.

    Args:
        source: "demo_scenes"; "voc2012", stored under `root`; or a folder with images/ and masks/,
            or with such folders in its train/ and val/ (or test/).
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
    inside = {path.name.lower(): path for path in files.sub_folders(folder)}
    tops = [next((inside[n] for n in names if n in inside), None) for names in SPLITS]
    if tops[0] and test_fraction is not None:
        raise UserError(f"--test_fraction is for pictures without a split, and {folder} has train/")
    if tops[0] and not tops[1]:
        raise UserError(f"{folder} has train/ but no val/ or test/")
    notes: list[str] = []
    if tops[0]:
        train, test = (pairs(top, pixels, notes) for top in tops)
    else:
        whole = pairs(folder, pixels, notes)
        if test_fraction is None:
            raise UserError(f"{folder} has no val/ to test on: give --test_fraction, such as 0.2")
        train, test = hold_out(whole, test_fraction, seed)
        notes.append(f"{len(test)} of {len(whole)} pictures are held out by seed {seed}")
    return Data(f"folder {folder}", train, test, count_classes(train, test), notes)


SPLITS = (labels.TRAIN, labels.TEST)


def demo_split(indices: range) -> MaskedArrays:
    scenes, targets = demo.demo_scenes(indices)
    return MaskedArrays(scenes, torch.stack([demo.semantic_mask(target) for target in targets]))


def voc(root: str, split: str, download: bool, pixels: reading.Pixels) -> MaskedImages:
    """PASCAL VOC 2012 through torchvision; of its pixels on outlines, 255, nothing is asked."""
    try:
        found = datasets.VOCSegmentation(root, "2012", split)
    except (RuntimeError, OSError) as absent:
        if not download:
            hint = "not found; add --download, or name its folder by --data_root"
            raise UserError(f"voc2012 under {root}: {hint}") from absent
        try:
            found = datasets.VOCSegmentation(root, "2012", split, download=True)
        except (RuntimeError, OSError) as failed:
            raise UserError(f"voc2012 under {root}: the download failed") from failed
    return MaskedImages(found.images, found.masks, pixels)


def pairs(folder: Path, pixels: reading.Pixels, notes: list[str]) -> MaskedImages:
    """The pictures below images/ that have a mask of the same name, whatever the suffix."""
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise UserError(f"no folder {folder / name}: pictures lie in images/, masks in masks/")
    left_out: Counter = Counter()
    images, masks = (
        {stem(path, folder / name): path for path in files.find_images(folder / name, left_out)}
        for name in ("images", "masks")
    )
    both = sorted({*images} & {*masks})
    if not both:
        raise UserError(f"no picture in {folder / 'images'} has a mask of its name in masks/")
    for kind, own, others in (("pictures", images, masks), ("masks", masks, images)):
        if lone := sorted({*own} - {*others}):
            other = "mask" if kind == "pictures" else "picture"
            notes.append(f"{len(lone)} {kind} without a {other} are left out, such as {lone[0]}")
    return MaskedImages([images[name] for name in both], [masks[name] for name in both], pixels)


def stem(path: str, folder: Path) -> str:
    return os.path.splitext(os.path.relpath(path, folder))[0]


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


def count_classes(train: MaskedImages, test: MaskedImages) -> int:
    """One more than the highest class of the training masks.

    Raises:
        UserError: where a test mask has a higher one, or all pixels are of one class.
    """
    highest = [-1, -1]
    for i, split in enumerate((train, test)):
        for path in split.masks:
            mask = read_mask(path)
            known = mask[mask != IGNORED]
            top = int(known.max()) if known.numel() else -1
            if i == 1 and top > highest[0]:
                raise UserError(
                    f"{path} has class {top}, the training masks none above {highest[0]}"
                )
            highest[i] = max(highest[i], top)
    if highest[0] < 1:
        raise UserError(
            "all pixels of the training masks are of class 0, or 255, which is ignored: a second "
            "class is 1, not 255"
        )
    return highest[0] + 1

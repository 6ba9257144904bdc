"""Pictures whose every pixel has a class: folders of pictures and masks, demo scenes."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lowdino import datasets, demo, image_io
from lowdino.annotations import need
from lowdino.distributed import UserError, user_errors

IGNORED = 255  # the class of pixels that count neither in training nor in evaluation


class MaskedImages(Dataset):
    """Pairs of an image (C, H, W) uint8 and its mask (H, W) uint8 of class indices, by paths."""

    def __init__(self, paths: list[str], masks: list[str], pixels: image_io.PixelFormat):
        self.paths, self.masks, self.pixels = paths, masks, pixels

    def __len__(self) -> int:
        return len(self.paths)

    @user_errors()
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = image_io.read_image(self.paths[index], None, self.pixels)
        mask = read_mask(self.masks[index])
        if mask.shape != image.shape[1:]:
            (h, w), (height, width) = mask.shape, image.shape[1:]
            words = f"a mask of {w} x {h} pixels, its picture has {width} x {height}"
            raise UserError(f"{self.masks[index]} is {words}")
        return image, mask


class MaskedArrays(TensorDataset):
    """Like `MaskedImages`, in memory: (N, C, H, W) and (N, H, W) uint8."""

    in_memory = True


LOSSY = ("JPEG", "JPEG2000", "MPO", "WEBP", "AVIF")
SCALED = {"L": 1, "L;2": 85, "L;4": 17}  # Pillow stretches grey of 2 and 4 bits to 255


def scale_of(image: Image.Image) -> int:
    """Factor by which Pillow is going to multiply a file's values; a UserError on other changes."""
    advice = "a mask's values must be read as they are; save it as PNG"
    if getattr(image, "tag_v2", {}).get(262) == 0:
        raise UserError(f"it is a TIFF file whose 0 is white: {advice}")
    if image.mode != "L" or not image.tile:
        return 1
    options, raw = image.tile[0][3], image_io.raw_mode(image.tile[0])
    if image.format == "PPM" and options != raw and options[1] != 255:
        raise UserError(f"its header gives {options[1]} as its greatest value, not 255: {advice}")
    if isinstance(raw, str) and raw not in SCALED:  # for GIF it is the number of bits
        raise UserError(f"its pixels are stored as {raw}: {advice}")
    return SCALED.get(raw, 1)


def read_mask(path: str) -> Tensor:
    """A mask (H, W) uint8: palette indices or grey values of a picture, upright."""
    try:
        with image_io.open_picture(path) as image:
            if image.format in LOSSY:
                raise UserError(f"a {image.format} file changes values; a mask has class indices")
            if image.mode not in ("P", "L", "1"):
                wanted = "a PNG with a palette or with grey values"
                raise UserError(f"its pixels are {image.mode}: a mask has class indices ({wanted})")
            scale = scale_of(image)
            image.load()
            turn = image_io.turn_of(image)  # after load(), as in image_io.py
            image = image.transpose(turn) if turn is not None else image
            return torch.from_numpy(np.array(image, dtype=np.uint8) // scale)
    except Exception as error:  # on a damaged file Pillow's decoders raise any kind of exception
        raise UserError(f"cannot read mask {path}: {error}") from error


def split_places(folder: Path) -> list[tuple[Path, Path]]:
    """Folders of pictures and of their masks: training and test, or one pair without a split."""
    for top in (folder, folder / "images"):
        folders = image_io.sub_folders(top) if top.is_dir() else []
        inside = {path.name.lower(): path for path in folders}
        train, test = (
            next((inside[name] for name in names if name in inside), None)
            for names in (datasets.TRAIN, datasets.TEST)
        )
        if train and top == folder:
            need(test, f"{folder} has train/ but no val/ or test/")
            return [(split / "images", split / "masks") for split in (train, test)]
        if train and test:
            return [(split, folder / "masks" / split.name) for split in (train, test)]
    return [(folder / "images", folder / "masks")]


def pair_masks(
    pictures: Path, masks: Path, pixels: image_io.PixelFormat, notes: list[str]
) -> MaskedImages:
    """The pictures below one folder that have a mask of the same name, whatever the suffix.

    `notes` gets a sentence on files that are left out.
    """
    for folder in (pictures, masks):
        need(folder.is_dir(), f"no folder {folder}: pictures lie in images/, masks in masks/")
    image_files, mask_files = by_stem(pictures), by_stem(masks)
    both = sorted({*image_files} & {*mask_files})
    need(both, f"no picture in {pictures} has a mask of its name in {masks}")
    kinds = (image_files, "pictures without a mask"), (mask_files, "masks without a picture")
    for files, words in kinds:
        if lone := sorted({*files} - {*both}):
            notes.append(f"{len(lone)} {words} are left out, such as {lone[0]}")
    paths = ([files[name] for name in both] for files in (image_files, mask_files))
    return MaskedImages(*paths, pixels)


def by_stem(folder: Path) -> dict[str, str]:
    """The image files below a folder, by their names in it without the suffix."""
    files: dict[str, str] = {}
    for path in image_io.find_images(folder):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        same = f"{files.get(stem)} and {path} differ in their suffixes alone"
        need(stem not in files, f"{same}, so either has the same mask: rename or remove one")
        files[stem] = path
    return files


def split_pictures(
    images: MaskedImages, fraction: float, seed: int
) -> tuple[MaskedImages, MaskedImages]:
    """Pictures to train on, and a random fraction, at least one picture, to test on."""
    count, total = max(round(fraction * len(images)), 1), len(images)
    need(count < total, f"--test_fraction {fraction:g} of {total} pictures leaves none to train on")
    order = np.random.default_rng(seed).permutation(total)

    def part(indices: list[int]) -> MaskedImages:
        paths = ([files[i] for i in indices] for files in (images.paths, images.masks))
        return MaskedImages(*paths, images.pixels)

    return part(sorted(order[count:])), part(sorted(order[:count]))


def classes_in(path: str) -> set[int]:
    return {*torch.bincount(read_mask(path).flatten()).nonzero()[:, 0].tolist()}


def count_classes(train: MaskedImages, test: MaskedImages) -> int:
    """One more than the highest class of the training masks; test masks may have no others."""
    known = {IGNORED}.union(*map(classes_in, train.masks))
    for path in test.masks:
        for name in sorted(classes_in(path) - known):
            words = f"make it {IGNORED}, which is ignored, or choose other pictures to test on"
            raise UserError(f"{path} has class {name}, which no training mask has: {words}")
    highest = max(known - {IGNORED}, default=0)
    rest = "of class 0, or 255, which is ignored: a second class is 1, not 255"
    need(highest > 0, f"all pixels of the training masks are {rest}")
    return highest + 1


@dataclass
class MaskSource:
    """Training and test pictures with masks."""

    name: str  # in words
    train: Dataset
    test: Dataset
    classes: int  # including the background where class 0 is one
    notes: list[str]  # sentences on what is left out or held out


def demo_split(indices: range) -> MaskedArrays:
    scenes, targets = demo.demo_scenes(indices)
    return MaskedArrays(scenes, torch.stack([demo.semantic_mask(target) for target in targets]))


def load_folder(
    folder: Path, pixels: image_io.PixelFormat, test_fraction: float | None, seed: int
) -> MaskSource:
    """A folder of pictures and masks, see `load`."""
    places = split_places(folder)
    unsplit = len(places) == 1 or test_fraction is None
    need(unsplit, f"--test_fraction is for pictures without a split, and {folder} has train/")
    notes: list[str] = []
    splits = [pair_masks(*place, pixels, notes) for place in places]
    if len(splits) == 1:
        given = test_fraction is not None
        need(given, f"{folder} has no val/ to test on: give --test_fraction, such as 0.2")
        splits, count = split_pictures(splits[0], test_fraction, seed), len(splits[0])
        notes.append(f"{len(splits[1])} of {count} pictures are held out by seed {seed}")
    return MaskSource(f"folder {folder}", *splits, count_classes(*splits), notes)


@user_errors()
def load(
    source: str, pixels: image_io.PixelFormat, test_fraction: float | None = None, seed: int = 0
) -> MaskSource:
    """Open a source by name; a UserError where there is none, or a file is wrong.

    Args:
        source: "demo_scenes"; or a folder with images/ and masks/, or with such folders in its
            train/ and val/ (or test/), or with these in both of them.
        test_fraction: fraction of the pictures to test on, by `seed`, for a folder without val/.
    """
    if source == "demo_scenes":
        train, test = map(demo_split, demo.splits(demo.SCENE_TRAIN, demo.SCENE_TEST))
        classes = 1 + len(demo.SCENE_CLASSES)
        return MaskSource("the built-in demo scenes", train, test, classes, [])
    if source and Path(source).is_dir():  # Path("") would be the current folder
        return load_folder(Path(source), pixels, test_fraction, seed)
    choices = "a folder with images/ and masks/, or demo_scenes"
    raise UserError(f"no data at {source or 'an empty path'}: --task segmentation takes {choices}")

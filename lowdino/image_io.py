"""One file becomes one uint8 image: any picture that Pillow knows, or an array of NumPy's."""

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS


class ImageError(ValueError):
    """An image that cannot be read; the sentence names the file."""


class PixelFormat(NamedTuple):
    """How the values of a file become those of an image.

    Attributes:
        channels: C. Any picture becomes RGB (3) or grey (1); other numbers need files of that many.
        value_range: what becomes 0 and what 255, of values of more than 8 bits; None: 0 and 65535,
            of whole numbers alone.
        max_megapixels: larger images are refused. A JPEG counts as it is decoded, see `read_image`.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    max_megapixels: float = 256.0

    def check_size(self, width: int, height: int) -> None:
        if width * height > 1e6 * self.max_megapixels:
            raise ValueError(
                f"{width} x {height} pixels are more than --max_megapixels {self.max_megapixels:g}"
            )


RGB = PixelFormat()


def read_image(path: str, max_side: int | None = None, pixels: PixelFormat = RGB) -> Tensor:
    """Decode a picture or a `.npy` file to (C, H, W) uint8.

    A picture is turned upright, as its EXIF says, and transparency is laid on white. Of several
    frames the first is taken. Values of more than 8 bits are scaled, see `PixelFormat`; but of 16
    bits of CMYK the upper 8 are taken as they are.

    Where C is neither 1 nor 3, it is the bands of a picture as they are, or C grey pages of one.
    An array is (H, W), which is grey, (H, W, C) or (C, H, W), and the former where it could be
    both. NaN in it becomes 0.

    Args:
        max_side: larger images are reduced, the shorter side to so many pixels. A JPEG is decoded
            at 1/2, 1/4 or 1/8 of its size where that is enough.

    Raises:
        ValueError: naming the file, where it cannot be read, has other channels, or its values have
            no known range.
    """
    try:
        layers = (array_layers if is_array(path) else picture_layers)(path, max_side, pixels)
        if max_side is not None:
            layers = [reduced(layer, max_side) for layer in layers]
        values = np.dstack(layers)  # (H, W, C)
    except Exception as error:  # on a damaged file Pillow's decoders raise any kind of exception
        raise ImageError(f"cannot read image {path}: {error}") from error
    return torch.from_numpy(values).permute(2, 0, 1)


def reduced(image: Image.Image, max_side: int) -> Image.Image:
    """The image with a shorter side of `max_side` pixels at most, whatever the longer one is."""
    scale = max_side / min(image.size)
    if scale >= 1:
        return image
    size = [round(side * scale) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def shorter_side(path: str, pixels: PixelFormat = RGB) -> int:
    """The smaller of height and width in pixels, from the file's header.

    Raises:
        ValueError: naming the file.
    """
    try:
        if is_array(path):
            return min(load_array(path, pixels.channels).shape[:2])
        with open_picture(path) as image:
            return min(image.size)
    except Exception as error:  # as in `read_image`
        raise ImageError(f"cannot read image {path}: {error}") from error


def deep_values(path: str, pixels: PixelFormat = RGB) -> np.ndarray | None:
    """The values of a file as they are, where they are of more than 8 bits; else None.

    Raises:
        ValueError: naming the file.
    """
    try:
        if is_array(path):
            values = load_array(path, pixels.channels)
            return None if values.dtype in (np.uint8, bool) else values
        with open_picture(path) as image:
            pixels.check_size(*image.size)
            found = [deep_picture(page, path) for page in pages(image, pixels.channels)]
            return None if found[0] is None else np.dstack(found)
    except Exception as error:  # as in `read_image`
        raise ImageError(f"cannot read image {path}: {error}") from error


def eight_bits(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Scale a range of values to 0..255 and clip what is beyond it; uint8 as it is.

    Raises:
        ValueError: where no range is given, and the values have none of their own.
    """
    if values.dtype == np.uint8:
        return np.array(values)
    if values.dtype == bool:
        return values * np.uint8(255)
    if value_range is None:
        advice = "give it by --value_range, or convert it to 8 or 16 bits first"
        if values.dtype.kind == "f":
            raise ValueError(f"floating-point values have no known range; {advice}")
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"values {values.min()} to {values.max()} do not fit 16 bits, and another range is "
                f"not known; {advice}"
            )
        value_range = 0, 65535
    low, high = value_range
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0).clip(0, 255).round().astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------

# How a picture is turned upright, by its EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def open_picture(path: str) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet, Pillow's own limit of their number put aside."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        # As a file, for by its name Pillow 13 maps plain grey TIFFs into memory, lying ones turned.
        with open(path, "rb") as file, Image.open(file) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def picture_layers(path: str, max_side: int | None, pixels: PixelFormat) -> list[Image.Image]:
    """An RGB or a grey picture, or a grey one for each channel, of 8 bits and upright."""
    layers = []
    with open_picture(path) as image:
        if max_side is not None:
            image.draft("RGB", (max_side, max_side))  # no smaller than that
        pixels.check_size(*image.size)
        for page in pages(image, pixels.channels):
            values = deep_picture(page, path)
            page.load()
            picture = page if values is None else of_deep(values, page, pixels)
            turn = turn_of(page)  # asked for after load(), for Pillow turns some TIFFs itself
            layers += [
                layer if turn is None else layer.transpose(turn)
                for layer in layers_of(picture, pixels.channels)
            ]
    if pixels.channels not in (1, 3) and len(layers) != pixels.channels:
        raise ValueError(
            f"it has {len(layers)} channels, and {pixels.channels} are wanted, as --in_chans or "
            "the network has them; where Pillow sees too few, give .npy or a grey page for each"
        )
    return layers


def of_deep(values: np.ndarray, page: Image.Image, pixels: PixelFormat) -> Image.Image:
    """The picture of a page's `deep_picture`, with its alpha channel."""
    scaled = eight_bits(values, pixels.value_range)
    if getattr(page, "tag_v2", {}).get(262) == 0:  # a TIFF whose 0 is white
        scaled = 255 - scaled
    picture = Image.fromarray(scaled)
    if page.mode in ("RGBA", "LA"):
        picture.putalpha(page.getchannel("A"))
    elif isinstance(hole := page.info.get("transparency"), int | tuple):  # the value that is none
        same = values == np.array(hole)
        same = same if same.ndim == 2 else same.all(axis=2)
        picture.putalpha(Image.fromarray(np.where(same, 0, 255).astype(np.uint8)))
    return picture


def pages(image: Image.Image, channels: int) -> Iterator[Image.Image]:
    """The first frame of a picture; all of them where they are the channels."""
    several = channels not in (1, 3) and len(image.getbands()) == 1
    several = several and getattr(image, "n_frames", 1) == channels
    for number in range(channels if several else 1):
        if number:
            image.seek(number)
        yield image


def deep_picture(image: Image.Image, path: str) -> np.ndarray | None:
    """Values of more than 8 bits as they are, (H, W) or (H, W, 3); None where there are 8."""
    if image.mode.startswith(("I", "F")):
        return np.array(image)
    if image.mode in ("RGB", "RGBA", "LA") and image.tile:
        raw = raw_mode(image.tile[0])
        if raw == "LA;16B" or raw.partition(";")[::2] in DEEP:
            return sixteen_bits(path, image, raw)
    return None


# Pillow keeps the upper byte of colours of 16 bits, and names where it is: Big or Little endian, or
# Native. Read as the other, the same file gives the lower byte.
DEEP = {(bands, end) for bands in ("RGB", "RGBA", "RGBX") for end in ("16B", "16L", "16N")}
OTHER_END = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def raw_mode(tile: tuple) -> str:
    return tile[3] if isinstance(tile[3], str) else tile[3][0]


def sixteen_bits(path: str, image: Image.Image, raw: str) -> np.ndarray:
    """(H, W, 3) uint16 of a picture whose pixels are in the raw mode `raw`; grey, (H, W)."""
    grey = raw == "LA;16B"  # whose four bytes a pixel are read as they are
    other = "RGBA" if grey else raw[:-1] + OTHER_END[raw[-1]]
    with open_picture(path) as lower:
        lower.seek(image.tell())
        for i, tile in enumerate(lower.tile):
            named = other if isinstance(tile[3], str) else (other, *tile[3][1:])
            # A plain tuple in older versions of Pillow.
            lower.tile[i] = getattr(tile, "_make", tuple)([*tile[:3], named])
        if grey:
            lower._mode = "RGBA"
        lower.load()
        upper, lower = (np.array(part).astype(np.uint16) for part in (image, lower))
    return lower[..., 0] * 256 + lower[..., 1] if grey else (upper * 256 + lower)[..., :3]


def turn_of(image: Image.Image) -> Image.Transpose | None:
    with suppress(Exception):  # damaged EXIF, which makes no worse picture
        return TURNS.get(image.getexif().get(0x0112))
    return None


def layers_of(image: Image.Image, channels: int) -> list[Image.Image]:
    """The picture as RGB or grey on white; where other channels are wanted, each of its bands."""
    if channels in (1, 3):
        if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return [image.convert("RGB" if channels == 3 else "L")]
    return [band.convert("L") for band in image.split()]


# --------------------------------------------------------------------------------------------------
# Arrays
# --------------------------------------------------------------------------------------------------


def is_array(path: str) -> bool:
    return path.lower().endswith(".npy")


def load_array(path: str, channels: int) -> np.ndarray:
    """A file's array with channels last, (H, W, C) or (H, W, 1), mapped and not yet read."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError("it is damaged, or holds objects in place of numbers") from error
    if not isinstance(values, np.ndarray):
        raise ValueError("it holds several arrays, where one image was expected")
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"its shape {values.shape} is that of no image, (H, W) or (H, W, C)")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"it holds {values.dtype}, where numbers were expected")
    shape = values.shape
    values = values[:, :, None] if values.ndim == 2 else values
    wanted = (channels, 1) if channels == 3 else (channels,)  # grey becomes RGB
    for count in wanted if values.ndim == 3 else ():
        if values.shape[2] == count:
            return values
        if values.shape[0] == count:
            return values.transpose(1, 2, 0)
    raise ValueError(
        f"its shape {shape} has no axis of {channels} channels, first or last, as --in_chans or "
        "the network has them"
    )


def array_layers(path: str, max_side: int | None, pixels: PixelFormat) -> list[Image.Image]:
    """A grey picture of 8 bits for each channel."""
    values = load_array(path, pixels.channels)
    height, width, bands = values.shape
    pixels.check_size(width, height)
    layers = [Image.fromarray(eight_bits(values[..., i], pixels.value_range)) for i in range(bands)]
    return layers if bands == pixels.channels else layers * pixels.channels


# --------------------------------------------------------------------------------------------------
# Which files are images
# --------------------------------------------------------------------------------------------------

# Pillow only tells what these are, or runs another program to read them.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# What systems put beside files; names that begin with a dot are left out too.
SYSTEM_FOLDERS = {"$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"}

# A training's folder holds the first and one of the others. Its pictures are no data.
RUN_SETTINGS = "args.json"
RUN_FILES = ("checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "log.jsonl", "crops.png")
RUN_PICTURES = ("crops.png", "neighbours.png", "maps.png", "attention.png")


@functools.cache
def suffixes() -> set[str]:
    """Of image files, in lower case: .npy, and all that Pillow reads."""
    known = Image.registered_extensions().items()
    return {".npy"} | {s for s, kind in known if kind in Image.OPEN and kind not in NOT_READ}


def find_images(folder: Path, left_out: Counter | None = None) -> list[str]:
    """All images below a folder, sorted; a ValueError where there are none.

    Links are followed, but each folder is read once.

    Args:
        left_out: counts what is no image, see `read_folder`.
    """
    left_out = Counter() if left_out is None else left_out
    paths = sorted(walk(str(folder), left_out, set()))
    if not paths:
        said = f"; left out: {counted(left_out)}" if left_out else ""
        raise ValueError(
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
        raise ValueError(f"cannot read folder {folder}: {error.strerror}") from error
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
    except ValueError:
        return True

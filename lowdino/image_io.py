"""One file becomes one uint8 image: any picture that Pillow reads, or an array of NumPy's.

`read_image` reads a file as a `PixelFormat` says, `find_value_range` and `channel_statistics` look
at a sample of files, and `find_images` lists the image files below a folder. Values of more than
8 bits are called deep here.
"""

import functools
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
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


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Turn every error into an ImageError: Pillow raises any kind of exception on damaged files."""
    try:
        yield
    except Exception as error:
        raise ImageError(f"cannot read image {path}: {error}") from error


class PixelFormat(NamedTuple):
    """How the values of a file become those of an image.

    Attributes:
        channels: C. Any picture becomes RGB (3) or grey (1); another C needs files of C channels.
        value_range: the deep values that become 0 and 255; None for 0 and 65535, of integers only.
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


def scale_to_8_bits(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Scale a range of values to 0..255 and clip the others; uint8 stays as it is.

    Raises:
        ValueError: where no range is given, and their type does not tell one.
    """
    if values.dtype == np.uint8:
        return np.array(values)
    if values.dtype == bool:
        return values * np.uint8(255)
    if value_range is None:
        advice = "give a range by --value_range, or convert to 8 or 16 bits first"
        if values.dtype.kind == "f":
            raise ValueError(f"floating-point values have no known range; {advice}")
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ValueError(f"values {low} to {high} do not fit 16 bits; {advice}")
    low, high = value_range or (0, 65535)
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0).clip(0, 255).round().astype(np.uint8)


# -- Pictures --------------------------------------------------------------------------------------

# How to turn a picture upright, by its EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Of 16-bit colours Pillow keeps the upper byte. Its raw mode says which byte that is: Big endian,
# Little endian or Native. Read with the other byte order, the same file gives the lower byte.
DEEP = {(bands, order) for bands in ("RGB", "RGBA", "RGBX") for order in ("16B", "16L", "16N")}
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@contextmanager
def open_picture(path: str) -> Iterator[Image.Image]:
    """A picture that is not decoded yet, without Pillow's own limit of its size."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        # By its name Pillow 13 would map a plain grey TIFF into memory, and turn it wrongly.
        with open(path, "rb") as file, Image.open(file) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The turn that makes a picture upright; None for an upright one or damaged EXIF."""
    with suppress(Exception):
        return TURNS.get(image.getexif().get(0x0112))
    return None


def raw_mode(tile: tuple) -> str:
    """How Pillow reads a tile of a picture, see `DEEP`."""
    return tile[3] if isinstance(tile[3], str) else tile[3][0]


def values_of_16_bits(path: str, image: Image.Image, raw: str) -> np.ndarray:
    """uint16 values of a picture of raw mode `raw`: (H, W, 3), or (H, W) for grey with alpha."""
    grey = raw == "LA;16B"  # the four bytes of a pixel are read as they are
    other = "RGBA" if grey else raw[:-1] + OTHER_ORDER[raw[-1]]
    with open_picture(path) as lower:
        lower.seek(image.tell())
        for i, tile in enumerate(lower.tile):
            mode = other if isinstance(tile[3], str) else (other, *tile[3][1:])
            # Older versions of Pillow have a plain tuple.
            lower.tile[i] = getattr(tile, "_make", tuple)([*tile[:3], mode])
        if grey:
            lower._mode = "RGBA"
        lower.load()
        upper, lower = (np.array(part).astype(np.uint16) for part in (image, lower))
    return lower[..., 0] * 256 + lower[..., 1] if grey else (upper * 256 + lower)[..., :3]


def deep_values_of_page(image: Image.Image, path: str) -> np.ndarray | None:
    """The deep values of a frame, (H, W) or (H, W, 3); None where it has 8 bits."""
    if image.mode.startswith(("I", "F")):
        return np.array(image)
    if image.mode in ("RGB", "RGBA", "LA") and image.tile:
        raw = raw_mode(image.tile[0])
        if raw == "LA;16B" or raw.partition(";")[::2] in DEEP:
            return values_of_16_bits(path, image, raw)
    return None


def picture_of_deep_values(
    values: np.ndarray, page: Image.Image, pixel_format: PixelFormat
) -> Image.Image:
    """A picture of 8 bits, with the page's alpha channel."""
    scaled = scale_to_8_bits(values, pixel_format.value_range)
    if getattr(page, "tag_v2", {}).get(262) == 0:  # a TIFF whose 0 is white
        scaled = 255 - scaled
    picture = Image.fromarray(scaled)
    if page.mode in ("RGBA", "LA"):
        picture.putalpha(page.getchannel("A"))
    elif isinstance(hole := page.info.get("transparency"), int | tuple):  # the transparent value
        same = values == np.array(hole)
        same = same if same.ndim == 2 else same.all(axis=2)
        picture.putalpha(Image.fromarray(np.where(same, 0, 255).astype(np.uint8)))
    return picture


def pages(image: Image.Image, channels: int) -> Iterator[Image.Image]:
    """The first frame of a picture, or all frames where each is a channel."""
    several = channels not in (1, 3) and len(image.getbands()) == 1
    several = several and getattr(image, "n_frames", 1) == channels
    for number in range(channels if several else 1):
        if number:
            image.seek(number)
        yield image


def layers_of_page(image: Image.Image, channels: int) -> list[Image.Image]:
    """The picture as RGB or grey on white; for another number of channels, its bands."""
    if channels in (1, 3):
        if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return [image.convert("RGB" if channels == 3 else "L")]
    return [band.convert("L") for band in image.split()]


def picture_layers(path: str, max_side: int | None, pixel_format: PixelFormat) -> list[Image.Image]:
    """One RGB or grey picture, or a grey one per channel; of 8 bits and upright."""
    channels, layers = pixel_format.channels, []
    with open_picture(path) as image:
        if max_side is not None:
            image.draft("RGB", (max_side, max_side))  # decodes at no smaller size
        pixel_format.check_size(*image.size)
        for page in pages(image, channels):
            values = deep_values_of_page(page, path)
            page.load()
            picture = page if values is None else picture_of_deep_values(values, page, pixel_format)
            turn = turn_of(page)  # after load(), because Pillow turns some TIFFs itself
            layers += [
                layer if turn is None else layer.transpose(turn)
                for layer in layers_of_page(picture, channels)
            ]
    if channels not in (1, 3) and len(layers) != channels:
        raise ValueError(
            f"it has {len(layers)} channels, and {channels} are wanted, as --in_chans or the "
            "network has them; where Pillow sees too few, give .npy or a grey page per channel"
        )
    return layers


# -- Arrays ----------------------------------------------------------------------------------------


def is_array(path: str) -> bool:
    return path.lower().endswith(".npy")


def load_array(path: str, channels: int) -> np.ndarray:
    """A file's array with channels last, (H, W, C) or (H, W, 1); mapped, not yet read."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError("it is damaged, or holds objects in place of numbers") from error
    if not isinstance(values, np.ndarray):
        raise ValueError("it holds several arrays, where one image was expected")
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"its shape {values.shape} is no image's: (H, W) or (H, W, C)")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"it holds {values.dtype}, where numbers were expected")
    shape = values.shape
    values = values[:, :, None] if values.ndim == 2 else values
    for count in (channels, 1) if channels == 3 else (channels,):  # grey becomes RGB
        if values.shape[2] == count:
            return values
        if values.shape[0] == count:
            return values.transpose(1, 2, 0)
    axis = f"axis of {channels} channels, first or last"
    raise ValueError(f"its shape {shape} has no {axis}, as --in_chans or the network has them")


def array_layers(path: str, max_side: int | None, pixel_format: PixelFormat) -> list[Image.Image]:
    """A grey picture of 8 bits per channel."""
    values = load_array(path, pixel_format.channels)
    height, width, bands = values.shape
    pixel_format.check_size(width, height)
    bands = (scale_to_8_bits(values[..., i], pixel_format.value_range) for i in range(bands))
    layers = list(map(Image.fromarray, bands))
    return layers if len(layers) == pixel_format.channels else layers * pixel_format.channels


# -- One file, and a sample of several -------------------------------------------------------------


def reduced(image: Image.Image, max_side: int) -> Image.Image:
    """The image, with its shorter side reduced to `max_side` pixels where that is longer."""
    scale = max_side / min(image.size)
    if scale >= 1:
        return image
    size = [round(side * scale) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def read_image(path: str, max_side: int | None = None, pixel_format: PixelFormat = RGB) -> Tensor:
    """Decode a picture or a `.npy` file to (C, H, W) uint8.

    A picture is turned upright, as its EXIF says, and transparency is laid on white. Of several
    frames the first is taken. Deep values are scaled, see `PixelFormat`; only of 16-bit CMYK the
    upper 8 bits are taken as they are.

    Where C is neither 1 nor 3, the channels are a picture's bands, or its C grey pages. An array is
    (H, W), which is grey, (H, W, C) or (C, H, W); where it could be both, (H, W, C). NaN becomes 0.

    Args:
        max_side: the shorter side of larger images is reduced to this many pixels; None keeps all
            pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is enough.

    Raises:
        ImageError: naming the file, where it cannot be read, has other channels, or its values have
            no known range.
    """
    with named_errors(path):
        layers = (array_layers if is_array(path) else picture_layers)(path, max_side, pixel_format)
        if max_side is not None:
            layers = [reduced(layer, max_side) for layer in layers]
        values = np.dstack(layers)  # (H, W, C)
    return torch.from_numpy(values).permute(2, 0, 1)


def shorter_side(path: str, pixel_format: PixelFormat = RGB) -> int:
    """The smaller of height and width in pixels, from the file's header; or an ImageError."""
    with named_errors(path):
        if is_array(path):
            return min(load_array(path, pixel_format.channels).shape[:2])
        with open_picture(path) as image:
            return min(image.size)


def deep_values(path: str, pixel_format: PixelFormat = RGB) -> np.ndarray | None:
    """The unscaled values of a file of more than 8 bits, or None; or an ImageError."""
    with named_errors(path):
        if is_array(path):
            values = load_array(path, pixel_format.channels)
            return None if values.dtype in (np.uint8, bool) else values
        with open_picture(path) as image:
            pixel_format.check_size(*image.size)
            frames = pages(image, pixel_format.channels)
            layers = [deep_values_of_page(frame, path) for frame in frames]
            return None if layers[0] is None else np.dstack(layers)


SAMPLE = 200  # files at most, evenly from first to last


def find_value_range(paths: Sequence[str], pixel_format: PixelFormat) -> tuple[float, float] | None:
    """The range of the deep values in a sample of files; None where there are none.

    Integers from 0 to 65,535 have the range of their bits, 0 to 2^n - 1 with n from 8 to 16, since
    the brightest pixel of a dark sample is too low a limit. Floating-point values have [0, 1] where
    they lie within it. All others have their minimum and maximum. Unreadable files are left out.
    """
    low, high, integers = math.inf, -math.inf, True
    for path in paths[:: math.ceil(len(paths) / SAMPLE)]:
        with suppress(ImageError):
            values = deep_values(path, pixel_format)
            finite = () if values is None else values[np.isfinite(values)]
            if len(finite):
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                integers = integers and values.dtype.kind != "f"
    if high == -math.inf:
        return None
    if integers and 0 <= low and high < 2**16:
        return 0.0, 2.0 ** max(int(high).bit_length(), 8) - 1
    if not integers and 0 <= low and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def channel_statistics(
    paths: Sequence[str], max_side: int | None, pixel_format: PixelFormat
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1], over the pixels of a sample of files.

    Unreadable files are left out; an ImageError where all are.
    """
    count, total, squares = 0, 0.0, 0.0
    for path in paths[:: math.ceil(len(paths) / SAMPLE)]:
        with suppress(ImageError):
            values = read_image(path, max_side, pixel_format).flatten(1).double() / 255  # (C, H*W)
            count += values.shape[1]
            total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
    if not count:
        read_image(paths[0], max_side, pixel_format)  # its error
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    # A constant channel is divided by one level of 255, not by 0.
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())


# -- Image files of a folder -----------------------------------------------------------------------

# Formats that Pillow only identifies, or reads by running another program.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Folders that systems put beside files. Names that begin with a dot are left out too.
SYSTEM_FOLDERS = {"$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"}

# The output folder of a training has RUN_SETTINGS and one of RUN_FILES. Its pictures are no data.
RUN_SETTINGS = "args.json"
RUN_FILES = ("checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "log.jsonl", "crops.png")
RUN_PICTURES = ("crops.png", "neighbours.png", "maps.png", "attention.png")


@functools.cache
def suffixes() -> set[str]:
    """The suffixes of image files, in lower case: .npy, and all that Pillow reads."""
    known = Image.registered_extensions().items()
    return {".npy"} | {s for s, kind in known if kind in Image.OPEN and kind not in NOT_READ}


def is_run(folder: str | Path) -> bool:
    """Whether a training wrote its files into a folder."""
    exists = lambda name: os.path.exists(os.path.join(folder, name))
    return exists(RUN_SETTINGS) and any(map(exists, RUN_FILES))


def read_folder(folder: str | Path, left_out: Counter | None = None) -> tuple[list[str], list[str]]:
    """The images and the sub-folders of a folder, sorted.

    Args:
        left_out: counts the other files by suffix, names that begin with a dot, broken links, and
            what a training wrote.
    """
    left_out = Counter() if left_out is None else left_out
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
        # entry.is_dir() and is_file() raise on a loop of links, os.path does not.
        elif os.path.isdir(entry.path) if link else entry.is_dir():
            folders += [entry.path] * (name not in SYSTEM_FOLDERS)
        elif suffix not in suffixes():
            left_out[suffix or "without suffix"] += 1
        elif of_run and name in RUN_PICTURES or suffix == ".npy" and f"{name}.json" in names:
            left_out["written by a run"] += 1  # an array with a .json is a teacher's cache
        elif not (os.path.isfile(entry.path) if link else entry.is_file()):
            left_out["broken links" if link else "special files"] += 1
        else:
            images.append(entry.path)
    return images, folders


def walk(folder: str | Path, left_out: Counter, seen: set[str] | None = None) -> Iterator[str]:
    """The images of a folder and of those below it. Links are followed, each folder is read once.

    Args:
        left_out: see `read_folder`. seen: the real paths of the folders that have been read.
    """
    inner, seen, real = seen is not None, set() if seen is None else seen, os.path.realpath(folder)
    if real in seen:
        return
    if inner and is_run(folder):  # no data, unless asked for by name
        left_out["written by a run"] += 1
        return
    seen.add(real)
    images, folders = read_folder(folder, left_out)
    yield from images
    for path in folders:
        yield from walk(path, left_out, seen)


def find_images(folder: Path, left_out: Counter | None = None) -> list[str]:
    """All images below a folder, sorted; a ValueError where there are none. See `walk`."""
    left_out = Counter() if left_out is None else left_out
    paths = sorted(walk(folder, left_out))
    if not paths:
        known = f"{' '.join(IMG_EXTENSIONS)} .npy and what else Pillow reads"
        remark = f"; left out: {describe_counts(left_out)}" if left_out else ""
        raise ValueError(f"no images under {folder}; looked for {known}{remark}")
    return paths


def has_images(folder: Path) -> bool:
    """Whether there are images below a folder, or it cannot be read."""
    try:
        return any(walk(folder, Counter()))
    except ValueError:
        return True


def sub_folders(folder: Path) -> list[Path]:
    """The sub-folders that may hold images: all but the output folders of trainings."""
    return [Path(path) for path in read_folder(folder)[1] if not is_run(path)]


def describe_counts(left_out: Counter, most: int = 8) -> str:
    """The largest counts in words, and the sum of the others: "3 hidden, 2 .txt, 1 others"."""
    largest = Counter(dict(sorted(left_out.items()))).most_common(most)
    others = left_out.total() - sum(count for _, count in largest)
    largest += [("others", others)] * bool(others)
    return ", ".join(f"{count} {kind}" for kind, count in largest)

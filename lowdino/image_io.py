"""One file becomes one uint8 image: any picture that Pillow reads, or an array of NumPy's.

Deep values are those of more than 8 bits.
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
    """How a file becomes an image."""

    channels: int = 3  # any picture becomes RGB (3) or grey (1); other numbers are the file's own
    # The deep values that become 0 and 255; None for 0 and 65535, of integers only.
    value_range: tuple[float, float] | None = None
    max_megapixels: float = 256.0  # larger images are refused; a JPEG counts as it is decoded

    def check_size(self, width: int, height: int) -> None:
        if width * height > 1e6 * (limit := self.max_megapixels):
            raise ValueError(f"{width} x {height} pixels are more than --max_megapixels {limit:g}")


RGB = PixelFormat()
SAMPLE = 200  # files at most that tell a range or statistics, evenly from first to last


def scale_to_8_bits(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Scale a range to 0..255 and clip; a ValueError where neither it nor the type says which."""
    if values.dtype == np.uint8:
        return np.array(values)
    if values.dtype == bool:
        return values * np.uint8(255)
    if value_range is None:
        hint = "give --value_range, or convert to 8 or 16 bits"
        if values.dtype.kind == "f":
            raise ValueError(f"floating-point values have no known range; {hint}")
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values {values.min()} to {values.max()} do not fit 16 bits; {hint}")
    low, high = value_range or (0, 65535)
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0).clip(0, 255).round().astype(np.uint8)


# -- One file --------------------------------------------------------------------------------------

# The turns that make a picture upright, by its EXIF orientation from 2 on; 1 is upright.
TURN_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {number: Image.Transpose[name] for number, name in enumerate(TURN_NAMES.split(), 2)}

# Pillow keeps the upper byte of 16-bit colours. Read with the other byte order, big (B) or little
# endian (L) or native (N), the same file gives the lower byte.
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
    return tile[3] if isinstance(tile[3], str) else tile[3][0]


def values_of_16_bits(path: str, image: Image.Image, raw: str) -> np.ndarray:
    """uint16 values of a picture of raw mode `raw`: (H, W, 3), or (H, W) for grey with alpha."""
    grey = raw == "LA;16B"  # the four bytes of a pixel are read as they are
    other = "RGBA" if grey else raw[:-1] + OTHER_ORDER[raw[-1]]
    with open_picture(path) as lower:
        lower.seek(image.tell())
        for i, tile in enumerate(lower.tile):  # plain tuples in older versions of Pillow
            mode = other if isinstance(tile[3], str) else (other, *tile[3][1:])
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


def picture_of_deep_values(values: np.ndarray, page: Image.Image, value_range) -> Image.Image:
    """A picture of 8 bits, with the page's alpha channel."""
    scaled = scale_to_8_bits(values, value_range)
    if getattr(page, "tag_v2", {}).get(262) == 0:  # a TIFF whose 0 is white
        scaled = 255 - scaled
    picture = Image.fromarray(scaled)
    if page.mode in ("RGBA", "LA"):
        picture.putalpha(page.getchannel("A"))
    elif isinstance(hole := page.info.get("transparency"), int | tuple):  # the transparent value
        same = (np.atleast_3d(values) == hole).all(axis=2)
        picture.putalpha(Image.fromarray(np.where(same, 0, 255).astype(np.uint8)))
    return picture


def pages(image: Image.Image, channels: int) -> Iterator[Image.Image]:
    """The first frame of a picture, or all frames where each is a channel."""
    grey = channels not in (1, 3) and len(image.getbands()) == 1
    for number in range(channels if grey and getattr(image, "n_frames", 1) == channels else 1):
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
    channels, value_range, _ = pixel_format
    layers = []
    with open_picture(path) as image:
        if max_side is not None:
            image.draft("RGB", (max_side, max_side))  # decodes at no smaller size
        pixel_format.check_size(*image.size)
        for page in pages(image, channels):
            values = deep_values_of_page(page, path)
            page.load()
            picture = page if values is None else picture_of_deep_values(values, page, value_range)
            turn = turn_of(page)  # after load(), because Pillow turns some TIFFs itself
            bands = layers_of_page(picture, channels)
            layers += bands if turn is None else [band.transpose(turn) for band in bands]
    if channels not in (1, 3) and len(layers) != channels:
        counts = f"it has {len(layers)} channels, and {channels} are wanted by --in_chans"
        raise ValueError(f"{counts} or the network: give .npy or a grey page per channel")
    return layers


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
    shape = values.shape
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"its shape {shape} is no image's: (H, W) or (H, W, C)")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"it holds {values.dtype}, where numbers were expected")
    values = np.atleast_3d(values)
    for count in (3, 1) if channels == 3 else (channels,):  # grey becomes RGB
        if count in (values.shape[2], values.shape[0]):
            return values if values.shape[2] == count else values.transpose(1, 2, 0)
    axis = f"axis of {channels} channels, first or last"
    raise ValueError(f"its shape {shape} has no {axis}, as --in_chans or the network wants")


def array_layers(path: str, max_side: int | None, pixel_format: PixelFormat) -> list[Image.Image]:
    """A grey picture of 8 bits per channel."""
    values = load_array(path, pixel_format.channels)
    height, width, count = values.shape
    pixel_format.check_size(width, height)
    bands = (scale_to_8_bits(values[..., i], pixel_format.value_range) for i in range(count))
    return list(map(Image.fromarray, bands)) * (pixel_format.channels // count)


def reduced(image: Image.Image, max_side: int) -> Image.Image:
    scale = max_side / min(image.size)
    size = [round(side * scale) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0) if scale < 1 else image


def read_image(path: str, max_side: int | None = None, pixel_format: PixelFormat = RGB) -> Tensor:
    """Decode a picture or a `.npy` file to (C, H, W) uint8; an ImageError where that fails.

    A picture is turned upright by its EXIF and laid on white. The first of several frames counts.
    Deep values are scaled, but 16-bit CMYK loses its lower bytes. Where C is neither 1 nor 3, the
    channels are a picture's bands, or its C grey pages. An array is grey (H, W), (H, W, C) or else
    (C, H, W); NaN becomes 0. A shorter side above `max_side` pixels is reduced to that; a JPEG is
    then decoded at 1/2, 1/4 or 1/8 of its size where that is enough.
    """
    with named_errors(path):
        layers = (array_layers if is_array(path) else picture_layers)(path, max_side, pixel_format)
        if max_side is not None:
            layers = [reduced(layer, max_side) for layer in layers]
        return torch.from_numpy(np.dstack(layers)).permute(2, 0, 1)


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
            layers = [deep_values_of_page(p, path) for p in pages(image, pixel_format.channels)]
            return None if layers[0] is None else np.dstack(layers)


def find_value_range(paths: Sequence[str], pixel_format: PixelFormat) -> tuple[float, float] | None:
    """The range of the deep values in a sample, without unreadable files; None without any.

    Integers from 0 to 65,535 have 0 to 2^n - 1, n from 8 to 16, since the brightest pixel of a dark
    sample is too low a limit. Floats within [0, 1] have that, all others their least and largest.
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
    """Mean and standard deviation by channel, in [0, 1], of a sample; without unreadable files."""
    count, total, squares = 0, 0.0, 0.0
    for path in paths[:: math.ceil(len(paths) / SAMPLE)]:
        with suppress(ImageError):
            values = read_image(path, max_side, pixel_format).flatten(1).double() / 255  # (C, H*W)
            count += values.shape[1]
            total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
    if not count:
        read_image(paths[0], max_side, pixel_format)  # raises its ImageError
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)  # never 0
    return tuple(mean.tolist()), tuple(std.tolist())


# -- Image files of a folder -----------------------------------------------------------------------

# Formats that Pillow only identifies, or reads by running another program.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Folders that systems put beside files.
SYSTEM_FOLDERS = {"$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"}
# The output folder of a training has args.json and one of RUN_FILES. Its pictures are no data.
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
    return exists("args.json") and any(map(exists, RUN_FILES))


def read_folder(folder: str | Path, left_out: Counter | None = None) -> tuple[list[str], list[str]]:
    """The images and sub-folders of a folder, sorted; `left_out` counts other files by reason."""
    left_out = Counter() if left_out is None else left_out
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
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
    """The images below a folder, links followed; `seen` has the real paths that were read."""
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
    if paths := sorted(walk(folder, left_out)):
        return paths
    remark = f"; left out: {describe_counts(left_out)}" if left_out else ""
    known = f"{' '.join(IMG_EXTENSIONS)} .npy and what else Pillow reads"
    raise ValueError(f"no images under {folder}; looked for {known}{remark}")


def has_images(folder: Path) -> bool:
    """Whether there are images below a folder, or it cannot be read."""
    with suppress(ValueError):
        return any(walk(folder, Counter()))
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

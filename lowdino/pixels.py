"""What the files of a data set hold: the range of their values, mean and std of their channels.

Values of more than 8 bits are scaled by the range that a sample has (of 12 bits 0 to 4095), which
the log says and backbone.pth keeps, or by --value_range. Where channels are not RGB, --in_chans,
their mean and std are computed and kept, and hue, saturation and grayscale are left out.
"""

import math

import numpy as np
from torch import nn

from lowdino import data, reading, sources

SAMPLE = 200  # files, evenly from first to last, that tell about all


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


def sample_of(images: data.ImageFiles) -> range:
    return range(0, len(images), math.ceil(len(images) / SAMPLE))


def find_range(images: data.ImageArray | data.ImageFiles) -> tuple[float, float] | None:
    """The range of values of more than 8 bits, by a sample; None where there are none.

    Whole numbers from 0 up to 65,535 get the range of their bits, 2^n - 1 with n from 8 to 16: of
    one image nearly all could be dark. Floating-point ones have [0, 1] where they are within it.
    All others have their minimum and maximum. Files that cannot be read are left out.
    """
    low, high, whole = math.inf, -math.inf, True
    for i in sample_of(images) if isinstance(images, data.ImageFiles) else ():
        try:
            values = reading.deep_values(images.paths[i], images.pixels)
        except reading.UserError:
            continue
        if values is None:
            continue
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            whole = whole and values.dtype.kind != "f"
    if high == -math.inf:
        return None
    if whole and 0 <= low and high < 2**16:
        return 0.0, 2.0 ** max(int(high).bit_length(), 8) - 1
    if not whole and 0 <= low and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def statistics(images: data.ImageFiles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of values in [0, 1], over a sample's pixels.

    Files that cannot be read are left out.

    Raises:
        UserError: where none can be read.
    """
    count, total, squares, unread = 0, 0.0, 0.0, None
    for i in sample_of(images):
        try:
            image = reading.read_image(images.paths[i], images.max_side, images.pixels)
        except reading.UserError as error:
            unread = error
            continue
        values = image.flatten(1).double() / 255  # (C, H * W)
        count += values.shape[1]
        total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
    if not count:
        raise unread
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    # A channel that is the same everywhere is divided by one level of 255.
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())


def read_as(source: sources.Data, **changes) -> None:
    """Change what the files of a source become, by the names of `reading.Pixels`.

    Raises:
        UserError: where the images are in memory, and of another number of channels.
    """
    for images in (source.pretrain, source.train, source.test):
        if isinstance(images, data.ImageFiles):
            images.pixels = images.pixels._replace(**changes)
        elif isinstance(images, data.ImageArray) and images.images.shape[1] != changes.get(
            "channels", 3
        ):
            own, wanted = images.images.shape[1], changes["channels"]
            raise UserError(f"{source.name}: it has {own} channels, and {wanted} are wanted")


def fit(args, backbone: nn.Module, source: sources.Data, saved: dict | None = None) -> str:
    """Settle how a training reads the files of `source` and normalises them; and what to say of it.

    The range is that of `args.value_range`, of the checkpoint `saved`, or what is found. A network
    whose mean and std are not known gets those of the images.

    Raises:
        UserError: where a range is given that no image needs, or none can be read.
    """
    if saved:
        backbone.mean, backbone.std = map(tuple, saved["normalisation"])
        # Before ranges were kept, there was one for all, which reading has by itself.
        value_range, how = args.value_range or saved.get("value_range"), "before"
    else:
        value_range, how = given_or_found(args, source.pretrain, source.name)
    said = read_range(backbone, source, value_range, how)
    if backbone.mean is None:
        backbone.mean, backbone.std = statistics(source.pretrain)
        if args.init:
            said += f"; the first layer of --init is adapted to {args.in_chans} channels"
    if args.in_chans != 3:
        mean, std = (" ".join(f"{v:.3f}" for v in vs) for vs in (backbone.mean, backbone.std))
        said += f"; mean {mean}, std {std}; no hue, saturation and grayscale"
    return said


def fit_evaluation(args, backbone: nn.Module, source: sources.Data) -> str:
    """As `fit`, of an evaluation: the range and the number of channels are the backbone's own."""
    found = range_of_evaluation(args, backbone, source.pretrain, source.name)
    return read_range(backbone, source, *found)


def with_range(
    args, backbone: nn.Module, name: str, paths: list[str], pixels: reading.Pixels
) -> tuple[reading.Pixels, str]:
    """As `fit_evaluation`, of the pictures at `paths` of a dense task.

    Args:
        name: of the data set, in words.

    Returns:
        `pixels` with the range, and what to say of it.
    """
    images = data.ImageFiles(paths)
    images.pixels = pixels
    value_range, how = range_of_evaluation(args, backbone, images, name)
    return pixels._replace(value_range=value_range), in_words(value_range, how)


def range_of_evaluation(
    args, backbone: nn.Module, images, name: str
) -> tuple[tuple[float, float] | None, str]:
    """The range that a flag gives, else the backbone's own, else that of a sample; and which."""
    own = getattr(backbone, "value_range", None)
    if own and not args.value_range:
        return own, "the backbone's"
    return given_or_found(args, images, name)


def given_or_found(args, images, name: str) -> tuple[tuple[float, float] | None, str]:
    """The range that a flag gives, else that of a sample of the images; and which of them it is.

    Raises:
        UserError: where a range is given that no image needs, with the `name` of the data set.
    """
    found = find_range(images)
    if args.value_range and not found:
        raise UserError(
            f"--value_range is of values of more than 8 bits, and {name} has none in a sample: "
            "leave it out"
        )
    return (args.value_range, "given") if args.value_range else (found, "found in a sample")


def read_range(backbone: nn.Module, source: sources.Data, value_range, how: str) -> str:
    """Read a source by a range, and keep that with the backbone; in words."""
    read_as(source, value_range=value_range)
    backbone.value_range = value_range
    return in_words(value_range, how)


def in_words(value_range: tuple[float, float] | None, how: str) -> str:
    if value_range is None:
        return ""
    low, high = value_range
    return f"; values {low:g} to {high:g} ({how}) become 0 to 255"

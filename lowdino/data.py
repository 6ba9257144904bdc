"""Images in one batch format: uint8 on a common canvas, decoded but not yet augmented.

Augmentation happens on the device. What one file becomes is in `reading.py`, and where files come
from in `sources.py`. Large images are reduced on reading: the shorter side to twice the crop's. Of
elongated ones, such as lines of text, a batch has a part at random, of twice the shorter side; an
evaluation sees the centre.
"""

import hashlib
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from lowdino import image_io
from lowdino.distributed import UserError
from lowdino.image_io import ImageError, PixelFormat, read_image, shorter_side

NO_LABEL = -1


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8, each in the top left corner of its canvas
    sizes: Tensor  # (B, 2) int64, height and width of each image
    labels: Tensor  # (B,) int64, NO_LABEL where there is none
    indices: Tensor  # (B,) int64, indices into the data set
    bad: Sequence[str] = ()  # one message for each unreadable image that another one replaces


# --------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------


class ImageArray(Dataset):
    """Images of one size in memory: (N, 3, S, S) uint8 and, where they have labels, (N,) int64.

    Args:
        view_side: smallest side that still shows their content, for `suitable_size`; None for S.
    """

    replace_bad = False  # there are none; see `ImageFiles`
    in_memory = True  # see `loader_processes`

    @property
    def no_processes(self) -> bool:
        """Images on a GPU are for this process alone, see `loader_processes`."""
        return self.images.device.type != "cpu"

    def __init__(self, images: Tensor, labels: Tensor | None = None, view_side: int | None = None):
        self.images = images
        self.view_side = view_side or images.shape[-1]
        self.labels = torch.full((len(images),), NO_LABEL) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index], int(self.labels[index]), index

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch in one step; the loader calls this where it exists."""
        i = torch.tensor(indices)
        # On a CPU index_select is four times as fast as images[i].
        images = self.images.index_select(0, i.to(self.images.device))
        return Batch(images, torch.full((len(i), 2), images.shape[-1]), self.labels[i], i)

    def shorter_side(self, index: int) -> int:
        return self.view_side

    def decoded_bytes(self) -> int:
        return self.images.numel()

    def fingerprint(self) -> str:
        """Count, side and a hash of the pixels of a thousand images."""
        some = self.images[:: max(len(self) // 1000, 1)]
        pixels = hashlib.sha256(some.numpy().tobytes()).hexdigest()[:12]
        return f"{len(self)} of {self.images.shape[-1]} px, pixels {pixels}"


class ImageFiles(Dataset):
    """Image files, decoded on access.

    With `replace_bad`, another image replaces one that cannot be read. The index of the bad image
    alone decides which, so the choice is the same for any number of loader processes and after a
    resume. Without it, reading raises a UserError.

    Args:
        paths: of the files. labels: a class for each, or None.
        max_side: larger images are reduced on reading, see `read_image`; None keeps all pixels.

    `pixels` says what the files' values become.
    """

    pixels = PixelFormat()
    replace_bad = False
    ATTEMPTS = 20

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int] | None = None, max_side: int | None = None
    ):
        self.paths = list(paths)
        self.labels = [NO_LABEL] * len(self.paths) if labels is None else list(labels)
        self.max_side = max_side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int, list[str]]:
        candidates = [index]
        if self.replace_bad:
            draws = np.random.SeedSequence([4, index]).generate_state(self.ATTEMPTS)
            candidates += [int(draw) % len(self) for draw in draws]
        bad: list[str] = []
        for i in candidates:
            try:
                return read_image(self.paths[i], self.max_side, self.pixels), self.labels[i], i, bad
            except ImageError as error:
                bad.append(str(error))
        raise UserError(bad[0])

    def fingerprint(self) -> str:
        """Count and a hash of the names relative to their common folder, which may be moved."""
        paths = [os.path.abspath(path) for path in self.paths]
        top = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = "\n".join(os.path.relpath(path, top) for path in paths)
        return f"{len(self)}, names {hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}"

    def shorter_side(self, index: int) -> int:
        """The smaller of height and width, from the file's header."""
        return shorter_side(self.paths[index], self.pixels)

    def decoded_bytes(self, sample: int = 32) -> int:
        """An estimate, from an even sample."""
        read = [self[i][0].numel() for i in range(0, len(self), max(len(self) // sample, 1))]
        return round(len(self) * sum(read) / len(read))


class CachedImages(Dataset):
    """The images of another data set, decoded once and kept on a device, each in its own size.

    Args:
        files: the data set, read at its present `max_side` and with its replacements.
        num_workers: loader processes that read it.
    """

    in_memory = no_processes = True  # see `loader_processes`

    def __init__(self, files: ImageFiles, device: torch.device, num_workers: int):
        self.paths = files.paths
        self.items: list[tuple[Tensor, int, int, list[str]]] = []
        loader = open_loader(files, num_workers, batch_size=64, collate_fn=pack)
        for pixels, shapes, *others in loader:
            # A copy, because a loader's process shares its memory for a while only.
            parts = pixels.to(device, copy=True).split([shape.numel() for shape in shapes])
            self.items += zip([part.view(shape) for part, shape in zip(parts, shapes)], *others)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int, list[str]]:
        return self.items[index]


def pack(items: list[tuple[Tensor, int, int, list[str]]]) -> tuple:
    """64 images as one tensor, which a loader's process sends faster than 64 tensors."""
    images, *others = zip(*items)
    pixels = torch.cat([image.flatten() for image in images])
    return pixels, [image.shape for image in images], *others


# What "auto" caches at most: this share of a GPU's memory, or this many bytes per rank on the host.
CACHE_SHARE, CACHE_BYTES = 0.25, 2 * 2**30


def where_to_cache(dataset: ImageArray | ImageFiles, device: torch.device) -> str:
    """The choice of "auto": the first of "device" (CUDA), "host" and "none" that has room."""
    size = dataset.decoded_bytes()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if size <= CACHE_SHARE * memory:
            return "device"
    return "host" if size <= CACHE_BYTES else "none"


def cached(
    dataset: ImageArray | ImageFiles, where: str, device: torch.device, num_workers: int
) -> ImageArray | ImageFiles | CachedImages:
    """The data set, decoded once and kept on the "device" or the "host", or as it is ("none")."""
    if isinstance(dataset, ImageArray):
        if where != "device":
            return dataset
        return ImageArray(dataset.images.to(device), dataset.labels, dataset.view_side)
    if where == "none":
        return dataset
    return CachedImages(dataset, device if where == "device" else torch.device("cpu"), num_workers)


def collate(items: Batch | list[tuple[Tensor, int, int, list[str]]]) -> Batch:
    """Images of any sizes on the smallest rectangle that holds them all: (B, C, H, W)."""
    if isinstance(items, Batch):
        return items
    images, labels, indices, bad = zip(*items)
    images = fit_canvas(images)
    sizes = torch.tensor([image.shape[1:] for image in images])  # (B, 2)
    if (sizes == sizes[0]).all():
        canvas = torch.stack(images)
    else:
        shape = len(images), len(images[0]), *sizes.amax(dim=0).tolist()
        canvas = torch.zeros(shape, dtype=torch.uint8, device=images[0].device)
        for corner, image in zip(canvas, images):
            corner[:, : image.shape[1], : image.shape[2]] = image
    return Batch(canvas, sizes, torch.tensor(labels), torch.tensor(indices), sum(bad, []))


# A canvas may have so many bytes, or sides of twice the longest of the images' shorter sides.
CANVAS_BYTES = 2**29


def fit_canvas(images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Reduce the longest images of a batch whose canvas would be larger than CANVAS_BYTES.

    Images keep their shorter side on reading, so a long row and a high column of text may need a
    canvas that is far larger than both.
    """
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)  # (B, 2)
    most = CANVAS_BYTES / (len(images) * len(images[0]))
    if sizes.amax(dim=0).prod() <= most:
        return images
    most = max(most, 4 * sizes.amin(dim=1).max() ** 2)
    longest = sizes.max()
    while True:
        scale = (longest / sizes.amax(dim=1, keepdim=True)).clamp(max=1)
        if (sizes * scale).amax(dim=0).prod() <= most:
            break
        longest *= 0.95
    fitting = (sizes * scale).floor().clamp(min=1).int().tolist()
    return [
        image if list(image.shape[1:]) == size else resized(image, size)
        for image, size in zip(images, fitting)
    ]


def resized(image: Tensor, size: list[int]) -> Tensor:
    """(C, H, W) uint8 -> (C, *size) uint8."""
    image = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return image.round_().clamp_(0, 255).to(torch.uint8)


def central_part(image: Tensor) -> Tensor:
    """The central square of (C, H, W), with another row or column where the rest is odd.

    So its centre is that of the whole, for `augment.central_boxes`.
    """
    side = min(image.shape[1:])
    (top, height), (left, width) = (
        ((whole - side) // 2, side + (whole - side) % 2) for whole in image.shape[1:]
    )
    return image[:, top : top + height, left : left + width]


def collate_centres(items: Batch | list[tuple[Tensor, int, int, list[str]]]) -> Batch:
    """As `collate`, of the images' central parts, which are all that an evaluation sees."""
    if isinstance(items, Batch):
        return items
    return collate([(central_part(image), *others) for image, *others in items])


def suitable_size(dataset: ImageArray | ImageFiles, sample: int = 256) -> int:
    """A side of the views that suits a data set: a multiple of 32 from 32 to 224 pixels.

    It is the median of the shorter side over an even sample, rounded down. Unreadable images of
    the sample are left out.
    """
    step = max(len(dataset) // sample, 1)
    sides, unread = [], None
    for i in range(0, len(dataset), step):
        try:
            sides.append(dataset.shorter_side(i))
        except ImageError as error:
            unread = error
    if not sides:
        raise UserError(str(unread))
    side = int(np.median(sides))
    return min(max(side // 32 * 32, 32), 224)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole(dataset: Dataset) -> Dataset:
    """The data set that a Subset, perhaps of a Subset, is of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def loader_processes(dataset: Dataset, asked: int | None) -> int:
    """Loader processes of this rank.

    None for a data set that says `no_processes`, whose images are cached or on a GPU. Else those
    asked for, else none for images `in_memory`, else as many as its cores, at most 10.
    """
    dataset = whole(dataset)
    if getattr(dataset, "no_processes", False):
        return 0
    if asked is not None:
        return asked
    if getattr(dataset, "in_memory", False):
        return 0
    return min(max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 10)


# --------------------------------------------------------------------------------------------------
# Loaders. The order is a function of (seed, epoch), so a checkpoint need not save it.
# --------------------------------------------------------------------------------------------------


class TrainingBatches(Sampler[list[int]]):
    """This rank's batches of a training from step `start` to step `stop`, across epochs.

    Step s takes global batch s mod steps_per_epoch of a permutation that (seed, epoch) determine.
    Images that do not fill an epoch's last batch are left out of that epoch. The global batch does
    not depend on how many ranks share it.

    Raises:
        UserError: where there are fewer images than one global batch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world
        self.steps_per_epoch = images // (batch_size * world)
        if self.steps_per_epoch == 0:
            raise UserError(f"{images} images are fewer than one batch of {world} x {batch_size}")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        shuffled, order = None, None  # the epoch that `order` belongs to
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                seed = np.random.SeedSequence([0, self.seed, epoch]).generate_state(1, np.uint64)[0]
                generator = torch.Generator().manual_seed(int(seed) >> 1)
                shuffled, order = epoch, torch.randperm(self.images, generator=generator)
            first = (i * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def leave_signals_to_parent(worker: int) -> None:
    """Let a loader's process survive a signal to the whole group, for the parent to save first.

    SIGTERM ends it after half a minute: a parent that exits sends one too, and waits for it.
    """
    if not hasattr(signal, "SIGALRM"):  # Windows
        return
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class ByPipe:
    """A tensor that a loader's process pickles, where torch would put it into shared memory."""

    def __init__(self, tensor: Tensor):
        self.array = tensor.numpy()

    def __reduce__(self):
        return torch.from_numpy, (self.array,)


class Piped:
    """A collate function whose tensors go through the pipe from a loader's process."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, items: list) -> Sequence:
        batch = self.function(items)
        parts = [ByPipe(part) if isinstance(part, Tensor) else part for part in batch]
        return Batch(*parts) if isinstance(batch, Batch) else tuple(parts)


# Where less of /dev/shm is free, it is left alone. Docker gives 64 MiB unless told otherwise.
LEAST_SHARED_MEMORY = 2**30
PIPES = (
    "/dev/shm is too small for the batches of the loader processes, which come through pipes, at "
    "some cost: docker run --shm-size 8g gives more, --num_workers 0 does without"
)


def lacks_shared_memory(dataset: Dataset, num_workers: int, batch_size: int) -> bool:
    """Whether /dev/shm is too small for the batches that loader processes have ready, two each.

    A process that fills it is killed, and the others wait for ever. Data sets that do not reduce
    images to their `max_side` say by `item_bytes` what one item has at most.
    """
    try:
        found = os.statvfs("/dev/shm")
    except (AttributeError, OSError):  # not on Linux
        return False
    dataset = whole(dataset)
    side = getattr(dataset, "max_side", None) or 512
    channels = getattr(dataset, "pixels", PixelFormat()).channels
    # Photographs of both orientations on a canvas have 3/2 of the shorter side both ways.
    item = getattr(dataset, "item_bytes", None) or channels * (1.5 * side) ** 2
    batch = batch_size * item
    free = found.f_bavail * found.f_frsize / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return num_workers > 0 and free < max((2 * num_workers + 1) * batch, LEAST_SHARED_MEMORY)


def open_loader(dataset: Dataset, num_workers: int, **options) -> DataLoader:
    """A loader with what all of them have in common; options are DataLoader's."""
    options = {"collate_fn": collate, "worker_init_fn": leave_signals_to_parent} | options
    batch = options.get("batch_size") or getattr(options["batch_sampler"], "batch_size", None)
    batch = batch or max(map(len, options["batch_sampler"]), default=0)  # a list of batches
    if lacks_shared_memory(dataset, num_workers, batch):
        options["collate_fn"] = Piped(options["collate_fn"])
    return DataLoader(dataset, num_workers=num_workers, **options)


def training_loader(
    dataset: Dataset, batches: TrainingBatches, num_workers: int, pin_memory: bool
) -> DataLoader:
    """The batches that a sampler names, decoded by `num_workers` processes."""
    num_workers = loader_processes(dataset, num_workers)
    return open_loader(dataset, num_workers, batch_sampler=batches, pin_memory=pin_memory)


def on_device(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with images and sizes on the device; on CUDA the next is copied ahead.

    Its copy runs in a stream of its own, while the device works on this batch.
    """

    def moved(batch: Batch) -> Batch:
        return batch._replace(
            images=batch.images.to(device, non_blocking=True),
            sizes=batch.sizes.to(device, non_blocking=True),
        )

    if device.type != "cuda":
        yield from map(moved, loader)
        return
    copies, ahead = torch.cuda.Stream(device), None
    for batch in loader:
        with torch.cuda.stream(copies):
            batch = moved(batch)
        if ahead is not None:
            yield ready(*ahead)
        ahead = batch, copies.record_event()
    if ahead is not None:
        yield ready(*ahead)


def ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Let the current stream wait for a batch's copy, and keep its memory until it is done."""
    here = torch.cuda.current_stream(batch.images.device)
    here.wait_event(copied)
    for tensor in (batch.images, batch.sizes):
        tensor.record_stream(here)
    return batch


def evaluation_loader(
    dataset: Dataset, batch_size: int, num_workers: int, rank: int = 0, world: int = 1
) -> DataLoader:
    """Batches in order, without repeats; each rank reads every world-th image, at least one."""
    if len(dataset) < world:
        raise UserError(
            f"{len(dataset)} images to evaluate are fewer than the {world} ranks; start fewer"
        )
    mine = Subset(dataset, range(rank, len(dataset), world))
    workers = loader_processes(dataset, num_workers)
    return open_loader(mine, workers, batch_size=batch_size, collate_fn=collate_centres)


# --------------------------------------------------------------------------------------------------
# Values and channels of files
# --------------------------------------------------------------------------------------------------

VALUE_SAMPLE = 200  # files, evenly from first to last, that tell about all


def sample_of(images: ImageFiles) -> range:
    return range(0, len(images), math.ceil(len(images) / VALUE_SAMPLE))


def find_value_range(images: ImageArray | ImageFiles) -> tuple[float, float] | None:
    """The range of values of more than 8 bits, by a sample; None where there are none.

    Whole numbers from 0 up to 65,535 get the range of their bits, 2^n - 1 with n from 8 to 16: of
    one image nearly all could be dark. Floating-point ones have [0, 1] where they are within it.
    All others have their minimum and maximum. Files that cannot be read are left out.
    """
    low, high, whole = math.inf, -math.inf, True
    for i in sample_of(images) if isinstance(images, ImageFiles) else ():
        try:
            values = image_io.deep_values(images.paths[i], images.pixels)
        except ImageError:
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


def channel_statistics(images: ImageFiles) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of values in [0, 1], over a sample's pixels.

    Files that cannot be read are left out.

    Raises:
        UserError: where none can be read.
    """
    count, total, squares, unread = 0, 0.0, 0.0, None
    for i in sample_of(images):
        try:
            image = image_io.read_image(images.paths[i], images.max_side, images.pixels)
        except ImageError as error:
            unread = error
            continue
        values = image.flatten(1).double() / 255  # (C, H * W)
        count += values.shape[1]
        total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
    if not count:
        raise UserError(str(unread))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    # A channel that is the same everywhere is divided by one level of 255.
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())


def read_as(source, **changes) -> None:
    """Change what the files of a source become, by the names of `image_io.PixelFormat`.

    Raises:
        UserError: where the images are in memory, and of another number of channels.
    """
    for images in (source.pretrain, source.train, source.test):
        if isinstance(images, ImageFiles):
            images.pixels = images.pixels._replace(**changes)
        elif isinstance(images, ImageArray) and images.images.shape[1] != changes.get(
            "channels", 3
        ):
            own, wanted = images.images.shape[1], changes["channels"]
            raise UserError(f"{source.name}: it has {own} channels, and {wanted} are wanted")


def fit_values(args, backbone: nn.Module, source, saved: dict | None = None) -> str:
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
        value_range, how = given_or_sampled_range(args, source.pretrain, source.name)
    said = set_value_range(backbone, source, value_range, how)
    if backbone.mean is None:
        backbone.mean, backbone.std = channel_statistics(source.pretrain)
        if args.init:
            said += f"; the first layer of --init is adapted to {args.in_chans} channels"
    if args.in_chans != 3:
        mean, std = (" ".join(f"{v:.3f}" for v in vs) for vs in (backbone.mean, backbone.std))
        said += f"; mean {mean}, std {std}; no hue, saturation and grayscale"
    return said


def fit_values_of_evaluation(args, backbone: nn.Module, source) -> str:
    """As `fit`, of an evaluation: the range and the number of channels are the backbone's own."""
    found = range_of_evaluation(args, backbone, source.pretrain, source.name)
    return set_value_range(backbone, source, *found)


def with_value_range(
    args, backbone: nn.Module, name: str, paths: list[str], pixels: image_io.PixelFormat
) -> tuple[image_io.PixelFormat, str]:
    """As `fit_evaluation`, of the pictures at `paths` of a dense task.

    Args:
        name: of the data set, in words.

    Returns:
        `pixels` with the range, and what to say of it.
    """
    images = ImageFiles(paths)
    images.pixels = pixels
    value_range, how = range_of_evaluation(args, backbone, images, name)
    return pixels._replace(value_range=value_range), range_in_words(value_range, how)


def range_of_evaluation(
    args, backbone: nn.Module, images, name: str
) -> tuple[tuple[float, float] | None, str]:
    """The range that a flag gives, else the backbone's own, else that of a sample; and which."""
    own = getattr(backbone, "value_range", None)
    if own and not args.value_range:
        return own, "the backbone's"
    return given_or_sampled_range(args, images, name)


def given_or_sampled_range(args, images, name: str) -> tuple[tuple[float, float] | None, str]:
    """The range that a flag gives, else that of a sample of the images; and which of them it is.

    Raises:
        UserError: where a range is given that no image needs, with the `name` of the data set.
    """
    found = find_value_range(images)
    if args.value_range and not found:
        raise UserError(
            f"--value_range is of values of more than 8 bits, and {name} has none in a sample: "
            "leave it out"
        )
    return (args.value_range, "given") if args.value_range else (found, "found in a sample")


def set_value_range(backbone: nn.Module, source, value_range, how: str) -> str:
    """Read a source by a range, and keep that with the backbone; in words."""
    read_as(source, value_range=value_range)
    backbone.value_range = value_range
    return range_in_words(value_range, how)


def range_in_words(value_range: tuple[float, float] | None, how: str) -> str:
    if value_range is None:
        return ""
    low, high = value_range
    return f"; values {low:g} to {high:g} ({how}) become 0 to 255"

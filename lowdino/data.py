"""Images in batches: uint8 on a common canvas, decoded but not yet augmented.

Here are the data sets (images in memory, in files, or cached), how their images form a batch, the
loaders, and how a network and its images agree on values. `image_io.py` reads one file, and
`datasets.py` knows where files come from. Augmentation happens later, on the device.

Large images are reduced on reading, the shorter side to twice the view's. Of an elongated image,
such as a line of text, training sees a random part, see `augment.windows`, and an evaluation the
centre.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from lowdino import image_io
from lowdino.augment import BLUR, JITTER, MultiCrop, seeded_generator
from lowdino.distributed import UserError, user_errors
from lowdino.image_io import RGB, ImageError, PixelFormat, read_image
from lowdino.schedules import Stream

NO_LABEL = -1

# One image: (C, H, W) uint8, its label and index, and messages on the images that it replaces.
Item = tuple[Tensor, int, int, list[str]]


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8, each in the top left corner of its canvas
    sizes: Tensor  # (B, 2) int64, height and width of each image
    labels: Tensor  # (B,) int64, NO_LABEL where there is none
    indices: Tensor  # (B,) int64, indices into the data set
    bad: Sequence[str] = ()  # a message for each unreadable image that another one replaces


# --------------------------------------------------------------------------------------------------
# Data sets. Those with `in_memory` need no loader processes; others may say by `item_bytes` how
# large an item can be.
# --------------------------------------------------------------------------------------------------


class ImageArray(Dataset):
    """Images of one size in memory: (N, 3, S, S) uint8 and, where they have labels, (N,) int64.

    Args:
        view_side: smallest side that still shows their content, for `suitable_size`; None for S.
    """

    in_memory = True
    replace_bad = False  # there are no bad ones; see `ImageFiles`

    def __init__(self, images: Tensor, labels: Tensor | None = None, view_side: int | None = None):
        self.images = images
        self.view_side = view_side or images.shape[-1]
        self.labels = torch.full((len(images),), NO_LABEL) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index], int(self.labels[index]), index

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch at once; a DataLoader calls this where it exists."""
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
        sample = self.images[:: max(len(self) // 1000, 1)]
        pixels = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:12]
        return f"{len(self)} of {self.images.shape[-1]} px, pixels {pixels}"


class ImageFiles(Dataset):
    """Image files, decoded on access.

    With `replace_bad`, another image replaces one that cannot be read. The index of the bad image
    alone decides which, so the choice is the same for any number of loader processes and after a
    resume. Without it, reading raises a UserError.

    Args:
        paths: of the files. labels: a class for each, or None.
        max_side: larger images are reduced on reading, see `read_image`; None keeps all pixels.
        pixel_format: what the files' values become.
    """

    replace_bad = False
    ATTEMPTS = 20

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None = None,
        max_side: int | None = None,
        pixel_format: PixelFormat = RGB,
    ):
        self.paths = list(paths)
        self.labels = [NO_LABEL] * len(self.paths) if labels is None else list(labels)
        self.max_side, self.pixel_format = max_side, pixel_format

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        candidates = [index]
        if self.replace_bad:
            seed = np.random.SeedSequence([Stream.REPLACEMENT, index])
            candidates += [int(draw) % len(self) for draw in seed.generate_state(self.ATTEMPTS)]
        bad: list[str] = []
        for i in candidates:
            try:
                image = read_image(self.paths[i], self.max_side, self.pixel_format)
                return image, self.labels[i], i, bad
            except ImageError as error:
                bad.append(str(error))
        raise UserError(bad[0])

    def shorter_side(self, index: int) -> int:
        return image_io.shorter_side(self.paths[index], self.pixel_format)

    @property
    def item_bytes(self) -> float:
        # Photographs of both orientations on a canvas have 3/2 of the shorter side both ways.
        return self.pixel_format.channels * (1.5 * (self.max_side or 512)) ** 2

    def decoded_bytes(self, sample: int = 32) -> int:
        """An estimate, from an even sample."""
        sizes = [self[i][0].numel() for i in range(0, len(self), max(len(self) // sample, 1))]
        return round(len(self) * sum(sizes) / len(sizes))

    def fingerprint(self) -> str:
        """Count and a hash of the names relative to their common folder, which may be moved."""
        paths = [os.path.abspath(path) for path in self.paths]
        top = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = "\n".join(os.path.relpath(path, top) for path in paths)
        return f"{len(self)}, names {hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}"


class CachedImages(Dataset):
    """The images of `ImageFiles`, decoded once and kept on a device, in their different sizes.

    Args:
        files: read at their present `max_side` and with their replacements.
        num_workers: loader processes that read them.
    """

    def __init__(self, files: ImageFiles, device: torch.device, num_workers: int):
        self.paths = files.paths
        self.items: list[Item] = []
        loader = open_loader(files, num_workers, batch_size=64, collate_fn=pack)
        for pixels, shapes, *others in loader:
            # A copy, because a loader process reuses its shared memory.
            parts = pixels.to(device, copy=True).split([shape.numel() for shape in shapes])
            self.items += zip([part.view(shape) for part, shape in zip(parts, shapes)], *others)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def pack(items: list[Item]) -> tuple:
    """Images as one tensor: a loader process sends 64 tensors three times slower."""
    images, *others = zip(*items)
    pixels = torch.cat([image.flatten() for image in images])
    return pixels, [image.shape for image in images], *others


# Limits of --cache auto: this share of a GPU's memory, or this many bytes per rank on the host.
CACHE_SHARE, CACHE_BYTES = 0.25, 2 * 2**30


def where_to_cache(dataset: ImageArray | ImageFiles, device: torch.device) -> str:
    """The choice of --cache auto: the first of "device" (CUDA), "host" and "none" with room."""
    size = dataset.decoded_bytes()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if size <= CACHE_SHARE * memory:
            return "device"
    return "host" if size <= CACHE_BYTES else "none"


def cached(
    dataset: ImageArray | ImageFiles, where: str, device: torch.device, num_workers: int
) -> ImageArray | ImageFiles | CachedImages:
    """The data set, decoded once and kept on the "device" or the "host"; unchanged for "none"."""
    if isinstance(dataset, ImageArray):
        if where != "device":
            return dataset
        return ImageArray(dataset.images.to(device), dataset.labels, dataset.view_side)
    if where == "none":
        return dataset
    return CachedImages(dataset, device if where == "device" else torch.device("cpu"), num_workers)


@user_errors()
def suitable_size(dataset: ImageArray | ImageFiles, sample: int = 256) -> int:
    """A side of the views that suits a data set: a multiple of 32 from 32 to 224 pixels.

    It is the median of the shorter sides of an even sample, rounded down. Unreadable images of the
    sample are left out; a UserError where all are.
    """
    sides = []
    for i in range(0, len(dataset), max(len(dataset) // sample, 1)):
        with suppress(ImageError):
            sides.append(dataset.shorter_side(i))
    side = np.median(sides or dataset.shorter_side(0))  # without sides, the first one's error
    return min(max(int(side) // 32 * 32, 32), 224)


# -- Canvas of a batch -----------------------------------------------------------------------------

# A canvas has at most this many bytes, or sides of twice the longest of the shorter sides.
CANVAS_BYTES = 2**29


def fit_canvas(images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Reduce the longest images of a batch whose canvas would be larger than CANVAS_BYTES.

    Images keep their shorter side on reading, so the canvas of a long row and a high column of text
    may be far larger than both.
    """
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)  # (B, 2)
    most = CANVAS_BYTES / (len(images) * len(images[0]))
    if sizes.amax(dim=0).prod() <= most:
        return images
    most = max(most, 4 * sizes.amin(dim=1).max() ** 2)
    sides, longest = sizes, sizes.max()
    while sides.amax(dim=0).prod() > most:
        longest *= 0.95
        sides = sizes * (longest / sizes.amax(dim=1, keepdim=True)).clamp(max=1)
    sides = sides.floor().clamp(min=1).int().tolist()
    return [
        image if list(image.shape[1:]) == size else resized(image, size)
        for image, size in zip(images, sides)
    ]


def resized(image: Tensor, size: list[int]) -> Tensor:
    """(C, H, W) uint8 -> (C, *size) uint8."""
    image = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return image.round_().clamp_(0, 255).to(torch.uint8)


def central_part(image: Tensor) -> Tensor:
    """The central square of (C, H, W), all that an evaluation sees.

    It has one more row or column where the margins are odd, so that its centre, as
    `augment.central_boxes` rounds it, is the image's.
    """
    side = min(image.shape[1:])
    (top, height), (left, width) = (
        ((length - side) // 2, side + (length - side) % 2) for length in image.shape[1:]
    )
    return image[:, top : top + height, left : left + width]


def collate(items: Batch | list[Item], part: Callable[[Tensor], Tensor] | None = None) -> Batch:
    """Images of any sizes, or a `part` of each, on the smallest rectangle that holds them all."""
    if isinstance(items, Batch):
        return items
    images, labels, indices, bad = zip(*items)
    images = fit_canvas([part(image) for image in images] if part else images)
    sizes = torch.tensor([image.shape[1:] for image in images])  # (B, 2)
    if (sizes == sizes[0]).all():
        canvas = torch.stack(images)
    else:
        shape = len(images), len(images[0]), *sizes.amax(dim=0).tolist()
        canvas = torch.zeros(shape, dtype=torch.uint8, device=images[0].device)
        for corner, image in zip(canvas, images):
            corner[:, : image.shape[1], : image.shape[2]] = image
    return Batch(canvas, sizes, torch.tensor(labels), torch.tensor(indices), sum(bad, []))


# -- Loaders ---------------------------------------------------------------------------------------


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_subsets(dataset: Dataset) -> Dataset:
    """The data set below a Subset, or below a Subset of a Subset."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def loader_processes(dataset: Dataset, asked: int | None) -> int:
    """Loader processes of this rank.

    None for cached images and images on a GPU, which other processes cannot share. Else those
    asked for; by default none for images in memory, and for files one per core, at most 10.
    """
    dataset = without_subsets(dataset)
    on_gpu = isinstance(dataset, ImageArray) and dataset.images.device.type != "cpu"
    if on_gpu or isinstance(dataset, CachedImages):
        return 0
    if asked is None and getattr(dataset, "in_memory", False):
        return 0
    per_rank = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(per_rank, 1), 10) if asked is None else asked


# Where less of /dev/shm is free, loader processes do not use it. Docker's default is 64 MiB.
LEAST_SHARED_MEMORY = 2**30
PIPES = (
    "/dev/shm is too small for the batches of the loader processes, which now come through slower "
    "pipes; docker run --shm-size 8g makes it larger, --num_workers 0 does without it"
)


def lacks_shared_memory(dataset: Dataset, num_workers: int, batch_size: int) -> bool:
    """Whether /dev/shm is too small for the two batches that each loader process has ready.

    A process that fills it is killed, and the others wait for ever.
    """
    try:
        disk = os.statvfs("/dev/shm")
    except (AttributeError, OSError):  # not on Linux
        return False
    free = disk.f_bavail * disk.f_frsize / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batch = batch_size * getattr(without_subsets(dataset), "item_bytes", 2**21)
    return num_workers > 0 and free < max((2 * num_workers + 1) * batch, LEAST_SHARED_MEMORY)


def start_worker(worker: int) -> None:
    """Let a loader process survive a signal to all processes, so that its parent can save first.

    SIGTERM ends it after half a minute: a parent that exits sends one too, and waits for it.
    """
    if not hasattr(signal, "SIGALRM"):  # Windows
        return
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def start_worker_with_pipe(worker: int) -> None:
    """As `start_worker`, and pickle tensors by their values, not as names in shared memory."""
    start_worker(worker)
    ForkingPickler.register(Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))


def open_loader(dataset: Dataset, num_workers: int | None, **options) -> DataLoader:
    """A DataLoader with the settings that all loaders share; options are DataLoader's."""
    num_workers = loader_processes(dataset, num_workers)
    options = {"collate_fn": collate} | options
    batch_size = options.get("batch_size") or getattr(options["batch_sampler"], "batch_size", None)
    batch_size = batch_size or max(map(len, options["batch_sampler"]), default=0)  # of a list
    by_pipe = lacks_shared_memory(dataset, num_workers, batch_size)
    start = start_worker_with_pipe if by_pipe else start_worker
    return DataLoader(dataset, num_workers=num_workers, worker_init_fn=start, **options)


@dataclass(eq=False)
class TrainingBatches(Sampler[list[int]]):
    """This rank's batches of a training from step `start` to step `stop`, across epochs.

    Step s takes global batch s mod steps_per_epoch of a permutation that (seed, epoch) determine,
    so a checkpoint need not save the order. Images that do not fill an epoch's last batch are left
    out of that epoch. The global batch does not depend on how many ranks share it.

    Raises:
        UserError: where there are fewer images than one global batch.
    """

    images: int
    batch_size: int  # per rank
    seed: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        self.steps_per_epoch = self.images // (self.batch_size * self.world)
        if self.steps_per_epoch == 0:
            one = f"{self.world} x {self.batch_size}"
            raise UserError(f"{self.images} images are fewer than one batch of {one}")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        shuffled, order = None, None  # an epoch, and the order of its images
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                generator = seeded_generator("cpu", Stream.ORDER, self.seed, epoch)
                shuffled, order = epoch, torch.randperm(self.images, generator=generator)
            first = (i * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def training_loader(
    dataset: Dataset, batches: TrainingBatches, num_workers: int | None, pin_memory: bool
) -> DataLoader:
    """The batches that a sampler names."""
    return open_loader(dataset, num_workers, batch_sampler=batches, pin_memory=pin_memory)


def evaluation_loader(
    dataset: Dataset, batch_size: int, num_workers: int | None, rank: int = 0, world: int = 1
) -> DataLoader:
    """The central parts of the images in order; each rank reads every world-th, at least one."""
    if len(dataset) < world:
        raise UserError(
            f"{len(dataset)} images to evaluate are fewer than the {world} ranks; start fewer"
        )
    share = Subset(dataset, range(rank, len(dataset), world))
    centres = partial(collate, part=central_part)
    return open_loader(share, num_workers, batch_size=batch_size, collate_fn=centres)


def on_device(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with images and sizes on the device; from pinned memory without waiting for them."""
    for batch in loader:
        images, sizes = (v.to(device, non_blocking=True) for v in (batch.images, batch.sizes))
        yield batch._replace(images=images, sizes=sizes)


# -- Value range: the deep values of files that become 0 and 255, see `image_io.PixelFormat` -------


def describe_value_range(value_range: Sequence[float] | None, origin: str) -> str:
    """A remark for the log, empty without a range."""
    text = "; values {:g} to {:g} ({}) become 0 to 255"
    return text.format(*value_range, origin) if value_range else ""


def choose_value_range(
    images: ImageArray | ImageFiles,
    name: str,
    given: Sequence[float] | None,
    known: Sequence[float] | None = None,
) -> tuple[Sequence[float] | None, str]:
    """The given range, else the known one, else that of a sample; and a remark for the log.

    Args:
        name: of the data set, in words.
        given: by --value_range. known: the backbone's.

    Raises:
        UserError: where a range is given, and no image of the sample needs one.
    """
    if known and not given:
        return known, describe_value_range(known, "the backbone's")
    files = isinstance(images, ImageFiles)
    sampled = image_io.find_value_range(images.paths, images.pixel_format) if files else None
    if given and not sampled:
        raise UserError(
            f"--value_range is of values of more than 8 bits, and {name} has none in a sample: "
            "leave it out"
        )
    if given:
        return given, describe_value_range(given, "given")
    return sampled, describe_value_range(sampled, "found in a sample")


@user_errors()
def fit_backbone_to_images(args, backbone: nn.Module, source, saved: dict | None = None) -> str:
    """Set the value range of a training's images and the backbone's mean and std.

    The range is that of --value_range, else of the checkpoint `saved`, else of a sample. Mean and
    std are those of `saved`, or of a sample where the backbone has none. Returns a remark for the
    log.

    Raises:
        UserError: where a range is given that no image needs, or no image can be read.
    """
    images = source.pretrain
    if saved:
        backbone.mean, backbone.std = map(tuple, saved["normalisation"])
        value_range = args.value_range or saved.get("value_range")
        remark = describe_value_range(value_range, "before")
    else:
        value_range, remark = choose_value_range(images, source.name, args.value_range)
    source.set_pixel_format(value_range=value_range)
    backbone.value_range = value_range
    if backbone.mean is None:
        how = images.max_side, images.pixel_format
        backbone.mean, backbone.std = image_io.channel_statistics(images.paths, *how)
        if args.init:
            remark += f"; the first layer of --init is adapted to {args.in_chans} channels"
    if args.in_chans != 3:
        mean, std = (" ".join(f"{v:.3f}" for v in vs) for vs in (backbone.mean, backbone.std))
        remark += f"; mean {mean}, std {std}; no hue, saturation and grayscale"
    return remark


def fit_images_to_backbone(args, backbone: nn.Module, source) -> str:
    """Set the value range of an evaluation's images: by the flag, the backbone or a sample.

    Returns a remark for the log.
    """
    known = getattr(backbone, "value_range", None)
    chosen, remark = choose_value_range(source.pretrain, source.name, args.value_range, known)
    source.set_pixel_format(value_range=chosen)
    backbone.value_range = chosen
    return remark


# -- Views -----------------------------------------------------------------------------------------


def build_views(s, backbone: nn.Module) -> MultiCrop:
    """The views that settings ask for, normalised as the backbone expects."""
    return MultiCrop(
        s.global_crops_size,
        s.local_crops_size,
        s.local_crops_number,
        s.global_crops_scale,
        s.local_crops_scale,
        s.vertical_flip,
        # DINO blurs by up to 2 pixels at 224. Smaller views get less in proportion, or the blur
        # would erase them.
        blur_sigma=(0.1, 2 * s.global_crops_size / 224),
        mean=backbone.mean,
        std=backbone.std,
        jitter=tuple(s.jitter * strength for strength in JITTER),
        blur=tuple(s.blur * probability for probability in BLUR),
        solarize=s.solarize,
        global_number=s.global_crops_number,
        grayscale=s.grayscale,
    )

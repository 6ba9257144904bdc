"""Images in batches: uint8 on a common canvas, decoded but not yet augmented.

Large images are reduced on reading, the shorter side to twice the view's. Of a long image, such as
a line of text, training sees a random part (`augment.windows`), an evaluation the centre.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
Range = Sequence[float] | None
# One image: (C, H, W) uint8, its label and index, and messages on the images that it replaces.
Item = tuple[Tensor, int, int, list[str]]


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8, each in the top left corner of its canvas
    sizes: Tensor  # (B, 2) int64, height and width of each image
    labels: Tensor  # (B,) int64, NO_LABEL where there is none
    indices: Tensor  # (B,) int64, indices into the data set
    bad: Sequence[str] = ()  # a message for each unreadable image that another one replaces


class ImageArray(Dataset):
    """Images of one size in memory: (N, 3, S, S) uint8 and, where they have labels, (N,) int64."""

    in_memory = True  # needs no loader processes
    replace_bad = False  # there are no bad ones; see `ImageFiles`

    def __init__(self, images: Tensor, labels: Tensor | None = None, view_side: int | None = None):
        self.images = images
        self.view_side = view_side or images.shape[-1]  # the least that still shows their content
        self.labels = torch.full((len(images),), NO_LABEL) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index], int(self.labels[index]), index

    def __getitems__(self, indices: list[int]) -> Batch:
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


@dataclass(eq=False)
class ImageFiles(Dataset):
    """Image files, decoded on access by `read_image`.

    With `replace_bad`, another image replaces one that cannot be read. The bad one's index alone
    decides which, so that a resume does not change it. Else reading raises a UserError.
    """

    paths: Sequence[str]
    labels: Sequence[int] | None = None  # a class for each
    max_side: int | None = None  # larger images are reduced on reading; None keeps all pixels
    pixel_format: PixelFormat = RGB

    replace_bad = False
    ATTEMPTS = 20

    def __post_init__(self):
        self.paths = list(self.paths)
        self.labels = [NO_LABEL] * len(self) if self.labels is None else list(self.labels)

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


class CachedImages(list[Item]):
    """The images of files as they are read now, kept on a device, in their different sizes."""

    def __init__(self, files: ImageFiles, device: torch.device, num_workers: int):
        super().__init__()
        self.paths = files.paths
        loader = open_loader(files, num_workers, batch_size=64, collate_fn=pack)
        for pixels, shapes, *others in loader:
            # A copy, because a loader process reuses its shared memory.
            parts = pixels.to(device, copy=True).split([shape.numel() for shape in shapes])
            self.extend(zip(map(Tensor.view, parts, shapes), *others))


def pack(items: list[Item]) -> tuple:
    """Images as one tensor: a loader process sends 64 tensors three times slower."""
    images, *others = zip(*items)
    pixels = torch.cat([image.flatten() for image in images])
    return pixels, [image.shape for image in images], *others


Images = ImageArray | ImageFiles
# Limits of --cache auto: this share of a GPU's memory, or this many bytes per rank on the host.
CACHE_SHARE, CACHE_BYTES = 0.25, 2 * 2**30


def where_to_cache(dataset: Images, device: torch.device) -> str:
    """The choice of --cache auto: the first of "device" (CUDA), "host" and "none" with room."""
    size, cuda = dataset.decoded_bytes(), device.type == "cuda"
    if cuda and size <= CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory:
        return "device"
    return "host" if size <= CACHE_BYTES else "none"


def cached(dataset: Images, where: str, device: torch.device, workers: int | None) -> Images | list:
    """The data set, decoded once and kept on the "device" or the "host"; unchanged for "none"."""
    if where == "none" or where == "host" and isinstance(dataset, ImageArray):
        return dataset
    if isinstance(dataset, ImageArray):
        return ImageArray(dataset.images.to(device), dataset.labels, dataset.view_side)
    return CachedImages(dataset, device if where == "device" else torch.device("cpu"), workers)


@user_errors()
def suitable_size(dataset: Images, sample: int = 256) -> int:
    """A side of views that suits a data set: a multiple of 32 from 32 to 224 pixels.

    It is the median shorter side of an even sample, rounded down; a UserError where none is read.
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
    """Reduce the longest images where a long row and a high column exceed CANVAS_BYTES together."""
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)  # (B, 2)
    most = CANVAS_BYTES / (len(images) * len(images[0]))
    if sizes.amax(dim=0).prod() <= most:
        return images
    most = max(most, 4 * sizes.amin(dim=1).max() ** 2)
    sides, longest = sizes, sizes.max()
    while sides.amax(dim=0).prod() > most:
        longest *= 0.95
        sides = sizes * (longest / sizes.amax(dim=1, keepdim=True)).clamp(max=1)
    return list(map(resized, images, sides.floor().clamp(min=1).int().tolist()))


def resized(image: Tensor, size: list[int]) -> Tensor:
    """(C, H, W) uint8 -> (C, *size) uint8."""
    if list(image.shape[1:]) == size:
        return image
    image = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return image.round_().clamp_(0, 255).to(torch.uint8)


def central_part(image: Tensor) -> Tensor:
    """The central square of (C, H, W), all that an evaluation sees."""
    # Where margins are odd it is a pixel longer, to have the centre of `augment.central_boxes`.
    margins = [length - min(image.shape[1:]) for length in image.shape[1:]]
    rows, columns = (slice(m // 2, -(m // 2) or None) for m in margins)
    return image[:, rows, columns]


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
        canvas = images[0].new_zeros(len(images), len(images[0]), *sizes.amax(dim=0).tolist())
        for corner, image in zip(canvas, images):
            corner[:, : image.shape[1], : image.shape[2]] = image
    return Batch(canvas, sizes, torch.tensor(labels), torch.tensor(indices), sum(bad, []))


# -- Loaders ---------------------------------------------------------------------------------------


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_subsets(dataset: Dataset) -> Dataset:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def loader_processes(dataset: Dataset, asked: int | None) -> int:
    """Loader processes of this rank.

    Cached images and images on a GPU, which processes cannot share, have none, nor has a machine
    without shared memory. Others have those asked for; by default images in memory have none, and
    files one per core, at most 10.
    """
    dataset = without_subsets(dataset)
    on_gpu = isinstance(dataset, ImageArray) and dataset.images.device.type != "cpu"
    in_memory = asked is None and getattr(dataset, "in_memory", False)
    if on_gpu or in_memory or isinstance(dataset, CachedImages) or lacks_shared_memory():
        return 0
    per_rank = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(per_rank, 1), 10) if asked is None else asked


LEAST_SHARED_MEMORY = 2**30  # bytes per rank; Docker's default is 64 MiB of all ranks
NO_WORKERS = (
    "/dev/shm is too small for the batches of loader processes, so there are none: "
    "docker run --shm-size 8g makes it larger"
)


def lacks_shared_memory() -> bool:
    """Whether /dev/shm, which kills a process that fills it, is too small for loader processes."""
    try:
        disk = os.statvfs("/dev/shm")
    except (AttributeError, OSError):  # not on Linux
        return False
    free = disk.f_bavail * disk.f_frsize / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free < LEAST_SHARED_MEMORY


def start_worker(worker: int) -> None:
    """Let a loader process survive signals to all, so that its parent can save first."""
    if not hasattr(signal, "SIGALRM"):  # Windows
        return
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # It still ends, half a minute later: a parent that exits sends SIGTERM too, and waits for it.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def open_loader(dataset: Dataset, num_workers: int | None, **options) -> DataLoader:
    """A DataLoader with the settings that all loaders share; options are DataLoader's."""
    num_workers, options = loader_processes(dataset, num_workers), {"collate_fn": collate} | options
    return DataLoader(dataset, num_workers=num_workers, worker_init_fn=start_worker, **options)


@dataclass(eq=False)
class TrainingBatches(Sampler[list[int]]):
    """This rank's batches of a training from step `start` to step `stop`, across epochs.

    Step s takes global batch s mod steps_per_epoch of a permutation that (seed, epoch) determine,
    so a checkpoint need not save the order. Images beyond an epoch's last full batch are left out;
    a UserError where there is none. A global batch does not depend on how many ranks share it.
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
            batch = f"one batch of {self.world} x {self.batch_size}"
            raise UserError(f"{self.images} images are fewer than {batch}")

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


def evaluation_loader(
    dataset: Dataset, batch_size: int, num_workers: int | None, rank: int = 0, world: int = 1
) -> DataLoader:
    """The central parts of the images in order; each rank reads every world-th, at least one."""
    if len(dataset) < world:
        counts = f"{len(dataset)} images to evaluate are fewer than the {world} ranks"
        raise UserError(f"{counts}; start fewer")
    share = Subset(dataset, range(rank, len(dataset), world))
    centres = partial(collate, part=central_part)
    return open_loader(share, num_workers, batch_size=batch_size, collate_fn=centres)


def on_device(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Move images and sizes to the device; from pinned memory without waiting for them."""
    for batch in loader:
        images, sizes = (v.to(device, non_blocking=True) for v in (batch.images, batch.sizes))
        yield batch._replace(images=images, sizes=sizes)


# -- Value range: the deep values of files that become 0 and 255, see `image_io.PixelFormat` -------


def describe_value_range(limits: Range, origin: str) -> str:
    """A remark for the log, empty without a range."""
    return "; values {:g} to {:g} ({}) become 0 to 255".format(*limits, origin) if limits else ""


def choose_value_range(
    images: Images, name: str, given: Range, known: Range = None
) -> tuple[Range, str]:
    """The `given` range, else the `known` one of the backbone, else a sample's; a remark on it.

    A UserError where a range is given, and no image of the sample needs one; `name` is their set's.
    """
    if known and not given:
        return known, describe_value_range(known, "the backbone's")
    files = isinstance(images, ImageFiles)
    sampled = image_io.find_value_range(images.paths, images.pixel_format) if files else None
    if given and not sampled:
        lacking = f"and {name} has none in a sample: leave it out"
        raise UserError(f"--value_range is of values of more than 8 bits, {lacking}")
    origin = "given" if given else "found in a sample"
    return given or sampled, describe_value_range(given or sampled, origin)


@user_errors()
def fit_backbone_to_images(args, backbone: nn.Module, source, saved: dict | None = None) -> str:
    """Set the value range of a training's images and the backbone's mean and std; a remark on them.

    The range is --value_range's, else that of the checkpoint `saved`, else a sample's; mean and std
    are those of `saved`, or a sample's where the backbone has none.
    """
    images, value_range = source.pretrain, args.value_range
    if saved:
        backbone.mean, backbone.std = map(tuple, saved["normalisation"])
        value_range = value_range or saved.get("value_range")
        remark = describe_value_range(value_range, "before")
    else:
        value_range, remark = choose_value_range(images, source.name, value_range)
    source.set_pixel_format(value_range=value_range)
    backbone.value_range = value_range
    if backbone.mean is None:
        files = images.paths, images.max_side, images.pixel_format
        backbone.mean, backbone.std = image_io.channel_statistics(*files)
        if args.init:
            remark += f"; the first layer of --init is adapted to {args.in_chans} channels"
    if args.in_chans != 3:
        mean, std = (" ".join(f"{v:.3f}" for v in vs) for vs in (backbone.mean, backbone.std))
        remark += f"; mean {mean}, std {std}; no hue, saturation and grayscale"
    return remark


def fit_images_to_backbone(args, backbone: nn.Module, source) -> str:
    """Set the value range of an evaluation's images, see `choose_value_range`; a remark on it."""
    known = getattr(backbone, "value_range", None)
    chosen, remark = choose_value_range(source.pretrain, source.name, args.value_range, known)
    source.set_pixel_format(value_range=chosen)
    backbone.value_range = chosen
    return remark


def build_views(s, backbone: nn.Module) -> MultiCrop:
    """The views that settings ask for, normalised as the backbone expects."""
    sizes = s.global_crops_size, s.local_crops_size, s.local_crops_number
    scales = s.global_crops_scale, s.local_crops_scale
    return MultiCrop(
        *sizes,
        *scales,
        vertical_flip=s.vertical_flip,
        jitter=tuple(s.jitter * strength for strength in JITTER),
        blur=tuple(s.blur * probability for probability in BLUR),
        # Smaller views get less than DINO's 2 pixels at 224 in proportion, or it would erase them.
        blur_sigma=(0.1, 2 * s.global_crops_size / 224),
        solarize=s.solarize,
        grayscale=s.grayscale,
        global_number=s.global_crops_number,
        mean=backbone.mean,
        std=backbone.std,
    )

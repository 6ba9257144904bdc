"""Images in one batch format: uint8 on a common canvas, decoded but not yet augmented.

Augmentation happens on the device. Sources: a folder (with or without class sub-folders), a text
file of paths, and torchvision's CIFAR-10, CIFAR-100 and STL-10.
"""

import hashlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

NO_LABEL = -1


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) uint8, each in the top left corner of its canvas
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
    """

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
                return read_image(self.paths[i], self.max_side), self.labels[i], i, bad
            except UserError as error:
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
        try:
            with Image.open(self.paths[index]) as image:
                return min(image.size)
        except Exception as error:  # as in `read_image`
            raise UserError(f"cannot read image {self.paths[index]}: {error}") from error

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


def read_image(path: str, max_side: int | None = None) -> Tensor:
    """Decode any Pillow image to (3, H, W) uint8 RGB; 16-bit grey is scaled, alpha is dropped.

    Args:
        max_side: reduce the shorter side to at most this many pixels, the longer to twice as many.

    Raises:
        UserError: naming the file, where it cannot be read or its values have no known range.
    """
    try:
        with Image.open(path) as image:
            if max_side is not None:
                # JPEG only: decodes at 1/2, 1/4 or 1/8 of the size, but not below max_side.
                image.draft("RGB", (max_side, max_side))
            image.load()
            image = eight_bits(image).convert("RGB")
            if max_side is not None:
                scale = min(max_side / min(image.size), 2 * max_side / max(image.size))
                if scale < 1:
                    smaller = [max(round(side * scale), 1) for side in image.size]
                    image = image.resize(smaller, Image.Resampling.BICUBIC, reducing_gap=2.0)
    except Exception as error:  # on a damaged file Pillow's decoders raise any kind of exception
        raise UserError(f"cannot read image {path}: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; an image of other modes as it is."""
    if image.mode == "F":
        raise UserError(
            "floating-point values have no known range; convert it to 8 or 16 bits first"
        )
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)  # of 16 bits, or of 32 that should fit 16
    if values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"values {values.min()} to {values.max()} do not fit 16 bits; convert it first"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))


def collate(items: Batch | list[tuple[Tensor, int, int, list[str]]]) -> Batch:
    """Images of any sizes on the smallest rectangle that holds them all: (B, 3, H, W)."""
    if isinstance(items, Batch):
        return items
    images, labels, indices, bad = zip(*items)
    sizes = torch.tensor([image.shape[1:] for image in images])  # (B, 2)
    if (sizes == sizes[0]).all():
        canvas = torch.stack(images)
    else:
        height, width = sizes.amax(dim=0).tolist()
        device = images[0].device
        canvas = torch.zeros(len(images), 3, height, width, dtype=torch.uint8, device=device)
        for corner, image in zip(canvas, images):
            corner[:, : image.shape[1], : image.shape[2]] = image
    return Batch(canvas, sizes, torch.tensor(labels), torch.tensor(indices), sum(bad, []))


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
        except UserError as error:
            unread = error
    if not sides:
        raise unread
    side = int(np.median(sides))
    return min(max(side // 32 * 32, 32), 224)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(dataset: Dataset) -> int:
    """Loader processes of this rank: 0 for images in memory, else its cores, at most 10."""
    if isinstance(dataset, ImageArray):
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


def processes(dataset: Dataset, num_workers: int) -> int:
    """Loader processes: 0 for cached images and for images on a GPU, else `num_workers`."""
    on_gpu = isinstance(dataset, ImageArray) and dataset.images.device.type != "cpu"
    return 0 if isinstance(dataset, CachedImages) or on_gpu else num_workers


def open_loader(dataset: Dataset, num_workers: int, **options) -> DataLoader:
    """A loader with what all of them have in common."""
    options = {"collate_fn": collate, "worker_init_fn": leave_signals_to_parent} | options
    return DataLoader(dataset, num_workers=num_workers, **options)


def training_loader(
    dataset: Dataset, batches: TrainingBatches, num_workers: int, pin_memory: bool
) -> DataLoader:
    """The batches that a sampler names, decoded by `num_workers` processes."""
    num_workers = processes(dataset, num_workers)
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
    mine = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    return open_loader(mine, processes(dataset, num_workers), batch_size=batch_size)


# --------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a source holds.

    Attributes:
        name: in words, for the log.
        pretrain: all images to learn from; labels are not used.
        train, test: labelled images, the memory and the queries of k-NN; None where there are none.
        classes: number of labels; 0 without them.
    """

    name: str
    pretrain: ImageArray | ImageFiles
    train: ImageArray | ImageFiles | None = None
    test: ImageArray | ImageFiles | None = None
    classes: int = 0

    def limit_side(self, max_side: int) -> None:
        """Reduce large files on reading; see `read_image`."""
        for images in (self.pretrain, self.train, self.test):
            if isinstance(images, ImageFiles):
                images.max_side = max_side


def load(source: str, root: str = "data", download: bool = False) -> Data:
    """Open a source by name.

    Args:
        source: "cifar10", "cifar100" or "stl10", stored under `root`; a text file, see
            `load_listing`; or a folder, see `load_folder`.
        download: fetch one of torchvision's data sets where `root` lacks it.

    Raises:
        UserError: in one sentence, where there is nothing to read.
    """
    if source in TORCHVISION:
        return load_torchvision(source, root, download)
    path = Path(source)
    if path.is_file():
        return load_listing(path)
    if source and path.is_dir():  # Path("") would be the current folder
        return load_folder(path)
    raise UserError(
        f"no data at {source or 'an empty path'}: give a folder, a text file of paths, "
        "demo, cifar10, cifar100 or stl10"
    )


def load_listing(listing: Path) -> Data:
    """The images named in a text file, one a line, relative to the file's own folder."""
    try:
        lines = [line.strip() for line in listing.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{listing} is not a text file; give a folder of images, or a list of paths"
        ) from error
    paths = [str(listing.parent / line) for line in lines if line]
    if not paths:
        raise UserError(f"{listing} has no lines; it should name one image a line")
    missing = next((p for p in paths if not os.path.isfile(p)), None)
    if missing:
        raise UserError(f"{listing} names {missing}, which does not exist")
    return Data(f"{len(paths)} images named in {listing}", ImageFiles(paths))


def load_folder(folder: Path) -> Data:
    """All images below a folder, or below its `train/` where it has one.

    Where `train/` and, beside it, `val/` or `test/` both have class sub-folders, they are the
    labelled training and test images.
    """
    top = folder / "train"
    if not top.is_dir():
        return Data(f"folder {folder}", ImageFiles(find_images(folder)))
    paths = find_images(top)
    data = Data(f"folder {top}", ImageFiles(paths))
    test_top = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    names = classes_of(paths, top)
    if test_top is None or names is None:
        return data
    test_paths = find_images(test_top)
    test_names = classes_of(test_paths, test_top)
    if test_names is None:
        return data
    classes = sorted(set(names))
    check_classes(classes, test_names, top, test_top)
    number = {name: i for i, name in enumerate(classes)}
    data.pretrain.labels = [number[name] for name in names]
    data.train = data.pretrain
    data.test = ImageFiles(test_paths, [number[name] for name in test_names])
    data.classes = len(classes)
    return data


def check_classes(classes: list[str], test_names: list[str], top: Path, test_top: Path) -> None:
    """Refuse a class folder without images, and a test class that the training images lack."""
    for folder in sorted(top.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in classes:
            raise UserError(f"class folder {folder} has no image: fill it, or remove it")
    unknown = sorted(set(test_names) - set(classes))
    if unknown:
        raise UserError(f"{test_top} has class {unknown[0]!r}, which {top} lacks")


def load_on_ranks(source: str, root: str, download: bool, rank: int) -> Data:
    """`load` in every process of a job; only the first downloads, and the others wait for it."""
    if not (download and dist.is_initialized()):
        return load(source, root, download)
    if rank != 0:
        dist.barrier()
    found = load(source, root, download and rank == 0)
    if rank == 0:
        dist.barrier()
    return found


def find_images(folder: Path) -> list[str]:
    """All images below a folder, sorted; a UserError where there are none.

    Links are followed, but each folder is read once. Names that begin with a dot are left out.
    """

    def refuse(error: OSError):
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}") from error

    paths, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in files if name.lower().endswith(IMG_EXTENSIONS))
        paths += [os.path.join(root, name) for name in images if not name.startswith(".")]
    if not paths:
        raise UserError(f"no images under {folder}; looked for {' '.join(IMG_EXTENSIONS)}")
    return sorted(paths)


def classes_of(paths: list[str], folder: Path) -> list[str] | None:
    """The sub-folder of `folder` that each image is in; None where some are in `folder` itself."""
    parts = [Path(path).relative_to(folder).parts for path in paths]
    return [p[0] for p in parts] if all(len(p) > 1 for p in parts) else None


TORCHVISION = {
    "cifar10": ("CIFAR-10", "CIFAR10"),
    "cifar100": ("CIFAR-100", "CIFAR100"),
    "stl10": ("STL-10, its unlabelled images", "STL10"),
}  # source -> name for the log, class of torchvision.datasets


def load_torchvision(source: str, root: str, download: bool) -> Data:
    """One of torchvision's data sets, in memory."""
    name, kind = TORCHVISION[source]

    def split(**which) -> ImageArray:
        found = getattr(datasets, kind)(root, download=download, **which)
        labels = found.targets if hasattr(found, "targets") else found.labels
        images = torch.from_numpy(found.data)
        if images.shape[1] != 3:  # CIFAR has channels last, STL-10 first
            images = images.permute(0, 3, 1, 2).contiguous()
        return ImageArray(images, torch.as_tensor(labels, dtype=torch.int64))

    try:
        if source == "stl10":
            pretrain, train, test = (split(split=s) for s in ("unlabeled", "train", "test"))
        else:
            pretrain = train = split(train=True)
            test = split(train=False)
    except (RuntimeError, OSError) as error:  # absent, corrupted, or no network
        hint = "the download failed"
        if not download:
            hint = "not found; add --download, or name its folder by --data_root"
        raise UserError(f"{source} under {root}: {hint}") from error
    return Data(name, pretrain, train, test, classes=int(train.labels.max()) + 1)

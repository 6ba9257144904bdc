"""Images in one batch format: uint8 on a square canvas, decoded and nothing more. Augmentation is the device's work.

Sources: a folder (with or without class sub-folders), a text file of paths, torchvision's CIFAR-10, CIFAR-100 and STL-10,
and demo images made by code.
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


class Batch(NamedTuple):
    images: Tensor  # (B, 3, S, S) uint8, each in the top left corner of its canvas
    sizes: Tensor  # (B, 2) int64, height and width of each
    labels: Tensor  # (B,) int64, NO_LABEL where there is none
    indices: Tensor  # (B,) int64, places in the data set
    bad: Sequence[
        str
    ] = ()  # of each image that could not be read and that another stands in for: the path, and why


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


class ImageArray(Dataset):
    """Images of one size in memory: (N, 3, S, S) uint8 and, where they have labels, (N,) int64.

    Args:
        view_side: the side at which their content is still to be seen, for `suitable_size`; None for S.
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
        """A whole batch by one look-up; the loader calls this where it exists."""
        i = torch.tensor(indices)
        images = self.images.index_select(
            0, i.to(self.images.device)
        )  # four times as fast as images[i] on a CPU
        return Batch(images, torch.full((len(i), 2), images.shape[-1]), self.labels[i], i)

    def shorter_side(self, index: int) -> int:
        return self.view_side

    def decoded_bytes(self) -> int:
        return self.images.numel()

    def fingerprint(self) -> str:
        """Count, side and the pixels of a thousand images."""
        some = self.images[:: max(len(self) // 1000, 1)]
        return f"{len(self)} of {self.images.shape[-1]} px, pixels {hashlib.sha256(some.numpy().tobytes()).hexdigest()[:12]}"


class ImageFiles(Dataset):
    """Image files, decoded when asked for.

    Args:
        paths: of the files. labels: a class for each, or None.
        max_side: larger images are reduced on reading, see `read_image`; None keeps all pixels.

    Where `replace_bad` is set, another image stands in for one that cannot be read: which, its place alone decides, so
    that it is the same for any number of loader processes and after a restart. By default reading raises a ValueError.
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
        substitutes = (
            np.random.SeedSequence([4, index]).generate_state(self.ATTEMPTS)
            if self.replace_bad
            else ()
        )
        bad: list[str] = []
        for place in (index, *(int(s) % len(self) for s in substitutes)):
            try:
                return read_image(self.paths[place], self.max_side), self.labels[place], place, bad
            except ValueError as error:
                bad.append(str(error))
        raise ValueError(bad[0])

    def fingerprint(self) -> str:
        """Count and names, less the folder that all of them lie in, so that a moved folder is still the same."""
        paths = [os.path.abspath(path) for path in self.paths]
        top = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = "\n".join(os.path.relpath(path, top) for path in paths)
        return f"{len(self)}, names {hashlib.sha256(os.fsencode(names)).hexdigest()[:12]}"

    def shorter_side(self, index: int) -> int:
        """Height or width, the smaller, from the file's header."""
        try:
            with Image.open(self.paths[index]) as image:
                return min(image.size)
        except Exception as error:  # as in `read_image`
            raise ValueError(f"cannot read image {self.paths[index]}: {error}") from error

    def decoded_bytes(self, sample: int = 32) -> int:
        """An estimate, from an even sample."""
        read = [self[i][0].numel() for i in range(0, len(self), max(len(self) // sample, 1))]
        return round(len(self) * sum(read) / len(read))


class CachedImages(Dataset):
    """The images of another set, decoded once and kept on a device, each in its own size.

    Args:
        files: the set; what it reads now, at its `max_side` and with its substitutes, stays. num_workers: to read it with.
    """

    def __init__(self, files: ImageFiles, device: torch.device, num_workers: int):
        self.paths = files.paths
        self.items: list[tuple[Tensor, int, int, list[str]]] = []
        for pixels, shapes, *others in DataLoader(
            files,
            64,
            num_workers=num_workers,
            collate_fn=pack,
            worker_init_fn=leave_signals_to_parent,
        ):
            parts = pixels.to(device, copy=True).split(
                [shape.numel() for shape in shapes]
            )  # a copy: a loader's process lends
            self.items += zip([part.view(shape) for part, shape in zip(parts, shapes)], *others)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int, list[str]]:
        return self.items[index]


def pack(items: list[tuple[Tensor, int, int, list[str]]]) -> tuple:
    """Of one tensor, a loader's process sends 64 images faster than of 64."""
    images, *others = zip(*items)
    return (
        torch.cat([image.flatten() for image in images]),
        [image.shape for image in images],
        *others,
    )


# What "auto" keeps in memory: of a GPU this share at most, of the host's memory so many bytes a rank.
CACHE_SHARE, CACHE_BYTES = 0.25, 2 * 2**30


def where_to_cache(dataset: ImageArray | ImageFiles, device: torch.device) -> str:
    """The choice of "auto": "device" (CUDA), "host" or "none", the first that the decoded images fit."""
    size = dataset.decoded_bytes()
    if (
        device.type == "cuda"
        and size <= CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory
    ):
        return "device"
    return "host" if size <= CACHE_BYTES else "none"


def cached(
    dataset: ImageArray | ImageFiles, where: str, device: torch.device, num_workers: int
) -> ImageArray | ImageFiles | CachedImages:
    """The set as a training reads it: decoded once and kept on the "device" or the "host", or read ever anew ("none")."""
    if isinstance(dataset, ImageArray):
        if where != "device":
            return dataset
        return ImageArray(dataset.images.to(device), dataset.labels, dataset.view_side)
    return (
        dataset
        if where == "none"
        else CachedImages(
            dataset, device if where == "device" else torch.device("cpu"), num_workers
        )
    )


def read_image(path: str, max_side: int | None = None) -> Tensor:
    """Decode any Pillow image to (3, H, W) uint8 RGB; grey of 16 bits is scaled to 8, alpha is dropped.

    Args:
        max_side: reduce the shorter side to at most this many pixels, and the longer one to at most twice as many.

    Raises:
        ValueError: naming the file, where it cannot be read or its values have no known range.
    """
    try:
        with Image.open(path) as image:
            if max_side is not None:
                image.draft(
                    "RGB", (max_side, max_side)
                )  # JPEG only: decode at 1/2, 1/4 or 1/8, not below max_side
            image.load()
            if image.mode.startswith("I"):  # 16 bits, or 32 that must hold 16
                values = np.asarray(image)
                if values.min() < 0 or values.max() > 65535:
                    raise ValueError(
                        f"values {values.min()} to {values.max()} do not fit 16 bits; convert it first"
                    )
                image = Image.fromarray((values / 257).round().astype(np.uint8))
            elif image.mode == "F":
                raise ValueError(
                    "floating-point values have no known range; convert it to 8 or 16 bits first"
                )
            image = image.convert("RGB")
            if max_side is not None:
                scale = min(max_side / min(image.size), 2 * max_side / max(image.size))
                if scale < 1:
                    smaller = [max(round(side * scale), 1) for side in image.size]
                    image = image.resize(smaller, Image.Resampling.BICUBIC, reducing_gap=2.0)
    except Exception as error:  # a damaged file makes Pillow's decoders fail in any way there is
        raise ValueError(f"cannot read image {path}: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def collate(items: Batch | list[tuple[Tensor, int, int, list[str]]]) -> Batch:
    """Images of any sizes on the smallest square canvas that holds them all."""
    if isinstance(items, Batch):
        return items
    images, labels, indices, bad = zip(*items)
    sizes = torch.tensor([image.shape[1:] for image in images])
    side = int(sizes.max())
    if (sizes == side).all():
        canvas = torch.stack(images)
    else:
        canvas = torch.zeros(len(images), 3, side, side, dtype=torch.uint8, device=images[0].device)
        for place, image in zip(canvas, images):
            place[:, : image.shape[1], : image.shape[2]] = image
    return Batch(canvas, sizes, torch.tensor(labels), torch.tensor(indices), sum(bad, []))


def suitable_size(dataset: ImageArray | ImageFiles, sample: int = 256) -> int:
    """Side of the views that suit a set of images: what a typical one has, in whole 32s, from 32 to 224 pixels.

    Typical is the median of the shorter side over an even sample of them, less those that cannot be read.
    """
    step = max(len(dataset) // sample, 1)
    sides, unread = [], None
    for i in range(0, len(dataset), step):
        try:
            sides.append(dataset.shorter_side(i))
        except ValueError as error:
            unread = error
    if not sides:
        raise unread
    side = int(np.median(sides))
    return min(max(side // 32 * 32, 32), 224)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(dataset: Dataset) -> int:
    """Loader processes for this rank: none for images in memory, else one a core of its share, 10 at most."""
    if isinstance(dataset, ImageArray):
        return 0
    return min(max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), 10)


# ---------------------------------------------------------------------------------------------------------------------
# Order: a function of (seed, epoch), so that nothing of it is saved
# ---------------------------------------------------------------------------------------------------------------------


class TrainingBatches(Sampler[list[int]]):
    """This rank's batches of a whole training, from step `start` to step `stop`, without a seam between epochs.

    Step s is the (s mod steps_per_epoch)-th global batch of a permutation that (seed, epoch) determine; the images left
    over at an epoch's end wait for another permutation. The global batch does not depend on how many ranks share it.

    Raises:
        ValueError: where there are fewer images than one global batch.
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
            raise ValueError(f"{images} images are fewer than one batch of {world} x {batch_size}")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        shuffled, order = None, None
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.steps_per_epoch)
            if epoch != shuffled:
                seed = np.random.SeedSequence([0, self.seed, epoch]).generate_state(1, np.uint64)[0]
                generator = torch.Generator().manual_seed(int(seed) >> 1)
                shuffled, order = epoch, torch.randperm(self.images, generator=generator)
            first = (i * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def leave_signals_to_parent(worker: int) -> None:
    """For a loader's process: a signal to the whole group must not take the images from a parent that saves first.

    SIGTERM ends it half a minute later, for a parent that leaves without it sends one too and waits.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def processes(dataset: Dataset, num_workers: int) -> int:
    """A loader's: images that are cached need no other processes, nor may others have those on a GPU."""
    on_gpu = isinstance(dataset, ImageArray) and dataset.images.device.type != "cpu"
    return 0 if isinstance(dataset, CachedImages) or on_gpu else num_workers


def training_loader(
    dataset: Dataset, batches: TrainingBatches, num_workers: int, pin_memory: bool
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=processes(dataset, num_workers),
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent,
    )


def on_device(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with images and sizes on the device; on CUDA the next is copied while this one is worked on."""

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
    """A batch whose copy the stream in use waits for, and whose memory it keeps from being given away too soon."""
    here = torch.cuda.current_stream(batch.images.device)
    here.wait_event(copied)
    for tensor in (batch.images, batch.sizes):
        tensor.record_stream(here)
    return batch


def evaluation_loader(
    dataset: Dataset, batch_size: int, num_workers: int, rank: int = 0, world: int = 1
) -> DataLoader:
    """In order, without repeats; each rank reads every world-th image.

    Raises:
        ValueError: where there is not one image for every rank.
    """
    if len(dataset) < world:
        raise ValueError(
            f"{len(dataset)} images to evaluate are fewer than the {world} ranks; start fewer"
        )
    mine = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    return DataLoader(
        mine,
        batch_size=batch_size,
        num_workers=processes(dataset, num_workers),
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Demo images
# ---------------------------------------------------------------------------------------------------------------------

DEMO_SIDE = 64
DEMO_TRAIN, DEMO_TEST = 4000, 1000
GLYPH_SIDE = 13
GLYPHS_AN_IMAGE = 28


def demo_glyphs() -> np.ndarray:
    """The ten classes: shapes of about equal ink on 13 x 13 pixels, drawn smooth: (10, 13, 13) in [0, 1]."""
    y, x = np.mgrid[-6:7, -6:7].astype(np.float64)
    r, square, diamond = np.hypot(x, y), np.maximum(abs(x), abs(y)), abs(x) + abs(y)
    bar = lambda t, width: abs(t) - width  # noqa: E731  a band of half-width `width` about t = 0
    # Signed distances, negative inside, in pixels.
    shapes = [
        r - 4.1,  # disc
        abs(r - 4.6) - 0.95,  # ring
        square - 3.6,  # square
        abs(square - 4.3) - 0.8,  # frame
        abs(diamond - 5.2) / 1.4 - 0.95,  # hollow diamond
        np.maximum(np.minimum(bar(x, 1.2), bar(y, 1.2)), square - 5.4),  # plus
        np.maximum(np.minimum(bar(x - y, 1.7), bar(x + y, 1.7)), square - 4.6) / 1.4,  # saltire
        np.maximum(abs(abs(y) - 3.2) - 1.2, abs(x) - 5.2),  # two level bars
        np.maximum(abs(abs(x) - 3.2) - 1.2, abs(y) - 5.2),  # two upright bars
        np.hypot(abs(x) - 3.4, abs(y) - 3.4) - 2.0,  # four dots
    ]
    return np.clip(0.5 - np.stack(shapes), 0, 1)


def demo_images(indices: Sequence[int], chunk: int = 500) -> ImageArray:
    """Images by index, 64 x 64, class = index mod 10; an index always gives the same image.

    An image is strewn with one kind of glyph over a cloudy ground. The kind is its class, and the one thing that all
    of its crops share: place, colour and brightness change from glyph to glyph, and the ground from corner to corner, so
    that neither raw pixels nor the mean colour of a view tell the class.
    """
    indices = np.asarray(indices)
    glyphs, side, n = demo_glyphs().astype(np.float32), GLYPH_SIDE, GLYPHS_AN_IMAGE
    # Bilinear weights that stretch a grid of 5 x 5 random colours into clouds.
    at = np.linspace(0, 4 - 1e-6, DEMO_SIDE)
    stretch = np.maximum(0, 1 - abs(at[:, None] - np.arange(5))).astype(np.float32)  # (64, 5)
    offsets = np.arange(side)
    images = []
    for part in np.split(indices, range(chunk, len(indices), chunk)):
        u = np.stack(
            [np.random.default_rng(int(i)).random(75 + n * 5, dtype=np.float32) for i in part]
        )  # (N, ...)
        ground, u = u[:, :75].reshape(-1, 3, 5, 5), u[:, 75:].reshape(len(part), n, 5)
        canvas = np.pad(
            0.2 + 0.2 * (stretch @ ground @ stretch.T),
            [(0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2],
        )
        corner = (u[:, :, :2] * DEMO_SIDE).astype(int)  # (N, n, 2), top and left
        ink = 0.3 + 0.3 * u[:, :, 2:]  # (N, n, 3)
        which = np.arange(len(part))[:, None, None]
        for k in range(n):
            rows = corner[:, k, 0, None, None] + offsets[:, None]  # (N, 13, 1)
            columns = corner[:, k, 1, None, None] + offsets  # (N, 1, 13)
            stamp = glyphs[part % 10, :, :, None] * ink[:, k, None, None, :]  # (N, 13, 13, 3)
            canvas[which, :, rows, columns] += stamp
        canvas = canvas[:, :, side // 2 : -(side // 2), side // 2 : -(side // 2)]
        images.append((canvas.clip(0, 1) * 255).round().astype(np.uint8))
    # Half the side shows the glyphs as well, at a quarter of the cost.
    return ImageArray(
        torch.from_numpy(np.concatenate(images)),
        torch.from_numpy(indices % 10),
        view_side=DEMO_SIDE // 2,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a source holds.

    pretrain: all that may be learned from, labels unused. train and test: the labelled images that k-NN remembers and
    those that it is asked about, None where the source has none. name: in words, for the log.
    """

    name: str
    pretrain: ImageArray | ImageFiles
    train: ImageArray | ImageFiles | None = None
    test: ImageArray | ImageFiles | None = None
    classes: int = 0

    def limit_side(self, max_side: int) -> None:
        """Let files be reduced on reading; see `read_image`."""
        for images in (self.pretrain, self.train, self.test):
            if isinstance(images, ImageFiles):
                images.max_side = max_side


def load(source: str, root: str = "data", download: bool = False) -> Data:
    """Open a source by name.

    Args:
        source: "demo"; "cifar10", "cifar100" or "stl10", kept under `root`; a text file with one path a line, relative
            to the file's own folder; or a folder, searched recursively. Of a folder with `train/` inside, `train/` is
            what is learned from, and `val/` or `test/` beside it, both with class sub-folders, what k-NN is tested on.
        download: fetch one of torchvision's sets where `root` lacks it.

    Raises:
        ValueError: in one sentence, where there is nothing to read.
    """
    if source == "demo":
        train, test = demo_images(range(DEMO_TRAIN)), demo_images(range(10**6, 10**6 + DEMO_TEST))
        return Data("the built-in demo images", train, train, test, classes=10)
    if source in ("cifar10", "cifar100", "stl10"):
        return load_torchvision(source, root, download)
    path = Path(source)
    if path.is_file():
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source} is not a text file; give a folder of images, or a list of paths"
            ) from error
        paths = [str(path.parent / line) for line in lines if line]
        if not paths:
            raise ValueError(f"{source} has no lines; it should name one image a line")
        missing = next((p for p in paths if not os.path.isfile(p)), None)
        if missing:
            raise ValueError(f"{source} names {missing}, which does not exist")
        return Data(f"{len(paths)} images named in {source}", ImageFiles(paths))
    if not source or not path.is_dir():  # the path of no name is the folder that one is in
        raise ValueError(
            f"no data at {source or 'a path of no name'}: give a folder, a text file of paths, demo, cifar10, cifar100 or stl10"
        )

    train_path = path / "train"
    if not train_path.is_dir():
        return Data(f"folder {source}", ImageFiles(find_images(path)))
    paths = find_images(train_path)
    pretrain = ImageFiles(paths)
    data = Data(f"folder {train_path}", pretrain)
    test_path = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    names = classes_of(paths, train_path)
    if test_path is None or names is None:
        return data
    test_paths = find_images(test_path)
    test_names = classes_of(test_paths, test_path)
    if test_names is None:
        return data
    classes = sorted(set(names))
    for folder in (
        f for f in sorted(train_path.iterdir()) if f.is_dir() and not f.name.startswith(".")
    ):
        if folder.name not in classes:
            raise ValueError(f"class folder {folder} has no image: fill it, or remove it")
    unknown = sorted(set(test_names) - set(classes))
    if unknown:
        raise ValueError(f"{test_path} has class {unknown[0]!r}, which {train_path} lacks")
    number = {name: i for i, name in enumerate(classes)}
    data.train = pretrain
    pretrain.labels = [number[name] for name in names]
    data.test = ImageFiles(test_paths, [number[name] for name in test_names])
    data.classes = len(classes)
    return data


def load_on_ranks(source: str, root: str, download: bool, rank: int) -> Data:
    """`load` in every process of a job, where only the first may download and the others wait for it."""
    if not (download and dist.is_initialized()):
        return load(source, root, download)
    if rank != 0:
        dist.barrier()
    found = load(source, root, download and rank == 0)
    if rank == 0:
        dist.barrier()
    return found


def find_images(folder: Path) -> list[str]:
    """All images below a folder, sorted; links are followed, each folder once. Names that begin with a dot are left out.

    Raises:
        ValueError: where there are none, or a folder cannot be read.
    """

    def refuse(error: OSError):
        raise ValueError(f"cannot read folder {error.filename}: {error.strerror}") from error

    paths, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            os.path.join(root, name)
            for name in files
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    if not paths:
        raise ValueError(f"no images under {folder}; looked for {' '.join(IMG_EXTENSIONS)}")
    return sorted(paths)


def classes_of(paths: list[str], folder: Path) -> list[str] | None:
    """The name of the sub-folder of `folder` that each image lies in; None where some lie in `folder` itself."""
    parts = [Path(path).relative_to(folder).parts for path in paths]
    return [p[0] for p in parts] if all(len(p) > 1 for p in parts) else None


def load_torchvision(name: str, root: str, download: bool) -> Data:
    def images(values: np.ndarray) -> Tensor:  # CIFAR has channels last, STL first
        tensor = torch.from_numpy(values)
        return tensor if tensor.shape[1] == 3 else tensor.permute(0, 3, 1, 2).contiguous()

    def split(**which) -> ImageArray:
        found = kind(root, download=download, **which)
        labels = found.targets if hasattr(found, "targets") else found.labels
        return ImageArray(images(found.data), torch.as_tensor(labels, dtype=torch.int64))

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[
        name
    ]
    try:
        if name == "stl10":
            return Data(
                "STL-10, its unlabelled images",
                split(split="unlabeled"),
                split(split="train"),
                split(split="test"),
                classes=10,
            )
        train, test = split(train=True), split(train=False)
    except (RuntimeError, OSError) as error:  # absent or corrupted; no network
        hint = (
            "the download failed"
            if download
            else "not found; add --download, or name its folder by --data_root"
        )
        raise ValueError(f"{name} under {root}: {hint}") from error
    return Data(
        name.upper().replace("CIFAR", "CIFAR-"),
        train,
        train,
        test,
        classes=int(train.labels.max()) + 1,
    )

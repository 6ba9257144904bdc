"""Classes of pixels: a linear layer on a backbone's frozen maps, or an FCN trained whole.

`eval_linear.py --task segmentation` runs it.
"""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lowdino import (
    augment,
    data,
    demo,
    dense,
    distributed,
    image_io,
    linear,
    masks,
    optim,
    probe,
    schedules,
    settings,
)
from lowdino.distributed import UserError
from lowdino.features import check_finite, normalisation, open_network

# The flags of eval_linear.py that this task has beside those of every task.
FLAGS = ("finetune", "from_scratch", "layer_decay", "epochs", "test_fraction", "maps")

VIEWS = 2  # the stream of random numbers of the training views, see augment.derived_seed


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of what is trained, in one sentence, or None."""
    whole = args.finetune or args.from_scratch
    if not args.models or "pixels" in args.models:
        return "--task segmentation needs one backbone or more"
    if args.finetune and args.from_scratch:
        return "--finetune and --from_scratch are two ways of training; give one"
    if whole and args.maps != "last":
        return "--maps is of the linear layer; a network that is trained whole has the last map"
    if len(args.lr or [0]) * len(args.weight_decay or [0]) > 1:
        return "--task segmentation takes one --lr and one --weight_decay"
    if args.image_size is not None and args.image_size < 32:
        return f"--image_size must be at least 32 pixels, not {args.image_size}"
    if args.test_fraction is not None and not 0 < args.test_fraction < 1:
        return f"--test_fraction must lie between 0 and 1, not {args.test_fraction}"
    if args.test_fraction is not None and args.data_path in ("demo_scenes", "voc2012"):
        return f"--test_fraction is for a folder; {args.data_path} has test pictures of its own"
    return linear.check_whole(args) or settings.check_reading(args)


def settle(args: argparse.Namespace) -> None:
    """Fill in the defaults.

    The linear layer's rate was the best of 0.1 and 0.3 on 400 training scenes of the demo, held
    out, for a network at random weights and a trained one. Whole networks have classification's.
    """
    whole = args.finetune or args.from_scratch
    args.lr = args.lr or [1e-3 if whole else 0.3]
    args.weight_decay = args.weight_decay or [0.05 if whole else 0.0]
    args.layer_decay = args.layer_decay or (0.75 if args.finetune else 1.0)
    args.epochs, args.batch_size_per_gpu = args.epochs or 20, args.batch_size_per_gpu or 16


def protocol(args: argparse.Namespace) -> str:
    """What is done, in a sentence for people who compare."""
    rates = f"AdamW, learning rate {args.lr[0]:g}"
    squares = "pictures resized to squares; mean IoU at their own size"
    if args.finetune or args.from_scratch:
        start = "from random weights" if args.from_scratch else "fine-tuned"
        return (
            f"FCN on the last feature map, {start}: {rates}, x {args.layer_decay:g} a block "
            f"downwards, {args.epochs} epochs of crops and flips; {squares}"
        )
    of = "the last feature map" if args.maps == "last" else "all maps, resized to the finest"
    return (
        f"linear layer on {of}, half-whitened, upsampled: {rates}, {args.epochs} epochs; {squares}"
    )


# --------------------------------------------------------------------------------------------------
# Pictures and masks as tensors
# --------------------------------------------------------------------------------------------------


def whole_box(image: Tensor) -> Tensor:
    """The box of a whole picture: (1, 4)."""
    return torch.tensor([[0.0, 0.0, *image.shape[1:]]], device=image.device)


def square(image: Tensor, size: int, box: Tensor, flip: Tensor | None = None) -> Tensor:
    """A box of a picture (C, H, W), resized: (1, C, size, size) in [0, 1]."""
    return augment.resized_crop(image[None], box, size, flip)


def square_mask(mask: Tensor, size: int, box: Tensor, flip: bool = False) -> Tensor:
    """The same box of a mask (H, W), each pixel the nearest one: (size, size)."""
    top, left, height, width = box[0].tolist()
    at = (torch.arange(size, device=mask.device) + 0.5) / size
    rows, columns = ((low + side * at).long() for low, side in ((top, height), (left, width)))
    return mask[rows][:, columns.flip(0) if flip else columns]


def batches(
    args, images: Dataset, order: Iterable[list[int]], device: torch.device
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Lists of pictures and masks, those of each list of indices in `order`."""
    workers = data.loader_processes(images, args.num_workers)
    loader = data.open_loader(images, workers, batch_sampler=order, collate_fn=flat)
    for tensors in loader:
        tensors = [tensor.to(device) for tensor in tensors]
        yield list(zip(tensors[::2], tensors[1::2]))


def flat(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """One list of tensors, which a loader's processes can send."""
    return [tensor for pair in pairs for tensor in pair]


# --------------------------------------------------------------------------------------------------
# A linear layer on frozen maps
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def maps_of(backbone: nn.Module, x: Tensor, which: str) -> Tensor:
    """The last map, or all maps side by side, resized to the finest: (B, D, h, w)."""
    with torch.autocast("cuda", torch.bfloat16, enabled=x.device.type == "cuda"):
        if which == "last":
            return backbone.forward_features(x).float()
        maps = [found.float() for found in backbone.forward_pyramid(x)]
    finest = maps[0].shape[-2:]
    resized = (F.interpolate(m, finest, mode="bilinear", align_corners=False) for m in maps[1:])
    return torch.cat([maps[0], *resized], dim=1)


def frozen_maps(
    args, backbone: nn.Module, images: Dataset, size: int, ranks
) -> tuple[Tensor, Tensor]:
    """Maps of pictures, float32 (N, D, h, w), and their masks, (N, size, size), on the device.

    Raises:
        UserError: where they would not fit into half of its memory, or are not finite.
    """
    mean, std = normalisation(backbone)
    count, maps, found = len(images), [], []
    order = linear.shares(count, args.batch_size_per_gpu, ranks)
    for batch in batches(args, images, order, ranks.device):
        x = torch.cat([square(image, size, whole_box(image)) for image, _ in batch])
        maps.append(maps_of(backbone, augment.normalize(x, mean, std), args.maps))
        found += [square_mask(mask, size, whole_box(mask[None])) for _, mask in batch]
        if len(maps) == 1:
            # Four bytes a number, once in parts and once together, on every rank.
            needed = 8 * maps[0][0].numel() * count
            # On the host all ranks share one memory, on GPUs each has its own.
            needed *= 1 if ranks.device.type == "cuda" else ranks.world
            check_memory(args, needed, count, memory_of(ranks.device))
    maps, found = torch.cat(maps), torch.stack(found)
    check_finite(maps, "maps")
    return tuple(distributed.gather_strided(part, count) for part in (maps, found))


def memory_of(device: torch.device) -> float:
    """Bytes that are free on a GPU, or that the host has; infinity where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(args, needed: int, count: int, memory: float) -> None:
    """Refuse maps of `needed` bytes where they are more than half of the memory."""
    if needed > memory / 2:
        advice = "a smaller --image_size or --label_fraction"
        advice += ", or --maps last" if args.maps != "last" else ""
        raise UserError(
            f"the maps of {count} pictures take {needed / 1e9:.0f} GB, more than half of the "
            f"memory: give {advice}"
        )


def loss_of(logits: Tensor, found: Tensor) -> Tensor:
    """Mean cross-entropy of (B, C, H, W) over the pixels of (B, H, W) that count; 0 of none."""
    loss = F.cross_entropy(logits, found.long(), ignore_index=masks.IGNORED, reduction="sum")
    return loss / (found != masks.IGNORED).sum().clamp(min=1)


class LinearLayer(nn.Module):
    """A linear layer on scaled maps, upsampled: (B, D, h, w) -> logits (B, C, *size)."""

    def __init__(self, scaler: probe.Scaler, width: int, classes: int):
        super().__init__()
        self.mean, self.stretch = scaler.mean, scaler.symmetric
        self.weight = nn.Parameter(torch.zeros(width + 1, classes, device=self.mean.device))

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        # The scaler is linear too: both are one layer on the maps as they are.
        weight = self.stretch @ self.weight[:-1]  # (D, C)
        bias = self.weight[-1] - self.mean @ weight
        logits = F.conv2d(maps, weight.T[:, :, None, None], bias)
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def learn_linear(
    args, maps: Tensor, found: Tensor, chosen: list[int], classes: int, seed: int
) -> LinearLayer:
    """Train on the chosen of maps (N, D, h, w) and masks (N, size, size), all of them on every
    rank."""
    few = max(len(chosen) * maps[0, 0].numel() // 100_000, 1)
    some = maps[chosen[::few]]  # about 100,000 cells tell their scale
    rows = some.movedim(1, 3).flatten(0, 2)  # (n * h * w, D)
    layer = LinearLayer(probe.Scaler(rows), maps.shape[1], classes)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=args.weight_decay[0])
    batch = min(args.batch_size_per_gpu, len(chosen))
    steps = args.epochs * (len(chosen) // batch)
    order = data.TrainingBatches(len(chosen), batch, seed, 0, steps)
    for step, picks in enumerate(order):
        indices = [chosen[i] for i in picks]
        loss = loss_of(layer(maps[indices], found.shape[1:]), found[indices])
        optimizer.param_groups[0]["lr"] = schedules.cosine(step, steps, args.lr[0], 0.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return layer


def learn_frozen(
    args,
    backbone: nn.Module,
    maps: Tensor,
    found: Tensor,
    used: list[int],
    classes: int,
    size: int,
    chosen: list[int],
    seed: int,
) -> Callable[[Tensor], Tensor]:
    """The backbone and a linear layer on it, trained on the pictures at indices `chosen`.

    Args:
        maps, found: of the pictures at indices `used`, see `frozen_maps`.

    Returns:
        A function: images (B, C, size, size) -> logits (B, classes, size, size).
    """
    place = {index: i for i, index in enumerate(used)}
    layer = learn_linear(args, maps, found, [place[i] for i in chosen], classes, seed)
    return lambda x: layer(maps_of(backbone, x, args.maps), (size, size))


# --------------------------------------------------------------------------------------------------
# The whole network
# --------------------------------------------------------------------------------------------------


def training_batch(batch, size: int, network, seed: int, step: int, ranks) -> tuple[Tensor, Tensor]:
    """A random-resized crop (area 0.25 to 1) and a flip of each picture and its mask."""
    device = ranks.device
    generator = augment.seeded_generator(device, VIEWS, seed, step, ranks.rank)
    sizes = torch.tensor([image.shape[1:] for image, _ in batch], device=device)
    boxes = augment.random_boxes(sizes, (0.25, 1.0), generator)
    flips = torch.rand(len(batch), generator=generator, device=device) < 0.5
    parts = [(*pair, box[None], flip) for pair, box, flip in zip(batch, boxes, flips)]
    x = torch.cat([square(image, size, box, flip[None]) for image, _, box, flip in parts])
    found = [square_mask(mask, size, box, bool(flip)) for _, mask, box, flip in parts]
    return augment.normalize(x, *normalisation(network)), torch.stack(found)


def learn_whole(
    args, name: str, source: masks.Data, size: int, ranks, chosen: list[int], seed: int
) -> Callable[[Tensor], Tensor]:
    """The network `name`, trained whole on the pictures at indices `chosen`.

    Returns:
        A function: images (B, C, size, size) -> logits (B, classes, size, size).

    Raises:
        UserError: where the pictures are too few for the ranks or for batch norm; `Diverged`.
    """
    _, backbone = open_network(name, seed)
    torch.manual_seed(seed)
    network = dense.segmenter(backbone, source.classes)
    network.mean, network.std = normalisation(backbone)
    network = distributed.on_device(network, ranks)
    groups = optim.layerwise_groups(backbone, network.classifier, args.layer_decay)
    images = Subset(source.train, chosen)
    batch, steps = linear.batch_and_steps(args, len(chosen), ranks.world, batch_norm=True)
    order = data.TrainingBatches(len(chosen), batch, seed, 0, steps, ranks.rank, ranks.world)
    model = distributed.data_parallel(network).train()

    def losses() -> Iterator[Tensor]:
        for step, pairs in enumerate(batches(args, images, order, ranks.device)):
            x, found = training_batch(pairs, size, network, seed, step, ranks)
            with torch.autocast("cuda", torch.bfloat16, enabled=ranks.device.type == "cuda"):
                logits = model(x)["out"]
            yield loss_of(logits.float(), found)

    linear.adamw_steps(losses(), groups, args, steps, ranks)
    pairs = enumerate(batches(args, images, order, ranks.device), start=steps)
    views = (training_batch(p, size, network, seed, step, ranks)[0] for step, p in pairs)
    linear.settle_batch_norm(network, views)
    distributed.broadcast_buffers(network)
    network.eval()
    return lambda x: network(x)["out"]


# --------------------------------------------------------------------------------------------------
# Mean IoU
# --------------------------------------------------------------------------------------------------


LOGITS = 2**25  # so many are interpolated at once, 128 MiB


def predicted(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of each pixel, of logits (C, h, w) that are interpolated: (H, W) int64.

    A few classes at a time: all logits of a large picture may take gigabytes.
    """
    count = max(LOGITS // math.prod(size), 1)
    for first in range(0, len(logits), count):
        part = logits[None, first : first + count].float()
        part = F.interpolate(part, size, mode="bilinear", align_corners=False)[0]
        top, name = part.max(dim=0)
        if first == 0:
            highest, said = top, name
        else:
            said = torch.where(top > highest, first + name, said)
            highest = torch.maximum(top, highest)
    return said


@torch.no_grad()
def evaluate(args, logits_of, normalisation, source, size: int, ranks) -> float:
    """Mean IoU on the test pictures, each at its own size.

    Args:
        logits_of: squares (B, C, size, size) -> logits (B, classes, h, w), of any h and w.

    Raises:
        Diverged: where logits are not finite.
    """
    total = torch.zeros(source.classes, source.classes, dtype=torch.int64, device=ranks.device)
    order = linear.shares(len(source.test), args.batch_size_per_gpu, ranks)
    for batch in batches(args, source.test, order, ranks.device):
        x = torch.cat([square(image, size, whole_box(image)) for image, _ in batch])
        found = logits_of(augment.normalize(x, *normalisation))
        linear.check_logits(found)
        for logits, (_, mask) in zip(found, batch):
            said = predicted(logits, tuple(mask.shape))
            total += dense.confusion_of(said, mask, source.classes, masks.IGNORED)
    if ranks.world > 1:
        torch.distributed.all_reduce(total)
    return dense.mean_iou(total)


def check_size(size: int, stride: int) -> None:
    """Refuse an --image_size that is not in whole strides of the network."""
    if size % stride:
        raise UserError(
            f"--image_size must be a multiple of the network's stride, {stride}, not {size}"
        )


def size_of(args, backbone: nn.Module, images: Dataset) -> int:
    """--image_size, or the median of the shorter side of some pictures, of 512 pixels at most, in
    whole strides of the network: its last map would not cover the rest.

    Raises:
        UserError: where --image_size is no multiple of the stride.
    """
    stride = backbone.pyramid_strides[-1]
    if args.image_size:
        check_size(args.image_size, stride)
        return args.image_size
    some = range(0, len(images), max(len(images) // 32, 1))
    sides = torch.tensor([float(min(images[i][1].shape)) for i in some])
    return max(min(int(sides.median()), 512) // stride, 1) * stride


def measure(args, name: str, opened, number: int, ranks: distributed.Ranks) -> dict:
    """All figures of one model: row `number` of the table."""
    title, backbone = opened
    channels = len(normalisation(backbone)[0])
    as_read = image_io.PixelFormat(channels, max_megapixels=args.max_megapixels)
    where = args.data_path, args.data_root, args.download
    source = masks.load(*where, as_read, args.test_fraction, args.seeds[0], ranks.rank)
    said = ""
    if isinstance(source.train, masks.MaskedImages):
        paths = source.train.images
        known = getattr(backbone, "value_range", None)
        images = data.ImageFiles(paths, pixel_format=as_read)
        value_range, said = data.choose_value_range(images, source.name, args.value_range, known)
        as_read = as_read._replace(value_range=value_range)
        source.train.pixels = source.test.pixels = as_read
    elif channels != 3:
        raise UserError(f"{source.name} are pictures in colours, and {title} is of {channels}")
    size = size_of(args, backbone, source.train)
    subsets = {
        (fraction, seed): linear.some_of(len(source.train), fraction, seed, least=2)
        for fraction in args.label_fraction
        for seed in args.seeds
    }
    used = sorted({*itertools.chain(*subsets.values())})
    if min(len(used), len(source.test)) < ranks.world:
        raise UserError(f"{source.name} has fewer pictures than there are ranks; start fewer")
    if ranks.first:
        if number == 1 and source.notes:
            print("\n".join(source.notes))
        counts = f"{len(source.train)} training and {len(source.test)} test pictures"
        counts += f", {source.classes} classes"
        print(f"{title}; {source.name}: {counts}, {size} px{said}", flush=True)
    backbone = backbone.to(ranks.device).eval()
    if args.finetune or args.from_scratch:
        learn = partial(learn_whole, args, name, source, size, ranks)
    else:
        maps, found = frozen_maps(args, backbone, Subset(source.train, used), size, ranks)
        learn = partial(learn_frozen, args, backbone, maps, found, used, source.classes, size)
    results = []
    for fraction in args.label_fraction:
        results.append([])
        for seed in args.seeds:
            start, chosen = time.perf_counter(), subsets[fraction, seed]
            logits_of = learn(chosen, seed)
            score = evaluate(args, logits_of, normalisation(backbone), source, size, ranks)
            results[-1].append(score)
            if ranks.first:
                subset = f"{fraction:g} of the masks ({len(chosen)} pictures), seed {seed}"
                seconds = time.perf_counter() - start
                print(f"  {subset}: mean IoU {score:.4f} in {seconds:.0f} s", flush=True)
    return {"model": title, "image_size": size, "mean_iou": results}


def headings(args: argparse.Namespace) -> list[str]:
    """The columns behind the model's name."""
    way = linear.way_of(args)
    return ["pixels", *(f"mIoU, {way} {100 * f:g} %" for f in args.label_fraction)]


def cells(args: argparse.Namespace, row: dict) -> list[str]:
    """What a row has in these columns, in percent."""
    return [str(row["image_size"]), *map(linear.percent, row["mean_iou"])]


# --------------------------------------------------------------------------------------------------
# Label propagation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def propagated_iou(
    features: Callable[[Tensor], Tensor],
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    ranks: distributed.Ranks,
    films: int = 40,
    frames: int = 8,
) -> tuple[float, float]:
    """Mean IoU of labels carried through films of demo scenes by `dense.propagate`, and of labels
    that stay where they were.

    DAVIS's J in small: of the classes in a film's first frame, over its other frames.

    Args:
        features: images (B, 3, size, size) -> maps (B, D, h, w).
    """
    carried, still = [], []
    for index in demo.splits(0, films)[1]:
        drawn = [demo.demo_scenes([index], frame) for frame in range(frames)]
        scenes = torch.cat([scene for scene, _ in drawn]).to(ranks.device)
        shown = torch.stack([demo.semantic_mask(target) for _, (target,) in drawn])
        shown = shown.to(ranks.device).long()
        boxes = whole_box(scenes[0]).expand(frames, -1)
        views = augment.resized_crop(scenes, boxes, size)
        maps = features(augment.normalize(views, mean, std)).float()
        classes = [0, *shown[0].unique().tolist()[1:]]
        first = torch.stack([shown[0] == name for name in classes]).float()  # (C, H, W)
        labels = F.adaptive_avg_pool2d(first, maps.shape[-2:])  # the shares of each cell
        found = dense.propagate(maps, labels)
        found = F.interpolate(found, shown.shape[1:], mode="bilinear", align_corners=False)
        said = torch.tensor(classes, device=ranks.device)[found.argmax(dim=1)]
        for name in classes[1:]:
            carried.append(iou(said[1:] == name, shown[1:] == name))
            still.append(iou(shown[:1] == name, shown[1:] == name))
    return torch.stack(carried).mean().item(), torch.stack(still).mean().item()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Mean over frames of intersection over union of two films of pixels, (T, H, W) bool."""
    both, either = (x.flatten(1).sum(dim=1).cpu().double() for x in (a & b, a | b))
    return (both / either.clamp_min(1)).mean()

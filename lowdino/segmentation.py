"""Classes of pixels: a linear layer on a backbone's frozen maps, or an FCN, all of it trained.

`eval_linear.py --task segmentation` runs it.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lowdino import augment, data, dense, distributed, linear, masks, optim, probe, schedules
from lowdino.distributed import UserError
from lowdino.features import check_finite, normalisation, open_network
from lowdino.schedules import Stream
from lowdino.settings import Settings

# The flags of eval_linear.py that belong to this task and not to every task.
FLAGS = ("finetune", "from_scratch", "layer_decay", "epochs", "test_fraction", "maps")


def check(args: Settings) -> str | None:
    """The first error in the flags of this task, in one sentence, or None."""
    if error := linear.check_dense(args):
        return error
    if args.finetune and args.from_scratch:
        return "--finetune and --from_scratch are two ways of training; give one"
    if linear.trains_network(args) and args.maps != "last":
        return "--maps is for the linear layer; --finetune and --from_scratch use the last map"
    return linear.check_network_training(args)


def defaults(args: Settings) -> dict:
    """Values of the flags that are not given.

    The linear layer's learning rate was the best of 0.1 and 0.3 on 400 training scenes of the demo,
    held out, for a network at random weights and a trained one. The others are classification's.
    """
    lr, weight_decay = (1e-3, 0.05) if linear.trains_network(args) else (0.3, 0.0)
    values = dict(layer_decay=0.75 if args.finetune else 1.0, epochs=20, batch_size_per_gpu=16)
    return values | dict(lr=[lr], weight_decay=[weight_decay])


def protocol(args: Settings) -> str:
    """The training and its settings, in one sentence for people who compare."""
    rates = f"AdamW, learning rate {args.lr[0]:g}"
    squares = "pictures resized to squares; mean IoU at their own size"
    if linear.trains_network(args):
        start = "from random weights" if args.from_scratch else "fine-tuned"
        rates += f", x {args.layer_decay:g} per block downwards, {args.epochs} epochs"
        return f"FCN on the last feature map, {start}: {rates} of crops and flips; {squares}"
    maps = "the last feature map" if args.maps == "last" else "all maps, resized to the finest"
    rates += f", {args.epochs} epochs"
    return f"linear layer on {maps}, half-whitened, upsampled: {rates}; {squares}"


# -- Pictures and masks as squares -----------------------------------------------------------------


def full_box(image: Tensor) -> Tensor:
    """The box of all pixels of a picture (C, H, W): (1, 4)."""
    return torch.tensor([[0.0, 0.0, *image.shape[1:]]], device=image.device)


def square_mask(mask: Tensor, size: int, box: Tensor, flip: bool = False) -> Tensor:
    """A box (1, 4) of a mask (H, W), resized by the nearest pixel: (size, size)."""
    top, left, height, width = box[0].tolist()
    centres = (torch.arange(size, device=mask.device) + 0.5) / size
    rows, columns = (top + height * centres).long(), (left + width * centres).long()
    return mask[rows][:, columns.flip(0) if flip else columns]


def squares(subject: linear.Subject, pictures: list[tuple]) -> Tensor:
    """Pictures with masks as a network's input: (B, C, size, size), normalised."""
    x = [augment.resized_crop(image[None], full_box(image), subject.size) for image, _ in pictures]
    return augment.normalize(torch.cat(x), *normalisation(subject.backbone))


def training_squares(
    subject: linear.Subject, pictures: list[tuple], seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """A random-resized crop (area 0.25 to 1) and a flip of each picture and its mask.

    Images are (B, C, size, size), normalised, and masks (B, size, size).
    """
    device, rank, size = subject.ranks.device, subject.ranks.rank, subject.size
    generator = augment.seeded_generator(device, Stream.LABELLED_VIEWS, seed, step, rank)
    sizes = torch.tensor([image.shape[1:] for image, _ in pictures], device=device)
    boxes = augment.random_boxes(sizes, (0.25, 1.0), generator)
    flips = torch.rand(len(pictures), generator=generator, device=device) < 0.5
    crops, crop_masks = [], []
    for (image, mask), box, flip in zip(pictures, boxes[:, None], flips):
        crops.append(augment.resized_crop(image[None], box, size, flip[None]))
        crop_masks.append(square_mask(mask, size, box, bool(flip)))
    x = augment.normalize(torch.cat(crops), *normalisation(subject.backbone))
    return x, torch.stack(crop_masks)


def pixel_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of (B, C, H, W) over the pixels of (B, H, W) that count; 0 for none."""
    loss = F.cross_entropy(logits, mask.long(), ignore_index=masks.IGNORED, reduction="sum")
    return loss / (mask != masks.IGNORED).sum().clamp(min=1)


# -- A linear layer on frozen maps -----------------------------------------------------------------


@torch.no_grad()
def maps_of(backbone: nn.Module, x: Tensor, which: str) -> Tensor:
    """The last map, or all maps side by side, resized to the finest: (B, D, h, w)."""
    with linear.autocast(x.device):
        if which == "last":
            return backbone.forward_features(x).float()
        finest, *coarser = (level.float() for level in backbone.forward_pyramid(x))
    size = finest.shape[-2:]
    resized = (F.interpolate(m, size, mode="bilinear", align_corners=False) for m in coarser)
    return torch.cat([finest, *resized], dim=1)


def frozen_maps(subject: linear.Subject, images: Dataset) -> tuple[Tensor, Tensor]:
    """Maps of pictures, float32 (N, D, h, w), and their masks, (N, size, size), on the device.

    A UserError where they would not fit into half of its memory, or are not finite.
    """
    args, ranks, size = subject.args, subject.ranks, subject.size
    count, maps, square_masks = len(images), [], []
    order = linear.rank_batches(subject, count)
    for pictures in linear.picture_batches(subject, images, order):
        maps.append(maps_of(subject.backbone, squares(subject, pictures), args.maps))
        square_masks += [square_mask(mask, size, full_box(image)) for image, mask in pictures]
        if len(maps) == 1:
            # Four bytes per number, in parts and together; on the host, those of all ranks.
            copies = 8 * (1 if ranks.device.type == "cuda" else ranks.world)
            needed = copies * maps[0][0].numel() * count
            check_memory(args, needed, count, memory_of(ranks.device))
    maps, square_masks = torch.cat(maps), torch.stack(square_masks)
    check_finite(maps, "maps")
    return tuple(distributed.gather_strided(part, count) for part in (maps, square_masks))


def memory_of(device: torch.device) -> float:
    """Free bytes of a GPU, or all bytes of the host; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(args, needed: int, count: int, memory: float) -> None:
    """Refuse maps of `needed` bytes, more than half of the memory."""
    if needed > memory / 2:
        advice = "a smaller --image_size or --label_fraction"
        advice += ", or --maps last" if args.maps != "last" else ""
        size = f"{needed / 1e9:.0f} GB, more than half of the memory"
        raise UserError(f"the maps of {count} pictures take {size}: give {advice}")


class LinearLayer(nn.Module):
    """A linear layer on half-whitened maps, upsampled: (B, D, h, w) -> logits (B, C, *size)."""

    def __init__(self, whitening: probe.HalfWhitening, width: int, classes: int):
        super().__init__()
        self.mean, self.stretch = whitening.mean, whitening.symmetric
        self.weight = nn.Parameter(torch.zeros(width + 1, classes, device=self.mean.device))

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        # Half-whitening is linear too: both are one layer on the maps as they are.
        weight = self.stretch @ self.weight[:-1]  # (D, C)
        bias = self.weight[-1] - self.mean @ weight
        logits = F.conv2d(maps, weight.T[:, :, None, None], bias)
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def fit_linear_layer(
    subject: linear.Subject, maps: Tensor, square_masks: Tensor, rows: list[int], seed: int
) -> LinearLayer:
    """Train on `rows` of maps (N, D, h, w) and masks (N, size, size), the same on every rank."""
    args = subject.args
    stride = max(len(rows) * maps[0, 0].numel() // 100_000, 1)  # 100,000 cells show the variance
    cells = maps[rows[::stride]].movedim(1, 3).flatten(0, 2)  # (n * h * w, D)
    layer = LinearLayer(probe.HalfWhitening(cells), maps.shape[1], subject.source.classes)
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=args.weight_decay[0])
    batch = min(args.batch_size_per_gpu, len(rows))
    steps = args.epochs * (len(rows) // batch)
    for step, picks in enumerate(data.TrainingBatches(len(rows), batch, seed, 0, steps)):
        indices = [rows[i] for i in picks]
        loss = pixel_loss(layer(maps[indices], square_masks.shape[1:]), square_masks[indices])
        optimizer.param_groups[0]["lr"] = schedules.cosine(step, steps, args.lr[0], 0.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return layer


def finetune(subject: linear.Subject, indices: list[int], seed: int) -> nn.Module:
    """An FCN on the network, all of it trained on the pictures at `indices`."""
    args, ranks, source = subject.args, subject.ranks, subject.source
    _, backbone = open_network(subject.name, seed)
    torch.manual_seed(seed)
    network = distributed.on_device(dense.segmenter(backbone, source.classes), ranks)
    order = linear.training_order(subject, len(indices), seed)
    pictures = Subset(source.train, indices)
    groups = optim.layerwise_groups(backbone, network.classifier, args.layer_decay)
    optimizer = linear.CosineAdamW(subject, groups, len(order))
    model = distributed.data_parallel(network).train()
    for step, items in enumerate(linear.picture_batches(subject, pictures, order)):
        x, mask = training_squares(subject, items, seed, step)
        with linear.autocast(ranks.device):
            logits = model(x)["out"]
        optimizer.step(pixel_loss(logits.float(), mask))
    later = enumerate(linear.picture_batches(subject, pictures, order), start=len(order))
    views = (training_squares(subject, items, seed, step)[0] for step, items in later)
    linear.estimate_batch_norm(network, views)
    return network.eval()


# -- Evaluation ------------------------------------------------------------------------------------

MOST_LOGITS = 2**25  # logits that are interpolated at once, 128 MiB


def predicted_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of each pixel, for logits (C, h, w) that are interpolated to `size`: (H, W) int64.

    A few classes at a time: all logits of a large picture may take gigabytes.
    """
    count = max(MOST_LOGITS // math.prod(size), 1)
    highest, predicted = torch.tensor(-torch.inf, device=logits.device), 0
    for first in range(0, len(logits), count):
        part = logits[None, first : first + count].float()
        part = F.interpolate(part, size, mode="bilinear", align_corners=False)[0]
        top, label = part.max(dim=0)
        predicted = torch.where(top > highest, first + label, predicted)
        highest = torch.maximum(top, highest)
    return predicted


@torch.no_grad()
def evaluate(subject: linear.Subject, logits_of: Callable[[Tensor], Tensor]) -> float:
    """Mean IoU on the test pictures, each at its own size; `Diverged` on infinite logits.

    `logits_of` maps squares (B, C, size, size) to logits (B, classes, h, w), of any h and w.
    """
    ranks, test, classes = subject.ranks, subject.source.test, subject.source.classes
    total = torch.zeros(classes, classes, dtype=torch.int64, device=ranks.device)
    order = linear.rank_batches(subject, len(test))
    for pictures in linear.picture_batches(subject, test, order):
        batch_logits = logits_of(squares(subject, pictures))
        linear.refuse_divergence(batch_logits, "trained logits are not finite")
        for logits, (_, mask) in zip(batch_logits, pictures):
            predicted = predicted_classes(logits, tuple(mask.shape))
            total += dense.confusion(predicted, mask, classes, masks.IGNORED)
    if ranks.world > 1:
        torch.distributed.all_reduce(total)
    return dense.mean_iou(total)


def check_size(size: int, stride: int) -> None:
    """Refuse an --image_size that is no multiple of the network's stride."""
    if size % stride:
        words = f"a multiple of the network's stride, {stride}, not {size}"
        raise UserError(f"--image_size must be {words}")


def suitable_size(args, backbone: nn.Module, images: Dataset) -> int:
    """--image_size, or the median of the shorter sides of a sample, at most 512 pixels.

    The median is rounded down to whole strides: the network's last map would not cover the rest.
    """
    stride = backbone.pyramid_strides[-1]
    if args.image_size:
        check_size(args.image_size, stride)
        return args.image_size
    sample = range(0, len(images), max(len(images) // 32, 1))
    sides = torch.tensor([float(min(images[i][1].shape)) for i in sample])
    return max(min(int(sides.median()), 512) // stride, 1) * stride


def measure(subject: linear.Subject) -> dict:
    """All figures of one model: its row of the table."""
    args, ranks = subject.args, subject.ranks
    split = dict(test_fraction=args.test_fraction, seed=args.seeds[0])
    load = partial(masks.load, source=args.data_path, **split)
    source, remark = linear.open_pictures(subject, load)
    size, count = suitable_size(args, subject.backbone, source.train), len(source.train)
    backbone = subject.backbone.to(ranks.device).eval()
    subject = replace(subject, backbone=backbone, source=source, size=size)
    subsets = linear.subsets_of(args, partial(linear.random_subset, count, least=2))
    used = sorted({*itertools.chain(*subsets.values())})
    if min(len(used), len(source.test)) < ranks.world:
        raise UserError(f"{source.name} has fewer pictures than there are ranks; start fewer")
    linear.print_pictures(subject, source.classes, remark)
    if not linear.trains_network(args):
        maps, square_masks = frozen_maps(subject, Subset(source.train, used))

    def learn(indices: Sequence[int], seed: int, _: str) -> tuple[dict, str]:
        if linear.trains_network(args):
            network = finetune(subject, indices, seed)
            logits_of = lambda x: network(x)["out"]
        else:
            rows = [used.index(i) for i in indices]
            layer = fit_linear_layer(subject, maps, square_masks, rows, seed)
            logits_of = lambda x: layer(maps_of(backbone, x, args.maps), (size, size))
        iou = evaluate(subject, logits_of)
        return {"mean_iou": iou}, f"mean IoU {iou:.4f}"

    cells = linear.measure_subsets(subject, subsets, learn, "masks")
    return {"model": subject.title, "image_size": size, "trained": cells}


def columns(args: Settings) -> dict:
    """Columns after the model's name: headings, and functions from a row to its text."""
    size = {"pixels": lambda row: str(row["image_size"])}
    return size | linear.figure_columns(args, {f"mIoU, {linear.training_name(args)}": "mean_iou"})

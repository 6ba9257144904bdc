"""Objects in boxes: torchvision's Faster R-CNN or Mask R-CNN on a backbone, trained whole.

`eval_linear.py --task detection` runs it.
"""

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import lowdino
from lowdino import (
    annotations,
    augment,
    data,
    dense,
    distributed,
    image_io,
    linear,
    optim,
    settings,
)
from lowdino.distributed import UserError, user_errors
from lowdino.evaluate import Score, average_precision, match
from lowdino.features import normalisation, open_network
from lowdino.linear import some_of

# The flags of eval_linear.py that this task has beside those of every task.
FLAGS = ("detector", "steps", "layer_decay")

# Streams of random numbers, see augment.derived_seed: flips, and the detector's choice of anchors
# and proposals to learn from.
FLIPS, CHOICES = 2, 3

MAX_NORM = 10.0  # of the gradient; above it a step is shortened


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of what is trained, in one sentence, or None."""
    if not args.models or "pixels" in args.models:
        return "--task detection needs one backbone or more"
    if len(args.lr or [0]) * len(args.weight_decay or [0]) > 1:
        return "--task detection takes one --lr and one --weight_decay"
    if args.layer_decay is not None and not 0 < args.layer_decay <= 1:
        return f"--layer_decay lies above 0, up to 1, not at {args.layer_decay}"
    if args.steps is not None and args.steps < 1:
        return f"--steps must be at least 1, not {args.steps}"
    if args.image_size is not None and args.image_size < 32:
        return f"--image_size must be at least 32 pixels, not {args.image_size}"
    return settings.check_reading(args)


def settle(args: argparse.Namespace) -> None:
    """Fill in the defaults."""
    args.lr, args.weight_decay = args.lr or [1e-3], args.weight_decay or [0.05]
    args.layer_decay = args.layer_decay or 1.0
    args.steps, args.batch_size_per_gpu = args.steps or 300, args.batch_size_per_gpu or 8


NAMES = {"faster_rcnn": "Faster R-CNN", "mask_rcnn": "Mask R-CNN"}


def protocol(args: argparse.Namespace) -> str:
    """What is done, in a sentence for people who compare."""
    decay = f", x {args.layer_decay:g} a block downwards" if args.layer_decay < 1 else ""
    return (
        f"torchvision's {NAMES[args.detector]} on an FPN, trained whole: AdamW, learning rate "
        f"{args.lr[0]:g}{decay}, weight decay {args.weight_decay[0]:g}, {args.steps} steps of "
        f"{args.batch_size_per_gpu} pictures a rank with flips, whatever the share of the boxes; "
        f"batch norm is frozen in pre-trained weights on pictures of {SMALL_SIDE} pixels or more, "
        "else trained; COCO's AP on the test pictures"
    )


# --------------------------------------------------------------------------------------------------
# The detector
# --------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """The numbers of a detector.

    Attributes:
        strides: of the maps. width: channels of the maps and of the mask head. hidden: width of the
            box head. anchors, proposals: of each image, to learn from. kept: proposals of each
            image that are left by non-maximum suppression.
        freeze_bn: keep the batch norm of pre-trained weights as it is.
    """

    strides: tuple[int, ...]
    width: int
    hidden: int
    anchors: int
    proposals: int
    kept: int
    freeze_bn: bool


# torchvision's, made for 800 pixels; and a quarter of the width for pictures of an eighth. There
# batch norm is always trained, so that random and pre-trained weights differ in nothing else. On
# the demo scenes it costs nothing: after 100 steps from the weights of a classifier of glyphs,
# mobilevit_xxs has an AP of 63 with it, and of 62 where it is frozen.
FINEST = 4  # stride of the finest map
LARGE = Recipe((FINEST, 8, 16, 32, 64), 256, 1024, 256, 512, 2000, freeze_bn=True)
SMALL = Recipe((FINEST, 8, 16, 32), 64, 256, 128, 32, 200, freeze_bn=False)
SMALL_SIDE = 200  # pixels


def recipe_for(size: int) -> Recipe:
    return SMALL if size < SMALL_SIDE else LARGE


def anchor_sizes(size: int, strides: tuple[int, ...]) -> tuple[tuple[int], ...]:
    """Sides of the anchors of each map, for images of `size` pixels.

    COCO's recipe has 8 times the stride at 800 pixels. They shrink with the image, but not below 3
    times the stride: an object between two such anchors would be far from both.
    """
    return tuple((round(max(8 * size / 800, 3) * stride),) for stride in strides)


class Maps(nn.Module):
    """The FPN's maps, computed in bfloat16 on CUDA and given in float32.

    Anchors take the type of the maps, and bfloat16 would round them to whole multiples of 4 pixels
    where images have 800.
    """

    def __init__(self, body: dense.FPNBackbone):
        super().__init__()
        self.body, self.out_channels = body, body.out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=x.device.type == "cuda"):
            maps = self.body(x)
        return OrderedDict((name, map.float().contiguous()) for name, map in maps.items())


class RoIAlign(MultiScaleRoIAlign):
    """torchvision's, at the strides that the maps have.

    It guesses them once, from the heights of the first images before they are padded, and then
    takes small ones for half as large. The maps themselves tell the padded size.
    """

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        height, width = next(iter(x.values())).shape[-2:]
        return super().forward(x, boxes, [(FINEST * height, FINEST * width)])


def build(kind: str, backbone: nn.Module, classes: int, size: int, freeze_bn: bool) -> FasterRCNN:
    """torchvision's detector on a backbone, for images with a shorter side of `size` pixels.

    Args:
        kind: "faster_rcnn" or "mask_rcnn".
        classes: without the background.
    """
    recipe = recipe_for(size)
    width, strides = recipe.width, recipe.strides
    maps = Maps(dense.fpn_backbone(backbone, width, strides, freeze_bn))
    mean, std = normalisation(backbone)
    pooled = ["0", "1", "2", "3"]  # the names of the maps; a fifth is the proposals' alone
    heads = {
        "box_roi_pool": RoIAlign(pooled, output_size=7, sampling_ratio=2),
        "box_head": TwoMLPHead(width * 7**2, recipe.hidden),
        "box_predictor": FastRCNNPredictor(recipe.hidden, classes + 1),
    }
    if kind == "mask_rcnn":
        heads["mask_roi_pool"] = RoIAlign(pooled, output_size=14, sampling_ratio=2)
        heads["mask_head"] = MaskRCNNHeads(width, (width,) * 4, dilation=1)
        heads["mask_predictor"] = MaskRCNNPredictor(width, width, classes + 1)
    anchors = AnchorGenerator(anchor_sizes(size, strides), ((0.5, 1.0, 2.0),) * len(strides))
    return (MaskRCNN if kind == "mask_rcnn" else FasterRCNN)(
        maps,
        min_size=size,
        max_size=round(size * 1333 / 800),
        image_mean=mean,
        image_std=std,
        rpn_anchor_generator=anchors,
        rpn_batch_size_per_image=recipe.anchors,
        rpn_pre_nms_top_n_train=recipe.kept,
        rpn_post_nms_top_n_train=recipe.kept,
        rpn_pre_nms_top_n_test=recipe.kept // 2,
        rpn_post_nms_top_n_test=recipe.kept // 2,
        box_batch_size_per_image=recipe.proposals,
        **heads,
    )


# --------------------------------------------------------------------------------------------------
# Batches. A loader gives them as flat lists of tensors, which is what its processes can send.
# --------------------------------------------------------------------------------------------------

Item = tuple[Tensor, dict[str, Tensor]]


def kinds_of(args: argparse.Namespace) -> list[str]:
    """What the detector finds of each object, by which its AP is named."""
    return ["boxes", *["masks"] * (args.detector == "mask_rcnn")]


def flat(items: list[Item], names: list[str]) -> list[Tensor]:
    return [tensor for image, target in items for tensor in (image, *map(target.get, names))]


def batches(
    pictures: Dataset,
    kinds: list[str],
    order: Iterable[list[int]],
    workers: int,
    device: torch.device,
) -> Iterator[list[Item]]:
    """The pictures and what is in them, of each list of indices in `order`.

    Args:
        kinds: "boxes", and "masks" where they are wanted.
    """
    names = [*annotations.OF_BOXES, *(kind for kind in kinds if kind != "boxes")]
    collate, pinned = partial(flat, names=names), device.type == "cuda"
    loader: DataLoader = data.open_loader(
        pictures, workers, batch_sampler=order, collate_fn=collate, pin_memory=pinned
    )
    for tensors in loader:
        values = iter([tensor.to(device, non_blocking=True) for tensor in tensors])
        yield [(image, {name: next(values) for name in names}) for image in values]


def flipped(image: Tensor, target: dict[str, Tensor]) -> Item:
    """An image and what is in it, left and right exchanged."""
    left, top, right, bottom = target["boxes"].unbind(dim=1)
    width = image.shape[2]
    target = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    return image.flip(2), target


def training_batch(items: list[Item], seed: int, step: int, rank: int):
    """Images in [0, 1] and targets as torchvision's detectors take them.

    Half of the images are flipped. Crowds and difficult objects are left out.
    """
    generator = augment.seeded_generator("cpu", FLIPS, seed, step, rank)
    flips = torch.rand(len(items), generator=generator) < 0.5
    items = [flipped(*item) if flip else item for item, flip in zip(items, flips)]
    targets = []
    for _, target in items:
        kept = ~(target["crowd"] | target["difficult"])
        names = [name for name in target if name not in ("crowd", "difficult")]
        targets.append({name: target[name][kept] for name in names})
    return [image / 255 for image, _ in items], targets


# --------------------------------------------------------------------------------------------------
# Training and evaluation
# --------------------------------------------------------------------------------------------------


def learn(
    args, name: str, source: annotations.Source, chosen: list[int], size: int, seed: int, ranks
) -> FasterRCNN:
    """The detector, trained from the network `name` on with the pictures at indices `chosen`.

    Raises:
        UserError: where the pictures are fewer than the ranks; `linear.Diverged`.
    """
    batch = min(args.batch_size_per_gpu, len(chosen) // ranks.world)
    if batch == 0:
        raise UserError(f"{len(chosen)} pictures are fewer than the {ranks.world} ranks")
    if batch == 1 and size <= 32:
        raise UserError("batch norm needs two pictures a rank or more where they have 32 pixels")
    _, backbone = open_network(name, seed)
    torch.manual_seed(seed)
    freeze_bn = recipe_for(size).freeze_bn and name not in lowdino.ARCHS
    detector = build(args.detector, backbone, len(source.names), size, freeze_bn)
    detector = distributed.on_device(detector, ranks)
    own = {*backbone.parameters()}
    head = nn.ParameterList(p for p in detector.parameters() if p not in own)
    groups = optim.layerwise_groups(backbone, head, args.layer_decay)
    pictures, kinds = Subset(source.train, chosen), kinds_of(args)
    order = data.TrainingBatches(len(chosen), batch, seed, 0, args.steps, ranks.rank, ranks.world)
    workers = data.loader_processes(pictures, args.num_workers)
    model = distributed.data_parallel(detector).train()

    def losses() -> Iterator[Tensor]:
        for step, items in enumerate(batches(pictures, kinds, order, workers, ranks.device)):
            images, targets = training_batch(items, seed, step, ranks.rank)
            torch.manual_seed(augment.derived_seed(CHOICES, seed, step, ranks.rank))
            yield sum(model(images, targets).values())

    linear.adamw_steps(losses(), groups, args, args.steps, ranks, MAX_NORM)
    if not freeze_bn:
        few = min(args.steps, 20)
        order = data.TrainingBatches(len(chosen), batch, seed, 0, few, ranks.rank, ranks.world)
        settle_batch_norm(detector, batches(pictures, kinds, order, workers, ranks.device))
        distributed.broadcast_buffers(detector)
    return detector


def settle_batch_norm(detector: FasterRCNN, found: Iterable[list[Item]]) -> None:
    """Replace batch norm's moving averages, which lag behind, by the mean over some batches."""
    views = (detector.transform([image / 255 for image, _ in items])[0].tensors for items in found)
    linear.settle_batch_norm(detector.backbone, views)


@user_errors()
@torch.no_grad()
def evaluate(detector: FasterRCNN, pictures: Dataset, batch: int, workers: int, ranks):
    """The detector's AP by kind, "boxes" and, of Mask R-CNN, "masks", on all pictures.

    Each rank does its share.
    """
    detector.eval()
    order = linear.shares(len(pictures), batch, ranks)
    kinds = ["boxes", *["masks"] * isinstance(detector, MaskRCNN)]
    matches = {kind: [] for kind in kinds}
    for items in batches(pictures, kinds, order, workers, ranks.device):
        for found, (_, target) in zip(detector([image / 255 for image, _ in items]), items):
            if "masks" in found:
                found["masks"] = found["masks"][:, 0] > 0.5
            found, target = ({k: v.cpu() for k, v in part.items()} for part in (found, target))
            for kind in kinds:
                matches[kind].append(match(found, target, kind))
    parts = distributed.gather_objects(matches)
    return {
        kind: average_precision(
            [parts[i % ranks.world][kind][i // ranks.world] for i in range(len(pictures))]
        )
        for kind in kinds
    }


def suitable_size(pictures: Dataset) -> int:
    """The median of the shorter side to the nearest whole 32 pixels, 32 to 800.

    torchvision pads images to whole 32s.
    """
    return min(max(round(statistics.median(map(min, pictures.sizes)) / 32), 1) * 32, 800)


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def measure(args, name: str, opened, number: int, ranks: distributed.Ranks) -> dict:
    """All figures of one model: row `number` of the table."""
    title, backbone = opened
    channels = len(normalisation(backbone)[0])
    as_read = image_io.PixelFormat(channels, max_megapixels=args.max_megapixels)
    where = args.data_path, args.data_root, args.download
    source = annotations.load(*where, args.detector == "mask_rcnn", as_read, ranks.rank)
    said = ""
    if isinstance(source.train, annotations.Pictures):
        paths = [picture.path for picture in source.train.pictures]
        known = getattr(backbone, "value_range", None)
        images = data.ImageFiles(paths, pixel_format=as_read)
        value_range, said = data.choose_value_range(images, source.name, args.value_range, known)
        as_read = as_read._replace(value_range=value_range)
        source.train.pixels = source.test.pixels = as_read
    if len(source.train[0][0]) != channels:
        raise UserError(f"{source.name} are pictures in colours, and {title} is of {channels}")
    size = args.image_size or suitable_size(source.train)
    parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
    row = {"model": title, "parameters_M": parameters, "image_size": size, "trained": []}
    if ranks.first:
        if number == 1 and source.notes:
            print("\n".join(source.notes))
        counts = f"{len(source.train)} training and {len(source.test)} test pictures"
        classes = f"{len(source.names)} classes"
        print(f"{title}; {source.name}: {counts}, {classes}, {size} px{said}", flush=True)
    torch.backends.cudnn.benchmark = False  # it would time its algorithms for every shape anew
    start = time.perf_counter()
    for fraction in args.label_fraction:
        cell = {"label_fraction": fraction, "seeds": args.seeds, "pictures": []}
        for seed in args.seeds:
            chosen = some_of(len(source.train), fraction, seed)
            detector = learn(args, name, source, chosen, size, seed, ranks)
            workers = data.loader_processes(source.test, args.num_workers)
            batch = args.batch_size_per_gpu
            scores = evaluate(detector, source.test, batch, workers, ranks)
            cell["pictures"].append(len(chosen))
            for kind, score in scores.items():
                cell.setdefault(f"{kind}_ap50", []).append(score.ap50)
                cell.setdefault(f"{kind}_ap", []).append(score.ap)
            if ranks.first:
                seconds = time.perf_counter() - start
                print(
                    f"  {fraction:g} of the pictures ({len(chosen)}), seed {seed}: "
                    f"{in_words(scores)} after {seconds:.0f} s",
                    flush=True,
                )
        row["trained"].append(cell)
    return row


def in_words(scores: dict[str, Score]) -> str:
    return ", ".join(f"AP50 of {k} {s.ap50:.4f}, AP {s.ap:.4f}" for k, s in scores.items())


def headings(args: argparse.Namespace) -> list[str]:
    """The columns behind the model's name."""
    figures = [f"{ap} of {kind}" for kind in kinds_of(args) for ap in ("AP50", "AP")]
    shares = [f"{100 * fraction:g} %" for fraction in args.label_fraction]
    return ["pixels", *(f"{figure}, {share}" for share in shares for figure in figures)]


def cells(args: argparse.Namespace, row: dict) -> list[str]:
    """What a row has in these columns, in percent."""
    names = [f"{kind}_{ap}" for kind in kinds_of(args) for ap in ("ap50", "ap")]
    figures = [linear.percent(cell[name]) for cell in row["trained"] for name in names]
    return [str(row["image_size"]), *figures]

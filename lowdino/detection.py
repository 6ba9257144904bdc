"""Objects in boxes: torchvision's Faster R-CNN on a backbone, all of it trained.

`eval_linear.py --task detection` runs it.
"""

import statistics
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import lowdino
from lowdino import annotations, augment, dense, distributed, linear, optim
from lowdino.distributed import user_errors
from lowdino.evaluate import Score, average_precision, match
from lowdino.features import normalisation, open_network
from lowdino.schedules import Stream
from lowdino.settings import Settings

# The flags of eval_linear.py that belong to this task and not to every task.
FLAGS = ("steps", "layer_decay")
MAX_NORM = 10.0  # limit of the gradient's norm


def check(args: Settings) -> str | None:
    """The first error in the flags of this task, in one sentence, or None."""
    if error := linear.check_dense(args):
        return error
    if args.layer_decay is not None and not 0 < args.layer_decay <= 1:
        return f"--layer_decay lies above 0, up to 1, not at {args.layer_decay}"
    return None


def defaults(args: Settings) -> dict:
    """Values of the flags that are not given."""
    return dict(lr=[1e-3], weight_decay=[0.05], layer_decay=1.0, steps=300, batch_size_per_gpu=8)


def protocol(args: Settings) -> str:
    """The training and its settings, in one sentence for people who compare."""
    rates = f"learning rate {args.lr[0]:g}"
    rates += f", x {args.layer_decay:g} per block downwards" if args.layer_decay < 1 else ""
    return (
        f"torchvision's Faster R-CNN on an FPN, all weights trained: AdamW, {rates}, "
        f"weight decay {args.weight_decay[0]:g}, {args.steps} steps of {args.batch_size_per_gpu} "
        "pictures per process with flips, the same at every fraction of the pictures; batch norm "
        f"is frozen in pre-trained weights on pictures of {SMALL_SIDE} pixels or more, else "
        "trained; COCO's AP on the test pictures"
    )


# -- The detector ----------------------------------------------------------------------------------


class DetectorSize(NamedTuple):
    """The numbers of a detector."""

    strides: tuple[int, ...]  # of the maps
    width: int  # channels of the maps
    hidden: int  # width of the box head
    anchors: int  # per image to train on
    proposals: int  # per image to train on
    kept: int  # proposals per image after non-maximum suppression
    freeze_bn: bool  # keep the batch norm of pre-trained weights as it is


# LARGE is torchvision's, made for 800 pixels. SMALL, for an eighth of them, has a quarter of the
# width. It always trains batch norm, so that random and pre-trained weights differ in nothing else;
# on the demo scenes this costs no AP.
FINEST = 4  # stride of the finest map
LARGE = DetectorSize((FINEST, 8, 16, 32, 64), 256, 1024, 256, 512, 2000, freeze_bn=True)
SMALL = DetectorSize((FINEST, 8, 16, 32), 64, 256, 128, 32, 200, freeze_bn=False)
SMALL_SIDE = 200  # pixels


def detector_size(size: int) -> DetectorSize:
    return SMALL if size < SMALL_SIDE else LARGE


def anchor_sizes(size: int, strides: tuple[int, ...]) -> tuple[tuple[int], ...]:
    """Sides of the anchors of each map, for images of `size` pixels: COCO's 8 strides at 800.

    Below 3 strides an object between two anchors would be far from both.
    """
    return tuple((round(max(8 * size / 800, 3) * stride),) for stride in strides)


class Maps(nn.Module):
    """The FPN's maps, computed in bfloat16 on CUDA and returned in float32.

    Anchors take the type of the maps, and bfloat16 would round them to 4 pixels in images of 800.
    """

    def __init__(self, body: dense.FPNBackbone):
        super().__init__()
        self.body, self.out_channels = body, body.out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        with linear.autocast(x.device):
            maps = self.body(x)
        return OrderedDict((name, map.float().contiguous()) for name, map in maps.items())


class RoIAlign(MultiScaleRoIAlign):
    """torchvision's RoI align, at the true strides of the maps.

    torchvision guesses the strides once, from the heights of the first images before padding, and
    then takes small images for half as large. The size of the maps gives the padded size.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        height, width = next(iter(x.values())).shape[-2:]
        return super().forward(x, boxes, [(FINEST * height, FINEST * width)])


def build(backbone: nn.Module, classes: int, size: int, freeze_bn: bool) -> FasterRCNN:
    """torchvision's detector on a backbone, for images with a shorter side of `size` pixels.

    `classes` does not count the background.
    """
    numbers, (mean, std) = detector_size(size), normalisation(backbone)
    width, strides = numbers.width, numbers.strides
    maps = Maps(dense.fpn_backbone(backbone, width, strides, freeze_bn))
    pooled = ["0", "1", "2", "3"]  # names of the maps; a fifth map is for proposals only
    anchors = AnchorGenerator(anchor_sizes(size, strides), ((0.5, 1.0, 2.0),) * len(strides))
    return FasterRCNN(
        maps,
        min_size=size,
        max_size=round(size * 1333 / 800),
        image_mean=mean,
        image_std=std,
        rpn_anchor_generator=anchors,
        rpn_batch_size_per_image=numbers.anchors,
        rpn_pre_nms_top_n_train=numbers.kept,
        rpn_post_nms_top_n_train=numbers.kept,
        rpn_pre_nms_top_n_test=numbers.kept // 2,
        rpn_post_nms_top_n_test=numbers.kept // 2,
        box_batch_size_per_image=numbers.proposals,
        box_roi_pool=RoIAlign(pooled, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(width * 7**2, numbers.hidden),
        box_predictor=FastRCNNPredictor(numbers.hidden, classes + 1),
    )


Item = tuple[Tensor, dict[str, Tensor]]


def images_of(items: list[Item]) -> list[Tensor]:
    return [image / 255 for image, _ in items]  # in [0, 1]


def flipped(image: Tensor, target: dict[str, Tensor]) -> Item:
    """An image and its target, left and right exchanged."""
    left, top, right, bottom = target["boxes"].unbind(dim=1)
    left, right = image.shape[2] - right, image.shape[2] - left
    return image.flip(2), target | {"boxes": torch.stack([left, top, right, bottom], dim=1)}


def training_batch(items: list[Item], seed: int, step: int, rank: int):
    """Images and targets for torchvision's detectors: half flipped, without what does not count."""
    generator = augment.seeded_generator("cpu", Stream.LABELLED_VIEWS, seed, step, rank)
    flips = torch.rand(len(items), generator=generator) < 0.5
    items = [flipped(*item) if flip else item for item, flip in zip(items, flips)]
    targets = [{n: t[n][~t["crowd"]] for n in ("boxes", "labels")} for _, t in items]
    return images_of(items), targets


def train(subject: linear.Subject, indices: list[int], seed: int) -> FasterRCNN:
    """A detector on the network, trained on the pictures at `indices`."""
    args, ranks, source, size = subject.args, subject.ranks, subject.source, subject.size
    # At 32 pixels the coarsest map is one cell, which has no variance.
    order = linear.training_order(subject, len(indices), seed, batch_norm=size <= 32)
    _, backbone = open_network(subject.name, seed)
    torch.manual_seed(seed)
    freeze_bn = detector_size(size).freeze_bn and subject.name not in lowdino.ARCHS
    detector = distributed.on_device(build(backbone, len(source.names), size, freeze_bn), ranks)
    pictures, body = Subset(source.train, indices), {*backbone.parameters()}
    head = nn.ParameterList(p for p in detector.parameters() if p not in body)
    groups = optim.layerwise_groups(backbone, head, args.layer_decay)
    optimizer = linear.CosineAdamW(subject, groups, len(order), MAX_NORM)
    model = distributed.data_parallel(detector).train()
    for step, items in enumerate(linear.picture_batches(subject, pictures, order)):
        images, targets = training_batch(items, seed, step, ranks.rank)
        torch.manual_seed(augment.derived_seed(Stream.PROPOSALS, seed, step, ranks.rank))
        optimizer.step(sum(model(images, targets).values()))
    if not freeze_bn:
        again = linear.picture_batches(subject, pictures, order)
        views = (detector.transform(images_of(items))[0].tensors for items in again)
        linear.estimate_batch_norm(detector.backbone, views)
    return detector


@user_errors()
@torch.no_grad()
def evaluate(subject: linear.Subject, detector: FasterRCNN) -> Score:
    """The detector's AP; each rank does its share."""
    detector.eval()
    pictures, world, matches = subject.source.test, subject.ranks.world, []
    order = linear.rank_batches(subject, len(pictures))
    for items in linear.picture_batches(subject, pictures, order):
        for detected, (_, target) in zip(detector(images_of(items)), items):
            pair = [{k: v.cpu() for k, v in part.items()} for part in (detected, target)]
            matches.append(match(*pair))
    parts = distributed.gather_objects(matches)
    return average_precision([parts[i % world][i // world] for i in range(len(pictures))])


def suitable_size(pictures: Dataset) -> int:
    """The median of the shorter side in whole 32 pixels, torchvision's unit; from 32 to 800."""
    return min(max(round(statistics.median(map(min, pictures.sizes)) / 32), 1) * 32, 800)


def measure(subject: linear.Subject) -> dict:
    """All figures of one model: its row of the table."""
    args = subject.args
    source, remark = linear.open_pictures(subject, partial(annotations.load, args.data_path))
    subject = replace(subject, source=source, size=args.image_size or suitable_size(source.train))
    linear.print_pictures(subject, len(source.names), remark)
    torch.backends.cudnn.benchmark = False  # it would time its algorithms for every shape

    def learn(indices: Sequence[int], seed: int, _: str) -> tuple[dict, str]:
        ap50, ap, _ = evaluate(subject, train(subject, indices, seed))
        return {"ap50": ap50, "ap": ap}, f"AP50 {ap50:.4f}, AP {ap:.4f}"

    subsets = linear.subsets_of(args, partial(linear.random_subset, len(source.train)))
    parameters = sum(p.numel() for p in subject.backbone.parameters()) / 1e6
    row = {"model": subject.title, "parameters_M": parameters, "image_size": subject.size}
    return row | {"trained": linear.measure_subsets(subject, subsets, learn, "pictures")}


def columns(args: Settings) -> dict:
    """Columns after the model's name: headings, and functions from a row to its text."""
    figures = linear.figure_columns(args, {"AP50,": "ap50", "AP,": "ap"})
    return {"pixels": lambda row: str(row["image_size"])} | figures

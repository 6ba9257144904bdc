"""What tests of distillation share: small teachers and students, their flags, and one batch."""

from pathlib import Path

import torch
from conftest import demo_array
from pytest import MonkeyPatch
from runs import options
from torch import nn

import distill
import lowdino
from lowdino import (
    checkpoint,
    data,
    datasets,
    demo,
    distillation,
    distributed,
    features,
    settings,
)
from lowdino.distillation import Distillation
from lowdino.features import cached_features

RANKS = distributed.Ranks(0, 1, torch.device("cpu"))
SMALL = (
    "--arch mobilevit_xxs --batch_size_per_gpu 8 --epochs 2 --warmup_epochs 1 --device cpu "
    "--log_freq 2 --global_crops_size 32 --global_crops_number 2 --knn_freq 1 --amp none"
).split()


def student(text="", **named):
    """Flags of distill.py for a small student on a CPU, and more."""
    return SMALL + options(text, **named)


def parse(*flags, teacher="a.pth"):
    """The flags of distill.py, parsed."""
    return settings.resolve(distill.get_parser(), ["--teacher", teacher, *map(str, flags)])


def save_teacher(path, **more):
    """A file of a small backbone, and the path."""
    torch.manual_seed(3)
    backbone = lowdino.build_backbone("mobilevit_xxs")
    checkpoint.save_backbone(path, backbone, "mobilevit_xxs", 32, 1, **more)
    return path


class Counted(nn.Module):
    """A network that counts the images that it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.seen = nn.Conv2d(3, 24, 8, 8), 0

    def forward(self, x):
        self.seen += len(x)
        return self.conv(x).mean(dim=(2, 3))


def distill_method(network, text="", **named):
    """The method that distill.py makes for demo images.

    Args:
        network: the teacher; None for the one that the flags name.
        text, named: flags, as `runs.options` takes them.
    """
    args = parse(*student("--knn_freq 0 --num_workers 0"), *options(text, **named), teacher="a:b")
    images = demo_array(range(40))
    source = datasets.Source("some", images, images, demo_array(range(50, 60)), 10)
    with MonkeyPatch.context() as patch:
        patch.setattr(distillation, "imported", lambda path: network)
        teacher = distillation.open_teacher(args, source, RANKS)
    if args.cache_teacher:
        path, teacher.images = Path(args.cache_teacher), images
        teacher.features = cached_features(teacher, images, path, 0, RANKS)
    distillation.add_classifier(teacher, args, source, RANKS)
    return Distillation(features.build_backbone(args), args, teacher, total_steps=10)


def batch_of_demo(indices):
    """A batch of demo images, their indices for labels too."""
    images, _ = demo.demo_images(indices)
    indices = torch.as_tensor(indices)
    sizes = torch.full((len(images), 2), demo.SIDE)
    return data.Batch(images, sizes, indices, indices)


def two_corners(batch):
    """Two views (B, 3, 32, 32) of a batch of demo images."""
    images = batch.images
    return [images[:, :, :32, :32] / 128.0 - 1, images[:, :, 32:, 32:] / 128.0 - 1]

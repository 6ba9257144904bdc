"""Frozen networks: opened by name or file, and their features of a set of images over all ranks."""

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import lowdino
from lowdino import augment, data, distributed, evaluate


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


def open_network(name: str, seed: int = 0) -> tuple[str, nn.Module]:
    """A network by name, in words and as a module.

    Args:
        name: "pixels"; an architecture, for its random initialisation; a file that
            `lowdino.load_backbone` takes; or ARCH=FILE, for a plain state dict of a ConvNet.
        seed: of a random initialisation.

    Raises:
        UserError: where there is no such file or architecture.
    """
    if name == "pixels":
        return "raw pixels", nn.Sequential(Shrink(), nn.Flatten())
    arch, equals, weights = name.partition("=")
    torch.manual_seed(seed)
    if arch in lowdino.ARCHS and not equals:
        return f"{arch} at random initialisation, seed {seed}", lowdino.build_backbone(arch)
    if arch not in lowdino.ARCHS:
        if not os.path.exists(name):
            known = ", ".join(lowdino.ARCHS)
            raise UserError(f"no file {name}, and no such architecture; there are {known}")
        arch, weights = None, name
    backbone = lowdino.load_backbone(weights, arch)
    epoch = f", epoch {backbone.epoch}" if hasattr(backbone, "epoch") else ""
    return f"{backbone.arch} of {weights}{epoch}", backbone


class Shrink(nn.Module):
    """Images of more than 32 x 32 pixels to 32 x 32, by the mean of areas.

    More pixels tell no more, and a probe's cost grows with the square of their number.
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 32) if x.shape[-1] > 32 else x


class Pooled(nn.Module):
    """A backbone with other pooling: mean or maximum of the last map, or beside the default."""

    def __init__(self, backbone: nn.Module, pool: str):
        super().__init__()
        self.backbone, self.pool = backbone, pool

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.forward_features(x).flatten(2)  # (B, C, h * w)
        features = features.amax(dim=2) if self.pool.endswith("max") else features.mean(dim=2)
        if self.pool.startswith("default+"):
            features = torch.cat([self.backbone(x), features], dim=1)
        return features  # (B, C) or (B, D + C)


def pooled(backbone: nn.Module, pool: str) -> nn.Module:
    return backbone if pool == "default" else Pooled(backbone, pool)


def normalisation(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std by channel that a network's inputs need; ImageNet's where it says none."""
    mean = getattr(network, "mean", augment.IMAGENET_MEAN)
    return mean, getattr(network, "std", augment.IMAGENET_STD)


def check_finite(found: Tensor, what: str) -> None:
    """Refuse what a network gives, named by `what`, where some of it is not finite."""
    if not found.isfinite().all():
        raise UserError(
            f"the network gives {what} that are not finite numbers: its weights are damaged, or "
            "diverged"
        )


def own_features(
    backbone: nn.Module,
    images: data.ImageArray | data.ImageFiles,
    size: int,
    ranks: distributed.Ranks,
    batch_size: int = 256,
    workers: int = 0,
    pool: str = "default",
    through: Callable[[Iterable], Iterable] = iter,
) -> tuple[Tensor, Tensor]:
    """Features and labels of this rank's share of the images, as `features` has those of all.

    Args:
        through: what the batches pass through on their way.
    """
    mean, std = normalisation(backbone)

    def view(canvas: Tensor, sizes: Tensor) -> Tensor:
        x = augment.central_view(canvas, sizes, size, mean, std)
        return x.contiguous(memory_format=torch.channels_last)

    batches = data.evaluation_loader(images, batch_size, workers, ranks.rank, ranks.world)
    network = pooled(backbone, pool)
    return evaluate.extract_features(network, through(batches), view, ranks.device)


def features(
    backbone: nn.Module,
    images: data.ImageArray | data.ImageFiles,
    size: int,
    ranks: distributed.Ranks,
    batch_size: int = 256,
    workers: int = 0,
    pool: str = "default",
) -> evaluate.Features:
    """Features of the central view of all images, on every rank, each having done its share.

    Returns:
        float32 features (N, D), labels (N,) and names of files.

    Raises:
        UserError: where some are not finite.
    """
    own = own_features(backbone, images, size, ranks, batch_size, workers, pool)
    names = getattr(images, "paths", None) or [str(i) for i in range(len(images))]
    rows = (distributed.gather_strided(part, len(images)) for part in own)
    found = evaluate.Features(*rows, names)
    check_finite(found.features, "features")
    return found

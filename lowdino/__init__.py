"""LowDINO: small networks that learn to see without labels."""

from torch import nn

from lowdino import models
from lowdino.checkpoint import load, load_backbone_weights

__all__ = ["build_backbone", "load_backbone"]


def build_backbone(arch: str) -> nn.Module:
    """A backbone at random initialisation, its name in `arch`; see `lowdino.models` for the architectures and their contract.

    Raises:
        ValueError: for an unknown architecture.
    """
    if arch not in models.ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(models.ARCHS)}")
    backbone = getattr(models, arch)()
    backbone.arch = arch
    return backbone


def load_backbone(path: str) -> nn.Module:
    """A trained backbone in eval mode, from the `backbone.pth` that train.py writes.

    Beside the contract of `lowdino.models` it has `arch`, `mean`, `std`, `image_size` and `epoch`: feed it float images
    in [0, 1], resized to about `image_size`, minus `mean`, over `std`, by channel.

    Raises:
        ValueError: where the file is missing, damaged or of another kind.
    """
    content = load(path)
    lacking = [key for key in ("arch", "state_dict", "mean", "std", "image_size", "epoch") if key not in content]
    if lacking:
        raise ValueError(f"{path} is not a backbone file of this library: it lacks {', '.join(lacking)}")
    backbone = build_backbone(content["arch"])
    load_backbone_weights(backbone, content, str(path))
    for key in ("image_size", "epoch"):
        setattr(backbone, key, content[key])
    backbone.mean, backbone.std = tuple(content["mean"]), tuple(content["std"])
    return backbone.eval()

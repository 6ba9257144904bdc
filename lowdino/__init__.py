"""LowDINO: small networks that learn to see without labels."""

from torch import nn

from lowdino import models, vit
from lowdino.checkpoint import load, load_backbone_weights, weights_of

__all__ = ["ARCHS", "build_backbone", "load_backbone"]

ARCHS = models.ARCHS + vit.ARCHS


def build_backbone(arch: str, **options) -> nn.Module:
    """A backbone at random initialisation, its name in `arch`; see `lowdino.models` and `lowdino.vit` for the contract.

    Args:
        options: of a Vision Transformer: patch_size (16) and image_size (224), in pixels.

    Raises:
        ValueError: for an unknown architecture.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHS)}")
    backbone = getattr(vit if arch in vit.ARCHS else models, arch)(**options)
    backbone.arch = arch
    return backbone


def load_backbone(path: str, arch: str | None = None) -> nn.Module:
    """A trained backbone in eval mode.

    Args:
        path: the `backbone.pth` that train.py writes, or a plain state dict: DINO's and DINOv2's Vision Transformers,
            DINO's ResNet-50, torchvision's ConvNets, timm's MobileViT.
        arch: name of the architecture, which a plain state dict of a ConvNet needs.

    Beside the contract of `lowdino.models` it has `arch` and, from a `backbone.pth`, `mean`, `std`, `image_size` and
    `epoch`: feed it float images in [0, 1], resized to about `image_size`, minus `mean`, over `std`, by channel.

    Raises:
        ValueError: where the file is missing, damaged or of another kind or architecture.
    """
    content = load(path)
    if arch and content.get("arch", arch) != arch:
        raise ValueError(f"{path} holds {content['arch']}, not {arch}")
    arch = arch or content.get("arch")
    weights = weights_of(content, path)
    if arch not in models.ARCHS and "pos_embed" in weights:
        try:
            backbone = vit.like(weights)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        backbone.arch = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}.get(
            backbone.embed_dim, "vit"
        )
        if arch not in (None, backbone.arch):
            raise ValueError(f"{path} holds a {backbone.arch}, not {arch}")
    elif arch:
        backbone = build_backbone(arch)
    else:
        raise ValueError(
            f"{path} does not say of which architecture it is; name it: {', '.join(ARCHS)}"
        )
    load_backbone_weights(backbone, content, str(path))
    if "arch" in content:
        for key in ("mean", "std", "image_size", "epoch"):
            if key not in content:
                raise ValueError(f"{path} is not a whole backbone file: it lacks {key}")
            setattr(backbone, key, tuple(content[key]) if key in ("mean", "std") else content[key])
    return backbone.eval()

"""LowDINO: small networks that learn to see without labels."""

from torch import Tensor, nn

from lowdino import models, vit
from lowdino.checkpoint import UserError, load, load_backbone_weights, weights_of

__all__ = ["ARCHS", "build_backbone", "load_backbone"]

ARCHS = models.ARCHS + vit.ARCHS


def build_backbone(arch: str, **options) -> nn.Module:
    """A backbone at random initialisation, its name in `arch`.

    See `lowdino.models` and `lowdino.vit` for the contract.

    Args:
        options: of a Vision Transformer: patch_size (16) and image_size (224), in pixels.

    Raises:
        UserError: for an unknown architecture.
    """
    if arch not in ARCHS:
        raise UserError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHS)}")
    backbone = getattr(vit if arch in vit.ARCHS else models, arch)(**options)
    backbone.arch = arch
    return backbone


def load_backbone(path: str, arch: str | None = None) -> nn.Module:
    """A trained backbone in eval mode.

    Args:
        path: the `backbone.pth` that train.py writes, a training checkpoint of DINO's official
            code, or a state dict, plain or as `state_dict` in a dict: DINO's and DINOv2's Vision
            Transformers, DINO's ResNet-50, torchvision's ConvNets, timm's MobileViT.
        arch: name of the architecture, which a ConvNet's file needs unless it says it.

    Beside the contract of `lowdino.models` it has `arch` and, where the file says them,
    `image_size` and `epoch`. Feed it float images in [0, 1], resized to about `image_size`, minus
    `mean`, over `std`, by channel.

    Raises:
        UserError: where the file is missing, damaged or of another kind or architecture.
    """
    content = load(path)
    if arch and content.get("arch", arch) != arch:
        raise UserError(f"{path} holds {content['arch']}, not {arch}")
    backbone = network_for(weights_of(content, path), arch or arch_of(content), path)
    if arch and arch != backbone.arch:
        raise UserError(f"{path} holds a {backbone.arch}, not {arch}")
    load_backbone_weights(backbone, content, str(path))
    if "mean" in content and "std" in content:
        backbone.mean, backbone.std = tuple(content["mean"]), tuple(content["std"])
    elif backbone.arch.startswith("mobilevit"):
        # Ours always say their own; timm's, the only others, expect images in [0, 1] as they are.
        backbone.mean, backbone.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for key in ("image_size", "epoch"):
        if key in content:
            setattr(backbone, key, content[key])
    return backbone.eval()


def arch_of(content: dict) -> str | None:
    """The architecture that a file names, itself or by the flags of the run that wrote it."""
    return content.get("arch", getattr(content.get("args"), "arch", None))


def network_for(weights: dict[str, Tensor], arch: str | None, path: str) -> nn.Module:
    """A network, at random weights, for a file's weights; a Vision Transformer's tell its shape."""
    if arch not in models.ARCHS and "pos_embed" in weights:
        try:
            backbone = vit.like(weights)
        except vit.UserError as error:
            raise UserError(f"{path}: {error}") from error
        names = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
        backbone.arch = names.get(backbone.embed_dim, "vit")
        return backbone
    if not arch:
        raise UserError(
            f"{path} does not say of which architecture it is; name it: {', '.join(ARCHS)}"
        )
    return build_backbone(arch)

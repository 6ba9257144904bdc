"""LowDINO: small networks that learn to see without labels."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lowdino import augment, data, dense, image_io, models, vit
from lowdino.checkpoint import load, load_backbone_weights, weights_of
from lowdino.distributed import UserError, user_errors

__all__ = ["ARCHS", "build_backbone", "dense", "load_backbone", "open_image"]
__version__ = "0.1.0"  # that of setup.py

ARCHS = models.ARCHS + vit.ARCHS


@user_errors()
def build_backbone(arch: str, in_chans: int = 3, **options) -> nn.Module:
    """A backbone at random initialisation. `lowdino.models` and `lowdino.vit` state its contract.

    Args:
        arch: one of `ARCHS`, kept as the backbone's `arch`; a UserError for any other.
        in_chans: number of input channels. Unless it is 3, set `mean` and `std` from your images.
        options: of a Vision Transformer: patch_size (16) and image_size (224), in pixels.
    """
    if arch not in ARCHS:
        raise UserError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHS)}")
    backbone = getattr(vit if arch in vit.ARCHS else models, arch)(**options)
    backbone.arch = arch
    models.set_in_chans(backbone, in_chans)
    return backbone


@user_errors()
def load_backbone(path: str, arch: str | None = None) -> nn.Module:
    """A trained backbone in eval mode.

    Args:
        path: the `backbone.pth` of train.py, a training checkpoint of DINO's official code, or a
            state dict, plain or as `state_dict` in a dict: DINO's and DINOv2's Vision Transformers,
            DINO's ResNet-50, torchvision's ConvNets, timm's MobileViT.
        arch: name of the architecture, needed for the file of a ConvNet that does not name it.

    It also has `arch` and, where the file has them, `image_size`, `value_range`, `epoch` and
    `whitening`, a linear layer that half-whitens its features (else an identity). Its input, as
    `open_image` makes it, is float images in [0, 1], resized to about `image_size`, minus `mean`,
    over `std`. A UserError says that the file is missing, damaged or of another kind.
    """
    content = load(path)
    if arch and content.get("arch", arch) != arch:
        raise UserError(f"{path} holds {content['arch']}, not {arch}")
    weights = weights_of(content, path)
    named = content.get("arch", getattr(content.get("args"), "arch", None))  # itself or by a flag
    backbone = network_for(weights, arch or named, path)
    if arch and arch != backbone.arch:
        raise UserError(f"{path} holds a {backbone.arch}, not {arch}")
    stem = weights.get(f"{models.stem_of(backbone)[0]}.weight")
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    models.set_in_chans(backbone, channels)
    if "whitening.weight" in weights:
        backbone.whitening = nn.Linear(*weights["whitening.weight"].shape).requires_grad_(False)
    load_backbone_weights(backbone, content, str(path))
    if "mean" in content and "std" in content:
        backbone.mean, backbone.std = tuple(content["mean"]), tuple(content["std"])
    elif backbone.arch.startswith("mobilevit"):
        # Our files have both; timm's, the only others, expect images in [0, 1] as they are.
        backbone.mean, backbone.std = (0.0,) * channels, (1.0,) * channels
    elif backbone.mean is None:  # ImageNet's, averaged over RGB
        backbone.mean, backbone.std = (0.449,) * channels, (0.226,) * channels
    for key in content.keys() & {"image_size", "value_range", "epoch"}:
        setattr(backbone, key, content[key])
    return backbone.eval()


def network_for(weights: dict[str, Tensor], arch: str | None, path: str) -> nn.Module:
    """A network that fits a file's weights; those of a Vision Transformer tell its shape."""
    if arch not in models.ARCHS and "pos_embed" in weights:
        try:
            backbone = vit.like(weights)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        names = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
        backbone.arch = names.get(backbone.embed_dim, "vit")
        return backbone
    if not arch:
        raise UserError(f"{path} does not name its architecture; it is one of {', '.join(ARCHS)}")
    return build_backbone(arch)


@user_errors()
def open_image(path: str | Path, backbone: nn.Module, size: int | None = None) -> Tensor:
    """An image file as a network's input: (1, C, size, size) float32, on the CPU.

    As in `eval_knn.py` it is the central square of the upright picture in the backbone's channels
    and value range, resized to `size` pixels (default: the backbone's `image_size`, or 224) and
    normalised. A UserError names a file that cannot be read or has other channels.
    """
    size = size or getattr(backbone, "image_size", 224)
    pixels = image_io.PixelFormat(len(backbone.mean), getattr(backbone, "value_range", None))
    if not pixels.value_range and image_io.deep_values(str(path), pixels) is not None:
        advice = "set its value_range to the values of black and white, such as (0, 4095)"
        raise UserError(f"{path} has more than 8 bits, and the network was trained on 8: {advice}")
    image = data.central_part(image_io.read_image(str(path), 2 * size, pixels))
    sizes = torch.tensor([image.shape[1:]])
    return augment.central_view(image[None], sizes, size, backbone.mean, backbone.std)

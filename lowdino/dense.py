"""Backbones under torchvision's detectors and segmenters, and mean IoU.

from torchvision.models.detection import MaskRCNN

body = fpn_backbone(lowdino.load_backbone("backbone.pth"))
detector = MaskRCNN(body, num_classes=91, image_mean=body.mean, image_std=body.std)

network = segmenter(lowdino.load_backbone("backbone.pth"), classes=21)
logits = network(images)["out"]  # (B, 21, H, W)
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from lowdino.distributed import UserError


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace batch norm in place by torchvision's with fixed statistics and weights.

    Mask R-CNN (He et al., 2017) has it: one or two images per GPU are too few for statistics.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze_batch_norm(child)


# -- Detection -------------------------------------------------------------------------------------


class Finer(nn.Sequential):
    """A map of twice the side and half the channels, as ViTDet's (Li et al., 2022) of a ViT."""

    def __init__(self, dim: int):
        enlarge = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        super().__init__(enlarge, nn.GroupNorm(1, dim // 2), nn.GELU())


class FPNBackbone(nn.Module):
    """A feature pyramid network (Lin et al., 2017) on a backbone's maps; see `fpn_backbone`."""

    def __init__(self, backbone: nn.Module, out_channels: int, strides: tuple[int, ...]):
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        self.mean, self.std = backbone.mean, backbone.std
        levels = [round(math.log2(stride)) for stride in backbone.pyramid_strides]
        # Detectors take a map's scale for a power of 2. A ViT with patches of 14 pixels gets images
        # of 14/16 of their side, so that its map has a stride of 16.
        self.shrink = backbone.pyramid_strides[0] / 2 ** levels[0]
        wanted = [round(math.log2(stride)) for stride in strides]
        self.chosen = [i for i, level in enumerate(levels) if level in wanted]
        dims = [backbone.pyramid_dims[i] for i in self.chosen]
        finer = range(max(levels[0] - wanted[0], 0))
        self.finer = nn.ModuleList(Finer(dims[0] // 2**n) for n in finer)
        dims = [dims[0] // 2 ** (n + 1) for n in reversed(finer)] + dims
        self.fpn = FeaturePyramidNetwork(dims, out_channels)
        self.coarser = len(wanted) - len(dims)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        if self.shrink != 1:
            size = [round(side * self.shrink) for side in x.shape[2:]]
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        pyramid = self.backbone.forward_pyramid(x)
        maps = [pyramid[i] for i in self.chosen]
        for finer in self.finer:
            maps.insert(0, finer(maps[0]))
        maps = self.fpn(OrderedDict((str(i), map) for i, map in enumerate(maps)))
        for _ in range(self.coarser):
            last = next(reversed(maps.values()))
            maps[str(len(maps))] = F.max_pool2d(last, 1, stride=2)
        return maps


def fpn_backbone(
    backbone: nn.Module,
    out_channels: int = 256,
    strides: tuple[int, ...] = (4, 8, 16, 32, 64),
    freeze_bn: bool = True,
) -> FPNBackbone:
    """A backbone for torchvision's MaskRCNN, FasterRCNN, RetinaNet and FCOS.

    (B, C, H, W) -> maps by name, "0" the finest. The detectors normalise the images: give them the
    backbone's `mean` and `std` as `image_mean` and `image_std`.

    Args:
        backbone: becomes part of the result; `freeze_bn` changes it.
        out_channels: number of channels of every map.
        strides: powers of 2, each twice the one before, among them the backbone's coarsest (a ViT's
            is the power nearest to the side of its patches), else a UserError. The default is Mask
            R-CNN's; RetinaNet and FCOS have anchors for (8, 16, 32, 64, 128). Coarser maps are
            max-pooled, as in the FPN; those finer than a ViT's come of transposed convolutions.
        freeze_bn: keep batch norm as it is, as Mask R-CNN does. Random weights, whose statistics
            are not estimated yet, need False.
    """
    first = strides[0] if strides else 0
    if first.bit_count() != 1 or any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise UserError(f"strides must be powers of 2, each twice the one before, not {strides}")
    last = 2 ** round(math.log2(max(backbone.pyramid_strides)))
    if not first <= last <= strides[-1]:
        raise UserError(f"strides must reach the backbone's coarsest, {last}, not {strides}")
    if freeze_bn:
        freeze_batch_norm(backbone)
    return FPNBackbone(backbone, out_channels, strides)


# -- Segmentation ----------------------------------------------------------------------------------


class LastMap(nn.Module):
    """The last feature map of a backbone, under the name that torchvision's segmenters read."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.backbone.forward_features(x)}


def segmenter(backbone: nn.Module, classes: int) -> FCN:
    """torchvision's FCN (Long et al., 2015) on the last feature map; the backbone is part of it.

    Images (B, C, H, W), normalised by its `mean` and `std`, -> {"out": (B, classes, H, W)}.
    """
    return FCN(LastMap(backbone), FCNHead(backbone.embed_dim, classes))


def confusion(predicted: Tensor, mask: Tensor, classes: int, ignore: int = 255) -> Tensor:
    """Pixels of each class but `ignore` (rows) by predicted class: (H, W) twice -> (C, C) int64."""
    known = mask != ignore
    pairs = mask[known].long() * classes + predicted[known]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union of the classes that occur or are predicted, from (C, C)."""
    confusion = confusion.cpu().double()  # MPS has no float64
    both = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - both
    return (both[union > 0] / union[union > 0]).mean().item()

"""Small backbones: MobileViT and ResNet5M, and torchvision's ConvNets without their classifier.

Every backbone keeps one contract, for any H, W >= 32, odd and non-square sizes included:
    embed_dim                       width of the pooled features
    mean, std                       the normalisation that its weights expect, ImageNet's by default
    forward((B, 3, H, W))           -> (B, embed_dim), the mean over the last feature map, through
                                    `whitening`: identity, or the affine map of a trained file
    forward_features((B, 3, H, W))  -> (B, embed_dim, h, w), the last feature map
    forward_pyramid((B, 3, H, W))   -> the feature maps for detectors, of pyramid_strides (4 to 32;
                                    ResNet5M 4 to 16) and pyramid_dims channels, the finest first
`set_in_chans` changes the number of channels of any of these networks and of ViTs.

    arch                  parameters  embed_dim
    mobilevit_xxs            951,024        320
    mobilevit_xs           1,932,848        384
    mobilevit_s            4,937,632        640
    resnet5m               4,956,480        512
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock as TorchvisionBasicBlock
from torchvision.models.resnet import Bottleneck

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def stem_of(backbone: nn.Module) -> tuple[str, nn.Conv2d]:
    """The name of the first convolution, and the convolution itself."""
    modules = backbone.named_modules()
    return next((name, module) for name, module in modules if isinstance(module, nn.Conv2d))


@torch.no_grad()
def set_in_chans(backbone: nn.Module, channels: int) -> None:
    """Adapt a network for RGB images to images of `channels` channels, in place, if it must change.

    The weights are adapted as in timm: summed over RGB for one channel, else R, G, B, R, ... in
    turn, times 3 / channels, so that grey images keep their features. `mean` and `std` become None,
    because they follow from the images. A ValueError says that the network has other channels.
    """
    _, stem = stem_of(backbone)
    if stem.in_channels == channels:
        return
    if stem.in_channels != 3:
        have = f"weights of {stem.in_channels} channels"
        raise ValueError(f"{have} cannot be adapted to {channels}, as those of RGB can")
    if channels == 1:
        weight = stem.weight.sum(dim=1, keepdim=True)
    else:
        weight = stem.weight[:, torch.arange(channels) % 3] * (3 / channels)
    stem.in_channels, stem.weight = channels, nn.Parameter(weight)
    backbone.mean = backbone.std = None


# -- MobileViT (Mehta and Rastegari, 2022, arXiv 2110.02178) ---------------------------------------
# The state_dict has the names and shapes of timm's `mobilevit_{xxs,xs,s}` with `num_classes=0`.


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm and, except at the end of a residual branch, SiLU."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int = 1, stride: int = 1, groups: int = 1, act=True
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_dim)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.silu(x, inplace=True) if self.act else x


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al., 2018): 1x1 wider, depthwise 3x3, 1x1 without SiLU."""

    def __init__(self, in_dim: int, out_dim: int, stride: int, expansion: float):
        super().__init__()
        hidden = int(in_dim * expansion)
        self.conv1_1x1 = ConvNormAct(in_dim, hidden)
        self.conv2_kxk = ConvNormAct(hidden, hidden, 3, stride, groups=hidden)
        self.conv3_1x1 = ConvNormAct(hidden, out_dim, act=False)
        self.residual = stride == 1 and in_dim == out_dim

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + y if self.residual else y


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of (B, N, C)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # A single token, as in a view of 32 pixels, attends only to itself.
        alone = not isinstance(N, torch.SymInt) and N == 1  # a symbol in a program for any size
        x = v if alone else F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x), inplace=True))


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer: attention over tokens, then an MLP of twice the width on each."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MobileViTBlock(nn.Module):
    """Local features by convolution and global features by attention, fused with the input.

    Section 3.1 of the paper. Attention joins the pixels that have the same position in their 2x2
    patches. Each of the four sequences covers the image, at a quarter of the cost; the 3x3
    convolutions join them. A map of odd side is resized bilinearly to an even side, and back.
    """

    def __init__(self, dim: int, transformer_dim: int, depth: int, num_heads: int = 4):
        super().__init__()
        self.conv_kxk = ConvNormAct(dim, dim, 3)
        self.conv_1x1 = nn.Conv2d(dim, transformer_dim, 1, bias=False)
        layers = (TransformerLayer(transformer_dim, num_heads) for _ in range(depth))
        self.transformer = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(transformer_dim)
        self.conv_proj = ConvNormAct(transformer_dim, dim)
        self.conv_fusion = ConvNormAct(2 * dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        # B images, C channels, a map of H x W pixels: h x w patches of 2 x 2 pixels.
        shortcut = x
        x = self.conv_1x1(self.conv_kxk(x))
        B, C, H, W = x.shape
        h, w = (H + 1) // 2, (W + 1) // 2
        # A program exported for any size has no branch: it also resizes even sides, to themselves.
        odd = any(isinstance(side, torch.SymInt) or side % 2 for side in (H, W))
        if odd:
            x = F.interpolate(x, size=(2 * h, 2 * w), mode="bilinear", align_corners=False)

        x = x.reshape(B, C, h, 2, w, 2).permute(0, 3, 5, 2, 4, 1)  # (B, 2, 2, h, w, C)
        x = self.norm(self.transformer(x.reshape(B * 4, h * w, C)))  # (B * 4, h * w, C)
        x = x.view(B, 2, 2, h, w, C).permute(0, 5, 3, 1, 4, 2)  # (B, C, h, 2, w, 2)
        x = x.reshape(B, C, 2 * h, 2 * w)

        if odd:
            x = F.interpolate(x, size=(H, W), mode="bilinear", align_corners=False)
        return self.conv_fusion(torch.cat([shortcut, self.conv_proj(x)], dim=1))


class MobileViT(nn.Module):
    """MobileViT without classifier. The side of the feature map is 1/32 of the input's.

    Args:
        dims: channels of the five stages. embed_dim: channels of the final 1x1 convolution.
        transformer_dims: token widths of the attention blocks in the last three stages.
        expansion: width of the middle of an inverted residual block, relative to its input.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD  # the normalisation that its weights expect

    def __init__(self, dims: tuple, transformer_dims: tuple, embed_dim: int, expansion: float):
        super().__init__()
        self.embed_dim, self.whitening = embed_dim, nn.Identity()
        d1, d2, d3, d4, d5 = dims
        self.pyramid_strides, self.pyramid_dims = (4, 8, 16, 32), (d2, d3, d4, embed_dim)
        t3, t4, t5 = transformer_dims

        def local(in_dim: int, out_dim: int, stride: int) -> InvertedResidual:
            return InvertedResidual(in_dim, out_dim, stride, expansion)

        self.stem = ConvNormAct(3, 16, 3, stride=2)  # stride 2
        self.stages = nn.Sequential(
            nn.Sequential(local(16, d1, 1)),  # 2
            nn.Sequential(local(d1, d2, 2), local(d2, d2, 1), local(d2, d2, 1)),  # 4
            nn.Sequential(local(d2, d3, 2), MobileViTBlock(d3, t3, depth=2)),  # 8
            nn.Sequential(local(d3, d4, 2), MobileViTBlock(d4, t4, depth=4)),  # 16
            nn.Sequential(local(d4, d5, 2), MobileViTBlock(d5, t5, depth=3)),  # 32
        )
        self.final_conv = ConvNormAct(d5, embed_dim)
        self.apply(init_weights)
        self.init_to_agree()

    @torch.no_grad()
    def init_to_agree(self) -> None:
        """Initialise so that two views of an image have similar features.

        Where they do not correlate, the teacher's output for one view is a target of noise for the
        other, and the uniform distribution the best prediction. With He's initialisation alone they
        do not, because a stride-2 depthwise filter of random signs hashes its input. Therefore
          - depthwise filters start as a mean plus noise, which is antialiased subsampling;
          - residual branches start at zero (Goyal et al., 2017);
          - attention starts near zero: fusion is the identity on its shortcut, plus 0.1 of noise.
        """
        for block in self.modules():
            if isinstance(block, InvertedResidual):
                block.conv2_kxk.conv.weight.mul_(0.3).add_(1 / 9)
                if block.residual:
                    nn.init.zeros_(block.conv3_1x1.bn.weight)
            elif isinstance(block, MobileViTBlock):
                fusion = block.conv_fusion.conv.weight.mul_(
                    0.1
                )  # (dim, 2 * dim, 3, 3), shortcut first
                fusion[:, : len(fusion), 1, 1] += torch.eye(len(fusion))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.final_conv(self.stages(self.stem(x)))

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        x = self.stages[0](self.stem(x))
        maps = []
        for stage in self.stages[1:]:
            x = stage(x)
            maps.append(x)
        return [*maps[:-1], self.final_conv(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.whitening(self.forward_features(x).mean(dim=(2, 3)))


def init_weights(module: nn.Module) -> None:
    """He's normal by fan-out for convolutions; DINO's, truncated at std 0.02, for linear layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# -- ResNet5M, the ConvNet of the LowDINO paper (Prathapaneni and Shashank, 2023) ------------------
# Its parameters have the names of torchvision's ResNets.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes (He et al., 2016)."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_dim)
        self.downsample = None
        if stride != 1 or in_dim != out_dim:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNet5M(nn.Module):
    """Stem 7x7/2 of 64, max-pool 3x3/2, basic blocks 64 x3, 128 x6 (/2), 512 x1 (/2): stride 16."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD  # the normalisation that its weights expect

    def __init__(self):
        super().__init__()
        self.embed_dim, self.whitening = 512, nn.Identity()
        self.pyramid_strides, self.pyramid_dims = (4, 8, 16), (64, 128, 512)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(*(BasicBlock(64, 64) for _ in range(3)))
        self.layer2 = nn.Sequential(
            BasicBlock(64, 128, stride=2), *(BasicBlock(128, 128) for _ in range(5))
        )
        self.layer3 = nn.Sequential(BasicBlock(128, 512, stride=2))
        self.apply(init_weights)
        # Residual branches start at zero, for the reason given in MobileViT.init_to_agree.
        for block in self.modules():
            if isinstance(block, BasicBlock):
                nn.init.zeros_(block.bn2.weight)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        c2 = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        c3 = self.layer2(c2)
        return [c2, c3, self.layer3(c3)]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_pyramid(x)[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.whitening(self.forward_features(x).mean(dim=(2, 3)))


# -- Networks of torchvision, with its parameter names ---------------------------------------------


class ResNet(torchvision.models.ResNet):
    mean, std = IMAGENET_MEAN, IMAGENET_STD  # the normalisation that its weights expect

    def __init__(self, block: type, layers: list[int]):
        super().__init__(block, layers)
        self.embed_dim, self.whitening = self.fc.in_features, nn.Identity()
        self.fc = nn.Identity()
        self.pyramid_strides = 4, 8, 16, 32
        self.pyramid_dims = tuple(self.embed_dim // n for n in (8, 4, 2, 1))

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_pyramid(x)[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.whitening(self.forward_features(x).mean(dim=(2, 3)))


class MobileNet(nn.Module):
    """torchvision's `features`; `ends` are the indices of the last layers at strides 4 to 32."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD  # the normalisation that its weights expect

    def __init__(self, features: nn.Sequential, ends: tuple[int, ...]):
        super().__init__()
        self.features, self.ends = features, ends
        self.embed_dim, self.whitening = features[-1].out_channels, nn.Identity()
        self.pyramid_strides = 4, 8, 16, 32
        self.pyramid_dims = tuple(features[end].out_channels for end in ends)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.ends:
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.whitening(self.features(x).mean(dim=(2, 3)))


# -- Factories: one per architecture, with random weights ------------------------------------------

ARCHS = ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s", "resnet5m")
ARCHS += ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "mobilenet_v3_small")


def mobilevit_xxs() -> MobileViT:
    return MobileViT((16, 24, 48, 64, 80), (64, 80, 96), embed_dim=320, expansion=2)


def mobilevit_xs() -> MobileViT:
    return MobileViT((32, 48, 64, 80, 96), (96, 120, 144), embed_dim=384, expansion=4)


def mobilevit_s() -> MobileViT:
    return MobileViT((32, 64, 96, 128, 160), (144, 192, 240), embed_dim=640, expansion=4)


def resnet5m() -> ResNet5M:
    return ResNet5M()


def resnet18() -> ResNet:
    return ResNet(TorchvisionBasicBlock, [2, 2, 2, 2])


def resnet34() -> ResNet:
    return ResNet(TorchvisionBasicBlock, [3, 4, 6, 3])


def resnet50() -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3])


def mobilenet_v2() -> MobileNet:
    return MobileNet(torchvision.models.mobilenet_v2(weights=None).features, (3, 6, 13, 18))


def mobilenet_v3_small() -> MobileNet:
    return MobileNet(torchvision.models.mobilenet_v3_small(weights=None).features, (1, 3, 8, 12))

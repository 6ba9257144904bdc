"""Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929), as student and as teacher.

Official files of DINO (such as `dino_deitsmall16_pretrain.pth`) and DINOv2 (such as
`dinov2_vits14_reg4_pretrain.pth`) load with strict=True, and the features equal those of the
official code at every size. `like(state_dict)` builds the network for a file.

The contract is that of the ConvNets, for any H, W of a patch or more; pixels beyond are ignored:
    embed_dim                       width of the features
    mean, std                       the normalisation that its weights expect
    forward((B, 3, H, W))           -> (B, embed_dim), the class token
    forward_features((B, 3, H, W))  -> (B, embed_dim, h, w), the patch tokens as a map
    forward_tokens((B, 3, H, W))    -> class token and map, from one pass
    forward_pyramid((B, 3, H, W))   -> the map in a list, see pyramid_strides and pyramid_dims

    arch         parameters (patch 16, 224 px)    embed_dim    heads
    vit_tiny                         5,524,416          192        3
    vit_small                       21,665,664          384        6
    vit_base                        85,798,656          768       12
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PatchEmbed(nn.Module):
    """Cut an image into patches and map each to a token: (B, 3, H, W) -> (B, dim, h, w)."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of (B, N, C)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """Query, key and value of each head: (B, N, C) -> (3, B, heads, N, C / heads)."""
        B, N, C = x.shape
        return self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(*self.split(x))  # (B, heads, N, C / heads)
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """Attention of each token: (B, N, C) -> (B, heads, N, N), with rows that sum to one."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned gain per channel (Touvron et al., 2021), 1e-5 at the start."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, with stochastic depth per image (Huang et al., 2016)."""

    def __init__(self, dim: int, num_heads: int, layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = StochasticDepth(p=0.0, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT without classifier.

    The position embedding is resized as in the official code, see `positions`, which differs with
    and without registers; so `antialias` follows from these, and a state dict tells all.

    Args:
        patch_size: side of a patch in pixels.
        image_size: side in pixels of the square images that the position embedding is for.
        dim, depth, num_heads: width of the tokens, number of blocks, heads per block.
        registers: number of register tokens (Darcet et al., 2024).
        layer_scale: a learned gain per channel of each branch, as in DINOv2.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD  # the normalisation that its weights expect

    def __init__(
        self, patch_size, image_size, dim, depth, num_heads, registers: int = 0, layer_scale=False
    ):
        super().__init__()
        self.embed_dim, self.patch_size, self.whitening = dim, patch_size, nn.Identity()
        self.pyramid_strides, self.pyramid_dims = (patch_size,), (dim,)
        self.grid = image_size // patch_size
        self.antialias = registers > 0
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for token in (self.cls_token, self.pos_embed, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        self.apply(init_weights)

    def set_drop_path_rate(self, rate: float) -> None:
        """Set the rate of stochastic depth: 0 in the first block, rising linearly to `rate`."""
        for block, p in zip(self.blocks, torch.linspace(0, rate, len(self.blocks)).tolist()):
            block.drop_path.p = p

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As in nn.Module, but without `mask_token`, which DINOv2's files have for training."""
        kept = {name: value for name, value in state_dict.items() if name != "mask_token"}
        return super().load_state_dict(kept, strict, assign)

    def positions(self, height: int, width: int) -> Tensor:
        """Position embedding of an image of height x width pixels: (1, 1 + h * w, C).

        DINO, and DINOv2 without registers, resize without antialiasing, by the scale factor of 0.1
        patches more than there are: meant against rounding of the size, it also shifts where the
        embedding is sampled. DINOv2 with registers resizes to the exact size, with antialiasing.
        """
        h, w, grid = height // self.patch_size, width // self.patch_size, self.grid
        # The official code compares pixels: 224 x 230 has the same number of patches, but resizes.
        if h * w == grid**2 and height == width:
            return self.pos_embed
        first, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.transpose(1, 2).unflatten(2, (grid, grid))  # (1, C, grid, grid)
        if self.antialias:
            patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=True)
        else:
            scale = ((h + 0.1) / grid, (w + 0.1) / grid)
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)

    def tokens(self, x: Tensor) -> tuple[Tensor, int, int]:
        """The input of the first block: (B, 1 + registers + h * w, C), h and w."""
        B, _, H, W = x.shape
        if min(H, W) < (p := self.patch_size):
            raise ValueError(f"an image must have one whole patch at least, {p} x {p} pixels")
        x = self.patch_embed(x)  # (B, C, h, w)
        h, w = x.shape[-2:]
        x = torch.cat([self.cls_token.expand(B, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(H, W)  # (B, 1 + h * w, C)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(B, -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return x, h, w

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, C) and the map of patch tokens (B, C, h, w), after the last norm."""
        x, h, w = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_tokens(x)[1]

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        return [self.forward_features(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.whitening(self.forward_tokens(x)[0])

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block, (B, heads, N, N) with N = 1 + registers + h * w."""
        x, _, _ = self.tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x))


def init_weights(module: nn.Module) -> None:
    """DINO's: truncated normal of std 0.02 for linear weights, zero for biases, no others."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def like(state_dict: dict[str, Tensor]) -> VisionTransformer:
    """A network with random weights and heads of 64 that fits a state dict; else a ValueError."""
    try:
        positions, patches = state_dict["pos_embed"], state_dict["patch_embed.proj.weight"]
        registers = state_dict.get("register_tokens", torch.empty(1, 0)).shape[1]
        blocks = (name.split(".")[1] for name in state_dict if name.startswith("blocks."))
        depth = 1 + max(map(int, blocks))
        dim, side = positions.shape[2], patches.shape[3]
        grid = math.isqrt(positions.shape[1] - 1)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            "no Vision Transformer by the names of DINO's or DINOv2's files"
        ) from error
    scaled = "blocks.0.ls1.gamma" in state_dict
    return VisionTransformer(side, grid * side, dim, depth, max(dim // 64, 1), registers, scaled)


# -- Factories -------------------------------------------------------------------------------------
# DINO's architectures; DINOv2's have patch_size=14, image_size=518 and layer_scale=True too.

ARCHS = ("vit_tiny", "vit_small", "vit_base")


def vit_tiny(patch_size: int = 16, image_size: int = 224, **options) -> VisionTransformer:
    return VisionTransformer(patch_size, image_size, dim=192, depth=12, num_heads=3, **options)


def vit_small(patch_size: int = 16, image_size: int = 224, **options) -> VisionTransformer:
    return VisionTransformer(patch_size, image_size, dim=384, depth=12, num_heads=6, **options)


def vit_base(patch_size: int = 16, image_size: int = 224, **options) -> VisionTransformer:
    return VisionTransformer(patch_size, image_size, dim=768, depth=12, num_heads=12, **options)

"""Multi-crop augmentation of uint8 batches, on the device where they lie.

A crop, an antialiased resize and a flip are together one linear map along each axis, of a few taps
for each image, which equals Pillow's BICUBIC within rounding. A GPU applies it as two batched
matrix products, a CPU as weighted sums of rows, and as torch's resize to large views of uint8
images. Blur is such a map too. Colour operations compare no elements: a CPU is slow at that.

Images are (B, C, H, W) with values in [0, 1] unless a docstring differs. Every parameter is a
tensor of one value per image. Hue, saturation and grayscale apply to RGB only.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# DINO's strengths of brightness, contrast, saturation and hue; DINO's probabilities of blur for the
# first global view, each other global view and each local view.
JITTER, BLUR = (0.4, 0.4, 0.2, 0.1), (1.0, 0.1, 0.5)


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits from numbers >= 0 (such as stream, seed, step, rank) alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seeded_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator on `device` with the seed derived from the numbers."""
    return torch.Generator(device).manual_seed(derived_seed(*numbers))


# -- Geometry --------------------------------------------------------------------------------------


def interpolation(
    start: Tensor, length: Tensor, out_size: int, in_size: int, flip: Tensor
) -> tuple[Tensor, Tensor]:
    """Pixels to read along an axis of `in_size`, and their weights, to resize a part to `out_size`.

    The kernel is cubic with a = -0.5 (Keys, 1981) and, as Pillow's, widened by the scale where the
    part shrinks (antialiasing) and cut at the part's edges. Keys' two cubics at distance x are one
    sum, v * v * (v - 1) / 2 + u * u * (1 - 2 * u), with v = max(2 - x, 0) and u = max(1 - x, 0).
    The code takes twice that, because the weights are divided by their sum.

    `start` and `length` (N,) are the parts in pixels, and `flip` (N,) bool reverses them. Returns
    indices int64 and weights float32, both (N, out_size, taps); a pixel's weights sum to 1.
    """
    support = 2 * max(1, in_size / out_size)  # at most, in pixels
    taps = torch.arange(2 * math.ceil(support), device=start.device, dtype=torch.float32)
    out = torch.arange(out_size, device=start.device, dtype=torch.float32) + 0.5
    out = torch.where(flip[:, None], out_size - out, out)  # (N, out)
    start, length = start.float()[:, None, None], length.float()[:, None, None]  # (N, 1, 1)
    scale = length / out_size
    centre = start + out[:, :, None] * scale  # (N, out, 1)
    first = (centre - 0.5 * len(taps)).round()
    v = (first + 0.5 - centre + taps).abs_()  # (N, out, taps), the distances
    v = v.mul_(-1 / scale.clamp(min=1)).add_(2).clamp_(min=0)
    weights = v - 1
    u = weights.clamp(min=0)
    weights.mul_(v).mul_(v).addcmul_(u * u, torch.rsub(u, 2, alpha=4))
    indices = first + taps
    half = length / 2
    inside = torch.sub(half + 0.5, (indices - (start + half - 0.5)).abs_()).clamp_(0, 1)
    weights *= inside  # 1 in the part, 0 outside
    weights /= weights.sum(dim=2, keepdim=True)
    return indices.long().clamp_(0, in_size - 1), weights  # beyond the edges weights are 0


def resample(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: x (B, L, K), indices and weights (N, n, taps) -> (N, n, K).

    N is a multiple of B, and map i belongs to x[i % B]. A CPU uses torch's fused look-up and sum of
    embeddings, a GPU the product with a matrix of mostly zeros.
    """
    B, L, K = x.shape
    N, n, _ = indices.shape
    if on_cpu(x):
        rows = indices + L * (torch.arange(N) % B)[:, None, None]
        rows, weights = rows.flatten(0, 1), weights.flatten(0, 1)
        table = x.reshape(B * L, K)
        sums = F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
        return sums.view(N, n, K)
    with torch.autocast(x.device.type, enabled=False):  # its 8 bits are too few for an image
        matrices = weights.new_zeros(N, n, L).scatter_add_(2, indices, weights)
        # The matrices of one x below each other: a single product, and no copies of x.
        matrices = matrices.unflatten(0, (-1, B)).transpose(0, 1).flatten(1, 2)  # (B, N/B * n, L)
        sums = torch.bmm(matrices, x).unflatten(1, (-1, n))  # (B, N/B, n, K)
        return sums.transpose(0, 1).flatten(0, 1)


def separable(images: Tensor, *axes: Tensor) -> Tensor:
    """Resample along each axis, columns first, and clip as Pillow: (B, C, H, W) -> (N, C, h, w).

    `axes` are the indices and weights of the rows, then those of the columns, see `resample`.
    """
    C, H = images.shape[1:3]
    images = images.permute(0, 3, 1, 2).flatten(2)  # (B, W, C * H)
    images = resample(images, *axes[2:]).clamp_(0, 1)  # (N, w, C * H)
    images = images.unflatten(2, (C, H)).permute(0, 3, 2, 1).flatten(2)  # (N, H, C * w)
    images = resample(images, *axes[:2]).clamp_(0, 1)  # (N, h, C * w)
    return images.unflatten(2, (C, -1)).transpose(1, 2)


def resized_crop(
    images: Tensor,
    boxes: Tensor,
    out_size: int,
    flip: Tensor | None = None,
    vertical_flip: Tensor | None = None,
) -> Tensor:
    """Crop one box or several from each image, resize to a square (antialiased bicubic), and flip.

    Values are clipped between the passes along the two axes, so the order of the passes changes
    sharp edges by some levels of 255. Pillow resizes along the width first; since version 13, along
    the height first where a box loses more than twice as much height as width. So does this code on
    a CPU. On a GPU it always resizes along the width first, as Pillow 12 does: a choice per image
    would need two resamplings of every image, or a wait for the host.

    Args:
        images: (B, C, H, W), uint8, or float in [0, 1]; box i belongs to image i % B.
        boxes: (N, 4) top, left, height, width in pixels, inside the images.
        flip, vertical_flip: (N,) bool, mirror left-right and top-bottom; None for no flip.

    Returns (N, C, out_size, out_size) float32 in [0, 1].
    """
    large = out_size + max(images.shape[2:]) > 192
    if large and on_cpu(images) and images.dtype == torch.uint8:  # where torch's resize is faster
        return resized_crop_one_by_one(images, boxes, out_size, flip, vertical_flip)
    top, left, height, width = boxes.unbind(dim=1)
    none = torch.zeros_like(top, dtype=torch.bool)
    flip, vertical_flip = (none if mask is None else mask for mask in (flip, vertical_flip))
    rows = interpolation(top, height, out_size, images.shape[2], vertical_flip)
    columns = interpolation(left, width, out_size, images.shape[3], flip)
    images = to_float(images.permute(0, 3, 1, 2).contiguous())  # columns first, as they are read
    images = images.permute(0, 2, 3, 1)
    crops = separable(images, *rows, *columns)
    if on_cpu(images) and len(tall := height_first(boxes, out_size).nonzero().flatten()):
        turned = images.index_select(0, tall % len(images)).transpose(2, 3)
        axes = (v.index_select(0, tall) for v in (*columns, *rows))
        crops[tall] = separable(turned, *axes).transpose(2, 3)
    return crops


def height_first(boxes: Tensor, out_size: int) -> Tensor:
    """Whether Pillow 13 and later resizes a box along the height first: (N, 4) -> (N,) bool."""
    lost_height, lost_width = (boxes[:, 2:] - out_size).unbind(dim=1)
    return (lost_height > 0) & (lost_height > 2 * lost_width)


def resized_crop_one_by_one(
    images: Tensor, boxes: Tensor, out_size: int, flip: Tensor | None, vertical_flip: Tensor | None
) -> Tensor:
    """`resized_crop` by torch's own resize of uint8, which goes along the width first."""
    crops = torch.empty(len(boxes), images.shape[1], out_size, out_size, dtype=torch.uint8)
    numbers = torch.column_stack([boxes, height_first(boxes, out_size)]).int().tolist()
    for i, (top, left, height, width, transposed) in enumerate(numbers):
        box, out = images[i % len(images), None], crops[i]
        box = box[..., top : top + height, left : left + width]
        if transposed:
            box, out = box.transpose(2, 3), out.transpose(1, 2)
        out.copy_(F.interpolate(box, (out_size, out_size), mode="bicubic", antialias=True)[0])
    for mask, axis in ((vertical_flip, 2), (flip, 3)):
        if mask is not None:
            crops = apply_where(mask, crops, partial(torch.flip, dims=(axis,)))
    return to_float(crops)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1]; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def random_boxes(
    sizes: Tensor,
    scale: tuple[float, float],
    generator: torch.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
) -> Tensor:
    """Boxes of torchvision's RandomResizedCrop: (B, 4) top, left, height, width; float32 integers.

    The area is uniform in `scale`, a fraction of the image's, and the logarithm of width / height
    in `ratio`. The first draw that fits is taken; where none does, the largest central box that the
    ratio allows. `sizes` (B, 2) are height and width of each image in pixels.
    """
    height, width = sizes.float()[:, None].unbind(dim=2)  # (B, 1) each
    u = torch.rand(len(sizes), attempts, 2, generator=generator, device=sizes.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, attempts)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    # Where no draw fits: the complete image, cut to the nearest allowed ratio.
    full_w = torch.minimum(width, (height * ratio[1]).round())
    full_h = torch.minimum(height, (width / ratio[0]).round())
    any_fits = fits.any(dim=1, keepdim=True)
    w = torch.where(any_fits, w.gather(1, first), full_w)
    h = torch.where(any_fits, h.gather(1, first), full_h)

    u = torch.rand(len(sizes), 2, generator=generator, device=sizes.device)
    room_y, room_x = height - h, width - w
    top, left = u[:, :1] * (room_y + 1), u[:, 1:] * (room_x + 1)
    top = torch.where(any_fits, top.floor().minimum(room_y), (room_y / 2).floor())
    left = torch.where(any_fits, left.floor().minimum(room_x), (room_x / 2).floor())
    return torch.cat([top, left, h, w], dim=1)


def windows(sizes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random part of each image, at most twice its shorter side long: corners, sizes (B, 2).

    Crops are nearly square, so all those of a line of text would lie at its centre. `generator` is
    not advanced, so the views of other images, which are their own part, stay the same.
    """
    part, stream = torch.minimum(sizes, 2 * sizes.amin(dim=1, keepdim=True)), None
    if generator is not None:  # a separate stream: its seed with the last bit flipped
        stream = torch.Generator(sizes.device).manual_seed(generator.initial_seed() ^ 1)
    u = torch.rand(sizes.shape, generator=stream, device=sizes.device)
    return (u * (sizes - part + 1)).floor().minimum(sizes - part), part


def central_boxes(sizes: Tensor, fraction: float) -> Tensor:
    """Central squares with `fraction` of the shorter side: sizes (B, 2) -> integer boxes (B, 4)."""
    side = (sizes.amin(dim=1) * fraction).round().clamp(min=1)
    top, left = ((sizes - side[:, None]) / 2).floor().unbind(dim=1)
    return torch.stack([top, left, side, side], dim=1)


# -- Colour and blur -------------------------------------------------------------------------------


def on_cpu(images: Tensor) -> bool:
    """Whether to compute an operation only where it is needed; a GPU's host would wait for that."""
    return images.device.type == "cpu"


def grayscale(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, as Pillow's mode L; the mean of other channels: -> (B, 1, H, W)."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    r, g, b = images.unbind(dim=1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def shift_hue(images: Tensor, shift: Tensor) -> None:
    """Turn the hue by `shift` (B,) of a full circle, in HSV, in place. Value and chroma stay.

    With channels scaled to reach from 0 to 1, the hue lies 1 + g + b - r sixths of the circle away
    from red, on the side of the greater of g and b. A channel is 2 - (the hue's distance from it),
    clipped to [0, 1]. This needs no table of six cases.
    """
    r, g, b = images.unbind(dim=1)  # (B, H, W)
    low, high = torch.minimum(g, b), torch.maximum(g, b)
    torch.minimum(low, r, out=low)  # in place where possible: twice as fast as into new memory
    torch.maximum(high, r, out=high)
    chroma = high - low
    hue, side = g + b, g - b
    hue.sub_(r).sub_(low).add_(chroma).copysign_(side)
    torch.clamp(chroma, min=1e-8, out=side)
    hue.div_(side).add_(6 * shift[:, None, None])
    hue.sub_(torch.div(hue, 6, out=side).floor_(), alpha=6)  # in [0, 6)
    # Green is at 2 and blue at 4: each is 1 minus (its distance - 1). Red is at 0 and at 6: it is
    # the distance from 3, minus 1.
    for channel, position, start, sign in ((r, 3, low, 1), (g, 2, high, -1), (b, 4, high, -1)):
        torch.sub(hue, position, out=channel).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(start, channel, chroma, value=sign, out=channel)


def color_jitter(images: Tensor, factors: Tensor, hue: Tensor, order: Tensor) -> Tensor:
    """torchvision's brightness, contrast, saturation and hue, in a different order for each image.

    Three of the four are blends, f * image + (1 - f) * grey, with grey = 0, the mean luma or the
    luma. Three blends before the hue and three after it, used or left at f = 1, give every order
    with a single turn of the hue. A CPU sorts images by the position of the hue, and skips blends
    that no image uses.

    Args:
        factors: (B, 3) of brightness, contrast and saturation; 1 changes nothing.
        hue: (B,) shift in [-0.5, 0.5] of a full circle; 0 changes nothing. Only RGB has a hue.
        order: (B, 4) a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue, first to last.
    """
    position = order.argsort(dim=1)  # (B, 4) of each operation in its image's order
    if on_cpu(images):
        at_rest = (factors == 1).all(dim=1) & (hue == 0)
        # The number of blends before the hue; images at rest come last.
        early = position[:, 3].masked_fill(at_rest, 4)
        by_hue = early.argsort()
        none, one, two, end, _ = torch.bincount(early, minlength=5).cumsum(dim=0).tolist()
        bounds = (none, end), (one, end), (two, end), (0, end), (0, none), (0, one), (0, two)
        parts = [slice(*bound) for bound in bounds]
        values = images, factors, hue, position
        images, factors, hue, position = (v.index_select(0, by_hue) for v in values)
    else:
        by_hue, parts, images = None, [slice(None)] * 7, images.clone()
    blends = position[:, :3].argsort(dim=1)  # (B, 3) first to last
    late = position.gather(1, blends) > position[:, 3:]  # (B, 3) after the hue
    share = 1 - factors.gather(1, blends)  # of grey
    share = torch.cat([share.masked_fill(late, 0), share.masked_fill(~late, 0)], dim=1)  # (B, 6)
    blends = torch.cat([blends, blends], dim=1)
    share, of_mean, of_luma = (
        v.T[:, :, None, None, None].unbind() for v in (share, blends == 1, blends == 2)
    )
    for slot, part in enumerate(parts):  # three blends, the hue, three blends
        chosen = images[part]
        if slot == 3:
            if chosen.shape[1] == 3:
                shift_hue(chosen, hue[part])
            continue
        k = slot - (slot > 3)
        grey = grayscale(chosen)
        mean = grey.mean(dim=(2, 3), keepdim=True).mul_(of_mean[k][part])
        chosen.lerp_(grey.mul_(of_luma[k][part]).add_(mean), share[k][part]).clamp_(0, 1)
    return images if by_hue is None else images.index_select(0, by_hue.argsort())


def gaussian_blur(images: Tensor, sigma: Tensor, reach: int = 4) -> Tensor:
    """Blur images, of sides above `reach`, by `sigma` (B,) pixels; 0 changes nothing.

    It is torchvision's GaussianBlur of kernel size 2 * reach + 1 = 9, as in DINOv2: the kernel is
    sampled, cut and normalised, and images are reflected at their edge pixels.
    """
    distance = torch.arange(-reach, reach + 1, device=sigma.device)
    sigma = sigma.float().clamp(min=1e-4)[:, None]  # 0 becomes the identity
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)  # (B, 9)
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, None]

    def along(size: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(size, device=sigma.device)[:, None] + distance
        indices = (size - 1) - ((size - 1) - indices.abs()).abs()
        return indices.expand(len(sigma), -1, -1), weights.expand(-1, size, -1)

    return separable(images, *along(images.shape[2]), *along(images.shape[3]))


def solarize(images: Tensor) -> Tensor:
    """Invert all values of one half and above, as Pillow does."""
    return torch.minimum(images, 1 - images)


def apply_where(
    mask: Tensor, images: Tensor, operation: Callable[..., Tensor], *values: Tensor
) -> Tensor:
    """operation(images, *values) where `mask` (B,) is true; on a CPU in place."""
    if not on_cpu(images):
        return torch.where(mask.view(-1, 1, 1, 1), operation(images, *values), images)
    indices = mask.nonzero().flatten()
    if len(indices):  # index_select is twice as fast as v[indices]
        images[indices] = operation(*(v.index_select(0, indices) for v in (images, *values)))
    return images


# -- Views -----------------------------------------------------------------------------------------

BLOCK = 2**23  # bytes of float views that a CPU computes at once; measured at 32 to 224 pixels


def blocks(images: Tensor, crops: int, size: int) -> list[tuple[slice, slice]]:
    """Slices of the images (B, ...), and of their `crops` of side `size`, to compute together.

    Crop i is of image i % B. On a GPU there is one slice. On a CPU the crops of a slice fit BLOCK:
    one crop of some images, or one or more of all images.
    """
    B = len(images)
    most = max(BLOCK // (12 * size * size), 1) if on_cpu(images) else crops
    if most >= B:
        step = most // B * B
        starts = range(0, crops, step)
        return [(slice(B), slice(start, min(start + step, crops))) for start in starts]
    parts = [slice(start, min(start + most, B)) for start in range(0, B, most)]
    return [
        (part, slice(first + part.start, first + part.stop))
        for first in range(0, crops, B)
        for part in parts
    ]


# Below this sigma, in pixels, a neighbouring pixel's share is less than 0.4 %.
SMALLEST_BLUR = 0.3


class MultiCrop(nn.Module):
    """Global and local views of each image, with random numbers per image (DINO's augmentation).

    forward(images, sizes, generator): images (B, C, H, W) uint8, each in the top left corner of its
    canvas, with height and width `sizes` (B, 2) in pixels; a generator on the same device. Returns
    a list of normalised float32 tensors: `global_number` of (B, C, global_size, global_size), at
    least one, then `local_number` of (B, C, local_size, local_size).

    The defaults are those of DINO's official code; the blur of 9 x 9 pixels is DINOv2's.

    Args:
        global_scale, local_scale: range of the crop's area, as a fraction of the image's.
        vertical_flip: probability of a top-bottom flip (LowDINO's); left-right is always 0.5.
        jitter: strengths, see JITTER, applied with probability 0.8. blur: probabilities, see BLUR.
        blur_sigma: range in pixels; there is no blur where it ends at SMALLEST_BLUR or below.
        solarize: probability for each global view except the first. grayscale: for all.
        mean, std: of the normalisation, by channel.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        local_number: int = 8,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        vertical_flip: float = 0.0,
        jitter: tuple[float, float, float, float] = JITTER,
        blur: tuple[float, float, float] = BLUR,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.2,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        *,
        global_number: int = 2,
        grayscale: float = 0.2,
    ):
        super().__init__()
        if global_number < 1:
            raise ValueError(f"at least one global view is needed, not {global_number}")
        self.global_size, self.local_size, self.local_number = global_size, local_size, local_number
        if len(mean) != 3:
            jitter, grayscale = (*jitter[:2], 0.0, 0.0), 0.0
        self.vertical_flip, self.grayscale = vertical_flip, grayscale
        self.blur_sigma, self.blurs = blur_sigma, blur_sigma[1] > SMALLEST_BLUR
        # Buffers, because copying a constant to a GPU in every step makes the host wait for it.
        for name, values in (("jitter", jitter), ("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        # Per size of views: size, crops' scale, and by view the chances of blur and solarisation.
        first, others, local = blur
        of_blur = (first,) + (others,) * (global_number - 1)
        of_solarize = (0.0,) + (solarize,) * (global_number - 1)
        self.groups = [(global_size, global_scale, of_blur, of_solarize)]
        if local_number:
            of_local = (local,) * local_number, (0.0,) * local_number
            self.groups.append((local_size, local_scale, *of_local))

    def describe(self) -> str:
        """The number and size of the views, and whether they are too small for blur."""
        words = lambda n, kind, size: f"{n} {kind} view{'s' * (n != 1)} of {size} px"
        text = words(len(self.groups[0][2]), "global", self.global_size) + ", "
        local = self.local_number
        text += words(local, "local", self.local_size) if local else "no local views"
        return text if self.blurs else f"{text}; blur is off below {SMALLEST_BLUR} px"

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Tensor, generator: torch.Generator) -> list[Tensor]:
        parts = windows(sizes, generator)
        return [v for group in self.groups for v in self.draw(images, *parts, generator, group)]

    def draw(
        self, images: Tensor, corners: Tensor, sizes: Tensor, generator: torch.Generator, group
    ) -> Sequence[Tensor]:
        """The N views of one size, view by view: first all random numbers, then the pixels."""
        size, scale, blur, solar = group
        device, views = images.device, len(blur)
        N = views * len(images)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        def chance(*probabilities: float) -> Tensor:
            """(N,) bool, from one probability per view."""
            return torch.cat([u < p for u, p in zip(uniform(N).chunk(views), probabilities)])

        boxes = random_boxes(torch.cat([sizes] * views), scale, generator)
        boxes[:, :2] += torch.cat([corners] * views)
        flip, vertical_flip = uniform(N) < 0.5, uniform(N) < self.vertical_flip
        amounts = (2 * uniform(N, 4) - 1) * self.jitter * (uniform(N, 1) < 0.8)
        order = uniform(N, 4).argsort(dim=1)
        # A mask, an operation, and its values.
        operations = [(uniform(N) < self.grayscale, lambda x: grayscale(x).expand_as(x))]
        low, high = self.blur_sigma
        if self.blurs and any(blur):
            operations.append((chance(*blur), gaussian_blur, low + (high - low) * uniform(N)))
        if any(solar):
            operations.append((chance(*solar), solarize))

        made = torch.empty(N, images.shape[1], size, size, device=device)
        for part, crops in blocks(images, N, size):
            x = resized_crop(images[part], boxes[crops], size, flip[crops], vertical_flip[crops])
            x = color_jitter(x, 1 + amounts[crops, :3], amounts[crops, 3], order[crops])
            for mask, operation, *values in operations:
                x = apply_where(mask[crops], x, operation, *(v[crops] for v in values))
            normalize(x, self.mean, self.std, out=made[crops])
        return made.chunk(views)


def normalize(
    images: Tensor, mean: Tensor | Sequence, std: Tensor | Sequence, out: Tensor | None = None
) -> Tensor:
    """(images - mean) / std by channel: (B, C, H, W) -> (B, C, H, W), into `out` if given."""
    mean, std = (torch.as_tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return torch.sub(images, mean, out=out).div_(std)


@torch.no_grad()
def central_view(
    images: Tensor,
    sizes: Tensor,
    size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    fraction: float | None = None,
) -> Tensor:
    """The view of an evaluation: the central square, resized and normalised, (B, C, size, size).

    Images (B, C, H, W), uint8 or in [0, 1], of height and width `sizes` (B, 2), lie in the top left
    corner of their canvas. The square has a `fraction` of the shorter side, by default the usual
    0.875 (resize to 256, crop 224) from 128 pixels on, and 1 below, where there is no margin.
    """
    fraction = fraction or (0.875 if size >= 128 else 1.0)
    return normalize(resized_crop(images, central_boxes(sizes, fraction), size), mean, std)

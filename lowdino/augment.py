"""Multi-crop augmentation of whole uint8 batches, on whatever device they are on.

A crop, an antialiased resize and a flip are one linear map along each axis, of few taps and of each image's own: exact to
Pillow's BICUBIC within its rounding, and differentiable. A GPU takes it as two batched matrix products, a CPU as weighted
sums of rows, and leaves large views of uint8 images to torch's resize. Blur is such a map too. Colour operations are
arithmetic, without a comparison an element, which a CPU is slow at. The data loader only decodes.

Images are (B, 3, H, W) with values in [0, 1] unless said otherwise; every parameter is a tensor of one value an image.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that is a function of the numbers (seed, step, rank) and of nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def seeded_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator on `device` with the seed derived from the numbers."""
    return torch.Generator(device).manual_seed(derived_seed(*numbers))


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


def interpolation(
    start: Tensor, length: Tensor, out_size: int, in_size: int, flip: Tensor
) -> tuple[Tensor, Tensor]:
    """How to read `length` pixels from `start` and resample them to `out_size`: (B,) x 2 -> places and weights, (B, out_size, taps).

    Cubic kernel with a = -0.5 (Keys, 1981), widened by the scale where it shrinks (antialiasing) and cut at the crop's
    edges: Pillow's definition. Where `flip`, what comes out is in reverse order.

    Keys' two cubics at distance x are one sum, v * v * (v - 1) / 2 + u * u * (1 - 2 * u), of v = max(2 - x, 0) and
    u = max(1 - x, 0); here it is twice that, for the weights are divided by their sum.
    """
    support = 2 * max(1, in_size / out_size)  # at most, in pixels
    taps = torch.arange(2 * math.ceil(support), device=start.device)
    out = torch.arange(out_size, device=start.device, dtype=torch.float32) + 0.5
    out = torch.where(flip[:, None], out_size - out, out)  # (B, out)
    start, length = start.float()[:, None, None], length.float()[:, None, None]  # (B, 1, 1)
    scale = length / out_size
    centre = start + out[:, :, None] * scale  # (B, out, 1)
    first = (centre - 0.5 * len(taps)).round()
    v = (
        (first + 0.5 - centre + taps).abs_().mul_(-1 / scale.clamp(min=1)).add_(2).clamp_(min=0)
    )  # (B, out, taps)
    weights = v - 1
    u = weights.clamp(min=0)
    weights.mul_(v).mul_(v).addcmul_(u * u, torch.rsub(u, 2, alpha=4))
    places = first + taps
    half = length / 2
    weights *= torch.sub(half + 0.5, (places - (start + half - 0.5)).abs_()).clamp_(
        0, 1
    )  # 1 in the crop, 0 outside
    weights /= weights.sum(dim=2, keepdim=True)
    return places.long().clamp_(0, in_size - 1), weights  # beyond the edges weights are 0


def resample(x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows: (B, L, K), places and weights (B, n, taps) -> (B, n, K).

    By a matrix that is mostly zeros, or, where an operation `picks`, by torch's fused look-up and sum of embeddings. That
    takes places and weights of N, a multiple of B, too: of each x, then of each again, and so on -> (N, n, K).
    """
    B, L, K = x.shape
    if picks(x):
        N, n, _ = places.shape
        rows = places + L * (torch.arange(N) % B)[:, None, None]
        sums = F.embedding_bag(
            rows.flatten(0, 1),
            x.reshape(B * L, K),
            per_sample_weights=weights.flatten(0, 1),
            mode="sum",
        )
        return sums.view(N, n, K)
    with torch.autocast(x.device.type, enabled=False):  # whose 8 bits would do for no image
        return torch.bmm(
            weights.new_zeros(B, places.shape[1], L).scatter_add_(2, places, weights), x
        )


def separable(images: Tensor, *axes: Tensor) -> Tensor:
    """Resample along each axis, columns first: (B, C, H, W) -> (B, C, h, w).

    `axes` are places and weights (B, h, taps) of the rows, and those (B, w, taps) of the columns; or N, as `resample` has
    it. The result of either pass is clipped to [0, 1], as Pillow does.
    """
    C, H = images.shape[1:3]
    images = resample(images.permute(0, 3, 1, 2).flatten(2), *axes[2:]).clamp_(
        0, 1
    )  # (N, w, C * H)
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
    """Crop a box from each image, or several; resize it to a square with antialiased bicubic interpolation, perhaps flip it.

    Args:
        images: (B, 3, H, W), uint8, or float in [0, 1].
        boxes: (N, 4) top, left, height, width in pixels, inside the image; N a multiple of B: one of each image, then
            another of each, and so on.
        out_size: side of the result in pixels.
        flip, vertical_flip: (N,) bool, mirror left-right and top-bottom; None for none.

    Returns:
        (N, 3, out_size, out_size) float32 in [0, 1].

    Clipping between the two passes makes their order matter, by some levels at sharp edges. Pillow before version 13
    always resized along the width first; since then a box that loses more than twice as much in height as in width is
    resized along the height first, and so it is here: such an image goes through transposed.
    """
    top, left, height, width = boxes.unbind(dim=1)
    lost_height, lost_width = height - out_size, width - out_size
    transposed = (lost_height > 0) & (lost_height > 2 * lost_width)
    if goes_one_by_one(images, out_size):
        crops = resized_crop_one_by_one(images, boxes, out_size, transposed)
        for axis, mirrored in ((2, vertical_flip), (3, flip)):
            if mirrored is not None:
                crops = where_chosen(mirrored, crops, lambda crops: crops.flip(axis))
        return to_float(crops)
    images = to_float(images.permute(0, 3, 1, 2).contiguous()).permute(
        0, 2, 3, 1
    )  # columns first, as they are read
    side = max(images.shape[2:])
    if images.shape[2] != images.shape[3]:
        images = F.pad(images, (0, side - images.shape[3], 0, side - images.shape[2]))
    none = torch.zeros_like(top, dtype=torch.bool)
    flips = torch.cat([none if axis is None else axis for axis in (vertical_flip, flip)])
    start, length = boxes.T.flatten().chunk(2)  # of the rows, then of the columns
    places, weights = (v.chunk(2) for v in interpolation(start, length, out_size, side, flips))

    def sideways(_: Tensor, which: Tensor, *axes: Tensor) -> Tensor:
        own = images.index_select(0, which) if picks(images) else images
        return separable(own.transpose(2, 3), *axes[2:], *axes[:2]).transpose(2, 3)

    which = torch.arange(len(boxes), device=images.device) % len(images)
    values = transposed, which, places[0], weights[0], places[1], weights[1]
    parts = [values] if picks(images) else zip(*(v.split(len(images)) for v in values))
    crops = [
        where_chosen(chosen, separable(images, *axes), sideways, which, *axes)
        for chosen, which, *axes in parts
    ]
    return torch.cat(crops) if len(crops) > 1 else crops[0]


def goes_one_by_one(images: Tensor, out_size: int) -> bool:
    """Large views, or views of large images, of uint8 on a CPU, where torch's resize is faster; the limit is a measured one."""
    return (
        images.dtype == torch.uint8
        and images.device.type == "cpu"
        and out_size + max(images.shape[2:]) > 192
    )


def resized_crop_one_by_one(
    images: Tensor, boxes: Tensor, out_size: int, transposed: Tensor
) -> Tensor:
    """`resized_crop` by torch's own resize of uint8, which goes along the width first; the result is uint8."""
    crops = torch.empty(len(boxes), 3, out_size, out_size, dtype=torch.uint8)
    for i, (top, left, height, width, turned) in enumerate(
        torch.column_stack([boxes, transposed]).int().tolist()
    ):
        crop, out = (
            images[i % len(images), None, :, top : top + height, left : left + width],
            crops[i],
        )
        if turned:
            crop, out = crop.transpose(2, 3), out.transpose(1, 2)
        out.copy_(F.interpolate(crop, (out_size, out_size), mode="bicubic", antialias=True)[0])
    return crops


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
    """Boxes of torchvision's RandomResizedCrop: (B, 2) heights and widths -> (B, 4) top, left, height, width.

    The area is uniform in `scale` of the image's, the logarithm of the aspect ratio uniform in `ratio`; the first of ten
    draws that fits is taken, else the central box that is as large as the ratio allows.
    """
    height, width = sizes.float()[:, None].unbind(dim=2)  # (B, 1) each
    u = torch.rand(len(sizes), attempts, 2, generator=generator, device=sizes.device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, attempts)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    # Where no draw fits: the whole image, cut to the nearest allowed ratio.
    full_w = torch.minimum(width, (height * ratio[1]).round())
    full_h = torch.minimum(height, (width / ratio[0]).round())
    found = fits.any(dim=1, keepdim=True)
    w = torch.where(found, w.gather(1, first), full_w)
    h = torch.where(found, h.gather(1, first), full_h)

    u = torch.rand(len(sizes), 2, generator=generator, device=sizes.device)
    room_y, room_x = height - h, width - w
    top = torch.where(
        found, (u[:, :1] * (room_y + 1)).floor().minimum(room_y), (room_y / 2).floor()
    )
    left = torch.where(
        found, (u[:, 1:] * (room_x + 1)).floor().minimum(room_x), (room_x / 2).floor()
    )
    return torch.cat([top, left, h, w], dim=1)


def central_boxes(sizes: Tensor, fraction: float) -> Tensor:
    """The central square with `fraction` of the shorter side: (B, 2) heights and widths -> (B, 4) boxes."""
    side = (sizes.amin(dim=1) * fraction).round().clamp(min=1)
    top, left = ((sizes - side[:, None]) / 2).floor().unbind(dim=1)
    return torch.stack([top, left, side, side], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Colour and blur
# ---------------------------------------------------------------------------------------------------------------------


def picks(images: Tensor) -> bool:
    """Whether an operation on some of the images or pixels leaves the others out: on a CPU.

    A GPU works on all and throws away, for it would have to wait until the number of the chosen ones is known.
    """
    return images.device.type == "cpu"


def grayscale(images: Tensor) -> Tensor:
    """Luma of ITU-R 601, as Pillow's mode L: (B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = images.unbind(dim=1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def shift_hue(images: Tensor, shift: Tensor) -> None:
    """Turn the hue by `shift` (B,) of a full circle, in HSV: value and chroma stay. In place.

    With the channels stretched to 0..1, by the lowest and the chroma, the hue is 1 + g + b - r sixths of the circle away
    from red, on the side of the greater of g and b; and a channel is 2 - (the hue's distance from it), cut to 0..1. So
    there is no table of six cases, and nothing to choose.
    """
    r, g, b = images.unbind(dim=1)  # (B, H, W)
    low, high = torch.minimum(g, b), torch.maximum(g, b)
    torch.minimum(low, r, out=low)  # in place, as much as can be: twice as fast as into new memory
    torch.maximum(high, r, out=high)
    chroma = high - low
    hue, side = g + b, g - b
    hue.sub_(r).sub_(low).add_(chroma).copysign_(side)
    torch.clamp(chroma, min=1e-8, out=side)
    hue.div_(side).add_(6 * shift[:, None, None])
    hue.sub_(torch.div(hue, 6, out=side).floor_(), alpha=6)  # in [0, 6)
    # Green is at 2 and blue at 4: what they lack is their distance - 1. Red is at 0 and 6, so that it has its distance from 3, - 1.
    for channel, place, start, sign in ((r, 3, low, 1), (g, 2, high, -1), (b, 4, high, -1)):
        torch.sub(hue, place, out=channel).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(start, channel, chroma, value=sign, out=channel)


def color_jitter(images: Tensor, factors: Tensor, hue: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in an order of each image's own.

    Args:
        factors: (B, 3) of brightness, contrast and saturation; 1 changes nothing.
        hue: (B,) shift in [-0.5, 0.5]; 0 changes nothing.
        order: (B, 4) a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue, first to last.

    Three of the four are one form, f * image + (1 - f) * grey, with grey = 0, the mean luma or the luma. So three slots
    of that form before the hue and three after it, filled or left at f = 1, hold every order with a single turn of hue.
    Where an operation `picks`, the images are sorted by the hue's place, and a slot has those that fill it.
    """
    place = order.argsort(dim=1)  # (B, 4) of each operation in its image's order
    if picks(images):
        at_rest = (factors == 1).all(dim=1) & (hue == 0)
        early = place[:, 3].masked_fill(
            at_rest, 4
        )  # the number of blends before the hue; those at rest come last
        by_hue = early.argsort()
        none, one, two, end, _ = torch.bincount(early, minlength=5).cumsum(dim=0).tolist()
        parts = [
            slice(none, end),
            slice(one, end),
            slice(two, end),
            slice(end),
            slice(none),
            slice(one),
            slice(two),
        ]
        images, factors, hue, place = (
            v.index_select(0, by_hue) for v in (images, factors, hue, place)
        )
    else:
        by_hue, parts, images = None, [slice(None)] * 7, images.clone()
    blends = place[:, :3].argsort(dim=1)  # (B, 3) first to last
    late = place.gather(1, blends) > place[:, 3:]  # (B, 3) behind the hue
    share = 1 - factors.gather(1, blends)  # of grey
    share = torch.cat([share.masked_fill(late, 0), share.masked_fill(~late, 0)], dim=1)  # (B, 6)
    blends = torch.cat([blends, blends], dim=1)
    share, of_mean, of_luma = (
        v.T[:, :, None, None, None].unbind() for v in (share, blends == 1, blends == 2)
    )
    for slot, part in enumerate(parts):  # three blends, the hue, three blends
        own = images[part]
        if slot == 3:
            shift_hue(own, hue[part])
            continue
        k = slot - (slot > 3)
        grey = grayscale(own)
        mean = grey.mean(dim=(2, 3), keepdim=True).mul_(of_mean[k][part])
        own.lerp_(grey.mul_(of_luma[k][part]).add_(mean), share[k][part]).clamp_(0, 1)
    return images if by_hue is None else images.index_select(0, by_hue.argsort())


def gaussian_blur(images: Tensor, sigma: Tensor, reach: int = 4) -> Tensor:
    """Blur each image with its own standard deviation `sigma` (B,) in pixels; 0 changes nothing.

    torchvision's GaussianBlur of kernel size 2 * reach + 1 = 9, as DINOv2 has it: sampled, cut, normalised, and mirrored
    about the edge pixels, of sides above `reach`.
    """
    distance = torch.arange(-reach, reach + 1, device=sigma.device)
    weights = torch.exp(
        -0.5 * (distance / sigma.float().clamp(min=1e-4)[:, None]) ** 2
    )  # (B, 9); 0 becomes the identity
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, None]

    def along(size: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(size, device=sigma.device)[:, None] + distance
        places = (size - 1) - ((size - 1) - places.abs()).abs()
        return places.expand(len(sigma), -1, -1), weights.expand(-1, size, -1)

    return separable(images, *along(images.shape[2]), *along(images.shape[3]))


def solarize(images: Tensor) -> Tensor:
    """Invert all values of one half and above."""
    return torch.minimum(images, 1 - images)


def where_chosen(
    chosen: Tensor, images: Tensor, operation: Callable[..., Tensor], *values: Tensor
) -> Tensor:
    """operation(images, *values) of the images that are `chosen` (B,), the others as they are; in place if it `picks`."""
    if not picks(images):
        return torch.where(chosen.view(-1, 1, 1, 1), operation(images, *values), images)
    which = chosen.nonzero().flatten()
    if len(which):
        images[which] = operation(
            *(v.index_select(0, which) for v in (images, *values))
        )  # twice as fast as v[which]
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


BLOCK = 2**23  # bytes of float views that a CPU works on together; measured at 32 to 224 pixels


def blocks(images: Tensor, crops: int, size: int) -> list[tuple[slice, slice]]:
    """Slices of the images (B, ...), and of their `crops`, a multiple of B, that are worked on together.

    Crops of side `size` come one of each image, then another of each, and so on. On a CPU a slice is either part of the
    images, once, or all of them, some times, and within BLOCK; on a GPU there is one.
    """
    B = len(images)
    most = max(BLOCK // (12 * size * size), 1) if picks(images) else crops
    if most >= B:
        step = most // B * B
        return [
            (slice(B), slice(start, min(start + step, crops))) for start in range(0, crops, step)
        ]
    parts = [slice(start, min(start + most, B)) for start in range(0, B, most)]
    return [
        (part, slice(first + part.start, first + part.stop))
        for first in range(0, crops, B)
        for part in parts
    ]


class MultiCrop(nn.Module):
    """Two global and some local views of each image (DINO's augmentation), drawn for each image by itself.

    forward(images, sizes, generator): images (B, 3, S, S) uint8, each in the top left corner of its canvas with height
    and width `sizes` (B, 2); a generator on the same device. Returns a list of normalised float32 tensors, two of
    (B, 3, global_size, global_size), then `local_number` of (B, 3, local_size, local_size).

    Args:
        global_size, local_size: sides in pixels. local_number: local views an image.
        global_scale, local_scale: range of the crop's area as a fraction of the image's.
        vertical_flip: probability of flipping top-bottom, LowDINO's; left-right is always 0.5.
        jitter: strengths of brightness, contrast, saturation and hue, applied with probability 0.8.
        blur: probability for the first global view, the second, the local ones.
        blur_sigma: range of the blur's standard deviation in pixels; one that ends at 0.3 or less is left out.
        solarize: probability for the second global view.
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
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.2,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ):
        super().__init__()
        self.vertical_flip = vertical_flip
        self.blur_sigma = blur_sigma
        # Buffers, because a constant that is copied to a GPU in every step makes the host wait for it.
        self.register_buffer("jitter", torch.tensor(jitter), persistent=False)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        # The views of one size: the size, the crops' scale, and of each view the probabilities of blur and of solarising.
        self.groups = [(global_size, global_scale, blur[:2], (0.0, solarize))]
        if local_number:
            self.groups += [
                (local_size, local_scale, blur[2:] * local_number, (0.0,) * local_number)
            ]

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [
            view for group in self.groups for view in self.draw(images, sizes, generator, *group)
        ]

    def draw(
        self,
        images: Tensor,
        sizes: Tensor,
        generator: torch.Generator,
        size: int,
        scale: tuple[float, float],
        blur: tuple[float, ...],
        solar: tuple[float, ...],
    ) -> Sequence[Tensor]:
        """The views of one size, all N of them, view by view: first all that is drawn, then the work on the pixels."""
        device, views = images.device, len(blur)
        N = views * len(images)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        def chance(*probabilities: float) -> Tensor:
            """(N,), from one probability for each view."""
            return torch.cat([u < p for u, p in zip(uniform(N).chunk(views), probabilities)])

        boxes = random_boxes(torch.cat([sizes] * views), scale, generator)
        flip, vertical_flip = uniform(N) < 0.5, uniform(N) < self.vertical_flip
        amounts = (2 * uniform(N, 4) - 1) * self.jitter * (uniform(N, 1) < 0.8)
        order = uniform(N, 4).argsort(dim=1)
        # Who is chosen, for what, and with which values.
        operations = [(uniform(N) < 0.2, lambda x: grayscale(x).expand(-1, 3, -1, -1))]
        low, high = self.blur_sigma
        if high > 0.3:  # below, a neighbouring pixel's share is less than 0.4 %
            operations.append((chance(*blur), gaussian_blur, low + (high - low) * uniform(N)))
        if any(solar):
            operations.append((chance(*solar), solarize))

        made = torch.empty(N, 3, size, size, device=device)
        for part, whole in blocks(images, N, size):
            x = resized_crop(
                images[part],
                boxes[whole],
                size,
                flip=flip[whole],
                vertical_flip=vertical_flip[whole],
            )
            x = color_jitter(x, 1 + amounts[whole, :3], amounts[whole, 3], order=order[whole])
            for chosen, operation, *values in operations:
                x = where_chosen(chosen[whole], x, operation, *(v[whole] for v in values))
            normalize(x, self.mean, self.std, out=made[whole])
        return made.chunk(views)


def normalize(
    images: Tensor,
    mean: Tensor | tuple[float, ...],
    std: Tensor | tuple[float, ...],
    out: Tensor | None = None,
) -> Tensor:
    """(images - mean) / std by channel: (B, 3, H, W), 3 values each -> (B, 3, H, W), into `out` where it is given."""
    mean, std = (torch.as_tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
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
    """The view for evaluation: the central square, resized and normalised, (B, 3, S, S) uint8 -> (B, 3, size, size).

    Args:
        fraction: of the shorter side; None takes the usual 0.875 (resize to 256, crop 224) from 128 pixels on, and the
            whole side below, where images have no margin to spare.
    """
    fraction = fraction or (0.875 if size >= 128 else 1.0)
    return normalize(resized_crop(images, central_boxes(sizes, fraction), size), mean, std)

"""Multi-crop augmentation of whole uint8 batches, on whatever device they are on.

A crop, an antialiased resize and a flip are one linear map along each axis, so all of it is two batched matrix products
with matrices of each image's own: exact to Pillow's BICUBIC within its rounding, differentiable, and the same code on
CPU, CUDA and MPS, but for large views of uint8 images on a CPU, which torch's resize makes. Blur is two more products.
Colour operations are arithmetic, without a comparison an element, which a CPU is slow at. The data loader only decodes.

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


def seeded_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator on `device` whose state is a function of the numbers (seed, step, rank) and of nothing else."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


def interpolation_matrix(start: Tensor, length: Tensor, out_size: int, in_size: int, flip: Tensor) -> Tensor:
    """Rows that read `length` pixels from `start` and resample them to `out_size`: (B,) x 2 -> (B, out_size, in_size).

    Cubic kernel with a = -0.5 (Keys, 1981), widened by the scale where it shrinks (antialiasing) and cut at the crop's
    edges: Pillow's definition. Where `flip`, the rows come in reverse order.

    Keys' two cubics at distance x are one sum, v * v * (v - 1) / 2 + u * u * (1 - 2 * u), of v = max(2 - x, 0) and
    u = max(1 - x, 0).
    """
    support = 2 * max(1, in_size / out_size)  # at most, in pixels
    taps = torch.arange(2 * math.ceil(support), device=start.device)
    out = torch.arange(out_size, device=start.device, dtype=torch.float32) + 0.5
    out = torch.where(flip[:, None], out_size - out, out)  # (B, out)
    start, length = start.float()[:, None, None], length.float()[:, None, None]  # (B, 1, 1)
    scale = length / out_size
    centre = start + out[:, :, None] * scale  # (B, out, 1)
    pixel = (centre - 0.5 * len(taps)).round() + taps  # (B, out, taps), those whose middle is within the support
    x = (pixel + 0.5 - centre).abs_() / scale.clamp(min=1)
    v = (2 - x).clamp_(min=0)
    u = (v - 1).clamp_(min=0)
    weight = (v * v * (v - 1) / 2 + u * u * (1 - 2 * u)) * ((pixel >= start) & (pixel < start + length))
    weight = weight / weight.sum(dim=2, keepdim=True)
    matrix = weight.new_zeros(len(weight), out_size, in_size)
    return matrix.scatter_add_(2, pixel.long().clamp_(0, in_size - 1), weight)  # beyond the edges weights are 0


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a matrix along each axis, columns first: (B, C, H, W), (B, h, H), (B, w, W) -> (B, C, h, w).

    The result of either pass is clipped to [0, 1], as Pillow does.
    """
    B, C, H, W = images.shape
    images = torch.bmm(images.reshape(B, C * H, W), columns.transpose(1, 2)).clamp_(0, 1)
    return torch.matmul(rows[:, None], images.view(B, C, H, columns.shape[1])).clamp_(0, 1)


def resized_crop(images: Tensor, boxes: Tensor, out_size: int, flip: Tensor | None = None,
                 vertical_flip: Tensor | None = None) -> Tensor:  # fmt: skip
    """Crop a box from each image, resize it to a square with antialiased bicubic interpolation, perhaps flip it.

    Args:
        images: (B, 3, H, W), uint8, or float in [0, 1].
        boxes: (B, 4) top, left, height, width in pixels, inside the image.
        out_size: side of the result in pixels.
        flip, vertical_flip: (B,) bool, mirror left-right and top-bottom; None for none.

    Returns:
        (B, 3, out_size, out_size) float32 in [0, 1].

    Clipping between the two passes makes their order matter, by some levels at sharp edges. Pillow before version 13
    always resized along the width first; since then a box that loses more than twice as much in height as in width is
    resized along the height first, and so it is here: such an image goes through transposed.
    """
    top, left, height, width = boxes.unbind(dim=1)
    lost_height, lost_width = height - out_size, width - out_size
    transposed = (lost_height > 0) & (lost_height > 2 * lost_width)
    if goes_one_by_one(images, out_size):
        return resized_crop_one_by_one(images, boxes, out_size, transposed, flip, vertical_flip)
    images = to_float(images)
    side = max(images.shape[2:])
    if images.shape[2] != images.shape[3]:
        images = F.pad(images, (0, side - images.shape[3], 0, side - images.shape[2]))
    none = torch.zeros_like(top, dtype=torch.bool)
    flips = torch.cat([none if axis is None else axis for axis in (vertical_flip, flip)])
    start, length = boxes.T.flatten().chunk(2)  # of the rows, then of the columns
    rows, columns = interpolation_matrix(start, length, out_size, side, flips).chunk(2)
    views = separable(images, rows, columns)

    def sideways(_: Tensor, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return separable(images.transpose(2, 3), columns, rows).transpose(2, 3)

    return where_chosen(transposed, views, sideways, images, rows, columns)


def goes_one_by_one(images: Tensor, out_size: int) -> bool:
    """Large views of uint8 on a CPU: the matrices would be large, and mostly zeros."""
    return images.dtype == torch.uint8 and images.device.type == "cpu" and out_size >= 96


def resized_crop_one_by_one(images: Tensor, boxes: Tensor, out_size: int, transposed: Tensor, flip: Tensor | None,
                            vertical_flip: Tensor | None) -> Tensor:  # fmt: skip
    """`resized_crop` by torch's own resize of uint8."""
    views = torch.empty(len(images), 3, out_size, out_size, dtype=torch.uint8)
    for i, (top, left, height, width) in enumerate(boxes.int().tolist()):
        crop = images[i : i + 1, :, top : top + height, left : left + width]
        turn = 2, (3 if transposed[i] else 2)  # the resize goes along the width first
        crop = F.interpolate(crop.transpose(*turn), (out_size, out_size), mode="bicubic", antialias=True).transpose(*turn)
        mirrored = [axis for axis, mirror in ((2, vertical_flip), (3, flip)) if mirror is not None and mirror[i]]
        views[i] = crop.flip(mirrored)[0]
    return to_float(views)


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1]; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def random_boxes(sizes: Tensor, scale: tuple[float, float], generator: torch.Generator,
                 ratio: tuple[float, float] = (3 / 4, 4 / 3), attempts: int = 10) -> Tensor:  # fmt: skip
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
    top = torch.where(found, (u[:, :1] * (room_y + 1)).floor().minimum(room_y), (room_y / 2).floor())
    left = torch.where(found, (u[:, 1:] * (room_x + 1)).floor().minimum(room_x), (room_x / 2).floor())
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
    """Whether an operation on some of the images leaves the others out: on a CPU.

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
    low = torch.minimum(torch.minimum(r, g), b)  # much faster than amin over three channels
    high = torch.maximum(torch.maximum(r, g), b)
    chroma = high - low
    hue = torch.copysign((g + b).sub_(r).sub_(low).add_(chroma), g - b)
    hue.div_(chroma.clamp(min=1e-8)).add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)  # in [0, 6)
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
        early = place[:, 3].masked_fill(at_rest, 4)  # the number of blends before the hue; those at rest come last
        by_hue = early.argsort()
        none, one, two, end, _ = torch.bincount(early, minlength=5).cumsum(dim=0).tolist()
        parts = [slice(none, end), slice(one, end), slice(two, end), slice(end), slice(none), slice(one), slice(two)]
        images, factors, hue, place = (v.index_select(0, by_hue) for v in (images, factors, hue, place))
    else:
        by_hue, parts, images = None, [slice(None)] * 7, images.clone()
    blends = place[:, :3].argsort(dim=1)  # (B, 3) first to last
    factors = factors.gather(1, blends)
    late = place.gather(1, blends) > place[:, 3:]  # (B, 3) behind the hue
    for slot, part in enumerate(parts):  # three blends, the hue, three blends
        own = images[part]
        if slot == 3:
            shift_hue(own, hue[part])
            continue
        k = slot % 4  # 0 to 2 in either half
        f = factors[part, k].masked_fill(late[part, k] != (slot > 3), 1.0)
        f, blend = (v.view(-1, 1, 1, 1) for v in (f, blends[part, k]))
        grey = grayscale(own)
        mean = grey.mean(dim=(2, 3), keepdim=True)
        grey.mul_((1 - f) * (blend == 2)).add_((1 - f) * (blend == 1) * mean)
        own.mul_(f).add_(grey).clamp_(0, 1)
    return images if by_hue is None else images.index_select(0, by_hue.argsort())


def blur_matrix(sigma: Tensor, size: int, reach: int = 4) -> Tensor:
    """Gaussian of standard deviation `sigma` (B,) along an axis of `size` > `reach` pixels: (B, size, size).

    torchvision's GaussianBlur of kernel size 2 * reach + 1 = 9, as DINOv2 has it: sampled, cut, normalised, and
    mirrored about the edge pixels. Output i takes its share of input j directly and through either mirror.
    """
    pixel = torch.arange(size, device=sigma.device)
    i, j = pixel[:, None], pixel  # (size, 1), (size,)
    distances = torch.arange(reach + 1, device=sigma.device)
    decay = -0.5 / sigma.float().clamp(min=1e-4)[:, None] ** 2  # (B, 1); 0 becomes the identity
    shares = torch.exp(decay * distances**2)  # (B, reach + 1)
    shares = shares / (2 * shares.sum(dim=1, keepdim=True) - 1)  # at distance 0 it is 1

    def at(distance: Tensor) -> Tensor:
        return (distance == distances[:, None, None]).float()  # (reach + 1, size, size)

    ways = at((i - j).abs()) + at(i + j) * (j > 0) + at(2 * (size - 1) - i - j) * (j < size - 1)
    return (shares @ ways.flatten(1)).view(-1, size, size)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own standard deviation `sigma` (B,) in pixels; 0 changes nothing."""
    rows, columns = blur_matrix(sigma, images.shape[2]), blur_matrix(sigma, images.shape[3])
    return separable(images, rows, columns)


def solarize(images: Tensor) -> Tensor:
    """Invert all values of one half and above."""
    return torch.minimum(images, 1 - images)


def where_chosen(chosen: Tensor, images: Tensor, operation: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """operation(images, *values) of the images that are `chosen` (B,), the others as they are; in place if it `picks`."""
    if not picks(images):
        return torch.where(chosen.view(-1, 1, 1, 1), operation(images, *values), images)
    which = chosen.nonzero().flatten()
    images[which] = operation(*(v.index_select(0, which) for v in (images, *values)))  # twice as fast as v[which]
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


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

    def __init__(self, global_size: int = 224, local_size: int = 96, local_number: int = 8,
                 global_scale: tuple[float, float] = (0.4, 1.0), local_scale: tuple[float, float] = (0.05, 0.4),
                 vertical_flip: float = 0.0, jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
                 blur: tuple[float, float, float] = (1.0, 0.1, 0.5), blur_sigma: tuple[float, float] = (0.1, 2.0),
                 solarize: float = 0.2, mean: tuple[float, ...] = IMAGENET_MEAN,
                 std: tuple[float, ...] = IMAGENET_STD):  # fmt: skip
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
            self.groups += [(local_size, local_scale, blur[2:] * local_number, (0.0,) * local_number)]

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Tensor, generator: torch.Generator) -> list[Tensor]:
        with torch.autocast(device_type=images.device.type, enabled=False):
            return [view for group in self.groups for view in self.draw(images, sizes, generator, *group)]

    def draw(self, images: Tensor, sizes: Tensor, generator: torch.Generator, size: int, scale: tuple[float, float],
             blur: tuple[float, ...], solar: tuple[float, ...]) -> Sequence[Tensor]:  # fmt: skip
        """The views of one size; the colours of all N of them, view by view, change in one go."""
        device, views = images.device, len(blur)
        N = views * len(images)
        if not goes_one_by_one(images, size):
            images = to_float(images)

        def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

        def chance(*probabilities: float) -> Tensor:
            """(N,), from one probability for all views or one for each."""
            return torch.cat([u < p for u, p in zip(uniform(N).chunk(len(probabilities)), probabilities)])

        boxes = random_boxes(sizes.repeat(views, 1), scale, generator).chunk(views)
        flips, vertical_flips = chance(0.5).chunk(views), chance(self.vertical_flip).chunk(views)
        x = torch.cat([resized_crop(images, boxes[i], size, flip=flips[i], vertical_flip=vertical_flips[i]) for i in range(views)])

        amounts = uniform(N, 4, low=-1.0) * self.jitter * chance(0.8)[:, None]
        x = color_jitter(x, 1 + amounts[:, :3], amounts[:, 3], order=uniform(N, 4).argsort(dim=1))
        x = where_chosen(chance(0.2), x, lambda x: grayscale(x).expand(-1, 3, -1, -1))
        if self.blur_sigma[1] > 0.3:  # below, a neighbouring pixel's share is less than 0.4 %
            x = where_chosen(chance(*blur), x, gaussian_blur, uniform(N, low=self.blur_sigma[0], high=self.blur_sigma[1]))
        if any(solar):
            x = where_chosen(chance(*solar), x, solarize)
        return normalize(x, self.mean, self.std).chunk(views)


def normalize(images: Tensor, mean: Tensor | tuple[float, ...], std: Tensor | tuple[float, ...]) -> Tensor:
    """(images - mean) / std by channel."""
    mean, std = (torch.as_tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images - mean).div_(std)


@torch.no_grad()
def central_view(images: Tensor, sizes: Tensor, size: int, mean: tuple[float, ...] = IMAGENET_MEAN,
                 std: tuple[float, ...] = IMAGENET_STD, fraction: float | None = None) -> Tensor:  # fmt: skip
    """The view for evaluation: the central square, resized and normalised, (B, 3, S, S) uint8 -> (B, 3, size, size).

    Args:
        fraction: of the shorter side; None takes the usual 0.875 (resize to 256, crop 224) from 128 pixels on, and the
            whole side below, where images have no margin to spare.
    """
    fraction = fraction or (0.875 if size >= 128 else 1.0)
    return normalize(resized_crop(images, central_boxes(sizes, fraction), size), mean, std)

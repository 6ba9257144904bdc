"""Pictures of what a network sees, as PNG with a text "caption", and curves, as SVG.

crops.png        the views that it is trained on
neighbours.png   images and those whose features are nearest
maps.png         PCA maps of its last feature map
attention.png    the attention of a Vision Transformer's last block
"""

import html
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from lowdino import augment, checkpoint, data, evaluate
from lowdino.datasets import Source
from lowdino.distributed import Ranks, user_errors
from lowdino.features import compute_rank_features, normalisation

QUERIES = 8  # images that a run's pictures show
MEMORY = 512  # images to seek neighbours among where nobody has computed all features
CELLS = 8  # smallest side of a feature map that is shown
GREY, GREEN, RED = (0.5, 0.5, 0.5), (0.1, 0.7, 0.2), (0.9, 0.1, 0.1)

# -- Images to cells, cells to a file --------------------------------------------------------------


def random_indices(images, count: int, seed: int = 0) -> list[int]:
    """Indices of `count` random images, always the same, or of all where there are fewer."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return order[:count].tolist()


def squares(images, indices: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
    """The central squares of some images, (n, C, side, side) in [0, 1], and their labels (n,)."""
    loader = data.evaluation_loader(Subset(images, indices), len(indices), 0)
    canvas, sizes, labels, *_ = next(iter(loader))
    boxes = augment.central_boxes(sizes, 1.0).to(canvas.device)
    return augment.resized_crop(canvas, boxes, side).cpu(), labels


def visible(images: Tensor) -> Tensor:
    """The first three channels of (B, C, H, W), of fewer the first as grey: (B, 3, H, W)."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def enlarged(maps: Tensor, side: int) -> Tensor:
    """(n, C, h, w) -> (n, C, side, side), bilinear, on the CPU."""
    return F.interpolate(maps.float().cpu(), size=(side, side), mode="bilinear")


def write(file: str | BinaryIO, cells: Tensor, columns: int, caption: str) -> None:
    """Write cells (n, 3, h, w) in [0, 1] row by row, to a path or, as a PNG, to an open file."""
    grid = make_grid(cells, nrow=columns, padding=1, pad_value=1.0)
    picture = to_pil_image(grid.mul(255).round().clamp(0, 255).byte())
    info = PngInfo()
    info.add_text("caption", caption)
    kind = None if isinstance(file, str) else "png"
    picture.save(file, kind, pnginfo=info, compress_level=3)


def save_views(file: BinaryIO, views: list[Tensor], mean, std, images: int = 8) -> None:
    """Write a row per image, a column per view; `mean` and `std` are those that views have.

    Small views are framed in grey.
    """
    side = max(view.shape[-1] for view in views)
    scale, shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (std, mean))
    columns = []
    for view in views:
        room = side - view.shape[-1]
        frame = 2 * (room // 2, room - room // 2)
        view = visible(view[:images].float().cpu() * scale + shift)
        columns.append(F.pad(view, frame, value=0.5))
    caption = "A row per image, a column per view. Views of an image should show the same thing."
    write(file, torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1), len(views), caption)


# -- Nearest neighbours ----------------------------------------------------------------------------


def label_cells(cells: Tensor, words: Sequence[str]) -> None:
    """Write a word at the foot of each of the framed cells (n, 3, 70, 70), in place."""
    for cell, word in zip(cells, words):
        strip = Image.new("L", (64, 12))
        ImageDraw.Draw(strip).text((2, 0), word[:11], 255)
        foot = cell[:, -15:-3, 3:-3]
        foot.copy_((0.35 * foot).maximum(pil_to_tensor(strip) / 255))


def save_rows(file, queries, rows, memory, near: list[list[int]], names, caption: str) -> None:
    """Write a row per query: the image of `queries` at rows[i], those of `memory` at near[i]."""
    cells = []
    for row, indices in zip(rows, near):
        query, (label,) = squares(queries, [row], 64)
        others, labels = squares(memory, indices, 64)
        colours = [GREY] * (1 + len(indices))
        if label != data.NO_LABEL:
            colours[1:] = [GREEN if other == label else RED for other in labels]
        framed = torch.tensor(colours)[:, :, None, None].repeat(1, 1, 70, 70)
        framed[:, :, 3:-3, 3:-3] = visible(torch.cat([query, others]))
        if names and label != data.NO_LABEL:
            label_cells(framed, [names[i] for i in (label, *labels)])
        cells.append(framed)
    write(file, torch.cat(cells), 1 + max(map(len, near)), caption)


def save_neighbours(
    file, queries, memory, features: tuple[Tensor, Tensor], rows: Sequence[int], names=None, k=8
) -> None:
    """A row per query at `rows`: itself, framed grey, and the k nearest images of `memory`.

    They are framed green where they have its class, red where not, grey without labels. `memory`
    may be `queries` itself. `features` are theirs, (n, D) and (N, D); `names` those of the classes.
    """
    among = memory is queries  # an image is its own nearest neighbour then, or ties with its copy
    k = min(k, len(memory) - among)
    _, nearest = evaluate.nearest_neighbours(features[1], features[0][list(rows)], k + among)
    near = [[i for i in row if not among or i != q][:k] for q, row in zip(rows, nearest.tolist())]
    kind, others = "test image", "training images"
    meaning = "Green: of its class, red: of another."
    if among:
        kind, others = "image", f"of {len(memory)} random images"
        meaning = "What they have in common is what the network sees."
    caption = f"A random {kind} per row, framed grey, and the nearest {others} by features. "
    save_rows(file, queries, rows, memory, near, names, caption + meaning)


# -- Feature maps ----------------------------------------------------------------------------------


def principal_components(maps: Tensor) -> Tensor:
    """The first three principal components of all cells: (n, C, h, w) -> (n, 3, h, w) in [0, 1].

    Each goes from its 1st percentile to its 99th, and its largest loading is positive.
    """
    cells = maps.movedim(1, -1).flatten(0, 2).float().cpu()  # (n * h * w, C)
    cells = cells - cells.mean(dim=0)
    axes = torch.linalg.svd(cells, full_matrices=False).Vh[:3]  # (3, C)
    largest = axes.abs().argmax(dim=1, keepdim=True)
    scores = cells @ (axes * axes.gather(1, largest).sign()).T  # (n * h * w, 3)
    low, high = scores.quantile(torch.tensor([0.01, 0.99]), dim=0)
    colours = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.unflatten(0, (len(maps), *maps.shape[2:])).movedim(-1, 1)


def map_side(backbone: nn.Module, size: int, device: torch.device) -> int:
    """Side of an input, `size` or more in whole 32s, that gives a last map of CELLS x CELLS."""
    side = math.ceil(size / 32) * 32
    x = torch.zeros(1, len(backbone.mean), side, side, device=device)
    cells = backbone.forward_features(x).shape[-1]
    return max(side, math.ceil(CELLS * side / cells / 32) * 32)


@torch.no_grad()
def save_maps(
    file: str | BinaryIO, backbone: nn.Module, images, indices: list[int], size: int, device
) -> Tensor:
    """Some images, each with its PCA map beside it, four cells per row.

    `backbone` is in eval mode and knows views of `size` pixels. Images are enlarged where its maps
    would be smaller than CELLS x CELLS. Returns its input (n, C, side, side), normalised.
    """
    side, shown = map_side(backbone, size, device), 160
    mean, std = normalisation(backbone)
    x = augment.normalize(squares(images, indices, side)[0].to(device), mean, std)
    maps = backbone.forward_features(x)
    colours = enlarged(principal_components(maps), shown)
    pairs = torch.stack([visible(squares(images, indices, shown)[0]), colours], dim=1)
    larger = f", enlarged from the {size} of its training" if side > size else ""
    caption = (
        f"Images and the first three principal components of their last feature maps, "
        f"{maps.shape[3]} x {maps.shape[2]} cells, as red, green and blue. Equal colours are alike "
        f"to the network. Its input had {side} pixels{larger}."
    )
    write(file, pairs.flatten(0, 1), 4, caption)
    return x


def attention_maps(network: nn.Module, x: Tensor) -> Tensor:
    """Attention of a ViT's class token to the patches: (n, C, H, W) -> (n, heads, h, w).

    It is that of the last block, and sums to one with that to the class token and the registers.
    """
    h, w = (side // network.patch_size for side in x.shape[-2:])
    return network.get_last_selfattention(x)[:, :, 0, -h * w :].unflatten(2, (h, w))


@torch.no_grad()
def save_attention(
    file: str | BinaryIO, backbone: nn.Module, images, indices: list[int], x: Tensor
) -> None:
    """A row per image: itself, then as each head sees it; `x` is what `save_maps` returned."""
    maps, shown = attention_maps(backbone, x), 96
    image = visible(squares(images, indices, shown)[0])  # (n, 3, 96, 96)
    light = enlarged(maps / maps.amax(dim=(2, 3), keepdim=True), shown)  # (n, heads, 96, 96)
    grey = 0.5 + 0.5 * image.mean(dim=1, keepdim=True)
    cells = [image, *(grey.expand(-1, 3, -1, -1) * head for head in light.split(1, dim=1))]
    caption = (
        f"Attention of the class token in the last block, {maps.shape[3]} x {maps.shape[2]} "
        f"patches: the image, then {maps.shape[1]} heads. A head looks at what is bright."
    )
    write(file, torch.stack(cells, dim=1).flatten(0, 1), len(cells), caption)


@user_errors()
def save_all(folder: Path, backbone, source: Source, size: int, device, features=None) -> None:
    """Write neighbours.png, maps.png and, for a ViT, attention.png.

    The network knows views of `size` pixels. `features` are `evaluate.Features` of the training and
    test images; without them neighbours are sought among MEMORY training images.
    """
    images = source.test if features else source.pretrain
    indices, training = random_indices(images, QUERIES), backbone.training
    with checkpoint.atomic(folder / "neighbours.png") as file:
        if features:
            train, test = (part.features for part in features)
            save_neighbours(file, images, source.train, (test, train), indices, source.names)
        else:
            few, alone = Subset(images, random_indices(images, MEMORY)), Ranks(0, 1, device)
            rows, _ = compute_rank_features(backbone, few, size, alone)
            save_neighbours(file, few, few, (rows, rows), range(len(indices)), source.names)
    backbone.eval()
    with checkpoint.atomic(folder / "maps.png") as file:
        x = save_maps(file, backbone, images, indices, size, device)
    if hasattr(backbone, "get_last_selfattention"):
        with checkpoint.atomic(folder / "attention.png") as file:
            save_attention(file, backbone, images, indices, x)
    backbone.train(training)


# -- Curves ----------------------------------------------------------------------------------------

Curve = dict[float, float | None]  # x -> y, None where y is not finite

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#555555")
STROKES = {"grid": "#dddddd"} | {f"c{i}": colour for i, colour in enumerate(COLOURS)}  # by class
DOTS = 20  # a curve of more points has no dots
POINTS = 400  # of more points a curve shows means


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers, from below `low` to above `high`."""
    step = 10 ** math.floor(math.log10((high - low) or 1.0))
    step *= next(k for k in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (k * step) <= 9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def pieces(curve: Curve) -> list[list[tuple[float, float]]]:
    """The points of a curve, in one list for each stretch without a gap."""
    stretches = itertools.groupby(sorted(curve.items()), lambda point: point[1] is not None)
    return [list(points) for finite, points in stretches if finite]


def thinned(curve: Curve) -> Curve:
    """At most POINTS points, each the mean of as many; a gap where one of them is."""
    points, size = sorted(curve.items()), math.ceil(len(curve) / POINTS)
    means = {}
    for i in range(0, len(points), size or 1):
        xs, ys = zip(*points[i : i + size])
        means[xs[-1]] = None if None in ys else statistics.fmean(ys)
    return means


def svg_text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(words)}</text>'


def svg_line(points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line in the colour of its class `kind`, see STROKES."""
    path, width = " ".join(f"{x},{y}" for x, y in points), 1 if kind == "grid" else 2
    look = f'class="{kind}" fill="none" stroke="{STROKES[kind]}" stroke-width="{width}"'
    return f'<polyline points="{path}" {look}/>'


def legend(names: Sequence[str], kinds: Sequence[str]) -> tuple[list[str], int]:
    """The names below the plot, as many per row as fit, and the height of the whole picture."""
    parts, x, y = [], 60.0, 422
    for name, kind in zip(names, kinds):
        width = 44 + 9.5 * len(name)
        if x > 60 and x + width > 560:
            x, y = 60.0, y + 26
        parts += [svg_line([(x, y - 6), (x + 18, y - 6)], kind), svg_text(x + 24, y, name)]
        x += width
    return parts, y + 12


def draw_curves(
    curves: dict[str, Curve], x_name: str, y_name: str, logarithmic=False, from_zero=False
) -> str:
    """An SVG of curves by name. A logarithmic x axis names every x; `from_zero` is for y."""
    xs = sorted({x for curve in curves.values() for x in curve})
    ys = [y for curve in curves.values() for y in curve.values() if y is not None]
    low, high = min([0.0] * from_zero + ys), max([0.0] * from_zero + ys)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    x_ticks, y_ticks = xs if logarithmic else ticks(min(xs[0], 0), xs[-1]), ticks(low, high)
    scale = math.log if logarithmic else float
    left, right, bottom, top = scale(x_ticks[0]), scale(x_ticks[-1]), y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - left) / ((right - left) or 1.0)
        up = (y - bottom) / ((top - bottom) or 1.0)
        return round(60 + 480 * across, 1), round(340 - 300 * up, 1)

    parts = [svg_text(300, 392, x_name, "middle"), svg_text(60, 22, y_name)]
    for tick in y_ticks:
        x, y = at(x_ticks[0], tick)
        parts += [svg_line([(x, y), (540, y)], "grid"), svg_text(x - 8, y + 6, f"{tick:g}", "end")]
    for tick in x_ticks:
        x, y = at(tick, bottom)
        parts += [svg_line([(x, y), (x, y + 5)], "grid"), svg_text(x, 365, f"{tick:g}", "middle")]
    kinds = [f"c{i % len(COLOURS)}" for i in range(len(curves))]
    for curve, kind in zip(curves.values(), kinds):
        for piece in pieces(curve):
            points = [at(x, y) for x, y in piece]
            parts.append(svg_line(points, kind))
            if len(points) == 1 or len(curve) <= DOTS:
                dot = f'class="{kind}" r="3.5" fill="{STROKES[kind]}"'
                parts += [f'<circle cx="{x}" cy="{y}" {dot}/>' for x, y in points]
    names, height = legend(curves, kinds) if len(curves) > 1 else ([], 402)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-14 0 580 {height}" font-size="18" '
        f'font-family="sans-serif" role="img"><title>{html.escape(y_name)}</title>'
        f'<rect class="paper" x="-14" width="580" height="{height}" fill="white"/>\n'
        + "\n".join([*parts, *names, "</svg>\n"])
    )

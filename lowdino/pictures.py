"""Pictures of what a network has learned: nearest neighbours, PCA maps of its last feature map,
and, of a Vision Transformer, the attention of its last block.

Each is a PNG that carries its caption, as its text "caption".
"""

import html
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.utils import make_grid, save_image

from lowdino import (
    augment,
    checkpoint,
    data,
    datasets,
    distributed,
    evaluate,
)
from lowdino.distributed import user_errors
from lowdino.features import compute_own_features, normalisation

MEMORY = 512  # images among which neighbours are sought where nobody has computed all features
CELLS = 8  # least side of a feature map that is shown
GREY, GREEN, RED = (0.5, 0.5, 0.5), (0.1, 0.7, 0.2), (0.9, 0.1, 0.1)


def squares(images, indices: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
    """The central squares of some images, (n, C, side, side) in [0, 1], and their labels (n,)."""
    loader = data.evaluation_loader(Subset(images, indices), len(indices), 0)
    canvas, sizes, labels, *_ = next(iter(loader))
    boxes = augment.central_boxes(sizes, 1.0).to(canvas.device)
    return augment.resized_crop(canvas, boxes, side).cpu(), labels


def thumbnails(images, indices: Sequence[int], side: int = 64) -> tuple[Tensor, Tensor]:
    """`squares` as a person sees them, of three channels."""
    found, labels = squares(images, indices, side)
    return visible(found), labels


def write(file: str | BinaryIO, cells: Tensor, columns: int, caption: str = "") -> None:
    """Write cells (n, 3, h, w) in [0, 1] as a picture, row by row with white lines between them.

    Args:
        file: a path, whose suffix names the format, or an open file, for a PNG.
    """
    grid = make_grid(cells, nrow=columns, padding=1, pad_value=1.0)
    values = grid.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    info = PngInfo()
    info.add_text("caption", caption)
    kind = None if isinstance(file, str) else "png"
    Image.fromarray(values.numpy()).save(file, kind, pnginfo=info, compress_level=3)


# --------------------------------------------------------------------------------------------------
# Nearest neighbours
# --------------------------------------------------------------------------------------------------


def some(images, count: int, seed: int = 0) -> list[int]:
    """Indices of `count` random images, always the same, or of all where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(images), generator=generator)[:count].tolist()


def save_neighbours(
    file: str | BinaryIO,
    source: datasets.Source,
    train: evaluate.Features,
    test: evaluate.Features,
    queries: int = 10,
    neighbours: int = 8,
) -> None:
    """A row a random test image, then its nearest training images, framed green where they are of
    its class and red where not.
    """
    rows = some(source.test, queries)
    k = min(neighbours, len(source.train))
    query = test.features[rows]
    _, found = evaluate.nearest_neighbours(train.features, query, k)
    caption = (
        "Each row is a random test image, framed grey, and the training images whose features are "
        "nearest to its own. Green: of its class, red: of another."
    )
    save_rows(file, source.test, rows, source.train, found.tolist(), source.names, caption)


def save_own_neighbours(
    file: BinaryIO, images, indices: list[int], features: Tensor, queries: int, names=None
) -> None:
    """As `save_neighbours`, of some of the images among each other.

    Args:
        indices: of those images. features: (n, D), theirs; the first are the queries.
    """
    k = min(8, len(indices) - 1)
    _, found = evaluate.nearest_neighbours(features, features[:queries], k + 1)
    # An image is its own nearest neighbour, or ties with its copy.
    near = [[indices[i] for i in row if i != own][:k] for own, row in enumerate(found.tolist())]
    caption = (
        f"Each row is a random image, framed grey, and those of {len(indices)} random images whose "
        "features are nearest to its own. What they have in common is what the network sees."
    )
    save_rows(file, images, indices[:queries], images, near, names, caption)


def save_rows(
    file: str | BinaryIO,
    queries,
    rows: Sequence[int],
    memory,
    near: Sequence[Sequence[int]],
    names: Sequence[str] | None,
    caption: str,
) -> None:
    """The picture of `save_neighbours`, of queries `rows` and the images that are near each."""
    cells = []
    for row, indices in zip(rows, near):
        query, (label,) = thumbnails(queries, [row])
        found, labels = thumbnails(memory, indices)
        colours = [GREY] * (1 + len(indices))
        if label != data.NO_LABEL:
            colours[1:] = [GREEN if other == label else RED for other in labels]
        framed = torch.tensor(colours)[:, :, None, None].repeat(1, 1, 70, 70)
        framed[:, :, 3:-3, 3:-3] = torch.cat([query, found])
        if names and label != data.NO_LABEL:
            label_cells(framed, [names[i] for i in (label, *labels)])
        cells.append(framed)
    write(file, torch.cat(cells), 1 + max(map(len, near)), caption)


def label_cells(cells: Tensor, words: Sequence[str]) -> None:
    """Write a word at the foot of each of the framed cells (n, 3, 70, 70), in place."""
    for cell, word in zip(cells, words):
        strip = Image.new("L", (64, 12))
        ImageDraw.Draw(strip).text((2, 0), word[:11], 255)
        values = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(12, 64) / 255
        cell[:, -15:-3, 3:-3] = (0.35 * cell[:, -15:-3, 3:-3]).maximum(values)


# --------------------------------------------------------------------------------------------------
# Feature maps
# --------------------------------------------------------------------------------------------------


def principal_components(maps: Tensor) -> Tensor:
    """The first three principal components of all cells of all maps, as colours.

    (n, C, h, w) -> (n, 3, h, w) in [0, 1], each component from its 1st percentile to its 99th. Its
    sign is such that its largest loading is positive.
    """
    cells = maps.movedim(1, -1).flatten(0, 2).float().cpu()  # (n * h * w, C)
    cells = cells - cells.mean(dim=0)
    axes = torch.linalg.svd(cells, full_matrices=False).Vh[:3]  # (3, C)
    largest = axes.abs().argmax(dim=1, keepdim=True)
    found = cells @ (axes * axes.gather(1, largest).sign()).T  # (n * h * w, 3)
    low, high = found.quantile(torch.tensor([0.01, 0.99]), dim=0)
    found = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return found.unflatten(0, (len(maps), *maps.shape[2:])).movedim(-1, 1)


def map_side(backbone: nn.Module, size: int, device: torch.device) -> int:
    """Side of an input, `size` or more in whole 32s, that gives a last map of CELLS x CELLS."""
    side = math.ceil(size / 32) * 32
    cells = backbone.forward_features(
        torch.zeros(1, len(backbone.mean), side, side, device=device)
    ).shape[-1]
    return max(side, math.ceil(CELLS * side / cells / 32) * 32)


def enlarged(maps: Tensor, side: int) -> Tensor:
    """(n, C, h, w) -> (n, C, side, side), bilinear, on the CPU."""
    return F.interpolate(maps.float().cpu(), size=(side, side), mode="bilinear")


@torch.no_grad()
def save_maps(
    file: str | BinaryIO, backbone: nn.Module, images, indices: list[int], size: int, device
) -> Tensor:
    """Some images, each with its PCA map beside it, four cells a row.

    Args:
        backbone: in eval mode. size: side of the views that it knows; smaller maps than
            CELLS x CELLS are had of enlarged images, which the caption says.

    Returns:
        The network's input, (n, C, side, side) normalised.
    """
    side, shown = map_side(backbone, size, device), 160
    mean, std = normalisation(backbone)
    x = augment.normalize(squares(images, indices, side)[0].to(device), mean, std)
    maps = backbone.forward_features(x)
    colours = enlarged(principal_components(maps), shown)
    pairs = torch.stack([thumbnails(images, indices, shown)[0], colours], dim=1)
    larger = f", enlarged from the {size} of its training" if side > size else ""
    caption = (
        f"Images and the last feature map, {maps.shape[3]} x {maps.shape[2]} cells: its first "
        f"three principal components over all of these images as red, green and blue. "
        f"Equal colours are alike to the network. Its input had {side} pixels{larger}."
    )
    write(file, pairs.flatten(0, 1), 4, caption)
    return x


def attention_maps(network: nn.Module, x: Tensor) -> Tensor:
    """What the class token of a ViT's last block attends to: (n, C, H, W) -> (n, heads, h, w).

    The weights of a map are those of the patches, which sum to one with those of the class token
    itself and of the registers.
    """
    h, w = (side // network.patch_size for side in x.shape[-2:])
    return network.get_last_selfattention(x)[:, :, 0, -h * w :].unflatten(2, (h, w))


@torch.no_grad()
def save_attention(
    file: str | BinaryIO, backbone: nn.Module, images, indices: list[int], x: Tensor
) -> None:
    """A row an image: itself, then as each head of the last block sees it.

    Args:
        x: the network's input, as of `save_maps`.
    """
    maps, shown = attention_maps(backbone, x), 96
    cells = [thumbnails(images, indices, shown)[0]]
    light = enlarged(maps / maps.amax(dim=(2, 3), keepdim=True), shown)  # (n, heads, 96, 96)
    grey = cells[0].mean(dim=1, keepdim=True)
    cells += [(0.5 + 0.5 * grey).expand(-1, 3, -1, -1) * head for head in light.split(1, dim=1)]
    caption = (
        f"Attention of the class token in the last block, {maps.shape[3]} x {maps.shape[2]} "
        f"patches: the image, then a column for each of the {maps.shape[1]} heads. What is bright "
        "is what the head looks at."
    )
    write(file, torch.stack(cells, dim=1).flatten(0, 1), len(cells), caption)


@user_errors()
def save_all(
    folder: Path,
    backbone: nn.Module,
    source: datasets.Source,
    size: int,
    device: torch.device,
    features: tuple[evaluate.Features, evaluate.Features] | None = None,
    queries: int = 8,
) -> None:
    """neighbours.png, maps.png and, of a ViT, attention.png.

    Args:
        size: side of the views that the network knows.
        features: of the training and test images; without them neighbours are sought among MEMORY
            images of those to learn from.
    """
    images = source.pretrain if features is None else source.test
    shown = some(images, queries)
    training = backbone.training
    with checkpoint.atomic(folder / "neighbours.png") as file:
        if features:
            save_neighbours(file, source, *features, queries=queries)
        else:
            indices = some(images, MEMORY)
            alone = distributed.Ranks(0, 1, device)
            found, _ = compute_own_features(backbone, Subset(images, indices), size, alone)
            save_own_neighbours(file, images, indices, found, queries, source.names)
    backbone.eval()
    with checkpoint.atomic(folder / "maps.png") as file:
        x = save_maps(file, backbone, images, shown, size, device)
    if hasattr(backbone, "get_last_selfattention"):
        with checkpoint.atomic(folder / "attention.png") as file:
            save_attention(file, backbone, images, shown, x)
    backbone.train(training)


def save_views(
    file: BinaryIO,
    views: list[Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    images: int = 8,
) -> None:
    """Write a PNG of the first images' views: a row an image, a column a view.

    Small views are framed in grey. `mean` and `std` are those that the views are normalised by.
    """
    side = max(view.shape[-1] for view in views)
    scale, shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (std, mean))
    columns = []
    for view in views:
        view = visible(view[:images].float().cpu() * scale + shift)
        room = side - view.shape[-1]
        before = room // 2
        columns.append(F.pad(view, (before, room - before, before, room - before), value=0.5))
    save_image(
        torch.stack(columns, dim=1).flatten(0, 1).clamp(0, 1),
        file,
        format="png",
        nrow=len(views),
        pad_value=1.0,
    )


def visible(images: Tensor) -> Tensor:
    """The first three channels of (B, C, H, W), of fewer the first as grey: (B, 3, H, W)."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


# --------------------------------------------------------------------------------------------------
# Curves as SVG
# --------------------------------------------------------------------------------------------------

Curve = dict[float, float | None]  # x -> y, None where y is not finite

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#555555")
DOTS = 20  # a curve of more points has none
POINTS = 400  # of more points a curve shows means


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers, from below `low` to above `high`."""
    step = 10 ** math.floor(math.log10((high - low) or 1.0))
    step *= next(k for k in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (k * step) <= 9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def pieces(curve: Curve) -> list[list[tuple[float, float]]]:
    """The points of a curve, in a list of its own each stretch without a gap."""
    found: list[list] = [[]]
    for x, y in sorted(curve.items()):
        if y is None:
            found.append([])
        else:
            found[-1].append((x, y))
    return [piece for piece in found if piece]


def thinned(curve: Curve) -> Curve:
    """At most POINTS points, each the mean of as many; a gap where one of them is."""
    points, size = sorted(curve.items()), math.ceil(len(curve) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    means = {}
    for group in groups:
        ys = [y for _, y in group]
        means[group[-1][0]] = None if None in ys else statistics.fmean(ys)
    return means


def draw_curves(
    curves: dict[str, Curve],
    x_name: str,
    y_name: str,
    logarithmic: bool = False,
    from_zero: bool = False,
) -> str:
    """An SVG of curves by name. On a logarithmic axis every x has its number.

    Args:
        from_zero: whether the y axis begins at 0. One curve has no name of its own.
    """
    xs = sorted({x for curve in curves.values() for x in curve})
    ys = [y for curve in curves.values() for y in curve.values() if y is not None]
    low, high = min([0.0] * from_zero + ys), max([0.0] * from_zero + ys)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    y_ticks = ticks(low, high)
    x_ticks = xs if logarithmic else ticks(min(xs[0], 0), xs[-1])
    scale = math.log if logarithmic else float

    def share(value: float, marks: list[float], scale=float) -> float:
        low, high = scale(marks[0]), scale(marks[-1])
        return (scale(value) - low) / ((high - low) or 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        return round(60 + 480 * share(x, x_ticks, scale), 1), round(
            340 - 300 * share(y, y_ticks), 1
        )

    parts = [svg_text(300, 392, x_name, 'text-anchor="middle"'), svg_text(60, 22, y_name)]
    for tick in y_ticks:
        x, y = at(x_ticks[0], tick)
        parts.append(svg_line([(x, y), (540, y)], "#dddddd", "grid"))
        parts.append(svg_text(x - 8, y + 6, f"{tick:g}", 'text-anchor="end"'))
    for tick in x_ticks:
        x, y = at(tick, y_ticks[0])
        parts.append(svg_line([(x, y), (x, y + 5)], "#dddddd", "grid"))
        parts.append(svg_text(x, 365, f"{tick:g}", 'text-anchor="middle"'))
    for (_, curve), colour, kind in styled(curves):
        for piece in pieces(curve):
            points = [at(x, y) for x, y in piece]
            parts.append(svg_line(points, colour, kind))
            if len(points) == 1 or len(curve) <= DOTS:
                dot = f'class="{kind}" r="3.5" fill="{colour}"'
                parts += [f'<circle cx="{x}" cy="{y}" {dot}/>' for x, y in points]
    height = 402
    if len(curves) > 1:
        names, height = legend(curves)
        parts += names
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-14 0 580 {height}" font-size="18" '
        f'font-family="sans-serif" role="img"><title>{html.escape(y_name)}</title>'
        f'<rect class="paper" x="-14" width="580" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def styled(curves: dict[str, Curve]) -> Iterator[tuple[tuple[str, Curve], str, str]]:
    """Name and curve, with its colour and the class of that."""
    for i, item in enumerate(curves.items()):
        yield item, COLOURS[i % len(COLOURS)], f"c{i % len(COLOURS)}"


def legend(curves: dict[str, Curve]) -> tuple[list[str], int]:
    """The names below the plot, as many a row as fit, and the height of the whole picture."""
    parts, x, y = [], 60.0, 422
    for (name, _), colour, kind in styled(curves):
        width = 44 + 9.5 * len(name)
        if x > 60 and x + width > 560:
            x, y = 60.0, y + 26
        parts.append(svg_line([(x, y - 6), (x + 18, y - 6)], colour, kind))
        parts.append(svg_text(x + 24, y, name))
        x += width
    return parts, y + 12


def svg_text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" {more}>{html.escape(words)}</text>'


def svg_line(points: Sequence[tuple[float, float]], colour: str, kind: str) -> str:
    path, width = " ".join(f"{x},{y}" for x, y in points), 1 if kind == "grid" else 2
    look = f'class="{kind}" fill="none" stroke="{colour}" stroke-width="{width}"'
    return f'<polyline points="{path}" {look}/>'

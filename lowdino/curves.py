"""Curves as SVG, for a page or a file of its own.

Colours are for a white page; a style sheet finds its way by the classes: `c0`, `c1` and so on for
the curves, `grid` for lines and `paper` for the ground.
"""

import html
import math
import statistics
from collections.abc import Iterator, Sequence

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


def drawn(
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

    parts = [text(300, 392, x_name, 'text-anchor="middle"'), text(60, 22, y_name)]
    for tick in y_ticks:
        x, y = at(x_ticks[0], tick)
        parts.append(line([(x, y), (540, y)], "#dddddd", "grid"))
        parts.append(text(x - 8, y + 6, f"{tick:g}", 'text-anchor="end"'))
    for tick in x_ticks:
        x, y = at(tick, y_ticks[0])
        parts.append(line([(x, y), (x, y + 5)], "#dddddd", "grid"))
        parts.append(text(x, 365, f"{tick:g}", 'text-anchor="middle"'))
    for (_, curve), colour, kind in styled(curves):
        for piece in pieces(curve):
            points = [at(x, y) for x, y in piece]
            parts.append(line(points, colour, kind))
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
        parts.append(line([(x, y - 6), (x + 18, y - 6)], colour, kind))
        parts.append(text(x + 24, y, name))
        x += width
    return parts, y + 12


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" {more}>{html.escape(words)}</text>'


def line(points: Sequence[tuple[float, float]], colour: str, kind: str) -> str:
    path, width = " ".join(f"{x},{y}" for x, y in points), 1 if kind == "grid" else 2
    look = f'class="{kind}" fill="none" stroke="{colour}" stroke-width="{width}"'
    return f'<polyline points="{path}" {look}/>'

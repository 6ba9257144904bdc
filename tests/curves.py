"""Curves as SVG."""

import math

COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#555555")
DOTS = 20  # a curve of more points has none


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers, from below `low` to above `high`."""
    step = 10 ** math.floor(math.log10((high - low) or 1.0))
    step *= next(k for k in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (k * step) <= 9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def drawn(
    curves: dict[str, dict[float, float]], x_name: str, y_name: str, logarithmic: bool = False
) -> str:
    """A picture of curves, name -> x -> y. On a logarithmic axis every x has its number."""
    xs = sorted({x for curve in curves.values() for x in curve})
    ys = [y for curve in curves.values() for y in curve.values()]
    y_ticks = ticks(min(ys), max(ys))
    x_ticks = xs if logarithmic else ticks(xs[0], xs[-1])
    scale = math.log if logarithmic else float

    def share(value: float, marks: list[float], scale=float) -> float:
        low, high = scale(marks[0]), scale(marks[-1])
        return (scale(value) - low) / ((high - low) or 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        return round(60 + 480 * share(x, x_ticks, scale), 1), round(
            340 - 300 * share(y, y_ticks), 1
        )

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" {more}>{words}</text>'

    def line(points: list[tuple[float, float]], colour: str) -> str:
        path = " ".join(f"{x},{y}" for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'

    parts = [text(300, 385, x_name, 'text-anchor="middle"'), text(60, 25, y_name)]
    for tick in y_ticks:
        x, y = at(x_ticks[0], tick)
        parts.append(line([(x, y), (540, y)], "#dddddd"))
        parts.append(text(x - 8, y + 4, f"{tick:g}", 'text-anchor="end"'))
    for tick in x_ticks:
        parts.append(text(at(tick, y_ticks[0])[0], 362, f"{tick:g}", 'text-anchor="middle"'))
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [at(x, y) for x, y in sorted(curve.items())]
        parts.append(line(points, colour))
        if len(points) <= DOTS:
            parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(text(560, 50 + 22 * i, name, f'fill="{colour}"'))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="400" font-size="14" '
        'font-family="sans-serif"><rect width="860" height="400" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )

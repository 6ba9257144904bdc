"""Demo images made by code, ten classes of 64 x 64 pixels, to try everything without a file."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SIDE = 64
TRAIN, TEST = 4000, 1000  # images of the two splits
TEST_START = 10**6  # first index of the test split; the training split starts at 0
GLYPH_SIDE = 13
GLYPHS_PER_IMAGE = 28


def draw_glyphs() -> np.ndarray:
    """The ten classes: shapes of about equal area with smooth edges, (10, 13, 13) in [0, 1]."""
    y, x = np.mgrid[-6:7, -6:7].astype(np.float64)
    r, square, diamond = np.hypot(x, y), np.maximum(abs(x), abs(y)), abs(x) + abs(y)

    def bar(t: np.ndarray, width: float) -> np.ndarray:
        """A band of half-width `width` about t = 0."""
        return abs(t) - width

    # Signed distances, negative inside, in pixels.
    shapes = [
        r - 4.1,  # disc
        abs(r - 4.6) - 0.95,  # ring
        square - 3.6,  # square
        abs(square - 4.3) - 0.8,  # frame
        abs(diamond - 5.2) / 1.4 - 0.95,  # hollow diamond
        np.maximum(np.minimum(bar(x, 1.2), bar(y, 1.2)), square - 5.4),  # plus
        np.maximum(np.minimum(bar(x - y, 1.7), bar(x + y, 1.7)), square - 4.6) / 1.4,  # saltire
        np.maximum(abs(abs(y) - 3.2) - 1.2, abs(x) - 5.2),  # two horizontal bars
        np.maximum(abs(abs(x) - 3.2) - 1.2, abs(y) - 5.2),  # two vertical bars
        np.hypot(abs(x) - 3.4, abs(y) - 3.4) - 2.0,  # four dots
    ]
    return np.clip(0.5 - np.stack(shapes), 0, 1)


def draw_chunk(indices: np.ndarray, glyphs: np.ndarray) -> np.ndarray:
    """Images of some indices: (N,), (10, 13, 13) -> (N, 3, 64, 64) uint8."""
    border, n = GLYPH_SIDE // 2, GLYPHS_PER_IMAGE
    u = np.stack(
        [np.random.default_rng(int(i)).random(75 + n * 5, dtype=np.float32) for i in indices]
    )  # (N, 75 + n * 5)
    colours, u = u[:, :75].reshape(-1, 3, 5, 5), u[:, 75:].reshape(len(indices), n, 5)
    # Bilinear weights that stretch a grid of 5 x 5 random colours into clouds.
    at = np.linspace(0, 4 - 1e-6, SIDE)
    stretch = np.maximum(0, 1 - abs(at[:, None] - np.arange(5))).astype(np.float32)  # (64, 5)
    background = 0.2 + 0.2 * (stretch @ colours @ stretch.T)  # (N, 3, 64, 64)
    canvas = np.pad(background, [(0, 0), (0, 0), (border, border), (border, border)])
    corner = (u[:, :, :2] * SIDE).astype(int)  # (N, n, 2), top and left
    ink = 0.3 + 0.3 * u[:, :, 2:]  # (N, n, 3)
    image = np.arange(len(indices))[:, None, None]
    offsets = np.arange(GLYPH_SIDE)
    for k in range(n):
        rows = corner[:, k, 0, None, None] + offsets[:, None]  # (N, 13, 1)
        columns = corner[:, k, 1, None, None] + offsets  # (N, 1, 13)
        stamp = glyphs[indices % 10, :, :, None] * ink[:, k, None, None, :]  # (N, 13, 13, 3)
        canvas[image, :, rows, columns] += stamp
    canvas = canvas[:, :, border:-border, border:-border]
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def demo_images(indices: Sequence[int], chunk: int = 500) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) and labels int64 (N,) by index; the label is index mod 10.

    The same index always gives the same image. Each image has many copies of one glyph on a cloudy
    background. The glyph is the class, and the only thing that all crops of an image share:
    position, colour and brightness change from copy to copy, and the background from corner to
    corner. So neither raw pixels nor the mean colour of a view tell the class. The glyphs are still
    clear at half the side.

    Args:
        chunk: images drawn at a time, which bounds the memory.
    """
    indices = np.asarray(indices, dtype=np.int64)
    glyphs = draw_glyphs().astype(np.float32)
    parts = np.split(indices, range(chunk, len(indices), chunk))
    images = np.concatenate([draw_chunk(part, glyphs) for part in parts])
    return torch.from_numpy(images), torch.from_numpy(indices % 10)

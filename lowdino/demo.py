"""Images made by code, to try everything without a file.

`demo_images` have ten classes; `demo_scenes` have boxes and masks, for detection and segmentation.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SIDE, GLYPH_SIDE, GLYPHS_PER_IMAGE = 64, 13, 28
TRAIN, TEST = 4000, 1000  # images per split
TEST_START = 10**6  # first index of the test split; the training split starts at 0

SCENE_SIDE = 96
SCENE_TRAIN, SCENE_TEST = 2000, 400  # scenes per split
CANDIDATES = 16  # glyphs drawn for a scene; those that would touch another are left out
KINDS = 2  # classes drawn for a scene, perhaps twice the same: as in photos, its parts are related
# Labels 1 to 10; 0 is the background.
SCENE_CLASSES = tuple("disc ring square frame diamond plus saltire rows columns dots".split())


def splits(train: int, test: int) -> tuple[range, range]:
    """The indices of so many training and test images."""
    return range(train), range(TEST_START, TEST_START + test)


def shapes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distances to the ten classes in pixels, negative inside: (H, W) * 2 -> (10, H, W)."""
    # They have about equal areas, and reach 6 pixels from their centre (0, 0).
    r, square, diamond = np.hypot(x, y), np.maximum(abs(x), abs(y)), abs(x) + abs(y)
    bar = lambda t, width: abs(t) - width  # a band about t = 0, of that half-width
    return np.stack(
        [
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
    )


def clouds(colours: np.ndarray, side: int) -> np.ndarray:
    """Stretch grids of 5 x 5 colours bilinearly: (..., 5, 5) -> (..., side, side)."""
    at = np.linspace(0, 4 - 1e-6, side)
    stretch = np.maximum(0, 1 - abs(at[:, None] - np.arange(5))).astype(np.float32)  # (side, 5)
    return 0.2 + 0.2 * (stretch @ colours @ stretch.T)


def draw_images(indices: np.ndarray, glyphs: np.ndarray) -> np.ndarray:
    """Draw the images of some indices: (N,), (10, 13, 13) -> (N, 3, 64, 64) uint8."""
    border, n = GLYPH_SIDE // 2, GLYPHS_PER_IMAGE
    generators = map(np.random.default_rng, indices.tolist())
    u = np.stack([g.random(75 + n * 5, dtype=np.float32) for g in generators])  # (N, 75 + n * 5)
    colours, u = u[:, :75].reshape(-1, 3, 5, 5), u[:, 75:].reshape(len(indices), n, 5)
    background = clouds(colours, SIDE)  # (N, 3, 64, 64)
    canvas = np.pad(background, [(0, 0), (0, 0), (border, border), (border, border)])
    corner = (u[:, :, :2] * SIDE).astype(int)  # (N, n, 2), top and left
    ink = 0.3 + 0.3 * u[:, :, 2:]  # (N, n, 3)
    image, offsets = np.arange(len(indices))[:, None, None], np.arange(GLYPH_SIDE)
    for k in range(n):
        rows = corner[:, k, 0, None, None] + offsets[:, None]  # (N, 13, 1)
        columns = corner[:, k, 1, None, None] + offsets  # (N, 1, 13)
        stamp = glyphs[indices % 10, :, :, None] * ink[:, k, None, None, :]  # (N, 13, 13, 3)
        canvas[image, :, rows, columns] += stamp
    canvas = canvas[:, :, border:-border, border:-border]
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def demo_images(indices: Sequence[int], chunk: int = 500) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) and labels int64 (N,) by index; the label is index mod 10.

    The same index always gives the same image: many copies of one glyph, its class, on a cloudy
    background. The glyph is all that the crops of an image share, since position, colour and
    brightness differ by copy, so neither raw pixels nor mean colours tell the class. It is still
    clear at half the side. `chunk` images are drawn at a time, which bounds the memory.
    """
    indices = np.asarray(indices, dtype=np.int64)
    y, x = np.mgrid[-6:7, -6:7].astype(np.float64)
    glyphs = np.clip(0.5 - shapes(x, y), 0, 1).astype(np.float32)  # (10, 13, 13), smooth edges
    chunks = np.split(indices, range(chunk, len(indices), chunk))
    images = np.concatenate([draw_images(part, glyphs) for part in chunks])
    return torch.from_numpy(images), torch.from_numpy(indices % 10)


def draw_scene(index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An image (3, 96, 96) uint8, and its boxes, labels and masks as in `demo_scenes`."""
    generator = np.random.default_rng([int(index), 1])
    image = clouds(generator.random((3, 5, 5), dtype=np.float32), SCENE_SIDE)
    boxes, labels, masks, places = [], [], [], []
    kinds = generator.integers(0, 10, KINDS)
    for u in generator.random((CANDIDATES, 9)):
        scale = 1.0 + 1.2 * u[0]  # of a glyph of 13 pixels
        radius = 6 * scale
        centre = radius + (SCENE_SIDE - 2 * radius) * u[1:3]  # inside the scene
        if any(np.hypot(*(centre - other)) < 0.9 * (radius + r) for other, r in places):
            continue
        places.append((centre, radius))
        mask = np.zeros((SCENE_SIDE, SCENE_SIDE), dtype=bool)
        low, high = (np.clip(centre + d, 0, SCENE_SIDE).astype(int) for d in (-radius, radius + 2))
        window = tuple(slice(*ends) for ends in zip(low, high))
        y, x = ((at - middle) / scale for at, middle in zip(np.mgrid[window], centre))
        kind, ink = int(kinds[int(KINDS * u[5])]), np.float32(0.3 + 0.4 * u[6:9])
        cover = np.clip(0.5 - shapes(x, y)[kind] * scale, 0, 1)
        image[(slice(None), *window)] += cover * ink[:, None, None]
        mask[window] = cover > 0.5
        if mask.any():
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            labels.append(1 + kind)
            masks.append(mask)
    target = dict(
        boxes=np.float32(boxes).reshape(-1, 4),
        labels=np.int64(labels),
        masks=np.uint8(masks).reshape(-1, SCENE_SIDE, SCENE_SIDE),
    )
    return (image.clip(0, 1) * 255).round().astype(np.uint8), target


def demo_scenes(indices: Sequence[int]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Scenes uint8 (N, 3, 96, 96) by index, and a dict of the objects in each.

    The same index always gives the same scene: about eight glyphs of 7 to 28 pixels on a cloudy
    background, of one or two classes. The dicts are those of torchvision's detectors: boxes (n, 4)
    float32 of left, top, right and bottom in pixels, labels (n,) int64 from 1 (see SCENE_CLASSES),
    masks (n, 96, 96) uint8.
    """
    drawn = [draw_scene(index) for index in indices]
    images = torch.from_numpy(np.stack([image for image, _ in drawn]))
    targets = [{name: torch.from_numpy(value) for name, value in t.items()} for _, t in drawn]
    return images, targets


def semantic_mask(target: dict[str, Tensor]) -> Tensor:
    """The label of each pixel of a scene: (96, 96) uint8, 0 for the background."""
    return (target["masks"] * target["labels"][:, None, None]).amax(dim=0).to(torch.uint8)

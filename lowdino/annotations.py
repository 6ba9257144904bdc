"""Pictures with boxes and masks: the demo scenes, or a folder in COCO's form."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowdino import demo, image_io
from lowdino.distributed import UserError, user_errors
from lowdino.image_io import RGB, PixelFormat


def polygon_mask(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie inside a polygon: (N, 2) of x and y -> (H, W) bool.

    The centre of the first pixel is (0.5, 0.5). Pixels that the edges enclose twice are outside.
    """
    (x0, y0), (x1, y1) = polygon.T[:, :, None], np.roll(polygon, -1, axis=0).T[:, :, None]
    # Computed within the polygon's bounding box: most objects are small in their pictures.
    left, top = np.floor(polygon.min(axis=0)).clip(0, (width, height)).astype(np.int64)
    right, bottom = np.ceil(polygon.max(axis=0)).clip(0, (width, height)).astype(np.int64)
    y = np.arange(top, bottom) + 0.5
    edges, rows = np.nonzero((y0 <= y) != (y1 <= y))
    slope = (x1 - x0)[edges, 0] / (y1 - y0)[edges, 0]
    x = x0[edges, 0] + (y[rows] - y0[edges, 0]) * slope  # where the row crosses the edge
    crossings = np.zeros((bottom - top, right - left + 1), dtype=np.int64)
    columns = np.ceil(x - 0.5).clip(left, right).astype(np.int64) - left
    np.add.at(crossings, (rows, columns), 1)
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = crossings.cumsum(axis=1)[:, :-1] % 2 == 1
    return mask


def run_length_mask(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Runs of zeros and ones in turn, zeros first, down the columns: (H, W) bool."""
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


@dataclass
class Picture:
    """A picture's file, and the objects in it. Crowds are not trained on."""

    path: str
    height: int  # of the upright picture, in pixels
    width: int
    boxes: np.ndarray  # (n, 4) float32: left, top, right, bottom in pixels, inside, not empty
    labels: np.ndarray  # (n,) int64 from 1
    crowd: np.ndarray  # (n,) bool: the box of several objects
    shapes: list[list[np.ndarray] | np.ndarray] | None = None  # polygons or run lengths of each

    def masks(self) -> np.ndarray:
        """(n, H, W) uint8."""
        size = self.height, self.width
        masks = np.zeros((len(self.labels), *size), dtype=np.uint8)
        for mask, shape in zip(masks, self.shapes):
            if isinstance(shape, np.ndarray):
                mask[:] = run_length_mask(shape, *size)
            else:
                for polygon in shape:
                    mask |= polygon_mask(polygon, *size)
        return masks


class Pictures(Dataset):
    """Files, decoded on access, each with its objects.

    An item is the image, (C, H, W) uint8, and a dict of `Picture`'s boxes, labels and crowd and,
    where there are masks, masks (n, H, W) uint8.
    """

    def __init__(self, pictures: list[Picture], pixels: PixelFormat = RGB):
        self.pictures, self.pixels = pictures, pixels
        self.paths = [picture.path for picture in pictures]
        self.sizes = [(picture.height, picture.width) for picture in pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    @user_errors()
    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        picture = self.pictures[index]
        names = "boxes", "labels", "crowd"
        target = {name: torch.from_numpy(getattr(picture, name)) for name in names}
        if picture.shapes is not None:
            target["masks"] = torch.from_numpy(picture.masks())
        return image_io.read_image(picture.path, pixel_format=self.pixels), target


class Scenes(Dataset):
    """Demo scenes in memory, with items like those of `Pictures`."""

    in_memory = True

    def __init__(self, indices: Sequence[int], masks: bool):
        self.images, self.targets = demo.demo_scenes(indices)
        self.sizes = [tuple(self.images.shape[2:])] * len(self.images)
        for target in self.targets:
            target["crowd"] = torch.zeros(len(target["labels"]), dtype=torch.bool)
            if not masks:
                del target["masks"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], self.targets[index]


@dataclass
class BoxSource:
    """Training and test pictures with boxes."""

    name: str  # in words, for the log
    train: Pictures | Scenes
    test: Pictures | Scenes
    names: Sequence[str]  # of the classes; label 1 is the first
    notes: list[str] = field(default_factory=list)  # sentences on what was cut or left out


def upright_size(path: str, pixels: PixelFormat) -> tuple[int, int]:
    """Height and width of a picture as `read_image` gives it, from the file's header."""
    lying = [image_io.TURNS[orientation] for orientation in (5, 6, 7, 8)]
    with image_io.named_errors(path):
        if image_io.is_array(path):
            height, width = image_io.load_array(path, pixels.channels).shape[:2]
            pixels.check_size(width, height)
            return height, width
        with image_io.open_picture(path) as image:
            pixels.check_size(*image.size)
            width, height = image.size
            if image.format == "TIFF":  # whose size newer versions of Pillow give upright already
                width, height = image.tag_v2[256], image.tag_v2[257]
            return (width, height) if image_io.turn_of(image) in lying else (height, width)


def clip_boxes(
    boxes: Iterable[list[float]], height: int, width: int, changes: Counter
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes clipped to their picture, (n, 4) float32, and which of them have an area, (n,) bool.

    `changes` counts boxes that are cut by more than a pixel, and boxes without an area.
    """
    # Clipped in float64: a number too large for float32 would become infinite.
    boxes = np.array([*boxes], dtype=np.float64).reshape(-1, 4)
    clipped = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    changes["cut"] += int((kept & (abs(clipped - boxes) > 1).any(axis=1)).sum())
    changes["left out"] += int((~kept).sum())
    return clipped, kept


def notes_of(file: str | Path, changes: Counter) -> list[str]:
    """A note on the boxes that `clip_boxes` counted, or none."""
    cut = "boxes reach beyond their pictures and are cut"
    words = {"cut": cut, "left out": "have no area inside theirs and are left out"}
    notes = [f"{changes[name]} {words[name]}" for name in words if changes[name]]
    return [f"{file}: {', '.join(notes)}"] if notes else []


def need_objects(name: str | Path, pictures: list[Picture]) -> None:
    """Refuse pictures without an object to train on or to test on."""
    count = sum((~picture.crowd).sum() for picture in pictures)
    need(count, f"{name} has no box of an object that counts, and a detector needs some")


# -- COCO's form -----------------------------------------------------------------------------------


def load_coco(folder: Path, masks: bool = False, pixels: PixelFormat = RGB) -> BoxSource:
    """Pictures in train/ and val/ of a folder, with their objects in JSON files of COCO's form.

    COCO's names, train2017/ and val2017/, are known too. The files, in annotations/ or in the
    folder itself, are instances_train*.json and instances_val*.json, or train.json and val.json.
    Categories become labels 1, 2, ... in the order of their ids. A UserError names the wrong file.
    """
    train_place, test_place = (find_split(folder, split) for split in ("train", "val"))
    categories, train, notes = read_coco(*train_place, masks, pixels)
    _, test, test_notes = read_coco(*test_place, masks, pixels, categories)
    names = [categories[number] for number in sorted(categories)]
    splits = Pictures(train, pixels), Pictures(test, pixels)
    return BoxSource(f"folder {folder}", *splits, names, notes + test_notes)


def find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """The JSON file of a split, and the folder of its pictures."""
    for top in (folder / "annotations", folder):
        for file in (*sorted(top.glob(f"instances_{split}*.json")), top / f"{split}.json"):
            for name in (file.stem.removeprefix("instances_"), split):
                if file.is_file() and (folder / name).is_dir():
                    return file, folder / name
    wanted = f"annotations/instances_{split}*.json or {split}.json, with or without annotations/, "
    wanted += f"and for a folder {split}/, or one of the file's year, as {split}2017/"
    raise UserError(f"{folder} lacks {split} pictures in COCO's form: looked for {wanted}")


def read_coco(
    file: Path, folder: Path, masks: bool, pixels: PixelFormat, train_categories: dict | None = None
) -> tuple[dict[int, str], list[Picture], list[str]]:
    """Names of categories by id, pictures in the order of the JSON file, and notes.

    With `masks` every object needs its segmentation. The categories of the training file number the
    labels of both files.
    """
    try:
        images, rows, categories = read_tables(file)
        names = category_names(categories, train_categories)
        labels = {number: i for i, number in enumerate(sorted(train_categories or names), start=1)}
        rows_of_image = {number: [] for number in images}
        for number, row in rows.items():
            for key, table in (("image_id", images), ("category_id", names)):
                value = row.get(key)
                known = isinstance(value, int | str) and value in table
                need(known, f"annotation {number} has {key} {value!r}, none of {len(table)} listed")
            rows_of_image[row["image_id"]].append(row)
        changes, pictures = Counter(), []
        for number, image in images.items():
            path, size = checked_file(image, folder, pixels)
            boxes, kept = clip_boxes(map(corners, rows_of_image[number]), *size, changes)
            objects = [row for row, keep in zip(rows_of_image[number], kept) if keep]
            row_labels = np.array([labels[row["category_id"]] for row in objects], dtype=np.int64)
            crowd = np.array([bool(row.get("iscrowd", 0)) for row in objects], dtype=bool)
            shapes = [mask_shape(row, size) for row in objects] if masks else None
            values = boxes[kept], row_labels, crowd, shapes
            pictures.append(Picture(path, *size, *values))
    except (UserError, image_io.ImageError) as error:
        raise UserError(f"{file}: {error}") from error
    need_objects(file, pictures)
    return names, pictures, notes_of(file, changes)


def need(condition, sentence: str) -> None:
    """Raise a UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def read_tables(file: Path) -> list[dict]:
    """Images, annotations and categories of a file, each a dict of JSON objects by their ids."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: of JSON and of UTF-8
        raise UserError(f"it is damaged, or no JSON ({error})") from error
    kind, names = type(content).__name__, ("images", "annotations", "categories")
    need(kind == "dict", f"it holds a {kind}; COCO's form is an object of {', '.join(names)}")
    tables = []
    for name in names:
        rows, table = content.get(name), {}
        need(isinstance(rows, list), f'it lacks a list "{name}"; COCO\'s form has one')
        need(rows or name == "annotations", f"it has no {name}")
        for i, row in enumerate(rows):
            number = row.get("id") if isinstance(row, dict) else None
            need(isinstance(number, int | str), f'row {i} of "{name}" is no object with an id')
            need(number not in table, f'"{name}" has id {number} twice')
            table[number] = row
        tables.append(table)
    return tables


def category_names(categories: dict, train_categories: dict[int, str] | None) -> dict[int, str]:
    """Names of categories by id, which must be those of the training file."""
    names = {number: row.get("name") for number, row in categories.items()}
    for number, name in names.items():
        valid = type(number) is int and isinstance(name, str)
        need(valid, f"category {number!r} needs an integer as id, and a name")
        trained = (train_categories or names).get(number)
        words = f"{name!r} here, and {trained!r} in the training file"
        need(name == trained, f"category {number} is {words}")
    return names


def checked_file(image: dict, folder: Path, pixels: PixelFormat) -> tuple[str, tuple[int, int]]:
    """Path, height and width of an image's file, which must have the size that its row gives."""
    name = image.get("file_name")
    need(isinstance(name, str) and name, f"image {image['id']} has no file_name")
    path = str(folder / name)
    need(os.path.isfile(path), f"it names {path}, which does not exist")
    height, width = size = upright_size(path, pixels)
    given = image.get("height", height), image.get("width", width)
    words = f"{given[1]!r} x {given[0]!r} pixels and is {width} x {height}"
    need(given == size, f"{path} should be {words}; its boxes would lie elsewhere")
    return path, size


def corners(row: dict) -> list[float]:
    """Left, top, right and bottom, from an annotation's `bbox` of left, top, width and height."""
    bbox = row.get("bbox")
    valid, given = isinstance(bbox, list) and len(bbox) == 4, str(bbox)[:80]
    valid = valid and all(map(is_number, bbox))
    need(valid, f"the bbox of annotation {row['id']} is {given}, not [left, top, width, height]")
    left, top, width, height = bbox
    return [left, top, left + width, top + height]


def mask_shape(row: dict, size: tuple[int, int]) -> list[np.ndarray] | np.ndarray:
    """The polygons, (N, 2) each, or the run lengths of an annotation's mask."""
    name, segmentation = f"annotation {row['id']}", row.get("segmentation")
    need(segmentation, f"{name} has no segmentation, which Mask R-CNN needs; Faster R-CNN does not")
    if isinstance(segmentation, list):
        valid = all(map(is_polygon, segmentation))
        need(valid, f"{name} has a polygon that is no list of three or more pairs of x and y")
        return [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    need(isinstance(counts, list), f"{name} has neither polygons nor a list of run lengths")
    given = segmentation.get("size")
    need(
        given == [*size], f"the mask of {name} has height and width {given}, its picture {[*size]}"
    )
    valid = all(type(run) is int and run >= 0 for run in counts) and sum(counts) == math.prod(size)
    need(valid, f"the run lengths of {name} do not fill its mask of {size[0]} x {size[1]} pixels")
    return np.array(counts, dtype=np.int64)


def is_number(value) -> bool:
    """Whether a value of JSON is a number, which `true` is not, and small enough for pixels."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_polygon(value) -> bool:
    pairs = isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0
    return pairs and all(map(is_number, value))


@user_errors()
def load(source: str, masks: bool = False, pixels: PixelFormat = RGB) -> BoxSource:
    """Open a source by name; a UserError where there is none, it lacks masks, or a file is wrong.

    `source` is "demo_scenes", or a folder in COCO's form, see `load_coco`. `masks` gives every
    object its mask.
    """
    if source == "demo_scenes":
        splits = demo.splits(demo.SCENE_TRAIN, demo.SCENE_TEST)
        train, test = (Scenes(indices, masks) for indices in splits)
        return BoxSource("the built-in demo scenes", train, test, demo.SCENE_CLASSES)
    if source and Path(source).is_dir():  # Path("") would be the current folder
        return load_coco(Path(source), masks, pixels)
    choices = "a folder in COCO's form or demo_scenes"
    raise UserError(f"no pictures with boxes at {source or 'an empty path'}: give {choices}")

"""Pictures with boxes: the demo scenes, or a folder in COCO's form."""

import json
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


@dataclass(eq=False)
class Pictures(Dataset):
    """Files, decoded on access, each with its objects.

    An item is the image, (C, H, W) uint8, and a dict of its boxes (n, 4) float32 of left, top,
    right and bottom in pixels, inside the image and not empty; labels (n,) int64 from 1; and crowd
    (n,) bool, true for the box of several objects, which is not trained on.
    """

    paths: list[str]
    sizes: list[tuple[int, int]]  # heights and widths of the upright pictures
    targets: list[dict[str, np.ndarray]]
    pixels: PixelFormat = RGB

    def __len__(self) -> int:
        return len(self.paths)

    @user_errors()
    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = image_io.read_image(self.paths[index], pixel_format=self.pixels)
        return image, {name: torch.from_numpy(v) for name, v in self.targets[index].items()}


class Scenes(Dataset):
    """Demo scenes in memory, with items like those of `Pictures`."""

    in_memory = True

    def __init__(self, indices: Sequence[int]):
        self.images, self.targets = demo.demo_scenes(indices)
        self.sizes = [tuple(self.images.shape[2:])] * len(self.images)
        for target in self.targets:
            del target["masks"]
            target["crowd"] = torch.zeros(len(target["labels"]), dtype=torch.bool)

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

    `changes` counts boxes that are cut by more than a pixel, and boxes without an area, in words.
    """
    # Clipped in float64: a number too large for float32 would become infinite.
    boxes = np.array([*boxes], dtype=np.float64).reshape(-1, 4)
    clipped = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    cut = kept & (abs(clipped - boxes) > 1).any(axis=1)
    changes["boxes reach beyond their pictures and are cut"] += int(cut.sum())
    changes["have no area inside theirs and are left out"] += int((~kept).sum())
    return clipped, kept


# -- COCO's form -----------------------------------------------------------------------------------


def load_coco(folder: Path, pixels: PixelFormat = RGB) -> BoxSource:
    """Pictures in train/ and val/ of a folder, with their objects in JSON files of COCO's form.

    COCO's names, train2017/ and val2017/, are known too. The files, in annotations/ or in the
    folder itself, are instances_train*.json and instances_val*.json, or train.json and val.json.
    Categories become labels 1, 2, ... in the order of their ids. A UserError names the wrong file.
    """
    train_place, test_place = (find_split(folder, split) for split in ("train", "val"))
    categories, train, notes = read_coco(*train_place, pixels)
    _, test, test_notes = read_coco(*test_place, pixels, categories)
    names = [categories[number] for number in sorted(categories)]
    return BoxSource(f"folder {folder}", train, test, names, notes + test_notes)


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
    file: Path, folder: Path, pixels: PixelFormat, train_categories: dict | None = None
) -> tuple[dict[int, str], Pictures, list[str]]:
    """Names of categories by id, pictures in the order of the JSON file, and notes.

    The categories of the training file number the labels of both files.
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
            objects = rows_of_image[number]
            boxes, kept = clip_boxes(map(corners, objects), *size, changes)
            row_labels = np.array([labels[row["category_id"]] for row in objects], dtype=np.int64)
            crowd = np.array([bool(row.get("iscrowd", 0)) for row in objects], dtype=bool)
            target = dict(boxes=boxes[kept], labels=row_labels[kept], crowd=crowd[kept])
            pictures.append((path, size, target))
    except (UserError, image_io.ImageError) as error:
        raise UserError(f"{file}: {error}") from error
    counted = any((~target["crowd"]).any() for _, _, target in pictures)
    need(counted, f"{file} has no box of an object that counts, and a detector needs some")
    notes = [f"{count} {words}" for words, count in changes.items() if count]
    notes = [f"{file}: {', '.join(notes)}"] if notes else []
    return names, Pictures(*map(list, zip(*pictures)), pixels), notes


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


def is_number(value) -> bool:
    """Whether a value of JSON is a number, which `true` is not, and small enough for pixels."""
    return type(value) in (int, float) and abs(value) < 1e300


@user_errors()
def load(source: str, pixels: PixelFormat = RGB) -> BoxSource:
    """Open "demo_scenes", or a folder in COCO's form, see `load_coco`.

    A UserError where there is none, or a file is wrong.
    """
    if source == "demo_scenes":
        train, test = map(Scenes, demo.splits(demo.SCENE_TRAIN, demo.SCENE_TEST))
        return BoxSource("the built-in demo scenes", train, test, demo.SCENE_CLASSES)
    if source and Path(source).is_dir():  # Path("") would be the current folder
        return load_coco(Path(source), pixels)
    choices = "a folder in COCO's form or demo_scenes"
    raise UserError(f"no pictures with boxes at {source or 'an empty path'}: give {choices}")

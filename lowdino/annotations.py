"""Pictures with boxes and masks: the demo scenes, a folder in COCO's form, or PASCAL VOC 2007."""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets

from lowdino import demo
from lowdino.distributed import UserError, user_errors
from lowdino.image_io import (
    RGB,
    PixelFormat,
    is_array,
    load_array,
    open_picture,
    read_image,
    turn_of,
)

# --------------------------------------------------------------------------------------------------
# Masks: polygons, and COCO's run lengths, which go down the columns and begin with zeros
# --------------------------------------------------------------------------------------------------


def polygon_mask(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie inside a polygon: (N, 2) of x and y -> (H, W) bool.

    The centre of the first pixel is (0.5, 0.5). What edges enclose twice is outside.
    """
    (x0, y0), (x1, y1) = polygon.T[:, :, None], np.roll(polygon, -1, axis=0).T[:, :, None]
    # All is computed within the polygon's bounding box, for objects are small in their pictures.
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


def run_lengths(text: str) -> list[int]:
    """The numbers in COCO's compressed form.

    A character holds five bits of a number, lowest first, plus 48; its sixth bit says that more
    follow. The last one's fifth bit is the sign. From the fourth number on, what stands there is
    the difference to the last but one.
    """
    counts, value, shift = [], 0, 0
    for code in text.encode():
        code -= 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    return counts


def run_length_mask(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Runs of zeros and ones by turns, together height * width: (H, W) bool."""
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


# --------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """A picture's file and what is in it.

    Attributes:
        path: of the file, which is `height` x `width` pixels when it is upright.
        boxes: (n, 4) float32, left, top, right and bottom in pixels, inside the picture, not empty.
        labels: (n,) int64 from 1.
        crowd: (n,) bool, what stands for several objects.
        difficult: (n,) bool, what is too hard to be counted. Neither is trained on.
        shapes: of each object its polygons, or its run lengths; None without masks.
    """

    path: str
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    shapes: list[list[np.ndarray] | np.ndarray] | None = None

    @property
    def layers(self) -> int:
        """Masks that it has."""
        return 0 if self.shapes is None else len(self.shapes)

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


# What an item says of each box, beside its mask.
OF_BOXES = ("boxes", "labels", "crowd", "difficult")


class Pictures(Dataset):
    """Files, decoded on access, each with what is in it.

    An item is the image, (C, H, W) uint8, and a dict of boxes (n, 4) float32, labels (n,) int64,
    crowd and difficult (n,) bool and, where there are masks, masks (n, H, W) uint8; see `Picture`.
    """

    def __init__(self, pictures: list[Picture], pixels: PixelFormat = RGB):
        self.pictures, self.pixels = pictures, pixels
        self.sizes = [(picture.height, picture.width) for picture in pictures]

    @property
    def item_bytes(self) -> int:
        """The most that a picture and its masks have; see `data.lacks_shared_memory`."""
        return max((self.pixels.channels + p.layers) * p.height * p.width for p in self.pictures)

    def __len__(self) -> int:
        return len(self.pictures)

    @user_errors()
    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        picture = self.pictures[index]
        values = {name: getattr(picture, name) for name in OF_BOXES}
        if picture.shapes is not None:
            values["masks"] = picture.masks()
        target = {name: torch.from_numpy(value) for name, value in values.items()}
        return read_image(picture.path, pixel_format=self.pixels), target


class Scenes(Dataset):
    """Demo scenes in memory, with items as `Pictures` has them."""

    in_memory = True

    def __init__(self, indices: Sequence[int], masks: bool):
        self.images, self.targets = demo.demo_scenes(indices)
        self.sizes = [tuple(self.images.shape[2:])] * len(self.images)
        for target in self.targets:
            for name in ("crowd", "difficult"):
                target[name] = torch.zeros(len(target["labels"]), dtype=torch.bool)
            if not masks:
                del target["masks"]

    def __len__(self) -> int:
        return len(self.images)

    @user_errors()
    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], self.targets[index]


@dataclass
class Source:
    """Training and test pictures with boxes.

    Attributes:
        name: in words, for the log.
        names: of the classes; label 1 is the first.
        notes: what was assumed, cut or left out, a sentence each.
    """

    name: str
    train: Pictures | Scenes
    test: Pictures | Scenes
    names: Sequence[str]
    notes: list[str] = field(default_factory=list)


@user_errors()
def load(
    source: str,
    root: str = "data",
    download: bool = False,
    masks: bool = False,
    pixels: PixelFormat = RGB,
    rank: int = 0,
) -> Source:
    """Open a source by name.

    Args:
        source: "demo_scenes"; "voc2007", stored under `root`; or a folder in COCO's form, see
            `load_coco`.
        download: fetch VOC where `root` lacks it. `rank` 0 does, and the others wait for it.
        masks: give every object its mask.
        pixels: see `read_image`.

    Raises:
        UserError: in one sentence, where there is nothing to read, something of it is wrong, or
            masks are wanted and there are none.
    """
    if source == "demo_scenes":
        splits = demo.splits(demo.SCENE_TRAIN, demo.SCENE_TEST)
        parts = (Scenes(indices, masks) for indices in splits)
        return Source("the built-in demo scenes", *parts, demo.SCENE_CLASSES)
    if source == "voc2007":
        if masks:
            raise UserError("voc2007 is read for its boxes alone; masks need demo_scenes or COCO's")
        return load_voc(root, download, pixels, rank)
    if source and Path(source).is_dir():  # Path("") would be the current folder
        return load_coco(Path(source), masks, pixels)
    raise UserError(
        f"no pictures with boxes at {source or 'an empty path'}: give a folder in COCO's form, "
        "demo_scenes or voc2007"
    )


def upright_size(path: str, pixels: PixelFormat) -> tuple[int, int]:
    """Height and width of a picture as `read_image` gives it, from the file's header.

    Raises:
        UserError: naming the file.
    """
    lying = (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
    )
    try:
        if is_array(path):
            height, width = load_array(path, pixels.channels).shape[:2]
            pixels.check_size(width, height)
            return height, width
        with open_picture(path) as image:
            pixels.check_size(*image.size)
            width, height = image.size
            if image.format == "TIFF":  # whose size newer versions of Pillow give upright already
                width, height = image.tag_v2[256], image.tag_v2[257]
            return (width, height) if turn_of(image) in lying else (height, width)
    except Exception as error:  # on a damaged file Pillow raises any kind of exception
        raise UserError(f"cannot read image {path}: {error}") from error


def in_picture(boxes: list[list[float]], height: int, width: int, lost: Counter):
    """Boxes cut to their picture, and which of them have anything left: (n, 4) float32, (n,) bool.

    Args:
        lost: counts what is cut by more than a pixel, and what has nothing left.
    """
    # Clipped in float64: a number too large for float32 would become infinite.
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    cut = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    whole = (cut[:, 2:] > cut[:, :2]).all(axis=1)
    lost["cut"] += int((whole & (abs(cut - boxes) > 1).any(axis=1)).sum())
    lost["left out"] += int((~whole).sum())
    return cut, whole


def of_lost(file: str | Path, lost: Counter) -> list[str]:
    """A note on the boxes that `in_picture` counted."""
    said = [
        f"{lost['cut']} boxes reach beyond their pictures and are cut",
        f"{lost['left out']} have no area inside theirs and are left out",
    ]
    said = [part for part, name in zip(said, ("cut", "left out")) if lost[name]]
    return [f"{file}: {', '.join(said)}"] * bool(said)


def need_objects(name: str | Path, pictures: list[Picture]) -> None:
    """Refuse pictures that have nothing to learn from, or to test by."""
    if all((picture.crowd | picture.difficult).all() for picture in pictures):
        raise UserError(f"{name} has no box of an object that counts, and a detector needs some")


# --------------------------------------------------------------------------------------------------
# COCO's form
# --------------------------------------------------------------------------------------------------


def load_coco(folder: Path, masks: bool = False, pixels: PixelFormat = RGB) -> Source:
    """Pictures in train/ and val/ of a folder, and what is in them by JSON files in COCO's form.

    COCO's own names, train2017/ and val2017/, are known too. The files are annotations/ or the
    folder itself's instances_train*.json and instances_val*.json, or train.json and val.json.
    Categories become labels 1, 2, ... in the order of their ids.

    Raises:
        UserError: naming the file, see `load`.
    """
    (train_file, train), (test_file, test) = (find_split(folder, name) for name in ("train", "val"))
    categories, *read = Coco(train_file, train, masks, pixels).read()
    _, *tested = Coco(test_file, test, masks, pixels).read(categories)
    need_objects(train_file, read[0])
    need_objects(test_file, tested[0])
    parts = (Pictures(pictures, pixels) for pictures, _ in (read, tested))
    names = [categories[number] for number in sorted(categories)]
    return Source(f"folder {folder}", *parts, names, read[1] + tested[1])


def find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """The JSON file of a split, and the folder of its pictures."""
    for top in (folder / "annotations", folder):
        for file in (*sorted(top.glob(f"instances_{split}*.json")), top / f"{split}.json"):
            pictures = (folder / name for name in (file.stem.removeprefix("instances_"), split))
            found = next((path for path in pictures if path.is_dir()), None)
            if found and file.is_file():
                return file, found
    raise UserError(
        f"{folder} lacks {split} pictures in COCO's form: looked for annotations/instances_"
        f"{split}*.json, annotations/{split}.json and the same without annotations/, and for "
        f"folders {split}/ or that of the file's year, as {split}2017/"
    )


class Coco:
    """One JSON file in COCO's form, of which any fault is reported in one sentence.

    Args:
        file: the JSON file. folder: of the pictures. masks: every object needs its segmentation.
    """

    def __init__(self, file: Path, folder: Path, masks: bool, pixels: PixelFormat):
        self.file, self.folder, self.masks, self.pixels = file, folder, masks, pixels

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.file}: {what}")

    def read(self, known: dict[int, str] | None = None):
        """Categories by id, pictures in the file's order, and notes.

        Args:
            known: the training file's categories, by which labels are counted; None when reading
                the training file.
        """
        content = self.content()
        rows = {name: self.rows(content, name) for name in ("images", "annotations", "categories")}
        categories = {}
        for number, row in rows["categories"].items():
            if type(number) is not int or not isinstance(row.get("name"), str):
                raise self.wrong(f"category {number!r} needs a whole number as id, and a name")
            categories[number] = row["name"]
            there = None if known is None else known.get(number)
            if known is not None and row["name"] != there:
                raise self.wrong(
                    f"category {number} is {row['name']!r} here, and {there!r} in the training file"
                )
        if not rows["images"] or not categories:
            raise self.wrong("it has no images" if categories else "it has no categories")
        of_image = {number: [] for number in rows["images"]}
        for number, row in rows["annotations"].items():
            if not is_id(row.get("image_id"), of_image):
                raise self.wrong(
                    f"annotation {number} is of image {row.get('image_id')!r}, which is not listed"
                )
            if not is_id(row.get("category_id"), categories):
                raise self.wrong(
                    f"annotation {number} has category {row.get('category_id')!r}, which is not "
                    f"listed; there are {len(categories)}, ids {min(categories)} to "
                    f"{max(categories)}"
                )
            of_image[row["image_id"]].append(number)
        labels = {number: i for i, number in enumerate(sorted(known or categories), start=1)}
        lost, pictures = Counter(), []
        for number, row in rows["images"].items():
            own = {i: rows["annotations"][i] for i in of_image[number]}
            pictures.append(self.picture(number, row, own, labels, lost))
        return categories, pictures, of_lost(self.file, lost)

    def content(self) -> dict:
        """The file's JSON, an object."""
        try:
            content = json.loads(self.file.read_bytes())
        except (ValueError, RecursionError) as error:  # ValueError: of JSON and of UTF-8
            raise self.wrong(f"it is damaged, or no JSON ({error})") from error
        if not isinstance(content, dict):
            raise self.wrong(
                f"it holds a {type(content).__name__}; COCO's form is an object of images, "
                "annotations and categories"
            )
        return content

    def rows(self, content: dict, name: str) -> dict:
        """A list of objects by their ids."""
        rows = content.get(name)
        if not isinstance(rows, list):
            raise self.wrong(f'it lacks a list "{name}"; COCO\'s form has one')
        found = {}
        for i, row in enumerate(rows):
            number = row.get("id") if isinstance(row, dict) else None
            if not isinstance(number, int | str):
                raise self.wrong(f'row {i} of "{name}" is no object with an id')
            if number in found:
                raise self.wrong(f'"{name}" has id {number} twice')
            found[number] = row
        return found

    def picture(self, number, row: dict, own: dict, labels: dict, lost: Counter) -> Picture:
        """A picture and its annotations by their ids."""
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise self.wrong(f"image {number} has no file_name")
        path = str(self.folder / name)
        if not os.path.isfile(path):
            raise self.wrong(f"it names {path}, which does not exist")
        size = height, width = upright_size(path, self.pixels)
        said = tuple(row.get(key, side) for key, side in zip(("height", "width"), size))
        if said != size:
            raise self.wrong(
                f"{path} should be {said[1]!r} x {said[0]!r} pixels and is {width} x {height}; its "
                "boxes would lie elsewhere"
            )
        boxes = [self.box(i, annotation.get("bbox")) for i, annotation in own.items()]
        boxes, whole = in_picture(boxes, height, width, lost)
        kept = [pair for pair, keep in zip(own.items(), whole) if keep]
        shapes = [self.shape(i, annotation, size) for i, annotation in kept] if self.masks else None
        known = np.array([labels[a["category_id"]] for _, a in kept], dtype=np.int64)
        crowd = np.array([bool(a.get("iscrowd", 0)) for _, a in kept], dtype=bool)
        easy = np.zeros(len(crowd), dtype=bool)
        return Picture(path, height, width, boxes[whole], known, crowd, easy, shapes)

    def box(self, number, bbox) -> list[float]:
        """Left, top, right and bottom of a `bbox` of left, top, width and height."""
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox))):
            raise self.wrong(
                f"the bbox of annotation {number} is {str(bbox)[:80]}, where [left, top, width, "
                "height] was expected"
            )
        left, top, width, height = bbox
        return [left, top, left + width, top + height]

    def shape(self, number, annotation: dict, size: tuple[int, int]):
        """The polygons or run lengths of an annotation's mask."""
        shape = annotation.get("segmentation")
        if not shape:
            raise self.wrong(
                f"annotation {number} has no segmentation, which Mask R-CNN needs of all; Faster "
                "R-CNN does without"
            )
        if isinstance(shape, list):
            if not all(is_polygon(polygon) for polygon in shape):
                raise self.wrong(
                    f"the segmentation of annotation {number} has a polygon that is no list of "
                    "three pairs or more of x and y"
                )
            return [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in shape]
        if not isinstance(shape, dict) or not isinstance(shape.get("counts"), list | str):
            raise self.wrong(
                f"the segmentation of annotation {number} is neither polygons nor run lengths"
            )
        if shape.get("size") != [*size]:
            raise self.wrong(
                f"the mask of annotation {number} is of size {shape.get('size')} (height, width), "
                f"and its picture of {[*size]}"
            )
        counts = shape["counts"]
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        right = all(type(count) is int and count >= 0 for count in counts)
        if not right or sum(counts) != math.prod(size):
            raise self.wrong(
                f"the run lengths of annotation {number} do not fill its mask of {size[0]} x "
                f"{size[1]} pixels"
            )
        return np.array(counts, dtype=np.int64)


def is_id(value, known: dict) -> bool:
    return isinstance(value, int | str) and value in known


def is_number(value) -> bool:
    """Whether a value of JSON is a number, which `true` is not, and one that pixels may have."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_polygon(value) -> bool:
    long = isinstance(value, list) and len(value) >= 6 and len(value) % 2 == 0
    return long and all(map(is_number, value))


# --------------------------------------------------------------------------------------------------
# PASCAL VOC 2007
# --------------------------------------------------------------------------------------------------

# Label 1 is the first; in the order of the classes' names.
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()


def load_voc(root: str, download: bool, pixels: PixelFormat, rank: int) -> Source:
    """VOC 2007 through torchvision: trainval to train on, test to test on.

    Objects marked as difficult are neither trained on nor counted.
    """
    if download and rank == 0:
        for split in ("trainval", "test"):
            open_voc(root, split, download)
    if download and dist.is_initialized():
        dist.barrier()
    lost, parts = Counter(), []
    for split in ("trainval", "test"):
        found = open_voc(root, split)
        parts.append([read_voc(*files, pixels, lost) for files in zip(found.images, found.targets)])
        need_objects(f"voc2007, {split}, under {root}", parts[-1])
    hard = sum(int(picture.difficult.sum()) for part in parts for picture in part)
    notes = [f"{hard} objects marked as difficult are not counted"] * bool(hard)
    train, test = (Pictures(part, pixels) for part in parts)
    return Source("PASCAL VOC 2007", train, test, VOC_CLASSES, notes + of_lost("VOC 2007", lost))


def open_voc(root: str, split: str, download: bool = False) -> torchvision_datasets.VOCDetection:
    """torchvision's data set, fetched only where it is missing."""
    try:
        return torchvision_datasets.VOCDetection(root, "2007", split)
    except (RuntimeError, OSError) as absent:
        hint = "not found; add --download, or name its folder by --data_root"
        error = absent
        if download:
            try:
                return torchvision_datasets.VOCDetection(root, "2007", split, download=True)
            except (RuntimeError, OSError) as failed:
                hint, error = "the download failed", failed
    raise UserError(f"voc2007, {split}, under {root}: {hint}") from error


def read_voc(path: str, file: str, pixels: PixelFormat, lost: Counter) -> Picture:
    """A picture and its XML file.

    Pixels are counted from 1 there and boxes include their last one, so left and top are less by
    one here.
    """
    height, width = upright_size(path, pixels)
    try:
        objects = ElementTree.parse(file).getroot().findall("object")
        labels = [1 + VOC_CLASSES.index(item.findtext("name", "")) for item in objects]
        difficult = [int(item.findtext("difficult", "0")) != 0 for item in objects]
        corners = [
            [
                float(item.findtext(f"bndbox/{name}", ""))
                for name in ("xmin", "ymin", "xmax", "ymax")
            ]
            for item in objects
        ]
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise UserError(f"{file} is missing, damaged, or not VOC's ({error})") from error
    if not np.isfinite(corners).all():
        raise UserError(f"{file} has a box that is no numbers")
    boxes = np.array(corners, dtype=np.float64).reshape(-1, 4) - [1, 1, 0, 0]
    boxes, whole = in_picture(boxes, height, width, lost)
    labels, difficult = np.array(labels, dtype=np.int64), np.array(difficult, dtype=bool)
    crowd = np.zeros(whole.sum(), dtype=bool)
    return Picture(path, height, width, boxes[whole], labels[whole], crowd, difficult[whole])

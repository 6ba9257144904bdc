"""Where images and labels come from: a folder, a text file of paths, or a data set of `NAMED`.

A folder is read with all its sub-folders, but for hidden files and what an earlier run wrote. Where
it holds train/ and val/ (see `TRAIN`, `TEST`) with class sub-folders, a run trains on the first and
reports k-NN accuracy on the other. Labels, which are never trained on, may also come from a table,
and a part of each class may be held out; then the scripts that evaluate need the same flags.
"""

import csv
import functools
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import datasets as torchvision_datasets

from lowdino import demo, distributed, image_io
from lowdino.data import ImageArray, ImageFiles
from lowdino.distributed import UserError, user_errors
from lowdino.schedules import Stream

# Names of the splits, in any case. Of several test folders the first in this order is taken.
TRAIN = ("train", "training")
TEST = ("val", "valid", "validation", "test", "testing")

Labels = list[str | None]  # the class of each image; None where a table leaves it out


@dataclass
class Source:
    """The images of a data set."""

    name: str  # in words, for the log
    pretrain: ImageArray | ImageFiles  # all images to learn from; labels are not used
    train: ImageArray | ImageFiles | None = None  # labelled images, the memory of k-NN
    test: ImageArray | ImageFiles | None = None  # the queries of k-NN
    classes: int = 0  # number of labels
    notes: list[str] = field(default_factory=list)  # what was assumed, skipped or left out
    no_labels: str = ""  # why there are no labels to test on
    names: list[str] | None = None  # of the classes, by label

    def files(self) -> list[ImageFiles]:
        return [x for x in (self.pretrain, self.train, self.test) if isinstance(x, ImageFiles)]

    def limit_side(self, max_side: int) -> None:
        """Reduce large files on reading; see `read_image`."""
        for images in self.files():
            images.max_side = max_side

    def set_pixel_format(self, **changes) -> None:
        """Change fields of the files' PixelFormat; a UserError for other channels in memory."""
        images, needed = self.pretrain, changes.get("channels", 3)
        if isinstance(images, ImageArray) and (channels := images.images.shape[1]) != needed:
            raise UserError(f"{self.name}: {channels} channels, where {needed} are needed")
        for images in self.files():
            images.pixel_format = images.pixel_format._replace(**changes)


# -- Named data sets, functions of --data_root and --download --------------------------------------


def demo_images(root: str, download: bool) -> Source:
    side = demo.SIDE // 2  # shows the glyphs as well, at a quarter of the cost
    indices = demo.splits(demo.TRAIN, demo.TEST)
    train, test = (ImageArray(*demo.demo_images(split), side) for split in indices)
    return Source("the built-in demo images", train, train, test, classes=10)


def demo_scenes(root: str, download: bool) -> Source:
    scenes, _ = demo.demo_scenes(range(demo.SCENE_TRAIN))
    # A third of the side is enough for a ResNet5M, but not for a MobileViT; see RESULTS.md.
    images = ImageArray(scenes, view_side=64)
    why = "each has several classes; use demo, or eval_linear.py --task segmentation"
    return Source("the built-in demo scenes", images, notes=[f"no k-NN: {why}"], no_labels=why)


def torchvision_set(kind: str, name: str, root: str, download: bool) -> Source:
    """A data set of torchvision, in memory; `kind` is its class there."""
    stl, splits = kind == "STL10", [dict(train=True), dict(train=False)]
    if stl:
        splits = [dict(split=split) for split in ("train", "test", "unlabeled")]
    load_split = functools.partial(getattr(torchvision_datasets, kind), root, download=download)
    try:
        sets = [load_split(**split) for split in splits]
    except (RuntimeError, OSError) as error:  # absent, corrupted, or no network
        hint = "the download failed" if download else "not found; add --download or --data_root"
        raise UserError(f"{kind.lower()} under {root}: {hint}") from error
    arrays = []
    for loaded in sets:
        images = loaded.data if stl else loaded.data.transpose(0, 3, 1, 2)  # CIFAR: channels last
        labels = torch.as_tensor(loaded.labels if stl else loaded.targets, dtype=torch.int64)
        arrays.append(ImageArray(torch.from_numpy(images).contiguous(), labels))
    train, test, pretrain = *arrays[:2], arrays[2 if stl else 0]
    classes, names = int(train.labels.max()) + 1, getattr(sets[0], "classes", None)
    return Source(name, pretrain, train, test, classes, names=names)


NAMED = {
    "demo": demo_images,
    "demo_scenes": demo_scenes,
    "cifar10": functools.partial(torchvision_set, "CIFAR10", "CIFAR-10"),
    "cifar100": functools.partial(torchvision_set, "CIFAR100", "CIFAR-100"),
    "stl10": functools.partial(torchvision_set, "STL10", "STL-10, its unlabelled images"),
}


# -- Image files and their splits ------------------------------------------------------------------


class NoLabels(UserError):
    """Why there are no labels to test on; it names the file or folder that is the reason."""


class Row(NamedTuple):
    """A row of a table of labels."""

    line: int
    path: str  # as written
    label: str
    split: str | None = None


def path_key(path: str) -> str:
    """A path to compare by: Macs write accents as separate characters, tables do not."""
    return unicodedata.normalize("NFC", os.path.abspath(path))


def shortened(names: list[str], most: int = 5) -> str:
    """The first of the names, and the number of the others."""
    return ", ".join(names[:most] + [f"{len(names) - most} others"] * (len(names) > most))


@dataclass
class Splits:
    """The image files of a folder or list, and what is known of their splits and labels."""

    name: str  # where the training images are from, in words
    folder: Path  # the folder itself, or that of the list
    train: list[str]  # paths
    top: Path | None = None  # the folder whose sub-folders may be classes
    test_name: str = ""
    test: list[str] = field(default_factory=list)
    test_top: Path | None = None
    no_test: str = ""  # why there are no test images
    unused: list[str] = field(default_factory=list)  # folders and files of neither split
    notes: list[str] = field(default_factory=list)
    table: dict[str, Row] = field(default_factory=dict)  # by the `path_key` of their image

    def labels_of(self, paths: list[str], top: Path | None) -> Labels:
        """The table's labels, where it names some of the images; else the sub-folders of `top`."""
        rows = [self.table.get(path_key(path)) for path in paths] if self.table else []
        if any(rows):
            return [row and row.label for row in rows]
        if top is None:
            raise NoLabels(f"{self.name} have no labels but those of a table, --labels")
        parts = [Path(path).relative_to(top).parts for path in paths]
        loose = [path for path, names in zip(paths, parts) if len(names) == 1]
        if len(loose) == len(paths):
            raise NoLabels(f"the images of {top} are in no class sub-folders")
        if loose:
            raise NoLabels(f"{loose[0]} is beside the class sub-folders of {top}, not in one")
        return [names[0] for names in parts]

    def classes_of(self, labels: Labels) -> set[str]:
        """The classes of the training images; NoLabels where there is only one."""
        classes = set(filter(None, labels))
        if len(classes) == 1:
            one = f"one class, {classes.pop()!r}"
            raise NoLabels(f"all images of {self.top or self.name} are of {one}")
        return classes

    def all_notes(self) -> list[str]:
        return self.notes + [f"not used: {shortened(self.unused)}"] * bool(self.unused)


def read_list(file: Path) -> Splits:
    """The images named in a text file, one per line, relative to the file's folder."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file of paths, nor a folder of images") from error
    paths = [str(file.parent / line) for line in lines if line]
    if not paths:
        raise UserError(f"{file} has no lines; it should name one image per line")
    if missing := next((path for path in paths if not os.path.isfile(path)), None):
        raise UserError(f"{file} names {missing}, which does not exist")
    distinct = list({path_key(path): path for path in reversed(paths)}.values())[::-1]
    repeated = len(paths) - len(distinct)
    splits = Splits(f"{len(distinct)} images named in {file}", file.parent, distinct)
    splits.no_test = f"{file} is a list of paths; that needs --labels and --test_fraction beside it"
    splits.notes = [f"{repeated} lines name an image again"] * bool(repeated)
    return splits


def read_splits(folder: Path, by_table: bool) -> Splits:
    """All images below a folder, or below its train/ and val/ unless a table has the splits."""
    inside, left_out = image_io.sub_folders(folder), Counter()
    tops, test_tops = (
        [path for name in names for path in inside if path.name.lower() == name]
        for names in (TRAIN, TEST)
    )
    # Without a val/, a train/ of images is a class where a folder beside it has images too.
    is_class = tops and not test_tops and image_io.read_folder(tops[0])[0]
    is_class = is_class and any(image_io.has_images(path) for path in inside if path != tops[0])
    top = tops[0] if tops and not is_class and not by_table else folder
    splits = Splits(f"folder {top}", folder, image_io.find_images(top, left_out), top)
    if top == folder:
        needed = f"train/ and val/ (or test/) in {folder}, each with class sub-folders"
        splits.no_test = f"that needs {needed}, or --test_fraction, or --labels"
        splits.notes = [] if by_table else notes_on_names(splits, tops, test_tops)
    else:
        empty = [f"{path} has no image" for path in test_tops]
        splits.no_test = empty[0] if empty else f"no val/ or test/ is beside {top}"
        tests = ((path, sorted(image_io.walk(path, left_out))) for path in test_tops)
        splits.test_top, splits.test = next((pair for pair in tests if pair[1]), (None, []))
        splits.test_name = str(splits.test_top)
        unused = [path for path in inside if path not in (top, splits.test_top)]
        named = (*tops, *test_tops)
        splits.unused = [str(p) for p in unused if p in named or image_io.has_images(p)]
        splits.unused += image_io.read_folder(folder)[0]
    if left_out:
        splits.notes.append(f"left out: {image_io.describe_counts(left_out)}")
    return splits


def notes_on_names(splits: Splits, tops: list[Path], test_tops: list[Path]) -> list[str]:
    """A note on a folder that has the name of a split and is read like any other."""
    if tops:
        return [f"{tops[0]} is read as a class like its neighbours: no val/ is beside it"]
    folder, parents = splits.folder, sorted({*map(os.path.dirname, splits.train)})
    below = [Path(parent).relative_to(folder).parts for parent in parents]
    inner = (folder.joinpath(*parts[:2]) for parts in below if len(parts) > 1)
    named = test_tops or [path for path in inner if path.name.lower() in (*TRAIN, *TEST)]
    return [f"{path} is read like any other folder: {folder} has no train/" for path in named[:1]]


# -- Labels, and splits by a table -----------------------------------------------------------------


def read_table(file: Path) -> list[Row]:
    """The rows of a table with the columns path and label, perhaps split, and any others.

    The first line names them; commas, semicolons or tabs separate them. Labels are any strings, a
    split is one of `TRAIN` or `TEST`. A UserError says what is wrong with the table.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not a text file in UTF-8")
        raise UserError(f"--labels {file} cannot be read: {reason}") from error
    if not text.strip():
        raise UserError(f"--labels {file} is empty: give a table with the columns path and label")
    try:
        for delimiter in ",;\t":
            reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
            header = [name.strip().lower() for name in next(reader)]
            if {"path", "label"} <= set(header):
                break
        else:
            first = text.splitlines()[0][:80]
            raise UserError(f"--labels {file} lacks the column path or label; line 1 is {first!r}")
        rows = [row_of(header, cells, reader.line_num, file) for cells in reader if any(cells)]
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of --labels {file}: {error}") from error
    if not rows:
        raise UserError(f"--labels {file} has no rows below the names of its columns")
    return rows


def row_of(header: list[str], cells: list[str], line: int, file: Path) -> Row:
    values, where = dict(zip(header, cells)), f"line {line} of --labels {file}"
    path, label = (values.get(name, "").strip() for name in ("path", "label"))
    if not path or not label:
        raise UserError(f"{where} lacks a path or a label")
    if len(cells) > len(header):
        raise UserError(f"{where} has more cells than line 1; put quotes around values with commas")
    if "split" not in header:
        return Row(line, path, label)
    split, known = values.get("split", ""), (*TRAIN, *TEST)
    if split.strip().lower() not in known:
        raise UserError(f"{where} has the split {split!r}, which is none of {', '.join(known)}")
    return Row(line, path, label, split.strip().lower())


def apply_table(splits: Splits, rows: list[Row], file: Path) -> None:
    """Look up the images of a table's rows, and take its splits where it has them.

    A row's path is relative to the folder of the table or to that of the images. A UserError names
    a missing file, rows in contradiction, and a table that leaves no image to train on.
    """
    paths = splits.train + splits.test
    known, not_read = {path_key(path) for path in paths}, 0
    for row in rows:
        where = f"line {row.line} of --labels {file}"
        places = [path_key(os.path.join(top, row.path)) for top in (file.parent, splits.folder)]
        path = next((place for place in places if place in known), None)
        if path is None:
            if not any(map(os.path.exists, places)):
                tops = f"neither in {file.parent} nor in {splits.folder}"
                raise UserError(f"{where} names {row.path}, which is {tops}")
            not_read += 1
            continue
        first = splits.table.setdefault(path, row)
        if (first.label, first.split) != (row.label, row.split):
            raise UserError(f"{where} contradicts line {first.line}, which names {row.path} too")
    if not splits.table:
        raise UserError(f"--labels {file} names no image that is read from {splits.folder}")
    if not_read:
        splits.notes.append(f"{not_read} rows of {file} name files that are not read")
    if not any(row.split for row in splits.table.values()):
        if not splits.test:
            needed = f"a column split, or --test_fraction, or train/ and val/ in {splits.folder}"
            splits.no_test = f"{file} labels training images alone; that needs {needed}"
        return
    # Test on the first split of `TEST` that the table has; train on images without a split too.
    split_of = {path: row.split for path, row in splits.table.items()}
    named = [(path, split_of.get(path_key(path))) for path in paths]
    test = next((name for name in TEST if name in split_of.values()), None)
    splits.train = [path for path, split in named if split in (None, *TRAIN)]
    splits.test = [path for path, split in named if split and split == test]
    splits.test_name, splits.no_test = f"split {test} of {file}", f"{file} has no split val or test"
    if not splits.train:
        raise UserError(f"--labels {file} leaves no image to train on: all are of other splits")
    if others := len(paths) - len(splits.train) - len(splits.test):
        splits.unused.append(f"{others} images of other splits of {file}")


def labels_of_splits(splits: Splits) -> tuple[Labels, Labels]:
    """The labels of the training and of the test images; NoLabels where they cannot be tested."""
    if not splits.test:
        raise NoLabels(splits.no_test)
    train = splits.labels_of(splits.train, splits.top)
    test = splits.labels_of(splits.test, splits.test_top)
    known = splits.classes_of(train)
    for name in sorted(set(filter(None, test)) - known):
        if splits.top and (folder := splits.top / name).is_dir():
            raise NoLabels(f"class folder {folder} has no image, but {splits.test_name} has one")
        near = (f" (it has {other!r})" for other in known if other.lower() == name.lower())
        lacking = f"{splits.top or splits.name} lacks{next(near, '')}"
        raise NoLabels(f"{splits.test_name} has class {name!r}, which {lacking}")
    return train, test


def held_out_indices(paths: Sequence[str], labels: Labels, fraction: float, seed: int) -> list[int]:
    """Indices of a `fraction` of each class, one at least, not all; by seed and sorted names."""
    groups: dict[str, list[int]] = {}
    for i in sorted(range(len(paths)), key=lambda i: paths[i]):
        if labels[i] is not None:
            groups.setdefault(labels[i], []).append(i)
    chosen = []
    for number, (_, members) in enumerate(sorted(groups.items())):
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        sequence = np.random.SeedSequence([Stream.HELD_OUT, seed, number])
        order = np.argsort(sequence.generate_state(len(members)), kind="stable")
        chosen += [members[i] for i in order[:count]]
    return sorted(chosen)


def make_test_split(splits: Splits, fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Make a part of the training images test images; the labels of both."""
    try:
        labels = splits.labels_of(splits.train, splits.top)
        splits.classes_of(labels)
    except NoLabels as reason:
        raise UserError(f"--test_fraction needs labels: {reason}") from reason
    chosen = held_out_indices(splits.train, labels, fraction, seed)
    if not chosen:
        raise UserError(f"--test_fraction: no class of {splits.name} has two images")
    rest = sorted({*range(len(labels))} - {*chosen})
    splits.test, splits.train = ([splits.train[i] for i in part] for part in (chosen, rest))
    splits.test_name, splits.test_top = f"{splits.name}, held out", None
    part = f"{len(chosen)} images, a part of each class, are held out by seed {seed}"
    omitted = "train.py with the same flags does not train on them"
    splits.notes.append(f"--test_fraction {fraction:g}: {part}; {omitted}")
    if single := sorted(name for name, count in Counter(labels).items() if name and count == 1):
        splits.notes.append(f"classes of one image, which is not held out: {shortened(single)}")
    return [labels[i] for i in rest], [labels[i] for i in chosen]


def labelled(paths: list[str], labels: Labels, names: list[str]) -> ImageFiles:
    """The images that have a label, and its number among the names of the classes."""
    number = {name: i for i, name in enumerate(names)}
    pairs = [(path, number[label]) for path, label in zip(paths, labels) if label is not None]
    return ImageFiles(*zip(*pairs))


def source_of(splits: Splits, test_fraction: float | None, seed: int) -> Source:
    """The images with their labels, or with the reason why there are none to test on."""
    try:
        train, test = labels_of_splits(splits)
        if test_fraction is not None:
            raise UserError(f"leave out --test_fraction: {splits.test_name} has test images")
    except NoLabels as reason:
        if splits.test:
            splits.unused.insert(0, splits.test_name)
        if test_fraction is None:
            notes = [f"no k-NN: {reason}", *splits.all_notes()]
            return Source(splits.name, ImageFiles(splits.train), notes=notes, no_labels=str(reason))
        train, test = make_test_split(splits, test_fraction, seed)
    names = sorted(set(filter(None, train)))
    memory, queries = labelled(splits.train, train, names), labelled(splits.test, test, names)
    pretrain = memory if len(memory) == len(train) else ImageFiles(splits.train)
    images = f"{len(queries)} test images in {splits.test_name}"
    notes = [f"{len(names)} classes: {shortened(names)}; {images}", *splits.all_notes()]
    empty = []
    for top, labels in ((splits.top, set(train)), (splits.test_top, set(test))):
        if top and not splits.table:
            empty += [str(path) for path in image_io.sub_folders(top) if path.name not in labels]
    if empty:
        notes.append(f"class folders without an image: {shortened(empty)}")
    if count := train.count(None):
        notes.append(f"{count} images without a label are trained on, not evaluated")
    if count := test.count(None):
        notes.append(f"{count} test images without a label are left out")
    return Source(splits.name, pretrain, memory, queries, len(names), notes, names=names)


@user_errors()
def load(
    source: str,
    root: str = "data",
    download: bool = False,
    table: str | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    rank: int = 0,
) -> Source:
    """Open a name of `NAMED`, a text file of paths, or a folder; a UserError where that fails.

    With `download`, rank 0 fetches a named set to `root`, and the others wait. A `table` labels a
    folder or list (see `read_table`), and `test_fraction` of each class is held out by `seed`.
    """
    if source in NAMED:
        with distributed.first_rank_before_others(rank, download):
            return NAMED[source](root, download and rank == 0)
    path, file = Path(source), Path(table) if table is not None else None
    rows = read_table(file) if file else []
    if path.is_file():
        splits = read_list(path)
    elif source and path.is_dir():  # Path("") would be the current folder
        splits = read_splits(path, by_table=any(row.split for row in rows))
    else:
        known = f"a folder, a text file of paths, or one of {', '.join(NAMED)}"
        raise UserError(f"no data at {source or 'an empty path'}: give {known}")
    if rows:
        apply_table(splits, rows, file)
    return source_of(splits, test_fraction, seed)


def open_source(args, rank: int) -> Source:
    """The data set that the flags about data name, labels and held-out images included."""
    seed = args.seed if hasattr(args, "seed") else args.seeds[0]
    where = args.data_path, args.data_root, args.download
    return load(*where, args.labels, args.test_fraction, seed, rank)

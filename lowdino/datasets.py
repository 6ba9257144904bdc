"""Where images come from: a folder, a text file of paths, or one of torchvision's data sets.

A folder is read with all its sub-folders, but for names that begin with a dot, and for what an
earlier run wrote. Labels are never used for training. Where a folder holds train/ (or training) and
val/ (or valid, validation, test, testing; in any case) with class sub-folders, a run trains on the
first and reports k-NN accuracy on the other. Labels may also come from a table, and test images may
be held out of each class, see `labels.py`: give the scripts that evaluate the same flags. The log
says which folders were taken and which not, counts by suffix the files that are no images, and, in
one line, `no k-NN: ...`, why there are no labels. An evaluation then refuses with the same words.
"""

import csv
import io
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torchvision import datasets as torchvision_datasets

from lowdino.data import ImageArray, ImageFiles
from lowdino.distributed import UserError, user_errors
from lowdino.image_io import counted, find_images, has_images, read_folder, sub_folders, walk

# --------------------------------------------------------------------------------------------------
# Labels by folder or table
# --------------------------------------------------------------------------------------------------

# Names of a split, in any case. Of several for test images the first is taken.
TRAIN = ("train", "training")
TEST = ("val", "valid", "validation", "test", "testing")


class NoLabels(UserError):
    """Why there are no labels to test on; it names the file or folder that is the reason."""


class Row(NamedTuple):
    """Of a table: its line, the path as written, a label, and a split where there is one."""

    line: int
    path: str
    label: str
    split: str | None = None


def labels_of_folders(paths: Sequence[str], top: Path) -> list[str]:
    """The sub-folder of `top` that each image is in.

    Raises:
        NoLabels: where some are in none.
    """
    parts = [Path(path).relative_to(top).parts for path in paths]
    loose = [path for path, names in zip(paths, parts) if len(names) == 1]
    if len(loose) == len(paths):
        raise NoLabels(f"the images of {top} are in no class sub-folders")
    if loose:
        raise NoLabels(f"{loose[0]} is beside the class sub-folders of {top}, not in one of them")
    return [names[0] for names in parts]


def read_table(file: Path) -> list[Row]:
    """The rows of a table with the columns path and label, perhaps split, and any others.

    The first line names them. They are separated by commas, semicolons or tabs. Labels are any
    strings. A split has a name of `TRAIN` or `TEST`.

    Raises:
        UserError: where it cannot be read, has no rows, lacks a column, or a row lacks a value.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--labels {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        wanted = "give a table with the columns path and label"
        raise UserError(f"--labels {file} is not a text file in UTF-8: {wanted}") from error
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
            raise UserError(
                f"--labels {file} lacks the column path or label: its first line, which should "
                f"name them, is {first!r}"
            )
        cells = [
            (reader.line_num, dict(itertools.zip_longest(header, row, fillvalue="")))
            for row in reader
            if any(row)
        ]
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of --labels {file}: {error}") from error
    if not cells:
        raise UserError(f"--labels {file} has no rows below the names of its columns")
    return [row_of(values, line, file) for line, values in cells]


def row_of(values: dict[str, str], line: int, file: Path) -> Row:
    """One row, checked by itself."""
    path, label = (values.get(name, "").strip() for name in ("path", "label"))
    if not path or not label:
        raise UserError(f"line {line} of --labels {file} lacks a path or a label")
    if "" in values:  # more cells than columns
        raise UserError(
            f"line {line} of --labels {file} has more cells than the first line has columns: put "
            "quotes around a value that has commas in it"
        )
    split = values.get("split")
    if split is not None and split.strip().lower() not in (*TRAIN, *TEST):
        raise UserError(
            f"line {line} of --labels {file} has the split {split!r}, which is none of "
            f"{', '.join((*TRAIN, *TEST))}"
        )
    return Row(line, path, label, split and split.strip().lower())


def path_key(path: str) -> str:
    """A path to compare by; a Mac writes accents as characters of their own, a table does not."""
    return unicodedata.normalize("NFC", os.path.abspath(path))


def look_up_rows(
    rows: list[Row], file: Path, folder: Path, paths: Sequence[str]
) -> tuple[dict[str, Row], int]:
    """The rows by the `key` of their image, and how many are of files that are none of `paths`.

    A row's path is relative to the table's own folder or to `folder`.

    Raises:
        UserError: where a row names a missing file, two rows contradict each other, or no row names
            an image of `paths`.
    """
    known, found, others = {path_key(path) for path in paths}, {}, 0
    for row in rows:
        places = [path_key(os.path.join(base, row.path)) for base in (file.parent, folder)]
        path = next((place for place in places if place in known), None)
        if path is None:
            if not any(map(os.path.exists, places)):
                raise UserError(
                    f"line {row.line} of --labels {file} names {row.path}, which is neither in "
                    f"{file.parent} nor in {folder}"
                )
            others += 1
            continue
        first = found.setdefault(path, row)
        if (first.label, first.split) != (row.label, row.split):
            raise UserError(
                f"--labels {file} names {row.path} in lines {first.line} and {row.line}, with "
                "different labels or splits"
            )
    if not found:
        raise UserError(f"--labels {file} names no image that is read from {folder}")
    return found, others


def held_out_indices(
    paths: Sequence[str], labels: Sequence[str | None], fraction: float, seed: int
) -> list[int]:
    """Indices of about a `fraction` of each class, one at least; never all of it.

    The choice is a function of `seed`, the names of the classes and the order of the paths' names.
    Images without a label are never chosen.
    """
    groups: dict[str, list[int]] = {}
    for i in sorted(range(len(paths)), key=lambda i: paths[i]):
        if labels[i] is not None:
            groups.setdefault(labels[i], []).append(i)
    chosen = []
    for number, label in enumerate(sorted(groups)):
        members = groups[label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        draws = np.random.SeedSequence([5, seed, number]).generate_state(len(members))
        chosen += [members[i] for i in np.argsort(draws, kind="stable")[:count]]
    return sorted(chosen)


@dataclass
class Source:
    """What a source holds.

    Attributes:
        name: in words, for the log.
        pretrain: all images to learn from; labels are not used.
        train, test: labelled images, the memory and the queries of k-NN; None where there are none.
        classes: number of labels; 0 without them.
        notes: what was assumed, skipped or left out, a sentence each.
        no_labels: why there are no labels to test on; empty where there are some.
        names: of the classes, by label; None where nothing names them.
    """

    name: str
    pretrain: ImageArray | ImageFiles
    train: ImageArray | ImageFiles | None = None
    test: ImageArray | ImageFiles | None = None
    classes: int = 0
    notes: list[str] = field(default_factory=list)
    no_labels: str = ""
    names: list[str] | None = None

    def limit_side(self, max_side: int) -> None:
        """Reduce large files on reading; see `read_image`."""
        for images in (self.pretrain, self.train, self.test):
            if isinstance(images, ImageFiles):
                images.max_side = max_side


@user_errors()
def load(
    source: str,
    root: str = "data",
    download: bool = False,
    table: str | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
) -> Source:
    """Open a source by name.

    Args:
        source: "cifar10", "cifar100" or "stl10", stored under `root`; a text file, see
            `find_listed`; or a folder, see `find_split`.
        download: fetch one of torchvision's data sets where `root` lacks it.
        table: a file that gives labels to a folder or list, see `read_table`.
        test_fraction: share of each class to hold out as test images, chosen by `seed`, where a
            folder or list has none.

    Raises:
        UserError: in one sentence, where there is nothing to read, or the labels asked for are not
            to be had.
    """
    if source in TORCHVISION:
        return load_torchvision(source, root, download)
    path, file = Path(source), Path(table) if table is not None else None
    rows = read_table(file) if file else []
    if path.is_file():
        files = find_listed(path)
    elif source and path.is_dir():  # Path("") would be the current folder
        files = find_split(path, whole=any(row.split for row in rows))
    else:
        raise UserError(
            f"no data at {source or 'an empty path'}: give a folder, a text file of paths, "
            "demo, demo_scenes, cifar10, cifar100 or stl10"
        )
    if rows:
        read_labels(files, rows, file)
    return with_labels(files, test_fraction, seed)


def load_on_ranks(source: str, root: str, download: bool, rank: int, **labelling) -> Source:
    """`load` in every process of a job; only the first downloads, and the others wait for it."""
    if not (download and dist.is_initialized()):
        return load(source, root, download, **labelling)
    if rank != 0:
        dist.barrier()
    found = load(source, root, download and rank == 0, **labelling)
    if rank == 0:
        dist.barrier()
    return found


# --------------------------------------------------------------------------------------------------
# Folders and lists
# --------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """The image files of a folder or list, and what is known of their splits and labels.

    Attributes:
        name, test_name: where training and test images are from, in words.
        folder: the folder itself, or that of the list.
        train, test: paths.
        top, test_top: the folders whose sub-folders may be classes.
        no_test: why there are no test images.
        unused: folders and files beside those of the splits.
        table: labels by the images' `path_key`.
    """

    name: str
    folder: Path
    train: list[str]
    top: Path | None = None
    test_name: str = ""
    test: list[str] = field(default_factory=list)
    test_top: Path | None = None
    no_test: str = ""
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    table: dict[str, Row] = field(default_factory=dict)

    def labels_of(self, paths: list[str], top: Path | None) -> list[str | None]:
        """The table's labels, where it names some of the images; else their folders' names."""
        rows = [self.table.get(path_key(path)) for path in paths] if self.table else []
        if any(rows):
            return [row and row.label for row in rows]
        if top is None:
            raise NoLabels(f"{self.name} have no labels but those of a table, --labels")
        return labels_of_folders(paths, top)


def find_listed(listing: Path) -> Files:
    """The images named in a text file, one a line, relative to the file's own folder."""
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{listing} is not a text file; give a folder of images, or a list of paths"
        ) from error
    paths = [str(listing.parent / line) for line in lines if line]
    if not paths:
        raise UserError(f"{listing} has no lines; it should name one image a line")
    missing = next((p for p in paths if not os.path.isfile(p)), None)
    if missing:
        raise UserError(f"{listing} names {missing}, which does not exist")
    distinct = {path_key(path): path for path in reversed(paths)}
    notes = [f"{len(paths) - len(distinct)} lines name an image again"]
    notes, paths = notes * (len(distinct) < len(paths)), list(reversed(distinct.values()))
    no_test = f"{listing} is a list of paths; that needs --labels and --test_fraction beside it"
    name = f"{len(paths)} images named in {listing}"
    return Files(name, listing.parent, paths, no_test=no_test, notes=notes)


def find_split(folder: Path, whole: bool = False) -> Files:
    """All images below a folder, or below its train/ and val/ (see `TRAIN` and `TEST`).

    What is beside these is not used. A train/ without a val/ that has images of its own, as
    folders beside it have, is no split but a class.

    Args:
        whole: take all images, whatever the names of folders.
    """
    inside = sub_folders(folder)
    tops, test_tops = (
        [path for name in names for path in inside if path.name.lower() == name]
        for names in (TRAIN, TEST)
    )
    left_out, notes = Counter(), []
    one_class = not whole and tops and not test_tops and is_class(tops[0], inside)
    if whole or not tops or one_class:
        no_test = (
            f"that needs train/ and val/ (or test/) in {folder}, each with class sub-folders, or "
            "--test_fraction, or --labels"
        )
        paths = find_images(folder, left_out)
        if one_class:
            notes = [f"{tops[0]} is read as a class like its neighbours: no val/ is beside it"]
        elif not whole:
            notes = like_others(folder, test_tops, paths)
        files = Files(f"folder {folder}", folder, paths, folder, no_test=no_test, notes=notes)
    else:
        top = tops[0]
        files = Files(f"folder {top}", folder, find_images(top, left_out), top)
        find_tests(files, test_tops, left_out)
        used = (top, files.test_top)
        splits = (*tops, *test_tops)
        files.unused = [
            str(path)
            for path in inside
            if path not in used and (path in splits or has_images(path))
        ]
        files.unused += read_folder(str(folder), Counter())[0]
    if left_out:
        files.notes.append(f"left out: {counted(left_out)}")
    return files


def find_tests(files: Files, test_tops: list[Path], left_out: Counter) -> None:
    """Take the images of the first of some folders that has any."""
    files.no_test = f"no val/ or test/ is beside {files.top}"
    if test_tops:
        files.no_test = f"{test_tops[0]} has no image"
    for test_top in test_tops:
        files.test = sorted(walk(str(test_top), left_out, set()))
        if files.test:
            files.test_top, files.test_name = test_top, str(test_top)
            return


def like_others(folder: Path, test_tops: list[Path], paths: list[str]) -> list[str]:
    """A note on what is called like a part of a split where there is no split.

    Args:
        test_tops: such folders in `folder`. paths: of its images, whose own folders tell the rest.
    """
    names = {*TRAIN, *TEST}
    below = (Path(top).relative_to(folder) for top in sorted({*map(os.path.dirname, paths)}))
    inner = (folder.joinpath(*top.parts[:2]) for top in below if len(top.parts) > 1)
    found = test_tops or [top for top in inner if top.name.lower() in names]
    return [f"{path} is read like any other folder: {folder} has no train/" for path in found[:1]]


def is_class(top: Path, inside: list[Path]) -> bool:
    """Whether a train/ without a val/ is a class, a vehicle say: others have images as it has."""
    return bool(read_folder(str(top), Counter())[0]) and any(
        path != top and has_images(path) for path in inside
    )


# --------------------------------------------------------------------------------------------------
# Labels of a source
# --------------------------------------------------------------------------------------------------


def read_labels(files: Files, rows: list[Row], file: Path) -> None:
    """Look up the images in a table's rows, and take its splits where it has them."""
    files.table, others = look_up_rows(rows, file, files.folder, files.train + files.test)
    if others:
        files.notes.append(f"{others} rows of {file} name files that are not read")
    splits = [row.split for row in files.table.values()]
    if any(splits):
        split_by_table(files, next((s for s in TEST if s in splits), None), file)
    elif not files.test:
        files.no_test = (
            f"{file} labels training images alone; that needs a column split in it, or "
            f"--test_fraction, or train/ and val/ in {files.folder}"
        )


def split_by_table(files: Files, chosen: str | None, file: Path) -> None:
    """The images whose split is `chosen` are test images, those without a split are trained on."""
    paths = files.train + files.test
    rows = (files.table.get(path_key(path)) for path in paths)
    splits = [row and row.split for row in rows]
    files.train = [p for p, split in zip(paths, splits) if split in (None, *TRAIN)]
    files.test = [p for p, split in zip(paths, splits) if split and split == chosen]
    files.test_name, files.no_test = f"split {chosen} of {file}", f"{file} has no split val or test"
    if not files.train:
        raise UserError(f"--labels {file} leaves no image to train on: all are of other splits")
    if others := len(paths) - len(files.train) - len(files.test):
        files.unused.append(f"{others} images of other splits of {file}")


def with_labels(files: Files, test_fraction: float | None, seed: int) -> Source:
    """The images with their labels, or with the reason why there are none to test on."""
    try:
        train, test = labels_of_splits(files)
        if test_fraction is not None:
            raise UserError(
                f"--test_fraction is for images without test images, and {files.test_name} has "
                "some: leave it out"
            )
    except NoLabels as reason:
        if files.test:
            files.unused.insert(0, files.test_name)
        if test_fraction is None:
            images, notes = ImageFiles(files.train), [f"no k-NN: {reason}", *notes_of(files)]
            return Source(files.name, images, notes=notes, no_labels=str(reason))
        train, test = hold_out_tests(files, test_fraction, seed)
    classes = sorted({name for name in train if name is not None})
    memory, queries = (
        labelled(*split, classes) for split in ((files.train, train), (files.test, test))
    )
    pretrain = memory if len(memory) == len(train) else ImageFiles(files.train)
    said = f"{some(classes)}; {len(queries)} test images in {files.test_name}"
    notes = [f"{len(classes)} classes: {said}", *notes_of(files)]
    notes += empty_classes(files, train, test)
    if None in train:
        notes.append(f"{train.count(None)} images without a label are trained on, not evaluated")
    if None in test:
        notes.append(f"{test.count(None)} test images without a label are left out")
    return Source(files.name, pretrain, memory, queries, len(classes), notes, names=classes)


def labels_of_splits(files: Files) -> tuple[list[str | None], list[str | None]]:
    """The labels of the training and of the test images; None for images that a table leaves out.

    Raises:
        NoLabels: where they are of no use to test on.
    """
    if not files.test:
        raise NoLabels(files.no_test)
    train = files.labels_of(files.train, files.top)
    test = files.labels_of(files.test, files.test_top)
    known, where = two_classes(files, train), files.top or files.name
    unknown = sorted(set(filter(None, test)) - known)
    if unknown and files.top and (files.top / unknown[0]).is_dir():
        raise NoLabels(
            f"class folder {files.top / unknown[0]} has no image, and {files.test_name} has some "
            "of that class"
        )
    if unknown:
        near = (f" (it has {name!r})" for name in known if name.lower() == unknown[0].lower())
        raise NoLabels(
            f"{files.test_name} has class {unknown[0]!r}, which {where} lacks{next(near, '')}"
        )
    return train, test


def two_classes(files: Files, train: list[str | None]) -> set[str]:
    """The classes of the training images, of which there must be two."""
    known = set(filter(None, train))
    if len(known) == 1:
        where = files.top or files.name
        raise NoLabels(f"all images of {where} are of one class, {known.pop()!r}")
    return known


def hold_out_tests(
    files: Files, fraction: float, seed: int
) -> tuple[list[str | None], list[str | None]]:
    """Make a part of the training images test images; the labels of both."""
    try:
        names = files.labels_of(files.train, files.top)
        two_classes(files, names)
    except NoLabels as reason:
        raise UserError(f"--test_fraction needs labels: {reason}") from reason
    chosen = held_out_indices(files.train, names, fraction, seed)
    if not chosen:
        raise UserError(f"--test_fraction: no class of {files.name} has two images")
    rest = sorted({*range(len(names))} - {*chosen})
    files.test, files.train = ([files.train[i] for i in part] for part in (chosen, rest))
    files.test_name, files.test_top = f"{files.name}, held out", None
    files.notes.append(
        f"--test_fraction {fraction:g}: {len(chosen)} images, a part of each class, are held out "
        f"by seed {seed}; train.py with the same flags does not train on them"
    )
    if single := sorted(name for name, count in Counter(names).items() if name and count == 1):
        files.notes.append(f"classes of one image, which is not held out: {some(single)}")
    return [names[i] for i in rest], [names[i] for i in chosen]


def labelled(paths: list[str], names: list[str | None], classes: list[str]) -> ImageFiles:
    """Those of the images that have a label, with its number."""
    number = {name: i for i, name in enumerate(classes)}
    pairs = [(path, number[name]) for path, name in zip(paths, names) if name is not None]
    return ImageFiles(*zip(*pairs))


def empty_classes(files: Files, train: list[str | None], test: list[str | None]) -> list[str]:
    """A note on the class folders without images; there are none where a table has the labels."""
    empty = []
    for top, names in ((files.top, train), (files.test_top, test)):
        if top and not files.table:
            known = set(names)
            empty += [str(path) for path in sub_folders(top) if path.name not in known]
    return [f"class folders without an image: {some(empty)}"] * bool(empty)


def notes_of(files: Files) -> list[str]:
    return files.notes + [f"not used: {some(files.unused)}"] * bool(files.unused)


def some(names: list[str], most: int = 5) -> str:
    """The first of some names, and how many others."""
    others = [f"{len(names) - most} others"] * (len(names) > most)
    return ", ".join([*names[:most], *others])


# --------------------------------------------------------------------------------------------------
# torchvision's data sets
# --------------------------------------------------------------------------------------------------

TORCHVISION = {
    "cifar10": ("CIFAR-10", "CIFAR10"),
    "cifar100": ("CIFAR-100", "CIFAR100"),
    "stl10": ("STL-10, its unlabelled images", "STL10"),
}  # source -> name for the log, class of torchvision.datasets


def load_torchvision(source: str, root: str, download: bool) -> Source:
    """One of torchvision's data sets, in memory."""
    name, kind = TORCHVISION[source]
    names: list[str] = []

    def split(**which) -> ImageArray:
        found = getattr(torchvision_datasets, kind)(root, download=download, **which)
        names[:] = getattr(found, "classes", [])
        labels = found.targets if hasattr(found, "targets") else found.labels
        images = torch.from_numpy(found.data)
        if images.shape[1] != 3:  # CIFAR has channels last, STL-10 first
            images = images.permute(0, 3, 1, 2).contiguous()
        return ImageArray(images, torch.as_tensor(labels, dtype=torch.int64))

    try:
        if source == "stl10":
            pretrain, train, test = (split(split=s) for s in ("unlabeled", "train", "test"))
        else:
            pretrain = train = split(train=True)
            test = split(train=False)
    except (RuntimeError, OSError) as error:  # absent, corrupted, or no network
        hint = "the download failed"
        if not download:
            hint = "not found; add --download, or name its folder by --data_root"
        raise UserError(f"{source} under {root}: {hint}") from error
    classes = int(train.labels.max()) + 1
    return Source(name, pretrain, train, test, classes, names=names or None)

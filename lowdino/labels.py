"""Labels of image files: by their folders or by a table; and which of them to hold out for tests.

Images without a label in the table are trained on, and not evaluated. A split in the table takes
the place of the folders'. Held-out images are not trained on. Reads no image.
"""

import csv
import io
import itertools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Names of a split, in any case. Of several for test images the first is taken.
TRAIN = ("train", "training")
TEST = ("val", "valid", "validation", "test", "testing")


class UserError(ValueError):
    """What a user can mend, said in one sentence."""


class NoLabels(UserError):
    """Why there are no labels to test on; it names the file or folder that is the reason."""


class Row(NamedTuple):
    """Of a table: its line, the path as written, a label, and a split where there is one."""

    line: int
    path: str
    label: str
    split: str | None = None


def of_folders(paths: Sequence[str], top: Path) -> list[str]:
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


def key(path: str) -> str:
    """A path to compare by; a Mac writes accents as characters of their own, a table does not."""
    return unicodedata.normalize("NFC", os.path.abspath(path))


def look_up(
    rows: list[Row], file: Path, folder: Path, paths: Sequence[str]
) -> tuple[dict[str, Row], int]:
    """The rows by the `key` of their image, and how many are of files that are none of `paths`.

    A row's path is relative to the table's own folder or to `folder`.

    Raises:
        UserError: where a row names a missing file, two rows contradict each other, or no row names
            an image of `paths`.
    """
    known, found, others = {key(path) for path in paths}, {}, 0
    for row in rows:
        places = [key(os.path.join(base, row.path)) for base in (file.parent, folder)]
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


def hold_out(
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

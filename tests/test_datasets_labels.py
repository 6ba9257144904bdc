"""Labels by a table, and images held out for tests."""

import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from conftest import classes, draw, numbered
from runs import is_one_sentence, options, records, small, stepwise

from lowdino import datasets

# --------------------------------------------------------------------------------------------------
# Tables of labels
# --------------------------------------------------------------------------------------------------

TABLES = {
    "plain": "path,label\ntrain/dark/0.png,x\ntrain/dark/1.png,y\nval/dark/0.png,x\n",
    "bom and crlf": "\ufeffpath,label\r\ntrain/dark/0.png,x\r\ntrain/dark/1.png,y\r\n\r\n"
    "val/dark/0.png,x\r\n",
    "more columns, another order": "id, Label, size, Path\n1,x,3,train/dark/0.png\n"
    "2,y,3,train/dark/1.png\n3,x,3,val/dark/0.png\n3,x,3,val/dark/0.png\n",
    "semicolons": "path;label\ntrain/dark/0.png;x\ntrain/dark/1.png;y\nval/dark/0.png;x\n",
    "tabs": "path\tlabel\ntrain/dark/0.png\tx\ntrain/dark/1.png\ty\nval/dark/0.png\tx\n",
    "quotes": 'path,label\n"train/dark/0.png","x"\n"train/dark/1.png",y\n"val/dark/0.png",x\n',
    "absolute": "path,label\n{0}/train/dark/0.png,x\n{0}/train/dark/1.png,y\n{0}/val/dark/0.png,x",
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("table", TABLES)
def test_labels_of_a_table(table, beside, picture_folder, tmp_path):
    """Paths are relative to the table's folder or, where it lies elsewhere, to that of the data."""
    file = (picture_folder if beside else tmp_path) / "labels.csv"
    file.write_text(TABLES[table].format(picture_folder), encoding="utf-8", newline="")
    source = datasets.load(str(picture_folder), table=str(file))
    names = [os.path.relpath(path, picture_folder) for path in source.train.paths]
    assert dict(zip(names, source.train.labels)) == {"train/dark/0.png": 0, "train/dark/1.png": 1}
    assert source.test.labels == [0] and source.classes == 2 and len(source.pretrain) == 24
    assert source.notes == [
        f"2 classes: x, y; 1 test images in {picture_folder}/val",
        "22 images without a label are trained on, not evaluated",
        "7 test images without a label are left out",
    ]


def test_any_string_is_a_label_and_any_name_a_path(tmp_path):
    composed = unicodedata.normalize("NFC", "é, 2.png")
    top = draw(tmp_path / "p", "a b.png", unicodedata.normalize("NFD", composed), "c.png")
    (tmp_path / "t.csv").write_text(
        f'path,label,split\na b.png,"red, or 10",train\n"{composed}", 2,train\nc.png,2,val\n',
        encoding="utf-8",
    )
    source = datasets.load(str(top), table=str(tmp_path / "t.csv"))
    assert source.notes[0].startswith("2 classes: 2, red, or 10; 1 test images in split val of ")
    assert source.train.labels == [1, 0] and source.test.labels == [0]
    assert len(source.pretrain) == 2  # a test image is not trained on


def test_a_list_for_one_split_leaves_the_other_its_folders(tmp_path):
    """As Tiny-ImageNet's: classes in train, a flat val and a list of its labels."""
    draw(tmp_path, *classes("train", 3), *numbered("val/images", 2))
    (tmp_path / "val" / "list.csv").write_text("path,label\nimages/00.png,b\nimages/01.png,a\n")
    source = datasets.load(str(tmp_path), table=str(tmp_path / "val" / "list.csv"))
    assert source.train.labels == [0, 0, 0, 1, 1, 1] and source.test.labels == [1, 0]
    assert source.train is source.pretrain


def test_a_tables_splits_take_the_place_of_folders(tmp_path):
    draw(tmp_path, *numbered("train", 3), *numbered("val", 3), "x.png")
    (tmp_path / "t.csv").write_text(
        "path,label,split\ntrain/00.png,a,test\ntrain/01.png,a,TRAIN\nval/00.png,b,train\n"
        "val/01.png,b,valid\nval/02.png,a,valid\n"
    )
    source = datasets.load(str(tmp_path), table=str(tmp_path / "t.csv"))
    names = lambda images: [os.path.relpath(path, tmp_path) for path in images.paths]
    assert names(source.pretrain) == ["train/01.png", "train/02.png", "val/00.png", "x.png"]
    assert names(source.train) == ["train/01.png", "val/00.png"]
    assert names(source.test) == ["val/01.png", "val/02.png"] and source.test.labels == [1, 0]
    assert f"not used: 1 images of other splits of {tmp_path}/t.csv" in source.notes


def test_a_table_for_a_list_of_paths(picture_folder):
    listing, table = picture_folder / "some.txt", picture_folder / "t.csv"
    listing.write_text("".join(f"train/dark/{i}.png\n" for i in range(6)))
    table.write_text(
        "path,label\n" + "".join(f"train/dark/{i}.png,{i % 2}\n" for i in range(8)),
    )
    alone = datasets.load(str(listing))
    assert alone.no_labels.startswith(f"{listing} is a list of paths; that needs --labels")
    with_table = datasets.load(str(listing), table=str(table))
    assert with_table.no_labels.startswith(f"{table} labels training images alone; that needs")
    assert f"2 rows of {table} name files that are not read" in with_table.notes
    source = datasets.load(str(listing), table=str(table), test_fraction=0.3)
    assert Counter(source.train.labels) == {0: 2, 1: 2} and Counter(source.test.labels) == {
        0: 1,
        1: 1,
    }


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty: give a table with the columns path and label"),
        ("path,label\n\n", "has no rows below the names of its columns"),
        (
            "path,class\na.png,1\n",
            "lacks the column path or label; line 1 is 'path,class'",
        ),
        ("train/dark/0.png,1\n", "lacks the column path or label"),
        ("path,label\ntrain/dark/0.png,1\nnone.png,1\n", "line 3 of .* names none.png, which is n"),
        ("path,label\ntrain/dark/0.png\n", "line 2 of .* lacks a path or a label"),
        ("path,label\n,1\n", "line 2 of .* lacks a path or a label"),
        (
            "path,label\ntrain/dark/0.png,1\n./train/dark/0.png,2\n",
            "line 3 of .* contradicts line 2, which names ./train/dark/0.png too",
        ),
        ("path,label,split\ntrain/dark/0.png,1,dev\n", "line 2 of .* has the split 'dev', which"),
        ("path,label,split\ntrain/dark/0.png,1\n", "line 2 of .* has the split '', which"),
        ("path,label,split\ntrain/dark/0.png,1,test\n", "has class '1', which .*pictures lacks"),
        ("path,label\nlabels.csv,1\n", "names no image that is read from"),
        ("path,label\ntrain/dark/0.png,a, b\n", "line 2 of .* has more cells than line 1; put q"),
        (b"\x89PNG\r\n\xff", "is not a text file in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_wrong_table_is_one_sentence(content, message, picture_folder, tmp_path, call_script):
    file = picture_folder / "labels.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = options("--pixels", data_path=picture_folder, labels=file)
    assert is_one_sentence(call_script("eval_knn.py", *flags, check=False), message)


def test_a_table_with_the_images_of_no_class_twice(picture_folder):
    """Training goes on where a table does not do for tests."""
    (picture_folder / "t.csv").write_text("path,label\ntrain/dark/0.png,x\nval/dark/0.png,x\n")
    source = datasets.load(str(picture_folder), table=str(picture_folder / "t.csv"))
    assert source.no_labels == f"all images of {picture_folder}/train are of one class, 'x'"
    assert len(source.pretrain) == 24


# --------------------------------------------------------------------------------------------------
# Images held out
# --------------------------------------------------------------------------------------------------


def test_held_out_images_are_of_every_class_and_not_trained_on(tmp_path):
    top = draw(tmp_path / "p", *classes(".", 10), *numbered("c", 3), "d/0.png")
    source = datasets.load(str(top), test_fraction=0.2)
    assert Counter(source.test.labels) == {0: 2, 1: 2, 2: 1}
    assert Counter(source.train.labels) == {0: 8, 1: 8, 2: 2, 3: 1}
    assert source.pretrain is source.train and not {*source.train.paths} & {*source.test.paths}
    assert len({*source.train.paths, *source.test.paths}) == 24
    assert source.notes == [
        f"4 classes: a, b, c, d; 5 test images in folder {top}, held out",
        "--test_fraction 0.2: 5 images, a part of each class, are held out by seed 0; train.py "
        "with the same flags does not train on them",
        "classes of one image, which is not held out: d",
    ]
    most = datasets.load(str(top), test_fraction=0.99)
    assert Counter(most.train.labels) == dict.fromkeys(range(4), 1)


def test_the_choice_follows_from_the_seed_and_the_names(tmp_path):
    names = lambda source: [Path(path).parts[-2:] for path in source.test.paths]
    top = draw(tmp_path / "p", *classes(".", 10))
    first = names(datasets.load(str(top), test_fraction=0.3))
    others = [names(datasets.load(str(top), test_fraction=0.3, seed=seed)) for seed in (1, 2, 3)]
    assert len({tuple(paths) for paths in (first, *others)}) == 4
    top = top.rename(tmp_path / "elsewhere")
    assert names(datasets.load(str(top), test_fraction=0.3)) == first
    paths, have = [f"{i}" for i in range(9)], ["a", "b", None] * 3
    assert datasets.held_out_indices(paths, have, 0.4, 5) == datasets.held_out_indices(
        paths, have, 0.4, 5
    )
    assert all(have[i] for i in datasets.held_out_indices(paths, have, 0.4, 5))
    # Every image of a class has its turn.
    chosen = Counter(
        i for seed in range(300) for i in datasets.held_out_indices(paths, have, 0.4, seed)
    )
    assert set(chosen) == {0, 1, 3, 4, 6, 7} and min(chosen.values()) > 70


def test_held_out_where_the_folders_test_images_have_no_labels(tmp_path):
    draw(tmp_path, *classes("train", 4), *numbered("test", 2))
    source = datasets.load(str(tmp_path), test_fraction=0.25)
    assert len(source.train) == 6 and len(source.test) == 2
    assert f"not used: {tmp_path}/test" in source.notes


@pytest.mark.parametrize(
    "names, message",
    [
        (
            classes("train", 2) + classes("val", 2),
            "leave out --test_fraction: .*val has test images",
        ),
        (numbered(".", 4), "--test_fraction needs labels: the images of .* are in no class sub-f"),
        (numbered("a", 4), "--test_fraction needs labels: all images of .* are of one class, 'a'"),
        (["a/0.png", "b/0.png"], "--test_fraction: no class of folder .* has two images"),
    ],
)
def test_nothing_to_hold_out_is_one_sentence(names, message, tmp_path, call_script):
    flags = options("--test_fraction 0.5", data_path=draw(tmp_path / "p", *names))
    for script, more in (
        ("train.py", small(output_dir=tmp_path / "o")),
        ("eval_linear.py", ["pixels", "--output_dir", tmp_path / "o"]),
    ):
        assert is_one_sentence(call_script(script, *more, *flags, check=False), message)


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train.py", "--test_fraction 1", "--test_fraction must lie between 0 and 1, not 1.0"),
        ("eval_knn.py", "--pixels --test_fraction 0", "--test_fraction must lie between 0 and 1"),
        ("train.py", "--test_fraction 0.2", "--test_fraction goes with a folder or list .* demo"),
        ("train.py", "--labels a.csv --data_path stl10", "--labels goes with .* stl10 has labels"),
        ("eval_linear.py", "pixels --labels a.csv", "--labels goes with a folder or list"),
        ("eval_knn.py", "--from_features a.npz --labels b.csv", "--labels needs the images, which"),
    ],
)
def test_flags_that_do_not_go_together(script, flags, message, call_script):
    assert is_one_sentence(call_script(script, *flags.split(), check=False), message)


def test_scripts_agree_on_what_is_held_out(picture_folder, tmp_path, call_script):
    """The k-NN of a training is that of eval_knn.py, and a resumed run has the same images."""
    train, out = picture_folder / "train", tmp_path / "out"
    table = tmp_path / "labels.csv"
    rows = [f"{shade}/{i}.png,{shade}\n" for shade in ("dark", "light") for i in range(10)]
    table.write_text("path,label\n" + "".join(rows))
    flags = stepwise(train, out, "--epochs 1 --test_fraction 0.2 --seed 3", labels=table)
    done = call_script("train.py", *flags)
    assert f"data: folder {train}, 20 images" in done.stdout.splitlines()[0]
    assert "4 images without a label are trained on, not evaluated" in done.stdout
    labels = options("--test_fraction 0.2 --seed 3 --num_workers 0", data_path=train, labels=table)
    shown = call_script("eval_knn.py", "--weights", out / "backbone.pth", "--nb_knn", 20, *labels)
    assert "held out by seed 3" in shown.stdout and "16 training and 4 test" in shown.stdout
    assert f"top-1 {records(out, 'knn')[-1]:.4f}" in shown.stdout
    linear = options(
        "--epochs 2 --test_fraction 0.2 --seeds 3 --num_workers 0 --device cpu",
        data_path=train,
        labels=table,
        output_dir=tmp_path / "linear",
    )
    shown = call_script("eval_linear.py", out / "backbone.pth", *linear).stdout
    assert "16 training and 4 test images" in shown and shown.count("held out by seed 3") == 1

    moved = table.rename(tmp_path / "moved.csv")
    again = stepwise(train, out, "--epochs 1 --test_fraction 0.2 --seed 3", labels=moved)
    assert "already finished" in call_script("train.py", *again).stdout
    other = stepwise(train, out, "--epochs 1 --seed 3", labels=moved)
    refused = call_script("train.py", *other, check=False)
    assert is_one_sentence(
        refused, "cannot resume from .*test_fraction 0.2, not None; images 20, names .*, not 24, "
    )

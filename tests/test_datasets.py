"""Which files are images, which splits a folder has, and the notes on both; named data sets."""

import os

import numpy as np
import pytest
from conftest import classes, draw, numbered
from PIL import Image
from runs import is_one_sentence, options, small, stepwise

from lowdino import datasets, distributed, image_io

# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------

LAYOUTS = {
    "detection": (
        numbered("train/images", 3) + numbered("valid/images", 2) + numbered("test/images", 2),
        "folder {}/train, 3 images",
        "no k-NN: all images of {0}/train are of one class, 'images'",
        "not used: {0}/valid, {0}/test",
    ),
    "classes in train, none in val": (
        classes("train", 3) + numbered("val/images", 2),
        "folder {}/train, 6 images",
        "no k-NN: {0}/val has class 'images', which {0}/train lacks",
        "not used: {0}/val",
    ),
    "flat val": (
        classes("train", 3) + numbered("val", 2),
        "folder {}/train, 6 images",
        "no k-NN: the images of {0}/val are in no class sub-folders",
        "not used: {0}/val",
    ),
    "stray picture": (
        classes("train", 3) + classes("val", 2) + ["train/sheet.png"],
        "folder {}/train, 7 images",
        "no k-NN: {0}/train/sheet.png is beside the class sub-folders of {0}/train, not in one",
        "not used: {0}/val",
    ),
    "valid": (
        classes("train", 3) + classes("valid", 2),
        "folder {}/train, 6 images",
        "2 classes: a, b; 4 test images in {0}/valid",
    ),
    "capitals, val before test": (
        classes("TRAIN", 3) + classes("Test", 1) + classes("Validation", 2),
        "folder {}/TRAIN, 6 images",
        "2 classes: a, b; 4 test images in {0}/Validation",
        "not used: {0}/Test",
    ),
    "training and testing": (
        classes("training", 3) + classes("testing", 2) + ["extra/0.png", "sheet.png"],
        "folder {}/training, 6 images",
        "2 classes: a, b; 4 test images in {0}/testing",
        "not used: {0}/extra, {0}/sheet.png",
    ),
    "a class named train": (
        numbered("train", 3) + numbered("bus", 3),
        "folder {}, 6 images",
        "no k-NN: that needs train/ and val/ (or test/) in {0}, each with class sub-folders, or "
        "--test_fraction, or --labels",
        "{0}/train is read as a class like its neighbours: no val/ is beside it",
    ),
    "no train": (
        classes("val", 2) + classes("other", 2),
        "folder {}, 8 images",
        "no k-NN: that needs train/ and val/ (or test/) in {0}, each with class sub-folders, or "
        "--test_fraction, or --labels",
        "{0}/val is read like any other folder: {0} has no train/",
    ),
    "splits one folder deeper": (
        numbered("images/train", 2) + numbered("images/val", 2),
        "folder {}, 4 images",
        "no k-NN: that needs train/ and val/ (or test/) in {0}, each with class sub-folders, or "
        "--test_fraction, or --labels",
        "{0}/images/train is read like any other folder: {0} has no train/",
    ),
    "train alone": (
        classes("train", 2) + ["other/0.png"],
        "folder {}/train, 4 images",
        "no k-NN: no val/ or test/ is beside {0}/train",
        "not used: {0}/other",
    ),
    "another case": (
        classes("train", 2, "AB") + classes("val", 2, "aB"),
        "folder {}/train, 4 images",
        "no k-NN: {0}/val has class 'a', which {0}/train lacks (it has 'A')",
        "not used: {0}/val",
    ),
    "numbers, spaces and accents": (
        classes("train", 2, ["10", "2", "an é"]) + classes("val", 1, ["2", "an é"]),
        "folder {}/train, 6 images",
        "3 classes: 10, 2, an é; 2 test images in {0}/val",
    ),
    "deeper": (
        numbered("train/a/images/x", 2) + numbered("train/b", 2) + classes("val", 1),
        "folder {}/train, 4 images",
        "2 classes: a, b; 2 test images in {0}/val",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_what_was_assumed_is_said(layout, tmp_path):
    names, name, *notes = LAYOUTS[layout]
    source = datasets.load(str(draw(tmp_path, *names)))
    assert f"{source.name}, {len(source.pretrain)} images" == name.format(tmp_path)
    assert source.notes == [note.format(tmp_path) for note in notes]
    assert (source.test is None) == notes[0].startswith("no k-NN: ")
    assert source.no_labels == (notes[0].removeprefix("no k-NN: ").format(tmp_path)) * (
        source.test is None
    )
    if source.test is not None:
        assert len(source.train) == len(source.pretrain)


@pytest.mark.parametrize("layout", ["detection", "stray picture", "flat val", "another case"])
def test_an_evaluation_refuses_for_the_same_reason(layout, tmp_path, call_script):
    names, _, note, *_ = LAYOUTS[layout]
    draw(tmp_path, *names)
    named = dict(data_path=tmp_path, output_dir=tmp_path / "o")
    reason = note.removeprefix("no k-NN: ").format(tmp_path)
    message = f"folder {tmp_path}/train has no labels to test on: {reason}"
    for script, flags in (
        ("eval_knn.py", ["--pixels", "--data_path", tmp_path]),
        ("eval_linear.py", ["pixels", *options(**named)]),
    ):
        done = call_script(script, *flags, check=False)
        assert done.returncode == 2 and done.stderr == f"{script}: error: {message}\n"


def test_labels_that_cannot_be_had_are_one_line_of_a_training(
    picture_folder, tmp_path, call_script
):
    draw(picture_folder, "train/sheet.png")
    (picture_folder / "train" / "README").touch()
    flags = small("--epochs 1 --num_workers 0", data_path=picture_folder, output_dir=tmp_path / "o")
    lines = call_script("train.py", *flags).stdout.splitlines()
    train = picture_folder / "train"
    assert lines[0].startswith(f"data: folder {train}, 25 images")
    assert [line for line in lines if "k-NN" in line] == [
        f"no k-NN: {train}/sheet.png is beside the class sub-folders of {train}, not in one"
    ]
    assert "left out: 1 without suffix" in lines
    assert (tmp_path / "o" / "backbone.pth").exists()


def test_a_class_without_an_image_is_named(picture_folder, call_script):
    train, val = picture_folder / "train", picture_folder / "val"
    (train / "grey").mkdir()
    (train / "grey" / "notes.txt").touch()
    done = call_script("eval_knn.py", "--pixels", "--data_path", picture_folder)
    assert f"class folders without an image: {train}/grey\n" in done.stdout
    assert "24 training and 8 test images, 2 classes" in done.stdout
    draw(val, "grey/0.png")
    done = call_script("eval_knn.py", "--pixels", "--data_path", picture_folder, check=False)
    assert is_one_sentence(done, f"class folder {train}/grey has no image, but {val} has one")
    source = datasets.load(str(picture_folder))
    assert len(source.pretrain) == 24 and source.no_labels in done.stderr
    (train / "grey" / "notes.txt").unlink()
    (train / "grey").rmdir()
    done = call_script("eval_knn.py", "--pixels", "--data_path", picture_folder, check=False)
    assert is_one_sentence(done, "val has class 'grey', which .*train lacks")


def test_an_empty_val_gives_way_to_test(tmp_path):
    draw(tmp_path, *classes("train", 2))
    (tmp_path / "val").mkdir()
    assert datasets.load(str(tmp_path)).no_labels == f"{tmp_path}/val has no image"
    draw(tmp_path, *classes("test", 1))
    assert datasets.load(str(tmp_path)).notes == [
        f"2 classes: a, b; 2 test images in {tmp_path}/test",
        f"not used: {tmp_path}/val",
    ]


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_all_that_pillow_reads_is_found_and_the_rest_counted(tmp_path):
    images = "a.JPG b.jfif c.gif d.webp e.tif f.TIFF g.bmp h.ppm i.tga j.jp2 k.ico l.jpe".split()
    draw(tmp_path, *images)
    np.save(tmp_path / "m.npy", np.zeros((4, 4, 3), np.uint8))
    others = (
        "1.txt 2.TXT 3.xml Thumbs.db desktop.ini README .DS_Store ._a.JPG sub/.hidden.png a.eps "
        "a.h5 a.mpg __MACOSX/a.png @eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg"
    )
    for name in others.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no picture")
    source = datasets.load(str(tmp_path))
    assert [os.path.basename(path) for path in source.pretrain.paths] == [*images, "m.npy"]
    assert all(Image.open(path).size == (32, 32) for path in source.pretrain.paths[:-1])
    assert source.notes[1:] == [
        "left out: 3 hidden, 2 .txt, 1 .db, 1 .eps, 1 .h5, 1 .ini, 1 .mpg, 1 .xml, 1 others"
    ]


def test_only_what_pillow_decodes_by_itself_counts_as_an_image():
    """Each suffix belongs to a decoder, and those that torchvision takes are among them."""
    known = image_io.suffixes()
    assert {*image_io.IMG_EXTENSIONS} < known and not {
        ".eps",
        ".ps",
        ".hdf",
        ".mpeg",
        ".pdf",
    } & known
    for suffix in known - {".npy"}:
        assert Image.registered_extensions()[suffix] in Image.OPEN


def test_broken_links_and_unreadable_folders(picture_folder, monkeypatch):
    train = picture_folder / "train"
    (train / "dark" / "gone.png").symlink_to(picture_folder / "nowhere.png")
    (train / "dark" / "self.png").symlink_to(train / "dark" / "self.png")
    os.mkfifo(train / "dark" / "pipe.png")
    source = datasets.load(str(picture_folder))
    assert len(source.pretrain) == 24
    assert "left out: 2 broken links, 1 special files" in source.notes
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("dark"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match="cannot read folder .*/dark: Permission denied"):
        datasets.load(str(picture_folder))


@pytest.mark.parametrize(
    "out", ["output", *(pytest.param(out, marks=pytest.mark.slow) for out in ("runs/test", "."))]
)
def test_what_a_run_wrote_is_never_data(out, tmp_path, call_script):
    draw(tmp_path, *numbered(".", 8))
    flags = stepwise(".", out, "--epochs 1")
    first = call_script("train.py", *flags, cwd=tmp_path).stdout
    assert "8 images" in first.splitlines()[0] and (tmp_path / out / "crops.png").exists()
    again = call_script("train.py", *flags, cwd=tmp_path).stdout
    assert "8 images" in again.splitlines()[0] and "already finished" in again
    for name in ("checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "log.jsonl"):
        (tmp_path / out / name).unlink()  # as if killed in its first steps
    before = datasets.load(str(tmp_path))
    written = 3 if out == "." else 1  # pictures, or a folder
    assert len(before.pretrain) == 8 and f"{written} written by a run" in before.notes[1]


def test_a_teachers_cache_is_no_image(tmp_path):
    draw(tmp_path, *numbered(".", 3))
    np.save(tmp_path / "teacher.npy", np.zeros((3, 4), np.float16))
    assert len(datasets.load(str(tmp_path)).pretrain) == 4
    (tmp_path / "teacher.npy.json").write_text("{}")  # as distill.py --cache_teacher leaves it
    assert len(datasets.load(str(tmp_path)).pretrain) == 3


def test_folders_with_and_without_classes(picture_folder):
    source = datasets.load(str(picture_folder))
    assert len(source.pretrain) == 24 and len(source.test) == 8 and source.classes == 2
    assert source.train.labels == [0] * 12 + [1] * 12 and "/dark/" in source.train.paths[0]
    flat = datasets.load(str(picture_folder / "train"))
    assert len(flat.pretrain) == 24 and flat.test is None


def test_list_of_paths(picture_folder):
    listing = picture_folder / "some.txt"
    listing.write_text(
        "train/dark/0.png\n\n" + str(picture_folder / "val" / "light" / "3.png") + "\n"
    )
    source = datasets.load(str(listing))
    assert len(source.pretrain) == 2 and source.pretrain[1][0].shape == (3, 40, 32)
    listing.write_text("train/dark/none.png\n")
    with pytest.raises(ValueError, match="some.txt names .*none.png, which does not exist"):
        datasets.load(str(listing))


def test_fingerprint_is_of_the_names_below_the_folder(picture_folder, tmp_path):
    before = datasets.load(str(picture_folder)).pretrain.fingerprint()
    moved = picture_folder.rename(tmp_path / "moved")
    assert datasets.load(str(moved)).pretrain.fingerprint() == before
    (moved / "train" / "dark" / "0.png").rename(moved / "train" / "dark" / "00.png")
    assert datasets.load(str(moved)).pretrain.fingerprint() != before


def test_links_are_followed_once(picture_folder):
    (picture_folder / "train" / "loop").symlink_to(picture_folder / "train")
    assert len(image_io.find_images(picture_folder / "train")) == 24


def test_names_that_begin_with_a_dot_are_left_out(picture_folder):
    hidden = picture_folder / "train" / ".checkpoints"
    hidden.mkdir()
    for path in (hidden / "0.png", picture_folder / "train" / "dark" / "._0.png"):
        path.write_bytes((picture_folder / "train" / "dark" / "0.png").read_bytes())
    source = datasets.load(str(picture_folder))
    assert len(source.pretrain) == 24 and source.classes == 2
    assert len(image_io.find_images(hidden)) == 1  # asked for by name


def test_a_path_of_no_name_is_not_this_folder():
    with pytest.raises(ValueError, match="no data at an empty path: give a folder"):
        datasets.load("")


def test_nothing_to_read_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images under .*; looked for .jpg"):
        image_io.find_images(tmp_path / "empty")
    (tmp_path / "image.png").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="image.png is not a text file"):
        datasets.load(str(tmp_path / "image.png"))
    with pytest.raises(
        distributed.UserError,
        match="no data at nowhere: give a folder.* demo, demo_scenes, cifar10",
    ):
        datasets.load("nowhere")
    with pytest.raises(ValueError, match="cifar10 under .*not found; add --download"):
        datasets.load("cifar10", root=str(tmp_path))


# --------------------------------------------------------------------------------------------------
# torchvision's data sets
# --------------------------------------------------------------------------------------------------


class FakeSet:
    """As torchvision's CIFAR10 and STL10, each in its layout; red is the image's number."""

    def __init__(self, root, download=False, train=None, split=None):
        count = 6 if train or split == "unlabeled" else 4
        shape = (count, 3, 96, 96) if split else (count, 32, 32, 3)
        self.classes = ["cat", "dog"]
        self.data = np.broadcast_to(
            np.arange(count, dtype=np.uint8)[:, None, None, None], shape
        ).copy()
        green, blue = (self.data[:, c] if split else self.data[..., c] for c in (1, 2))  # (N, H, W)
        green[:], blue[:] = 200, np.arange(blue.shape[1])[:, None]  # the row
        if split:
            self.labels = np.full(count, -1) if split == "unlabeled" else np.arange(count)
        else:
            self.targets = list(range(count))


@pytest.mark.parametrize(
    "name, side, train_labels", [("cifar10", 32, range(6)), ("stl10", 96, range(4))]
)
def test_torchvisions_sets(name, side, train_labels, monkeypatch):
    monkeypatch.setattr(datasets.torchvision_datasets, name.upper(), FakeSet)
    source = datasets.load(name)
    assert source.train.labels.tolist() == list(train_labels)
    assert source.test.labels.tolist() == list(range(4))
    assert source.names == ["cat", "dog"] and source.notes == []
    assert len(source.pretrain) == 6 and source.pretrain.images.shape[1:] == (3, side, side)
    assert source.pretrain.images[:, :, 5, 7].tolist() == [[i, 200, 5] for i in range(6)]

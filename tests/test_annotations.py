"""Readers of pictures with boxes, against files written by hand."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lowdino import annotations, demo
from lowdino.annotations import UserError, load
from lowdino.image_io import PixelFormat, read_image

# ---------------------------------------------------------------------------------------------
# COCO's form
# ---------------------------------------------------------------------------------------------


def content():
    """Two pictures of 40 x 30, the second empty, and two categories."""
    images = [
        {"id": 7, "file_name": "a.png", "height": 30, "width": 40},
        {"id": 3, "file_name": "sub/b.jpg", "height": 30, "width": 40},
    ]
    rows = [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 2, 10, 10]},
        {"id": 2, "image_id": 7, "category_id": 18, "bbox": [30.5, 20, 5, 4.5]},
        {"id": 3, "image_id": 7, "category_id": 18, "bbox": [0, 0, 40, 30], "iscrowd": 1},
    ]
    categories = [{"id": 90, "name": "cat"}, {"id": 18, "name": "dog"}]
    return {"images": images, "annotations": rows, "categories": categories}


def write(folder, train=None, val=None, names=("instances_train", "instances_val")):
    """A small folder in COCO's form, with JSON of `content` or as given."""
    (folder / "annotations").mkdir(parents=True)
    for name, coco in zip(names, (train, val)):
        pictures = folder / name.removeprefix("instances_")
        (pictures / "sub").mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(pictures / "a.png")
        Image.new("RGB", (40, 30), "blue").save(pictures / "sub/b.jpg")
        coco = content() if coco is None else coco
        text = coco if isinstance(coco, str) else json.dumps(coco)
        (folder / f"annotations/{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "names", [("instances_train2017", "instances_val2017"), ("instances_train", "val")]
)
def test_coco(tmp_path, names):
    source = load(str(write(tmp_path, names=names)))
    assert source.names == ["dog", "cat"]  # by their ids, 18 and 90
    assert source.notes == []
    for part in (source.train, source.test):
        assert len(part) == 2 and part.sizes == [(30, 40)] * 2
        image, target = part[0]
        assert image.shape == (3, 30, 40) and image.dtype == torch.uint8
        assert image[:, 5, 5].tolist() == [255, 0, 0]
        assert target["boxes"].tolist() == [[2, 2, 12, 12], [30.5, 20, 35.5, 24.5], [0, 0, 40, 30]]
        assert target["labels"].tolist() == [2, 1, 1]
        assert target["crowd"].tolist() == [False, False, True]
        # An image without boxes is kept.
        image, target = part[1]
        assert image[2, 0, 0] > 200
        shapes = {name: list(value.shape) for name, value in target.items()}
        assert shapes == {"boxes": [0, 4], "labels": [0], "crowd": [0]}
        assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64


def test_files_beside_the_folders(tmp_path):
    write(tmp_path, names=("train", "val"))
    for name in ("train.json", "val.json"):
        (tmp_path / "annotations" / name).rename(tmp_path / name)
    (tmp_path / "annotations").rmdir()
    assert len(load(str(tmp_path)).train) == 2


def test_boxes_that_leave_their_picture_are_cut(tmp_path):
    coco = content()
    coco["annotations"][0]["bbox"] = [-5, 20, 10, 1e200]
    coco["annotations"][1]["bbox"] = [40, 5, 5, 5]  # outside
    coco["annotations"][2] |= {"bbox": [5, 5, 0, 3], "iscrowd": 0}  # of no area
    source = load(str(write(tmp_path, coco)))
    target = source.train[0][1]
    assert target["boxes"].tolist() == [[0, 20, 5, 30]]
    assert target["labels"].tolist() == [2] and target["crowd"].tolist() == [False]
    file = tmp_path / "annotations/instances_train.json"
    assert source.notes == [
        f"{file}: 1 boxes reach beyond their pictures and are cut, 2 have no area inside theirs "
        "and are left out"
    ]


def change(*path, to):
    """A function that sets one value deep in the JSON."""

    def apply(coco):
        *way, last = path
        for key in way:
            coco = coco[key]
        coco[last] = to

    return apply


ROW = ("annotations", 0)
WRONG = {
    "category 18 twice": (change("categories", 0, "id", to=18), '"categories" has id 18 twice'),
    "image twice": (change("images", 0, "id", to=3), '"images" has id 3 twice'),
    "annotation twice": (change(*ROW, "id", to=2), '"annotations" has id 2 twice'),
    "no id": (change(*ROW, to=[1]), 'row 0 of "annotations" is no object with an id'),
    "unknown category": (
        change(*ROW, "category_id", to=19),
        "annotation 1 has category_id 19, none of 2 listed",
    ),
    "category that is a list": (change(*ROW, "category_id", to=[18]), r"has category_id \[18\]"),
    "unknown image": (change(*ROW, "image_id", to=8), "annotation 1 has image_id 8, none of 2"),
    "category without a name": (
        change("categories", 0, "name", to=3),
        "category 90 needs an integer",
    ),
    "category with a name as id": (change("categories", 0, "id", to="x"), "category 'x' needs a"),
    "no list": (change("annotations", to={}), 'it lacks a list "annotations"'),
    "no images": (change("images", to=[]), "it has no images"),
    "no categories": (change("categories", to=[]), "it has no categories"),
    "no file name": (change("images", 0, "file_name", to=None), "image 7 has no file_name"),
    "no such file": (change("images", 0, "file_name", to="c.png"), "names .*c.png, which does not"),
    "another size": (
        change("images", 0, "width", to=41),
        r"train/a.png should be 41 x 30 pixels and is 40 x 30; its boxes would lie elsewhere",
    ),
    "short box": (
        change(*ROW, "bbox", to=[1, 2, 3]),
        r"the bbox of annotation 1 is \[1, 2, 3\], not \[left, top, width, height\]",
    ),
    "box that is no numbers": (change(*ROW, "bbox", to=[1, 2, 3, float("nan")]), "bbox of annot"),
    "box beyond all numbers": (change(*ROW, "bbox", to=[1, 2, 3, 10**400]), "bbox of annotation 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_json(tmp_path, case):
    spoil, sentence = WRONG[case]
    coco = content()
    spoil(coco)
    with pytest.raises(UserError, match=sentence) as error:
        load(str(write(tmp_path, coco)))
    assert str(error.value).startswith(str(tmp_path / "annotations/instances_train.json"))


@pytest.mark.parametrize("text", ['{"images": [', "", "\x00\xff", "[" * 100000, "[]", "3"])
def test_damaged_json(tmp_path, text):
    wanted = "it holds a (list|int); COCO's form" if text in "[]3" and text else "it is damaged, or"
    with pytest.raises(UserError, match=f"instances_train.json: {wanted}"):
        load(str(write(tmp_path, text)))


def test_splits_must_agree(tmp_path):
    coco = content()
    coco["categories"][0]["name"] = "cow"
    message = "instances_val.json: category 90 is 'cow' here, and 'cat' in the training file"
    with pytest.raises(UserError, match=message):
        load(str(write(tmp_path, val=coco)))


def test_test_split_may_lack_a_category(tmp_path):
    coco = content()
    del coco["categories"][1], coco["annotations"][1:]
    source = load(str(write(tmp_path, val=coco)))
    assert source.test[0][1]["labels"].tolist() == [2]


def test_no_box_at_all(tmp_path):
    coco = content()
    del coco["annotations"][:2]  # a crowd alone is left
    with pytest.raises(UserError, match="instances_val.json has no box of an object that"):
        load(str(write(tmp_path, val=coco)))


def test_damaged_picture(tmp_path):
    write(tmp_path)
    (tmp_path / "train/a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read image .*train/a\.png"):
        load(str(tmp_path))


def test_pictures_are_upright(tmp_path):
    """EXIF turns the picture, and the file's own sides are the other way round."""
    write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 40), "blue").save(tmp_path / "train/sub/b.jpg", exif=exif)
    assert load(str(tmp_path)).train[1][0].shape == (3, 30, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("end", ["jpg", "png", "tif"])
def test_sizes_from_headers_are_those_of_the_pictures_read(tmp_path, end, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"turned.{end}")
    Image.new("RGB", (30, 40), "blue").save(path, exif=exif)
    assert annotations.upright_size(path, PixelFormat()) == read_image(path).shape[1:]


def test_pictures_that_are_arrays(tmp_path):
    write(tmp_path)
    values = np.random.default_rng(0).integers(0, 256, (5, 30, 40), dtype=np.uint8)
    for split, array in (("train", values), ("val", values.transpose(1, 2, 0))):
        np.save(tmp_path / f"{split}/a.npy", array)
        coco = content()
        coco["images"] = [coco["images"][0] | {"file_name": "a.npy"}]
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(coco))
    source = load(str(tmp_path), pixels=PixelFormat(channels=5))
    for part in (source.train, source.test):
        assert part.sizes == [(30, 40)]
        np.testing.assert_array_equal(part[0][0], values)
    file = re.escape(str(tmp_path / "train/a.npy"))
    with pytest.raises(UserError, match=f"cannot read image {file}: its shape .* no axis of 3"):
        load(str(tmp_path))
    with pytest.raises(UserError, match=f"{file}: 40 x 30 pixels are more than --max_megapixels"):
        load(str(tmp_path), pixels=PixelFormat(5, max_megapixels=0.001))


@pytest.mark.parametrize("missing", ["annotations/instances_val.json", "val"])
def test_what_was_looked_for(tmp_path, missing):
    write(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    message = r"lacks val pictures in COCO's form: looked for annotations/instances_val\*.json"
    with pytest.raises(UserError, match=message):
        load(str(tmp_path))


def test_no_source(tmp_path):
    for name in ("", str(tmp_path / "nowhere"), "cifar10", "voc2007"):
        with pytest.raises(UserError, match="no pictures with boxes at .*give a folder in COCO's"):
            load(name)


# ---------------------------------------------------------------------------------------------
# Demo scenes
# ---------------------------------------------------------------------------------------------


def test_demo_scenes(monkeypatch):
    monkeypatch.setattr(demo, "SCENE_TRAIN", 5)
    monkeypatch.setattr(demo, "SCENE_TEST", 3)
    source = load("demo_scenes")
    assert (len(source.train), len(source.test), len(source.names)) == (5, 3, 10)
    images, targets = demo.demo_scenes([demo.TEST_START + 1])
    image, target = source.test[1]
    assert (image == images[0]).all() and source.test.sizes[1] == (96, 96)
    assert set(target) == {"boxes", "labels", "crowd"}
    for name in ("boxes", "labels"):
        assert (target[name] == targets[0][name]).all()
    assert not target["crowd"].any() and len(target["crowd"]) == len(target["labels"])

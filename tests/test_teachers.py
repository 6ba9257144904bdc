"""Frozen teachers: what they see, the cache of their features, and those that do not fit."""

import json

import numpy as np
import pytest
import torch
from runs import is_one_sentence, options
from teaching import Counted, batch_of_demo, distill_method, save_teacher, student

from lowdino import augment, demo, distillation, features
from lowdino.distributed import UserError

IMAGENET = augment.IMAGENET_MEAN, augment.IMAGENET_STD


def test_a_teacher_sees_views_in_its_own_size_and_normalisation():
    network = Counted()
    network.mean, network.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    method = distill_method(network, "--teacher_size 64 --local_crops_number 1")
    ramp = torch.linspace(0.2, 0.8, 32).expand(4, 3, 32, 32)
    values = [ramp, ramp.transpose(2, 3), torch.rand(4, 3, 32, 32)]  # in [0, 1]
    views = [augment.normalize(x, *IMAGENET) for x in values]
    targets = method.teacher.targets(views, torch.arange(4), method.backbone)
    boxes = torch.tensor([[0, 0, 32, 32]]).expand(4, -1)
    larger = [augment.resized_crop(x, boxes, 64) for x in values[:2]]  # within [0, 1] too
    one, two = (network(augment.normalize(x, network.mean, network.std)) for x in larger)
    # For a local view the mean of both.
    expected = torch.cat([one, two, (one + two) / 2])
    torch.testing.assert_close(targets, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("number", [1, 3])
def test_a_teacher_sees_the_global_views_however_many(number, monkeypatch):
    network, batch = Counted(), batch_of_demo(range(4))
    method = distill_method(network, f"--global_crops_number {number} --local_crops_number 2")
    views = [torch.randn(4, 3, 32, 32) for _ in range(number + 2)]
    seen = [network(view) for view in views[:number]]
    expected = torch.cat([*seen, *[sum(seen) / number] * 2])
    targets = []
    monkeypatch.setattr(method, "term", lambda name, s, t, *others: targets.append(t) or s.sum())
    before = network.seen
    method(views, batch)
    assert network.seen == before + 4 * number
    torch.testing.assert_close(targets[0], expected)


def test_a_students_own_normalisation_is_undone_for_its_teacher():
    network = Counted()
    method = distill_method(network)
    method.backbone.mean, method.backbone.std = (0.0,) * 3, (1.0,) * 3
    x = torch.rand(4, 3, 32, 32)
    expected = network(augment.normalize(x, *IMAGENET))
    torch.testing.assert_close(method.teacher(x, method.backbone), expected)


# --------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------


def test_a_cached_teacher_never_runs_again(tmp_path):
    network, cache = Counted(), tmp_path / "cache.npy"
    views, batch = [torch.randn(4, 3, 32, 32) for _ in range(2)], batch_of_demo([7, 3, 39, 0])
    live = distill_method(network)
    seen = network.seen
    live(views, batch)
    assert network.seen == seen + 8
    targets = live.teacher.targets(views, batch.indices, live.backbone)
    torch.testing.assert_close(targets, torch.cat([network(view) for view in views]))

    before = distillation.fingerprint(network)
    cached = distill_method(network, cache_teacher=cache)
    file = np.load(cache)
    assert file.dtype == np.float16 and file.shape == (40, 24)
    view = augment.central_view(demo.demo_images([3])[0], torch.tensor([[64, 64]]), 32, *IMAGENET)
    np.testing.assert_allclose(file[3], network(view)[0].detach(), atol=1e-3)
    seen = network.seen
    cached(views, batch).backward()
    again = distill_method(network, cache_teacher=cache)  # a later student
    # It is run for its width, and on the first images to compare them with the file.
    assert network.seen == seen + 1 + 8
    rows = torch.from_numpy(file[[7, 3, 39, 0]]).float()
    targets = again.teacher.targets(views, batch.indices, again.backbone)
    assert torch.equal(targets, torch.cat([rows, rows]))
    assert distillation.fingerprint(network) == before
    assert all(p.grad is None for p in network.parameters())


def test_a_cache_serves_with_a_classifier_and_without(tmp_path):
    """It holds what the backbone gives; bench_papers.py shares one among all objectives."""
    classifier = {"weight": torch.randn(10, 320), "bias": torch.randn(10)}
    path, cache = save_teacher(tmp_path / "t.pth", classifier=classifier), tmp_path / "cache.npy"
    without = distill_method(None, teacher=path, cache_teacher=cache)
    kd = "--objective kd --teacher_head file"
    with_one = distill_method(None, kd, teacher=path, cache_teacher=cache)
    assert np.array_equal(without.teacher.features, with_one.teacher.features)
    # A run that is resumed needs the same classifier all the same.
    assert without.teacher.fingerprint != with_one.teacher.fingerprint


@pytest.mark.slow
def test_a_cache_has_no_features_of_substitutes(picture_folder, tmp_path, call_script):
    (picture_folder / "train" / "dark" / "5.png").write_text("not a picture")
    flags = student(
        "--max_bad_fraction 0.2",
        teacher=save_teacher(tmp_path / "teacher.pth"),
        data_path=picture_folder,
        cache_teacher=tmp_path / "cache.npy",
        output_dir=tmp_path / "out",
    )
    done = call_script("distill.py", *flags, check=False)
    assert is_one_sentence(done, r"cannot read image \S+/dark/5.png")


def test_a_stopped_cache_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 16)
    cache, notes = tmp_path / "cache.npy", tmp_path / "cache.npy.json"
    distill_method(Counted(), cache_teacher=cache)
    complete = np.load(cache)
    values = json.loads(notes.read_text())
    notes.write_text(json.dumps(values | {"done": 16}))
    half = np.lib.format.open_memmap(cache, "r+")
    half[16:] = 0
    half.flush()
    network = Counted()
    distill_method(network, cache_teacher=cache)
    assert network.seen == 24 + 1 + 8 and np.array_equal(np.load(cache), complete)


@pytest.mark.parametrize(
    "spoil, message",
    [
        ({"teacher": "0"}, "belongs to teacher 0, not "),
        ({"images": "0"}, "belongs to images 0, not "),
        ({"size": 64}, "belongs to size 64, not 32"),
    ],
)
def test_a_cache_of_something_else_is_refused(spoil, message, tmp_path):
    cache, notes = tmp_path / "cache.npy", tmp_path / "cache.npy.json"
    distill_method(Counted(), cache_teacher=cache)

    def refused(message):
        with pytest.raises(UserError, match=message):
            distill_method(Counted(), cache_teacher=cache)

    notes.write_text(json.dumps(json.loads(notes.read_text()) | spoil))
    refused(message)
    notes.write_text("{")
    refused("cache.npy is damaged: delete it and cache.npy.json")
    notes.unlink()
    refused("exists without cache.npy.json, which would say whose it is")


def test_a_damaged_or_changed_cache_is_refused(tmp_path):
    cache, notes = tmp_path / "cache.npy", tmp_path / "cache.npy.json"
    distill_method(Counted(), cache_teacher=cache)
    good, values = cache.read_bytes(), json.loads(notes.read_text())

    def refused(message, path=cache):
        with pytest.raises(UserError, match=message):
            distill_method(Counted(), cache_teacher=path)

    for content in (good[:300], b"half", b"", np.lib.format.magic(1, 0)):
        cache.write_bytes(content)
        refused("cache.npy is damaged: delete it and cache.npy.json")
    cache.write_bytes(good)
    for done in ("x", None, -3, 41):
        notes.write_text(json.dumps(values | {"done": done}))
        refused("cache.npy is damaged")
    notes.write_text(json.dumps(values))
    stored = np.load(cache)
    np.save(cache, np.full_like(stored, np.nan))
    refused("is damaged")
    np.save(cache, np.full_like(stored, 7.0))
    refused("holds other features of the first images than this teacher gives")
    (tmp_path / "file").write_text("")
    refused("--cache_teacher .*file/c.npy: folder .*: ", tmp_path / "file" / "c.npy")


# --------------------------------------------------------------------------------------------------
# A file of features
# --------------------------------------------------------------------------------------------------


def test_features_of_any_teacher_in_a_file(picture_folder, tmp_path, call_script):
    file, values = tmp_path / "features.npz", tmp_path / "features.npy"
    flags = options("--arch resnet18 --device cpu", data_path=picture_folder, features=file)
    call_script("eval_knn.py", *flags)
    np.save(values, np.load(file)["train"])
    flags = student("--knn_freq 0", data_path=picture_folder)
    similarity = options("--objective similarity", teacher=file, output_dir=tmp_path / "a")
    assert "backbone: " in call_script("distill.py", *flags, *similarity).stdout
    call_script("distill.py", *flags, *options(teacher=values, output_dir=tmp_path / "b"))


def test_a_wrong_file_of_features_is_one_sentence(picture_folder, tmp_path, call_script):
    values = np.random.default_rng(0).normal(size=(24, 512)).astype(np.float32)
    np.save(tmp_path / "fewer.npy", values[:-1])
    np.save(tmp_path / "flat.npy", values[:, 0])
    np.save(tmp_path / "nan.npy", np.full_like(values, np.nan))
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    flags = student(data_path=picture_folder, output_dir=tmp_path / "out")
    for name, message in (
        ("fewer.npy", "holds features of 23 other images than the 24"),
        ("flat.npy", r"should be \(N, D\)"),
        ("nan.npy", "not finite"),
        ("damaged.npz", "it is damaged"),
        ("none.npy", "no file"),
    ):
        done = call_script("distill.py", *flags, "--teacher", tmp_path / name, check=False)
        assert is_one_sentence(done, message), done.stderr


# --------------------------------------------------------------------------------------------------
# Teachers that do not fit
# --------------------------------------------------------------------------------------------------

MINE = """
import torch
from torch import nn

def number(): return 3
def maps(): return nn.Conv2d(3, 4, 8)
def fussy(): return nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
"""


def classifier(classes, features):
    return {"weight": torch.zeros(classes, features), "bias": torch.zeros(classes)}


def test_wrong_teachers_are_one_sentence(picture_folder, tmp_path, call_script):
    def at(name):
        return tmp_path / name

    at("damaged.pth").write_bytes(b"half")
    torch.save({"fc.weight": torch.zeros(3, 4)}, at("plain.pth"))
    good = save_teacher(at("teacher.pth"))
    unfit = save_teacher(at("unfit.pth"), classifier=classifier(2, 5))
    three = save_teacher(at("three.pth"), classifier=classifier(3, 320))
    at("mine.py").write_text(MINE)
    flags = student(data_path=picture_folder, output_dir=at("out"))
    file = "--objective kd --teacher_head file"
    for teacher, more, message in (
        (at("none.pth"), "", "no file"),
        (at("damaged.pth"), "", "it is damaged"),
        (at("plain.pth"), "", "does not name its architecture"),
        (f"resnet18={at('plain.pth')}", "", "does not fit this architecture"),
        ("resnet18=", "", "no file ''"),
        (good, "--objective dino", "teacher's head: give a checkpoint.pth of train.py"),
        (good, file, "holds no classifier"),
        (unfit, file, "its classifier takes 5 features, its network gives 320"),
        (three, file, "its classifier knows 3 classes, folder .* has 2"),
        ("nowhere:teacher", "", "cannot import and call it: No module named 'nowhere'"),
        ("mine:other", "", "cannot import and call it"),
        ("mine:number", "", "returns a int, not a network"),
        ("mine:maps", "", r"not a tensor \(1, features\)"),
        ("mine:fussy", "", "cannot take an image of 32 x 32 pixels, see --teacher_size"),
        (at("lr=1") / "none.pth", "", "no file .*lr=1/none.pth"),
    ):
        given = [*flags, "--teacher", teacher, *more.split()]
        done = call_script("distill.py", *given, check=False, cwd=tmp_path)
        assert is_one_sentence(done, message), done.stderr


def test_labels_are_asked_for_where_there_are_none(picture_folder, tmp_path, call_script):
    teacher = save_teacher(tmp_path / "teacher.pth", classifier=classifier(2, 320))
    unlabelled = picture_folder / "train"
    flags = student(teacher=teacher, data_path=unlabelled, output_dir=tmp_path / "out")
    for more, message in (
        ("--objective kd --teacher_head train", "--teacher_head train needs labels, and folder"),
        (
            "--objective kd --teacher_head file --kd_weight 0.5",
            "--kd_weight 0.5 needs labels of folder",
        ),
    ):
        done = call_script("distill.py", *flags, *more.split(), check=False)
        assert is_one_sentence(done, message), done.stderr

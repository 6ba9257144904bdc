"""Distillation: losses against loops in float64, the script from outside, and teachers that do not fit."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import losses_on_a_batch
from torch import nn

import distill
import lowdino
from lowdino import augment, checkpoint, data, distributed
from lowdino.losses import KDLoss, SimilarityLoss, SimKDLoss

RANKS = distributed.Ranks(0, 1, torch.device("cpu"))


def softmax(row):
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def unit(row):
    length = math.sqrt(sum(value**2 for value in row))
    return [value / length for value in row]


def test_kd_is_the_softened_divergence():
    s, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    loss = KDLoss(temperature=2.5)(s, t)
    by_hand = 0.0
    for a, b in zip(s.tolist(), t.tolist()):
        p_s, p_t = softmax([v / 2.5 for v in a]), softmax([v / 2.5 for v in b])
        by_hand += 2.5**2 * sum(q * math.log(q / p) for p, q in zip(p_s, p_t)) / 5
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert s.grad.abs().sum() > 0 and t.grad is None


def test_simkd_is_the_mean_squared_difference():
    s, t = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = SimKDLoss()(s, t)
    by_hand = sum((a - b) ** 2 for x, y in zip(s.tolist(), t.tolist()) for a, b in zip(x, y)) / 24
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert s.grad.abs().sum() > 0 and t.grad is None


def test_similarity_looks_at_the_batch_and_the_last_images():
    loss, history = SimilarityLoss(dim=6, queue_size=5, student_temp=0.2, teacher_temp=0.1), []
    for _ in range(4):  # the queue is empty, half full, full, full
        s, t = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
        value = loss(s, t)
        batch = [unit(row) for row in t.tolist()]
        anchors = batch + history[:5]
        history = batch + history
        torch.testing.assert_close(
            SimilarityLoss(6, 0)(torch.cat([s, s]), t), SimilarityLoss(6, 0)(s, t)
        )  # two views of each
        by_hand = 0.0
        for a, b in zip(s.tolist(), t.tolist()):
            p_s = softmax([sum(x * y for x, y in zip(unit(a), q)) / 0.2 for q in anchors])
            p_t = softmax([sum(x * y for x, y in zip(unit(b), q)) / 0.1 for q in anchors])
            by_hand -= sum(q * math.log(p) for p, q in zip(p_s, p_t)) / 3
        assert value.item() == pytest.approx(by_hand, rel=1e-5)
        value.backward()
        assert s.grad.isfinite().all() and s.grad.abs().sum() > 0 and t.grad is None
    loss.eval()
    before = loss.queue.clone()
    loss(torch.randn(3, 6), torch.randn(3, 6))
    assert torch.equal(loss.queue, before)  # evaluation leaves no trace


def save_teacher(path, arch="mobilevit_xxs", **more):
    torch.manual_seed(3)
    backbone = lowdino.build_backbone(arch)
    checkpoint.save_backbone(
        path, backbone, arch, augment.IMAGENET_MEAN, augment.IMAGENET_STD, 32, 1, **more
    )
    return path


SMALL = [
    "--arch",
    "mobilevit_xxs",
    "--batch_size_per_gpu",
    8,
    "--epochs",
    2,
    "--warmup_epochs",
    1,
    "--device",
    "cpu",
    "--log_freq",
    2,
    "--global_crops_size",
    32,
    "--knn_freq",
    1,
]


@pytest.mark.parametrize(
    "flags, said",
    [
        pytest.param(["--objective", "kd"], None, marks=pytest.mark.slow),
        (["--objective", "kd", "--match", "pool", "--local_crops_number", 1], None),
        pytest.param(
            ["--objective", "mvmr", "kd", "--projector", 32, 16, "--local_crops_number", 1],
            None,
            marks=pytest.mark.slow,
        ),
        (
            [
                "--objective",
                "kd",
                "simkd",
                "similarity",
                "--objective_weight",
                1,
                2,
                0.5,
                "--teacher_head",
                "train",
                "--alpha",
                0.5,
            ],
            "on the student's through simkd's projector",
        ),
    ],
)
def test_objectives_alone_and_together(flags, said, picture_folder, tmp_path, call_script):
    teacher = save_teacher(tmp_path / "teacher.pth")
    done = call_script(
        "distill.py",
        "--teacher",
        teacher,
        *SMALL,
        *flags,
        "--data_path",
        picture_folder,
        "--output_dir",
        tmp_path / "out",
    )
    numbers = re.search(
        r"k-NN \(k=20\) accuracy: (\d.\d+) after 2 epochs, (\d.\d+) before the first, of the teacher (\d.\d+)",
        done.stdout,
    )
    assert numbers and "k-NN (k=20) of the student " in done.stdout
    assert ("the teacher's classifier: 1.0000 on its features" in done.stdout) == bool(said) and (
        said or ""
    ) in done.stdout
    losses = [
        json.loads(line)
        for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    if said:  # the second line is of one step, the third
        one = losses[1]
        assert one["loss"] == pytest.approx(
            one["kd"] + 2 * one["simkd"] + 0.5 * one["similarity"], rel=1e-5
        )
    assert len(losses) == 4
    assert lowdino.load_backbone(str(tmp_path / "out" / "backbone.pth")).arch == "mobilevit_xxs"


@pytest.mark.parametrize(
    "arch, use_bn", [("mobilevit_xxs", "true"), ("vit_tiny", "false")]
)  # the latter has no buffers
def test_dino_objective_takes_the_head_of_a_run(
    arch, use_bn, picture_folder, tmp_path, call_script
):
    call_script(
        "train.py",
        "--arch",
        "mobilevit_xxs",
        "--batch_size_per_gpu",
        8,
        "--epochs",
        1,
        "--warmup_epochs",
        0,
        "--out_dim",
        16,
        "--hidden_dim",
        32,
        "--global_crops_size",
        32,
        "--local_crops_number",
        0,
        "--device",
        "cpu",
        "--use_bn_in_head",
        use_bn,
        "--norm_last_layer",
        "false",
        "--data_path",
        picture_folder,
        "--output_dir",
        tmp_path / "run",
    )
    teacher = tmp_path / "run" / "checkpoint.pth"
    done = call_script(
        "distill.py",
        "--teacher",
        teacher,
        *SMALL,
        "--arch",
        arch,
        "--objective",
        "dino",
        "--local_crops_number",
        1,
        "--data_path",
        picture_folder,
        "--output_dir",
        tmp_path / "out",
    )
    assert "of the student's average" in done.stdout and "of the teacher" in done.stdout
    kept = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    saved = lowdino.load_backbone(str(tmp_path / "out" / "backbone.pth")).state_dict()
    assert all(
        torch.equal(value, kept["average"][f"backbone.{name}"]) for name, value in saved.items()
    )
    assert not any(
        torch.equal(kept["average"][name], value)
        for name, value in kept["student"].items()
        if value.ndim > 1
    )
    assert all(
        kept["average"][f"backbone.{name}"].abs().sum() > 0
        for name in saved
        if name.endswith("running_mean")
    )
    # Another script's folder is refused.
    done = call_script(
        "distill.py",
        "--teacher",
        teacher,
        *SMALL,
        "--data_path",
        picture_folder,
        "--output_dir",
        tmp_path / "run",
        check=False,
    )
    assert (
        done.returncode == 2 and "holds a run with" in done.stderr and done.stderr.count("\n") == 1
    )


class Counted(nn.Module):
    """A network that counts the images that it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.seen = nn.Conv2d(3, 24, 8, 8), 0

    def forward(self, x):
        self.seen += len(x)
        return self.conv(x).mean(dim=(2, 3))


def method_and_views(tmp_path, flags, teacher, monkeypatch):
    monkeypatch.setattr(distill, "imported", lambda path: teacher)
    args = distill.train.parse(
        distill.get_parser(),
        skip=distill.SKIPPED,
        argv=["--teacher", "some:teacher", *map(str, SMALL), "--knn_freq", "0", *flags],
    )
    assert distill.check(args) is None
    images = data.demo_images(range(40))
    source = data.Data("some", images, images, data.demo_images(range(50, 60)), 10)
    args.num_workers = 0
    return distill.Distillation(args, RANKS, source, total_steps=10)


@pytest.mark.parametrize("objective", ["kd", "simkd", "similarity", "mvmr"])
def test_an_objective_is_learned_on_a_batch(objective, tmp_path, monkeypatch):
    torch.manual_seed(0)
    method = method_and_views(
        tmp_path, ["--objective", objective, "--queue_size", "0"], Counted(), monkeypatch
    )
    images = data.demo_images(range(16)).images
    batch = data.Batch(images, torch.full((16, 2), 64), torch.arange(16), torch.arange(16))
    views = [images[:, :, :32, :32] / 128.0 - 1, images[:, :, 32:, 32:] / 128.0 - 1]
    losses = losses_on_a_batch(method, views, batch)
    floor = 0.0
    if objective == "similarity":  # a cross-entropy's least value is the entropy of its target
        t = torch.nn.functional.normalize(method.targets(views, batch.indices), dim=1)
        floor = torch.special.entr((t @ t.T / 0.01).softmax(dim=1)).sum(dim=1).mean().item()
    assert losses[-1] - floor < 0.7 * (losses[0] - floor), losses


def test_a_cached_teacher_never_runs_again(tmp_path, monkeypatch):
    teacher, cache = Counted(), tmp_path / "cache.npy"
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    indices = torch.tensor([7, 3, 39, 0])
    batch = data.Batch(
        data.demo_images(indices.numpy()).images, torch.full((4, 2), 64), torch.arange(4), indices
    )
    live = method_and_views(tmp_path, [], teacher, monkeypatch)
    seen = teacher.seen
    live.objective(live.network, views, batch, 0, False)
    assert teacher.seen == seen + 8
    torch.testing.assert_close(
        live.targets(views, indices), torch.cat([teacher(view) for view in views])
    )

    before = distill.fingerprint(teacher)
    flags = ["--cache_teacher", str(cache)]
    cached = method_and_views(tmp_path, flags, teacher, monkeypatch)
    file = np.load(cache)
    assert file.dtype == np.float16 and file.shape == (40, 24)
    images = data.demo_images([3]).images
    own = augment.central_view(
        images, torch.tensor([[64, 64]]), 32, augment.IMAGENET_MEAN, augment.IMAGENET_STD
    )
    np.testing.assert_allclose(file[3], teacher(own)[0].detach(), atol=1e-3)
    seen = teacher.seen
    loss, _ = cached.objective(cached.network, views, batch, 0, False)
    loss.backward()
    again = method_and_views(tmp_path, flags, teacher, monkeypatch)  # a later student
    assert teacher.seen == seen + 1 + 8  # its width, and the first images to compare with the file
    rows = torch.from_numpy(file[[7, 3, 39, 0]]).float()
    assert torch.equal(again.targets(views, indices), torch.cat([rows, rows]))
    assert distill.fingerprint(teacher) == before and all(
        p.grad is None for p in teacher.parameters()
    )


def test_a_teacher_sees_views_in_its_own_size_and_normalisation(tmp_path, monkeypatch):
    teacher = Counted()
    teacher.mean, teacher.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    method = method_and_views(
        tmp_path, ["--teacher_size", "64", "--local_crops_number", "1"], teacher, monkeypatch
    )
    ramp = torch.linspace(0.2, 0.8, 32).expand(4, 3, 32, 32)
    values = [ramp, ramp.transpose(2, 3), torch.rand(4, 3, 32, 32)]  # in [0, 1]
    targets = method.targets(
        [augment.normalize(x, augment.IMAGENET_MEAN, augment.IMAGENET_STD) for x in values],
        torch.arange(4),
    )
    larger = [
        augment.resized_crop(x, torch.tensor([[0, 0, 32, 32]]).expand(4, -1), 64)
        for x in values[:2]
    ]  # within [0, 1] too
    one, two = (teacher(augment.normalize(x, teacher.mean, teacher.std)) for x in larger)
    torch.testing.assert_close(
        targets, torch.cat([one, two, (one + two) / 2]), atol=1e-3, rtol=1e-3
    )  # a local view: the mean of both


def test_kd_follows_the_classifier_in_the_teachers_file(tmp_path, monkeypatch):
    weight, bias = torch.randn(10, 320), torch.randn(10)
    path = save_teacher(tmp_path / "teacher.pth", classifier={"weight": weight, "bias": bias})
    flags = [
        "--teacher",
        str(path),
        "--teacher_head",
        "file",
        "--temperature",
        "2",
        "--alpha",
        "0.7",
    ]
    method = method_and_views(tmp_path, flags, None, monkeypatch)
    answers, features, labels = torch.randn(6, 10), torch.randn(6, 320), torch.arange(6)
    by_hand = 0.0
    for s, t, label in zip(
        answers.tolist(), (features @ weight.T + bias).tolist(), labels.tolist()
    ):
        p_s, p_t = softmax([v / 2 for v in s]), softmax([v / 2 for v in t])
        by_hand += (
            0.7 * 4 * sum(q * math.log(q / p) for p, q in zip(p_s, p_t)) / 6
            - 0.3 * math.log(softmax(s)[label]) / 6
        )
    assert method.kd_term(answers, features, labels).item() == pytest.approx(by_hand, rel=1e-4)


def test_a_cache_has_no_features_of_substitutes(picture_folder, tmp_path, call_script):
    (picture_folder / "train" / "dark" / "5.png").write_text("not a picture")
    done = call_script(
        "distill.py",
        "--teacher",
        save_teacher(tmp_path / "teacher.pth"),
        *SMALL,
        "--data_path",
        picture_folder,
        "--max_bad_fraction",
        0.2,
        "--cache_teacher",
        tmp_path / "cache.npy",
        "--output_dir",
        tmp_path / "out",
        check=False,
    )
    assert done.returncode == 2 and re.search(r"cannot read image \S+/dark/5.png", done.stderr)


def test_a_stopped_cache_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK", 16)
    flags, cache = ["--cache_teacher", str(tmp_path / "cache.npy")], tmp_path / "cache.npy"
    method_and_views(tmp_path, flags, Counted(), monkeypatch)
    whole, notes = np.load(cache), tmp_path / "cache.npy.json"
    values = json.loads(notes.read_text())
    notes.write_text(json.dumps(values | {"done": 16}))
    half = np.lib.format.open_memmap(cache, "r+")
    half[16:] = 0
    half.flush()
    teacher = Counted()
    method_and_views(tmp_path, flags, teacher, monkeypatch)
    assert teacher.seen == 24 + 1 + 8 and np.array_equal(np.load(cache), whole)


@pytest.mark.parametrize(
    "spoil, message",
    [
        ({"teacher": "0"}, "belongs to other weights"),
        ({"images": "0"}, "belongs to other images"),
        ({"size": 64}, "belongs to other sizes"),
    ],
)
def test_a_cache_of_something_else_is_refused(spoil, message, tmp_path, monkeypatch):
    flags = ["--cache_teacher", str(tmp_path / "cache.npy")]
    method_and_views(tmp_path, flags, Counted(), monkeypatch)
    notes = tmp_path / "cache.npy.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | spoil))
    with pytest.raises(ValueError, match=message):
        method_and_views(tmp_path, flags, Counted(), monkeypatch)
    notes.write_text("{")
    with pytest.raises(ValueError, match="cache.npy is damaged: delete it and cache.npy.json"):
        method_and_views(tmp_path, flags, Counted(), monkeypatch)
    notes.unlink()
    with pytest.raises(
        ValueError, match="exists without cache.npy.json, which would say whose it is"
    ):
        method_and_views(tmp_path, flags, Counted(), monkeypatch)


def test_a_damaged_or_changed_cache_is_refused(tmp_path, monkeypatch):
    cache, notes = tmp_path / "cache.npy", tmp_path / "cache.npy.json"
    flags = ["--cache_teacher", str(cache)]
    method_and_views(tmp_path, flags, Counted(), monkeypatch)
    good, values = cache.read_bytes(), json.loads(notes.read_text())
    for content in (good[:300], b"half", b"", np.lib.format.magic(1, 0)):
        cache.write_bytes(content)
        with pytest.raises(ValueError, match="cache.npy is damaged: delete it and cache.npy.json"):
            method_and_views(tmp_path, flags, Counted(), monkeypatch)
    cache.write_bytes(good)
    for done in ("x", None, -3, 41):
        notes.write_text(json.dumps(values | {"done": done}))
        with pytest.raises(ValueError, match="cache.npy is damaged"):
            method_and_views(tmp_path, flags, Counted(), monkeypatch)
    notes.write_text(json.dumps(values))
    spoilt = np.load(cache)
    for rows, message in (
        (np.nan, "is damaged"),
        (7.0, "holds other features of the first images than this teacher gives"),
    ):
        np.save(cache, np.full_like(spoilt, rows))
        with pytest.raises(ValueError, match=message):
            method_and_views(tmp_path, flags, Counted(), monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--cache_teacher .*file/c.npy: folder .*: "):
        method_and_views(
            tmp_path, ["--cache_teacher", str(tmp_path / "file" / "c.npy")], Counted(), monkeypatch
        )


def test_heads_stand_in_one_order(tmp_path, monkeypatch):
    for objectives in (["simkd", "similarity"], ["similarity", "simkd"]):
        method = method_and_views(tmp_path, ["--objective", *objectives], Counted(), monkeypatch)
        assert list(method.network.heads) == ["simkd", "similarity"]


def test_a_stopped_distillation_goes_on_to_the_same_end(
    picture_folder, tmp_path, call_script, stopped_after_a_checkpoint
):
    teacher = save_teacher(tmp_path / "teacher.pth")
    flags = [
        "--teacher",
        teacher,
        *SMALL,
        "--objective",
        "simkd",
        "similarity",
        "--queue_size",
        20,
        "--data_path",
        picture_folder,
        "--cache_teacher",
        tmp_path / "cache.npy",
    ]
    call_script("distill.py", *flags, "--output_dir", tmp_path / "whole")
    stopped_after_a_checkpoint("distill.py", *flags, "--output_dir", tmp_path / "stopped")
    done = call_script("distill.py", *flags, "--output_dir", tmp_path / "stopped")
    assert "going on from" in done.stdout
    whole, stopped = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("whole", "stopped")
    )
    for part in ("student", "loss"):
        assert all(torch.equal(value, stopped[part][name]) for name, value in whole[part].items())


@pytest.mark.slow
def test_two_ranks_distil_too(picture_folder, tmp_path, run_script):
    teacher = save_teacher(tmp_path / "teacher.pth")
    for ranks in (1, 2):
        done = run_script(
            "distill.py",
            "--teacher",
            teacher,
            *SMALL,
            "--objective",
            "kd",
            "similarity",
            "--teacher_head",
            "train",
            "--cache_teacher",
            tmp_path / f"{ranks}.npy",
            "--data_path",
            picture_folder,
            "--output_dir",
            tmp_path / f"{ranks}",
            ranks=ranks,
        )
        assert (
            done.stdout.count("the teacher's classifier: ") == 1
            and ", of the teacher " in done.stdout
        )
    one, two = (np.load(tmp_path / f"{ranks}.npy") for ranks in (1, 2))
    assert one.shape == (24, 320) and one.std() > 0
    np.testing.assert_allclose(one, two, atol=1e-3)  # each image's features in its own row


def test_features_of_any_teacher_in_a_file(picture_folder, tmp_path, call_script):
    file = tmp_path / "features.npz"
    call_script(
        "eval_knn.py",
        "--arch",
        "resnet18",
        "--data_path",
        picture_folder,
        "--features",
        file,
        "--device",
        "cpu",
    )
    flags = [*SMALL, "--data_path", picture_folder, "--knn_freq", 0]
    done = call_script(
        "distill.py",
        "--teacher",
        file,
        *flags,
        "--objective",
        "similarity",
        "--output_dir",
        tmp_path / "a",
    )
    assert "backbone: " in done.stdout
    values = np.load(file)["train"]
    np.save(tmp_path / "features.npy", values)
    call_script(
        "distill.py", "--teacher", tmp_path / "features.npy", *flags, "--output_dir", tmp_path / "b"
    )
    np.save(tmp_path / "fewer.npy", values[:-1])
    np.save(tmp_path / "flat.npy", values[:, 0])
    np.save(tmp_path / "nan.npy", np.full_like(values, np.nan))
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    for name, message in (
        ("fewer.npy", "holds features of 23 other images than the 24"),
        ("flat.npy", r"should be \(N, D\)"),
        ("nan.npy", "not finite"),
        ("damaged.npz", "it is damaged"),
        ("none.npy", "no file"),
    ):
        done = call_script(
            "distill.py",
            "--teacher",
            tmp_path / name,
            *flags,
            "--output_dir",
            tmp_path / "c",
            check=False,
        )
        assert (
            done.returncode == 2
            and re.search(message, done.stderr)
            and done.stderr.count("\n") == 1
        ), done.stderr


def test_wrong_teachers_are_one_sentence(picture_folder, tmp_path, call_script):
    (tmp_path / "damaged.pth").write_bytes(b"half")
    torch.save({"fc.weight": torch.zeros(3, 4)}, tmp_path / "plain.pth")
    good = save_teacher(tmp_path / "teacher.pth")
    wide = {"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}
    unfit = save_teacher(tmp_path / "unfit.pth", classifier=wide)
    three = save_teacher(
        tmp_path / "three.pth", classifier={"weight": torch.zeros(3, 320), "bias": torch.zeros(3)}
    )
    (tmp_path / "mine.py").write_text(
        "def number(): return 3\ndef maps(): import torch; return torch.nn.Conv2d(3, 4, 8)\n"
        "def fussy(): import torch; return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(5, 2))\n"
    )
    for teacher, flags, message in (
        (tmp_path / "none.pth", [], "no file"),
        (tmp_path / "damaged.pth", [], "it is damaged"),
        (tmp_path / "plain.pth", [], "does not say of which architecture"),
        (f"resnet18={tmp_path / 'plain.pth'}", [], "does not fit this architecture"),
        ("resnet18=", [], "no file ''"),
        (
            good,
            ["--objective", "dino"],
            "needs the teacher's head: give a checkpoint.pth of train.py",
        ),
        (good, ["--teacher_head", "file"], "holds no classifier"),
        (
            unfit,
            ["--teacher_head", "file"],
            "its classifier takes 5 features, its network gives 320",
        ),
        (three, ["--teacher_head", "file"], "its classifier knows 3 classes, folder .* has 2"),
        ("nowhere:teacher", [], "cannot import and call it: No module named 'nowhere'"),
        ("mine:other", [], "cannot import and call it"),
        ("mine:number", [], "returns a int, where a network was expected"),
        ("mine:maps", [], r"where a tensor \(1, features\) was expected"),
        ("mine:fussy", [], "cannot take an image of 32 x 32 pixels, see --teacher_size"),
        (tmp_path / "lr=1" / "none.pth", [], "no file .*lr=1/none.pth"),
    ):
        done = call_script(
            "distill.py",
            "--teacher",
            teacher,
            *SMALL,
            *flags,
            "--data_path",
            picture_folder,
            "--output_dir",
            tmp_path / "out",
            check=False,
            cwd=tmp_path,
        )
        assert (
            done.returncode == 2
            and re.search(message, done.stderr)
            and done.stderr.count("\n") == 1
        ), done.stderr


def test_labels_are_asked_for_where_there_are_none(picture_folder, tmp_path, call_script):
    teacher = save_teacher(
        tmp_path / "teacher.pth", classifier={"weight": torch.zeros(2, 320), "bias": torch.zeros(2)}
    )
    for flags, message in (
        (["--teacher_head", "train"], "--teacher_head train needs labels, and folder"),
        (["--teacher_head", "file", "--alpha", 0.5], "--alpha 0.5 needs labels, and folder"),
    ):
        done = call_script(
            "distill.py",
            "--teacher",
            teacher,
            *SMALL,
            *flags,
            "--data_path",
            picture_folder / "train",
            "--output_dir",
            tmp_path / "out",
            check=False,
        )
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--objective", "kd", "kd"], "--objective names one twice"),
        (
            ["--objective", "kd", "dino", "--objective_weight", "1"],
            "--objective_weight needs a number above 0 for each of kd dino",
        ),
        (["--alpha", "0.5"], "--alpha below 1 weighs labels"),
        (["--match", "pool", "--teacher_head", "train"], "--match pool goes with"),
        (
            ["--objective", "similarity", "--teacher_head", "train"],
            "--teacher_head is used by --objective kd and simkd",
        ),
        (
            ["--objective", "dino", "--cache_teacher", "a.npy"],
            "--objective dino needs the teacher's answers to every view",
        ),
        (["--teacher", "resnet18"], "--teacher resnet18 would have random weights"),
        (
            ["--teacher", "a.npz", "--cache_teacher", "b.npy"],
            "--cache_teacher and --teacher_size need a teacher that is a network",
        ),
        (["--cache_teacher", "b"], "--cache_teacher should end in .npy"),
        (
            ["--teacher", "a.npz", "--teacher_head", "file"],
            "--teacher_head file needs a teacher's file of weights",
        ),
        (
            ["--teacher", "a.npz", "--teacher_head", "train", "--objective", "simkd"],
            "--teacher_head train with a file of features",
        ),
        (
            ["--teacher", "a.npy", "--objective", "dino"],
            "--objective dino needs the teacher's head",
        ),
        (["--teacher_size", "3"], "--teacher_size must be at least 32"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--alpha", "2"], "--alpha must lie between 0 and 1"),
        (["--queue_size", "-1"], "--queue_size must be 0 or more"),
        (["--epochs", "0"], "--epochs must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    args = distill.train.parse(
        distill.get_parser(), skip=distill.SKIPPED, argv=["--teacher", "a.pth", *flags]
    )
    assert distill.check(args).startswith(message)


def test_presets_serve_distillation_too():
    args = distill.train.parse(
        distill.get_parser(), skip=distill.SKIPPED, argv=["--teacher", "a.pth", "--preset", "small"]
    )
    assert distill.check(args) is None
    sslight = distill.train.parse(
        distill.get_parser(),
        skip=distill.SKIPPED,
        argv=["--teacher", "a.pth", "--preset", "sslight"],
    )
    assert sslight.alpha == 1.0 and distill.check(sslight) is None
    assert (args.lr, args.epochs, args.local_crops_number, args.teacher_temp) == (
        2e-3,
        30,
        0,
        0.04,
    ) and not hasattr(args, "out_dim")

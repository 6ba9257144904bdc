"""DINO's objective and metrics, and runs that are made to fail: the health report names each."""

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image
from runs import options, train_here
from torch import nn

import lowdino
import train
from lowdino import augment, demo, engine, health, methods, settings
from lowdino.losses import InfoNCELoss, KoLeoLoss

# Small enough for 150 steps in seconds.
COMMON = (
    "--batch_size_per_gpu 8 --global_crops_size 32 --warmup_epochs 0 --epochs 3 --knn_freq 0 "
    "--device cpu --log_freq 10 --num_workers 0 --amp none"
)
SMALL = f"{COMMON} --preset small --hidden_dim 64 --out_dim 64 --lr 3e-3"
EMP = f"{COMMON} --preset emp --projector 64 64 --global_crops_number 4"


class Tiny(nn.Module):
    """A backbone of two convolutions."""

    embed_dim = 16
    mean, std = augment.IMAGENET_MEAN, augment.IMAGENET_STD

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )

    def forward(self, x):
        return self.layers(x).mean(dim=(2, 3))


def tiny_method(flags, **steps):
    args = settings.resolve(train.get_parser(), [*SMALL.split(), *flags.split()])
    return methods.DINO(Tiny(), args, **steps)


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "momentum, step, trained, moved",
    [
        (0.9, 10, True, True),
        (0.9, 10, False, False),
        (0.9, 999, False, True),
        (1.0, 999, True, False),
    ],
)
def test_a_teacher_that_does_not_move_is_seen_unless_the_schedule_holds_it(
    momentum, step, trained, moved
):
    method = tiny_method(f"--momentum_teacher {momentum}", total_steps=1000)
    method([torch.randn(8, 3, 32, 32) for _ in range(2)], step=step)
    if trained:
        with torch.no_grad():
            torch._foreach_mul_(list(method.student.parameters()), 1.01)
    before = copy.deepcopy(method.teacher)
    for _ in range(2):  # it is no matter how often it is read
        method.after_step(step)
        assert method.metrics()["teacher_moved"] == moved
    weights = zip(before.parameters(), method.teacher.parameters())
    assert any(not torch.equal(a, b) for a, b in weights) == (trained and momentum < 1)


def test_what_is_minimised_is_the_losses_by_their_weights():
    flags = (
        "--infonce_weight 0.8 --koleo_weight 0.3 --freeze_last_layer 1 --warmup_teacher_temp 0.02 "
        "--teacher_temp 0.06 --warmup_teacher_temp_epochs 3 --momentum_teacher 0.9"
    )
    method = tiny_method(flags, total_steps=900, epoch_steps=300)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    for step, fading, temperature in ((0, 1.0, 0.02), (450, 0.5, 0.04)):
        (f, e, s), (_, _, t) = method.student(views), method.teacher(views)
        expected = copy.deepcopy(method.loss)(s.chunk(2), t.chunk(2), temperature)
        loss, metrics = method(views, step=step), method.metrics()
        assert metrics["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["teacher_temp"] == pytest.approx(temperature)
        koleo = sum(KoLeoLoss()(x) for x in f.chunk(2)).item()
        others = 0.8 * fading * InfoNCELoss()(*e.chunk(2)).item() + 0.3 * koleo
        assert loss.item() - metrics["cross_entropy"] == pytest.approx(others, rel=1e-4)
    for step, frozen in ((0, True), (299, True), (300, False)):
        loss.backward(retain_graph=True)
        method.before_step(step)
        assert (method.student.head.last_layer.weight.grad is None) == frozen


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def write_images(kind, folder):
    """400 pictures: the demo's, all black, or black and grey in turn, which no augmentation
    confuses."""
    images = np.zeros((400, 32, 32, 3), dtype=np.uint8)
    if kind == "demo":
        images = demo.demo_images(range(400))[0].permute(0, 2, 3, 1).numpy()
    elif kind == "black or grey":
        images[::2] = 110
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")


def run(images, tmp_path, monkeypatch, flags, usual=SMALL):
    """A real run on one process with a tiny backbone."""
    write_images(images, tmp_path / "pictures")
    monkeypatch.setattr(health.Health, "PATIENCE", 40)
    monkeypatch.setattr(lowdino, "build_backbone", lambda arch: Tiny())
    folders = options(data_path=tmp_path / "pictures", output_dir=tmp_path / "out")
    train_here([*usual.split(), *flags.split(), *folders])


RUNS = [
    ("no sign of collapse", "demo", ""),
    # No sharpening.
    ("uniform collapse", "demo", "--teacher_temp 1 --warmup_teacher_temp 1"),
    # No centring.
    ("one-cluster collapse", "demo", "--center_momentum 1 --infonce_weight 0"),
    # Sinkhorn-Knopp keeps the teacher from one cluster, in which the loss of single steps is 0.
    (
        "diverging loss",
        "demo",
        "--lr 10 --optimizer sgd --norm_last_layer false --clip_grad 0",
    ),
    pytest.param("teacher stands still", "demo", "--momentum_teacher 1", marks=pytest.mark.slow),
    pytest.param("dead features", "black", "", marks=pytest.mark.slow),
    pytest.param(
        "nothing left to learn",
        "black or grey",
        "--out_dim 2 --batch_size_per_gpu 32 --epochs 12",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("verdict, images, flags", RUNS)
def test_runs_made_to_fail_are_named(verdict, images, flags, tmp_path, capsys, monkeypatch):
    run(images, tmp_path, monkeypatch, flags)
    reports = re.findall("^health: (.*)$", capsys.readouterr().out, re.MULTILINE)
    names = {line.split(":")[0] for line in reports}
    assert verdict in names
    # Pictures that are all alike, or of two kinds, have other symptoms too, and so has a run that
    # diverged.
    if images == "demo" and verdict not in ("diverging loss", "collapsed embeddings"):
        assert names == {verdict} and reports[-1].startswith(verdict)


@pytest.mark.parametrize(
    "verdict, flags",
    [("no sign of collapse", ""), ("collapsed embeddings", "--cosine_weight 1e9")],
)
def test_many_views_are_judged_too(verdict, flags, tmp_path, capsys, monkeypatch):
    run("demo", tmp_path, monkeypatch, flags, usual=EMP)
    reports = re.findall("^health: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert verdict in {line.split(":")[0] for line in reports}
    assert len(reports) == 1 or verdict != "no sign of collapse"


def test_a_loss_that_is_nan_stops_the_run(tmp_path, monkeypatch):
    message = r"diverging loss at step \d+: it is nan on rank 0 for images \S+.png, "
    with pytest.raises(engine.Diverged, match=message):
        run("demo", tmp_path, monkeypatch, "--lr 1e30")

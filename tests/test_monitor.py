"""The health report: each verdict on a run that is made to fail that way, and none on one that is well."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lowdino
import train
from lowdino import data, distributed, monitor
from lowdino.losses import InfoNCELoss, KoLeoLoss

# Small enough for 150 steps in seconds.
SMALL = [
    "--preset",
    "small",
    "--batch_size_per_gpu",
    "8",
    "--global_crops_size",
    "32",
    "--hidden_dim",
    "64",
    "--out_dim",
    "64",
    "--warmup_epochs",
    "0",
    "--lr",
    "3e-3",
    "--epochs",
    "3",
    "--knn_freq",
    "0",
    "--device",
    "cpu",
    "--log_freq",
    "10",
    "--num_workers",
    "0",
]


class Tiny(nn.Module):
    """A backbone of two convolutions."""

    embed_dim = 16

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


def test_entropy_and_spread_are_those_of_numpy():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=7)
    p[0] = [1, 0, 0, 0, 0]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1).mean()
    assert monitor.mean_entropy(torch.tensor(p)).item() == pytest.approx(entropy)

    x = rng.normal(size=(40, 6)) * [3, 2, 1, 0.1, 0.1, 0.1] + 1
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.T, bias=True))
    std, rank = monitor.spread(torch.tensor(x))
    assert std.item() == pytest.approx(math.sqrt(eigenvalues.sum()), rel=1e-4)
    assert rank.item() == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-4)
    std, rank = monitor.spread(torch.ones(5, 3))
    assert std.item() == pytest.approx(0, abs=1e-6) and rank.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "momentum, step, trained, moved",
    [
        ("0.9", 10, True, True),
        ("0.9", 10, False, False),
        ("0.9", 999, False, True),
        ("1.0", 999, True, False),
    ],
)
def test_a_teacher_that_does_not_move_is_seen_unless_the_schedule_holds_it(
    momentum, step, trained, moved, monkeypatch
):
    monkeypatch.setattr(lowdino, "build_backbone", lambda *_, **__: Tiny())
    args = train.parse(train.get_parser(), [*SMALL, "--momentum_teacher", momentum])
    method = train.SelfDistillation(
        args,
        distributed.Ranks(0, 1, torch.device("cpu")),
        data.Data("none", None),
        total_steps=1000,
    )
    method.objective(
        method.network, [torch.randn(8, 3, 32, 32) for _ in range(2)], None, step, logging=True
    )
    if trained:
        with torch.no_grad():
            torch._foreach_mul_(list(method.network.parameters()), 1.01)
    read = []
    for _ in range(2):
        method.after_step(step)
        read.append(method.signs()["teacher_moved"])
    assert read == [True, moved]  # with nothing to compare it with, the first tells nothing


def test_what_is_minimised_is_the_losses_by_their_weights(monkeypatch):
    monkeypatch.setattr(lowdino, "build_backbone", lambda *_, **__: Tiny())
    flags = [
        *SMALL,
        "--infonce_weight",
        "0.8",
        "--koleo_weight",
        "0.3",
        "--freeze_last_layer",
        "1",
        "--warmup_teacher_temp",
        "0.02",
        "--teacher_temp",
        "0.06",
        "--warmup_teacher_temp_epochs",
        "3",
    ]
    args = train.parse(train.get_parser(), flags)
    method = train.SelfDistillation(
        args, distributed.Ranks(0, 1, torch.device("cpu")), data.Data("none", None), total_steps=900
    )
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    for step, fading, temperature in ((0, 1.0, 0.02), (450, 0.5, 0.04)):
        (f, e, s), (_, _, t) = method.network(views), method.teacher(views)
        expected = copy.deepcopy(method.criterion)(s.chunk(2), t.chunk(2), temperature)
        loss, total = method.objective(method.network, views, None, step, logging=False)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        others = 0.8 * fading * InfoNCELoss()(*e.chunk(2)) + 0.3 * sum(
            KoLeoLoss()(x) for x in f.chunk(2)
        )
        assert (total - loss).item() == pytest.approx(others.item(), rel=1e-4)
    for step, frozen in ((0, True), (299, True), (300, False)):
        total.backward(retain_graph=True)
        method.after_backward(step)
        assert (method.network.head.last_layer.weight.grad is None) == frozen


WELL = dict(
    loss=3.5,
    entropy=2.0,
    entropy_of_mean=3.0,
    feature_std=0.3,
    effective_rank=8.0,
    teacher_moved=True,
)


def test_a_sign_counts_once_it_lasts_and_until_it_is_over():
    health = monitor.Health(64)
    uniform = WELL | dict(entropy=4.15, entropy_of_mean=4.158, loss=4.159)
    assert health.read(10, **uniform) == [] and health.read(200, **uniform) == []
    assert health.read(205, **WELL) == []  # it left by itself: nothing was said
    assert health.read(210, **uniform) == [] and health.verdict() == "no sign of collapse"
    news = health.read(410, **uniform)
    assert (
        len(news) == 1
        and news[0].startswith("uniform collapse: ")
        and "raise --infonce_weight" in news[0]
    )
    assert health.read(420, **uniform) == [] and health.verdict() == news[0]  # said once
    assert (
        health.read(430, **WELL) == ["uniform collapse: over"]
        and health.verdict() == "no sign of collapse"
    )


@pytest.mark.parametrize(
    "name, flag, values",
    [
        (
            "one-cluster collapse",
            "--center_momentum",
            dict(entropy=0.01, entropy_of_mean=0.02, loss=0.03),
        ),
        (
            "one-cluster collapse",
            "--center_momentum",
            dict(entropy=2.0, entropy_of_mean=2.01),
        ),  # several, the same for all
        ("dead features", "--lr", dict(feature_std=0.001)),
        ("dead features", "--lr", dict(effective_rank=1.2)),
        ("diverging loss", "--lr", dict(loss=6.0)),
        ("nothing left to learn", "--global_crops_scale", dict(loss=2.01)),
        ("teacher stands still", "--momentum_teacher", dict(teacher_moved=False)),
    ],
)
def test_each_sign_alone(name, flag, values):
    signs = monitor.Health(64).signs(**WELL | values)
    assert list(signs) == [name] and flag in signs[name]
    assert monitor.Health(64).signs(**WELL) == {}


def write_images(kind, folder):
    """400 pictures: the demo's, all black, or black and grey in turn, which no augmentation confuses."""
    images = np.zeros((400, 32, 32, 3), dtype=np.uint8)
    if kind == "demo":
        images = data.demo_images(range(400)).images.permute(0, 2, 3, 1).numpy()
    elif kind == "black or grey":
        images[::2] = 110
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")


def run(images, tmp_path, monkeypatch, flags):
    """A real run on one process with a tiny backbone."""
    write_images(images, tmp_path / "pictures")
    monkeypatch.setattr(monitor.Health, "PATIENCE", 40)
    monkeypatch.setattr(lowdino, "build_backbone", lambda arch: Tiny())
    args = train.parse(
        train.get_parser(),
        [
            *SMALL,
            *flags,
            "--data_path",
            str(tmp_path / "pictures"),
            "--output_dir",
            str(tmp_path / "out"),
        ],
    )
    assert train.check(args) is None
    ranks = distributed.Ranks(0, 1, torch.device("cpu"))
    train.train(args, ranks, train.settle(args, ranks), train.SelfDistillation)


RUNS = [
    ("no sign of collapse", "demo", []),
    (
        "uniform collapse",
        "demo",
        ["--teacher_temp", "1", "--warmup_teacher_temp", "1"],
    ),  # no sharpening
    (
        "one-cluster collapse",
        "demo",
        ["--center_momentum", "1", "--infonce_weight", "0"],
    ),  # no centring
    (
        "diverging loss",
        "demo",
        ["--lr", "10", "--optimizer", "sgd", "--norm_last_layer", "false", "--clip_grad", "0"],
    ),
    pytest.param(
        "teacher stands still", "demo", ["--momentum_teacher", "1"], marks=pytest.mark.slow
    ),
    pytest.param("dead features", "black", [], marks=pytest.mark.slow),
    pytest.param(
        "nothing left to learn",
        "black or grey",
        ["--out_dim", "2", "--batch_size_per_gpu", "32", "--epochs", "12"],
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("verdict, images, flags", RUNS)
def test_runs_made_to_fail_are_named(verdict, images, flags, tmp_path, capsys, monkeypatch):
    run(images, tmp_path, monkeypatch, flags)
    said = re.findall("^health: (.*)$", capsys.readouterr().out, re.MULTILINE)
    names = {line.split(":")[0] for line in said}
    assert verdict in names
    # Pictures that are all alike, or of two kinds, have other signs too, and a run that diverged goes on anyhow.
    if images == "demo" and verdict != "diverging loss":
        assert names == {verdict} and said[-1].startswith(verdict)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(
        FloatingPointError,
        match=r"diverging loss at step \d+: it is nan on rank 0 for images \S+.png, ",
    ):
        run("demo", tmp_path, monkeypatch, ["--lr", "1e30"])

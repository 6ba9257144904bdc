"""The scripts from outside: what they write, refuse, print, and that a stopped run ends as an unstopped one."""

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import eval_knn
import lowdino
import train
from lowdino import augment, data, distributed

SMALL = [
    "--arch",
    "mobilevit_xxs",
    "--batch_size_per_gpu",
    "4",
    "--local_crops_number",
    "1",
    "--out_dim",
    "16",
    "--hidden_dim",
    "32",
    "--warmup_epochs",
    "1",
    "--log_freq",
    "2",
    "--device",
    "cpu",
    "--knn_freq",
    "1",
    "--infonce_weight",
    "1",
    "--cache",
    "none",
]


def records(folder, key):
    return [
        r[key] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if key in r
    ]


def assert_same_run(a, b):
    """Two output folders end in the same weights, optimizer state, centre and losses, bit for bit."""
    ends = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (a, b)]
    assert ends[0]["step"] == ends[1]["step"]

    def compare(x, y, where):
        if isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for k in x:
                compare(x[k], y[k], f"{where}.{k}")
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), f"{where} differs by {(x - y).abs().max()}"
        elif isinstance(x, list):
            for i, (p, q) in enumerate(zip(x, y, strict=True)):
                compare(p, q, f"{where}[{i}]")
        else:
            assert x == y, where

    for part in ("student", "teacher", "loss", "optimizer", "scaler"):
        compare(ends[0][part], ends[1][part], part)
    assert records(a, "loss") == records(b, "loss") and len(records(a, "loss")) > 2


def test_cached_images_are_decoded_once_and_train_alike(
    picture_folder, tmp_path, call_script, monkeypatch
):
    reads, read = [], data.read_image

    def counted(path, max_side=None):
        reads.append(path)
        return read(path, max_side)

    monkeypatch.setattr(data, "read_image", counted)
    (picture_folder / "train" / "dark" / "3.png").write_text("not a picture")
    flags = [
        *SMALL,
        "--data_path",
        picture_folder,
        "--epochs",
        2,
        "--num_workers",
        0,
        "--max_bad_fraction",
        0.2,
    ]
    call_script("train.py", *flags, "--output_dir", tmp_path / "none")
    assert len(reads) > 3 * 24  # two epochs, three evaluations
    reads.clear()
    done = call_script("train.py", *flags, "--cache", "auto", "--output_dir", tmp_path / "auto")
    assert "images decoded and kept on the host" in done.stdout
    training = [path for path in reads if f"{os.sep}train{os.sep}" in path]
    assert len(set(training)) == 24 and len(training) == 2 * (
        24 + 1
    )  # with a substitute; the estimate of "auto" reads all of so few
    assert_same_run(tmp_path / "none", tmp_path / "auto")
    assert records(tmp_path / "none", "knn") == records(tmp_path / "auto", "knn")
    assert (tmp_path / "none" / "bad_images.txt").read_text() == (
        tmp_path / "auto" / "bad_images.txt"
    ).read_text()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_leaves_plain_files(picture_folder, tmp_path, call_script):
    flags = [
        *SMALL,
        "--arch",
        "resnet5m",
        "--data_path",
        picture_folder,
        "--epochs",
        2,
        "--num_workers",
        0,
    ]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        call_script("train.py", *flags, "--output_dir", tmp_path / name, *more)
    eager, compiled = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("eager", "compiled")
    )
    assert eager["student"].keys() == compiled["student"].keys()
    for name, weight in eager["student"].items():
        torch.testing.assert_close(compiled["student"][name], weight, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(
        records(tmp_path / "compiled", "loss"),
        records(tmp_path / "eager", "loss"),
        atol=0.01,
        rtol=0,
    )


def test_training_writes_what_it_should(picture_folder, tmp_path, call_script, monkeypatch):
    out, drawn, seeded = tmp_path / "out", [], augment.seeded_generator

    def noted(device, *numbers):
        drawn.append(numbers)
        return seeded(device, *numbers)

    monkeypatch.setattr(augment, "seeded_generator", noted)
    done = call_script(
        "train.py",
        *SMALL,
        "--data_path",
        picture_folder,
        "--output_dir",
        out,
        "--epochs",
        2,
        "--saveckp_freq",
        1,
        "--koleo_weight",
        0.1,
        "--alpha",
        0.4,
        "--optimizer",
        "lars",
    )
    assert {
        "args.json",
        "backbone.pth",
        "checkpoint.pth",
        "checkpoint.prev.pth",
        "checkpoint0001.pth",
        "checkpoint0002.pth",
        "crops.png",
        "log.jsonl",
    } == set(os.listdir(out))
    line = done.stdout.splitlines()
    assert "24 images; global views 32 px, 1 local views 32 px" in line[0]
    assert re.search(
        r"epoch 0 step 2/12 loss \d.\d+ loss_over_lnk \d.\d+ lr .* weight_decay .* memory_mb .* momentum .* entropy .* entropy_of_mean .* feature_std .* effective_rank .* images/s wait .* eta",
        done.stdout,
    )
    assert re.search(
        r"k-NN \(k=20\) accuracy: \d.\d+ after 2 epochs, \d.\d+ before the first", done.stdout
    )
    assert (
        "health: no sign of collapse" in done.stdout
    )  # 12 steps are too few for any other verdict
    assert json.loads((out / "args.json").read_text())["optimizer"] == "lars"
    assert records(out, "step") == [0, 2, 4, 6, 6, 8, 10, 12, 12] and len(records(out, "knn")) == 3
    peak = 5e-4 * 4 / 256
    falling = [1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * step / 6)) / 2 for step in (1, 3, 5)]
    assert records(out, "lr") == pytest.approx([peak / 5, peak * 3 / 5, peak, *falling])
    assert records(out, "weight_decay") == pytest.approx(
        [0.4 - 0.36 * (1 + math.cos(math.pi * step / 12)) / 2 for step in (1, 3, 5, 7, 9, 11)]
    )
    assert drawn == [(1, 0, step, 0) for step in range(12)]  # stream, seed, step, rank
    backbone = lowdino.load_backbone(str(out / "backbone.pth"))
    assert backbone.epoch == 2 and backbone.image_size == 32
    teacher = torch.load(out / "checkpoint.pth", weights_only=True)["teacher"]
    assert all(torch.equal(v, teacher[f"backbone.{k}"]) for k, v in backbone.state_dict().items())

    # k-NN of the file is what training printed, and the floors have no file.
    shown = call_script(
        "eval_knn.py",
        "--weights",
        out / "backbone.pth",
        "--data_path",
        picture_folder,
        "--nb_knn",
        5,
        20,
    )
    assert (
        re.search(r"\(k=20\) top-1 (\d.\d+)", shown.stdout)[1] == f"{records(out, 'knn')[-1]:.4f}"
    )
    assert "top-5" not in shown.stdout  # two classes

    again = call_script(
        "train.py",
        *SMALL,
        "--data_path",
        picture_folder,
        "--output_dir",
        out,
        "--epochs",
        2,
        "--saveckp_freq",
        1,
        "--koleo_weight",
        0.1,
        "--alpha",
        0.4,
        "--optimizer",
        "lars",
    )
    assert "already finished: 2 epochs" in again.stdout and "health:" not in again.stdout
    other = call_script(
        "train.py",
        *SMALL,
        "--data_path",
        picture_folder,
        "--output_dir",
        out,
        "--epochs",
        3,
        check=False,
    )
    assert (
        other.returncode == 2
        and "holds a run with" in other.stderr
        and "epochs 2, not 3" in other.stderr
    )
    assert other.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, workers, arch", [(2, 0, "mobilevit_xxs"), (1, 2, "mobilevit_xxs"), (1, 0, "vit_tiny")]
)
def test_killed_run_goes_on_to_the_same_end(
    picture_folder, tmp_path, run_script, ranks, workers, arch
):
    flags = [
        *SMALL,
        "--arch",
        arch,
        "--data_path",
        picture_folder,
        "--epochs",
        4,
        "--num_workers",
        workers,
        "--knn_freq",
        0,
    ]
    run_script("train.py", *flags, "--output_dir", tmp_path / "whole", ranks=ranks)
    stopped = tmp_path / "stopped"
    launcher = (
        ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        if ranks > 1
        else []
    )
    process = subprocess.Popen(
        [
            sys.executable,
            *launcher,
            str(ROOT / "train.py"),
            *map(str, flags),
            "--output_dir",
            str(stopped),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1" if ranks > 1 else "2"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not (stopped / "checkpoint.pth").exists():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (
        torch.load(stopped / "checkpoint.pth", weights_only=True)["step"]
        < torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)["step"]
    )
    done = run_script("train.py", *flags, "--output_dir", stopped, ranks=ranks)
    assert "Warning" not in done.stderr  # no deprecated call, on this torch
    assert f"going on from {stopped} after step" in done.stdout
    assert_same_run(tmp_path / "whole", stopped)


def test_training_on_cifar10(cifar10, tmp_path, call_script):
    for split, count in (("train", 8), ("test", 2)):
        for name in os.listdir(cifar10 / split):
            (tmp_path / "few" / split / name).mkdir(parents=True)
            for file in sorted(os.listdir(cifar10 / split / name))[:count]:
                shutil.copy(cifar10 / split / name / file, tmp_path / "few" / split / name)
    done = call_script(
        "train.py",
        *SMALL,
        "--data_path",
        tmp_path / "few",
        "--output_dir",
        tmp_path / "out",
        "--epochs",
        1,
        "--centering",
        "sinkhorn",
        "--optimizer",
        "sgd",
        "--amp",
        "bf16",
    )
    assert "80 images; global views 32 px" in done.stdout and "accuracy" in done.stdout
    for flags in (
        ["--pixels"],
        ["--arch", "resnet5m"],
        ["--weights", tmp_path / "out" / "backbone.pth"],
    ):
        shown = call_script("eval_knn.py", *flags, "--data_path", tmp_path / "few").stdout
        assert "(k=80) top-1" in shown and "top-5" in shown  # 200 neighbours of 80


def test_a_backbone_file_starts_a_training(picture_folder, tmp_path, call_script):
    torch.manual_seed(5)
    weights = lowdino.build_backbone("mobilevit_xxs").state_dict()
    torch.save(
        weights | {"head.fc.weight": torch.zeros(10, 320)}, tmp_path / "timm.pth"
    )  # as timm with a classifier
    flags = [
        *SMALL,
        "--data_path",
        picture_folder,
        "--epochs",
        1,
        "--lr",
        0,
        "--min_lr",
        0,
        "--weight_decay",
        0,
    ]
    call_script(
        "train.py", *flags, "--init", tmp_path / "timm.pth", "--output_dir", tmp_path / "out"
    )
    trained = torch.load(tmp_path / "out" / "backbone.pth", weights_only=True)["state_dict"]
    moved = [
        k
        for k, v in trained.items()
        if "running" not in k and "batches" not in k and not torch.allclose(v, weights[k])
    ]
    assert moved == []
    wrong = call_script(
        "train.py",
        *flags,
        "--init",
        tmp_path / "timm.pth",
        "--output_dir",
        tmp_path / "no",
        "--arch",
        "resnet5m",
        check=False,
    )
    assert wrong.returncode == 2 and "timm.pth does not fit this architecture" in wrong.stderr


def test_weights_of_a_known_architecture_are_used(picture_folder, tmp_path, call_script):
    torch.manual_seed(5)
    network = lowdino.build_backbone("resnet18").eval()
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    call_script(
        "eval_knn.py",
        "--arch",
        "resnet18",
        "--weights",
        tmp_path / "plain.pth",
        "--data_path",
        picture_folder,
        "--device",
        "cpu",
        "--features",
        tmp_path / "features.npz",
    )
    found = torch.from_numpy(np.load(tmp_path / "features.npz")["train"])
    images, sizes, *_ = data.collate(
        [data.load(str(picture_folder)).pretrain[i] for i in range(24)]
    )
    with torch.no_grad():
        torch.testing.assert_close(
            found, network(augment.central_view(images, sizes, 32)), atol=1e-4, rtol=1e-4
        )
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(
            eval_knn.open_model(f"resnet18={tmp_path / 'plain.pth'}")[1].eval()(x), network(x)
        )


def test_views_are_those_that_the_flags_ask_for():
    views = train.build_views(
        train.parse(
            train.get_parser(),
            [
                "--global_crops_size",
                "64",
                "--global_crops_scale",
                "0.3",
                "0.9",
                "--local_crops_size",
                "48",
                "--local_crops_scale",
                "0.1",
                "0.2",
                "--local_crops_number",
                "3",
                "--vertical_flip",
                "0.25",
            ],
        )
    )
    assert [(size, *scale, len(blur)) for size, scale, blur, _ in views.groups] == [
        (64, 0.3, 0.9, 2),
        (48, 0.1, 0.2, 3),
    ]
    assert views.vertical_flip == 0.25 and views.blur_sigma == pytest.approx((0.1, 2 * 64 / 224))


def test_a_vit_has_the_patches_that_are_asked_for(picture_folder, tmp_path, call_script):
    call_script(
        "train.py",
        *SMALL,
        "--arch",
        "vit_tiny",
        "--patch_size",
        8,
        "--data_path",
        picture_folder,
        "--epochs",
        1,
        "--knn_freq",
        0,
        "--output_dir",
        tmp_path,
    )
    saved = lowdino.load_backbone(str(tmp_path / "backbone.pth"))
    assert saved.patch_size == 8 and saved.state_dict()["patch_embed.proj.weight"].shape == (
        192,
        3,
        8,
        8,
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--global_crops_scale", "0.4", "1.4"], "--global_crops_scale needs 0 < MIN <= MAX <= 1"),
        (["--local_crops_scale", "0.4", "0.05"], "--local_crops_scale needs 0 < MIN <= MAX <= 1"),
        (["--epochs", "5"], "--warmup_epochs 10 is longer than the training, --epochs 5"),
        (
            ["--warmup_teacher_temp_epochs", "101"],
            "--warmup_teacher_temp_epochs 101 is longer than the training",
        ),
        (["--arch", "vit_huge"], "--arch vit_huge is unknown; choose from mobilevit_xxs"),
        (["--batch_size_per_gpu", "1"], "--batch_size_per_gpu must be at least 2"),
        (["--out_dim", "1"], "--out_dim must be at least 2, not 1"),
        (["--seed", "99999999999999999999"], "--seed must be below 2^63"),
        (["--teacher_temp", "0"], "--teacher_temp must be above 0, not 0.0"),
        (["--momentum_teacher", "1.5"], "--momentum_teacher must lie between 0 and 1, not 1.5"),
        (["--lr", "-1"], "--lr must be 0 or more, not -1.0"),
        (["--lr", "nan"], "--lr must be 0 or more, not nan"),
        (["--global_crops_size", "16"], "--global_crops_size must be at least 32 pixels, not 16"),
        (
            ["--alpha", "0.4", "--local_crops_number", "0"],
            "--alpha balances global against local views",
        ),
        (["--init", "/no/such/file"], "--init /no/such/file does not exist"),
        (["--init", ""], "--init  does not exist"),
        (["--num_workers", "-1"], "--num_workers must be 0 or more, not -1"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(flags, message):
    answer = train.check(train.parse(train.get_parser(), flags))
    assert answer.startswith(message) and "\n" not in answer


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train.py", ["--arch", "vit_huge"], "train.py: error: --arch vit_huge is unknown"),
        ("train.py", ["--data_path", "/nowhere"], "train.py: error: no data at /nowhere"),
        (
            "train.py",
            ["--batch_size_per_gpu", "5000"],
            "4000 images are fewer than one batch of 5000",
        ),
        ("train.py", ["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a CUDA device"),
        (
            "eval_knn.py",
            [],
            "eval_knn.py: error: give a backbone, --weights FILE or --arch NAME, or else --pixels",
        ),
        ("eval_knn.py", ["--weights", "/nowhere.pth"], "eval_knn.py: error: no file /nowhere.pth"),
    ],
)
def test_scripts_exit_with_2_and_one_line(script, flags, message, tmp_path, call_script):
    done = call_script(script, *flags, check=False, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_knn_flags_are_checked():
    def answer(*flags):
        return eval_knn.check(eval_knn.get_parser().parse_args(flags))

    assert answer("--pixels") is None and answer("--arch", "resnet5m") is None
    assert answer("--pixels", "--arch", "resnet5m").startswith("give a backbone")
    assert answer("--weights", "", "--arch", "resnet5m").startswith("--weights names no file")
    assert answer("--pixels", "--neighbours", "out").startswith(
        "--neighbours out should end as a picture's name does"
    )
    assert answer("--pixels", "--neighbours", "out.PNG") is None
    assert answer("--pixels", "--nb_knn", "0").startswith("--nb_knn must be at least 1")
    assert answer("--pixels", "--temperature", "0.001").startswith(
        "--temperature must be at least 0.013"
    )
    assert answer("--pixels", "--image_size", "8").startswith("--image_size must be at least 32")


def test_names_that_are_no_text_are_printed_all_the_same(picture_folder, tmp_path, run_script):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        os.rename(picture_folder, odd)
    except OSError:
        pytest.skip("names of files are text here")
    done = run_script("eval_knn.py", "--pixels", "--data_path", odd, "--device", "cpu")
    assert r"/caf\udce9/train: 24 training and 8 test images" in done.stdout


def test_unlabelled_data_has_no_knn(picture_folder, tmp_path, call_script):
    tested = call_script(
        "eval_knn.py", "--pixels", "--data_path", picture_folder / "train", check=False
    )
    assert (
        tested.returncode == 2
        and "has no labels to test on: that needs train/ and val/" in tested.stderr
    )
    trained = call_script(
        "train.py",
        *SMALL,
        "--data_path",
        picture_folder / "train",
        "--epochs",
        1,
        "--output_dir",
        tmp_path / "o",
    )
    assert "k-NN" not in trained.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence(picture_folder, tmp_path, call_script, workers):
    (picture_folder / "train" / "dark" / "5.png").write_bytes(b"no picture")
    done = call_script(
        "train.py",
        *SMALL,
        "--data_path",
        picture_folder / "train",
        "--epochs",
        1,
        "--num_workers",
        workers,
        "--output_dir",
        tmp_path / "o",
        check=False,
    )
    assert done.returncode == 2 and re.fullmatch(
        r"train.py: error: 1 of 24 images cannot be read.* cannot read image .*/dark/5.png: .*\n",
        done.stderr,
    )
    done = call_script(
        "eval_knn.py",
        "--pixels",
        "--data_path",
        picture_folder,
        "--num_workers",
        workers,
        check=False,
    )
    assert done.returncode == 2 and re.fullmatch(
        r"eval_knn.py: error: cannot read image .*/dark/5.png: .*\n", done.stderr
    )


def test_bad_output_folder_is_one_sentence(picture_folder, tmp_path):
    (tmp_path / "file").touch()
    args = train.parse(
        train.get_parser(),
        [*SMALL, "--data_path", str(picture_folder), "--output_dir", str(tmp_path / "file")],
    )
    with pytest.raises(ValueError, match="--output_dir .*/file cannot be made: File exists"):
        train.settle(args, distributed.Ranks(0, 1, torch.device("cpu")))


def test_presets_are_the_papers_and_flags_win():
    def settings(*flags):
        return train.parse(train.get_parser(), flags)

    table2 = dict(
        epochs=100,
        batch_size_per_gpu=64,
        optimizer="sgd",
        lr=5e-4,
        min_lr=1e-6,
        warmup_epochs=10,
        weight_decay=0.04,
        weight_decay_end=0.4,
        out_dim=1024,
        momentum_teacher=0.9995,
        teacher_temp=0.04,
        student_temp=0.1,
        global_crops_scale=[0.4, 1.0],
        local_crops_scale=[0.05, 0.4],
        freeze_last_layer=0,
    )
    assert table2.items() <= vars(settings("--preset", "lowdino")).items()
    lowdino_preset = settings("--preset", "lowdino", "--lr", "0.1")
    assert (lowdino_preset.momentum_teacher, lowdino_preset.out_dim, lowdino_preset.clip_grad) == (
        0.9995,
        1024,
        2.0,
    )
    assert (
        lowdino_preset.lr == 0.1
        and lowdino_preset.local_crops_number == 2
        and not lowdino_preset.norm_last_layer
    )
    assert settings("--preset", "lowdino", "--arch", "resnet5m").local_crops_number == 8
    assert (
        settings(
            "--preset", "lowdino", "--arch", "resnet5m", "--local_crops_number", "3"
        ).local_crops_number
        == 3
    )
    cnn, vit = (
        settings("--preset", "sslight", "--arch", "resnet18"),
        settings("--preset", "sslight", "--arch", "vit_tiny"),
    )
    assert (cnn.optimizer, cnn.out_dim, cnn.local_crops_number, cnn.use_bn_in_head, cnn.alpha) == (
        "lars",
        4096,
        6,
        True,
        0.4,
    )
    assert cnn.local_crops_size == 128 and cnn.lr == 0.48
    assert (vit.optimizer, vit.out_dim, vit.local_crops_number, vit.use_bn_in_head, vit.alpha) == (
        "adamw",
        65536,
        10,
        False,
        0.4,
    )
    assert (
        settings("--preset", "dino").out_dim == 65536
        and settings("--preset", "dino").local_crops_size == 96
    )
    for preset in train.PRESETS:
        assert train.check(settings("--preset", preset)) is None


def test_teacher_momentum_follows_from_the_number_of_steps(picture_folder, tmp_path):
    flags = [
        "--preset",
        "small",
        "--data_path",
        str(picture_folder),
        "--batch_size_per_gpu",
        "4",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    args = train.parse(train.get_parser(), [*flags, "--epochs", "4"])
    train.settle(args, distributed.Ranks(0, 1, torch.device("cpu")))
    assert args.momentum_teacher == pytest.approx(
        1 - 1 / (2 * 24**0.5)
    )  # 24 images, 6 steps an epoch


def test_help_shows_defaults_and_touches_no_network():
    cut_off = f"""
import socket, sys, runpy
def refuse(*a, **k): raise SystemExit("network touched")
socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, {str(ROOT)!r})
for script in ("train", "distill", "eval_knn", "eval_linear"):
    sys.argv = [script, "--help"]
    try:
        runpy.run_module(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
"""
    done = subprocess.run([sys.executable, "-c", cut_off], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and done.stdout.count("usage: ") == 4
        and "default: None" not in done.stdout
    ), done.stderr
    assert done.stdout.count("(default: ") > 60


def test_each_module_imports_alone(tmp_path):
    """Every file from an empty folder of its own, with nothing of this project within reach."""
    modules = sorted(p for p in (ROOT / "lowdino").glob("*.py") if p.name != "__init__.py")
    assert len(modules) >= 12
    for module in modules:
        tree = ast.parse(module.read_text())
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {
            "." * n.level + (n.module or "")
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom)
        }
        for name in imported:
            top = name.split(".")[0]
            assert top in {"torch", "torchvision", "numpy", "PIL"} | set(sys.stdlib_module_names), (
                f"{module.name} imports {name}"
            )
        (tmp_path / module.stem).mkdir()
        shutil.copy(module, tmp_path / module.stem)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    sys.path.insert(0, name)\n"
        "    importlib.import_module(name)\n"
        "    del sys.path[0], sys.modules[name]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(m.stem for m in modules)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

"""The scripts from outside: what they write, print and refuse."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from runs import (
    SMALL,  # noqa: F401, for test_benchmarks.py
    assert_same_run,
    is_one_sentence,
    options,
    records,
    saved,
    small,
    stepwise,
    train_here,
)

import lowdino
import train
from lowdino import augment, data, datasets, distributed, methods, settings
from lowdino.features import open_network

# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The numbers that seeds of views are derived from, in the order of their use."""
    found, seeded = [], augment.seeded_generator

    def noted(device, *numbers):
        found.append(numbers)
        return seeded(device, *numbers)

    monkeypatch.setattr(augment, "seeded_generator", noted)
    return found


FILES = (
    "args.json backbone.pth checkpoint.pth checkpoint.prev.pth checkpoint0001.pth "
    "checkpoint0002.pth crops.png log.jsonl maps.png neighbours.png report.html"
).split()
WRITING = (
    "--epochs 2 --saveckp_freq 1 --koleo_weight 0.1 --alpha 0.4 --optimizer lars --num_workers 0"
)


def test_training_writes_what_it_should(picture_folder, tmp_path, call_script, drawn):
    out = tmp_path / "out"
    flags = small(WRITING, data_path=picture_folder, output_dir=out)
    done = call_script("train.py", *flags)
    assert set(os.listdir(out)) == set(FILES)
    views = "24 images; 2 global views of 32 px, 1 local view of 32 px"
    assert views in done.stdout.splitlines()[0]
    header = "step epoch loss lr images/s wait memory left loss_over_lnk entropy"
    lines = done.stdout.splitlines()
    table = next(
        i for i, line in enumerate(lines) if line.split()[: len(header.split())] == header.split()
    )
    row = r" +2/12 +0 +\d\.\d+ +\S+ +\d+ +\d+% +\d+ MB +\d:\d\d:\d\d +\d\.\d+ +\d\.\d+ +\d\.\d+ +.*"
    assert re.fullmatch(row, lines[table + 1]) and len(lines[table + 1]) <= 120
    assert len(lines[table + 1]) == len(lines[table])
    logged = json.loads((out / "log.jsonl").read_text().splitlines()[1])
    names = (
        "step epoch loss cross_entropy loss_over_lnk entropy entropy_of_mean feature_std "
        "effective_rank momentum lr weight_decay memory_mb images_per_s data_wait eta_s"
    )
    assert set(names.split()) <= logged.keys()
    said = r"k-NN \(k=20\) accuracy: \d.\d+ after 2 epochs, \d.\d+ before the first"
    assert re.search(said, done.stdout)
    assert "health: too short to tell: 11 steps, a verdict needs 200" in done.stdout
    assert json.loads((out / "args.json").read_text())["optimizer"] == "lars"
    assert records(out, "step") == [0, 2, 4, 6, 6, 8, 10, 12, 12] and len(records(out, "knn")) == 3
    assert drawn == [(1, 0, step, 0) for step in range(12)]  # stream, seed, step, rank
    backbone = lowdino.load_backbone(str(out / "backbone.pth"))
    assert backbone.epoch == 2 and backbone.image_size == 32
    state = saved(out)["method"]
    own = backbone.state_dict().items()
    assert all(torch.equal(value, state[f"teacher.backbone.{name}"]) for name, value in own)

    # k-NN of the file is what training printed.
    options_ = options(weights=out / "backbone.pth", data_path=picture_folder)
    shown = call_script("eval_knn.py", *options_, "--nb_knn", 5, 20).stdout
    assert re.search(r"\(k=20\) top-1 (\d.\d+)", shown)[1] == f"{records(out, 'knn')[-1]:.4f}"
    assert "top-5" not in shown  # two classes

    again = call_script("train.py", *flags)
    assert "already finished: 2 epochs" in again.stdout and "health:" not in again.stdout
    other = call_script("train.py", *flags, "--epochs", 3, check=False)
    assert is_one_sentence(other, "cannot resume from.* epochs 2, not 3")


def test_schedules_are_those_that_the_flags_ask_for(picture_folder, tmp_path, call_script):
    text = "--preset dino --global_crops_size 32 --local_crops_size 32 --log_freq 1 --knn_freq 0"
    flags = stepwise(picture_folder, tmp_path, text)
    call_script("train.py", *flags, "--save_every_steps", 0)
    peak = 5e-4 * 4 / 256
    falling = [1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    # --warmup_epochs 1 is six steps, the last of them at the peak.
    assert records(tmp_path, "lr") == pytest.approx([peak * i / 5 for i in range(6)] + falling)
    decay = [0.4 - 0.36 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert records(tmp_path, "weight_decay") == pytest.approx(decay)
    momentum = [1 - 0.004 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert records(tmp_path, "momentum") == pytest.approx(momentum)


def test_loss_is_the_whole_objective(picture_folder, tmp_path, call_script):
    for name, text in (("both", "--infonce_weight 1"), ("one", "--infonce_weight 0")):
        flags = stepwise(picture_folder, tmp_path / name, "--epochs 1 --log_freq 1 --knn_freq 0")
        call_script("train.py", *flags, *text.split())
    assert records(tmp_path / "one", "loss") == records(tmp_path / "one", "cross_entropy")
    pairs = zip(records(tmp_path / "both", "loss"), records(tmp_path / "both", "cross_entropy"))
    # InfoNCE of random features of four images is near ln 4, and its weight falls from 1.
    assert 0.5 < next(loss - entropy for loss, entropy in pairs) < 3


@pytest.mark.parametrize("amp, expected", [("bf16", torch.bfloat16), ("none", torch.float32)])
def test_networks_run_in_the_type_that_amp_names(amp, expected, picture_folder, tmp_path):
    seen = {}

    def build(backbone, args, **steps):
        method = methods.DINO(backbone, args, **steps)
        for name in ("student", "teacher"):
            convolutions = [m for m in getattr(method, name).modules() if is_convolution(m)]
            seen[name] = set()
            note = lambda module, given, made, name=name: seen[name].add(made.dtype)
            for module in convolutions:
                module.register_forward_hook(note)
        return method

    is_convolution = lambda module: isinstance(module, torch.nn.Conv2d)
    flags = stepwise(picture_folder, tmp_path, "--epochs 1 --knn_freq 0", amp=amp)
    train_here([*flags, "--batch_size_per_gpu", 24], build)
    assert seen == {"student": {expected}, "teacher": {expected}}
    assert saved(tmp_path)["step"] == 1
    assert {v.dtype for v in saved(tmp_path)["method"].values() if v.is_floating_point()} == {
        torch.float32
    }


def test_cached_images_are_decoded_once_and_train_alike(
    picture_folder, tmp_path, call_script, monkeypatch
):
    reads, read = [], data.read_image

    def counted(path, *how):
        reads.append(path)
        return read(path, *how)

    monkeypatch.setattr(data, "read_image", counted)
    (picture_folder / "train" / "dark" / "3.png").write_text("not a picture")
    none, auto = tmp_path / "none", tmp_path / "auto"
    more = "--save_every_steps 0 --max_bad_fraction 0.2"
    call_script("train.py", *stepwise(picture_folder, none, more))
    assert len(reads) > 3 * 24  # two epochs, three evaluations
    reads.clear()
    done = call_script("train.py", *stepwise(picture_folder, auto, more, cache="auto"))
    assert "images decoded and kept on the host" in done.stdout
    training = [path for path in reads if f"{os.sep}train{os.sep}" in path]
    # With a substitute. The estimate of "auto" reads all of so few.
    assert len(set(training)) == 24 and len(training) == 2 * (24 + 1)
    assert_same_run(none, auto)
    assert records(none, "knn") == records(auto, "knn")
    assert (none / "bad_images.txt").read_text() == (auto / "bad_images.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_leaves_plain_files(picture_folder, tmp_path, call_script):
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        # AdamW makes much of roundings, the more the higher its learning rate is.
        text = "--save_every_steps 0 --arch resnet5m --lr 2e-4"
        flags = stepwise(picture_folder, tmp_path / name, text)
        call_script("train.py", *flags, *more)
    eager, compiled = (saved(tmp_path / name)["method"] for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight, atol=1e-2, rtol=1e-2)
    losses = [records(tmp_path / name, "loss") for name in ("compiled", "eager")]
    torch.testing.assert_close(*losses, atol=0.01, rtol=0)


def test_training_on_cifar10(cifar10, tmp_path, call_script):
    few, out = tmp_path / "few", tmp_path / "out"
    for split, count in (("train", 8), ("test", 2)):
        for name in os.listdir(cifar10 / split):
            (few / split / name).mkdir(parents=True)
            for file in sorted(os.listdir(cifar10 / split / name))[:count]:
                shutil.copy(cifar10 / split / name / file, few / split / name)
    text = "--epochs 1 --centering sinkhorn --optimizer sgd --amp bf16"
    done = call_script("train.py", *small(text, data_path=few, output_dir=out))
    assert "80 images; 2 global views of 32 px" in done.stdout and "accuracy" in done.stdout
    for text in ("--pixels", "--arch resnet5m", f"--weights {out / 'backbone.pth'}"):
        shown = call_script("eval_knn.py", *options(text, data_path=few)).stdout
        assert "(k=80) top-1" in shown and "top-5" in shown  # 200 neighbours of 80


def test_a_vit_has_the_patches_that_are_asked_for(picture_folder, tmp_path, call_script):
    text = "--arch vit_tiny --patch_size 8 --epochs 1 --knn_freq 0"
    call_script("train.py", *small(text, data_path=picture_folder, output_dir=tmp_path))
    saved = lowdino.load_backbone(str(tmp_path / "backbone.pth"))
    weights = saved.state_dict()["patch_embed.proj.weight"]
    assert saved.patch_size == 8 and weights.shape == (192, 3, 8, 8)


def test_unlabelled_data_has_no_knn(picture_folder, tmp_path, call_script):
    pictures = picture_folder / "train"
    tested = call_script("eval_knn.py", "--pixels", "--data_path", pictures, check=False)
    assert is_one_sentence(tested, "has no labels to test on: that needs train/ and val/")
    flags = small("--epochs 1", data_path=pictures, output_dir=tmp_path / "o")
    said = call_script("train.py", *flags).stdout.splitlines()
    assert [line[:9] for line in said if "k-NN" in line] == ["no k-NN: "]


def test_bad_output_folder_is_one_sentence(picture_folder, tmp_path):
    (tmp_path / "file").touch()
    flags = small(data_path=picture_folder, output_dir=tmp_path / "file")
    s = settings.resolve(train.get_parser(), flags)
    with pytest.raises(
        distributed.UserError, match="--output_dir .*/file cannot be made: File exi"
    ):
        settings.open_training_images(s, distributed.Ranks(0, 1, torch.device("cpu")))


def test_torch_distributed_launch_may_pass_the_local_rank(picture_folder, tmp_path, call_script):
    flags = stepwise(picture_folder, tmp_path, "--epochs 1 --knn_freq 0 --save_every_steps 0")
    for option in ("--local-rank=0", "--local_rank=0"):  # of new and of old versions of torch
        call_script("train.py", option, *flags)
    assert "local_rank" not in json.loads((tmp_path / "args.json").read_text())


# --------------------------------------------------------------------------------------------------
# Files of weights
# --------------------------------------------------------------------------------------------------

STILL = "--epochs 1 --lr 0 --min_lr 0 --weight_decay 0 --knn_freq 0 --num_workers 0"


@pytest.fixture
def plain_weights(tmp_path):
    """A file of MobileViT's weights with a classifier, as timm's, and these weights."""
    torch.manual_seed(5)
    weights = lowdino.build_backbone("mobilevit_xxs").state_dict()
    torch.save(weights | {"head.fc.weight": torch.zeros(10, 320)}, tmp_path / "timm.pth")
    return tmp_path / "timm.pth", weights


def test_a_backbone_file_starts_a_training(plain_weights, picture_folder, tmp_path, call_script):
    file, weights = plain_weights
    flags = small(STILL, data_path=picture_folder, init=file)
    call_script("train.py", *flags, "--output_dir", tmp_path / "out")
    trained = torch.load(tmp_path / "out" / "backbone.pth", weights_only=True)["state_dict"]
    learnt = [name for name in trained if "running" not in name and "batches" not in name]
    assert [name for name in learnt if not torch.allclose(trained[name], weights[name])] == []
    other = [*flags, "--output_dir", tmp_path / "no", "--arch", "resnet5m"]
    wrong = call_script("train.py", *other, check=False)
    assert is_one_sentence(wrong, "timm.pth does not fit this architecture")


@pytest.mark.parametrize("own", [None, ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])])
def test_a_backbone_keeps_its_normalisation(
    own, plain_weights, picture_folder, tmp_path, call_script, monkeypatch
):
    """timm's MobileViT takes images in [0, 1] as they are; a backbone.pth says its mean and std."""
    file, expected = plain_weights[0], own or ([0.0] * 3, [1.0] * 3)
    if own:
        backbone = lowdino.load_backbone(str(file), "mobilevit_xxs")
        backbone.mean, backbone.std = own
        file = tmp_path / "own.pth"
        lowdino.checkpoint.save_backbone(file, backbone, "mobilevit_xxs", 32, 1)
    made, build = [], data.build_views

    def noted(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(data, "build_views", noted)
    flags = small(STILL, data_path=picture_folder, init=file, output_dir=tmp_path / "out")
    call_script("train.py", *flags)
    views, kept = made[0], torch.load(tmp_path / "out" / "backbone.pth", weights_only=True)
    for name, values in zip(("mean", "std"), expected):
        assert kept[name] == values
        assert getattr(views, name).flatten().tolist() == pytest.approx(values)
    assert saved(tmp_path / "out")["normalisation"] == list(expected)


def test_weights_of_a_known_architecture_are_used(picture_folder, tmp_path, call_script):
    torch.manual_seed(5)
    network = lowdino.build_backbone("resnet18").eval()
    file, features = tmp_path / "plain.pth", tmp_path / "features.npz"
    torch.save(network.state_dict(), file)
    named = dict(weights=file, data_path=picture_folder, features=features)
    call_script("eval_knn.py", *options("--arch resnet18 --device cpu", **named))
    found = torch.from_numpy(np.load(features)["train"])
    source = datasets.load(str(picture_folder)).pretrain
    images, sizes, *_ = data.collate([source[i] for i in range(24)])
    with torch.no_grad():
        expected = network(augment.central_view(images, sizes, 32))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        x = torch.randn(2, 3, 32, 32)
        opened = open_network(f"resnet18={file}")[1].eval()
        assert torch.equal(opened(x), network(x))


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train.py", "--arch vit_huge", "train.py: error: --arch vit_huge is unknown"),
        ("train.py", "--data_path /nowhere", "train.py: error: no data at /nowhere"),
        ("train.py", "--batch_size_per_gpu 5000", "4000 images are fewer than one batch of 5000"),
        ("train.py", "--amp fp16 --device cpu", "--amp fp16 needs a CUDA device"),
        ("eval_knn.py", "", "eval_knn.py: error: give a backbone, --weights FILE or --arch NAME"),
        ("eval_knn.py", "--weights /nowhere.pth", "eval_knn.py: error: no file /nowhere.pth"),
    ],
)
def test_scripts_exit_with_2_and_one_line(script, flags, message, tmp_path, call_script):
    done = call_script(script, *flags.split(), check=False, cwd=tmp_path)
    assert is_one_sentence(done, re.escape(message))
    assert os.listdir(tmp_path) == []


def test_names_that_are_no_text_are_printed_all_the_same(picture_folder, tmp_path, run_script):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        os.rename(picture_folder, odd)
    except OSError:
        pytest.skip("names of files are text here")
    done = run_script("eval_knn.py", "--pixels", "--data_path", odd, "--device", "cpu")
    assert r"/caf\udce9/train: 24 training and 8 test images" in done.stdout


@pytest.mark.cuda
@pytest.mark.parametrize("cache", ["auto", "device", "host", "none"])
def test_a_gpu_trains_wherever_the_images_are_kept(cache, picture_folder, tmp_path, call_script):
    flags = small(f"--device cuda --epochs 1 --cache {cache}", data_path=picture_folder)
    done = call_script("train.py", *flags, *options(output_dir=tmp_path / "out"))
    assert "k-NN (k=20) accuracy: " in done.stdout

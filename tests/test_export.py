"""Backbones as files for elsewhere: their features there, what travels along, what is refused."""

import json
import os
import sys

import bench_export
import pytest
import torch
from torch.torch_version import TorchVersion

import lowdino
from lowdino import checkpoint, export, vit

QUICK = ("resnet5m", "vit_tiny")
ARCHS = [
    pytest.param(arch, marks=() if arch in QUICK else pytest.mark.slow) for arch in lowdino.ARCHS
]
SIZES = ((64, 64), (32, 32), (96, 160))  # last maps of odd and even sides, and of one pixel
MEAN, STD = (0.2, 0.5, 0.6), (0.1, 0.3, 0.4)


def as_if_trained(arch):
    """A backbone in which no layer is without effect, and the normalisation is unusual."""
    backbone = lowdino.build_backbone(arch).eval()
    for name, value in backbone.state_dict().items():
        if value.ndim == 1:  # batch and layer norms, biases
            value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.1)
    backbone.mean, backbone.std, backbone.image_size = MEAN, STD, 64
    return backbone


def saved(tmp_path, side=64):
    path = tmp_path / "backbone.pth"
    checkpoint.save_backbone(path, as_if_trained("resnet5m"), "resnet5m", side, epoch=1)
    return path


def normalised(x):
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def assert_near(features, expected):
    """Within 1e-4 of the features' root mean square."""
    assert features.shape == expected.shape
    assert (features - expected).abs().max() <= 1e-4 * expected.square().mean().sqrt()


def opened(path):
    """An exported program as a function, and what travelled with it."""
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        about = session.get_modelmeta().custom_metadata_map
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), about
    about = dict.fromkeys(("arch", "mean", "std", "image_size", "input"), "")
    return torch.export.load(path, extra_files=about).module(), about


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_a_program_gives_the_features(arch, suffix, tmp_path):
    """At batch 1 and 7 and at all sizes, a ViT's at one; of pixels, or of normalised images."""
    for package in export.FORMATS[suffix][2]:
        pytest.importorskip(package)
    network, normalise = as_if_trained(arch), arch != "resnet5m"
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = tmp_path / f"backbone{suffix}"
    exported = export.export(network, str(path), normalise=normalise)
    assert exported.difference <= 1e-4 and exported.megabytes == os.path.getsize(path) / 1e6
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    program, about = opened(path)
    assert about["arch"] == arch and about["image_size"] == "64"
    assert json.loads(about["mean"]) == list(MEAN) and json.loads(about["std"]) == list(STD)
    assert ("minus mean, over std" in about["input"]) == (not normalise)
    for size in SIZES[:1] if arch in vit.ARCHS else SIZES:
        for batch in (1, 7):
            x = torch.rand(batch, 3, *size)
            assert_near(program(x if normalise else normalised(x)), network(normalised(x)))


def test_what_travels_with_images_of_twelve_bits():
    network = as_if_trained("mobilevit_xxs")
    network.value_range = (0.0, 4095.0)
    assert json.loads(export.about(network, 64)["value_range"]) == [0, 4095]


@torch.no_grad()
def test_weights_travel_by_their_names(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    network, path = as_if_trained("mobilevit_xxs"), str(tmp_path / "backbone.safetensors")
    assert export.export(network, path).difference == 0
    with safetensors.safe_open(path, "pt") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    assert about == {
        "arch": "mobilevit_xxs",
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "image_size": "64",
    }
    expected = network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@torch.no_grad()
def test_timm_takes_the_weights(tmp_path):
    timm = pytest.importorskip("timm")
    network, path = as_if_trained("mobilevit_s"), str(tmp_path / "backbone.safetensors")
    export.export(network, path)
    theirs = timm.create_model("mobilevit_s", num_classes=0, checkpoint_path=path).eval()
    for size in ((64, 64), (96, 160)):
        x = normalised(torch.rand(2, 3, *size))
        assert_near(theirs(x), network(x))


@pytest.mark.slow
def test_the_table_of_what_leaves(capsys, monkeypatch):
    words = "bench_export.py --archs resnet5m --image_size 32 --repeats 1"
    monkeypatch.setattr(sys, "argv", words.split())
    bench_export.main()
    heading, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
    assert heading.startswith("|  | parameters (M) | .pt2, MB | ") and heading.endswith(" k-NN |")
    assert row.startswith("| `resnet5m` | 4.96 | 20.") and row.endswith(" | - |")
    assert row.count("|") == heading.count("|")


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def command(call_script):
    """Run `python -m lowdino.export`: its status, its output and its errors."""

    def call(*words):
        done = call_script("lowdino.export", *words, check=False)
        return done.returncode, done.stdout, done.stderr

    return call


def test_the_command_says_what_it_wrote(command, tmp_path):
    path, threads = saved(tmp_path), torch.get_num_threads()
    status, printed, _ = command(path, tmp_path / "out.pt2", "--normalise", "--image_size", 32)
    assert status == 0 and torch.get_num_threads() == threads
    first, second, third = printed.splitlines()
    assert first.startswith(f"{tmp_path / 'out.pt2'}: resnet5m, 512 features, 20.")
    assert second == (
        "takes float32 images (batch, 3, height, width) of RGB pixels in [0, 1], height and width "
        "in whole 32s"
    )
    assert "1 x 32 x 32 pixels, one thread" in third and "largest difference 0.0e+00" in third


def test_bad_input_of_the_command(command, tmp_path, monkeypatch):
    path = saved(tmp_path, side=40)
    torch.save({"settings": {}, "method": {}}, tmp_path / "checkpoint.pth")
    out = tmp_path / "out.pt2"
    cases = [
        ((path, tmp_path / "out.tflite"), "out.tflite should end in .pt2 or .onnx or .safetensors"),
        ((path, tmp_path / "no" / "out.pt2"), "no writable folder"),
        ((tmp_path / "none.pth", out), "no file"),
        (("mobilevit_s", out), "no file mobilevit_s"),
        ((tmp_path / "checkpoint.pth", out), "give the backbone.pth beside it"),
        (
            (path, out, "--image_size", 40),
            "image size 40 is not in whole 32s: give --image_size 32",
        ),
        ((path, out, "--image_size", -32), "image size -32 is not in whole 32s"),
    ]
    for words, sentence in cases:
        status, output, errors = command(*words)
        assert status == 2 and sentence in errors and errors.count("\n") == 1 and not output, errors
    monkeypatch.setattr(export, "installed", lambda package: False)
    for suffix, packages in ((".onnx", "onnx and onnxscript"), (".safetensors", "safetensors")):
        status, _, errors = command(path, tmp_path / f"out{suffix}")
        assert status == 2 and f"{suffix} needs {packages}: pip install" in errors
    monkeypatch.setattr(export, "installed", lambda package: True)
    _, _, errors = command(path, tmp_path / "out.safetensors", "--normalise")
    assert "--normalise needs .pt2 or .onnx" in errors
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.4.1"))
    assert ".onnx needs torch 2.6 or newer, not 2.4.1" in command(path, tmp_path / "out.onnx")[2]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("out")]


@pytest.mark.parametrize("change", [2e-4, float("nan")])
def test_a_file_of_other_features_is_not_written(command, tmp_path, monkeypatch, change):
    def other(content, backbone):
        size = lambda x: backbone(x).square().mean().sqrt()
        return "another network", lambda x: backbone(x) + change * size(x)

    monkeypatch.setitem(export.FORMATS, ".pt2", (lambda *_: b"content", other, ()))
    path = saved(tmp_path)
    status, _, errors = command(path, tmp_path / "out.pt2")
    assert status == 2 and "is not written: its features differ" in errors
    assert not (tmp_path / "out.pt2").exists()


def test_a_folder_in_the_way(command, tmp_path, monkeypatch):
    monkeypatch.setitem(
        export.FORMATS, ".pt2", (lambda *_: b"content", lambda _, network: ("it", network), ())
    )
    path = saved(tmp_path)
    (tmp_path / "out.pt2").mkdir()
    status, _, errors = command(path, tmp_path / "out.pt2")
    assert status == 2 and "out.pt2: Is a directory" in errors

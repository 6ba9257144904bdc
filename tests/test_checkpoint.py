"""Files: atomic, safe to open, and clear when they do not fit."""

import argparse
import errno
import os
import pickle
import re
import stat

import pytest
import torch
from torch import nn

import lowdino
from lowdino import checkpoint


def test_backbone_file_comes_back_ready(tmp_path):
    backbone = lowdino.build_backbone("mobilevit_xxs")
    with torch.no_grad():
        backbone.stem.bn.running_mean.fill_(0.3)
    backbone.mean, backbone.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    checkpoint.save_backbone(tmp_path / "b.pth", backbone, "mobilevit_xxs", 64, 5, extra=[1])
    assert checkpoint.load(tmp_path / "b.pth")["extra"] == [1]
    again = lowdino.load_backbone(str(tmp_path / "b.pth"))
    assert (
        not again.training
        and again.arch == "mobilevit_xxs"
        and again.image_size == 64
        and again.epoch == 5
    )
    assert again.mean == (0.1, 0.2, 0.3) and again.std == (1.0, 2.0, 3.0)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), backbone.eval()(x))


def test_previous_checkpoint_is_kept_and_stands_in(tmp_path):
    assert checkpoint.load_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, {"step": step, "x": torch.ones(3)})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.prev.pth", "checkpoint.pth"]
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 3
    os.unlink(tmp_path / "checkpoint.pth")  # killed between the two renames
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 2


def test_order_of_an_atomic_write(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    checkpoint.save_atomic(tmp_path / "x.pth", {"a": 1})
    assert calls == ["file", "rename", "folder"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    checkpoint.save_atomic(tmp_path / "x.pth", {"a": 1})
    before = (tmp_path / "x.pth").read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):  # the newer Pythons' is the latter
        checkpoint.save_atomic(tmp_path / "x.pth", {"a": lambda: None})
    assert os.listdir(tmp_path) == ["x.pth"] and (tmp_path / "x.pth").read_bytes() == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_is_one_sentence_and_the_old_file_stays(number, tmp_path, monkeypatch):
    checkpoint.save_atomic(tmp_path / "x.pth", {"a": 1})
    before = (tmp_path / "x.pth").read_bytes()

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError) as caught:
        checkpoint.save_atomic(tmp_path / "x.pth", {"a": 2})
    assert str(caught.value) == f"{tmp_path / 'x.pth'}: {os.strerror(number)}"
    assert os.listdir(tmp_path) == ["x.pth"] and (tmp_path / "x.pth").read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_disk_that_is_full_within_torch_save_is_the_same_sentence(tmp_path):
    with pytest.raises(ValueError, match="x.pth: No space left on device$"):
        with checkpoint.atomic(tmp_path / "x.pth"), open("/dev/full", "wb", 0) as full:
            torch.save({"a": torch.zeros(100_000)}, full)
    with pytest.raises(ValueError, match="x.pth: full$"):
        with checkpoint.atomic(tmp_path / "x.pth"):
            try:
                raise OSError(errno.ENOSPC, "full")
            finally:
                raise RuntimeError("unexpected pos 704 vs 598")  # as of some versions of torch
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x.pth"
    with pytest.raises(ValueError, match=re.escape(f"{path}: Not a directory")):
        checkpoint.save_atomic(path, {})


def test_other_errors_in_an_atomic_write_stay_as_they_are(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), checkpoint.atomic(tmp_path / "x.pth"):
            raise error("a bug, or Ctrl-C")
    assert os.listdir(tmp_path) == []


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/lowdino_was_here",)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot read .*: it is damaged, or not a file of plain tensors"),
        (b"some text", "cannot read .*damaged"),
        (None, "no file "),
        (Malicious(), "cannot read .*not a file of plain tensors"),
        ([1, 2], "holds a list, not a dict"),
    ],
)
def test_bad_files_are_refused_and_never_run(tmp_path, content, message):
    path = tmp_path / "bad.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/lowdino_was_here")


def test_a_folder_is_no_damaged_file(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*: Is a directory"):
        checkpoint.load(tmp_path)


def test_truncated_file_is_refused(tmp_path):
    torch.save({"a": torch.randn(1000)}, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot read .*damaged"):
        checkpoint.load(tmp_path / "x.pth")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    warnings = []
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"step": step})
    (tmp_path / "checkpoint.pth").write_bytes(b"half a fi")
    assert checkpoint.load_checkpoint(tmp_path, warnings.append) == {"step": 1}
    assert len(warnings) == 1 and re.search(
        "checkpoint.pth: it is damaged.*: going back to .*checkpoint.prev.pth", warnings[0]
    )
    checkpoint.save_atomic(
        tmp_path / "checkpoint.new.pth", {"step": 3}
    )  # killed between two renames
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 3
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        ValueError,
        match="checkpoint.new.pth: .*checkpoint.pth: .*checkpoint.prev.pth: it is damaged",
    ):
        checkpoint.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ({0: torch.zeros(1)}, "holds no state dict"),
        ({"state_dict": [1]}, "holds no state dict"),
    ],
)
def test_files_that_hold_no_backbone(content, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load_backbone_weights(nn.Linear(2, 3), content, "file")


def test_weights_that_do_not_fit_are_counted():
    model = nn.Sequential(nn.Linear(2, 3))
    bad = {"0.weight": torch.zeros(4, 2), "1.weight": torch.zeros(1), "fc.weight": torch.zeros(9)}
    with pytest.raises(
        ValueError,
        match=r"1 missing \(first 0.bias\), 1 unexpected \(first 1.weight\), "
        r"1 of another shape \(first 0.weight\)",
    ):
        checkpoint.load_backbone_weights(model, bad, "file")


def test_a_classifier_in_the_file_is_left_out():
    import torchvision

    theirs = torchvision.models.resnet18(weights=None)
    ours = lowdino.build_backbone("resnet18")
    checkpoint.load_backbone_weights(ours, theirs.state_dict(), "file")
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)


def test_a_training_checkpoint_is_no_backbone_file(tmp_path):
    checkpoint.save_checkpoint(tmp_path, {"settings": {}, "step": 1})
    with pytest.raises(
        ValueError, match="checkpoint.pth is a training checkpoint; give the backbone.pth beside it"
    ):
        lowdino.load_backbone(str(tmp_path / "checkpoint.pth"))


# --------------------------------------------------------------------------------------------------
# Files of others
# --------------------------------------------------------------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
AS_THEY_ARE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def assert_loads(path, network, arch=None):
    """The file holds `network`, which comes back in eval mode."""
    backbone = lowdino.load_backbone(str(path), arch)
    assert backbone.arch == network.arch and not backbone.training
    assert backbone.state_dict().keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    return backbone


def official_checkpoint(network, wrapped, **more):
    """What the official DINO saves: a student within DistributedDataParallel, flags, a teacher.

    The teacher is within DistributedDataParallel too where it has batch norm.
    """
    ours = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    ours["head.last_layer.weight_g"] = torch.ones(8, 1)
    teacher = {f"module.{name}": value for name, value in ours.items()} if wrapped else ours
    student = {f"module.{name}": torch.zeros_like(value) for name, value in ours.items()}
    return dict(student=student, teacher=teacher, optimizer={}, epoch=3, dino_loss={}) | more


@pytest.mark.parametrize(
    "arch, wrapped, flag", [("vit_tiny", False, "vit_tiny"), ("resnet18", True, "resnet18")]
)
def test_the_teacher_of_an_official_training_checkpoint(arch, wrapped, flag, tmp_path):
    network = lowdino.build_backbone(arch)
    flags = argparse.Namespace(arch=flag, patch_size=16)
    torch.save(official_checkpoint(network, wrapped, args=flags), tmp_path / "dino.pth")
    backbone = assert_loads(tmp_path / "dino.pth", network)
    assert backbone.epoch == 3 and not hasattr(backbone, "image_size")
    assert (backbone.mean, backbone.std) == IMAGENET
    assert_loads(tmp_path / "dino.pth", network, arch)


def test_flags_in_a_file_are_read_and_nothing_else_is_allowed_by_it(tmp_path):
    before = list(torch.serialization.get_safe_globals())  # torch 2.4 gives its own list
    torch.save({"args": argparse.Namespace(x=1)}, tmp_path / "flags.pth")
    assert checkpoint.load(tmp_path / "flags.pth")["args"].x == 1
    torch.save({"args": argparse.Namespace(x=Malicious())}, tmp_path / "flags.pth")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        checkpoint.load(tmp_path / "flags.pth")
    assert not os.path.exists("/tmp/lowdino_was_here")
    assert list(torch.serialization.get_safe_globals()) == before


def test_a_teacher_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="holds a teacher without a backbone"):
        checkpoint.weights_of({"teacher": {"head.weight": torch.ones(1)}}, "file")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_file_with_arch_epoch_and_state_dict(key, tmp_path):
    network = lowdino.build_backbone("resnet18")
    content = {"arch": "resnet18", "epoch": 3, key: network.state_dict()}
    torch.save(content, tmp_path / "example.pth")
    backbone = assert_loads(tmp_path / "example.pth", network)
    assert backbone.epoch == 3 and not hasattr(backbone, "image_size")
    assert (backbone.mean, backbone.std) == IMAGENET
    with pytest.raises(ValueError, match="holds resnet18, not resnet34"):
        lowdino.load_backbone(str(tmp_path / "example.pth"), "resnet34")


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone."])
def test_known_prefixes_are_taken_off_all_names_or_none(prefix, tmp_path):
    network = lowdino.build_backbone("resnet18")
    weights = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(weights, tmp_path / "wrapped.pth")
    assert_loads(tmp_path / "wrapped.pth", network, "resnet18")
    torch.save({"state_dict": weights, "arch": "resnet18"}, tmp_path / "wrapped.pth")
    assert_loads(tmp_path / "wrapped.pth", network)
    weights["conv1.weight"] = weights.pop(prefix + "conv1.weight")
    torch.save(weights, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match=rf"unexpected \(first {prefix}bn1.bias"):
        lowdino.load_backbone(str(tmp_path / "wrapped.pth"), "resnet18")


def test_a_vit_says_its_own_shape_and_a_convnet_must_be_named(tmp_path):
    network = lowdino.build_backbone("vit_tiny", image_size=64)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    assert_loads(tmp_path / "vit.pth", network)
    with pytest.raises(ValueError, match="holds a vit_tiny, not vit_small"):
        lowdino.load_backbone(str(tmp_path / "vit.pth"), "vit_small")
    torch.save(lowdino.build_backbone("resnet18").state_dict(), tmp_path / "convnet.pth")
    with pytest.raises(ValueError, match="does not name its architecture; it is one of"):
        lowdino.load_backbone(str(tmp_path / "convnet.pth"))


def test_the_normalisation_is_the_files_else_that_of_who_trains_such_networks(tmp_path):
    path = tmp_path / "x.pth"

    def normalisation(content, arch=None):
        torch.save(content, path)
        backbone = lowdino.load_backbone(str(path), arch)
        return backbone.mean, backbone.std

    mobilevit = lowdino.build_backbone("mobilevit_xxs")
    assert (mobilevit.mean, mobilevit.std) == IMAGENET
    checkpoint.save_backbone(path, mobilevit, "mobilevit_xxs", 64, 5)  # what train.py writes
    ours = checkpoint.load(path)
    assert normalisation(ours) == IMAGENET
    assert normalisation(ours | {"mean": [0.1] * 3, "std": [0.2] * 3}) == ((0.1,) * 3, (0.2,) * 3)
    # timm trains MobileViT on images in [0, 1].
    weights = mobilevit.state_dict()
    assert normalisation(weights, "mobilevit_xxs") == AS_THEY_ARE
    assert normalisation({"arch": "mobilevit_xxs", "state_dict": weights}) == AS_THEY_ARE
    assert normalisation(lowdino.build_backbone("resnet18").state_dict(), "resnet18") == IMAGENET
    assert normalisation(lowdino.build_backbone("vit_tiny").state_dict()) == IMAGENET
    assert (lowdino.build_backbone("mobilevit_xxs").mean) == IMAGENET[0]  # the class is as it was

"""Files: atomic, safe to open, and clear when they do not fit."""

import os
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
    checkpoint.save_backbone(
        tmp_path / "b.pth", backbone, "mobilevit_xxs", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 64, 5
    )
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
    with pytest.raises(Exception):
        checkpoint.save_atomic(tmp_path / "x.pth", {"a": lambda: None})  # cannot be pickled
    assert os.listdir(tmp_path) == ["x.pth"] and (tmp_path / "x.pth").read_bytes() == before


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
        ([1, 2], "holds a list, where a dict"),
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


def test_truncated_file_is_refused(tmp_path):
    torch.save({"a": torch.randn(1000)}, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot read .*damaged"):
        checkpoint.load(tmp_path / "x.pth")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    said = []
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"step": step})
    (tmp_path / "checkpoint.pth").write_bytes(b"half a fi")
    assert checkpoint.load_checkpoint(tmp_path, said.append) == {"step": 1}
    assert len(said) == 1 and re.search(
        "checkpoint.pth: it is damaged.*: going back to .*checkpoint.prev.pth", said[0]
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
        match=r"1 missing \(first 0.bias\), 1 unexpected \(first 1.weight\), 1 of another shape \(first 0.weight\)",
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

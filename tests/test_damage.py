"""Full disks, damaged or moved files, other settings: a run resumes exactly, or says why not."""

import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, is_one_sentence, saved, saved_step, stepwise

import lowdino
from lowdino import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of an unhurt run's output folder."""
    return shutil.copytree(whole[1], tmp_path / "out")


@pytest.fixture
def at_step_11(finished):
    """The same without the last of its twelve steps."""
    shutil.copy(finished / "checkpoint.prev.pth", finished / "checkpoint.pth")
    return finished


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------
# Disk
# --------------------------------------------------------------------------------------------------


def test_full_disk_is_one_sentence_and_leaves_the_checkpoint(whole, at_step_11, call_script):
    before = files(at_step_11)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pth"]) // 2, limits[1]))
    try:
        done = call_script("train.py", *stepwise(whole[0], at_step_11), check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_one_sentence(done, r"^train.py: error: .*/checkpoint\S*.pth: File too large\n$")
    after = files(at_step_11)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in after if name.startswith("checkpoint"))


def test_a_folder_that_cannot_be_written_to_is_one_sentence(whole, call_script):
    folder = Path("/proc/self/fdinfo")  # refuses even the superuser
    if not folder.is_dir():
        pytest.skip("needs Linux's /proc")
    done = call_script("train.py", *stepwise(whole[0], folder), check=False)
    assert is_one_sentence(done, r"^train.py: error: /proc/self/fdinfo\S*: .*\n$")


# --------------------------------------------------------------------------------------------------
# Damaged checkpoints
# --------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_falls_back_aloud(whole, finished, call_script):
    damaged = finished / "checkpoint.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    done = call_script("train.py", *stepwise(whole[0], finished))
    assert re.search(
        r"!{80}\nWARNING: cannot read .*/checkpoint.pth: it is damaged.*: "
        r"going back to .*/checkpoint.prev.pth\n!{80}",
        done.stdout,
    )
    assert "after step 11" in done.stdout
    assert_same_run(whole[1], finished)


def test_any_flipped_bit_is_seen_or_without_effect(tmp_path):
    content = {"a": torch.arange(500.0), "step": 7, "settings": {"arch": "resnet5m"}}
    checkpoint.save_atomic(tmp_path / "x.pth", content)
    rest = {name: value for name, value in content.items() if name != "a"}
    intact, lot, seen = (tmp_path / "x.pth").read_bytes(), random.Random(0), 0
    for _ in range(400):
        hurt = bytearray(intact)
        hurt[lot.randrange(len(hurt))] ^= 1 << lot.randrange(8)
        (tmp_path / "x.pth").write_bytes(hurt)
        try:
            loaded = checkpoint.load(tmp_path / "x.pth")
            assert torch.equal(loaded.pop("a"), content["a"]) and loaded == rest
        except ValueError as error:
            assert "it is damaged" in str(error)
            seen += 1
    assert seen > 200


# --------------------------------------------------------------------------------------------------
# Other settings, other images
# --------------------------------------------------------------------------------------------------


def change_settings(folder, change):
    """Have a checkpoint say that its run had other settings."""
    content = saved(folder)
    change(content["settings"])
    checkpoint.save_atomic(folder / "checkpoint.pth", content)


def test_only_settings_that_a_checkpoint_knows_are_compared(whole, at_step_11, call_script):
    """So that a flag which is newer than the checkpoint does not refuse it."""
    change_settings(at_step_11, lambda theirs: theirs.pop("clip_grad"))
    done = call_script("train.py", *stepwise(whole[0], at_step_11))
    assert "after step 11" in done.stdout and "clip_grad" in saved(at_step_11)["settings"]
    assert_same_run(whole[1], at_step_11)


def test_other_images_and_another_number_of_ranks_are_refused(
    whole, finished, tmp_path, call_script
):
    # The same images at another place are the same.
    pictures = shutil.copytree(whole[0], tmp_path / "pictures")
    flags = stepwise(pictures, finished)
    assert "already finished" in call_script("train.py", *flags).stdout
    added = pictures / "train" / "dark" / "new.png"
    shutil.copy(pictures / "train" / "dark" / "0.png", added)
    done = call_script("train.py", *flags, check=False)
    assert is_one_sentence(done, r"cannot resume from .* images 24, names \w+, not 25, names \w+")
    added.unlink()
    change_settings(finished, lambda theirs: theirs.update(world=2))
    done = call_script("train.py", *flags, check=False)
    assert is_one_sentence(done, "cannot resume from .* world 2, not 1")


@pytest.mark.slow
def test_changed_settings_are_accepted_by_a_flag(whole, finished, call_script):
    flags, changed = stepwise(whole[0], finished), "epochs 2, not 3; clip_grad 3.0, not 1.0"
    more = [*flags, "--epochs", 3, "--clip_grad", 1]
    refused = call_script("train.py", *more, check=False)
    assert is_one_sentence(refused, f"{changed}.*--accept_changes")
    done = call_script("train.py", *more, "--accept_changes")
    assert changed in done.stdout and saved_step(finished) == 18
    fewer = call_script("train.py", *flags, "--epochs", 1, "--accept_changes", check=False)
    assert is_one_sentence(fewer, "it has made 18 steps, and 6 are asked for")


def test_another_network_is_refused_whatever_is_accepted(whole, finished, call_script):
    before = files(finished)
    flags = stepwise(whole[0], finished, "--arch resnet5m --accept_changes")
    done = call_script("train.py", *flags, check=False)
    refused = "cannot resume from .*: its run has arch mobilevit_xxs, not resnet5m: give another"
    assert is_one_sentence(done, refused) and len(done.stderr) < 400
    assert files(finished) == before


def test_what_a_run_starts_from_is_known_by_its_weights(whole, tmp_path, call_script):
    out, there, moved = tmp_path / "out", tmp_path / "a.pth", tmp_path / "moved" / "b.pth"
    moved.parent.mkdir()
    torch.save(lowdino.build_backbone("mobilevit_xxs").state_dict(), there)
    flags = stepwise(whole[0], out, "--epochs 1 --knn_freq 0")
    call_script("train.py", *flags, "--init", there, "--output_dir", tmp_path / "unhurt")
    call_script("train.py", *flags, "--init", there)
    (out / "checkpoint.prev.pth").replace(out / "checkpoint.pth")
    there.rename(moved)
    done = call_script("train.py", *flags, "--init", moved)
    assert "after step 5" in done.stdout
    assert_same_run(tmp_path / "unhurt", out)
    torch.save(lowdino.build_backbone("mobilevit_xxs").state_dict(), moved)
    done = call_script("train.py", *flags, "--init", moved, check=False)
    assert is_one_sentence(done, r"cannot resume from .* init \w{16}, not \w{16}; ")

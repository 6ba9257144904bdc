"""Steps whose loss is not finite, and images that cannot be read, are left out or a clear stop."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import (
    assert_equal,
    assert_same_run,
    at_step,
    is_one_sentence,
    one_thread_each,
    saved_step,
    small,
    stepwise,
    torchrun,
    train_here,
)

import train
from lowdino import budget, data, methods

pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------------------------------
# Losses and gradients that are not finite
# --------------------------------------------------------------------------------------------------


@contextmanager
def poisoned(steps, where="loss"):
    """On the last rank, the loss of some steps is NaN, or its gradients alone are infinite."""
    forward = methods.DINO.forward
    last = int(os.environ.get("WORLD_SIZE", 1)) - 1

    def spoil(self, views, batch=None, step=0):
        loss = forward(self, views, batch, step)
        if step not in steps or int(os.environ.get("RANK", 0)) != last:
            return loss
        if where == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.DINO, "forward", spoil)
        yield


@pytest.mark.parametrize("where", ["loss", pytest.param("gradients", marks=pytest.mark.slow)])
def test_nothing_changes_in_a_step_that_is_not_finite(where, picture_folder, tmp_path, call_script):
    flags = stepwise(picture_folder, tmp_path, "--epochs 1 --use_bn_in_head true")
    with poisoned({3}, where):
        done = call_script("train.py", *flags, check=False)
    named = r"on rank 0 for images \S+/train/(dark|light)/\d+.png, "
    assert is_one_sentence(done, rf"diverging loss at step 4: it is \S+ .*{named}")
    assert saved_step(tmp_path) == 3
    flags += ["--skip_nonfinite", "2"]
    with poisoned({3, 4, 5}, where):
        done = call_script("train.py", *flags, check=False)
    assert is_one_sentence(done) and done.stdout.count("undone") == 2
    with poisoned({3, 5}, where):
        done = call_script("train.py", *flags, "--output_dir", tmp_path / "b")
    assert done.stdout.count("undone, 1 in a row") == 2
    last, before = (
        torch.load(tmp_path / "b" / f"checkpoint{which}.pth", weights_only=True)
        for which in ("", ".prev")
    )
    assert (last["step"], before["step"]) == (6, 5)
    assert_equal(last["method"], before["method"], "method")  # weights, statistics, centre
    assert_equal(last["optimizer"]["state"], before["optimizer"]["state"], "optimizer")


@pytest.mark.slow
def test_float16_that_overflows_is_left_out_and_stops_where_no_scale_helps(
    picture_folder, tmp_path, capsys, monkeypatch
):
    # A CPU is slow at it, and `amp_of` refuses it there.
    monkeypatch.setattr(budget, "amp_of", lambda *_: "fp16")
    text = "--save_every_steps 0 --knn_freq 0 --skip_nonfinite 1 --accept_changes --epochs"

    def run(epochs):
        train_here(stepwise(picture_folder, tmp_path, f"{text} {epochs}"))

    with poisoned({1}):
        run(epochs=1)
    assert "undone, 1 in a row" in capsys.readouterr().out and saved_step(tmp_path) == 6
    said = r"diverging gradients at step \d+: at no scale does float16"
    with poisoned(range(100), "gradients"), pytest.raises(FloatingPointError, match=said):
        run(epochs=8)
    assert saved_step(tmp_path) in (18, 24, 30)  # by the scale that the steps before left


def poisoned_rank(flags, where):
    """As train.py on one of two ranks, of which the last has a bad third step."""
    sys.argv = ["train.py", *flags]
    with poisoned({2}, where):
        train.main()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_one_rank_stops_both_before_anything_changes(where, picture_folder, tmp_path):
    # InfoNCE, over the images of all ranks, would spread bad gradients to all of them.
    flags = stepwise(picture_folder, tmp_path / "out", "--knn_freq 0 --infonce_weight 0")
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import test_bad_steps\ntest_bad_steps.poisoned_rank({flags!r}, {where!r})\n"
    )
    command = torchrun(tmp_path / "run.py", [])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=one_thread_each()
    )
    said = r"diverging loss at step 3: it is \S+ .*on rank 1 for images \S+.png"
    assert done.returncode != 0 and re.search(said, done.stderr)
    assert "on rank 0" not in done.stderr
    assert saved_step(tmp_path / "out") == 2


# --------------------------------------------------------------------------------------------------
# Bad images
# --------------------------------------------------------------------------------------------------


def spoil_some(folder):
    """Four images that cannot be read, four odd ones that can; the names of the former."""
    good = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("CMYK", (40, 32), (10, 60, 90, 0)).save(folder / "cmyk.jpg")
    Image.new("I;16", (40, 32), 40000).save(folder / "deep.png")
    Image.new("LA", (40, 32)).save(folder / "veiled.png")
    (folder / "loop").symlink_to(folder.parent, target_is_directory=True)
    return {"truncated.png", "empty.png", "text.jpg", "bomb.png"}


@pytest.mark.slow
def test_bad_images_are_named_and_replaced_alike_whatever_the_workers(
    picture_folder, tmp_path, call_script
):
    bad = spoil_some(picture_folder / "train" / "dark")
    for out, workers in (("a", 0), ("b", 2)):
        more = dict(num_workers=workers, max_bad_fraction=0.2)
        done = call_script("train.py", *stepwise(picture_folder, tmp_path / out, **more))
        assert "32 images" in done.stdout and "4 images could not be read; see " in done.stdout
        lines = (tmp_path / out / "bad_images.txt").read_text().splitlines()
        assert all(line.startswith("cannot read image ") for line in lines)
        assert {os.path.basename(line.split(":")[0]) for line in lines} == bad and len(lines) == 4
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_too_many_bad_images_are_a_clear_stop(picture_folder, tmp_path, call_script):
    spoil_some(picture_folder / "train" / "dark")
    done = call_script("train.py", *stepwise(picture_folder, tmp_path), check=False)
    assert is_one_sentence(
        done,
        r"train.py: error: \d of 32 images cannot be read, more than --max_bad_fraction 0.01; "
        r".*/bad_images.txt lists them: repair them, then delete it; the last: cannot read image ",
    )
    again = call_script("train.py", *stepwise(picture_folder, tmp_path), check=False)
    assert again.returncode == 2 and again.stderr == done.stderr


@pytest.mark.slow
def test_an_image_deleted_during_the_run_is_replaced(picture_folder, tmp_path, call_script):
    flags = stepwise(picture_folder, tmp_path, "--knn_freq 0 --max_bad_fraction 0.05")
    with at_step(6, (picture_folder / "train" / "dark" / "3.png").unlink):
        call_script("train.py", *flags)
    noted = (tmp_path / "bad_images.txt").read_text()
    assert re.fullmatch(r"cannot read image .*/dark/3.png: .*No such file.*\n", noted)


def test_a_folder_of_bad_images_only_is_refused(tmp_path):
    (tmp_path / "a.png").touch()
    images = data.ImageFiles([str(tmp_path / "a.png")])
    images.replace_bad = True
    with pytest.raises(ValueError, match="cannot read image .*a.png"):
        images[0]
    with pytest.raises(ValueError, match="cannot read image .*a.png"):
        data.suitable_size(images)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence(picture_folder, tmp_path, call_script, workers):
    (picture_folder / "train" / "dark" / "5.png").write_bytes(b"no picture")
    more = dict(num_workers=workers, data_path=picture_folder / "train", output_dir=tmp_path / "o")
    done = call_script("train.py", *small("--epochs 1", **more), check=False)
    said = r"^train.py: error: 1 of 24 images cannot be read.* cannot read image .*/dark/5.png: "
    assert is_one_sentence(done, said)
    flags = ["--pixels", "--data_path", picture_folder, "--num_workers", workers]
    done = call_script("eval_knn.py", *flags, check=False)
    assert is_one_sentence(done, r"^eval_knn.py: error: cannot read image .*/dark/5.png: ")

"""Runs that are stopped, killed, starved of disk or fed nonsense: nothing is lost, and the end is that of an unhurt run."""

import ast
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import ROOT, draw_pictures, restore_signals
from PIL import Image
from test_scripts import SMALL, assert_same_run, records

import train
from lowdino import checkpoint, data, distributed, evaluate, optim


def flags(folder, out, *more):
    """Two epochs of six steps, each step saved."""
    return [
        *SMALL,
        "--data_path",
        folder,
        "--output_dir",
        out,
        "--save_every_steps",
        "1",
        "--epochs",
        "2",
        "--num_workers",
        "0",
        *more,
    ]


def saved_step(folder):
    found = checkpoint.load_checkpoint(folder)
    return found["step"] if found else 0


@contextmanager
def at_step(n, do):
    """Call do() within the n-th step that is made, between backward pass and update."""
    calls, clip = [], optim.clip_gradients_by_parameter

    def count(*args):
        calls.append(None)
        if len(calls) == n:
            do()
        return clip(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "clip_gradients_by_parameter", count)
        yield


def terminate(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs are alike bit for bit where their sums are shared out alike, and the processes started here have one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(one_thread, tmp_path_factory):
    """An unhurt run's images and its output folder."""
    folder = tmp_path_factory.mktemp("whole")
    draw_pictures(folder / "pictures")
    args = train.parse(
        train.get_parser(), [str(f) for f in flags(folder / "pictures", folder / "out")]
    )
    ranks = distributed.start("cpu")
    train.train(args, ranks, train.settle(args, ranks), train.SelfDistillation)
    restore_signals()
    return folder / "pictures", folder / "out"


@pytest.mark.parametrize(
    "step, number",
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        (3, signal.SIGTERM),
        (3, signal.SIGUSR1),
        pytest.param(6, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signalled_run_saves_stops_and_goes_on_exactly(
    step, number, whole, tmp_path, call_script
):
    """The first step, one between two log lines, the last of an epoch."""
    pictures, unhurt = whole
    with at_step(step, lambda: (terminate(number), terminate(number))):
        done = call_script(
            "train.py", *flags(pictures, tmp_path), "--save_every_steps", 0, check=False
        )
    assert done.returncode == distributed.STOPPED == 75
    assert (
        f"stopped by a signal after step {step}, which is saved" in done.stdout
        and saved_step(tmp_path) == step
    )
    done = call_script("train.py", *flags(pictures, tmp_path))
    assert f"going on from {tmp_path} after step {step}" in done.stdout
    assert_same_run(unhurt, tmp_path)
    assert records(tmp_path, "knn") == records(unhurt, "knn")


def signalled_while_evaluating(script_flags):
    """In a process of its own: SIGTERM comes in the third evaluation, after the last step; the exit status."""
    calls, accuracy = [], evaluate.knn_accuracy

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 3:
            terminate()
        return accuracy(*args)

    evaluate.knn_accuracy = interrupt
    print(os.waitstatus_to_exitcode(os.waitpid(forked(script_flags), 0)[1]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_evaluating_stops_at_once_and_loses_nothing(
    workers, whole, tmp_path, call_script
):
    pictures, unhurt = whole
    settings = [str(f) for f in flags(pictures, tmp_path, "--num_workers", workers)]
    assert in_a_new_process(f"signalled_while_evaluating({settings!r})") == "75\n"
    assert len(records(tmp_path, "knn")) == 2
    done = call_script("train.py", *settings)
    assert "k-NN (k=20) accuracy" in done.stdout
    assert_same_run(unhurt, tmp_path)
    assert records(tmp_path, "knn") == records(unhurt, "knn")


def signalled_in_a_loader(script_flags):
    """In a process of its own: SIGTERM comes when the first evaluation has started one of its loader's processes."""
    start = multiprocessing.process.BaseProcess.start

    def interrupt(self):
        start(self)
        terminate()

    multiprocessing.process.BaseProcess.start = interrupt
    print(os.waitstatus_to_exitcode(os.waitpid(forked(script_flags), 0)[1]))


@pytest.mark.slow
def test_a_signal_while_a_loader_starts_does_not_hang(whole, tmp_path):
    settings = [str(f) for f in flags(whole[0], tmp_path, "--num_workers", 2)]
    assert in_a_new_process(f"signalled_in_a_loader({settings!r})") == "75\n"


def start_ranks(script_flags, log, *launcher):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        *launcher,
        str(ROOT / "train.py"),
    ]
    return subprocess.Popen(
        [*command, *map(str, script_flags)],
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def ranks_of(process):
    """Process ids of the ranks that a torchrun started."""
    return [
        int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, to",
    [(signal.SIGTERM, "torchrun"), (signal.SIGUSR1, "torchrun"), (signal.SIGTERM, "rank 1")],
)
def test_two_ranks_agree_where_to_stop(number, to, picture_folder, tmp_path, run_script):
    settings = flags(
        picture_folder, tmp_path / "out", "--epochs", 6, "--save_every_steps", 0, "--knn_freq", 0
    )
    process = start_ranks(settings, tmp_path / "log")
    wait_for((tmp_path / "out" / "checkpoint.pth").exists, process)
    pids = ranks_of(process)
    os.kill(process.pid if to == "torchrun" else pids[1], number)
    assert process.wait(timeout=60) != 0
    end = (
        time.monotonic() + 30
    )  # SIGUSR1 ends torchrun itself at once; its ranks notice, save and follow
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)
    said = re.search(r"stopped by a signal after step (\d+)", (tmp_path / "log").read_text())
    assert int(said[1]) == saved_step(tmp_path / "out") < 18
    if to == "rank 1":
        assert "(exitcode: 75)" in (tmp_path / "log").read_text()
    run_script("train.py", *settings, ranks=2)
    run_script("train.py", *settings, "--output_dir", tmp_path / "unhurt", ranks=2)
    assert_same_run(tmp_path / "unhurt", tmp_path / "out")


@pytest.mark.slow
def test_torchrun_restarts_after_the_death_of_a_rank(picture_folder, tmp_path, run_script):
    settings = flags(picture_folder, tmp_path / "out", "--epochs", 6, "--knn_freq", 0)
    process = start_ranks(settings, tmp_path / "log", "--max-restarts=1")
    wait_for((tmp_path / "out" / "checkpoint.prev.pth").exists, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "log").read_text().count("going on from") == 1
    run_script("train.py", *settings, "--output_dir", tmp_path / "unhurt", ranks=2)
    assert_same_run(tmp_path / "unhurt", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# SIGKILL
# ---------------------------------------------------------------------------------------------------------------------


def forked(script_flags, hurt=None, script="train", log=os.devnull):
    """Start a script in a fork of this process, which has imported all it needs but used no thread; its process id."""
    if pid := os.fork():
        return pid
    if hurt:
        hurt()
    sys.argv = [f"{script}.py", *map(str, script_flags)]
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    status = 1
    try:
        importlib.import_module(script).main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_in_save(bytes_written):
    """The third checkpoint of the next training stops after so many bytes."""
    calls, save = [], torch.save

    def partly(content, file):
        calls.append(None)
        if len(calls) == 3:
            save(content, whole := Path(file.name + ".whole"))
            file.write(whole.read_bytes()[:bytes_written])
            file.flush()
            whole.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    torch.save = partly


def die_in_rename(n):
    """The n-th renaming of the next training is its last act."""
    calls, replace = [], os.replace

    def counted(*args):
        replace(*args)
        calls.append(None)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted


def kill_thirty_times(out, script_flags):
    """In a process of its own: a run is killed at thirty random moments; each time a checkpoint as new as its log is there."""
    moments, before = random.Random(0), 0
    for _ in range(30):
        pid = forked(script_flags)
        time.sleep(moments.uniform(0.1, 1.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = saved_step(out)
        lines = (
            (Path(out) / "log.jsonl").read_text().splitlines(keepends=True)
            if (Path(out) / "log.jsonl").exists()
            else []
        )
        logged = max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
        assert step >= before and step >= logged - 1, (
            step,
            before,
            logged,
        )  # of each step the log is written, then the checkpoint
        before = step
    print("survived", before)
    assert os.waitpid(forked(script_flags), 0)[1] == 0


def in_a_new_process(call):
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport test_survival\nfrom test_survival import *\n{call}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=3000,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_thirty_kills(picture_folder, tmp_path, call_script):
    settings = [
        str(f)
        for f in flags(
            picture_folder, tmp_path / "out", "--epochs", 100, "--log_freq", 1, "--knn_freq", 0
        )
    ]
    said = in_a_new_process(f"kill_thirty_times({str(tmp_path / 'out')!r}, {settings!r})")
    assert (
        0 < int(said.split()[-1]) < 600
    )  # a fast machine does not come to the end before the last kill
    in_a_new_process(
        f"os.waitpid(forked({[*settings, '--output_dir', str(tmp_path / 'unhurt')]!r}), 0)"
    )
    assert_same_run(tmp_path / "unhurt", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "hurt, step",
    [(f"die_in_save({n})", 2) for n in (0, 1, 1000, 10**6)]
    + [(f"die_in_rename({n})", step) for n, step in ((3, 1), (4, 1), (5, 2), (6, 2), (7, 2))],
)
def test_killed_in_a_save(hurt, step, whole, tmp_path, call_script):
    """args.json and crops.png are renamed once each, the first checkpoint twice, the second three times."""
    pictures, unhurt = whole
    settings = [str(f) for f in flags(pictures, tmp_path)]
    said = in_a_new_process(f"print(os.waitpid(forked({settings!r}, lambda: {hurt}), 0)[1])")
    assert int(said) == signal.SIGKILL and saved_step(tmp_path) == step
    call_script("train.py", *settings)
    assert_same_run(unhurt, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------------


def test_full_disk_is_one_sentence_and_leaves_the_checkpoint(whole, tmp_path, call_script):
    pictures, _ = whole
    shutil.copytree(whole[1], tmp_path / "out")
    for name in ("checkpoint.pth", "checkpoint.prev.pth"):  # as at step 11
        shutil.copy(whole[1] / "checkpoint.prev.pth", tmp_path / "out" / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pth"]) // 2, limits[1]))
    try:
        done = call_script(
            "train.py", *flags(pictures, tmp_path / "out"), "--epochs", 2, check=False
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.returncode == 2 and re.fullmatch(
        r"train.py: error: .*/checkpoint\S*.pth: File too large\n", done.stderr
    )
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys() and all(
        after[name] == before[name] for name in after if name.startswith("checkpoint")
    )


def test_a_folder_that_cannot_be_written_to_is_one_sentence(whole, call_script):
    pictures, _ = whole
    folder = Path("/proc/self/fdinfo")  # refuses even the superuser
    if not folder.is_dir():
        pytest.skip("there is no such folder here")
    done = call_script("train.py", *flags(pictures, folder), check=False)
    assert done.returncode == 2 and re.fullmatch(
        r"train.py: error: /proc/self/fdinfo\S*: .*\n", done.stderr
    )


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_falls_back_aloud(whole, tmp_path, call_script):
    pictures, unhurt = whole
    shutil.copytree(unhurt, tmp_path / "out")
    damaged = tmp_path / "out" / "checkpoint.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    done = call_script("train.py", *flags(pictures, tmp_path / "out"))
    assert re.search(
        r"!{80}\nWARNING: cannot read .*/checkpoint.pth: it is damaged.*: going back to .*/checkpoint.prev.pth\n!{80}",
        done.stdout,
    )
    assert "after step 11" in done.stdout
    assert_same_run(unhurt, tmp_path / "out")


def test_any_flipped_bit_is_seen_or_without_effect(tmp_path):
    content = {"a": torch.arange(500.0), "step": 7, "settings": {"arch": "resnet5m"}}
    checkpoint.save_atomic(tmp_path / "x.pth", content)
    whole, lot, seen = (tmp_path / "x.pth").read_bytes(), random.Random(0), 0
    for _ in range(400):
        hurt = bytearray(whole)
        hurt[lot.randrange(len(hurt))] ^= 1 << lot.randrange(8)
        (tmp_path / "x.pth").write_bytes(hurt)
        try:
            found = checkpoint.load(tmp_path / "x.pth")
            assert torch.equal(found.pop("a"), content["a"]) and found == {
                k: v for k, v in content.items() if k != "a"
            }
        except ValueError as error:
            assert "it is damaged" in str(error)
            seen += 1
    assert seen > 200


def test_other_images_and_another_number_of_ranks_are_refused(whole, tmp_path, call_script):
    pictures, unhurt = whole
    shutil.copytree(unhurt, tmp_path / "out")
    shutil.copytree(pictures, tmp_path / "pictures")  # the same images at another place
    settings = flags(tmp_path / "pictures", tmp_path / "out")
    assert "already finished" in call_script("train.py", *settings).stdout
    added = tmp_path / "pictures" / "train" / "dark" / "new.png"
    shutil.copy(tmp_path / "pictures" / "train" / "dark" / "0.png", added)
    done = call_script("train.py", *settings, check=False)
    assert done.returncode == 2 and re.search(
        r"holds a run with.* images 24, names \w+, not 25, names \w+", done.stderr
    )
    added.unlink()
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    content["settings"]["world"] = 2
    checkpoint.save_atomic(tmp_path / "out" / "checkpoint.pth", content)
    done = call_script("train.py", *settings, check=False)
    assert (
        done.returncode == 2
        and "holds a run with" in done.stderr
        and "world 2, not 1" in done.stderr
    )


@pytest.mark.slow
def test_changed_settings_are_accepted_by_a_flag(whole, tmp_path, call_script):
    pictures, unhurt = whole
    shutil.copytree(unhurt, tmp_path / "out")
    changed = [*flags(pictures, tmp_path / "out"), "--epochs", 3, "--clip_grad", 1]
    refused = call_script("train.py", *changed, check=False)
    assert (
        refused.returncode == 2
        and "epochs 2, not 3; clip_grad 3.0, not 1.0" in refused.stderr
        and "--accept_changes" in refused.stderr
    )
    done = call_script("train.py", *changed, "--accept_changes")
    assert (
        "epochs 2, not 3; clip_grad 3.0, not 1.0" in done.stdout
        and saved_step(tmp_path / "out") == 18
    )
    other = call_script(
        "train.py",
        *flags(pictures, tmp_path / "out"),
        "--arch",
        "resnet5m",
        "--accept_changes",
        check=False,
    )
    assert (
        other.returncode == 2
        and "holds a run that these settings cannot go on with" in other.stderr
        and other.stderr.count("\n") == 1
    )
    fewer = call_script(
        "train.py",
        *flags(pictures, tmp_path / "out"),
        "--epochs",
        1,
        "--accept_changes",
        check=False,
    )
    assert fewer.returncode == 2 and "has made 18 steps, and now 6 are asked for" in fewer.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are no numbers
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def poisoned(steps, where="loss"):
    """The loss of some steps, or its gradient alone, is no number on the last rank."""
    objective, made = train.SelfDistillation.objective, set()

    def spoil(self, model, views, batch, step, logging):
        loss, total = objective(self, model, views, batch, step, logging)
        if (
            step in steps
            and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        ):
            made.add(step)
            if where == "loss":
                total = total * float("nan")
            else:
                total.register_hook(lambda gradient: gradient * float("inf"))
        return loss, total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.SelfDistillation, "objective", spoil)
        yield


def assert_same_parts(a, b):
    """Two checkpoints have the same weights, statistics, centre and optimizer state."""
    for part in ("student", "teacher", "loss"):
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items()), part
    states = [
        torch.cat(
            [v.flatten() for state in c["optimizer"]["state"].values() for v in state.values()]
        )
        for c in (a, b)
    ]
    assert torch.equal(*states)


@pytest.mark.parametrize("where", ["loss", pytest.param("gradients", marks=pytest.mark.slow)])
def test_nothing_changes_in_a_step_that_is_no_number(where, picture_folder, tmp_path, call_script):
    settings = flags(picture_folder, tmp_path, "--epochs", 1, "--use_bn_in_head", "true")
    with poisoned({3}, where):
        done = call_script("train.py", *settings, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(
        r"diverging loss at step 4: it is \S+ .*on rank 0 for images \S+/train/(dark|light)/\d+.png, ",
        done.stderr,
    )
    assert saved_step(tmp_path) == 3
    with poisoned({3, 4, 5}, where):
        done = call_script("train.py", *settings, "--skip_nonfinite", 2, check=False)
        assert done.returncode == 2 and done.stdout.count("left out") == 2
    with poisoned({3, 5}, where):
        done = call_script(
            "train.py", *settings, "--skip_nonfinite", 2, "--output_dir", tmp_path / "b"
        )
    assert done.stdout.count("left out, 1 in a row") == 2
    last, before = (
        torch.load(tmp_path / "b" / f"checkpoint{which}.pth", weights_only=True)
        for which in ("", ".prev")
    )
    assert (last["step"], before["step"]) == (6, 5)
    assert_same_parts(last, before)


def test_float16_that_overflows_is_left_out_and_stops_where_no_scale_helps(
    picture_folder, tmp_path, capsys
):
    ranks = distributed.start("cpu")

    def run(epochs):
        args = train.parse(
            train.get_parser(),
            [
                str(f)
                for f in flags(
                    picture_folder,
                    tmp_path,
                    "--epochs",
                    epochs,
                    "--save_every_steps",
                    0,
                    "--knn_freq",
                    0,
                    "--skip_nonfinite",
                    1,
                    "--accept_changes",
                )
            ],
        )
        source = train.settle(args, ranks)
        args.amp = "fp16"  # which `settle` refuses on a CPU, for it is slow there
        train.train(args, ranks, source, train.SelfDistillation)

    with poisoned({1}):
        run(epochs=1)
    assert "left out, 1 in a row" in capsys.readouterr().out and saved_step(tmp_path) == 6
    with (
        poisoned(range(100), "gradients"),
        pytest.raises(
            FloatingPointError, match=r"diverging gradients at step \d+: at no scale does float16"
        ),
    ):
        run(epochs=8)
    assert saved_step(tmp_path) in (18, 24, 30)  # by the scale that the steps before left


def poisoned_rank(script_flags, where):
    sys.argv = ["train.py", *script_flags]
    with poisoned({2}, where):
        train.main()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_one_rank_stops_both_before_anything_changes(where, picture_folder, tmp_path):
    # InfoNCE, over the images of all ranks, would spread bad gradients to all of them.
    settings = [
        str(f)
        for f in flags(picture_folder, tmp_path / "out", "--knn_freq", 0, "--infonce_weight", 0)
    ]
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import test_survival\ntest_survival.poisoned_rank({settings!r}, {where!r})\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            str(tmp_path / "run.py"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    assert (
        re.search(
            r"diverging loss at step 3: it is \S+ .*on rank 1 for images \S+.png", done.stderr
        )
        and "on rank 0" not in done.stderr
    )
    assert saved_step(tmp_path / "out") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Bad images
# ---------------------------------------------------------------------------------------------------------------------


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


def test_bad_images_are_named_and_replaced_alike_whatever_the_workers(
    picture_folder, tmp_path, call_script
):
    bad = spoil_some(picture_folder / "train" / "dark")
    for out, workers in (("a", 0), ("b", 2)):
        done = call_script(
            "train.py",
            *flags(
                picture_folder, tmp_path / out, "--num_workers", workers, "--max_bad_fraction", 0.2
            ),
        )
        assert "32 images" in done.stdout and "4 images could not be read; see " in done.stdout
        lines = (tmp_path / out / "bad_images.txt").read_text().splitlines()
        assert all(line.startswith("cannot read image ") for line in lines)
        assert {os.path.basename(line.split(":")[0]) for line in lines} == bad and len(lines) == 4
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_too_many_bad_images_are_a_clear_stop(picture_folder, tmp_path, call_script):
    spoil_some(picture_folder / "train" / "dark")
    done = call_script("train.py", *flags(picture_folder, tmp_path), check=False)
    assert done.returncode == 2 and re.search(
        r"train.py: error: \d of 32 images cannot be read, more than --max_bad_fraction 0.01; they are named "
        r"in .*/bad_images.txt, .* the last: cannot read image ",
        done.stderr,
    )
    again = call_script("train.py", *flags(picture_folder, tmp_path), check=False)
    assert again.returncode == 2 and again.stderr == done.stderr


@pytest.mark.slow
def test_an_image_deleted_during_the_run_is_replaced(picture_folder, tmp_path, call_script):
    with at_step(6, (picture_folder / "train" / "dark" / "3.png").unlink):
        call_script(
            "train.py",
            *flags(picture_folder, tmp_path, "--knn_freq", 0, "--max_bad_fraction", 0.05),
        )
    assert re.fullmatch(
        r"cannot read image .*/dark/3.png: .*No such file.*\n",
        (tmp_path / "bad_images.txt").read_text(),
    )


def test_a_folder_of_bad_images_only_is_refused(tmp_path):
    (tmp_path / "a.png").touch()
    images = data.ImageFiles([str(tmp_path / "a.png")])
    images.replace_bad = True
    with pytest.raises(ValueError, match="cannot read image .*a.png"):
        images[0]
    with pytest.raises(ValueError, match="cannot read image .*a.png"):
        data.suitable_size(images)


# ---------------------------------------------------------------------------------------------------------------------
# Flags and time
# ---------------------------------------------------------------------------------------------------------------------


def absurd(action):
    """Values to try for a flag."""
    if action.nargs == 0:
        return [[]]
    values = {
        int: ["-1", "0", "1", "3", "1000000000000000", "1e3"],
        float: ["-1", "0", "0.5", "1e30", "nan", "inf"],
    }.get(
        action.type,
        ["-1", "0", "none", "nan", "true"]
        if action.type
        else ["", "/nowhere/at/all", "nonsense", "\u00e9 \t"],
    )
    many = action.nargs if isinstance(action.nargs, int) else 1
    return [[value] * many for value in values] + [["x"], ["1", "2", "3", "4"]]


def try_all(script, base, folder):
    """In a process of its own: each flag of a script with absurd values, for ten seconds at most."""
    parser = importlib.import_module(script).get_parser()
    os.mkdir(folder)
    os.chdir(folder)
    log, count = Path(folder + ".log"), {"refused": 0, "works": 0}
    for action in parser._actions:
        if action.dest in ("help", "download", "output_dir") or not action.option_strings:
            continue
        for values in absurd(action):
            given = [*base, action.option_strings[0], *values]
            if "--output_dir" in parser._option_string_actions:
                given += ["--output_dir", folder + ".out"]
            pid, end, status = forked(given, script=script, log=log), time.monotonic() + 10, None
            while status is None and time.monotonic() < end:
                time.sleep(0.02)
                done, ended = os.waitpid(pid, os.WNOHANG)
                status = os.waitstatus_to_exitcode(ended) if done else None
            if status is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            said = log.read_text()
            problem = (
                None if status in (None, 0, 2) and "Traceback" not in said else f"status {status}"
            )
            if status == 2:
                errors = [line for line in said.splitlines() if "error:" in line]
                if (
                    len(errors) != 1
                    or not errors[0].startswith(f"{script}.py: error: ")
                    or said.splitlines()[-1] != errors[0]
                ):
                    problem = "not one sentence"
            written = set(os.listdir(folder))
            if not written <= set(values):  # beside a file that the flag itself names
                problem = f"wrote {written}"
            if problem:
                print(f"{script} {given[len(base) :]}: {problem}\n{said[-2000:]}")
            for name in written:
                os.unlink(name)
            shutil.rmtree(folder + ".out", ignore_errors=True)
            count["refused" if status == 2 else "works"] += 1
    print(count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, base",
    [
        ("train", [*SMALL, "--epochs", "1", "--knn_freq", "0", "--num_workers", "0"]),
        (
            "train",
            [
                *SMALL,
                "--epochs",
                "1",
                "--knn_freq",
                "0",
                "--num_workers",
                "0",
                "--method",
                "mvmr",
                "--projector",
                "8",
                "--local_crops_number",
                "0",
            ],
        ),
        (
            "distill",
            [
                "--teacher",
                "TEACHER",
                "--arch",
                "mobilevit_xxs",
                "--batch_size_per_gpu",
                "4",
                "--epochs",
                "1",
                "--warmup_epochs",
                "0",
                "--knn_freq",
                "0",
                "--num_workers",
                "0",
                "--device",
                "cpu",
                "--local_crops_number",
                "0",
            ],
        ),
        ("eval_knn", ["--weights", "TEACHER", "--num_workers", "0", "--device", "cpu"]),
        ("eval_linear", ["TEACHER", "--epochs", "1", "--num_workers", "0", "--device", "cpu"]),
    ],
)
def test_absurd_flags_are_one_sentence_or_work(script, base, whole, tmp_path):
    pictures, unhurt = whole
    base = [str(unhurt / "backbone.pth") if flag == "TEACHER" else flag for flag in base] + [
        "--data_path",
        str(pictures),
    ]
    problems = in_a_new_process(
        f"try_all({script!r}, {base!r}, {str(tmp_path / 'here')!r})"
    ).splitlines()
    counts = ast.literal_eval(problems.pop())
    assert not problems, "\n".join(problems)
    assert counts["refused"] > 20 and counts["works"] > 10


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(whole, tmp_path):
    """For LOWDINO_SOAK_MINUTES, 1 by default: from the second third to the last, median memory grows by a twentieth at most.

    Of the number of open files the least must not grow: a file that is open half of the time moves a median by one.
    """
    seconds = 60 * float(os.environ.get("LOWDINO_SOAK_MINUTES", 1))
    settings = [
        *map(str, flags(whole[0], tmp_path / "out")),
        "--epochs",
        "1000000",
        "--num_workers",
        "2",
        "--knn_freq",
        "20",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *settings], stdout=open(tmp_path / "log", "w")
    )
    seen = []
    try:
        wait_for((tmp_path / "out" / "checkpoint.pth").exists, process)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(seconds / 300)
            assert process.poll() is None
            resident = int(
                re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]
            )
            seen.append((resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert process.returncode == 75
    third = len(seen) // 3
    resident, files = zip(*seen)
    assert median(resident[-third:]) <= 1.05 * median(resident[third : 2 * third]), resident
    assert min(files[-third:]) <= min(files[third : 2 * third]), files

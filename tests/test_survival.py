"""Runs that are stopped or killed at any moment go on, and end as a run that nobody hurt.

Full disks and damaged files are in test_damage.py, bad numbers and images in test_bad_steps.py.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import (
    assert_same_run,
    at_step,
    ended,
    forked,
    in_a_new_process,
    is_one_sentence,
    one_thread_each,
    ranks_of,
    records,
    saved_step,
    start_ranks,
    stepwise,
    terminate,
    torchrun,
    wait_for,
)
from torch.distributed.elastic.utils.distributed import get_free_port

from lowdino import distributed, engine

pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, number",
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        (3, signal.SIGTERM),
        pytest.param(3, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(3, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(6, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signalled_run_saves_stops_and_goes_on_exactly(
    step, number, whole, tmp_path, call_script
):
    """The first step, one between two log lines, the last of an epoch."""
    pictures, unhurt = whole
    flags = stepwise(pictures, tmp_path)
    with at_step(step, lambda: (terminate(number), terminate(number))):
        done = call_script("train.py", *flags, "--save_every_steps", 0, check=False)
    assert distributed.STOPPED == 75
    assert done.returncode == (130 if number == signal.SIGINT else 75) and done.stderr == ""
    assert done.stdout.count(f"stopped by a signal after step {step}, which is saved") == 1
    assert saved_step(tmp_path) == step
    done = call_script("train.py", *flags)
    assert f"resuming from {tmp_path} after step {step}" in done.stdout
    assert_same_run(unhurt, tmp_path)
    assert records(tmp_path, "knn") == records(unhurt, "knn")


def signalled_while_evaluating(flags):
    """In a process of its own: SIGTERM comes in the third evaluation, after the last step.

    Prints the exit status.
    """
    calls, accuracy = [], engine.knn_accuracy

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 3:
            terminate()
        return accuracy(*args)

    engine.knn_accuracy = interrupt
    print(ended(forked(flags)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_evaluating_stops_at_once_and_loses_nothing(
    workers, whole, tmp_path, call_script
):
    pictures, unhurt = whole
    flags = stepwise(pictures, tmp_path, num_workers=workers)
    assert in_a_new_process(__name__, f"signalled_while_evaluating({flags!r})") == "75\n"
    assert len(records(tmp_path, "knn")) == 2
    done = call_script("train.py", *flags)
    assert "k-NN (k=20) accuracy" in done.stdout
    assert_same_run(unhurt, tmp_path)
    assert records(tmp_path, "knn") == records(unhurt, "knn")


def signalled_in_a_loader(flags):
    """In a process of its own: SIGTERM comes when the first evaluation has started a worker."""
    start = multiprocessing.process.BaseProcess.start

    def interrupt(self):
        start(self)
        terminate()

    multiprocessing.process.BaseProcess.start = interrupt
    print(ended(forked(flags)))


@pytest.mark.slow
def test_a_signal_while_a_loader_starts_does_not_hang(whole, tmp_path):
    flags = stepwise(whole[0], tmp_path, num_workers=2)
    assert in_a_new_process(__name__, f"signalled_in_a_loader({flags!r})") == "75\n"


# --------------------------------------------------------------------------------------------------
# Two ranks
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, to",
    [(signal.SIGTERM, "torchrun"), (signal.SIGUSR1, "torchrun"), (signal.SIGTERM, "rank 1")],
)
def test_two_ranks_agree_where_to_stop(number, to, picture_folder, tmp_path, run_script):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = stepwise(picture_folder, out, "--epochs 6 --save_every_steps 0 --knn_freq 0")
    process = start_ranks(flags, log)
    wait_for((out / "checkpoint.pth").exists, process)
    pids = ranks_of(process)
    os.kill(process.pid if to == "torchrun" else pids[1], number)
    assert process.wait(timeout=60) != 0
    end = time.monotonic() + 30
    # SIGUSR1 ends torchrun itself at once. Its ranks notice, save and follow.
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)
    said = re.search(r"stopped by a signal after step (\d+)", log.read_text())
    assert int(said[1]) == saved_step(out) < 18
    if to == "rank 1":
        assert "(exitcode: 75)" in log.read_text()
    run_script("train.py", *flags, ranks=2)
    run_script("train.py", *flags, "--output_dir", tmp_path / "unhurt", ranks=2)
    assert_same_run(tmp_path / "unhurt", out)


@pytest.mark.slow
def test_torchrun_restarts_after_the_death_of_a_rank(picture_folder, tmp_path, run_script):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = stepwise(picture_folder, out, "--epochs 6 --knn_freq 0")
    process = start_ranks(flags, log, "--max-restarts=1")
    wait_for((out / "checkpoint.prev.pth").exists, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    assert log.read_text().count("resuming from") == 1
    run_script("train.py", *flags, "--output_dir", tmp_path / "unhurt", ranks=2)
    assert_same_run(tmp_path / "unhurt", out)


@pytest.mark.slow
def test_ranks_that_find_different_steps_say_so_before_the_first(
    picture_folder, tmp_path, run_script
):
    """As two machines do that do not share the output folder."""
    flags = stepwise(picture_folder, tmp_path / "0", "--epochs 1 --knn_freq 0 --log_freq 1")
    run_script("train.py", *flags, ranks=2)
    (tmp_path / "1").mkdir()
    (tmp_path / "0" / "checkpoint.prev.pth").rename(tmp_path / "1" / "checkpoint.pth")
    before = (tmp_path / "0" / "checkpoint.pth").read_bytes()
    log = (tmp_path / "0" / "log.jsonl").read_bytes()
    # Not by torchrun, which ends a rank as soon as the other has failed, even before it speaks.
    machines = one_thread_each() | {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    machines |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    command = [sys.executable, ROOT / "train.py", *flags, "--output_dir"]
    processes = [
        subprocess.Popen(
            [*map(str, command), str(tmp_path / rank)],
            env=machines | {"RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    errors = re.findall("^train.py: error: .*", "".join(errors), re.MULTILINE)
    assert all(process.returncode for process in processes) and len(errors) == 2
    for folder in (tmp_path / "0", tmp_path / "1"):
        said = f"checkpoints of steps 3, 2 in --output_dir {folder}: every machine needs to see"
        assert sum(said in error for error in errors) == 1
    assert (tmp_path / "0" / "checkpoint.pth").read_bytes() == before
    assert (tmp_path / "0" / "log.jsonl").read_bytes() == log
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["checkpoint.pth"]


# --------------------------------------------------------------------------------------------------
# SIGKILL
# --------------------------------------------------------------------------------------------------


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
    """The n-th renaming of a .pth file is the next training's last act."""
    calls, replace = [], os.replace

    def counted(*args):
        replace(*args)
        calls.extend(str(args[1]).endswith(".pth") * [None])
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted


def last_logged(path):
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def kill_thirty_times(out, flags):
    """In a process of its own: a run is killed at thirty random moments.

    Each time a checkpoint as new as its log is there: of each step the log is written, then the
    checkpoint. The moments come later after a kill that came before the first step, else earlier:
    on any machine some are in the start of a run and some in its steps.
    """
    moments, before, later = random.Random(0), 0, 1.0
    for _ in range(30):
        pid = forked(flags)
        time.sleep(later * moments.uniform(0.1, 1.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step, logged = saved_step(out), last_logged(Path(out) / "log.jsonl")
        assert step >= before and step >= logged - 1, (step, before, logged)
        later *= 1.5 if step == before else 1 / 1.5
        before = step
    print("survived", before)
    assert ended(forked(flags)) == 0


@pytest.mark.slow
def test_thirty_kills(picture_folder, tmp_path):
    flags = stepwise(picture_folder, tmp_path / "out", "--epochs 100 --log_freq 1 --knn_freq 0")
    said = in_a_new_process(__name__, f"kill_thirty_times({str(tmp_path / 'out')!r}, {flags!r})")
    # A fast machine does not come to the end before the last kill.
    assert 0 < int(said.split()[-1]) < 600
    flags += ["--output_dir", str(tmp_path / "unhurt")]
    in_a_new_process(__name__, f"ended(forked({flags!r}))")
    assert_same_run(tmp_path / "unhurt", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "hurt, step",
    [(f"die_in_save({n})", 2) for n in (0, 1, 1000, 10**6)]
    + [(f"die_in_rename({n})", step) for n, step in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 2))],
)
def test_killed_in_a_save(hurt, step, whole, tmp_path, call_script):
    """Files of the first checkpoint are renamed twice, of the second thrice."""
    pictures, unhurt = whole
    flags = stepwise(pictures, tmp_path)
    said = in_a_new_process(__name__, f"print(ended(forked({flags!r}, lambda: {hurt})))")
    assert int(said) == -signal.SIGKILL and saved_step(tmp_path) == step
    call_script("train.py", *flags)
    assert_same_run(unhurt, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, workers, arch", [(2, 0, "mobilevit_xxs"), (1, 2, "mobilevit_xxs"), (1, 0, "vit_tiny")]
)
def test_killed_run_goes_on_to_the_same_end(
    picture_folder, tmp_path, run_script, ranks, workers, arch
):
    out, unhurt = tmp_path / "out", tmp_path / "unhurt"
    more = dict(save_every_steps=0, arch=arch, num_workers=workers)
    flags = stepwise(picture_folder, out, "--epochs 4 --knn_freq 0", **more)
    run_script("train.py", *flags, "--output_dir", unhurt, ranks=ranks)
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    if ranks > 1:
        command = torchrun(ROOT / "train.py", flags)
    env = os.environ | {"OMP_NUM_THREADS": "1" if ranks > 1 else "2"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, env=env, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
    wait_for((out / "checkpoint.pth").exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert saved_step(out) < saved_step(unhurt)
    done = run_script("train.py", *flags, ranks=ranks)
    assert "Warning" not in done.stderr  # no deprecated call, on this torch
    assert f"resuming from {out} after step" in done.stdout
    assert_same_run(unhurt, out)


# --------------------------------------------------------------------------------------------------
# Bugs
# --------------------------------------------------------------------------------------------------


def test_a_bug_keeps_its_traceback(whole, tmp_path, call_script):
    """Only a UserError is one sentence with status 2."""
    flags = stepwise(whole[0], tmp_path, "--knn_freq 0")

    def unpack():
        _a, _b = 1, 2, 3

    with at_step(2, unpack), pytest.raises(ValueError, match="too many values to unpack") as found:
        call_script("train.py", *flags)
    assert {"main", "launch", "train", "unpack"} <= {entry.name for entry in found.traceback}
    assert saved_step(tmp_path) == 1

    def refuse():
        raise distributed.UserError("too many values")

    with at_step(1, refuse):
        done = call_script("train.py", *flags, check=False)
    assert is_one_sentence(done, "^train.py: error: too many values\n$")

"""Every flag of every script with absurd values, and hours of training: no crash, no leak."""

import ast
import importlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from conftest import ROOT
from runs import SMALL, forked, in_a_new_process, stepwise, wait_for

from lowdino import data

# --------------------------------------------------------------------------------------------------
# Absurd flags
# --------------------------------------------------------------------------------------------------

HUGE = "1000000000000000"

# Flags and values that run for longer than anybody waits. After so many seconds they are killed;
# any other run must end by itself.
LONG = {("--epochs", HUGE)}
PATIENCE = {True: 3, False: 120}

# --compile takes minutes and has a test of its own, in test_scripts.py.
NOT_TRIED = ("help", "download", "output_dir", "compile")


def absurd(action):
    """Values to try for a flag."""
    if action.nargs == 0:
        return [[]]
    values = ["", "/nowhere/at/all", "nonsense", "\u00e9 \t"]
    if action.type:
        values = ["-1", "0", "none", "nan", "true"]
    if action.type is int:
        values = ["-1", "0", "1", "3", HUGE, "1e3"]
    if action.type is float:
        values = ["-1", "0", "0.5", "1e30", "nan", "inf"]
    many = action.nargs if isinstance(action.nargs, int) else 1
    return [[value] * many for value in values] + [["x"], ["1", "2", "3", "4"]]


def status_by(deadline, pid):
    """A process's exit status, "running", or None where it had to be killed."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        return os.waitstatus_to_exitcode(status)
    if time.monotonic() < deadline:
        return "running"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def judge(script, status, said, long):
    """What is wrong with the way that a script ended, or None."""
    if status is None:
        return None if long else "did not end"
    if status not in (0, 2) or "Traceback" in said:
        return f"status {status}"
    errors = [line for line in said.splitlines() if "error:" in line]
    if status == 2:
        one = len(errors) == 1 and said.splitlines()[-1] == errors[0]
        if not one or not errors[0].startswith(f"{script}.py: error: "):
            return "not one sentence"
    return None


def cases(parser, only):
    """Each flag of a script, or of those named in `only`, with each of its absurd values."""
    for action in parser._actions:
        left_out = action.dest in NOT_TRIED or not action.option_strings
        if not left_out and (not only or action.dest in only):
            for values in absurd(action):
                yield [action.option_strings[0], *values]


def try_all(script, base, folder, only=None):
    """In a process of its own: all cases, each in an empty folder, as many at once as cores.

    Prints what went wrong, and at the end how many were refused, worked or had to be killed.
    """
    parser = importlib.import_module(script).get_parser()
    waiting, running = list(cases(parser, only))[::-1], {}
    count = {"refused": 0, "works": 0, "killed": 0}
    for number in itertools.count():
        if waiting and len(running) < data.cores():
            given, here = waiting.pop(), Path(f"{folder}{number}")
            here.mkdir()
            os.chdir(here)
            flags = [*base, *given]
            if "--output_dir" in parser._option_string_actions:
                flags += ["--output_dir", f"{here}.out"]
            pid = forked(flags, script=script, log=Path(f"{here}.log"))
            long = tuple(given) in LONG
            running[pid] = given, here, long, time.monotonic() + PATIENCE[long]
            continue
        time.sleep(0.02)
        for pid, (given, here, long, deadline) in [*running.items()]:
            if (status := status_by(deadline, pid)) == "running":
                continue
            del running[pid]
            said, written = Path(f"{here}.log").read_text(), set(os.listdir(here))
            problem = judge(script, status, said, long)
            if not written <= set(given[1:]):  # beside a file that the flag itself names
                problem = f"wrote {written}"
            if problem:
                print(f"{script} {given}: {problem}\n{said[-2000:]}")
            shutil.rmtree(f"{here}.out", ignore_errors=True)
            count[{None: "killed", 2: "refused"}.get(status, "works")] += 1
        if not waiting and not running:
            print(count)
            return


TRAINING = "--epochs 1 --knn_freq 0 --num_workers 0".split()
PROJECTED = (
    "--arch mobilevit_xxs --batch_size_per_gpu 4 --warmup_epochs 0 --device cpu --amp none "
    "--cache none --global_crops_number 2 --projector 8"
).split()
DISTILLATION = (
    "--teacher TEACHER --arch mobilevit_xxs --batch_size_per_gpu 4 --warmup_epochs 0 --device cpu "
    "--local_crops_number 0 --amp none"
).split()
EVALUATION = "--num_workers 0 --device cpu".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, base",
    [
        ("train", [*SMALL, *TRAINING]),
        ("train", ["--method", "emp", *PROJECTED, *TRAINING]),
        ("train", ["--method", "mvmr", *PROJECTED, *TRAINING]),
        ("distill", [*DISTILLATION, *TRAINING]),
        ("eval_knn", ["--weights", "TEACHER", *EVALUATION]),
        ("eval_linear", ["TEACHER", "--epochs", "1", *EVALUATION]),
    ],
    ids=["dino", "emp", "mvmr", "distill", "eval_knn", "eval_linear"],
)
def test_absurd_flags_are_one_sentence_or_work(script, base, whole, tmp_path, capsys):
    pictures, unhurt = whole
    base = [str(unhurt / "backbone.pth") if flag == "TEACHER" else flag for flag in base]
    base += ["--data_path", str(pictures)]
    call = f"try_all({script!r}, {base!r}, {str(tmp_path / 'here')!r})"
    *problems, last = in_a_new_process(__name__, call).splitlines()
    with capsys.disabled():
        print(f"\n{script}: {last}")
    counts = ast.literal_eval(last)
    assert not problems, "\n".join(problems)
    assert counts["refused"] > 20 and counts["works"] > 10 and counts["killed"] <= len(LONG)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, own",
    [
        ("moco", {"queue_size", "temperature", "momentum_teacher"}),
        ("swav", {"queue_size", "queue_epochs", "out_dim"}),
        ("vicreg", {"projector", "covariance_weight"}),
        ("barlow", {"redundancy_weight"}),
    ],
)
def test_absurd_flags_of_a_method_are_one_sentence_or_work(method, own, whole, tmp_path):
    base = ["--method", method, *PROJECTED, *TRAINING, "--data_path", str(whole[0])]
    call = f"try_all('train', {base!r}, {str(tmp_path / 'here')!r}, {own!r})"
    *problems, last = in_a_new_process(__name__, call).splitlines()
    assert not problems, "\n".join(problems)
    counts = ast.literal_eval(last)
    assert counts["refused"] > 3 and counts["works"] > 0 and not counts["killed"]


# --------------------------------------------------------------------------------------------------
# Memory and files over time
# --------------------------------------------------------------------------------------------------


def memory_and_files(process):
    """Resident memory in KiB, and the number of open files."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
    return resident, len(os.listdir(f"/proc/{process.pid}/fd"))


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(whole, tmp_path):
    """For LOWDINO_SOAK_MINUTES, 1 by default.

    From the second third to the last, median memory grows by a twentieth at most. Of the number of
    open files the least must not grow: a file that is open half of the time moves a median by one.
    """
    seconds = 60 * float(os.environ.get("LOWDINO_SOAK_MINUTES", 1))
    text = "--epochs 1000000 --num_workers 2 --knn_freq 20"
    command = [sys.executable, str(ROOT / "train.py"), *stepwise(whole[0], tmp_path / "out", text)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log)
    seen = []
    try:
        wait_for((tmp_path / "out" / "checkpoint.pth").exists, process)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(seconds / 300)
            assert process.poll() is None
            seen.append(memory_and_files(process))
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert process.returncode == 75
    third = len(seen) // 3
    resident, files = zip(*seen)
    assert median(resident[-third:]) <= 1.05 * median(resident[third : 2 * third]), resident
    assert min(files[-third:]) <= min(files[third : 2 * third]), files

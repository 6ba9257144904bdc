"""What tests of whole runs share: their flags, how they start and are stopped, how they compare."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, restore_signals

import train
from lowdino import checkpoint, distributed, optim, settings

SMALL = (
    "--method dino --arch mobilevit_xxs --batch_size_per_gpu 4 --local_crops_number 1 --out_dim 16 "
    "--hidden_dim 32 --warmup_epochs 1 --log_freq 2 --device cpu --knn_freq 1 --infonce_weight 1 "
    "--cache none --amp none --global_crops_size 32"
).split()


def options(text="", **named):
    """Flags as a list: options("--epochs 2", data_path=folder) is --epochs 2 --data_path FOLDER."""
    pairs = ((f"--{name}", str(value)) for name, value in named.items())
    return text.split() + [word for pair in pairs for word in pair]


def small(text="", **named):
    """Flags of a small network on a CPU, and more."""
    return SMALL + options(text, **named)


def stepwise(pictures, out, text="", **named):
    """Flags of two epochs of six steps, each step saved, and more."""
    usual = "--save_every_steps 1 --epochs 2 --num_workers 0"
    return small(usual, data_path=pictures, output_dir=out) + options(text, **named)


def records(folder, key):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def saved(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def saved_step(folder):
    found = checkpoint.load_checkpoint(folder)
    return found["step"] if found else 0


def saved_by_one_and_two_ranks(code, tmp_path, run_script):
    """What a script saves at {out}, run by one process and by two; {root} is the project's."""
    results = []
    for ranks in (1, 2):
        script, out = tmp_path / f"ranks{ranks}.py", str(tmp_path / f"{ranks}.pth")
        script.write_text(code.format(root=str(ROOT), out=out))
        run_script(script, ranks=ranks)
        results.append(torch.load(out, weights_only=True))
    return results


def assert_equal(x, y, where):
    """Two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(x, dict):
        assert x.keys() == y.keys(), where
        for key in x:
            assert_equal(x[key], y[key], f"{where}.{key}")
    elif isinstance(x, torch.Tensor):
        assert torch.equal(x, y), f"{where} differs by {(x - y).abs().max()}"
    elif isinstance(x, list):
        for i, (p, q) in enumerate(zip(x, y, strict=True)):
            assert_equal(p, q, f"{where}[{i}]")
    else:
        assert x == y, where


def assert_same_run(a, b):
    """Two output folders end in the same weights, centre, optimizer state and losses."""
    ends = [saved(folder) for folder in (a, b)]
    for part in ("step", "method", "optimizer", "scaler"):
        assert_equal(ends[0][part], ends[1][part], part)
    assert any(name.startswith("student.") for name in ends[0]["method"])
    assert records(a, "loss") == records(b, "loss") and len(records(a, "loss")) > 2


def is_one_sentence(done, pattern=""):
    """Whether a script ended with status 2 and one line on stderr, in which the pattern is."""
    one = done.returncode == 2 and done.stderr.count("\n") == 1
    return one and re.search(pattern, done.stderr) is not None


# --------------------------------------------------------------------------------------------------
# Hurt at a moment
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


def torchrun(script, flags, *launcher):
    """A command that starts a script on two ranks."""
    run = "-m torch.distributed.run --nproc_per_node=2 --standalone".split()
    return [sys.executable, *run, *launcher, str(script), *map(str, flags)]


def one_thread_each():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def start_ranks(flags, log, *launcher):
    """Start train.py on two ranks; what they print goes to the file `log`."""
    command = torchrun(ROOT / "train.py", flags, *launcher)
    with open(log, "w") as file:
        env = one_thread_each()
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def ranks_of(process):
    """Process ids of the ranks that a torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def forked(flags, hurt=None, script="train", log=os.devnull):
    """Start a script in a fork of this process, and return its process id.

    It must have imported all that the script needs, and used no thread.
    """
    if pid := os.fork():
        return pid
    if hurt:
        hurt()
    sys.argv = [f"{script}.py", *map(str, flags)]
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


def ended(pid):
    """The exit status of a process, minus the signal's number where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_new_process(module, call):
    """What an expression prints in a process of its own, among the names of a module of tests."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        f"import train\nfrom {module} import *\n{call}"
    )
    command = [sys.executable, "-c", code]
    env = one_thread_each()
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def one_thread():
    """Runs are alike bit for bit where their sums are shared out alike; so one thread for all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_here(flags, build=None):
    """As train.py, in this process and without `launch`: what the run raises comes out of it.

    Args:
        build: makes the method in place of the class that --method names.
    """
    s = settings.resolve(train.get_parser(), [str(flag) for flag in flags])
    with pytest.MonkeyPatch.context() as patch:
        if build:
            patch.setattr(train, "METHODS", {s.method: build})
        try:
            return train.run(s, distributed.start("cpu"))
        finally:
            restore_signals()

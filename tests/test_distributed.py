"""Devices, launching, errors and signals of one process; several real ranks are in test_scripts."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from lowdino import distributed
from lowdino.distributed import Ranks, StopSignals, UserError, launch


class DivergedError(UserError, FloatingPointError):
    """A class below UserError that is another error too, as the engine's is."""


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No rank in the environment, and Ctrl-C works again after a script has ended."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    yield
    for number in distributed.STOP_SIGNALS:
        ctrl_c = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if ctrl_c else signal.SIG_DFL)


# --------------------------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def feigned_cuda(monkeypatch):
    """Two GPUs that are not there, and the settings of a new process; the chosen one is returned.

    What these settings do to kernels is not seen here, only that they are made.
    """
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield chosen
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_on_cuda_kernels_are_tuned_and_float32_products_are_tf32(device, feigned_cuda):
    ranks = distributed.start(device)
    assert ranks == Ranks(0, 1, torch.device("cuda:0")) and feigned_cuda == [ranks.device]
    assert torch.backends.cudnn.benchmark is True
    assert torch.get_float32_matmul_precision() == "high"


def test_on_a_cpu_float32_is_float32(feigned_cuda):
    assert distributed.start("cpu") == Ranks(0, 1, torch.device("cpu")) and not feigned_cuda
    assert torch.backends.cudnn.benchmark is False
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_rank_has_the_gpu_of_its_local_rank_or_the_only_one_that_srun_shows(
    feigned_cuda, monkeypatch
):
    choose = distributed.choose_device
    assert choose("cuda", 2, 1) == torch.device("cuda:1")
    with pytest.raises(distributed.UserError, match="local rank 2 has no GPU .*: 2 visible"):
        choose("cuda", 3, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert choose("cuda", 2, 1) == torch.device("cuda:0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun within a job's script
    with pytest.raises(distributed.UserError, match="local rank 1 has no GPU .*: 1 visible"):
        choose("cuda", 2, 1)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_missing_device_is_one_sentence(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(distributed.UserError, match=f"--device {device}: "):
        distributed.start(device)


def test_ranks_that_cannot_find_each_other_are_one_sentence(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(distributed.UserError, match="2 processes .*: set MASTER_PORT,"):
        distributed.start("cpu")


@pytest.mark.parametrize(
    "world, device, synchronised", [(2, "cuda", True), (1, "cuda", False), (2, "cpu", False)]
)
def test_batch_norm_is_over_all_ranks_where_several_have_cuda(
    world, device, synchronised, monkeypatch
):
    """The modules alone; nothing is moved to the device, which need not be there."""
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4)))
    module = distributed.on_device(module, Ranks(0, world, torch.device(device)))
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2
    assert [isinstance(m, nn.SyncBatchNorm) for m in norms] == [synchronised] * 2


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


def launched(work, parse=lambda: None):
    """The exit status of a script."""
    try:
        launch("script.py", parse, lambda args, ranks: work(ranks))
    except SystemExit as end:
        return end.code
    return 0


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "error, sentence",
    [
        (UserError("too many images"), "too many images"),
        (distributed.UserError("no such device"), "no such device"),
        (DivergedError("loss is NaN"), "loss is NaN"),
        (UserError("a file\nname"), "a file name"),
        (UserError(), "UserError"),
        (OSError(errno.ENOSPC, "No space left", "x.pth"), "x.pth: No space left"),
        (OSError(errno.EIO, "Input/output error"), f"[Errno {errno.EIO}] Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory.\nMore"),
            "out of memory: smaller batches, views or heads may help (CUDA out of memory.)",
        ),
        (
            MemoryError(),
            "out of memory: smaller batches, views or heads may help (MemoryError)",
        ),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            "out of memory: smaller batches, views or heads may help "
            f"([Errno {errno.ENOMEM}] Cannot allocate memory)",
        ),
        (
            RuntimeError("[/gloo/x.cc:1] Connection closed by peer"),
            "lost another rank, whose error says why ([/gloo/x.cc:1] Connection closed by peer)",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "DataLoader worker (pid 7) is killed by signal: Killed.: where memory is short, "
            "fewer --num_workers may help",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(error, sentence, capsys):
    assert launched(lambda ranks: raise_(error)) == 2
    assert capsys.readouterr().err == f"script.py: error: {sentence}\n"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("too many values to unpack (expected 2)"),
        FloatingPointError("underflow"),
        OSError("stopped"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("gloo"),
    ],
)
def test_a_bug_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)) as caught:
        launched(lambda ranks: raise_(error))
    assert caught.value is error and capsys.readouterr().err == ""


def of_a_loaders_process(error):
    """What DataLoader makes of an error in one of its processes, with that process's traceback."""
    try:
        raise error
    except Exception:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    try:
        wrapped.reraise()
    except Exception as again:
        return again


@pytest.mark.parametrize(
    "error, sentence",
    [
        (UserError("no image: a.png"), "no image: a.png"),
        (distributed.UserError("no image: a.png"), "no image: a.png"),
        (DivergedError("no image: ValueError: b"), "no image: ValueError: b"),
        (OSError(errno.EIO, "Input/output error"), f"[Errno {errno.EIO}] Input/output error"),
        (ValueError("too many values"), None),
        (OSError(errno.ENOENT, "No such file or directory"), None),
        (RuntimeError("shapes cannot be multiplied"), None),
    ],
)
def test_of_a_loaders_process_the_last_line_is_told(error, sentence):
    wrapped = of_a_loaders_process(error)
    assert type(wrapped) is type(error) and "Traceback (most recent call last)" in str(wrapped)
    assert distributed.sentence_of(wrapped) == sentence


class Broken(Dataset):
    """Every item is an error."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise UserError("no image: a.png")


@pytest.mark.slow  # torch waits for seconds for a process that had an error
def test_an_error_in_a_real_loader_is_one_sentence(capsys):
    status = launched(lambda ranks: next(iter(DataLoader(Broken(), num_workers=1))))
    assert status == 2 and capsys.readouterr().err == "script.py: error: no image: a.png\n"


def test_wrong_flags_are_said_by_the_first_rank(capsys, monkeypatch):
    def never(ranks):
        raise AssertionError

    def parse():
        raise UserError("--lr is negative")

    assert launched(never, parse) == 2
    assert capsys.readouterr().err == "script.py: error: --lr is negative\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched(never, parse) == 2 and capsys.readouterr().err == ""


def test_a_script_that_ends_well_has_status_zero(capsys):
    assert launched(lambda ranks: None) == 0 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("errors", ["apart", "together"])
def test_a_reader_that_leaves_is_one_sentence(errors):
    """As in `train.py | head -1`, and with 2>&1, where nobody can hear of it."""
    code = "from lowdino.distributed import launch\nlaunch('x.py', int, lambda args, ranks: ["
    code += "print('y' * 99, flush=True) for _ in range(10**5)])"
    to = subprocess.PIPE if errors == "apart" else subprocess.STDOUT
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=to, cwd=ROOT) as process:
        assert process.stdout.readline() == b"y" * 99 + b"\n"
        process.stdout.close()
        written = process.stderr.read() if process.stderr else b""
        assert process.wait(timeout=60) == 2
    expected = b"x.py: error: the output pipe was closed\n"
    assert written == (expected if process.stderr else b"")


# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------


def test_ctrl_c_outside_a_training_is_one_line(capsys):
    assert launched(lambda ranks: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "script.py: stopped by Ctrl-C\n"
    for number in distributed.STOP_SIGNALS:  # one that comes while it ends changes nothing
        assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize(
    "numbers, status",
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGTERM, signal.SIGINT], 130),  # the terminal's, then torchrun's
        ([signal.SIGTERM, signal.SIGINT], 75),
    ],
)
def test_the_first_signal_decides_the_status(numbers, status):
    signals = StopSignals()
    signals.held = True
    assert not signals.seen and signals.status == distributed.STOPPED
    for number in numbers:
        signal.raise_signal(number)
    assert signals.seen and signals.status == status


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("held", [True, False])
def test_what_is_not_held_ends_at_once(number, status, held, monkeypatch, capfd):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    signals = StopSignals()
    signals.held = held
    signal.raise_signal(number)
    assert left == ([] if held else [status])
    assert capfd.readouterr().err == ("" if held or status == 75 else "stopped by Ctrl-C\n")
    with signals.at_once():
        assert left[-1] == status


def test_the_loss_of_torchrun_is_a_signal(monkeypatch):
    signals = StopSignals()
    monkeypatch.setattr(os, "getppid", lambda: signals.parent + 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not signals.seen
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert signals.seen and signals.status == distributed.STOPPED


def test_without_sigusr1_the_file_can_be_imported(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(signal, "SIGUSR1")
    spec = importlib.util.spec_from_file_location("copied_distributed", distributed.__file__)
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied_distributed", copied)
    spec.loader.exec_module(copied)
    assert copied.STOP_SIGNALS == (signal.SIGTERM, signal.SIGINT)

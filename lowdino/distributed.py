"""Processes and devices: started by torchrun, by SLURM or alone; NCCL on CUDA, gloo on the CPU.

    torchrun --nproc_per_node=8 train.py ...                                    eight GPUs
    torchrun --nproc_per_node=2 train.py --device cpu ...                       two processes, gloo
    torchrun --nnodes=4 --node_rank=$I --nproc_per_node=8 --master_addr=$FIRST \
        --master_port=29500 train.py ...                                        on each of four
    srun --ntasks-per-node=8 --gpus-per-node=8 python train.py ...              SLURM, one per GPU

SLURM needs MASTER_ADDR, the first host of the job, and MASTER_PORT in the environment. With
`#SBATCH --signal=USR1@120 --requeue` it sends its stop signal early; where `srun` then ends with
status 75, `scontrol requeue $SLURM_JOB_ID` queues the script again. On one machine gloo listens on
the loopback address alone, torchrun's store on all addresses.
"""

import ctypes
import errno
import gc
import inspect
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class UserError(ValueError):
    """An error that the user can fix, in one sentence. `launch` prints it and exits with 2."""


class Diverged(UserError, FloatingPointError):
    """A loss, a gradient or a logit is not finite."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ValueErrors of files that can be copied alone into UserErrors; a decorator too."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


# -- Processes and devices -------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`, and works on `device`."""

    rank: int
    world: int
    device: torch.device
    first = property(lambda self: self.rank == 0)


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) by torchrun, or by `srun`, one rank per task; (0, 1, 0) alone."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        # A lone `python` in an allocation has SLURM_PROCID too; only `srun` makes several tasks.
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) <= 1:
            return 0, 1, 0
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    return tuple(int(os.environ.get(name, 0)) for name in names)


def start(device: str = "auto") -> Ranks:
    """Choose the device and, where there are several processes, join them.

    `device` is "auto" (CUDA, else MPS for a single process, else CPU), "cuda", "mps" or "cpu". A
    UserError says that there is none for this process, or that the first rank's address is missing.
    """
    rank, world, local = rank_from_environment()
    chosen = choose_device(device, world, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # cuDNN seeks its fastest algorithm once per shape, and views have few. TF32 has float32's
        # range and float16's precision; heads, k-NN and all of `--amp none` use it.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif chosen.type == "cpu":
        keep_freed_memory()
    if world > 1:
        join(rank, world, chosen)
    return Ranks(rank, world, chosen)


def choose_device(device: str, world: int, local: int) -> torch.device:
    """The device that `start` is asked for, with the index of this rank's GPU."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    mps = mps and torch.amp.is_autocast_available("mps") and world == 1
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    if device == "mps" and not mps:
        raise UserError("--device mps: needs Apple's Metal, torch 2.5 or newer and one process")
    if device != "cuda":
        return torch.device(device)
    visible = torch.cuda.device_count()
    # SLURM may show each task one GPU only, whatever its local rank.
    by_srun = "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    index = 0 if visible == 1 and by_srun else local
    if index >= visible:
        advice = f"start {visible} processes per node, or use --device cpu"
        raise UserError(f"local rank {local} has no GPU of its own: {visible} visible; {advice}")
    return torch.device("cuda", index)


def join(rank: int, world: int, device: torch.device) -> None:
    """Make this process a member of the process group."""
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        advice = "the first node's name and a free port, or start them by torchrun"
        raise UserError(f"{world} processes cannot meet: set {' and '.join(missing)}, {advice}")
    # By default gloo listens on the network, by the machine's name.
    loopback = {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex())
    if on_one_machine(world) and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
    # When torchrun restarts dead ranks it keeps its store, with their old addresses.
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(hours=2)  # for a download by the first rank; NCCL's default is ten minutes
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)


def on_one_machine(world: int) -> bool:
    """Whether torchrun, SLURM or the address of the first rank says so."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]) == world
    loopback = os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1", "::1")
    return os.environ.get("SLURM_STEP_NUM_NODES") == "1" or loopback


def keep_freed_memory() -> None:
    """Have glibc keep memory between steps: clearing new pages can cost as much as their use."""
    with suppress(AttributeError, TypeError, OSError):  # no mallopt; Windows, which opens no None
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the top of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping for a large block, which would go when it is freed


# -- Stopping --------------------------------------------------------------------------------------

# SLURM, torchrun and clouds announce by the first two that they will kill; Ctrl-C is SIGINT.
NAMES_OF_STOP_SIGNALS = "SIGTERM", "SIGUSR1", "SIGINT"  # Windows lacks SIGUSR1
STOP_SIGNALS = tuple(getattr(signal, n) for n in NAMES_OF_STOP_SIGNALS if hasattr(signal, n))

STOPPED = 75  # exit status after a signal (EX_TEMPFAIL, "try again"): the same command resumes
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT


def stop(together: bool = True) -> None:
    """Leave the process group, as the last call before the process ends.

    Gloo's group stays: its end joins its threads, and one of them may wait for Python's lock, which
    this thread holds. NCCL's stays unless all ranks leave `together`: it would wait for the others.
    """
    for number in STOP_SIGNALS:  # all is saved by now, and the exit status should say so
        signal.signal(number, signal.SIG_IGN)
    if together and dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


class StopSignals:
    """Notes the signals that ask a run to stop, so that it can save first.

    While `held`, a signal is only noted in `seen`. Else it ends the process at once and without
    clean-up, because an exception could come out of any line, even of torch. The loss of the
    torchrun that started this process counts as a signal: nobody would send the next. The first
    signal decides the exit `status`, INTERRUPTED by SIGINT, else STOPPED; torchrun repeats Ctrl-C.
    """

    def __init__(self):
        self.received, self.held, self.status = False, False, STOPPED
        self.process, self.parent = os.getpid(), os.getppid()
        for number in STOP_SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:  # a loader's process, which does not ignore signals yet
            return
        if not self.received and number == signal.SIGINT:
            self.status = INTERRUPTED
        self.received = True
        if not self.held:
            self.leave()

    def leave(self) -> None:
        with suppress(RuntimeError):  # the signal may have come in the middle of a print
            sys.stdout.flush()
        if self.status == INTERRUPTED and rank_from_environment()[0] == 0:
            os.write(2, b"stopped by Ctrl-C\n")  # print must not be called within print
        os._exit(self.status)

    @property
    def seen(self) -> bool:
        return self.received or "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of a held run that may end anywhere."""
        self.held = False
        if self.seen:
            self.leave()
        yield
        self.held = True


# -- Modules and exchanges -------------------------------------------------------------------------


def on_device(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module on its device, channels last; on several GPUs with synchronised batch norm."""
    module = module.to(ranks.device, memory_format=torch.channels_last)
    if ranks.world > 1 and ranks.device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


def data_parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the ranks; itself where there is one process."""
    if not dist.is_initialized():
        return module
    # Without device_ids inputs stay where they are: labels and indices are needed on the CPU.
    # Batch norm's buffers need no exchange in training. Torch 2.15 renamed that option.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{option: False})


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def any_rank(flags: list[bool | Tensor], device: torch.device) -> list[bool]:
    """Which flags are set on any rank: one exchange, at which the CPU waits for the device."""
    if dist.is_initialized():
        highest = torch.stack([torch.as_tensor(flag, device=device).float() for flag in flags])
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        flags = highest.tolist()
    return [bool(flag) for flag in flags]


@contextmanager
def first_rank_before_others(rank: int, wait: bool) -> Iterator[None]:
    """With `wait`, rank 0 works inside first, on a download say, and the others after it."""
    wait = wait and dist.is_initialized()
    if wait and rank != 0:
        dist.barrier()
    yield
    if wait and rank == 0:
        dist.barrier()


def gather_objects(item: object) -> list:
    """Each rank's object, on all ranks, in their order."""
    items = [item]
    if dist.is_initialized():
        items *= dist.get_world_size()
        dist.all_gather_object(items, item)
    return items


def gather_strided(rows: Tensor, total: int) -> Tensor:
    """Join on all ranks the rows (n, ...) of every world-th item: (total, ...) in their order."""
    if not dist.is_initialized():
        return rows
    world = dist.get_world_size()
    padded = rows.new_zeros(-(-total // world), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the first rank's buffers, such as batch norm's statistics, to every rank."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


# -- Errors and the launch of a script -------------------------------------------------------------

# Errors of the operating system that are no bug: a full, read-only or failing disk, a permission.
MACHINE_ERRORS = "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO"


def sentence_of(error: Exception) -> str | None:
    """One sentence on an error that the user can fix; None for any other, which is a bug."""
    kind = type(error).__name__
    lines = str(error).strip().splitlines() or [kind]
    if any(line.endswith("Traceback (most recent call last):") for line in lines):
        # From a DataLoader's process, with its traceback: the last line, "module.Class: text".
        lines = [re.sub(rf"^(\w+\.)*{kind}: ", "", lines[-1])]
    text, first = " ".join(lines), lines[0]
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError):
        written = re.match(r"\[Errno (\d+)\]", first)  # all that a loader's process passes on
        number = error.errno or (written and int(written[1]))
        if errno.errorcode.get(number) in MACHINE_ERRORS:
            return f"{error.filename}: {error.strerror}" if error.filename else first
    runtime = isinstance(error, RuntimeError)
    full = re.search("allocate memory|out of memory|Storage size", first)
    if isinstance(error, MemoryError) or (full and (runtime or isinstance(error, OSError))):
        return f"out of memory: smaller batches, views or heads may help ({first})"
    if isinstance(error, dist.DistError) or (runtime and "gloo" in first):
        return f"lost another rank, whose error says why ({text})"
    if runtime and first.startswith("DataLoader worker"):
        return f"{first.split('. ')[0]}: where memory is short, fewer --num_workers may help"
    return None


def launch(script: str, parse: Callable[[], Any], work: Callable[[Any, Ranks], object]) -> None:
    """Run a script: `work` on the settings that `parse` returns, and on this process's rank.

    `start` takes the settings' `device`, default "cpu". An error that the user can fix is one line,
    of the first rank alone if in `parse`, and exit status 2. Any other keeps its traceback.
    """
    first = heard = rank_from_environment()[0] == 0
    status, together, message = 0, False, ""
    with suppress(AttributeError):  # a notebook's stdout
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    try:
        args = parse()
        heard = True
        work(args, start(getattr(args, "device", "cpu")))
        together = True
    except SystemExit as stopped:  # of all ranks, after a signal
        status, together = stopped.code if isinstance(stopped.code, int) else 1, True
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "stopped by Ctrl-C" * first
    except BrokenPipeError:
        status, message = 2, "error: the output pipe was closed"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
    except Exception as error:
        if (sentence := sentence_of(error)) is None:
            raise
        status, message = 2, f"error: {sentence}" * heard
    finally:
        several = dist.is_initialized()
        stop(together)
    with suppress(OSError):  # stderr may be the closed pipe too
        if message:
            print(f"{script}: {message}", file=sys.stderr)
    gc.collect()  # ends a loader that an error left, with its processes
    if several:  # without Python's clean-up, in which gloo can hang or abort, see `stop`
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)

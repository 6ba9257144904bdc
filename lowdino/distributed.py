"""Processes and devices: started by torchrun, by SLURM or alone; NCCL on CUDA, gloo on the CPU.

    torchrun --nproc_per_node=8 train.py ...                                    eight GPUs
    torchrun --nproc_per_node=2 train.py --device cpu ...                       two processes, gloo
    torchrun --nnodes=4 --node_rank=$I --nproc_per_node=8 --master_addr=$FIRST \
        --master_port=29500 train.py ...                                        on each of four
    srun --ntasks-per-node=8 --gpus-per-node=8 python train.py ...              SLURM, a task a GPU

SLURM needs MASTER_ADDR, the first host of the job, and MASTER_PORT in the environment. It sends its
signal ahead of time with `#SBATCH --signal=USR1@120 --requeue`; where `srun` then ends with status
75, `scontrol requeue $SLURM_JOB_ID` puts the script into the queue again. On CUDA with several
ranks batch norm is synchronised, as in DINO; on the CPU each rank has its own batch statistics. On
one machine gloo listens on the loopback address alone; torchrun's own store on all.
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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class UserError(ValueError):
    """What a user can fix, in one sentence: `launch` prints it, and the exit status is 2."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around calls of files that can be copied alone, whose ValueErrors are sentences for users.

    It is a decorator too.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`, and works on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun or `srun` set them; (0, 1, 0) alone.

    Under `srun` one task is one rank.
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return (
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", 0)),
        )
    # An interactive `python` inside an allocation has SLURM_PROCID too. Only `srun` makes a step
    # of several tasks.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return (
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
        )
    return 0, 1, 0


def start(device: str = "auto") -> Ranks:
    """Choose the device and, where there are several processes, join them.

    Args:
        device: "auto" (CUDA, else MPS where there is one process, else CPU), "cuda", "mps" or
            "cpu".

    Raises:
        UserError: where the device is not there, a node has more processes than GPUs, or the
            address of the first rank is missing.
    """
    rank, world, local = rank_from_environment()
    chosen = choose_device(device, world, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        use_fast_kernels()
    elif chosen.type == "cpu":
        keep_freed_memory()
    if world > 1:
        join(rank, world, chosen)
    return Ranks(rank, world, chosen)


def choose_device(device: str, world: int, local: int) -> torch.device:
    """The device that `start` is asked for, with the index of this rank's GPU."""
    mps = (
        torch.backends.mps.is_available() and torch.amp.is_autocast_available("mps") and world == 1
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    if device == "mps" and not mps:
        raise UserError(
            "--device mps: needs Apple's Metal, torch 2.5 or newer and a single process"
        )
    if device != "cuda":
        return torch.device(device)
    visible = torch.cuda.device_count()
    # SLURM may show each task one GPU only, whatever its local rank.
    by_srun = "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    index = 0 if visible == 1 and by_srun else local
    if index >= visible:
        raise UserError(
            f"local rank {local} has no GPU of its own: {visible} visible; "
            f"start {visible} processes a node, or use --device cpu"
        )
    return torch.device("cuda", index)


def use_fast_kernels() -> None:
    """Settings of CUDA for networks whose inputs come in a few fixed shapes.

    cuDNN times its algorithms once for each shape and keeps the fastest. Views have the same few
    shapes in every step, so the search pays for itself at once. What is multiplied in float32
    (heads, k-NN, all of `--amp none`) goes through the tensor cores as TF32. That has float32's
    range and float16's precision, as autocast has anyhow, and is several times as fast.
    """
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def join(rank: int, world: int, device: torch.device) -> None:
    """Make this process a member of the process group."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{world} processes cannot find each other: set {' and '.join(missing)}, "
            "the first node's name and a free port, or start them by torchrun"
        )
    # Where all ranks are on one machine, gloo need not listen on its network.
    # Without this it would, by the machine's name.
    loopback = {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex())
    if on_one_machine(world) and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
    # torchrun keeps its store, with the addresses of the dead, when it starts dead ranks anew.
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # While the first rank downloads, the others wait longer than the ten minutes that NCCL allows.
    options = dict(store=store, rank=rank, world_size=world, timeout=timedelta(hours=2))
    dist.init_process_group(backend, **options)


def on_one_machine(world: int) -> bool:
    """Whether torchrun, SLURM or the address of the first rank says so."""
    environment = os.environ
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"]) == world
    loopback = environment.get("MASTER_ADDR") in ("localhost", "127.0.0.1", "::1")
    return environment.get("SLURM_STEP_NUM_NODES") == "1" or loopback


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of giving it back to the kernel.

    Every step takes and frees the same large blocks. Pages that come anew from the kernel, which
    clears them, can cost as much as the work on them. Nothing happens without glibc or where
    another allocator is preloaded.
    """
    with suppress(AttributeError, TypeError, OSError):  # no mallopt; Windows, which opens no None
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the top of the heap
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping for a large block, which would go when it is freed


# SLURM, torchrun and clouds say by the first two that they are going to kill; Ctrl-C is SIGINT.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    if hasattr(signal, name)  # Windows lacks SIGUSR1
)

# Exit status of a run that a signal stopped and that goes on when started again.
STOPPED = 75  # EX_TEMPFAIL of sysexits.h, "try again"
INTERRUPTED = 130  # by Ctrl-C, as shells have it: 128 + SIGINT


def stop(together: bool = True) -> None:
    """To be called last, before the process ends by `os._exit` where there are several ranks.

    `together`: all ranks leave. NCCL's group would wait for ranks that do not, so it is left alone
    then. Gloo's is always left alone: its end joins its threads, and one of them may be waiting for
    Python's lock, which this thread holds, to let go of its last tensor.
    """
    for number in STOP_SIGNALS:  # what was to be saved is, and the exit status should tell
        signal.signal(number, signal.SIG_IGN)
    if together and dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


class StopSignals:
    """Notes the signals that ask a run to stop, so that it can save first.

    While `held`, a signal is only noted in `seen`. Else it ends the process at once with `status`
    and without cleaning up: an exception could come out of any line, of torch's own too. To lose
    the torchrun that started this process counts as a signal, because it will be missed when the
    next one is due.

    `status` is the exit status to leave with: INTERRUPTED where the first signal was SIGINT, else
    STOPPED. More signals change nothing: on Ctrl-C a rank gets the terminal's and torchrun's.
    """

    def __init__(self):
        self.came, self.held, self.status = False, False, STOPPED
        self.process, self.parent = os.getpid(), os.getppid()
        for number in STOP_SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:  # a loader's process, not yet told to leave signals alone
            return
        if not self.came and number == signal.SIGINT:
            self.status = INTERRUPTED
        self.came = True
        if not self.held:
            self.leave()

    def leave(self) -> None:
        with suppress(RuntimeError):  # the signal may have come in the middle of a print
            sys.stdout.flush()
        if self.status == INTERRUPTED and rank_from_environment()[0] == 0:
            os.write(2, b"stopped by Ctrl-C\n")  # print is not allowed to be called within print
        os._exit(self.status)

    @property
    def seen(self) -> bool:
        return self.came or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A part of a held run that may be broken off anywhere."""
        self.held = False
        if self.seen:
            self.leave()
        yield
        self.held = True


def launch(script: str, wrong: str | None, device: str, work: Callable[[Ranks], None]) -> None:
    """Run a script's `work` on this process's rank.

    What a user can mend is one line and exit status 2. Anything else keeps its traceback.

    Args:
        wrong: what is the matter with the flags, which the first rank says for all; None where
            nothing is.
        device: see `start`.
    """
    status, together = 0, False
    with suppress(AttributeError):  # a notebook's stdout
        # File names are bytes, which may be no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if wrong:
            status = 2
            if rank_from_environment()[0] == 0:
                print_error(script, wrong)
        else:
            work(start(device))
        together = True
    except SystemExit as stopped:  # of all ranks, after a signal
        status, together = stopped.code if isinstance(stopped.code, int) else 1, True
    except KeyboardInterrupt:
        status = INTERRUPTED
        if rank_from_environment()[0] == 0:
            print(f"{script}: stopped by Ctrl-C", file=sys.stderr)
    except BrokenPipeError:
        status = 2
        with suppress(OSError):  # the errors may have had the same reader
            print_error(script, "whoever read the output is gone (broken pipe)")
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        status = 2
        print_error(script, sentence)
    finally:
        several = dist.is_initialized()
        stop(together)
    gc.collect()  # a loader that an error left, with its processes
    if several:
        # Without Python's clean-up, in which gloo can hang or abort, see `stop`.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def print_error(script: str, sentence: str) -> None:
    print(f"{script}: error: {sentence}", file=sys.stderr)


# Errors of the operating system that are no bug: a full, read-only or failing disk, a permission.
NAMES_OF_MACHINE_ERRORS = "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO"
MACHINE_ERRORS = {getattr(errno, name) for name in NAMES_OF_MACHINE_ERRORS if hasattr(errno, name)}


def sentence_of(error: Exception) -> str | None:
    """One sentence on an error that a user can fix; None for any other, which is a bug."""
    lines = lines_of(error)
    if isinstance(error, UserError):
        return " ".join(lines)
    said = lines[0]
    if isinstance(error, OSError) and error_number(error, said) in MACHINE_ERRORS:
        return f"{error.filename}: {error.strerror}" if error.filename else said
    out_of_memory = "allocate memory", "out of memory", "Storage size"
    if isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in said for words in out_of_memory)
    ):
        return f"out of memory: smaller batches, views or heads may help ({said})"
    if not isinstance(error, RuntimeError):
        return None
    if isinstance(error, dist.DistError) or "gloo" in said:
        return f"lost another rank, whose own error tells why ({' '.join(lines)})"
    if said.startswith("DataLoader worker"):
        killed = said.split(". ")[0]
        return f"{killed}: where memory is short, fewer --num_workers may help"
    return None


def lines_of(error: Exception) -> list[str]:
    """The lines of an error's text, at least one.

    A DataLoader puts the traceback of the loader's process before an error that was raised there.
    Then it is the last line alone, without the name of the error's class.
    """
    lines = str(error).strip().splitlines()
    if any(line.endswith("Traceback (most recent call last):") for line in lines):
        prefix = rf"(\w+\.)*{re.escape(type(error).__name__)}: "
        lines = [re.sub(f"^{prefix}", "", lines[-1])]
    return lines or [type(error).__name__]


def error_number(error: OSError, said: str) -> int | None:
    """An OSError's errno; one that comes from a loader's process has it in its text alone."""
    found = re.match(r"\[Errno (\d+)\]", said)
    return int(found[1]) if error.errno is None and found else error.errno


def on_device(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module on this rank's device, in channels-last memory format.

    Where several ranks have CUDA its batch norm takes its statistics over all of them.
    """
    module = module.to(ranks.device, memory_format=torch.channels_last)
    if ranks.world > 1 and ranks.device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


def data_parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the ranks; itself where there is one process."""
    if not dist.is_initialized():
        return module
    # Without device_ids, inputs stay where they are: labels and indices are wanted on the CPU.
    # Batch norm's buffers need no exchange in training. That option was renamed in torch 2.15.
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
    """Which of some flags are set on any rank.

    It is one exchange, at which the CPU waits for what the step has asked of the device so far.
    """
    if dist.is_initialized():
        found = torch.stack(
            [torch.as_tensor(flag, dtype=torch.float32, device=device) for flag in flags]
        )
        dist.all_reduce(found, dist.ReduceOp.MAX)
        flags = found.tolist()
    return [bool(flag) for flag in flags]


def gather_objects(own: object) -> list:
    """Each rank's object, on all ranks, in their order."""
    if not dist.is_initialized():
        return [own]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def gather_strided(rows: Tensor, total: int) -> Tensor:
    """Put together what each rank made of every world-th item, on all ranks.

    The (n, ...) of each rank become (total, ...), in the order of the items.
    """
    if not dist.is_initialized():
        return rows
    world = dist.get_world_size()
    longest = -(-total // world)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the first rank's buffers, batch norm's statistics among them."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)

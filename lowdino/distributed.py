"""Processes and devices: started by torchrun, by SLURM or alone; NCCL on CUDA, gloo on the CPU."""

import ctypes
import gc
import inspect
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process's place: rank of `world`, on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun or `srun` set them; (0, 1, 0) alone.

    Under `srun` one task is one rank; MASTER_ADDR and MASTER_PORT must be set where there is more than one.
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return (
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", 0)),
        )
    # An interactive `python` inside an allocation has SLURM_PROCID too; only `srun` makes several tasks of a step.
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
        device: "auto" (CUDA, else MPS where there is one process, else CPU), "cuda", "mps" or "cpu".

    Raises:
        ValueError: where the device is not there, or a node has more processes than GPUs.
    """
    rank, world, local = rank_from_environment()
    mps = (
        torch.backends.mps.is_available() and torch.amp.is_autocast_available("mps") and world == 1
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available here; use --device cpu")
    if device == "mps" and not mps:
        raise ValueError(
            "--device mps: needs Apple's Metal, torch 2.5 or newer and a single process"
        )
    if device == "cuda":
        # SLURM may show each task one GPU only, whatever its local rank.
        visible = torch.cuda.device_count()
        index = (
            0
            if visible == 1
            and "SLURM_LOCALID" in os.environ
            and "TORCHELASTIC_RUN_ID" not in os.environ
            else local
        )
        if index >= visible:
            raise ValueError(
                f"local rank {local} has no GPU of its own: {visible} visible; start {visible} processes "
                "a node, or use --device cpu"
            )
        torch.cuda.set_device(index)
        device = f"cuda:{index}"
    if device == "cpu":
        keep_freed_memory()
    if world > 1:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        # Where all ranks are on one machine, gloo need not listen on its network; it would by the machine's name.
        loopback = {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex())
        if on_one_machine(world) and loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
        # torchrun keeps its store when it starts dead ranks anew, and the addresses of the dead in it.
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, torch.device(device))


def on_one_machine(world: int) -> bool:
    """Whether torchrun, SLURM or the address of the first rank says so."""
    environment = os.environ
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"]) == world
    return environment.get("SLURM_STEP_NUM_NODES") == "1" or environment.get("MASTER_ADDR") in (
        "localhost",
        "127.0.0.1",
        "::1",
    )


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, in place of giving it back to the kernel.

    Every step takes and frees the same large blocks, and pages that come anew from the kernel, which clears them, can cost as
    much as the work on them. Nothing happens without glibc or where another allocator is preloaded.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the top of the heap
        mallopt(
            -4, 0
        )  # M_MMAP_MAX: no mapping of its own for a large block, which would go when it is freed


STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1


def stop(together: bool = True) -> None:
    """To be called last. `together`: all ranks leave; NCCL's group would wait for those that do not, and is left alone."""
    for number in STOP_SIGNALS:  # what was to be saved is, and the exit status should tell
        signal.signal(number, signal.SIG_IGN)
    if together and dist.is_initialized():
        dist.destroy_process_group()


# Exit status of a run that a signal stopped and that goes on when started again: EX_TEMPFAIL of sysexits.h, "try again".
STOPPED = 75


class StopSignals:
    """SIGTERM and SIGUSR1, by which SLURM, torchrun and clouds say that they are going to kill, noted so that a run can save.

    While `held`, a signal is only noted in `seen`; else it ends the process at once with status STOPPED, and without
    cleaning up: an exception could come out of any line, of torch's own too. To lose the torchrun that started this process
    counts as a signal: it will be missed when the next one is due.
    """

    def __init__(self):
        self.came, self.held, self.process, self.parent = False, False, os.getpid(), os.getppid()
        for number in STOP_SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:  # a loader's process, not yet told to leave signals alone
            return
        self.came = True
        if not self.held:
            self.leave()

    def leave(self) -> None:
        sys.stdout.flush()
        os._exit(STOPPED)

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
    """Run a script's `work` on this process's rank; what a user can mend is one line and exit status 2, no traceback.

    Args:
        wrong: what is the matter with the flags, which the first rank says for all; None where nothing is.
        device: see `start`.
    """
    status, together = 0, False
    with suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # names of files are bytes, which may be no text
    try:
        if wrong:
            status = complain(script, wrong) if rank_from_environment()[0] == 0 else 2
        else:
            work(start(device))
        together = True
    except SystemExit:  # of all ranks, after a signal
        together = True
        raise
    except (ValueError, FloatingPointError) as error:
        # Of an error in a loader's process the last line is its own; the others are that process's traceback.
        status = complain(script, str(error).strip().splitlines()[-1].removeprefix("ValueError: "))
    except OSError as error:
        status = complain(
            script, f"{error.filename}: {error.strerror}" if error.filename else str(error)
        )
    except (RuntimeError, MemoryError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if (
            isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
            or "allocate memory" in said
            or "Storage size" in said
        ):
            status = complain(
                script, f"out of memory: smaller batches, views or heads may help ({said})"
            )
        elif isinstance(error, dist.DistError) or "gloo" in said:
            status = complain(script, f"lost another rank, whose own error tells why ({said})")
        elif said.startswith("DataLoader worker"):
            status = complain(
                script,
                f"{said.split('. ')[0]}: where memory is short, fewer --num_workers may help",
            )
        else:
            raise
    finally:
        stop(together)
    gc.collect()  # a loader that an error left, with its processes
    if status:
        sys.exit(status)


def complain(script: str, sentence: str) -> int:
    print(f"{script}: error: {sentence}", file=sys.stderr)
    return 2


def on_device(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module on this rank's device, its images channels-last, its batch norm over all ranks where they have CUDA."""
    module = module.to(ranks.device, memory_format=torch.channels_last)
    if ranks.world > 1 and ranks.device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its gradients averaged over the ranks; itself where there is one process."""
    if not dist.is_initialized():
        return module
    # Batch norm's buffers need no exchange in training; the option that says so was renamed in torch 2.15.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        module,
        [device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{option: False},
    )


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def any_rank(flags: list[bool | Tensor], device: torch.device) -> list[bool]:
    """Which of some flags are set on any rank: one exchange, and the one wait for the device that a step has."""
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
    """Put together what each rank made of every world-th item: (n, ...) of each -> (total, ...) in order, on all ranks."""
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

#!/usr/bin/env python3
"""Where the time goes: views, the parts of a step, and train.py as a whole over bare passes.

    python tests/bench_speed.py --archs resnet5m mobilevit_xxs --sizes 32 64 \
        --output_dir runs/speed

Each figure is a median over --repeats. Each ratio is taken between two things that are timed in
turns. Prints Markdown tables and writes speed.json. There are two views an image and the settings
of `--preset small`; train.py is also measured with the eight views of `--preset emp`. The images
are made up: as large as the views up to 64 pixels, twice as large above. Two ranks and one process
are compared on the demo images, of 64 pixels. Nothing here decodes files.
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from comparison import ROOT
from PIL import Image
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from whole_runs import logged, measure_train, pictures, seconds, training_flags

import lowdino
import train
from lowdino import (
    augment,
    budget,
    data,
    demo,
    distributed,
    ema,
    evaluate,
    features,
    logger,
    methods,
    optim,
    settings,
)

TURN = 10  # seconds that one of two jobs runs, with the other one stopped


def in_turns(device: torch.device, repeats: int, **works: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each. Every round runs them all; the first round does not count."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append({name: seconds(device, work) for name, work in works.items()})
    return {name: statistics.median(r[name] for r in rounds[1:]) for name in works}


def milliseconds(times: dict[str, float]) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * value for name, value in times.items()}


# --------------------------------------------------------------------------------------------------
# Views
# --------------------------------------------------------------------------------------------------


class PILViews(Dataset):
    """The global views of `augment.MultiCrop`, image by image, by torchvision's transforms of PIL
    images."""

    def __init__(self, images: np.ndarray, size: int):
        def pipeline(blur: float, solarize: float) -> v2.Compose:
            crop = functools.partial(v2.RandomResizedCrop, size, scale=(0.2, 1.0))
            return v2.Compose(
                [
                    crop(interpolation=v2.InterpolationMode.BICUBIC),
                    v2.RandomHorizontalFlip(),
                    v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                    v2.RandomGrayscale(0.2),
                    v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur),
                    v2.RandomSolarize(128, p=solarize),
                    v2.PILToTensor(),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD),
                ]
            )

        self.images, self.pipelines = images, (pipeline(1.0, 0.0), pipeline(0.1, 0.2))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return [pipeline(Image.fromarray(self.images[i])) for pipeline in self.pipelines]


def measure_views(size: int, repeats: int, device: torch.device) -> dict:
    """Views/s of batches of 64, over a DataLoader of the PIL pipeline, and over its transforms
    alone, with nothing handed over."""
    images = pictures(1024 if size <= 64 else 256, size)
    sizes = torch.full((len(images), 2), images.shape[-1])
    crop = augment.MultiCrop(size, size, 0, (0.2, 1.0)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    cores = data.cores()
    dataset = PILViews(images.permute(0, 2, 3, 1).contiguous().numpy(), size)

    def ours():
        for part, sides in zip(images.split(64), sizes.split(64)):
            crop(part.to(device), sides.to(device), generator)

    works = {"ours": ours}
    for name, collate in {"pil": None, "pil_alone": len}.items():
        options = dict(num_workers=cores, persistent_workers=True, collate_fn=collate)
        loader = DataLoader(dataset, 64, **options)
        works[name] = lambda loader=loader: sum(1 for _ in loader)
    times = in_turns(device, repeats, **works)
    return {
        "size": size,
        **{f"{name}_views_per_s": 2 * len(images) / time for name, time in times.items()},
        "pil_processes": cores,
        "ratio": times["pil"] / times["ours"],
        "ratio_alone": times["pil_alone"] / times["ours"],
    }


# --------------------------------------------------------------------------------------------------
# The parts of a step
# --------------------------------------------------------------------------------------------------


class Step:
    """A training step in parts, each to be timed, and the bare passes on the same views."""

    def __init__(self, args: argparse.Namespace, images: Tensor, device: torch.device):
        self.args, self.device = args, device
        backbone = features.build_backbone(args)
        self.crop = data.build_views(args, backbone).to(device)
        method = methods.DINO(backbone, args, args.epochs * 100, 100)
        ranks = distributed.Ranks(0, 1, device)
        self.method = distributed.on_device(method, ranks).train()
        self.optimizer = optim.build(args.optimizer, self.method, args.lr, device)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.generator = torch.Generator(device).manual_seed(0)
        self.batch = data.ImageArray(images).__getitems__(list(range(len(images))))

    def autocast(self) -> torch.autocast:
        amp = self.args.amp
        return torch.autocast(self.device.type, budget.AUTOCAST[amp], enabled=amp != "none")

    def make_views(self) -> None:
        batch = self.batch
        made = self.crop(batch.images.to(self.device), batch.sizes.to(self.device), self.generator)
        self.views = [view.contiguous(memory_format=torch.channels_last) for view in made]

    def teacher(self) -> None:
        with torch.no_grad(), self.autocast():
            self.method.teacher(self.views[:2])

    def forward(self) -> None:
        with self.autocast():
            self.bare = sum(out.float().mean() for out in self.method.student(self.views))

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.bare.backward()

    def objective(self) -> None:
        with self.autocast():
            self.loss = self.method(self.views, self.batch, 0)

    def objective_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.backward()

    def clip_and_step(self) -> None:
        self.method.before_step(0)
        norms = optim.clip_gradients_by_parameter(self.parameters, self.args.clip_grad)
        distributed.any_rank([~norms.sum().isfinite()], self.device)
        self.optimizer.step()


def measure_step(
    arch: str, size: int, batch: int, repeats: int, device: torch.device, local: int = 0
) -> dict:
    """Seconds of each part of a training step, and of the bare passes on views that are there
    already."""
    flags = (
        f"--preset small --arch {arch} --global_crops_size {size} --local_crops_number {local} "
        "--local_crops_size 32 --momentum_teacher 0.99 --amp "
        f"{'bf16' if device.type == 'cuda' else 'none'}"
    )
    args = settings.resolve(train.get_parser(), flags.split())
    step = Step(args, pictures(batch, size), device)
    bare = {"teacher": step.teacher, "forward": step.forward, "backward": step.backward}
    own = {
        "teacher_student_losses": step.objective,
        "their_backward": step.objective_backward,
        "clip_and_step": step.clip_and_step,
        "ema": functools.partial(step.method.after_step, 0),
    }
    parts = in_turns(device, repeats, views=step.make_views, **bare, **own)
    floor = sum(parts[name] for name in bare)
    whole = sum(parts[name] for name in ("views", *own))
    speeds = {"step_images_per_s": batch / whole, "step_over_floor": floor / whole}
    row = {"arch": arch, "size": size, "batch": batch, "local_views": local}
    return row | speeds | milliseconds(parts)


# --------------------------------------------------------------------------------------------------
# Two ranks
# --------------------------------------------------------------------------------------------------


def start_training(flags: list[str], world: int, port: int) -> list[subprocess.Popen]:
    """Start train.py on `world` ranks, on a CPU with the cores between them."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--log_freq", "5"]
    shared = os.environ | {
        "OMP_NUM_THREADS": str(max(data.cores() // world, 1)),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    job = []
    for rank in map(str, range(world)):
        env = shared | {"RANK": rank, "LOCAL_RANK": rank}
        job.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env))
    return job


def take_turns(jobs: list[list[subprocess.Popen]]) -> None:
    """Run jobs in turns, the others stopped, so that all see the same machine."""
    processes = sum(jobs, [])
    try:
        while any(process.poll() is None for process in processes):
            for job in jobs:
                for process in processes:
                    process.send_signal(signal.SIGCONT if process in job else signal.SIGSTOP)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    for process in job:
                        process.wait(TURN)
    finally:
        for process in processes:
            process.kill()
    if any(process.wait() for process in processes):
        raise RuntimeError("a run of train.py failed, see above")


def usual_rate(folder: Path) -> float:
    """Median images/s of a log, without the first tenth and where the job was stopped."""
    rates = [record["images_per_s"] for record in logged(folder)]
    rates = rates[len(rates) // 10 + 1 :]
    return statistics.median(rate for rate in rates if rate > max(rates) / 2)


def measure_ranks(
    arch: str, size: int, batch: int, steps: int, output: Path, device: torch.device
) -> dict:
    """Two ranks over one process with one batch, by train.py's own log.

    Both make about `steps` steps on the demo images, in whole epochs.
    """
    jobs, folders, port = [], [], get_free_port()
    epochs = max(steps * batch // demo.TRAIN, 1)
    for world in (1, 2):
        folder = output / f"{arch}_{size}_{batch}_{world}_{time.time_ns()}"
        flags = training_flags(arch, size, batch, folder, device, world, epochs)
        jobs.append(start_training(flags, world, port))
        folders.append(folder)
    take_turns(jobs)
    one, two = map(usual_rate, folders)
    rates = {"one_images_per_s": one, "two_images_per_s": two, "ratio": two / one}
    return {"arch": arch, "size": size, "batch": batch} | rates


# --------------------------------------------------------------------------------------------------
# One choice at a time
# --------------------------------------------------------------------------------------------------


def passes(
    arch: str, views: Tensor, memory_format: torch.memory_format, compiled: bool = False
) -> Callable[[], None]:
    """A forward and a backward pass of a backbone on views."""
    network = lowdino.build_backbone(arch).to(views.device, memory_format=memory_format)
    views = views.contiguous(memory_format=memory_format)
    if compiled:
        network.compile(dynamic=False)

    def work():
        network.zero_grad(set_to_none=True)
        network(views).square().mean().backward()

    work()
    return work


def adamw(arch: str, device: torch.device, fused: bool) -> Callable[[], None]:
    """A step of AdamW on random gradients."""
    network = lowdino.build_backbone(arch).to(device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(optim.parameter_groups(network), fused=fused, foreach=False).step


def averages(arch: str, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """The teacher's average by `ema.update`, and parameter by parameter."""
    teacher, student = (lowdino.build_backbone(arch).to(device) for _ in range(2))
    pairs = ema.paired_parameters(teacher, student)

    @torch.no_grad()
    def one_by_one():
        for mean, parameter in zip(*pairs):
            mean.lerp_(parameter, 0.004)

    return lambda: ema.update(*pairs, 0.996), one_by_one


def measure_levers(
    arch: str, size: int, batch: int, repeats: int, device: torch.device, compiled: bool
) -> list[dict]:
    """What one choice each gives: milliseconds as train.py has it, and otherwise; with `compiled`
    also what --compile gives, which takes minutes."""
    run = functools.partial(passes, arch, torch.randn(2 * batch, 3, size, size, device=device))
    levers = {
        "channels_last": (run(torch.channels_last), run(torch.contiguous_format)),
        "fused AdamW": (adamw(arch, device, True), adamw(arch, device, False)),
        "foreach EMA": averages(arch, device),
    }
    if compiled:
        faster = run(torch.channels_last, compiled=True)
        levers["--compile (off by default)"] = faster, levers["channels_last"][0]
    rows = []
    for name, (with_it, without) in levers.items():
        times = in_turns(device, repeats, **{"with": with_it, "without": without})
        row = {"arch": arch, "size": size, "lever": name} | milliseconds(times)
        rows.append(row | {"ratio": times["without"] / times["with"]})
    return rows


def measure_knn(repeats: int, device: torch.device) -> dict:
    """The k-NN step on 50,000 x 10,000 x 640 over the matrix product that it cannot do without."""
    generator = torch.Generator().manual_seed(0)
    memory, queries = (torch.randn(n, 640, generator=generator).to(device) for n in (50000, 10000))
    labels = torch.randint(10, (50000,), generator=generator).to(device)

    def product():
        for block in queries.split(1000):
            block @ memory.T

    def knn():
        evaluate.knn_classify(memory, labels, queries, 20, num_classes=10)

    times = in_turns(device, repeats, product=product, knn=knn)
    found = {f"{name}_s": value for name, value in times.items()}
    ratio = times["knn"] / times["product"]
    return found | {"ratio": ratio, "memory_mb": logger.memory_mb(device)}


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------

# Columns: key of a row -> heading.
NETWORK = {"arch": "arch", "size": "pixels"}
VIEWS = {
    "size": "pixels",
    "ours_views_per_s": "views/s",
    "pil_views_per_s": "PIL, views/s",
    "pil_processes": "PIL processes",
    "ratio": "ratio",
    "ratio_alone": "over its transforms alone",
}
TIMED = "views teacher forward backward teacher_student_losses their_backward clip_and_step ema"
PARTS = NETWORK | {f"{name}_ms": f"{name.replace('_', ' ')}, ms" for name in TIMED.split()}
WHOLE = NETWORK | {
    "floor_images_per_s": "floor, images/s",
    "train_images_per_s": "train.py, images/s",
    "train_over_floor": "ratio",
    "step_over_floor": "one step over the floor",
    "data_wait": "waiting",
    "memory_mb": "MiB",
}
MANY_VIEWS = {name: heading for name, heading in WHOLE.items() if name != "step_over_floor"}
RANKS = NETWORK | {
    "batch": "batch of both",
    "one_images_per_s": "one process, images/s",
    "two_images_per_s": "two ranks, images/s",
    "ratio": "ratio",
}
LEVERS = NETWORK | {
    "lever": "lever",
    "with_ms": "with, ms",
    "without_ms": "without, ms",
    "ratio": "ratio",
}
GROWTH = NETWORK | {
    "batch": "batch",
    "local_views": "local views of 32 px",
    "step_images_per_s": "images/s",
    "step_over_floor": "one step over the floor",
}


def cell(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def show(rows: list[dict], columns: dict[str, str]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(columns.values()) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell(row[name]) for name in columns) + " |")
    print(flush=True)


def whole_run(arch: str, size: int, args, output: Path, device: torch.device, preset: str) -> dict:
    """`measure_train` in a process of its own, for the peak of its memory."""
    folder = output / f"{arch}_{size}_{preset}_{time.time_ns()}"
    with get_context("spawn").Pool(1) as process:
        run = arch, size, args.batch, folder, device
        flags = training_flags(*run, preset=preset, amp=args.amp)
        return process.apply(measure_train, [flags, args.steps])


def measure_networks(args, device: torch.device, output: Path, found: dict) -> None:
    """Everything but the views, printed and added to `found`."""
    batch, repeats, size = args.batch, args.repeats, args.sizes[0]
    for arch in args.archs:
        for side in args.sizes:
            row = measure_step(arch, side, batch, repeats, device)
            row |= whole_run(arch, side, args, output, device, "small")
            found["steps"].append(row)
            print(json.dumps(row), flush=True)
    print()
    show(found["steps"], PARTS)
    show(found["steps"], WHOLE)
    found["many_views"] = [
        {"arch": arch, "size": size} | whole_run(arch, size, args, output, device, "emp")
        for arch in args.archs
    ]
    show(found["many_views"], MANY_VIEWS)
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        found["ranks"] = [
            measure_ranks(arch, size, total, 2 * args.steps, output, device)
            for arch in args.archs
            for total in (batch, 2 * batch)
        ]
        show(found["ranks"], RANKS)
    found["levers"] = []
    for arch in args.archs:
        found["levers"] += measure_levers(arch, size, batch, repeats, device, args.compile)
    show(found["levers"], LEVERS)
    grown = [(batch // 4, 0), (batch, 0), (4 * batch, 0), (batch, 2), (batch, 8)]
    found["growth"] = [
        measure_step(args.archs[0], size, images, repeats, device, local) for images, local in grown
    ]
    show(found["growth"], GROWTH)
    found["knn"] = measure_knn(repeats, device)
    took = f"{found['knn']['knn_s']:.1f} s, {found['knn']['ratio']:.2f} times"
    print(f"k-NN, 50,000 x 10,000 x 640: {took} the bare matrix product")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    archs = ["resnet5m", "mobilevit_xxs", "mobilevit_s"]
    parser.add_argument("--archs", nargs="*", default=archs, help="none: the views alone")
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 96, 224])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="of train.py")
    help = "as a lever too, which takes minutes and, on a CPU, a C++ compiler"
    parser.add_argument("--compile", action="store_true", help=help)
    help = "of train.py; default: bf16 on a GPU, none on a CPU"
    parser.add_argument("--amp", choices=["bf16", "none"], help=help)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device)
    parser.add_argument("--output_dir", default="runs/speed")
    return parser


def main() -> None:
    args = get_parser().parse_args()

    device, output = distributed.start(args.device).device, Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    views = [measure_views(size, args.repeats, device) for size in args.sizes]
    found = {"views": views, "steps": []}
    show(found["views"], VIEWS)
    if args.archs:
        measure_networks(args, device, output, found)
    (output / "speed.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Where the time goes: views against a PIL pipeline, the parts of a step, and the whole of train.py against bare passes.

    python tests/bench_speed.py --archs resnet5m mobilevit_xxs --sizes 32 64 --output_dir runs/speed

Each figure is a median over --repeats, and each ratio is taken between two things timed in turns. Prints Markdown tables
and writes speed.json. Two views an image and `--preset small`, on made-up images as large as the views up to 64 pixels, twice
as large above; two ranks and one process are compared on the demo's own, of 64 pixels. Nothing here decodes files.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lowdino
import train
from lowdino import augment, data, distributed, ema, evaluate, monitor, optim


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(device: torch.device, repeats: int, **works: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each; every round runs them all, and the first round does not count."""
    rounds = [
        {name: seconds(device, work) for name, work in works.items()} for _ in range(repeats + 1)
    ][1:]
    return {name: statistics.median(r[name] for r in rounds) for name in works}


def pictures(count: int, view: int) -> torch.Tensor:
    """Demo images in the size for views of side `view`: (count, 3, side, side) uint8."""
    images, side = data.demo_images(range(count)).images.float(), view if view <= 64 else 2 * view
    return (
        torch.nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
        .round()
        .to(torch.uint8)
    )


class Repeated(data.ImageArray):
    """As many images as the demo has, but always the same few: of the larger sizes so many would not fit."""

    def __len__(self) -> int:
        return data.DEMO_TRAIN

    def __getitems__(self, indices: list[int]) -> data.Batch:
        return super().__getitems__([i % len(self.images) for i in indices])


class PILViews(torch.utils.data.Dataset):
    """The global views of `augment.MultiCrop`, image by image by torchvision's transforms of PIL images."""

    def __init__(self, images: np.ndarray, size: int):
        def pipeline(blur: float, solarize: float) -> v2.Compose:
            return v2.Compose(
                [
                    v2.RandomResizedCrop(
                        size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC
                    ),
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

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return [pipeline(Image.fromarray(self.images[i])) for pipeline in self.pipelines]


def measure_views(size: int, repeats: int, device: torch.device) -> dict:
    """Views/s of batches of 64, against a DataLoader of the PIL pipeline; and against its transforms alone, with nothing handed over."""
    images = pictures(1024 if size <= 64 else 256, size)
    sizes = torch.full((len(images), 2), images.shape[-1])
    crop = augment.MultiCrop(size, size, 0, (0.2, 1.0)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    cores = data.cores()
    dataset = PILViews(images.permute(0, 2, 3, 1).contiguous().numpy(), size)
    loaders = {
        name: torch.utils.data.DataLoader(
            dataset, 64, num_workers=cores, persistent_workers=True, collate_fn=collate
        )
        for name, collate in {"pil": None, "pil_alone": len}.items()
    }

    def ours():
        for part, sides in zip(images.split(64), sizes.split(64)):
            crop(part.to(device), sides.to(device), generator)

    def exhaust(loader):
        for _ in loader:
            pass

    times = in_turns(
        device,
        repeats,
        ours=ours,
        **{name: functools.partial(exhaust, loader) for name, loader in loaders.items()},
    )
    rates = {f"{name}_views_per_s": 2 * len(images) / time for name, time in times.items()}
    return {
        "size": size,
        **rates,
        "pil_processes": cores,
        "ratio": times["pil"] / times["ours"],
        "ratio_alone": times["pil_alone"] / times["ours"],
    }


def measure_step(
    arch: str, size: int, batch: int, repeats: int, device: torch.device, local: int = 0
) -> dict:
    """Seconds of each part of a training step, and of the bare passes on views that are there already."""
    args = train.parse(
        train.get_parser(),
        [
            "--preset",
            "small",
            "--arch",
            arch,
            "--global_crops_size",
            str(size),
            "--local_crops_number",
            str(local),
            "--local_crops_size",
            "32",
            "--momentum_teacher",
            "0.99",
        ],
    )
    args.amp = "bf16" if device.type == "cuda" else "none"
    images = pictures(batch, size)
    source = data.Data("made-up images", data.ImageArray(images))
    method = train.SelfDistillation(
        args, distributed.Ranks(0, 1, device), source, args.epochs * 100
    )
    model, parameters = method.network.train(), list(method.network.parameters())
    optimizer = train.build_optimizer(args, model, device)
    crop = train.build_views(args).to(device)
    generator, state = torch.Generator(device).manual_seed(0), {}
    drawn = source.pretrain.__getitems__(list(range(batch)))

    def views():
        made = crop(drawn.images.to(device), drawn.sizes.to(device), generator)
        state["views"] = [view.contiguous(memory_format=torch.channels_last) for view in made]

    def autocast():
        return torch.autocast(device.type, train.AUTOCAST[args.amp], enabled=args.amp != "none")

    def teacher():
        with torch.no_grad(), autocast():
            method.teacher(state["views"][:2])

    def forward():
        with autocast():
            state["bare"] = sum(out.float().mean() for out in model(state["views"]))

    def backward():
        optimizer.zero_grad(set_to_none=True)
        state["bare"].backward()

    def objective():
        with autocast():
            state["loss"] = method.objective(model, state["views"], drawn, 0, False)[1]

    def objective_backward():
        optimizer.zero_grad(set_to_none=True)
        state["loss"].backward()

    def clip_and_step():
        norms = optim.clip_gradients_by_parameter(parameters, args.clip_grad)
        distributed.any_rank([~norms.sum().isfinite()], device)
        optimizer.step()

    parts = in_turns(
        device,
        repeats,
        views=views,
        teacher=teacher,
        forward=forward,
        backward=backward,
        teacher_student_losses=objective,
        their_backward=objective_backward,
        clip_and_step=clip_and_step,
        ema=lambda: method.after_step(0),
    )
    floor = parts["teacher"] + parts["forward"] + parts["backward"]
    whole = sum(
        parts[name]
        for name in ("views", "teacher_student_losses", "their_backward", "clip_and_step", "ema")
    )
    return {
        "arch": arch,
        "size": size,
        "batch": batch,
        "local_views": local,
        "step_images_per_s": batch / whole,
        "step_over_floor": floor / whole,
        **{f"{name}_ms": 1e3 * value for name, value in parts.items()},
    }


BLOCK = 5  # steps of train.py between two stops for as many bare passes
TURN = 10  # seconds that one of two jobs runs, with the other one stopped


def training_flags(
    arch: str, size: int, batch: int, steps: int, folder: Path, device: torch.device, ranks: int = 1
) -> list[str]:
    """Flags for train.py, about `steps` of it, in whole epochs; the ranks share the batch."""
    epochs = max(steps * batch // data.DEMO_TRAIN, 1)
    return [
        "--preset",
        "small",
        "--arch",
        arch,
        "--global_crops_size",
        str(size),
        "--batch_size_per_gpu",
        str(batch // ranks),
        "--epochs",
        str(epochs),
        "--warmup_epochs",
        "0",
        "--knn_freq",
        "0",
        "--saveckp_freq",
        "0",
        "--device",
        device.type,
        "--output_dir",
        str(folder),
    ]


def logged(folder: Path) -> list[dict]:
    """What a training logged of its steps."""
    return [
        r
        for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        if "images_per_s" in r
    ]


def measure_train(
    arch: str, size: int, batch: int, steps: int, folder: Path, device: torch.device
) -> dict:
    """Images/s of train.py's own loop, and of the bare passes that it is stopped for between blocks of steps: one machine for both.

    With the share of time that it waits for data, and its peak memory; to be called in a process of its own.
    """
    blocks = []  # seconds of a block of bare passes, and of the steps behind them

    class Interrupted(train.SelfDistillation):
        def objective(self, model, views, batch, step, logging):
            def bare_passes():
                for _ in range(BLOCK):
                    with torch.no_grad():
                        self.teacher(views[:2])
                    loss = sum(out.float().mean() for out in model(views))
                    model.zero_grad(set_to_none=True)
                    with torch.autocast(device.type, enabled=False):
                        loss.backward()

            if step % BLOCK == 0:
                if step:
                    blocks[-1].append(
                        time.perf_counter() - self.began + seconds(device, lambda: None)
                    )
                blocks.append([seconds(device, bare_passes)])
                self.began = time.perf_counter()
            return super().objective(model, views, batch, step, logging)

    flags = training_flags(arch, size, batch, steps, folder, device)
    args, ranks = train.parse(train.get_parser(), flags), distributed.start(device.type)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.train(
            args,
            ranks,
            replace(train.settle(args, ranks), pretrain=Repeated(pictures(4 * batch, size))),
            Interrupted,
        )
    records = logged(folder)
    pairs = [
        ((bare + bare_after) / 2, trained)
        for (bare, trained), (bare_after, *_) in zip(blocks[1:], blocks[2:])
    ]
    bare, trained = (statistics.median(times) for times in zip(*pairs))
    return {
        "floor_images_per_s": BLOCK * batch / bare,
        "train_images_per_s": BLOCK * batch / trained,
        "train_over_floor": statistics.median(bare / trained for bare, trained in pairs),
        "data_wait": statistics.median(r["data_wait"] for r in records),
        "memory_mb": records[-1]["memory_mb"],
    }


def measure_ranks(
    arch: str, size: int, batch: int, steps: int, output: Path, device: torch.device
) -> dict:
    """Two ranks against one process, with one batch and, on a CPU, the cores between them; by train.py's own log.

    The two jobs take turns, in which the other one is stopped, so that both see the same machine.
    """
    port = get_free_port()
    jobs, folders = {}, {}
    for world in (1, 2):
        folders[world] = output / f"{arch}_{size}_{batch}_{world}_{time.time_ns()}"
        flags = training_flags(arch, size, batch, steps, folders[world], device, world)
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--log_freq", "5"]
        shared = os.environ | {
            "OMP_NUM_THREADS": str(max(data.cores() // world, 1)),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        jobs[world] = [
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]
    processes = jobs[1] + jobs[2]
    try:
        while any(process.poll() is None for process in processes):
            for job in jobs.values():
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

    def images_per_s(world: int) -> float:
        rates = [r["images_per_s"] for r in logged(folders[world])]
        rates = rates[len(rates) // 10 + 1 :]
        highest = max(rates)
        return statistics.median(
            rate for rate in rates if rate > highest / 2
        )  # in the others the job was stopped

    one, two = images_per_s(1), images_per_s(2)
    return {
        "arch": arch,
        "size": size,
        "batch": batch,
        "one_images_per_s": one,
        "two_images_per_s": two,
        "ratio": two / one,
    }


def measure_levers(
    arch: str, size: int, batch: int, repeats: int, device: torch.device
) -> list[dict]:
    """What one choice each gives: milliseconds as train.py has it, and otherwise."""

    def passes(memory_format: torch.memory_format, compiled: bool = False) -> Callable[[], None]:
        network = lowdino.build_backbone(arch).to(device, memory_format=memory_format)
        views = torch.randn(2 * batch, 3, size, size, device=device).contiguous(
            memory_format=memory_format
        )
        if compiled:
            network.compile(dynamic=False)

        def work():
            network.zero_grad(set_to_none=True)
            network(views).square().mean().backward()

        work()
        return work

    def adamw(fused: bool) -> Callable[[], None]:
        network = lowdino.build_backbone(arch).to(device)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        return torch.optim.AdamW(optim.parameter_groups(network), fused=fused, foreach=False).step

    teacher, student = (
        lowdino.build_backbone(arch).to(device),
        lowdino.build_backbone(arch).to(device),
    )
    pairs = ema.paired_parameters(teacher, student)

    @torch.no_grad()
    def one_by_one():
        for mean, parameter in zip(*pairs):
            mean.lerp_(parameter, 0.004)

    levers = {
        "channels_last": (passes(torch.channels_last), passes(torch.contiguous_format)),
        "fused AdamW": (adamw(True), adamw(False)),
        "foreach EMA": (lambda: ema.update(*pairs, 0.996), one_by_one),
    }
    if device.type == "cuda" or shutil.which("c++"):
        levers["--compile (off by default)"] = (
            passes(torch.channels_last, compiled=True),
            levers["channels_last"][0],
        )
    rows = []
    for name, (with_it, without) in levers.items():
        times = in_turns(device, repeats, with_it=with_it, without=without)
        rows.append(
            {
                "arch": arch,
                "size": size,
                "lever": name,
                "with_ms": 1e3 * times["with_it"],
                "without_ms": 1e3 * times["without"],
                "ratio": times["without"] / times["with_it"],
            }
        )
    return rows


def measure_knn(repeats: int, device: torch.device) -> dict:
    """The k-NN step on 50,000 x 10,000 x 640 beside the matrix product that it cannot do without."""
    generator = torch.Generator().manual_seed(0)
    memory, asked = (torch.randn(n, 640, generator=generator).to(device) for n in (50000, 10000))
    labels = torch.randint(10, (50000,), generator=generator).to(device)

    def product():
        for block in asked.split(1000):
            block @ memory.T

    times = in_turns(
        device,
        repeats,
        product=product,
        knn=lambda: evaluate.knn_classify(memory, labels, asked, 20, num_classes=10),
    )
    return {
        "knn_s": times["knn"],
        "product_s": times["product"],
        "ratio": times["knn"] / times["product"],
        "memory_mb": monitor.memory_mb(device),
    }


def table(rows: list[dict], columns: dict[str, str]) -> str:
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    cells = [
        [
            f"{row[c]:.3g}"
            if isinstance(row[c], float) and row[c] < 1000
            else f"{row[c]:.0f}"
            if isinstance(row[c], float)
            else str(row[c])
            for c in columns
        ]
        for row in rows
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]) + "\n"


def measure_networks(
    args: argparse.Namespace, device: torch.device, output: Path, found: dict
) -> None:
    """Everything but the views, printed and added to `found`."""
    for arch in args.archs:
        for size in args.sizes:
            row = measure_step(arch, size, args.batch, args.repeats, device)
            with get_context("spawn").Pool(1) as process:  # of its own, for the peak of its memory
                row |= process.apply(
                    measure_train,
                    (
                        arch,
                        size,
                        args.batch,
                        args.steps,
                        output / f"{arch}_{size}_{time.time_ns()}",
                        device,
                    ),
                )
            found["steps"].append(row)
            print(json.dumps(row), flush=True)
    names = [
        "views",
        "teacher",
        "forward",
        "backward",
        "teacher_student_losses",
        "their_backward",
        "clip_and_step",
        "ema",
    ]
    print(
        "\n"
        + table(
            found["steps"],
            {
                "arch": "arch",
                "size": "pixels",
                **{f"{n}_ms": f"{n.replace('_', ' ')}, ms" for n in names},
            },
        )
    )
    print(
        table(
            found["steps"],
            {
                "arch": "arch",
                "size": "pixels",
                "floor_images_per_s": "floor, images/s",
                "train_images_per_s": "train.py, images/s",
                "train_over_floor": "ratio",
                "step_over_floor": "one step over the floor",
                "data_wait": "waiting",
                "memory_mb": "MiB",
            },
        )
    )
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        found["ranks"] = [
            measure_ranks(arch, args.sizes[0], batch, 2 * args.steps, output, device)
            for arch in args.archs
            for batch in (args.batch, 2 * args.batch)
        ]
        print(
            table(
                found["ranks"],
                {
                    "arch": "arch",
                    "size": "pixels",
                    "batch": "batch of both",
                    "one_images_per_s": "one process, images/s",
                    "two_images_per_s": "two ranks, images/s",
                    "ratio": "ratio",
                },
            ),
            flush=True,
        )
    found["levers"] = [
        row
        for arch in args.archs
        for row in measure_levers(arch, args.sizes[0], args.batch, args.repeats, device)
    ]
    print(
        table(
            found["levers"],
            {
                "arch": "arch",
                "size": "pixels",
                "lever": "lever",
                "with_ms": "with, ms",
                "without_ms": "without, ms",
                "ratio": "ratio",
            },
        ),
        flush=True,
    )
    grown = [
        (args.batch // 4, 0),
        (args.batch, 0),
        (4 * args.batch, 0),
        (args.batch, 2),
        (args.batch, 8),
    ]
    found["growth"] = [
        measure_step(args.archs[0], args.sizes[0], batch, args.repeats, device, local)
        for batch, local in grown
    ]
    print(
        table(
            found["growth"],
            {
                "arch": "arch",
                "size": "pixels",
                "batch": "batch",
                "local_views": "local views of 32 px",
                "step_images_per_s": "images/s",
                "step_over_floor": "one step over the floor",
            },
        ),
        flush=True,
    )
    found["knn"] = measure_knn(args.repeats, device)
    print(
        f"k-NN, 50,000 x 10,000 x 640: {found['knn']['knn_s']:.1f} s, {found['knn']['ratio']:.2f} times the bare matrix product"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--archs",
        nargs="*",
        help="none: the views alone",
        default=["resnet5m", "mobilevit_xxs", "mobilevit_s"],
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 96, 224])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120, help="of train.py")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output_dir", default="runs/speed")
    args = parser.parse_args()
    device, output = distributed.start(args.device).device, Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    found = {
        "views": [measure_views(size, args.repeats, device) for size in args.sizes],
        "steps": [],
    }
    print(
        table(
            found["views"],
            {
                "size": "pixels",
                "ours_views_per_s": "views/s",
                "pil_views_per_s": "PIL, views/s",
                "pil_processes": "PIL processes",
                "ratio": "ratio",
                "ratio_alone": "over its transforms alone",
            },
        ),
        flush=True,
    )
    if args.archs:
        measure_networks(args, device, output, found)
    (output / "speed.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

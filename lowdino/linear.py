"""Training with labels: batches, steps, batch norm and the table of eval_linear.py's tasks.

Images are classified by a linear classifier on frozen features, or by fine-tuning the network.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import update_bn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

import lowdino
from lowdino import augment, checkpoint, data, distributed, image_io, optim, probe, schedules
from lowdino.distributed import Diverged, UserError, user_errors
from lowdino.features import FLOORS, Pooled, normalisation, open_network
from lowdino.schedules import Stream

# The grids of the linear classifier. Half-whitened features suit them whatever the network.
PROBE_LR = [1.0, 3.0, 10.0, 30.0, 100.0]
PROBE_WEIGHT_DECAY = [0.0, 1e-5, 1e-4, 1e-3]
LBFGS_WEIGHT_DECAY = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7]


@dataclass
class Subject:
    """A model, and the settings and the images that it is measured with."""

    args: Any  # settings of eval_linear.py
    ranks: distributed.Ranks
    number: int  # row of the model in the table, from 1
    name: str  # the model as it is given, or a file of features
    title: str  # the model in words
    backbone: nn.Module | None = None
    source: object = None  # the images
    size: int | None = None  # side of the network's input, in pixels


def trains_network(args) -> bool:
    """Whether all weights are trained, and not a linear layer alone."""
    return args.finetune or args.from_scratch


def training_name(args) -> str:
    """How the network is trained, in one word for a heading."""
    return "scratch" if args.from_scratch else "fine-tuned" if args.finetune else "linear"


def check_network_training(args) -> str | None:
    """The first error in the flags of --finetune and --from_scratch, in one sentence, or None."""
    if args.layer_decay is not None and not (trains_network(args) and 0 < args.layer_decay <= 1):
        return "--layer_decay goes with --finetune or --from_scratch and lies above 0, up to 1"
    if args.from_scratch and not all(model in lowdino.ARCHS for model in args.models):
        return f"--from_scratch takes names of architectures: {', '.join(lowdino.ARCHS)}"
    return None


def check_dense(args) -> str | None:
    """The first error in the flags that segmentation and detection share, or None."""
    if not args.models or FLOORS & {*args.models}:
        return f"--task {args.task} needs one backbone or more"
    if len(args.lr or [0]) * len(args.weight_decay or [0]) > 1:
        return f"--task {args.task} takes one --lr and one --weight_decay"
    return None


# -- Batches ---------------------------------------------------------------------------------------


def batch_and_steps(args, count: int, world: int, batch_norm: bool = False) -> tuple[int, int]:
    """Batch size per process and number of steps, --steps or else --epochs, of `count` images.

    A UserError where the images are fewer than the ranks, or a batch too small for `batch_norm`.
    """
    if count < world:
        raise UserError(f"{count} labelled images are fewer than the {world} ranks; start fewer")
    given = args.batch_size_per_gpu
    batch = min(given, count // world)
    if batch_norm and batch == 1:
        advice = "more labelled images" if given > 1 else "a --batch_size_per_gpu of at least 2"
        raise UserError(f"batch norm needs two images per process and step: give {advice}")
    return batch, args.steps or args.epochs * (count // (batch * world))


def training_order(
    subject: Subject, count: int, seed: int, batch_norm: bool = True
) -> data.TrainingBatches:
    """This rank's batches of the positions 0 to `count` - 1, see `batch_and_steps`."""
    ranks = subject.ranks
    batch, steps = batch_and_steps(subject.args, count, ranks.world, batch_norm)
    return data.TrainingBatches(count, batch, seed, 0, steps, ranks.rank, ranks.world)


def training_loader(subject: Subject, indices: Tensor, order: data.TrainingBatches) -> DataLoader:
    """Batches of the training images at `indices`, of which `order` names positions."""
    images, workers = Subset(subject.source.train, indices.tolist()), subject.args.num_workers
    pin = subject.ranks.device.type == "cuda"
    return data.open_loader(images, workers, batch_sampler=order, pin_memory=pin)


def training_view(subject: Subject, batch: data.Batch, seed: int, step: int) -> Tensor:
    """ImageNet's usual random-resized crop (area 0.08 to 1) and flip: (B, C, size, size)."""
    device, rank = subject.ranks.device, subject.ranks.rank
    images, sizes = batch.images.to(device), batch.sizes.to(device)
    generator = augment.seeded_generator(device, Stream.LABELLED_VIEWS, seed, step, rank)
    boxes = augment.random_boxes(sizes, (0.08, 1.0), generator)
    flip = torch.rand(len(images), generator=generator, device=device) < 0.5
    x = augment.resized_crop(images, boxes, subject.size, flip)
    x = augment.normalize(x, *normalisation(subject.backbone))
    return x.contiguous(memory_format=torch.channels_last)


def rank_batches(subject: Subject, count: int) -> BatchSampler:
    """Indices of this rank's share of `count` pictures, every world-th one, in batches."""
    share = range(subject.ranks.rank, count, subject.ranks.world)
    return BatchSampler(share, subject.args.batch_size_per_gpu, drop_last=False)


def picture_batches(
    subject: Subject, pictures: Dataset, order: Iterable[list[int]]
) -> Iterator[list[tuple]]:
    """The pictures of each list of indices in `order`, with their targets, on the device.

    A picture is (C, H, W) uint8, of any size. Its target is a tensor, or a dict of tensors.
    """
    device, workers = subject.ranks.device, subject.args.num_workers
    options = dict(batch_sampler=order, collate_fn=list, pin_memory=device.type == "cuda")

    def moved(target: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        if isinstance(target, dict):
            return {name: moved(value) for name, value in target.items()}
        return target.to(device, non_blocking=True)

    for items in data.open_loader(pictures, workers, **options):
        yield [(moved(image), moved(target)) for image, target in items]


def open_pictures(subject: Subject, load: Callable) -> tuple[object, str]:
    """Pictures with targets, read as the backbone needs them, and a remark on their values.

    `load` opens them by `pixels`, a `PixelFormat`. Those in memory, which have no `paths`, are in
    colours: a UserError where the backbone is not.
    """
    args, channels = subject.args, len(normalisation(subject.backbone)[0])
    pixels = image_io.PixelFormat(channels, max_megapixels=args.max_megapixels)
    source, remark = load(pixels=pixels), ""
    if hasattr(source.train, "paths"):
        images = data.ImageFiles(source.train.paths, pixel_format=pixels)
        known = getattr(subject.backbone, "value_range", None)
        value_range, remark = data.choose_value_range(images, source.name, args.value_range, known)
        source.train.pixels = source.test.pixels = pixels._replace(value_range=value_range)
    elif channels != 3:
        words = f"{subject.title} is of {channels} channels"
        raise UserError(f"{source.name} are pictures in colours, and {words}")
    return source, remark


def print_pictures(subject: Subject, classes: int, remark: str) -> None:
    """Print what the model is measured on; before the first row, the notes on the pictures."""
    source = subject.source
    if subject.ranks.first:
        print("".join(f"{note}\n" for note in source.notes * (subject.number == 1)), end="")
        counts = f"{len(source.train)} training and {len(source.test)} test pictures"
        size = f"{classes} classes, {subject.size} px{remark}"
        print(f"{subject.title}; {source.name}: {counts}, {size}", flush=True)


def random_subset(count: int, fraction: float, seed: int, least: int = 1) -> list[int]:
    """Sorted indices of a random fraction, `least` or more; a larger one has those of a smaller."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: max(round(fraction * count), least)].tolist())


# -- Training steps --------------------------------------------------------------------------------


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, nothing elsewhere."""
    # Named "cuda" on every device: torch 2.4 has no autocast on MPS, not even turned off.
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


class CosineAdamW:
    """AdamW with a short warm-up and a cosine to 0, by the first --lr and --weight_decay.

    Each group has `scale`, the factor of its learning rate. `max_norm` limits the gradient's norm
    over all parameters. The first rank prints the loss at every fifth of the steps and at the last.
    """

    def __init__(
        self, subject: Subject, groups: list[dict], steps: int, max_norm: float = math.inf
    ):
        decay, self.lr = subject.args.weight_decay[0], subject.args.lr[0]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=decay)
        self.printing, self.steps, self.max_norm = subject.ranks.first, steps, max_norm
        self.done = 0

    def step(self, loss: Tensor) -> None:
        """One step down the gradient; `Diverged` on a printed loss or clipped norm not finite."""
        lr = schedules.cosine(self.done, self.steps, self.lr, 0.0, warmup_steps=self.steps // 20)
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = lr * group["scale"]
        self.done += 1
        if self.done % max(self.steps // 5, 1) == 0 or self.done == self.steps:
            refuse_divergence(loss, f"it is {loss.item()} at step {self.done}")
            if self.printing:
                print(f"  step {self.done}/{self.steps} loss {loss.item():.4f}", flush=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.max_norm < math.inf:
            parameters = [p for group in groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.max_norm)
            refuse_divergence(norm, f"its gradient is {norm.item()} at step {self.done}")
        self.optimizer.step()


def refuse_divergence(values: Tensor, sentence: str) -> None:
    """Raise `Diverged` unless all values are finite."""
    if not values.isfinite().all():
        raise Diverged(f"diverging loss: {sentence}; a lower --lr may help")


def estimate_batch_norm(network: nn.Module, views: Iterable[Tensor], batches: int = 20) -> None:
    """Replace batch norm's moving averages by the mean over the first `batches` of `views`.

    After few steps the moving averages lag behind the weights. All ranks get the first rank's.
    """
    update_bn(itertools.islice(views, batches), network)
    distributed.broadcast_buffers(network)


# -- Classification --------------------------------------------------------------------------------


@dataclass
class ProbeInputs:
    """Training features of a frozen network, half-whitened, and their labels."""

    whitening: probe.HalfWhitening
    x: Tensor  # (N, D + 1)
    labels: Tensor  # (N,)
    classes: int


def choose_and_fit(
    subject: Subject, inputs: ProbeInputs, indices: Tensor, seed: int
) -> tuple[Tensor, str]:
    """The classifier of the best setting of the grid, (D + 1, C), and that setting in words.

    Settings are compared on --val_fraction of the labels at `indices`; the best is fitted to all.
    """
    args = subject.args
    grid = [*itertools.product(args.lr, args.weight_decay)]
    if len(grid) > 1:
        with user_errors():
            split = probe.split_for_choice(inputs.labels[indices], args.val_fraction, seed)
        inner, held_out = (indices[part] for part in split)
        weights = fit(subject, inputs, inner, grid, seed, choosing=True)
        errors = probe.brier_scores(inputs.x[held_out], inputs.labels[held_out], weights)
        grid = [grid[int(errors.nan_to_num(nan=math.inf).argmin())]]  # NaN has diverged
    weights = fit(subject, inputs, indices, grid, seed)[:, 0]
    ((lr, decay),) = grid
    rate = "" if args.solver == "lbfgs" else f"lr {lr:g}, "
    return weights, f"{rate}weight decay {decay:g}"


def fit(
    subject: Subject, inputs: ProbeInputs, indices: Tensor, grid: list, seed: int, choosing=False
) -> Tensor:
    """Classifiers of all settings on the training images at `indices`: (D + 1, G, C).

    Args:
        grid: (learning rate per 256 images, weight decay) of each classifier.
        choosing: train on a sixteenth of the batch, with as many steps at the same learning rates:
            the path of full batches, with more noise; see tests/bench_probe.py.
    """
    args, classes = subject.args, inputs.classes
    x, labels = inputs.x[indices], inputs.labels[indices]
    if args.solver == "lbfgs":
        return probe.logistic_regression(x, labels, classes, [decay for _, decay in grid])
    world = subject.ranks.world if args.augment else 1  # else every rank trains on all features
    batch, steps = batch_and_steps(args, len(x), world)
    settings = [(lr * batch * world / 256, decay) for lr, decay in grid]
    batch = math.ceil(batch / 16) if choosing else batch
    if not args.augment:
        return probe.train_probes(x, labels, classes, settings, steps, batch, seed)
    order = data.TrainingBatches(len(x), batch, seed, 0, steps, subject.ranks.rank, world)
    return fit_on_views(subject, inputs, settings, training_loader(subject, indices, order), seed)


@torch.no_grad()
def fit_on_views(
    subject: Subject, inputs: ProbeInputs, settings: list, loader: DataLoader, seed: int
) -> Tensor:
    """As `fit`, on features of new random views in every step."""
    ranks, steps = subject.ranks, len(loader)
    probes = probe.Probes(settings, inputs.x.shape[1], inputs.classes, ranks.device)
    network = Pooled(subject.backbone, subject.args.pool).eval()
    for step, images in enumerate(loader):
        features = network(training_view(subject, images, seed, step)).float()
        total = len(features) * ranks.world
        # All ranks make the same step on the features of all.
        features = distributed.gather_strided(features, total)
        labels = distributed.gather_strided(images.labels.to(ranks.device), total)
        probes.step(inputs.whitening(features), labels, schedules.cosine(step, steps, 1.0, 0.0))
    return probes.classifiers()


def finetune(subject: Subject, indices: Tensor, seed: int) -> nn.Sequential:
    """The network and a linear classifier, trained together on the images at `indices`."""
    ranks = subject.ranks
    _, backbone = open_network(subject.name, seed)
    torch.manual_seed(seed)
    head = nn.Linear(backbone.embed_dim, subject.source.classes)
    nn.init.zeros_(head.weight)
    network = nn.Sequential(backbone, head)
    network.mean, network.std = normalisation(backbone)
    backbone.value_range = getattr(subject.backbone, "value_range", None)
    network = distributed.on_device(network, ranks)
    loader = training_loader(subject, indices, training_order(subject, len(indices), seed))
    groups = optim.layerwise_groups(*network, subject.args.layer_decay)
    optimizer = CosineAdamW(subject, groups, len(loader))
    model = distributed.data_parallel(network).train()
    for step, images in enumerate(loader):
        view = training_view(subject, images, seed, step)
        with autocast(ranks.device):
            logits = model(view)
        optimizer.step(F.cross_entropy(logits.float(), images.labels.to(ranks.device)))
    later = enumerate(loader, start=len(loader))
    views = (training_view(subject, images, seed, step) for step, images in later)
    estimate_batch_norm(network, views)
    return network


@user_errors()
def save_network(path: Path, network: nn.Sequential, image_size: int, epochs: int) -> None:
    """A backbone file that also holds its classifier: logits = features @ weight.T + bias."""
    backbone, head = network
    weights = {name: value.cpu() for name, value in head.state_dict().items()}
    checkpoint.save_backbone(path, backbone, backbone.arch, image_size, epochs, classifier=weights)


# -- The table -------------------------------------------------------------------------------------


def measure_subsets(
    subject: Subject,
    subsets: dict[tuple[float, int], Sequence],
    measure: Callable[[Sequence, int, str], tuple[dict, str]],
    labelled: str,
) -> list[dict]:
    """Train on each subset; cells of the table, each a fraction, the seeds and their figures.

    Args:
        subsets: indices of the training images by (fraction, seed).
        measure: (indices, seed, name of the subset) -> figures by name, and the same in words.
        labelled: the fraction is one of the "labels", "masks" or "pictures".
    """
    cells = {}
    for (fraction, seed), indices in subsets.items():
        start = time.perf_counter()
        figures, words = measure(indices, seed, f"{fraction:g}_seed{seed}")
        cell = cells.setdefault(fraction, {"label_fraction": fraction, "seeds": subject.args.seeds})
        for name, value in ({"images": len(indices)} | figures).items():
            cell.setdefault(name, []).append(value)
        if subject.ranks.first:
            subset = f"{fraction:g} of the {labelled} ({len(indices)} images), seed {seed}"
            print(f"  {subset}: {words} in {time.perf_counter() - start:.0f} s", flush=True)
    return [*cells.values()]


def subsets_of(args, choose: Callable) -> dict[tuple[float, int], Sequence]:
    """`choose(fraction, seed)`, indices, by each --label_fraction and each of the --seeds."""
    with user_errors():
        pairs = itertools.product(args.label_fraction, args.seeds)
        return {pair: choose(*pair) for pair in pairs}


def percent(values: list[float]) -> str:
    """Mean in percent and, for several values, the standard deviation."""
    text = f"{100 * statistics.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.2f}"


def figure_columns(args, figures: dict[str, str]) -> dict[str, Callable]:
    """Columns at each fraction, of figures named by heading: functions from a row to its text."""
    text = lambda i, name, row: percent(row["trained"][i][name])
    return {
        f"{heading} {100 * fraction:g} %": partial(text, i, name)
        for i, fraction in enumerate(dict.fromkeys(args.label_fraction))
        for heading, name in figures.items()
    }


@torch.no_grad()
def cost(
    backbone: nn.Module, size: int, device: torch.device, batch: int = 64, repeats: int = 5
) -> dict[str, float]:
    """Millions of parameters and of multiply-adds per image, and milliseconds per image.

    The time is the median over `repeats` batches of `batch` images.
    """
    backbone.eval()
    x = torch.randn(batch, len(normalisation(backbone)[0]), size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    # The plain form of attention is matrix products, which the counter knows on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backbone(x[:1])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        backbone(x).sum().item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    return {
        "parameters_M": sum(p.numel() for p in backbone.parameters()) / 1e6,
        "multiply_adds_M": counter.get_total_flops() / 2e6,
        "ms_per_image": statistics.median(seconds) / batch * 1e3,
    }

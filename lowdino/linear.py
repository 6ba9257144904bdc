"""What labels add to a backbone: a linear classifier on its frozen features, or a fine-tuning of
the whole network, and what the network costs."""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

import lowdino
from lowdino import (
    augment,
    checkpoint,
    data,
    datasets,
    distributed,
    evaluate,
    optim,
    probe,
    schedules,
)
from lowdino.distributed import UserError, user_errors
from lowdino.features import Pooled, compute_features, normalisation, open_network

# The probe's grids. `probe.Scaler` brings all features to one scale, so they suit every network.
PROBE_LR = [1.0, 3.0, 10.0, 30.0, 100.0]
PROBE_WEIGHT_DECAY = [0.0, 1e-5, 1e-4, 1e-3]
LBFGS_WEIGHT_DECAY = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7]

# The stream of random numbers of the training views, see augment.derived_seed. 0 is the order of
# the images, in data.py.
VIEWS = 2


class Diverged(UserError, FloatingPointError):
    """A loss that is not finite."""


def check_whole(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of networks trained whole, in one sentence, or None."""
    whole = args.finetune or args.from_scratch
    if args.layer_decay is not None and not (whole and 0 < args.layer_decay <= 1):
        return "--layer_decay goes with --finetune or --from_scratch and lies above 0, up to 1"
    if args.from_scratch and not all(model in lowdino.ARCHS for model in args.models):
        return f"--from_scratch takes names of architectures: {', '.join(lowdino.ARCHS)}"
    return None


def way_of(args: argparse.Namespace) -> str:
    """What is trained, in a word for a table."""
    return "scratch" if args.from_scratch else "fine-tuned" if args.finetune else "linear"


@dataclass
class Subject:
    """A backbone, the images it is measured on, and how they are read."""

    backbone: nn.Module
    source: datasets.Source
    size: int
    workers: int
    ranks: distributed.Ranks


@dataclass
class ProbeInputs:
    """Training features of a frozen network, scaled for the probe, and their labels."""

    scaler: probe.Scaler
    x: Tensor  # (N, D + 1)
    labels: Tensor  # (N,)
    classes: int


# ---------------------------------------------------------------------------------------------
# Batches of random views, for every training that needs the images
# ---------------------------------------------------------------------------------------------


def batch_and_steps(args, count: int, world: int, batch_norm: bool = False) -> tuple[int, int]:
    """Images a rank and step, and steps, of --epochs on so many images.

    Raises:
        UserError: where the images are fewer than the ranks, or a batch too small for `batch_norm`.
    """
    if count < world:
        raise UserError(f"{count} labelled images are fewer than the {world} ranks; start fewer")
    batch = min(args.batch_size_per_gpu, count // world)
    if batch_norm and batch == 1:
        few = args.batch_size_per_gpu > 1
        advice = "more images are labelled" if few else "--batch_size_per_gpu is at least 2"
        raise UserError(f"batch norm needs two images a rank and step; see that {advice}")
    return batch, args.epochs * (count // (batch * world))


def training_batches(
    subject: Subject, indices: Tensor, batch: int, steps: int, seed: int
) -> DataLoader:
    """The loader of a training on the images at `indices`, `batch` images a rank and step."""
    ranks = subject.ranks
    batches = data.TrainingBatches(len(indices), batch, seed, 0, steps, ranks.rank, ranks.world)
    chosen = Subset(subject.source.train, indices.tolist())
    return data.training_loader(chosen, batches, subject.workers, ranks.device.type == "cuda")


def training_view(batch: data.Batch, subject: Subject, seed: int, step: int) -> Tensor:
    """A random-resized crop (area 0.08 to 1) and a flip of each image: (B, 3, size, size).

    Supervised training on ImageNet has them so.
    """
    device = subject.ranks.device
    images, sizes = batch.images.to(device), batch.sizes.to(device)
    generator = augment.seeded_generator(device, VIEWS, seed, step, subject.ranks.rank)
    boxes = augment.random_boxes(sizes, (0.08, 1.0), generator)
    flip = torch.rand(len(images), generator=generator, device=device) < 0.5
    x = augment.resized_crop(images, boxes, subject.size, flip)
    x = augment.normalize(x, *normalisation(subject.backbone))
    return x.contiguous(memory_format=torch.channels_last)


def some_of(count: int, fraction: float, seed: int, least: int = 1) -> list[int]:
    """A seeded share of so many pictures, at least `least` of them, in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: max(round(fraction * count), least)].tolist())


def shares(count: int, batch: int, ranks: distributed.Ranks) -> list[list[int]]:
    """This rank's share of so many pictures, every world-th, in batches."""
    own = range(ranks.rank, count, ranks.world)
    return [list(own[i : i + batch]) for i in range(0, len(own), batch)]


# ---------------------------------------------------------------------------------------------
# A linear classifier on frozen features
# ---------------------------------------------------------------------------------------------


def choose_and_fit(
    args, subject: Subject | None, inputs: ProbeInputs, indices: Tensor, seed: int
) -> tuple[Tensor, str]:
    """The classifier of the best setting of the grid, (D + 1, C), and that setting in words.

    Settings are compared on --val_fraction of the labels at `indices`. The best one is then fitted
    to all of them.
    """
    grid = list(itertools.product(args.lr, args.weight_decay))
    if len(grid) > 1:
        with user_errors():
            parts = probe.hold_out(inputs.labels[indices], args.val_fraction, seed)
        inner, held = (indices[part] for part in parts)
        weights = fit(args, subject, inputs, inner, grid, seed, choosing=True)
        errors = probe.brier_scores(inputs.x[held], inputs.labels[held], weights)
        grid = [grid[int(errors.nan_to_num(nan=math.inf).argmin())]]  # NaN has diverged
    weights = fit(args, subject, inputs, indices, grid, seed)[:, 0]
    ((lr, decay),) = grid
    rate = "" if args.solver == "lbfgs" else f"lr {lr:g}, "
    return weights, f"{rate}weight decay {decay:g}"


def fit(
    args,
    subject: Subject | None,
    inputs: ProbeInputs,
    indices: Tensor,
    grid: list[tuple[float, float]],
    seed: int,
    choosing: bool = False,
) -> Tensor:
    """Classifiers of all settings of `grid` on the training images at `indices`: (D + 1, G, C).

    Args:
        subject: is needed for --augment alone.
        grid: (learning rate per 256 images, weight decay) of each.
        choosing: trains on a sixteenth of the batch, in as many steps at the same learning rates.
            This follows the path of whole batches, with more noise. tests/bench_probe.py measures
            what it saves and what it loses.
    """
    x, labels, classes = inputs.x[indices], inputs.labels[indices], inputs.classes
    if args.solver == "lbfgs":
        return probe.logistic_regression(x, labels, classes, [decay for _, decay in grid])
    # On features at hand every rank trains the whole.
    world = subject.ranks.world if args.augment else 1
    batch, steps = batch_and_steps(args, len(indices), world)
    settings = [(lr * batch * world / 256, decay) for lr, decay in grid]
    if choosing:
        batch = math.ceil(batch / 16)
    if not args.augment:
        return probe.train_probes(x, labels, classes, settings, steps, batch, seed)
    return fit_on_views(args, subject, inputs, indices, settings, batch, steps, seed)


@torch.no_grad()
def fit_on_views(
    args,
    subject: Subject,
    inputs: ProbeInputs,
    indices: Tensor,
    settings: list[tuple[float, float]],
    batch: int,
    steps: int,
    seed: int,
) -> Tensor:
    """As `fit`, on the features of new random views in every step."""
    ranks = subject.ranks
    probes = probe.Probes(settings, inputs.x.shape[1], inputs.classes, ranks.device)
    network = Pooled(subject.backbone, args.pool).eval()
    for step, images in enumerate(training_batches(subject, indices, batch, steps, seed)):
        features = network(training_view(images, subject, seed, step)).float()
        # All ranks take the same step on the features of all.
        x, labels = (
            distributed.gather_strided(own, batch * ranks.world)
            for own in (features, images.labels.to(ranks.device))
        )
        probes.step(inputs.scaler(x), labels, schedules.cosine(step, steps, 1.0, 0.0))
    return probes.classifiers()


# ---------------------------------------------------------------------------------------------
# The whole network
# ---------------------------------------------------------------------------------------------


def finetuned(args, subject: Subject, name: str, indices: Tensor, seed: int) -> nn.Sequential:
    """Backbone and classifier, trained together from the network `name` on.

    Raises:
        UserError: where there are too few labels for the ranks or for batch norm; `Diverged`.
    """
    ranks = subject.ranks
    network = distributed.on_device(with_classifier(name, subject.source.classes, seed), ranks)
    groups = optim.layerwise_groups(*network, args.layer_decay)
    batch, steps = batch_and_steps(args, len(indices), ranks.world, batch_norm=True)
    network[0].value_range = getattr(subject.backbone, "value_range", None)
    loader = training_batches(subject, indices, batch, steps, seed)
    model = distributed.data_parallel(network).train()

    def losses() -> Iterator[Tensor]:
        for step, images in enumerate(loader):
            view = training_view(images, subject, seed, step)
            # Named "cuda" on every device: torch 2.4 has no autocast on MPS, not even turned off.
            with torch.autocast("cuda", torch.bfloat16, enabled=ranks.device.type == "cuda"):
                logits = model(view)
            yield F.cross_entropy(logits.float(), images.labels.to(ranks.device))

    adamw_steps(losses(), groups, args, steps, ranks)
    views = (training_view(images, subject, seed, steps + i) for i, images in enumerate(loader))
    settle_batch_norm(network, views)
    distributed.broadcast_buffers(network)
    return network


def with_classifier(name: str, classes: int, seed: int) -> nn.Sequential:
    """A network by name and a linear classifier of zeros, with the network's normalisation."""
    _, backbone = open_network(name, seed)
    torch.manual_seed(seed)
    head = nn.Linear(backbone.embed_dim, classes)
    nn.init.zeros_(head.weight)
    network = nn.Sequential(backbone, head)
    network.mean, network.std = normalisation(backbone)
    return network


def adamw_steps(
    losses: Iterable[Tensor],
    groups: list[dict],
    args,
    steps: int,
    ranks: distributed.Ranks,
    max_norm: float = math.inf,
) -> None:
    """AdamW's steps with a short warm-up and a cosine, one on each of `losses`.

    Args:
        losses: computed when they are asked for, each with the weights of the step before.
        groups: of parameters, with `scale`, the factor of their learning rate.
        args: its `lr` and `weight_decay` are lists, of which the first is taken.
        steps: how many losses there are; the learning rate ends near 0 at the last one.
        ranks: the first one prints the loss at a fifth of the steps, two fifths and so on, and at
            the last.
        max_norm: of the gradient of all parameters, which is clipped to it.

    Raises:
        Diverged: where a printed loss or, if it is clipped, a gradient isn't finite.
    """
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay[0])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step, loss in enumerate(losses, start=1):
        lr = schedules.cosine(step - 1, steps, args.lr[0], 0.0, warmup_steps=steps // 20)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        if step % max(steps // 5, 1) == 0 or step == steps:
            value = loss.item()
            check_finite("it", value, step)
            if ranks.first:
                print(f"  step {step}/{steps} loss {value:.4f}", flush=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if max_norm < math.inf:
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            check_finite("its gradient", norm.item(), step)
        optimizer.step()


def check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise Diverged(f"diverging loss: {name} is {value} at step {step}; a lower --lr may help")


def check_logits(logits: Tensor) -> None:
    """Refuse what a trained network or classifier says of test images where it is not finite."""
    if not logits.isfinite().all():
        raise Diverged("diverging loss: trained logits are not finite; a lower --lr may help")


@torch.no_grad()
def settle_batch_norm(network: nn.Module, views: Iterable[Tensor], batches: int = 20) -> None:
    """Replace batch norm's moving averages by the mean over some batches.

    The averages lag behind where steps are few.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    for view in itertools.islice(views, batches):
        network(view)


@user_errors()
def save_network(path: Path, network: nn.Sequential, image_size: int, epochs: int) -> None:
    """A backbone file that also holds its classifier: logits = features @ weight.T + bias."""
    backbone, head = network
    classifier = {name: value.cpu() for name, value in head.state_dict().items()}
    checkpoint.save_backbone(
        path, backbone, backbone.arch, image_size, epochs, classifier=classifier
    )


# ---------------------------------------------------------------------------------------------
# Accuracies at fractions of the labels
# ---------------------------------------------------------------------------------------------


def results(
    args,
    learn: Callable[[Tensor, int, str], tuple[Tensor, str]],
    labels: Tensor,
    test_labels: Tensor,
    ranks: distributed.Ranks,
) -> list[dict]:
    """Learn from each fraction of the labels (N,) by each seed: a cell of the table a fraction.

    Args:
        learn: (indices, seed, name of the subset) -> logits of the test images (M, C), and what
            was chosen.
    """
    # All subsets first: one that cannot be is said before anything is trained.
    with user_errors():
        subsets = [
            [probe.label_subset(labels, fraction, seed) for seed in args.seeds]
            for fraction in args.label_fraction
        ]
    cells = []
    for fraction, own in zip(args.label_fraction, subsets):
        top1, top5, settings = [], [], []
        for seed, indices in zip(args.seeds, own):
            subset = f"{fraction:g}_seed{seed}"
            if ranks.first:
                listed = "".join(f"{i}\n" for i in indices.tolist())
                (Path(args.output_dir) / f"labels_{subset}.txt").write_text(listed)
            logits, chosen = learn(indices.to(ranks.device), seed, subset)
            settings.append(chosen)
            top1.append(evaluate.accuracy(logits, test_labels))
            said = f"top-1 {top1[-1]:.4f}"
            if logits.shape[1] > 5:
                top5.append(evaluate.accuracy(logits, test_labels, top=5))
                said += f" top-5 {top5[-1]:.4f}"
            if ranks.first:
                trained = f"{fraction:g} of the labels ({len(indices)} images), seed {seed}"
                print(f"  {trained}: {said}{chosen and f', {chosen}'}", flush=True)
        cell = {"label_fraction": fraction, "seeds": args.seeds}
        cells.append(cell | {"top1": top1, "top5": top5, "chosen": settings})
    return cells


def learn_whole(
    args, subject: Subject, name: str, number: int, indices: Tensor, seed: int, subset: str
) -> tuple[Tensor, str]:
    """Train and save the whole network: its logits of the test images, and no choice of settings.

    Args:
        subset: fraction and seed, for the file's name.
    """
    network = finetuned(args, subject, name, indices, seed)
    test, size, ranks = subject.source.test, subject.size, subject.ranks
    batch, workers = args.batch_size_per_gpu, subject.workers
    logits = compute_features(network, test, size, ranks, batch, workers).features
    if ranks.first:
        path = Path(args.output_dir) / f"network{number}_{subset}.pth"
        save_network(path, network, size, args.epochs)
    return logits, ""


def learn_probe(
    args, subject, inputs: ProbeInputs, test: Tensor, indices: Tensor, seed: int, _: str
) -> tuple[Tensor, str]:
    """Train the linear classifier: its logits of `test` (N, D + 1), and the settings chosen."""
    weights, chosen = choose_and_fit(args, subject, inputs, indices, seed)
    logits = test @ weights
    check_logits(logits)
    return logits, chosen


def percent(values: list[float]) -> str:
    """Mean in percent and, of several, the standard deviation."""
    text = f"{100 * statistics.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.2f}"


# ---------------------------------------------------------------------------------------------
# What a network costs
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def cost(
    backbone: nn.Module, size: int, device: torch.device, batch: int = 64, repeats: int = 5
) -> dict[str, float]:
    """Millions of parameters and of multiply-adds an image, both counted, and milliseconds an
    image in batches of `batch`."""
    backbone.eval()
    channels = len(normalisation(backbone)[0])
    x = torch.randn(batch, channels, size, size, device=device)
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
        "ms_an_image": statistics.median(seconds) / batch * 1e3,
    }

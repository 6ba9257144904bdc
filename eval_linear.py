#!/usr/bin/env python3
"""Accuracy of a linear classifier on frozen features, or of the whole network fine-tuned, at fractions of the labels.

    python eval_linear.py output/backbone.pth --data_path /path/with/train/and/val
    python eval_linear.py pixels resnet5m output/backbone.pth --label_fraction 0.01 0.1 1      one table of all
    python eval_linear.py output/backbone.pth --finetune --label_fraction 0.2
    python eval_linear.py mobilevit_s --from_scratch --label_fraction 0.2                      its supervised rival

A MODEL is a backbone.pth of train.py, a state dict of DINO's or DINOv2's ViT, an architecture's name (at random weights),
ARCH=FILE for a plain state dict such as timm's or torchvision's, or pixels.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode

import eval_knn
import lowdino
from lowdino import augment, checkpoint, data, distributed, evaluate, optim, probe, schedules

# The probe's grids. `probe.Scaler` brings all features to the same scale, so that they serve every network.
PROBE_LR = [1.0, 3.0, 10.0, 30.0, 100.0]
PROBE_WEIGHT_DECAY = [0.0, 1e-5, 1e-4, 1e-3]
LBFGS_WEIGHT_DECAY = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=" ".join(__doc__.split("\n\n")[2].split()),
        allow_abbrev=False,
        formatter_class=eval_knn.HelpFormatter,
    )
    add = parser.add_argument
    add(
        "models", nargs="*", metavar="MODEL", help="backbone.pth, architecture, ARCH=FILE or pixels"
    )
    add(
        "--from_features",
        metavar="FILE",
        help="probe an .npz of features, as eval_knn.py --features writes, instead",
    )

    what = parser.add_argument_group(
        "what is trained (default: a linear classifier on features computed once)"
    )
    add = what.add_argument
    add(
        "--augment",
        action="store_true",
        help="the original's protocol: crops and flips anew in every epoch",
    )
    add("--finetune", action="store_true", help="train the whole network")
    add("--from_scratch", action="store_true", help="train the whole network from random weights")
    add(
        "--solver",
        choices=["sgd", "lbfgs"],
        default="sgd",
        help="of the probe: lbfgs is logistic regression to its optimum",
    )
    add(
        "--lr",
        type=float,
        nargs="+",
        help="learning rates to choose from, of the probe per 256 images; default: a grid "
        "for the probe, 0.001 for the whole network",
    )
    add(
        "--weight_decay",
        type=float,
        nargs="+",
        help="to choose from; default: a grid for the probe, 0.05 for the network",
    )
    add(
        "--layer_decay",
        type=float,
        help="learning rate of a block over that of the block above; default: 0.75 with "
        "--finetune, 1 with --from_scratch, where no block knows more than another",
    )
    add("--epochs", type=int, default=100)
    add("--batch_size_per_gpu", type=int, default=256)

    labels = parser.add_argument_group("labels")
    add = labels.add_argument
    add(
        "--label_fraction",
        type=float,
        nargs="+",
        default=[1.0],
        help="fractions of each class's training labels to use",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="of the choice of labels and of the training; several give mean and "
        "standard deviation",
    )
    add(
        "--val_fraction",
        type=float,
        default=0.2,
        help="of the training labels in use, held out to choose settings by",
    )

    rest = parser.add_argument_group("data and output")
    add = rest.add_argument
    eval_knn.add_data_flags(add)
    add("--nb_knn", type=int, default=20, help="neighbours of the k-NN that is printed beside")
    add(
        "--output_dir",
        default="output_linear",
        help="for table.md, table.json, the images chosen at each fraction, and networks that were trained whole",
    )
    return parser


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    whole = args.finetune or args.from_scratch
    if bool(args.models) == bool(args.from_features):
        return "give one MODEL or more, or --from_features FILE"
    if args.augment + args.finetune + args.from_scratch > 1:
        return "--augment, --finetune and --from_scratch are three ways of training; give one"
    if args.from_features and (args.augment or whole):
        return "--augment, --finetune and --from_scratch need the images, which --from_features does without"
    if args.solver == "lbfgs" and (args.augment or whole):
        return "--solver lbfgs needs features that stay the same: not with --augment, --finetune or --from_scratch"
    if args.solver == "lbfgs" and args.lr:
        return "--solver lbfgs has no learning rate; leave --lr out"
    if whole and len(args.lr or [0]) * len(args.weight_decay or [0]) > 1:
        return "the whole network is trained with one --lr and one --weight_decay"
    if whole and (args.pool != "default" or "pixels" in args.models):
        return "the whole network is trained as it is: no --pool, no pixels"
    if "pixels" in args.models and (args.augment or args.pool != "default"):
        return "--augment and --pool need backbones; pixels has none"
    if args.from_features and (args.pool != "default" or args.image_size):
        return "--pool and --image_size need the images, which --from_features does without"
    if args.layer_decay is not None and not (whole and 0 < args.layer_decay <= 1):
        return "--layer_decay goes with --finetune or --from_scratch and lies above 0, up to 1"
    if args.from_scratch and not all(model in lowdino.ARCHS for model in args.models):
        return f"--from_scratch takes names of architectures: {', '.join(lowdino.ARCHS)}"
    for flag in ("lr", "weight_decay"):
        if (values := getattr(args, flag)) and not all(
            0 <= value < float("inf") for value in values
        ):
            return f"--{flag} must be 0 or more, not {values}"
    if not all(0 < fraction <= 1 for fraction in args.label_fraction):
        return f"--label_fraction must lie above 0, up to 1, not {args.label_fraction}"
    if not all(0 <= seed < 2**63 for seed in args.seeds):
        return f"--seeds must lie between 0 and 2^63, not {args.seeds}"
    if not 0 < args.val_fraction < 1:
        return f"--val_fraction must lie between 0 and 1, not {args.val_fraction}"
    if args.image_size is not None and args.image_size < 32:
        return f"--image_size must be at least 32 pixels, not {args.image_size}"
    for flag, low in (("epochs", 1), ("batch_size_per_gpu", 1), ("nb_knn", 1), ("num_workers", 0)):
        if (value := getattr(args, flag)) is not None and value < low:
            return f"--{flag} must be at least {low}, not {value}"
    return None


@dataclass
class Subject:
    """A model, the images it is measured on, and how they are read."""

    backbone: nn.Module
    source: data.Data
    size: int
    workers: int
    ranks: distributed.Ranks


def protocol(args: argparse.Namespace) -> str:
    """What was done, in a sentence for people who compare."""
    if args.finetune or args.from_scratch:
        return (
            f"whole network {'from random weights' if args.from_scratch else 'fine-tuned'}: AdamW, learning rate "
            f"{args.lr[0]:g}, x {args.layer_decay:g} a block downwards, weight decay {args.weight_decay[0]:g}, "
            f"{args.epochs} epochs of crops and flips; the last epoch"
        )
    settings = f"{len(args.weight_decay)} weight decays"
    if args.solver == "sgd":
        settings = f"{len(args.lr)} learning rates x {settings}"
    views = "features of crops and flips" if args.augment else "features"
    solver = (
        f"SGD, {args.epochs} epochs"
        if args.solver == "sgd"
        else "logistic regression to its optimum"
    )
    if len(args.lr) * len(args.weight_decay) > 1:
        settings += f", chosen by squared error of probabilities on {args.val_fraction:g} of the training labels in use"
        settings += (
            ", then fitted to all of them"
            if args.solver == "lbfgs"
            else (" after a training on a sixteenth of the batch; then fitted to all of them")
        )
    return (
        f"linear classifier on {views}, half-whitened by all training images: {solver}; {settings}"
    )


@dataclass
class Frozen:
    """Training features of a frozen network as the probe sees them, and their labels."""

    scaler: probe.Scaler
    inputs: Tensor  # (N, D + 1)
    labels: Tensor  # (N,)
    classes: int


def size_and_steps(args: argparse.Namespace, places: Tensor, world: int) -> tuple[int, int]:
    """Images a rank and step, and steps, of --epochs on the training images at `places`."""
    if len(places) < world:
        raise ValueError(
            f"{len(places)} labelled images are fewer than the {world} ranks; start fewer"
        )
    size = min(args.batch_size_per_gpu, len(places) // world)
    return size, args.epochs * (len(places) // (size * world))


def training_batches(
    subject: Subject, places: Tensor, size: int, steps: int, seed: int
) -> torch.utils.data.DataLoader:
    """The loader of a whole training on the training images at `places`, `size` images a rank and step."""
    ranks = subject.ranks
    batches = data.TrainingBatches(len(places), size, seed, 0, steps, ranks.rank, ranks.world)
    chosen = Subset(subject.source.train, places.tolist())
    return data.training_loader(chosen, batches, subject.workers, ranks.device.type == "cuda")


def training_view(batch: data.Batch, subject: Subject, seed: int, step: int) -> Tensor:
    """A random-resized crop (area 0.08 to 1) and a flip of each image, as supervised training on ImageNet has them."""
    device = subject.ranks.device
    images, sizes = batch.images.to(device), batch.sizes.to(device)
    generator = augment.seeded_generator(device, 2, seed, step, subject.ranks.rank)
    boxes = augment.random_boxes(sizes, (0.08, 1.0), generator)
    flip = torch.rand(len(images), generator=generator, device=device) < 0.5
    x = augment.normalize(
        augment.resized_crop(images, boxes, subject.size, flip),
        *eval_knn.normalisation(subject.backbone),
    )
    return x.contiguous(memory_format=torch.channels_last)


def fit(
    args: argparse.Namespace,
    subject: Subject | None,
    frozen: Frozen,
    places: Tensor,
    settings: list[tuple[float, float]],
    seed: int,
    choosing: bool = False,
) -> Tensor:
    """Classifiers of all `settings` on the training images at `places`: weights (D + 1, G, C) for the scaler's (N, D + 1).

    Those that are there for `choosing` one of them are trained on a sixteenth of the batch, in as many steps at the same
    learning rates: the path of whole batches, with more noise. tests/bench_probe.py has what that saves and what it loses.
    """
    if args.solver == "lbfgs":
        x, y = frozen.inputs[places], frozen.labels[places]
        return probe.logistic_regression(x, y, frozen.classes, [decay for _, decay in settings])
    world = (
        subject.ranks.world if args.augment else 1
    )  # on features at hand every rank trains the whole
    size, steps = size_and_steps(args, places, world)
    rates = [(lr * size * world / 256, decay) for lr, decay in settings]
    if choosing:
        size = math.ceil(size / 16)
    if not args.augment:
        return probe.train_probes(
            frozen.inputs[places], frozen.labels[places], frozen.classes, rates, steps, size, seed
        )
    loader = training_batches(subject, places, size, steps, seed)
    device = subject.ranks.device
    probes = probe.Probes(rates, frozen.inputs.shape[1], frozen.classes, device)
    network = eval_knn.pooled(subject.backbone, args.pool).eval()
    for step, images in enumerate(loader):
        with torch.no_grad():
            own = network(training_view(images, subject, seed, step)).float()
        # All ranks take the same step on the features of all.
        x, y = (
            distributed.gather_strided(rows, size * world)
            for rows in (own, images.labels.to(device))
        )
        probes.step(frozen.scaler(x), y, schedules.cosine(step, steps, 1.0, 0.0))
    return probes.classifiers()


def probe_weights(
    args: argparse.Namespace, subject: Subject | None, frozen: Frozen, places: Tensor, seed: int
) -> tuple[Tensor, str]:
    """The chosen classifier, (D + 1, C), and what was chosen, in words."""
    settings = list(itertools.product(args.lr, args.weight_decay))
    if len(settings) > 1:
        inner, held = (
            places[part] for part in probe.hold_out(frozen.labels[places], args.val_fraction, seed)
        )
        weights = fit(args, subject, frozen, inner, settings, seed, choosing=True)
        settings = [
            settings[
                int(probe.brier_scores(frozen.inputs[held], frozen.labels[held], weights).argmin())
            ]
        ]
    weights = fit(args, subject, frozen, places, settings, seed)
    ((lr, decay),) = settings
    return weights[
        :, 0
    ], f"weight decay {decay:g}" if args.solver == "lbfgs" else f"lr {lr:g}, weight decay {decay:g}"


@torch.no_grad()
def settle_batch_norm(network: nn.Module, views: Iterable[Tensor], batches: int = 20) -> None:
    """Replace batch norm's moving averages, which lag behind where steps are few, by the mean over some batches."""
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    for view in itertools.islice(views, batches):
        network(view)


def finetuned(
    args: argparse.Namespace, subject: Subject, name: str, places: Tensor, seed: int
) -> nn.Sequential:
    """Backbone and classifier, trained together from `name` anew."""
    ranks = subject.ranks
    _, backbone = eval_knn.open_model(name, seed)
    torch.manual_seed(seed)
    head = nn.Linear(backbone.embed_dim, subject.source.classes)
    nn.init.zeros_(head.weight)
    network = distributed.on_device(nn.Sequential(backbone, head), ranks)
    optimizer = torch.optim.AdamW(
        optim.layerwise_groups(*network, args.layer_decay),
        lr=0.0,
        weight_decay=args.weight_decay[0],
    )
    size, steps = size_and_steps(args, places, ranks.world)
    if size == 1:
        raise ValueError(
            "batch norm needs two images a rank or more: give a larger --batch_size_per_gpu, or more labels"
        )
    loader = training_batches(subject, places, size, steps, seed)
    model = distributed.data_parallel(network, ranks.device).train()
    for step, batch in enumerate(loader):
        lr = schedules.cosine(step, steps, args.lr[0], 0.0, warmup_steps=steps // 20)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.device.type == "cuda"):
            scores = model(training_view(batch, subject, seed, step))
        loss = F.cross_entropy(scores.float(), batch.labels.to(ranks.device))
        if (step + 1) % max(steps // 5, 1) == 0:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"diverging loss: it is {loss.item()} at step {step + 1}; a lower --lr may help"
                )
            if ranks.first:
                print(f"  step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    settle_batch_norm(
        network, (training_view(batch, subject, seed, steps + i) for i, batch in enumerate(loader))
    )
    distributed.broadcast_buffers(network)
    network.mean, network.std = eval_knn.normalisation(subject.backbone)
    return network


@torch.no_grad()
def cost(
    backbone: nn.Module, size: int, device: torch.device, batch: int = 64, repeats: int = 5
) -> dict[str, float]:
    """Millions of parameters and of multiply-adds an image, counted, and milliseconds an image in batches of 64."""
    backbone.eval()
    x = torch.randn(batch, 3, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    # The plain form of attention is made of matrix products, which the counter knows on every device.
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


def percent(values: list[float]) -> str:
    """Mean in percent and, of several, the standard deviation."""
    text = f"{100 * statistics.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.2f}"


def save_network(path: Path, network: nn.Sequential, image_size: int, epochs: int) -> None:
    """A backbone file that also holds its classifier: scores = features @ weight.T + bias."""
    backbone, head = network
    classifier = {name: value.cpu() for name, value in head.state_dict().items()}
    checkpoint.save_backbone(
        path,
        backbone,
        backbone.arch,
        network.mean,
        network.std,
        image_size,
        epochs,
        classifier=classifier,
    )


def measure(
    args: argparse.Namespace,
    name: str,
    opened: tuple[str, nn.Module] | None,
    output: Path,
    number: int,
    ranks: distributed.Ranks,
) -> dict:
    """All figures of one model, of its title and network as opened, or of a file of features: row `number` of the table."""
    say = print if ranks.first else lambda *_, **__: None
    subject = None
    if opened is None:
        title, train, test = evaluate.load_features(name, ranks.device)
        row = {"model": title}
    else:
        title, backbone = opened
        source, size, workers = eval_knn.open_data(args, backbone, ranks)
        subject = Subject(
            backbone.to(ranks.device, memory_format=torch.channels_last),
            source,
            size,
            workers,
            ranks,
        )
        row = {"model": title, "image_size": size, **cost(backbone, size, ranks.device)}
        start = time.perf_counter()
        train, test = (
            eval_knn.features(backbone, images, size, ranks, 256, workers, args.pool)
            for images in (source.train, source.test)
        )
        say(
            f"{title}: {len(train.labels)} training and {len(test.labels)} test images, {size} px, "
            f"{train.features.shape[1]} features in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    classes = int(train.labels.max()) + 1
    if int(test.labels.max()) >= classes:
        raise ValueError(
            f"the test images have class {int(test.labels.max())}, the training images none above {classes - 1}"
        )
    row["knn"] = evaluate.knn_accuracy(train, test, args.nb_knn, classes)
    say(f"  k-NN (k={min(args.nb_knn, len(train.labels))}) top-1 {row['knn']:.4f}", flush=True)
    whole = args.finetune or args.from_scratch
    if not whole:
        scaler = probe.Scaler(train.features)
        frozen, test_inputs = (
            Frozen(scaler, scaler(train.features), train.labels, classes),
            scaler(test.features),
        )
    row["trained"] = []
    # All choices first: one that cannot be is said before anything is trained.
    subsets = {
        (fraction, seed): probe.label_subset(train.labels, fraction, seed)
        for fraction in args.label_fraction
        for seed in args.seeds
    }
    for fraction in args.label_fraction:
        cell = {
            "label_fraction": fraction,
            "seeds": args.seeds,
            "top1": [],
            "top5": [],
            "chosen": [],
        }
        for seed in args.seeds:
            places = subsets[fraction, seed]
            if ranks.first:
                listed = "".join(f"{i}\n" for i in places.tolist())
                (output / f"labels_{fraction:g}_seed{seed}.txt").write_text(listed)
            places = places.to(ranks.device)
            if whole:
                network, chosen = finetuned(args, subject, name, places, seed), ""
                scores = eval_knn.features(network, source.test, size, ranks, 256, workers).features
                if ranks.first:
                    save_network(
                        output / f"network{number}_{fraction:g}_seed{seed}.pth",
                        network,
                        size,
                        args.epochs,
                    )
            else:
                weights, chosen = probe_weights(args, subject, frozen, places, seed)
                scores = test_inputs @ weights
            cell["top1"].append(evaluate.accuracy(scores, test.labels))
            top5 = ""
            if classes > 5:
                cell["top5"].append(evaluate.accuracy(scores, test.labels, top=5))
                top5 = f" top-5 {cell['top5'][-1]:.4f}"
            cell["chosen"].append(chosen)
            say(
                f"  {fraction:g} of the labels ({len(places)} images), seed {seed}: top-1 {cell['top1'][-1]:.4f}{top5}"
                f"{chosen and f', {chosen}'}",
                flush=True,
            )
        row["trained"].append(cell)
    return row


def table(args: argparse.Namespace, rows: list[dict]) -> str:
    """The rows in Markdown, accuracies in percent."""
    kind = "scratch" if args.from_scratch else "fine-tuned" if args.finetune else "linear"
    costs = (
        []
        if args.from_features
        else ["parameters (M)", "multiply-adds (M)", "ms an image", "pixels"]
    )
    heads = [
        "model",
        *costs,
        f"k-NN (k={args.nb_knn})",
        *(f"{kind} {100 * f:g} %" for f in args.label_fraction),
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        numbers = (
            []
            if args.from_features
            else [
                f"{row['parameters_M']:.2f}",
                f"{row['multiply_adds_M']:.1f}",
                f"{row['ms_an_image']:.2f}",
                f"{row['image_size']}",
            ]
        )
        lines.append(
            [
                row["model"],
                *numbers,
                percent([row["knn"]]),
                *(percent(cell["top1"]) for cell in row["trained"]),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output} cannot be made: {error.strerror}") from error
    whole, lbfgs = args.finetune or args.from_scratch, args.solver == "lbfgs"
    args.lr = args.lr or ([1e-3] if whole else [0.0] if lbfgs else PROBE_LR)
    args.weight_decay = args.weight_decay or (
        [0.05] if whole else LBFGS_WEIGHT_DECAY if lbfgs else PROBE_WEIGHT_DECAY
    )
    args.layer_decay = args.layer_decay or (0.75 if args.finetune else 1.0)
    if ranks.first:
        print(f"protocol: {protocol(args)}", flush=True)
    rows = []
    # All models first: a wrong one is said before anything is computed.
    opened = [(name, eval_knn.open_model(name, args.seeds[0])) for name in args.models] or [
        (args.from_features, None)
    ]
    for number, (name, model) in enumerate(opened, start=1):
        rows.append(measure(args, name, model, output, number, ranks))
        if ranks.first:  # after every model: a stopped run keeps what it has
            (output / "table.md").write_text(table(args, rows))
            (output / "table.json").write_text(
                json.dumps(
                    {"protocol": protocol(args), "settings": vars(args), "rows": rows}, indent=2
                )
                + "\n"
            )
    if ranks.first:
        print(f"\n{table(args, rows)}\nalso in {output}/table.md and {output}/table.json")


def main() -> None:
    args = get_parser().parse_args()
    distributed.launch("eval_linear.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

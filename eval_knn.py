#!/usr/bin/env python3
"""Weighted k-NN accuracy of a backbone, of its random initialisation or of raw pixels (Wu et al., 2018; DINO).

python eval_knn.py --weights output/backbone.pth --data_path /path/with/train/and/val
python eval_knn.py --arch mobilevit_xxs                random weights: the floor under every figure
python eval_knn.py --pixels                            no network at all: the other floor
"""

import argparse
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image

import lowdino
from lowdino import augment, data, distributed, evaluate
from lowdino.evaluate import Features


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless it is None, which the help itself explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add(
        "--weights",
        metavar="FILE",
        help="backbone.pth of train.py, or a state dict of DINO's or DINOv2's ViT; with --arch, "
        "also of timm's MobileViT or torchvision's networks",
    )
    add(
        "--arch",
        help=f"backbone: {', '.join(lowdino.ARCHS)}; without --weights at random initialisation",
    )
    add("--pixels", action="store_true", help="classify by raw pixels instead of a backbone")
    add(
        "--from_features",
        metavar="FILE",
        help="classify by an .npz of features, as --features writes, instead of a backbone",
    )
    add(
        "--features",
        metavar="FILE",
        help="also write the features, labels and file names to this .npz",
    )
    add(
        "--neighbours",
        metavar="FILE",
        help="also write a picture of some test images and their nearest training images",
    )
    add_data_flags(add)
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="of the votes, exp(cosine / temperature)")
    add("--batch_size_per_gpu", type=int, default=256)
    add("--seed", type=int, default=0, help="of a random initialisation")
    return parser


def add_data_flags(add: Callable) -> None:
    """The flags of every evaluation, given a parser's or a group's `add_argument`."""
    add(
        "--data_path",
        default="demo",
        help="folder with train/ and val/ (or test/) of class sub-folders, cifar10, cifar100, stl10 or demo",
    )
    add("--data_root", default="data", help="where cifar10, cifar100 and stl10 are kept")
    add(
        "--download",
        action="store_true",
        help="fetch cifar10, cifar100 or stl10 where --data_root lacks it",
    )
    add(
        "--image_size",
        type=int,
        help="side of the network's input; default: the backbone file's, or what suits the images",
    )
    add(
        "--pool",
        choices=["default", "mean", "max", "default+mean", "default+max"],
        default="default",
        help="default: the backbone's own, a ConvNet's mean or a ViT's class token; mean, max: over the last feature map; or "
        "two side by side",
    )
    add(
        "--num_workers",
        type=int,
        help="loader processes; default: 0 for images in memory, else up to 10",
    )
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    if args.pixels + bool(args.weights or args.arch) + bool(args.from_features) != 1:
        return "give a backbone, --weights FILE or --arch NAME, or else --pixels or --from_features FILE"
    if args.from_features and (args.features or args.neighbours):
        return "--features and --neighbours need the images, which --from_features does without"
    if args.pixels and args.pool != "default":
        return "--pool needs a backbone, and --pixels has none"
    if args.from_features and (args.pool != "default" or args.image_size):
        return "--pool and --image_size need the images, which --from_features does without"
    if args.weights == "":
        return "--weights names no file; without it weights are random"
    if args.neighbours and not args.neighbours.lower().endswith(IMG_EXTENSIONS):
        return f"--neighbours {args.neighbours} should end as a picture's name does, in .png say"
    for flag in ("features", "neighbours"):
        if path := getattr(args, flag):
            folder = os.path.dirname(path) or "."
            if not os.access(folder, os.W_OK):
                return f"--{flag} {path}: no folder {folder} that can be written to"
    if args.arch and args.arch not in lowdino.ARCHS:
        return f"--arch {args.arch} is unknown; choose from {', '.join(lowdino.ARCHS)}"
    if min(args.nb_knn) < 1:
        return f"--nb_knn must be at least 1, not {min(args.nb_knn)}"
    if not 0.013 <= args.temperature < float("inf"):
        return f"--temperature must be at least 0.013 (below, sums of exp(1 / temperature) overflow), not {args.temperature}"
    if not 0 <= args.seed < 2**63:
        return f"--seed must lie between 0 and 2^63, not {args.seed}"
    if args.image_size is not None and args.image_size < 32:
        return f"--image_size must be at least 32 pixels, not {args.image_size}"
    if args.batch_size_per_gpu < 1:
        return f"--batch_size_per_gpu must be at least 1, not {args.batch_size_per_gpu}"
    if args.num_workers is not None and args.num_workers < 0:
        return f"--num_workers must be 0 or more, not {args.num_workers}"
    return None


def open_model(name: str, seed: int = 0) -> tuple[str, nn.Module]:
    """A frozen network by name, in words and as a module.

    Args:
        name: "pixels"; an architecture, for its random initialisation; a file that `lowdino.load_backbone` takes; or
            ARCH=FILE, for a plain state dict of a ConvNet.
        seed: of a random initialisation.
    """
    if (
        name == "pixels"
    ):  # at most 32 x 32 of them: more tell no more, and a probe's cost grows with their square
        return "raw pixels", nn.Sequential(Shrink(), nn.Flatten())
    arch, equals, weights = name.partition("=")
    torch.manual_seed(seed)
    if arch in lowdino.ARCHS and not equals:
        return f"{arch} at random initialisation, seed {seed}", lowdino.build_backbone(arch)
    if arch not in lowdino.ARCHS:
        if not os.path.exists(name):
            raise ValueError(
                f"no file {name}, and no such architecture; there are {', '.join(lowdino.ARCHS)}"
            )
        arch, weights = None, name
    backbone = lowdino.load_backbone(weights, arch)
    epoch = f", epoch {backbone.epoch}" if hasattr(backbone, "epoch") else ""
    return f"{backbone.arch} of {weights}{epoch}", backbone


class Shrink(nn.Module):
    """Images of more than 32 x 32 pixels to 32 x 32, by the mean of areas."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 32) if x.shape[-1] > 32 else x


class Pooled(nn.Module):
    """A backbone whose features are pooled otherwise: mean or maximum over the last map, perhaps beside the default."""

    def __init__(self, backbone: nn.Module, pool: str):
        super().__init__()
        self.backbone, self.pool = backbone, pool

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.forward_features(x).flatten(2)  # (B, C, h * w)
        features = features.amax(dim=2) if self.pool.endswith("max") else features.mean(dim=2)
        return (
            torch.cat([self.backbone(x), features], dim=1)
            if self.pool.startswith("default+")
            else features
        )


def pooled(backbone: nn.Module, pool: str) -> nn.Module:
    return backbone if pool == "default" else Pooled(backbone, pool)


def normalisation(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by channel that its inputs should have; ImageNet's where it says none."""
    return getattr(backbone, "mean", augment.IMAGENET_MEAN), getattr(
        backbone, "std", augment.IMAGENET_STD
    )


def features(
    backbone: nn.Module,
    images: data.ImageArray | data.ImageFiles,
    size: int,
    ranks: distributed.Ranks,
    batch_size: int = 256,
    workers: int = 0,
    pool: str = "default",
) -> Features:
    """Of the central view of all images, on every rank, each having done its share: float32 (N, D), with labels and files.

    Raises:
        ValueError: where some are not finite.
    """

    def view(canvas, sizes):
        x = augment.central_view(canvas, sizes, size, *normalisation(backbone))
        return x.contiguous(memory_format=torch.channels_last)

    batches = data.evaluation_loader(images, batch_size, workers, ranks.rank, ranks.world)
    own = evaluate.extract_features(pooled(backbone, pool), batches, view, ranks.device)
    files = getattr(images, "paths", None) or [str(i) for i in range(len(images))]
    found = Features(*(distributed.gather_strided(rows, len(images)) for rows in own), files)
    if not found.features.isfinite().all():
        raise ValueError(
            "the network gives features that are not finite numbers: its weights are damaged, or diverged"
        )
    return found


def open_data(
    args: argparse.Namespace, backbone: nn.Module, ranks: distributed.Ranks, labelled: bool = True
) -> tuple[data.Data, int, int]:
    """The images, the side of the network's input, and the number of loader processes that the flags ask for.

    Raises:
        ValueError: where `labelled` and there are no labels to test on.
    """
    source = data.load_on_ranks(args.data_path, args.data_root, args.download, ranks.rank)
    if labelled and source.test is None:
        raise ValueError(
            f"{source.name} has no labels to test on: that needs train/ and val/ (or test/), "
            "each with class sub-folders"
        )
    size = (
        args.image_size
        or getattr(backbone, "image_size", None)
        or data.suitable_size(source.pretrain)
    )
    source.limit_side(2 * size)
    return (
        source,
        size,
        data.default_workers(source.pretrain) if args.num_workers is None else args.num_workers,
    )


def save_neighbours(
    path: str,
    images: data.Data,
    train: Features,
    test: Features,
    queries: int = 10,
    neighbours: int = 8,
) -> None:
    """Write a picture: a row a test image, drawn by lot, then its nearest training images, framed green or red."""
    rows = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))[:queries]
    _, places = evaluate.nearest_neighbours(
        train.features,
        test.features[rows.to(test.features.device)],
        min(neighbours, len(images.train)),
    )
    cells = []
    for row, near in zip(rows.tolist(), places.tolist()):
        query, own = thumbnails(images.test, [row])
        found, labels = thumbnails(images.train, near)
        colours = [
            (0.5, 0.5, 0.5),
            *((0.1, 0.7, 0.2) if label == own[0] else (0.9, 0.1, 0.1) for label in labels),
        ]
        framed = torch.tensor(colours)[:, :, None, None].repeat(1, 1, 70, 70)
        framed[:, :, 3:-3, 3:-3] = torch.cat([query, found])
        cells.append(framed)
    save_image(torch.cat(cells), path, nrow=1 + len(places[0]), padding=1, pad_value=1.0)


def thumbnails(
    images: data.ImageArray | data.ImageFiles, places: list[int]
) -> tuple[Tensor, Tensor]:
    """The central squares of some images, (n, 3, 64, 64), and their labels."""
    canvas, sizes, labels, *_ = next(
        iter(data.evaluation_loader(Subset(images, places), len(places), 0))
    )
    return augment.resized_crop(canvas, augment.central_boxes(sizes, 1.0), 64), labels


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    if args.from_features:
        name, train, test = evaluate.load_features(args.from_features, ranks.device)
        if not ranks.first:
            return
        print(
            f"{name}; {args.from_features}: {len(train.labels)} training and {len(test.labels)} test images"
        )
    else:
        model = "pixels" if args.pixels else "=".join(filter(None, (args.arch, args.weights)))
        name, backbone = open_model(model, args.seed)
        source, size, workers = open_data(
            args, backbone, ranks, labelled=bool(args.neighbours) or not args.features
        )
        backbone = backbone.to(ranks.device, memory_format=torch.channels_last)
        images = (
            {"train": source.train, "test": source.test}
            if source.test
            else {"train": source.pretrain}
        )
        splits = {
            key: features(backbone, part, size, ranks, args.batch_size_per_gpu, workers, args.pool)
            for key, part in images.items()
        }
        if not ranks.first:
            return
        width = splits["train"].features.shape[1]
        if args.features:
            evaluate.save_features(args.features, name, splits)
            print(
                f"{args.features}: {width} features of {' and '.join(f'{len(p)} {key}' for key, p in images.items())} images"
            )
        if not source.test:
            return
        train, test = splits["train"], splits["test"]
        print(
            f"{name}; {source.name}: {len(source.train)} training and {len(source.test)} test images, "
            f"{source.classes} classes, {size} px, {width} features"
        )
        if args.neighbours:
            save_neighbours(args.neighbours, source, train, test)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    for k in args.nb_knn:
        scores = evaluate.knn_classify(
            train.features, train.labels, test.features, k, args.temperature, classes
        )
        line = f"k-NN (k={min(k, len(train.labels))}) top-1 {evaluate.accuracy(scores, test.labels):.4f}"
        if classes > 5:
            line += f" top-5 {evaluate.accuracy(scores, test.labels, top=5):.4f}"
        print(line, flush=True)


def main() -> None:
    args = get_parser().parse_args()
    distributed.launch("eval_knn.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

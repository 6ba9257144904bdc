#!/usr/bin/env python3
"""Weighted k-NN accuracy of a backbone, of its random initialisation or of raw pixels (Wu et al.,
2018; DINO).

    python eval_knn.py --weights output/backbone.pth --data_path /path/with/train/and/val
    python eval_knn.py --arch mobilevit_xxs      random weights: the floor under every figure
    python eval_knn.py --pixels                  no network at all: the other floor
"""

import argparse
import os

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

import lowdino
from lowdino import demo, distributed, evaluate, flags, pictures, segmentation, settings
from lowdino.distributed import UserError, user_errors
from lowdino.evaluate import Features
from lowdino.features import compute_features, normalisation, open_network

# Flags that do not go with another one.
FOREIGN = {
    "from_features": ("features", "neighbours"),
    "maps": ("features", "neighbours", "map"),
    "pixels": ("pool",),
    "propagate": ("pool", "nb_knn", "temperature", "map", "maps", "features", "neighbours"),
}


def get_parser() -> argparse.ArgumentParser:
    parser = flags.parser_of(__doc__)
    add = parser.add_argument
    help = (
        "backbone.pth of train.py, or a state dict of DINO's or DINOv2's ViT; with --arch, also of "
        "timm's MobileViT or torchvision's networks"
    )
    add("--weights", metavar="FILE", help=help)
    help = f"backbone: {', '.join(lowdino.ARCHS)}; without --weights at random initialisation"
    add("--arch", help=help)
    add("--pixels", action="store_true", help="classify by raw pixels instead of a backbone")
    help = "classify by an .npz of features, as --features writes, instead of a backbone"
    add("--from_features", metavar="FILE", help=help)
    help = "also write the features, labels and file names to this .npz"
    add("--features", metavar="FILE", help=help)
    help = "also write a picture of some test images and their nearest training images"
    add("--neighbours", metavar="FILE", help=help)
    help = "only write a picture of some images and their last feature maps, as PCA colours"
    add("--maps", metavar="FILE", help=help)
    help = (
        "also print the mean average precision of retrieval: test images rank the training images, "
        "and those of the same class are relevant"
    )
    add("--map", action="store_true", help=help)
    help = (
        "only print the mean IoU of label propagation in films of demo scenes: labels are carried "
        "from the first frame to the others, by nearest neighbours among the cells of the map of "
        "stride 8, or a ViT's"
    )
    add("--propagate", action="store_true", help=help)
    settings.add_evaluation_flags(add)
    k = [10, 20, 100, 200]
    add("--nb_knn", type=int, nargs="+", default=k, help="numbers of neighbours")
    help = "temperature of the votes, exp(cosine / temperature)"
    add("--temperature", type=float, default=0.07, help=help)
    add("--batch_size_per_gpu", type=int, default=256, help="batch size per process")
    add("--seed", type=int, default=0, help="of a random initialisation, and of --test_fraction")
    return parser


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    if args.pixels + bool(args.weights or args.arch) + bool(args.from_features) != 1:
        return (
            "give a backbone, --weights FILE or --arch NAME, or else --pixels or --from_features "
            "FILE"
        )
    for mode, done in (("maps", "written"), ("propagate", "measured")):
        if getattr(args, mode) and (args.pixels or args.from_features):
            return f"--{mode} needs a backbone, --weights or --arch, and is {done} alone"
    parser = get_parser()
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for mode, foreign in FOREIGN.items():
        for name in foreign:
            if {mode, name} <= given:
                return f"--{name} is not for --{mode}: leave it out"
    if args.propagate and args.data_path != "demo_scenes":
        return "--propagate is measured on the films of --data_path demo_scenes"
    if args.weights == "":
        return "--weights names no file; without it weights are random"
    for flag in ("features", "neighbours", "maps"):
        path = getattr(args, flag) or ""
        if path and flag != "features" and not path.lower().endswith(IMG_EXTENSIONS):
            return f"--{flag} {path} should end as a picture's name does, in .png say"
        folder = os.path.dirname(path) or "."
        if path and not os.access(folder, os.W_OK):
            return f"--{flag} {path}: no folder {folder} that can be written to"
    if args.arch and args.arch not in lowdino.ARCHS:
        return f"--arch {args.arch} is unknown; choose from {', '.join(lowdino.ARCHS)}"
    if min(args.nb_knn) < 1:
        return f"--nb_knn must be at least 1, not {min(args.nb_knn)}"
    if not 0.013 <= args.temperature < float("inf"):
        return (
            "--temperature must be at least 0.013 (below, sums of exp(1 / temperature) overflow), "
            f"not {args.temperature}"
        )
    if not 0 <= args.seed < 2**63:
        return f"--seed must lie between 0 and 2^63, not {args.seed}"
    return settings.check_evaluation(args) or flags.out_of_range(
        args, at_least_one=("batch_size_per_gpu",)
    )


def open_model(args: argparse.Namespace) -> tuple[str, torch.nn.Module]:
    """The title and the network of the model that the flags name."""
    name = "pixels" if args.pixels else "=".join(filter(None, (args.arch, args.weights)))
    return open_network(name, args.seed)


def read_features(args, ranks: distributed.Ranks) -> tuple[Features, Features] | None:
    """Training and test features of --from_features; None on other ranks than the first."""
    with user_errors():
        name, train, test = evaluate.load_features(args.from_features, ranks.device)
    if not ranks.first:
        return None
    counts = f"{len(train.labels)} training and {len(test.labels)} test images"
    print(f"{name}; {args.from_features}: {counts}")
    return train, test


def features_of_images(args, ranks: distributed.Ranks) -> tuple[Features, Features] | None:
    """Training and test features of the model that the flags name, on the first rank.

    None on other ranks, without labels, and where --maps is all that is asked for.
    """
    title, backbone = open_model(args)
    labelled = bool(args.neighbours or args.map) or not (args.features or args.maps)
    source, size, workers = settings.open_data(args, backbone, ranks, labelled)
    if ranks.first and source.notes and not args.maps:  # which needs no labels
        print("\n".join(source.notes), flush=True)
    backbone = backbone.to(ranks.device, memory_format=torch.channels_last)
    if args.maps:
        if ranks.first:
            images = source.test or source.pretrain
            indices = pictures.random_indices(images, 8)
            pictures.save_maps(args.maps, backbone.eval(), images, indices, size, ranks.device)
            print(f"{args.maps}: PCA maps of {title}")
        return None
    images = {"train": source.train, "test": source.test}
    if source.test is None:
        images = {"train": source.pretrain}
    batch = args.batch_size_per_gpu
    splits = {
        split: compute_features(backbone, part, size, ranks, batch, workers, args.pool)
        for split, part in images.items()
    }
    if not ranks.first:
        return None
    width = splits["train"].features.shape[1]
    if args.features:
        evaluate.save_features(args.features, title, splits)
        counts = " and ".join(f"{len(part)} {split}" for split, part in images.items())
        print(f"{args.features}: {width} features of {counts} images")
    if source.test is None:
        return None
    train, test = splits["train"], splits["test"]
    print(
        f"{title}; {source.name}: {len(source.train)} training and {len(source.test)} test images, "
        f"{source.classes} classes, {size} px, {width} features"
    )
    if args.neighbours:
        pair, rows = (test.features, train.features), pictures.random_indices(source.test, 10)
        data = source.test, source.train
        pictures.save_neighbours(args.neighbours, *data, pair, rows, source.names)
    return train, test


def propagate(args, ranks: distributed.Ranks) -> None:
    """Print the mean IoU of label propagation, on the first rank."""
    title, backbone = open_model(args)
    if not ranks.first:
        return
    backbone = backbone.to(ranks.device).eval()
    strides = backbone.pyramid_strides
    level = min(range(len(strides)), key=lambda i: abs(strides[i] - 8))  # as DINO's ViT-S/8
    size = args.image_size or 2 * demo.SCENE_SIDE // strides[-1] * strides[-1]
    segmentation.check_size(size, strides[-1])
    if len(normalisation(backbone)[0]) != 3:
        raise UserError(f"demo scenes are in colours, and {title} is not")
    iou, still = segmentation.propagated_iou(
        lambda x: backbone.forward_pyramid(x)[level], size, *normalisation(backbone), ranks
    )
    print(f"{title}; films of demo scenes, {size} px")
    print(f"label propagation: mean IoU {iou:.4f}, of labels that stay {still:.4f}")


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    if args.propagate:
        return propagate(args, ranks)
    splits = (read_features if args.from_features else features_of_images)(args, ranks)
    if splits is None:
        return
    train, test = splits
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    for k in args.nb_knn:
        scores = evaluate.knn_classify(
            train.features, train.labels, test.features, k, args.temperature, classes
        )
        accuracy = evaluate.accuracy(scores, test.labels)
        line = f"k-NN (k={min(k, len(train.labels))}) top-1 {accuracy:.4f}"
        if classes > 5:
            line += f" top-5 {evaluate.accuracy(scores, test.labels, top=5):.4f}"
        print(line, flush=True)
    if args.map:
        print(f"retrieval mAP {evaluate.retrieval_map(train, test):.4f}")


def main() -> None:
    args = get_parser().parse_args()
    distributed.launch("eval_knn.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

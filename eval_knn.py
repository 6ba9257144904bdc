#!/usr/bin/env python3
"""Weighted k-NN accuracy of a backbone, of its random initialisation, of raw pixels or of a patch
dictionary (Wu et al., 2018; DINO).

    python eval_knn.py --weights output/backbone.pth --data_path /path/with/train/and/val
    python eval_knn.py --arch mobilevit_xxs      random weights: the floor under every figure
    python eval_knn.py --pixels                  no network at all: the second floor
    python eval_knn.py --patches                 a dictionary of patches, k-means alone: the third
"""

import os

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

import lowdino
from lowdino import distributed, evaluate, features, pictures, settings
from lowdino.distributed import user_errors
from lowdino.evaluate import Features
from lowdino.features import FLOORS, compute_features, open_network
from lowdino.methods import Flag

# Flags that do not go with another one.
FOREIGN = {
    "from_features": ("features", "neighbours"),
    "maps": ("features", "neighbours", "map"),
    "pixels": ("pool",),
    "patches": ("pool",),
}


FLAGS = {
    "the model": (
        Flag("weights", "backbone.pth, or another file that load_backbone reads", metavar="FILE"),
        Flag("arch", "backbone; without --weights at random values", choices=lowdino.ARCHS),
        Flag("pixels", "classify by raw pixels instead of a backbone", bool),
        Flag("patches", "classify by responses to a dictionary of the images' patches", bool),
        Flag("from_features", "classify by an .npz that --features wrote", metavar="FILE"),
    ),
    "what is measured": (
        Flag("nb_knn", "numbers of neighbours", int, ">= 1", [10, 20, 100, 200], nargs="+"),
        Flag("temperature", "of the votes, exp(cosine / temperature)", float, default=0.07),
        Flag("whiten", "also with features half-whitened by the training images", bool),
        Flag("map", "also the mean average precision of retrieval by class", bool),
        Flag("features", "also write features, labels and names to this .npz", metavar="FILE"),
        Flag("neighbours", "also write a picture of nearest training images", metavar="FILE"),
        Flag("maps", "only write a picture of last feature maps, as PCA colours", metavar="FILE"),
    ),
    "data": (
        *settings.EVALUATION_FLAGS,
        Flag("batch_size_per_gpu", "batch size per process", int, ">= 1", 256),
        Flag("seed", "seed of a random initialisation and of --test_fraction", int, ">= 0", 0),
    ),
}


def get_parser() -> settings.Parser:
    return settings.Parser("eval_knn.py", __doc__, FLAGS)


def check(args: settings.Settings) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    others = args.pixels, args.patches, args.from_features
    if sum(map(bool, (args.weights or args.arch, *others))) != 1:
        choices = "--pixels, --patches or --from_features FILE"
        return f"give a backbone, --weights FILE or --arch NAME, or else {choices}"
    if args.maps and any(others):
        return "--maps needs a backbone, --weights or --arch, and is written alone"
    for mode, foreign in FOREIGN.items():
        for name in foreign:
            if {mode, name} <= args.typed:
                return f"--{name} is not for --{mode}: leave it out"
    if args.weights == "":
        return "--weights names no file; without it weights are random"
    for flag in ("features", "neighbours", "maps"):
        path = getattr(args, flag) or ""
        if path and flag != "features" and not path.lower().endswith(IMG_EXTENSIONS):
            return f"--{flag} {path} should end as a picture's name does, in .png say"
        folder = os.path.dirname(path) or "."
        if path and not os.access(folder, os.W_OK):
            return f"--{flag} {path}: no folder {folder} that can be written to"
    if not 0.013 <= args.temperature < float("inf"):
        return (
            "--temperature must be at least 0.013 (below, sums of exp(1 / temperature) overflow), "
            f"not {args.temperature}"
        )
    if args.seed >= 2**63:
        return f"--seed must be below 2^63, not {args.seed}"
    return settings.check_evaluation(args)


def open_model(args: settings.Settings) -> tuple[str, torch.nn.Module]:
    """The title and the network of the model that the flags name."""
    floor = [name for name in FLOORS if getattr(args, name)]
    name = floor[0] if floor else "=".join(filter(None, (args.arch, args.weights)))
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
    source, size, workers = features.open_images(args, backbone, ranks, labelled)
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


def print_accuracies(args, train: Features, test: Features, what: str = "") -> None:
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    for k in args.nb_knn:
        scores = evaluate.knn_classify(
            train.features, train.labels, test.features, k, args.temperature, classes
        )
        accuracy = evaluate.accuracy(scores, test.labels)
        line = f"k-NN (k={min(k, len(train.labels))}){what} top-1 {accuracy:.4f}"
        if classes > 5:
            line += f" top-5 {evaluate.accuracy(scores, test.labels, top=5):.4f}"
        print(line, flush=True)


def run(args: settings.Settings, ranks: distributed.Ranks) -> None:
    splits = (read_features if args.from_features else features_of_images)(args, ranks)
    if splits is None:
        return
    train, test = splits
    print_accuracies(args, train, test)
    if args.whiten:
        _, whitened = features.whiten(train, test)
        print_accuracies(args, *whitened, " of half-whitened features")
    if args.map:
        print(f"retrieval mAP {evaluate.retrieval_map(train, test):.4f}")


def main() -> None:
    distributed.launch("eval_knn.py", lambda: get_parser().parse(None, check), run)


if __name__ == "__main__":
    main()

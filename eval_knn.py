#!/usr/bin/env python3
"""Weighted k-NN accuracy of a backbone, of its random initialisation or of raw pixels (Wu et al., 2018; DINO).

    python eval_knn.py --weights output/backbone.pth --data_path /path/with/train/and/val
    python eval_knn.py --arch mobilevit_xxs                random weights: the floor under every figure
    python eval_knn.py --pixels                            no network at all: the other floor
"""

import argparse

import torch
from torch import nn

import lowdino
from lowdino import augment, checkpoint, data, distributed, evaluate, models


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--weights", metavar="FILE", help="backbone.pth of train.py; with --arch, also a state dict such as timm's")
    add("--arch", help=f"backbone: {', '.join(models.ARCHS)}; without --weights at random initialisation")
    add("--pixels", action="store_true", help="classify by raw pixels instead of a backbone")
    add("--data_path", default="demo",
        help="folder with train/ and val/ (or test/) of class sub-folders, cifar10, cifar100, stl10 or demo")  # fmt: skip
    add("--data_root", default="data", help="where cifar10, cifar100 and stl10 are kept")
    add("--download", action="store_true", help="fetch cifar10, cifar100 or stl10 where --data_root lacks it")
    add("--image_size", type=int, help="side of the network's input; default: the backbone file's, or what suits the images")
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="of the votes, exp(cosine / temperature)")
    add("--batch_size_per_gpu", type=int, default=256)
    add("--seed", type=int, default=0, help="of a random initialisation")
    add("--num_workers", type=int, help="loader processes; default: 0 for images in memory, else up to 10")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    return parser


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    if args.pixels + bool(args.weights or args.arch) != 1:
        return "give a backbone, --weights FILE or --arch NAME, or else --pixels"
    if args.arch and args.arch not in models.ARCHS:
        return f"--arch {args.arch} is unknown; choose from {', '.join(models.ARCHS)}"
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


def open_backbone(args: argparse.Namespace) -> tuple[str, nn.Module]:
    """What the flags name, in words and as a module."""
    if args.pixels:
        return "raw pixels", nn.Flatten()
    if args.weights and not args.arch:
        backbone = lowdino.load_backbone(args.weights)
        return f"{backbone.arch} of {args.weights}, epoch {backbone.epoch}", backbone
    torch.manual_seed(args.seed)
    backbone = lowdino.build_backbone(args.arch)
    if args.weights:
        checkpoint.load_backbone_weights(backbone, checkpoint.load(args.weights), args.weights)
        return f"{args.arch} of {args.weights}", backbone
    return f"{args.arch} at random initialisation, seed {args.seed}", backbone


def features(backbone: nn.Module, images: data.ImageArray | data.ImageFiles, size: int, ranks: distributed.Ranks,
             batch_size: int = 256, workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(N, D) features and (N,) labels of the central view of all images, on every rank, each having done its share."""
    mean, std = getattr(backbone, "mean", augment.IMAGENET_MEAN), getattr(backbone, "std", augment.IMAGENET_STD)

    def view(canvas, sizes):
        x = augment.central_view(canvas, sizes, size, mean, std)
        return x.contiguous(memory_format=torch.channels_last)

    batches = data.evaluation_loader(images, batch_size, workers, ranks.rank, ranks.world)
    own = evaluate.extract_features(backbone, batches, view, ranks.device)
    all_features, all_labels = (distributed.gather_strided(rows, len(images)) for rows in own)
    return all_features, all_labels


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    name, backbone = open_backbone(args)
    backbone = backbone.to(ranks.device, memory_format=torch.channels_last)
    source = data.load_on_ranks(args.data_path, args.data_root, args.download, ranks.rank)
    if source.test is None:
        raise ValueError(f"{source.name} has no labels to test on: k-NN needs train/ and val/ (or test/), "
                         "each with class sub-folders")  # fmt: skip
    size = args.image_size or getattr(backbone, "image_size", None) or data.suitable_size(source.train)
    source.limit_side(2 * size)
    workers = data.default_workers(source.train) if args.num_workers is None else args.num_workers

    train_features, train_labels = features(backbone, source.train, size, ranks, args.batch_size_per_gpu, workers)
    test_features, test_labels = features(backbone, source.test, size, ranks, args.batch_size_per_gpu, workers)
    if not ranks.first:
        return
    print(f"{name}; {source.name}: {len(source.train)} training and {len(source.test)} test images, "
          f"{source.classes} classes, {size} px, {train_features.shape[1]} features")  # fmt: skip
    for k in args.nb_knn:
        scores = evaluate.knn_classify(train_features, train_labels, test_features, k, args.temperature, source.classes)
        line = f"k-NN (k={min(k, len(train_features))}) top-1 {evaluate.accuracy(scores, test_labels):.4f}"
        if source.classes > 5:
            line += f" top-5 {evaluate.accuracy(scores, test_labels, top=5):.4f}"
        print(line, flush=True)


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    if message := check(args):
        parser.exit(2, f"eval_knn.py: error: {message}\n")
    try:
        run(args, distributed.start(args.device))
    except ValueError as error:
        # Of an error in a loader's process the last line is its own; the others are that process's traceback.
        sentence = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        parser.exit(2, f"eval_knn.py: error: {sentence}\n")
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()

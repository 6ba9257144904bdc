#!/usr/bin/env python3
"""Pre-train a small backbone without labels, by the coding rate of many views (EMP-SSL), by
self-distillation with a momentum teacher (DINO, LowDINO, SSLight), by MV-MR, or by what these are
compared with (BYOL, MoCo v2, SwAV, SimCLR, VICReg, Barlow Twins).

    python train.py --arch mobilevit_xxs --minutes 1.2                      demo images: k-NN 0.72
    torchrun --nproc_per_node=8 train.py --arch mobilevit_s --data_path /path/to/pictures

Methods: emp compares eight views with their image's mean, and the batch by its coding rate. dino
compares distributions over prototypes with those of a teacher; mvmr embeddings with those of the
plain image and with fixed descriptors, by distance correlation; byol predictions with a teacher's
projections; moco queries with a key among a queue of others; swav assignments to prototypes,
swapped between views; simclr each embedding with all others of the batch. vicreg and barlow bring
two views together, with even variances and no correlations. dino, byol, moco and swav take local
views too, --local_crops_number, and balance them by --alpha. All but dino, moco and mvmr train by
Muon by default.
"""

import argparse

from lowdino import distributed, engine, flags, settings
from lowdino.methods import METHODS


def get_parser() -> argparse.ArgumentParser:
    parser = flags.parser_of(__doc__)
    help = (
        "what is learned, see below; default: the preset's, or the one whose flags are given, or "
        "emp"
    )
    parser.add_argument("--method", choices=METHODS, help=help)
    for method in METHODS.values():
        method.add_flags(parser)
    settings.add_training_flags(parser)
    return parser


def check(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags by themselves, in one sentence, or None."""
    return settings.check_training(args) or METHODS[args.method].check(args)


def run(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    source = settings.settle(args, ranks)
    engine.train(args, ranks, source, METHODS[args.method].build)


def main() -> None:
    args = settings.parse(get_parser())
    distributed.launch("train.py", check(args), args.device, lambda ranks: run(args, ranks))


if __name__ == "__main__":
    main()

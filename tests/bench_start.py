#!/usr/bin/env python3
"""Why does self-distillation start, or not: one change at a time, on the demo images.

    python tests/bench_start.py [--epochs 5] [--arch mobilevit_xxs] [--seed 0]

Trains `--preset small` at 32 pixels from variants of the initialisation and of the settings, and prints a Markdown table:
rho, the correlation between the head's outputs for the two views of an image at initialisation; the loss over ln K; and
the teacher's k-NN accuracy before and after. A loss that stays at 1.00 is the uniform collapse.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lowdino
import train
from lowdino import augment, data, distributed, models
from lowdino.heads import DINOHead

build = lowdino.build_backbone


def only(*parts: str):
    """He's initialisation with the named parts of MobileViT.init_to_agree and no others."""

    def make(arch: str) -> nn.Module:
        backbone = build(arch)
        started = {k: v.clone() for k, v in backbone.state_dict().items()}
        backbone.apply(models.init_weights)
        for name, parameter in backbone.named_parameters():
            kept = {"depthwise": "conv2_kxk.conv", "residual": "conv3_1x1.bn", "fusion": "conv_fusion.conv"}
            if any(kept[part] in name for part in parts):
                parameter.data.copy_(started[name])
            elif "conv3_1x1.bn.weight" in name:
                nn.init.ones_(parameter)
        return backbone

    return make


VARIANTS = [
    ("as it is", build, []),
    ("He's initialisation alone", only(), []),
    ("... and depthwise filters near the mean", only("depthwise"), []),
    ("... and residual branches at zero", only("residual"), []),
    ("... and fusion near the identity", only("fusion"), []),
    ("as it is, --use_bn_in_head false", build, ["--use_bn_in_head", "false"]),
    ("as it is, --momentum_teacher 0.996", build, ["--momentum_teacher", "0.996"]),
]


@torch.no_grad()
def agreement(make, arch: str, seed: int) -> float:
    """Correlation between the centred logits of the two global views of 256 demo images, in training mode."""
    torch.manual_seed(seed)
    backbone = make(arch).train()
    head = DINOHead(backbone.embed_dim, 1024, use_bn=True, hidden_dim=512).train()
    images = data.demo_images(range(256)).images
    crop = augment.MultiCrop(32, 32, 0, blur_sigma=(0.1, 2 * 32 / 224))
    views = crop(images, torch.full((256, 2), images.shape[-1]), augment.seeded_generator("cpu", seed))
    a, b = [logits - logits.mean(0) for logits in (head(backbone(view)) for view in views)]
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--arch", default="mobilevit_xxs")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    rows = ["| start | rho | loss / ln K | k-NN before | k-NN after |", "|---|---|---|---|---|"]
    for name, make, changes in VARIANTS:
        if make is not build and not flags.arch.startswith("mobilevit"):
            continue
        with tempfile.TemporaryDirectory() as output:
            args = train.parse(train.get_parser(), [
                "--preset", "small", "--arch", flags.arch, "--epochs", str(flags.epochs),
                "--seed", str(flags.seed), "--device", "cpu", "--output_dir", output, *changes])  # fmt: skip
            assert train.check(args) is None
            ranks = distributed.Ranks(0, 1, torch.device("cpu"))
            lowdino.build_backbone = make
            train.train(args, ranks, train.settle(args, ranks))
            lowdino.build_backbone = build
            log = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
        knn = [record["knn"] for record in log if "knn" in record]
        loss = [record["loss_over_lnk"] for record in log if "loss" in record][-1]
        rows.append(f"| {name} | {agreement(make, flags.arch, flags.seed):.2f} | {loss:.2f} | {knn[0]:.3f} | {knn[-1]:.3f} |")
        print(rows[-1], flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Why does self-distillation start, or not: one change at a time, on the demo images.

    python tests/bench_start.py [--epochs 5] [--arch mobilevit_xxs] [--seed 0]

Trains `--preset small` at 32 pixels from variants of the initialisation and of the settings, and prints a Markdown table:
rho, the correlation between the head's outputs for the two views of an image at initialisation; at the end the loss over
ln K and I, the entropy of the teacher's mean answer less the mean entropy of its answers, in nats, which is what an answer
tells of its image; and the teacher's k-NN accuracy before and after. Loss 1.00 and I = 0 are the uniform collapse.
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
            kept = {
                "depthwise": "conv2_kxk.conv",
                "residual": "conv3_1x1.bn",
                "fusion": "conv_fusion.conv",
            }
            if any(kept[part] in name for part in parts):
                parameter.data.copy_(started[name])
            elif "conv3_1x1.bn.weight" in name:
                nn.init.ones_(parameter)
        return backbone

    return make


NO_INFONCE = ["--infonce_weight", "0"]
VARIANTS = [
    ("as it is", build, []),
    ("without InfoNCE", build, NO_INFONCE),
    ("He's initialisation alone", only(), []),
    ("He's initialisation alone, without InfoNCE", only(), NO_INFONCE),
    ("... and depthwise filters near the mean", only("depthwise"), NO_INFONCE),
    ("... and residual branches at zero", only("residual"), NO_INFONCE),
    ("... and fusion near the identity", only("fusion"), NO_INFONCE),
    ("as it is, no batch norm in the head", build, ["--use_bn_in_head", "false"]),
    ("as it is, Sinkhorn-Knopp", build, ["--centering", "sinkhorn"]),
    ("as it is, KoLeo 0.1", build, ["--koleo_weight", "0.1"]),
    ("as it is, momentum 0.996", build, ["--momentum_teacher", "0.996"]),
    ("as it is, crops from 0.4", build, ["--global_crops_scale", "0.4", "1"]),
]


@torch.no_grad()
def agreement(make, arch: str, seed: int) -> float:
    """Correlation between the centred logits of the two global views of 256 demo images, in training mode."""
    torch.manual_seed(seed)
    backbone = make(arch).train()
    head = DINOHead(backbone.embed_dim, 1024, use_bn=True, hidden_dim=512).train()
    images = data.demo_images(range(256)).images
    crop = augment.MultiCrop(32, 32, 0, (0.2, 1.0), blur_sigma=(0.1, 2 * 32 / 224))
    views = crop(
        images, torch.full((256, 2), images.shape[-1]), augment.seeded_generator("cpu", seed)
    )
    a, b = [logits - logits.mean(0) for logits in (head(backbone(view)) for view in views)]
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--arch", default="mobilevit_xxs")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    rows = [
        "| change | rho | loss / ln K | I | k-NN before | k-NN after |",
        "|---|---|---|---|---|---|",
    ]
    for name, make, changes in VARIANTS:
        if make is not build and not flags.arch.startswith("mobilevit"):
            continue
        with tempfile.TemporaryDirectory() as output:
            args = train.parse(
                train.get_parser(),
                [
                    "--preset",
                    "small",
                    "--arch",
                    flags.arch,
                    "--epochs",
                    str(flags.epochs),
                    "--seed",
                    str(flags.seed),
                    "--device",
                    "cpu",
                    "--output_dir",
                    output,
                    *changes,
                ],
            )
            assert train.check(args) is None
            ranks = distributed.Ranks(0, 1, torch.device("cpu"))
            lowdino.build_backbone = make
            train.train(args, ranks, train.settle(args, ranks), train.SelfDistillation)
            lowdino.build_backbone = build
            log = [
                json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()
            ]
        knn = [record["knn"] for record in log if "knn" in record]
        last = [record for record in log if "loss" in record][-1]
        information = last["entropy_of_mean"] - last["entropy"]
        rows.append(
            f"| {name} | {agreement(make, flags.arch, flags.seed):.2f} | {last['loss_over_lnk']:.2f} "
            f"| {information:.2f} | {knn[0]:.3f} | {knn[-1]:.3f} |"
        )
        print(rows[-1], flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()

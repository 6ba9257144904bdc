#!/usr/bin/env python3
"""Why does self-distillation start, or not: one change at a time, on the demo images.

    python tests/bench_start.py [--epochs 5] [--arch mobilevit_xxs] [--seed 0]

Trains `--preset small` at 32 pixels from variants of the initialisation and of the settings, and
prints a Markdown table with these columns: rho, the correlation of the head's logits for two views
of an image at initialisation; DINO's loss over ln K at the end; I, the mutual information of image
and prototype at the end, in nats, which is the entropy of the teacher's mean distribution less the
mean entropy of its distributions; the teacher's k-NN accuracy before and after. A loss of 1.00 and
I = 0 are the uniform collapse.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lowdino  # noqa: E402
import train  # noqa: E402
from lowdino import augment, demo, distributed, methods, models, settings  # noqa: E402
from lowdino.heads import DINOHead  # noqa: E402
from lowdino.report import read_log  # noqa: E402

# The parts of MobileViT.init_to_agree, and the weights that each of them sets.
PARTS = {
    "depthwise": "conv2_kxk.conv",
    "residual": "conv3_1x1.bn",
    "fusion": "conv_fusion.conv",
}


def only(*parts: str) -> Callable[[str], nn.Module]:
    """He's initialisation with the named parts of MobileViT.init_to_agree and no others."""

    def make(arch: str) -> nn.Module:
        backbone = lowdino.build_backbone(arch)
        started = {k: v.clone() for k, v in backbone.state_dict().items()}
        backbone.apply(models.init_weights)
        for name, parameter in backbone.named_parameters():
            if any(PARTS[part] in name for part in parts):
                parameter.data.copy_(started[name])
            elif "conv3_1x1.bn.weight" in name:
                nn.init.ones_(parameter)
        return backbone

    return make


AS_IT_IS = lowdino.build_backbone
NO_INFONCE = ["--infonce_weight", "0"]
VARIANTS = [
    ("as it is", AS_IT_IS, []),
    ("without InfoNCE", AS_IT_IS, NO_INFONCE),
    ("He's initialisation alone", only(), []),
    ("He's initialisation alone, without InfoNCE", only(), NO_INFONCE),
    ("... and depthwise filters near the mean", only("depthwise"), NO_INFONCE),
    ("... and residual branches at zero", only("residual"), NO_INFONCE),
    ("... and fusion near the identity", only("fusion"), NO_INFONCE),
    ("as it is, no batch norm in the head", AS_IT_IS, ["--use_bn_in_head", "false"]),
    ("as it is, Sinkhorn-Knopp", AS_IT_IS, ["--centering", "sinkhorn"]),
    ("as it is, KoLeo 0.1", AS_IT_IS, ["--koleo_weight", "0.1"]),
    ("as it is, momentum 0.996", AS_IT_IS, ["--momentum_teacher", "0.996"]),
    ("as it is, crops from 0.4", AS_IT_IS, ["--global_crops_scale", "0.4", "1"]),
]


@torch.no_grad()
def agreement(make: Callable[[str], nn.Module], arch: str, seed: int) -> float:
    """Correlation between the centred logits of the two global views of 256 demo images, in
    training mode."""
    torch.manual_seed(seed)
    backbone = make(arch).train()
    head = DINOHead(backbone.embed_dim, 1024, use_bn=True, hidden_dim=512).train()
    images, _ = demo.demo_images(range(256))
    sizes = torch.full((len(images), 2), demo.SIDE)
    crop = augment.MultiCrop(32, 32, 0, (0.2, 1.0), blur_sigma=(0.1, 2 * 32 / 224))
    views = crop(images, sizes, augment.seeded_generator("cpu", seed))
    a, b = [logits - logits.mean(0) for logits in (head(backbone(view)) for view in views)]
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def trained(make: Callable[[str], nn.Module], flags: list[str]) -> list[dict]:
    """Train from the backbone that `make` makes; the records of the log."""
    with tempfile.TemporaryDirectory() as output:
        flags = ["--preset", "small", "--device", "cpu", "--output_dir", output, *flags]
        s = settings.resolve(train.get_parser(), flags)

        def build(_, s, **steps) -> methods.DINO:
            torch.manual_seed(s.seed)
            return methods.DINO(make(s.arch), s, **steps)

        with patch.object(train, "METHODS", {"dino": build}):
            train.run(s, distributed.start("cpu"))
        return read_log(Path(output) / "log.jsonl")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--arch", default="mobilevit_xxs")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    common = ["--arch", args.arch, "--epochs", str(args.epochs), "--seed", str(args.seed)]
    rows = [
        "| change | rho | loss / ln K | I | k-NN before | k-NN after |",
        "|---|---|---|---|---|---|",
    ]
    for name, make, changes in VARIANTS:
        if make is not AS_IT_IS and not args.arch.startswith("mobilevit"):
            continue
        log = trained(make, common + changes)
        knn = [record["knn"] for record in log if "knn" in record]
        last = [record for record in log if "loss" in record][-1]
        cells = (
            f"{agreement(make, args.arch, args.seed):.2f}",
            f"{last['loss_over_lnk']:.2f}",
            f"{last['entropy_of_mean'] - last['entropy']:.2f}",
            f"{knn[0]:.3f}",
            f"{knn[-1]:.3f}",
        )
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main()

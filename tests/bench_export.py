#!/usr/bin/env python3
"""Exported netfunctions: parameters, size of the file, and milliseconds per image by PyTorch,
torch.export's program and onnxruntime, at batch 1 by one thread.

    python tests/bench_export.py --image_size 224 --backbones runs

Weights are read from runs/ARCH/backbone.pth, whose k-NN accuracy (k = 20) is then measured by
eval_knn.py with the flags behind `--`; without that file they are random. Each time is followed by
its ratio to a `resnet18` by PyTorch, timed in turns with it. Without onnx, onnxscript and
onnxruntime there is no column for them.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch
from comparison import ROOT, row, run
from torch import nn

sys.path.insert(0, str(ROOT))

import lowdino  # noqa: E402
from lowdino import export  # noqa: E402


def measured(arch: str, args: argparse.Namespace, suffixes: list[str], rival: nn.Module) -> str:
    """The row of one network."""
    weights = Path(args.backbones, arch, "backbone.pth")
    trained, side = weights.is_file(), args.image_size
    backbone = lowdino.load_backbone(str(weights)) if trained else lowdino.build_backbone(arch)
    backbone.eval()
    functions, megabytes = [rival, backbone], []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in suffixes:
            path = Path(folder, f"backbone{suffix}")
            megabytes.append(export.export(backbone, str(path), side).megabytes)
            _, read, _ = export.FORMATS[suffix]
            functions.append(read(path.read_bytes(), backbone)[1])
    x = torch.rand(1, len(backbone.mean), side, side)
    rival_ms, *times = export.milliseconds(functions, x, args.repeats)
    knn = "-"
    if trained:
        printed = run("eval_knn.py", "--weights", str(weights), "--nb_knn", "20", *args.flags)
        knn = re.search(r"\(k=20\) top-1 ([\d.]+)", printed)[1]
    millions = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    cells = [f"`{arch}`", f"{millions:.2f}", *(f"{value:.1f}" for value in megabytes)]
    return row(*cells, *(f"{ms:.1f} ({ms / rival_ms:.2f})" for ms in times), knn)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--archs", nargs="+", default=lowdino.ARCHS)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=11)
    help = "folder of ARCH/backbone.pth; without one weights are random"
    parser.add_argument("--backbones", default="-", help=help)
    parser.add_argument("flags", nargs="*", help="of eval_knn.py, behind --")
    return parser


@torch.no_grad()
def main() -> None:
    args = get_parser().parse_args()
    needed = "onnx", "onnxscript", "onnxruntime"
    suffixes = [".pt2", ".onnx"] if all(map(export.installed, needed)) else [".pt2"]
    rival = lowdino.build_backbone("resnet18").eval()
    sizes, times = (f"{suffix}, MB" for suffix in suffixes), ("PyTorch", *suffixes)
    heading = ["", "parameters (M)", *sizes, *(f"{time}, ms" for time in times), "k-NN"]
    rows = [row(*heading), "|---" * len(heading) + "|"]
    for arch in args.archs:
        rows.append(measured(arch, args, suffixes, rival))
        print(rows[-1], flush=True)
    print("\n".join(["", *rows]))


if __name__ == "__main__":
    main()

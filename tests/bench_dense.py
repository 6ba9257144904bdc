#!/usr/bin/env python3
"""The cost of a pyramid of maps over the last map alone: time and, on CUDA, memory.

    python tests/bench_dense.py --image_size 224 --batch_size 8

Forward passes in evaluation and forward and backward passes in training, timed in turns; the median
of the ratios forward_pyramid / forward_features.
"""

import argparse
import statistics
import time

import torch
from comparison import row  # this import first: it makes the library importable

import lowdino


def timed(network, forward: str, x: torch.Tensor, training: bool) -> tuple[float, int]:
    """Seconds and, on CUDA, the peak of memory in bytes."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        maps = getattr(network.train(training), forward)(x)
        last = maps[-1] if isinstance(maps, list) else maps
        total = last.float().sum()
        if training:
            total.backward()
    total.item()  # waits for the device
    peak = torch.cuda.max_memory_allocated() if x.is_cuda else 0
    return time.perf_counter() - start, peak


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--archs", nargs="+", default=lowdino.ARCHS)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    print(row("", "time, evaluation", "time, training", "memory, evaluation", "memory, training"))
    print("|---" * 5 + "|")
    for arch in args.archs:
        network = lowdino.build_backbone(arch).to(args.device)
        x = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
        times, peaks = [], []
        for training in (False, True):
            results = {}
            for i in range(args.rounds + 2):  # the first two warm up
                for forward in ("forward_features", "forward_pyramid"):
                    result = timed(network, forward, x, training)
                    if i >= 2:
                        results.setdefault(forward, []).append(result)
            pairs = list(zip(results["forward_pyramid"], results["forward_features"]))
            times.append(f"{statistics.median(a[0] / b[0] for a, b in pairs):.3f}")
            peaks.append(f"{pairs[-1][0][1] / pairs[-1][1][1]:.3f}" if x.is_cuda else "-")
        print(row(f"`{arch}`", *times, *peaks), flush=True)


if __name__ == "__main__":
    main()

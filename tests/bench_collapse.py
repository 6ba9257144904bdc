#!/usr/bin/env python3
"""What centring and sharpening are for: entropy and KL of DINO's teacher over the training with
both, with either alone, and with none (DINO, figure 7).

    python tests/bench_collapse.py --arch resnet5m --data_path DATA --output_dir runs/collapse \
        -- --epochs 2

Trains by `--preset small` without InfoNCE, four times, with the flags behind `--`; draws
entropy.svg and kl.svg into --output_dir and prints the last values. Without centring the centre
stays at 0; without sharpening the teacher has the student's temperature. A run that was stopped
goes on.
"""

import argparse
import math
from pathlib import Path

from comparison import row, run, settings

from lowdino.pictures import draw_curves
from lowdino.report import RunRecord

WAYS = {
    "both": [],
    "no sharpening": ["--teacher_temp", "0.1", "--warmup_teacher_temp", "0.1"],
    "no centring": ["--center_momentum", "1"],
}
WAYS["none"] = WAYS["no sharpening"] + WAYS["no centring"]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--arch", default="resnet5m")
    parser.add_argument("--data_path", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output_dir", default="runs/collapse")
    parser.add_argument("flags", nargs="*", help="of train.py, behind --")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    common = ["--preset", "small", "--infonce_weight", "0", "--arch", args.arch]
    common += ["--data_path", args.data_path, "--seed", str(args.seed), "--device", args.device]
    common += ["--log_freq", "1"]  # of more steps the log has the mean loss
    output = Path(args.output_dir)
    entropy, kl, knn = {}, {}, {}
    for name, way in WAYS.items():
        folder = output / name.replace(" ", "_")
        run("train.py", *args.flags, *common, "--output_dir", str(folder), *way)
        record = RunRecord(folder)
        entropy[name], kl[name] = record.curves["entropy"], record.curves["kl"]
        knn[name] = [percent / 100 for percent in record.values("knn")][-1:]
    k = settings(folder)["out_dim"]
    entropy[f"ln K = {math.log(k):.2f}"] = dict.fromkeys(entropy["both"], math.log(k))
    for file, values, heading in (("entropy", entropy, "entropy, nats"), ("kl", kl, "KL, nats")):
        (output / f"{file}.svg").write_text(draw_curves(values, "step", heading))
    rows = [row("", "entropy", "KL", "k-NN"), "|---|---|---|---|"]
    for name in WAYS:
        last = [curve[name][max(curve[name])] for curve in (entropy, kl)]
        values = [*last, *(knn[name] or [math.nan])]  # there are pictures without labels
        rows.append(row(name, *(f"{value:.3f}" for value in values)))
    print("\n".join(rows))


if __name__ == "__main__":
    main()

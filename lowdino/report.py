"""One page on a run, or on several side by side: does it learn, how fast, what does it see?

    python -m lowdino.report runs/a                                  writes runs/a/report.html
    python -m lowdino.report runs/a runs/b --output both.html

It shows log.jsonl, args.json and the pictures of a run's folder. train.py and distill.py write it
at every evaluation and at the end. It needs no other file: curves are SVG, pictures are embedded.
"""

import argparse
import base64
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from html import escape
from itertools import pairwise, product
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import lowdino
from lowdino import checkpoint, datasets, distributed, health, logger
from lowdino.distributed import UserError, user_errors
from lowdino.pictures import COLOURS, Curve, draw_curves, save_all, thinned

# -- The record of a run ---------------------------------------------------------------------------


def finite(value: object) -> float | None:
    """A number as a float; None where it is no number, or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_log(path: Path) -> list[dict]:
    """The records of a log, without an incomplete last line; a UserError where it is damaged."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        missing = f"{path.parent} holds no readable log.jsonl: give the --output_dir of a run"
        raise UserError(missing) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] + 0  # a number
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            damage = f"line {number} is not a JSON object with a step; delete it"
            raise UserError(f"{path} is damaged: {damage}") from error
        records.append(record)
    if not records:
        raise UserError(f"{path} has no line yet: wait for the run's first step")
    return records


def read_settings(path: Path) -> dict:
    """The content of args.json; an empty dict where there is no such file."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: it is not a JSON object") from error


class RunRecord:
    """The settings and numbers of a run, read from its folder; a UserError for damaged files.

    `curves` holds, by name, the numbers of the log by their step. Added are `kl`, `ln_k` and the
    k-NN accuracy in percent; `loss` is left out where the log has it over ln K.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.name = Path(folder), str(folder)
        self.records = read_log(self.folder / "log.jsonl")
        self.args = read_settings(self.folder / "args.json")
        self.facts, self.unusual = self.args.pop("run", {}), self.args.pop("unusual", [])
        self.step = max(record["step"] for record in self.records)
        self.curves: dict[str, Curve] = {}
        k = self.facts.get("out_dim")
        for record in self.records:
            numbers = {name: finite(value) for name, value in record.items()}
            for name in KNN.values() & numbers.keys():
                numbers[name] = numbers[name] and 100 * numbers[name]
            if {"entropy", "cross_entropy"} <= numbers.keys():
                pair = numbers["cross_entropy"], numbers["entropy"]
                numbers["kl"] = None if None in pair else pair[0] - pair[1]
                numbers |= {"ln_k": math.log(k)} if k else {}
            for name, number in numbers.items():
                self.curves.setdefault(name, {})[record["step"]] = number
        if "loss_over_lnk" in self.curves:
            self.curves.pop("loss", None)

    def values(self, name: str) -> list[float]:
        """The finite values of a curve."""
        return [y for _, y in sorted(self.curves.get(name, {}).items()) if y is not None]

    def verdict(self) -> str:
        """The verdict of `health.Health` on the log."""
        losses = [record["loss"] for record in self.records if "loss" in record]
        if losses and finite(losses[-1]) is None:
            return "diverging loss: the last is not finite: lower --lr, or lengthen --warmup_epochs"
        watch = health.Health(self.facts.get("out_dim"), self.facts.get("remedy", "lower --lr"))
        for record in self.records:
            metrics = {key: finite(value) for key, value in record.items() if key != "step"}
            complete = {"loss", "feature_std", "effective_rank"} <= metrics.keys()
            if complete and None not in metrics.values():
                watch.read(record["step"], **metrics)
        return watch.verdict()

    def seconds(self) -> float:
        """Time of all steps, those before a stop too."""
        images = self.args.get("batch_size_per_gpu", 0) * self.args.get("world", 1)
        speeds = sorted(self.curves.get("images_per_s", {}).items())
        intervals = pairwise([(0, None), *speeds])
        return sum((step - last) * images / v for (last, _), (step, v) in intervals if v)

    def progress(self) -> str:
        """How far it is, in words."""
        left = [record["eta_s"] for record in self.records if "eta_s" in record]
        if not left:
            return "before the first step"
        if not left[-1]:
            return f"finished after {self.step:,} steps"
        seconds, total = finite(left[-1]), finite(self.args.get("total_steps"))
        then = f", {logger.duration(seconds)} left" if seconds is not None else ""
        return f"{self.step:,}{f' of {total:,.0f}' if total else ''} steps{then}"

    def figures(self) -> dict[str, str]:
        """The key figures, by name: the first and last value of some curves, and the speed."""
        figures = {}
        for key, name, digits, unit in (
            ("knn", "k-NN accuracy", ".1f", " %"),
            ("loss_over_lnk", "loss / ln K", ".3g", ""),
            ("loss", "loss", ".3g", ""),
            ("effective_rank", "effective rank", ".1f", ""),
        ):
            if values := self.values(key):
                ends = dict.fromkeys((0, len(values) - 1))  # one where there is one value
                figures[name] = " → ".join(f"{values[i]:{digits}}" for i in ends) + unit
        figures["steps"] = f"{self.step:,}"
        if speeds := self.values("images_per_s"):
            figures["time of the steps"] = logger.duration(self.seconds())
            figures["images/s"] = f"{statistics.median(speeds):,.0f}"
        return figures


def facts(method, source: datasets.Source, device: torch.device) -> dict:
    """What the report of a run needs besides its settings and its log."""
    return {
        "version": lowdino.__version__,
        "machine": logger.machine(device),
        "images": f"{source.name}, {len(source.pretrain):,} images",
        "out_dim": method.out_dim,
        "remedy": method.remedy,
    }


# -- The page --------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1d2226; --soft: #66707a;
  --rule: #e3e6e8; --well: #24804f; --wait: #a86b00; --ill: #c0392b;
  --c0: #1b6ca8; --c1: #c0392b; --c2: #2e8b57; --c3: #8e44ad; --c4: #c77d0a; --c5: #555; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e4e7ea;
  --soft: #98a2ab; --rule: #30363c; --well: #55c08a; --wait: #e0a844; --ill: #ef7b6d;
  --c0: #6db3e8; --c1: #ef7b6d; --c2: #67c98f; --c3: #c792e0; --c4: #e8ae4d; --c5: #b5bcc2; } }
* { box-sizing: border-box; } footer { margin-top: 40px; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; } h3 { font-size: 1rem; margin: 0; }
p, figcaption { margin: 4px 0; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
.grid { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.fit { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.fit + .fit { margin-top: 16px; } .seen { columns: 2 460px; column-gap: 16px; }
.seen figure { break-inside: avoid; margin-bottom: 16px; }
.card, figure { margin: 0; padding: 16px 18px; background: var(--card); min-width: 0;
  border: 1px solid var(--rule); border-radius: 10px; }
.run { border-left: 6px solid var(--state); margin-top: 16px; }
.run h2 { color: var(--state); margin: 0; font-size: 1.3rem; }
.well { --state: var(--well); } .wait { --state: var(--wait); } .ill { --state: var(--ill); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px 20px;
  margin: 16px 0 2px; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; }
svg text { fill: var(--ink); } svg .paper { fill: none; } svg .grid { stroke: var(--rule); }
img { display: block; max-width: 100%; height: auto; margin: 10px 0 8px; border-radius: 4px; }
.small { image-rendering: pixelated; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 20px 3px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { font-weight: 600; } tr.changed td { font-weight: 600; }
summary { cursor: pointer; color: var(--soft); margin: 12px 0; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: var(--rule);
  border-radius: 4px; padding: 1px 4px; white-space: nowrap; }
"""
STYLE += "\n".join(
    f"polyline.c{i} {{ stroke: var(--c{i}) }} circle.c{i} {{ fill: var(--c{i}) }}"
    for i in range(len(COLOURS))
)


ENTROPIES = {"of an image": "entropy", "of the mean": "entropy_of_mean", "ln K": "ln_k"}
RANKS = {"features": "effective_rank", "embeddings": "embedding_rank"}
KNN = {"k-NN": "knn", "not whitened": "plain_knn", "patch dictionary": "patches_knn"}
CHARTS = (  # heading, unit, and the curves by name: their keys in `RunRecord.curves`
    ("k-NN accuracy", "%", KNN),
    ("Loss", "cross-entropy / ln K", {"loss": "loss_over_lnk"}),
    ("Loss", "loss", {"loss": "loss"}),
    ("Entropy of the teacher", "nats", ENTROPIES),
    ("KL divergence", "nats", {"KL": "kl"}),
    ("Effective rank", "directions", RANKS),
    ("Learning rate", "learning rate", {"learning rate": "lr"}),
    ("Throughput", "images/s", {"images/s": "images_per_s"}),
)
NOTES = {  # by the key of a chart's first curve
    "knn": "Held-out images, classified by their nearest training images. It should rise, above "
    "the patch dictionary, which learns nothing but k-means.",
    "loss_over_lnk": "At 1 the student knows nothing yet. It should fall.",
    "loss": "It should fall, fast at first. Its height means nothing by itself.",
    "entropy": "Both at ln K, or both near 0: a collapse. The wider apart, the better.",
    "kl": "What the student has yet to learn from the teacher. At 0 nothing is left.",
    "effective_rank": "Number of directions over which a batch scatters. Near 1 all looks alike.",
    "lr": "It follows its schedule.",
    "images_per_s": "Images per second of all ranks.",
}


def figure(heading: str, content: str, caption: str) -> str:
    caption = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure><h3>{escape(heading)}</h3>{content}{caption}</figure>"


def card(run: RunRecord, level: str) -> str:
    """The verdict on a run and its key figures, below a heading of a level."""
    heading, _, rest = run.verdict().partition(": ")
    state = {"no sign of collapse": "well", "too short to tell": "wait"}.get(heading, "ill")
    sentences = [f"{rest[0].upper()}{rest[1:]}."] if rest else []
    knn = run.values("knn")
    if len(knn) > 1:
        change = "risen" if knn[-1] > knn[0] else "not risen"
        sentences.append(f"The k-NN accuracy has {change}: {knn[0]:.1f} % → {knn[-1]:.1f} %.")
    if (loss := run.values("loss_over_lnk")) and loss[-1] > 0.98:
        sentences.append(f"The loss is still {loss[-1]:.3f} ln K: little is learned so far.")
        state = "wait" if state == "well" else state
    if not knn and (run.folder / "neighbours.png").exists():
        sentences.append("No k-NN accuracy is known: judge by the nearest neighbours below.")
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    words = re.sub(r"(--\w+(?: sinkhorn)?)", r"<code>\1</code>", words)  # flags
    figures = run.figures().items()
    terms = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    about = [run.args.get("arch"), run.args.get("method"), run.facts.get("images"), run.progress()]
    line = " · ".join(escape(str(part)) for part in about if part)
    return (
        f'<section class="card run {state}"><{level}>{escape(run.name)}</{level}>'
        f'<p class="soft">{line}</p><h2>{escape(heading.capitalize())}</h2>{words}'
        f"<dl>{terms}</dl></section>"
    )


def plots(heading: str, unit: str, keys: dict[str, str], runs: Sequence[RunRecord]) -> str:
    """A chart of `CHARTS`; of several runs a chart per number, with a curve per run."""
    several, groups = len(runs) > 1, {}
    for run, (name, key) in product(runs, keys.items()):
        curve = thinned(run.curves.get(key, {}))
        if {*curve.values()} <= {None} or (several and key == "ln_k"):
            continue
        title = heading + f", {name}" * (several and len(keys) > 1)
        groups.setdefault(title, {})[run.name if several else name] = curve
    figures = ""
    for title, curves in groups.items():
        if several and len(curves) == 1:  # which has no legend
            title += f", {next(iter(curves))}"
        gap = any(None in curve.values() for curve in curves.values())
        note = NOTES[next(iter(keys.values()))] + " In a gap it is not finite." * gap
        svg = draw_curves(curves, "step", unit, from_zero=unit != "loss")
        figures += figure(title, svg, note)
    return figures


PICTURES = dict(
    crops="Views", neighbours="Nearest neighbours", maps="Feature maps", attention="Attention"
)


def picture(run: RunRecord, name: str, several: bool) -> str:
    """A figure of one of the run's pictures; nothing where there is none."""
    path = run.folder / f"{name}.png"
    try:
        with Image.open(path) as image:
            (width, height), caption = image.size, image.info.get("caption", "")
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError:  # missing or incomplete
        return ""
    scale = max(min(480 // width, 560 // height), 1)  # a small one in whole pixels
    look = f'{"class=small " if scale > 1 else ""}style="width:{width * scale}px" alt=""'
    heading = PICTURES[name] + f", {run.name}" * several
    return figure(heading, f'<img {look} src="data:image/png;base64,{content}">', caption)


def shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def settings_table(runs: Sequence[RunRecord], names: Sequence[str], kind: str = "") -> str:
    """A row per setting, a column per run."""
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    lines = [f"<tr><th></th>{heads}</tr>"] if len(runs) > 1 else []
    for name in names:
        cells = "".join(f"<td>{escape(shown(run.args.get(name)))}</td>" for run in runs)
        lines.append(f'<tr class="{kind}"><th>{escape(name)}</th>{cells}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def all_settings(runs: Sequence[RunRecord]) -> str:
    """The settings that differ from the defaults or between the runs, and then the others."""
    names = list(dict.fromkeys(name for run in runs for name in run.args))
    unusual = {name for run in runs for name in run.unusual}
    unusual |= {n for n in names if len({str(run.args.get(n)) for run in runs}) > 1}
    first, others = ([n for n in names if (n in unusual) == kind] for kind in (True, False))
    note = "Those that differ from the defaults" + " or between the runs" * (len(runs) > 1)
    return (
        f'<h2>Settings</h2><p class="soft">{note}.</p>{settings_table(runs, first, "changed")}'
        f"<details><summary>The {len(others)} others</summary>{settings_table(runs, others)}"
        "</details>"
    )


def page(runs: Sequence[RunRecord]) -> str:
    """The report as HTML."""
    several = len(runs) > 1
    title = f"{len(runs)} runs" if several else runs[0].name
    rows = ["".join(picture(run, name, several) for run in runs) for name in PICTURES]
    # A row per kind, a picture of one run beside that of another.
    kind, rows = ("grid fit", rows) if several else ("seen", ["".join(rows)])
    pictures = "\n".join(f'<div class="{kind}">{row}</div>' for row in rows if row)
    facts = [run.facts.get("version", "?") + " on " + run.facts.get("machine", "?") for run in runs]
    by = escape("; ".join(dict.fromkeys(facts)))
    parts = [
        f"<h1>{escape(title)}</h1>" if several else "",
        *(card(run, "h3" if several else "h1") for run in runs),
        f'<h2>Curves</h2>\n<div class="grid">{"".join(plots(*c, runs) for c in CHARTS)}</div>',
        f"<h2>What the network sees</h2>\n{pictures}" if pictures else "",
        all_settings(runs),
        f'<footer class="soft">LowDINO {by}. Written {time.strftime("%Y-%m-%d %H:%M")}.</footer>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)} – LowDINO</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def write(folders: Sequence[str | Path], output: Path) -> Path:
    """Write the report of the runs in some folders to `output`; a UserError where one has none."""
    content = page([RunRecord(folder) for folder in folders])
    with user_errors(), checkpoint.atomic(output) as file:
        file.write(content.encode("utf-8", "backslashreplace"))
    return output


class Reporter:
    """Keeps the pictures and the report of a run up to date, on its first rank.

    `due` says when to draw the pictures again: they take at most SHARE of the time. `size` is the
    side of the views that the network knows.
    """

    SHARE = 1 / 50

    def __init__(self, folder: Path, size: int, device: torch.device):
        self.folder, self.size, self.device = folder, size, device
        self.next = 0.0

    @property
    def due(self) -> bool:
        return time.perf_counter() >= self.next

    def write(
        self, backbone: nn.Module, source: datasets.Source, features=None, pictures=True, page=True
    ) -> None:
        """Write the pictures, as `lowdino.pictures.save_all` does, and the page with them."""
        start = time.perf_counter()
        if pictures:
            save_all(self.folder, backbone, source, self.size, self.device, features)
            end = time.perf_counter()
            self.next = end + (end - start) / self.SHARE
        if page:
            write([self.folder], self.folder / "report.html")


def main() -> None:
    parser = argparse.ArgumentParser("python -m lowdino.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders, each the --output_dir of a run")
    parser.add_argument("--output", help="default: report.html, in the only run's folder or here")
    args = parser.parse_args()
    output = Path(args.output or Path(args.runs[0] if len(args.runs) == 1 else "") / "report.html")
    distributed.launch("report", lambda: None, lambda *_: print(write(args.runs, output)))


if __name__ == "__main__":
    main()

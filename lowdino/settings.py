"""Settings, in one pass: default < recipe < optimizer's row < fitted to data and machine < typed.

`resolve` makes the first three and what was typed into frozen `Settings`; `fit_to_data` adds what
follows from the images and the machine, and keeps the reason of each value. Nothing writes to
settings afterwards: a longer or shorter run has new ones, by `fit_epochs`.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lowdino
from lowdino import checkpoint, data, datasets, distributed
from lowdino.distributed import UserError, user_errors
from lowdino.methods import Flag, default_momentum
from lowdino.recipes import METHODS, OPTIMIZERS, RECIPES, default_recipe, preset_for

LEAST_STEPS = 2000  # where neither --epochs, --minutes nor --preset says how long a run is
IN_EPOCHS = ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer", "queue_epochs")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Values of flags as attributes, which cannot be written to."""

    values: dict[str, Any]  # of the flags that the method knows
    typed: frozenset[str] = frozenset()  # names of the flags on the command line
    row: dict[str, Any] = dataclasses.field(default_factory=dict)  # of recipes.py
    recipe: str = ""  # its name
    reasons: tuple[str, ...] = ()  # a line per value that was fitted to data and machine
    started: float = 0.0  # `time.perf_counter()` when --minutes began

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"no setting {name}") from None

    def replace(self, **values) -> "Settings":
        return dataclasses.replace(self, values=self.values | values)

    def fit(self, name: str, value: Any, reason: str) -> "Settings":
        """The settings with a value that follows from others; what was typed stays."""
        if name in self.typed or self.values[name] == value:
            return self
        shown = f"{value:.4g}" if isinstance(value, float) else value
        others = (line for line in self.reasons if not line.startswith(f"{name} "))
        reasons = (*others, f"{name} {shown}: {reason}")
        return dataclasses.replace(self, values=self.values | {name: value}, reasons=reasons)


KINDS = {"int": "a whole number", "float": "a number", "number_or_none": "a number or none"}
KINDS["true_or_false"] = "true or false"

# -- Flags -----------------------------------------------------------------------------------------

BACKBONES = f"backbone: {', '.join(lowdino.ARCHS)}"
AMP = ("auto", "bf16", "fp16", "none")
LINEAR_SCALING = "batch size that --lr refers to; 0 disables linear scaling"
CACHES = ("auto", "device", "host", "none")
BAD_IMAGES = "largest tolerated fraction of unreadable images (each is replaced)"
# The flags of --help, which the others of --help_all follow.
EVERYDAY = (
    "teacher objective data_path output_dir arch minutes epochs method preset global_crops_size "
    "batch_size_per_gpu device seed"
).split()
PLACES = f"folder, text file with one path per line, or {', '.join(datasets.NAMED)}"
AREA = dict(type=float, nargs=2, metavar=("MIN", "MAX"))
DATA_FLAGS = (
    Flag("data_path", PLACES, default="demo"),
    Flag("data_root", "folder of cifar10, cifar100 and stl10", default="data"),
    Flag("download", "fetch cifar10, cifar100 or stl10 where --data_root lacks it", bool),
    Flag("labels", "table with columns path, label and perhaps split", metavar="FILE.csv"),
    Flag("test_fraction", "share of each class to hold out as test images", float),
    Flag("device", "where to compute", default="auto", choices=("auto", "cuda", "mps", "cpu")),
    Flag("value_range", "values of 16 bits or more that become black and white", float, nargs=2),
    Flag("max_megapixels", "larger images count as unreadable", float, "> 0", 256.0),
    Flag("num_workers", "loader processes per rank; default: by the machine", int, "0 to 1000"),
)
# Flags of every training, by the heading of --help_all.
TRAINING_FLAGS = {
    "network": (
        Flag("arch", BACKBONES, default="mobilevit_s", choices=lowdino.ARCHS),
        Flag("patch_size", "side of a ViT's patches in pixels", int, "1 to 32", 16),
        Flag("drop_path_rate", "stochastic depth of a ViT's last block", float, "0 to 1"),
        Flag("init", "backbone file to start from", metavar="FILE"),
        Flag("in_chans", "number of input channels, 1 to 16", int, "1 to 16", 3),
    ),
    "optimisation": (
        Flag("optimizer", "each has its default --lr and --weight_decay", choices=(*OPTIMIZERS,)),
        Flag("epochs", "default: 30 epochs, at least 2,000 steps", int, ">= 1"),
        Flag("minutes", "length of the run in minutes, in place of --epochs", float, "> 0"),
        Flag("batch_size_per_gpu", "batch size per process", int, ">= 2"),
        Flag("lr", "peak learning rate; times total batch / lr_reference_batch", float, ">= 0"),
        Flag("lr_reference_batch", LINEAR_SCALING, int, ">= 0"),
        Flag("warmup_epochs", "epochs over which the learning rate rises", float, ">= 0"),
        Flag("min_lr", "learning rate at the end of its cosine", float, ">= 0"),
        Flag("weight_decay", "weight decay at the start", float, ">= 0"),
        Flag("weight_decay_end", "weight decay at the end of its cosine", float, ">= 0"),
        Flag("clip_grad", "limit of each parameter's gradient norm; 0: none", float, ">= 0"),
        Flag("amp", "autocast type; auto: the fastest", default="auto", choices=AMP),
    ),
    "views": (
        Flag("global_crops_size", "side of global views; default: fits the images", int, ">= 32"),
        Flag("global_crops_number", "global views per image", int, ">= 1"),
        Flag("global_crops_scale", "area of global crops, as a fraction of the image", **AREA),
        Flag("local_crops_number", "local views per image", int, ">= 0"),
        Flag("local_crops_size", "side of local views; default: 3/7 of global ones", int, ">= 32"),
        Flag("local_crops_scale", "area of local crops, as a fraction of the image", **AREA),
        Flag("vertical_flip", "probability of a top-bottom flip", float, "0 to 1"),
        Flag("jitter", "strength of colour jitter: DINO's is 1", float, "0 to 2.5"),
        Flag("grayscale", "probability of a view without colour", float, "0 to 1"),
        Flag("blur", "factor of DINO's probabilities of blur (local: 0.5)", float, "0 to 1"),
        Flag("solarize", "probability of solarising a global view but the first", float, "0 to 1"),
    ),
    "data": DATA_FLAGS,
    "output and checkpoints": (
        Flag("output_dir", "output folder; repeat the command to resume", default="output"),
        Flag("saveckp_freq", "epochs between numbered checkpoints; 0: none", int, ">= 0", 20),
        Flag("save_every_steps", "steps between checkpoints; 0: every epoch", int, ">= 0", 0),
        Flag("accept_changes", "resume although settings have changed", bool),
        Flag("skip_nonfinite", "steps in a row to undo where a loss is not finite", int, ">= 0", 0),
        Flag("max_bad_fraction", BAD_IMAGES, float, "0 to 1", 0.01),
        Flag("knn_freq", "epochs between evaluations; 0: no k-NN, no pictures", int, ">= 0", 10),
        Flag("nb_knn", "neighbours of the k-NN", int, ">= 1", 20),
        Flag("log_freq", "steps between log lines", int, ">= 1", 10),
        Flag("seed", "seed of weights, order and views", int, ">= 0", 0),
        Flag("cache", "keep decoded images; auto: where they fit", default="auto", choices=CACHES),
        Flag("compile", "torch.compile: a slow start, faster steps", bool),
    ),
}
PRESETS = tuple(name for name in RECIPES if name != "distill")
PRESET = Flag("preset", f"recipe of a paper or ours: {', '.join(PRESETS)}", choices=PRESETS)
POOLS = ("default", "mean", "max", "default+mean", "default+max")
POOL = "default: the backbone's; mean or maximum of the last map; or two side by side"
EVALUATION_FLAGS = (
    *DATA_FLAGS,
    Flag("image_size", "side of the network's input; default: fits file or images", int, ">= 32"),
    Flag("pool", POOL, default="default", choices=POOLS),
)


class Parser(argparse.ArgumentParser):
    """A parser of `Flag`s that knows what was typed; wrong flags are a UserError of one line.

    Args:
        script: its name. doc: its docstring: the first paragraph describes it, the third follows
            the flags. groups: flags by heading. positional: arguments without a flag.
    """

    def __init__(self, script: str, doc: str, groups: dict[str, Iterable[Flag]], positional=()):
        description, *rest = (" ".join(part.split()) for part in doc.strip().split("\n\n"))
        names = [flag.name.upper() for flag in positional]
        super().__init__(
            prog=script,
            description=description,
            epilog=rest[1] if len(rest) > 1 else None,
            usage=" ".join(["%(prog)s", *names, "[flags]"]),
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,
        )
        self.flags = {flag.name: flag for flags in groups.values() for flag in flags}
        self.positional = positional
        for flag, name in zip(positional, names):
            self.add_argument(flag.name, nargs=flag.nargs or "?", help=flag.help, metavar=name)
        for title, flags in groups.items():
            group = self.add_argument_group(title)
            for flag in flags:
                if flag.type is bool:
                    group.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
                    continue
                value = {int: "N", str: "NAME"}.get(flag.type, "X")
                if 0 < len(flag.choices) < 8:
                    value = f"{{{','.join(flag.choices)}}}"
                how = dict(type=flag.type, nargs=flag.nargs, help=flag.help)
                group.add_argument(f"--{flag.name}", metavar=flag.metavar or value, **how)
        group = self.add_argument_group("help")
        group.add_argument("-h", "--help", action="store_true", help="the everyday flags")
        group.add_argument("--help_all", action="store_true", help="all flags")
        # torch.distributed.launch passes it; the environment has it too.
        self.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)

    def typed(self, argv: Sequence[str] | None) -> tuple[dict[str, Any], str]:
        """The flags on the command line, each checked by itself; and "help", "help_all" or ""."""
        typed = vars(self.parse_args(argv))
        asked = [name for name in ("help_all", "help") if typed.pop(name, False)]
        typed.pop("local_rank", None)
        for name in self.flags.keys() & typed.keys():
            if wrong := self.flags[name].wrong(typed[name]):
                raise UserError(wrong)
        return typed, "".join(asked[:1])

    def defaults(self) -> dict[str, Any]:
        flags = [*self.positional, *self.flags.values()]
        return {flag.name: False if flag.type is bool else flag.default for flag in flags}

    def parse(self, argv: Sequence[str] | None, check: Callable[[Settings], str | None]):
        """`Settings` of a script without recipes; a UserError with what `check` finds wrong."""
        typed, asked = self.typed(argv)
        s = Settings(self.defaults() | typed, frozenset(typed))
        if asked:
            self.show_help(s.values, "help_all")
        for flag in self.positional:
            if flag.nargs is None and flag.name not in typed:
                raise UserError(f"{flag.name.upper()} is missing: {flag.help}")
        if wrong := check(s):
            raise UserError(wrong)
        return s

    def error(self, message: str) -> None:
        name, kind = message.split()[-1].partition("=")[0], ""
        if message.startswith("unrecognized"):
            name = next((w for w in message.split() if w.startswith("--")), name).partition("=")[0]
            flags = [f"--{flag}" for flag in self.flags]
            near = [flag for flag in flags if flag.startswith(name)]
            near = near or difflib.get_close_matches(name, flags, 1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else "--help_all lists all flags"
            message = f"{name} is unknown: {hint}"
        elif wrong := re.match(r"argument (--\w+): invalid (\w+) value: (.*)", message):
            name, kind, value = wrong.groups()
            message = f"{name} needs {KINDS.get(kind, kind)}, not {value}"
        raise UserError(message.removeprefix("argument "))

    def show_help(self, values: dict[str, Any], asked: str) -> None:
        """Print the everyday flags or all, each with its value where it is not typed, and exit."""
        for action in self._actions:
            flag = self.flags.get(action.dest)
            if asked == "help" and flag and flag.name not in EVERYDAY:
                action.help = argparse.SUPPRESS
            elif flag and not any((value := values.get(flag.name)) is x for x in (None, False)):
                shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
                action.help = f"{flag.help} (default: {shown})".replace("%", "%%")
        self.print_help()
        sys.exit(0)


# -- Resolve ---------------------------------------------------------------------------------------


def training_parser(script: str, doc: str) -> Parser:
    """All flags of train.py or distill.py."""
    if script == "distill.py":
        first = {"distillation": [*METHODS["distillation"].flags, PRESET]}
    else:
        names = [name for name in METHODS if name != "distillation"]
        method = Flag("method", f"{', '.join(names)}; default: the preset's", choices=names)
        first = {"method": [method, PRESET]}
        for flag in dict.fromkeys(flag for name in names for flag in METHODS[name].flags):
            owners = ", ".join(name for name in names if flag in METHODS[name].flags)
            first.setdefault(owners, []).append(flag)
    return Parser(script, doc, first | TRAINING_FLAGS)


def resolve(parser: Parser, argv: Sequence[str] | None = None) -> Settings:
    """What the flags alone decide; a UserError for the first thing that is wrong with them."""
    started, (typed, asked) = time.perf_counter(), parser.typed(argv)
    recipe, row = choose_recipe(typed, parser)
    method, values = METHODS[row["method"]], parser.defaults() | row
    if "preset" not in typed or "minutes" in typed:
        values["epochs"] = None  # the images or the minutes decide
    if typed.get("optimizer", row["optimizer"]) != row["optimizer"]:
        rates = OPTIMIZERS[typed["optimizer"]].items()  # a rate that is typed keeps its meaning
        values |= {k: v for k, v in rates if "lr" not in typed or "lr" not in k}
    values |= typed
    if asked:
        parser.show_help(values, asked)
    foreign = {
        flag for other in METHODS.values() for flag in other.flags if flag not in method.flags
    }
    foreign = {flag.name for flag in foreign} - {flag.name for flag in method.flags}
    if mistaken := sorted(typed.keys() & foreign):
        raise UserError(foreign_flag(mistaken[0], method.name, typed))
    values = {name: value for name, value in values.items() if name not in foreign}
    s = Settings(values, frozenset(typed), row, recipe, started=started)
    if wrong := check(s) or method.check(s):
        raise UserError(wrong)
    return s


def choose_recipe(typed: dict[str, Any], parser: Parser) -> tuple[str, dict[str, Any]]:
    """The name of the row of --preset or --method, and the row with the method's name."""
    preset = typed.get("preset")
    if "method" not in parser.flags:  # of a preset distill.py takes optimisation and views
        names = {flag.name for flags in TRAINING_FLAGS.values() for flag in flags}
        row = RECIPES[preset or "distill"]
        shared = {name: row[name] for name in row.keys() & names - {"drop_path_rate"}}
        return preset or "distill", RECIPES["distill"] | shared | {"method": "distillation"}
    owner = RECIPES[preset]["method"].name if preset else next(iter(METHODS))
    method = typed.get("method", owner)
    if preset and method != owner:
        raise UserError(f"--preset {preset} is a recipe of {owner}, not of {method}")
    recipe = preset_for(preset, typed.get("arch", "")) if preset else default_recipe(method)
    return recipe, RECIPES[recipe] | {"method": method}


def foreign_flag(name: str, method: str, typed: dict[str, Any]) -> str:
    """The sentence that refuses a flag of other methods."""
    owners = [m for m in METHODS if name in {f.name for f in METHODS[m].flags}]
    owners = ", ".join(owner for owner in owners if owner != "distillation")
    chosen = {"method", "preset"} & typed.keys()
    return f"--{name} is a flag of {owners}{f', not of {method}' if chosen else ': give --method'}"


# -- Fit -------------------------------------------------------------------------------------------


def fit_to_data(s: Settings, images: int, side: int, world: int = 1) -> Settings:
    """What follows from the number of images, a `side` that suits them, and the ranks.

    A UserError where the images are fewer than one batch, or a warm-up outlasts the run.
    """
    if s.global_crops_size is None:
        reason = "the median side of the images, 224 at most"
        if s.arch.startswith("mobilevit") and side < 48:
            side, reason = 48, "at 32 the last stage of a MobileViT sees a single position"
        s = s.fit("global_crops_size", side, reason)
    if "preset" not in s.typed:
        s = METHODS[s.method].fit(s)
        batch = max(min(s.batch_size_per_gpu, images // world), 2)
        s = s.fit("batch_size_per_gpu", batch, f"there are {images} images")
    if s.local_crops_size is None:
        local = max(round(s.global_crops_size * 3 / 7 / 16) * 16, 32)
        reason = "3/7 of the global views, in whole 16s, 32 at least"
        with_reason = s.fit("local_crops_size", local, reason)
        s = with_reason if s.local_crops_number else s.replace(local_crops_size=local)
    total = s.batch_size_per_gpu * world
    if not (steps := images // total):
        parts = f"{world} x --batch_size_per_gpu {s.batch_size_per_gpu}"
        raise UserError(f"{images} images are fewer than one batch of {total} ({parts})")
    if not s.epochs and not s.minutes:
        epochs = max(s.row["epochs"], math.ceil(LEAST_STEPS / steps))
        s = s.fit("epochs", epochs, f"{steps} steps each, {LEAST_STEPS:,} at least")
    if s.epochs:
        s = fit_epochs(s, s.epochs)
        if s.values.get("momentum_teacher", 0) is None:
            momentum = default_momentum(s.epochs * steps)
            s = s.fit("momentum_teacher", momentum, f"1 - 1 / (2 sqrt({s.epochs * steps}))")
    return s


def fit_epochs(s: Settings, epochs: float) -> Settings:
    """What counts in epochs and is not typed, fitted to a run of so many epochs.

    A value keeps its share of the recipe's epochs in a run that is longer because the images are
    few. It is at most a tenth of the run, or its share where that is more. A UserError where a
    warm-up is longer than the run.
    """
    for name in filter(s.values.__contains__, IN_EPOCHS):
        share = s.row[name] / s.row["epochs"]
        value = s.row[name] if "epochs" in s.typed else max(s.row[name], epochs * share)
        value = min(value, epochs * max(share, 0.1))
        s = s.fit(name, value, f"{value / epochs:.2g} of the run")
    if s.values.get("teacher_update") == "epoch" and epochs < 1:
        raise UserError(f"--teacher_update epoch needs an epoch, there is time for {epochs:.2g}")
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        if (value := s.values.get(name, 0)) > epochs:
            length = f"--minutes {s.minutes:g}" if s.minutes else f"--epochs {epochs:g}"
            raise UserError(f"--{name} {value:g} is longer than the training, {length}")
    return s


# -- Checks: the first thing wrong with the flags by themselves, in one sentence, or None ----------


def check(s: Settings) -> str | None:
    """Of every training."""
    if s.seed >= 2**63:
        return f"--seed must be below 2^63, not {s.seed}"
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(s, name)
        if not 0 < low <= high <= 1:
            wanted = "0 < MIN <= MAX <= 1, fractions of the image's area"
            return f"--{name} needs {wanted}, not {low} {high}"
    if s.minutes and "epochs" in s.typed:
        return "--minutes and --epochs both say how long to train: give one of them"
    if s.init is not None and not os.path.isfile(s.init):
        return f"--init {s.init} does not exist"
    return check_data(s)


def check_data(s) -> str | None:
    """Of `DATA_FLAGS`."""
    if s.test_fraction is not None and not 0 < s.test_fraction < 1:
        return f"--test_fraction must lie between 0 and 1, not {s.test_fraction}"
    for name in ("labels", "test_fraction"):
        if getattr(s, name) is not None and s.data_path in datasets.NAMED:
            why = f"{s.data_path} has labels and test images of its own"
            return f"--{name} goes with a folder or list of images; {why}"
    if s.value_range and not -math.inf < s.value_range[0] < s.value_range[1] < math.inf:
        low, high = s.value_range
        return f"--value_range needs LOW < HIGH, not {low:g} {high:g}"
    if s.value_range and s.data_path == "demo_scenes":
        return "--value_range is of values of more than 8 bits, and demo_scenes has none"
    return None


def check_evaluation(s) -> str | None:
    """Of `EVALUATION_FLAGS`."""
    for name in ("pool", "image_size", "labels", "test_fraction"):
        if s.from_features and name in s.typed:
            return f"--{name} needs the images, which --from_features does without"
    return check_data(s)


# -- Settings on disk ------------------------------------------------------------------------------

# A resumed run may change these: they decide where and how it computes, not what (rounding may
# differ). A teacher and an --init are compared by their weights, wherever their files lie.
FREE = {
    "teacher", "cache_teacher", "output_dir", "data_path", "data_root", "download", "labels",
    "device", "num_workers", "cache", "compile", "log_freq", "knn_freq", "saveckp_freq",
    "save_every_steps", "accept_changes", "skip_nonfinite", "max_bad_fraction",
}  # fmt: skip


def compared(settings: Settings, fingerprint: str, world: int) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that stopped."""
    values = {name: value for name, value in settings.values.items() if name not in FREE}
    if settings.amp == "auto":  # it takes the type that the run had
        del values["amp"]
    if settings.init:
        values["init"] = hashlib.sha256(Path(settings.init).read_bytes()).hexdigest()[:16]
    return values | {"world": world, "images": fingerprint}


@user_errors()
def write(path: Path, settings: Settings, facts: dict) -> list[str]:
    """Write all values and some facts about the run as JSON; return the lines that tell of them."""
    fitted = [reason.split()[0] for reason in settings.reasons]
    names = sorted(settings.typed & settings.values.keys())
    content = settings.values | facts | {"recipe": settings.recipe, "unusual": names + fitted}
    with checkpoint.atomic(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
    typed = ", ".join(f"{name}={settings.values[name]}" for name in names) or "nothing"
    recipe = f"recipe {settings.recipe}; typed: {typed}"
    return [recipe, *settings.reasons, f"{path} has all settings"]


def make_output_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be made: {error.strerror}") from error
    return Path(path)


# -- Images ----------------------------------------------------------------------------------------


def open_training_images(s: Settings, ranks: distributed.Ranks) -> tuple[datasets.Source, Settings]:
    """The images to learn from, and the settings fitted to them; a UserError if they do not fit."""
    kind = ranks.device.type
    if s.amp == "fp16" and kind != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA device, and this is {kind}; use bf16 or none")
    source = datasets.open_source(s, ranks.rank)
    source.set_pixel_format(channels=s.in_chans, max_megapixels=s.max_megapixels)
    images = source.pretrain
    side = s.global_crops_size or data.suitable_size(images)
    s = fit_to_data(s, len(images), side, ranks.world)
    images.replace_bad = True
    source.limit_side(2 * s.global_crops_size)  # a crop of a quarter of the area fills its view
    make_output_folder(s.output_dir)
    return source, s.replace(num_workers=data.loader_processes(images, s.num_workers))

"""Settings of a run: flags and checks that scripts share, and what follows from the data."""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import lowdino
from lowdino import checkpoint, data, datasets, distributed, parts
from lowdino.base import default_momentum
from lowdino.distributed import UserError, user_errors
from lowdino.flags import out_of_range
from lowdino.methods import METHODS
from lowdino.presets import PRESETS, recipe

# Of a training without --epochs or --minutes. The usual 30 epochs are more from 67 steps each on.
LEAST_STEPS = 2000
IN_EPOCHS = ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer", "queue_epochs")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Flags by hand, over the settings of the preset or of the recipe, over the parser's defaults.

    `args.by_hand` names the flags given by hand, `args.defaults` has what all would be without
    them, `args.usual` the epochs that the settings are made for and what they count in epochs,
    `args.started` is when --minutes begin. --help shows the defaults as the other flags leave them.
    """
    started = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("-h", "--help")]
    by_hand = given(parser, words)
    args = parser.parse_args(words)
    if hasattr(args, "method"):
        of_preset = PRESETS[args.preset].get("method", "dino") if args.preset else None
        args.method = args.method or of_preset or implied_method(by_hand)
    found = recipe(args, by_hand) | {"method": getattr(args, "method", None)}
    epochs = found["epochs"]
    if args.minutes or not args.preset:
        found["epochs"] = None  # see `settle`
    known = {name: value for name, value in found.items() if hasattr(args, name)}
    parser.set_defaults(**known)
    args = parser.parse_args(argv)
    args.started, args.by_hand = started, sorted(by_hand)
    args.defaults = {action.dest: action.default for action in parser._actions} | {"method": None}
    in_epochs = (name for name in IN_EPOCHS if hasattr(args, name) and name not in by_hand)
    args.usual = {"epochs": epochs} | {name: getattr(args, name) for name in in_epochs}
    if args.epochs:
        fit_epochs(args, max(args.epochs, 0))
    del args.local_rank
    return args


def given(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The names of the flags that are on the command line."""
    missing = object()
    names = vars(parser.parse_args(argv))
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, missing)))
    return {name for name, value in vars(found).items() if value is not missing}


def implied_method(by_hand: set[str]) -> str:
    """The method whose flags are given by hand, by default the recipe's."""
    of_methods = by_hand & set().union(*map(flags_of, METHODS))
    return next((name for name in ("emp", *METHODS) if of_methods <= flags_of(name)), "emp")


def flags_of(method: str) -> set[str]:
    """The names of the flags that a method, and not every one, knows."""
    parser = argparse.ArgumentParser()
    METHODS[method].add_flags(parser)
    return {*vars(parser.parse_args([])), *METHODS[method].shared}


def fit_epochs(args: argparse.Namespace, epochs: float) -> None:
    """Fit what is counted in epochs, and not given by hand, to the length of a training.

    Where it would take more than a tenth of the epochs and more than its own share of the preset's,
    it is cut to that. Where more epochs than the preset's are not asked for by hand, as those of a
    small folder are, it keeps its share.
    """
    for name in args.usual.keys() & set(IN_EPOCHS):
        value, share = args.usual[name], args.usual[name] / args.usual["epochs"]
        if "epochs" not in args.by_hand:
            value = max(value, epochs * share)
        setattr(args, name, min(value, epochs * max(share, 0.1)))


# ---------------------------------------------------------------------------------------------
# Flags of every training, whatever its method
# ---------------------------------------------------------------------------------------------

UNSAID = ("by_hand", "usual", "started", "defaults")  # no flags

# What a resumed run may change, because it does not change what is computed. A teacher of
# distill.py and an --init are compared by their weights, wherever their files lie.
FREE = {
    "teacher", "cache_teacher", "output_dir", "data_path", "data_root", "download", "labels",
    "device",
    "num_workers", "cache", "compile", "log_freq", "knn_freq", "saveckp_freq", "save_every_steps",
    "accept_changes", "skip_nonfinite", "max_bad_fraction", *UNSAID,
}  # fmt: skip


def write(path: Path, args: argparse.Namespace, known: dict) -> list[str]:
    """Write all flags and what is `known` beside them as JSON; in lines, what is unusual.

    Those are the flags by hand, and what differs from the defaults for the images' sake.
    """
    values = {name: value for name, value in vars(args).items() if name not in UNSAID}
    method = getattr(args, "method", None)
    foreign = set().union(*map(flags_of, METHODS)) - flags_of(method) if method else set()
    unusual = {
        name: value
        for name, value in values.items()
        if value != args.defaults.get(name) and name not in foreign
    }
    with user_errors(), checkpoint.atomic(path) as file:
        content = values | known | {"unusual": list(unusual)}
        file.write(json.dumps(content, indent=2).encode() + b"\n")
    others = f"--preset {args.preset}" if args.preset else "the recipe"
    by_hand = f", but by hand {', '.join(args.by_hand)}" if args.by_hand else ""
    return [
        f"settings of {others}{by_hand}",
        f"settings that differ from the defaults; {path.name} has all:",
        *(f"  {name}={value}" for name, value in unusual.items()),
    ]


def compared(args: argparse.Namespace, images: data.ImageArray | data.ImageFiles, world: int):
    """The settings that a resumed run must share with the one that stopped."""
    names = sorted(vars(args), key=lambda name: name not in args.by_hand)  # those asked for first
    settings = {name: getattr(args, name) for name in names if name not in FREE}
    if args.amp == "auto":  # it takes what the run had
        del settings["amp"]
    if args.init:
        settings["init"] = hashlib.sha256(Path(args.init).read_bytes()).hexdigest()[:16]
    return settings | {"world": world, "images": images.fingerprint()}


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Network, optimisation, views, data and output."""
    help = "settings of a paper, or of this project for small machines; flags given by hand win"
    parser.add_argument("--preset", choices=PRESETS, help=help)
    # torch.distributed.launch passes it; the environment has it too.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    add_network_flags(parser.add_argument_group("network").add_argument)
    add_optimisation_flags(parser.add_argument_group("optimisation").add_argument)
    add_view_flags(parser.add_argument_group("views").add_argument)
    add_output_flags(parser.add_argument_group("data and output").add_argument)


def add_network_flags(add) -> None:
    add("--arch", default="mobilevit_s", help=f"backbone: {', '.join(lowdino.ARCHS)}")
    add("--patch_size", type=int, default=16, help="side of a ViT's patches in pixels")
    help = (
        "share of images for which a ViT's last block drops a branch; the first drops none, the "
        "others between"
    )
    add("--drop_path_rate", type=float, default=0.1, help=help)
    help = "backbone file to start from: ours, or a state dict such as timm's MobileViT"
    add("--init", metavar="FILE", help=help)
    help = "channels of the images, 1 to 16: 3 for colours, 1 for grey, others for files of so many"
    add("--in_chans", type=int, default=3, metavar="N", help=help)


def add_optimisation_flags(add) -> None:
    add("--optimizer", choices=["adamw", "muon", "sgd", "lars"], default="adamw")
    help = "default: the preset's; without one 30, or what 2,000 steps take where that is more"
    add("--epochs", type=int, help=help)
    help = "in place of --epochs: steps, evaluations and saving end within so many minutes"
    add("--minutes", type=float, metavar="M", help=help)
    add("--batch_size_per_gpu", type=int, default=64, help="images a process and step")
    help = "peak learning rate, for a total batch of --lr_reference_batch"
    add("--lr", type=float, default=5e-4, help=help)
    help = "--lr scales in proportion to total batch / this; 0: never"
    add("--lr_reference_batch", type=int, default=256, help=help)
    help = "epochs over which the learning rate rises, perhaps a part of one"
    add("--warmup_epochs", type=float, default=10, help=help)
    add("--min_lr", type=float, default=1e-6, help="learning rate at the end of its cosine")
    add("--weight_decay", type=float, default=0.04, help="weight decay at the start")
    help = "weight decay at the end of its cosine"
    add("--weight_decay_end", type=float, default=0.4, help=help)
    help = "limit of each parameter's gradient norm; 0: none"
    add("--clip_grad", type=float, default=3.0, help=help)
    help = (
        "autocast type; auto: bf16 on CUDA, or fp16 on GPUs before Ampere; on a CPU the faster of "
        "bf16 and none, which is timed"
    )
    add("--amp", choices=["auto", "bf16", "fp16", "none"], default="auto", help=help)


def add_view_flags(add) -> None:
    help = "side of global views; default: suits the images, 224 at most"
    add("--global_crops_size", type=int, help=help)
    add("--global_crops_number", type=int, default=2, help="global views an image")
    area, both = dict(type=float, nargs=2, metavar=("MIN", "MAX")), "as a fraction of the image's"
    help = f"area of global crops {both}"
    add("--global_crops_scale", default=[0.4, 1.0], help=help, **area)
    add("--local_crops_number", type=int, default=8, help="local views an image")
    help = "side of local views; default: 3/7 of the global ones, 32 at least"
    add("--local_crops_size", type=int, help=help)
    add("--local_crops_scale", default=[0.05, 0.4], help=f"area of local crops {both}", **area)
    add("--vertical_flip", type=float, default=0.0, help="probability of a top-bottom flip")
    help = "strength of colour jitter: 0 for none, 1 for DINO's, which is 0.4 0.4 0.2 0.1"
    add("--jitter", type=float, default=1.0, help=help)
    add("--grayscale", type=float, default=0.2, help="probability of a view without colour")
    help = "factor of the probabilities of blur, DINO's 1, 0.1 and, of local views, 0.5; 0: none"
    add("--blur", type=float, default=1.0, help=help)
    help = "probability of solarisation, of global views but the first"
    add("--solarize", type=float, default=0.2, help=help)


def add_source_flags(add) -> None:
    """Where a named data set lies, and labels that a folder's names do not give."""
    add("--data_root", default="data", help="where cifar10, cifar100 and stl10 are kept")
    help = "fetch cifar10, cifar100 or stl10 where --data_root lacks it"
    add("--download", action="store_true", help=help)
    help = (
        "labels of a folder's or list's images: a table with the columns path (relative to the "
        "table or to the folder) and label, perhaps split (train, val or test)"
    )
    add("--labels", metavar="FILE.csv", help=help)
    help = (
        "hold out this share of each class as test images, chosen by the seed, where there are "
        "none; a training does not see them"
    )
    add("--test_fraction", type=float, metavar="F", help=help)
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    help = (
        "values that become black and white, of images of more than 8 bits; default: the "
        "network's, or what a sample of the images has"
    )
    add("--value_range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=help)
    help = (
        "larger images are unreadable; a JPEG counts as it is decoded, at 1/8 of its size perhaps"
    )
    add("--max_megapixels", type=float, default=256.0, help=help)


def add_output_flags(add) -> None:
    help = (
        "folder (with or without sub-folders), text file with one path a line, cifar10, cifar100, "
        "stl10, demo or demo_scenes"
    )
    add("--data_path", default="demo", help=help)
    add_source_flags(add)
    help = "where all is written; a run that was stopped goes on from here"
    add("--output_dir", default="output", help=help)
    help = "keep a numbered checkpoint every so many epochs; 0: none"
    add("--saveckp_freq", type=int, default=20, help=help)
    help = "also save a checkpoint every so many steps; 0: at the end of an epoch"
    add("--save_every_steps", type=int, default=0, help=help)
    help = "go on with the run in --output_dir though the settings have changed"
    add("--accept_changes", action="store_true", help=help)
    help = "leave out up to N steps in a row whose loss or gradients are not finite, and go on"
    add("--skip_nonfinite", type=int, default=0, metavar="N", help=help)
    help = "of images that may be unreadable, others standing in for them; see bad_images.txt"
    add("--max_bad_fraction", type=float, default=0.01, help=help)
    help = (
        "k-NN accuracy every so many epochs, where there are labels; 0: never, and no pictures in "
        "the report; default with --minutes: as often as a twentieth of the time allows"
    )
    add("--knn_freq", type=int, default=10, help=help)
    add("--nb_knn", type=int, default=20, help="neighbours of that k-NN")
    add("--log_freq", type=int, default=10, help="a log line every so many steps")
    add("--seed", type=int, default=0)
    help = "loader processes a rank; default: 0 for images in memory, else up to 10"
    add("--num_workers", type=int, help=help)
    help = (
        "decode each image once and keep it there; none: in every epoch; auto: on a GPU, if a "
        "quarter of it is enough, else on the host, if 2 GiB a rank are, else not"
    )
    add("--cache", choices=["auto", "device", "host", "none"], default="auto", help=help)
    help = "compile student and teacher by torch.compile: a slow start, faster steps"
    add("--compile", action="store_true", help=help)


def check_training(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of `add_training_flags`, in one sentence, or None."""
    if args.batch_size_per_gpu < 2:
        batch = args.batch_size_per_gpu
        return f"--batch_size_per_gpu must be at least 2, for batch norm's sake, not {batch}"
    if args.seed >= 2**63:
        return f"--seed must be below 2^63, not {args.seed}"
    if wrong := check_source(args) or check_reading(args):
        return wrong
    if not 1 <= args.in_chans <= 16:
        return f"--in_chans must lie between 1 and 16, not {args.in_chans}"
    if not 0 <= args.jitter <= 2.5:
        wanted = "between 0 and 2.5, where brightness falls to 0"
        return f"--jitter must lie {wanted}, not {args.jitter}"
    if wrong := out_of_range(
        args,
        above_zero=("minutes",),
        at_least_one=("epochs", "log_freq", "nb_knn", "global_crops_number"),
        not_negative=(
            "local_crops_number", "lr_reference_batch", "warmup_epochs", "min_lr", "weight_decay",
            "weight_decay_end", "clip_grad", "saveckp_freq", "save_every_steps", "skip_nonfinite",
            "knn_freq", "seed", "lr",
        ),
        fractions=(
            "vertical_flip", "grayscale", "blur", "solarize", "drop_path_rate", "max_bad_fraction",
        ),
    ):  # fmt: skip
        return wrong
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            wanted = "0 < MIN <= MAX <= 1, fractions of the image's area"
            return f"--{name} needs {wanted}, not {low} {high}"
    if getattr(args, "projector", None) and min(args.projector) < 1:
        return f"--projector needs widths of at least 1, not {args.projector}"
    for name in ("global_crops_size", "local_crops_size"):
        if getattr(args, name) is not None and getattr(args, name) < 32:
            return f"--{name} must be at least 32 pixels, not {getattr(args, name)}"
    if args.arch not in lowdino.ARCHS:
        return f"--arch {args.arch} is unknown; choose from {', '.join(lowdino.ARCHS)}"
    if not 1 <= args.patch_size <= 32:
        size = args.patch_size
        return f"--patch_size must lie between 1 and 32 pixels, the smallest view, not {size}"
    if hasattr(args, "method") and (foreign := foreign_flag(args)):
        return foreign
    if args.minutes and args.epochs:
        return "--minutes and --epochs both say how long to train; give one of them"
    if args.epochs and (wrong := check_warm_ups(args, args.epochs)):
        return wrong
    if args.init is not None and not os.path.isfile(args.init):
        return f"--init {args.init} does not exist"
    return None


def check_warm_ups(args: argparse.Namespace, epochs: float) -> str | None:
    """As `check_training`, where the number of epochs is known."""
    if getattr(args, "teacher_update", None) == "epoch" and epochs < 1:
        return f"--teacher_update epoch needs an epoch at least, and there is time for {epochs:.2g}"
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        value = getattr(args, name, 0)
        if value > epochs:
            length = f"--minutes {args.minutes:g}" if args.minutes else f"--epochs {epochs:g}"
            return f"--{name} {value:g} is longer than the training, {length}"
    return None


def foreign_flag(args: argparse.Namespace) -> str | None:
    """A flag given by hand that the method does not know, in one sentence, or None."""
    for name in args.by_hand:
        owners = [method for method in METHODS if name in flags_of(method)]
        if owners and args.method not in owners:
            return f"--{name} is a flag of --method {owners[0]}, not of {args.method}"
    return None


def check_source(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of `add_source_flags`, in one sentence, or None."""
    if args.test_fraction is not None and not 0 < args.test_fraction < 1:
        return f"--test_fraction must lie between 0 and 1, not {args.test_fraction}"
    for name in ("labels", "test_fraction"):
        if getattr(args, name) is not None and args.data_path in NAMED:
            return (
                f"--{name} goes with a folder or list of images; {args.data_path} has labels and "
                "test images of its own"
            )
    return None


def check_reading(args: argparse.Namespace) -> str | None:
    """The first thing wrong with how images are read, in one sentence, or None."""
    if args.value_range and not -math.inf < args.value_range[0] < args.value_range[1] < math.inf:
        low, high = args.value_range
        return f"--value_range needs LOW < HIGH, not {low:g} {high:g}"
    if args.value_range and args.data_path == "demo_scenes":
        return "--value_range is of values of more than 8 bits, and demo_scenes has none"
    if args.num_workers is not None and args.num_workers > 1000:
        return f"--num_workers must be at most 1000, not {args.num_workers}"
    return out_of_range(args, not_negative=("num_workers",), above_zero=("max_megapixels",))


# ---------------------------------------------------------------------------------------------
# Flags of every evaluation
# ---------------------------------------------------------------------------------------------


def add_evaluation_flags(add) -> None:
    help = (
        "folder with train/ and val/ (or test/) of class sub-folders, or any with --labels or "
        "--test_fraction; or cifar10, cifar100, stl10 or demo"
    )
    add("--data_path", default="demo", help=help)
    add_source_flags(add)
    help = "side of the network's input; default: the backbone file's, or what suits the images"
    add("--image_size", type=int, help=help)
    help = (
        "default: the backbone's own, a ConvNet's mean or a ViT's class token; mean, max: over the "
        "last feature map; or two side by side"
    )
    pools = ["default", "mean", "max", "default+mean", "default+max"]
    add("--pool", choices=pools, default="default", help=help)
    help = "loader processes; default: 0 for images in memory, else up to 10"
    add("--num_workers", type=int, help=help)


def check_evaluation(args: argparse.Namespace) -> str | None:
    """The first thing wrong with the flags of `add_evaluation_flags`, in one sentence, or None."""
    if args.from_features and (args.pool != "default" or args.image_size):
        return "--pool and --image_size need the images, which --from_features does without"
    if args.from_features and (args.labels or args.test_fraction):
        return "--labels and --test_fraction need the images, which --from_features does without"
    if args.image_size is not None and args.image_size < 32:
        return f"--image_size must be at least 32 pixels, not {args.image_size}"
    return check_source(args) or check_reading(args)


# ---------------------------------------------------------------------------------------------
# What follows from the data and the machine
# ---------------------------------------------------------------------------------------------


NAMED = tuple(datasets.NAMED)  # what --data_path takes beside files


def load_data(args: argparse.Namespace, ranks: distributed.Ranks) -> datasets.Source:
    """The data set that --data_path names, see `datasets.load`."""
    seed = args.seed if hasattr(args, "seed") else args.seeds[0]
    where = args.data_path, args.data_root, args.download
    return datasets.load(*where, args.labels, args.test_fraction, seed, ranks.rank)


def settle(args: argparse.Namespace, ranks: distributed.Ranks) -> datasets.Source:
    """Open the data of a training, and fill in what depends on it and on the machine.

    Raises:
        UserError: in one sentence, where data and settings do not go together.
    """
    parts.check_amp(args.amp, ranks.device)
    source = load_data(args, ranks)
    source.set_pixel_format(channels=args.in_chans, max_megapixels=args.max_megapixels)
    if args.global_crops_size is None:
        args.global_crops_size = data.suitable_size(source.pretrain)
    if args.local_crops_size is None:
        args.local_crops_size = max(round(args.global_crops_size * 3 / 7 / 16) * 16, 32)
    source.pretrain.replace_bad = True
    # A crop of a quarter of the area still fills its view.
    source.limit_side(2 * args.global_crops_size)
    args.num_workers = data.loader_processes(source.pretrain, args.num_workers)

    images = len(source.pretrain)
    if not args.preset and "batch_size_per_gpu" not in args.by_hand:
        args.batch_size_per_gpu = max(min(args.batch_size_per_gpu, images // ranks.world), 2)
    total = args.batch_size_per_gpu * ranks.world
    if images < total:
        raise UserError(
            f"{source.name}: {images} images are fewer than one batch of {total} "
            f"({ranks.world} x --batch_size_per_gpu {args.batch_size_per_gpu})"
        )
    if not args.epochs and not args.minutes:
        args.epochs = max(args.usual["epochs"], math.ceil(LEAST_STEPS / (images // total)))
        fit_epochs(args, args.epochs)
        if wrong := check_warm_ups(args, args.epochs):
            raise UserError(wrong)
    if args.epochs and getattr(args, "momentum_teacher", 0) is None:
        args.momentum_teacher = default_momentum(args.epochs * (images // total))
    make_output_folder(args.output_dir)
    return source


def make_output_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be made: {error.strerror}") from error
    return Path(path)


def open_data(
    args: argparse.Namespace, backbone, ranks: distributed.Ranks, labelled: bool = True
) -> tuple[datasets.Source, int, int]:
    """The images of an evaluation, the side of the network's input, and the number of workers.

    Raises:
        UserError: where `labelled` and there are no labels to test on.
    """
    source = load_data(args, ranks)
    if labelled and source.test is None:
        raise UserError(f"{source.name} has no labels to test on: {source.no_labels}")
    channels = len(getattr(backbone, "mean", (0, 0, 0)))
    source.set_pixel_format(channels=channels, max_megapixels=args.max_megapixels)
    size = args.image_size or getattr(backbone, "image_size", None)
    size = size or data.suitable_size(source.pretrain)
    source.limit_side(2 * size)
    said = data.fit_images_to_backbone(args, backbone, source)
    if said and ranks.first:
        print(f"{source.name}{said}")
    return source, size, data.loader_processes(source.pretrain, args.num_workers)

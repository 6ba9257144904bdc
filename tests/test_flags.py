"""Flags: what is refused, presets, defaults and help."""

import json
import subprocess
import sys

import conftest
import pytest
from conftest import ROOT
from runs import options

import distill
import eval_knn
import lowdino
import train
from lowdino import data, distributed, recipes, settings


def parsed(text="", script=train, **named):
    return settings.resolve(script.get_parser(), options(text, **named))


def fitted(text="", images=45_000, side=32, world=1, script=train, **named):
    return settings.fit_to_data(parsed(text, script, **named), images, side, world)


def refusal(text, script=train):
    """The sentence by which flags are refused."""
    with pytest.raises(distributed.UserError) as caught:
        parsed(text, script)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--global_crops_scale 0.4 1.4", "--global_crops_scale needs 0 < MIN <= MAX <= 1"),
        ("--local_crops_scale 0.4 0.05", "--local_crops_scale needs 0 < MIN <= MAX <= 1"),
        (
            "--epochs 5 --warmup_epochs 10",
            "--warmup_epochs 10 is longer than the training, --epochs 5",
        ),
        (
            "--preset dino --warmup_teacher_temp_epochs 101",
            "--warmup_teacher_temp_epochs 101 is longer than the training",
        ),
        ("--arch vit_huge", "--arch vit_huge is unknown: did you mean vit_base? choose from"),
        ("--batch_size_per_gpu 1", "--batch_size_per_gpu must be at least 2"),
        ("--epochs 0", "--epochs must be at least 1, not 0"),
        ("--epochs -3", "--epochs must be at least 1, not -3"),
        ("--method dino --out_dim 1", "--out_dim must be at least 2, not 1"),
        ("--seed 99999999999999999999", "--seed must be below 2^63"),
        ("--method dino --teacher_temp 0", "--teacher_temp must be above 0, not 0.0"),
        (
            "--method dino --momentum_teacher 1.5",
            "--momentum_teacher must lie between 0 and 1, not 1.5",
        ),
        ("--lr -1", "--lr must be 0 or more, not -1.0"),
        ("--lr nan", "--lr must be 0 or more, not nan"),
        ("--global_crops_size 16", "--global_crops_size must be at least 32, not 16"),
        (
            "--method dino --alpha 0.4 --local_crops_number 0",
            "--alpha balances global against local views",
        ),
        ("--init /no/such/file", "--init /no/such/file does not exist"),
        ("--init=", "--init  does not exist"),
        ("--num_workers -1", "--num_workers must lie between 0 and 1000, not -1"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(flags, message):
    with pytest.raises(distributed.UserError) as caught:
        fitted(flags)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_knn_flags_are_checked():
    def parse(text):
        return eval_knn.get_parser().parse(text.split(), eval_knn.check)

    assert parse("--pixels").pixels and parse("--arch resnet5m").arch == "resnet5m"
    assert parse("--pixels --neighbours out.PNG").neighbours == "out.PNG"
    for text, message in (
        ("--pixels --arch resnet5m", "give a backbone"),
        ("--weights= --arch resnet5m", "--weights names no file"),
        ("--pixels --neighbours out", "--neighbours out should end as a picture's name does"),
        ("--pixels --nb_knn 0", "--nb_knn must be at least 1"),
        ("--pixels --temperature 0.001", "--temperature must be at least 0.013"),
        ("--pixels --image_size 8", "--image_size must be at least 32"),
    ):
        with pytest.raises(distributed.UserError, match=f"^{message}"):
            parse(text)


# --------------------------------------------------------------------------------------------------
# Presets and defaults
# --------------------------------------------------------------------------------------------------

TABLE_2 = dict(
    epochs=100,
    batch_size_per_gpu=64,
    optimizer="sgd",
    lr=5e-4,
    min_lr=1e-6,
    warmup_epochs=10,
    weight_decay=0.04,
    weight_decay_end=0.4,
    out_dim=1024,
    momentum_teacher=0.9995,
    teacher_temp=0.04,
    student_temp=0.1,
    global_crops_scale=[0.4, 1.0],
    local_crops_scale=[0.05, 0.4],
    freeze_last_layer=0,
)


def test_presets_are_the_papers_and_flags_win():
    def has(text, **expected):
        return expected.items() <= parsed(f"--preset {text}").values.items()

    assert has("lowdino", **TABLE_2)
    more = dict(clip_grad=2.0, local_crops_number=2, norm_last_layer=False)
    assert has("lowdino --lr 0.1", **TABLE_2 | more | dict(lr=0.1))
    assert has("lowdino --arch resnet5m", local_crops_number=8)
    assert has("lowdino --arch resnet5m --local_crops_number 3", local_crops_number=3)
    cnn = dict(optimizer="lars", out_dim=4096, local_crops_number=6, use_bn_in_head=True)
    assert has("sslight --arch resnet18", **cnn, alpha=0.4, local_crops_size=128, lr=0.48)
    vit = dict(optimizer="adamw", out_dim=65536, local_crops_number=10, use_bn_in_head=False)
    assert has("sslight --arch vit_tiny", **vit, alpha=0.4)
    assert has("dino", out_dim=65536, local_crops_size=96)


@pytest.mark.parametrize("preset", settings.PRESETS)
@pytest.mark.parametrize("more", ["", "--epochs 1", "--epochs 1000"])
def test_presets_pass_their_own_checks(preset, more):
    assert fitted(f"--preset {preset} {more}").recipe == preset


def test_a_default_warm_up_never_outlasts_the_training():
    def dino(text):
        return fitted(f"--preset dino {text}")

    assert dino("--epochs 5").warmup_epochs == 0.5
    assert dino("--epochs 50").warmup_epochs == 5 and dino("").warmup_epochs == 10
    assert dino("--epochs 1000").warmup_epochs == 10
    assert dino("--epochs 5 --warmup_epochs 2").warmup_epochs == 2
    assert fitted("").warmup_epochs == 0.3 and fitted("--epochs 1").warmup_epochs == 0.1
    # A preset's own share of the epochs, where it is longer: 50 of 200.
    assert fitted("--preset sslight --epochs 20").warmup_teacher_temp_epochs == 5
    assert fitted("--preset sslight --epochs 20").warmup_epochs == 2
    assert fitted("--preset small --epochs 2").warmup_epochs == 0.2


def test_teacher_momentum_follows_from_the_number_of_steps():
    s = fitted("--preset small --batch_size_per_gpu 4 --epochs 4", images=24)
    # 24 images, 6 steps per epoch
    assert s.momentum_teacher == pytest.approx(1 - 1 / (2 * 24**0.5))


def test_settings_are_frozen():
    s = parsed()
    with pytest.raises(AttributeError):
        s.lr = 1.0
    assert s.replace(lr=1.0).lr == 1.0 and s.lr == 0.12


def test_views_are_those_that_the_flags_ask_for():
    flags = (
        "--method dino --global_crops_size 64 --global_crops_scale 0.3 0.9 "
        "--local_crops_size 48 --local_crops_scale 0.1 0.2 --local_crops_number 3 "
        "--vertical_flip 0.25"
    )
    views = data.build_views(parsed(flags), lowdino.build_backbone("mobilevit_xxs"))
    groups = [(size, *scale, len(blur)) for size, scale, blur, _ in views.groups]
    assert groups == [(64, 0.3, 0.9, 2), (48, 0.1, 0.2, 3)]
    assert views.vertical_flip == 0.25 and views.blur_sigma == pytest.approx((0.1, 2 * 64 / 224))


# --------------------------------------------------------------------------------------------------
# Help
# --------------------------------------------------------------------------------------------------

HELP = f"""
import socket, sys, runpy
def refuse(*a, **k): raise SystemExit("network touched")
socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, {str(ROOT)!r})
for script in ("train", "distill", "eval_knn", "eval_linear"):
    sys.argv = [script, "--help_all"]
    try:
        runpy.run_module(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
"""


def test_help_shows_defaults_and_touches_no_network():
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage: ") == 4, done.stderr
    assert "default: None" not in done.stdout and done.stdout.count("(default: ") > 60


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--help_all", "(default: 0.12)"),
        ("--preset sslight --help_all", "(default: 0.48)"),
        ("--optimizer sgd --help_all", "(default: 0.1)"),
    ],
)
def test_help_shows_the_defaults_that_the_other_flags_leave(flags, expected, capsys):
    with pytest.raises(SystemExit):
        parsed(flags)
    words = " ".join(capsys.readouterr().out.split())
    assert f"peak learning rate; times total batch / lr_reference_batch {expected}" in words


def test_help_shows_the_everyday_flags_first(capsys):
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            parsed(flag)
        lines = capsys.readouterr().out.splitlines()
        shown[flag] = [line.split()[0] for line in lines if line.startswith("  --")]
    everyday = [name for name in settings.EVERYDAY if name not in ("teacher", "objective")]
    assert {*shown["--help"]} == {f"--{name}" for name in everyday} | {"--help_all"}
    assert len(shown["--help_all"]) > 60 and "--koleo_weight" in shown["--help_all"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--epoch 3", "--epoch is unknown: did you mean --epochs?"),
        ("--epoch=3", "--epoch is unknown: did you mean --epochs?"),
        ("--zzz", "--zzz is unknown: --help_all lists all flags"),
        ("--preset dyno", "--preset dyno is unknown: did you mean dino? choose from emp, small"),
        ("--method din", "--method din is unknown: did you mean dino? choose from emp, dino"),
        ("--arch mobilevits", "--arch mobilevits is unknown: did you mean mobilevit_s? choose"),
        ("--lr fast", "--lr needs a number, not 'fast'"),
        ("--temperature 0.1", "--temperature is a flag of moco, simclr: give --method"),
        ("--momentum_teacher .9", "--momentum_teacher is a flag of dino, byol, moco: give"),
        ("--invariance_weight 2", "--invariance_weight is a flag of mvmr, vicreg: give --method"),
        ("--preset small --method byol", "--preset small is a recipe of dino, not of byol"),
    ],
)
def test_a_wrong_flag_gets_the_nearest_right_one(flags, message):
    assert refusal(flags).startswith(message)


# --------------------------------------------------------------------------------------------------
# Recipes, and what commit 372397f made of the same flags
# --------------------------------------------------------------------------------------------------

COLUMNS = {
    flag.name
    for heading in ("optimisation", "views")
    for flag in settings.TRAINING_FLAGS[heading]
    if flag.name not in ("minutes", "amp")
} | {"drop_path_rate"}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_a_complete_row(name):
    row = recipes.RECIPES[name]
    method = {flag.name for flag in row["method"].flags}
    of_teacher = {"teacher", "objective_weight", "teacher_size", "cache_teacher", "teacher_head"}
    assert {*row} == COLUMNS | {"method"} | (method - of_teacher)


BEFORE = json.loads((ROOT / "tests/settings_372397f.json").read_text())
# distill.py takes of a preset the optimisation and the views, not what its own flags mean.
CHANGED = "projector momentum_teacher teacher_temp temperature queue_size".split()


@pytest.mark.parametrize("case", BEFORE, ids=lambda case: " ".join(map(str, case[:5])))
def test_settings_are_those_of_before(case):
    script, flags, images, side, world, expected = case
    module, teacher = (distill, "--teacher a:b") if script == "distill" else (train, "")
    s = fitted(f"{teacher} {flags}", images, side, world, module)
    if script == "distill" and "--preset" in flags:
        expected = {name: value for name, value in expected.items() if name not in CHANGED}
    if s.arch.startswith("mobilevit") and expected.get("global_crops_size") == 32:
        expected = expected | {"global_crops_size": 48}  # since then, its least
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in s.values.items()}
    assert {name: lists[name] for name in expected} == expected


def test_the_suite_says_what_it_did_not_run():
    reasons = [conftest.SLOW] * 2 + [conftest.CUDA, "could not import 'timm': No module", *"acdb"]
    assert conftest.not_run(["Skipped: " + reason for reason in reasons]) == (
        "2 slow (give --slow), 1 cuda (no CUDA device), 1 optional packages (timm), "
        "4 other (a; b; c; 1 more reasons)"
    )
    assert conftest.not_run([]) == "nothing was skipped"

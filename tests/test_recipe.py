"""What is chosen without a preset, and what is measured: --amp auto, --minutes."""

import json
import math
import types

import pytest
import torch
from conftest import demo_array
from runs import (
    assert_equal,
    assert_same_run,
    at_step,
    options,
    records,
    saved,
    small,
    stepwise,
    terminate,
    train_here,
)
from torch import nn

import distill
import train
from lowdino import budget, datasets, distributed, settings

CPU = torch.device("cpu")


def parsed(text="", script=train, **named):
    return settings.resolve(script.get_parser(), options(text, **named))


def fitted(text="", images=45_000, side=32, world=1, script=train):
    return settings.fit_to_data(parsed(text, script), images, side, world)


# --------------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", dict(method="emp", optimizer="muon", lr=0.12, global_crops_number=4)),
        # Images and views make up 512 views per step.
        ("--global_crops_number 4", dict(method="emp", batch_size_per_gpu=128)),
        ("--global_crops_number 32", dict(method="emp", batch_size_per_gpu=16)),
        ("--global_crops_number 4 --batch_size_per_gpu 8", dict(batch_size_per_gpu=8)),
        ("--preset emp --global_crops_number 8", dict(batch_size_per_gpu=128)),
        ("--method dino", dict(optimizer="adamw", lr=2e-3, out_dim=1024)),
        ("--method dino --alpha 0.4", dict(local_crops_number=6)),
        ("--method dino --alpha 0.4 --local_crops_number 2", dict(local_crops_number=2)),
        ("--method mvmr --descriptors hog", dict(projector=[512, 512, 512])),
        ("--projector 64 64", dict(method="emp", projector=[64, 64])),
        ("--method mvmr --projector 64 64", dict(method="mvmr", projector=[64, 64])),
        ("--preset mvmr", dict(method="mvmr", lr=1e-4)),
        ("--preset dino", dict(method="dino", lr=5e-4, out_dim=65536)),
        # An optimizer has a learning rate of its own.
        ("--optimizer adamw", dict(method="emp", lr=2e-3)),
        ("--optimizer sgd", dict(method="emp", lr=0.1, lr_reference_batch=256, weight_decay=1e-4)),
        ("--preset sslight --optimizer adamw", dict(lr=2e-3, min_lr=1e-6)),
        ("--optimizer sgd --lr 1", dict(lr=1, lr_reference_batch=0, weight_decay=1e-4)),
        ("--method dino --optimizer muon", dict(lr=0.12, lr_reference_batch=0)),
    ],
)
def test_settings_follow_from_the_typed_flags(flags, expected):
    s = fitted(flags)
    assert {name: getattr(s, name) for name in expected} == expected


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", dict(optimizer="muon", lr=0.12, global_crops_number=1, objective=["similarity"])),
        ("", dict(global_crops_scale=[0.2, 1.0])),
        ("--cache_teacher t.npy", dict(global_crops_scale=[0.9, 1.0])),
        ("--teacher t.npy", dict(global_crops_scale=[0.9, 1.0])),
        ("--cache_teacher t.npy --preset small", dict(global_crops_scale=[0.2, 1.0])),
        ("--objective dino", dict(global_crops_number=2, batch_size_per_gpu=128)),
        ("--objective kd --teacher_head train", dict(temperature=3.0)),
        ("--objective simkd --teacher_head train", dict(objective=["simkd"])),
        ("--preset small", dict(optimizer="adamw", lr=2e-3, objective=["similarity"])),
        ("--preset small --objective kd --temperature 4", dict(lr=2e-3, temperature=4.0)),
        ("--optimizer adamw", dict(optimizer="adamw", lr=2e-3)),
    ],
)
def test_distillation_has_a_recipe_too(flags, expected):
    s = fitted(f"--teacher some:network {flags}", script=distill)
    assert {name: getattr(s, name) for name in expected} == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method emp --out_dim 9", "--out_dim is a flag of dino, swav, not of emp"),
        ("--preset dino --rate_eps 1", "--rate_eps is a flag of emp, not of dino"),
        ("--preset emp --descriptors hog", "--descriptors is a flag of mvmr, not of emp"),
        ("--out_dim 9 --rate_eps 1", "--out_dim is a flag of dino, swav: give --method"),
        ("--minutes 3 --epochs 2", "--minutes and --epochs both say how long to train"),
        ("--minutes 0", "--minutes must be above 0, not 0.0"),
        ("--minutes nan", "--minutes must be above 0, not nan"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(distributed.UserError, match=f"^{message}"):
        parsed(flags)


@pytest.mark.parametrize(
    "images, ranks, flags, expected",
    [
        # Never fewer than 2,000 steps.
        (45_000, 1, "", dict(epochs=30, batch_size_per_gpu=128)),
        (640, 1, "", dict(epochs=400, batch_size_per_gpu=128)),
        (640, 1, "--epochs 3", dict(epochs=3, warmup_epochs=0.3)),
        (1_281_167, 8, "", dict(epochs=30, batch_size_per_gpu=128, global_crops_size=224)),
        # A folder smaller than a batch.
        (24, 1, "", dict(epochs=2000, batch_size_per_gpu=24, warmup_epochs=20)),
        (24, 4, "", dict(epochs=2000, batch_size_per_gpu=6)),
        (45_000, 1, "--minutes 3", dict(epochs=None, warmup_epochs=0.3)),
    ],
)
def test_settings_follow_from_the_images(images, ranks, flags, expected):
    s = fitted(flags, images, 224, ranks)
    assert {name: getattr(s, name) for name in expected} == expected


def test_a_warm_up_that_is_typed_outlasts_no_training_of_the_recipe():
    with pytest.raises(
        distributed.UserError, match="--warmup_epochs 2001 is longer than the train"
    ):
        fitted("--warmup_epochs 2001")


def test_the_log_says_what_was_typed_and_why_other_values_differ(picture_folder, tmp_path, capsys):
    flags = "--arch mobilevit_xxs --epochs 1 --global_crops_number 2 --amp none --device cpu"
    train_here(options(flags, data_path=picture_folder, output_dir=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    typed = f"amp=none, arch=mobilevit_xxs, data_path={picture_folder}, device=cpu, epochs=1, "
    assert f"recipe emp; typed: {typed}global_crops_number=2, output_dir={tmp_path}" in lines
    assert "batch_size_per_gpu 24: there are 24 images" in lines
    values = json.loads((tmp_path / "args.json").read_text())
    assert values["method"] == "emp" and values["batch_size_per_gpu"] == 24
    assert "freeze_last_layer" not in values and "batch_size_per_gpu" in values["unusual"]


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def test_trials_leave_no_trace():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(module.parameters())
    parts = {"method": module, "optimizer": optimizer}
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with budget.put_back(parts):
        module(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(module[0].weight, weights["0.weight"])
    assert_equal({**module.state_dict()}, weights, "weights")
    assert optimizer.state_dict()["state"] == {}
    assert all(p.grad is None for p in module.parameters())


def with_seconds(monkeypatch, *found):
    """Let what is timed take so long."""
    calls = []

    def seconds(work, device, times=2, enough=math.inf):
        work()
        calls.append(found[len(calls)])
        return calls[-1]

    monkeypatch.setattr(budget, "seconds", seconds)
    return calls


@pytest.mark.parametrize(
    "seconds, chosen",
    [((2.0, 1.0), "bf16"), pytest.param((1.0, 0.96), "none", marks=pytest.mark.slow)],
)
def test_the_faster_autocast_is_chosen_and_kept(
    seconds, chosen, picture_folder, tmp_path, monkeypatch, capsys
):
    by_hand, auto = tmp_path / "by_hand", tmp_path / "auto"
    train_here(stepwise(picture_folder, by_hand, amp=chosen))
    capsys.readouterr()
    flags = stepwise(picture_folder, auto, amp="auto")
    calls = with_seconds(monkeypatch, *seconds)
    with at_step(2 + 5, terminate), pytest.raises(SystemExit):  # two steps are trials
        train_here(flags)
    said = "{:.3g} s in float32, {:.3g} s in bf16".format(*seconds)
    assert f"--amp {chosen}: a step takes {said}\n" in capsys.readouterr().out
    assert saved(auto)["step"] == 5 and saved(auto)["settings"]["amp"] == chosen
    train_here(flags)
    assert len(calls) == 2  # the resumed run times nothing
    # Trials change nothing: the end is that of the run whose type was given.
    assert_same_run(auto, by_hand)


def test_what_takes_too_long_is_tried_once():
    clock, made = iter([1.0] * 9), []
    found = budget.seconds(lambda: made.append(next(clock)), CPU, enough=0.0)
    assert len(made) == 1 and found > 0
    budget.seconds(lambda: made.append(next(clock)), CPU)
    assert len(made) == 1 + 3


def test_a_warm_up_by_hand_longer_than_the_minutes_is_refused(
    picture_folder, tmp_path, monkeypatch
):
    with_seconds(monkeypatch, 0.5)
    flags = small("--minutes 0.2 --knn_freq 0 --warmup_epochs 9", data_path=picture_folder)
    with pytest.raises(
        distributed.UserError, match="--warmup_epochs 9 is longer than the training, --min"
    ):
        train_here([*flags, "--output_dir", tmp_path])


def test_another_autocast_than_the_checkpoints_is_refused(
    picture_folder, tmp_path, monkeypatch, call_script
):
    flags = stepwise(picture_folder, tmp_path, "--epochs 1 --knn_freq 0")
    call_script("train.py", *flags)
    done = call_script("train.py", *flags, "--amp", "bf16", check=False)
    assert done.returncode == 2 and "cannot resume from" in done.stderr
    assert "its run has amp none, not bf16" in done.stderr


class FakeClock:
    """Time that passes only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        clock = types.SimpleNamespace(perf_counter=lambda: self.now)
        for module in (budget, settings):
            monkeypatch.setattr(module, "time", clock)


def test_an_evaluation_is_foreseen_from_its_first_batches(monkeypatch):
    clock = FakeClock(monkeypatch)

    def batches(number):
        for i in range(number):
            clock.now += 2.0 if i == 0 else 0.5  # the first waits for the loader's processes
            yield torch.zeros(10, 3), torch.zeros(10)

    sample = budget.Sample(limit=1.2)
    shared = budget.Sample(limit=9, workers=2)
    assert len(list(shared(batches(4)))) == 4
    assert shared.seconds(1000) == pytest.approx(2.5 + 980 * 0.05)
    assert len(list(sample(batches(100)))) == 4  # until more than 1.2 s have passed since the first
    assert sample.seconds(1000) == pytest.approx(2 + 990 * 0.05)
    whole = budget.Sample(limit=9)
    assert len(list(whole(batches(1)))) == 1 and whole.seconds(10) == 2.0


def test_foreseen_is_the_time_of_extraction_and_of_neighbours(monkeypatch):
    clock = FakeClock(monkeypatch)
    source = datasets.Source("some", None, demo_array(range(600)), demo_array(range(600, 1000)), 10)
    knn = budget.evaluate.knn_accuracy

    class Network(nn.Module):
        def forward(self, x):
            clock.now += 0.01 * len(x)
            return x.mean(dim=(2, 3))

    def timed(train, test, *more):
        clock.now += 1e-6 * len(train.labels) * len(test.labels)
        return knn(train, test, *more)

    monkeypatch.setattr(budget.evaluate, "knn_accuracy", timed)
    args = types.SimpleNamespace(minutes=0.1, global_crops_size=32, num_workers=0, nb_knn=5)
    ranks = distributed.Ranks(0, 1, CPU)
    # 0.03 s are over after the second batch of 256.
    found = budget.seconds_of_evaluation(Network(), args, source, ranks)
    assert found == pytest.approx(0.01 * 1000 + 1e-6 * 600 * 400)


def test_a_budget_is_spent_to_its_end(monkeypatch):
    clock = FakeClock(monkeypatch)
    plan = budget.Budget(minutes=2, started=clock.now)  # 120 s, of which 4 are not the run's
    clock.now += 6
    # Without labels: 110 s of steps.
    assert plan.plan(0, 0.5) == (220, 0)
    # Evaluations of 2 s: one at the end, 2.2 s with what it may take longer, one before the first
    # step, and others every 40 s, which are a twentieth of the steps' time.
    plan.evaluated(2.0)
    assert plan.plan(0, 0.5) == (int(105.8 / 0.525), 80)
    assert plan.plan(1, 0.5) == (1 + int(107.8 / 0.525), 80)
    # One that would take more than half of what is left is only made at the end.
    plan.evaluated(6.0)
    assert plan.plan(0, 0.5) == (int((110 - 6.6) / 0.5), 0)
    # As often as is asked for by hand, whatever it takes.
    plan.every = 20
    assert plan.plan(0, 0.5) == (int((110 - 12.6) / 0.8), 20)
    # There is always a step to do.
    clock.now += 500
    assert plan.plan(7, 0.5)[0] == 8


def test_a_plan_is_corrected_by_the_pace_of_the_steps_alone(monkeypatch):
    clock = FakeClock(monkeypatch)
    plan = budget.Budget(minutes=2, started=clock.now)
    total, _ = plan.plan(0, 0.5)
    assert total == 232 and not plan.is_due()
    clock.now += 23 * 0.5 - 0.1  # a little faster, by 1 s to the end
    assert not plan.is_due() and plan.correction(23, total) is None
    clock.now += 23 * 1.0  # half as fast
    assert plan.is_due()
    assert plan.correction(46, total) == (46 + int((116 - 34.4) / 1.0), 0)
    # A little slower is late.
    clock.now += 10.1
    assert plan.correction(56, 127) == (56 + int((116 - 44.5) / 1.01), 0)
    # An evaluation is no step's time.
    plan.evaluated(9.0)
    clock.now += 9 + 10 * 1.0
    left = 116 - 44.5 - 19 - 9.9
    assert plan.correction(66, 200) == (66 + int(left / 1.0), 0)


@pytest.mark.slow
def test_a_run_of_minutes_goes_on_to_the_end_of_its_plan(
    picture_folder, tmp_path, monkeypatch, capsys
):
    clock = FakeClock(monkeypatch)
    calls = with_seconds(monkeypatch, 0.5, 0.5, 0.5)
    text = "--minutes 0.2 --save_every_steps 1 --num_workers 0 --knn_freq 0"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def flags(out):
        return small(text, data_path=picture_folder, output_dir=out)

    # (12 - 4) s of half a second each.
    monkeypatch.setattr(budget.Budget, "correction", lambda self, step, total: None)
    train_here(flags(whole))
    assert saved(whole)["total_steps"] == saved(whole)["step"] == 16
    assert "plan: 16 steps (2.67 epochs)\n" in capsys.readouterr().out
    with at_step(1 + 5, terminate), pytest.raises(SystemExit):  # the first is a trial
        train_here(flags(stopped))
    train_here(flags(stopped))
    assert len(calls) == 2  # the resumed run makes no plan
    assert_same_run(whole, stopped)
    # A warm-up of --warmup_epochs 1 by hand, which is six steps, and a cosine over all the others.
    lr = records(whole, "lr")
    peak = saved(whole)["settings"]["lr"]
    steps = [json.loads(line)["step"] for line in (whole / "log.jsonl").open() if "lr" in line]
    expected = [
        peak * step / 5
        if step < 6
        else 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (step - 6) / 10)) / 2
        for step in (number - 1 for number in steps)
    ]
    assert lr == pytest.approx(expected)

    # Other minutes are a new plan, from where the run stands.
    more = [*flags(whole), "--minutes", "0.3", "--accept_changes"]
    train_here(more)
    assert saved(whole)["total_steps"] == 16 + 28
    assert clock.now == 1000


def test_a_run_of_minutes_corrects_its_plan(picture_folder, tmp_path, monkeypatch, capsys):
    with_seconds(monkeypatch, 0.5)
    FakeClock(monkeypatch)
    monkeypatch.setattr(budget.Budget, "is_due", lambda self: True)
    better = {2: (24, 0)}
    monkeypatch.setattr(budget.Budget, "correction", lambda self, step, total: better.get(step))
    flags = small("--minutes 0.2 --knn_freq 0", data_path=picture_folder, output_dir=tmp_path)
    train_here(flags)
    assert "plan: 24 steps (4 epochs)" in capsys.readouterr().out
    assert saved(tmp_path)["step"] == 24

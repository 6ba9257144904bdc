"""Entropy, spread and the symptoms of collapse; and that the log's numbers need no Unix."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch

from lowdino import health, logger, methods

WELL = dict(
    cross_entropy=3.5,
    entropy=2.0,
    entropy_of_mean=3.0,
    feature_std=0.3,
    effective_rank=8.0,
    teacher_moved=True,
)
UNIFORM = WELL | dict(entropy=4.15, entropy_of_mean=4.158, cross_entropy=4.159)


def test_entropy_and_spread_are_those_of_numpy():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=7)
    p[0] = [1, 0, 0, 0, 0]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1).mean()
    assert health.mean_entropy(torch.tensor(p)).item() == pytest.approx(entropy)

    x = rng.normal(size=(40, 6)) * [3, 2, 1, 0.1, 0.1, 0.1] + 1
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.T, bias=True))
    std, rank = health.spread(torch.tensor(x))
    assert std.item() == pytest.approx(math.sqrt(eigenvalues.sum()), rel=1e-4)
    assert rank.item() == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-4)
    std, rank = health.spread(torch.ones(5, 3))
    assert std.item() == pytest.approx(0, abs=1e-6) and rank.item() == pytest.approx(0, abs=1e-6)


def test_a_symptom_counts_once_it_lasts_and_until_it_is_over():
    watch = health.Health(64)
    assert watch.read(10, **UNIFORM) == [] and watch.read(200, **UNIFORM) == []
    assert watch.read(205, **WELL) == []  # it left by itself: nothing was reported
    assert watch.read(210, **UNIFORM) == [] and watch.verdict() == "no sign of collapse"
    news = watch.read(410, **UNIFORM)
    assert len(news) == 1 and news[0].startswith("uniform collapse: ")
    assert "raise --infonce_weight" in news[0]
    assert watch.read(420, **UNIFORM) == [] and watch.verdict() == news[0]  # reported once
    assert watch.read(430, **WELL) == ["uniform collapse: over"]
    assert watch.verdict() == "no sign of collapse"


@pytest.mark.parametrize("first", [1, 10, 5000])  # a run, one with rare readings, a resumed one
def test_below_two_hundred_steps_there_is_no_verdict(first):
    watch = health.Health(64)
    assert watch.verdict() == "too short to tell: 0 steps, a verdict needs 200"
    watch.read(first, **WELL)
    assert watch.verdict() == "too short to tell: 1 step, a verdict needs 200"
    watch.read(first + 198, **UNIFORM)
    verdict = watch.verdict()
    assert verdict.startswith(
        "too short to tell: 199 steps, a verdict needs 200; seen so far: uniform"
    )
    assert "raise --infonce_weight" in verdict
    watch.read(first + 198, **WELL)
    assert watch.verdict() == "too short to tell: 199 steps, a verdict needs 200"
    watch.read(first + 199, **WELL)
    assert watch.verdict() == "no sign of collapse"


def test_what_was_wrong_all_the_time_is_never_called_healthy():
    watch = health.Health(64)
    for step in range(1, 400):
        watch.read(step, **UNIFORM)
        assert "uniform collapse: " in watch.verdict()
        assert watch.verdict().startswith("too short to tell") == (step < 200)


@pytest.mark.parametrize(
    "name, flag, metrics",
    [
        # One prototype for all images; several, the same for all.
        (
            "one-cluster collapse",
            "--center_momentum",
            dict(entropy=0.01, entropy_of_mean=0.02, cross_entropy=0.03),
        ),
        ("one-cluster collapse", "--center_momentum", dict(entropy=2.0, entropy_of_mean=2.01)),
        ("dead features", "--lr", dict(feature_std=0.001)),
        ("dead features", "--lr", dict(effective_rank=1.2)),
        ("diverging loss", "--lr", dict(cross_entropy=6.0)),
        ("nothing left to learn", "--global_crops_scale", dict(cross_entropy=2.01)),
        ("collapsed embeddings", "--cosine_weight", dict(embedding_std=0.05, embedding_rank=9.0)),
        ("collapsed embeddings", "--lr", dict(embedding_std=0.9, embedding_rank=1.1)),
        ("teacher stands still", "--momentum_teacher", dict(teacher_moved=False)),
    ],
)
def test_each_symptom_alone(name, flag, metrics):
    symptoms = health.Health(64, methods.EMP.remedy).symptoms(**WELL | metrics)
    assert list(symptoms) == [name] and flag in symptoms[name]
    assert health.Health(64).symptoms(**WELL) == {}


def test_without_prototypes_the_features_alone_are_judged():
    watch = health.Health(None)
    assert watch.symptoms(feature_std=0.3, effective_rank=8.0, some_other_metric=1.0) == {}
    assert list(watch.symptoms(feature_std=0.0, effective_rank=8.0)) == ["dead features"]
    # Prototypes, but no cross-entropy: the entropies still tell of a collapse.
    metrics = {name: value for name, value in UNIFORM.items() if name != "cross_entropy"}
    assert list(health.Health(64).symptoms(**metrics)) == ["uniform collapse"]
    metrics |= dict(entropy=2.0, entropy_of_mean=3.0)
    assert health.Health(64).symptoms(**metrics) == {}


def test_without_the_resource_module_the_peak_memory_is_zero(monkeypatch):
    """As on Windows, whose Python lacks it."""
    assert logger.memory_mb(torch.device("cpu")) > 1
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("copied_logger", logger.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.memory_mb(torch.device("cpu")) == 0.0


def test_symptoms_that_take_turns_count_together():
    """A run that diverges jumps between very large and very small losses at single readings."""
    report = health.Health(64)
    turns = WELL | dict(cross_entropy=9.0), WELL | dict(feature_std=0.001)
    for step in range(10, 251, 10):
        assert report.read(step, **turns[step // 10 % 2]) == []  # neither has lasted
    assert report.verdict().startswith("dead features: ")
    report.read(260, **WELL)
    assert report.verdict() == "no sign of collapse"

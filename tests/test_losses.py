"""Losses against loops in float64 numpy, and across two ranks against one."""

import math
import textwrap

import numpy as np
import pytest
import torch
from runs import saved_by_one_and_two_ranks

from lowdino import losses
from lowdino.losses import DINOLoss, InfoNCELoss, KoLeoLoss, sinkhorn_knopp


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def loop_loss(student, teacher, center, teacher_temp, student_temp, alpha):
    """Equation by equation, one image and one pair at a time."""
    by_kind = {"global": [], "local": []}
    for i, t in enumerate(teacher):
        for j, s in enumerate(student):
            if i != j:
                h = [
                    -(
                        softmax((t[b] - center) / teacher_temp)
                        * np.log(softmax(s[b] / student_temp))
                    ).sum()
                    for b in range(len(t))
                ]
                by_kind["global" if j < 2 else "local"].append(np.mean(h))
    if alpha is None:
        return np.mean(by_kind["global"] + by_kind["local"])
    return alpha * np.mean(by_kind["global"]) + (1 - alpha) * np.mean(by_kind["local"])


def logits(views, batch=5, width=7, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale, (batch, width)) for _ in range(views)]


def tensors(arrays, **options):
    return [torch.tensor(a, dtype=torch.float32, **options) for a in arrays]


@pytest.mark.parametrize("views, alpha", [(2, None), (5, None), (5, 0.4), (10, 0.0), (3, 1.0)])
def test_dino_loss_and_centre(views, alpha):
    student, teacher = logits(views, seed=1), logits(2, seed=2)
    loss = DINOLoss(7, student_temp=0.1, center_momentum=0.9, alpha=alpha)
    center = np.zeros(7)
    for _ in range(3):
        ours = loss(tensors(student), tensors(teacher), 0.05)
        assert ours.item() == pytest.approx(
            loop_loss(student, teacher, center, 0.05, 0.1, alpha), rel=1e-5
        )
        center = 0.9 * center + 0.1 * np.concatenate(teacher).mean(axis=0)
        assert loss.center.shape == (1, 7)
        np.testing.assert_allclose(loss.center[0].numpy(), center, rtol=1e-5, atol=1e-7)


def test_dino_gradient_is_that_of_the_definition():
    student, teacher = logits(4, seed=1), logits(2, seed=2)
    ours = tensors(student, requires_grad=True)
    teacher_tensors = tensors(teacher, requires_grad=True)
    DINOLoss(7)(ours, teacher_tensors, 0.04).backward()
    reference = [torch.tensor(s, requires_grad=True) for s in student]
    pairs = [
        -(torch.tensor(teacher[i]).div(0.04).softmax(1) * reference[j].div(0.1).log_softmax(1))
        .sum(1)
        .mean()
        for i in range(2)
        for j in range(4)
        if i != j
    ]
    torch.stack(pairs).mean().backward()
    for a, b in zip(ours, reference):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-7)
    assert all(t.grad is None for t in teacher_tensors)


def test_evaluation_mode_leaves_the_centre():
    loss = DINOLoss(7).eval()
    loss(tensors(logits(2)), tensors(logits(2)), 0.04)
    assert loss.center.abs().sum() == 0


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_forward_is_targets_pairs_and_update_center(centering):
    student, teacher = tensors(logits(4, seed=1)), tensors(logits(2, seed=2))
    whole, steps = (DINOLoss(7, centering=centering, alpha=0.4) for _ in range(2))
    for _ in range(3):
        t = torch.cat(teacher)
        P_t = steps.targets(t, 0.05)
        assert P_t.dtype == torch.float32 and not P_t.requires_grad
        torch.testing.assert_close(P_t.sum(dim=1), torch.ones(10))
        loss = steps.pairs(student, P_t.chunk(2))
        steps.update_center(t)
        assert loss.item() == whole(student, teacher, 0.05).item()
        assert torch.equal(whole.center, steps.center)
    assert (steps.center.abs().sum() > 0) == (centering == "softmax")


def test_uniform_logits_give_ln_k():
    loss = DINOLoss(100)([torch.zeros(3, 100)] * 4, [torch.zeros(3, 100)] * 2, 0.04)
    assert loss.item() == pytest.approx(math.log(100))


def test_sinkhorn_is_the_alternating_normalisation():
    t = np.concatenate(logits(2, batch=6, seed=3, scale=0.3))
    q = np.exp(t / 0.07)
    for _ in range(3):
        q /= q.sum(axis=0, keepdims=True)
        q /= q.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sinkhorn_knopp(torch.tensor(t), 0.07).numpy(), q, rtol=1e-4)
    student, teacher = logits(3, batch=6, seed=4), np.split(t, 2)
    ours = DINOLoss(7, centering="sinkhorn")(tensors(student), tensors(teacher), 0.07).item()
    h = [
        -(q[i * 6 + b] * np.log(softmax(student[j][b] / 0.1))).sum()
        for i in range(2)
        for j in range(3)
        if i != j
        for b in range(6)
    ]
    assert ours == pytest.approx(np.mean(h), rel=1e-4)


def test_sinkhorn_survives_extreme_logits():
    q = sinkhorn_knopp(torch.randn(8, 50) * 100, 0.04)
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(8))


def test_loss_is_float32_under_autocast():
    student, teacher = logits(3, seed=1), logits(2, seed=2)
    exact = DINOLoss(7)(tensors(student), tensors(teacher), 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = DINOLoss(7)(tensors(student), tensors(teacher), 0.04)
        spread = KoLeoLoss()(tensors(student)[0])
        contrast = InfoNCELoss()(*tensors(student)[:2])
    assert contrast.item() == InfoNCELoss()(*tensors(student)[:2]).item()
    assert ours.dtype == spread.dtype == contrast.dtype == torch.float32
    assert ours.item() == exact.item()


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_the_steps_are_float32_for_bfloat16_logits_under_autocast(centering):
    loss = DINOLoss(7, centering=centering)
    student, teacher = (
        [v.bfloat16() for v in tensors(x)] for x in (logits(3, seed=1), logits(2, seed=2))
    )
    t = torch.cat(teacher)
    exact = loss.targets(t.float(), 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        P_t = loss.targets(t, 0.04)
        value = loss.pairs(student, P_t.chunk(2))
    assert value.dtype == P_t.dtype == torch.float32 and torch.equal(P_t, exact)
    assert value.item() == loss.pairs([s.float() for s in student], exact.chunk(2)).item()


def test_koleo_is_the_nearest_neighbours_log_distance():
    features = logits(1, batch=9, width=4, seed=5)[0]
    z = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = [min(np.linalg.norm(z[i] - z[j]) for j in range(9) if j != i) for i in range(9)]
    assert KoLeoLoss()(torch.tensor(features)).item() == pytest.approx(
        -np.mean(np.log(nearest)), rel=1e-5
    )


def test_koleo_of_identical_rows_has_a_finite_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    KoLeoLoss()(features).backward()
    assert torch.isfinite(features.grad).all()


def test_infonce_is_the_loop_over_both_views():
    a, b = logits(2, batch=6, width=4, seed=6)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    terms = []
    for first, second in ((a, b), (b, a)):
        for i in range(6):
            weights = [math.exp(first[i] @ second[j] / 0.3) for j in range(6)]
            terms.append(-math.log(weights[i] / sum(weights)))
    assert InfoNCELoss(0.3)(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(
        np.mean(terms), rel=1e-5
    )


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: DINOLoss(7, centering="mean"),
            "centering must be 'softmax' or 'sinkhorn', not 'mean'",
        ),
        (lambda: DINOLoss(7, alpha=1.5), r"must lie in \[0, 1\], not 1.5"),
        (
            lambda: DINOLoss(7, alpha=0.4)(tensors(logits(2)), tensors(logits(2)), 0.04),
            "needs local views to balance",
        ),
        (lambda: KoLeoLoss()(torch.randn(1, 4)), "needs two images at least"),
        (
            lambda: DINOLoss(7)(tensors(logits(2)), tensors(logits(1)), 0.04),
            "needs 2 teacher .* got 1 and 2",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.fixture
def two_equal_ranks(monkeypatch):
    """This process as the first of two that hold the same tensors, which must be contiguous."""

    def all_gather(gathered, x):
        assert all(tensor.is_contiguous() for tensor in (*gathered, x))
        for tensor in gathered:
            tensor.copy_(x)

    monkeypatch.setattr(losses, "world_size", lambda: 2)
    monkeypatch.setattr(losses, "rank", lambda: 0)
    monkeypatch.setattr(losses.dist, "all_gather", all_gather)
    monkeypatch.setattr(losses.dist, "all_reduce", lambda x: x.mul_(2))


def test_gathered_rows_share_their_gradient_with_nobody(two_equal_ranks):
    """A sum gives both its terms one gradient, which each of them is to double by itself."""
    a, b = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, 2)
    (weight * (losses.rows_of_all_ranks(a) + losses.rows_of_all_ranks(b))).sum().backward()
    for x in (a, b):
        assert torch.equal(x.grad, 2 * weight[:3])


def test_rows_in_any_layout_are_gathered(two_equal_ranks):
    x = torch.randn(2, 3).T
    assert torch.equal(losses.rows_of_all_ranks(x), torch.cat([x, x]))


RANKS = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    sys.path.insert(0, {root!r})
    from lowdino import distributed
    from lowdino.losses import DINOLoss, DistanceCorrelation, InfoNCELoss
    from lowdino.losses import KoLeoLoss, MVMRLoss, SimilarityLoss

    def main(_, ranks):
        rank, world = ranks.rank, ranks.world
        torch.manual_seed(0)
        x, t = torch.randn(3, 8, 6), torch.randn(2, 8, 10)  # views, images, width
        model = nn.Linear(6, 10)
        own = slice(rank * 8 // world, (rank + 1) * 8 // world)
        wrapped = DistributedDataParallel(model) if world > 1 else model
        result = {{}}
        for centering in ("softmax", "sinkhorn"):
            loss = DINOLoss(10, centering=centering, alpha=0.4)
            similarity = SimilarityLoss(10, queue_size=16)
            model.zero_grad()
            for step in range(2):
                logits = wrapped(x[:, own].flatten(0, 1)).chunk(3)
                (loss(logits, list(t[:, own]), 0.05)
                 + KoLeoLoss()(logits[0])
                 + InfoNCELoss()(*logits[:2])
                 + similarity(logits[2], t[1, own])
                 + sum(MVMRLoss()(*logits[:2], [t[0, own]]))
                 + DistanceCorrelation()(logits[1], t[1, own])).backward()
            result[centering] = [loss.center, model.weight.grad.clone(), model.bias.grad.clone()]
        if rank == 0:
            torch.save(result, {out!r})

    distributed.launch("ranks", lambda: None, main)  # as the scripts start and end
""")


@pytest.mark.slow
def test_two_ranks_give_the_centre_and_gradients_of_one(tmp_path, run_script):
    results = saved_by_one_and_two_ranks(RANKS, tmp_path, run_script)
    for centering in ("softmax", "sinkhorn"):
        for one, two in zip(results[0][centering], results[1][centering]):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        assert results[0][centering][1].abs().sum() > 0
    assert results[0]["softmax"][0].abs().sum() > 0 and results[0]["sinkhorn"][0].abs().sum() == 0

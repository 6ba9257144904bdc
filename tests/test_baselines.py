"""BYOL, MoCo, SwAV, SimCLR, VICReg and Barlow Twins: losses against loops in float64, across ranks,
what may not leak, and runs of train.py; and DINO's other teachers."""

import copy
import math
import textwrap

import bench_papers
import numpy as np
import pytest
import torch
from runs import is_one_sentence, options, saved, saved_by_one_and_two_ranks
from torch import nn

from lowdino import augment, baselines, health, losses, methods, recipes, schedules

NEW = ("byol", "moco", "swav", "simclr", "vicreg", "barlow")


class Tiny(nn.Module):
    """A convolution with a batch norm, whose statistics tell which views were one batch."""

    mean, std, embed_dim = (0.25, 0.5, 0.75), (0.5, 0.25, 0.5), 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        return self.layers(x).relu().mean(dim=(2, 3))


SMALL = dict(projector=[12, 6], out_dim=7, queue_size=10, queue_epochs=0.0)


def method_of(name, backbone=None, **given):
    torch.manual_seed(0)
    args = recipes.options(name, **SMALL | given)
    return recipes.METHODS[name](backbone or Tiny(), args, total_steps=20, epoch_steps=5)


def views_of(count=2, images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, 32, 32, generator=generator) for _ in range(count)]


def rows(count, n, width, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, width)) for _ in range(count)]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensors(arrays):
    return [torch.tensor(a) for a in arrays]


# ---------------------------------------------------------------------------------------------
# Losses, one image at a time
# ---------------------------------------------------------------------------------------------


def test_nt_xent_is_the_loop_over_all_other_views():
    a, b = rows(2, 5, 4)
    z, n = unit(np.concatenate([a, b])), 5
    terms = []
    for i in range(2 * n):
        weights = [math.exp(z[i] @ z[k] / 0.3) if k != i else 0 for k in range(2 * n)]
        terms.append(-math.log(weights[(i + n) % (2 * n)] / sum(weights)))
    assert baselines.nt_xent(*tensors([a, b]), 0.3).item() == pytest.approx(
        np.mean(terms), rel=1e-5
    )


def test_vicregs_terms_are_the_loops():
    a, b = (0.7 * x + 1 for x in rows(2, 6, 4, seed=1))
    v = c = 0
    for z in (a, b):
        n, D = z.shape
        centred = [[z[i, d] - sum(z[:, d]) / n for d in range(D)] for i in range(n)]

        def covariance(d, e, rows=centred):
            return sum(row[d] * row[e] for row in rows) / (len(rows) - 1)

        v += sum(max(0, 1 - math.sqrt(covariance(d, d) + 1e-4)) for d in range(D)) / D / 2
        c += sum(covariance(d, e) ** 2 for d in range(D) for e in range(D) if d != e) / D
    s = np.mean([(a[i, d] - b[i, d]) ** 2 for i in range(6) for d in range(4)])
    found = [x.item() for x in baselines.vicreg(*tensors([a, b]))]
    assert found == pytest.approx([s, v, c], rel=1e-5) and v > 0.1
    assert (
        baselines.vicreg(*tensors([a[:, :1], b[:, :1]]))[2] == 0
    )  # which torch.cov has no matrix of


def test_barlow_twins_terms_are_the_correlations():
    a, b = rows(2, 7, 3, seed=2)
    C = np.corrcoef(a, b, rowvar=False)[:3, 3:]
    diagonal = sum((1 - C[d, d]) ** 2 for d in range(3))
    off = sum(C[d, e] ** 2 for d in range(3) for e in range(3) if d != e)
    found = [x.item() for x in baselines.barlow_twins(*tensors([a, b]))]
    assert found == pytest.approx([diagonal, off], rel=1e-3)  # the variance has an epsilon


@pytest.mark.parametrize("local, alpha", [(0, None), (2, None), (2, 0.3)])
def test_mocos_loss_and_queue_are_the_loops(local, alpha):
    loss = baselines.MoCoLoss(4, queue_size=6, temperature=0.3, alpha=alpha)
    queue = [row.double().numpy() for row in loss.queue]
    assert np.linalg.norm(queue, axis=1) == pytest.approx(1, rel=1e-5)
    for seed in range(3):
        k, *queries = rows(2 + local, 4, 4, seed=seed)
        means = []
        for q in map(unit, queries):
            terms = []
            for i in range(4):
                positive = math.exp(q[i] @ unit(k)[i] / 0.3)
                negative = sum(math.exp(q[i] @ row / 0.3) for row in queue)
                terms.append(-math.log(positive / (positive + negative)))
            means.append(np.mean(terms))
        expected = np.mean(means)  # P_gg = 1 and P_gl = the number of local views
        if alpha is not None:
            expected = alpha * means[0] + (1 - alpha) * np.mean(means[1:])
        assert loss(tensors(queries), torch.tensor(k)).item() == pytest.approx(expected, rel=1e-5)
        queue = [*unit(k), *queue][:6]
    np.testing.assert_allclose(loss.queue.numpy(), queue, rtol=1e-5)


def test_a_batch_larger_than_the_queue_leaves_its_first_rows():
    queue = baselines.enqueued(torch.zeros(3, 1), torch.arange(5.0)[:, None])
    assert queue[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("local, alpha", [(0, None), (2, None), (2, 0.3)])
def test_byol_is_the_mean_over_pairs(local, alpha):
    method, views = method_of("byol", alpha=alpha), views_of(2 + local)
    loss = method(views)
    with torch.no_grad():
        z_t = [unit(x.double().numpy()) for x in method.teacher(views[:2])[1]["projector"].chunk(2)]
        q = method.predictor(method.student(views)[1]["projector"])
        q = [unit(x.double().numpy()) for x in q.chunk(len(views))]
    of = {"global": [], "local": []}
    for i in range(2):
        for j in range(len(views)):
            if i != j:
                terms = [2 - 2 * q[j][b] @ z_t[i][b] for b in range(4)]
                of["global" if j < 2 else "local"].append(np.mean(terms))
    expected = np.mean(of["global"] + of["local"])
    if alpha is not None:
        expected = alpha * np.mean(of["global"]) + (1 - alpha) * np.mean(of["local"])
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def sinkhorn(s, eps):
    Q = np.exp(s / eps)
    for _ in range(3):
        Q /= Q.sum(axis=0, keepdims=True)
        Q /= Q.sum(axis=1, keepdims=True)
    return Q


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_swav_is_the_mean_over_swapped_views(alpha):
    """In the last step the queue, of ten embeddings of each view, is full and takes part."""
    method = method_of("swav", teacher_temp=0.3, alpha=alpha)
    method.prototypes.weight.data.normal_()
    queue = [[], []]
    for step in range(4):
        views = views_of(4, seed=step)
        twin = method_of("swav")
        twin.load_state_dict(method.state_dict())
        loss = method(views, step=step)
        with torch.no_grad():
            z = twin.student(views)[1]["projector"].double().numpy()
        C = unit(method.prototypes.weight.detach().double().numpy())
        z = [unit(x) for x in np.split(z, 4)]
        terms = {"global": [], "local": []}
        for i in range(2):
            own = z[i] @ C.T
            if len(queue[i]) == 10:
                own = np.concatenate([own, np.array(queue[i]) @ C.T])
            q = sinkhorn(own, 0.3)[:4]
            for j in range(4):
                if j != i:
                    p = np.exp(z[j] @ C.T / 0.1)
                    p /= p.sum(axis=1, keepdims=True)
                    entropy = np.mean(-(q * np.log(p)).sum(axis=1))
                    terms["global" if j < 2 else "local"].append(entropy)
            queue[i] = [*z[i], *queue[i]][:10]
        expected = np.mean(terms["global"] + terms["local"])
        if alpha is not None:
            expected = alpha * np.mean(terms["global"]) + (1 - alpha) * np.mean(terms["local"])
        assert loss.item() == pytest.approx(expected, rel=1e-4), step
    assert len(queue[0]) == 10


def test_the_queue_waits_for_its_epoch_and_prototypes_for_theirs():
    early, late = method_of("swav"), method_of("swav", queue_epochs=2.0)
    for step in range(12):
        views = views_of(seed=step)
        same = early(views, step=step).item() == late(views, step=step).item()
        # Ten embeddings are there after three batches of four; two epochs are ten steps.
        assert same == (step < 3 or step >= 10), step
    assert torch.equal(early.queue, late.queue)
    loss = early(views_of(), step=4)
    for step in (4, 5):
        loss = early(views_of(), step=step)
        early.zero_grad()
        loss.backward()
        early.before_step(step)
        assert (early.prototypes.weight.grad is None) == (step < 5)


def test_a_queue_that_was_full_is_not_after_another_state():
    """As where steps are timed and taken back: zeros are no embeddings."""
    method, fresh = method_of("swav"), method_of("swav")
    for step in range(4):
        method(views_of(seed=step), step=step)
    assert method.full
    method.load_state_dict(fresh.state_dict())
    assert method(views_of()).item() == fresh(views_of()).item()


# ---------------------------------------------------------------------------------------------
# Teachers
# ---------------------------------------------------------------------------------------------


def test_mocos_queries_and_keys_come_in_parts_of_different_images(monkeypatch):
    """Batch norm would tell a query which key was of its batch, the others being of the queue."""
    seen = {}

    def look(loss, queries, k):
        seen.update(queries=queries, k=k)
        return queries[0].sum()

    monkeypatch.setattr(baselines.MoCoLoss, "forward", look)
    method, views = method_of("moco"), [view.requires_grad_() for view in views_of(3, images=9)]
    norm = copy.deepcopy(method.teacher)
    method(views, step=3)

    for j, part in ((0, slice(5)), (7, slice(5, 9))):  # an image of each part
        for query, view in zip(seen["queries"], views[1:]):
            (gradient,) = torch.autograd.grad(query[j].sum(), view, retain_graph=True)
            inside = torch.zeros(9, dtype=torch.bool)
            inside[part] = True
            assert torch.equal(gradient.flatten(1).any(dim=1), inside)  # what the query depends on
    stream = schedules.Stream.KEY_ORDER
    order = torch.randperm(9, generator=augment.seeded_generator("cpu", stream, 0, 3))
    for part in (order[:5], order[5:]):
        expected = norm([views[0][part]])[1]["projector"]
        torch.testing.assert_close(seen["k"][part], expected)
    assert not seen["k"].requires_grad and set(order[:5].tolist()) != set(range(5))


def test_mocos_queries_are_in_the_order_of_views_and_images():
    """Without batch norm the parts change nothing."""
    method, views = method_of("moco"), views_of(4, images=9)
    method.eval()
    features, z = method.student(views[1:])
    for found, expected in zip(method.queries(views[1:]), (features, z["projector"])):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "images, ranks, sizes",
    [(3, 1, [3]), (25, 1, [13, 12]), (128, 1, [32] * 4), (512, 1, [64] * 8), (32, 8, [4] * 8)],
)
def test_sizes_of_mocos_parts(images, ranks, sizes, monkeypatch):
    monkeypatch.setattr(losses, "world_size", lambda: ranks)
    assert [len(part) for part in method_of("moco").parts(torch.zeros(images, 1))] == sizes


def test_mocos_momentum_is_fixed_and_byols_rises_to_one():
    for name, expected in (("moco", [0.9, 0.9]), ("byol", [0.9, 1.0])):
        for step, momentum in zip((0, 20), expected):
            method = method_of(name, momentum_teacher=0.9)
            before = method.teacher.backbone.layers[0].weight.clone()
            method.student.backbone.layers[0].weight.data += 1.0
            method(views_of(), step=step)
            method.after_step(step)
            assert method.metrics()["momentum"] == pytest.approx(momentum)
            moved = method.teacher.backbone.layers[0].weight - before
            torch.testing.assert_close(moved, torch.full_like(moved, 1 - momentum))


@pytest.mark.parametrize("update", ["step", "epoch", "momentum"])
def test_dinos_other_teachers(update):
    """The student of the step before, or of the end of the epoch before (five steps)."""
    given = dict(hidden_dim=12, freeze_last_layer=0, teacher_update=update)
    method = method_of("dino", **given)
    for p in method.student.parameters():  # of a size at which it keeps learning
        p.data += 0.3 * torch.randn_like(p)
    method.teacher.load_state_dict(method.student.state_dict())
    optimizer, students = torch.optim.SGD(method.parameters(), lr=1e-2), []
    for step in range(12):
        teacher = method.teacher.backbone.layers[0].weight.clone()
        expected = {"step": step - 1, "epoch": step // 5 * 5 - 1}.get(update)
        if expected is not None and expected >= 0:
            assert torch.equal(teacher, students[expected]), step
        loss = method(views_of(seed=step), step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step)
        students.append(method.student.backbone.layers[0].weight.detach().clone())
        assert method.metrics()["teacher_moved"], step
    assert not any(torch.equal(a, b) for a, b in zip(students, students[1:]))


# ---------------------------------------------------------------------------------------------
# Ranks, health, runs
# ---------------------------------------------------------------------------------------------


class Counting(Tiny):
    """Counts the passes of images: a forward 1, a backward 2. A copy of it counts too."""

    passes = 0

    def forward(self, x):
        Counting.passes += len(x) * (3 if torch.is_grad_enabled() else 1)
        return super().forward(x)


@pytest.mark.parametrize("name", [name for name in recipes.METHODS if name != "distillation"])
def test_passes_an_image(name, monkeypatch):
    """Those by which the papers' tables are given equal compute."""
    monkeypatch.setattr(Counting, "passes", 0)
    monkeypatch.setattr(methods, "plain_view", lambda batch, size, backbone: batch)
    method = method_of(
        name, Counting(), projector=[12, 6], descriptors=["pixels"], patches_weight=0
    )
    views = views_of(recipes.RECIPES["emp"]["global_crops_number"] if name == "emp" else 2)
    method(views, views[0])
    assert Counting.passes == bench_papers.PASSES[name] * len(views[0])


RANKS = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    sys.path.insert(0, {root!r})
    from lowdino import distributed, recipes

    class Flat(nn.Module):  # without batch norm, whose statistics each rank has for itself
        embed_dim = 6
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 6)
        def forward(self, x):
            return self.layer(x.flatten(1)).tanh()

    def main(_, ranks):
        rank, world = ranks.rank, ranks.world
        own, result = slice(rank * 8 // world, (rank + 1) * 8 // world), {{}}
        torch.manual_seed(0)
        views = torch.randn(4, 3, 8, 3, 2, 2)  # steps, views, images
        for name in {names!r}:
            torch.manual_seed(1)
            args = recipes.options(
                name, projector=[6], out_dim=7, queue_size=16, queue_epochs=0.0, temperature=0.3,
                freeze_last_layer=0, teacher_temp=0.1, alpha=0.4,
            )
            method = recipes.METHODS[name](Flat(), args, 4, 2)
            if name == "byol":
                method.predictor = nn.Linear(6, 6)
            wrapped = DistributedDataParallel(method) if world > 1 else method
            optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
            count = 3 if name in ("byol", "moco", "swav") else 2
            for step in range(4):
                optimizer.zero_grad()
                wrapped(list(views[step][:count, own]), step=step).backward()
                optimizer.step()
                method.after_step(step)
            result[name] = method.state_dict()
        if rank == 0:
            torch.save(result, {out!r})

    distributed.launch("ranks", lambda: None, main)
""")


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(tmp_path, run_script):
    """All weights, teachers and queues after four steps."""
    code = RANKS.replace("{names!r}", repr(NEW))
    one, two = saved_by_one_and_two_ranks(code, tmp_path, run_script)
    for name in NEW:
        for key, value in one[name].items():
            other = two[name][key]
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("name", NEW)
def test_collapsed_embeddings_are_told_with_a_flag_of_the_method(name):
    method = method_of(name)
    projector = method.student.heads["projector"]
    last = [layer for layer in projector if isinstance(layer, nn.Linear)][-1]
    last.weight.data.zero_()
    last.bias.data.fill_(0.3)
    method(views_of())
    found = health.Health(method.out_dim, method.remedy).symptoms(**method.metrics())
    assert "collapsed embeddings" in found and found["collapsed embeddings"].endswith(method.remedy)
    flags = [word.strip(",") for word in method.remedy.split() if word.startswith("--")]
    known = vars(recipes.options(name))
    assert flags and all(flag == "--lr" or flag[2:] in known for flag in flags)


# MoCo has a teacher and a queue, all that a method keeps beside its networks.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "moco")) for name in NEW]
)
def test_a_run_goes_on_bit_for_bit(
    name, picture_folder, tmp_path, call_script, stopped_after_a_checkpoint
):
    text = (
        f"--method {name} --arch mobilevit_xxs --epochs 2 --batch_size_per_gpu 8 --projector 16 8"
    )
    text += " --num_workers 0 --device cpu --amp none --log_freq 1 --knn_freq 1 --nb_knn 5"
    flags = options(text, data_path=picture_folder)
    if name in ("byol", "moco", "swav"):
        flags += ["--local_crops_number", 1, "--alpha", 0.4]
    if name in ("moco", "swav"):
        flags += ["--queue_size", 16]
    done = call_script("train.py", *flags, "--output_dir", tmp_path / "whole")
    assert "embedding_rank" in done.stdout and "k-NN (k=5) of the student" in done.stdout
    stopped_after_a_checkpoint("train.py", *flags, "--output_dir", tmp_path / "stopped")
    call_script("train.py", *flags, "--output_dir", tmp_path / "stopped")
    whole, resumed = (saved(tmp_path / folder)["method"] for folder in ("whole", "stopped"))
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method byol --alpha 0.4 --local_crops_number 0", "--local_crops_number is 0"),
        (
            "--method simclr --alpha 0.4",
            "is a flag of dino, byol, moco, swav, not of simclr",
        ),
        (
            "--method vicreg --local_crops_number 2",
            "compares two views: --local_crops_number 0",
        ),
        ("--method moco --queue_size 16", "--queue_size 16 is smaller than a batch"),
        ("--method swav --queue_size 16", "--queue_size 16 is smaller than a batch"),
        ("--method moco --momentum_teacher none", "moco has a fixed --momentum_teacher"),
        ("--method emp --teacher_update step", "--teacher_update is a flag of dino, not of emp"),
        ("--method byol --global_crops_number 4", "byol takes --global_crops_number 2, not 4"),
        ("--method barlow --redundancy_weight -1", "--redundancy_weight must be 0 or more"),
        (
            "--method vicreg --invariance_weight 0 --variance_weight 0 --covariance_weight 0",
            "nothing to learn",
        ),
    ],
)
def test_flags_that_do_not_fit(flags, message, call_script, tmp_path):
    given = options(flags, output_dir=tmp_path / "x")
    assert is_one_sentence(call_script("train.py", *given, check=False), message)


def test_pairs_of_views_are_checked():
    with pytest.raises(ValueError, match="needs 2 teacher and at least 2 student views, got 1"):
        losses.mean_over_pairs(baselines.mean_dot, views_of(2), views_of(1))

"""Distillation: losses against loops in float64, the script from outside, flags that do not fit."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import losses_on_a_batch
from runs import assert_equal, is_one_sentence, options, records, saved
from teaching import (
    Counted,
    batch_of_demo,
    distill_method,
    parse,
    save_teacher,
    student,
    two_corners,
)

import lowdino
from lowdino import distributed
from lowdino.distillation import kd_term
from lowdino.losses import KDLoss, SimilarityLoss, SimKDLoss


def softmax(row):
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def unit(row):
    length = math.sqrt(sum(value**2 for value in row))
    return [value / length for value in row]


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def test_kd_is_the_softened_divergence():
    s, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    loss = KDLoss(temperature=2.5)(s, t)
    by_hand = 0.0
    for a, b in zip(s.tolist(), t.tolist()):
        p_s, p_t = softmax([v / 2.5 for v in a]), softmax([v / 2.5 for v in b])
        by_hand += 2.5**2 * sum(q * math.log(q / p) for p, q in zip(p_s, p_t)) / 5
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert s.grad.abs().sum() > 0 and t.grad is None


def test_simkd_is_the_mean_squared_difference():
    s, t = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = SimKDLoss()(s, t)
    by_hand = sum((a - b) ** 2 for x, y in zip(s.tolist(), t.tolist()) for a, b in zip(x, y)) / 24
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    loss.backward()
    assert s.grad.abs().sum() > 0 and t.grad is None


def test_similarity_looks_at_the_batch_and_the_last_images():
    loss, history = SimilarityLoss(dim=6, queue_size=5, student_temp=0.2, teacher_temp=0.1), []
    for _ in range(4):  # the queue is empty, half full, full, full
        s, t = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
        value = loss(s, t)
        batch = [unit(row) for row in t.tolist()]
        anchors = batch + history[:5]
        history = batch + history
        two_views = SimilarityLoss(6, 0)(torch.cat([s, s]), t)
        torch.testing.assert_close(two_views, SimilarityLoss(6, 0)(s, t))
        by_hand = 0.0
        for a, b in zip(s.tolist(), t.tolist()):
            p_s = softmax([sum(x * y for x, y in zip(unit(a), q)) / 0.2 for q in anchors])
            p_t = softmax([sum(x * y for x, y in zip(unit(b), q)) / 0.1 for q in anchors])
            by_hand -= sum(q * math.log(p) for p, q in zip(p_s, p_t)) / 3
        assert value.item() == pytest.approx(by_hand, rel=1e-5)
        value.backward()
        assert s.grad.isfinite().all() and s.grad.abs().sum() > 0 and t.grad is None
    loss.eval()
    before = loss.queue.clone()
    loss(torch.randn(3, 6), torch.randn(3, 6))
    assert torch.equal(loss.queue, before)  # evaluation leaves no trace


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["kd", "simkd", "similarity", "mvmr"])
def test_an_objective_is_learned_on_a_batch(objective):
    queue = " --queue_size 0" * (objective == "similarity")
    method = distill_method(Counted(), f"--objective {objective}{queue}")
    batch = batch_of_demo(range(16))
    views = two_corners(batch)
    losses = losses_on_a_batch(method, views, batch)
    floor = 0.0
    if objective == "similarity":  # a cross-entropy's least value is the entropy of its target
        targets = method.teacher.targets(views, batch.indices, method.backbone)
        t = torch.nn.functional.normalize(targets, dim=1)
        floor = torch.special.entr((t @ t.T / 0.01).softmax(dim=1)).sum(dim=1).mean().item()
    assert losses[-1] - floor < 0.7 * (losses[0] - floor), losses


def test_the_loss_is_the_objectives_by_their_weights():
    flags = "--objective kd simkd --objective_weight 0.5 3 --local_crops_number 1"
    method, batch = distill_method(Counted(), flags), batch_of_demo(range(8))
    views = [*two_corners(batch), torch.randn(8, 3, 32, 32)]
    loss = method(views, batch).item()
    _, outputs = method.student(views)
    t = method.teacher.targets(views, batch.indices, method.backbone)
    kd, simkd = KDLoss(3.0)(outputs["kd"], t), SimKDLoss()(outputs["simkd"], t)
    assert loss == pytest.approx(0.5 * kd.item() + 3 * simkd.item(), rel=1e-5)
    metrics = method.metrics()
    assert metrics["kd"] == pytest.approx(kd.item(), rel=1e-5)
    assert metrics["simkd"] == pytest.approx(simkd.item(), rel=1e-5)


def test_kd_follows_the_classifier_in_the_teachers_file(tmp_path):
    weight, bias = torch.randn(10, 320), torch.randn(10)
    path = save_teacher(tmp_path / "teacher.pth", classifier={"weight": weight, "bias": bias})
    flags = "--objective kd --teacher_head file --temperature 2 --kd_weight 0.7"
    method = distill_method(None, flags, teacher=path)
    logits, features, labels = torch.randn(6, 10), torch.randn(6, 320), torch.arange(6)
    theirs = (features @ weight.T + bias).tolist()
    by_hand = 0.0
    for s, t, label in zip(logits.tolist(), theirs, labels.tolist()):
        p_s, p_t = softmax([v / 2 for v in s]), softmax([v / 2 for v in t])
        by_hand += 0.7 * 4 * sum(q * math.log(q / p) for p, q in zip(p_s, p_t)) / 6
        by_hand -= 0.3 * math.log(softmax(s)[label]) / 6
    term = kd_term(method, logits, features, labels)
    assert term.item() == pytest.approx(by_hand, rel=1e-4)


def test_heads_stand_in_one_order():
    for objectives in ("simkd similarity", "similarity simkd"):
        method = distill_method(Counted(), f"--objective {objectives}")
        assert list(method.student.heads) == ["simkd", "similarity"]


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------

FOUR_OBJECTIVES = (
    "--objective kd simkd similarity --objective_weight 1 2 0.5 --teacher_head train "
    "--kd_weight 0.5"
)


@pytest.mark.parametrize(
    "flags, said",
    [
        pytest.param("--objective kd", None, marks=pytest.mark.slow),
        ("--objective kd --match pool --local_crops_number 1", None),
        pytest.param(
            "--objective mvmr kd --projector 32 16 --local_crops_number 1",
            None,
            marks=pytest.mark.slow,
        ),
        (FOUR_OBJECTIVES, "on the student's through simkd's projector"),
    ],
)
def test_objectives_alone_and_together(flags, said, picture_folder, tmp_path, call_script):
    teacher, out = save_teacher(tmp_path / "teacher.pth"), tmp_path / "out"
    flags = student(flags, teacher=teacher, data_path=picture_folder, output_dir=out)
    printed = call_script("distill.py", *flags).stdout
    assert re.search(
        r"k-NN \(k=20\) accuracy: (\d.\d+) after 2 epochs, (\d.\d+) before the first, "
        r"of the teacher (\d.\d+)",
        printed,
    )
    assert "k-NN (k=20) of the student " in printed
    assert ("the teacher's classifier: 1.0000 on its features" in printed) == bool(said)
    assert (said or "") in printed
    losses = records(out, "loss")
    assert len(losses) == 4
    if said:  # the second line is of one step, the third
        kd, simkd, similarity = (records(out, name)[1] for name in ("kd", "simkd", "similarity"))
        assert losses[1] == pytest.approx(kd + 2 * simkd + 0.5 * similarity, rel=1e-5)
    assert lowdino.load_backbone(str(out / "backbone.pth")).arch == "mobilevit_xxs"


def test_a_student_without_buffers_may_leave_steps_out(picture_folder, tmp_path, call_script):
    flags = student("--arch vit_tiny --epochs 1 --skip_nonfinite 1 --knn_freq 0 --warmup_epochs 0")
    named = dict(teacher=save_teacher(tmp_path / "t.pth"), data_path=picture_folder)
    done = call_script("distill.py", *flags, *options(output_dir=tmp_path / "out", **named))
    assert "backbone: " in done.stdout


@pytest.mark.slow
# The latter has no buffers.
@pytest.mark.parametrize("arch, use_bn", [("mobilevit_xxs", "true"), ("vit_tiny", "false")])
def test_dino_objective_takes_the_head_of_a_run(
    arch, use_bn, picture_folder, tmp_path, call_script
):
    run, out = tmp_path / "run", tmp_path / "out"
    head = f"--out_dim 16 --hidden_dim 32 --use_bn_in_head {use_bn} --norm_last_layer false"
    head = f"--method dino {head}"
    flags = student("--epochs 1 --warmup_epochs 0 --local_crops_number 0 --knn_freq 0 " + head)
    call_script("train.py", *flags, *options(data_path=picture_folder, output_dir=run))
    flags = student(teacher=run / "checkpoint.pth", data_path=picture_folder)
    dino = options(f"--arch {arch} --objective dino --local_crops_number 1", output_dir=out)
    done = call_script("distill.py", *flags, *dino)
    assert "of the average student" in done.stdout and "of the teacher" in done.stdout
    method = saved(out)["method"]
    backbone = lowdino.load_backbone(str(out / "backbone.pth"))
    assert isinstance(backbone.whitening, torch.nn.Linear)
    backbone.whitening = torch.nn.Identity()  # the file's alone
    kept = backbone.state_dict()
    average = {name: method[f"average_student.backbone.{name}"] for name in kept}
    assert all(torch.equal(value, kept[name]) for name, value in average.items())
    trained = {name: method[f"student.backbone.{name}"] for name in kept}
    assert not any(torch.equal(average[n], v) for n, v in trained.items() if v.ndim > 1)
    assert all(average[n].abs().sum() > 0 for n in kept if n.endswith("running_mean"))
    # Another script's folder is refused.
    done = call_script("distill.py", *flags, *options(output_dir=run), check=False)
    assert is_one_sentence(done, "cannot resume from")


@pytest.mark.slow
def test_a_stopped_distillation_goes_on_to_the_same_end(
    picture_folder, tmp_path, call_script, stopped_after_a_checkpoint
):
    flags = student(
        "--objective simkd similarity --queue_size 20",
        teacher=save_teacher(tmp_path / "teacher.pth"),
        data_path=picture_folder,
        cache_teacher=tmp_path / "cache.npy",
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    call_script("distill.py", *flags, "--output_dir", whole)
    stopped_after_a_checkpoint("distill.py", *flags, "--output_dir", stopped)
    done = call_script("distill.py", *flags, "--output_dir", stopped)
    assert "resuming from" in done.stdout
    ends = [saved(folder)["method"] for folder in (whole, stopped)]
    assert ends[0]["losses.similarity.queue"].abs().sum() > 0
    assert_equal(*ends, "method")


@pytest.mark.slow
def test_two_ranks_distil_too(picture_folder, tmp_path, run_script):
    flags = student(
        "--objective kd similarity --teacher_head train",
        teacher=save_teacher(tmp_path / "teacher.pth"),
        data_path=picture_folder,
    )
    caches = []
    for ranks in (1, 2):
        own = options(cache_teacher=tmp_path / f"{ranks}.npy", output_dir=tmp_path / f"{ranks}")
        printed = run_script("distill.py", *flags, *own, ranks=ranks).stdout
        assert printed.count("the teacher's classifier: ") == 1
        assert ", of the teacher " in printed
        caches.append(torch.from_numpy(np.load(tmp_path / f"{ranks}.npy")))
    one, two = caches
    assert one.shape == (24, 320) and one.float().std() > 0
    # Each image's features are in its own row.
    torch.testing.assert_close(one, two, atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--objective kd kd", "--objective names one twice"),
        (
            "--objective kd dino --objective_weight 1",
            "--objective_weight needs a number for each of kd dino",
        ),
        ("--objective_weight 0", "--objective_weight must be above 0"),
        ("--objective kd --kd_weight 0.5", "--kd_weight below 1 weighs labels"),
        ("--objective kd --match pool --teacher_head train", "--match pool goes with"),
        ("--temperature 4", "--temperature is a flag of --objective kd"),
        ("--objective kd --queue_size 9", "--queue_size is a flag of --objective similarity"),
        (
            "--objective similarity --teacher_head train",
            "--teacher_head is used by --objective kd and simkd",
        ),
        (
            "--objective dino --cache_teacher a.npy",
            "--objective dino needs the teacher's logits for every view",
        ),
        ("--teacher resnet18", "--teacher resnet18 would have random weights"),
        (
            "--teacher a.npz --cache_teacher b.npy",
            "--cache_teacher and --teacher_size need a teacher that is a network",
        ),
        ("--cache_teacher b", "--cache_teacher should end in .npy"),
        (
            "--teacher a.npz --objective kd --teacher_head file",
            "--teacher_head file needs a teacher's file of weights",
        ),
        (
            "--teacher a.npz --teacher_head train --objective simkd",
            "--teacher_head train with a file of features",
        ),
        ("--teacher a.npy --objective dino", "--objective dino needs the teacher's head"),
        ("--teacher_size 3", "--teacher_size must be at least 32"),
        ("--temperature 0", "--temperature must be above 0"),
        ("--kd_weight 2", "--kd_weight must lie between 0 and 1"),
        ("--queue_size -1", "--queue_size must be 0 or more"),
        ("--projector 0", "--projector must be at least 1"),
        ("--epochs 0", "--epochs must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(distributed.UserError, match=f"^{message}"):
        parse(*flags.split())


def test_presets_serve_distillation_too():
    args = parse("--preset", "small")
    assert (args.lr, args.epochs, args.local_crops_number) == (2e-3, 30, 0)
    assert args.teacher_temp == 0.04 and not hasattr(args, "out_dim")
    # What SSLight's alpha balances are views, no labels: there is no such flag here.
    args = parse("--preset", "sslight")
    assert args.kd_weight == 1.0 and not hasattr(args, "alpha")

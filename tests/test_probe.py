"""The probe against autograd, float64 and scikit-learn's objective; eval_linear.py from outside."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import eval_linear
import lowdino
from lowdino import data, distributed, evaluate, linear, optim, probe


def blobs(n, classes=4, width=12, seed=0):
    """Gaussian classes that overlap, in directions of very different variance: (n, width), (n,)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = rng.permutation(np.arange(n) % classes)
    x = (centres[labels] + 1.5 * rng.normal(size=(n, width))) * np.geomspace(1, 0.01, width)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def test_half_whitening_is_that_of_eigenvalues():
    x = blobs(300)[0]
    y = probe.HalfWhitening(x)(x).double().numpy()
    assert y.shape == (300, 13) and (y[:, -1] == 1).all()
    y = y[:, :-1]
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    assert (y**2).sum(1).mean() == pytest.approx(1, rel=1e-4)
    before = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))
    before /= before.sum()
    expected = before / np.sqrt(before + 1e-5)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(np.cov(y.T, bias=True)), expected / expected.sum(), rtol=1e-3, atol=1e-6
    )


def test_symmetric_whitening_does_not_rotate():
    """Features of equal variance in all directions, whose eigenvectors are rounding's, stay."""
    x = torch.linalg.qr(torch.randn(300, 12, generator=torch.Generator().manual_seed(0))).Q
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x)).T  # the covariance is 1 / 300
    matrix = probe.HalfWhitening(x).symmetric
    torch.testing.assert_close(matrix / matrix[0, 0], torch.eye(12), atol=1e-4, rtol=0)
    whitening = probe.HalfWhitening(blobs(300)[0])
    symmetric, matrix = whitening.symmetric, whitening.matrix
    torch.testing.assert_close(symmetric, symmetric.T)
    torch.testing.assert_close(symmetric @ symmetric, matrix @ matrix.T, atol=1e-3, rtol=1e-4)


def test_probes_are_separate_classifiers_trained_by_sgd():
    x, labels = blobs(64)
    x = probe.HalfWhitening(x)(x)
    settings = [(0.5, 0.0), (5.0, 1e-3), (20.0, 1e-1)]
    together = probe.Probes(settings, x.shape[1], 4)
    factors = [1.0, 0.7, 0.2, 0.1]
    for factor in factors:
        together.step(x, labels, factor)
    for g, (lr, decay) in enumerate(settings):
        weight = torch.zeros(x.shape[1], 4, dtype=torch.float64, requires_grad=True)
        velocity = 0
        for factor in factors:
            loss = F.cross_entropy(x.double() @ weight, labels)
            loss = loss + 0.5 * decay * weight[:-1].square().sum()
            velocity = 0.9 * velocity + torch.autograd.grad(loss, weight)[0]
            weight = (weight - factor * lr * velocity).detach().requires_grad_()
        torch.testing.assert_close(
            together.classifiers()[:, g].double(), weight.detach(), atol=1e-5, rtol=1e-4
        )


def test_sure_classifiers_make_no_denormal_numbers():
    labels = torch.arange(8) % 2
    x = F.pad(2.0 * labels[:, None] - 1, (0, 1), value=1.0)  # one feature, -1 or 1
    probes = probe.Probes([(1e3, 0.0)], 2, 2)
    for _ in range(900):  # a velocity that nothing feeds falls to 0.9^900 = 7e-42
        probes.step(x, labels, 1.0)
    assert evaluate.accuracy(x @ probes.classifiers()[:, 0], labels) == 1
    assert (probes.velocity[:, 0].abs() > torch.finfo(torch.float32).tiny).all()


def optimum(x, labels, classes, decay):
    """The convex optimum by Newton's method in float64: (D + 1, C)."""
    x, target = x.double(), F.one_hot(labels, classes).double()
    shape = (x.shape[1], classes)
    penalty = torch.full(shape, decay, dtype=torch.float64)
    penalty[-1] = 0
    weight = torch.zeros(shape, dtype=torch.float64)
    for _ in range(30):
        p = (x @ weight).softmax(1)
        gradient = x.T @ (p - target) / len(x) + penalty * weight
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = torch.einsum("nd,ne,ncf->dcef", x, x, curvature) / len(x)
        hessian = hessian.reshape(weight.numel(), -1)
        hessian += torch.diag(penalty.flatten() + 1e-12)  # the bias is free up to a constant
        weight -= torch.linalg.lstsq(hessian, gradient.flatten()[:, None]).solution.view(shape)
    assert gradient.abs().max() < 1e-9
    return weight


def test_logistic_regression_reaches_the_optimum_and_sgd_its_accuracy():
    (x, labels), (test, test_labels) = blobs(600), blobs(2000, seed=1)
    whitening = probe.HalfWhitening(x)
    x, test = whitening(x), whitening(test)
    decays = [1e-4, 1e-2, 1e-3]  # in any order
    weights = probe.logistic_regression(x, labels, 4, decays)
    assert weights.shape == (13, 3, 4)
    accuracies = []
    for g, decay in enumerate(decays):
        best = optimum(x, labels, 4, decay)
        torch.testing.assert_close(
            weights[:-1, g].double(), best[:-1], atol=2e-3 * best.abs().max().item(), rtol=0
        )
        accuracies.append(evaluate.accuracy(test.double() @ best, test_labels))
    trained = probe.train_probes(x, labels, 4, [(10.0, decay) for decay in decays], steps=200)
    for g in range(3):
        accuracy = evaluate.accuracy(test @ trained[:, g], test_labels)
        assert accuracy == pytest.approx(accuracies[g], abs=0.005)
    assert min(accuracies) > 0.5


def test_brier_scores_equal_a_loop_and_forgive_a_wrong_scale():
    (x, labels), generator = blobs(20), torch.Generator().manual_seed(0)
    weights = torch.randn(12, 3, 4, generator=generator)
    scores = probe.brier_scores(x, labels, weights)
    for g, score in enumerate(scores):
        at_scales = []
        for scale in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
            p = np.exp(scale * (x.double() @ weights[:, g].double()).numpy())
            p /= p.sum(axis=1, keepdims=True)
            errors = [(p[i, c] - (labels[i] == c).item()) ** 2 for i in range(20) for c in range(4)]
            at_scales.append(sum(errors) / 20)
        assert score == pytest.approx(min(at_scales), rel=1e-5)
    optimal = probe.logistic_regression(x, labels, 4, [1e-2])
    scores = probe.brier_scores(x, labels, torch.cat([optimal, 16 * optimal, -optimal], dim=1))
    assert scores[0] < 0.7 and scores[2] >= 0.75
    assert scores[1] == pytest.approx(scores[0].item(), rel=0.05)


def test_label_subsets_are_balanced_nested_and_of_the_labels_alone():
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)[order]
    small, large = probe.label_subset(labels, 0.1, 3), probe.label_subset(labels, 0.5, 3)
    assert torch.bincount(labels[small]).tolist() == [4, 2, 1]
    assert torch.bincount(labels[large]).tolist() == [20, 10, 5]
    assert set(small.tolist()) < set(large.tolist()) and small.tolist() == sorted(small.tolist())
    assert small.tolist() != probe.label_subset(labels, 0.1, 4).tolist()
    assert probe.label_subset(labels, 1.0, 0).tolist() == list(range(70))
    with pytest.raises(
        ValueError,
        match="a fraction of 0.01 of the labels leaves class 0, of 40 images, without one",
    ):
        probe.label_subset(labels, 0.01, 0)
    with pytest.raises(ValueError, match="class 1 has no training image"):
        probe.label_subset(torch.tensor([0, 2]), 1.0, 0)


def test_held_out_images_are_balanced_and_apart():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 3)
    inner, held_out = probe.split_for_choice(labels, 0.2, 0)
    assert torch.bincount(labels[held_out]).tolist() == [8, 4]
    assert sorted([*inner.tolist(), *held_out.tolist()]) == list(range(63))
    with pytest.raises(ValueError, match="6 labels are too few to hold 0.2 of each class out"):
        probe.split_for_choice(torch.tensor([0, 0, 0, 1, 1, 1]), 0.2, 0)


def test_learning_rates_fall_from_block_to_block():
    backbone, head = lowdino.build_backbone("resnet5m"), nn.Linear(512, 3)
    groups = optim.layerwise_groups(backbone, head, 0.5)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    parameters = [*backbone.parameters(), *head.parameters()]
    assert len(scale) == len(parameters) == sum(len(g["params"]) for g in groups)
    assert scale[id(head.weight)] == scale[id(head.bias)] == 1
    depths = {"layer3.0.conv1": 1, "layer2.5.conv1": 2, "layer2.0.bn1": 7}
    depths |= {"layer1.0.conv2": 10, "bn1": 11, "conv1": 12}
    for name, depth in depths.items():
        assert scale[id(backbone.get_submodule(name).weight)] == 0.5**depth, name
    for group in groups:
        undecayed = group.get("weight_decay") == 0
        assert all((p.ndim <= 1) == undecayed for p in group["params"])


def test_cost_is_counted():
    cost = linear.cost(nn.Conv2d(3, 8, 3, padding=1, bias=False), 32, torch.device("cpu"))
    assert cost["multiply_adds_M"] == pytest.approx(32 * 32 * 8 * 27 / 1e6)
    assert cost["parameters_M"] == pytest.approx(216 / 1e6)


QUICK = ["--device", "cpu", "--epochs", "3", "--val_fraction", "0.3"]


def test_a_table_of_several_models(picture_folder, tmp_path, call_script):
    val = picture_folder / "val"
    # So one of eight is wrong, in val/ alone.
    (val / "dark" / "0.png").write_bytes((val / "light" / "0.png").read_bytes())
    flags = [*QUICK, "--label_fraction", 0.5, 1, "--seeds", 0, 1]
    folders = ["--data_path", picture_folder, "--output_dir", tmp_path / "out"]
    done = call_script("eval_linear.py", "pixels", "mobilevit_xxs", *flags, *folders)
    assert "protocol: linear classifier on features, half-whitened" in done.stdout
    written = (tmp_path / "out" / "table.md").read_text()
    assert written in done.stdout
    heads, _, pixels, network = written.splitlines()
    assert heads == (
        "| model | parameters (M) | multiply-adds (M) | ms per image | pixels | k-NN (k=20) "
        "| linear 50 % | linear 100 % |"
    )
    assert re.match(r"\| raw pixels \| 0.00 \| 0.0 \| .* \| 32 \| 87.50 \| 87.50 ± 0.00 \|", pixels)
    assert re.match(
        r"\| mobilevit_xxs at random initialisation, seed 0 \| 0.95 \| \d+\.\d \|", network
    )
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert rows[0]["trained"][1]["top1"] == [0.875, 0.875] and "chosen" in rows[1]["trained"][0]
    chosen = [int(line) for line in (tmp_path / "out" / "labels_0.5_seed1.txt").read_text().split()]
    # 12 of either class, the dark ones first
    assert len(chosen) == 12 and sum(i < 12 for i in chosen) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--augment", "--pool", "mean"],
        ["--finetune", "--epochs", "12", "--layer_decay", "0.9", "--image_size", "48"],
        ["--solver", "lbfgs", "--pool", "default+max"],
        pytest.param(["--from_scratch", "--epochs", "12"], marks=pytest.mark.slow),
    ],
)
def test_other_ways_of_training(flags, picture_folder, tmp_path, call_script):
    folders = ["--data_path", picture_folder, "--output_dir", tmp_path / "out"]
    batch = ["--batch_size_per_gpu", 8]
    done = call_script("eval_linear.py", "mobilevit_xxs", *QUICK, *flags, *batch, *folders)
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert row["trained"][0]["top1"][0] > 0.9  # dark against light
    assert row["image_size"] == (48 if "48" in flags else 32)
    file = tmp_path / "out" / "network1_1_seed0.pth"
    network = flags[0] in ("--finetune", "--from_scratch")
    assert ("whole network" in done.stdout) == network == file.exists()
    if network:  # what was trained is kept: backbone and classifier give that accuracy again
        features = ["--data_path", picture_folder, "--features", tmp_path / "f.npz"]
        call_script("eval_knn.py", "--weights", file, *features)
        _, _, test = evaluate.load_features(tmp_path / "f.npz")
        logits = F.linear(test.features, **torch.load(file, weights_only=True)["classifier"])
        assert evaluate.accuracy(logits, test.labels) == row["trained"][0]["top1"][0]


@pytest.mark.parametrize(
    "count, batch, sentence",
    [
        (1, 8, "1 labelled images are fewer than the 2 ranks; start fewer"),
        (8, 1, "batch norm needs two images per process and step: give a --batch_size_per_gpu"),
        (3, 8, "batch norm needs two images per process and step: give more labelled images"),
    ],
)
def test_batches_that_are_too_small_are_one_sentence(count, batch, sentence):
    args = SimpleNamespace(batch_size_per_gpu=batch, epochs=5, steps=None)
    with pytest.raises(distributed.UserError, match=sentence):
        linear.batch_and_steps(args, count, 2, batch_norm=True)
    assert count < 2 or linear.batch_and_steps(args, count, 2)[0] == 1
    assert linear.batch_and_steps(args, 13, 2) == (min(batch, 6), 5 * (13 // (2 * min(batch, 6))))


@pytest.mark.parametrize("flags", [[], ["--finetune", "--epochs", 1]])
def test_features_are_computed_in_batches_of_the_flag(
    flags, picture_folder, tmp_path, call_script, monkeypatch
):
    sizes = []
    loader = data.evaluation_loader

    def watched(images, batch_size, *others):
        sizes.append(batch_size)
        return loader(images, batch_size, *others)

    monkeypatch.setattr(data, "evaluation_loader", watched)
    flags = [*flags, *QUICK, "--batch_size_per_gpu", 7, "--data_path", picture_folder]
    call_script("eval_linear.py", "mobilenet_v3_small", *flags, "--output_dir", tmp_path)
    assert sizes == [7] * (3 if "--finetune" in flags else 2)


def test_a_last_loss_that_is_not_finite_is_told():
    weight = torch.nn.Parameter(torch.ones(1))
    args = SimpleNamespace(lr=[0.1], weight_decay=[0.0])
    subject = linear.Subject(args, distributed.Ranks(0, 1, torch.device("cpu")), 1, "", "")
    optimizer = linear.CosineAdamW(subject, [{"params": [weight], "scale": 1.0}], 13)
    for _ in range(12):
        optimizer.step(weight.sum())
    with pytest.raises(linear.Diverged, match="it is nan at step 13"):
        optimizer.step(weight.sum() * math.nan)


def test_a_probe_that_diverged_is_not_chosen_and_has_no_figure(picture_folder, call_script):
    out = picture_folder / "out"
    flags = [*QUICK, "--data_path", picture_folder, "--output_dir", out, "--weight_decay", 1]
    call_script("eval_linear.py", "pixels", *flags, "--lr", 1e30, 1)
    (row,) = json.loads((out / "table.json").read_text())["rows"]
    assert row["trained"][0]["chosen"] == ["lr 1, weight decay 1"]
    done = call_script("eval_linear.py", "pixels", *flags, "--lr", 1e30, check=False)
    assert done.returncode == 2 and "trained logits are not finite" in done.stderr


@pytest.mark.slow
def test_batch_norm_settles_and_divergence_is_told(picture_folder, tmp_path, call_script):
    flags = [*QUICK, "--finetune", "--epochs", 12, "--batch_size_per_gpu", 8]
    flags += ["--data_path", picture_folder, "--output_dir", tmp_path / "out"]
    # Its averages have a momentum of 0.01.
    call_script("eval_linear.py", "mobilenet_v3_small", *flags)
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert row["trained"][0]["top1"][0] > 0.8
    done = call_script("eval_linear.py", "mobilevit_xxs", "--lr", 1e30, *flags, check=False)
    assert done.returncode == 2 and "diverging loss: it is nan at step" in done.stderr
    assert done.stderr.count("\n") == 1
    assert issubclass(linear.Diverged, FloatingPointError)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--augment"], ["--from_scratch", "--epochs", "12"]])
def test_two_ranks_train_too(flags, picture_folder, tmp_path, run_script):
    tables = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        batch = ["--batch_size_per_gpu", 8 // ranks]
        folders = ["--output_dir", out, "--data_path", picture_folder]
        run_script("eval_linear.py", "mobilevit_xxs", *QUICK, *flags, *batch, *folders, ranks=ranks)
        tables.append(json.loads((out / "table.json").read_text())["rows"][0])
    assert tables[0]["knn"] == tables[1]["knn"]
    assert min(t["trained"][0]["top1"][0] for t in tables) > 0.8


def linear_result(call_script, file, output):
    """The first cell of the table that eval_linear.py makes of a file of features."""
    flags = ["--epochs", 3, "--val_fraction", 0.3, "--output_dir", output]
    done = call_script("eval_linear.py", "--from_features", file, *flags)
    assert (output / "table.md").read_text() in done.stdout
    return json.loads((output / "table.json").read_text())["rows"][0]["trained"][0]


def test_features_go_through_a_file(picture_folder, tmp_path, call_script):
    file = tmp_path / "features.npz"
    flags = ["--arch", "mobilevit_xxs", "--data_path", picture_folder, "--features", file]
    direct = call_script("eval_knn.py", *flags, "--pool", "default+max")
    again = call_script("eval_knn.py", "--from_features", file)
    accuracies, read = (
        [line for line in done.stdout.splitlines() if line.startswith("k-NN")]
        for done in (direct, again)
    )
    assert accuracies and accuracies == read
    arrays = dict(np.load(file))
    assert arrays["train"].shape == (24, 640)
    assert arrays["train_labels"].tolist() == [0] * 12 + [1] * 12
    assert str(arrays["test_files"][0]).endswith("pictures/val/dark/0.png")
    assert (arrays["train"][:, 320:] >= arrays["train"][:, :320]).all()  # a maximum against a mean
    direct = linear_result(call_script, file, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| mobilevit_xxs at random initialisation, seed 0 | 100.00 | 100.00 |" in table
    # Test labels choose nothing: with others, the same choice and the opposite accuracy.
    np.savez(tmp_path / "others.npz", **arrays | {"test_labels": 1 - arrays["test_labels"]})
    other = linear_result(call_script, tmp_path / "others.npz", tmp_path / "others")
    assert direct["chosen"] == other["chosen"] != [""]
    assert direct["top1"] == [1.0] and other["top1"] == [0.0]


def test_what_retrieval_needs_is_asked_for(picture_folder, tmp_path, call_script):
    flags = ["--arch", "mobilevit_xxs", "--data_path", picture_folder / "train" / "dark", "--map"]
    for others, sentence in (
        (["--features", tmp_path / "features.npz"], "has no labels to test on"),
        (["--maps", tmp_path / "maps.png"], "--map is not for --maps: leave it out"),
    ):
        done = call_script("eval_knn.py", *flags, *others, check=False)
        assert done.returncode == 2 and re.search(sentence, done.stderr)


def test_a_picture_of_neighbours(picture_folder, tmp_path, call_script):
    flags = ["--arch", "mobilevit_xxs", "--data_path", picture_folder, "--pool", "default+max"]
    call_script("eval_knn.py", *flags, "--neighbours", tmp_path / "neighbours.png")
    picture = Image.open(tmp_path / "neighbours.png")
    # A query and eight neighbours, framed, for each of eight test images.
    assert picture.size == (9 * 71 + 1, 8 * 71 + 1)
    assert [round(v / 25.5) for v in picture.getpixel((71 + 2, 2))] == [1, 7, 2]  # of its own class


def test_features_without_labels_are_kept_but_not_probed(picture_folder, tmp_path, call_script):
    file = tmp_path / "unlabelled.npz"
    flags = ["--data_path", picture_folder / "train", "--features", file]
    call_script("eval_knn.py", "--arch", "mobilevit_xxs", *flags)
    assert np.load(file)["train"].shape == (24, 320)
    flags = ["--from_features", file, "--output_dir", tmp_path / "no"]
    refused = call_script("eval_linear.py", *flags, check=False)
    assert refused.returncode == 2 and "should be integers from 0" in refused.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"test": np.zeros((2, 3), np.float32)}, "train has 4 features per image, test 3"),
        (
            {"test": np.full((2, 4), np.nan, np.float32)},
            "test has values that are not finite numbers",
        ),
        (
            {"train_labels": np.zeros(5, int)},
            r"train should be \(N, D\) with N labels, not \(6, 4\) with labels \(5,\)",
        ),
        ({"train_labels": np.full(6, 0.5)}, "train_labels should be integers from 0"),
        ({"train": np.array([object()] * 6)}, "damaged, or not an .npz file of plain arrays"),
    ],
)
def test_wrong_feature_files_are_one_sentence(change, message, tmp_path):
    arrays = {
        "train": np.ones((6, 4), np.float32),
        "train_labels": np.arange(6) % 2,
        "test": np.ones((2, 4), np.float32),
        "test_labels": np.arange(2),
    }
    np.savez(tmp_path / "good.npz", **arrays)
    assert evaluate.load_features(tmp_path / "good.npz")[2].files == ["0", "1"]
    np.savez(tmp_path / "bad.npz", **arrays | change)
    with pytest.raises(ValueError, match=message):
        evaluate.load_features(tmp_path / "bad.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot read .*cut.npz: it is damaged"):
        evaluate.load_features(tmp_path / "cut.npz")


def test_wrong_labels_are_one_sentence(picture_folder, tmp_path, call_script):
    def message(folder, *flags):
        flags = *QUICK, *flags, "--data_path", folder, "--output_dir", tmp_path / "out"
        done = call_script("eval_linear.py", "mobilevit_xxs", *flags, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return done.stderr

    without = "leaves class 0, of 12 images, without one"
    assert without in message(picture_folder, "--label_fraction", 0.01)
    few = "2 labels are too few to hold 0.3 of each"
    assert few in message(picture_folder, "--label_fraction", 0.1)
    assert "has no labels to test on" in message(picture_folder / "train")
    (picture_folder / "train" / "void").mkdir()
    val = picture_folder / "val"
    (val / "void").mkdir()
    shutil.copy(val / "dark" / "0.png", val / "void" / "0.png")
    assert "train/void has no image, but" in message(picture_folder)
    (val / "0.png").write_bytes((val / "dark" / "0.png").read_bytes())
    assert "has no labels to test on" in message(picture_folder)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give one MODEL or more, or --from_features FILE"),
        (["pixels", "--from_features", "x.npz"], "give one MODEL or more"),
        (
            ["resnet18", "--augment", "--finetune"],
            "--augment, --finetune and --from_scratch are three ways",
        ),
        (
            ["--from_features", "x.npz", "--augment"],
            "--augment, --finetune and --from_scratch need the images",
        ),
        (
            ["resnet18", "--augment", "--solver", "lbfgs"],
            "--solver lbfgs needs features that stay the same",
        ),
        (["resnet18", "--lr", "1", "--solver", "lbfgs"], "--solver lbfgs has no learning rate"),
        (
            ["resnet18", "--finetune", "--lr", "1", "2"],
            "the whole network is trained with one --lr",
        ),
        (
            ["pixels", "--finetune"],
            "the whole network is trained without --pool, and pixels has none",
        ),
        (["pixels", "--augment"], "--augment and --pool need backbones"),
        (["pixels", "resnet18", "--pool", "max"], "--augment and --pool need backbones"),
        (["--from_features", "x.npz", "--pool", "max"], "--pool needs the images, which"),
        (["resnet18=a.pth", "--from_scratch"], "--from_scratch takes names of architectures"),
        (["resnet18", "--layer_decay", "0.5"], "--layer_decay goes with --finetune"),
        (["a.pth", "--from_scratch"], "--from_scratch takes names of architectures"),
        (["resnet18", "--lr", "-1"], "--lr must be 0 or more, 1e30 at most, not [-1.0]"),
        (["resnet18", "--lr", "1e38"], "--lr must be 0 or more, 1e30 at most, not [1e+38]"),
        (["resnet18", "--weight_decay", "nan"], "--weight_decay must be 0 or more, 1e30 at most"),
        (
            ["resnet18", "--label_fraction", "0.1", "1.5"],
            "--label_fraction must lie above 0, up to 1",
        ),
        (["resnet18", "--val_fraction", "1"], "--val_fraction must lie between 0 and 1"),
        (["resnet18", "--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["resnet18", "--image_size", "8"], "--image_size must be at least 32"),
        (["resnet18", "--seeds", "-1"], "--seeds must lie between 0 and 2^63"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(distributed.UserError) as refused:
        eval_linear.get_parser().parse(flags, eval_linear.check)
    assert str(refused.value).startswith(message)

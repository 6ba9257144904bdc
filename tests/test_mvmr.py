"""MV-MR: distance correlation, its loss and the image descriptors against loops in float64 and
recorded values; the method."""

import math

import numpy as np
import pytest
import torch
from conftest import losses_on_a_batch
from runs import assert_equal, options, records, saved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowdino
import train
from lowdino import data, demo, descriptors, distributed, methods, settings
from lowdino.losses import DistanceCorrelation, MVMRLoss


def centred(rows):
    n = len(rows)
    d = np.array([[math.dist(a, b) for b in rows] for a in rows])
    return d - d.mean(axis=1).reshape(n, 1) - d.mean(axis=0).reshape(1, n) + d.mean()


def correlation_by_hand(x, y):
    a, b = centred(x.tolist()), centred(y.tolist())
    return math.sqrt((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()))


def dependent(n, d, e):
    x = torch.randn(n, d)
    return x, torch.cat([x[:, :1] ** 2, torch.randn(n, e)], dim=1)


# --------------------------------------------------------------------------------------------------
# Distance correlation and the loss
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d, e", [(2, 3, 4), (3, 1, 1), (12, 5, 2), (20, 40, 3)])
def test_distance_correlation_is_its_definition(n, d, e):
    (x, y), dcor = dependent(n, d, e), DistanceCorrelation()
    expected = correlation_by_hand(x, y)
    assert dcor(x, y).item() == pytest.approx(expected, abs=1e-5)
    assert dcor(x * 1000, y / 1000).item() == pytest.approx(expected, abs=1e-5)
    assert dcor(x, 3 * x + 1).item() == pytest.approx(1, abs=1e-5)


def test_distance_correlation_is_dcors():
    dcor = pytest.importorskip("dcor")
    for shape in ((64, 32, 100), (2, 3, 4), (128, 512, 20)):
        x, y = dependent(*shape)
        theirs = dcor.distance_correlation(x.double().numpy(), y.double().numpy())
        assert DistanceCorrelation()(x, y).item() == pytest.approx(theirs, abs=1e-5)


def test_distance_correlation_of_repeated_rows():
    x, y = dependent(8, 4, 3)
    x[3] = x[5]
    x.requires_grad_()
    DistanceCorrelation()(x, y).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    same = torch.ones(8, 4, requires_grad=True)
    value = DistanceCorrelation()(same, y)
    value.backward()
    assert value == 0 and torch.equal(same.grad, torch.zeros(8, 4))


class Largest(TorchDispatchMode):
    """Records the numbers in the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_distance_correlation_makes_no_large_tensor():
    x, y = torch.randn(64, 40, requires_grad=True), torch.randn(64, 30)
    with Largest() as seen:
        DistanceCorrelation()(x, y).backward()
    assert 0 < seen.numbers <= 64 * 64


def test_mvmr_loss_is_the_papers():
    z, z_augmented = torch.randn(6, 5) * 0.5, torch.randn(6, 5)
    r, q = torch.randn(6, 9), torch.randn(6, 2)
    l1, l2, l3 = MVMRLoss(2.0, 3.0, 0.5, 0.25, margin=1.1, eps=1e-3)(z, z_augmented, [r, q])
    a, b = z.double().numpy(), z_augmented.double().numpy()
    hinge = [np.mean([max(0, 1.1 - math.sqrt(v.var(ddof=1) + 1e-3)) for v in x.T]) for x in (a, b)]
    assert l1.item() == pytest.approx(2 * ((a - b) ** 2).mean() + 3 * sum(hinge), rel=1e-5)
    assert l2.item() == pytest.approx(0.5 * (1 - correlation_by_hand(a, b)), rel=1e-4)
    both = correlation_by_hand(b, r) + correlation_by_hand(b, q)
    assert l3.item() == pytest.approx(0.25 * (2 - both), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Descriptors
# --------------------------------------------------------------------------------------------------


def test_local_std_is_numpys():
    x = torch.randn(2, 3, 7, 9)
    padded = np.pad(x.double().numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    expected = windows.std(axis=(4, 5)).reshape(2, -1)
    np.testing.assert_allclose(descriptors.local_std(x), expected, atol=1e-5)
    assert (descriptors.local_std(torch.full((1, 1, 8, 8), 0.3)) < 1e-3).all()


def test_hog_is_a_loop():
    x = torch.randn(2, 3, 17, 24)
    image = np.pad(x.double().numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge")
    expected = np.zeros((2, 3, 24, 2, 3))
    for b, c, i, j in np.ndindex(2, 3, 16, 24):
        dx = (image[b, c, i + 1, j + 2] - image[b, c, i + 1, j]) / 2
        dy = (image[b, c, i + 2, j + 1] - image[b, c, i, j + 1]) / 2
        position = (math.atan2(dy, dx) % math.pi) / math.pi * 24
        low = math.floor(position)
        cell = expected[b, c, :, i // 8, j // 8]
        cell[low % 24] += (1 - position + low) * math.hypot(dx, dy) / 64
        cell[(low + 1) % 24] += (position - low) * math.hypot(dx, dy) / 64
    np.testing.assert_allclose(descriptors.hog(x), expected.reshape(2, -1), atol=1e-5)


# From kymatio 0.3.0 in float64, Scattering2D(J=2, L=8) of `picture`: channel, path, row and column,
# and the norm of all.
KYMATIO = {
    (0, 0, 0, 0): -0.1552481,
    (0, 1, 3, 4): 0.2133514,
    (1, 9, 7, 9): 0.05437869,
    (1, 17, 2, 2): 0.02136909,
    (0, 80, 5, 1): 0.03801037,
    (1, 45, 0, 9): 0.02664439,
}
KYMATIO_NORM = 8.859465


def picture():
    return torch.from_numpy(np.random.RandomState(0).randn(1, 2, 32, 40)).float()


def test_scattering_is_kymatios():
    found = descriptors.Scattering(32, 40)(picture())
    assert found.norm().item() == pytest.approx(KYMATIO_NORM, rel=1e-3)
    found = found.view(2, 81, 8, 10)
    for index, value in KYMATIO.items():
        assert found[index].item() == pytest.approx(value, abs=1e-4), index


def test_scattering_averages_and_forgets_small_shifts():
    constant = descriptors.Scattering(32, 32)(torch.full((1, 1, 32, 32), 0.7)).view(81, 64)
    torch.testing.assert_close(constant[0], torch.full((64,), 0.7), atol=1e-3, rtol=0)
    assert constant[1:].abs().max() < 1e-4
    message = "images of 32 x 7 pixels are too small for scattering with J = 2: 8 at least"
    with pytest.raises(ValueError, match=message):
        descriptors.Scattering(32, 7)


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


def parse(flags):
    return settings.resolve(train.get_parser(), flags.split())


def test_the_papers_setting_is_a_preset():
    args = parse("--preset mvmr")
    assert (args.method, args.projector) == ("mvmr", [8192] * 3)
    assert (args.lr, args.weight_decay, args.local_crops_number) == (1e-4, 1e-6, 0)
    assert args.descriptors == ["pixels", "augmented", "local_std", "hog", "scattering"]


NOTHING = (
    "--invariance_weight 0 --variance_weight 0 --dependence_weight 0 --representation_weight 0"
)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method mvmr --local_crops_number 2", "--method mvmr has one augmented view"),
        ("--preset mvmr --projector 0", "--projector must be at least 1, not"),
        ("--preset mvmr --descriptors hog hog", "--descriptors names one twice"),
        ("--preset mvmr --invariance_weight -1", "--invariance_weight must be 0 or more"),
        (f"--preset mvmr {NOTHING}", "--method mvmr has nothing to learn"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(distributed.UserError, match=f"^{message}"):
        parse(flags)


def test_it_is_learned_on_a_batch():
    args = parse("--preset mvmr_small --projector 32 16 --global_crops_size 32")
    method = methods.MVMR(lowdino.build_backbone("mobilevit_xxs"), args)
    images, _ = demo.demo_images(range(16))
    batch = data.ImageArray(images).__getitems__(list(range(16)))
    views = [images[:, :, :32, :32] / 128.0 - 1, images[:, :, 32:, 32:] / 128.0 - 1]
    losses = losses_on_a_batch(method, views, batch)
    assert losses[-1] < 0.8 * losses[0], losses
    metrics = method.metrics()
    terms = metrics["L1"] + metrics["L2"] + metrics["L3"]
    assert losses[-1] == pytest.approx(terms, rel=1e-5)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_end(
    picture_folder, tmp_path, call_script, stopped_after_a_checkpoint
):
    flags = options(
        "--preset mvmr_small --arch mobilevit_xxs --batch_size_per_gpu 8 --epochs 2 "
        "--projector 32 16 --device cpu --log_freq 1 --knn_freq 1 --amp none",
        data_path=picture_folder,
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    printed = call_script("train.py", *flags, "--output_dir", whole).stdout
    assert "k-NN (k=20) of the student" in printed
    # Six steps are no verdict, but the last of them has no symptom.
    assert "health: too short to tell: 6 steps, a verdict needs 200\n" in printed
    losses, terms = records(whole, "loss"), [records(whole, name) for name in ("L1", "L2", "L3")]
    assert len(losses) == 6
    assert losses == pytest.approx([sum(values) for values in zip(*terms)], rel=1e-5)
    assert all(0 < value < 5 for value in terms[2])  # of five descriptors
    assert all(value > 0.01 for value in records(whole, "feature_std"))
    assert lowdino.load_backbone(str(whole / "backbone.pth")).epoch == 2

    stopped_after_a_checkpoint("train.py", *flags, "--output_dir", stopped)
    assert "resuming from" in call_script("train.py", *flags, "--output_dir", stopped).stdout
    assert_equal(*(saved(folder)["method"] for folder in (whole, stopped)), "method")

"""The patch dictionary: against a loop in float64; as floor, teacher, descriptor and start."""

import numpy as np
import pytest
import torch
from conftest import restore_signals
from runs import assert_equal, options, records, saved, saved_by_one_and_two_ranks, train_here
from torch import nn

import distill
import eval_knn
import lowdino
from lowdino import (
    augment,
    data,
    demo,
    descriptors,
    distributed,
    features,
    losses,
    recipes,
    settings,
)
from lowdino.descriptors import PatchDictionary
from lowdino.features import PatchStart

RANKS = distributed.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def pictures():
    images, _ = demo.demo_images(range(64))
    return images


@pytest.fixture(scope="module")
def fitted(pictures):
    dictionary = PatchDictionary(atoms=8)
    dictionary.fit(pictures / 255, seed=0)
    return dictionary


def cells(side, grid):
    """Rows of adaptive pooling: from floor(i n / G) to ceil((i + 1) n / G)."""
    return [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]


def by_hand(dictionary, image):
    """The features of one picture (C, 32, 32) float64, patch by patch."""
    filters = dictionary.filters.double().numpy()
    offset, w = dictionary.offset.double().numpy().ravel(), dictionary.width
    side = 32 - w + 1
    responses = np.zeros((2 * len(filters), side, side))
    for i in range(side):
        for j in range(side):
            patch = image[:, i : i + w, j : j + w]
            normal = (patch - patch.mean()) / np.sqrt(patch.var() + 10 / 255**2)
            dot = (filters * normal).sum(axis=(1, 2, 3)) - offset
            responses[:, i, j] = np.concatenate([dot, -dot]) - 0.35
    responses = responses.clip(0)
    places = cells(side, dictionary.grid)
    codes = [[[r[a, b].mean() for b in places] for a in places] for r in responses]
    codes = np.array(codes).ravel() - dictionary.code_mean.double().numpy()
    return codes @ dictionary.projection.double().numpy()


def test_features_are_their_definition(fitted, pictures):
    images = nn.functional.adaptive_avg_pool2d(pictures[:3].double() / 255, 32)
    given = fitted(pictures[:3] / 255).numpy()
    for image, row in zip(images.numpy(), given):
        np.testing.assert_allclose(row, by_hand(fitted, image), atol=2e-4)


def test_atoms_are_whitened_patches_of_unit_length(pictures):
    """Whitened by numpy; after three rounds the nearest atom is nearer than a random one."""
    images = pictures / 255
    torch.manual_seed(0)
    patches = descriptors.contrast_normalised(descriptors.random_patches(images, 8))
    z = patches.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    z = (z - z.mean(axis=0)) @ (vectors / np.sqrt(values + 0.1)) @ vectors.T
    atoms = descriptors.spherical_kmeans(torch.from_numpy(z), 8, rounds=3)
    np.testing.assert_allclose(atoms.norm(dim=1), 1, atol=1e-9)
    before = descriptors.spherical_kmeans(torch.from_numpy(z), 8, rounds=0)
    nearest, random = (abs(z @ x.numpy().T).max(axis=1).mean() for x in (atoms, before))
    assert nearest > 1.2 * random


def test_codes_are_projected_on_half_whitened_components(pictures):
    dictionary = PatchDictionary(atoms=4, grid=1)  # 8 codes: all of them are kept
    dictionary.fit(pictures / 255)
    rows = dictionary(pictures / 255).double().numpy()[:, :8]
    codes = dictionary.codes(pictures / 255).double().numpy()
    standard = (codes - codes.mean(axis=0)) / (codes.std(axis=0, ddof=1) + 1e-3)
    values = np.linalg.eigvalsh(standard.T @ standard / len(codes))[::-1]
    # A component of variance v, over v^(1/4), has the variance v^(1/2).
    np.testing.assert_allclose((rows**2).mean(axis=0), np.sqrt(values), rtol=1e-3, atol=1e-6)
    assert not dictionary(pictures / 255)[:, 8:].any()


@pytest.mark.parametrize("channels, side", [(1, 32), (4, 33), (3, 28), (3, 224), (16, 40)])
def test_any_channels_and_size(channels, side):
    images = torch.rand(20, channels, side, side, generator=torch.Generator().manual_seed(1))
    dictionary = PatchDictionary(channels, atoms=6)
    dictionary.fit(images)
    rows = dictionary(images)
    assert rows.shape == (20, 512) and rows.isfinite().all() and rows.std(dim=0).sum() > 0
    maps = dictionary.forward_features(images)
    assert maps.shape == (20, 12, side // 4, side // 4)
    flat = dictionary(torch.full_like(images, 0.5))
    assert flat.isfinite().all()


def test_a_seed_decides(pictures):
    first, same, other = (PatchDictionary(atoms=8) for _ in range(3))
    before = torch.get_rng_state()
    for dictionary, seed in ((first, 0), (same, 0), (other, 1)):
        dictionary.fit(pictures / 255, seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(dict(first.state_dict()), dict(same.state_dict()), "seed 0")
    assert not torch.equal(first.filters, other.filters)


# --------------------------------------------------------------------------------------------------
# The start of a training
# --------------------------------------------------------------------------------------------------


def batch_of(images):
    sizes = torch.tensor([[images.shape[-1]] * 2] * len(images))
    numbers = torch.arange(len(images))
    return data.Batch(images, sizes, numbers, numbers, [])


def test_the_start_is_the_similarity_to_the_dictionary_and_fades(fitted, pictures):
    backbone = lowdino.build_backbone("mobilevit_xxs")
    start = PatchStart(backbone, weight=3.0)
    start.dictionary = fitted
    rows, batch = torch.randn(4 * 16, 320), batch_of(pictures[:16])
    start.eval()
    plain = augment.central_view(batch.images, batch.sizes, 32, (0.0,) * 3, (1.0,) * 3)
    loss = losses.SimilarityLoss(512, teacher_temp=0.1).eval()
    expected = loss(start.projector(rows), fitted(plain))
    for step, weight in ((0, 3.0), (5, 1.5), (10, 0.0)):
        torch.testing.assert_close(start(rows, batch, step, 10), weight * expected)
    assert start(rows, batch, 0, float("inf")) > 0
    with pytest.raises(ValueError, match="patches_weight needs the batch"):
        start(rows, None, 0, 10)


def test_no_weight_no_dictionary():
    start = PatchStart(lowdino.build_backbone("mobilevit_xxs"), weight=0.0)
    assert not start.state_dict() and start(torch.ones(2, 320), None, 0, 10) == 0.0


def test_a_dictionary_that_recognises_nothing_is_left_out():
    """Pictures without an edge: their patches have no contrast, their mean colours tell them."""
    colours = torch.rand(200, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    images = (colours.expand(-1, -1, 32, 32) * 255).to(torch.uint8).contiguous()
    method = recipes.METHODS["emp"](
        lowdino.build_backbone("mobilevit_xxs"), recipes.options("emp", projector=[16, 8])
    )
    (line,) = features.fit_dictionaries(method, data.ImageArray(images), RANKS)
    assert line.endswith("so the run does without it") and not method.patches.useful
    views = [torch.rand(4, 3, 32, 32) for _ in range(2)]
    args = recipes.options("emp", projector=[16, 8], patches_weight=0)
    torch.manual_seed(0)
    with_it = method(views, batch_of(images[:4]))
    alone = recipes.METHODS["emp"](method.backbone, args)
    alone.student = method.student
    torch.testing.assert_close(with_it, alone(views))


def test_crops_of_pictures_are_recognised_and_crops_of_noise_are_not(pictures):
    images, dictionary = pictures / 255, PatchDictionary()
    dictionary.fit(images)
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    by_pixels = features.crop_recall(nn.Flatten(), images)
    assert features.crop_recall(dictionary, images) > by_pixels > 8 / 64
    assert features.crop_recall(nn.Flatten(), noise) < 8 / 64


RUN = "--arch mobilevit_xxs --batch_size_per_gpu 8 --global_crops_number 2"
RUN += " --epochs 2 --save_every_steps 1 --num_workers 0 --device cpu --amp none --log_freq 1"


class Stopped(Exception):
    """Of a test, in the middle of a run."""


@pytest.mark.parametrize("name", ["emp", "dino"])
def test_a_stopped_run_resumes_with_its_dictionary(name, picture_folder, tmp_path, monkeypatch):
    heads = {"emp": "--projector 16 8", "dino": "--out_dim 16 --hidden_dim 16"}
    flags = f"--method {name} --patches_weight 9 {heads[name]} {RUN}"
    through, halves = tmp_path / "through", tmp_path / "halves"
    train_here(options(flags, data_path=picture_folder, output_dir=through))

    def stop(method, step=0):
        if step == 3:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(recipes.METHODS[name], "before_step", stop)
        train_here(options(flags, data_path=picture_folder, output_dir=halves))
    monkeypatch.setattr(PatchDictionary, "fit", None)  # that of the checkpoint is taken
    train_here(options(flags, data_path=picture_folder, output_dir=halves))
    assert_equal(saved(through)["method"], saved(halves)["method"], "method")
    assert records(through, "loss") == records(halves, "loss")
    assert saved(through)["method"]["patches.dictionary.filters"].any()


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(tmp_path, run_script):
    code = """
import sys, torch
sys.path.insert(0, {root!r})
from torch import nn
from lowdino import data, demo, distributed, features, recipes

class Flat(nn.Module):  # without batch norm, whose statistics each rank has for itself
    embed_dim, mean, std = 6, (0.0,) * 3, (1.0,) * 3
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 6)
    def forward(self, x):
        return self.layer(x.flatten(1)).tanh()

def main(_, ranks):
    images, _ = demo.demo_images(range(64))
    torch.manual_seed(0)
    method = recipes.METHODS["emp"](Flat(), recipes.options("emp", projector=[6]), 4, 2)
    method.patches.projector = nn.Linear(6, 512)
    features.fit_dictionaries(method, data.ImageArray(images), ranks)
    wrapped = distributed.data_parallel(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    for step in range(4):
        rows = torch.arange(16 * step, 16 * step + 16)[ranks.rank * 16 // ranks.world :]
        rows = rows[: 16 // ranks.world]
        batch = data.Batch(images[rows], torch.full((len(rows), 2), 64), rows, rows, [])
        views = [x / 255 for x in (images[rows, :, 32:, 32:], images[rows, :, :32, :32])]
        optimizer.zero_grad()
        wrapped(views, batch, step).backward()
        optimizer.step()
    if ranks.first:
        torch.save(method.state_dict(), {out!r})

distributed.launch("ranks", lambda: None, main)
"""
    one, two = saved_by_one_and_two_ranks(code, tmp_path, run_script)
    for name, value in one.items():
        if ".dictionary." not in name and "queue" not in name:  # whose components' signs are free
            torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3, msg=name)


# --------------------------------------------------------------------------------------------------
# Whitened features, floor, teacher and descriptor
# --------------------------------------------------------------------------------------------------


def test_a_whitening_layer_half_whitens():
    rows = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.tensor([9.0, 7, 5, 4, 3, 2]) + 4
    whitened = features.whitening_layer(rows)(rows).double()
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(6).double(), atol=1e-4, rtol=0)
    given = torch.linalg.eigvalsh(torch.cov(rows.double().T, correction=0))
    values = torch.linalg.eigvalsh(whitened.T @ whitened / len(rows))
    ratio = values / given**0.3  # 1 - 2 * 0.35, up to one factor
    torch.testing.assert_close(ratio, ratio.mean().expand(6), rtol=0.05, atol=0)


def test_a_finished_backbone_carries_its_whitening(picture_folder, tmp_path, capsys):
    flags = RUN.replace("--epochs 2", "--epochs 1 --knn_freq 1 --projector 16 8")
    train_here(options(flags, data_path=picture_folder, output_dir=tmp_path))
    printed = capsys.readouterr().out
    network = lowdino.load_backbone(str(tmp_path / "backbone.pth"))
    assert isinstance(network.whitening, nn.Linear)
    assert not network.whitening.weight.requires_grad
    x = torch.rand(2, 3, 32, 32)
    plain = network.forward_features(x).mean(dim=(2, 3))
    torch.testing.assert_close(network(x), network.whitening(plain))
    eval_knn.run(
        eval_knn.get_parser().parse(
            options("--nb_knn 20", weights=tmp_path / "backbone.pth", data_path=picture_folder),
            eval_knn.check,
        ),
        RANKS,
    )
    accuracy = capsys.readouterr().out.split("top-1 ")[1][:6]
    assert f"of the student {accuracy} (" in printed and "not whitened)" in printed


def test_patches_are_a_floor_by_name(picture_folder, capsys):
    flags = options("--patches --whiten --nb_knn 1", data_path=picture_folder)
    eval_knn.run(eval_knn.get_parser().parse(flags, eval_knn.check), RANKS)
    printed = capsys.readouterr().out
    assert "\npatch dictionary; " in printed and "512 features" in printed
    assert "k-NN (k=1) top-1" in printed and "k-NN (k=1) of half-whitened features" in printed


def test_patches_are_a_teacher_by_name(picture_folder, tmp_path, capsys):
    flags = "--teacher patches --arch mobilevit_xxs --epochs 1 --batch_size_per_gpu 8 --device cpu"
    flags += " --amp none --num_workers 0 --knn_freq 0"
    flags = options(flags, data_path=picture_folder, output_dir=tmp_path)
    distill.run(settings.resolve(distill.get_parser(), flags), distributed.start("cpu"))
    restore_signals()
    assert records(tmp_path, "similarity")[-1] > 0
    head = saved(tmp_path)["method"]["student.heads.similarity.3.weight"]
    assert head.shape[0] == 512

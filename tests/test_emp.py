"""Many views, the coding rate and Muon: against float64 by hand, across ranks, and in a run."""

import math
import textwrap

import numpy as np
import pytest
import torch
from runs import saved_by_one_and_two_ranks
from torch import nn

import train
from lowdino import augment, distributed, heads, methods, optim, recipes, settings, vit
from lowdino.losses import CodingRateLoss


def by_hand(z, eps):
    """C and R of (V, B, d) in float64, one image and one view at a time."""
    V, B, d = z.shape
    z = z / np.linalg.norm(z, axis=2, keepdims=True)
    cosines = []
    for i in range(B):
        mean = z[:, i].mean(axis=0)
        cosines += [z[v, i] @ mean / np.linalg.norm(mean) for v in range(V)]
    rates = []
    for v in range(V):
        covariance = sum(np.outer(x, x) for x in z[v])
        rates.append(np.linalg.slogdet(np.eye(d) + d / (B * eps) * covariance)[1] / 2)
    return np.mean(cosines), np.mean(rates)


@pytest.mark.parametrize("B, d", [(4, 9), (9, 9), (20, 6)])
def test_coding_rate_is_its_definition(B, d):
    z = np.random.default_rng(B).normal(size=(3, B, d))
    loss = CodingRateLoss(weight=7.0, eps=0.3)
    found = loss(torch.tensor(z, dtype=torch.float32))
    expected = by_hand(z, 0.3)
    assert [v.item() for v in found] == pytest.approx(expected, rel=1e-5)
    assert loss.total(*found).item() == pytest.approx(-7 * expected[0] - expected[1], rel=1e-5)


def test_coding_rate_rises_with_the_spread():
    """One public code has its sign the wrong way round: the loss must prefer spread embeddings."""
    loss = CodingRateLoss()
    spread, point = torch.eye(8)[None].repeat(2, 1, 1), torch.ones(2, 8, 8)
    (c_spread, r_spread), (c_point, r_point) = loss(spread), loss(point)
    assert c_spread.item() == pytest.approx(1) and c_point.item() == pytest.approx(1)
    # Eight orthogonal vectors have eight eigenvalues 1 + 1 / eps, equal ones a single 1 + 8 / eps.
    assert r_spread.item() == pytest.approx(8 / 2 * math.log(1 + 8 / (8 * 0.2)), rel=1e-5)
    assert r_point.item() == pytest.approx(1 / 2 * math.log(1 + 8 / 0.2), rel=1e-5)
    assert loss.total(c_spread, r_spread) < loss.total(c_point, r_point)


RANKS = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    sys.path.insert(0, {root!r})
    from lowdino import distributed, optim
    from lowdino.losses import CodingRateLoss

    def main(_, ranks):
        rank, world = ranks.rank, ranks.world
        torch.manual_seed(0)
        x, model = torch.randn(3, 8, 6), nn.Linear(6, 10)  # views, images, width
        own = slice(rank * 8 // world, (rank + 1) * 8 // world)
        wrapped = DistributedDataParallel(model) if world > 1 else model
        optimizer, loss = optim.Muon(model.parameters(), lr=0.1), CodingRateLoss()
        for _ in range(3):
            optimizer.zero_grad()
            loss.total(*loss(wrapped(x[:, own]))).backward()
            optimizer.step()
        if rank == 0:
            torch.save([model.weight.grad, model.bias.grad, *model.state_dict().values()], {out!r})

    distributed.launch("ranks", lambda: None, main)
""")


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(tmp_path, run_script):
    results = saved_by_one_and_two_ranks(RANKS, tmp_path, run_script)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5, 12), (3, 12, 5), (2, 7, 7)])
def test_orthogonalized_keeps_directions_and_evens_lengths(shape):
    g = torch.randn(*shape, dtype=torch.float64)
    found = optim.orthogonalized(g)
    for matrix, given in zip(found.double(), g, strict=True):
        u, s, v = torch.linalg.svd(given, full_matrices=False)
        kept = torch.diagonal(u.T @ matrix @ v.T)
        torch.testing.assert_close(u @ torch.diag(kept) @ v, matrix, atol=1e-4, rtol=1e-4)
        assert 0.6 < kept[s > 0.01 * s.norm()].min() and kept.max() < 1.25


DECADES = torch.logspace(0, -3, 256, dtype=torch.float64)
LOW_RANK = torch.cat([torch.ones(2), torch.full((254,), 0.01)]).double()


@pytest.fixture(params=["of_all", "of_each", "before torch 2.9"])
def rounded(request, monkeypatch):
    """Leave to round factors, by either of torch's settings; a function that says whether it is."""
    backends = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
    both = hasattr(backends[1], "fp32_precision")
    if request.param == "of_each":
        if not both:
            pytest.skip("this torch has one setting, of all backends")
        before = [backend.fp32_precision for backend in backends]
        backends[0].fp32_precision, backends[1].fp32_precision = "tf32", "bf16"
        yield lambda: [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
        return
    torch.set_float32_matmul_precision("medium")
    if both and request.param != "of_all":
        for module in (torch.backends.cuda, torch.backends.mkldnn):
            monkeypatch.setattr(module, "matmul", None)
    yield lambda: torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("singular_values", [DECADES, LOW_RANK], ids=["decades", "low_rank"])
def test_leave_to_round_factors_is_not_taken(singular_values, rounded):
    """A CPU with AMX and a GPU round them where they may; then S has negative eigenvalues."""
    u, v = (torch.linalg.qr(torch.randn(n, 256, dtype=torch.float64))[0] for n in (256, 700))
    g = u @ torch.diag(singular_values) @ v.T
    found = optim.orthogonalized(g[None])[0]
    assert rounded()
    torch.testing.assert_close(found.double(), newton_schulz(g), atol=2e-3, rtol=0.02)


def newton_schulz(x):
    """Muon's iteration as it is written: five multiplications of the whole matrix."""
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x


def test_muon_by_hand():
    """A wide, a tall and a convolution's matrix, of one and of several of a shape; and a bias."""
    shapes = [(3, 8), (3, 8), (8, 3), (4, 2, 3, 3), (5,)]
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    own = [p.detach().clone() for p in parameters]
    muon = optim.Muon(optim.decay_groups(parameters), lr=0.1, weight_decay=0.5)
    momentum, mean, square = [torch.zeros_like(p) for p in own], 0.0, 0.0
    for t in (1, 2, 3):
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        muon.step()
        for i, g in enumerate(gradients[:4]):
            momentum[i] = 0.95 * momentum[i] + g
            nesterov = (g + 0.95 * momentum[i]).flatten(1)
            tall = len(nesterov) > nesterov.shape[1]
            update = newton_schulz(nesterov.T).T if tall else newton_schulz(nesterov)
            scale = max(1, len(nesterov) / nesterov.shape[1]) ** 0.5
            own[i] = (1 - 0.1 * 0.5) * own[i] - 0.1 * scale * update.reshape(own[i].shape)
        g = gradients[4]
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        own[4] -= 0.1 * mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        for p, expected in zip(parameters, own, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_vits_tokens_and_gains_are_no_matrices():
    model = nn.Sequential(vit.vit_tiny(), heads.DINOHead(192, 8, norm_last_layer=False))
    names = {p: name for name, p in model.named_parameters()}
    matrices, others, spared = optim.muon_groups(model, scale=0.02)
    assert {names[p] for p in others["params"]} == {
        "0.cls_token",
        "0.pos_embed",
        "1.last_layer.gain",
    }
    assert all(p.ndim in (2, 4) for p in matrices["params"]) and "scale" not in matrices
    assert others["decays"] and not spared["decays"] and others["scale"] == spared["scale"] == 0.02
    assert sum(len(group["params"]) for group in (matrices, others, spared)) == len(names)


def test_embeddings_that_are_not_finite_give_a_loss_that_is_not():
    z = torch.randn(2, 4, 6)
    z[1, 2, 3] = torch.nan
    loss = CodingRateLoss()
    assert loss.total(*loss(z)).isnan()


def test_muon_goes_on_from_its_state():
    def build():
        torch.manual_seed(0)
        layer = nn.Linear(4, 6)
        return layer, optim.Muon(optim.parameter_groups(layer), lr=0.1, weight_decay=0.1)

    def step(layer, muon, seed):
        torch.manual_seed(seed)
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        muon.step()

    whole, first = build(), build()
    for seed in range(4):
        step(*whole, seed)
    for seed in range(2):
        step(*first, seed)
    second = build()
    for part, saved in zip(second, first, strict=True):
        part.load_state_dict(saved.state_dict())
    for seed in range(2, 4):
        step(*second, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters()))


@pytest.mark.slow
def test_a_run_of_the_preset_resumes(
    picture_folder, tmp_path, call_script, stopped_after_a_checkpoint
):
    flags = ["--preset", "emp", "--arch", "resnet5m", "--data_path", picture_folder]
    flags += ["--batch_size_per_gpu", 4, "--global_crops_number", 3, "--epochs", 1]
    flags += ["--device", "cpu", "--num_workers", 0, "--save_every_steps", 2, "--log_freq", 1]
    flags += ["--amp", "bf16"]
    done = call_script("train.py", *flags, "--output_dir", tmp_path / "whole")
    assert "3 global views of 32 px" in done.stdout and " cosine " in done.stdout
    assert "of the student" in done.stdout and " coding_rate " in done.stdout
    stopped_after_a_checkpoint("train.py", *flags, "--output_dir", tmp_path / "stopped")
    call_script("train.py", *flags, "--output_dir", tmp_path / "stopped")
    whole, stopped = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["method"]
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--method", "emp", "--global_crops_number", "1", "--local_crops_number", "0"],
            "--method emp compares views of an image: give --global_crops_number 2 or more",
        ),
        (["--method", "emp", "--rate_eps", "0"], "--rate_eps must be above 0, not 0.0"),
        (
            ["--method", "dino", "--alpha", "0.4", "--global_crops_number", "3"],
            "--method dino takes --global_crops_number 2, not 3",
        ),
        (["--global_crops_number", "0"], "--global_crops_number must be at least 1, not 0"),
        (["--grayscale", "2"], "--grayscale must lie between 0 and 1, not 2.0"),
        (["--projector", "0"], "--projector must be at least 1, not [0]"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, message):
    with pytest.raises(distributed.UserError) as caught:
        settings.resolve(train.get_parser(), flags)
    assert str(caught.value) == message


def test_grayscale_has_the_probability_that_is_asked_for():
    images, sizes = torch.zeros(50, 3, 8, 8, dtype=torch.uint8), torch.full((50, 2), 8)
    images[:, 0] = 200
    for probability in (0.0, 1.0):
        still = dict(jitter=(0.0,) * 4, solarize=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
        crops = augment.MultiCrop(8, 8, 0, blur=(0.0,) * 3, **still, grayscale=probability)
        views = torch.cat(crops(images, sizes, augment.seeded_generator("cpu", 0)))
        grey = (views[:, 0] - views[:, 2]).abs().amax(dim=(1, 2)) < 1e-5
        assert grey.float().mean().item() == probability


def test_options_are_enough_for_ones_own_loop():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone.embed_dim = 8
    method = methods.EMP(backbone, recipes.options("emp", projector=[16, 8], patches_weight=0))
    optimizer = optim.Muon(method.parameters(), lr=0.02)
    views, losses = [torch.randn(16, 3, 16, 16) for _ in range(4)], []
    for _ in range(10):
        loss = method(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and method.metrics()["cosine"] > 0


def test_what_is_no_matrix_keeps_the_factor_of_this_runs_learning_rate():
    """As after --accept_changes --lr: the factor is 0.002 over the rate of matrices."""
    saved, loaded = (optim.Muon(optim.muon_groups(nn.Linear(4, 6), x)) for x in (0.1, 0.4))
    loaded.load_state_dict(saved.state_dict())
    assert [group.get("scale") for group in loaded.param_groups] == [None, 0.4, 0.4]

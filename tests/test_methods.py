"""Methods without the engine, a new one through it, and that they learn."""

import copy
import functools
import io
import itertools
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import demo_array
from torch import nn

import distill
import lowdino
from lowdino import augment, data, demo, distributed, evaluate, heads, methods, recipes, settings
from lowdino import distillation as teachers_file
from lowdino.distillation import Distillation
from lowdino.features import compute_features

CPU = distributed.Ranks(0, 1, torch.device("cpu"))


class Small(nn.Module):
    """Three convolutions, which learn the demo images in seconds."""

    mean, std, embed_dim = augment.IMAGENET_MEAN, augment.IMAGENET_STD, 128

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for width, stride in ((32, 2), (64, 2), (128, 1)):
            layers += [
                nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x).mean(dim=(2, 3))


def batches_and_views(images, batch_size=64, epochs=1, local=0, seed=0):
    """Batches of images in a new order in each epoch, with two global views and some local ones."""
    steps = epochs * (len(images) // batch_size)
    indices = data.TrainingBatches(len(images), batch_size, seed, 0, steps, 0, 1)
    blur = (0.1, 2 * 32 / 224)
    multicrop = augment.MultiCrop(32, 32, local, (0.2, 1.0), blur_sigma=blur)
    for step, batch in enumerate(
        data.open_loader(images, 0, batch_sampler=indices, pin_memory=False)
    ):
        generator = augment.seeded_generator("cpu", 1, seed, step)
        yield batch, multicrop(batch.images, batch.sizes, generator)


def distillation(backbone, seed=0, **given):
    """With a teacher at random weights, or its features in a table."""
    s = settings.resolve(distill.get_parser(), ["--teacher", "none"])
    args = s.replace(**{"objective": ["kd"]} | given)
    torch.manual_seed(7)
    network = Small().eval().requires_grad_(False)
    head = heads.DINOHead(128, 64, hidden_dim=32).requires_grad_(False)
    teacher = teachers_file.Teacher(
        "small", "0", 128, CPU.device, network, 32, head=head, center=torch.zeros(1, 64)
    )
    torch.manual_seed(seed)
    return Distillation(backbone, args, teacher, total_steps=40, epoch_steps=10)


def mvmr(backbone, **given):
    few = dict(projector=[64, 64], descriptors=["augmented", "hog"], global_crops_size=32)
    return methods.MVMR(backbone, recipes.options("mvmr", **few | given), 40, 10)


def dino(backbone, **given):
    args = recipes.options("dino", **dict(out_dim=64, hidden_dim=32) | given)
    return methods.DINO(backbone, args, 40, 10)


def baseline(name):
    few = dict(projector=[32, 16], out_dim=20, queue_size=32, queue_epochs=0.0)
    return recipes.METHODS[name](Small(), recipes.options(name, **few), 40, 10)


BUILD = {
    **{
        name: functools.partial(baseline, name)
        for name in ("byol", "moco", "swav", "simclr", "vicreg", "barlow")
    },
    "dino": lambda: dino(Small(), koleo_weight=0.1, infonce_weight=0.1),
    "mvmr": lambda: mvmr(Small()),
    "kd and similarity": lambda: distillation(
        Small(), objective=["kd", "similarity"], queue_size=50
    ),
    "dino and mvmr": lambda: distillation(Small(), objective=["dino", "mvmr"], projector=[32, 32]),
}


# ---------------------------------------------------------------------------------------------
# One's own loop
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mvmr", "distillation"])
def test_the_loss_falls_in_a_loop_of_ten_lines(name):
    build = {"mvmr": mvmr, "distillation": lambda net: distillation(net, objective=["simkd"])}
    method = build[name](Small())
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    batches = batches_and_views(demo_array(range(256)), batch_size=32, epochs=5)
    losses = steps(method, optimizer, batches, 0)
    assert len(losses) == 40
    # 0.46 and 0.01 of it are left.
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def knn_accuracy(backbone, train_images, test_images):
    train_features, test_features = (
        compute_features(backbone, images, 32, CPU) for images in (train_images, test_images)
    )
    return evaluate.knn_accuracy(train_features, test_features, 20, 10)


def test_self_distillation_learns():
    """DINO alone, without InfoNCE, by k-NN of its teacher on images that it has not seen.

    Batch norm's statistics alone, which any forward pass brings, are worth up to 8 points here. So
    the network is compared with itself at random weights that has them. Over four seeds that had
    0.58 to 0.65, and each of them gained 0.13 to 0.15.
    """
    images = demo_array(range(1000))
    unseen = demo_array(range(demo.TEST_START, demo.TEST_START + 500))
    epochs, epoch_steps = 6, 1000 // 64
    small = dict(
        out_dim=1024,
        hidden_dim=512,
        use_bn_in_head=True,
        momentum_teacher=None,
        freeze_last_layer=0,
    )
    args = recipes.options("dino", **small)
    method = methods.DINO(Small(), args, epochs * epoch_steps, epoch_steps)

    at_random = copy.deepcopy(method.teacher)
    for _, views in batches_and_views(images):
        at_random(views)
    before = knn_accuracy(at_random.backbone, images, unseen)

    optimizer = torch.optim.AdamW(method.parameters(), lr=0.0, weight_decay=0.04)
    for step, (_, views) in enumerate(batches_and_views(images, epochs=epochs)):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(step / 5, 1 - step / (epochs * epoch_steps))
        loss = method(views, step=step)
        optimizer.zero_grad()
        loss.backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
    after = knn_accuracy(method.backbone, images, unseen)
    assert after > before + 0.1, (before, after)


def test_options_are_those_of_the_papers_recipe():
    for name, method in recipes.METHODS.items():
        row = recipes.RECIPES.get(name) or recipes.RECIPES[recipes.default_recipe(name)]
        expected = {flag.name: row[flag.name] for flag in method.flags if flag.name in row}
        assert expected and vars(recipes.options(name)) == expected
    given = recipes.options("dino", out_dim=7, more="kept")
    assert (given.out_dim, given.more, given.student_temp) == (7, "kept", 0.1)
    assert not hasattr(given, "projector")  # of another method
    with pytest.raises(ValueError, match="no method 'none'; there are emp, dino, mvmr, byol"):
        recipes.options("none")


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------


def steps(method, optimizer, batches, first):
    """The losses of a few steps, the first of them number `first`."""
    losses = []
    for step, (batch, views) in enumerate(batches, start=first):
        loss = method(views, batch, step)
        optimizer.zero_grad()
        loss.backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def four_batches():
    return list(batches_and_views(demo_array(range(64)), batch_size=16))


@pytest.mark.parametrize("name", BUILD)
def test_state_dicts_are_enough_to_resume(name, four_batches):
    method = BUILD[name]()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    steps(method, optimizer, four_batches[:2], 0)
    file = io.BytesIO()
    torch.save([method.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    losses = steps(method, optimizer, four_batches[2:], 2)

    torch.manual_seed(123)
    other = BUILD[name]()
    for tensor in (*other.parameters(), *other.buffers()):  # none of which may be left
        tensor.data.fill_(0.123 if tensor.is_floating_point() else 3)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for part, state in zip((other, other_optimizer), torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    assert steps(other, other_optimizer, four_batches[2:], 2) == losses
    theirs = other.state_dict()
    for key, value in method.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    assert other.metrics() == method.metrics()


@pytest.mark.parametrize("name", BUILD)
def test_nothing_hidden_passes_between_calls(name, four_batches):
    """A step leaves outside the state dict `terms` and `last`, for metrics(), without a graph."""
    method = BUILD[name]()
    before = {k: v for k, v in vars(method).items() if k != "training"}
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    steps(method, optimizer, four_batches[:2], 0)
    assert vars(method).keys() - before.keys() == {"last", "terms", "training"}
    assert all(vars(method)[k] is v for k, v in before.items())
    tensors = [x for x in flattened((method.last, method.terms)) if isinstance(x, torch.Tensor)]
    assert tensors and not any(x.requires_grad for x in tensors)
    metrics = method.metrics()
    assert metrics and all(isinstance(v, float | bool) for v in metrics.values())
    assert metrics == method.metrics()

    twin = copy.deepcopy(method)
    del twin.last, twin.terms
    batch, views = four_batches[2]
    loss, its_loss = method(views, batch, 2), twin(views, batch, 2)
    assert torch.equal(loss, its_loss)
    assert all(map(torch.equal, method.state_dict().values(), twin.state_dict().values()))
    method.after_step(2)  # the twin's EMA moves the twin's own weights
    twin.after_step(2)
    assert all(map(torch.equal, method.state_dict().values(), twin.state_dict().values()))


def flattened(x):
    if isinstance(x, dict):
        x = list(x.values())
    return itertools.chain(*map(flattened, x)) if isinstance(x, list | tuple) else [x]


# ---------------------------------------------------------------------------------------------
# A new method: one class with its flags, and a row in recipes.py
# ---------------------------------------------------------------------------------------------


class SimSiam(methods.Method):
    """Siamese networks with a predictor and a stopped gradient (Chen and He, 2021)."""

    name = "simsiam"
    flags = (methods.Flag("predictor_dim", "width of the predictor's hidden layer", int, ">= 1"),)

    def __init__(self, backbone, args, total_steps=1, epoch_steps=1):
        super().__init__(args, total_steps, epoch_steps)
        dim = backbone.embed_dim
        self.student = heads.ManyHeads(backbone, {"projector": heads.Projector(dim, dim, dim)})
        self.predictor = heads.Projector(dim, args.predictor_dim, dim)

    def forward(self, views, batch=None, step=0):
        features, outputs = self.student(views[:2])
        z1, z2 = outputs["projector"].detach().chunk(2)  # no gradient through z
        p1, p2 = self.predictor(outputs["projector"]).chunk(2)
        self.last = features.detach().chunk(2)[0]
        return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2

    def metrics(self):
        return methods.feature_metrics(self.last)


@pytest.fixture
def simsiam(monkeypatch):
    row = recipes.RECIPES["simclr_small"] | dict(method=SimSiam, predictor_dim=64)
    monkeypatch.setitem(recipes.RECIPES, "simsiam", row)
    monkeypatch.setitem(recipes.METHODS, "simsiam", SimSiam)


def test_a_new_method_trains_and_resumes(
    simsiam, call_script, stopped_after_a_checkpoint, picture_folder, tmp_path
):
    """Through train.py as it stands, with its own flag; a stopped run goes on bit for bit."""
    given = ["--method", "simsiam", "--predictor_dim", 24, "--arch", "mobilevit_xxs"]
    given += ["--data_path", picture_folder, "--epochs", 2, "--batch_size_per_gpu", 8]
    given += ["--local_crops_number", 0, "--warmup_epochs", 1, "--knn_freq", 1, "--nb_knn", 5]
    given += ["--num_workers", 0, "--device", "cpu", "--amp", "none"]
    given += ["--log_freq", 1, "--output_dir"]
    done = call_script("train.py", *given, tmp_path / "whole")
    assert "predictor_dim=24" in done.stdout and "k-NN (k=5) of the student" in done.stdout
    assert "effective_rank" in done.stdout

    stopped_after_a_checkpoint("train.py", *given, tmp_path / "stopped")
    again = call_script("train.py", *given, tmp_path / "stopped")
    assert "resuming from" in again.stdout
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("whole", "stopped")
    )
    assert whole["settings"]["predictor_dim"] == 24 and whole["step"] == resumed["step"] == 6
    assert whole["method"]["predictor.0.weight"].shape[0] == 24
    for key, value in whole["method"].items():
        assert torch.equal(value, resumed["method"][key]), key

    wrong = call_script("train.py", *given, tmp_path / "x", "--predictor_dim", 0, check=False)
    assert wrong.returncode == 2 and "--predictor_dim must be at least 1" in wrong.stderr
    other = call_script("train.py", *given, tmp_path / "whole", "--predictor_dim", 9, check=False)
    assert other.returncode == 2 and "predictor_dim 24, not 9" in other.stderr


def test_the_loop_of_the_docstring_runs():
    """As it stands at the head of methods.py, with a backbone and views of one's own."""
    (loop,) = re.findall(r"\n\n(    method = .*?)\n\n", methods.__doc__, re.DOTALL)
    views = [[torch.randn(8, 3, 32, 32) for _ in range(2)] for _ in range(3)]
    names = vars(methods) | {
        "options": recipes.options,
        "backbone": lowdino.build_backbone("mobilevit_xxs"),
        "loader": views,
    }
    exec(textwrap.dedent(loop), names)
    assert names["step"] == 2 and names["loss"].isfinite()
    assert names["method"].metrics()["teacher_moved"]

"""Each method against its formulas written out by hand, in float64.

The references know nothing of lowdino but the names of the weights. The library's losses and the
teacher's features are float32 by `.float()`. Here that is `.double()`, so that both sides agree to
1e-8 and rounding hides nothing.
"""

import argparse
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import demo_array
from torch import nn

import lowdino.settings
import train
from lowdino import augment, data, descriptors, distillation, features, heads, methods, recipes
from lowdino.datasets import Source
from lowdino.distillation import Teacher
from lowdino.distributed import Ranks

TOLERANCE = dict(rtol=1e-7, atol=1e-9)


class Tiny(nn.Module):
    """Two convolutions with a batch norm, whose statistics tell which views were one batch."""

    mean, std, embed_dim = (0.25, 0.5, 0.75), (0.5, 0.25, 0.5), 8

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2)

    def forward(self, x):
        x = F.gelu(self.norm(self.first(x)))
        return self.second(x).mean(dim=(2, 3))


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def assert_near(own, expected, name):
    torch.testing.assert_close(own, expected, **TOLERANCE, msg=lambda text: f"{name}: {text}")


# -- Networks by hand, over a dict of weights `w`, which holds the running statistics too ----------


def batch_norm(x, w, name):
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    mean, variance = x.mean(dims), x.var(dims, unbiased=False)
    for key, value in (("mean", mean), ("var", x.var(dims))):
        old = w[f"{name}.running_{key}"]
        w[f"{name}.running_{key}"] = 0.9 * old + 0.1 * value.detach()
    x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
    return x * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def unit(x):
    return x / x.square().sum(dim=1, keepdim=True).sqrt()


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def features_of(w, groups):
    """Features (V B, 8); views of one size, a group, are one batch for batch norm."""
    found = []
    for group in filter(len, groups):
        x = F.conv2d(torch.cat(group), w["backbone.first.weight"], stride=2)
        x = gelu(batch_norm(x, w, "backbone.norm"))
        x = F.conv2d(x, w["backbone.second.weight"], w["backbone.second.bias"], stride=2)
        found.append(x.mean(dim=(2, 3)))
    return torch.cat(found)


def dino_head(x, w, name):
    """Unit vectors and logits of a head with batch norm and learnt gains."""
    x = gelu(batch_norm(linear(x, w, f"{name}.mlp.0"), w, f"{name}.mlp.1"))
    x = gelu(batch_norm(linear(x, w, f"{name}.mlp.3"), w, f"{name}.mlp.4"))
    z = unit(linear(x, w, f"{name}.mlp.6"))
    prototypes = unit(w[f"{name}.last_layer.weight"]) * w[f"{name}.last_layer.gain"]
    return z, z @ prototypes.T


def projector(x, w, name):
    """Linear, batch norm, ReLU, linear."""
    x = batch_norm(linear(x, w, f"{name}.0"), w, f"{name}.1")
    return linear(x.clamp(min=0), w, f"{name}.3")


def softmax(x):
    x = (x - x.amax(dim=1, keepdim=True)).exp()
    return x / x.sum(dim=1, keepdim=True)


def cross_entropy(target, logits):
    """- sum_k target log softmax(logits), mean over the rows."""
    return -(target * softmax(logits).log()).sum(dim=1).mean()


def part(state, prefix):
    """float64 copies of the entries of a state dict below a prefix."""
    return {
        name.removeprefix(prefix): value.detach().clone()
        for name, value in state.items()
        if name.startswith(prefix) and value.is_floating_point()
    }


# -- The whole DINO step, through the engine -------------------------------------------------------

BATCH, EPOCH, EPOCHS = 5, 2, 5  # images, steps an epoch, epochs
SETTINGS = dict(
    minutes=None, in_chans=3, value_range=None, device="cpu",
    arch="mobilevit_xxs", init=None, seed=0, compile=False, cache="none", num_workers=0, amp="none",
    optimizer="adamw", batch_size_per_gpu=BATCH, epochs=EPOCHS, lr=0.04, lr_reference_batch=10,
    min_lr=1e-3, warmup_epochs=1.5, weight_decay=0.1, weight_decay_end=0.8, clip_grad=0.05,
    global_crops_size=32, local_crops_size=24, local_crops_number=2, vertical_flip=0.0,
    global_crops_number=2, grayscale=0.2, jitter=1.0, blur=1.0, solarize=0.2,
    global_crops_scale=[0.4, 1.0], local_crops_scale=[0.05, 0.4], skip_nonfinite=0,
    max_bad_fraction=0.0, accept_changes=False, log_freq=1, knn_freq=0, saveckp_freq=0,
    save_every_steps=0, out_dim=12, hidden_dim=10, use_bn_in_head=True, norm_last_layer=False,
    momentum_teacher=0.8, student_temp=0.2, teacher_temp=0.1, warmup_teacher_temp=0.05,
    warmup_teacher_temp_epochs=2, center_momentum=0.7, freeze_last_layer=1,
)  # fmt: skip
REGULARISED = dict(alpha=0.3, infonce_weight=0.5, koleo_weight=0.1)


class Recorded(methods.DINO):
    """DINO that keeps the views and the losses of all its steps."""

    def forward(self, views, batch=None, step=0):
        views = [view.double() for view in views]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            loss = super().forward(views, batch, step)
        self.seen.append(views)
        self.found.append(loss.item())
        return loss


def trained_by_engine(folder, **changes):
    """A method after engine.train(), with `start`, its state before, and what it saw."""
    values = vars(recipes.options("dino", **SETTINGS | changes, output_dir=str(folder)))
    values["method"] = "dino"

    def build(backbone, args, **steps):
        method = Recorded(backbone, args, **steps).double()
        # Weights of that size use the softmax's range, and gains of 1 would hide that they decay.
        for name, p in method.student.named_parameters():
            p.data += torch.randn_like(p) * (0.1 if p.ndim == 1 or "gain" in name else 0.3)
        method.teacher.load_state_dict(method.student.state_dict())
        method.start, method.seen, method.found = copy.deepcopy(method.state_dict()), [], []
        return method

    ranks = Ranks(0, 1, torch.device("cpu"))
    source = Source("few images", demo_array(range(BATCH * EPOCH)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "build_backbone", lambda args: Tiny())
        patch.setattr(lowdino.settings, "open_training_images", lambda s, ranks: (source, s))
        patch.setattr(train, "METHODS", {"dino": build})
        return train.run(lowdino.settings.Settings(values), ranks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_by_engine(tmp_path_factory.mktemp("plain"))


def half_cosine(step, total, start, end):
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


class Reference:
    """DINO with AdamW by its formulas. `wrong` names one thing to do as one must not."""

    def __init__(self, start, args, wrong=None):
        self.args, self.wrong = args, wrong
        self.student, self.teacher = part(start, "student."), part(start, "teacher.")
        self.center = start["loss.center"].clone()
        self.names = [name for name in self.student if "running" not in name]
        self.m = {name: torch.zeros_like(self.student[name]) for name in self.names}
        self.v, self.count = copy.deepcopy(self.m), dict.fromkeys(self.names, 0)

    def step(self, i, views):
        args, total = self.args, EPOCH * EPOCHS
        gradients, loss, mean_t = self.loss_and_gradients(i, views)
        self.center = args.center_momentum * self.center + (1 - args.center_momentum) * mean_t
        frozen = i < args.freeze_last_layer * EPOCH and self.wrong != "prototypes never frozen"
        for name in self.names:
            if not (frozen and "last_layer" in name):
                self.adamw(i, name, gradients[name])
        momentum = half_cosine(i, total, args.momentum_teacher, 1)
        if self.wrong == "constant momentum":
            momentum = args.momentum_teacher
        for name in self.names:
            average = momentum * self.teacher[name] + (1 - momentum) * self.student[name]
            self.teacher[name] = average
        return loss

    def loss_and_gradients(self, i, views):
        args, total = self.args, EPOCH * EPOCHS
        warmup = args.warmup_teacher_temp_epochs * EPOCH
        T_t = args.warmup_teacher_temp
        T_t += (args.teacher_temp - T_t) * min(i / warmup, 1)
        if self.wrong == "no warm-up of the temperature":
            T_t = args.teacher_temp
        T_s = T_t if self.wrong == "the teacher's temperature" else args.student_temp

        seen = views[-2:] if self.wrong == "teacher sees the last views" else views[:2]
        _, t = dino_head(features_of(self.teacher, [seen]), self.teacher, "head")
        center = 0 if self.wrong == "no centring" else self.center
        if self.wrong == "centre moves first":
            rate = 1 - args.center_momentum
            center = center + rate * (t.mean(dim=0, keepdim=True) - center)
        P_t = softmax((t - center) / T_t).split(BATCH)

        leaves = {name: self.student[name].requires_grad_() for name in self.names}
        features = features_of(self.student, [views[:2], views[2:]])
        z, s = dino_head(features, self.student, "head")
        s = (s / T_s).split(BATCH)
        pairs = [(g, v) for g in range(2) for v in range(len(views)) if g != v]
        terms = {(g, v): cross_entropy(P_t[g], s[v]) for g, v in pairs}
        loss = sum(terms.values()) / len(terms)
        if args.alpha is not None:
            of_global = [term for (_, v), term in terms.items() if v < 2]
            of_local = [term for (_, v), term in terms.items() if v >= 2]
            loss = args.alpha * sum(of_global) / len(of_global)
            loss = loss + (1 - args.alpha) * sum(of_local) / len(of_local)
        if args.infonce_weight:
            loss = loss + half_cosine(i, total, args.infonce_weight, 0) * info_nce(
                *z.split(BATCH)[:2]
            )
        for view in features.split(BATCH)[:2]:
            loss = loss + args.koleo_weight * koleo(view)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
        self.student = {name: value.detach() for name, value in self.student.items()}
        return gradients, loss.item(), t.mean(dim=0, keepdim=True)

    def adamw(self, i, name, g):
        args, total, p = self.args, EPOCH * EPOCHS, self.student[name]
        norm = g.square().sum().sqrt()
        if norm > args.clip_grad and self.wrong != "no clipping":
            g = g * args.clip_grad / (norm + 1e-6)
        warmup, peak = round(args.warmup_epochs * EPOCH), args.lr * BATCH / args.lr_reference_batch
        lr = half_cosine(i - warmup, total - warmup, peak, args.min_lr)
        if i < warmup and self.wrong != "no warm-up of the learning rate":
            lr = peak * i / (warmup - 1)
        decay = half_cosine(i, total, args.weight_decay, args.weight_decay_end)
        if self.wrong == "constant weight decay":
            decay = args.weight_decay
        if p.ndim == 1 and self.wrong != "biases and norms decay":
            decay = 0
        self.count[name] += 1
        m = self.m[name] = 0.9 * self.m[name] + 0.1 * g
        v = self.v[name] = 0.999 * self.v[name] + 0.001 * g * g
        m, v = m / (1 - 0.9 ** self.count[name]), v / (1 - 0.999 ** self.count[name])
        self.student[name] = p - lr * decay * p - lr * m / (v.sqrt() + 1e-8)

    def state(self):
        student = {f"student.{name}": value for name, value in self.student.items()}
        teacher = {f"teacher.{name}": value for name, value in self.teacher.items()}
        return student | teacher | {"loss.center": self.center}


def info_nce(a, b, temperature=0.2):
    target = torch.eye(len(a), dtype=a.dtype)
    a_to_b, b_to_a = a @ b.T / temperature, b @ a.T / temperature
    return (cross_entropy(target, a_to_b) + cross_entropy(target, b_to_a)) / 2


def koleo(features):
    z = unit(features)
    distance = (z[:, None] - z[None]).square().sum(dim=2)  # squared; a row's own is not its nearest
    nearest = (distance + 1e9 * torch.eye(len(z), dtype=z.dtype)).amin(dim=1).sqrt()
    return -(nearest + 1e-8).log().mean()


def replayed(method, wrong=None):
    """The reference's state after the same views, and its losses."""
    reference = Reference(method.start, method.args, wrong)
    losses = [reference.step(i, views) for i, views in enumerate(method.seen)]
    return reference.state(), losses


def assert_replays(method):
    state, losses = replayed(method)
    assert len(losses) == EPOCH * EPOCHS
    torch.testing.assert_close(method.found, losses, **TOLERANCE)
    own = part(method.state_dict(), "")
    assert own.keys() == state.keys()
    for name, value in state.items():
        assert_near(own[name], value, name)


def test_dino_steps(trained):
    """Every weight of student and teacher, their running statistics and the centre, ten steps on.

    They depend on all schedules, clipping, AdamW and the frozen prototypes.
    """
    assert_replays(trained)


def test_dino_steps_with_regularisers(tmp_path):
    assert_replays(trained_by_engine(tmp_path, **REGULARISED))


MISTAKES = [
    "teacher sees the last views",
    "biases and norms decay",
    "constant momentum",
    "no centring",
    "centre moves first",
    "no clipping",
    "the teacher's temperature",
    "no warm-up of the temperature",
    "no warm-up of the learning rate",
    "constant weight decay",
    "prototypes never frozen",
]


@pytest.mark.parametrize("wrong", MISTAKES)
def test_dino_steps_tell_mistakes(trained, wrong):
    """In this run each of them shows, a thousand times above the tolerance at the least."""
    state, _ = replayed(trained, wrong)
    own = part(trained.state_dict(), "")
    assert max((own[name] - value).abs().max() for name, value in state.items()) > 1e-3


# -- MV-MR -----------------------------------------------------------------------------------------


def distance_correlation(x, y):
    def centred(rows):
        d = ((rows[:, None] - rows[None]).square().sum(dim=2) + 1e-30).sqrt()
        d = d * (1 - torch.eye(len(d), dtype=d.dtype))
        return d - d.mean(dim=0)[None] - d.mean(dim=1)[:, None] + d.mean()

    A, B = centred(x), centred(y)
    covariance, var_x, var_y = (A * B).mean(), (A * A).mean(), (B * B).mean()
    return (covariance / (var_x * var_y).sqrt()).sqrt()


def mvmr_terms(z, z_augmented, representations):
    def hinge(z):
        return (1 - (z.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean()

    l1 = (z - z_augmented).square().mean(), hinge(z) + hinge(z_augmented)
    l2 = 1 - distance_correlation(z, z_augmented)
    return *l1, l2, sum(1 - distance_correlation(z_augmented, r) for r in representations)


def assert_gradients(method, loss, reference, w):
    """Loss and gradients of the student's parameters, the reference's in terms of the dict `w`."""
    torch.testing.assert_close(loss, reference, **TOLERANCE)
    loss.backward()
    parameters = dict(method.student.named_parameters())
    expected = torch.autograd.grad(reference, [w[name] for name in parameters], allow_unused=True)
    assert sum(g is not None for g in expected) >= 5
    for (name, p), g in zip(parameters.items(), expected):
        g = torch.zeros_like(p) if g is None else g
        own = torch.zeros_like(p) if p.grad is None else p.grad
        assert_near(own, g, name)


def leaves_of(method):
    w = part(method.student.state_dict(), "")
    return {k: v if "running" in k else v.requires_grad_() for k, v in w.items()}


@pytest.fixture
def batch():
    images, labels, indices = demo_array(range(6)).images, torch.arange(6) % 4, torch.arange(6)
    return data.Batch(images, torch.full((6, 2), 64), labels, indices)


@pytest.fixture
def plain(batch, monkeypatch):
    """The plain view of that batch, which methods get in float64."""
    seen = methods.plain_view(batch, 32, Tiny()).double()
    expected = augment.central_view(batch.images, batch.sizes, 32, Tiny.mean, Tiny.std)
    assert torch.equal(seen, expected.double())

    def view(given, size, backbone):
        assert given is batch and size == 32 and backbone.mean == Tiny.mean
        return seen

    for module in (methods, distillation):
        monkeypatch.setattr(module, "plain_view", view)
    return seen


def test_mvmr(batch, plain, in_float64, monkeypatch):
    """Of the plain image and the first view; `augmented` describes the second, the others the
    plain image."""
    # The votes of the real one are float32.
    monkeypatch.setattr(descriptors, "hog", lambda x: x[:, 0, ::4].flatten(1))
    names = ["augmented", "pixels", "local_std", "hog", "scattering"]
    weights = dict(zip(methods.MVMR_WEIGHTS, (0.5, 2.0, 0.7, 0.3)))
    args = recipes.options("mvmr", projector=[9, 7], descriptors=names, global_crops_size=32)
    vars(args).update(weights)
    method = methods.MVMR(Tiny(), args).double()
    views = [torch.randn(6, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    w = leaves_of(method)
    features = features_of(w, [[plain, views[0]]])
    z, z_augmented = projector(features, w, "heads.projector").chunk(2)
    scattering = descriptors.Scattering(32, 32).double()
    fixed = [describe(plain) for describe in (descriptors.local_std, descriptors.hog, scattering)]
    representations = [views[1].flatten(1), plain.flatten(1), *fixed]
    terms = mvmr_terms(z, z_augmented, representations)
    reference = sum(a * b for a, b in zip(weights.values(), terms))
    assert_gradients(method, method(views, batch), reference, w)


# -- Distillation ----------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A teacher's network, which wants other values by channel than the student's."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 5, stride=3)

    def forward(self, x):
        return self.conv(x).mean(dim=(2, 3))


def teacher_of(cached=False, classifier=False):
    backbone, head = Frozen().double(), heads.DINOHead(12, 9, True, False, 10).double()
    for module in (backbone, head):
        module.eval().requires_grad_(False)
    cpu, center = torch.device("cpu"), torch.randn(1, 9)
    teacher = Teacher("tiny", "0", 12, cpu, backbone, 24, head=head, center=center)
    if cached:
        teacher.features = torch.randn(8, 12).numpy()
    if classifier:
        teacher.classifier = nn.Linear(12, 4).double().requires_grad_(False)
    return teacher


def teacher_features(teacher, view):
    """The student's normalisation undone, the teacher's done, its size."""
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (Tiny.mean, Tiny.std))
    x = (view * std + mean - 0.5) / 0.25
    x = F.interpolate(x, (24, 24), mode="bicubic", align_corners=False, antialias=True)
    conv = teacher.backbone.conv
    return F.conv2d(x, conv.weight, conv.bias, stride=3).mean(dim=(2, 3))


def pooled(x, width):
    """Adaptive mean of neighbouring features, by its definition."""
    n, columns = x.shape[1], []
    for i in range(width):
        columns.append(x[:, i * n // width : -(-(i + 1) * n // width)].mean(dim=1))
    return torch.stack(columns, dim=1)


class DistillationReference:
    """The objectives by hand, over the student's weights `w`. Queue and centre move with calls."""

    def __init__(self, args, teacher):
        self.args, self.teacher = args, teacher
        self.queue, self.center = torch.zeros(0, 12).double(), teacher.center.double()

    def loss(self, w, views, plain, batch):
        args, teacher = self.args, self.teacher
        mvmr = "mvmr" in args.objective
        features = features_of(w, [views[:2], views[2:], [plain] if mvmr else []])
        if teacher.features is None:
            t = [teacher_features(teacher, view) for view in views[:2]]
            t.append((t[0] + t[1]) / 2)
            self.once, self.plain = torch.cat(t), teacher_features(teacher, plain)
        else:
            t = [torch.from_numpy(teacher.features)[batch.indices].double()] * 3
            self.once = self.plain = t[0]
        labels = torch.eye(4).double()[batch.labels].repeat(3, 1)
        weights = args.objective_weight or [1.0] * len(args.objective)
        terms = {
            name: getattr(self, name)(w, features, torch.cat(t), labels) for name in args.objective
        }
        return sum(weight * terms[name] for weight, name in zip(weights, args.objective))

    def kd(self, w, features, t, labels):
        T, weight = self.args.temperature, self.args.kd_weight
        s = features[:18]
        if self.args.match == "pool":
            t = pooled(t, 8)
        else:
            s = linear(s, w, "heads.kd")
        if self.teacher.classifier:
            t = t @ self.teacher.classifier.weight.T + self.teacher.classifier.bias
        P_t, P_s = softmax(t / T), softmax(s / T)
        divergence = T**2 * (P_t * (P_t / P_s).log()).sum(dim=1).mean()
        if weight == 1:
            return divergence
        return weight * divergence + (1 - weight) * cross_entropy(labels, s)

    def simkd(self, w, features, t, labels):
        return (projector(features, w, "heads.simkd")[:18] - t).square().mean()

    def similarity(self, w, features, t, labels):
        s = unit(projector(features, w, "heads.similarity")[:18])
        once = unit(self.once)
        anchors = torch.cat([once, self.queue])
        target = softmax(once @ anchors.T / 0.01).repeat(18 // len(once), 1)
        self.queue = anchors[: self.args.queue_size]
        return cross_entropy(target, s @ anchors.T / 0.2)

    def dino(self, w, features, t, labels):
        _, s = dino_head(features, w, "heads.dino")
        with torch.no_grad():
            logits = self.teacher.head(t[:12])  # its MLP's statistics are fixed
        targets = softmax((logits - self.center) / self.args.teacher_temp).split(6)
        s = (s[:18] / self.args.student_temp).split(6)
        pairs = [cross_entropy(targets[g], s[v]) for g in range(2) for v in range(3) if g != v]
        self.center = 0.9 * self.center + 0.1 * logits.mean(dim=0, keepdim=True)
        return sum(pairs) / len(pairs)

    def mvmr(self, w, features, t, labels):
        s = projector(features, w, "heads.mvmr")
        return sum(mvmr_terms(s[18:], s[:6], [self.plain]))


DEFAULTS = dict(
    objective_weight=None, kd_weight=1.0, match="projector", temperature=3.0, queue_size=30,
    projector=[10, 7], student_temp=0.2, teacher_temp=0.05, momentum_teacher=0.6,
    global_crops_number=2,
)  # fmt: skip
CASES = {
    "kd, classifier": dict(objective=["kd"], kd_weight=0.7, classifier=True),
    "kd, features": dict(objective=["kd"]),
    "kd, pooled": dict(objective=["kd"], match="pool"),
    "kd, cached": dict(objective=["kd"], cached=True),
    "simkd": dict(objective=["simkd"]),
    "similarity": dict(objective=["similarity"]),
    "similarity, cached": dict(objective=["similarity"], cached=True),
    "dino": dict(objective=["dino"]),
    "mvmr": dict(objective=["mvmr"]),
    "mvmr, cached": dict(objective=["mvmr"], cached=True),
    "all": dict(
        objective=["mvmr", "dino", "kd", "similarity", "simkd"],
        objective_weight=[0.5, 2.0, 1.5, 0.3, 0.7],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_distillation(case, batch, plain, in_float64):
    """The second of two steps, when queue and centre have content of their own."""
    given = {"cached": False, "classifier": False} | CASES[case]
    teacher = teacher_of(given.pop("cached"), given.pop("classifier"))
    args = argparse.Namespace(**DEFAULTS | given)
    method = distillation.Distillation(Tiny(), args, teacher, total_steps=9).double()
    reference = DistillationReference(args, teacher)
    for _ in range(2):
        views = [torch.randn(6, 3, side, side, dtype=torch.float64) for side in (32, 32, 16)]
        method.zero_grad()
        w = leaves_of(method)
        expected = reference.loss(w, views, plain, batch)
        assert_gradients(method, method(views, batch), expected, w)


def test_the_average_of_the_student_follows_it(in_float64):
    """Weights and batch-norm statistics, by the momentum of the step."""
    args = argparse.Namespace(objective=["dino"], **DEFAULTS)
    method = distillation.Distillation(Tiny(), args, teacher_of(), total_steps=4).double()
    for p in (*method.student.parameters(), method.student.backbone.norm.running_mean):
        p.data += torch.randn_like(p)
    before = part(method.average_student.state_dict(), "")
    method.after_step(1)
    momentum = half_cosine(1, 4, 0.6, 1)
    assert method.backbone is method.average_student.backbone
    for name, value in part(method.average_student.state_dict(), "").items():
        own = method.student.state_dict()[name]
        expected = momentum * before[name] + (1 - momentum) * own
        torch.testing.assert_close(value, expected, **TOLERANCE)

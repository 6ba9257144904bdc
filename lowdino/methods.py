"""Ways to learn, one class per method, each with its flags. A method fits any training loop:

    method = DINO(backbone, options("dino", out_dim=1024), total_steps=1000)
    optimizer = torch.optim.AdamW(method.parameters())
    for step, views in enumerate(loader):  # a list of (B, 3, H, W), the global views first
        loss = method(views, step=step)
        optimizer.zero_grad()
        loss.backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)

`options` is in recipes.py. MV-MR, distillation and `patches_weight` need the batch of the views,
method(views, batch, step), and patch dictionaries `features.fit_dictionaries` before the first one.
`baselines.py` has the methods to compare with. A new method is one class and one row of numbers.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowdino import augment, data, descriptors, distributed, ema, health, losses, schedules
from lowdino.features import PatchStart, patch_features
from lowdino.heads import DINOHead, ManyHeads, MultiViewNetwork, Projector

# -- Flags -----------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A flag --name.

    Attributes:
        type: a function of the text; `bool` for a flag without a value.
        range: of numbers: "> 0", ">= 2" (both finite), or "0 to 1".
        default: where no recipe sets the flag; recipes.py has the values of all others.
    """

    name: str
    help: str
    type: Callable[[str], Any] = str
    range: str = ""
    default: Any = None
    choices: Sequence[str] = ()
    nargs: int | str | None = None
    metavar: str | tuple[str, ...] | None = None

    def wrong(self, value: Any) -> str | None:
        """What is wrong with a value, in one sentence, or None; NaN is in no range."""
        for item in value if isinstance(value, list | tuple) else [value]:
            if self.choices and item not in self.choices:
                near = difflib.get_close_matches(str(item), self.choices, 1)
                hint = f": did you mean {near[0]}?" if near else ";"
                known = ", ".join(self.choices)
                return f"--{self.name} {item} is unknown{hint} choose from {known}"
            if self.range and item is not None and not in_range(item, self.range):
                return f"--{self.name} {in_words(self.range)}, not {value}"
        return None


def in_range(value: float, range: str) -> bool:
    first, *_, last = range.split()
    if " to " in range:
        return float(first) <= value <= float(last)
    return (value > float(last) if first == ">" else value >= float(last)) and value < math.inf


def in_words(range: str) -> str:
    known = {"> 0": "must be above 0", ">= 0": "must be 0 or more"}
    if " to " in range:
        return f"must lie between {range.replace(' to ', ' and ')}"
    return known.get(range) or f"must be at least {range.split()[1]}"


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


SHARED = (
    Flag("projector", "widths of the projector's layers", int, ">= 1", nargs="+"),
    Flag("momentum_teacher", "EMA momentum; none: by the steps", number_or_none, "0 to 1"),
    Flag("alpha", "weight of global against local views; none: by pairs", number_or_none, "0 to 1"),
    Flag("out_dim", "number of prototypes K, the width of the logits", int, ">= 2"),
    Flag("student_temp", "temperature of the student's softmax", float, "> 0"),
    Flag("teacher_temp", "temperature of the teacher's softmax, SwAV's epsilon", float, "> 0"),
    Flag("freeze_last_layer", "epochs in which the prototypes stay fixed", float, ">= 0"),
    Flag("temperature", "temperature of the softmax over keys or classes", float, "> 0"),
    Flag("queue_size", "embeddings in the queue; 0: no queue", int, ">= 0"),
    Flag("patches_weight", "weight of a patch dictionary's similarities, fading", float, ">= 0"),
    Flag("invariance_weight", "weight of the mean square between views", float, ">= 0"),
    Flag("variance_weight", "weight of the hinge on standard deviations", float, ">= 0"),
)


def shared(*names: str) -> tuple[Flag, ...]:
    """Flags of several methods, by name."""
    return tuple(flag for name in names for flag in SHARED if flag.name == name)


# -- The base classes ------------------------------------------------------------------------------


class Method(nn.Module):
    """Base of all methods: a module that owns networks, heads, queues and centres.

    A sub-class is built as Class(backbone, args, total_steps, epoch_steps). `student.backbone` is
    its backbone, and `terms` the parts of its loss. A checkpoint needs its `state_dict()` alone.
    `args` has the values of `flags`, see `recipes.options`. Where `total_steps` is infinity,
    schedules stay at their start; where `epoch_steps` is 0, nothing lasts for some epochs.
    """

    name: str  # of --method
    flags: tuple[Flag, ...] = ()
    evaluated = "student"  # the network whose backbone is evaluated and kept
    out_dim: int | None = None  # K, where outputs are distributions over K prototypes
    remedy = "lower --lr"  # against collapsed embeddings, for `health.Health`
    momentum_rises = True  # of the EMA, to 1
    whitens = False  # the features of the finished backbone, by `features.whitening_layer`
    pairs_views = True  # needs two global views, each to be compared with the other
    terms: dict[str, Tensor] = {}  # scalars of the last loss, for metrics() and the log

    def __init__(self, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__()
        self.args, self.total_steps, self.epoch_steps = args, total_steps, epoch_steps

    @classmethod
    def check(cls, s) -> str | None:
        """The first contradiction between flags, in one sentence, or None."""
        if cls.pairs_views and s.global_crops_number != 2:
            given = s.global_crops_number
            return f"--method {cls.name} takes --global_crops_number 2, not {given}"
        # Without either flag `fit` sets the number of local views.
        known = {"local_crops_number", "preset"} & s.typed
        if getattr(s, "alpha", None) is not None and not s.local_crops_number and known:
            return "--alpha balances global against local views, and --local_crops_number is 0"
        return None

    @classmethod
    def fit(cls, s):
        """Settings where some follow from others that are typed, without --preset."""
        if s.values.get("alpha") is not None and "alpha" in s.typed:
            number = 6  # SSLight's
            s = s.fit("local_crops_number", number, "--alpha balances global against local views")
        return s

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.evaluated).backbone

    def forward(
        self, views: list[Tensor], batch: data.Batch | None = None, step: int = 0
    ) -> Tensor:
        """The loss, a scalar, for V views (B, 3, H, W) of a batch, global views first."""
        raise NotImplementedError

    def before_step(self, step: int = 0) -> None:
        """Called between backward pass and optimizer: drop gradients here."""

    def after_step(self, step: int = 0) -> None:
        """Called after the optimizer: move a momentum teacher here."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the last forward pass, for the log and `health.Health`; on all ranks together.

        Losses and entropies are over all ranks, spread and rank over this rank's images.
        """
        return {}


class ProjectionMethod(Method):
    """Base of methods whose loss compares the embeddings of a projector."""

    projector: Callable[..., nn.Module] = Projector

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(args, total_steps, epoch_steps)
        projector = self.projector(backbone.embed_dim, *args.projector)
        self.student = ManyHeads(backbone, {"projector": projector})

    def keep(self, step: int, features: Tensor, z: Tensor, views: list, **terms: Tensor) -> None:
        """Keep what `metrics` reads: the first view's features and embeddings, and the terms."""
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.last = (step, *(x.detach()[: len(views[0])] for x in (features, z)))

    def metrics(self):
        step, features, z = self.last
        teacher = teacher_metrics(self, step) if hasattr(self, "teacher") else {}
        embeddings = feature_metrics(z, ("embedding_std", "embedding_rank"))
        return mean_terms(self) | embeddings | feature_metrics(features) | teacher


def teacher_momentum(method: Method, step: int) -> float:
    """Momentum of the EMA, lambda in DINO, on a cosine from --momentum_teacher to 1, or fixed.

    With --teacher_update step the teacher is the student after the previous step, with epoch the
    student at the end of the previous epoch (DINO, figure 6): momentum 0, and 1 in between.
    """
    update = getattr(method.args, "teacher_update", "momentum")
    if update != "momentum":
        due = update == "step" or (step + 1) % max(method.epoch_steps, 1) == 0
        return 0.0 if due else 1.0
    start = method.args.momentum_teacher
    if start is None:
        start = default_momentum(method.total_steps)
    if not method.momentum_rises:
        return start
    return schedules.cosine(step, method.total_steps, start, 1.0)


def default_momentum(total_steps: float) -> float:
    """1 - 1 / (2 sqrt(steps)): 0.99 at 2,500 steps, DINO's 0.996 at 16,000 or an unknown number."""
    return 0.996 if total_steps == math.inf else 1 - 0.5 / math.sqrt(total_steps)


def mean_terms(method: Method) -> dict[str, float]:
    """The terms of the last loss, over all ranks."""
    means = {k: distributed.mean_over_ranks(v.clone()) for k, v in method.terms.items()}
    return {name: value.item() for name, value in means.items()}


def prototype_metrics(P_t: Tensor) -> dict[str, float]:
    """Entropies of the teacher's distributions (n, K), in nats."""
    mean = distributed.mean_over_ranks(P_t.mean(dim=0))
    return {
        "entropy": distributed.mean_over_ranks(health.mean_entropy(P_t)).item(),
        "entropy_of_mean": health.mean_entropy(mean[None]).item(),
    }


def feature_metrics(features: Tensor, names=("feature_std", "effective_rank")) -> dict[str, float]:
    """Spread and effective rank of one view's features, or embeddings, (B, D) on this rank."""
    return dict(zip(names, (value.item() for value in health.spread(features))))


def teacher_metrics(method: Method, step: int) -> dict[str, float]:
    """State of the momentum teacher, and whether it still moves."""
    momentum = teacher_momentum(method, step)
    theta_t, theta_s = (weights[0] for weights in method.weights)
    # Towards the end of a long run the schedule lets the teacher stand still, as it should.
    nearly_one = 1 - 1e-6
    by_schedule = momentum > nearly_one and teacher_momentum(method, 0) < nearly_one
    is_copy = getattr(method.args, "teacher_update", "momentum") != "momentum"
    if by_schedule or is_copy:
        moved = True
    else:  # one weight tells whether any moves
        moved = not torch.equal(theta_t, theta_t.lerp(theta_s.detach(), 1 - momentum))
    return {"momentum": momentum, "teacher_moved": moved}


# -- DINO ------------------------------------------------------------------------------------------


UPDATES = ("momentum", "epoch", "step")


class DINO(Method):
    """Self-distillation with no labels (Caron et al., 2021, algorithm 1).

    The student's distribution over K prototypes, for every view, should match the momentum
    teacher's P_t for another, global, view of the same image.
    """

    name = "dino"
    evaluated = "teacher"
    flags = (
        *shared("out_dim"),
        Flag("hidden_dim", "width of the head's hidden layers", int, ">= 1"),
        Flag("use_bn_in_head", "batch norm in the head", true_or_false, metavar="BOOL"),
        Flag("norm_last_layer", "prototypes of length 1: steadier", true_or_false, metavar="BOOL"),
        *shared("freeze_last_layer", "momentum_teacher"),
        Flag("teacher_update", "EMA, or the student of the last epoch or step", choices=UPDATES),
        *shared("student_temp", "teacher_temp"),
        Flag("warmup_teacher_temp", "teacher_temp at the start of its warm-up", float, "> 0"),
        Flag("warmup_teacher_temp_epochs", "warm-up epochs of teacher_temp", float, ">= 0"),
        Flag("centering", "how targets avoid collapse", choices=("softmax", "sinkhorn")),
        Flag("center_momentum", "EMA momentum of the softmax's centre", float, "0 to 1"),
        *shared("alpha", "patches_weight"),
        Flag("koleo_weight", "weight of the KoLeo regulariser (DINOv2: 0.1)", float, ">= 0"),
        Flag("infonce_weight", "weight of InfoNCE at the start, fading to 0", float, ">= 0"),
    )

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(args, total_steps, epoch_steps)
        self.out_dim = args.out_dim
        shape = args.out_dim, args.use_bn_in_head, args.norm_last_layer, args.hidden_dim
        self.student = MultiViewNetwork(backbone, DINOHead(backbone.embed_dim, *shape))
        self.teacher = ema.make_teacher(self.student)  # a copy without gradients
        self.weights = ema.paired_parameters(self.teacher, self.student)  # theta_t, theta_s
        self.patches = PatchStart(backbone, args.patches_weight)
        self.loss = losses.DINOLoss(
            args.out_dim, args.student_temp, args.center_momentum, args.centering, args.alpha
        )

    def forward(self, views, batch=None, step=0):
        with torch.no_grad():
            _, _, t = self.teacher(views[:2])  # logits (2 B, K)
            P_t = self.loss.targets(t, teacher_temperature(self, step))  # centred and sharpened
        features, z, s = self.student(views)  # (V B, D), unit (V B, 256), logits (V B, K)
        loss = self.loss.pairs(s.chunk(len(views)), P_t.chunk(2))  # equation 3
        self.loss.update_center(t)  # equation 4
        self.terms, self.last = {"cross_entropy": loss.detach()}, (step, features.detach(), P_t)
        loss = loss + self.patches(features, batch, step, self.total_steps)
        return loss + regularizers(self, features.chunk(len(views)), z.chunk(len(views)), step)

    def before_step(self, step=0):
        if step < self.args.freeze_last_layer * self.epoch_steps:
            self.student.head.last_layer.zero_grad()

    def after_step(self, step=0):
        ema.update(*self.weights, teacher_momentum(self, step))  # theta_t follows theta_s

    def metrics(self):
        return dino_metrics(self, *self.last)


def teacher_temperature(method: Method, step: int) -> float:
    """T_t, linear over its warm-up in steps; the official code has one value per epoch."""
    args = method.args
    warmup = round(args.warmup_teacher_temp_epochs * method.epoch_steps)
    return schedules.linear(step, warmup, args.warmup_teacher_temp, args.teacher_temp)


def regularizers(method: Method, features: tuple, z: tuple, step: int) -> Tensor | float:
    """InfoNCE between the global views, which fades, and KoLeo; a weight of 0 leaves one out."""
    args, total = method.args, 0.0
    if args.infonce_weight:
        weight = schedules.cosine(step, method.total_steps, args.infonce_weight, 0.0)
        total = weight * losses.InfoNCELoss()(z[0], z[1])
    if args.koleo_weight:
        koleo = losses.KoLeoLoss()
        total = total + args.koleo_weight * (koleo(features[0]) + koleo(features[1]))
    return total


def dino_metrics(method: Method, step: int, features: Tensor, P_t: Tensor) -> dict[str, float]:
    """Entropies of the teacher's distributions, spread of one view's features, state of the EMA."""
    return {
        **mean_terms(method),
        **prototype_metrics(P_t),
        **feature_metrics(features[: len(P_t) // 2]),
        **teacher_metrics(method, step),
        "teacher_temp": teacher_temperature(method, step),
    }


# -- MV-MR -----------------------------------------------------------------------------------------


OF_THE_PAPER = "pixels", "augmented", "local_std", "hog", "scattering"
DESCRIPTORS = (*OF_THE_PAPER, "patches")
MVMR_WEIGHTS = [f"{w}_weight" for w in "invariance variance dependence representation".split()]


class MVMR(ProjectionMethod):
    """Multi-view, multi-representation learning (Kinakh et al.), without a teacher or contrast.

    The embedding z' of an augmented view should depend, by distance correlation, on z of the plain
    image and on fixed descriptors r_m of it. The descriptor "augmented" is the second view.
    """

    name = "mvmr"
    flags = (
        *shared("projector"),
        Flag("descriptors", "fixed representations of the image", choices=DESCRIPTORS, nargs="+"),
        *shared("invariance_weight", "variance_weight"),
        Flag("dependence_weight", "weight of L2, 1 - distance correlation", float, ">= 0"),
        Flag("representation_weight", "weight of L3, the same with descriptors", float, ">= 0"),
    )

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        self.loss = losses.MVMRLoss(*(getattr(args, name) for name in MVMR_WEIGHTS))
        if "scattering" in args.descriptors:
            with distributed.user_errors():
                self.scattering = descriptors.Scattering(*[args.global_crops_size] * 2)
        if "patches" in args.descriptors:
            self.dictionary = descriptors.PatchDictionary(len(backbone.mean))

    def forward(self, views, batch=None, step=0):
        plain = plain_view(batch, views[0].shape[-1], self.backbone)
        features, outputs = self.student([plain, views[0]])  # (2 B, D)
        z, z_augmented = outputs["projector"].chunk(2)  # (B, E)
        r = self.representations(plain, views[1], batch) if self.args.representation_weight else []
        terms = self.loss(z, z_augmented, r)  # L1, L2 and L3, equations 4 to 9
        self.terms = {f"L{i}": term.detach() for i, term in enumerate(terms, start=1)}
        self.last = features.detach().chunk(2)[0]
        return sum(terms)  # equation 10

    def representations(self, plain: Tensor, augmented: Tensor, batch: data.Batch) -> list[Tensor]:
        describe = {name: getattr(descriptors, name) for name in ("pixels", "local_std", "hog")}
        describe["scattering"] = getattr(self, "scattering", None)
        describe["augmented"] = lambda _: descriptors.pixels(augmented)
        describe["patches"] = lambda _: patch_features(self.dictionary, batch)
        return [describe[name](plain) for name in self.args.descriptors]

    def metrics(self):
        return mean_terms(self) | feature_metrics(self.last)

    @classmethod
    def check(cls, s):
        if s.local_crops_number:
            given = s.local_crops_number
            return f"--method mvmr has one augmented view: give --local_crops_number 0, not {given}"
        if len(set(s.descriptors)) < len(s.descriptors):
            return f"--descriptors names one twice: {' '.join(s.descriptors)}"
        if not any(getattr(s, name) for name in MVMR_WEIGHTS):
            return "--method mvmr has nothing to learn: all four of its weights are 0"
        return super().check(s)


def plain_view(batch: data.Batch, size: int, backbone: nn.Module) -> Tensor:
    """The images of a batch uncropped, resized and normalised: (B, 3, size, size)."""
    x = augment.central_view(batch.images, batch.sizes, size, backbone.mean, backbone.std)
    return x.contiguous(memory_format=torch.channels_last)


# -- EMP-SSL ---------------------------------------------------------------------------------------


class EMP(ProjectionMethod):
    """Extreme multi-patch learning (EMP-SSL; Tong et al., 2023): many views of few images.

    The embeddings of an image's views should be near their mean, and those of the batch should have
    the largest coding rate. There is no teacher and no contrast; a patch dictionary begins it.
    """

    name, whitens, pairs_views = "emp", True, False
    remedy = "lower --cosine_weight, or --lr"
    views_per_step = 512  # on a rank, where the number of views is typed
    flags = (
        *shared("projector"),
        Flag("cosine_weight", "weight of the cosine to the image's mean", float, ">= 0"),
        Flag("rate_eps", "squared precision of the coding rate", float, "> 0"),
        *shared("patches_weight"),
    )

    def __init__(self, backbone, args, total_steps: float = math.inf, epoch_steps: int = 0):
        super().__init__(backbone, args, total_steps, epoch_steps)
        self.loss = losses.CodingRateLoss(args.cosine_weight, args.rate_eps)
        self.patches = PatchStart(backbone, args.patches_weight)

    def forward(self, views, batch=None, step=0):
        features, outputs = self.student(views)
        z = outputs["projector"].unflatten(0, (len(views), -1))  # (V, B, d)
        cosine, rate = self.loss(z)
        self.keep(step, features, outputs["projector"], views, cosine=cosine, coding_rate=rate)
        patches = self.patches(features, batch, step, self.total_steps)  # fading
        return self.loss.total(cosine, rate) + patches

    @classmethod
    def fit(cls, s):
        if "global_crops_number" in s.typed:
            batch = max(cls.views_per_step // s.global_crops_number, 16)
            s = s.fit("batch_size_per_gpu", batch, f"{cls.views_per_step} views per step")
        return s

    @classmethod
    def check(cls, s):
        if s.global_crops_number + s.local_crops_number < 2:
            return "--method emp compares views of an image: give --global_crops_number 2 or more"
        return None

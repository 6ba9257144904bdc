"""Does self-distillation learn, or does it collapse? The diagnosis needs no labels, only the log.

Use in a training loop:

    health = Health(out_dim)
    for line in health.read(step, feature_std=..., effective_rank=..., cross_entropy=..., ...):
        print(line)          # a symptom that has lasted, or one that is over
    print(health.verdict())  # one sentence at the end

verdict                   symptom                                    try
uniform collapse          mean entropy above 0.99 ln K: all          --infonce_weight 1,
                          prototypes, for every image                lower --teacher_temp
one-cluster collapse      entropy of the mean below 0.1 ln K, or no  lower --center_momentum,
                          higher than the mean entropy               higher --teacher_temp,
                                                                     --centering sinkhorn
nothing left to learn     cross-entropy less entropy, the KL of      higher --out_dim, wider
                          teacher and student, near 0                crops, local views
dead features             unit features within 0.01 of their mean,   lower --lr, a look at
                          or an effective rank below 1.5             crops.png
collapsed embeddings      within 0.1 of their mean, or an effective  the flag that the log
                          rank below 1.5 (no prototypes)             names, lower --lr
diverging loss            cross-entropy above 1.05 ln K              lower --lr, longer
                                                                     --warmup_epochs
teacher stands still      the EMA does not change it                 lower --momentum_teacher,
                                                                     higher --lr
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def mean_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows of (n, K), in nats."""
    return torch.special.entr(probabilities).sum(dim=1).mean()


@torch.no_grad()
def spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Scatter of the normalised features (n, D) about their mean, and its number of directions.

    These are the root mean square distance from the mean, in [0, 1], and the effective rank (sum
    l)^2 / sum l^2 of the eigenvalues l of their covariance (the participation ratio), from 1 to
    min(n - 1, D). Both are 0 where all features are equal.
    """
    z = F.normalize(features.float(), dim=1)
    z = z - z.mean(dim=0)
    gram = z @ z.T  # (n, n), with the covariance's non-zero eigenvalues times n
    total = gram.trace()
    return (total / len(z)).clamp_min(0).sqrt(), total**2 / gram.square().sum().clamp_min(1e-20)


class Health:
    """Reports the symptoms in the table above, without labels, and suggests the flag to change.

    A symptom counts once every reading has shown it for `PATIENCE` steps, because a healthy run
    starts near some of them. The symptoms follow DINO (Caron et al., 2021, section 5.3 and
    figure 7): entropy and KL divergence tell the two kinds of collapse apart. Entropies are in
    nats; ln K is that of the uniform distribution over K = `out_dim` prototypes. For a method
    without them, out_dim=None, features alone are judged. `remedy` is against collapsed embeddings.

    The thresholds were chosen on the runs of tests/test_collapse.py: a healthy one, and one that
    fails in each way.
    """

    PATIENCE = 200

    def __init__(self, out_dim: int | None, remedy: str = "lower --lr"):
        self.remedy = remedy
        self.uniform = math.log(out_dim) if out_dim else math.inf  # ln K
        self.steps = 0  # from the first reading to the last, both included
        self.first_step: int | None = None
        self.current: dict[str, str] = {}  # symptoms of the last reading
        self.since: dict[str, int] = {}  # step at which each of them began
        self.told: dict[str, str] = {}  # those of them that have lasted
        self.ill_since: int | None = None  # first step of the last readings with any symptom

    def symptoms(
        self,
        feature_std: float,
        effective_rank: float,
        cross_entropy: float | None = None,
        entropy: float | None = None,
        entropy_of_mean: float | None = None,
        teacher_moved: bool = True,
        embedding_std: float | None = None,
        embedding_rank: float | None = None,
        **others: float,
    ) -> dict[str, str]:
        """The symptoms of one reading: name and sentence.

        Args:
            feature_std, effective_rank: `spread` of the backbone's features.
            cross_entropy: of the student to the teacher, which is DINO's loss.
            entropy: mean entropy of the teacher's distributions. entropy_of_mean: of their mean.
            embedding_std, embedding_rank: `spread` of one view's embeddings, if a loss has any.
            teacher_moved: whether a step of the moving average changes the teacher's parameters.
            others: metrics that do not matter here.
        """
        if cross_entropy is not None and cross_entropy > 1.05 * self.uniform:
            above = f"{cross_entropy:.2f} is above that of a uniform distribution, ln K = "
            advice = f"{self.uniform:.2f}: lower --lr, or lengthen --warmup_epochs"
            return {"diverging loss": f"the cross-entropy {above}{advice}"}  # it causes the others
        symptoms = {}
        if not teacher_moved:
            advice = "lower --momentum_teacher, or raise --lr"
            symptoms["teacher stands still"] = f"the EMA does not change it: {advice}"
        if feature_std < 0.01 or effective_rank < 1.5:
            symptoms["dead features"] = (
                f"the backbone's features are nearly a point or a line (std {feature_std:.4f}, "
                f"effective rank {effective_rank:.1f}): lower --lr, raise --infonce_weight where "
                "there is one, and see in crops.png whether the pictures differ at all"
            )
        if embedding_std is not None and (embedding_std < 0.1 or embedding_rank < 1.5):
            symptoms["collapsed embeddings"] = (
                f"they are nearly a point or a line (std {embedding_std:.3f}, effective rank "
                f"{embedding_rank:.1f}), whatever the image: {self.remedy}"
            )
        if entropy is not None:
            symptoms |= self.collapse(cross_entropy, entropy, entropy_of_mean)
        return symptoms

    def collapse(self, cross_entropy: float | None, entropy: float, of_mean: float) -> dict:
        """The symptom of the teacher's distributions, if they have one."""
        numbers = f"(entropy {entropy:.2f}, of the mean {of_mean:.2f}, ln K {self.uniform:.2f})"
        same = "the teacher gives every image the same distribution, "
        if entropy > 0.99 * self.uniform:
            advice = "raise --infonce_weight, or lower --teacher_temp"
            return {"uniform collapse": f"{same}uniform over the prototypes {numbers}: {advice}"}
        # The difference is the mutual information of image and prototype.
        if of_mean < 0.1 * self.uniform or of_mean - entropy < 0.01 * self.uniform:
            advice = "lower --center_momentum, raise --teacher_temp, or use --centering sinkhorn"
            return {"one-cluster collapse": f"{same}over few prototypes {numbers}: {advice}"}
        if cross_entropy is not None and (kl := cross_entropy - entropy) < 0.02 * self.uniform:
            advice = "raise --out_dim, widen --global_crops_scale, or add local views"
            symptom = f"the student already predicts what the teacher does (KL {kl:.3f}): {advice}"
            return {"nothing left to learn": symptom}
        return {}

    def read(self, step: int, **metrics: float | bool) -> list[str]:
        """The sentences that are new at this step. `metrics` are the arguments of `symptoms`."""
        if self.first_step is None:
            self.first_step = step
        self.steps = step - self.first_step + 1
        current = self.current = self.symptoms(**metrics)
        if not current:
            self.ill_since = None
        elif self.ill_since is None:
            self.ill_since = step
        self.since = {name: self.since.get(name, step) for name in current}
        old = {name for name, start in self.since.items() if step - start + 1 >= self.PATIENCE}
        lasting = {name: text for name, text in current.items() if name in old}
        news = [f"{name}: {text}" for name, text in lasting.items() if name not in self.told]
        news += [f"{name}: over" for name in self.told if name not in current]
        self.told = {name: text for name, text in (self.told | lasting).items() if name in current}
        return news

    def verdict(self) -> str:
        """One sentence on the symptoms that have lasted; those that take turns count together."""
        if self.steps < self.PATIENCE:
            steps = f"{self.steps} step{'s' if self.steps != 1 else ''}"
            so_far = f"; seen so far: {joined(self.current)}" if self.current else ""
            return f"too short to tell: {steps}, a verdict needs {self.PATIENCE}{so_far}"
        always = self.ill_since is not None
        ill = always and self.first_step + self.steps - self.ill_since >= self.PATIENCE
        return joined(self.told) or (joined(self.current) if ill else "no sign of collapse")


def joined(symptoms: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in symptoms.items())

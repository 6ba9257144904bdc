"""Optimizers by name, and parts that torch.optim lacks: groups, clipping, LARS, Muon."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups: weights, which decay, and biases and norms, which do not, marked by `decays`.

    Weights have at least two dimensions (so has the gain of `WeightNormLinear`), the others one.
    """
    return decay_groups([p for p in model.parameters() if p.requires_grad])


def decay_groups(parameters: list[Tensor]) -> list[dict]:
    """The two groups of `parameter_groups` for a list of parameters."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "decays": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decays": False, "weight_decay": 0.0},
    ]


EMBEDDINGS = ("cls_token", "pos_embed", "register_tokens", "patch_embed")


def layerwise_groups(backbone: nn.Module, head: nn.Module, decay: float) -> list[dict]:
    """Groups whose learning rates fall by a factor of `decay` per block, from the head down.

    As in BEiT (Bao et al., 2021). A block is a child of the backbone, or each child of a child that
    is a sequence, in the order of definition. In a ViT the final `norm` belongs to the head, and
    all embeddings form the lowest block. The two groups of a block have their factor in `scale`.
    """
    top, blocks = [*head.parameters()], {}  # blocks: name -> parameters
    for name, parameter in backbone.named_parameters():
        child, *rest = name.split(".")
        if child == "norm":
            top.append(parameter)
            continue
        if child in EMBEDDINGS:
            child = "embeddings"
        elif isinstance(getattr(backbone, child), (nn.Sequential, nn.ModuleList)):
            child += "." + rest[0]
        blocks.setdefault(child, []).append(parameter)
    downwards = [top, *reversed(blocks.values())]
    return [
        {**group, "scale": decay**depth}
        for depth, block in enumerate(downwards)
        for group in decay_groups(block)
        if group["params"]
    ]


@torch.no_grad()
def clip_gradients_by_parameter(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient to a Euclidean norm of at most `max_norm` (0: no limit), in place.

    DINO clips each tensor by itself; `torch.nn.utils.clip_grad_norm_` clips all together. On a GPU
    nothing here waits for the device. Returns the norms before clipping, one per gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    # On a CPU a look at the norms costs nothing, and mostly none is too large.
    if max_norm and (norms.device.type != "cpu" or not norms.max() < max_norm):
        scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))
    return norms


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, with momentum (You et al., 2017, arXiv 1708.03888).

    For a weight w with gradient g:
        d = g + weight_decay * w
        d <- d * trust * |w| / |d|
        v <- momentum * v + d
        w <- w - lr * v
    Biases and norms (at most one dimension) take the plain momentum step without decay, as in BYOL.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=1e-3):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad
                if p.ndim > 1:
                    d = d.add(p, alpha=group["weight_decay"])
                    w_norm, d_norm = p.norm(), d.norm()
                    # For a zero weight or gradient, without a ratio of norms, the rate stays.
                    known = (w_norm > 0) & (d_norm > 0)
                    d = d * torch.where(known, group["trust"] * w_norm / d_norm, 1.0)
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].mul_(group["momentum"]).add_(d)
                p.add_(state["velocity"], alpha=-group["lr"])
        return loss


def is_matrix(p: Tensor) -> bool:
    """Whether Muon treats a weight as a matrix: two dimensions, or a convolution's four."""
    return p.ndim in (2, 4) and p.numel() > len(p)


def muon_groups(model: nn.Module, scale: float) -> list[dict]:
    """Groups for `Muon`: the matrices, and two for the others, at `scale` times their rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if is_matrix(p)]
    others = decay_groups([p for p in parameters if not is_matrix(p)])
    return [{"params": matrices, "decays": True}, *({**group, "scale": scale} for group in others)]


@contextmanager
def exact_matmul():
    """Do not round products of float32 matrices to TF32 or bf16 inside a `with`."""
    # torch 2.9 has a precision per backend; once set, a query of the global one is an error.
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in backends]
    of_all = None if backends else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if of_all:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
        if of_all:
            torch.set_float32_matmul_precision(of_all)


def orthogonalized(gradients: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices: (k, m, n) -> (k, m, n) float32.

    Newton and Schulz's iteration X <- (a + b X X^T + c (X X^T)^2) X with Muon's coefficients brings
    singular values from [0.01, 1] near 1, to [0.7, 1.2]. Each factor is a polynomial of S = X X^T,
    so only S (m, m) is iterated, where m is the shorter side, and X is multiplied once. Rounding to
    bf16 or TF32 could push an eigenvalue of S below 0, where five steps multiply it by up to a^10 =
    235,000: gradients of low rank, as near collapse, gave updates a thousand times too long.
    """
    if gradients.shape[1] > gradients.shape[2]:
        return orthogonalized(gradients.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradients.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    with exact_matmul():
        s, product = x @ x.mT, None  # (k, m, m)
        for i in range(steps):
            factor = torch.baddbmm(s, s, s, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            if i < steps - 1:
                s = factor @ s @ factor
        return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are replaced by nearly orthogonal ones (Jordan et al., 2024).

    For a weight W, a matrix (out, rest), with gradient G and learning rate lr:
        M <- momentum M + G,   O = orthogonalized(G + momentum M)           (Nesterov's momentum)
        W <- (1 - lr weight_decay) W - lr max(1, out / rest)^0.5 O
    All other parameters (biases, norms, gains, a ViT's tokens and positions; see `is_matrix`) take
    AdamW's step at `lr`, with the decay of their group. Torch 2.9's Muon takes no convolutions.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def load_state_dict(self, state_dict):
        """Keep this run's learning-rate factors, `scale`."""
        factors = [{"scale": g["scale"]} if "scale" in g else {} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, factor in zip(self.param_groups, factors):
            group.update(factor)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            shapes = defaultdict(list)
            for p in parameters:
                if is_matrix(p):
                    shapes[len(p), p.numel() // len(p)].append(p)
            for weights in shapes.values():
                self.step_matrices(group, weights)
            if others := [p for p in parameters if not is_matrix(p)]:
                self.step_others(group, others)
        return loss

    def step_matrices(self, group: dict, weights: list[Tensor]) -> None:
        """Update weights of one shape by a few batched products in place of many small ones."""
        gradients, momentum = [p.grad for p in weights], self.buffers(weights, "momentum")
        torch._foreach_mul_(momentum, group["momentum"])
        torch._foreach_add_(momentum, gradients)
        nesterov = torch._foreach_add(gradients, momentum, alpha=group["momentum"])
        updates = orthogonalized(torch.stack([g.flatten(1) for g in nesterov]))  # (k, out, rest)
        out, rest = updates.shape[1:]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        updates = [u.view(p.shape) for u, p in zip(updates, weights)]
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * max(1, out / rest) ** 0.5)

    def step_others(self, group: dict, others: list[Tensor]) -> None:
        gradients, (b1, b2) = [p.grad for p in others], self.BETAS
        mean, square = self.buffers(others, "mean"), self.buffers(others, "square")
        t = group["adamw_steps"] = group.get("adamw_steps", 0) + 1
        torch._foreach_mul_(others, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(mean, gradients, 1 - b1)
        torch._foreach_mul_(square, b2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - b2)
        root = torch._foreach_sqrt(square)
        torch._foreach_div_(root, (1 - b2**t) ** 0.5)
        torch._foreach_add_(root, self.EPS)
        torch._foreach_addcdiv_(others, mean, root, -group["lr"] / (1 - b1**t))

    def buffers(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """The state `name` of every parameter, zeros at the start."""
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]


MUON_OTHERS = (
    2e-3  # AdamW's peak rate for biases, norms, gains and tokens beside Muon, as in "small"
)


def build(name: str, model: nn.Module, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer `name` ("adamw", "muon", "sgd" or "lars"); `lr` is the peak of Muon's matrices.

    A loop sets each group's learning rate in every step, to its `scale` times the schedule's.
    """
    if name == "muon":
        return Muon(muon_groups(model, MUON_OTHERS / lr if lr else 1.0))
    groups = parameter_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=device.type in ("cuda", "cpu"))
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return LARS(groups)

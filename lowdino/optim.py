"""What torch.optim lacks: parameter groups, clipping by parameter, LARS."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups: weights, which decay, and biases and norms, which do not.

    Weights have two dimensions or more (the gain of `WeightNormLinear` too), the others one. The
    groups are marked `decays` True and False; the second has `weight_decay` 0.
    """
    return decay_groups([p for p in model.parameters() if p.requires_grad])


def decay_groups(parameters: list[Tensor]) -> list[dict]:
    """The two groups of `parameter_groups`, of these parameters."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "decays": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decays": False, "weight_decay": 0.0},
    ]


EMBEDDINGS = ("cls_token", "pos_embed", "register_tokens", "patch_embed")


def layerwise_groups(backbone: nn.Module, head: nn.Module, decay: float) -> list[dict]:
    """Groups whose learning rates fall by a factor of `decay` a block, from the head down.

    As in BEiT (Bao et al., 2021). A block is a child of the backbone, or a child of a child that is
    a sequence, in the order of definition. Of a ViT, the final `norm` goes with the head, and all
    embeddings are one block, the lowest: block i of n has depth n - i, the embeddings n + 1.

    Each group is one of `parameter_groups`, of one block, and has its factor in `scale`.
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
    """Scale each parameter's gradient down to a Euclidean norm of at most `max_norm`, in place.

    DINO's clipping has a limit for each tensor; `torch.nn.utils.clip_grad_norm_` has one for all
    together. On a GPU nothing here waits for the device.

    Args:
        max_norm: 0 is no limit.

    Returns:
        The norms before clipping, one for each parameter that has a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        # On a CPU looking at the norms costs nothing, and mostly none is too large.
        if norms.device.type != "cpu" or not norms.max() < max_norm:
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
    Biases and norms (one dimension or none) take the plain momentum step without decay, as in BYOL.

    Args:
        lr: learning rate.
        weight_decay: of weights.
        momentum: of the velocity v.
        trust: the trust coefficient.
    """

    def __init__(
        self,
        params,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 1e-3,
    ):
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        )

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
                    # A zero weight or gradient has no ratio of norms; its rate is not scaled.
                    rate = torch.where(
                        (w_norm > 0) & (d_norm > 0), group["trust"] * w_norm / d_norm, 1.0
                    )
                    d = d * rate
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].mul_(group["momentum"]).add_(d)
                p.add_(state["velocity"], alpha=-group["lr"])
        return loss

"""The momentum teacher: an exponential moving average of the student's parameters (He et al., 2020; Caron et al., 2021).

A teacher's buffers, batch norm's running statistics among them, are its own, from its own forward passes in training mode:
averaged statistics would belong to no network that ever ran. Only parameters are averaged, then.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student that shares no storage with it, takes no gradient and drops no path."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return teacher


def paired_parameters(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of both, matched by name, for `update`.

    Raises:
        ValueError: where the names differ, or a tensor is shared.
    """
    theirs, ours = dict(teacher.named_parameters()), dict(student.named_parameters())
    if theirs.keys() != ours.keys():
        raise ValueError(
            f"teacher and student have different parameters: {sorted(theirs.keys() ^ ours.keys())[:5]}"
        )
    shared = [name for name in ours if theirs[name].data_ptr() == ours[name].data_ptr()]
    if shared:
        raise ValueError(
            f"teacher and student share the storage of {shared[:5]}: the teacher must be a copy"
        )
    return list(theirs.values()), [ours[name] for name in theirs]


def paired_buffers(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point buffers of both, for `update`: of an average that sees no image itself and can have none of its own."""
    pairs = [(a, b) for a, b in zip(teacher.buffers(), student.buffers()) if a.is_floating_point()]
    return [a for a, _ in pairs], [b for _, b in pairs]


@torch.no_grad()
def update(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place (equation 1 of LowDINO). There may be none."""
    if teacher:
        torch._foreach_lerp_(teacher, student, 1 - momentum)

"""The momentum teacher: an exponential moving average (EMA) of the student's parameters.

He et al., 2020; Caron et al., 2021. Buffers, such as the statistics of batch norm, come from the
teacher's forward passes in training mode: averages would describe the activations of no network.
Only a teacher without such passes averages its buffers too, see `paired_buffers`.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth


def make_teacher(student: nn.Module) -> nn.Module:
    """A deep copy of the student, without gradients and stochastic depth."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return teacher


def paired_parameters(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of both, matched by name, for `update`.

    A ValueError says that the names differ, or that a tensor is shared.
    """
    theirs, ours = dict(teacher.named_parameters()), dict(student.named_parameters())
    if theirs.keys() != ours.keys():
        different = sorted(theirs.keys() ^ ours.keys())[:5]
        raise ValueError(f"teacher and student have different parameters: {different}")
    shared = [name for name in ours if theirs[name].data_ptr() == ours[name].data_ptr()]
    if shared:
        raise ValueError(f"teacher and student share {shared[:5]}: the teacher must be a copy")
    return list(theirs.values()), [ours[name] for name in theirs]


def paired_buffers(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point buffers of both, for `update`, if no forward pass makes the teacher's."""
    pairs = [(a, b) for a, b in zip(teacher.buffers(), student.buffers()) if a.is_floating_point()]
    return [a for a, _ in pairs], [b for _, b in pairs]


@torch.no_grad()
def update(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """In place, teacher <- momentum * teacher + (1 - momentum) * student (LowDINO's equation 1)."""
    if teacher:  # _foreach_ refuses empty lists
        torch._foreach_lerp_(teacher, student, 1 - momentum)

"""The network's input: a state and its two times in one tensor, and labels: classes, and beside them either conditions or
what an augmentation did.
"""

import torch
from torch import Tensor


def make_unified_flow_matching_input(x: Tensor, times: Tensor) -> Tensor:
    """Fuse a state and its two times into one fp32 tensor.

    x: (B, D) or (B, C, H, W), the state. times: (B, 2), the time of the state and the time it is headed to.
    Returns (B, D + 2), or (B, C + 2, H, W) with each time as a constant channel. Always fp32: bf16 would ruin t - r.
    """
    if x.ndim == 4:
        times = times[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x.float(), times.float()], dim=1)


def split_unified_flow_matching_input(unified: Tensor) -> tuple[Tensor, Tensor]:
    """Undo make_unified_flow_matching_input exactly, without a spatial mean: the state and the times (B, 2)."""
    state, times = unified[:, :-2], unified[:, -2:]
    return state, times[:, :, 0, 0] if unified.ndim == 4 else times


def join_label(classes: Tensor | None, parameters: Tensor) -> Tensor:
    """Return one label (B, 1 + A) fp32 of classes (B,), 0 where there are none, and what an augmentation did, (B, A)."""
    column = parameters.new_zeros(len(parameters), 1) if classes is None else classes[:, None].to(parameters)
    return torch.cat([column, parameters], dim=1)


def split_label(label: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Undo join_label: classes (B,) int64, and parameters (B, A) or None for a label that is classes alone."""
    if label is None or label.ndim == 1:
        return label, None
    return label[:, 0].long(), label[:, 1:]


def join_condition(classes: Tensor | None, condition: Tensor) -> Tensor:
    """Return one label (B, 2 + P) fp32 of classes (B,), 0 where there are none, 1 for "shown", and conditions (B, ...)."""
    flat = condition.flatten(1).float()
    return join_label(classes, torch.cat([flat.new_ones(len(flat), 1), flat], dim=1))


def join_class(label: Tensor, classes: Tensor) -> Tensor:
    """Return labels (B, 1 + A) or (B, 2 + P) with other classes (B,)."""
    return torch.cat([classes[:, None].to(label), label[:, 1:]], dim=1)


def classes_in(label: Tensor | None, num_classes: int) -> Tensor | None:
    """Return the classes (B,) of labels of data that have so many; None of none."""
    return split_label(label)[0] if num_classes else None


def with_class(label: Tensor, number: int) -> Tensor:
    """Return the label, (B,) or (B, 1 + A), with every class replaced by one."""
    parameters = split_label(label)[1]
    same = torch.full((len(label),), number, dtype=torch.int64, device=label.device)
    return same if parameters is None else join_label(same, parameters)

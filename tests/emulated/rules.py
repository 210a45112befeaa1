"""What the emulated device refuses and rounds, and the count of the waits for it."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tests.emulated import memory

NAME = "emu"
TESTED = ("2.14", "2.15")  # versions of torch whose hooks this was written for
Kind = Literal["cuda", "mps"]
aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.equal.default, aten.unique_dim.default, aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten.convolution_backward.default,
}  # fmt: skip
NOT_DETERMINISTIC = {
    aten.kthvalue.default, aten.median.dim, aten._adaptive_avg_pool2d_backward.default, aten.put_.default,
    aten.histc.default, aten.upsample_bilinear2d_backward.default, aten.upsample_bicubic2d_backward.default,
    aten.reflection_pad2d_backward.default, aten.grid_sampler_2d_backward.default,
}  # fmt: skip
# What autocast runs in lower precision and in fp32.
LOWER = (
    "mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "conv1d", "conv2d", "conv3d", "_convolution.deprecated",
    "matmul", "scaled_dot_product_attention",
)  # fmt: skip
FULL = (
    "exp", "log", "pow.Tensor_Scalar", "rsqrt", "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "mse_loss",
    "cross_entropy_loss", "sum",
)  # fmt: skip
FUSED = {aten._fused_adam_.default, aten._fused_adamw_.default, aten._fused_sgd_.default}
# Factories whose default kernel resizes an empty tensor, which a wrapper cannot follow.
FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")
EMULATION = {Path(__file__).with_name(f"{name}.py") for name in ("rules", "device", "registration")}


@dataclass
class Rules:
    """What the device refuses, rounds and tunes."""

    kind: Kind = "cuda"
    rounds: bool = True  # False: no TF32, to compare with the CPU
    tuned: set[int] = field(default_factory=set)  # rows of convolutions that kernels were tried for (cudnn.benchmark)

    @property
    def float64(self) -> bool:
        return self.kind == "cuda"

    @property
    def tf32(self) -> bool:
        return self.kind == "cuda" and self.rounds and torch.backends.cuda.matmul.allow_tf32

    @property
    def deterministic(self) -> bool:
        return self.kind == "cuda" and torch.are_deterministic_algorithms_enabled()


class Waits:
    """Counts the times the host waited for the device, by cause, and where in the project's code, while traced() is open."""

    def __init__(self) -> None:
        self.causes, self.places, self.operations, self.copies = Counter[str](), Counter[str](), 0, 0
        self.tracing = False

    def record(self, cause: str) -> None:
        memory.arrive(memory.LATE)
        self.causes[cause] += 1
        if self.tracing:
            frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
            ours = [frame for frame in frames if Path(frame.filename) not in EMULATION]
            self.places[f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}" if ours else cause] += 1

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Start from nothing, and note the place of every wait within."""
        self.causes.clear()
        self.places.clear()
        self.operations, self.copies, self.tracing = 0, 0, True
        yield
        self.tracing = False


RULES, WAITED = Rules(), Waits()


def as_tf32(value: Any) -> Any:
    """Round to the ten bits of mantissa that a tensor core reads of a float32."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.dim() < 2:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view_as(value)

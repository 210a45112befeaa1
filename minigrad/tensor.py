"""An array that remembers how it was computed, and gives the gradient of a scalar with respect to all it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, Union

import numpy as np

Array: TypeAlias = np.ndarray
Pullback = Callable[[Array], Array]  # from the gradient with respect to a result to that with respect to an argument
Operand: TypeAlias = Union["Tensor", Array, float]


def summed_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Return the gradient of an array of this shape that was broadcast: the sum over every place it was copied to."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    copied = tuple(axis for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis] != 1)
    return gradient.sum(axis=copied, keepdims=True) if copied else gradient


class Tensor:
    """Wrap an array of any shape (a number is one of shape ()) so that operations on it can be differentiated.

    data: the array, float64. grad: the gradient of what backward() was called on, of the same shape, zeros at first; it
    accumulates over calls until it is set to zero. An array or a number in an operation is a constant.
    """

    __array_ufunc__ = None  # an array on the left leaves the operation to the tensor

    def __init__(self, data: Operand | list[float], sources: list[tuple[Tensor, Pullback]] | None = None):
        self.data: Array = np.asarray(data.data if isinstance(data, Tensor) else data, dtype=np.float64)
        self.grad: Array = np.zeros_like(self.data)
        self.sources = sources or []

    shape = property(lambda self: self.data.shape)
    T = property(lambda self: self.transpose())

    @staticmethod
    def of(operand: Operand) -> Tensor:
        return operand if isinstance(operand, Tensor) else Tensor(operand)

    def __repr__(self) -> str:
        return f"Tensor({self.data})"

    def __add__(self, other: Operand) -> Tensor:
        a, b = self, Tensor.of(other)
        return Tensor(a.data + b.data, [(a, lambda g: summed_to(g, a.shape)), (b, lambda g: summed_to(g, b.shape))])

    def __mul__(self, other: Operand) -> Tensor:
        a, b = self, Tensor.of(other)
        back_to_a, back_to_b = (lambda g: summed_to(g * b.data, a.shape)), (lambda g: summed_to(g * a.data, b.shape))
        return Tensor(a.data * b.data, [(a, back_to_a), (b, back_to_b)])

    def __pow__(self, power: Operand) -> Tensor:
        if isinstance(power, Tensor):
            return (power * self.log()).exp()
        n = np.asarray(power, dtype=np.float64)
        return Tensor(self.data**n, [(self, lambda g: summed_to(g * n * self.data ** (n - 1), self.shape))])

    def __matmul__(self, other: Operand) -> Tensor:
        a, b = self, Tensor.of(other)
        if a.data.ndim == 1 or b.data.ndim == 1:  # a vector is one row on the left, one column on the right
            rows, columns = (a.reshape(1, -1) if a.data.ndim == 1 else a), (b.reshape(-1, 1) if b.data.ndim == 1 else b)
            return (rows @ columns).reshape((a.data @ b.data).shape)
        back_to_a = lambda g: summed_to(g @ b.data.swapaxes(-1, -2), a.shape)  # noqa: E731
        return Tensor(a.data @ b.data, [(a, back_to_a), (b, lambda g: summed_to(a.data.swapaxes(-1, -2) @ g, b.shape))])

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __sub__(self, other: Operand) -> Tensor:
        return self + -Tensor.of(other)

    def __truediv__(self, other: Operand) -> Tensor:
        return self * Tensor.of(other) ** -1.0

    def __rsub__(self, other: Operand) -> Tensor:
        return Tensor.of(other) - self

    def __rtruediv__(self, other: Operand) -> Tensor:
        return Tensor.of(other) / self

    def __rpow__(self, other: Operand) -> Tensor:
        return Tensor.of(other) ** self

    def __rmatmul__(self, other: Operand) -> Tensor:
        return Tensor.of(other) @ self

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the sum over an axis, several, or all."""
        kept = self.data.sum(axis=axis, keepdims=True).shape
        total = self.data.sum(axis=axis, keepdims=keepdims)
        return Tensor(total, [(self, lambda g: np.broadcast_to(g.reshape(kept), self.shape))])

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the mean over an axis, several, or all."""
        return self.sum(axis, keepdims) * (self.data.mean(axis=axis).size / self.data.size)

    def reshape(self, *shape: Any) -> Tensor:
        """Return the same numbers in another shape, given as numbers or as one tuple."""
        return Tensor(self.data.reshape(*shape), [(self, lambda g: g.reshape(self.shape))])

    def transpose(self, *axes: int) -> Tensor:
        """Return the axes in this order; reversed where none is given."""
        order = axes or tuple(reversed(range(self.data.ndim)))
        back = np.argsort([axis % self.data.ndim for axis in order])
        return Tensor(self.data.transpose(order), [(self, lambda g: g.transpose(tuple(back)))])

    def exp(self) -> Tensor:
        return Tensor(y := np.exp(self.data), [(self, lambda g: g * y)])

    def log(self) -> Tensor:
        return Tensor(np.log(self.data), [(self, lambda g: g / self.data)])

    def tanh(self) -> Tensor:
        y = np.tanh(self.data)
        return Tensor(y, [(self, lambda g: g * (1 - y * y))])

    def relu(self) -> Tensor:
        return Tensor(np.maximum(self.data, 0), [(self, lambda g: g * (self.data > 0))])

    def sigmoid(self) -> Tensor:
        y = 0.5 * (np.tanh(0.5 * self.data) + 1)  # never overflows
        return Tensor(y, [(self, lambda g: g * y * (1 - y))])

    def silu(self) -> Tensor:
        """Return x sigmoid(x) (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
        return self * self.sigmoid()

    def softmax(self, axis: int = -1) -> Tensor:
        """Return exp(x) over its sum along an axis."""
        raised = np.exp(self.data - self.data.max(axis=axis, keepdims=True))
        y = raised / raised.sum(axis=axis, keepdims=True)
        return Tensor(y, [(self, lambda g: y * (g - (g * y).sum(axis=axis, keepdims=True)))])

    def backward(self) -> None:
        """Add to every tensor's grad the gradient of this one, whose entries are summed where it holds several."""
        arrived = {id(self): np.ones_like(self.data)}
        for tensor in reversed(self.in_order()):
            gradient = arrived.pop(id(tensor))
            tensor.grad = tensor.grad + gradient
            for source, back in tensor.sources:
                arrived[id(source)] = arrived.get(id(source), 0) + back(gradient)

    def in_order(self) -> list[Tensor]:
        """Return this tensor and all it came from, each after its own sources; a loop, so that depth has no limit."""
        seen, order, stack = set[int](), list[Tensor](), [(self, False)]
        while stack:
            tensor, sources_done = stack.pop()
            if sources_done:
                order.append(tensor)
            elif id(tensor) not in seen:
                seen.add(id(tensor))
                stack += [(tensor, True), *((source, False) for source, _ in tensor.sources)]
        return order

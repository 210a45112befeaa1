"""minigrad's gradients: every operation against finite differences and against torch, over random shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from minigrad import MLP, Layer, Tensor, examples, make_circles, make_moons, make_spirals

BROADCAST = mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3)
PAIRS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
}
SINGLES = {
    "neg": lambda a: -a,
    "square": lambda a: a**2,
    "inverse root": lambda a: a**-0.5,
    "number - a": lambda a: 2.0 - a,
    "number / a": lambda a: 2.0 / a,
    "number ** a": lambda a: 2.0**a,
    "tanh": lambda a: a.tanh(),
    "relu": lambda a: (a - 1.0).relu(),
    "sigmoid": lambda a: a.sigmoid(),
    "silu": lambda a: a * a.sigmoid(),
    "exp": lambda a: a.exp(),
    "log": lambda a: a.log(),
    "softmax": lambda a: a.softmax(0) * a.softmax(-1),
    "sum": lambda a: a.sum() * a,
    "sum 0": lambda a: a.sum(0) * a,
    "mean -1": lambda a: a.mean(-1, keepdims=True) * a,
    "reshape": lambda a: a.reshape(-1) * 3.0,
    "transpose": lambda a: a.transpose(0, 2, 1) * 2.0 if isinstance(a, Tensor) else a.permute(0, 2, 1) * 2.0,
    "T": lambda a: a.T if isinstance(a, Tensor) else a.permute(2, 1, 0),
}
MATMULS = [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 4)), ((5, 2, 3), (3, 4))]
MATMULS += [((1, 2, 3), (4, 3, 2)), ((3,), (4, 3, 2))]


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 2.0, shape)


def check(operation, *arrays: np.ndarray) -> None:
    """Compare value and gradients of a weighted sum with torch's, and with central differences."""
    ours, theirs = [Tensor(array) for array in arrays], [torch.tensor(array, requires_grad=True) for array in arrays]
    found, wanted = operation(*ours), operation(*theirs)
    np.testing.assert_allclose(found.data, wanted.detach().numpy(), atol=1e-12)
    weight = drawn(found.shape, 7)
    (found * weight).sum().backward()
    (wanted * torch.tensor(weight)).sum().backward()
    total = lambda moved: (operation(*map(Tensor, moved)).data * weight).sum()  # noqa: E731
    for k, (tensor, reference) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(tensor.grad, reference.grad.numpy(), rtol=1e-9, atol=1e-9)
        place = tuple(size // 2 for size in tensor.shape)
        ahead, behind = ([array.copy() for array in arrays] for _ in range(2))
        ahead[k][place] += 1e-5
        behind[k][place] -= 1e-5
        slope = (total(ahead) - total(behind)) / 2e-5
        np.testing.assert_allclose(tensor.grad[place], slope, rtol=1e-6, atol=1e-6)


@given(BROADCAST, st.sampled_from(sorted(PAIRS)), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_two_arguments_broadcast(shapes, name, seed):
    a, b = shapes.input_shapes
    check(PAIRS[name], drawn(a, seed), drawn(b, seed + 1))


@given(st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from(sorted(SINGLES)), st.integers(0, 1000))
@settings(max_examples=120, deadline=None)
def test_one_argument(shape, name, seed):
    array = drawn(shape, seed)
    if name == "relu":
        array[abs(array - 1) < 1e-3] = 1.5  # away from the kink
    if name in ("sum 0", "mean -1"):
        reference = {"sum 0": lambda a: a.sum(0) * a, "mean -1": lambda a: a.mean(-1, keepdim=True) * a}[name]
        check(lambda a: SINGLES[name](a) if isinstance(a, Tensor) else reference(a), array)
    else:
        check(SINGLES[name], array)


@pytest.mark.parametrize(("left", "right"), MATMULS)
def test_matmul(left, right):
    check(lambda a, b: a @ b, drawn(left, 0), drawn(right, 1))


def test_arrays_and_numbers_on_either_side_are_constants():
    x = Tensor([1.0, 2.0])
    for y in (np.array([3.0, 4.0]) * x, x * np.array([3.0, 4.0])):
        assert isinstance(y, Tensor)
    ((np.eye(2) @ x) / np.array([1.0, 2.0]) - 1).sum().backward()
    np.testing.assert_allclose(x.grad, [1.0, 0.5])


def test_gradients_accumulate_until_zeroed_and_depth_has_no_limit():
    x = Tensor(2.0)
    y = x
    for _ in range(10_000):
        y = y * 1.0 + 0.0
    (y * x).backward()
    assert x.grad == 4.0
    (x * 3).backward()
    assert x.grad == 7.0
    x.grad = np.zeros(())
    z = x * x
    (z + z).backward()  # one result used twice
    assert x.grad == 8.0


def test_layers_start_with_the_stated_spread_and_refuse_what_they_do_not_know():
    layer = Layer(nin=300, nout=500, activation="tanh", rng=np.random.default_rng(0))
    assert abs(layer.weight.data.std() / np.sqrt(2 / 800) - 1) < 0.01 and not layer.bias.data.any()
    with pytest.raises(ValueError, match="activation='gelu' is unknown; use linear, relu"):
        Layer(2, 2, "gelu")
    with pytest.raises(ValueError, match="2 layers need as many activations"):
        MLP(2, [3, 1], ["tanh"])


def test_a_damaged_network_is_one_sentence(tmp_path):
    MLP(2, [3, 1], seed=0).save(tmp_path / "a.npz")
    arrays = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", **arrays | {"weight_1": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"weight_1 has shape \(2, 2\), not \(3, 1\)"):
        MLP.load(tmp_path / "b")
    np.savez(tmp_path / "c.npz", x=np.zeros(2))
    with pytest.raises(ValueError, match="holds no network"):
        MLP.load(tmp_path / "c.npz")


def test_data_sets_lie_where_they_say():
    x, y = make_moons(101)
    assert x.shape == (101, 2) and y.sum() == 51
    np.testing.assert_allclose(np.linalg.norm(np.where(y[:, None] == 0, x, [1.0, 0.5] - x), axis=1), 1)
    x, y = make_circles(100, factor=0.5)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), np.where(y == 0, 1, 0.5))
    x, y = make_spirals(100, n_classes=5, rotations=0)
    assert np.bincount(y).tolist() == [20] * 5 and np.linalg.norm(x, axis=1).max() <= 1 + 1e-12
    angle = np.arctan2(x[:, 1], x[:, 0]) % (2 * np.pi)
    np.testing.assert_allclose(angle, 2 * np.pi * y / 5, atol=1e-9)


def test_examples():
    assert examples.xor() == 1
    assert examples.moons() >= 0.95
    assert examples.linear_regression() < 0.01
    assert examples.save_and_load() == 0
    assert examples.spirals() >= 0.9

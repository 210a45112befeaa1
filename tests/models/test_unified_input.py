"""The one tensor a model sees: nothing is lost in it, and nothing is averaged out of it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.inputs import make_unified_flow_matching_input, split_unified_flow_matching_input

STATE_SHAPES = st.one_of(st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@settings(max_examples=60, deadline=None)
@given(STATE_SHAPES, st.integers(1, 4), DTYPES, st.integers(0, 2**31))
def test_round_trip_is_exact(shape: tuple[int, ...], batch: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, *shape), generator=generator).to(dtype)
    times = torch.rand((batch, 2), generator=generator)
    unified = make_unified_flow_matching_input(x, times)
    assert unified.dtype == torch.float32 and unified.shape == (batch, shape[0] + 2, *shape[1:])
    state, split_times = split_unified_flow_matching_input(unified)
    assert torch.equal(state, x.float()) and torch.equal(split_times, times)


@settings(max_examples=40, deadline=None)
@given(STATE_SHAPES, st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_times_keep_their_order_and_fill_their_channels(shape: tuple[int, ...], first: float, second: float) -> None:
    unified = make_unified_flow_matching_input(torch.zeros(1, *shape), torch.tensor([[first, second]]))
    assert (unified[0, -2] == first).all() and (unified[0, -1] == second).all()
    assert (unified[0, :-2] == 0).all()


def test_close_times_survive_half_precision_states() -> None:
    """t - r = 1e-4 would vanish in bf16, whose steps near 1 are 4e-3."""
    times = torch.tensor([[0.9, 0.9001]])
    unified = make_unified_flow_matching_input(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16), times)
    _, split_times = split_unified_flow_matching_input(unified)
    assert torch.equal(split_times, times)


def test_times_are_read_off_not_averaged() -> None:
    """A spatial mean of 7 x 7 equal fp32 values is not that value; and other pixels have no say."""
    times = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    unified = make_unified_flow_matching_input(torch.zeros(64, 1, 7, 7), times)
    assert not torch.equal(unified[:, -2:].mean((2, 3)), times)
    unified[:, -2:, 3:, 3:] = 100
    assert torch.equal(split_unified_flow_matching_input(unified)[1], times)


def test_gradients_pass_through_the_times() -> None:
    times = torch.rand(3, 2, requires_grad=True)
    _, split_times = split_unified_flow_matching_input(make_unified_flow_matching_input(torch.zeros(3, 1, 2, 2), times))
    (gradient,) = torch.autograd.grad(split_times.square().sum(), times)
    torch.testing.assert_close(gradient, 2 * times.detach())

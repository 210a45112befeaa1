"""The exponential moving average against its recursion and against torch's own."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.ema import ConstantEMA


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


def walk(net: nn.Module, steps: int) -> Iterator[int]:
    """Move the weights and buffers at random, as training would; steps count from 1."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        for p in net.parameters():
            p.data.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        net(torch.randn(8, 3, generator=generator, dtype=torch.float64))
        yield step


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_it_follows_its_recursion_with_a_ramp(decay: float) -> None:
    net, ema = network(), ConstantEMA(decay)
    average = ema.average_of(net)
    expected = flat(net).clone()
    for step in walk(net, 60):
        ema.update(average, net, step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * flat(net)
        assert torch.allclose(flat(average), expected, rtol=1e-12, atol=1e-12)


def test_past_the_ramp_it_is_torchs_averaged_model() -> None:
    net, ema = network(), ConstantEMA(0.95)
    average = ema.average_of(net)
    reference = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    reference.update_parameters(net)  # its first update only copies
    for step in walk(net, 30):
        ema.update(average, net, 1000 + step)
        reference.update_parameters(net)
    assert torch.allclose(flat(average), flat(reference.module), rtol=1e-12, atol=1e-12)


def test_the_ramp_soon_forgets_the_random_start() -> None:
    net, ema, shares = nn.Linear(1, 1, bias=False), ConstantEMA(0.999), []
    average = ema.average_of(net)
    nn.init.ones_(average.weight)
    nn.init.zeros_(net.weight)
    for step in range(1, 101):
        ema.update(average, net, step)
        shares.append(average.weight.item())  # what is left of the start
    assert shares[0] == pytest.approx(2 / 11)
    assert shares[99] < 1e-8 < 0.999**100


def test_decay_zero_keeps_the_weights_themselves() -> None:
    net, ema = network(), ConstantEMA(0.0)
    average = ema.average_of(net)
    for step in walk(net, 3):
        ema.update(average, net, step)
        assert torch.equal(flat(average), flat(net))


def test_buffers_are_copied_whatever_their_kind() -> None:
    net, ema = network(), ConstantEMA(0.999)
    average = ema.average_of(net)
    for step in walk(net, 5):
        ema.update(average, net, step)
    assert average[1].num_batches_tracked.item() == 5
    for kept, new in zip(average.buffers(), net.buffers(), strict=True):
        assert torch.equal(kept, new) and kept.dtype == new.dtype
        assert kept is not new


def test_the_average_is_a_separate_network_in_eval_mode_that_no_gradient_reaches() -> None:
    net, ema = network().train(), ConstantEMA(0.5)
    average = ema.average_of(net)
    before = copy.deepcopy(net.state_dict())
    ema.update(average, network(seed=1), 1)
    assert net.training and not any(module.training for module in average.modules())
    assert all(p.requires_grad for p in net.parameters()) and not any(p.requires_grad for p in average.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert average.state_dict().keys() == net.state_dict().keys()

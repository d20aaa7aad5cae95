"""The energy model: exact gradients, a normalised base, bounded slopes, and copies that are the same."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from anomalib_gen._runtime import forked_rng, make_generator
from anomalib_gen._training import _FlatWeights, _MovingAverage
from anomalib_gen.models import EnergyModel, FlowModel, TailedNormal, make_flow_transform
from anomalib_gen.networks import MLP, ResidualMLP, SpectralLinear

CPU = torch.device("cpu")


def make(network=MLP, features=3, levels=None, n_heads=1, grain=None, **parameters):
    with forked_rng(0):
        net = network(
            features,
            n_heads,
            hidden_features=16,
            context_features=0 if levels is None else 1,
            zero_output=False,
            **parameters,
        )
    return EnergyModel(net, features, noise_levels=levels, n_heads=n_heads, grain=grain).double().eval()


def draw(n, features=3, seed=0):
    return torch.randn(n, features, generator=make_generator(seed, CPU), dtype=torch.float64)


VARIANTS = [
    {},
    {"network": ResidualMLP},
    {"levels": (0.1, 2.0)},
    {"network": ResidualMLP, "levels": (0.1, 2.0), "spectral_norm": 1.5},
    {"n_heads": 3, "spectral_norm": 1.0},
    {"grain": torch.tensor([0.0, 0.5, 2.0])},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_score_is_minus_the_gradient_by_finite_differences(variant):
    model, x, h = make(**variant), 3 * draw(20), 1e-6
    noise = torch.full((20,), 0.7, dtype=torch.float64)
    for level in (None, noise):
        score = model.score(x, level)
        for j in range(3):
            step = h * torch.eye(3, dtype=torch.float64)[j]
            slope = (model.energy(x + step, level) - model.energy(x - step, level)) / (2 * h)
            torch.testing.assert_close(score[:, j], -slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_score_needs_no_recording_and_leaves_no_trace(variant):
    model, x = make(**variant), draw(5)
    recorded = model.score(x)
    assert recorded.requires_grad
    with torch.no_grad():
        silent = model.score(x)
    assert not silent.requires_grad
    torch.testing.assert_close(recorded.detach(), silent, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(model.score(x), silent)
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_score_can_be_differentiated_by_the_row():
    model, x = make(), draw(4).requires_grad_()
    (gradient,) = torch.autograd.grad(model.score(x)[:, 0].sum(), x)
    hessian = torch.autograd.functional.hessian(lambda row: model.energy(row[None]).sum(), x[0].detach())
    torch.testing.assert_close(gradient[0], -hessian[0])


def test_rows_do_not_mix():
    model, x = make(), draw(6)
    torch.testing.assert_close(model.energy(x).flip(0), model.energy(x.flip(0)), rtol=1e-14, atol=0)
    torch.testing.assert_close(model.score(x)[2:4], model.score(x[2:4]), rtol=1e-12, atol=1e-12)


def test_the_smallest_level_is_the_default():
    model, x = make(levels=(0.1, 2.0)), draw(5)
    noise = torch.full((5,), 0.1, dtype=torch.float64)
    assert torch.equal(model.energy(x), model.energy(x, noise))
    assert not torch.equal(model.energy(x), model.energy(x, 10 * noise))
    assert model.smallest_noise == 0.1
    assert make().smallest_noise is None


def test_an_untrained_energy_is_that_of_noised_standard_rows():
    """With a silent network the model is the standard normal with noise of each level added."""
    model, x = make(levels=(0.1, 2.0)), draw(5)
    nn.init.zeros_(model.network.output.weight)
    nn.init.zeros_(model.network.output.bias)
    for level in (0.1, 1.0, 2.0):
        noise = torch.full((5,), level, dtype=torch.float64)
        expected = 0.5 * x.square().sum(1) / (1 + level**2) + 1.5 * math.log(1 + level**2)
        torch.testing.assert_close(model.energy(x, noise), expected)


def test_rows_and_levels_of_another_kind_are_refused():
    flow = FlowModel(make_flow_transform("maf", 3), 1)
    for model in (EnergyModel(ResidualMLP(3, 1, hidden_features=4), 1), flow):
        with pytest.raises(ValueError, match=r"x must have the shape \(B, 1\), got \(2, 3\)"):
            model.energy(torch.zeros(2, 3))
    for levels in ((2.0, 0.1), (0.1, 0.1), (0.0, 1.0), (0.1, math.inf)):
        with pytest.raises(ValueError, match=r"noise_levels=.* two positive numbers, the smaller one first"):
            EnergyModel(torch.nn.Identity(), 3, noise_levels=levels)
        with pytest.raises(ValueError, match=r"noise_levels=.* two positive numbers, the smaller one first"):
            FlowModel(torch.nn.Identity(), 3, noise_levels=levels)


def test_heads_and_base_add_up():
    model, x = make(n_heads=3), draw(5)
    heads = model.head_energies(x)
    assert heads.shape == (5, 3)
    torch.testing.assert_close(model.energy(x), model.base.energy(x) + heads.sum(1))


def test_another_base_takes_the_place():
    class Shifted(nn.Module):
        def energy(self, x):
            return (x - 1).square().sum(1)

    model, x = make(), draw(5)
    network = model.head_energies(x).sum(1)
    model.set_base(Shifted())
    torch.testing.assert_close(model.energy(x), network + (x - 1).square().sum(1))


def test_energies_are_finite_to_the_end_of_the_range():
    model = make(levels=(0.1, 2.0), network=ResidualMLP)
    powers = 10.0 ** torch.tensor([2, 3, 6, 10, 100, 300, 308], dtype=torch.float64)
    for direction in [*torch.eye(3, dtype=torch.float64), *draw(10).clamp(-1, 1)]:
        x = powers[:, None] * direction
        energy = model.energy(x)
        assert energy.isfinite().all()
        assert (energy.diff() > 0).all()
        assert model.score(x).isfinite().all()


# The base -------------------------------------------------------------------------------------------------


def test_samples_of_a_few_chains_are_told():
    class Narrow(nn.Module):
        """Far from where the chains start, so that few of them carry the weight."""

        def energy(self, x):
            return 0.5 * ((x - 4) / 1e-4).square().sum(1)

    model = make()
    model.set_base(Narrow())
    with pytest.warns(UserWarning, match=r"Rows are drawn from 64 chains .* independent draws"):
        model.sample(10, make_generator(0, CPU))


def test_the_base_is_normalised_and_samples_itself():
    base = TailedNormal(torch.tensor([1.7], dtype=torch.float64))
    # Out to 1e6 deviations, on a grid that is geometric in the tails.
    half = torch.cat([torch.linspace(0, 8, 4001), torch.logspace(math.log10(8), 7, 8001)[1:]]).double()
    density = torch.exp(base.log_prob(half.unsqueeze(1)))
    assert 2 * float(torch.trapezoid(density, half)) == pytest.approx(1, abs=1e-5)
    x = base.sample(20_000, make_generator(0, CPU))
    assert float(x.std()) == pytest.approx(1.7, rel=0.02)
    assert base.log_partition() == pytest.approx(0.5 * math.log(2 * math.pi))


# Bounded slopes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("network", [MLP, ResidualMLP])
def test_spectral_norm_bounds_the_lipschitz_constant(network, bound):
    with forked_rng(0):
        net = network(4, 1, hidden_features=32, spectral_norm=bound, zero_output=False).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(20)  # every bound is active
    limit = bound**3 * 1.1**2 if network is MLP else 1.1 * bound**2 * (1 + 1.21 * bound**2) ** 2
    net.requires_grad_(False)
    x = 5 * draw(400, 4)
    slopes = (net(x[:200]) - net(x[200:])).abs().squeeze(1) / (x[:200] - x[200:]).norm(dim=1)
    assert float(slopes.max()) <= limit
    gradient = torch.autograd.functional.jacobian(lambda x: net(x).sum(), x)
    assert 0 < float(gradient.norm(dim=1).max()) <= limit


def test_power_iteration_finds_the_norm_and_small_layers_are_left_alone():
    with forked_rng(0):
        layer = SpectralLinear(6, 5, bound=0.3).double()
    x = draw(3, 6)
    for _ in range(200):
        y = layer(x)
    torch.testing.assert_close(y, layer.eval()(x), rtol=1e-6, atol=1e-9)
    layer.bound = 1e3
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_two_calls_in_one_step_can_be_walked_back():
    model = make(spectral_norm=1.0).train()
    (model.energy(draw(3)).sum() - model.energy(draw(3, seed=1)).sum()).backward()
    model.score(draw(3)).square().sum().backward()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_copies_pickles_and_averages_are_the_same_and_calls_change_nothing(variant):
    model, x = make(**variant), draw(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    energy = model.energy(x)
    average = _MovingAverage(model, _FlatWeights(list(model.parameters())), 0.9)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.model):
        assert torch.equal(copied.energy(x), energy)
    assert torch.equal(model.energy(x), energy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

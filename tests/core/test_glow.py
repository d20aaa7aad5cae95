"""Multi-scale flows: exact Jacobians and inverses of images of any size."""

import math

import pytest
import torch

from anomalib_gen.models.flow import FlowModel, make_flow_transform
from anomalib_gen.models.glow import ActNorm, FlattenedTransform, Glow, squeeze, unsqueeze

SHAPES = [(2, 4, 4), (1, 8, 8), (1, 5, 4), (1, 4, 7), (2, 5, 5), (1, 3, 3), (1, 28, 28), (3, 12, 20)]


def make(shape, seed=0, **parameters):
    """A map whose weights are away from the start, where couplings are linear."""
    torch.manual_seed(seed)
    glow = Glow(shape, **{"n_steps": 2, "hidden_channels": 8, **parameters})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in glow.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return glow.double().eval()


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 5, 4), (1, 4, 5), (1, 5, 5), (1, 3, 3)])
def test_the_log_determinant_is_that_of_the_jacobian(shape):
    glow, x = make(shape), draw(1, *shape)
    jacobian = torch.autograd.functional.jacobian(lambda x: glow(x)[0].flatten(), x)
    expected = torch.linalg.slogdet(jacobian.reshape(math.prod(shape), math.prod(shape))).logabsdet
    _, log_det = glow(x)
    torch.testing.assert_close(log_det[0], expected, rtol=1e-9, atol=1e-9)
    assert float(glow(draw(8, *shape))[1].detach().std()) > 1e-3


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 4), (1, 4, 5), (3, 7, 9)])
def test_shares_of_places_add_up(shape):
    model, x = make(shape), draw(6, *shape)
    u, log_det = model(x)
    log_normal = -0.5 * (u.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    shares = model.log_prob_by_place(x)
    assert shares.shape == (6, *shape[1:])
    torch.testing.assert_close(shares.sum((1, 2)), log_normal + log_det)


def test_shares_stay_where_they_come_from():
    """Layers that look nowhere but at their own pixels, one level: each square of 2 x 2 is a density of its own."""
    model, x = make((1, 6, 6), n_levels=1), draw(1, 1, 6, 6)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            with torch.no_grad():
                centre = module.weight[:, :, 1, 1].clone()
                module.weight.zero_()
                module.weight[:, :, 1, 1] = centre
    other = x.clone()
    other[..., 2:4, 4:6] += 1
    change = model.log_prob_by_place(other) - model.log_prob_by_place(x)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[2:4, 4:6] = True
    assert (change[0][~inside] == 0).all()
    assert change[0][inside].unique().numel() == 1
    assert change[0][inside][0] != 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_undoes(shape):
    glow, x = make(shape), 2 * draw(3, *shape)
    u, log_det = glow(x)
    assert u.shape == x.shape
    back, inverse_log_det = glow.inverse(u)
    assert float((back - x).detach().abs().max()) < 1e-6
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-8, atol=1e-8)
    forth, _ = glow(glow.inverse(x)[0])
    assert float((forth - x).detach().abs().max()) < 1e-6


def test_levels_go_on_while_sides_are_even():
    assert len(make((1, 32, 32)).levels) == 3
    assert len(make((1, 28, 28)).levels) == 2
    assert len(make((1, 28, 28), n_levels=1).levels) == 1
    assert len(make((1, 9, 9)).levels) == 3
    assert set(make((1, 5, 4)).edges) == {"row"}


def test_squeeze_folds_squares():
    x = draw(2, 3, 4, 6)
    assert squeeze(x).shape == (2, 12, 2, 3)
    torch.testing.assert_close(squeeze(x)[:, :4, 0, 0], x[:, 0, :2, :2].flatten(1))
    torch.testing.assert_close(unsqueeze(squeeze(x)), x, rtol=0, atol=0)


def test_a_density_of_images_integrates_to_one():
    """Importance sampling from a wide normal, of images of 1 x 2 x 2 pixels."""
    model = FlowModel(make((1, 2, 2)), (1, 2, 2)).double()
    width = 2.5
    x = width * draw(200_000, 1, 2, 2)
    log_proposal = -0.5 * (x / width).flatten(1).square().sum(1) - 4 * math.log(
        width * math.sqrt(2 * math.pi)
    )
    with torch.no_grad():
        weights = (model.log_prob(x) - log_proposal).exp()
    error = float(weights.std()) / math.sqrt(len(x))
    assert error < 0.02
    assert float(weights.mean()) == pytest.approx(1, abs=4 * error)


def test_samples_have_the_density():
    """The mean energy of samples is the entropy, which the change of variables gives from the other side."""
    model = FlowModel(make((1, 4, 4)), (1, 4, 4)).double()
    with torch.no_grad():
        x = model.sample(4000, torch.Generator().manual_seed(0))
        energy = -model.log_prob(x)
        u = draw(4000, 1, 4, 4, seed=5)
        y, log_det = model.transform.inverse(u)
        expected = 0.5 * u.flatten(1).square().sum(1) + 8 * math.log(2 * math.pi) + log_det
        # The tails' part of the density, on samples of our own.
        expected = expected + model.tails(model.tails.inverse(y)[0])[1] * -1
    error = math.sqrt(float(energy.var() + expected.var()) / 4000)
    assert float(energy.mean()) == pytest.approx(float(expected.mean()), abs=4 * error)


def test_actnorm_starts_from_the_first_batch_and_spares_dead_channels():
    x = torch.cat([3 + 2 * draw(50, 1, 4, 4), torch.full((50, 1, 4, 4), 7.0, dtype=torch.float64)], dim=1)
    layer = ActNorm(2).double().train()
    y = layer(x)[0].detach()
    assert float(y[:, 0].mean()) == pytest.approx(0, abs=1e-9)
    assert float(y[:, 0].std(correction=0)) == pytest.approx(1, abs=1e-9)
    assert float(y[:, 1].abs().max()) < 1e-9
    again = layer(10 * x)[0].detach()
    assert float(again[:, 0].std()) > 5
    fresh = ActNorm(2).double().eval()
    torch.testing.assert_close(fresh(x)[0], x)


def test_pixels_as_rows():
    torch.manual_seed(0)
    shape = (1, 2, 3)
    transform = FlattenedTransform(make_flow_transform("realnvp", 6, n_layers=2), shape).double()
    x = draw(4, *shape)
    u, log_det = transform(x)
    assert u.shape == x.shape
    assert log_det.shape == (4,)
    torch.testing.assert_close(transform.inverse(u)[0], x)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="sides of at least 2"):
        Glow((1, 1, 8))

"""Normalizing flows: bijections with the Jacobians they state, densities that integrate to one, samples of them."""

import functools
import math

import numpy as np
import pytest
import torch
from nflows.transforms.made import MaskedLinear
from nflows.transforms.splines.rational_quadratic import rational_quadratic_spline as nflows_spline
from scipy import stats
from torch.autograd.functional import jacobian

from anomalib_gen import FlowDetector
from anomalib_gen._runtime import forked_rng, make_generator
from anomalib_gen.models.flow import (
    CONDITIONER_BOUND,
    FLOW_TRANSFORMS,
    LOG_RANGE,
    SPLINE_BOUND,
    BoundedConditioner,
    CompressedTails,
    FlowModel,
    LULinear,
    make_flow_transform,
    rational_quadratic_spline,
)
from anomalib_gen.networks import TAIL_START, compress_tails, expand_tails
from anomalib_gen.objectives import MaximumLikelihood

FEATURES = (1, 2, 5)
AUTOREGRESSIVE = ("maf", "nsf-autoregressive")
LEVELS = (0.02, 1.0)
CPU = torch.device("cpu")

each_transform = pytest.mark.parametrize("name", FLOW_TRANSFORMS)
each_width = pytest.mark.parametrize("features", FEATURES)
with_and_without_context = pytest.mark.parametrize(
    "conditional", [False, True], ids=["unconditional", "conditional"]
)


def perturbed(build, scale=0.1):
    """Build a module in float64 and move all its weights away from their neutral start.

    Not too far: the inverse of a map with slopes of 1e4 loses digits however exact it is.
    """
    with forked_rng(0):
        module = build().double()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(scale * torch.randn_like(p))
    return module.eval()


def flow(name, features, conditional, **sizes):
    sizes = {"n_layers": 3, "hidden_features": 16, "n_blocks": 1, **sizes}

    def build():
        transform = make_flow_transform(name, features, context_features=1 if conditional else None, **sizes)
        return FlowModel(transform, features, noise_levels=LEVELS if conditional else None)

    return perturbed(build)


def levels_and_context(n, conditional):
    """A noise level for each row, and what a transform sees of it."""
    if not conditional:
        return None, None
    context = torch.linspace(-1, 1, n, dtype=torch.float64).unsqueeze(1)
    low, high = (math.log(level) for level in LEVELS)
    return torch.exp((low + high + context[:, 0] * (high - low)) / 2), context


def ordinary_rows(n, features, seed=0):
    return 2 * torch.randn(n, features, dtype=torch.float64, generator=make_generator(seed, CPU))


def special_rows(n, features):
    """Rows of far values and of values at, and beside, every border."""
    borders = [TAIL_START, SPLINE_BOUND, CONDITIONER_BOUND]
    values = [0.0, 1e-300, 1e2, 1e4, 1e6, *borders]
    values += [border * (1 + side * 1e-13) for border in borders for side in (-1, 1)]
    # What the tails map on the other borders.
    values += [TAIL_START + math.expm1(border - TAIL_START) for border in borders[1:]]
    values = torch.tensor(values, dtype=torch.float64)
    values = torch.cat(
        [values, -values, torch.randn(6, dtype=torch.float64, generator=make_generator(1, CPU))]
    )
    return values[torch.randint(len(values), (n, features), generator=make_generator(2, CPU))]


def assert_close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def log_det_of_jacobian(function, x):
    """log |det| of a rowwise function at each row of x, from automatic differentiation."""
    total = jacobian(lambda rows: function(rows).sum(0), x)  # (D, B, D): rows do not mix
    sign, log_det = torch.linalg.slogdet(total.movedim(1, 0))
    assert (sign != 0).all()
    return log_det


def assert_bijection(forward, inverse, x):
    y, log_det = forward(x)
    back, log_det_back = inverse(y)
    assert y.shape == x.shape
    assert log_det.shape == (len(x),)
    assert torch.isfinite(y).all()
    assert_close(back, x)
    assert_close(log_det_back, -log_det)


# Whole maps -----------------------------------------------------------------------------------------------


@each_transform
@each_width
@with_and_without_context
def test_flow_is_a_bijection_with_the_jacobian_it_states(name, features, conditional):
    model = flow(name, features, conditional)

    def forward(x, context):
        y, log_det_tails = model.tails(x)
        u, log_det = model.transform(y, context)
        return u, log_det + log_det_tails

    def inverse(u, context):
        y, log_det = model.transform.inverse(u, context)
        x, log_det_tails = model.tails.inverse(y)
        return x, log_det + log_det_tails

    for x in (ordinary_rows(200, features), special_rows(200, features)):
        noise, context = levels_and_context(len(x), conditional)
        with torch.no_grad():
            assert_bijection(lambda x, c=context: forward(x, c), lambda u, c=context: inverse(u, c), x)
            u, log_det = forward(x, context)
            expected = stats.norm.logpdf(u.numpy()).sum(axis=1) + log_det.numpy()
            np.testing.assert_allclose(model.log_prob(x, noise).numpy(), expected, rtol=1e-12, atol=1e-12)

    # Beside the borders: at a kink automatic differentiation has no unique answer.
    x = torch.cat([ordinary_rows(30, features), 1.01 * special_rows(30, features)])
    _, context = levels_and_context(len(x), conditional)
    log_det = forward(x, context)[1].detach()
    # The map is not an affine one, for which all this would be easy; nothing else can be made of one column by MAF.
    assert log_det[:30].std() > 0.01 or (features == 1 and not conditional and not name.startswith("nsf"))
    assert_close(log_det_of_jacobian(lambda x: forward(x, context)[0], x), log_det)


@each_transform
@each_width
def test_flow_without_mixing_and_with_few_bins_is_a_bijection(name, features):
    transform = flow(name, features, False, mix=False, n_bins=2, n_blocks=0, n_layers=4).transform
    with torch.no_grad():
        assert_bijection(transform, transform.inverse, special_rows(200, features).clamp(-20, 20))
    x = ordinary_rows(30, features)
    assert_close(log_det_of_jacobian(lambda x: transform(x)[0], x), transform(x)[1].detach())


@pytest.mark.parametrize("name", ["maf", "realnvp"])
def test_affine_scales_without_mixing_are_bounded(name):
    layer = flow(name, 6, False, mix=False, n_layers=1).transform
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(50)
        slopes = torch.autograd.functional.jacobian(lambda x: layer(x)[0].sum(0), ordinary_rows(50, 6))
    own = slopes.diagonal(dim1=0, dim2=2)
    assert 1.5 < float(own.max()) <= 2.0011
    assert float(own.min()) >= 0.0009


@each_transform
@each_width
def test_map_starts_close_to_the_identity(name, features):
    with forked_rng(0):
        transform = make_flow_transform(name, features, n_layers=1).double()
    x = ordinary_rows(50, features)
    u, log_det = transform(x)
    # Monotone and neutral: the same affine map for every row, the identity for splines.
    assert_close(log_det, log_det[:1].expand_as(log_det))
    if name.startswith("nsf"):
        assert_close(u, x, 1e-12)


@each_transform
def test_every_finite_row_has_a_finite_density_that_falls_outwards(name):
    model = flow(name, 3, True)
    rays = ordinary_rows(20, 3, seed=3).sign()
    radii = torch.logspace(3, 300, 60, dtype=torch.float64)
    with torch.no_grad():
        log_prob = torch.stack([model.log_prob(radius * rays) for radius in radii])
    assert torch.isfinite(log_prob).all()
    assert (log_prob.diff(dim=0) < 0).all()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'glow' is unknown.*'maf'.*'realnvp'.*factory"):
        make_flow_transform("glow", 2)


# Building blocks ------------------------------------------------------------------------------------------


@each_transform
@each_width
@with_and_without_context
def test_single_layer(name, features, conditional):
    """Spline coupling, autoregressive spline, affine coupling and masked affine autoregressive on their own."""
    layer = flow(name, features, conditional, n_layers=1).transform
    assert any(isinstance(part, BoundedConditioner) for part in layer.modules())
    for x in (ordinary_rows(100, features), special_rows(100, features)):
        _, context = levels_and_context(len(x), conditional)
        with torch.no_grad():
            assert_bijection(lambda x, c=context: layer(x, c), lambda y, c=context: layer.inverse(y, c), x)
    x = ordinary_rows(30, features)
    _, context = levels_and_context(len(x), conditional)
    assert_close(log_det_of_jacobian(lambda x: layer(x, context)[0], x), layer(x, context)[1].detach())


def test_couplings_leave_half_of_the_columns_alone():
    for name in ("nsf-coupling", "realnvp"):
        layer = flow(name, 5, False, n_layers=1).transform
        x = ordinary_rows(50, 5)
        moved = (layer(x)[0] != x).any(0)
        assert moved.tolist() == [False, True, False, True, False]


def test_bounded_conditioner_sees_a_box():
    layer = BoundedConditioner(lambda x, context: x)
    x = torch.tensor([[-1e9, -12.0, 0.5, 12.0, 1e9]])
    assert layer(x).tolist() == [[-12.0, -12.0, 0.5, 12.0, 12.0]]


@each_width
def test_compressed_tails(features):
    tails = CompressedTails()
    for x in (ordinary_rows(200, features), special_rows(200, features)):
        assert_bijection(tails, tails.inverse, x)
    x = torch.cat([3 * ordinary_rows(50, features), 1.01 * special_rows(50, features)])
    assert_close(log_det_of_jacobian(lambda x: tails(x)[0], x), tails(x)[1])


def test_compressed_tails_are_the_stated_function():
    tails, c = CompressedTails(), TAIL_START
    inside = torch.linspace(-c, c, 101, dtype=torch.float64).unsqueeze(1)
    assert torch.equal(tails(inside)[0], inside)
    assert torch.equal(tails(inside)[1], torch.zeros(101, dtype=torch.float64))
    x = torch.tensor([[c + 1.0], [-c - math.e + 1]], dtype=torch.float64)
    y, log_det = tails(x)
    assert_close(y[:, 0], torch.tensor([c + math.log(2), -c - 1], dtype=torch.float64), 1e-14)
    assert_close(log_det, torch.tensor([-math.log(2), -1], dtype=torch.float64), 1e-14)
    for values in (x, x.float()):  # rows that are compressed already
        y, log_det = compress_tails(values, math.inf)
        assert torch.equal(y, values)
        assert torch.equal(log_det, torch.zeros(2, dtype=values.dtype))
        assert torch.equal(expand_tails(y, math.inf)[0], values)


@each_width
def test_lu_linear_is_its_dense_matrix(features):
    layer = perturbed(lambda: LULinear(features))
    x = torch.cat([ordinary_rows(100, features), special_rows(100, features)])
    with torch.no_grad():
        assert_bijection(layer, layer.inverse, x)
        y, log_det = layer(x)
        lower, upper = layer._create_lower_upper()
    assert torch.equal(lower, lower.tril())
    assert torch.equal(upper, upper.triu())
    weight = lower @ upper
    assert features == 1 or (weight - torch.diag(weight.diagonal())).abs().max() > 0.01
    assert_close(y, x @ weight.T + layer.bias.detach(), 1e-12)
    assert_close(log_det, torch.linalg.slogdet(weight)[1].expand(len(x)), 1e-12)
    assert_close(layer.inverse(y)[0].detach(), torch.linalg.solve(weight, (y - layer.bias.detach()).T).T)


# Splines --------------------------------------------------------------------------------------------------


def spline_parameters(rows, columns, n_bins, scale=2.0, seed=0):
    shape = (rows, columns, 3 * n_bins - 1)
    return scale * torch.randn(shape, dtype=torch.float64, generator=make_generator(seed, CPU))


def positive(parameters):
    return torch.exp(LOG_RANGE * torch.tanh(parameters / LOG_RANGE))


@pytest.mark.parametrize("n_bins", [2, 3, 8])
def test_spline_is_a_bijection_with_the_slope_it_states(n_bins):
    x = (4 * ordinary_rows(500, 3)).requires_grad_()
    parameters = spline_parameters(500, 3, n_bins)
    y, log_slope = rational_quadratic_spline(x, parameters, n_bins)
    assert log_slope.abs().max() > 1
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert_close(slope.log(), log_slope.detach())
    y = y.detach().requires_grad_()
    back, log_slope_back = rational_quadratic_spline(y, parameters, n_bins, inverse=True)
    assert_close(back, x)
    assert_close(log_slope_back, -log_slope)
    (slope_back,) = torch.autograd.grad(back.sum(), y)
    assert_close(slope_back.log(), log_slope_back.detach())


@pytest.mark.parametrize("n_bins", [2, 8])
def test_spline_increases_and_is_continuous_at_the_border(n_bins):
    b = SPLINE_BOUND
    x = torch.linspace(-b - 1, b + 1, 2001, dtype=torch.float64).unsqueeze(1).expand(-1, 20).contiguous()
    parameters = spline_parameters(1, 20, n_bins, scale=3.0).expand(2001, -1, -1)
    y, log_slope = rational_quadratic_spline(x, parameters, n_bins)
    assert (y.diff(dim=0) > 0).all()
    outside = x.abs() > b
    assert torch.equal(y[outside], x[outside])
    assert torch.equal(log_slope[outside], torch.zeros_like(x[outside]))
    for end in (-b, b):
        border = end * torch.tensor([[1.0], [1 - 1e-10], [1 + 1e-10]], dtype=torch.float64).expand(-1, 20)
        for inverse in (False, True):
            y, log_slope = rational_quadratic_spline(border, parameters[:3], n_bins, inverse=inverse)
            assert_close(y, torch.full_like(y, end))
            assert log_slope.abs().max() < 1e-3  # the slope, too, is 1 on both sides


@pytest.mark.parametrize("n_bins", [2, 8])
@pytest.mark.parametrize("inverse", [False, True])
def test_spline_with_parameters_of_zero_is_the_identity(n_bins, inverse):
    x = torch.cat([4 * ordinary_rows(300, 2), special_rows(300, 2)])
    y, log_slope = rational_quadratic_spline(x, torch.zeros(600, 2, 3 * n_bins - 1), n_bins, inverse=inverse)
    assert_close(y, x, 1e-13)
    assert_close(log_slope, torch.zeros_like(x), 1e-13)


def test_spline_passes_through_its_knots_with_their_slopes():
    n_bins, b = 6, SPLINE_BOUND
    parameters = spline_parameters(40, 1, n_bins)
    widths, heights = positive(parameters[:, 0, :n_bins]), positive(parameters[:, 0, n_bins : 2 * n_bins])
    slopes = positive(parameters[:, 0, 2 * n_bins :])
    for k in range(1, n_bins):
        knot = -b + 2 * b * widths[:, :k].sum(1) / widths.sum(1)
        value = -b + 2 * b * heights[:, :k].sum(1) / heights.sum(1)
        y, log_slope = rational_quadratic_spline(knot[:, None], parameters, n_bins)
        assert_close(y[:, 0], value)
        assert_close(log_slope[:, 0].exp(), slopes[:, k - 1])


@pytest.mark.parametrize("inverse", [False, True])
def test_spline_agrees_with_the_one_of_nflows(inverse):
    n_bins, b = 5, SPLINE_BOUND
    x = ordinary_rows(400, 2).clamp(-b, b)
    parameters = spline_parameters(400, 2, n_bins)
    widths, heights, slopes = parameters.split([n_bins, n_bins, n_bins - 1], -1)
    slopes = torch.nn.functional.pad(positive(slopes), (1, 1), value=1.0)
    expected, expected_log_slope = nflows_spline(
        x,
        # Theirs are a softmax of the unnormalised sizes and a softplus of the unnormalised slopes.
        positive(widths).log(),
        positive(heights).log(),
        torch.log(torch.expm1(slopes)),
        inverse=inverse,
        left=-b,
        right=b,
        bottom=-b,
        top=b,
        min_bin_width=0.0,
        min_bin_height=0.0,
        min_derivative=0.0,
    )
    y, log_slope = rational_quadratic_spline(x, parameters, n_bins, inverse=inverse)
    assert_close(y, expected)
    assert_close(log_slope, expected_log_slope)


# Which column sees which ----------------------------------------------------------------------------------


def influence(layer, features):
    """(output, input) -> largest derivative over many rows."""
    x = ordinary_rows(60, features)
    return jacobian(lambda rows: layer(rows)[0].sum(0), x).abs().amax(1)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("hidden_features", [7, 8, 20])
def test_autoregressive_layer_sees_all_earlier_columns_and_no_later_one(name, hidden_features):
    layer = flow(name, 8, False, n_layers=1, hidden_features=hidden_features).transform
    seen = influence(layer, 8)
    assert torch.equal(seen, seen.tril())
    assert (seen[torch.ones(8, 8).tril().bool()] > 1e-6).all()


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("hidden_features", [2, 3, 5])
@pytest.mark.parametrize("n_blocks", [0, 2])
def test_fewer_hidden_units_than_columns_leave_no_column_unseen(name, hidden_features, n_blocks):
    layer = flow(name, 8, False, n_layers=1, hidden_features=hidden_features, n_blocks=n_blocks).transform
    seen = influence(layer, 8)
    assert torch.equal(seen, seen.tril())
    assert (seen.diagonal() > 1e-6).all()
    # Some unit sees all columns but the last, and some unit steers all columns but the first.
    assert (seen[-1] > 1e-6).all()
    assert (seen[:, 0] > 1e-6).all()
    # No column steers itself.
    x = ordinary_rows(50, 8)
    with torch.no_grad():
        assert_bijection(layer, layer.inverse, x)
    assert_close(log_det_of_jacobian(lambda x: layer(x)[0], x), layer(x)[1].detach())


@each_transform
@pytest.mark.parametrize("hidden_features", [3, 16])
@pytest.mark.parametrize("mix", [False, True])
def test_in_a_chain_every_output_sees_every_column(name, hidden_features, mix):
    transform = flow(name, 8, False, n_layers=4, hidden_features=hidden_features, mix=mix).transform
    assert (influence(transform, 8) > 1e-6).all()


# Gradients ------------------------------------------------------------------------------------------------


@each_transform
@each_width
@with_and_without_context
def test_every_weight_learns(name, features, conditional):
    with forked_rng(0):
        transform = make_flow_transform(
            name,
            features,
            context_features=1 if conditional else None,
            n_layers=2,
            hidden_features=8,
            n_bins=4,
        )
        model = FlowModel(transform, features, noise_levels=LEVELS if conditional else None).double()
    # Masked weights are constants: among them, with one column, all that would look at that column.
    masks = {layer.weight: layer.mask.bool() for layer in model.modules() if isinstance(layer, MaskedLinear)}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    objective, generator = MaximumLikelihood(), make_generator(0, CPU)
    x = 1.5 * ordinary_rows(256, features)
    largest = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(6):
        optimiser.zero_grad(set_to_none=True)
        objective(model, x, generator).mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            largest[name] = torch.maximum(largest[name], p.grad.abs())
        optimiser.step()
    for name, p in model.named_parameters():
        learns = largest[name] > 0
        expected = masks.get(p, torch.ones_like(learns))
        assert torch.equal(learns, expected), f"{name}: {int((learns != expected).sum())} of {p.numel()}"


# Densities ------------------------------------------------------------------------------------------------


@each_transform
def test_density_of_every_noise_level_integrates_to_one(name):
    model = flow(name, 1, True)
    t = torch.linspace(-60, 60, 30_001, dtype=torch.float64)
    x, dx = torch.sinh(t), torch.cosh(t) * (t[1] - t[0])
    densities = []
    for level in (0.02, 0.05, 0.3, 1.0):
        with torch.no_grad():
            densities.append(model.log_prob(x.unsqueeze(1), torch.full_like(x, level)).exp())
        assert float((densities[-1] * dx).sum()) == pytest.approx(1, abs=1e-4)
    # They are different densities, and the smallest level is the one of `log_prob`.
    assert float(((densities[0] - densities[-1]).abs() * dx).sum()) > 0.05
    assert torch.equal(model.log_prob(x.unsqueeze(1)).exp(), densities[0])


@each_transform
def test_density_of_two_columns_integrates_to_one(name):
    model = flow(name, 2, True)
    model.grain.copy_(torch.tensor([0.0, 1.5]))
    model.spread.copy_((1 + model.grain.square()).sqrt())
    t = torch.linspace(-16, 16, 601, dtype=torch.float64)
    x = torch.cartesian_prod(torch.sinh(t), torch.sinh(t))
    dx = torch.cartesian_prod(torch.cosh(t), torch.cosh(t)).prod(1) * (t[1] - t[0]) ** 2
    with torch.no_grad():
        density = model.log_prob(x, torch.full((len(x),), 0.3, dtype=torch.float64)).exp()
    assert float((density * dx).sum()) == pytest.approx(1, abs=1e-3)


def rows_in_two_groups(n, seed):
    """Two correlated groups, in columns of very different place and scale."""
    rng = np.random.default_rng(seed)
    group = rng.integers(2, size=n)
    centre = np.array([[-0.9, -0.6], [0.9, 0.6]])[group]
    factor = np.array([[[0.6, 0.0], [0.5, 0.4]], [[0.7, 0.0], [-0.4, 0.5]]])[group]
    z = centre + np.einsum("nij,nj->ni", factor, rng.normal(size=(n, 2)))
    return z * [1e-3, 40.0] + [1e3, -7.0]


# Affine layers are slow to split a group in two.
AFFINE = {"max_iter": 300, "learning_rate": 2e-2, "ema_decay": 0.97, "max_noise": None, "n_layers": 6}
SPLINE = {"max_iter": 150}


@functools.cache
def fitted(name):
    detector = FlowDetector(
        transform=name,
        hidden_features=32,
        n_iter_no_change=100,
        random_state=0,
        device="cpu",
        **(SPLINE if name.startswith("nsf") else AFFINE),
    )
    return detector.fit(rows_in_two_groups(2000, seed=0))


@functools.cache
def density_on_grid(name, n=400, width=8.0):
    """Midpoints, their densities, and the cell's area, over `width` standard deviations to each side."""
    X = rows_in_two_groups(2000, seed=0)
    middle, deviation = X.mean(axis=0), X.std(axis=0)
    steps = width * (2 * (np.arange(n) + 0.5) / n - 1)
    axes = [m + d * steps for m, d in zip(middle, deviation, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    area = np.prod(2 * width * deviation / n)
    return points, np.exp(fitted(name).score_samples(points)), area


@each_transform
def test_density_of_a_detector_integrates_to_one_in_the_units_of_the_data(name):
    _, density, area = density_on_grid(name)
    assert density.sum() * area == pytest.approx(1, abs=1e-3)


@each_transform
def test_fitted_flow_is_a_bijection(name):
    """Training does not drive a map to where its inverse loses digits."""
    detector = fitted(name)
    model = detector.model_
    rows = detector._scaler.transform(rows_in_two_groups(200, seed=4))
    for x in (torch.from_numpy(rows) / model.spread, special_rows(200, 2)):
        context = None if model.noise_levels is None else -torch.ones(len(x), 1, dtype=torch.float64)
        with torch.no_grad():
            y = model.tails(x)[0]
            assert_bijection(
                lambda y, c=context: model.transform(y, c),
                lambda u, c=context: model.transform.inverse(u, c),
                y,
            )


@each_transform
def test_log_prob_is_score_samples(name):
    X = rows_in_two_groups(100, seed=3)
    np.testing.assert_array_equal(fitted(name).log_prob(X), fitted(name).score_samples(X))


def random_covariance(features, seed):
    """A covariance of random correlations and unequal variances."""
    rng = np.random.default_rng(seed)
    correlation = np.corrcoef(rng.normal(size=(features, features + 3)))
    deviations = np.exp(rng.normal(size=features))
    return correlation * np.outer(deviations, deviations), np.abs(correlation - np.eye(features)).max()


def excess_of_gaussian(detector, features=5):
    """Nats per column by which a fitted detector is worse than the true density on fresh rows."""
    covariance, largest_correlation = random_covariance(features, seed=88)
    assert 0.88 < largest_correlation < 0.91
    rng = np.random.default_rng(0)
    mean = rng.normal(size=features)
    train, fresh = rng.multivariate_normal(mean, covariance, size=(2, 4000))
    true = stats.multivariate_normal(mean, covariance).logpdf(fresh)
    return (true.mean() - detector.fit(train).score(fresh)) / features


@each_transform
def test_likelihood_of_a_gaussian_after_short_training(name):
    detector = FlowDetector(
        transform=name, max_iter=250, hidden_features=32, random_state=0, device="cpu", contamination=0.01
    )
    assert abs(excess_of_gaussian(detector)) < 0.05


@each_transform
def test_flows_of_wide_rows_learn_narrow_densities(name):
    """They have no linear maps between the layers, which could make up for layers that only shrink."""
    first, noise = torch.randn(2, 500, generator=make_generator(0, CPU))
    x = torch.stack([first, (first + 0.2 * noise) / math.sqrt(1.04)], dim=1)
    true = -math.log(2 * math.pi * math.e) - 0.5 * math.log(0.04 / 1.04)
    peak = -math.log(2 * math.pi)
    with forked_rng(0):
        transform = make_flow_transform(name, 2, n_layers=4, hidden_features=16, n_blocks=1, mix=False)
    model = FlowModel(transform, 2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = -model.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert peak + 0.3 < -float(loss.detach()) < true + 0.15


@pytest.mark.slow
@each_transform
def test_likelihood_of_a_gaussian_with_default_settings(name):
    assert abs(excess_of_gaussian(FlowDetector(transform=name, random_state=0))) < 0.05


# Samples --------------------------------------------------------------------------------------------------

PROJECTIONS = np.array([[1, 0], [0, 1], [1, 1], [1, -1], [2, -1], [1, -2]]) / [1e-3, 40.0]
SIGNIFICANCE = 1e-3 / len(PROJECTIONS)


@each_transform
def test_samples_follow_the_model_density(name):
    points, density, area = density_on_grid(name)
    mass = density * area
    drawn = fitted(name).sample(2000, random_state=1)
    for projection in PROJECTIONS:
        along = (points - [1e3, -7]) @ projection
        order = np.argsort(along)
        share = np.cumsum(mass[order])
        result = stats.kstest(
            (drawn - [1e3, -7]) @ projection, lambda v, a=along[order], s=share: np.interp(v, a, s)
        )
        assert result.pvalue > SIGNIFICANCE, projection


@each_transform
def test_samples_and_rows_pass_for_the_same_distribution(name):
    drawn, rows = fitted(name).sample(600, random_state=0), rows_in_two_groups(600, seed=5)
    for projection in PROJECTIONS:
        assert stats.ks_2samp(drawn @ projection, rows @ projection).pvalue > SIGNIFICANCE, projection


@each_transform
def test_samples_are_in_the_order_and_the_units_of_the_columns(name):
    X, drawn = rows_in_two_groups(2000, seed=0), fitted(name).sample(2000, random_state=0)
    assert drawn.shape == X.shape
    assert drawn.dtype == np.float64
    standardised = (drawn - X.mean(axis=0)) / X.std(axis=0)
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(standardised.std(axis=0), 1, atol=0.1)


@each_transform
def test_samples_are_fixed_by_random_state(name):
    detector = fitted(name)
    drawn = detector.sample(5, random_state=3)
    np.testing.assert_array_equal(drawn, detector.sample(5, random_state=3))
    np.testing.assert_array_equal(drawn, detector.sample(5, random_state=np.random.RandomState(3)))
    assert (drawn != detector.sample(5, random_state=4)).all()
    assert len(np.unique(drawn, axis=0)) == 5


def test_model_samples_are_the_inverse_of_normal_draws_in_units_of_the_spread():
    model = flow("nsf-autoregressive", 3, True)
    model.spread.copy_(torch.tensor([1.0, 2.0, 5.0]))
    x = model.sample(50, make_generator(7, CPU))
    u = torch.randn(50, 3, dtype=torch.float64, generator=make_generator(7, CPU))
    _, context = levels_and_context(50, True)
    y, _ = model.tails(x / model.spread)
    assert_close(model.transform(y, torch.full_like(context, -1))[0].detach(), u)


@pytest.mark.parametrize("name", ["maf", "nsf-autoregressive"])
@pytest.mark.parametrize("hidden_features", [4, 16])
def test_the_context_reaches_every_column_of_a_layer(name, hidden_features):
    torch.manual_seed(0)
    layer = make_flow_transform(
        name, 6, context_features=1, n_layers=1, hidden_features=hidden_features
    ).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(8, 6, dtype=torch.float64)
    low, _ = layer(x, torch.full((8, 1), -1.0, dtype=torch.float64))
    high, _ = layer(x, torch.full((8, 1), 1.0, dtype=torch.float64))
    assert ((low - high).abs().amax(0) > 1e-6).all()

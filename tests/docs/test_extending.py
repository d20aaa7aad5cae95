"""The worked examples of "adding one in one file" hold what the package promises, and state truths."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import anomalib_gen
from anomalib_gen import EnergyDetector, FlowDetector
from anomalib_gen._runtime import make_generator

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "docs" / "examples"


def load(name, path):
    """Import a file under a name that pickle finds again."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MixtureDetector = load("mixture", EXAMPLES / "mixture.py").MixtureDetector
Objective = load("finite_difference", EXAMPLES / "finite_difference.py").FiniteDifferenceScoreMatching
Anomaly = load("smoothed_likelihood", EXAMPLES / "smoothed_likelihood.py").SmoothedLikelihood
# What every family promises, tested as it is for our own.
contract = load("contract_of_examples", TESTS / "core" / "test_contract.py")
trained = contract.trained

COMBINATIONS = [
    pytest.param(MixtureDetector, {}, id="MixtureDetector"),
    pytest.param(MixtureDetector, {"anomaly": "typicality"}, id="MixtureDetector-typicality"),
    pytest.param(EnergyDetector, {"objective": Objective()}, id="finite-differences"),
    pytest.param(FlowDetector, {"anomaly": Anomaly()}, id="smoothed-likelihood"),
]
each_combination = pytest.mark.parametrize(("family", "parts"), COMBINATIONS)


@each_combination
def test_scores(trained, family, parts, X, monkeypatch):
    contract.test_scores_are_finite_numbers_a_row(trained, family, parts, X)
    contract.test_far_rows_are_finite_and_the_furthest_is_the_worst(trained, family, parts, X)
    contract.test_a_score_depends_on_its_row_alone(trained, family, parts, X, monkeypatch)


@each_combination
def test_copies(trained, family, parts, X):
    contract.test_the_same_seed_gives_the_same_detector_and_touches_nothing(trained, family, parts, X)
    contract.test_a_clone_and_a_pickle_are_the_same_detector(trained, family, parts, X)


@each_combination
def test_every_weight_learns(family, parts, X, monkeypatch):
    contract.test_every_weight_learns(family, parts, X, monkeypatch)


@pytest.mark.parametrize(
    "promise",
    [
        contract.test_continuing,
        contract.test_samples_are_rows,
        contract.test_bad_input_is_named,
        contract.test_another_anomaly_must_be_known,
    ],
    ids=lambda promise: promise.__name__,
)
def test_the_detector_as_a_family(promise, trained, X):
    promise(trained, MixtureDetector, X)


def test_the_detector_with_odd_rows(X):
    contract.test_weights_of_rows(MixtureDetector, X)
    contract.test_a_constant_column(MixtureDetector, X)
    contract.test_a_few_rows_train(MixtureDetector, 3, 1)


SMALL = MixtureDetector(n_components=3, max_iter=10, random_state=0, device="cpu")


@parametrize_with_checks(
    [SMALL],
    expected_failed_checks=lambda detector: {
        "check_sample_weight_equivalence_on_dense_data": "stochastic training"
    },
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_the_detector_is_saved_without_pickle(tmp_path, X):
    detector = contract.small(MixtureDetector).fit(X)
    trusted = ["mixture:MixtureDetector", "mixture:MixtureModel"]
    anomalib_gen.save(detector, tmp_path / "model", trusted=trusted)
    loaded = anomalib_gen.load(tmp_path / "model", trusted=trusted)
    np.testing.assert_array_equal(loaded.score_samples(X), detector.score_samples(X))


def test_the_mixture_is_a_density():
    model = sys.modules["mixture"].MixtureModel(2, 1, torch.zeros(1)).double()
    with torch.no_grad():
        model.means.copy_(torch.tensor([[-1.0], [2.0]]))
        model.factors.copy_(torch.log(torch.tensor([[[2.0]], [[0.5]]])))
        model.logits.copy_(torch.log(torch.tensor([0.3, 0.7])))
        x = torch.linspace(-4.9, 4.9, 9, dtype=torch.float64)[:, None]
        normal = torch.distributions.Normal
        truth = 0.3 * normal(-1.0, 0.5).log_prob(x).exp() + 0.7 * normal(2.0, 2.0).log_prob(x).exp()
        torch.testing.assert_close(model.log_prob(x), truth[:, 0].log())
        drawn = model.sample(20_000, make_generator(0, torch.device("cpu")))
        zero = torch.tensor(0.0)
        below = 0.3 * normal(-1.0, 0.5).cdf(zero) + 0.7 * normal(2.0, 2.0).cdf(zero)
    assert float((drawn < 0).double().mean()) == pytest.approx(float(below), abs=0.01)


class Quadratic(nn.Module):
    """E(x) = x^T P x / 2: a normal density of precision P."""

    def __init__(self, precision):
        super().__init__()
        self.precision = torch.tensor(precision, dtype=torch.float64)

    def energy(self, x):
        return 0.5 * torch.einsum("bi,ij,bj->b", x, self.precision, x)

    def log_prob(self, x):
        return (
            -self.energy(x)
            + 0.5 * torch.logdet(self.precision)
            - 0.5 * len(self.precision) * math.log(2 * math.pi)
        )


@pytest.mark.parametrize("step", [0.01, 1.0])
def test_the_objective_is_score_matching_where_energies_are_quadratic(step):
    # tr(grad^2 log p) + |grad log p|^2 / 2, which for rows of precision P has the mean -tr P / 2.
    precision = [[2.0, 0.5], [0.5, 1.0]]
    model, generator = Quadratic(precision), make_generator(0, torch.device("cpu"))
    rows = torch.randn(100_000, 2, generator=generator, dtype=torch.float64)
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(model.precision).mT, rows.mT, upper=True).mT
    loss = Objective(data_noise=0.0, step=step)(model, rows, generator).mean()
    assert float(loss) == pytest.approx(-1.5, abs=0.03)


@pytest.mark.parametrize("row", [[0.0], [1.0], [2.5]])
def test_the_anomaly_widens_a_normal_density(row):
    precision, noise = 4.0, 0.5
    x = torch.tensor([row], dtype=torch.float64)
    anomaly = Anomaly(noise=noise, n_draws=4_000)
    found = float(anomaly(Quadratic([[precision]]), x, make_generator(0, torch.device("cpu"))))
    variance = 1 / precision + noise**2
    assert found == pytest.approx(
        row[0] ** 2 / (2 * variance) + math.log(2 * math.pi * variance) / 2, abs=0.05
    )

"""Online procedures follow their formulas, never overspend, keep the rate, and survive being stored."""

import json
import pickle

import numpy as np
import pytest
from scipy import integrate, stats

from anomalib_gen.calibration import ADDIS, LORD, SAFFRON
from anomalib_gen.calibration.online import _lord_sum, lord_gamma, saffron_gamma

CONTROLS = [LORD, SAFFRON, ADDIS]


def stream(seed, n=400, share=0.3, shift=3.5):
    random = np.random.default_rng(seed)
    abnormal = random.uniform(size=n) < share
    return stats.norm.sf(random.normal(size=n) + shift * abnormal), abnormal


# The formulas as printed, from the whole past at each time ------------------------------------------------


def lord_levels(p, alpha, w0):
    levels, times = [], []
    for t in range(1, len(p) + 1):
        level = lord_gamma(t) * w0
        for j, tau in enumerate(times):
            level += (alpha - w0 if j == 0 else alpha) * lord_gamma(t - tau)
        levels.append(level)
        if p[t - 1] <= level:
            times.append(t)
    return levels


def saffron_levels(p, alpha, w0, lam):
    levels, times = [], []
    for t in range(1, len(p) + 1):

        def candidates(after, t=t):
            return sum(p[i - 1] <= lam for i in range(after + 1, t))

        total = w0 * saffron_gamma(t - candidates(0))
        for j, tau in enumerate(times):
            total += (alpha - w0 if j == 0 else alpha) * saffron_gamma(t - tau - candidates(tau))
        levels.append(min(lam, (1 - lam) * total))
        if p[t - 1] <= levels[-1]:
            times.append(t)
    return levels


def addis_levels(p, alpha, w0, lam, theta):
    levels, times = [], []
    for t in range(1, len(p) + 1):

        def candidates(after, t=t):
            return sum(p[i - 1] <= lam for i in range(after + 1, t))

        kept = 1 + sum(value <= theta for value in p[: t - 1])
        total = w0 * saffron_gamma(kept - candidates(0))
        for j, tau in enumerate(times):
            start = sum(value <= theta for value in p[:tau])
            total += (alpha - w0 if j == 0 else alpha) * saffron_gamma(kept - start - candidates(tau))
        levels.append(min(lam, (theta - lam) * total))
        if p[t - 1] <= levels[-1]:
            times.append(t)
    return levels


@pytest.mark.parametrize("seed", range(3))
def test_levels_follow_the_papers(seed):
    p, _ = stream(seed, n=150)
    for control, expected in (
        (LORD(alpha=0.1), lord_levels(p, 0.1, 0.05)),
        (LORD(alpha=0.1, initial_wealth=0.02), lord_levels(p, 0.1, 0.02)),
        (SAFFRON(alpha=0.1), saffron_levels(p, 0.1, 0.05, 0.5)),
        (SAFFRON(alpha=0.2, lambda_=0.3), saffron_levels(p, 0.2, 0.1, 0.3)),
        (ADDIS(alpha=0.1), addis_levels(p, 0.1, 0.05, 0.25, 0.5)),
        (ADDIS(alpha=0.1, lambda_=0.5, theta=1.0), saffron_levels(p, 0.1, 0.05, 0.5)),
    ):
        levels = []
        for value in p:
            levels.append(control.level)
            assert control.test(value) == (value <= levels[-1])
        np.testing.assert_allclose(levels, expected)
        assert control.n_tests == len(p)
        assert 0 < control.n_discoveries < len(p)


def test_lord_by_hand():
    g = [None, *(lord_gamma(j) for j in range(1, 5))]
    control = LORD(alpha=0.1, initial_wealth=0.04)
    assert control.level == pytest.approx(0.04 * g[1])
    assert control.test(0.0)
    assert control.wealth == pytest.approx(0.04 - 0.04 * g[1] + 0.06)
    assert control.level == pytest.approx(0.04 * g[2] + 0.06 * g[1])
    assert not control.test(0.5)
    assert control.level == pytest.approx(0.04 * g[3] + 0.06 * g[2])
    assert control.test(0.0)
    assert control.level == pytest.approx(0.04 * g[4] + 0.06 * g[3] + 0.1 * g[1])


def test_saffron_by_hand():
    zeta = 2.2857656630  # of 1.6
    control = SAFFRON(alpha=0.1, initial_wealth=0.05)
    assert control.level == pytest.approx(0.5 * 0.05 / zeta)
    assert not control.test(0.4)  # a candidate costs nothing
    assert control.level == pytest.approx(0.5 * 0.05 / zeta)
    assert not control.test(0.7)
    assert control.level == pytest.approx(0.5 * 0.05 * 2**-1.6 / zeta)
    assert control.test(0.001)
    assert control.level == pytest.approx(0.5 * (0.05 * 2**-1.6 + 0.05) / zeta)


def test_weights_sum_to_one():
    # Ours up to 10^5 terms and an integral beyond; an integral from another place gives the same.
    def weight(u):  # of u = log j
        return u * np.exp(-np.sqrt(u))

    terms = 2000
    rest, _ = integrate.quad(weight, np.log(terms + 0.5), np.inf, limit=500)
    assert sum(_lord_sum() * lord_gamma(j) for j in range(1, terms + 1)) + rest == pytest.approx(
        _lord_sum(), rel=1e-6
    )
    rest = (10_000.5) ** -0.6 / 0.6
    total = sum(saffron_gamma(j) for j in range(1, 10_001)) + saffron_gamma(1) * rest
    assert total == pytest.approx(1, abs=1e-6)
    for gamma in (lord_gamma, saffron_gamma):
        values = [gamma(j) for j in range(1, 200)]
        assert min(values) > 0
        assert values[1:] == sorted(values[1:], reverse=True)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", ["null", "mixed", "all found", "all large", "just above"])
def test_wealth_is_never_negative(control, kind):
    running = control(alpha=0.2)
    p, _ = stream(0, n=1500)
    random = np.random.default_rng(0)
    for t in range(1500):
        level = running.level
        assert 0 < level < 1
        running.test(
            {
                "null": random.uniform(),
                "mixed": p[t],
                "all found": 0.0,
                "all large": 1.0,
                # What costs most: paid for and not found.
                "just above": max(np.nextafter(level, 1), getattr(running, "lambda_", 0) + 1e-9),
            }[kind]
        )
        assert running.wealth >= 0
    # What is spent and earned is told apart from rounding: nothing was cut off at zero.
    if kind == "just above":
        assert 0 < running.wealth < 0.1


@pytest.mark.parametrize("control", CONTROLS)
def test_false_discovery_rate(control):
    alpha, proportions, found = 0.2, [], []
    for seed in range(400):
        p, abnormal = stream(seed, n=200)
        flagged = np.fromiter(control(alpha=alpha).test_each(p), bool)
        proportions.append((flagged & ~abnormal).sum() / max(flagged.sum(), 1))
        found.append(flagged[abnormal].mean())
    assert np.mean(proportions) <= alpha + 3 * np.std(proportions) / 20
    assert np.mean(found) > 0.4


def test_saffron_finds_more_than_lord_where_anomalies_are_many():
    p, abnormal = stream(1, n=2000, share=0.5, shift=2.5)
    found = {c: np.fromiter(c(alpha=0.1).test_each(p), bool)[abnormal].mean() for c in CONTROLS}
    assert found[SAFFRON] > found[LORD]


@pytest.mark.parametrize("control", CONTROLS)
def test_state_goes_through_json_and_pickle(control):
    p, _ = stream(0, n=120)
    whole = list(control(alpha=0.1).test_each(p))
    running = control(alpha=0.1)
    first = list(running.test_each(p[:50]))
    restored = control.from_state(json.loads(json.dumps(running.get_state())))
    pickled = pickle.loads(pickle.dumps(running))
    assert repr(restored) == repr(running)
    assert first + list(restored.test_each(p[50:])) == whole
    assert first + list(pickled.test_each(p[50:])) == whole
    assert restored.wealth == pickled.wealth


def test_damaged_states_are_refused():
    state = LORD(alpha=0.1).get_state()
    with pytest.raises(ValueError, match="one of 'LORD', not of 'SAFFRON'"):
        SAFFRON.from_state(state)
    with pytest.raises(ValueError, match="The state should hold"):
        LORD.from_state({**state, "more": 1})
    for damage in ({"steps": [1, 1]}, {"steps": [0]}, {"wealth": -1.0}, {"wealth": float("nan")}):
        with pytest.raises(ValueError, match="The state is damaged"):
            LORD.from_state({**state, **damage})


@pytest.mark.parametrize("control", CONTROLS)
def test_errors_leave_the_state(control):
    running = control()
    running.test(0.5)
    before = running.get_state()
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"p_value must lie in \[0, 1\]"):
            running.test(wrong)
    for wrong in (np.array([0.1, 0.2]), [0.1], None, "x"):
        with pytest.raises(TypeError, match=r"p_value must be one number, got .*test_each"):
            running.test(wrong)
    assert running.get_state() == before
    for wrong in (0, 1, "x", None):
        with pytest.raises(ValueError, match=f"alpha must lie between 0 and 1, got {wrong!r}"):
            control(alpha=wrong)
    with pytest.raises(ValueError, match=r"initial_wealth must be positive and at most alpha=0.1, got 'x'"):
        control(alpha=0.1, initial_wealth="x")
    with pytest.raises(ValueError, match=r"initial_wealth must be positive and at most alpha=0.1, got 0.2"):
        control(alpha=0.1, initial_wealth=0.2)


def test_parameters_of_saffron_and_addis():
    for wrong in (1, "x"):
        with pytest.raises(ValueError, match=f"lambda_ must lie between 0 and 1, got {wrong!r}"):
            SAFFRON(lambda_=wrong)
    with pytest.raises(ValueError, match=r"theta must lie in \(0, 1\], got 'x'"):
        ADDIS(theta="x")
    with pytest.raises(ValueError, match="0 < lambda_ < theta <= 1 is needed"):
        ADDIS(lambda_=0.5, theta=0.5)

"""The training loop: what it keeps, how it ends, and what it says when something goes wrong."""

import contextlib
import math

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from anomalib_gen import _training
from anomalib_gen._training import (
    TrainingOptions,
    _AdamW,
    _FlatWeights,
    _MovingAverage,
    _pieces,
    evaluate,
    train,
)
from anomalib_gen.objectives import MaximumLikelihood

CPU = torch.device("cpu")


class Rows:
    """Rows in memory that remember which positions were taken."""

    def __init__(self, x):
        self.x = x
        self.taken = []

    def __len__(self):
        return len(self.x)

    def take(self, index):
        self.taken.append(index.clone())
        return self.x[index]

    def blocks(self, rows_per_block):
        yield from self.x.split(rows_per_block)


class Centre(nn.Module):
    """One trained point."""

    def __init__(self, features=2, start=0.0):
        super().__init__()
        self.centre = nn.Parameter(torch.full((features,), start))


def distance(model, x, generator):
    return (x - model.centre).square().sum(1)


def make_rows(n=40, features=2, mean=1.0):
    return Rows(mean + torch.randn(n, features, generator=torch.Generator().manual_seed(0)))


def run(model, objective, rows, *, seed=0, **arguments):
    options = {"max_iter": 30, "batch_size": 16, "learning_rate": 0.1, "warmup": 0}
    of_train = {
        name: arguments.pop(name)
        for name in ("weights", "validation", "validation_weights")
        if name in arguments
    }
    options = TrainingOptions(**{**options, **arguments})
    return train(model, objective, rows, options=options, seed=seed, device=CPU, **of_train)


class FailAt:
    """The distance, until something happens at step k."""

    def __init__(self, step, action):
        self.step, self.action, self.calls = step, action, 0

    def __call__(self, model, x, generator):
        loss = distance(model, x, generator)
        if self.calls == self.step:
            loss = self.action(loss)
        self.calls += 1
        return loss


def raise_(error):
    def action(loss):
        raise error

    return action


# What is trained ------------------------------------------------------------------------------------------


def test_training_finds_the_minimum():
    rows, model = make_rows(), Centre()
    result = run(model, distance, rows, max_iter=300, ema_decay=0.9)
    np.testing.assert_allclose(model.centre.detach(), rows.x.mean(0), atol=0.05)
    assert result.n_iter == result.best_iter == 300
    assert not model.training


@pytest.mark.parametrize(("n", "batch_size"), [(40, 16), (7, 256), (2, 256), (2, 1), (1, 4), (33, 32)])
def test_every_row_is_seen_once_a_pass(n, batch_size):
    rows = make_rows(n)
    steps = -(-n // batch_size)
    result = run(Centre(), distance, rows, max_iter=3 * steps, batch_size=batch_size)
    assert result.n_iter == 3 * steps
    sizes = [len(index) for index in rows.taken[:steps]]
    assert sizes == [batch_size] * (n // batch_size) + [n % batch_size] * bool(n % batch_size)
    passes = torch.cat(rows.taken).reshape(3, n)
    assert all(sorted(order.tolist()) == list(range(n)) for order in passes)


def test_rows_come_in_another_order_each_pass_and_with_each_seed():
    rows, other = make_rows(), make_rows()
    run(Centre(), distance, rows, max_iter=2, batch_size=40)
    run(Centre(), distance, other, max_iter=2, batch_size=40, seed=1)
    assert not torch.equal(rows.taken[0], rows.taken[1])
    assert not torch.equal(rows.taken[0], other.taken[0])


def test_weights_scale_the_loss():
    rows = Rows(torch.tensor([[0.0], [4.0]]))
    model = Centre(1)
    run(model, distance, rows, weights=torch.tensor([0.5, 1.5]), max_iter=400, batch_size=2, ema_decay=0.9)
    assert model.centre.item() == pytest.approx(3.0, abs=0.05)  # (0.5 * 0 + 1.5 * 4) / 2


def test_every_weight_follows_its_row():
    rows, seen = make_rows(), []

    def spy(model, x, generator):
        seen.append(distance(model, x, generator))
        return seen[-1]

    weights = torch.linspace(0.1, 1.9, 40)
    result = run(Centre(), spy, rows, weights=weights, max_iter=3, batch_size=16, eval_every=1)
    for loss, distances, index in zip(result.loss_curve, seen, rows.taken, strict=True):
        assert loss == pytest.approx((weights[index] * distances).mean().item(), rel=1e-5)


def test_weight_decay_is_for_matrices_only():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(2, 2))
            self.vector = nn.Parameter(torch.ones(2))

    model = Both()
    # No gradient: only the decay moves anything.
    run(
        model, lambda m, x, g: 0 * (m.matrix.sum() + m.vector.sum()) + x.sum(1), make_rows(), weight_decay=0.5
    )
    assert (model.matrix < 0.95).all()
    np.testing.assert_array_equal(model.vector.detach(), 1)


class Several(nn.Module):
    """Matrices and vectors of two precisions."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (shape, dtype) in {
            "a": ((2, 3), torch.float32),
            "b": ((3,), torch.float32),
            "c": ((), torch.float64),
            "d": ((2, 1, 2), torch.float64),
            "e": ((4, 1), torch.float32),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))


def test_weights_laid_end_to_end_are_the_same_weights():
    model = Several()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = _FlatWeights(list(model.parameters()))
    flat.forget()
    assert [(vector.numel(), vector.dtype) for vector in flat.vectors] == [
        (13, torch.float32),
        (5, torch.float64),
    ]
    assert [matrices.numel() for matrices in flat.matrices] == [10, 4]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
    (model.a.square().sum() + (3 * model.d).sum()).backward()
    single, double = flat.gradients
    torch.testing.assert_close(single[:6], 2 * before["a"].flatten())
    assert not single[6:].any()  # of e and b, which took no part
    assert (double[:4] == 3).all()
    assert not double[4:].any()
    flat.forget()
    assert not single.any()
    assert not double.any()
    assert not any(parameter.grad.any() for parameter in model.parameters())
    with torch.no_grad():
        for vector in flat.vectors:
            vector.add_(1)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] + 1)
    flat.release()
    places = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(places) == 5
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        flat.vectors[0].zero_()
    torch.testing.assert_close(model.a.detach(), before["a"] + 1)
    flat.load([torch.zeros_like(vector) for vector in flat.vectors])
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_every_weight_has_its_own_memory_after_training(fails):
    model = Several()

    def loss(model, x, generator):
        if fails and model.b.sum() < 100:
            raise ValueError("no")
        return x.sum(1) + sum(parameter.sum() for parameter in model.parameters())

    with pytest.raises(ValueError, match="no") if fails else contextlib.nullcontext():
        run(model, loss, make_rows(), max_iter=2)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        assert parameter.grad is None


def test_frozen_parameters_stay():
    model = Centre()
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    run(model, lambda m, x, g: (x * m.frozen - m.centre).square().sum(1), make_rows())
    np.testing.assert_array_equal(model.frozen, 1)


@pytest.mark.parametrize("largest", [0.5, 1e3])
def test_gradients_are_clipped_by_their_length_over_all_precisions(largest):
    model = Several()
    flat = _FlatWeights(list(model.parameters()))
    flat.forget()
    sum((weight**2).sum().double() for weight in model.parameters()).backward()
    expected = [2 * weight.detach().double() for weight in model.parameters()]
    length = float(torch.cat([part.flatten() for part in expected]).norm())
    flat.clip(largest)
    found = {}
    for vector, group in zip(flat.gradients, flat.groups, strict=True):
        found.update(_pieces(vector, group))
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        clipped = gradient * min(1.0, largest / length)
        torch.testing.assert_close(found[weight].double(), clipped, rtol=1e-5, atol=1e-7)


def test_gradients_of_zero_survive_clipping():
    flat = _FlatWeights(list(Several().parameters()))
    flat.clip(1.0)
    assert not any(gradient.any() for gradient in flat.gradients)


def test_objectives_that_take_gradients_of_their_own_do_not_spoil_those_of_training():
    def meddling(model, x, generator):
        with torch.enable_grad():
            distance(model, x, generator).sum().backward()
        if generator.initial_seed() == 1:
            model.zero_grad()
        return distance(model, x, generator)

    plain, own, zeroed = Centre(), Centre(), Centre()
    run(plain, distance, make_rows(), seed=0)
    run(own, meddling, make_rows(), seed=0)
    torch.testing.assert_close(own.centre, plain.centre)
    run(plain := Centre(), distance, make_rows(), seed=1)
    run(zeroed, meddling, make_rows(), seed=1)
    torch.testing.assert_close(zeroed.centre, plain.centre)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("factors", [{}, {"b": 3.0, "c": 0.5}])
def test_training_steps_are_those_of_clipped_adamw(weight_decay, factors):
    options = {"max_iter": 20, "learning_rate": 0.1, "warmup": 5, "max_grad_norm": 0.7, "ema_decay": 0.0}
    model, own = Several().float(), Several().float()
    model.rate_factors = factors

    def loss(model, x, generator):
        return x.square().sum(1) * 0 + sum((weight - 1).square().sum() for weight in model.parameters())

    run(model, loss, make_rows(), weight_decay=weight_decay, **options)
    matrices = [p for p in own.parameters() if p.ndim >= 2]
    rest = [name for name, p in own.named_parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay, "factor": 1.0},
            *(
                {"params": [getattr(own, name)], "weight_decay": 0.0, "factor": factors.get(name, 1.0)}
                for name in rest
            ),
        ]
    )
    for step in range(20):
        for group in optimiser.param_groups:
            rate = 0.1 * min(1, (step + 1) / 5) * 0.5 * (1 + np.cos(np.pi * step / 20))
            group["lr"] = rate * group["factor"]
        optimiser.zero_grad()
        loss(own, torch.zeros(1, 1), None).mean().backward()
        nn.utils.clip_grad_norm_(own.parameters(), 0.7)
        optimiser.step()
    for weight, expected in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


# Learning rate, averaging, precision ----------------------------------------------------------------------


def learning_rates(monkeypatch, **options):
    """Run the loop and return the step size of each step."""
    rates = []
    step = _AdamW.step

    def spy(self, rate):
        rates.append(rate)
        step(self, rate)

    monkeypatch.setattr(_AdamW, "step", spy)
    run(Centre(), distance, make_rows(), **options)
    return np.array(rates)


def test_the_step_size_falls_along_half_a_cosine(monkeypatch):
    rates = learning_rates(monkeypatch, max_iter=100, learning_rate=0.2, warmup=0)
    np.testing.assert_allclose(rates, 0.1 * (1 + np.cos(np.pi * np.arange(100) / 100)), rtol=1e-12)
    assert rates[0] == 0.2
    assert 0 < rates[-1] < 1e-3 * 0.2


def test_the_step_size_warms_up_linearly(monkeypatch):
    rates = learning_rates(monkeypatch, max_iter=100, learning_rate=0.2, warmup=20, schedule=False)
    np.testing.assert_allclose(rates[:20], 0.2 * np.arange(1, 21) / 20, rtol=1e-12)
    np.testing.assert_array_equal(rates[20:], 0.2)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.995])
def test_the_average_is_the_weighted_sum_it_claims_to_be(decay):
    model = Centre(1, start=5.0)
    average = _MovingAverage(model, _FlatWeights([model.centre]), decay)
    values = np.random.default_rng(0).normal(size=30)
    weights = np.zeros(31)  # of the start and of each value
    weights[0] = 1.0
    for t, value in enumerate(values):
        with torch.no_grad():
            model.centre.fill_(value)
        average.update(t)
        d = min(decay, (1 + t) / (10 + t))
        weights *= d
        weights[t + 1] = 1 - d
    expected = weights @ np.concatenate([[5.0], values])
    assert weights.sum() == pytest.approx(1)
    assert float(average.state()[0][0]) == pytest.approx(expected, abs=1e-6)
    assert float(average.model.centre) == pytest.approx(expected, abs=1e-6)
    assert model.centre.item() == pytest.approx(values[-1])


def test_the_averaged_weights_are_kept():
    plain, averaged = Centre(), Centre()
    run(plain, distance, make_rows(), ema_decay=0.0)
    run(averaged, distance, make_rows(), ema_decay=0.9)
    # Starting from 0 on the way to 1, an average lags behind.
    assert (averaged.centre < plain.centre).all()


def test_mixed_precision_trains_float32_weights_through_bfloat16():
    types = set()

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(2, 1)

    def objective(model, x, generator):
        y = model.map(x)
        types.add(y.dtype)
        return (y.float()[:, 0] - x.sum(1)).square()

    model = Linear()
    result = run(model, objective, make_rows(), mixed_precision=True, max_iter=150, eval_every=10)
    assert types == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert result.loss_curve[-1] < result.loss_curve[0] / 10
    types.clear()
    run(Linear(), objective, make_rows(), max_iter=2)
    assert types == {torch.float32}


# Held-out rows --------------------------------------------------------------------------------------------


def test_the_best_weights_on_held_out_rows_are_kept():
    # Training pulls to 1, past the held-out rows at 0.3.
    validation = Rows(torch.full((8, 2), 0.3))
    model = Centre()
    result = run(
        model, distance, make_rows(), validation=validation, max_iter=100, eval_every=1, learning_rate=0.02
    )
    best = int(np.argmin(result.validation_curve))
    assert result.best_iter == best + 1
    kept = evaluate(model, distance, validation, weights=None, rows_per_block=3, generator=torch.Generator())
    assert kept == pytest.approx(result.validation_curve[best])
    assert kept < 0.01
    assert result.validation_curve[-1] > 0.01


def test_training_stops_early():
    validation = Rows(torch.full((8, 2), 0.3))
    result = run(
        Centre(),
        distance,
        make_rows(),
        validation=validation,
        max_iter=1000,
        eval_every=5,
        n_iter_no_change=3,
        learning_rate=0.02,
    )
    assert result.n_iter == result.best_iter + 3 * 5
    assert result.n_iter < 1000
    assert len(result.validation_curve) == len(result.loss_curve) == result.n_iter // 5


def test_patience_starts_again_with_every_improvement():
    class Scripted:
        losses = iter([5.0, 6.0, 6.0, 4.0, 5.0, 5.0, 3.0, 3.5, 3.0, 4.0, 1.0])

        def __call__(self, model, x, generator):
            return distance(model, x, generator)

        def validate(self, model, x, generator):
            return torch.full((len(x),), next(self.losses))

    result = run(
        Centre(),
        Scripted(),
        make_rows(),
        validation=make_rows(8),
        eval_every=2,
        n_iter_no_change=3,
        max_iter=100,
    )
    # 3.0 for the second time is no improvement; 1.0 is never seen.
    assert result.validation_curve == [5.0, 6.0, 6.0, 4.0, 5.0, 5.0, 3.0, 3.5, 3.0, 4.0]
    assert (result.best_iter, result.n_iter) == (14, 20)


def test_the_last_step_is_always_evaluated():
    rows = make_rows()
    result = run(Centre(), distance, rows, validation=make_rows(8), max_iter=12, eval_every=5)
    assert len(result.validation_curve) == len(result.loss_curve) == 3
    assert result.validation_steps == result.loss_steps == [5, 10, 12]
    result = run(Centre(), distance, rows, max_iter=3, eval_every=5)
    assert (result.validation_steps, result.loss_steps) == ([], [3])
    assert (len(result.validation_curve), len(result.loss_curve)) == (0, 1)


def test_the_loss_curve_is_the_mean_between_evaluations():
    seen = []

    def spy(model, x, generator):
        loss = distance(model, x, generator)
        seen.append(loss.mean().item())
        return loss

    result = run(Centre(), spy, make_rows(), max_iter=7, eval_every=3)
    expected = [np.mean(seen[:3]), np.mean(seen[3:6]), seen[6]]
    np.testing.assert_allclose(result.loss_curve, expected, rtol=1e-6)


def test_an_objective_may_judge_held_out_rows_in_its_own_way():
    class Judged:
        def __call__(self, model, x, generator):
            return distance(model, x, generator)

        def validate(self, model, x, generator):
            return torch.full((len(x),), 7.0)

    result = run(Centre(), Judged(), make_rows(), validation=make_rows(8), max_iter=5)
    assert result.validation_curve == [7.0]


def test_an_objective_is_told_how_far_training_is():
    class Told:
        def __init__(self):
            self.seen = []

        def set_progress(self, fraction):
            self.seen.append(fraction)

        def __call__(self, model, x, generator):
            return distance(model, x, generator)

    objective = Told()
    run(Centre(), objective, make_rows(), max_iter=4)
    assert objective.seen == [0.0, 0.25, 0.5, 0.75]


def test_noise_at_evaluations_is_the_same_each_time():
    def noisy(model, x, generator):
        return distance(model, x, generator) * 0 + torch.rand(len(x), generator=generator)

    result = run(Centre(), noisy, make_rows(), validation=make_rows(8), max_iter=6, eval_every=2)
    assert len(set(result.validation_curve)) == 1


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
def test_evaluate_is_a_weighted_mean_whatever_the_blocks(rows_per_block):
    rows, model = make_rows(10), Centre()
    values = distance(model, rows.x, None).detach().double()
    weights = torch.linspace(0, 2, 10)

    def mean(w):
        return evaluate(model, distance, rows, weights=w, rows_per_block=rows_per_block, generator=None)

    assert mean(None) == pytest.approx(float(values.mean()))
    assert mean(weights) == pytest.approx(float((weights * values).sum() / weights.sum()))


# Interrupts -----------------------------------------------------------------------------------------------


def test_an_interrupt_keeps_the_weights_so_far():
    model, reference = Centre(), Centre()
    with pytest.warns(
        UserWarning, match=r"interrupted after 12 steps\..*weights of step 12, the best so far"
    ):
        result = run(model, FailAt(12, raise_(KeyboardInterrupt())), make_rows(), schedule=False)
    run(reference, distance, make_rows(), schedule=False, max_iter=12)
    assert len(result.loss_curve) == 1  # though no evaluation was due
    np.testing.assert_array_equal(model.centre.detach(), reference.centre.detach())
    assert (result.n_iter, result.best_iter, result.interrupted) == (12, 12, True)
    assert len(result.loss_curve) == len(result.loss_steps)
    assert not model.training


def test_an_interrupt_keeps_the_best_weights():
    validation = Rows(torch.full((8, 2), 0.3))
    model = Centre()

    class Once(FailAt):
        validate = staticmethod(distance)

    objective = Once(90, raise_(KeyboardInterrupt()))
    with pytest.warns(
        UserWarning, match=r"after 90 steps\. .*weights of step (\d+), the best so far"
    ) as caught:
        result = run(
            model,
            objective,
            make_rows(),
            validation=validation,
            max_iter=200,
            eval_every=10,
            learning_rate=0.02,
        )
    assert f"weights of step {result.best_iter}," in str(caught[0].message)
    assert result.best_iter == 10 * (int(np.argmin(result.validation_curve)) + 1) < 90
    assert distance(model, validation.x, None)[0].item() == pytest.approx(min(result.validation_curve))


def test_an_interrupt_before_the_first_step_is_passed_on():
    model = Centre(start=3.0)
    with pytest.raises(KeyboardInterrupt):
        run(model, FailAt(0, raise_(KeyboardInterrupt())), make_rows())
    np.testing.assert_array_equal(model.centre.detach(), 3.0)


def interrupt_at(monkeypatch, step):
    """Interrupt the training of flows at a step; the trial of two rows before it is let through."""
    loss = MaximumLikelihood.__call__
    calls = iter(range(10_000))

    def spy(self, model, x, generator):
        if len(x) > 2 and torch.is_grad_enabled() and next(calls) == step:
            raise KeyboardInterrupt
        return loss(self, model, x, generator)

    monkeypatch.setattr(MaximumLikelihood, "__call__", spy)


def test_an_interrupted_detector_is_usable(tiny, X, monkeypatch):
    interrupt_at(monkeypatch, 30)
    detector = tiny(max_iter=1000)
    with pytest.warns(UserWarning, match="interrupted after 30 steps") as caught:
        detector.fit(X)
    assert caught[0].filename == __file__
    assert detector.n_iter_ == 30
    assert np.isfinite(detector.score_samples(X)).all()
    assert (detector.predict(X) == -1).mean() == pytest.approx(0.1)


def test_warnings_point_at_the_users_line_however_deep(tiny, X, monkeypatch):
    interrupt_at(monkeypatch, 30)
    nested = make_pipeline(StandardScaler(), make_pipeline(StandardScaler(), tiny(max_iter=1000)))
    with pytest.warns(UserWarning, match="interrupted after 30 steps") as caught:
        nested.fit(X)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_detector_interrupted_at_once_is_as_before(tiny, X, monkeypatch):
    detector = tiny().fit(X)
    scores = detector.score_samples(X)
    interrupt_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        detector.fit(X[:, :2])
    np.testing.assert_array_equal(detector.score_samples(X), scores)


# Losses that are not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("check_every", [1, 5, 20, 1000])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_names_the_step_the_rate_and_a_cause(monkeypatch, check_every, bad):
    monkeypatch.setitem(_training.CHECK_EVERY, "cpu", check_every)
    # The cosine at step 7 of 30.
    rate = 0.05 * (1 + math.cos(math.pi * 7 / 30))
    message = (
        rf"not finite at step 7 \(learning rate {rate:.3g}\)\. Likely cause: the steps are too large: lower"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(Centre(), FailAt(7, lambda loss: loss * bad), make_rows())


def test_a_huge_value_is_named_as_the_cause():
    rows = make_rows()
    rows.x[3] = 1e25
    with pytest.raises(
        FloatingPointError, match=r"at step 0 .*standardised value of 1e\+25 .*heavy-tailed columns"
    ):
        run(Centre(), distance, rows, batch_size=40)


@pytest.mark.parametrize("check_every", [1, 20])
def test_the_cause_is_looked_for_in_the_batch_that_failed(monkeypatch, check_every):
    monkeypatch.setitem(_training.CHECK_EVERY, "cpu", check_every)
    rows = make_rows()
    rows.x[3] = 1e25
    position = next(
        k
        for k, index in enumerate(torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(1))
        if 3 in index
    )
    with pytest.raises(FloatingPointError, match=rf"at step {position} .*standardised value of 1e\+25"):
        run(Centre(), distance, rows, batch_size=1, max_iter=100)


def test_rows_that_are_not_finite_are_named_as_the_cause():
    rows = make_rows()
    rows.x[3] = math.inf
    with pytest.raises(FloatingPointError, match="the standardised rows are not finite"):
        run(Centre(), distance, rows, batch_size=40)


def test_a_far_too_large_learning_rate_is_named(tiny, X):
    def steep(features, context_features):
        class Steep(nn.Module):
            def __init__(self):
                super().__init__()
                self.log_scale = nn.Parameter(torch.zeros(features))

            def forward(self, x, context):
                scale = self.log_scale.exp()
                return x * scale, scale.log().sum().expand(len(x))

        return Steep()

    with pytest.raises(FloatingPointError, match="lower learning_rate or max_grad_norm"):
        tiny(transform=steep, learning_rate=1e5).fit(X)


# Memory ---------------------------------------------------------------------------------------------------

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError(CPU_MESSAGE),
    MemoryError(),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
]


def needs_memory(rows_that_fit, error):
    def objective(model, x, generator):
        if len(x) > rows_that_fit:
            raise error
        return distance(model, x, generator)

    return objective


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: f"{type(e).__name__} {str(e)[:10]}")
def test_the_batch_is_halved_until_it_fits(error):
    rows, model = make_rows(100), Centre()
    with pytest.warns(UserWarning, match="Out of memory") as caught:
        result = run(model, needs_memory(16, error), rows, batch_size=64, max_iter=200, ema_decay=0.9)
    assert [str(w.message) for w in caught] == [
        f"Out of memory at step 0: the batch is halved to {n} rows. Set batch_size={n} to start there."
        for n in (32, 16)
    ]
    assert result.n_iter == 200
    np.testing.assert_allclose(model.centre.detach(), rows.x.mean(0), atol=0.1)
    # No row of the pass in which it happened was lost.
    first_pass = torch.cat(rows.taken[2:9])
    assert sorted(first_pass.tolist()) == list(range(100))


def test_memory_that_runs_out_in_the_gradient_counts_too():
    class Expensive(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.rows = len(x)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if ctx.rows > 8:
                raise RuntimeError(CPU_MESSAGE)
            return gradient

    with pytest.warns(UserWarning, match="the batch is halved to 8 rows"):
        run(Centre(), lambda m, x, g: Expensive.apply(distance(m, x, g)), make_rows(), max_iter=5)


@pytest.mark.filterwarnings("ignore:Out of memory")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: f"{type(e).__name__} {str(e)[:10]}")
def test_held_out_rows_are_judged_in_blocks_that_fit(error):
    class Judged(FailAt):
        rows_that_fit = 30

        def validate(self, model, x, generator):
            if len(x) > self.rows_that_fit:
                raise error
            return distance(model, x, generator)

    objective, curves = Judged(-1, None), []
    with pytest.warns(UserWarning, match="held-out rows") as caught:
        curves.append(run(Centre(), objective, make_rows(), validation=make_rows(100), eval_every=10))
    assert [str(w.message) for w in caught] == [
        f"Out of memory at step 10: held-out rows are judged {n} at a time." for n in (50, 25)
    ]
    objective.rows_that_fit = 100
    curves.append(run(Centre(), objective, make_rows(), validation=make_rows(100), eval_every=10))
    assert curves[0].validation_curve == pytest.approx(curves[1].validation_curve)
    objective.rows_that_fit = 0
    with pytest.warns(UserWarning, match="1 at a time"), pytest.raises(type(error)):
        run(Centre(), objective, make_rows(), validation=make_rows(100))


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_one_row_that_does_not_fit_is_the_end():
    objective = needs_memory(0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):
        run(Centre(), objective, make_rows())


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), ZeroDivisionError()])
@pytest.mark.filterwarnings("error")
def test_other_errors_are_passed_on(error):
    with pytest.raises(type(error)) as caught:
        run(Centre(), needs_memory(4, error), make_rows())
    assert caught.value is error


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_a_detector_trains_on_when_memory_runs_out(tiny, X, monkeypatch):
    loss = MaximumLikelihood.__call__

    def spy(self, model, x, generator):
        if len(x) > 20:
            raise RuntimeError(CPU_MESSAGE)
        return loss(self, model, x, generator)

    monkeypatch.setattr(MaximumLikelihood, "__call__", spy)
    detector = tiny(batch_size=64)
    with pytest.warns(UserWarning, match="halved to 16 rows") as caught:
        detector.fit(X)
    assert caught[0].filename == __file__
    assert detector.n_iter_ == 20
    assert detector.batch_size == 64


# The progress bar -----------------------------------------------------------------------------------------


def test_verbose_shows_loss_validation_loss_and_speed(tiny, X, capfd):
    tiny(verbose=1).fit(X)
    shown = capfd.readouterr()
    assert shown.out == ""
    for part in ("FlowDetector", "loss=", "validation=", "row/s"):
        assert part in shown.err


def test_without_held_out_rows_no_validation_loss_is_shown(tiny, X, capfd):
    tiny(verbose=1, validation_fraction=0.0).fit(X)
    shown = capfd.readouterr().err
    assert "loss=" in shown
    assert "validation" not in shown


def test_silent_by_default(tiny, X, capfd):
    detector = tiny().fit(X)
    detector.predict(X)
    detector.sample(3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("n", "batch_size", "max_iter"), [(40, 16, 30), (40, 16, 31), (40, 64, 3), (5, 1, 7)]
)
def test_the_bar_ends_where_it_said(n, batch_size, max_iter, monkeypatch):
    class Bar:
        def __init__(self, total, **options):
            self.total, self.n, self.shown, self.closed = total, 0, {}, False
            bars.append(self)

        def update(self, n):
            assert not self.closed
            self.n += n

        def set_postfix(self, shown, refresh):
            self.shown = shown

        def close(self):
            self.closed = True

    bars = []
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)  # in a notebook it draws a widget, elsewhere text
    options = {"batch_size": batch_size, "max_iter": max_iter, "verbose": 1}
    run(Centre(), distance, make_rows(n), validation=make_rows(3), **options)
    (bar,) = bars
    assert bar.n == bar.total
    assert bar.shown.keys() == {"loss", "validation"}
    assert bar.closed


def test_the_bar_is_closed_when_training_fails(capfd):
    with pytest.raises(ZeroDivisionError):
        run(Centre(), FailAt(3, raise_(ZeroDivisionError())), make_rows(), verbose=1)
    assert capfd.readouterr().err.endswith("\n")


def test_held_out_rows_are_judged_with_the_current_buffers():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("steps", torch.zeros(()))

    def objective(model, x, generator):
        model.steps += 1
        return model.weight.square() + x[:, 0] * 0

    def judge(model, x, generator):
        return model.steps.expand(len(x))

    objective.validate = judge
    rows = make_rows(64)
    result = train(
        Counting(),
        objective,
        rows,
        options=TrainingOptions(
            max_iter=20, batch_size=8, learning_rate=0.1, eval_every=5, n_iter_no_change=10
        ),
        seed=0,
        device=torch.device("cpu"),
        validation=rows,
    )
    assert result.validation_curve == [5, 10, 15, 20]


# Divergence -----------------------------------------------------------------------------------------------


class Diverging:
    """The distance, until it says at step k that it diverged, whatever the loss is by then."""

    def __init__(self, step, factor=1.0):
        self.step, self.factor, self.calls = step, factor, 0

    def __call__(self, model, x, generator):
        self.calls += torch.is_grad_enabled()
        return distance(model, x, generator) * (self.factor if self.calls >= self.step else 1.0)

    def diverged(self):
        return "the chains left the data" if self.calls >= self.step else None


@pytest.mark.parametrize("held_out", [True, False])
def test_divergence_stops_with_a_diagnosis_and_the_best_weights_so_far(held_out):
    # After step 50 the loss pushes the centre away; the weights of step 50 are kept.
    rows = make_rows()
    validation = {"validation": make_rows(20)} if held_out else {}
    steady, model = Centre(), Centre()
    run(steady, distance, rows, max_iter=200, eval_every=25, schedule=False, **validation)
    with pytest.warns(
        UserWarning, match=r"diverged and was stopped at step 60: the chains left.* of step 50,"
    ):
        result = run(
            model, Diverging(60, -1e3), rows, max_iter=200, eval_every=25, schedule=False, **validation
        )
    assert (result.n_iter, result.best_iter) == (60, 50)
    assert len(result.loss_curve) == 2
    np.testing.assert_allclose(model.centre.detach(), steady.centre.detach(), atol=0.1)
    assert not model.training


def test_divergence_before_the_first_evaluation_keeps_what_there_is():
    model = Centre()
    with pytest.warns(UserWarning, match="at step 3: .* of step 3,"):
        result = run(model, Diverging(3), make_rows(), validation=make_rows(20))
    assert result.n_iter == result.best_iter == 3
    assert len(result.loss_curve) == 1
    assert torch.isfinite(model.centre).all()


def test_divergence_to_no_number_raises_with_the_diagnosis():
    with pytest.raises(FloatingPointError, match="diverged within 1 steps: the chains left the data"):
        run(Centre(), Diverging(1, math.nan), make_rows())


def test_steady_objectives_train_on():
    result = run(Centre(), Diverging(10**6), make_rows(), max_iter=40)
    assert result.n_iter == 40

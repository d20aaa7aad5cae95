"""Scores do not depend on the rows beside them, and nothing global is touched."""

import os
import random
import re
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_gen import ComposedDetector, EnergyDetector, _runtime, _scoring
from anomalib_gen._component import Component
from anomalib_gen.anomaly import Typicality
from anomalib_gen.explain import feature_contributions
from anomalib_gen.features import FeatureExtractor
from anomalib_gen.objectives import MaximumLikelihood

TRANSFORMS = ["nsf-autoregressive", "nsf-coupling", "maf", "realnvp"]
CPU = torch.device("cpu")


# Independence ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*TRANSFORMS, "typicality"])
def detector(request, tiny, X):
    if request.param == "typicality":
        return tiny(anomaly=Typicality()).fit(X)
    return tiny(transform=request.param).fit(X)


def test_a_score_does_not_depend_on_the_rows_beside_it(detector, X):
    scores = detector.score_samples(X)
    alone = np.concatenate([detector.score_samples(row[None]) for row in X[:30]])
    np.testing.assert_allclose(alone, scores[:30], rtol=1e-10)
    crowded = detector.score_samples(np.concatenate([X[:5], 1e8 * np.ones((50, 3)), X[5:10]]))
    np.testing.assert_allclose(crowded[[*range(5), *range(55, 60)]], scores[:10], rtol=1e-10)


def test_a_score_does_not_depend_on_the_order(detector, X):
    order = np.random.default_rng(0).permutation(len(X))
    np.testing.assert_allclose(detector.score_samples(X[order]), detector.score_samples(X)[order], rtol=1e-10)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_a_score_does_not_depend_on_the_block(detector, X, block, monkeypatch):
    scores = detector.score_samples(X)
    monkeypatch.setattr(_runtime, "scoring_block_rows", lambda size, device: block)
    np.testing.assert_allclose(detector.score_samples(X), scores, rtol=1e-10)


class Noisy(Component):
    """Distance from a random point, drawn once a block with the event's shape."""

    in_nats = False

    def __call__(self, model, x, generator):
        point = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype, device=x.device)
        return (x - point).square().sum(1)


@pytest.mark.parametrize("block", [1, 7])
def test_noise_in_an_anomaly_is_the_same_for_every_block(tiny, X, block, monkeypatch):
    detector = tiny(anomaly=Noisy()).fit(X)
    scores = detector.score_samples(X)
    monkeypatch.setattr(_runtime, "scoring_block_rows", lambda size, device: block)
    np.testing.assert_allclose(detector.score_samples(X), scores, rtol=1e-10)
    np.testing.assert_allclose(detector.score_samples(X[150:]), scores[150:], rtol=1e-10)
    assert not np.allclose(tiny(anomaly=Noisy(), random_state=1).fit(X).score_samples(X), scores, rtol=1e-3)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_scores_in_float32_hardly_depend_on_anything_either(tiny, X, transform, monkeypatch):
    exact = tiny(transform=transform).fit(X).score_samples(X)
    monkeypatch.setattr(_runtime, "scoring_dtype", lambda device: torch.float32)
    monkeypatch.setattr(_runtime, "scoring_block_rows", lambda size, device: 64)
    detector = tiny(transform=transform).fit(X)
    assert {p.dtype for p in detector.model_.parameters()} == {torch.float32}
    scores = detector.score_samples(X)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, exact, rtol=1e-4)
    order = np.random.default_rng(0).permutation(len(X))
    # 200 rows are three blocks of 64 and a padded one; alone, a row is padded with itself.
    for rows in (order, order[:7], order[:130]):
        np.testing.assert_allclose(detector.score_samples(X[rows]), scores[rows], rtol=1e-4)
    alone = np.concatenate([detector.score_samples(row[None]) for row in X[:5]])
    np.testing.assert_allclose(alone, scores[:5], rtol=1e-4)


def test_samples_do_not_depend_on_who_drew_before(fitted):
    expected = fitted.sample(4, random_state=7)
    fitted.sample(100, random_state=1)
    np.testing.assert_array_equal(fitted.sample(4, random_state=7), expected)


# Global state ---------------------------------------------------------------------------------------------


def global_state():
    """Everything of the process that a library might be tempted to change."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": (numpy_state[1].tolist(), *numpy_state[2:]),
        "python generator": random.getstate(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly mode": torch.is_anomaly_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warning filters": list(warnings.filters),
        "numpy errors": np.geterr(),
        "print options": np.get_printoptions(),
    }


@pytest.fixture
def unchanged(fitted):
    """Fail the test if global state differs at its end; start from seeds that are not the usual ones.

    The first fit of a process, that of `fitted`, makes scikit-learn and torch import what draws from Python's generator
    and filters warnings as it is imported (rich, sympy): not ours to fence in.
    """
    with warnings.catch_warnings():
        random.seed(123)
        np.random.seed(456)  # noqa: NPY002
        torch.manual_seed(789)
        before = global_state()
        yield
        after = global_state()
    for name, value in before.items():
        assert after[name] == value, name


class Dropping(nn.Module):
    """An affine map with dropout, which draws from torch's global generators while training."""

    def __init__(self, features, context_features):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(features))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, context):
        y = self.dropout(x - self.shift)
        return y, y.new_zeros(len(x))

    def inverse(self, u, context):
        return u + self.shift, u.new_zeros(len(u))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("transform", [*TRANSFORMS, Dropping])
def test_ordinary_use_touches_nothing_global(tiny, X, transform):
    detector = tiny(transform=transform, verbose=1).fit(X)
    detector.predict(X)
    detector.log_prob(X)
    detector.sample(5, random_state=0)
    detector.partial_fit(X)


@pytest.mark.usefixtures("unchanged")
def test_an_objective_that_draws_from_the_global_generator_is_fenced_in(tiny, X, monkeypatch):
    loss = MaximumLikelihood.__call__

    def careless(self, model, x, generator):
        return loss(self, model, x + 0.1 * torch.randn(x.shape), generator)

    monkeypatch.setattr(MaximumLikelihood, "__call__", careless)
    tiny().fit(X)


@pytest.mark.usefixtures("unchanged")
def test_a_failed_fit_touches_nothing_global(tiny, X):
    def broken(features, context_features):
        torch.rand(3)
        raise ZeroDivisionError

    class NotFinite(Dropping):
        def forward(self, x, context):
            y, log_det = super().forward(x, context)
            return y, log_det * torch.nan if self.training else log_det

    with pytest.raises(ZeroDivisionError):
        tiny(transform=broken).fit(X)
    with pytest.raises(FloatingPointError):
        tiny(transform=NotFinite).fit(X)
    with pytest.raises(ValueError, match="NaN"):
        tiny().fit(np.full((5, 2), np.nan))


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("step", [0, 5])
def test_an_interrupted_fit_touches_nothing_global(tiny, X, step):
    class Interrupted(Dropping):
        steps = 0

        def forward(self, x, context):
            if self.training:
                if self.steps == step:
                    raise KeyboardInterrupt
                self.steps += 1
            return super().forward(x, context)

    if step == 0:
        with pytest.raises(KeyboardInterrupt):
            tiny(transform=Interrupted).fit(X)
    else:
        with pytest.warns(UserWarning, match="interrupted after 5 steps"):
            tiny(transform=Interrupted).fit(X)


def test_global_state_makes_no_difference(tiny, X):
    expected = tiny().fit(X).score_samples(X)
    torch.manual_seed(1)
    with torch.no_grad():
        assert not torch.is_grad_enabled()
    assert np.array_equal(tiny().fit(X).score_samples(X), expected)


@pytest.mark.parametrize("state", [1, 2])
def test_dropout_is_seeded_by_random_state(tiny, X, state):
    torch.manual_seed(0)
    first = tiny(transform=Dropping, random_state=state).fit(X)
    torch.manual_seed(99)
    torch.rand(17)
    second = tiny(transform=Dropping, random_state=state).fit(X)
    np.testing.assert_array_equal(first.score_samples(X), second.score_samples(X))
    # No dropout in scores.
    np.testing.assert_array_equal(first.score_samples(X), first.score_samples(X))


def test_networks_are_seeded_by_random_state(tiny, X):
    shifts = [
        tiny(transform=Dropping, random_state=s, max_iter=1).fit(X).model_.transform.shift for s in (1, 2, 1)
    ]
    assert torch.equal(shifts[0], shifts[2])
    assert not torch.equal(shifts[0], shifts[1])


# Devices, blocks, generators ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_device_there_is(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert _runtime.resolve_device("auto") == torch.device(expected)
    assert _runtime.resolve_device(torch.device("cpu")) == CPU


def test_the_index_of_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert _runtime.resolve_device(device) == torch.device(device)
    for device in ("cuda:2", torch.device("cuda:7")):
        with pytest.raises(
            ValueError, match=r"torch finds 2 CUDA device\(s\).*device='auto' or another index"
        ):
            _runtime.resolve_device(device)


def test_scores_are_in_float64_where_there_is_float64():
    assert _runtime.scoring_dtype(CPU) == _runtime.scoring_dtype(torch.device("cuda")) == torch.float64
    assert _runtime.scoring_dtype(torch.device("mps")) == torch.float32


def test_generators_are_seeded_and_apart_from_the_global_one():
    state = torch.get_rng_state()
    a, b, c = (torch.rand(3, generator=_runtime.make_generator(seed, CPU)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fails", [False, True])
def test_the_fork_is_seeded_and_leaves_no_trace(fails):
    state = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        try:
            with _runtime.forked_rng(5):
                drawn.append(torch.rand(3))
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_take_turns_with_the_global_generators():
    def draw(seed):
        with _runtime.forked_rng(seed):
            first = torch.rand(3)
            time.sleep(0.01)  # where another thread would get in
            return torch.stack([first, torch.rand(3)])

    state, seeds = torch.get_rng_state(), range(8)
    expected = [draw(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as threads:
        for drawn, alone in zip(threads.map(draw, seeds), expected, strict=True):
            assert torch.equal(drawn, alone)
    assert torch.equal(torch.get_rng_state(), state)


def test_fits_in_threads_are_those_of_one_thread(tiny, X):
    seeds, state = range(6), torch.get_rng_state()

    def scores(seed):
        return tiny(max_iter=10, random_state=seed).fit(X).score_samples(X[:5])

    expected = [scores(seed) for seed in seeds]
    with ThreadPoolExecutor(3) as threads:
        np.testing.assert_array_equal(list(threads.map(scores, seeds)), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_lacks():
    held, release = threading.Event(), threading.Event()

    def hold():
        with _runtime.forked_rng(0):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:  # pragma: no cover
        os._exit(0 if _runtime._global_generators.acquire(timeout=5) else 1)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("n", "size"), [(0, 3), (1, 3), (3, 3), (10, 3), (2, 100)])
def test_blocks_cover_every_row_once_and_in_order(n, size):
    blocks = list(_runtime.row_blocks(n, size))
    assert [k for block in blocks for k in range(n)[block]] == list(range(n))
    assert all(block.stop - block.start <= size for block in blocks)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("event_size", [1, 10, 1000, 10**6, 10**9])
def test_blocks_are_bounded(device, event_size):
    device = torch.device(device)
    rows = _runtime.scoring_block_rows(event_size, device)
    assert 1 <= rows <= 65536
    assert rows == 1 or rows * event_size <= 2**22


with_openmp = pytest.mark.skipif(
    not _runtime._can_keep_to_one_core(), reason="torch has other threads than OpenMP's"
)


@with_openmp
def test_threads_work_on_one_core_each_and_answer_in_order():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    caller = threading.get_ident()

    def look(item):
        time.sleep(0.01 * (item % 3))
        torch.ones(300, 300) @ torch.ones(300, 300)
        return item, torch.get_num_threads(), threading.get_ident()

    try:
        found = list(_runtime.in_threads(look, range(20), 2))
        assert [item for item, *_ in found] == list(range(20))
        assert {threads for _, threads, _ in found} == {1}
        assert len({ident for *_, ident in found} - {caller}) == 2
        assert torch.get_num_threads() == 3
        # One thread is the caller's, which keeps its cores.
        assert list(_runtime.in_threads(look, [0], 1)) == [(0, 3, caller)]
    finally:
        torch.set_num_threads(before)


@with_openmp
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list threads")
def test_no_library_under_torch_starts_threads_where_one_core_is_enough():
    """Nor if the user has set their number by `torch.set_num_threads`, which tells MKL as well."""
    before = torch.get_num_threads()
    started = []

    def work(limited):
        if limited:
            _runtime._keep_to_one_core()
        there = set(os.listdir("/proc/self/task"))
        x = torch.ones(600, 600, dtype=torch.float64)
        (x @ x + x).exp()
        started.append(len(set(os.listdir("/proc/self/task")) - there))

    try:
        torch.set_num_threads(3)
        for limited in (True, False):
            thread = threading.Thread(target=work, args=(limited,))
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert started == [0, 2]


@with_openmp
def test_threads_are_as_many_as_torch_has_but_not_more_than_can_be_kept_apart(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert _runtime.scoring_threads() == 3
        torch.set_num_threads(50)
        assert _runtime.scoring_threads() == _runtime.MOST_THREADS
        monkeypatch.setattr(_runtime, "_can_keep_to_one_core", lambda: False)
        assert _runtime.scoring_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_threads_ask_for_few_items_ahead_and_for_none_after_an_error():
    asked, done = [], []

    def items():
        for item in range(1000):
            asked.append(item)
            yield item

    def work(item):
        if item == 5:
            raise ValueError("five")
        done.append(item)

    found = _runtime.in_threads(work, items(), 2)
    for _ in range(5):
        next(found)
    with pytest.raises(ValueError, match="five"):
        next(found)
    assert len(asked) < 20
    assert len(done) < 20


def test_what_the_system_has_no_threads_for_is_done_once_by_the_caller(monkeypatch):
    caller, done = threading.get_ident(), []

    def submit(*_):
        raise RuntimeError("can't start new thread")

    def work(item):
        done.append(item)
        if item == 5:
            raise ValueError("five")
        return threading.get_ident()

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    assert list(_runtime.in_threads(work, range(4), 2)) == [caller] * 4
    assert done == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="five") as caught:
        list(_runtime.in_threads(work, range(4, 8), 2))
    assert caught.value.__context__ is None


def test_threads_have_the_callers_context():
    with np.errstate(divide="raise"):
        found = list(_runtime.in_threads(lambda _: np.geterr()["divide"], range(3), 2))
    assert found == ["raise"] * 3


def test_who_interrupts_does_not_wait_for_what_is_being_computed():
    free, begun, done = threading.Event(), threading.Event(), []

    def work(item):
        begun.set()
        free.wait(20)
        done.append(item)

    def items():
        yield 0
        assert begun.wait(20)
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            list(_runtime.in_threads(work, items(), 2))
        assert not done
    finally:
        free.set()


def test_a_thread_that_outlives_the_main_one_can_score():
    code = """if True:
        import threading
        from anomalib_gen import _runtime

        def late():
            threading.main_thread().join()
            assert _runtime.scoring_threads() >= 1
            print(sum(_runtime.in_threads(abs, range(-10, 0), 2)))

        threading.Thread(target=late).start()
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "55\n"
    assert not done.stderr


def test_a_quota_takes_no_limit_away(monkeypatch):
    numbers = [5, 1, 0]  # the last is MKL's for no number of its own

    def setter(k):
        def set_threads(n):
            before, numbers[k] = numbers[k], n
            return before

        return set_threads

    monkeypatch.setattr(_runtime, "_thread_setters", lambda: [setter(k) for k in range(3)])
    monkeypatch.setattr(_runtime, "available_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    with _runtime.within_quota():
        assert numbers == [2, 1, 2]
    assert numbers == [5, 1, 0]


@with_openmp
def test_a_quota_of_cores_is_kept_to(tiny, X, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(_runtime, "available_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []
    forward = nn.Linear.forward
    monkeypatch.setattr(
        nn.Linear, "forward", lambda layer, x: (seen.append(torch.get_num_threads()), forward(layer, x))[1]
    )
    try:
        torch.set_num_threads(5)
        with _runtime.within_quota():
            assert torch.get_num_threads() == 2
            assert _runtime.scoring_threads() == 2
            with _runtime.within_quota():
                assert torch.get_num_threads() == 2
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 5
        detector = tiny().fit(X)
        detector.sample(3)
        detector.score_samples(X)
        assert set(seen) == {2}
        seen.clear()
        detector.score_samples(np.tile(X, (3, 1)))
        assert set(seen) == {1}  # threads that score blocks have a core each
        with pytest.raises(ValueError, match="max_iter"):
            tiny(max_iter=0).fit(X)
        assert torch.get_num_threads() == 5
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        with _runtime.within_quota():
            assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)


@with_openmp
@pytest.mark.filterwarnings("ignore:The weights of 4 chains:UserWarning")
@pytest.mark.parametrize(
    "call", ["contributions", "another anomaly", "constant", "sample of a product", "features"]
)
def test_other_heavy_calls_keep_to_the_quota_too(call, tiny, X, monkeypatch):
    before, seen = torch.get_num_threads(), []
    forward = nn.Linear.forward

    class Flat(nn.Module):
        def forward(self, images):
            seen.append(torch.get_num_threads())
            return images.flatten(1)

    small = {"max_iter": 2, "hidden_features": 8, "random_state": 0, "device": "cpu"}
    flow, energy = tiny(max_iter=2).fit(X), EnergyDetector(**small).fit(X)
    product = ComposedDetector([("flow", flow), ("energy", energy)], n_steps=4, random_state=0).fit(X)
    calls = {
        "contributions": lambda: feature_contributions(flow, X[:3]),
        "another anomaly": lambda: flow.with_anomaly("typicality", X),
        "constant": lambda: energy.normalize(n_chains=4, n_levels=2),
        "sample of a product": lambda: product.sample(2, random_state=0),
        "features": lambda: FeatureExtractor(Flat(), device="cpu").fit_transform(np.zeros((3, 1, 8, 8))),
    }
    monkeypatch.setattr(_runtime, "available_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        nn.Linear, "forward", lambda layer, x: (seen.append(torch.get_num_threads()), forward(layer, x))[1]
    )
    try:
        torch.set_num_threads(5)
        calls[call]()
        assert max(seen) == 2
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n_rows", [0, 1, 255, 256, 257, 512, 513, 2000, 4096, 10**5])
def test_rows_of_tables_are_shared_out(n_rows, monkeypatch):
    found = []
    for n_threads in (1, 3, 8):
        monkeypatch.setattr(_runtime, "scoring_threads", lambda n=n_threads: n)
        rows, threads = _scoring._blocks_and_threads(n_rows, 10, (10,), CPU)
        assert _scoring.LEAST_ROWS <= rows <= _scoring.ROWS_PER_BLOCK
        assert threads == max(1, min(n_threads, -(-n_rows // rows)))
        found.append(rows)
        assert _scoring._blocks_and_threads(n_rows, 64, (1, 8, 8), CPU)[1] == 1
        assert _scoring._blocks_and_threads(n_rows, 10, (10,), torch.device("cuda"))[1] == 1
    assert len(set(found)) == 1


def test_scores_of_many_rows_are_the_same_on_any_number_of_threads(fitted, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(1500, 3)) * [1.0, 1.0, 5.0]
    scores = []
    for n_threads in (1, 2, 5):
        monkeypatch.setattr(_runtime, "scoring_threads", lambda n=n_threads: n)
        scores.append(fitted.score_samples(rows))
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], scores[2])


def test_per_row_numbers_broadcast_over_events():
    t = torch.arange(4)
    assert _runtime.expand_as_rows(t, torch.zeros(4, 2)).shape == (4, 1)
    assert _runtime.expand_as_rows(t, torch.zeros(4, 3, 8, 8)).shape == (4, 1, 1, 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert _runtime.is_out_of_memory(error) is expected


def test_scoring_noise_is_the_same_in_every_precision():
    drawn = [
        _runtime.normal_noise((4, 3), torch.empty(0, dtype=dtype), _runtime.scoring_generator(3))
        for dtype in (torch.float64, torch.float32)
    ]
    assert [noise.dtype for noise in drawn] == [torch.float64, torch.float32]
    torch.testing.assert_close(drawn[0].float(), drawn[1])


def test_the_generator_of_scores_is_on_the_cpu():
    assert _runtime.scoring_generator(0).device == CPU


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "xla", "vulkan:0"])
def test_devices_without_values_are_refused_by_name(device, tiny, X):
    with pytest.raises(
        ValueError, match=rf"device={re.escape(repr(device))} was .* Use device='auto' or 'cpu'"
    ):
        tiny(device=device).fit(X)


def test_single_precision_is_for_one_thread_and_for_what_says_no_type():
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(1) as pool, _runtime.SinglePrecision():
            assert nn.Linear(2, 2).weight.dtype == torch.zeros(2).dtype == torch.float32
            assert nn.Linear(2, 2, dtype=torch.float64).weight.dtype == torch.float64
            assert torch.zeros(2, dtype=torch.int64).dtype == torch.arange(2).dtype == torch.int64
            assert torch.zeros(2, out=torch.empty(2, dtype=torch.float64)).dtype == torch.float64
            assert pool.submit(lambda: torch.zeros(2).dtype).result() == torch.float64
            assert torch.get_default_dtype() == torch.float64
        assert torch.zeros(2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)

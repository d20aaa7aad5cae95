"""Where and how tensors live and are computed: device, precision, threads, scoped randomness, row batches, shapes.

Nothing here changes a global: no seed, no thread count, no backend flag.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from joblib.externals.loky import cpu_count
from threadpoolctl import ThreadpoolController
from torch import nn
from torch.overrides import TorchFunctionMode

SCORING_VALUES_PER_BLOCK = 2**18
"""Input values scored at once on a CPU; keeps a block's activations in tens of megabytes."""
MOST_THREADS = 8
"""Threads that score at a time at most; each has its own buffers, of a closed form up to 80 MB (models.neighbors)."""
_IN_DEFAULT_TYPE = frozenset(
    {torch.empty, torch.eye, torch.linspace, torch.logspace, torch.ones, torch.rand, torch.randn, torch.zeros}
)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_global_generators = threading.RLock()
"""Held by the thread that has torch's global generators to itself."""


def _renew_lock() -> None:
    """Free the lock in a forked child: the thread that held it is not there to release it."""
    global _global_generators
    _global_generators = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for products in bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn a user's `device` into a `torch.device` that is there.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"`` takes CUDA, else Apple's MPS, else the CPU.

    Raises
    ------
    ValueError
        If the string names no device, or one that this machine lacks.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not a torch device. Use 'auto', 'cpu', 'cuda', 'cuda:<index>' or 'mps'."
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} was asked for, but torch finds no CUDA device. Use device='auto' or 'cpu'."
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r} was asked for, but torch finds {torch.cuda.device_count()} CUDA device(s), counted "
            "from 0. Use device='auto' or another index."
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device={device!r} was asked for, but torch finds no MPS device. Use device='auto' or 'cpu'."
        )
    if resolved.type not in ("cpu", "cuda", "mps"):
        try:
            # Values are needed, which tensors on "meta" have none of, and random numbers.
            torch.zeros(1, device=resolved).item()
            torch.Generator(device=resolved)
        except Exception as error:  # each kind of device raises its own
            raise ValueError(
                f"device={device!r} was asked for, but torch cannot compute there. Use device='auto' or 'cpu'."
            ) from error
    return resolved


def scoring_dtype(device: torch.device) -> torch.dtype:
    """Precision of every score of a table: float64, or float32 where the device has nothing better (MPS).

    In float32 the last bits of a matrix product depend on the number of rows beside the one of interest;
    float64 pushes that below anything a user compares.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def event_dtype(event_shape: Sequence[int], device: torch.device) -> torch.dtype:
    """Precision of scores of rows of a shape: `scoring_dtype`, and float32 for images.

    Convolutions have no fast kernels in float64: on a CPU they take 4 to 20 times as long. Blocks of one size, which
    float32 needs (see `_scoring.score_in_blocks`), keep an image's score its own.
    """
    return torch.float32 if len(event_shape) > 1 else scoring_dtype(device)


def make_generator(seed: int, device: torch.device) -> torch.Generator:
    """Return a generator on `device`, seeded and independent of the global one."""
    return torch.Generator(device=device).manual_seed(seed)


def scoring_generator(seed: int) -> torch.Generator:
    """Return the generator that anomalies draw from: on the CPU, whatever the device.

    Devices turn a seed into different numbers. With noise from one place a row has the same score, up to rounding, on
    every machine.
    """
    return make_generator(seed, torch.device("cpu"))


def check_generator(generator: torch.Generator) -> None:
    """Refuse seeds, numpy's generators, and None, for which torch would take its global generator."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            "generator must be a torch.Generator, such as torch.Generator().manual_seed(0), "
            f"got a {type(generator).__name__}."
        )


def normal_noise(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise from a generator on whichever device, in the precision and on the device of `like`."""
    exact = torch.float32 if generator.device.type == "mps" else torch.float64
    noise = torch.randn(shape, generator=generator, dtype=exact, device=generator.device)
    return noise.to(device=like.device, dtype=like.dtype)


def normal_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal noise of the shape, precision and device of `x`, from a generator on that device."""
    check_generator(generator)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


@contextmanager
def forked_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after.

    Layers draw their first weights, and dropout its masks, from the global generators and take no others. Those
    of the CPU and of a CUDA `device` are forked; networks are built on the CPU and moved afterwards. (On MPS, dropout
    draws from a generator that is left alone.)

    All threads share the global generators, so blocks of several threads take turns: detectors that are fitted in
    threads are the same as those fitted one after the other, and no faster.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    with _global_generators:
        cpu_state = torch.get_rng_state()
        cuda_state = None if cuda is None else torch.cuda.get_rng_state(cuda)
        try:
            torch.default_generator.manual_seed(seed)
            if cuda is not None:
                with torch.cuda.device(cuda):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            torch.set_rng_state(cpu_state)
            if cuda is not None and cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, cuda)


class SinglePrecision(TorchFunctionMode):
    """Make float32 of what torch's functions, and so its layers, make in their default type inside the block.

    That type is the process's (`torch.set_default_dtype`); this mode is the thread's own.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IN_DEFAULT_TYPE and kwargs.get("dtype") is None and kwargs.get("out") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


@torch.inference_mode(False)
def leave_inference_mode(model: nn.Module) -> None:
    """Renew weights and buffers that were copied or unpickled in inference mode: nothing could be differentiated."""
    renewed: dict[int, torch.Tensor] = {}  # what is shared stays so
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is None or not value.is_inference():
                    continue
                if id(value) not in renewed:
                    new = value.detach().clone()
                    is_weight = isinstance(value, nn.Parameter)
                    renewed[id(value)] = nn.Parameter(new, value.requires_grad) if is_weight else new
                # Of the kind that is there, which mypy does not see.
                kept[name] = renewed[id(value)]  # type: ignore[assignment]


def expand_as_rows(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape per-row numbers ``(B,)`` so that they broadcast over events ``(B, *E)``."""
    return t.reshape(-1, *([1] * (x.ndim - 1)))


def check_count(value: Any, name: str, *, least: int = 1) -> int:
    """Return a whole number of at least `least`; the message of another one names it."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")
    return int(value)


def check_share(value: Any, name: str, *, with_one: bool = False) -> float:
    """Return a number between 0 and 1, or in (0, 1]; the message of another value names it."""
    if not isinstance(value, Real) or not (0 < float(value) < 1 or (with_one and value == 1)):
        raise ValueError(f"{name} must lie {'in (0, 1]' if with_one else 'between 0 and 1'}, got {value!r}.")
    return float(value)


def check_shape(values: torch.Tensor, shape: Sequence[int], name: str) -> torch.Tensor:
    """Return what a user's function or network gave; another shape would broadcast and go unnoticed.

    Raises
    ------
    ValueError
        If `values` is no tensor of that shape, whose first number is that of the rows.
    """
    if not isinstance(values, torch.Tensor) or values.shape != tuple(shape):
        tensor = isinstance(values, torch.Tensor)
        found = f"a tensor of shape {tuple(values.shape)}" if tensor else f"a {type(values).__name__}"
        raise ValueError(f"{name} returned {found} for {shape[0]} rows; shape {tuple(shape)} is needed.")
    return values


def check_rows(x: torch.Tensor, event_shape: Sequence[int]) -> None:
    """Refuse rows of another shape than ``(B, *event_shape)``: narrow ones would broadcast too."""
    if x.shape[1:] != tuple(event_shape):
        wanted = ", ".join(map(str, event_shape))
        raise ValueError(f"x must have the shape (B, {wanted}), got {tuple(x.shape)}.")


def check_levels(noise_levels: tuple[float, float] | None) -> None:
    """Refuse a smallest and a largest noise level that are not positive and rise."""
    if noise_levels is not None and not 0 < noise_levels[0] < noise_levels[1] < math.inf:
        raise ValueError(
            f"noise_levels={noise_levels!r} must be two positive numbers, the smaller one first."
        )


def row_blocks(n_rows: int, rows_per_block: int) -> Iterator[slice]:
    """Cut ``range(n_rows)`` into slices of at most `rows_per_block` rows, in order."""
    for start in range(0, n_rows, rows_per_block):
        yield slice(start, min(start + rows_per_block, n_rows))


def scoring_block_rows(event_size: int, device: torch.device) -> int:
    """Rows to score at once, from the event's size and the device alone.

    It never depends on the number of rows at hand, so memory stays bounded whatever is passed.
    """
    values = SCORING_VALUES_PER_BLOCK if device.type == "cpu" else 16 * SCORING_VALUES_PER_BLOCK
    # A few columns still cost a network's whole width, hence the cap. On a CPU activations of a thousand rows are
    # about what its caches hold.
    return max(1, min(values // max(1, event_size), 1024 if device.type == "cpu" else 65536))


def scoring_threads() -> int:
    """Threads among which blocks of rows are shared out on a CPU: as many as torch has for one operation.

    Operations on a block are short, and threads that share each of them wait for one another at its end: where other
    work has one of the cores, for most of the time. Threads with blocks of their own wait for nobody.
    """
    try:
        return min(torch.get_num_threads(), MOST_THREADS) if _can_keep_to_one_core() else 1
    except RuntimeError:  # there are no threads to be had, for now
        return 1


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], n_threads: int
) -> Iterator[_Result]:
    """``function(item)`` of each item, in order, in threads whose operations run on one core each.

    Items are asked for in the caller's thread, a few ahead. With one thread everything is done there, as it is where
    the system has no threads to give. Context variables, such as numpy's error state, are the caller's.
    """
    if n_threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="scoring", initializer=_keep_to_one_core)
    waiting: deque[Future[_Result]] = deque()
    threads_to_be_had = wait = True
    try:
        for item in items:
            if threads_to_be_had:
                try:
                    waiting.append(pool.submit(copy_context().run, function, item))
                except RuntimeError:  # the main thread has ended, or the system is short of threads
                    threads_to_be_had = False
            if not threads_to_be_had:
                waiting.append(Future())
                waiting[-1].set_result(function(item))
            if len(waiting) > 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:
        # Blocks that were begun cannot be stopped, and may take minutes. A notebook goes on without them; a process
        # that ends waits for them.
        wait = False
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


@contextmanager
def within_quota() -> Iterator[None]:
    """Let torch's operations in this thread use no more cores than the process may.

    The share of a machine that a container has is a quota of time, of which torch knows nothing: it starts a thread for
    each of the machine's cores, and when they have used the quota up all stand still, also those that others wait for.
    ``OMP_NUM_THREADS``, where it is set, is the user's word and counts.
    """
    cores = available_cores()
    if torch.get_num_threads() <= cores or os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    before = _set_threads([cores] * len(_thread_setters()))
    # A library that had fewer keeps to them; 0 is MKL's word for no number of its own.
    _set_threads([min(n, cores) if n else cores for n in before])
    try:
        yield
    finally:
        _set_threads(before)


@functools.cache
def available_cores() -> int:
    """Cores that the process may use: by its affinity, its container's quota, and ``LOKY_MAX_CPU_COUNT``."""
    # loky's own: joblib's is 1 where it could start no processes.
    return int(cpu_count())


@functools.cache
def _thread_setters() -> list[Callable[[int], int]]:
    """Functions that set a number of threads for operations of the calling thread alone, and return the former one.

    They are OpenMP's, and where torch has MKL in it, MKL's, which `torch.set_num_threads` sets, too, and which rules
    matrix products from then on.
    """

    def of_openmp(library: Any) -> Callable[[int], int]:
        def set_threads(n: int) -> int:
            before = int(library.get_num_threads())
            library.set_num_threads(n)
            return before

        return set_threads

    setters = [
        of_openmp(library) for library in ThreadpoolController().select(user_api="openmp").lib_controllers
    ]
    for path in (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"):
        try:
            setters.append(ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local)
        except (OSError, AttributeError):
            continue
    return setters


def _set_threads(numbers: Sequence[int]) -> list[int]:
    """Set numbers of threads, one for each of `_thread_setters`, and return the former ones."""
    # Otherwise torch sets its own at the first operation of a thread.
    torch.get_num_threads()
    return [set_threads(n) for set_threads, n in zip(_thread_setters(), numbers, strict=True)]


def _keep_to_one_core() -> None:
    """Let torch's operations in this thread run on one core."""
    _set_threads([1] * len(_thread_setters()))


@functools.cache
def _can_keep_to_one_core() -> bool:
    """Whether `_keep_to_one_core` rules torch's threads: torch may have been built with others than OpenMP's.

    It cannot tell whether the library behind matrix products has threads of its own besides, as Apple's has.

    Raises
    ------
    RuntimeError
        If there are no threads to be had.
    """
    found: list[int] = []

    def look() -> None:
        _keep_to_one_core()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found == [1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a tensor could not be allocated, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "MPS backend out of memory" in str(error)
    )


def release_memory(device: torch.device) -> None:
    """Give cached blocks back after an allocation failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()

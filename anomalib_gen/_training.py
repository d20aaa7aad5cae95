"""The one training loop: the only place with an optimiser.

Rows come as index batches from data that are resident on the device where they fit. A step is

    loss -> gradient -> clip -> AdamW -> exponential moving average of the weights,

all of which but the first two work on the weights laid end to end (`_FlatWeights`): as many calls as there are weights
would take a tenth of the time of a small network's step. On a CUDA device the first two are recorded once and replayed
(`_recording`), where the objective says that it does the same at every step: one launch in place of hundreds, which
take longer than what they launch. Every `eval_every` steps the averaged weights are judged on
held-out rows; the best ones seen are kept.
The averaging follows Polyak and Juditsky (1992, doi:10.1137/0330046) in its exponential form, with a decay that
grows as min(decay, (1 + t) / (10 + t)), so that the first steps are soon forgotten.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.adam import adam

from anomalib_gen import _runtime
from anomalib_gen._recording import RecordedStep, can_record
from anomalib_gen._warnings import warn_user

CHECK_EVERY = {"cpu": 1, "cuda": 20, "mps": 20}
"""Steps between looks at the loss. On a GPU each look waits for the queue to drain."""
RECORD_AFTER = 10
"""Steps after which one is recorded: by then libraries have chosen their kernels and layers have seen data."""


class Rows(Protocol):
    """Training rows as tensors on the device, in the units that the model sees."""

    def __len__(self) -> int: ...

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the given positions (a CPU tensor), ``(B, *E)``."""
        ...

    def blocks(self, rows_per_block: int) -> Iterator[torch.Tensor]:
        """All rows in order, in blocks."""
        ...


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes
    ----------
    max_iter : int
        Gradient steps at most.
    batch_size : int
        Rows a step.
    learning_rate : float
        Peak of AdamW's step size; it warms up over `warmup` steps and then falls along half a cosine.
    weight_decay : float
        AdamW's decoupled weight decay, on matrices only.
    max_grad_norm : float
        Gradients of a larger norm are scaled down to it.
    ema_decay : float
        Decay of the weights' moving average.
    eval_every : int
        Steps between evaluations on the held-out rows, and between the points of the curves.
    n_iter_no_change : int
        Evaluations without a better validation loss after which training stops.
    warmup : int
        Steps of linear warm-up.
    schedule : bool
        Whether the step size falls; if not, it stays at its peak after the warm-up.
    mixed_precision : bool
        Run the forward pass in bfloat16 autocast. For models whose loss is exact enough so.
    recorded : bool
        Record a step on a CUDA device and replay it. For objectives and models that do the same at every step, whatever
        the values; where recording fails, and before torch 2.11, steps go on one by one.
    verbose : int
        1 shows a progress bar.
    rows_per_evaluation : int
        Held-out rows judged at once; no fewer than `batch_size`.
    """

    max_iter: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 10.0
    ema_decay: float = 0.995
    eval_every: int = 25
    n_iter_no_change: int = 20
    warmup: int = 50
    schedule: bool = True
    mixed_precision: bool = False
    recorded: bool = False
    verbose: int = 0
    rows_per_evaluation: int = 1024


@dataclass
class TrainingResult:
    """What training did.

    Attributes
    ----------
    n_iter : int
        Gradient steps taken.
    loss_curve : list of float
        Mean training loss between evaluations.
    validation_curve : list of float
        Loss of the averaged weights on the held-out rows at each evaluation; empty without held-out rows.
    loss_steps, validation_steps : list of int
        Steps taken by each point of the curves.
    best_iter : int
        The step whose averaged weights were kept.
    interrupted : bool
        Whether a keyboard interrupt ended it.
    """

    n_iter: int = 0
    loss_curve: list[float] = field(default_factory=list)
    validation_curve: list[float] = field(default_factory=list)
    loss_steps: list[int] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    best_iter: int = 0
    interrupted: bool = False


class _FlatWeights:
    """Parameters, and their gradients, as views of one long vector of each precision, matrices first.

    Parameters
    ----------
    parameters : list of Parameter
        Those to lay end to end. They stay what they are to the model; `release` gives each its own memory again.

    Attributes
    ----------
    vectors : list of Tensor
        The vectors.
    gradients : list of Tensor
        A vector of the same layout for each, where the parameters are trainable; its parts are their gradients.
    matrices : list of Tensor
        The part of each vector that holds matrices, which weight decay is for; it shares the vector's memory.
    groups : list of list of Parameter
        The parameters of each vector, in the order they lie there.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        by_precision: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in sorted(parameters, key=lambda parameter: parameter.ndim < 2):
            by_precision.setdefault(parameter.dtype, []).append(parameter)
        self.groups = list(by_precision.values())
        self.vectors: list[torch.Tensor] = []
        self.matrices: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self._places: list[tuple[nn.Parameter, torch.Tensor]] = []
        for group in self.groups:
            joined = torch.cat([parameter.detach().reshape(-1) for parameter in group])
            self.vectors.append(joined)
            self.matrices.append(
                joined[: sum(parameter.numel() for parameter in group if parameter.ndim >= 2)]
            )
            for parameter, piece in _pieces(joined, group):
                parameter.data = piece
            if any(parameter.requires_grad for parameter in group):
                gradient = torch.zeros_like(joined)
                self.gradients.append(gradient)
                self._places += _pieces(gradient, group)

    def forget(self) -> None:
        """Set all gradients to zero, where backward will add to them."""
        for gradient in self.gradients:
            gradient.zero_()
        for parameter, piece in self._places:
            # An objective may have set it to None, as `Module.zero_grad` does.
            if parameter.grad is not piece:
                parameter.grad = piece

    @torch.no_grad()
    def clip(self, max_norm: float) -> None:
        """Scale the vectors' gradients down to `max_norm`, together, if they are longer."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in self.gradients]
        norm = norms[0] if len(norms) == 1 else torch.stack([n.float() for n in norms]).norm()
        # A look is free on the CPU; elsewhere it would wait for the queue to drain.
        if norm.device.type == "cpu" and float(norm) <= max_norm:
            return
        factor = (max_norm / norm).clamp(max=1)
        for gradient in self.gradients:
            gradient.mul_(factor)

    def release(self) -> None:
        """Give each parameter its own memory, so that what copies or saves one does not drag along the others."""
        for group in self.groups:
            for parameter in group:
                parameter.data, parameter.grad = parameter.data.clone(), None

    @torch.no_grad()
    def load(self, vectors: list[torch.Tensor]) -> None:
        """Copy values that are laid out like `vectors` into the parameters."""
        for vector, group in zip(vectors, self.groups, strict=True):
            for parameter, piece in _pieces(vector, group):
                parameter.copy_(piece)


def _pieces(vector: torch.Tensor, group: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each parameter with its part of a vector, in its own shape."""
    for parameter, piece in zip(group, vector.split([p.numel() for p in group]), strict=True):
        yield parameter, piece.view(parameter.shape)


class _AdamW:
    """AdamW on long vectors: a call for all weights of one precision.

    Decay is taken off the matrices apart from Adam's step, which is what decouples it (Loshchilov and Hutter 2019,
    arXiv:1711.05101, algorithm 2). The step is torch's own function; the bookkeeping of `torch.optim.Optimizer` around
    it would take a twentieth of a small network's step.

    Parameters
    ----------
    weights : _FlatWeights
    weight_decay : float
    model : Module
        What the weights are of. A module's `rate_factors` says by what factor steps of some of its parameters, by
        name, are longer.
    """

    def __init__(self, weights: _FlatWeights, weight_decay: float, model: nn.Module) -> None:
        self.weights, self.weight_decay = weights, weight_decay
        self.quick: list[tuple[nn.Parameter, float]] = [
            (module.get_parameter(name), factor)
            for module in model.modules()
            for name, factor in getattr(module, "rate_factors", {}).items()
        ]
        self.means = [torch.zeros_like(vector) for vector in weights.gradients]
        self.squares = [torch.zeros_like(vector) for vector in weights.gradients]
        self.fused = all(vector.device.type in ("cpu", "cuda") for vector in weights.vectors)
        self.counts = [
            torch.zeros((), device=vector.device if self.fused else "cpu") for vector in weights.gradients
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the weights along their gradients by a step of size `rate`."""
        if self.weight_decay:
            for matrices in self.weights.matrices:
                matrices.mul_(1 - rate * self.weight_decay)
        before = [parameter.clone() for parameter, _ in self.quick]
        adam(
            self.weights.vectors,
            self.weights.gradients,
            self.means,
            self.squares,
            [],
            self.counts,
            fused=self.fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        for (parameter, factor), start in zip(self.quick, before, strict=True):
            parameter.copy_(torch.lerp(start, parameter, factor))


class _MovingAverage:
    """Averaged copy of a model, updated in one fused call a step.

    Parameters
    ----------
    model : Module
    weights : _FlatWeights
        Of all its trainable parameters.
    decay : float
    """

    def __init__(self, model: nn.Module, weights: _FlatWeights, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        names = {parameter: name for name, parameter in model.named_parameters()}
        copies = dict(self.model.named_parameters())
        order = [copies[names[parameter]] for group in weights.groups for parameter in group]
        self.source, self.average = weights.vectors, _FlatWeights(order).vectors
        # What a copy of the model shares with it (stored rows) does not change in training.
        pairs = zip(self.model.buffers(), model.buffers(), strict=True)
        moving = [(mine, theirs) for mine, theirs in pairs if mine is not theirs]
        self.buffers: list[torch.Tensor] = [mine for mine, _ in moving]
        self.source_buffers: list[torch.Tensor] = [theirs for _, theirs in moving]

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.source, weight)

    @torch.no_grad()
    def follow_buffers(self) -> None:
        """Take over what is no weight but changes in training, such as running statistics."""
        for mine, theirs in zip(self.buffers, self.source_buffers, strict=True):
            mine.copy_(theirs)

    def state(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Copies of the averaged weights and of the buffers that belong to them."""
        return [p.clone() for p in self.average], [b.clone() for b in self.buffers]


def _non_finite_message(step: int, lr: float, x: torch.Tensor) -> str:
    largest = float(x.abs().max())
    if not math.isfinite(largest):
        cause = "the standardised rows are not finite: look for extreme values in X"
    elif largest > 1e4:
        cause = (
            f"a standardised value of {largest:.3g} in the batch: transform heavy-tailed columns "
            "(QuantileTransformer, or a logarithm) before the detector"
        )
    else:
        cause = "the steps are too large: lower learning_rate or max_grad_norm"
    return f"The training loss is not finite at step {step} (learning rate {lr:.3g}). Likely cause: {cause}."


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Callable[[Any, torch.Tensor, torch.Generator], torch.Tensor],
    rows: Rows,
    *,
    weights: torch.Tensor | None,
    rows_per_block: int,
    generator: torch.Generator,
) -> float:
    """Mean loss over all `rows`, weighted by `weights` ``(len(rows),)`` if given."""
    total, mass, start = 0.0, 0.0, 0
    for x in rows.blocks(rows_per_block):
        values = loss(model, x, generator).double()
        if weights is None:
            total, mass = total + float(values.sum()), mass + len(x)
        else:
            w = weights[start : start + len(x)].to(values)
            total, mass = total + float((w * values).sum()), mass + float(w.sum())
        start += len(x)
    return total / mass


def train(
    model: nn.Module,
    objective: Callable[[Any, torch.Tensor, torch.Generator], torch.Tensor],
    rows: Rows,
    *,
    options: TrainingOptions,
    seed: int,
    device: torch.device,
    weights: torch.Tensor | None = None,
    validation: Rows | None = None,
    validation_weights: torch.Tensor | None = None,
    label: str = "fit",
) -> TrainingResult:
    """Train `model` in place and leave the best averaged weights in it.

    Parameters
    ----------
    model : Module
        On `device`, in float32.
    objective : callable
        ``objective(model, x, generator) -> (B,)``. Where it has a method ``validate`` of the same form, that one
        judges the held-out rows. Where it has ``set_progress(fraction)``, it is told before each step what share of
        `max_iter` has passed, from 0 to below 1; not so without a `schedule`, as in a stream of passes. Where it has
        ``diverged() -> str | None``, that is asked whenever the loss is looked at; a reason ends the training, and
        the best weights before that are kept. Whether it may be recorded is the caller's to say, see
        `TrainingOptions` and `_recording.is_recordable`.
    rows, validation : Rows
        Training rows and, optionally, held-out rows.
    options : TrainingOptions
    seed : int
        Seeds the order of the rows and the objective's noise.
    device : torch.device
    weights, validation_weights : Tensor, optional
        Weight of each row, with mean one over both together.
    label : str, default="fit"
        What the progress bar is called.

    Returns
    -------
    TrainingResult

    Raises
    ------
    FloatingPointError
        If the loss stops being finite; the message has the step, the learning rate and the likely cause. Also if the
        objective diverged before there were finite weights to keep.
    RuntimeError
        If not even a batch of one row fits into memory.

    Warns
    -----
    UserWarning
        If memory ran out and the batch, or the block of held-out rows, was halved, if the objective diverged, or if
        the user interrupted the training.
    """
    generator = _runtime.make_generator(seed, device)
    order = torch.Generator().manual_seed(seed)
    judge = getattr(objective, "validate", objective)
    diverged = getattr(objective, "diverged", lambda: None)
    # Without an end in sight there is no progress towards it.
    set_progress = getattr(objective, "set_progress", None) if options.schedule else None
    flat = _FlatWeights([parameter for parameter in model.parameters() if parameter.requires_grad])
    optimiser = _AdamW(flat, options.weight_decay, model)
    average = _MovingAverage(model, flat, options.ema_decay)
    average.model.eval()
    check_every = CHECK_EVERY.get(device.type, 1)
    result = TrainingResult()
    best_loss, best_weights, since_best = math.inf, None, 0
    batch_size, permutation, cursor = min(options.batch_size, len(rows)), torch.empty(0), 0
    # Held-out rows at once at most.
    most_judged = 0 if validation is None else len(validation)
    # Losses not looked at yet, and the rows they are of.
    pending: list[tuple[torch.Tensor, torch.Tensor]] = []
    recent: list[torch.Tensor] = []
    bar = _progress_bar(options, batch_size, len(rows), label)

    def learning_rate(step: int) -> float:
        rate = options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup))
        if options.schedule:
            rate *= 0.5 * (1 + math.cos(math.pi * step / options.max_iter))
        return rate

    def judge_held_out(validation: Rows) -> float:
        """Loss of the averaged weights, in blocks of held-out rows that fit into memory."""
        nonlocal most_judged
        while True:
            block = min(most_judged, max(batch_size, options.rows_per_evaluation))
            # The same noise at every evaluation: a difference is then a difference between weights.
            noise = _runtime.make_generator(seed + 1, device)
            try:
                return evaluate(
                    average.model,
                    judge,
                    validation,
                    weights=validation_weights,
                    rows_per_block=block,
                    generator=noise,
                )
            except Exception as error:  # devices differ in what they raise when memory runs out
                if not _runtime.is_out_of_memory(error) or block == 1:
                    raise
                most_judged = block // 2
                warn_user(
                    f"Out of memory at step {result.n_iter}: held-out rows are judged {most_judged} at a time."
                )
                _runtime.release_memory(device)

    def add_training_loss() -> None:
        if recent:
            result.loss_curve.append(float(torch.stack(recent).mean()))
            result.loss_steps.append(result.n_iter)
            recent.clear()

    def evaluate_and_keep() -> bool:
        """Add a point to the curves and keep the weights if they are the best; return whether to stop."""
        nonlocal best_loss, best_weights, since_best
        add_training_loss()
        if validation is None:
            result.best_iter = result.n_iter
            if hasattr(objective, "diverged"):
                best_weights = average.state()
            return False
        average.follow_buffers()
        loss = judge_held_out(validation)
        result.validation_curve.append(loss)
        result.validation_steps.append(result.n_iter)
        if loss < best_loss:
            best_loss, best_weights, since_best = loss, average.state(), 0
            result.best_iter = result.n_iter
        else:
            since_best += 1
        return since_best >= options.n_iter_no_change

    def keep_after_divergence(reason: str) -> None:
        """Make sure that there are weights to keep, and warn."""
        nonlocal best_weights
        if best_weights is None:
            average.follow_buffers()
            best_weights = average.state()
            result.best_iter = result.n_iter
            if not all(bool(torch.isfinite(value).all()) for value in best_weights[0]):
                raise FloatingPointError(f"Training diverged within {result.n_iter} steps: {reason}.")
        if not result.loss_curve:
            add_training_loss()
        warn_user(
            f"Training diverged and was stopped at step {result.n_iter}: {reason}. The detector keeps the weights of "
            f"step {result.best_iter}, the best so far.",
        )

    def check() -> None:
        losses = torch.stack([loss for loss, _ in pending]).tolist()
        first = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if first is not None:
            step = result.n_iter - len(pending) + first
            x = rows.take(pending[first][1])
            raise FloatingPointError(_non_finite_message(step, learning_rate(step), x))
        pending.clear()

    def gradient(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        """Leave the gradient in the flat weights and return the loss."""
        with torch.autocast(device.type, torch.bfloat16, enabled=options.mixed_precision):
            losses = objective(model, x, generator)
        if w is not None:
            losses = losses * w.to(losses)
        loss = losses.mean()
        flat.forget()
        loss.backward()
        return loss.detach()

    def record(x: torch.Tensor, w: torch.Tensor | None) -> RecordedStep | None:
        """Record a step, or return None and leave things as they were."""
        nonlocal generator
        state = generator.get_state()
        try:
            return RecordedStep(gradient, x, w, generator)
        except RuntimeError:
            generator = _runtime.make_generator(seed, device)
            generator.set_state(state)
            _runtime.release_memory(device)
            return None

    recorded: RecordedStep | None = None
    to_record = options.recorded and can_record(device) and options.max_iter >= 3 * RECORD_AFTER
    model.train()
    try:
        while result.n_iter < options.max_iter:
            if cursor >= len(permutation):
                permutation, cursor = torch.randperm(len(rows), generator=order), 0
            index = permutation[cursor : cursor + batch_size]
            rate = learning_rate(result.n_iter)
            if set_progress is not None:
                set_progress(result.n_iter / options.max_iter)
            try:
                x = rows.take(index)
                w = None if weights is None else weights[index].to(x)
                if to_record and result.n_iter >= RECORD_AFTER and len(index) == batch_size:
                    recorded, to_record = record(x, w), False
                step = recorded if recorded is not None and recorded.x.shape == x.shape else gradient
                loss = step(x, w)
            except Exception as error:  # devices differ in what they raise when memory runs out
                if not _runtime.is_out_of_memory(error) or batch_size == 1:
                    raise
                batch_size = max(1, batch_size // 2)
                warn_user(
                    f"Out of memory at step {result.n_iter}: the batch is halved to {batch_size} rows. "
                    f"Set batch_size={batch_size} to start there.",
                )
                # Let go of the graph before asking for memory again.
                recorded, loss, x = None, torch.empty(0), torch.empty(0)
                _runtime.release_memory(device)
                continue
            flat.clip(options.max_grad_norm)
            optimiser.step(rate)
            average.update(result.n_iter)
            cursor += len(index)
            result.n_iter += 1
            pending.append((loss, index))
            recent.append(loss)
            if len(pending) >= check_every or result.n_iter == options.max_iter:
                if reason := diverged():
                    keep_after_divergence(reason)
                    break
                check()
            if bar is not None:
                bar.update(len(index))
            if result.n_iter % options.eval_every == 0 or result.n_iter == options.max_iter:
                if pending:
                    check()
                stop = evaluate_and_keep()
                if bar is not None:
                    bar.set_postfix(_postfix(result), refresh=False)
                if stop:
                    break
    except KeyboardInterrupt:
        if result.n_iter == 0:
            raise
        result.interrupted = True
        if best_weights is None:
            result.best_iter = result.n_iter
        if not result.loss_curve:
            add_training_loss()
        warn_user(
            f"Training was interrupted after {result.n_iter} steps. The detector keeps the weights of step "
            f"{result.best_iter}, the best so far, and is usable.",
        )
    finally:
        flat.release()
        if bar is not None:
            bar.close()
    assert result.n_iter > 0
    with torch.no_grad():
        if best_weights is None:
            average.follow_buffers()
            best_weights = average.state()
        kept, kept_buffers = best_weights
        flat.load(kept)
        for value, target in zip(kept_buffers, average.source_buffers, strict=True):
            target.copy_(value)
    model.eval()
    return result


def _progress_bar(options: TrainingOptions, batch_size: int, n_rows: int, label: str) -> Any:
    if not options.verbose:
        return None
    from tqdm.auto import tqdm

    # The last batch of a pass over the rows is shorter than the others.
    passes, steps = divmod(options.max_iter, -(-n_rows // batch_size))
    total = passes * n_rows + min(n_rows, steps * batch_size)
    return tqdm(total=total, desc=label, unit="row", unit_scale=True)


def _postfix(result: TrainingResult) -> dict[str, str]:
    shown = {"loss": f"{result.loss_curve[-1]:.4g}"}
    if result.validation_curve:
        shown["validation"] = f"{result.validation_curve[-1]:.4g}"
    return shown

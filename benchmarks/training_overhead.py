"""What the detectors cost beside bare torch, and beside zuko's flows of the same size.

Every figure is a ratio of two times of one run in one process, below 1 where ours is faster: the median over pairs
that alternate, with quartiles. It says nothing about other machines' absolute speed.

Training
    A detector's `fit` is paused at the start of every epoch, and bare loops then run an epoch of their own: the
    same first weights, batches, objective with the same noise draws, AdamW groups and learning rates.

    - *minimal*: forward, backward, AdamW. Nothing else.
    - *equal*: also gradient clipping and the moving average of the weights, as the detector does. It ends with the
      detector's very weights, which is checked: both did the same work.

    The detector also checks every loss, keeps curves and draws its batches; that is what the ratio to *equal*
    shows. One line trains with the default held-out rows, whose evaluations the bare loops lack. *Whole fit* sets
    everything that `fit` does (validation of the input, standardisation, threshold) against the same number of
    minimal steps.
Scoring
    `score_samples` against the anomaly of the model over the same blocks of rows, standardised beforehand, in the
    same precision (float64), with equal results (checked). Context: the same in float32, and a call with a single row.
zuko
    For flows. Our transform against zuko's flow with the same layers, widths, bins and context: a training step
    (float32, forward, backward, AdamW) and a log-density (float64, no gradients). The networks have as many linear
    layers and activations; ours are residual, take the context in every block and have linear maps between the layers
    of the flow. The numbers of weights are printed.

Run::

    python benchmarks/training_overhead.py                     # every flow, objective and anomaly: an hour
    python benchmarks/training_overhead.py --detector "anomalib_gen.FlowDetector(transform='maf')"
    python benchmarks/training_overhead.py --output benchmarks/results/training-overhead.json
    python benchmarks/training_overhead.py --quick             # seconds; figures mean nothing
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measure import (
    environment,
    markdown,
    ratio,
    save,
    scoring_blocks,
    show,
    show_ratio,
    watch_training,
)
from torch import nn

from anomalib_gen import EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.benchmark import Detector, parse_detector
from anomalib_gen.detectors.flow import AUTO_LAYERS

TARGET = 1.10


def every_detector() -> list[str]:
    """Every transform of the flows, and every objective and anomaly of the other families."""
    own = "anomalib_gen."
    calls = [f"FlowDetector(transform={name!r})" for name in AUTO_LAYERS if name != "glow"]
    calls += ["FlowDetector(anomaly='typicality')"]
    calls += [f"VAEDetector(anomaly={name!r})" for name in VAEDetector._anomalies]
    calls += [f"EnergyDetector(objective={name!r})" for name in EnergyDetector._objectives]
    calls += ["EnergyDetector(anomaly='score_norm')"]
    return [own + call for call in calls]


def build(case: Detector, **parameters: Any) -> Any:
    return case.resolve()(**dict(case.arguments), device="cpu", **parameters)


def make_rows(n: int, columns: int, seed: int = 0) -> np.ndarray:
    """Two correlated clouds."""
    rng = np.random.default_rng(seed)
    clouds = [rng.normal(size=(n, columns)) @ rng.normal(size=(columns, columns)) + c for c in (-2, 2)]
    return np.where(rng.random((n, 1)) < 0.5, *clouds)


# Training ---------------------------------------------------------------------------------------------------


class BareLoop:
    """The training loop that one would write by hand for this model.

    Parameters
    ----------
    model : Module
        Copied.
    objective : callable
        ``objective(model, x, generator)``, the loss of each row.
    rows : Tensor of shape (n, columns)
    seed : int
        Of the order of the rows and of the noise.
    options : TrainingOptions
    equal : bool
        Also clip gradients and average the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[..., torch.Tensor],
        rows: torch.Tensor,
        seed: int,
        options: Any,
        *,
        equal: bool,
    ) -> None:
        self.model, self.objective, self.rows = copy.deepcopy(model), objective, rows
        self.options, self.equal = options, equal
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.averaged = list(self.average.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
        self.order = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(rows.device).manual_seed(seed)
        self.step = 0

    def epoch(self) -> float:
        """Train for one pass over the rows and return the time it took."""
        options, start = self.options, time.perf_counter()
        for index in torch.randperm(len(self.rows), generator=self.order).split(options.batch_size):
            rate = options.learning_rate * min(1.0, (self.step + 1) / max(1, options.warmup))
            rate *= 0.5 * (1 + math.cos(math.pi * self.step / options.max_iter))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            loss = self.objective(self.model, self.rows[index], self.generator).mean()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if self.equal:
                # By the norm of one vector, matrices first, as in the detector: its rounding depends on the order of
                # the sum, and grows with steps. (An energy's last bias has no gradient: a constant does not matter.)
                ordered = [p for group in self.optimiser.param_groups for p in group["params"]]
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in ordered]
                norm = torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in gradients]))
                nn.utils.clip_grads_with_norm_(self.parameters, options.max_grad_norm, norm)
            self.optimiser.step()
            if self.equal:
                decay = min(options.ema_decay, (1 + self.step) / (10 + self.step))
                with torch.no_grad():
                    torch._foreach_lerp_(self.averaged, self.parameters, 1 - decay)
            self.step += 1
        return time.perf_counter() - start


class Turns:
    """Pauses a fit at the start of every epoch to let the bare loops run one of theirs.

    The first epoch warms up and shows which rows the detector trains on, in its own units.
    """

    def __init__(self, n_rows: int, options: Any) -> None:
        self.n_rows, self.options = n_rows, options
        self.steps_per_epoch = -(-n_rows // options.batch_size)
        self.step = 0
        self.first: list[torch.Tensor] = []
        self.loops: dict[str, BareLoop] = {}
        self.times: dict[str, list[float]] = {"detector": [], "minimal": [], "equal": []}
        self.paused = 0.0
        self.resumed = math.nan

    def __call__(self, objective: Any, model: nn.Module, x: torch.Tensor, generator: torch.Generator) -> None:
        now = time.perf_counter()
        if self.step == 0:
            # The objective too: one with chains of its own must not share them.
            self.initial, self.objective = copy.deepcopy(model), copy.deepcopy(objective)
            self.seed = generator.initial_seed()
        if self.step < self.steps_per_epoch:
            self.first.append(x.clone())
        elif self.step % self.steps_per_epoch == 0:
            if not self.loops:
                self._begin()
            else:
                self.times["detector"].append(now - self.resumed)
            names = list(self.loops)
            for name in names if len(self.times["minimal"]) % 2 else reversed(names):
                self.times[name].append(self.loops[name].epoch())
            self.resumed = time.perf_counter()
            self.paused += self.resumed - now
        self.step += 1

    def _begin(self) -> None:
        seen = torch.cat(self.first)
        order = torch.randperm(self.n_rows, generator=torch.Generator().manual_seed(self.seed))
        rows = torch.empty_like(seen)
        rows[order] = seen
        for name in ("minimal", "equal"):
            self.loops[name] = BareLoop(
                self.initial,
                copy.deepcopy(self.objective),
                rows,
                self.seed,
                self.options,
                equal=name == "equal",
            )


def measure_training(
    X: np.ndarray, case: Detector, epochs: int, repeats: int, held_out: bool
) -> dict[str, Any]:
    """Time epochs of the detector and of the bare loops in turns."""
    times: dict[str, list[float]] = {"detector": [], "minimal": [], "equal": []}
    whole: list[float] = []
    difference = 0.0
    for repeat in range(repeats):
        detector = build(
            case, validation_fraction=0.1 if held_out else 0.0, n_iter_no_change=10**6, random_state=repeat
        )
        n_train = len(X) - (min(round(0.1 * len(X)), 2048) if held_out else 0)
        detector.n_features_in_, detector.event_shape_ = X.shape[1], X.shape[1:]
        per_epoch = detector._training_options(n_train, one_pass=True).max_iter
        detector.set_params(max_iter=(epochs + 3) * per_epoch)
        options = detector._training_options(n_train, one_pass=False)
        turns = Turns(n_train, options)
        watch_training(detector, turns)
        start = time.perf_counter()
        detector.fit(X)
        fit = time.perf_counter() - start - turns.paused
        minimal = sum(turns.times["minimal"]) / len(turns.times["minimal"])
        whole.append(fit / (minimal * (epochs + 3)))
        # The bare loops' first turn is their warm-up, and the detector's last turn ends with the fit.
        times["detector"] += turns.times["detector"][1:]
        for name in ("minimal", "equal"):
            times[name] += turns.times[name][1:-1]
        if not held_out:
            turns.loops["equal"].epoch()
            ours = dict(detector.model_.named_parameters())
            theirs = dict(turns.loops["equal"].average.named_parameters())
            # A learned constant is solved for once more after training.
            names = [name for name in theirs if name != "log_z"]
            gaps = [float((ours[name] - theirs[name]).abs().max().detach()) for name in names]
            difference = max(difference, *gaps)
    return {
        "minimal": ratio(times["detector"], times["minimal"]),
        "equal": None if held_out else ratio(times["detector"], times["equal"]),
        "whole_fit": ratio(whole, [1.0] * len(whole)),
        "epochs_in_fit": epochs + 3,
        "largest_weight_difference": None if held_out else difference,
    }


# Scoring ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def bare_scores(anomaly: Any, model: Any, blocks: list[torch.Tensor], seed: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for _ in blocks]
    pairs = zip(blocks, generators, strict=True)
    return torch.cat([-anomaly(model, x, generator) for x, generator in pairs])


def alternate(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Time two callables in turns, after one untimed call of each."""
    times: dict[Any, list[float]] = {ours: [], peer: []}
    ours(), peer()
    for repeat in range(repeats):
        for call in (ours, peer) if repeat % 2 else (peer, ours):
            start = time.perf_counter()
            call()
            times[call].append(time.perf_counter() - start)
    return ratio(times[ours], times[peer])


def measure_scoring(X: np.ndarray, case: Detector, repeats: int) -> dict[str, Any]:
    """Time `score_samples` against the anomaly of the model alone."""
    detector = build(case, max_iter=20, random_state=0).fit(X[:2000])
    blocks, one, seed = scoring_blocks(detector, X), X[:1], detector._scoring_seed
    anomaly, model = detector.anomaly_, detector.model_

    def bare(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
        return bare_scores(anomaly, model, rows, seed)

    scores, alone = detector.score_samples(X), bare(model, blocks).numpy()
    # Those of a density differ by the log-Jacobian of the scaling, the same for all rows.
    shift = float(np.median(scores - alone))
    np.testing.assert_allclose(scores, alone + shift, rtol=1e-9, atol=1e-9)
    model32, blocks32 = copy.deepcopy(model).float(), [x.float() for x in blocks]
    row = [blocks[0][:1]]
    return {
        "rows_per_block": len(blocks[0]),
        "float64": alternate(lambda: detector.score_samples(X), lambda: bare(model, blocks), repeats),
        "float32": alternate(lambda: detector.score_samples(X), lambda: bare(model32, blocks32), repeats),
        "one_row": alternate(lambda: detector.score_samples(one), lambda: bare(model, row), 20 * repeats),
    }


# zuko -------------------------------------------------------------------------------------------------------


def make_zuko(
    transform: str, columns: int, n_layers: int, hidden: int, n_blocks: int, n_bins: int
) -> nn.Module:
    """zuko's flow of the same kind and size, conditional on one number as ours is."""
    import zuko

    spline = {
        "univariate": zuko.transforms.MonotonicRQSTransform,
        "shapes": [(n_bins,), (n_bins,), (n_bins - 1,)],
    }
    size: dict[str, Any] = {"context": 1, "transforms": n_layers, "activation": nn.SiLU}
    # A residual block is two linear layers after as many activations. Those of zuko have one activation, so plain
    # networks of the same depth are the nearer peer.
    size["hidden_features"] = (hidden,) * (2 * n_blocks + 1)
    if transform == "nsf-autoregressive":
        return zuko.flows.NSF(columns, bins=n_bins, **size)
    if transform == "maf":
        return zuko.flows.MAF(columns, **size)
    return zuko.flows.NICE(columns, **size, **(spline if transform == "nsf-coupling" else {}))


def measure_zuko(X: np.ndarray, transform: str, steps: int, repeats: int) -> dict[str, Any]:
    """Time a training step and a log-density of our model and of zuko's."""
    detector = FlowDetector(transform=transform, max_iter=1, random_state=0, device="cpu").fit(X[:500])
    ours: Any = detector.model_.float().train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        n_layers, n_bins = AUTO_LAYERS[transform], 8
        zuko = make_zuko(transform, X.shape[1], n_layers, detector.hidden_features, detector.n_blocks, n_bins)
    z = torch.from_numpy((X - X.mean(0)) / X.std(0)).float()
    context = torch.linspace(-1, 1, len(z))[:, None]
    low, high = (math.log(level) for level in ours.noise_levels)
    noise = torch.exp((context[:, 0] + 1) / 2 * (high - low) + low)
    losses: dict[str, Callable[[slice], torch.Tensor]] = {
        "ours": lambda rows: ours.log_prob(z[rows], noise[rows]),
        "zuko": lambda rows: zuko(context[rows]).log_prob(z[rows]),
    }
    optimisers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for name, model in (("ours", ours), ("zuko", zuko))
    }

    def train(name: str) -> None:
        for k in range(steps):
            start = (256 * k) % max(1, len(z) - 256)
            loss = -losses[name](slice(start, start + 256)).mean()
            optimisers[name].zero_grad(set_to_none=True)
            loss.backward()
            optimisers[name].step()

    step = alternate(lambda: train("ours"), lambda: train("zuko"), repeats)
    ours, zuko, z, context, noise = (part.double() for part in (ours, zuko, z, context, noise))
    blocks = [slice(start, start + 4096) for start in range(0, len(z), 4096)]

    @torch.inference_mode()
    def log_prob(name: str) -> None:
        for rows in blocks:
            losses[name](rows)

    return {
        "weights": [sum(p.numel() for p in model.parameters()) for model in (ours, zuko)],
        "layers": n_layers,
        "training_step": step,
        "log_prob": alternate(lambda: log_prob("ours"), lambda: log_prob("zuko"), repeats),
    }


# Tables -----------------------------------------------------------------------------------------------------


def tables_of(found: dict[str, dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and lines of each table of the figures by detector."""
    training, scoring, flows = [], [], []
    for name, figures in found.items():
        trained, scored = figures["training"], figures["scoring"]
        ratios = [
            trained["minimal"],
            trained["equal"],
            figures["training_held_out"]["minimal"],
            trained["whole_fit"],
        ]
        training.append([name, *map(show_ratio, ratios), str(trained["epochs_in_fit"])])
        scoring.append([name, *(show_ratio(scored[key]) for key in ("float64", "float32", "one_row"))])
        if "zuko" in figures:
            z = figures["zuko"]
            weights = [f"{n:,}" for n in z["weights"]]
            ratios = [z["training_step"], z["log_prob"]]
            flows.append([name, str(z["layers"]), *weights, *map(show_ratio, ratios)])
    epochs = [
        "epoch / minimal",
        "epoch / equal",
        "held-out rows / minimal",
        "whole fit / minimal",
        "of epochs",
    ]
    target = f"median (quartiles), target {TARGET:.2f}"
    tables = [
        (f"An epoch of training / that of a bare loop: {target}", ["detector", *epochs], training),
        (
            f"score_samples / the model alone: {target}",
            ["detector", "float64", "float32", "one row"],
            scoring,
        ),
    ]
    if flows:
        header = ["detector", "layers", "weights", "zuko's", "training step", "log_prob"]
        tables.append(("Our transforms / zuko's: median (quartiles)", header, flows))
    return tables


def to_markdown(figures: dict[str, Any]) -> str:
    """All tables, below a line on where they are from."""
    setting, where = figures["setting"], figures["environment"]
    options = " ".join(f"--{name} {setting[name]}" for name in ("rows", "columns", "epochs", "repeats"))
    about = (
        f"Measured with `python benchmarks/training_overhead.py {options}`, torch {where['packages']['torch']}, "
        f"{where['torch_threads']} of {where['cpus']} cores ({where['processor']}, load {where['load_average']:.1f}).\n"
        "Ratios of times, below 1 where ours is faster; the script says of what. Its targets are for whole epochs,\n"
        "and for float64, in which scores are computed."
    )
    tables = [markdown(*table) for table in tables_of(figures["detectors"])]
    return "\n".join(["# What detectors cost beside bare torch and zuko", "", about, "", *tables])


def main(
    rows: Annotated[int, typer.Option(help="Rows to train on and to score.")] = 20_000,
    columns: Annotated[int, typer.Option(help="Columns of the rows.")] = 10,
    epochs: Annotated[int, typer.Option(help="Timed epochs a fit, after the warm-up.")] = 6,
    repeats: Annotated[int, typer.Option(help="Fits; scoring is repeated three times as often.")] = 3,
    detector: Annotated[
        list[str] | None,
        typer.Option(help="Detectors to measure, by import path and arguments; all by default."),
    ] = None,
    peer: Annotated[bool, typer.Option("--zuko/--no-zuko", help="Compare flows with zuko.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option(help="A dry run in seconds.")] = False,
) -> None:
    """Measure the overhead of detectors beside bare torch and beside zuko."""
    if quick:
        rows, columns, epochs, repeats = min(rows, 800), min(columns, 4), 1, 1
        detector = detector or ["anomalib_gen.FlowDetector(transform='realnvp')"]
    X = make_rows(rows, columns)
    figures: dict[str, Any] = {
        "environment": environment(),
        "setting": {"rows": rows, "columns": columns, "epochs": epochs, "repeats": repeats, "quick": quick},
        "detectors": {},
    }
    for case in map(parse_detector, detector or every_detector()):
        name = case.name
        print(f"measuring {name} ...", flush=True)
        found = figures["detectors"][name] = {
            "training": measure_training(X, case, epochs, repeats, held_out=False),
            "training_held_out": measure_training(X, case, epochs, repeats, held_out=True),
            "scoring": measure_scoring(X, case, 3 * repeats),
        }
        if (gap := found["training"]["largest_weight_difference"]) > 1e-5:
            print(f"  the equal loop ends {gap:.2g} away: unequal work!")
        if peer and case.resolve() is FlowDetector and "anomaly" not in dict(case.arguments):
            transform = FlowDetector(**dict(case.arguments))._resolve_transform()
            found["zuko"] = measure_zuko(X, transform, 2 if quick else 20, 3 * repeats)
    for table in tables_of(figures["detectors"]):
        show(*table)
    if output is not None:
        save(output, figures, to_markdown(figures))


if __name__ == "__main__":
    typer.run(main)

"""Draw the pictures of the documentation: `python docs/pictures.py`; a few minutes on one core.

They are committed, so that neither the README nor the site needs this to run.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer, make_moons

from anomalib_gen import DiffusionDetector, EnergyDetector, FlowDetector, VAEDetector
from anomalib_gen.calibration import SplitConformalDetector
from anomalib_gen.inspection import (
    DetectionCurveDisplay,
    FeatureContributionsDisplay,
    LandscapeDisplay,
    LossCurveDisplay,
    PValueDisplay,
    ScoreHistogramDisplay,
)

FOLDER = Path(__file__).parent / "_static"
INK = "#7A7A7A"  # of text: as far from white as from the dark of GitHub's and the site's pages
FOUND, MISSED = "#FF7A1A", "#FFFFFF"
NATS = 9  # energies further above the lowest than this look alike

FAMILIES = {
    "normalizing flow": ("exact", FlowDetector(random_state=0)),
    "variational autoencoder": ("a bound", VAEDetector(random_state=0)),
    "energy-based model": ("up to a constant", EnergyDetector(random_state=0)),
    "diffusion model": ("a bound", DiffusionDetector(random_state=0)),
}
"""Each with what its energy is to minus the log-density."""


def make_rows() -> tuple[np.ndarray, np.ndarray]:
    """Two moons of normal rows, and anomalies between and around them, at least a quarter away from every row."""
    normal, _ = make_moons(1000, noise=0.07, random_state=0)
    rng = np.random.default_rng(3)
    candidates = rng.uniform((-1.6, -1.2), (2.6, 1.7), size=(400, 2))
    clear, centre = make_moons(4000, noise=0.0, random_state=0)[0], normal.mean(axis=0)
    distance = np.sqrt(((candidates[:, None] - clear) ** 2).sum(-1)).min(axis=1)
    near = np.abs(candidates - centre).max(axis=1) < 1.4
    return normal, candidates[(distance > 0.28) & near][:24]


def draw_families(path: Path) -> None:
    """Draw the energy of two moons by each family, with the anomalies that it finds."""
    normal, anomalies = make_rows()
    x, y = np.meshgrid(np.linspace(-1.7, 2.7, 140), np.linspace(-1.3, 1.8, 100))
    grid = np.column_stack([x.ravel(), y.ravel()])
    mpl.rcParams.update({"font.size": 12, "text.color": INK})
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.1), layout="constrained")
    for ax, (name, (what, detector)) in zip(axes, FAMILIES.items(), strict=True):
        detector.fit(normal)
        energy = detector.energy(grid).reshape(x.shape)
        energy -= energy.min()
        found = detector.predict(anomalies) == -1
        ax.contourf(
            x, y, -energy, levels=np.linspace(-NATS, 0, 13), cmap="cividis", extend="min", antialiased=False
        )
        ax.plot(*normal[::4].T, ".", color="black", markersize=1.6, alpha=0.5)
        style = {"markersize": 7, "markeredgewidth": 1.2, "linestyle": "none"}
        ax.plot(*anomalies[found].T, "o", color=FOUND, markeredgecolor="black", **style)
        ax.plot(*anomalies[~found].T, "o", color=MISSED, markeredgecolor="black", **style)
        ax.set_axis_off()
        ax.set_title(f"{name}\n", fontweight="bold", fontsize=13)
        ax.text(
            0.5, 1.03, f"{what}; {found.sum()} of {len(found)} found", transform=ax.transAxes, ha="center"
        )
        print(
            name, found.sum(), "found;", f"{(detector.predict(normal) == -1).mean():.3f} of the rows flagged"
        )
    figure.savefig(path, dpi=110, transparent=True, pil_kwargs={"optimize": True})
    plt.close(figure)


def draw_displays(path: Path) -> None:
    """Draw six displays of one detector."""
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    benign, malignant = X[y == 1], X[y == 0]
    train, rows = benign[:250], pd.concat([benign[250:], malignant])
    labels = np.where(np.arange(len(rows)) < len(benign) - 250, 1, -1)
    flow = FlowDetector(random_state=0).fit(train)
    conformal = SplitConformalDetector(flow, random_state=0).fit(train)
    pair = ["mean radius", "mean texture"]
    plane = FlowDetector(random_state=0).fit(train[pair])
    grey = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    mpl.rcParams.update({"font.size": 9, "axes.facecolor": "none", **grey})
    figure, axes = plt.subplots(3, 2, figsize=(11, 13), layout="constrained")
    histogram, curve, p_values, landscape, loss, contributions = axes.ravel()
    ScoreHistogramDisplay.from_estimator(flow, rows, labels, ax=histogram)
    DetectionCurveDisplay.from_estimator(flow, rows, labels, ax=curve)
    PValueDisplay.from_estimator(conformal, benign[250:], ax=p_values)
    LandscapeDisplay.from_estimator(plane, rows[pair], labels, resolution=80, ax=landscape)
    LossCurveDisplay.from_estimator(flow, ax=loss)
    FeatureContributionsDisplay.from_estimator(
        flow, malignant[:1], background=train, max_columns=6, ax=contributions
    )
    # (Narrow axes side by side: long words are broken.)
    histogram.set_xlabel(histogram.get_xlabel().replace(" (", "\n(").replace("; ", ";\n"))
    p_values.set_title("split-conformal p-values")
    figure.savefig(path, dpi=90, transparent=True, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    draw_families(FOLDER / "families.png")
    draw_displays(FOLDER / "displays.png")

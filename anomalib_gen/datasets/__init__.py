"""Anomaly detection tasks: published tables, data that ships with scikit-learn, images, synthetic rows of known law.

Every loader returns a `sklearn.utils.Bunch` with ``data`` (n_samples, n_features) in float64, or uint8 images
(n_samples, channels, height, width), and ``target`` (n_samples,) in the package's one label convention, +1 inlier and
-1 outlier. Origins, licences and known defects stand in the ``DESCR`` of each.
"""

from anomalib_gen.datasets._adbench import fetch_adbench, list_adbench, load_adbench
from anomalib_gen.datasets._builtin import list_builtin, load_builtin
from anomalib_gen.datasets._defects import make_defects
from anomalib_gen.datasets._images import load_images, load_other_images
from anomalib_gen.datasets._synthetic import make_anomalies

__all__ = [
    "fetch_adbench",
    "list_adbench",
    "list_builtin",
    "load_adbench",
    "load_builtin",
    "load_images",
    "load_other_images",
    "make_anomalies",
    "make_defects",
]

"""Anomaly detection with generative models behind the scikit-learn API."""

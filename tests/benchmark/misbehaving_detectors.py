"""Detectors that fail in the ways a benchmark has to survive; imported by worker processes."""

import os
import signal
import time
from pathlib import Path

import numpy as np


class _Detector:
    def fit(self, X, y=None):
        return self

    def score_samples(self, X):
        return -np.abs(X).sum(axis=1)


class Raises(_Detector):
    def fit(self, X, y=None):
        raise RuntimeError("no <b>luck</b> today")


class Garbled(_Detector):
    """Names a file whose name is no text."""

    def fit(self, X, y=None):
        raise OSError("no file " + os.fsdecode(b"caf\xe9"))


class Mute(_Detector):
    """Raises an error that cannot say what it is."""

    def fit(self, X, y=None):
        raise _Mute


class _Mute(Exception):
    def __str__(self):
        return self.code


class Panics(_Detector):
    """Raises what is no Exception, as libraries in Rust do."""

    def fit(self, X, y=None):
        raise _Panic("no <b>luck</b> at all")


class _Panic(BaseException):
    pass


class Sleeps(_Detector):
    def __init__(self, *, seconds=60.0):
        self.seconds = seconds

    def fit(self, X, y=None):
        time.sleep(self.seconds)
        return self


class Exits(_Detector):
    def __init__(self, *, code=3):
        self.code = code

    def fit(self, X, y=None):
        os._exit(self.code)


class Killed(_Detector):
    def fit(self, X, y=None):
        os.kill(os.getpid(), signal.SIGKILL)


class NotFinite(_Detector):
    def score_samples(self, X):
        scores = super().score_samples(X)
        scores[0] = np.nan
        return scores


class Writes(_Detector):
    """Spoils its input."""

    def fit(self, X, y=None):
        X[:] = 0
        return self


class Counts(_Detector):
    """Leaves one line for each fit."""

    def __init__(self, *, log="", seconds=0.0):
        self.log = log
        self.seconds = seconds

    def fit(self, X, y=None):
        with Path(self.log).open("a") as file:
            file.write("fit\n")
        time.sleep(self.seconds)
        return self


class Threads(_Detector):
    """Fails unless it was given one thread."""

    def fit(self, X, y=None):
        from threadpoolctl import threadpool_info

        counts = {pool["num_threads"] for pool in threadpool_info()}
        if counts != {1}:
            raise RuntimeError(f"threads {counts}")
        return self

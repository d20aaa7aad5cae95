"""Reading ahead and writing behind, in threads, a part at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Ahead:
    """Runs an iterator in a thread, one item ahead; an error of it is raised where its item was due."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name="reading", daemon=True)
        self._thread.start()

    def _work(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join()


class Behind:
    """Calls a function in a thread, one call behind; an error of it is raised by the next `put` or `flush`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writing", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (arguments := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._function(*arguments)
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()

    def put(self, *arguments: Any) -> None:
        """Call the function soon."""
        self._raise()
        self._queue.put(arguments)

    def flush(self) -> None:
        """Wait for all calls."""
        self._queue.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread."""
        self._queue.put(None)
        self._thread.join()

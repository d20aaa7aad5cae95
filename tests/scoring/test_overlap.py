"""Reading ahead and writing behind: in order, bounded, and no error is lost."""

import threading

import pytest

from anomalib_gen.scoring.overlap import Ahead, Behind


def test_the_next_part_is_read_while_one_is_scored():
    reading = threading.Event()

    def items():
        yield 1
        reading.set()
        yield 2

    ahead = Ahead(items())
    taken = iter(ahead)
    assert next(taken) == 1
    # Nobody has asked for the second one yet.
    assert reading.wait(timeout=30)
    assert list(taken) == [2]
    ahead.close()


def test_only_so_much_is_read_ahead():
    read = []

    def items():
        for k in range(100):
            read.append(k)
            yield k

    ahead = Ahead(items())
    taken = iter(ahead)
    assert next(taken) == 0
    assert len(read) <= 4
    ahead.close()
    assert len(read) <= 5
    assert not ahead._thread.is_alive()


def test_an_error_of_reading_comes_after_what_was_read():
    def items():
        yield 1
        raise OSError("gone")

    ahead = Ahead(items())
    taken = iter(ahead)
    assert next(taken) == 1
    with pytest.raises(OSError, match="gone"):
        next(taken)
    ahead.close()


def test_a_part_is_written_while_the_next_is_scored():
    begun, go_on, written = threading.Event(), threading.Event(), []

    def write(k):
        begun.set()
        assert go_on.wait(timeout=30)
        written.append(k)

    behind = Behind(write)
    behind.put(1)
    assert begun.wait(timeout=30)
    behind.put(2)
    assert written == []
    go_on.set()
    behind.flush()
    assert written == [1, 2]
    behind.close()
    assert not behind._thread.is_alive()


def test_an_error_of_writing_stops_the_run():
    written = []

    def write(k):
        if k == 2:
            raise OSError("full")
        written.append(k)

    behind = Behind(write)
    behind.put(1)
    behind.put(2)
    with pytest.raises(OSError, match="full"):
        behind.flush()
    with pytest.raises(OSError, match="full"):
        behind.put(3)
    behind.close()
    assert written == [1]

"""Bars for somebody who is looking on, and nothing of them for anybody else."""

import io

from anomalib_gen.scoring._log import Log


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals():
    for stream, options, is_shown in (
        (Terminal(), {}, True),
        (Terminal(), {"quiet": True}, False),
        (Terminal(), {"as_json": True}, False),
        (io.StringIO(), {}, False),
    ):
        with Log(stream=stream, **options).progress("rows") as bar:
            bar.update(5)
        assert ("rows" in stream.getvalue()) == is_shown


def test_messages_do_not_go_on_in_the_line_of_a_bar():
    stream = Terminal()
    log = Log(stream=stream)
    with log.progress("rows") as bar:
        bar.update(5)
        log.warning("one")
    before, after = stream.getvalue().split("anomalib-gen: warning: one\n")
    assert before.endswith("\r")
    assert before.splitlines()[-1].strip() == ""
    assert "rows" in after

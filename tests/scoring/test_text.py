"""A quote too many, or what is no UTF-8, costs the row that it stands in, and no row is lost without a word."""

import io
import json

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from anomalib_gen.scoring import sources, text
from anomalib_gen.scoring._columns import Wanted
from anomalib_gen.scoring._errors import DataError
from anomalib_gen.scoring.sources import Reader, find_inputs
from anomalib_gen.scoring.text import CheckedText

WANTED = Wanted(("x", "kind"), 2, ("float", "text"), ("id",))


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read bytes as a file; keys, malformed lines, and the places of the good rows, whatever a block holds."""

    def read(content, ending=".csv", wanted=WANTED):
        path = tmp_path / f"a{ending}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        found = []
        for size in (16, 64, 2**22):
            monkeypatch.setattr(sources, "CSV_BLOCK_BYTES", size)
            (item,) = find_inputs([str(path)])
            keys, bad, places = [], {}, []
            for part in Reader(item, wanted).parts(7):
                keys += part.table.column("id").to_pylist()
                bad |= part.malformed
                places += part.rows.tolist()
            assert sorted([*places, *bad]) == list(range(len(places) + len(bad)))
            found.append((keys, bad))
        assert found[0] == found[1] == found[2]
        return found[0]

    return read


def lines_of(n):
    return ["id,x,kind", *(f"{k},{k}.5,a" for k in range(n))]


@pytest.mark.parametrize("at", [1, 10, 30])
@pytest.mark.parametrize("later", [None, 20])
def test_a_quote_too_many_costs_one_row(read, at, later):
    lines = lines_of(30)
    lines[at] = f'{at - 1},1,"a'
    if later:
        lines[later] = f'{later - 1},1,a"'
    keys, bad = read("\n".join(lines) + "\n")
    assert keys == [str(k) for k in range(30) if k != at - 1]
    ending = "that is not closed" if at == 30 else f"and line {at + 2} looks like another row"
    reason = f"line {at + 1} opens a quote{' ' if at == 30 else ', '}{ending}"
    assert bad == {at - 1: (reason, lines[at])}


def test_a_quote_too_many_among_quoted_values(read):
    lines = ["id,x,kind", *(f'{k},{k}.5,"a, ""{k}"""' for k in range(9))]
    lines[4] = '3,"3.5,"a"'
    lines[7] = '6,"6.5,a'
    keys, bad = read("\n".join(lines))
    # (Closed on its line, that of the fourth row makes another number of fields, or a value that is no number.)
    assert [key for key in keys if key != "3"] == list("0124578")
    assert 6 in bad


def test_two_lines_that_may_be_one_row_are_left_out_together(read):
    lines = lines_of(9)
    lines[4], lines[5] = '3,1,"a', '4,1,a"'
    keys, bad = read("\n".join(lines))
    assert keys == list("0125678"), bad
    ((reason, left_out),) = bad.values()
    assert reason == "line 5 opens a quote, and line 6 looks like another row (lines 5 to 6)"
    assert left_out == '3,1,"a\n4,1,a"'


@pytest.mark.parametrize("value", ["one\ntwo", "one\r\ntwo, three", '"one"\n\n""\ntwo', "\n", "a,b\n"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_values_with_line_breaks_are_read(read, value, column):
    row = ["k", "1", "a"]
    row[column] = value
    frame = pd.DataFrame([row] * 9, columns=["id", "x", "kind"])
    keys, bad = read(frame.to_csv(index=False))
    assert bad == {}
    assert keys == frame["id"].tolist()


def test_a_row_of_another_width_says_its_lines(read):
    keys, bad = read('id,x,kind\n0,"1\n\n2",a,b\n1,1,a\n')
    assert keys == ["1"]
    assert bad[0][0] == "line 2 opens a quote, and has 4 fields up to its end, not 3 (lines 2 to 4)"


def test_nothing_is_held_for_long(monkeypatch):
    monkeypatch.setattr(text, "MAX_ROW_BYTES", 100)
    content = b'id,x\n0,"' + b"word\n" * 200 + b"1,2\n"
    checked = CheckedText(io.BytesIO(content), "a.csv", ",", lambda name: True, 10)
    assert checked.names == ["id", "x"]
    read = b"".join(checked)
    reason, left_out = checked.bad["\x002"]
    assert reason == "line 2 opens a quote that is not closed within 0 MB (lines 2 to 21)"
    assert left_out.count("word") == 20
    assert read.endswith(b"word\n1,2\n")
    checked = CheckedText(io.BytesIO(b"id,x\n" + b"1" * 200), "a.csv", ",", lambda name: True, 10)
    with pytest.raises(DataError, match=r"a.csv cannot be read: line 2 has more than 0 MB. Is it text?"):
        b"".join(checked)


@pytest.mark.parametrize("header", ['id,x,"kind', 'id,"x,kind'])
def test_a_quote_too_many_in_the_header(read, header):
    with pytest.raises(
        DataError, match="damaged header: line 1 opens a quote, and line 2 looks like another"
    ):
        read("\n".join([header, *lines_of(9)[1:]]))


def test_quotes_in_names():
    content = b'"a"x,"b ""c""" ,d,"e,f"\n'
    names = CheckedText(io.BytesIO(content), "a.csv", ",", lambda name: True, 4).names
    assert names == ["ax", 'b "c" ', "d", "e,f"]
    header = pacsv.open_csv(io.BytesIO(content + b"1,2,3,4\n")).schema
    assert header.names == names


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_breaks_between_blocks(size, mark):
    content = mark + b'"c",d\r\n"q",1\r\n12345,2\r\n"a\r\nb",3\r\n'
    checked = CheckedText(io.BytesIO(content), "a.csv", ",", lambda name: True, size)
    assert checked.names == ["c", "d"]
    item = sources.Input("a.csv", "a.csv", ",", len(content), 0)
    convert = pacsv.ConvertOptions(column_types={"c": pa.string()})
    table = pa.concat_tables(sources.parse_text(checked, item, convert))
    assert table["d"].to_pylist() == [1, 2, 3]
    assert table["c"].to_pylist() == ["q", "12345", "a\r\nb"]
    assert checked.bad == {}


def test_line_breaks_in_names(read):
    wanted = Wanted(("x\ny", "kind"), 2, ("float", "text"), ("id",))
    assert read('\ufeffid,"x\ny",kind\n0,1,a\n', wanted=wanted) == (["0"], {})


def test_what_is_no_utf8_costs_its_row(read):
    lines = [
        line.encode() for line in ("id,x,kind,other", "é,1,a,b", "1,1,é,b", "2,1,a,é", "3,1,a,é,b", "4,1,a,b")
    ]
    lines[2:5] = [line.decode().encode("latin-1") for line in lines[2:5]]
    keys, bad = read(b"\n".join(lines))
    # In a column that nobody asked for it does not matter.
    assert keys == ["é", "2", "4"]
    assert bad[1][0].startswith("line 3 is no UTF-8 (byte 0xe9). Text must be UTF-8: save it as that, or")
    assert bad[1][1] == r"1,1,\xe9,b"
    assert bad[3] == ("the line has 5 fields, not 4", "3,1,a,�,b")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_header_that_is_no_utf8(read, encoding):
    with pytest.raises(
        DataError, match=r"header that is no UTF-8 \(byte 0x..\). Text must be UTF-8: save it"
    ):
        read("id,x,kind,größe\n1,1,a,1\n".encode(encoding))


@pytest.mark.parametrize("column", ["kind", "id"])
def test_fit_refuses_what_is_no_row(run, rows, tmp_path, column):
    frame, arguments = rows(200, 0), ("--exclude", "id", "-m", tmp_path / "model")
    lines = frame.to_csv(index=False).splitlines()
    source = tmp_path / "rows.csv"
    place = list(frame).index(column)
    for odd, message in (
        ('"a', "row: line 11 opens a quote, and line 12 looks like another row. Mend it"),
        ("é", "row: line 11 is no UTF-8"),
    ):
        fields = lines[10].split(",")
        fields[place] = odd
        content = "\n".join([*lines[:10], ",".join(fields), *lines[11:]])
        source.write_bytes(content.encode("latin-1"))
        result = run("fit", source, *arguments, "--detector", "anomalib_gen.VAEDetector(max_iter=2)")
        # (What is left out need not be UTF-8.)
        if (odd, column) == ("é", "id"):
            assert result.exit_code == 0, result.output
            continue
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_score_counts_what_is_no_row(run, rows, model, tmp_path, encoding, capfd):
    lines = rows(100, 1).to_csv(index=False).splitlines()
    lines[10] = lines[10][:-1] + ('"a' if encoding == "utf-8" else "é")
    lines[20] += ",é"
    source, output = tmp_path / "rows.csv", tmp_path / "out.parquet"
    source.write_bytes("\n".join(lines).encode(encoding))
    arguments = ("score", source, "-m", model, "-k", "id", "-o", output)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "line 11" in result.stderr
    result = run(*arguments, "--max-bad-rows", 2)
    assert result.exit_code == 4
    assert "98 rows scored" in result.stderr
    entries = [
        json.loads(line) for line in output.with_name("out.parquet.quarantine.jsonl").read_text().splitlines()
    ]
    assert [entry["row"] for entry in entries] == [9, 19]
    assert "Exception ignored" not in capfd.readouterr().err


def test_the_folders_of_text_are_columns(tmp_path):
    folder = tmp_path / "x=07" / "kind=a%20b" / "none=__HIVE_DEFAULT_PARTITION__"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("id,kind\n1,other\n")
    (item,) = find_inputs([str(folder)])
    (part,) = Reader(item, Wanted(("x", "kind", "none"), 3, ("float", "text", "text"), ("id",))).parts(9)
    assert part.table.to_pylist() == [{"id": "1", "x": 7, "kind": "a b", "none": None}]
    assert part.table.schema.field("x").type == pa.int32()

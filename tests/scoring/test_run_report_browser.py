"""The page of `report` in a headless Chromium: quiet, asking for nothing, sorted and filtered by keyboard."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

spec = importlib.util.spec_from_file_location("chromium", Path(__file__).with_name("chromium.py"))
chromium = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chromium)

pytestmark = pytest.mark.skipif(
    chromium.find_chromium() is None,
    reason="no Chromium on the PATH; on Debian: apt-get install chromium",
)


@pytest.fixture(scope="module")
def browser():
    browser = chromium.Chromium(chromium.find_chromium())
    yield browser
    browser.close()


@pytest.fixture
def show(browser):
    """Open a page; afterwards nothing may have gone wrong, and nothing have been asked for but the page."""
    opened = []

    def show(path, **view):
        browser.look(**view)
        browser.open(path)
        opened.append(path)
        return browser

    browser.problems.clear()
    browser.errors.clear()
    yield show
    browser.run("0")  # what has come until now is noted
    assert not browser.problems
    assert not browser.errors
    assert browser.requests == [opened[-1].resolve().as_uri()]


ORDER = """[...document.querySelectorAll('#{table} tbody tr')].filter(row => !row.hidden)
    .map(row => {{ const cell = row.cells[{column}]; return cell.dataset.value ?? cell.textContent.trim(); }})"""


def column(browser, table, place):
    return browser.run(ORDER.format(table=table, column=place))


def press_head(browser, table, place):
    browser.run(f"document.querySelectorAll('#{table} thead button')[{place}].focus()")
    browser.press("Enter", 13, "\r")


def sorted_by(browser, table):
    return browser.run(
        f"[...document.querySelectorAll('#{table} thead th')].map(head => head.getAttribute('aria-sort'))"
    )


@pytest.mark.parametrize("n", [0, 1, 10_000])
def test_opens_whatever_the_number_of_anomalies(show, pages, n):
    browser = show(pages[n][0])
    assert browser.run("document.querySelectorAll('#anomaly-table tbody tr').length") == min(n, 100)
    assert browser.run("document.querySelectorAll('svg').length") > 2
    # Every picture has a size, and nothing is wider than the window.
    assert browser.run(
        "[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().height > 50)"
    )
    assert browser.run("document.documentElement.scrollWidth") <= 1200


def test_tables_sort_by_keyboard(show, pages):
    browser = show(pages[10_000][0])
    scores = [float(value) for value in column(browser, "anomaly-table", 2)]
    assert scores == sorted(scores)
    assert set(sorted_by(browser, "anomaly-table")) == {None}
    press_head(browser, "anomaly-table", 2)
    assert sorted_by(browser, "anomaly-table")[2] == "ascending"
    press_head(browser, "anomaly-table", 2)
    assert [float(value) for value in column(browser, "anomaly-table", 2)] == sorted(scores, reverse=True)
    assert sorted_by(browser, "anomaly-table") == [None, None, "descending", None, None]
    press_head(browser, "anomaly-table", 1)
    names = column(browser, "anomaly-table", 1)
    assert names == sorted(names)
    assert sorted_by(browser, "anomaly-table") == [None, "ascending", None, None, None]
    # Numbers sort as numbers, and what is not known comes last either way.
    for direction in (1, -1):
        press_head(browser, "drift-table", 5)
        found = column(browser, "drift-table", 5)
        known = [float(value) for value in found if value != "–"]
        assert known == sorted(known, reverse=direction < 0)
        assert found[len(known) :] == ["–"] * (len(found) - len(known))
        assert len(known) < len(found)


def test_heads_are_reached_with_the_tabulator(show, pages):
    browser = show(pages[1][0])
    seen = []
    name = "e.id || e.closest('table')?.id || e.getAttribute('aria-label') || e.textContent"
    for _ in range(60):
        browser.press("Tab", 9)
        seen.append(browser.run(f"(e => {name})(document.activeElement)"))
    seen = seen[: seen.index(seen[0], 1)]  # once round
    assert seen[0] == "To the content"
    assert "anomaly-table-filter" in seen
    assert seen.count("anomaly-table") == 5
    assert "Drift of columns" in seen


def test_tables_filter(show, pages):
    browser = show(pages[10_000][0])
    names = column(browser, "anomaly-table", 1)
    browser.run("document.getElementById('anomaly-table-filter').focus()")
    browser.type(names[7].upper())
    shown = column(browser, "anomaly-table", 1)
    assert 0 < len(shown) < 5
    assert set(shown) == {names[7]}
    status = "document.querySelector('#anomaly-table-tools [role=status]').textContent"
    assert browser.run(status) == f"{len(shown)} of 100 rows"
    browser.type("nothing like it")
    assert column(browser, "anomaly-table", 1) == []
    # Sorting keeps what is hidden hidden.
    press_head(browser, "anomaly-table", 0)
    assert column(browser, "anomaly-table", 1) == []
    browser.run(
        "(input => { input.value = ''; input.dispatchEvent(new Event('input')); })"
        "(document.getElementById('anomaly-table-filter'))"
    )
    assert column(browser, "anomaly-table", 1) == names
    assert browser.run(status) == ""


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_at_night(show, pages, dark):
    browser = show(pages[10_000][0], width=360, height=740, dark=dark, touch=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(18, 21, 27)" if dark else "rgb(255, 255, 255)")
    # Words in pictures have the colour of the others.
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    assert browser.run(ink) == browser.run("getComputedStyle(document.body).color")
    # And are large enough: in pixels of the screen.
    height = "[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
    assert min(value for value in browser.run(height) if value > 0) >= 9


def test_what_a_screen_reader_finds(show, pages):
    browser = show(pages[10_000][0])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in nodes:
        if not node.get("ignored"):
            name = node.get("name", {}).get("value", "")
            roles.setdefault(node["role"]["value"], []).append(name)
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert len(roles[landmark]) == 1
    assert {"Scores", "Anomalies", "Drift", "Data quality", "Model card"} <= set(roles["region"])
    pictures = roles.get("image", []) + roles.get("img", [])
    assert len(pictures) > 2
    assert all(pictures)
    assert all(roles["button"])
    assert all(roles["searchbox"])
    assert len(roles["columnheader"]) > 10
    assert len(roles["rowheader"]) > 100


def test_prints_whole(show, pages, tmp_path):
    browser = show(pages[10_000][0])
    browser.pdf(tmp_path / "page.pdf")
    data = (tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert data.count(b"/Type /Page\n") + data.count(b"/Type /Page/") + data.count(b"/Type /Page ") > 3
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"


def test_names_and_values_do_nothing(show, nasty):
    browser = show(nasty)
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('img').length") == 0
    press_head(browser, "anomaly-table", 1)
    assert browser.run("window.hacked") is None


def test_no_other_script_could_run(browser, pages):
    browser.look()
    browser.open(pages[1][0])
    browser.problems.clear()
    browser.run(
        "(s => { s.textContent = 'window.hacked = 1'; document.body.append(s); })(document.createElement('script'))"
    )
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\">')")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run("window.hacked") is None
    assert len(browser.problems) >= 2  # both were refused
    assert all("Content Security Policy" in problem for problem in browser.problems)

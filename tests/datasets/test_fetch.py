"""Downloads from a local server: verified, resumed, retried, refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from anomalib_gen.datasets import fetch_adbench, load_adbench
from anomalib_gen.datasets._fetch import _CHUNK_BYTES, ResumingDownloader, _byte_range

FILE = "1_Toy.npz"
CHUNK = _CHUNK_BYTES


@pytest.fixture
def mirror(server, toy):
    server.files[FILE] = toy
    return server


def test_download_to_the_cache(mirror, toy, cache, capsys):
    path = fetch_adbench("toy", base_url=mirror.url)
    assert path == cache / "adbench" / FILE
    assert path.read_bytes() == toy
    assert mirror.requests == [None]
    assert [file.name for file in path.parent.iterdir()] == [FILE]  # neither .part nor temporary file is left
    assert fetch_adbench("toy", base_url=mirror.url) == path
    assert len(mirror.requests) == 1  # nothing is fetched twice


def test_download_to_data_home(mirror, toy, tmp_path):
    path = fetch_adbench("toy", data_home=tmp_path / "home", base_url=mirror.url + "/")
    assert path == tmp_path / "home" / "adbench" / FILE
    assert path.read_bytes() == toy


def test_load_downloads_from_the_mirror_of_the_environment(mirror, cache, monkeypatch):
    monkeypatch.setenv("ANOMALIB_GEN_MIRROR", mirror.url)
    assert load_adbench("toy").path == cache / "adbench" / FILE


def test_wrong_cached_file_is_downloaded_again(mirror, toy, cache, monkeypatch):
    monkeypatch.setenv("ANOMALIB_GEN_MIRROR", mirror.url)
    (cache / "adbench").mkdir(parents=True)
    (cache / "adbench" / FILE).write_bytes(b"damaged")
    assert load_adbench("toy").path.read_bytes() == toy


def test_progress_bar(mirror, capsys):
    fetch_adbench("toy", base_url=mirror.url, progressbar=True)
    assert f"{FILE}: 100%" in capsys.readouterr().err


def test_truncated_download_is_resumed_within_one_call(mirror, toy):
    mirror.truncate_after = [2 * CHUNK, CHUNK + 5]  # the 5 bytes of the broken chunk are lost
    assert fetch_adbench("toy", base_url=mirror.url).read_bytes() == toy
    assert mirror.requests == [None, f"bytes={2 * CHUNK}-", f"bytes={3 * CHUNK}-"]


def test_interrupted_download_is_kept_and_resumed_by_the_next_call(mirror, toy, cache):
    mirror.truncate_after = [2 * CHUNK, CHUNK]
    with pytest.raises(
        ConnectionError, match=rf"after 2 attempts: .*{3 * CHUNK} bytes are kept in .*1_Toy\.npz\.part"
    ):
        fetch_adbench("toy", base_url=mirror.url, retries=1)
    part = cache / "adbench" / f"{FILE}.part"
    assert part.read_bytes() == toy[: 3 * CHUNK]
    assert fetch_adbench("toy", base_url=mirror.url).read_bytes() == toy
    assert mirror.requests[-1] == f"bytes={3 * CHUNK}-"
    assert not part.exists()


def test_interruption_by_the_user_keeps_the_partial_file(mirror, toy, cache, monkeypatch):
    original = ResumingDownloader._attempt

    def interrupted(self, url, output):
        output.write_bytes(toy[:700])
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumingDownloader, "_attempt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_adbench("toy", base_url=mirror.url)
    monkeypatch.setattr(ResumingDownloader, "_attempt", original)
    assert fetch_adbench("toy", base_url=mirror.url).read_bytes() == toy
    assert mirror.requests == ["bytes=700-"]


def test_server_without_ranges_starts_again(mirror, toy):
    mirror.knows_ranges = False
    mirror.truncate_after = [CHUNK]
    assert fetch_adbench("toy", base_url=mirror.url).read_bytes() == toy
    assert mirror.requests == [None, f"bytes={CHUNK}-"]


@pytest.mark.parametrize("extra", [0, 10])
def test_partial_file_that_is_already_whole_or_too_long(mirror, toy, cache, extra):
    (cache / "adbench").mkdir(parents=True)
    (cache / "adbench" / f"{FILE}.part").write_bytes(toy + b"x" * extra)
    assert fetch_adbench("toy", base_url=mirror.url).read_bytes() == toy
    assert len(mirror.requests) == (2 if extra else 1)


def test_partial_file_of_another_version_is_dropped(mirror, toy, cache):
    (cache / "adbench").mkdir(parents=True)
    (cache / "adbench" / f"{FILE}.part").write_bytes(b"x" * 1000)
    assert fetch_adbench("toy", base_url=mirror.url).read_bytes() == toy
    assert mirror.requests == ["bytes=1000-", None]


@pytest.mark.parametrize("change", [lambda b: b"x" + b[1:], lambda b: b[:-5], lambda b: b + b"x" * 200_000])
def test_tampered_file_is_refused_and_removed(mirror, toy, cache, change):
    mirror.files[FILE] = change(toy)
    with pytest.raises(
        ValueError, match=rf"{FILE} does not hold the file .* expected [0-9a-f]{{64}} but got [0-9a-f]{{64}}"
    ):
        fetch_adbench("toy", base_url=mirror.url)
    assert list((cache / "adbench").iterdir()) == []
    assert mirror.requests == [None]  # a complete but wrong file is not asked for again


def test_simultaneous_downloads_do_not_disturb_each_other(mirror, toy, cache):
    (cache / "adbench").mkdir(parents=True)
    (cache / "adbench" / f"{FILE}.part").write_bytes(toy[:CHUNK])
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch_adbench("toy", base_url=mirror.url), range(4)))
    assert {path.read_bytes() for path in paths} == {toy}
    assert mirror.requests.count(f"bytes={CHUNK}-") == 1
    assert [file.name for file in (cache / "adbench").iterdir()] == [FILE]


def test_temporary_status_is_retried(mirror, toy):
    mirror.statuses = [503, 429]
    assert fetch_adbench("toy", base_url=mirror.url).read_bytes() == toy
    assert len(mirror.requests) == 3


def test_missing_file_is_not_retried(mirror):
    del mirror.files[FILE]
    with pytest.raises(ConnectionError, match="could not be downloaded: 404"):
        fetch_adbench("toy", base_url=mirror.url)
    assert len(mirror.requests) == 1


def test_failed_download_of_a_load_tells_where_it_looked(toy, cache, server, monkeypatch):
    monkeypatch.setenv("ANOMALIB_GEN_MIRROR", server.url)
    with pytest.raises(ConnectionError) as error:
        load_adbench("toy")
    assert str(cache) in error.value.__notes__[0]


def test_malformed_mirror(toy):
    with pytest.raises(ConnectionError, match=r"nowhere/1_Toy\.npz could not be downloaded"):
        fetch_adbench("toy", base_url="nowhere")


def test_no_checksum_no_download(toy, server):
    with pytest.raises(ValueError, match=r"2_unverified\.npz has no recorded checksum, .* put the file into"):
        fetch_adbench("unverified", base_url=server.url)
    assert server.requests == []


def test_negative_retries(toy):
    with pytest.raises(ValueError, match="retries must be 0 or more, got -1"):
        fetch_adbench("toy", retries=-1)


@pytest.mark.parametrize(
    ("header", "expected"),
    [("bytes 5-9/10", (5, 10)), ("bytes 5-9/*", (5, None)), ("bytes */10", (None, 10)), ("", (None, None))],
)
def test_byte_range(header, expected):
    assert _byte_range(header) == expected

"""Reading image files, layouts, and bits per dimension."""

import errno
import gc
import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from anomalib_gen import FlowDetector, VAEDetector
from anomalib_gen.calibration import (
    BootstrapConformalDetector,
    CrossConformalDetector,
    SplitConformalDetector,
    ThresholdDetector,
)
from anomalib_gen.images import SUFFIXES, ChannelsFirst, ImageReader, bits_per_dimension, list_images

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def folder(tmp_path):
    """Twelve colour images of 10 x 12 pixels, in two folders."""
    rng = np.random.default_rng(0)
    for k in range(12):
        place = tmp_path / ("a" if k % 2 else "b")
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(place / f"{k:02d}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_read_as_it_is(folder):
    reader = ImageReader()
    images = reader.fit_transform(folder)
    assert images.shape == (12, 3, 10, 12)
    assert images.dtype == np.uint8
    assert reader.event_shape_ == (3, 10, 12)
    paths = list_images(folder)
    assert paths == sorted(paths)
    np.testing.assert_array_equal(np.moveaxis(images[4], 0, 2), np.asarray(Image.open(paths[4])))


def test_paths_keep_their_order(folder):
    paths = list_images(folder)[::-1]
    reader = ImageReader(mode="L", size=(8, 9)).fit(paths)
    images = reader.transform(paths[:3])
    assert images.shape == (3, 1, 8, 9)
    np.testing.assert_array_equal(images[2:], reader.transform(np.array(paths[2:3])))


def test_large_results_are_mapped(folder):
    small, large = ImageReader(), ImageReader(max_bytes=1000)
    mapped = large.fit_transform(folder)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, small.fit_transform(folder))


def test_mapped_images_reach_other_processes_and_leave_no_file(folder):
    mapped = ImageReader(max_bytes=1000).fit_transform(folder)
    path, view = Path(mapped.filename), mapped[2:]
    sums = Parallel(n_jobs=2)(delayed(np.sum)(part) for part in (mapped, view))
    assert sums == [mapped.sum(), view.sum()]
    del mapped
    assert path.exists()
    assert view.any()
    del view
    gc.collect()
    assert not path.exists()


def test_a_disk_without_the_space_is_said_so_before_it_is_written_to(folder, monkeypatch, tmp_path_factory):
    """A mapped file that cannot grow ends the process by a signal."""
    place = tmp_path_factory.mktemp("full")
    monkeypatch.setattr(tempfile, "tempdir", str(place))

    def refuse(descriptor, start, size):
        assert size == 12 * 3 * 10 * 12
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        OSError, match=rf"12 images of shape \(3, 10, 12\) .*No space left.* TMPDIR .*{place}"
    ):
        ImageReader(max_bytes=1000).fit_transform(folder)
    assert not list(place.iterdir())

    def cannot(descriptor, start, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    assert ImageReader(max_bytes=1000).fit_transform(folder).shape == (12, 3, 10, 12)


def test_the_space_of_a_mapped_file_is_kept_until_it_is_written(folder, monkeypatch, tmp_path_factory):
    place = tmp_path_factory.mktemp("mapped")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    taken, decode = [], ImageReader._decode

    def look(reader, path, event_shape):
        taken.extend(file.stat().st_blocks * 512 for file in place.iterdir())
        return decode(reader, path, event_shape)

    monkeypatch.setattr(ImageReader, "_decode", look)
    images = ImageReader(max_bytes=1000).fit_transform(folder)
    assert taken[0] >= images.nbytes > 4096  # a file with one byte at its end has a block of that size


def test_a_fitted_reader_keeps_its_channels(folder):
    reader = ImageReader().fit(folder)
    images = reader.transform(folder)
    np.testing.assert_array_equal(reader.set_params(mode="L").transform(folder), images)
    assert reader.fit_transform(folder).shape == (12, 1, 10, 12)


def test_files_that_cannot_be_read_are_named(folder):
    (folder / "a" / "broken.png").write_bytes(b"not a picture")
    cut = (folder / "b" / "00.png").read_bytes()
    (folder / "b" / "cut.png").write_bytes(cut[: len(cut) // 2])
    Image.new("RGB", (5, 5)).save(folder / "b" / "small.png")
    reader = ImageReader().fit(folder)
    with pytest.raises(
        ValueError, match=r"3 of 15 files .*broken\.png \(no .*cut\.png.*small\.png \(5 x 5 pixels"
    ):
        reader.transform(folder)
    reader.set_params(on_error="skip")
    with pytest.warns(
        UserWarning, match=r"3 of 15 files cannot be read and are left out: .*broken\.png"
    ) as caught:
        images = reader.transform(folder)
    assert [warning.filename for warning in caught] == [__file__]
    assert len(images) == 12
    assert [path.rsplit("/")[-1] for path in reader.skipped_] == ["broken.png", "cut.png", "small.png"]
    with pytest.raises(ValueError, match="1 of 1 files cannot be read"):
        reader.transform([str(folder / "a" / "broken.png")])


def test_whatever_decoders_raise_names_the_file(folder):
    """Words in place of a height: Pillow fails when it writes the camera's tags anew, turned upright."""
    tags = struct.pack("<HHI4s", 0x0101, 2, 4, b"tall") + struct.pack("<HHII", 0x0112, 3, 1, 6)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    Image.new("RGB", (12, 10)).save(folder / "a" / "camera.jpg", exif=exif)
    reader = ImageReader(size=(10, 12), on_error="skip").fit(folder)
    with pytest.warns(UserWarning, match=r"1 of 13 files .*camera\.jpg"):
        assert len(reader.transform(folder)) == 12


def test_the_size_comes_from_a_file_that_can_be_read(folder):
    (folder / "a" / "00.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"No size can be told from .*00\.png"):
        ImageReader().fit(folder)
    assert ImageReader(on_error="skip").fit(folder).event_shape_ == (3, 10, 12)


def test_what_is_no_folder_and_no_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        ImageReader().fit(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="X='' is no folder"):
        ImageReader().fit("")
    with pytest.raises(ValueError, match="There are no image files"):
        ImageReader().fit(tmp_path)
    with pytest.raises(ValueError, match="X names no files"):
        ImageReader().fit([])
    for size in ((3, 0), (3, 4, 5), (3, 4.0), True):
        with pytest.raises(ValueError, match="size must be"):
            ImageReader(size=size).fit([tmp_path])
    with pytest.raises(ValueError, match="'mode'"):
        ImageReader(mode="CMYK").fit([tmp_path])


def test_what_is_no_row_of_paths_is_told(folder):
    files = list_images(folder)
    for once in (folder.glob("*/*.png"), map(str, files)):
        with pytest.raises(TypeError, match=r"a sequence of paths of files, got \w+\. Give list\(X\)\."):
            list_images(once)
    with pytest.raises(TypeError, match=r"got set\.$"):
        list_images(set(files))
    with pytest.raises(ValueError, match=r"a table of shape \(12, 2\)\. Take the column of paths"):
        list_images(np.array([files, files]).T)
    assert list_images(np.array(files)[:, None]) == files
    pipeline = make_pipeline(ImageReader(), FlowDetector(max_iter=1, hidden_features=8, device="cpu"))
    with pytest.raises(TypeError, match=r"single letters, as of a folder's name .*list_images\(folder\)"):
        GridSearchCV(pipeline, {}, cv=2, error_score="raise").fit(str(folder))


def test_a_size_that_a_header_has_made_up_names_the_file(folder, monkeypatch):
    def refuse(image, *args):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(ValueError, match=r"01\.png \(MemoryError\)"):
        ImageReader(size=8).fit_transform(folder)


def test_a_reader_drops_into_a_pipeline(folder):
    flow = FlowDetector(max_iter=2, hidden_features=8, random_state=0, device="cpu")
    pipeline = make_pipeline(ImageReader(size=8, mode="L"), flow).fit(folder)
    assert clone(pipeline).get_params()["imagereader__size"] == 8
    assert pipeline.score_samples(list_images(folder)[:2]).shape == (2,)
    assert flow.event_shape_ == (1, 8, 8)


def test_calibration_takes_files_to_fit_and_folders_to_score(folder):
    flow = FlowDetector(max_iter=1, hidden_features=8, random_state=0, device="cpu")
    pipeline, files = make_pipeline(ImageReader(size=8, mode="L"), flow), list_images(folder)
    detector = SplitConformalDetector(pipeline, alpha=0.2, random_state=0).fit(files)
    np.testing.assert_array_equal(detector.p_values(folder), detector.p_values(files))
    np.testing.assert_array_equal(detector.predict(str(folder)), detector.predict(files))
    for wrapper in (SplitConformalDetector, CrossConformalDetector, BootstrapConformalDetector):
        with pytest.raises(TypeError, match=r"is a folder, of which no part .*list_images\(folder\)"):
            wrapper(pipeline).fit(folder)
    for rule in ("contamination", "false-positive-rate", "cost"):
        with pytest.raises(TypeError, match="is a folder, of which no part"):
            ThresholdDetector(pipeline, threshold=rule).fit(str(folder), [1, -1])


def test_calibration_says_what_to_do_about_files_that_are_left_out(folder):
    flow = FlowDetector(max_iter=1, hidden_features=8, random_state=0, device="cpu")
    pipeline = make_pipeline(ImageReader(size=8, mode="L", on_error="skip"), flow)
    detector = SplitConformalDetector(pipeline, alpha=0.2, random_state=0).fit(list_images(folder))
    (folder / "a" / "broken.png").write_bytes(b"not a picture")
    files = list_images(folder)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=r"one score a row .* ImageReader leaves .* in its skipped_ out of X"),
    ):
        detector.p_values(files)
    left_out = detector.estimator_[0].skipped_
    assert detector.p_values([file for file in files if file not in left_out]).shape == (12,)


def test_layouts():
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 10, 3), dtype=np.uint8)
    layout = ChannelsFirst()
    moved = layout.fit_transform(images)
    assert moved.shape == (6, 3, 9, 10)
    assert np.shares_memory(moved, images)
    np.testing.assert_array_equal(layout.inverse_transform(moved), images)
    assert layout.transform(images[..., 0]).shape == (6, 1, 9, 10)
    with pytest.raises(ValueError, match=r"\(n, channels, height, width\) are needed, got .* \(6, 9\)"):
        layout.inverse_transform(images[..., 0, 0])
    with pytest.raises(ValueError, match="are needed"):
        layout.fit(images[0, 0])
    pipeline = make_pipeline(layout, FlowDetector(max_iter=2, hidden_features=8, device="cpu")).fit(images)
    assert pipeline.score_samples(images).shape == (6,)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_pipeline_with_images_may_return_data_frames(folder, library):
    pytest.importorskip(library)
    vae = VAEDetector(n_components=2, max_iter=2, hidden_features=8, random_state=0, device="cpu")
    images = ImageReader(size=8).fit_transform(folder)
    for steps, X in [
        ([ImageReader(size=8), vae], folder),
        ([ChannelsFirst(), vae], ChannelsFirst().inverse_transform(images)),
    ]:
        pipeline = clone(make_pipeline(*steps).set_output(transform=library)).fit(X)
        latent = pipeline.transform(X)
        assert type(latent).__module__.split(".")[0] == library
        assert list(latent.columns) == ["vaedetector0", "vaedetector1"]
        np.testing.assert_array_equal(pipeline[:-1].transform(X), images)


def test_bits_per_dimension():
    np.testing.assert_allclose(bits_per_dimension([-np.log(2) * 3 * 8 * 8 * 5.0], (3, 8, 8)), 5.0)
    for shape, message in ((64, "sequence"), ((0, 8, 8), "positive integer, got 0"), ((8, 8.0), "got 8.0")):
        with pytest.raises(ValueError, match=message):
            bits_per_dimension([-1.0], shape)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_would_unpack_to_too_much_are_named_too(folder, monkeypatch):
    reader = ImageReader(size=(10, 12)).fit(folder)
    Image.new("L", (40, 40)).save(folder / "a" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match=r"1 of 13 files .*huge\.png \(Image size \(1600 pixels\)"):
        reader.transform(folder)
    with pytest.warns(UserWarning, match="1 of 13 files"):
        assert len(reader.set_params(on_error="skip").transform(folder)) == 12
    assert [path.endswith("huge.png") for path in reader.skipped_] == [True]


def test_files_of_more_than_eight_bits_are_named_and_not_cut(tmp_path):
    deep = np.array([[0, 255], [256, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.float32) / 65535).save(tmp_path / "real.tif")
    Image.fromarray(deep.astype(np.uint8)).save(tmp_path / "plain.png")
    with pytest.raises(
        ValueError, match=r"deep\.png \(more than 8 bits a value.*real\.tif \(more than 8 bits"
    ):
        ImageReader(mode="L", size=2).fit_transform(tmp_path)
    reader = ImageReader(mode="L", on_error="skip")
    with pytest.warns(UserWarning, match="2 of 3 files"):
        assert reader.fit_transform(tmp_path).shape == (1, 1, 2, 2)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["rgb", "la", "rgba"])
def test_colours_of_sixteen_bits_are_not_cut_either(tmp_path, mode, kind, channels):
    """Pillow says that such files have 8 bits, and drops the lower ones."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(range(2 * 8 * channels)) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"deep\.png \(more than 8 bits a value"):
        ImageReader(mode=mode, size=8).fit_transform(tmp_path)


@pytest.mark.parametrize("kind", ["P3", "P6"])
def test_nor_are_those_of_ppm(tmp_path, kind):
    """Whose largest value is a number in the file, and not in the name of its layout."""
    values = np.linspace(0, 65535, 8 * 8 * 3).astype(">u2")
    for name, pixels, largest in (("deep", values, 65535), ("plain", values % 16, 15)):
        raw = pixels.astype(">u2" if largest > 255 else "u1").tobytes()
        body = raw if kind == "P6" else " ".join(map(str, pixels)).encode()
        (tmp_path / f"{name}.ppm").write_bytes(f"{kind}\n8 8\n{largest}\n".encode() + body)
    (tmp_path / "binary.ppm").write_bytes(b"P1\n8 8\n" + b"0 1 " * 32)
    with pytest.raises(ValueError, match=r"1 of 3 files .*deep\.ppm \(more than 8 bits a value"):
        ImageReader(size=8).fit_transform(tmp_path)


def test_sixteen_bits_a_pixel_are_less_than_eight_a_value(tmp_path):
    """Bitmaps of 5, 6 and 5 bits."""
    pixels = np.zeros((8, 8), dtype="<u2")
    pixels[0, :3] = 31 << 11, 63 << 5, 31
    header = struct.pack("<IiiHHIIiiII", 40, 8, -8, 1, 16, 3, pixels.nbytes, 0, 0, 0, 0)
    masks = struct.pack("<III", 31 << 11, 63 << 5, 31)
    (tmp_path / "565.bmp").write_bytes(
        struct.pack("<2sIII", b"BM", 66 + pixels.nbytes, 0, 66) + header + masks + pixels.tobytes()
    )
    (image,) = ImageReader().fit_transform(tmp_path)
    np.testing.assert_array_equal(image[:, 0, :3], 255 * np.eye(3))
    assert image.sum() == 3 * 255


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_stand_as_a_viewer_shows_them(tmp_path, suffix):
    pixels = np.zeros((16, 24), dtype=np.uint8)
    pixels[:8, :8] = 255  # the corner at the top left
    turned = {1: (16, 24, 0, 0), 3: (16, 24, -1, -1), 6: (24, 16, 0, -1), 8: (24, 16, -1, 0)}
    for orientation, (height, width, row, column) in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(pixels).save(path, exif=exif)
        (image,) = ImageReader(mode="L").fit_transform([path])
        assert image.shape == (1, height, width)
        assert image[0, row, column] > 200
        assert (image > 127).sum() == 64


def test_transparency_is_dropped_in_silence(tmp_path):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    grey.quantize(16).save(tmp_path / "palette.png", transparency=bytes(range(16)))
    grey.convert("RGBA").save(tmp_path / "colour.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = ImageReader(mode="L").fit_transform(tmp_path)
    np.testing.assert_array_equal(images[0, 0], np.asarray(grey))
    assert np.abs(images[1, 0].astype(int) - grey).max() <= 4


def test_folders_with_the_name_of_a_file_are_none(folder):
    (folder / "a" / "crops.png").mkdir()
    Image.new("RGB", (12, 10)).save(folder / "a" / "crops.png" / "Größe.PNG")
    (folder / "b" / "gone.jpg").symlink_to(folder / "nothing.jpg")
    paths = [path.rsplit("/")[-1] for path in list_images(folder)]
    assert len(paths) == 14
    assert {"Größe.PNG", "gone.jpg"} <= set(paths)
    with pytest.raises(ValueError, match=r"1 of 14 files cannot be read: .*gone\.jpg"):
        ImageReader().fit_transform(folder)


def test_links_to_folders_are_followed_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (12, 10)).save(elsewhere / "far.png")
    (folder / "c").symlink_to(elsewhere)
    (folder / "d").symlink_to(elsewhere)
    (folder / "a" / "round").symlink_to(folder)
    paths = list_images(folder)
    assert len(paths) == 13
    assert paths[-1] == str(folder / "c" / "far.png")
    link = folder / "b" / "all"
    link.symlink_to(folder)
    assert len(list_images(link)) == 13


def test_folders_that_may_not_be_read_are_not_passed_over(folder, monkeypatch):
    scan = os.scandir

    def forbid(path):
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(PermissionError, match=f"{folder}/a"):
        list_images(folder)


def test_the_endings_are_those_that_are_documented():
    assert all(suffix in list_images.__doc__ for suffix in SUFFIXES)


def test_readers_are_fitted_first_and_take_paths(folder):
    with pytest.raises(NotFittedError):
        ImageReader().transform(folder)
    with pytest.raises(TypeError, match=r"holds float values\. Arrays of images need no reader"):
        ImageReader().fit(np.zeros((3, 8, 8)))

"""Reading image files, layouts, and bits per dimension."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline

from anomalib_gen import FlowDetector
from anomalib_gen.images import ChannelsFirst, ImageReader, bits_per_dimension, list_images

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


def test_files_that_cannot_be_read_are_named(folder):
    (folder / "a" / "broken.png").write_bytes(b"not a picture")
    cut = (folder / "b" / "00.png").read_bytes()
    (folder / "b" / "cut.png").write_bytes(cut[: len(cut) // 2])
    Image.new("RGB", (5, 5)).save(folder / "b" / "small.png")
    reader = ImageReader().fit(folder)
    with pytest.raises(ValueError, match=r"3 of 15 files .*broken\.png.*cut\.png.*small\.png \(5 x 5 pixels"):
        reader.transform(folder)
    reader.set_params(on_error="skip")
    with pytest.warns(UserWarning, match=r"3 of 15 files cannot be read and are left out: .*broken\.png"):
        images = reader.transform(folder)
    assert len(images) == 12
    assert [path.rsplit("/")[-1] for path in reader.skipped_] == ["broken.png", "cut.png", "small.png"]
    with pytest.raises(ValueError, match="1 of 1 files cannot be read"):
        reader.transform([str(folder / "a" / "broken.png")])


def test_the_size_comes_from_a_file_that_can_be_read(folder):
    (folder / "a" / "00.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"No size can be told from .*00\.png"):
        ImageReader().fit(folder)
    assert ImageReader(on_error="skip").fit(folder).event_shape_ == (3, 10, 12)


def test_what_is_no_folder_and_no_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        ImageReader().fit(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="There are no image files"):
        ImageReader().fit(tmp_path)
    with pytest.raises(ValueError, match="X names no files"):
        ImageReader().fit([])
    with pytest.raises(ValueError, match="size must be"):
        ImageReader(size=(3, 0)).fit([tmp_path])
    with pytest.raises(ValueError, match="'mode'"):
        ImageReader(mode="CMYK").fit([tmp_path])


def test_a_reader_drops_into_a_pipeline(folder):
    flow = FlowDetector(max_iter=2, hidden_features=8, random_state=0, device="cpu")
    pipeline = make_pipeline(ImageReader(size=8, mode="L"), flow).fit(folder)
    assert clone(pipeline).get_params()["imagereader__size"] == 8
    assert pipeline.score_samples(list_images(folder)[:2]).shape == (2,)
    assert flow.event_shape_ == (1, 8, 8)


def test_layouts():
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 10, 3), dtype=np.uint8)
    layout = ChannelsFirst()
    moved = layout.fit_transform(images)
    assert moved.shape == (6, 3, 9, 10)
    assert np.shares_memory(moved, images)
    np.testing.assert_array_equal(layout.inverse_transform(moved), images)
    assert layout.transform(images[..., 0]).shape == (6, 1, 9, 10)
    with pytest.raises(ValueError, match="are needed"):
        layout.fit(images[0, 0])
    pipeline = make_pipeline(layout, FlowDetector(max_iter=2, hidden_features=8, device="cpu")).fit(images)
    assert pipeline.score_samples(images).shape == (6,)


def test_bits_per_dimension():
    np.testing.assert_allclose(bits_per_dimension([-np.log(2) * 3 * 8 * 8 * 5.0], (3, 8, 8)), 5.0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_would_unpack_to_too_much_are_named_too(folder, monkeypatch):
    reader = ImageReader(size=(10, 12)).fit(folder)
    Image.new("L", (40, 40)).save(folder / "a" / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match=r"1 of 13 files .*huge\.png \(Image size \(1600 pixels\)"):
        reader.transform(folder)
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


def test_readers_are_fitted_first_and_take_paths(folder):
    with pytest.raises(NotFittedError):
        ImageReader().transform(folder)
    with pytest.raises(TypeError, match=r"holds float values\. Arrays of images need no reader"):
        ImageReader().fit(np.zeros((3, 8, 8)))

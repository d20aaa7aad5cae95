"""Loaders of image collections and synthetic defects."""

import io
import os

import numpy as np
import pytest

from anomalib_gen.datasets import load_images, load_other_images, make_defects


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Tiny collections in the layout of the real ones."""
    monkeypatch.delenv("ANOMALIB_GEN_DATA", raising=False)
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    np.savez(
        folder / "mnist.npz",
        **{
            f"{what}_{part}": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            if what == "X"
            else np.arange(n, dtype=np.uint8) % 10
            for part, n in (("train", 40), ("test", 20))
            for what in ("X", "y")
        },
    )
    return tmp_path


def test_mnist(home, monkeypatch):
    bunch = load_images("MNIST", normal=[0, 1], data_home=home)
    assert bunch.data.shape == (40, 1, 28, 28)
    assert bunch.data.dtype == np.uint8
    np.testing.assert_array_equal(bunch.target == 1, bunch.classes <= 1)
    assert "Normal: 0, 1" in bunch.DESCR
    monkeypatch.setenv("ANOMALIB_GEN_DATA", os.fspath(home))
    X, y = load_images("mnist", normal="3", subset="test", return_X_y=True)
    assert X.shape == (20, 1, 28, 28)
    assert (y == 1).sum() == 2


def test_cifar(home):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    coded = []
    for k in range(6):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (40 * k, 0, 200)).save(file, format="PNG")
        coded.append(file.getvalue())
    table = pa.table({"image": pa.array(coded, pa.binary()), "label": pa.array(range(6), pa.int8())})
    pq.write_table(table, home / "images" / "cifar10-train.parquet")
    bunch = load_images("cifar10", normal="cat", data_home=home)
    assert bunch.data.shape == (6, 3, 32, 32)
    assert bunch.data[2, :, 0, 0].tolist() == [80, 0, 200]
    np.testing.assert_array_equal(bunch.target, [-1, -1, -1, 1, -1, -1])


def test_what_is_missing_is_told(home):
    with pytest.raises(FileNotFoundError, match=r"cifar10-train\.parquet was not found(.|\n)*images"):
        load_images("cifar10", normal=0, data_home=home)
    with pytest.raises(ValueError, match="subset must be"):
        load_images("mnist", normal=0, subset="validation", data_home=home)
    with pytest.raises(ValueError, match="no class"):
        load_images("mnist", normal="ten", data_home=home)
    with pytest.raises(ValueError, match=r"name='svhn'\. Known names: 'mnist', 'cifar10'\."):
        load_images("svhn", normal=0)


@pytest.mark.parametrize(("name", "file"), [("mnist", "mnist.npz"), ("cifar10", "cifar10-train.parquet")])
def test_damaged_files_are_named(home, name, file):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (home / "images" / file).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{file} cannot be read: "):
        load_images(name, normal=0, data_home=home)
    if name == "mnist":
        with pytest.raises(ValueError, match=r"mnist\.npz cannot be read: "):
            load_other_images(name, data_home=home)


def test_missing_packages_are_told(home, monkeypatch):
    (home / "images" / "cifar10-train.parquet").touch()
    monkeypatch.setattr("anomalib_gen.datasets._images.find_spec", lambda name: None if name == "PIL" else 1)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'anomalib-gen\[benchmark\]'"):
        load_images("cifar10", normal=0, data_home=home)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_real_files(name):
    try:
        bunch = load_images(name, normal=0, subset="test")
    except (FileNotFoundError, ModuleNotFoundError) as error:
        pytest.skip(str(error).splitlines()[0])
    assert len(bunch.data) == 10_000
    assert 900 < (bunch.target == 1).sum() < 1100


# Defects ---------------------------------------------------------------------------------------------------------


def pictures(n=20, channels=1, seed=0):
    """Smooth pictures: a bright square on a dark ground."""
    X = np.full((n, channels, 28, 28), 20, dtype=np.uint8)
    X[:, :, 6:22, 6:22] = 120
    return X


@pytest.mark.parametrize("kind", ["mixed", "blob", "missing", "scratch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_mark_what_changed(kind, channels):
    X = pictures(channels=channels)
    before = X.copy()
    defective, masks = make_defects(X, kind=kind, random_state=0)
    np.testing.assert_array_equal(X, before)
    assert defective.dtype == np.uint8
    assert masks.shape == (20, 28, 28)
    change = np.abs(defective.astype(int) - X).max(axis=1)
    np.testing.assert_array_equal(masks, change >= 32)
    assert (masks.sum(axis=(1, 2)) >= 4).all()
    assert masks.mean() < 0.3
    again, _ = make_defects(X, kind=kind, random_state=0)
    np.testing.assert_array_equal(again, defective)
    assert (make_defects(X, kind=kind, random_state=1)[0] != defective).any()


def test_impossible_defects_are_refused():
    with pytest.raises(ValueError, match="Image 0 takes no visible defect of the kind 'missing'"):
        make_defects(np.zeros((2, 1, 16, 16), np.uint8), kind="missing")
    with pytest.raises(ValueError, match="kind='dent' is unknown"):
        make_defects(pictures(), kind="dent")
    with pytest.raises(ValueError, match="uint8 images"):
        make_defects(pictures() / 255)
    with pytest.raises(ValueError, match=r"shape \(2, 16, 16, 3\).* at least 8.*ChannelsFirst"):
        make_defects(np.zeros((2, 16, 16, 3), np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, format="JPEG", **options)
    return file.getvalue()


@pytest.fixture
def coded_home(home):
    """With a test part of CIFAR-10 of one image of coarse JPEG."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pq = pytest.importorskip("pyarrow.parquet")
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    coded = jpeg(Image.new("RGB", (32, 32), (9, 90, 200)), quality=20, subsampling="4:2:0")
    table = pa.table({"image": pa.array([coded], pa.binary()), "label": pa.array([0], pa.int8())})
    pq.write_table(table, home / "images" / "cifar10-test.parquet")
    return home


@pytest.mark.parametrize("source", ["mnist", "photographs"])
def test_another_source_has_the_coding_of_cifar(coded_home, source):
    X = load_other_images(source, n_samples=12, random_state=0, data_home=coded_home)
    assert X.shape == (12, 3, 32, 32)
    assert X.dtype == np.uint8
    np.testing.assert_array_equal(
        load_other_images(source, n_samples=12, random_state=0, data_home=coded_home), X
    )
    assert len({image.tobytes() for image in X}) == 12
    if source == "mnist":
        Image = pytest.importorskip("PIL.Image")
        with np.load(coded_home / "images" / "mnist.npz") as archive:
            first = np.pad(archive["X_test"], ((0, 0), (2, 2), (2, 2)))
        coded = [jpeg(Image.fromarray(d).convert("RGB"), quality=20, subsampling="4:2:0") for d in first]
        known = {np.moveaxis(np.asarray(Image.open(io.BytesIO(c))), 2, 0).tobytes() for c in coded}
        assert {image.tobytes() for image in X} <= known


def test_files_without_loss_ask_for_no_coding(coded_home):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, format="PNG")
    table = pa.table({"image": pa.array([file.getvalue()], pa.binary()), "label": pa.array([0], pa.int8())})
    pq.write_table(table, coded_home / "images" / "cifar10-test.parquet")
    X = load_other_images("mnist", data_home=coded_home, random_state=0)
    digits = load_images("mnist", normal=0, subset="test", data_home=coded_home).data
    for channel in range(3):
        np.testing.assert_array_equal(X[:, channel, 2:-2, 2:-2], digits[:, 0])
    assert not X[:, :, :2].any()
    for n in (0, -1, 2.0):
        with pytest.raises(ValueError, match="n_samples must be a positive integer, got"):
            load_other_images("mnist", n_samples=n)
    with pytest.raises(ValueError, match="source must be one of 'mnist', 'photographs'"):
        load_other_images("svhn", data_home=coded_home)

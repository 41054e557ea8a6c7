"""The readers return what was written in the publishers' formats, and refuse everything else."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
pooch = pytest.importorskip("pooch")
pytest.importorskip("tqdm")

from data import (  # noqa: E402
    Characters,
    cifar10,
    faces,
    glyphs,
    image_folder,
    mnist,
    omniglot,
    rotated,
)
from data.sources import Source, download, locate  # noqa: E402


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# MNIST


def write_idx(path: Path, array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.tobytes()))
    return path.read_bytes()


@pytest.fixture
def digits(tmp_path):
    """A folder with a small MNIST training set, and the arrays that it holds."""
    pixels = noise(7, 28, 28)
    labels = np.array([3, 0, 9, 1, 1, 8, 5], dtype=np.uint8)
    write_idx(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz", labels)
    return tmp_path, pixels, labels


@pytest.mark.parametrize("inner", ["", "mnist"])
def test_mnist_is_read_as_written(digits, inner):
    folder, pixels, labels = digits
    images = mnist(folder / inner, train=True)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.dtype == torch.int64
    np.testing.assert_array_equal(images.pixels.numpy(), pixels[:, None])
    np.testing.assert_array_equal(images.labels.numpy(), labels)
    assert images.classes[9] == "9"
    assert len(images) == 7


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 40):
        data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shorten, "whole gzip file; found EOFError"),
        (flip, "whole gzip file"),
        (lambda path: path.write_bytes(b""), "00000803; found nothing"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "whole gzip file"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0")), "00000803; found 0000"),
        (lambda path: write_idx(path, np.zeros(7, np.uint8)), "00000803; found 00000801"),
        (lambda path: write_idx(path, np.zeros((7, 32, 32), np.uint8)), r"\(28, 28\); found 7 of"),
        (lambda path: write_idx(path, np.zeros((0, 28, 28), np.uint8)), "found 0 of"),
        (lambda path: write_idx(path, np.zeros((6, 28, 28), np.uint8)), "6 images and 7 labels"),
        (
            lambda path: path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 9, 28, 28))),
            "7056 bytes after the header, for 9 items; found 0 bytes",
        ),
    ],
)
def test_a_damaged_mnist_file_is_refused_by_name(digits, spoil, message):
    path = digits[0] / "mnist" / "train-images-idx3-ubyte.gz"
    spoil(path)
    with pytest.raises(ValueError, match=message) as raised:
        mnist(digits[0], train=True)
    assert "train-" in str(raised.value)
    assert "leave --data out" in str(raised.value)
    # What Python prints first is this error, not one of zlib or numpy.
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_a_label_that_is_no_digit_is_refused(digits):
    labels = np.array([3, 0, 9, 1, 1, 8, 200], dtype=np.uint8)
    write_idx(digits[0] / "mnist" / "train-labels-idx1-ubyte.gz", labels)
    with pytest.raises(ValueError, match="labels up to 200"):
        mnist(digits[0], train=True)


@pytest.mark.parametrize(
    ("read", "looked_for"),
    [
        (lambda folder: mnist(folder, train=False), "mnist/t10k-images-idx3-ubyte.gz"),
        (lambda folder: cifar10(folder, train=True), "cifar10/cifar-10-batches-py/data_batch_1"),
        (lambda folder: omniglot(folder, "background"), "omniglot/images_background.zip"),
    ],
)
def test_a_file_that_is_not_there_is_named_with_the_places_and_remedies(tmp_path, read, looked_for):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError) as raised:
            read(folder)
        message = str(raised.value)
        assert str(folder / looked_for) in message
        assert str(folder / Path(looked_for).name) in message
        assert "https://" in message
        assert "leave --data out" in message


# CIFAR-10

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch in the opcodes of Python 2's pickle, which the official files are written in."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value  # BINSTRING

    def whole(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)  # BININT

    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + whole(0) + b"\x85"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + whole(0) + whole(1) + b"tR("
    dtype += whole(3) + text(b"|") + b"NNN" + whole(-1) + whole(-1) + whole(0) + b"tb"
    shape = whole(data.shape[0]) + whole(data.shape[1]) + b"\x86"
    array = empty + text(b"b") + b"tR(" + whole(1) + shape + dtype + b"\x89"
    array += text(data.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(whole, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def python3_pickle(protocol: int):
    def write(data: np.ndarray, labels: list[int]) -> bytes:
        batch = {b"batch_label": b"training batch", b"labels": labels, b"data": data}
        return pickle.dumps(batch, protocol=protocol)

    return write


@pytest.fixture
def photographs():
    """Six small batches, ``(data, labels)`` each."""
    return {
        name: (noise(count, 3072, seed=count), (noise(count, seed=count) % 10).tolist())
        for name, count in zip(BATCHES, (4, 2, 3, 1, 6, 5), strict=True)
    }


def write_batches(folder: Path, photographs: dict, write=python2_pickle) -> Path:
    folder.mkdir(parents=True)
    for name, batch in photographs.items():
        (folder / name).write_bytes(write(*batch))
    return folder


def write_archive(path: Path, batches: Path, prefix: str = "cifar-10-batches-py") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(batches, prefix)


def assert_cifar10(folder: Path, photographs: dict) -> None:
    for train, names in ((True, BATCHES[:5]), (False, BATCHES[5:])):
        images = cifar10(folder, train)
        data = np.concatenate([photographs[name][0] for name in names])
        labels = [label for name in names for label in photographs[name][1]]
        assert images.pixels.dtype == torch.uint8
        # Each row: 1024 red values, row by row, then green, then blue.
        np.testing.assert_array_equal(images.pixels.numpy(), data.reshape(-1, 3, 32, 32))
        assert images.labels.tolist() == labels
        assert (images.classes[0], images.classes[9]) == ("airplane", "truck")


def test_the_python_2_pickle_of_these_tests_is_one(photographs):
    data, labels = photographs["test_batch"]
    batch = pickle.loads(python2_pickle(data, labels), encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], data)
    assert batch[b"labels"] == labels


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_cifar10_is_read_from_its_folder(tmp_path, photographs, inner):
    write_batches(tmp_path / "data" / inner, photographs)
    assert_cifar10(tmp_path / "data", photographs)


@pytest.mark.parametrize("inner", ["", "cifar10"])
def test_cifar10_is_read_from_its_archive_and_nothing_is_unpacked(tmp_path, photographs, inner):
    batches = write_batches(tmp_path / "batches", photographs)
    write_archive(tmp_path / "data" / inner / "cifar-10-python.tar.gz", batches)
    assert_cifar10(tmp_path / "data", photographs)
    files = [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert files == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar10_is_read_from_newer_pickles(tmp_path, photographs, protocol, order):
    def write(data: np.ndarray, labels: list[int]) -> bytes:
        return python3_pickle(protocol)(np.asarray(data, order=order), labels)

    write_batches(tmp_path / "data", photographs, write)
    assert_cifar10(tmp_path / "data", photographs)


class MakesFolder:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, photographs, protocol):
    batches = write_batches(tmp_path / "data", photographs)
    data, labels = photographs["data_batch_3"]
    marker = tmp_path / "made"
    batch = {b"data": data, b"labels": labels, b"filenames": MakesFolder(marker)}
    (batches / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=protocol))
    with pytest.raises(ValueError, match=r"data_batch_3 cannot be read.*it asks for") as raised:
        cifar10(batches, train=True)
    assert "mkdir" in str(raised.value) or "_frombuffer" in str(raised.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(MakesFolder(marker), protocol=protocol))
    assert marker.exists(), "the pickle would not have done anything anyway"


@pytest.mark.parametrize(
    "raw",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x10core.os.path.sep\x93.",  # a dotted name
        b"\x80\x02cnumpy\nndarray\n)\x81}b.",
        b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00rottR.",
        b"\x80\x02c_codecs\nencode\nN}X\x07\x00\x00\x00__doc__K\x01s\x86b.",  # sets an attribute
        b"\x82\x01.",  # an extension's code
        b"\x80\x02Pan id\n.",
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"labels": [1]}),
    ],
)
def test_a_file_that_is_no_batch_is_refused(tmp_path, photographs, raw):
    batches = write_batches(tmp_path / "data", photographs)
    (batches / "test_batch").write_bytes(raw)
    with pytest.raises(ValueError, match="test_batch cannot be read") as raised:
        cifar10(batches, train=False)
    assert "https://www.cs.toronto.edu" in str(raised.value)


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (PIXELS[:, :3000], [0, 1]),
        (PIXELS.astype(np.int16), [0, 1]),
        (PIXELS.astype(object), [0, 1]),
        (PIXELS[:0], []),
        (PIXELS, [0]),
        (PIXELS, [0, 10]),
        (PIXELS, [0, -1]),
        (PIXELS, [0, "cat"]),
        (PIXELS, None),
        (PIXELS.tobytes(), [0, 1]),
    ],
)
def test_a_batch_of_other_contents_is_refused(tmp_path, photographs, data, labels):
    batches = write_batches(tmp_path / "data", photographs)
    (batches / "test_batch").write_bytes(python3_pickle(4)(data, labels))
    with pytest.raises(ValueError, match=r"test_batch cannot be read.*shape \(N, 3072\)"):
        cifar10(batches, train=False)


def test_a_batch_that_says_it_is_longer_than_it_is_is_refused(tmp_path, photographs):
    batches = write_batches(tmp_path / "data", photographs)
    raw = python2_pickle(PIXELS, [0, 1])
    longer = raw.replace(struct.pack("<i", 3072), struct.pack("<i", 30720))
    assert longer != raw
    (batches / "test_batch").write_bytes(longer)
    with pytest.raises(ValueError, match="test_batch cannot be read"):
        cifar10(batches, train=False)


def test_a_damaged_or_incomplete_archive_is_refused_by_name(tmp_path, photographs):
    batches = write_batches(tmp_path / "batches", photographs)
    path = tmp_path / "cifar-10-python.tar.gz"
    for spoil in (shorten, flip, lambda path: path.write_bytes(b"nothing")):
        write_archive(path, batches)
        spoil(path)
        with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz cannot be read.*whole tar"):
            cifar10(tmp_path, train=True)
    write_archive(path, batches, prefix="../cifar-10-batches-py")
    with pytest.raises(ValueError, match="none of the names data_batch_1, data_batch_2"):
        cifar10(tmp_path, train=True)


def test_an_archive_with_links_for_batches_is_refused(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match="none of the names test_batch"):
        cifar10(tmp_path, train=False)


def test_a_folder_that_lacks_a_batch_is_refused(tmp_path, photographs):
    batches = write_batches(tmp_path / "data", photographs)
    (batches / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="but not data_batch_4"):
        cifar10(batches, train=True)


# Pictures


def write_picture(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def plain(color: tuple[int, int, int], size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), color, np.uint8)


def test_pictures_come_from_every_folder_in_the_order_of_their_paths(tmp_path):
    pixels = {name: noise(8, 8, 3, seed=ord(name)) for name in "abcd"}
    write_picture(tmp_path / "b.png", pixels["b"])
    write_picture(tmp_path / "c" / "z.PNG", pixels["c"])
    write_picture(tmp_path / "c" / "d" / "a.bmp", pixels["a"])
    write_picture(tmp_path / ".hidden.png", pixels["d"])
    (tmp_path / "notes.txt").write_text("not a picture")
    images = image_folder(tmp_path, 8, quiet=True)
    wanted = [pixels["b"], pixels["a"], pixels["c"]]
    np.testing.assert_array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), np.stack(wanted))
    assert images.labels is None
    assert torch.equal(image_folder(tmp_path, 8, limit=2, quiet=True).pixels, images.pixels[:2])


def test_a_jpeg_keeps_its_colours(tmp_path):
    write_picture(tmp_path / "a.jpg", plain((200, 100, 30)), quality=95)
    pixels = image_folder(tmp_path, 4, quiet=True).pixels
    assert pixels.shape == (1, 3, 4, 4)
    wanted = torch.tensor([200, 100, 30]).view(3, 1, 1)
    assert (pixels[0].int() - wanted).abs().max() <= 4


def test_the_middle_square_is_taken_and_antialiased(tmp_path):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :16], wide[:, 48:] = (255, 0, 0), (0, 0, 255)  # cut away
    wide[::2, 16:48] = (0, 200, 0)  # one line in two
    write_picture(tmp_path / "wide.png", wide)
    pixels = image_folder(tmp_path, 8, quiet=True).pixels[0].int()
    red, green, blue = pixels[:, 2:-2, 2:-2]  # the filter reaches over the edge by a pixel
    assert red.max() < 3
    assert blue.max() < 3
    assert (green - 100).abs().max() <= 12  # not 0 or 200, as picking lines would give


def test_a_picture_in_gray_or_stored_on_its_side_is_read_upright_in_rgb(tmp_path):
    gray = noise(8, 8)
    turn = Image.Exif()
    turn[0x0112] = 6  # to be shown turned by 90° clockwise
    write_picture(tmp_path / "a.png", gray)
    write_picture(tmp_path / "b.png", gray, exif=turn)
    upright, turned = image_folder(tmp_path, 8, quiet=True).pixels.numpy()
    np.testing.assert_array_equal(upright, np.stack([gray] * 3))
    np.testing.assert_array_equal(turned, np.stack([np.rot90(gray, -1)] * 3))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("name", ["b.jpg", "b.png"])
@pytest.mark.parametrize(
    "spoil", [cut, lambda path: path.write_text("hello"), lambda path: path.write_bytes(b"")]
)
def test_a_damaged_picture_is_refused_by_name(tmp_path, name, spoil):
    write_picture(tmp_path / "a.png", noise(16, 16, 3))
    write_picture(tmp_path / name, noise(16, 16, 3))
    spoil(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} cannot be read.*Expected a picture.*Remove it"):
        image_folder(tmp_path, 8, quiet=True)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        image_folder(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match=r"Expected pictures \(.*found no file"):
        image_folder(tmp_path, 8)
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(ValueError, match=r"found 1 other files, such as notes\.txt"):
        image_folder(tmp_path, 8)


@pytest.mark.parametrize(("size", "limit"), [(0, None), (8, 0), (8, -1)])
def test_a_senseless_size_or_limit_is_refused(tmp_path, size, limit):
    write_picture(tmp_path / "a.png", plain((1, 2, 3)))
    with pytest.raises(ValueError, match="must be positive"):
        image_folder(tmp_path, size, limit)


@pytest.mark.parametrize("inner", ["", "faces"])
def test_faces_come_from_the_train_and_test_folders(tmp_path, inner):
    for value, part in enumerate(("train", "test", "other")):
        write_picture(tmp_path / inner / part / "a.png", plain((value, value, value)))
    for train in (True, False):
        images = faces(tmp_path, train, 8, quiet=True)
        assert images.pixels.unique().tolist() == [0 if train else 1]


@pytest.mark.parametrize("inner", ["", "faces"])
def test_faces_of_one_folder_are_split_nine_to_one_by_name(tmp_path, inner):
    for number in range(21):
        write_picture(tmp_path / inner / f"{number:03}.png", plain((number, 0, 0)))
    train, test = (
        faces(tmp_path, part, 4, quiet=True).pixels[:, 0, 0, 0] for part in (True, False)
    )
    assert train.tolist() == list(range(18))
    assert test.tolist() == [18, 19, 20]
    assert len(faces(tmp_path, True, 4, limit=5, quiet=True)) == 5


def test_faces_are_the_users_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CelebA.*--data DIR"):
        faces(None, train=True)
    write_picture(tmp_path / "a.png", plain((1, 2, 3)))
    with pytest.raises(ValueError, match=r"one picture, a\.png\. Expected at least 2"):
        faces(tmp_path, train=True)


# Omniglot

CHARACTERS = ["Greek/character01", "Greek/character02", "Latin_(small)/character01"]


def png(drawing: np.ndarray) -> bytes:
    """A drawing as Omniglot has it: one bit a pixel, black ink (False) on white paper."""
    file = io.BytesIO()
    Image.fromarray(drawing).save(file, "PNG")
    return file.getvalue()


def write_omniglot(path: Path, drawings: np.ndarray, split: str = "background", drawers: int = 20):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"images_{split}/", b"")
        archive.writestr(f"__MACOSX/images_{split}/Greek/._character01", b"x")
        for number, name in reversed(list(enumerate(CHARACTERS))):  # order must not matter
            for drawer in range(drawers):
                member = f"images_{split}/{name}/{number + 1:04}_{drawer + 1:02}.png"
                archive.writestr(member, png(~drawings[number, drawer]))


@pytest.fixture(scope="module")
def drawings():
    return np.random.default_rng(1).random((3, 20, 105, 105)) < 0.1


@pytest.mark.parametrize("inner", ["", "omniglot"])
@pytest.mark.parametrize("split", ["background", "evaluation"])
def test_omniglot_is_read_as_written_with_ink_at_1(tmp_path, drawings, split, inner):
    write_omniglot(tmp_path / inner / f"images_{split}.zip", drawings, split)
    characters = omniglot(tmp_path, split, size=105, quiet=True)
    assert characters.names == tuple(CHARACTERS)
    assert characters.pixels.dtype == torch.float32
    np.testing.assert_array_equal(characters.pixels.numpy(), drawings[:, :, None])


def test_omniglot_is_antialiased(tmp_path):
    fine = np.zeros((3, 20, 105, 105), bool)
    fine[..., ::2, ::2] = True  # a quarter is ink: each small pixel should be near 1/4
    write_omniglot(tmp_path / "images_background.zip", fine)
    pixels = omniglot(tmp_path, "background", quiet=True).pixels
    assert pixels.shape == (3, 20, 1, 28, 28)
    assert pixels.min() >= 0
    assert (pixels[..., 2:-2, 2:-2] - 0.25).abs().max() < 0.1


def test_a_damaged_omniglot_archive_is_refused_by_name(tmp_path, drawings):
    path = tmp_path / "images_background.zip"
    write_omniglot(path, drawings)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images_background\.zip cannot be read.*whole zip"):
        omniglot(tmp_path, "background", quiet=True)
    path.write_bytes(whole[:20000] + bytes(500) + whole[20500:])
    with pytest.raises(ValueError, match=r"images_background\.zip: .*\.png cannot be read"):
        omniglot(tmp_path, "background", quiet=True)


def test_an_archive_of_other_drawings_is_refused(tmp_path, drawings):
    path = tmp_path / "images_background.zip"
    write_omniglot(path, drawings, drawers=19)
    with pytest.raises(ValueError, match=r"20 drawings.*found 19 of images_background/Greek"):
        omniglot(tmp_path, "background", quiet=True)
    write_omniglot(path, drawings, split="evaluation")
    with pytest.raises(ValueError, match="found 62 files and none of those"):
        omniglot(tmp_path, "background", quiet=True)
    write_omniglot(path, drawings[..., :50, :60])
    with pytest.raises(ValueError, match=r"0001_01\.png.*105×105 pixels; found 60×50"):
        omniglot(tmp_path, "background", quiet=True)


@pytest.mark.parametrize("read", [lambda split: omniglot(None, split), glyphs])
def test_a_split_that_there_is_not_is_refused(read):
    with pytest.raises(ValueError, match=r"split must be one of .*got 'train'"):
        read("train")


def test_rotations_are_new_characters():
    pixels = torch.rand(2, 20, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    turned = rotated(Characters(pixels, ("A/1", "B/1")))
    assert turned.names[:3] == ("A/1", "B/1", "A/1/90")
    assert len(set(turned.names)) == len(turned) == 8
    for turn in range(4):
        wanted = np.rot90(pixels.numpy(), turn, axes=(3, 4))
        np.testing.assert_array_equal(turned.pixels[2 * turn : 2 * turn + 2].numpy(), wanted)


# Glyphs


@pytest.fixture(scope="module")
def printed() -> dict[str, Characters]:
    return {split: glyphs(split, size=14, quiet=True) for split in ("background", "evaluation")}


def code(name: str) -> int:
    return int(name.split("/U+")[1], 16)


def test_there_are_enough_glyphs_and_no_class_is_in_both_splits(printed):
    background, evaluation = printed["background"], printed["evaluation"]
    assert len(background) >= 400
    assert len(evaluation) >= 200
    names = background.names + evaluation.names
    assert len({code(name) for name in names}) == len(names)
    for characters in printed.values():
        assert characters.pixels.shape == (len(characters.names), 20, 1, 14, 14)
        assert characters.pixels.min() >= 0
        assert characters.pixels.max() <= 1
        ink = characters.pixels.mean((2, 3, 4))
        assert ink.min() > 0.02
        assert ink.max() < 0.6


def test_a_letter_that_looks_like_another_is_one_class(printed):
    codes = {code(name) for characters in printed.values() for name in characters.names}
    for look_alikes in ("AΑАᎪ", "OΟОοоՕס", "HΗН", "PΡР", "CcϹϲСс", "SsЅѕ"):
        assert len(codes & set(map(ord, look_alikes))) == 1
    assert set(map(ord, "ABRaegЖЯфΩξ")) <= codes


def test_the_fonts_have_every_glyph(printed):
    from fontTools.ttLib import TTFont
    from matplotlib import get_data_path

    font = TTFont(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    names = [name for characters in printed.values() for name in characters.names]
    assert {code(name) for name in names} <= set(font.getBestCmap())


def test_no_two_drawings_are_the_same(printed):
    drawings = torch.cat([characters.pixels.flatten(0, 1) for characters in printed.values()])
    assert len(drawings.flatten(1).unique(dim=0)) == len(drawings)


def test_a_glyph_resembles_its_other_drawings(printed):
    pixels = torch.nn.functional.avg_pool2d(printed["evaluation"].pixels.flatten(0, 1), 3, 1, 1)
    pixels = torch.nn.functional.normalize(pixels.flatten(1) - pixels.flatten(1).mean(1, True))
    pixels = pixels.view(len(printed["evaluation"]), 20, -1)
    generator = torch.Generator().manual_seed(0)
    right = []
    for _ in range(200):  # 5 classes, told apart by the nearest of one example each
        five = torch.randperm(len(pixels), generator=generator)[:5]
        known, asked = torch.randperm(20, generator=generator)[:2]
        nearest = (pixels[five, asked] @ pixels[five, known].T).argmax(1)
        right.append((nearest == torch.arange(5)).float().mean().item())
    assert 0.6 < np.mean(right) < 0.99  # by chance 0.2; and not so easy that pixels suffice


def test_glyphs_are_the_same_on_every_call(printed):
    again = glyphs("evaluation", size=14, quiet=True)
    assert again.names == printed["evaluation"].names
    assert torch.equal(again.pixels, printed["evaluation"].pixels)


# Downloads


@contextmanager
def serving(body: bytes, announced: int | None = None):
    """The address of a web server on this machine that answers everything with ``body``."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(announced or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


BODY = bytes(range(256)) * 1000


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def at(url: str) -> Source:
        return Source("things", "thing.gz", url + "thing.gz", hashlib.md5(BODY).hexdigest())

    return at


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once(tmp_path, monkeypatch, source):
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    with serving(BODY) as url:
        path = locate(source(url), None, quiet=True)
    assert path == tmp_path / "implicitopt" / "things" / "thing.gz"
    assert path.read_bytes() == BODY
    assert locate(source(url), None, quiet=True) == path  # the server is gone
    # The cache is laid out as the folder that --data names.
    assert locate(source(url), tmp_path / "implicitopt", quiet=True) == path


def test_a_truncated_download_is_an_error_and_leaves_nothing(tmp_path, source):
    with serving(BODY[:-1000]) as url:
        with pytest.raises(ValueError, match=r"thing\.gz is damaged.*--data") as raised:
            download(source(url), tmp_path, quiet=True)
        assert url in str(raised.value)
    assert files_in(tmp_path) == []


def test_a_broken_connection_is_an_error_and_leaves_nothing(tmp_path, source):
    refusal = pytest.raises(OSError, match=r"thing\.gz was not downloaded.*--data")
    with serving(BODY[:-1000], announced=len(BODY)) as url, refusal:
        download(source(url), tmp_path, quiet=True)
    assert files_in(tmp_path) == []
    with pytest.raises(OSError, match=r"thing\.gz was not downloaded.*--data"):
        download(source(url), tmp_path, quiet=True)  # nobody answers
    assert files_in(tmp_path) == []


def test_a_spoiled_file_in_the_cache_is_downloaded_again(tmp_path, source):
    (tmp_path / "thing.gz").write_bytes(BODY[:100])
    with serving(BODY) as url:
        assert download(source(url), tmp_path, quiet=True).read_bytes() == BODY
    assert files_in(tmp_path) == ["thing.gz"]


def test_only_a_quiet_download_is_silent(tmp_path, source, capfd):
    with serving(BODY) as url:
        download(source(url), tmp_path / "quiet", quiet=True)
        assert "".join(capfd.readouterr()) == ""
        download(source(url), tmp_path / "loud", quiet=False)
        assert "100%" in capfd.readouterr().err

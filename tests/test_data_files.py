"""MNIST's files and TensorFlow Datasets."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaccel import data
from jaxaccel.data import _files

TESTS = Path(__file__).parent
TRAIN, TEST = 5_003, 4
NAMES = {
    "train-images-idx3-ubyte": (TRAIN, 28, 28),
    "train-labels-idx1-ubyte": (TRAIN,),
    "t10k-images-idx3-ubyte": (TEST, 28, 28),
    "t10k-labels-idx1-ubyte": (TEST,),
}


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def content(name: str) -> np.ndarray:
    values = np.random.default_rng(len(name)).integers(0, 256, NAMES[name], np.uint8)
    return values if values.ndim == 3 else values % 10


def write_mnist(folder: Path, compressed: bool = False, dot: bool = False) -> Path:
    for name in NAMES:
        file = idx(content(name))
        path = folder / (name.replace("-idx", ".idx") if dot else name)
        if compressed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(file, 1))
        else:
            path.write_bytes(file)
    return folder


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_mnist_reads_every_byte(tmp_path, compressed, dot):
    train, validation, test = data.mnist(write_mnist(tmp_path, compressed, dot))
    image, label = (content(name) for name in list(NAMES)[:2])
    np.testing.assert_array_equal(train.image[..., 0], image[:3])
    np.testing.assert_array_equal(validation.image[..., 0], image[3:])
    np.testing.assert_array_equal(np.concatenate([train.label, validation.label]), label)
    np.testing.assert_array_equal(test.image[..., 0], content("t10k-images-idx3-ubyte"))
    np.testing.assert_array_equal(test.label, content("t10k-labels-idx1-ubyte"))


def test_mnist_names_the_missing_file(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    message = (
        r"/t10k-labels-idx1-ubyte: no such file; expected it, or \['t10k-labels-idx1-ubyte\.gz', "
        r"'t10k-labels\.idx1-ubyte', 't10k-labels\.idx1-ubyte\.gz'\]$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        data.mnist(tmp_path)


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        (IMAGES, b"", rf"/{IMAGES}: starts with nothing; expected the IDX magic 00000803"),
        (
            IMAGES,
            b"<html>",
            r": starts with 3c68746d; expected the IDX magic 00000803 \(bytes, 3 d",
        ),
        (LABELS, idx(np.zeros((4, 28, 28))), rf"/{LABELS}: starts with 00000803; .* 00000801"),
        (IMAGES, idx(np.zeros((4, 28, 27), np.uint8)), r": images are \(28, 27\); .* \(28, 28\)$"),
        (IMAGES, idx(np.zeros((4, 28, 29), np.uint8)), r": header says \(4, 28, 29\); .* 28x28$"),
        (IMAGES, idx(content(IMAGES))[:-1], r": 3151 bytes; expected 3152 for \(4, 28, 28\)$"),
        (IMAGES, idx(content(IMAGES)) + b"0", r": 3153 bytes; expected 3152 for \(4, 28, 28\)$"),
        (LABELS, idx(np.zeros(3, np.uint8)), r": 3 labels; expected as many as the 4 images of "),
        (LABELS, idx(np.full(4, 10, np.uint8)), r": label 10; expected 0\.\.9$"),
    ],
)
def test_mnist_refuses_a_wrong_file(tmp_path, name, file, message):
    (write_mnist(tmp_path) / name).write_bytes(file)
    with pytest.raises(ValueError, match=message):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"plain bytes", r"\.gz: not a whole gzip file \(Not a gzipped file .*\); fetch it again$"),
        (gzip.compress(idx(content(IMAGES)))[:-30], r": not a whole gzip file \(.*\); fetch"),
        (gzip.compress(idx(content(IMAGES))[:-1]), r": 3135 bytes after the header; expected 3136"),
        (
            gzip.compress(idx(content(IMAGES)) + b"0"),
            r": more bytes after the header; expected 3136",
        ),
    ],
)
def test_mnist_refuses_a_wrong_gzip_file(tmp_path, file, message):
    (write_mnist(tmp_path, compressed=True) / f"{IMAGES}.gz").write_bytes(file)
    with pytest.raises(ValueError, match=message):
        data.mnist(tmp_path)


def test_mnist_needs_more_than_the_validation_images(tmp_path):
    write_mnist(tmp_path)
    for name in list(NAMES)[:2]:
        (tmp_path / name).write_bytes(idx(content(name)[:5000]))
    with pytest.raises(ValueError, match=r": 5000 training images; expected more than the 5000 "):
        data.mnist(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_lying_header_costs_no_memory(tmp_path, compressed):
    lie = bytes((0, 0, 8, 3)) + (1_900_000).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    path = tmp_path / ("lie.gz" if compressed else "lie")
    path.write_bytes(gzip.compress(lie) if compressed else lie)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"expected \d+ for \(1900000, 28, 28\)"):
        _files._read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    path.write_bytes(gzip.compress(b"\0\0\x08\3" + b"\xff" * 12) if compressed else lie)
    with pytest.raises(ValueError, match=r"header says|bytes; expected"):
        _files._read_idx(path, 3)


def test_a_gzip_bomb_is_read_no_further_than_its_header(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((2, 28, 28), np.uint8)) + bytes(64 << 20), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"more bytes after the header; expected 1568"):
        _files._read_idx(path, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("suffix", ["", ".gz"])
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 400),
    header_only=st.booleans(),
)
def test_mutated_files_give_the_array_or_a_clear_error(
    tmp_path_factory, suffix, edits, cut, header_only
):
    image = (np.arange(6 * 5 * 4) % 256).astype(np.uint8).reshape(6, 5, 4)
    whole = bytearray(gzip.compress(idx(image), mtime=0) if suffix else idx(image))
    for place, value in edits:
        whole[place % (16 if header_only else len(whole))] = value
    path = tmp_path_factory.mktemp("idx") / f"images{suffix}"
    path.write_bytes(whole[: len(whole) - cut // 4])
    found = read_or_message(path)
    if isinstance(found, str):
        assert str(path) in found
        assert "\n" not in found
    else:
        assert (found.dtype, found.ndim) == (np.uint8, 3)
        # What is read stands behind the header, or inflates by deflate's limit at most.
        assert found.size <= (1032 * len(whole) if suffix else len(whole) - 16)


def read_or_message(path: Path) -> np.ndarray | str:
    try:
        return _files._read_idx(path, 3)
    except (ValueError, OSError) as error:
        return str(error)


def python(*lines: str) -> subprocess.CompletedProcess[str]:
    """Runs lines in a process that has no TensorFlow."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "\n".join(("import without_tensorflow; without_tensorflow.hide()", *lines)),
        ],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    done = python("import tfds_digits", f"tfds_digits.prepare({str(folder)!r})")
    assert done.returncode == 0, done.stderr
    # Writing another format would take TensorFlow; claiming one does not.
    shutil.copytree(folder / "tensor_digits", folder / "tfrecord" / "tensor_digits")
    info = folder / "tfrecord" / "tensor_digits" / "1.2.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    return folder


@pytest.mark.parametrize("name", ["tensor_digits", "tensor_digits:1.2.0", "png_digits"])
def test_tfds_reads_every_image_without_tensorflow(prepared, name):
    done = python(
        "import json, sys",
        "from jaxaccel import data",
        f"source = data.tfds({name!r}, 'test', {str(prepared)!r})",
        "both = data.to_arrays(source)",
        "rows = [(row['image'].tolist(), int(row['label'])) for row in source]",
        "assert rows == [(row['image'].tolist(), int(row['label'])) for row in both]",
        "assert source[-1]['label'] == rows[-1][1] and str(both.image.dtype) == 'uint8'",
        "print(json.dumps([rows, 'tensorflow' in sys.modules]))",
    )
    assert done.returncode == 0, done.stderr
    rows, tensorflow = json.loads(done.stdout)
    assert not tensorflow
    # TFDS shuffles what it writes; the first pixel of the picture is its row.
    expected = {
        row: (np.arange(30).reshape(6, 5, 1) * 7 + row).astype(np.uint8) for row in range(100, 120)
    }
    found = {image[0][0][0]: np.array(image) for image, _ in rows}
    assert len(rows) == len(found) == 20
    for row, picture in expected.items():
        np.testing.assert_array_equal(found[row], picture)
    assert all(label == image[0][0][0] % 10 for image, label in rows)


def test_tfds_takes_the_latest_version(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.11"):
        (tmp_path / "digits" / version).mkdir(parents=True)
        (tmp_path / "digits" / version / "features.json").touch()
    (tmp_path / "digits" / "2.0.0").mkdir()  # begun and not finished
    for name, version in {"": "1.10.0", ":1.2.11": "1.2.11", ":1.*.0": "1.10.0"}.items():
        found = _files._prepared(tmp_path, f"digits{name}", "command")
        assert found == tmp_path / "digits" / version


REFUSED = {
    "data.tfds('absent', 'train', FOLDER)": (
        "FileNotFoundError: absent is not prepared in FOLDER; run tfds build absent --data_dir "
        "FOLDER --file_format array_record (which needs TensorFlow; reading does not)"
    ),
    "data.tfds('tensor_digits:2.0.0', 'train', FOLDER)": (
        "FileNotFoundError: tensor_digits:2.0.0 is not prepared in FOLDER; run tfds build"
    ),
    "data.tfds('tensor_digits', 'train', FOLDER + '/tfrecord')": (
        "ValueError: tensor_digits in FOLDER/tfrecord has no random access; run tfds build "
        "tensor_digits --overwrite --data_dir FOLDER/tfrecord --file_format array_record"
    ),
    "data.tfds('tensor_digits', 'valid', FOLDER)": "ValueError: Unknown split 'valid'",
    "data.tfds('tensor_digits', 'train', FOLDER)[20]": "IndexError: row 20 of 20",
    "_files._image_and_label('x', Info)": (
        "ValueError: x has features ['audio'] and supervised keys None; expected image and label, "
        "or a pair of keys"
    ),
}


@pytest.fixture(scope="module")
def refusals(prepared) -> list[str]:
    """What each call of REFUSED raises, from one process."""
    done = python(
        "import json",
        "from jaxaccel import data",
        "from jaxaccel.data import _files",
        "class Info: features, supervised_keys = {'audio': 0}, None",
        f"FOLDER, found = {str(prepared)!r}, []",
        f"for call in {list(REFUSED)!r}:",
        "    try: found.append(repr(eval(call)))",
        "    except Exception as error: found.append(f'{type(error).__name__}: {error}')",
        "print(json.dumps(found))",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=list(REFUSED))
def test_tfds_says_what_is_wrong(prepared, refusals, case):
    expected = list(REFUSED.values())[case].replace("FOLDER", str(prepared))
    assert refusals[case].startswith(expected)


def test_tfds_names_the_extra():
    done = python(
        "import sys; sys.modules['tensorflow_datasets'] = None",
        "from jaxaccel import data",
        "data.tfds('mnist', 'train')",
    )
    assert "ImportError: tensorflow-datasets cannot be imported (" in done.stderr
    assert "); pip install 'jaxaccel[experiments]'" in done.stderr
    assert done.returncode == 1

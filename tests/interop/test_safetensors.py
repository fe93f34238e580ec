# SPDX-License-Identifier: Apache-2.0
import errno
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_qlora.errors import InputError
from jax_qlora.interop.safetensors import DTYPES, read_directory, read_header
from jax_qlora.interop.safetensors_write import PlannedTensor, write_directory, write_file


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=(5, 3)).astype(np.float32),
        "b.c": rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
        "d": np.arange(7, dtype=np.uint8),
        "scalar": np.array(3.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }


def planned(tensors: dict[str, np.ndarray]) -> dict[str, PlannedTensor]:
    return {
        name: PlannedTensor(dtype=x.dtype, shape=x.shape, make=lambda x=x: x)
        for name, x in tensors.items()
    }


def raw_file(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        np.testing.assert_array_equal(got[name], x)


def test_reads_what_the_reference_library_wrote(tmp_path: Path):
    save_file(arrays(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert_same({name: t.read() for name, t in header.items()}, arrays())


def test_the_reference_library_reads_what_was_written(tmp_path: Path):
    write_file(tmp_path / "x.safetensors", planned(arrays()), metadata={"format": "pt"})
    assert_same(load_file(tmp_path / "x.safetensors"), arrays())
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


def test_rows_can_be_read_alone(tmp_path: Path):
    save_file(arrays(), tmp_path / "x.safetensors")
    tensor, whole = read_header(tmp_path / "x.safetensors")["a"], arrays()["a"]
    np.testing.assert_array_equal(tensor.read(1, 3), whole[1:3])
    np.testing.assert_array_equal(tensor.read(4), whole[4:])
    assert tensor.read(2, 2).shape == (0, 3)
    assert tensor.read().ctypes.data % 64 == 0


def test_sharded_directory_round_trip(tmp_path: Path):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}
    write_directory(tmp_path, planned(tensors), max_shard_bytes=80)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names[:3] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names[3] == "model.safetensors.index.json"
    assert_same({name: t.read() for name, t in read_directory(tmp_path).items()}, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(arrays(), tmp_path / "blobs" / "123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "123")
    assert set(read_directory(tmp_path / "snapshot")) == set(arrays())


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": ENTRY}, b"1234", None, "tensor 'a' ends at byte .* of"),
        ({"a": ENTRY}, b"12345678rest", None, "its tensors end at byte"),
        ({"a": ENTRY}, b"", 10**9, "its header does not fit in its"),
        (b"{nonsense", b"", None, "its header is no JSON"),
        (b'{"a": 1, "a": 2}', b"", None, "a name occurs twice"),
        (b"[1]", b"", None, "its header is no JSON object"),
        (b"[" * 200_000, b"", None, "its header is no JSON"),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", None, "tensor 'b' starts at byte .*, not"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"123412345678", None, "'a' starts at byte"),
        ({"a": {"dtype": "F32"}}, b"", None, "the entry of 'a' is"),
        ({"a": {**ENTRY, "dtype": []}}, b"12345678", None, "the entry of 'a' is"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"12345678", None, "the entry of 'a' is"),
        ({"a": {**ENTRY, "shape": [3]}}, b"12345678", None, r"F32 \[3\] needs 12 bytes and has 8"),
        ({"a": {**ENTRY, "dtype": "F8_E4M3"}}, b"12345678", None, "dtype F8_E4M3, which is not"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
):
    file = raw_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(InputError, match=message) as caught:
        read_header(file)
    assert "x.safetensors" in str(caught.value)


def test_missing_and_short_files_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="No file '.*x.safetensors'"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"123")
    with pytest.raises(InputError, match="does not fit in its 3 bytes"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(InputError, match="d.safetensors' cannot be read"):
        read_header(tmp_path / "d.safetensors")


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_file({"a": np.ones(100, np.float32)}, file)
    tensor = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated: tensor 'a' needs 400 bytes, found 392"):
        tensor.read()
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        tensor.read()


def test_a_directory_without_weights(tmp_path: Path):
    with pytest.raises(InputError, match="No weights in '.*': expected model.safetensors"):
        read_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle, which can run code"):
        read_directory(tmp_path)


def sharded(directory: Path) -> Path:
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(3)}
    write_directory(directory, planned(tensors), max_shard_bytes=80)
    return directory / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x", "..\\x", "", ".."])
def test_an_index_never_points_outside_its_directory(tmp_path: Path, name: str):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["t0"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected plain names of files in the same directory"):
        read_directory(tmp_path)


def test_an_index_that_contradicts_its_shards(tmp_path: Path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    for change, message in [
        ({"t9": "model-00001-of-00002.safetensors"}, "'t9' is in .*, which does not hold it"),
        ({"t0": "model-00003-of-00002.safetensors"}, "No file '.*model-00003-of-00002"),
    ]:
        changed = {"weight_map": content["weight_map"] | change}
        index.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            read_directory(tmp_path)
    content["weight_map"].pop("t0")
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="holds tensor 't0', which .* does not list"):
        read_directory(tmp_path)
    for text in ("{}", "[" * 200_000, '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(InputError, match="is no index of shards"):
            read_directory(tmp_path)


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_file(arrays(), file)

    def full() -> np.ndarray:
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = planned(arrays(1)) | {
        "z": PlannedTensor(dtype=np.dtype(np.float32), shape=(2,), make=full)
    }
    with pytest.raises(InputError, match="cannot be written: No space left on device. It needs"):
        write_file(file, tensors, metadata=None)
    assert_same(load_file(file), arrays())
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


def test_dtypes_have_the_sizes_of_the_format():
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == sizes | {
        "I8": 1, "U8": 1, "BOOL": 1,
    }  # fmt: skip

"""Random bytes where a checkpoint should be: always a CheckpointError or a valid reading, in bounded memory."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.folder import read_index
from tpcpu.checkpoint.gguf_file import GgufFile
from tpcpu.checkpoint.header import read_header
from tpcpu.checkpoint.torch_file import TorchFile
from tpcpu.errors import CheckpointError
from tpcpu.formats import ggml

VALID = save({"a": np.arange(6, dtype=np.float32), "b.weight": np.zeros((2, 3), np.float16)})
MEMORY = 8 << 20

numbers = st.integers(-(2**70), 2**70) | st.integers(-2, 64)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "I64", "X"]) | values,
        "shape": st.lists(numbers, max_size=4) | values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "é"]) | st.text(max_size=4), entries | values)


def attempt(read, path):
    """What `read(path)` gives, or None where it refuses, as it must: by a CheckpointError that names the file."""
    tracemalloc.start()
    try:
        return read(path)
    except CheckpointError as error:
        named = str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
    assert named
    return None


def check_file(path, content):
    """Reading `content` gives tensors inside the file, or a CheckpointError that names the file."""
    path.write_bytes(content)
    header = attempt(read_header, path)
    for tensor in header.tensors if header else ():
        start = header.offsets[tensor.name]
        assert 8 <= start <= start + tensor.nbytes <= len(content)


def files(header, data, extra):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", max(0, len(text) + extra)) + text + data


class TestSafetensors:
    @given(st.binary(max_size=200))
    def test_any_bytes(self, tmp_path_factory, content):
        check_file(tmp_path_factory.getbasetemp() / "any.safetensors", content)

    @given(headers, st.binary(max_size=64), st.sampled_from([0, 0, 0, -1, 1, 1 << 40]))
    def test_any_header(self, tmp_path_factory, header, data, extra):
        check_file(tmp_path_factory.getbasetemp() / "header.safetensors", files(header, data, extra))

    @given(st.binary(max_size=80), st.binary(max_size=20))
    def test_any_text_of_the_right_length(self, tmp_path_factory, text, data):
        check_file(tmp_path_factory.getbasetemp() / "text.safetensors", files(b"{" + text, data, 0))

    @given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
    @settings(max_examples=300)
    def test_a_valid_file_with_bytes_changed(self, tmp_path_factory, changes):
        content = bytearray(VALID)
        for place, value in changes:
            content[place] = value
        check_file(tmp_path_factory.getbasetemp() / "changed.safetensors", bytes(content))

    @given(st.integers(0, len(VALID)), st.binary(max_size=10))
    def test_a_valid_file_cut_or_lengthened(self, tmp_path_factory, size, more):
        check_file(tmp_path_factory.getbasetemp() / "cut.safetensors", VALID[:size] + more)


def torch_file(pickled, *storages):
    """A zip archive as torch writes it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in (("data.pkl", pickled), *((f"data/{i}", data) for i, data in enumerate(storages))):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return content.getvalue()


TENSORS = (  # {"a": six values in rows of three, "b": the last two of them}
    b"\x80\x02}(X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(("
    b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tq\x01QK\0"
    b"K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR"
    b"X\x01\0\0\0bctorch._utils\n_rebuild_tensor_v2\n(h\x01QK\x04K\x02\x85K\x01\x85\x89NtRu."
)
VALID_TORCH = torch_file(TENSORS, np.arange(6, dtype=np.float32).tobytes())


def check_torch_file(path, content):
    path.write_bytes(content)
    file = attempt(TorchFile, path)
    for tensor in file.tensors if file else ():
        start = file.offset(tensor)
        assert start is None or 0 <= start <= start + tensor.nbytes <= len(content)
        assert file.array(tensor).nbytes == tensor.nbytes


class TestTorch:
    def test_the_valid_file(self, tmp_path):
        (tmp_path / "valid.bin").write_bytes(VALID_TORCH)
        file = TorchFile(tmp_path / "valid.bin")
        found = {tensor.name: file.array(tensor).tolist() for tensor in file.tensors}
        assert found == {"a": [[0, 1, 2], [3, 4, 5]], "b": [4, 5]}

    @given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]))
    def test_any_bytes(self, tmp_path_factory, content, before):
        check_torch_file(tmp_path_factory.getbasetemp() / "any.bin", before + content)

    @given(st.binary(max_size=80))
    def test_any_pickle(self, tmp_path_factory, content):
        check_torch_file(tmp_path_factory.getbasetemp() / "pickle.bin", torch_file(b"\x80\x02" + content))

    @given(st.lists(st.tuples(st.integers(2, len(TENSORS) - 1), st.integers(0, 255)), min_size=1, max_size=4))
    @settings(max_examples=300)
    def test_a_valid_pickle_with_bytes_changed(self, tmp_path_factory, changes):
        content = bytearray(TENSORS)
        for place, value in changes:
            content[place] = value
        file = torch_file(bytes(content), bytes(24))
        check_torch_file(tmp_path_factory.getbasetemp() / "changed-pickle.bin", file)

    @given(st.lists(st.tuples(st.integers(0, len(VALID_TORCH) - 1), st.integers(0, 255)), min_size=1, max_size=4))
    @settings(max_examples=300)
    @example([(VALID_TORCH.index(b"PK\x01\x02") + 23, 1)])  # 16 MB more, by the directory
    def test_a_valid_file_with_bytes_changed(self, tmp_path_factory, changes):
        content = bytearray(VALID_TORCH)
        for place, value in changes:
            content[place] = value
        check_torch_file(tmp_path_factory.getbasetemp() / "changed.bin", bytes(content))

    @given(st.integers(0, len(VALID_TORCH)), st.binary(max_size=10))
    def test_a_valid_file_cut_or_lengthened(self, tmp_path_factory, size, more):
        check_torch_file(tmp_path_factory.getbasetemp() / "cut.bin", VALID_TORCH[:size] + more)


def gguf_text(value):
    return struct.pack("<Q", len(value)) + value


def gguf_file(tensors=2, entries=3):
    """Two tensors, and metadata of a number, a text and lists."""
    metadata = (
        gguf_text(b"general.alignment") + struct.pack("<II", 4, 32)
        + gguf_text(b"t.name") + struct.pack("<I", 8) + gguf_text(b"tiny")
        + gguf_text(b"t.list") + struct.pack("<IIQ", 9, 8, 2) + gguf_text(b"a") + gguf_text(b"b")
    )  # fmt: skip
    described = (
        gguf_text(b"x") + struct.pack("<IQQIQ", 2, 32, 2, 2, 0)  # Q4_0, 2 x 32
        + gguf_text(b"y") + struct.pack("<IQIQ", 1, 4, 0, 64)  # F32, 4
    )  # fmt: skip
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + metadata + described
    return header + bytes(-len(header) % 32) + bytes(80)


VALID_GGUF = gguf_file()
GGUF_SIZES = {number: (kind.name, kind.weights, kind.nbytes) for number, kind in ggml.TYPES.items()}


def check_gguf(path, content):
    path.write_bytes(content)
    file = attempt(lambda path: GgufFile(path, GGUF_SIZES), path)
    for tensor in file.tensors if file else ():
        assert 0 <= file.offset(tensor) <= file.offset(tensor) + tensor.nbytes <= len(content)
        assert file.array(tensor).nbytes == tensor.nbytes


class TestGguf:
    def test_the_valid_file(self, tmp_path):
        (tmp_path / "valid.gguf").write_bytes(VALID_GGUF)
        file = GgufFile(tmp_path / "valid.gguf", GGUF_SIZES)
        assert file.metadata == {"general.alignment": 32, "t.name": "tiny", "t.list": ["a", "b"]}
        assert [(each.name, each.dtype, each.shape, each.nbytes) for each in file.tensors] == [
            ("x", "Q4_0", (2, 32), 36), ("y", "F32", (4,), 16),
        ]  # fmt: skip

    @given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF", VALID_GGUF[:24]]))
    def test_any_bytes(self, tmp_path_factory, content, before):
        check_gguf(tmp_path_factory.getbasetemp() / "any.gguf", before + content)

    @given(st.lists(st.tuples(st.integers(0, len(VALID_GGUF) - 81), st.integers(0, 255)), min_size=1, max_size=5))
    @settings(max_examples=400)
    def test_a_valid_file_with_bytes_changed(self, tmp_path_factory, changes):
        content = bytearray(VALID_GGUF)
        for place, value in changes:
            content[place] = value
        check_gguf(tmp_path_factory.getbasetemp() / "changed.gguf", bytes(content))

    @given(numbers, numbers)
    def test_any_counts(self, tmp_path_factory, tensors, entries):
        file = gguf_file(tensors % 2**64, entries % 2**64)
        check_gguf(tmp_path_factory.getbasetemp() / "counts.gguf", file)

    @given(st.integers(0, len(VALID_GGUF)), st.binary(max_size=10))
    def test_a_valid_file_cut_or_lengthened(self, tmp_path_factory, size, more):
        check_gguf(tmp_path_factory.getbasetemp() / "cut.gguf", VALID_GGUF[:size] + more)


def check_index(path, content):
    path.write_bytes(content)
    weight_map = attempt(read_index, path)
    assert weight_map is None or weight_map
    for file in (weight_map or {}).values():
        assert "/" not in file
        assert file not in (".", "..")


class TestIndex:
    @given(st.binary(max_size=200))
    def test_any_bytes(self, tmp_path_factory, content):
        check_index(tmp_path_factory.getbasetemp() / "any.index.json", content)

    @given(st.dictionaries(st.just("weight_map") | st.text(max_size=5), st.dictionaries(st.text(), values) | values))
    def test_any_json(self, tmp_path_factory, value):
        check_index(tmp_path_factory.getbasetemp() / "json.index.json", json.dumps(value).encode())

    @given(st.dictionaries(st.text(min_size=1), st.text().map(lambda text: text + ".safetensors"), min_size=1))
    def test_any_names_through_a_folder(self, tmp_path_factory, weight_map):
        folder = tmp_path_factory.getbasetemp() / "folder"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert attempt(Checkpoint.open, folder) is None

    def test_a_deep_one(self, tmp_path):
        check_index(tmp_path / "deep.index.json", b'{"weight_map":' + b"[" * 1_000_000)

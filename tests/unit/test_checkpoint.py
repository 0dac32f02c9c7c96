"""Reading checkpoints: what is there is read, whatever way it is stored; what is wrong is named."""

import json
import mmap
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.torch_file import TorchFile
from tpcpu.errors import CheckpointError

DATA = Path(__file__).parents[1] / "data"


def folder_with(path, tensors, name="model.safetensors", config=None):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(tensors, path / name)
    return path


def raw_file(path, header, data=b"", length=None):
    """A safetensors file by hand, which may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype="F32", shape=(2,), place=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


@pytest.fixture
def folder(tmp_path):
    return folder_with(tmp_path / "model", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})


@pytest.mark.parametrize(("model", "count"), [("yuan-tiny", 86), ("llama-tiny", 57), ("stories260k", 47)])
def test_bundled_models(model, count):
    with Checkpoint.open(DATA / model) as checkpoint:
        assert len(checkpoint.tensors) == count
        assert checkpoint.config["model_type"] in ("yuan", "llama")
        assert checkpoint.generation_config
        tensor = checkpoint.tensors["model.embed_tokens.weight"]
        assert checkpoint.array(tensor.name).shape == tensor.shape
        assert tensor.nbytes == checkpoint.array(tensor.name).nbytes


def test_dtypes_and_values(tmp_path):
    tensors = {
        dtype.__name__: np.arange(8).reshape(2, 2, 2).astype(dtype)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int8, np.int64, np.bool_)
    }
    tensors["scalar"] = np.array(3.0, np.float32)
    tensors["empty"] = np.zeros((0, 4), np.float32)
    checkpoint = Checkpoint.open(folder_with(tmp_path / "m", tensors))
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        found = checkpoint.array(name)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert np.array_equal(found, expected)
        assert not found.flags.writeable
        with pytest.raises(ValueError):
            found[...] = 0


def test_views_copy_nothing_and_outlive_the_checkpoint(folder):
    with Checkpoint.open(folder) as checkpoint:
        view = checkpoint.array("a")
        base = view
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert view[1, 2] == 5
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.array("a")


def test_released_pages_are_read_again(tmp_path):
    values = np.arange(1 << 16, dtype=np.float32)
    with Checkpoint.open(folder_with(tmp_path / "m", {"a": values, "b": values + 1})) as checkpoint:
        for name, expected in (("a", values), ("b", values + 1)):
            view = checkpoint.array(name)
            assert np.array_equal(view, expected)
            checkpoint.release(name)
            checkpoint.release(name, 5, 9000)
            checkpoint.prefetch(name)
            assert np.array_equal(view, expected)


def test_an_unknown_tensor_is_named(folder):
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="tensor b is missing"):
        checkpoint.array("b")


def test_a_dtype_that_numpy_lacks_is_an_error_only_when_read(tmp_path):
    folder = folder_with(tmp_path / "m", {"a": np.zeros(2, np.float32)})
    raw_file(folder / "model.safetensors", {"a": entry("F4", (2,), (0, 1))}, b"\0")
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors["a"].dtype == "F4"
        with pytest.raises(CheckpointError, match="tensor a is F4"):
            checkpoint.array("a")


# ---- files that are wrong

HEADERS = {
    "empty": (None, b"", 0, "too few"),
    "header too long": (b"{}", b"", 1 << 62, "format allows"),
    "header longer than the file": (b"{}", b"", 500, "truncated"),
    "not JSON": (b"hello", b"", None, "not JSON"),
    "JSON that breaks off": (b'{"a": {"dtype"', b"", None, "not JSON"),
    "deep JSON": (b'{"a":' + b"[" * 100_000, b"", None, "not JSON"),
    "a list": (b"[]", b"", None, "expected a JSON object, found list"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "duplicate names": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        None,
        "'a' stands twice",
    ),
    "bare lists": (b'{"a":["F32",[2],[0,8]]}', bytes(8), None, "'a' is not a JSON object"),
    "overlap": ({"a": entry(), "b": entry(place=(4, 12))}, bytes(12), None, "'b' begins at byte 4 .* overlap"),
    "hole": ({"a": entry(), "b": entry(place=(12, 20))}, bytes(20), None, "'b' begins at byte 12 .* hole"),
    "outside the file": ({"a": entry()}, bytes(4), None, "'a' ends at byte 8 .* outside the file"),
    "bytes left over": ({"a": entry()}, bytes(9), None, "1 bytes after tensor 'a'"),
    "unknown dtype": ({"a": entry("F99")}, bytes(8), None, "F99"),
    "wrong dtype": ({"a": entry("F64")}, bytes(8), None, "'a': F64 of shape .2. needs 16 bytes"),
    "negative size": ({"a": entry(shape=(-2,))}, bytes(8), None, "'a' has the shape"),
    "huge size": ({"a": entry(shape=(1 << 60, 1 << 60))}, bytes(8), None, "'a'"),
    "backwards": ({"a": entry(place=(8, 0))}, bytes(8), None, "'a'"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "'a' is not of the form"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_corrupt_files_are_named(folder, case):
    header, data, length, message = HEADERS[case]
    file = folder / "model.safetensors"
    if header is None:
        file.write_bytes(b"")
    else:
        raw_file(file, header, data, length)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(folder)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_truncation_is_found(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)


def test_a_long_header_is_not_read_into_memory(folder):
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 1 << 33))
        file.truncate((1 << 33) + 100)  # sparse: no disk is used
    with pytest.raises(CheckpointError, match="format allows"):
        Checkpoint.open(folder)


# ---- folders that are wrong


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("[]", "found list"), ("{", "not JSON"), ('{"a":1,"a":2}', "twice")])
def test_a_config_that_is_no_object(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found neither"):
        Checkpoint.open(folder)
    save_file({"a": np.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors but no index"):
        Checkpoint.open(folder)


@pytest.fixture
def sharded(tmp_path):
    folder = folder_with(tmp_path / "sharded", {"a": np.zeros(2, np.float32)}, "model-00001-of-00002.safetensors")
    save_file({"b": np.ones(2, np.float32)}, folder / "model-00002-of-00002.safetensors")

    def index(weight_map):
        text = json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
        return folder

    return index


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards(sharded):
    with Checkpoint.open(sharded({"a": FIRST, "b": SECOND})) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.array("b")[0] == 1
        assert [file.name for file in checkpoint.files] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": "model-00003.safetensors"}, r"not there: 'model-00003\.safetensors'"),
        ({"a": FIRST, "b": FIRST}, "tensor b is missing"),
        ({"a": "../model.safetensors"}, "a file of the same folder"),
        ({"a": "/etc/passwd"}, "a file of the same folder"),
        ({"a": "config.json"}, r"expected \.safetensors"),
        ({"a": "nul\0.safetensors"}, "a file of the same folder"),
        ({"a": "\ud800.safetensors"}, "not there"),
        ({"a": "x" * 300 + ".safetensors"}, "a file of the same folder"),
        ({"a": 5}, "a file of the same folder"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_indexes_that_are_wrong(sharded, weight_map, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(sharded(weight_map))
    assert "sharded" in str(error.value)


def test_a_tensor_in_two_files(sharded):
    folder = sharded({"a": FIRST, "b": SECOND})
    both = {"b": np.ones(2, np.float32), "c": np.full(2, 7, np.float32)}
    save_file({"a": np.zeros(2, np.float32), "c": np.zeros(2, np.float32)}, folder / FIRST)
    save_file(both, folder / SECOND)
    with pytest.raises(CheckpointError, match=r"tensor c is in .* and in"):
        Checkpoint.open(folder)
    sharded({"a": FIRST, "b": SECOND, "c": SECOND})
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.array("c")[0] == 7


# ---- hub names


def test_hub_names_are_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--name"
    for revision in ("abc", "def"):
        (model / "snapshots" / revision).mkdir(parents=True)
        folder_with(model / "snapshots" / revision, {"a": np.full(1, revision == "def", np.float32)})
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        Checkpoint.open("owner/name")  # two revisions, and no word which
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("def")
    with Checkpoint.open("owner/name") as checkpoint:
        assert checkpoint.array("a")[0] == 1
    (model / "refs" / "main").write_text("../../../outside")
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        Checkpoint.open("owner/name")
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        Checkpoint.open("owner/other")


# ---- torch files


@pytest.fixture
def torch_folder(tmp_path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return torch, folder


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
def test_torch_file(torch_folder, old):
    torch, folder = torch_folder
    embedding = torch.randn(8, 64).to(torch.bfloat16)
    tensors = {
        "embedding": embedding,
        "head": embedding,  # tied: one storage under two names
        "half": torch.randn(3).half(),
        "turned": torch.randn(4, 6).t(),
        "slice": torch.arange(10.0)[2:5],
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "byte": torch.arange(7, dtype=torch.uint8),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
    }
    layer = torch.nn.Linear(3, 2)
    state = layer.state_dict()  # an ordered dictionary with an attribute
    state.update(tensors)
    tensors |= {"weight": layer.weight, "bias": layer.bias}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors["embedding"].dtype == "BF16"
        for name, tensor in tensors.items():
            found = checkpoint.array(name)
            assert found.shape == tuple(tensor.shape)
            assert not found.flags.writeable
            theirs = tensor.detach().float().numpy()
            assert np.array_equal(found.astype(np.float32), theirs)
            checkpoint.release(name)
            assert np.array_equal(found.astype(np.float32), theirs)
            if checkpoint.is_mapped(name) and found.size:
                file, start = checkpoint.place(name)
                assert file.read_bytes()[start : start + found.nbytes] == found.tobytes()
        assert not checkpoint.is_mapped("turned")
        assert checkpoint.place("turned") is None


def test_torch_shards(torch_folder):
    torch, folder = torch_folder
    weight_map = {}
    for i in (1, 2):
        name = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({f"w{i}": torch.full((2,), float(i))}, folder / name)
        weight_map[f"w{i}"] = name
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.array("w2").tolist() == [2, 2]


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def test_a_hostile_pickle_is_refused_and_not_executed(torch_folder, tmp_path):
    torch, folder = torch_folder
    trace, file = tmp_path / "trace", folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1), "b": Hostile(trace)}, folder / "pytorch_model.bin")
    for old in (False, True):
        torch.save({"a": torch.zeros(1), "b": Hostile(trace)}, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match=r"Path.*write_text|getattr|pathlib.*nothing was executed") as error:
            Checkpoint.open(folder)
        assert str(file) in str(error.value)
        assert not trace.exists()


def pickled(*opcodes):
    return b"\x80\x02" + b"".join(opcodes) + b"."


CODE = {
    "a function": (pickled(b"cos\nsystem\n(X\x02\0\0\0lstR"), "os.system"),
    "a built-in function": (pickled(b"c__builtin__\neval\n(X\x01\0\0\x001tR"), "__builtin__.eval"),
    "a function of torch": (pickled(b"ctorch.hub\nload\n(X\x01\0\0\0atR"), "torch.hub.load"),
    "a class by the old opcode": (pickled(b"(ios\nsystem\n"), "opcode INST"),
    "an object": (pickled(b"(ctorch\nSize\no"), "opcode OBJ"),
    "a new object": (pickled(b"ctorch\nSize\n)\x81"), "opcode NEWOBJ"),
    "an extension": (pickled(b"\x82\x01"), "opcode EXT1"),
    "state of a function": (
        pickled(b"}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n}X\x08\0\0\0__name__K\x01sbs"),
        "entry 'a' is a function",
    ),
    "what is called is no function": (pickled(b"K\x01)R"), "no pickle of weights"),
    "tuples of tuples as a key": (pickled(b"})", b"q\0h\0\x86q\0" * 70, b"K\x01s"), "a key that is a tuple"),
    "tuples of tuples as a shape": (
        pickled(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0)", b"q\0h\0\x86q\0" * 70, b")tR"), "no tuples of sizes"),
    "a length beyond the file": (pickled(b"X\xff\xff\xff\x7f"), "no pickle of weights"),
    "a reference far away": (pickled(b"]r\xff\xff\xff\xff"), "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", CODE)
def test_pickles_that_are_no_weights(tmp_path, case):
    content, message = CODE[case]
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(CheckpointError, match=message) as error:
        TorchFile(file)
    assert str(file) in str(error.value)


def test_torch_files_that_are_wrong(torch_folder):
    torch, folder = torch_folder
    file = folder / "pytorch_model.bin"
    for content in (b"", b"no zip", pickle.dumps({"a": 1}), pickle.dumps({"a": 1}, protocol=2), b"PK\x03\x04"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"no torch file|no pickle of weights|something else|zip") as error:
            Checkpoint.open(folder)
        assert "\n" not in str(error.value)
    for entries, compression, message in (
        ({"archive/data.pkl": b"\x80\x02garbage"}, zipfile.ZIP_STORED, "opcode GET"),
        ({"archive/data.pkl": pickle.dumps({})}, zipfile.ZIP_DEFLATED, "compressed"),
        ({"archive/data.pkl": pickle.dumps({}), "archive/byteorder": b"big"}, zipfile.ZIP_STORED, "byte order"),
        ({"archive/version": b"3"}, zipfile.ZIP_STORED, "0 descriptions"),
    ):
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(folder)
    for content, message in (
        ([1], "holds a list"),
        ({"a": 1}, "entry 'a' is a int"),
        ({1: torch.zeros(1)}, "entry 1"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "tensor a"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is a sparse tensor"),
        ({"a": torch.zeros(1, 5).expand(3, 5)}, "tensor a .* repeats values"),
    ):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(folder)
    for old in (False, True):
        torch.save({"a": torch.zeros(300), "b": torch.zeros(300)}, file, _use_new_zipfile_serialization=not old)
        file.write_bytes(file.read_bytes()[:-1300])
        with pytest.raises(CheckpointError, match=r"zip|cut short"):
            Checkpoint.open(folder)


def test_torch_files_are_read_without_torch(torch_folder):
    torch, folder = torch_folder
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom tpcpu.checkpoint import Checkpoint\n"
        "print(Checkpoint.open(sys.argv[1]).array('a'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1.]"

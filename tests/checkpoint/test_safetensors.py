"""safetensors files: the library reads what we write and the reverse; rows alone; broken files are named."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.safetensors import INDEX, Shards, TensorHeader, write_shards

TENSORS = {
    "a": torch.arange(12.0).view(4, 3), "b": torch.linspace(-1, 1, 10).to(torch.bfloat16).view(5, 2),
    "c": torch.linspace(-400, 400, 6).to(torch.float8_e4m3fn).view(2, 3), "d": torch.tensor(2.5, dtype=torch.float16),
    "e": torch.zeros(0, 3), "f": torch.tensor([1 / 3], dtype=torch.float64),
}  # fmt: skip


def same(a, b):
    bits_a, bits_b = (one.reshape(-1).view(torch.uint8) for one in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_a, bits_b)


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, TENSORS.items())
    return tmp_path


def test_the_library_reads_what_is_written(folder):
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == TENSORS.keys() and all(same(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


def test_what_the_library_writes_is_read_and_headers_cost_no_data(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    header = shards.headers["b"]
    assert header == TensorHeader("BF16", (5, 2), tmp_path / "model.safetensors", header.offset)
    assert shards.bytes_read == 0
    assert all(same(shards.read(name), tensor) for name, tensor in TENSORS.items())
    assert shards.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())


def test_rows_alone_are_all_that_is_read(folder):
    shards = Shards(folder)
    assert same(shards.read("b", slice(1, 4)), TENSORS["b"][1:4]) and shards.bytes_read == 3 * 2 * 2
    assert same(shards.read("c", slice(1, 2)), TENSORS["c"][1:2]) and shards.bytes_read == 12 + 3


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.lists(st.integers(1, 400), min_size=1, max_size=3))
def test_resharding_never_changes_a_byte(tmp_path_factory, sizes, limits):
    tensors = {f"t{i}": torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)}
    source = tensors
    for limit in limits:
        folder = tmp_path_factory.mktemp("shards")
        write_shards(folder, source.items(), limit)
        shards = Shards(folder)
        assert list(source) == list(tensors) and shards.headers.keys() == tensors.keys()
        files = sorted(folder.glob("*.safetensors"))
        held = [[tensors[name].nbytes for name, each in shards.headers.items() if each.file == file] for file in files]
        assert all(sum(part) <= limit or len(part) == 1 for part in held) and all(held)
        if len(files) > 1:
            index = json.loads((folder / INDEX).read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
            assert index["weight_map"] == {name: header.file.name for name, header in shards.headers.items()}
            assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
        source = {name: shards.read(name) for name in source}
        assert all(same(source[name], tensor) for name, tensor in tensors.items())


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_does_not_fit_its_files_is_named(tmp_path):
    write_shards(tmp_path, TENSORS.items(), 30)
    right = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    last, absent = right["f"], "model-00009-of-00009.safetensors"
    outside = ("../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\\b")
    cases = [
        (right | {"a": last}, f"{INDEX} says that {last} holds a, which it does not"),
        (right | {"z": last}, "holds z, which it does not"),
        (right | {"a": absent}, f"{INDEX} names {absent}, which is not there; is the download complete"),
        *((right | {"a": name}, "is no file name|link out of the folder") for name in outside),
        *((broken, "has no weight_map of tensors to files") for broken in ({}, [], {"a": 3}, None)),
    ]
    for weight_map, said in cases:
        write_index(tmp_path, weight_map)
        with pytest.raises(SlingshotError, match=said):
            Shards(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "y.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(SlingshotError, match=r"y\.safetensors: a is in x\.safetensors too"):
        Shards(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SlingshotError, match=r"holds no model\.safetensors$"):
        Shards(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SlingshotError, match=r"pytorch_model\.bin is pickled, .* and is never read: ask its maker"):
        Shards(folder)


def test_a_type_that_is_no_weight_is_named(tmp_path):
    save_file({"a": torch.ones(2, dtype=torch.int16)}, tmp_path / "model.safetensors")
    with pytest.raises(SlingshotError, match=r"model\.safetensors: a is stored as I16"):
        Shards(tmp_path).read("a")


def test_a_file_cut_after_it_was_opened_is_named(folder):
    shards = Shards(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: shards.headers["a"].offset + 5])
    with pytest.raises(SlingshotError, match=r"ends within a; is the download complete"):
        shards.read("a")


def test_a_disk_that_is_full_is_named(tmp_path):
    with pytest.raises(SlingshotError, match=r"cannot write .*; free space there or choose another --out"):
        write_shards(tmp_path / "missing", TENSORS.items())


@st.composite
def damaged(draw):
    """A sound file with bytes changed, cut or added, or with a header of its own making."""
    sound = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate("abc")}
    header = json.dumps(sound)
    if draw(st.booleans()):
        numbers = st.lists(st.integers(-(2**66), 2**66), max_size=4)
        value = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=4), st.none(), st.floats(), numbers)
        dtype = draw(st.sampled_from(["F32", "F8_E4M3", "x", 3]))
        entry = {"dtype": dtype, "shape": draw(value), "data_offsets": draw(value)}
        header = json.dumps({"a": entry} if draw(st.booleans()) else draw(value))
    if draw(st.booleans()):
        header = "[" * draw(st.integers(1, 100_000))
    length = draw(st.sampled_from([len(header), len(header) + 1, 2**63, 2**64 - 1, 99_999_999, 0]))
    content = bytearray(length.to_bytes(8, "little") + header.encode() + bytes(24))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@settings(max_examples=100)
@given(damaged())
def test_damaged_files_give_one_line_or_sound_tensors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        shards = Shards(tmp_path)
        for name, header in shards.headers.items():
            assert shards.read(name).shape == header.shape
    except SlingshotError as error:
        assert "model.safetensors" in str(error) and len(str(error)) < 500

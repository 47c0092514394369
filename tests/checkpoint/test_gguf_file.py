"""The GGUF container: what the `gguf` package writes is read alike; a header, however wrong, costs a line of error."""

import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from file_maker import finish
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.file import GGUFFile

HUGE = 2**63


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(n_tensors, n_keys, *rest, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(rest)


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name, *dimensions, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.fixture
def written(tmp_path):
    """A file with a value of every type, an alignment of its own, and tensors of three kinds."""
    writer = GGUFWriter(tmp_path / "all.gguf", "llama")
    writer.add_custom_alignment(64)
    values = {
        "uint8": 1, "int8": -1, "uint16": 2, "int16": -2, "uint32": 3, "int32": -3, "uint64": HUGE, "int64": -HUGE,
        "float32": 0.5, "float64": 0.1, "bool": True, "string": "é\n", "array": ["", "b", "ç"],
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_array("numbers", [1, 2, 3])
    numbers = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
    writer.add_tensor("f32", numbers)
    writer.add_tensor("f16", numbers.astype(np.float16).reshape(2, 3, 64))
    writer.add_tensor("q8_0", gguf.quants.quantize(numbers, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    finish(writer)
    return tmp_path / "all.gguf"


def test_keys_and_tensors_are_those_the_package_reads(written):
    file, theirs = GGUFFile(written), GGUFReader(written)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            value = file.keys[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), name
    assert file.tensors["f16"].shape == (2, 3, 64) and file.tensors["q8_0"].row_bytes == 68
    for expected in theirs.tensors:
        stored = file.tensors[expected.name]
        theirs = (expected.tensor_type, expected.data_offset, expected.n_bytes)
        assert (stored.kind, stored.offset, stored.nbytes) == theirs
        n_rows = stored.nbytes // stored.row_bytes
        assert file.read(stored, 0, n_rows).tobytes() == expected.data.tobytes()
        assert np.array_equal(file.read(stored, 2, 3), file.read(stored, 0, n_rows)[2:5])


def test_values_are_asked_for_by_type(written):
    file = GGUFFile(written)
    assert file.get("uint32", int) == 3 and file.get("absent", str, "x") == "x"
    with pytest.raises(SlingshotError, match=r"all\.gguf: the key absent is missing"):
        file.get("absent", int)
    with pytest.raises(SlingshotError, match=r"all\.gguf: bool must be of type int, got True"):
        file.get("bool", int)


def test_a_model_in_parts(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full(4, number, dtype=np.float32))
    finish(writer)
    file = GGUFFile(tmp_path / "m-00001-of-00003.gguf")
    assert list(file.tensors) == ["t0", "t1", "t2", "t3", "t4"]
    assert file.tensors["t4"].file.name == "m-00003-of-00003.gguf"
    assert file.read(file.tensors["t3"], 0, 1).view(np.float32).tolist() == [[3.0] * 4]
    first = r"give the first, whose name ends in -00001-of-00003\.gguf"
    with pytest.raises(SlingshotError, match=rf"m-00002-of-00003\.gguf is one of 3 parts; {first}"):
        GGUFFile(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(SlingshotError, match=r"cannot read .*m-00003-of-00003\.gguf: No such file"):
        GGUFFile(tmp_path / "m-00001-of-00003.gguf")


@pytest.mark.parametrize(("content", "said"), [
    (b"", "it is empty"),
    (b"GG", "it begins with b'GG', not with b'GGUF'"),
    (b"PK\3\4" + bytes(60), "not with b'GGUF'"),
    (b"GGUF", "it ends within its header"),
    (header(0, 0, version=1), "its version is 1"),
    (header(0, 0, version=3 << 24), "its version is 50331648, and 2 and 3 are read, little-endian"),
    (header(0, HUGE), "it ends within its header"),
    (header(HUGE, 0), "it ends within its header"),
    (header(0, 1, struct.pack("<Q", HUGE), bytes(64)), f"it claims {HUGE} entries where 64 bytes follow"),
    (header(0, 1, key("k", 8, struct.pack("<Q", HUGE)), bytes(64)), f"it claims {HUGE} entries"),
    (header(0, 1, key("k", 9, struct.pack("<IQ", 8, HUGE)), bytes(64)), f"it claims {HUGE} entries"),
    (header(0, 1, key("k", 9, struct.pack("<IQ", 7, HUGE)), bytes(64)), f"it claims {HUGE} entries"),
    (header(0, 1, key("k", 9, struct.pack("<IQ", 9, 1)), bytes(64)), "it has a value of the unknown type 9 of 9"),
    (header(0, 1, key("k", 77, bytes(64))), "it has a value of the unknown type 77"),
    (header(0, 2, *[key("k\n", 7, b"\1")] * 2), r"it has the key 'k\n' twice"),
    (header(0, 1, key("general.alignment", 4, struct.pack("<I", 24))), "general.alignment 24 is no power of two"),
    (header(0, 1, key("general.alignment", 4, struct.pack("<I", 0))), "general.alignment 0 is no power of two"),
    (header(0, 1, key("general.alignment", 8, text("x"))), "general.alignment 'x' is no power of two"),
    (header(0, 1, struct.pack("<Q", 1), b"\xff", bytes(20)), "can't decode byte 0xff"),
    (header(2, 0, *[tensor("t", 1)] * 2, bytes(64)), "it has the tensor 't' twice"),
    (header(1, 0, tensor("t", 1, 1, 1, 1, 1), bytes(64)), "its tensor 't' has 5 dimensions"),
    (header(1, 0, tensor("t"), bytes(64)), "its tensor 't' has 0 dimensions"),
    (header(1, 0, tensor("t", 4, 0), bytes(64)), "its tensor 't' has the shape [0, 4], impossible for F32"),
    (header(1, 0, tensor("t", 33, 2, kind=8), bytes(640)),
     "its tensor 't' has the shape [2, 33], impossible for Q8_0"),
    (header(1, 0, tensor("t", 4, kind=999), bytes(64)), "its tensor 't' is of the unknown type 999"),
    (header(1, 0, tensor("t", 99), bytes(64)), "its tensor 't' does not lie where it says"),
    (header(1, 0, tensor("t", HUGE, HUGE), bytes(64)), "its tensor 't' does not lie where it says"),
    (header(1, 0, tensor("t", 4, offset=HUGE), bytes(64)), "its tensor 't' does not lie where it says"),
    (header(1, 0, tensor("t", 4, offset=8), bytes(64)), "its tensor 't' does not lie where it says"),
])  # fmt: skip
def test_wrong_headers_are_refused_at_no_cost(tmp_path, content, said):
    (tmp_path / "m.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(SlingshotError) as error:
            GGUFFile(tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'm.gguf'} is no whole GGUF file: ")
    assert said in message and "\n" not in message


@pytest.mark.parametrize(("begins", "said"), [
    (header(0, HUGE), "it has the key '' twice"),
    (header(0, 1, key("k", 9, struct.pack("<IQ", 4, 2**30))), f"it claims {2**30} entries where 67108815 bytes follow"),
])  # fmt: skip
def test_a_header_of_any_length_is_read_no_further_than_its_limit(tmp_path, begins, said):
    path = tmp_path / "m.gguf"
    path.write_bytes(begins)
    os.truncate(path, 2**40)  # zeros that take no room: empty keys without end
    with pytest.raises(SlingshotError, match=said):
        GGUFFile(path)


def test_a_file_that_shrinks_is_no_crash(written):
    file = GGUFFile(written)
    os.truncate(written, written.stat().st_size - 500)
    with pytest.raises(SlingshotError, match=r"all\.gguf ends within its tensors"):
        file.read(file.tensors["q8_0"], 0, 6)
    written.unlink()
    with pytest.raises(SlingshotError, match=r"cannot read .*all\.gguf: No such file"):
        file.read(file.tensors["q8_0"], 0, 6)

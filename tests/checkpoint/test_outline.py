"""A checkpoint on a hub is examined by its headers alone; GGUF models come in all their parts."""

import json
from pathlib import Path

import pytest
from file_maker import finish
from gguf import GGUFReader, GGUFWriter
from hub_server import contents, same

from slingshot.checkpoint.gguf.write import write_gguf
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.load_save import load_tokenizer, open_weights
from slingshot.checkpoint.safetensors import Shards

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


LARGE = {"vocab_size": 280, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}


@pytest.mark.slow
def test_headers_are_read_without_the_weights(hub, ask, save, dense, tmp_path):
    """17 MB in four shards."""
    large = save(tmp_path / "large", dense(**LARGE), max_shard_size=5e6)
    hub.commit("org/name", contents(large) | {"modeling.py": b"x"})
    sizes = {file.name: file.stat().st_size for file in large.iterdir()}
    local = {name: [each.dtype, list(each.shape), each.file.name] for name, each in Shards(large).headers.items()}
    outlined = [local, sizes | {"modeling.py": 0}]
    assert ask.one("headers", "org/name") == outlined
    weights = [name for name in sizes if name.endswith(".safetensors")]
    assert sum(sizes[name] for name in weights) > 16e6 and hub.served() < 0.04 * 16e6
    assert {request.range for request in hub.log if request.path.endswith(".safetensors")} == {"bytes=0-99999"}
    facts = ask.one("examine", "org/name")
    assert (facts["kind"], facts["problems"], facts["files"]["files"]) == ("hub", [], 4)
    assert facts["notes"] == ["org/name: modeling.py is a program, and is never run"]
    hub.ranges, hub.stall = False, set(weights)  # whole files are begun and never ended: the header is enough
    assert ask.one("headers", "org/name") == outlined
    hub.ranges, hub.stall = True, set()
    hub.log.clear()
    folder = Path(ask.one("locate", "org/name"))
    assert set(hub.bodies()) == set(weights) and sizes.keys() == contents(folder).keys()
    assert ask.one("headers", "org/name", HF_HUB_OFFLINE="1") == [local, sizes]


@pytest.mark.slow
def test_a_header_longer_than_the_first_range_is_read_to_its_end(hub, ask):
    entry = {"dtype": "BF16", "shape": [0, 3], "data_offsets": [0, 0]}
    content = json.dumps({f"model.layers.{number}.weight": entry for number in range(2000)}).encode()
    assert len(content) > 100_000
    hub.commit("org/name", {"config.json": b"{}", SINGLE: len(content).to_bytes(8, "little") + content})
    headers, _ = ask.one("headers", "org/name")
    assert len(headers) == 2000 and headers["model.layers.7.weight"] == ["BF16", [0, 3], SINGLE]
    asked = {request.range for request in hub.log if request.path.startswith("/storage/")}
    assert asked == {"bytes=0-99999", f"bytes=0-{len(content) + 7}"}


def parts_of(file):
    """A .gguf file as a model of three parts: all keys in the first, tensors after one another."""
    reader = GGUFReader(file)
    writer = GGUFWriter(file.with_name("p.gguf"), "llama", split_max_tensors=-(-len(reader.tensors) // 3))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)
    return {path.name: path.read_bytes() for path in sorted(file.parent.glob("p-*-of-00003.gguf"))}


@pytest.fixture(scope="module")
def packed(save, dense, tmp_path_factory):
    """17 MB with Llama 3's scaling, which is a tensor of its own, behind a header of 1.2 MB."""
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    folder = save(tmp_path_factory.mktemp("packed"), dense(**LARGE, rope_scaling=rope))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    long = settings | {"chat_template": "{# " + "x" * 1_200_000 + " #}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(long))
    write_gguf(folder / "m.gguf", open_weights(folder), load_tokenizer(folder), "float32")
    return folder / "m.gguf"


@pytest.mark.slow
def test_all_parts_of_a_gguf_model_are_fetched(hub, ask, packed):
    """Whichever of them is named; without a connection too, and never without one of them."""
    parts = parts_of(packed)
    first, second, third = parts
    hub.commit("org/packed", parts | {"other.gguf": b"x"})
    hub.commit("org/torn", {first: parts[first], third: parts[third]})
    found, again = ask("locate", f"org/packed/{first}", f"org/packed/{third}")
    assert found == again and Path(found).name == first and set(hub.bodies()) == set(parts)
    assert "fetching 3 files" in ask.said and ask.one("locate", f"org/packed/{second}", HF_HUB_OFFLINE="1") == found
    assert same(Path(found), packed)
    (Path(found).parent / second).unlink()
    refused = ask.one("locate", f"org/packed/{first}", HF_HUB_OFFLINE="1")
    assert refused.startswith(f"refused: {second} of org/packed/{first}@main is not in ")
    lacks = f"refused: org/torn holds no {second}; its .gguf files: {first}, {third}"
    assert ask.one("locate", f"org/torn/{first}") == lacks


@pytest.mark.slow
def test_a_gguf_file_is_examined_by_its_header(hub, ask, packed):
    whole, parts = examine(str(packed)), parts_of(packed)
    hub.commit("org/packed", {"m.gguf": packed.read_bytes(), **parts, "broken.gguf": b"GGUF" + b"x" * 5_000_000})
    facts = ask.one("examine", "org/packed/m.gguf")
    other = {"source": "org/packed/m.gguf", "kind": "hub", "notes": facts["notes"]}
    assert facts == json.loads(json.dumps(whole | other))
    assert facts["model"]["rope_scaling"]["factor"] == 8.0 and facts["problems"] == []
    assert hub.served() < 0.15 * packed.stat().st_size
    facts = ask.one("examine", f"org/packed/{next(iter(parts))}")
    assert facts["parameters"] == whole["parameters"] and facts["files"]["files"] == 3 and facts["problems"] == []
    assert "broken.gguf is no whole GGUF file: its version is" in ask.one("examine", "org/packed/broken.gguf")
    hub.ranges = False
    facts = ask.one("examine", "org/packed/m.gguf")
    assert facts["parameters"] == whole["parameters"] and facts["problems"] == []


def of_index(weight_map):
    return {INDEX: json.dumps({"weight_map": weight_map}).encode(), "a.safetensors": b"x" * 100}


def of_header(header, size=None):
    return {SINGLE: (len(header) if size is None else size).to_bytes(8, "little") + header}


HOSTILE = {
    "org/endless": (of_header(b"{}", 2**63), f"{SINGLE} asks for a header of {2**63 + 8} bytes, at most 25000000"),
    "org/long": (of_header(b"{}", 25_000_001), "asks for a header of 25000009 bytes"),
    "org/short": (of_header(b"{}", 1000), f"{SINGLE} is no whole safetensors file"),
    "org/empty": ({SINGLE: b""}, f"{SINGLE} is no whole safetensors file"),
    "org/deep": (of_header(b"[" * 90_000), "is no whole safetensors file"),
    "org/beyond": (of_header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'), "is no whole safet"),
    "org/climbing": (of_index({"a": "../a.safetensors"}), "has no weight_map of tensors to safetensors files"),
    "org/absolute": (of_index({"a": "/etc/passwd"}), "has no weight_map"),
    "org/pickling": (of_index({"a": "pytorch_model.bin"}), "has no weight_map"),
    "org/pattern": (of_index({"a": "*.safetensors"}), "has no weight_map"),
    "org/number": (of_index({"a": 3}), "has no weight_map"),
    "org/list": (of_index(["a.safetensors"]), "has no weight_map"),
    "org/absent": (of_index({"a": "b.safetensors"}), "b.safetensors, which the repository does not hold"),
}  # fmt: skip


@pytest.mark.slow
def test_hostile_repositories_are_refused_by_their_headers(hub, ask, filled):
    for repo, (files, _) in HOSTILE.items():
        hub.commit(repo, {"config.json": b"{}"} | files)
    indexed = [repo for repo, (files, _) in HOSTILE.items() if INDEX in files]
    for function, repos in (("headers", HOSTILE), ("locate", indexed)):
        for repo, answer in zip(repos, ask(function, *repos), strict=True):
            assert answer.startswith("refused: ") and HOSTILE[repo][1] in answer
    hub.sizes["tokenizer.json"] = 50_000_001
    hub.log.clear()
    assert ask.one("headers", "org/name")[0]
    assert "tokenizer.json" not in hub.bodies() and "tokenizer_config.json" in hub.bodies()
    hub.sizes["config.json"] = 50_000_001
    large = "config.json has 50000001 bytes, more than 50000000; try another revision"
    assert ask.one("headers", "org/name") == f"refused: org/name: {large}"
    hub.sizes = {"model-00001-of-00003.safetensors": 10**30}
    refused = ask.one("headers", "org/name")
    assert refused.startswith("refused: ") and len(refused) < 400

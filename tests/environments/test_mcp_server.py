"""Tools of MCP servers: one that is well, one that is up to everything, and programs that are none."""

import json
import shlex
import sys
import time
from importlib.util import find_spec

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.environments.tool import MOST
from slingshot.environments.toolbox import ask, toolbox
from slingshot.sandbox.worker import Worker

pytestmark = pytest.mark.skipif(find_spec("mcp") is None, reason="mcp is not installed")
SERVER = '''
import os, time
from mcp.server.mcpserver import MCPServer
server = MCPServer("trouble")

@server.tool()
def add(a: int, b: int) -> str:
    """Adds two numbers."""
    return str(a + b)

@server.tool()
def flood() -> str:
    """Ten megabytes."""
    return "x" * 10_000_000

@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("no such thing")

@server.tool()
def die() -> str:
    """Dies."""
    os._exit(3)

@server.tool()
def lie() -> str:
    """Writes what is no protocol."""
    os.write(1, b"Content-Length: 7\\n\\n{\\"jsonrpc\\": \\"2.0\\", \\"id\\": 99, \\"result\\": 3}\\n")
    return "12"

@server.tool()
def hang() -> str:
    """Never ends."""
    time.sleep(3600)
    return ""

@server.tool()
def secrets() -> str:
    """What it sees of the environment."""
    return ",".join(sorted(os.environ))

server.run()
'''

LIAR = """
import json, sys
listed, shape = 0, {"type": "object", "properties": {"a": {"type": "integer"}, "b": True}, "required": ["a"]}
if "worse" in sys.argv:
    shape["required"] = 7
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    given, told = asked.get("params", {}), {}
    if asked["method"] == "initialize":
        version, about = given["protocolVersion"], {"name": "liar", "version": "1"}
        told = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
    if asked["method"] == "tools/list":
        listed += 1
        told = {"name": f"tool{listed}", "description": "x" * 100_000, "inputSchema": shape}
        told = {"tools": [told, {"name": "no name", "inputSchema": shape}], "nextCursor": "more"}
    if asked["method"] == "tools/call":
        told = {"tool1": {"content": "none"}, "tool2": {"content": [{"type": "song", "text": 3}]}, "tool3": {}}
        told = told.get(given["name"], {"content": [], "isError": True})
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": told}), flush=True)
"""


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A worker with the tools of the server, and how they are asked."""
    monkeypatch.setenv("API_TOKEN", "swordfish")
    (tmp_path / "server.py").write_text(SERVER)
    worker, box = Worker(), toolbox([f"mcp:{shlex.join([sys.executable, str(tmp_path / 'server.py')])}"])
    yield lambda name, **arguments: ask(worker, box, name, json.dumps(arguments)), worker.call(box, "schemas")
    worker.close()


@pytest.mark.slow
def test_a_servers_tools_are_called_and_its_trouble_is_an_observation(served):
    asked, schemas = served
    told = {each["function"]["name"]: each["function"] for each in schemas}
    assert list(told) == ["add", "flood", "fail", "die", "lie", "hang", "secrets"]
    assert told["add"]["description"] == "Adds two numbers." and told["add"]["parameters"]["required"] == ["a", "b"]
    assert asked("add", a=30, b=12) == "42"
    assert asked("add", a="thirty", b=12) == "error: a is integer, not 'thirty'"
    assert len(asked("flood")) < MOST + 100
    assert asked("fail") == "error: Error executing tool fail"
    assert asked("lie") == "12"
    assert "API_TOKEN" not in asked("secrets") and "PATH" in asked("secrets")
    assert asked("die").startswith("error: the server failed")
    assert asked("add", a=1, b=1) == "2"  # it was started again
    start = time.perf_counter()
    assert asked("hang") == "error: the server did not answer in 10 s"
    assert time.perf_counter() - start < 25 and asked("add", a=1, b=1) == "2"


@pytest.mark.slow
def test_a_server_that_lies_is_taken_at_no_more_than_words(tmp_path):
    """It turns its pages for ever, tells at length, and answers in no form that there is."""
    (tmp_path / "liar.py").write_text(LIAR)
    worker, box = Worker(), toolbox([f"mcp:{shlex.join([sys.executable, str(tmp_path / 'liar.py')])}"])
    told = [each["function"] for each in worker.call(box, "schemas")]
    assert [each["name"] for each in told] == [f"tool{number}" for number in range(1, 21)]
    assert all(len(each["description"]) == 2000 for each in told)
    assert told[0]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {}},
        "required": ["a"],
    }
    for number in range(1, 5):
        said = ask(worker, box, f"tool{number}", json.dumps({"a": 1}))
        assert said.startswith("error: ") and "\n" not in said and len(said) < 600
    worse = toolbox([f"mcp:{shlex.join([sys.executable, str(tmp_path / 'liar.py'), 'worse'])}"])
    with pytest.raises(SlingshotError, match=r"the server failed: .*required") as refused:
        worker.call(worse, "schemas")
    assert "\n" not in str(refused.value)
    worker.close()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "says"), [
    ("no-such-program", "the server failed"), (f"{sys.executable} -c 'print(1)'", "the server failed"),
    ("http://127.0.0.1:9/mcp", "the server failed"),
])  # fmt: skip
def test_what_is_no_server_is_refused_in_one_line(command, says):
    with pytest.raises(SlingshotError, match=says) as refused:
        Worker().call(toolbox([f"mcp:{command}"]), "schemas")
    assert f"mcp:{command}" in str(refused.value) and "\n" not in str(refused.value)

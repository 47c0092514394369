"""What stands in deploy/ runs: its commands are the program's, and systemd reads the unit."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from slingshot.cli.main import app

ROOT = Path(__file__).parents[2]
UNIT, IMAGE = ROOT / "deploy" / "slingshot.service", ROOT / "deploy" / "Dockerfile"


def parsed(arguments):
    """(path of the command, its options) as the program reads these arguments; fails where it does not."""
    command, path = get_command(app), []
    while isinstance(command, typer.core.TyperGroup):
        path.append(arguments[0])
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return path, command.make_context(path[-1], list(arguments)).params


def test_what_systemd_starts_is_a_command_and_writes_where_it_may():
    settings = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#")
    program, *arguments = shlex.split(settings["ExecStart"])
    path, options = parsed(arguments)
    assert Path(program).name == "slingshot" and path == ["serve"]
    assert options["ledger"] and Path(options["ledger"]).parent == Path("/var/lib", settings["StateDirectory"])
    assert float(settings["TimeoutStopSec"]) > options["drain"]


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    program = tmp_path / "slingshot"  # the only path that is another here
    program.touch(0o755)
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={program}", UNIT.read_text())
    (unit := tmp_path / "slingshot.service").write_text(text)
    told = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    mine = [line for line in told.stderr.splitlines() if "slingshot" in line]
    assert told.returncode == 0 and not mine, told.stderr


def test_what_the_image_runs_is_the_program():
    text = IMAGE.read_text()
    assert re.findall(r"(?m)^ENTRYPOINT (.*)", text) == ['["slingshot"]']
    [requested] = re.findall(r"pip install .* '\.\[(\w+)\]'", text)
    assert re.search(rf"(?m)^{requested} = \[", (ROOT / "pyproject.toml").read_text())
    assert (ROOT / "constraints.txt").exists()
    told = dict(re.findall(r"(\w+)=(/data)", text))
    assert told == {"XDG_DATA_HOME": "/data"} and "chown slingshot /data" in text  # where the ledger is
    [port] = re.findall(r"(?m)^EXPOSE (\d+)$", text)
    assert int(port) == parsed(["serve", "model"])[1]["port"]
    docs = (ROOT / "docs" / "serving.md").read_text()
    assert set(re.findall(r"-p 127\.0\.0\.1:\d+:(\d+)", docs)) == {port}


def test_every_command_of_the_pages_about_serving_is_one():
    """docker run's too: what stands behind the image's name is for the program."""
    text = (ROOT / "docs" / "serving.md").read_text()
    blocks = "\n".join(block for _, block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```", text))
    lines = [line.split(" # ")[0].split("  #")[0] for line in blocks.splitlines()]
    commands = [line.rpartition("slingshot ")[2] for line in lines if re.search(r"(^| )slingshot \w", line)]
    asked = [parsed(shlex.split(command)) for command in commands]
    assert len(asked) >= 12 and {"serve", "keys", "usage"} <= {path[0] for path, _ in asked}

"""`slingshot rollout-server` becomes vLLM's server, with the options that a run's servers need."""

import json
import subprocess
import sys

import pytest


@pytest.fixture
def stand_in(tmp_path):
    """stand_in(platform): in the place of a Python that has vLLM, what tells the options it was started with."""

    def make(platform):
        python = tmp_path / f"python-{platform}"
        tells = 'import json, os, sys; print(json.dumps([sys.argv[1:], os.environ["PYTHONPATH"]]))'
        python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {platform} || exec {sys.executable} -c \'{tells}\' "$@"\n')
        python.chmod(0o755)
        return str(python)

    return make


def started(model, *options):
    command = [sys.executable, "-m", "slingshot", "rollout-server", str(model), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_the_server_gets_the_options_that_rollouts_need(checkpoint, stand_in, platform):
    done = started(checkpoint, "--port", "8001", "--python", stand_in(platform), "--", "--seed", "7")
    said, told = done.stdout.splitlines()
    arguments, path = json.loads(told)
    assert "rollouts=http://127.0.0.1:8001" in said and path.endswith("rollout/extension")
    assert arguments[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    assert arguments[11:13] == ["--worker-extension-cls", "slingshot_reload.SlingshotReload"]
    assert "--enable-scale-out" in arguments and arguments[-2:] == ["--seed", "7"]
    assert ("--enforce-eager" in arguments) == (platform == "cpu")


@pytest.mark.slow
def test_a_python_without_vllm_is_refused_in_a_line(checkpoint):
    done = started(checkpoint)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no vLLM that runs: ModuleNotFoundError" in done.stderr and "--python" in done.stderr

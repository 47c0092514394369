"""A stage's state on disk: every rank's own rows in a file of its own, read again by any number of ranks.

    state-STEP/state.json              the step, what was consumed, the stage's own JSON
    state-STEP/tensors.safetensors     of one process; of several tensors-RANK.safetensors, the first's with all that is
                                       not sharded

A state is there when its folder has this name: until every rank's file is on the disk it is called .state-STEP.tmp. The
files say where their rows begin as those of torch.distributed.checkpoint's HuggingFaceStorageWriter do
(DCP_SHARDING_INFO), and its reader reads them. It does not write them: its ranks send each other pickled plans, and
nothing makes its folder appear as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, rename_folder, write_json
from slingshot.model.transformer import local_part
from slingshot.training.parallel import Parallel, placed_like

_OFFSETS = "DCP_SHARDING_INFO"


class _Piece(NamedTuple):
    first: int  # of the whole tensor's rows
    shape: list[int]
    file: Any  # an open safetensors file


class State:
    """What was saved after `step` steps: JSON, and tensors that are read when they are asked for, by name. False at the
    start, where nothing was saved."""

    def __init__(self, folder: Path | None = None) -> None:
        """SlingshotError when the folder holds no whole state."""
        self.step, self.meter, self.info = 0, dict[str, Any](), dict[str, Any]()
        self._folder, self._pieces = folder, dict[str, list[_Piece]]()
        if folder is None:
            return
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file = safe_open(path, framework="pt")
                offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "{}"))
                for name in file.keys():  # noqa: SIM118  # no mapping
                    first = next(iter(offsets.get(name, {}).get("saved_offsets", [])), 0)
                    self._pieces.setdefault(name, []).append(_Piece(first, file.get_slice(name).get_shape(), file))
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        said = read_json(folder / "state.json")
        self.step, self.meter, self.info = said["step"], said["meter"], said["info"]

    def __bool__(self) -> bool:
        return self._folder is not None

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """A tensor on the CPU, whole; or on the device of `like`, and where that is sharded, sharded as it is: a rank
        reads its own rows alone."""
        pieces = sorted(self._pieces[name], key=lambda piece: piece.first)
        if not pieces[0].shape:
            tensor: Tensor = pieces[0].file.get_tensor(name)
            return tensor if like is None else tensor.to(like.device)
        if like is None:
            return self._rows(name, pieces, 0, pieces[-1].first + pieces[-1].shape[0])
        local, first = local_part(like)
        return placed_like(self._rows(name, pieces, first, first + len(local)), like)

    def close(self) -> None:
        """Let go of the files, which take room on the disk as long as they are open."""
        self._pieces.clear()

    def _rows(self, name: str, pieces: list[_Piece], start: int, stop: int) -> Tensor:
        spans = [[min(max(at - piece.first, 0), piece.shape[0]) for at in (start, stop)] for piece in pieces]
        found = [(piece, slice(*span)) for piece, span in zip(pieces, spans, strict=True) if span[0] < span[1]]
        parts = [piece.file.get_slice(name)[rows] for piece, rows in found or [(pieces[0], slice(0, 0))]]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(rows) != stop - start:
            raise self._unreadable(f"rows of {name} are missing")
        return rows

    def _unreadable(self, why: object) -> SlingshotError:
        way_out = f"remove {self._folder and self._folder.parent} to start the stage anew"
        return SlingshotError(f"{self._folder} cannot be read: {why}; {way_out}")


class StateWriter:
    """One state on its way to the disk, on every rank at once; `commit` ends it. `done` tells of this rank's file.

    Several ranks, and an accelerator, go on training meanwhile (`behind`): what is written is a copy. One process on a
    CPU writes the tensors themselves, at once: a copy would be as large again.
    """

    def __init__(self, folder: Path, parallel: Parallel, tensors: Mapping[str, Tensor], said: dict[str, Any]) -> None:
        """`folder`: its final name; `said`: step, meter and info of State."""
        self.folder, self.parallel, self._said = folder, parallel, said
        self.behind = parallel.mesh is not None or parallel.device.type != "cpu"
        self._temporary = folder.with_name(f".{folder.name}.tmp")
        self._error: Exception | None = None
        own: dict[str, Tensor] = {}
        offsets: dict[str, Any] = {}
        for name, tensor in tensors.items():
            local, first = local_part(tensor)
            if len(local) if local is not tensor else parallel.is_first:
                own[name] = local.detach().to("cpu", copy=self.behind).contiguous()
                offsets[name] = {"saved_offsets": [first, *[0] * (tensor.dim() - 1)][: tensor.dim()]}
        alone = parallel.mesh is None
        self._file = self._temporary / ("tensors.safetensors" if alone else f"tensors-{parallel.dp_rank}.safetensors")
        metadata = None if alone else {_OFFSETS: json.dumps(offsets)}
        self._thread = Thread(target=self._write, args=(own, metadata), daemon=True)
        self._thread.start()
        if not self.behind:
            self.wait()

    def _write(self, own: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            save_file(own, self._file, metadata)
            with self._file.open("rb") as file:
                os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def commit(self) -> None:
        """Wait for every rank's file, and give the folder its name. All ranks take part, and raise if one could not."""
        self.wait()
        found = self.parallel.gather([[_why(self._error), self._file.name]])
        try:
            for rank, (why, file) in enumerate(found):
                if not why and self.parallel.is_first and not (self._temporary / file).exists():
                    why = f"{file} is not there; --out has to be one folder for all ranks"
                if why:
                    raise cannot_write(self.folder, why, rank if self.parallel.mesh is not None else None)
            if self.parallel.is_first:
                write_json(self._temporary / "state.json", self._said)
                rename_folder(self._temporary, self.folder)
        finally:
            if self.parallel.is_first:
                shutil.rmtree(self._temporary, ignore_errors=True)


def _why(error: Exception | None) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error or "")


def cannot_write(folder: Path, why: object, rank: int | None = None) -> SlingshotError:
    where = f"rank {rank} " if rank is not None else ""
    return SlingshotError(f"{where}cannot write {folder}: {why}; free space there and run the same command to go on")

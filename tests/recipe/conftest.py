"""A recipe of three stages that do next to nothing, and its finished run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import slingshot.recipe.report
from slingshot.base.errors import SlingshotError
from slingshot.recipe import runner
from slingshot.recipe.recipe import Recipe
from slingshot.recipe.runner import run
from slingshot.stages.kinds import STAGES

FAKES = Path(__file__).with_name("fake_stages.py")
TEXT = Path(__file__).with_name("three.toml").read_text()


@pytest.fixture(scope="module")
def built() -> Iterator[list[Path]]:
    """Stages that do next to nothing; gives the runs whose reports were built."""
    spec = importlib.util.spec_from_file_location("fake_stages", FAKES)
    assert spec and spec.loader
    fakes = importlib.util.module_from_spec(spec)
    reports: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fake_stages", fakes)
        spec.loader.exec_module(fakes)
        for kind, fake in fakes.FAKES.items():
            patch.setitem(STAGES, kind, fake)
        patch.setattr(runner, "PROGRAM", [str(FAKES)])
        patch.setattr(slingshot.recipe.report, "build", reports.append)
        yield reports


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    def write_and_load(text: str = TEXT, *overrides: str, seed: int | None = None) -> Recipe:
        (tmp_path / "three.toml").write_text(text)
        return Recipe.load(str(tmp_path / "three.toml"), overrides, seed)

    return write_and_load


@pytest.fixture(scope="module")
def finished(built: list[Path], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folder of a run of TEXT, what it said on standard output and error, and the runs whose reports it built."""
    folder, out, err = tmp_path_factory.mktemp("finished"), io.StringIO(), io.StringIO()
    (folder / "three.toml").write_text(TEXT)
    built.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run(Recipe.load(str(folder / "three.toml")), folder / "run")
    return SimpleNamespace(folder=folder / "run", out=out.getvalue(), err=err.getvalue(), built=[*built])


@pytest.fixture
def out(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """A run of TEXT with every stage finished."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


@pytest.fixture(scope="session")
def refusal() -> Callable[[Callable[[], object]], str]:
    """The one line with which a piece of work is refused."""

    def refused_with(work: Callable[[], object]) -> str:
        with pytest.raises(SlingshotError) as refused:
            work()
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return refused_with

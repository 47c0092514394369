"""What the command line's tests share: a command run in this process, and a small checkpoint to run it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slingshot.cli import main as cli
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slingshot", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, output.out, output.err

    return run


@pytest.fixture
def checkpoint(make_model: Callable[..., Transformer], deepseek: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    from slingshot.checkpoint.load_save import save_checkpoint

    folder = tmp_path / "model"
    folder.mkdir()
    save_checkpoint(folder, make_model(deepseek(vocab_size=268)), Tokenizer.train(["three plus three"], vocab_size=268))
    return folder

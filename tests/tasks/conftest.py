"""A user's own task from its source."""

import textwrap

import pytest

from slingshot.tasks.loader import load_task


@pytest.fixture
def load(tmp_path):
    """load(source): the task in a file of this source; another file, helper.py, lies beside it."""

    def write(source, name="mine.py", **params):
        (tmp_path / name).write_text(textwrap.dedent(source))
        (tmp_path / "helper.py").write_text("def double(number): return 2 * number")
        return load_task(str(tmp_path / name), **params)

    return write

"""What kernels are tested on: every level of instructions, both dtypes, one thread and several.

The quick tests take torch's path and the best level that this processor has, the slow ones those between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from slingshot.kernels.calls import NativeCall, native_for
from slingshot.kernels.native import NativeKernels, native_kernels, native_levels

from .agreement import TOLERANCE

LEVELS = [pytest.param(level, marks=[pytest.mark.slow] * (level != native_levels()[-1])) for level in native_levels()]


@pytest.fixture(params=("off", *LEVELS))
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels that choose for themselves run on."""
    monkeypatch.setenv("SLINGSHOT_NATIVE", request.param)


@pytest.fixture(params=LEVELS)
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], NativeCall]:
    """native(dtype): the native functions, at every level there is."""
    monkeypatch.setenv("SLINGSHOT_NATIVE", request.param)

    def calls(dtype: torch.dtype) -> NativeCall:
        found = native_for(torch.empty(0, dtype=dtype))
        assert found is not None
        return found

    return calls


@pytest.fixture(scope="session", params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    """All of them, at every level there is."""
    return native_kernels(request.param)


@pytest.fixture(scope="session", params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)

"""Verification beside sampling: tasks whose code is someone else's are asked in workers, the others at once.

with VerificationPool(mix.tasks) as verification:           # the workers start in the background, while a model loads
    futures = [verification.submit(item.task, item.problem, text) for item, text in answers]
    rewards = [future.result() for future in futures]
    verification.check()
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Self

from pydantic import PrivateAttr

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.pool import WorkerPool
from slingshot.sandbox.worker import Target, Worker
from slingshot.tasks.task import Problem, Reward, Task


class IsolatedTask(Task):
    """A task whose code is someone else's: it runs in a worker, the task's own or a VerificationPool's.

    A subclass brings `target`, `verify_in` and, where it has turns, `step_in`.
    """

    _worker: Worker = PrivateAttr(default_factory=Worker)

    @property
    @abstractmethod
    def target(self) -> Target:
        """The object inside the worker."""

    @abstractmethod
    def verify_in(self, worker: Worker, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """`verify` by this worker. What fails there is the reward's error."""

    def step_in(
        self, worker: Worker, problem: Problem, messages: Sequence[Mapping[str, str]]
    ) -> list[dict[str, str]] | None:
        """`step` by this worker. Raises SlingshotError for what fails there."""
        return None

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        return self.verify_in(self._worker, problem, text, lenient)

    def step(self, problem: Problem, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]] | None:
        return self.step_in(self._worker, problem, messages)


class VerificationPool:
    """Workers shared by `tasks`. A verifier that raises or hangs costs its own item: a reward of 0 that says why.

    `workers` are two where there are cores to spare, else one; none start where no task needs one.
    """

    def __init__(self, tasks: Sequence[Task], workers: int | None = None) -> None:
        targets = [task.target for task in tasks if isinstance(task, IsolatedTask)]
        size = workers or min(2, max(1, (os.cpu_count() or 1) - 1))
        self._pool = WorkerPool(size, targets) if targets else None
        self._verified = 0
        self._errors: list[str] = []

    def submit(self, task: Task, problem: Problem, text: str, lenient: bool = False) -> Future[Reward]:
        """The Future of `task.verify(problem, text, lenient)`; `task` is one of the pool's."""
        if self._pool is not None and isinstance(task, IsolatedTask):
            future = self._pool.submit(task.verify_in, problem, text, lenient)
        else:
            future = Future()
            future.set_result(task.verify(problem, text, lenient))
        future.add_done_callback(self._count)
        return future

    def step(
        self, task: Task, problem: Problem, messages: Sequence[Mapping[str, str]]
    ) -> Future[list[dict[str, str]] | None]:
        """The Future of `task.step(problem, messages)`; an environment that fails raises SlingshotError there."""
        if self._pool is not None and isinstance(task, IsolatedTask):
            return self._pool.submit(task.step_in, problem, messages)
        future: Future[list[dict[str, str]] | None] = Future()
        try:
            future.set_result(task.step(problem, messages))
        except SlingshotError as error:
            future.set_exception(error)
        return future

    def check(self) -> None:
        """Raises the first verifier's error if so far nothing at all could be verified."""
        if self._errors and not self._verified:
            raise SlingshotError(f"{self._errors[0]}; so it is with all {len(self._errors)} answers so far")

    def _count(self, future: Future[Reward]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        if (error := future.result().error) is None:
            self._verified += 1
        elif not self._verified:
            self._errors.append(error)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

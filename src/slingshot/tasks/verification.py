"""Verification beside sampling: tasks whose code is someone else's are asked in workers, the others at once.

with VerificationPool(mix.tasks) as verification:           # the workers start in the background, while a model loads
    futures = [verification.submit(item.task, item.problem, text) for item, text in answers]
    rewards = [future.result() for future in futures]
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from pydantic import PrivateAttr

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.worker import SandboxError, Target, Worker, WorkerPool
from slingshot.tasks.task import Problem, Reward, Task
from slingshot.tasks.verifiers import MAX_ANSWER

T = TypeVar("T")

MOST_WORKERS = 16  # for each batch whose answers may wait at once
IN_ALL = 64  # processes, some 20 MB each


class IsolatedTask(Task):
    """A task whose code is someone else's: an object in a worker, the task's own or a pool's."""

    _worker: Worker = PrivateAttr(default_factory=Worker)

    @property
    @abstractmethod
    def target(self) -> Target:
        """The object inside the worker."""

    def on(self, worker: Worker) -> Self:
        """This task, asking `worker` in place of its own."""
        task = self.model_copy()
        task._worker = worker
        return task

    def call(self, method: str, *args: Any, doing: str | None = None, timeout: float | None = None) -> Any:
        """What a method of the target returns. SlingshotError that names the task and what failed, as `doing` says."""
        try:
            return self._worker.call(self.target, method, *args, timeout=timeout)
        except SandboxError as error:
            what = f"{method}()" if doing is None else doing
            raise SlingshotError(f"{self.name}: {what} {error}" if what else f"{self.name}: {error}") from error

    def scored(self, answer: str, method: str, *args: Any) -> Reward:
        """What a method of the target says an answer is worth; 0 that says why where it fails or hangs."""
        try:
            return Reward(float(self.call(method, *args)), answer)
        except SlingshotError as error:
            return Reward(0.0, None, str(error))


class VerificationPool:
    """Workers shared by `tasks`. A verifier that raises or hangs costs its own item: a reward of 0 that says why.

    `workers` are at first two where there are cores to spare, else one; while answers queue up as many as cores but
    one, and more where verifiers wait; none start where no task needs one. `batches`: how many are verified at once;
    `most`: the workers that there are then at most.
    """

    def __init__(self, tasks: Sequence[Task], workers: int | None = None, batches: int = 1) -> None:
        targets = [task.target for task in tasks if isinstance(task, IsolatedTask)]
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun says
        cores = workers or max(1, (os.cpu_count() or 1) // ranks - 1)
        self.most = workers or min(IN_ALL, MOST_WORKERS * batches)
        self._pool = WorkerPool(workers or min(2, cores), targets, self.most, cores) if targets else None
        self.verified = 0  # answers so far, over all ranks, as its Rollouts count them

    def submit(self, task: Task, problem: Problem, text: str, lenient: bool = False) -> Future[Reward]:
        """The Future of `task.verify(problem, text, lenient)`; leniently the answer is looked for at a text's end."""
        text = text[-MAX_ANSWER:] if lenient else text
        return self._ask(task, lambda asked: asked.verify(problem, text, lenient))

    def step(
        self, task: Task, problem: Problem, messages: Sequence[Mapping[str, Any]]
    ) -> Future[list[dict[str, Any]] | None]:
        """The Future of `task.step(problem, messages)`; an environment that fails raises SlingshotError there."""
        return self._ask(task, lambda asked: asked.step(problem, messages))

    def _ask(self, task: Task, question: Callable[[Task], T]) -> Future[T]:
        if self._pool is not None and isinstance(task, IsolatedTask):
            return self._pool.submit(lambda worker: question(task.on(worker)))
        future = Future[T]()
        try:
            future.set_result(question(task))
        except SlingshotError as error:
            future.set_exception(error)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What waits is cancelled, what runs fails: at Ctrl-C nobody waits for a verifier that hangs."""
        if self._pool is not None:
            self._pool.close()

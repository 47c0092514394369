"""Rollouts beside training: the batch that a step trains on was begun up to `staleness` steps before it.

with RolloutsAhead(rollout, curriculum, count=16, staleness=1) as batches:
    for step in range(steps):
        batches.wait()                     # what was begun is sampled, so that all of it is of the same weights
        sampler.update_weights(step, state)
        batches.begin(step, steps)         # with these weights, in a thread; none for steps that there are not
        groups = batches.take()            # of the weights of step `batches.version`

Whatever the clock does, all of a step's batch is of the same weights: those of `staleness` steps before. With `partial`
no new weights wait: responses that are under way go on with them, and batches are sampled together. With 0 nothing is
begun before it is needed, and there is no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Self

from slingshot.rollout.curriculum import Curriculum
from slingshot.rollout.rollout import Batch, Rollout
from slingshot.rollout.trajectory import Trajectory
from slingshot.tasks.mixture import Item

Groups = list[list[Trajectory]]


class _Begun(NamedTuple):
    items: Sequence[Item]
    version: int  # of the weights that it began with
    before: dict[str, Any]  # the curriculum's state before they were drawn
    batch: Callable[[], Batch]


class RolloutsAhead:
    """Batches of `count` problems each, sampled one after the other; verified while later ones are sampled."""

    def __init__(
        self, rollout: Rollout, curriculum: Curriculum, count: int, staleness: int, partial: bool = False
    ) -> None:
        self.rollout, self.curriculum = rollout, curriculum
        self._count, self._staleness, self._partial = count, staleness, partial
        self._threads = ThreadPoolExecutor(1 + staleness if partial else 1, "rollouts") if staleness else None
        self._begun = deque[_Begun]()
        self._sampling: list[Future[Batch]] = []

    def wait(self) -> None:
        """Until no samples are under way that new weights wait for."""
        wait(self._sampling)
        self._sampling.clear()

    def begin(self, step: int, steps: int) -> None:
        """Draw and begin the batches of this step and of as many beyond it as may be stale; `steps` end the run."""
        while len(self._begun) < min(steps - step, self._staleness + 1):
            before = self.curriculum.state()
            items = self.curriculum.draw(self._count)
            self._begun.append(_Begun(items, step, before, self._begin(items)))

    def take(self) -> Groups:
        """The groups of the oldest batch that was begun."""
        self._taken = self._begun.popleft()
        return self.rollout.finish(self._taken.batch())

    @property
    def version(self) -> int:
        """Of the batch that was taken last: the step whose weights it began with."""
        return self._taken.version

    def put_back(self, step: int) -> None:
        """The batch taken last is the next to be taken: begun once more then, with the weights of this step."""
        items, _, before, _ = self._taken
        self._begun.appendleft(_Begun(items, step, before, lambda: self._begin(items)()))

    def more(self, count: int) -> Groups:
        """The groups of other problems, of the newest weights."""
        return self.rollout.finish(self._begin(self.curriculum.draw(count))())

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from: what was begun and not taken is drawn again."""
        drawn = self._begun[0].before["drawn"] if self._begun else self.curriculum.place
        return {**self.curriculum.state(), "drawn": drawn}

    def _begin(self, items: Sequence[Item]) -> Callable[[], Batch]:
        """What gives their samples: made when it is asked, or in the thread from now on."""
        if self._threads is None:
            return lambda: self.rollout.sample(items)
        future = self._threads.submit(self.rollout.sample, items)
        if not self._partial:
            self._sampling.append(future)
        return future.result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What waits is never begun; what runs is left after its next prompt."""
        if self._threads is not None:
            self.rollout.stopped = True
            self._threads.shutdown(cancel_futures=True)

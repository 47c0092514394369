"""Which problems a run of RL draws next: the place in the tasks' stream, and the problems that are solved already.

curriculum = Curriculum(mix, retire=0.9, place=saved["drawn"], retired=saved["retired"])
items = curriculum.draw(16)
curriculum.note(groups, parallel)           # a given problem that is solved nine times in ten is drawn no more
curriculum.state()                          # what a resumed run goes on from
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from slingshot.rollout.trajectory import Trajectory
from slingshot.tasks.mixture import Item, TaskMix
from slingshot.tasks.task import key_number
from slingshot.training.parallel import Parallel

# Retired problems passed over, for each that is drawn, before they are drawn all the same: nearly all are solved.
_PATIENCE = 64


class Curriculum:
    """Draws from a mixture. Problems of given tasks, so many and no more, retire at a pass rate of `retire` (none: 0).

    A generated task has always others, so its problems do not retire (arXiv 2510.13786, 3.2: no positive resampling).
    """

    def __init__(self, tasks: TaskMix, retire: float = 0.0, place: int = 0, retired: Iterable[int] = ()) -> None:
        self._tasks, self._retire, self.place, self.retired = tasks, retire, place, set(retired)

    def draw(self, count: int) -> list[Item]:
        """The next items, the retired left out."""
        drawn: list[Item] = []
        passed: list[Item] = []
        while len(drawn) < count and len(passed) < _PATIENCE * count:
            lacking = count - len(drawn)
            for item in self._tasks.draw(self.place, lacking):
                (passed if self._number(item) in self.retired else drawn).append(item)
            self.place += lacking
        return drawn + passed[: count - len(drawn)]

    def note(self, groups: Sequence[Sequence[Trajectory]], parallel: Parallel) -> None:
        """Retire what all ranks have seen solved."""
        if self._retire:
            given = (group for group in groups if group[0].item.task.is_given)
            solved = (its for its in given if sum(t.scores["accuracy"] for t in its) >= self._retire * len(its))
            self.retired.update(parallel.gather([self._number(group[0].item) for group in solved]))

    def state(self) -> dict[str, Any]:
        return {"drawn": self.place, "retired": sorted(self.retired)}

    def _number(self, item: Item) -> int:
        """Of the problem, wherever its task's file lies."""
        index = next(index for index, task in enumerate(self._tasks.tasks) if task is item.task)
        return key_number(f"{index}/{item.problem.key}")

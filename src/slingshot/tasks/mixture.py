"""Drawing problems: from one task or from several in shares, in an order by seed, every problem once before any twice.

mix = TaskMix([TaskConfig(name="arithmetic"), TaskConfig(name="hhmm.py", weight=3)], "train", seed="rl/0")
items = mix.draw(16 * step, 16)          # a pure function of the seed and the place: a resumed run draws the same
problems = distinct(task, "test", seed="evaluate/0", count=500)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from itertools import islice

from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.task import Problem, Split, Task, key_number

# Problems remembered as seen: enough for every file a person writes, and bounded for generators without end.
_REMEMBERED = 1 << 17
# Problems in a row that were seen before, until a generator is taken to have no others; more for one that brought many.
_MIN_PATIENCE, _MAX_PATIENCE = 1000, 20_000


@dataclass(frozen=True)
class Item:
    """A problem and the task it is of."""

    task: Task
    problem: Problem
    key: str  # names the noise of its samples


class TaskMix:
    """Several tasks in fixed shares: a stream of items, endless if `repeat`, else each problem once.

    Among the first n items every task has n times its share, to within one or two.
    """

    def __init__(self, configs: Sequence[TaskConfig], split: Split, seed: str, repeat: bool = True) -> None:
        if not configs:
            raise SlingshotError('tasks: at least one task is needed, for example {name = "arithmetic"}')
        self.tasks = [config.load() for config in configs]
        self._weights = [config.weight for config in configs]
        self._split, self._seed, self._repeat = split, seed, repeat
        self._place, self._stream = 0, self._items()

    def draw(self, start: int, count: int) -> list[Item]:
        """Items `start` to `start + count` of the stream; fewer where a task that is not repeated has no more."""
        if start < self._place:
            self._place, self._stream = 0, self._items()
        skipped, self._place = start - self._place, start + count
        return [item for item in islice(self._stream, skipped, skipped + count) if item is not None]

    def _items(self) -> Iterator[Item | None]:
        """The stream from its beginning on; None at the turn of a task that has no more."""
        streams = [
            _stream(task, self._split, f"{self._seed}/{index}", self._repeat) for index, task in enumerate(self.tasks)
        ]
        taken = [0] * len(self.tasks)
        for place in count_from():
            # Webster's method: the next item goes to the task that is furthest behind its share.
            index = min(range(len(taken)), key=lambda i: (taken[i] + 0.5) / self._weights[i])
            taken[index] += 1
            item = next(streams[index], None)
            yield Item(self.tasks[index], item, f"{self._seed}/{place}/{item.key}") if item else None


def distinct(task: Task, split: Split, seed: str, count: int) -> list[Problem]:
    """The first `count` problems of a split with different keys; fewer if the task runs out of them."""
    return list(islice(_stream(task, split, seed, repeat=False), count))


def passes(task: Task, split: Split, seed: str) -> Iterator[Problem]:
    """A task's problems pass after pass, each in an order of its own; one without end is in its first pass for ever."""
    for number in count_from():
        yield from _pass(task, split, seed, number)


def _pass(task: Task, split: Split, seed: str, number: int) -> Iterator[Problem]:
    return task.problems(split, key_number(f"{seed}/{number}") >> 2)


def _stream(task: Task, split: Split, seed: str, repeat: bool) -> Iterator[Problem]:
    """Problems of a task, none twice until a whole pass has brought nothing new; that is the end unless `repeat`."""
    seen: set[int] = set()
    for number in count_from():
        new = row = 0
        for problem in _pass(task, split, seed, number):
            key = key_number(problem.key)
            if key not in seen:
                new, row = new + 1, 0
                if len(seen) < _REMEMBERED:
                    seen.add(key)
                yield problem
            elif (row := row + 1) >= min(_MAX_PATIENCE, max(_MIN_PATIENCE, 4 * len(seen))):
                break
        if not new or len(seen) == _REMEMBERED:
            if not (repeat and seen):
                return
            seen.clear()

"""The way out of a misspelt name, told in the same words wherever a name is looked up.

did_you_mean("lrr", ["lr", "steps"])                 # "did you mean lr?"; learning_rate means it too
did_you_mean("zzz", ["lr", "steps"])                 # "there are: lr, steps"
raise unknown_name("task", "arithmetics", tasks)     # "task 'arithmetics' is unknown; did you mean arithmetic?"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from slingshot.base.errors import SlingshotError

_MOST_NAMES = 8  # a longer list is no way out: of it the nearest three are named, as far as they are near

# What other programs call it.
_SYNONYMS = {
    "lr": "learning_rate max_lr peak_lr", "kl": "beta kl_coef kl_beta", "clip": "max_grad_norm grad_clip",
    "batch_size": "batch train_batch_size", "prompts_per_step": "batch batch_size train_batch_size",
    "steps": "max_steps iterations max_iters", "epochs": "num_train_epochs steps", "group_size": "num_generations",
    "sequence_length": "max_length max_seq_length block_size context_length", "warmup": "warmup_ratio",
    "max_tokens": "max_length max_new_tokens max_completion_length", "data": "dataset", "text": "dataset corpus",
    "model": "checkpoint", "source": "model checkpoint", "dtype": "precision torch_dtype",
}  # fmt: skip


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that was meant, in whatever case, with or without its tables' names; None where none is near."""
    return next(iter(_near(name, known, 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The name that was meant; where none is, `otherwise`, or the names there are: all of a few, the near of many."""
    names = list(known)
    if meant := closest(name, names, cutoff):
        return f"did you mean {meant}?"
    if otherwise or not names:
        return otherwise or "there are none"
    if len(names) <= _MOST_NAMES:
        return f"there are: {', '.join(names)}"
    nearest = ", ".join(_near(name, names, 3, cutoff - 0.15))
    return f"the nearest of {len(names)} are {nearest}" if nearest else f"none of the {len(names)} there are is near it"


def unknown_name(what: str, name: str, known: Iterable[str]) -> SlingshotError:
    """The error for a name that is not among `known`."""
    return SlingshotError(f"{what} {name!r:.80} is unknown; {did_you_mean(name, known)}")


def _near(name: str, known: Iterable[str], count: int, cutoff: float) -> list[str]:
    spellings, name = sorted(known, key=lambda spelling: spelling.count(".")), name.lower()
    keys = [spelling for spelling in spellings if spelling.replace(".", "").isidentifier()]
    by_case = {key.lower().rpartition(".")[2]: key for key in reversed(keys)}
    by_case |= {spelling.lower(): spelling for spelling in spellings}
    meant = [by_case[key] for key, words in _SYNONYMS.items() if key in by_case and name in words.split()]
    near = [by_case[key] for key in difflib.get_close_matches(name, by_case, n=2 * count, cutoff=cutoff)]
    return list(dict.fromkeys(meant + near))[:count]

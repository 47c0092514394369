"""The commands by name, and the way out of a name that none of them has."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean

# What a newcomer looks for under a name that no command has.
_HINTS = {
    "list": "you may want slingshot recipes, or slingshot tasks; ",
    "export": "you may want slingshot convert; ",
    "train": "you may want slingshot run RECIPE, or slingshot pretrain, sft or rl; ",
    "eval": "you may want slingshot evaluate; ",
    "lora": "",
}


class Commands(TyperGroup):
    """The commands, and the way out of a name that is none."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None:
            known = [name for name, command in self.commands.items() if not command.hidden]
            hint = _HINTS.get(cmd_name, did_you_mean(cmd_name, known) + "; ")
            not_yet = "docs/not-yet.md says what is not there yet, and what to do instead"
            raise SlingshotError(f"there is no command {cmd_name!r}; {hint}{not_yet}")
        return found

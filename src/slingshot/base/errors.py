"""The one error a user sees."""

from __future__ import annotations


class SlingshotError(Exception):
    """Something its user can mend: one line that says what, where, and the way out. The CLI prints it and exits 2."""

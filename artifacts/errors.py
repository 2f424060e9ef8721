"""Every error a user can meet: what happened, why, and what to do next, with the process exit code it leads to.

All floors raise these; the command line prints them without a traceback. They live on the lowest floor because
every other floor needs them.
"""

from __future__ import annotations


class IngotError(Exception):
    """Base of all errors meant for the user.

    Args:
        what: what happened, naming the file, field, engine or pass.
        why: the cause, as far as it is known.
        fix: what the user can do next.
    """

    exit_code = 5

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join(
            line
            for line in (self.what, f"  why: {self.why}" if self.why else "", f"  fix: {self.fix}" if self.fix else "")
            if line
        )


class UsageError(IngotError):
    """A wrong flag, recipe, prompt or sampling parameter."""

    exit_code = 2


class UnsupportedModelError(IngotError):
    """The model cannot be compiled: no attention seam, other state than a KV cache, foreign code."""

    exit_code = 3


class VerificationError(IngotError):
    """An artifact is not what its manifest says, or does not fit this machine."""

    exit_code = 4


class GateError(IngotError):
    """A build's numbers fall short of its budgets."""

    exit_code = 4


class ResourceError(IngotError):
    """Disk, memory, compiler or device failed."""

    exit_code = 5

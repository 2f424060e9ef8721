"""How long a run of the harness may take: nothing new is begun past it, and no child outlives it by much."""

from __future__ import annotations

import time

from ..artifacts.errors import ResourceError

_LONGEST_S = 3600.0  # for one answer of a child, where nobody has set a limit


class OutOfTime(ResourceError):
    """The run's time is used up; what is measured stays."""


class Budget:
    """Counts from when it is made. `seconds`: None for no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0; an hour where there is no limit."""
        return _LONGEST_S if self._end is None else max(self._end - time.monotonic(), 0.0)

    def require(self, what: str) -> float:
        """Seconds left to begin `what`.

        Raises:
            OutOfTime: none are left.
        """
        if self.left <= 0:
            raise OutOfTime(f"not measured, since the time was used up: {what}", "", "")
        return self.left

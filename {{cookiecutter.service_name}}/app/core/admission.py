"""Back-pressure: how many requests may be inside at once. Decided before a byte of the body is read."""

from collections.abc import Callable

from app.core.errors import ServiceError


class Admission:
    """Counts the requests inside, and refuses the one too many in microseconds: `with admission: ...`."""

    def __init__(self, limit: int) -> None:
        self.limit, self.inside = limit, 0
        self.lingering: Callable[[], int] = lambda: 0  # answered requests whose rows still run

    def fit(self, seconds_per_row: float, deadline_seconds: float) -> None:
        """Lower the limit to what half the deadline can answer: the cost was measured without load."""
        self.limit = max(1, min(self.limit, int(deadline_seconds / 2 / max(seconds_per_row, 1e-9))))

    def check(self) -> None:
        """Raise ServiceError when there is no slot; takes none, so that a slow sender holds none."""
        if self.inside + self.lingering() >= self.limit:
            raise ServiceError("overloaded", "too many requests are waiting")

    def __enter__(self) -> None:
        self.check()
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1

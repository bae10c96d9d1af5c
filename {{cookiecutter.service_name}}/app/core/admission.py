"""Back-pressure: how many requests may be inside at once. Decided before a byte of the body is read."""

from app.core.errors import ServiceError


class Admission:
    """Counts the requests inside, and refuses the one too many in microseconds."""

    def __init__(self, limit: int) -> None:
        self.limit, self.inside = limit, 0

    def fit(self, seconds_per_row: float, deadline_seconds: float) -> None:
        """Lower the limit to what half the deadline can answer: the cost was measured without load."""
        self.limit = max(1, min(self.limit, int(deadline_seconds / 2 / max(seconds_per_row, 1e-9))))

    def enter(self, lingering: int) -> None:
        """Take a slot, or raise ServiceError; `lingering` are answered requests whose rows still run."""
        if self.inside + lingering >= self.limit:
            raise ServiceError("overloaded", "too many requests are waiting")
        self.inside += 1

    def leave(self) -> None:
        """Give the slot back."""
        self.inside -= 1

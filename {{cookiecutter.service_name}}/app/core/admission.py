"""Back-pressure: how many requests may be inside at once. Decided before a byte of the body is read."""

from app.core.errors import Overloaded


class Admission:
    """Counts the requests inside, and refuses the one too many in microseconds.

    A slot is taken at the door and given back when the work has really ended: `lingering` says how many
    requests have been answered (deadline, client gone) while their rows are still in the model.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0

    def enter(self, lingering: int = 0) -> None:
        """Take a slot; raises Overloaded when there is none."""
        if self.inside + lingering >= self.limit:
            raise Overloaded
        self.inside += 1

    def leave(self) -> None:
        """Give the slot back."""
        self.inside -= 1


def sustainable_limit(ceiling: int, seconds_per_row: float, deadline_seconds: float) -> int:
    """Requests that can be answered within half the deadline, never more than `ceiling`, at least one.

    Half, because the cost was measured at start on a quieter machine than the one under load.
    """
    return max(1, min(ceiling, int(deadline_seconds / 2 / max(seconds_per_row, 1e-9))))

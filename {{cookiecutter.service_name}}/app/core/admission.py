"""Back-pressure: how many requests may be inside at once. Decided before a byte of the body is read."""

from collections.abc import Callable

from app.core.errors import ServiceError

PACE_WEIGHT = 0.1  # of the latest call in the moving average


class Admission:
    """Counts the requests inside, and refuses the one too many in microseconds: `with admission: ...`.

    `lingering` says how many requests were answered at their deadline while their rows still run.
    """

    def __init__(self, limit: int, deadline_seconds: float, lingering: Callable[[], int] = lambda: 0) -> None:
        self.limit, self.inside, self._lingering = limit, 0, lingering
        self._most, self._budget = limit, deadline_seconds / 2  # the other half is a reserve
        self._seconds = 0.0  # of the model, for a request

    def expect(self, seconds: float) -> None:
        """Start again for a model that needs so many seconds for a request."""
        self._seconds = 0.0
        self.learn(seconds, 1)

    def learn(self, seconds: float, requests: int) -> None:
        """Admit as many as can be answered in time at the recent pace of the model."""
        latest = seconds / requests
        self._seconds += (latest - self._seconds) * (PACE_WEIGHT if self._seconds else 1)
        self.limit = max(1, min(self._most, int(self._budget / max(self._seconds, 1e-9))))

    def check(self) -> None:
        """Raise ServiceError when there is no slot; takes none, so that a slow sender holds none."""
        if self.inside + self._lingering() >= self.limit:
            raise ServiceError("overloaded", "too many requests are waiting")

    def __enter__(self) -> None:
        self.check()
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1

"""What a running process holds: settings, the model once it is loaded, the door, the log, the metrics."""

from dataclasses import dataclass

from app.api.security import Guard
from app.core.admission import Admission
from app.core.pipeline import Pipeline
from app.observability.logging import Logger
from app.observability.metrics import Recorder
from app.settings import Settings


@dataclass(slots=True, eq=False)
class Service:
    """Made by `main.create_app`; `pipeline` is None until the lifespan has loaded and warmed the model."""

    name: str
    version: str
    settings: Settings
    log: Logger
    admission: Admission
    guard: Guard
    recorder: Recorder
    pipeline: Pipeline | None = None

    @property
    def levels(self) -> tuple[int, int, int]:
        """Requests inside, requests queued, admission limit."""
        queued = 0 if self.pipeline is None else self.pipeline.batcher.waiting
        return self.admission.inside, queued, self.admission.limit

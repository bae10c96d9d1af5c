"""The service with nothing recorded and no line put together: what it has over this, observation costs.

gunicorn "unobserved:create_app()", in the service's folder, with this one on the path and APP_LOG_LEVEL=ERROR
"""

import importlib
from collections.abc import Sequence
from typing import Any

main, call, metrics = (
    importlib.import_module(f"app.{name}") for name in ("main", "api.call", "observability.metrics")
)


def nothing(*_: Any) -> None:
    """Nobody counts a request, or a call of the model and what was in it."""


def only_ids(call: Any, predictions: Sequence[Any], _thresholds: dict[str, Any]) -> None:
    """The ids, which clients get, and nothing for the log."""
    for one in predictions:
        one.prediction_id = call.service.feedback.identify(one.prediction_id, one.model_version, one.label)


vars(main)["Recorder"] = type("Deaf", (metrics.Recorder,), {"request": nothing, "batch": nothing})
call.Call.record = only_ids
create_app = main.create_app

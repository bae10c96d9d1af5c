"""The service with nothing recorded and no line put together: what it has over this, observation costs.

gunicorn "unobserved:create_app()", in the service's folder, with this one on the path and APP_LOG_LEVEL=ERROR
"""

import importlib
from collections.abc import Sequence
from typing import Any

main, call, calls, metrics = (
    importlib.import_module(f"app.{name}")
    for name in ("main", "api.call", "monitoring.calls", "observability.metrics")
)


def nothing(*_: Any) -> None:
    """In place of counting a request, or a call of the model with its rows."""


def only_ids(call: Any, predictions: Sequence[Any], _thresholds: dict[str, Any]) -> None:
    """The ids, which clients get, and nothing for the log."""
    for one in predictions:
        one.prediction_id = call.service.feedback.identify(one.prediction_id, one.model_version, one.label)


metrics.Recorder.count = metrics.Recorder.observe = calls.Calls.batch = nothing
call.Call.record = only_ids
create_app = main.create_app

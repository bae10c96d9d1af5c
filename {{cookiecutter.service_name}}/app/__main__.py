"""Commands of the service: python -m app config | address | predict [FILE].

`predict` is the golden path: the same artifact, validation and pipeline as the server, without the server.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.core.errors import ArtifactError, ServiceError
from app.settings import Settings, SettingsError, load_settings, redacted


def predict(content: bytes, settings: Settings) -> list[dict[str, Any]]:
    """Predictions for an instance or for `instances`, as JSON; raises ServiceError or ArtifactError."""
    # Imported here, because the other commands do not need them.
    from app.api.errors import from_validation
    from app.core.pipeline import OFFLINE, Pipeline
    from app.rollout.fleet import read_served
    from app.schemas.service import Instances

    body = content if b'"instances"' in content else b'{"instances":[' + content + b"]}"
    try:
        instances = Instances.model_validate_json(body).instances
    except ValidationError as error:
        raise from_validation(error, content) from None
    policy = replace(OFFLINE, review_threshold=settings.review_threshold, out_of_range=settings.out_of_range)
    predictions = []
    pipeline = Pipeline.offline(read_served(settings), policy)
    pipeline.model.replay()
    for answer in pipeline.answers(instances):
        if isinstance(answer, ServiceError):
            raise answer
        predictions.append({name: value for name, value in asdict(answer).items() if name != "prediction_id"})
    return predictions


def main() -> None:
    """Run the command line; a failure prints one line and exits with 1."""
    parser = argparse.ArgumentParser(prog="python -m app", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("config", "address", "predict"))
    parser.add_argument("file", nargs="?", type=Path, help="JSON for predict; standard input if absent")
    arguments = parser.parse_args()
    try:
        settings = load_settings()
        if arguments.command == "config":
            print(json.dumps(redacted(settings), indent=2))
        elif arguments.command == "address":
            print(f"docs: {settings.address}   stop: Ctrl-C")
        else:
            content = arguments.file.read_bytes() if arguments.file else sys.stdin.buffer.read()
            for prediction in predict(content, settings):
                print(json.dumps(prediction, ensure_ascii=False))
    except ServiceError as error:
        from app.api.errors import problem

        sys.exit(problem(error, "local").decode())
    except (SettingsError, ArtifactError, OSError) as error:
        sys.exit(f"{arguments.command}: {error}")


if __name__ == "__main__":
    main()

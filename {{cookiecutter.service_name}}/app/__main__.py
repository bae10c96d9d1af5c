"""Commands of the service: python -m app config | predict [FILE].

`predict` is the golden path: the same artifact, validation and pipeline as the server, without the server.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from pydantic import ValidationError

from app.api.errors import from_validation, problem
from app.core.errors import ArtifactError, ServiceError
from app.core.pipeline import Pipeline, Policy
from app.core.runtimes import load_runtime
from app.main import read_served
from app.observability.metrics import Metrics, Recorder
from app.schemas.service import Instances
from app.settings import Settings, SettingsError, load_settings, redacted


def predict(content: bytes, settings: Settings) -> list[dict[str, Any]]:
    """Predictions for an instance or for `instances`, as JSON; raises ServiceError or ArtifactError."""
    body = content if b'"instances"' in content else b'{"instances":[' + content + b"]}"
    try:
        instances = Instances.model_validate_json(body).instances
    except ValidationError as error:
        raise from_validation(error, content) from None
    artifact = read_served(settings)
    policy = Policy(settings.review_threshold, settings.out_of_range, execution="inline")
    pipeline = Pipeline(artifact, load_runtime(artifact), Recorder(Metrics()), policy)
    answers = asyncio.run(pipeline.predict(instances, [""] * len(instances), perf_counter() + 3600))
    return [{key: value for key, value in asdict(one).items() if key != "prediction_id"} for one in answers]


def main() -> int:
    """Run the command line; 0 when it worked, 1 with one line when it did not."""
    parser = argparse.ArgumentParser(prog="python -m app", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("config", help="print the effective configuration, secrets redacted")
    ask = commands.add_parser("predict", help="without a server: JSON in, a line of JSON an instance out")
    ask.add_argument("file", nargs="?", type=Path, help="a JSON document; standard input if absent")
    arguments = parser.parse_args()
    try:
        settings = load_settings()
        if arguments.command == "config":
            print(json.dumps(redacted(settings), indent=2))
            return 0
        content = arguments.file.read_bytes() if arguments.file else sys.stdin.buffer.read()
        for prediction in predict(content, settings):
            print(json.dumps(prediction, ensure_ascii=False))
    except ServiceError as error:
        print(problem(error, "local").decode(), file=sys.stderr)
        return 1
    except (SettingsError, ArtifactError, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

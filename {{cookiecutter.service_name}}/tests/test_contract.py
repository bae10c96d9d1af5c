"""The API is the committed one, keeps old clients working, and answers any request as it documents.

openapi.json (what clients were written for) <-> the application's own document
"""

import json
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case

from app.schemas.predict import Features
from tests.compatibility import breaks, live
from tests.conftest import INPUTS, KEY, LABELS, ROOT, Document, Service, read

NOW = live()
COMMITTED: Document = json.loads((ROOT / "openapi.json").read_text("utf-8"))


def test_old_clients_keep_working() -> None:
    """Nothing that the committed openapi.json promises was taken away."""
    broken = breaks(COMMITTED, NOW)
    assert not broken, "\n".join(["clients would break; if you mean it: make contract BREAKING=yes", *broken])


def test_the_api_is_the_committed_one() -> None:
    """Each change of the API is visible in the diff of openapi.json."""
    assert COMMITTED == NOW, "the API is not the one in openapi.json; to accept the change: make contract"


def test_every_feature_is_described() -> None:
    """The API has unit, bounds and description of each feature, and the meaning of the answer."""
    schemas = NOW["components"]["schemas"]
    for name, one in schemas["Features"]["properties"].items():
        said = {key for part in (one, *one.get("anyOf", [])) for key in part}
        wanted = {
            key
            for key in ("description", "unit", "minimum", "maximum")
            if INPUTS[name][key] not in (None, "")
        }
        assert wanted <= said, f"{name} lacks {wanted - said} in app/schemas/predict.py"
    answer = schemas["Prediction"]["properties"]["score" if LABELS else "value"]
    assert answer.get("description")


def test_the_examples_are_predicted(service: Service) -> None:
    """A client that copies an example from the documentation gets a prediction."""
    examples: list[Document] = Features.model_json_schema()["examples"]
    for example in (*examples, json.loads(read("docs/example.json"))):
        response = service.predict(example)
        assert response.status_code == 200, response.text


def moderate(value: Any) -> Any:
    """The same JSON with numbers that a model can calculate with: beyond them the service answers 422."""
    if isinstance(value, dict):
        return {key: moderate(one) for key, one in value.items()}
    if isinstance(value, list):
        return [moderate(one) for one in value]
    large = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > 1000
    return type(value)(value % 1000) if large else value


API = schemathesis.openapi.from_dict(NOW)
API.hook("map_body")(lambda _, body: moderate(body))


@API.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_generated_requests_get_documented_answers(case: Case[Any], service: Service) -> None:
    """Generated requests, valid and invalid, get a documented status and body, never a 5xx."""
    case.call_and_validate(base_url=service.url, headers={"X-API-Key": KEY})

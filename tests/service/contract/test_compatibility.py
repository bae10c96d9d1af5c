"""The compatibility check finds every kind of break and lets additions pass."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from tests.service.contract.compatibility import breaks

Change = Callable[[dict[str, Any]], object]

API: dict[str, Any] = {
    "paths": {
        "/price": {
            "post": {
                "parameters": [{"in": "query", "name": "currency", "schema": {"type": "string"}}],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/House"}}},
                },
                "responses": {
                    "200": {
                        "headers": {"X-Price-List": {"schema": {"type": "string"}}},
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Price"}}},
                    },
                    "503": {"headers": {"Retry-After": {"schema": {"type": "integer"}}}},
                },
            },
            "get": {"responses": {"200": {}}},
        },
        "/health": {"get": {"responses": {"200": {}}}},
    },
    "components": {
        "schemas": {
            "House": {
                "type": "object",
                "additionalProperties": False,
                "required": ["area"],
                "properties": {
                    "area": {"type": "number", "minimum": 0, "maximum": 1000, "unit": "m2"},
                    "kind": {"enum": ["flat", "villa"]},
                    "note": {"anyOf": [{"type": "string", "maxLength": 80}, {"type": "null"}]},
                    "rooms": {"type": "array", "items": {"type": "number"}, "maxItems": 9},
                    "annex": {"$ref": "#/components/schemas/House"},
                },
            },
            "Price": {
                "type": "object",
                "required": ["value", "grade"],
                "properties": {
                    "value": {"type": "number"},
                    "grade": {"enum": ["low", "high"]},
                    "terms": {"type": "array", "items": {"type": "string"}},
                    "parts": {"type": "object", "additionalProperties": {"type": "number"}},
                },
            },
        }
    },
}


def post(api: dict[str, Any]) -> dict[str, Any]:
    """The operation that takes a house."""
    operation: dict[str, Any] = api["paths"]["/price"]["post"]
    return operation


def house(api: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The request's schema, or one of its properties."""
    schema: dict[str, Any] = api["components"]["schemas"]["House"]
    return schema["properties"][name] if name else schema


def price(api: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The response's schema, or one of its properties."""
    schema: dict[str, Any] = api["components"]["schemas"]["Price"]
    return schema["properties"][name] if name else schema


def add(schema: dict[str, Any], required: bool) -> None:
    """One more property."""
    schema["properties"]["colour"] = {"type": "string"}
    schema["required"] = [*schema["required"], *(["colour"] if required else [])]


PRICE = "POST /price"
BODY = "POST /price body (application/json)"

BREAKS: dict[str, Change] = {
    "GET /health was removed": lambda api: api["paths"].pop("/health"),
    "GET /price was removed": lambda api: api["paths"]["/price"].pop("get"),
    PRICE + " now needs credentials": lambda api: post(api).update(security=[{"key": []}]),
    PRICE + " query currency is newly required": lambda api: post(api)["parameters"][0].update(required=True),
    PRICE + " query currency is no longer taken": lambda api: post(api)["parameters"].pop(),
    PRICE + " query currency: type was string, is integer": lambda api: post(api)["parameters"][0].update(
        schema={"type": "integer"}
    ),
    PRICE + " header day is newly required": lambda api: post(api)["parameters"].append(
        {"in": "header", "name": "day", "required": True, "schema": {"type": "string"}}
    ),
    BODY + " is no longer taken": lambda api: post(api).pop("requestBody"),
    BODY + ".colour is newly required": lambda api: add(house(api), True),
    BODY + ".kind is newly required": lambda api: house(api)["required"].append("kind"),
    BODY + ".kind is no longer taken": lambda api: house(api)["properties"].pop("kind"),
    BODY + ".area: type was number, is integer": lambda api: house(api, "area").update(type="integer"),
    BODY + ".area: minimum was 0, is 1": lambda api: house(api, "area").update(minimum=1),
    BODY + ".area: maximum was 1000, is 10": lambda api: house(api, "area").update(maximum=10),
    BODY + ".area: unit was m2, is ft2": lambda api: house(api, "area").update(unit="ft2"),
    BODY + ".area: exclusiveMinimum was None, is 0": lambda api: house(api, "area").update(
        exclusiveMinimum=0
    ),
    BODY + ".kind no longer takes ['villa']": lambda api: house(api, "kind").update(enum=["flat"]),
    BODY + ".area now takes only [1, 2]": lambda api: house(api, "area").update(enum=[1, 2]),
    BODY + ".note no longer takes null": lambda api: house(api)["properties"].update(
        note={"type": "string", "maxLength": 80}
    ),
    BODY + ".note no longer takes string": lambda api: house(api, "note")["anyOf"][0].update(maxLength=8),
    BODY + ".rooms: maxItems was 9, is 3": lambda api: house(api, "rooms").update(maxItems=3),
    BODY + ".rooms[]: type was number, is integer": lambda api: house(api, "rooms").update(
        items={"type": "integer"}
    ),
    PRICE + " 200 was removed": lambda api: post(api)["responses"].pop("200"),
    PRICE + " 200 lost the header X-Price-List": lambda api: post(api)["responses"]["200"].pop("headers"),
    PRICE + " 503 lost the header Retry-After": lambda api: post(api)["responses"]["503"].pop("headers"),
    PRICE + " 200 is no longer application/json": lambda api: post(api)["responses"]["200"].update(
        content={"text/csv": {"schema": {}}}
    ),
    PRICE + " 200.terms was removed": lambda api: price(api)["properties"].pop("terms"),
    PRICE + " 200.value is newly optional": lambda api: price(api)["required"].remove("value"),
    PRICE + " 200.value: type was number, is string": lambda api: price(api, "value").update(type="string"),
    PRICE + " 200.value may now be null": lambda api: price(api, "value").update(type=["number", "null"]),
    PRICE + " 200.grade may now be ['odd']": lambda api: price(api, "grade")["enum"].append("odd"),
    PRICE + " 200.grade is no longer one of ['low', 'high']": lambda api: price(api, "grade").pop("enum"),
    PRICE + " 200.terms[]: type was string, is integer": lambda api: price(api, "terms").update(
        items={"type": "integer"}
    ),
    PRICE + " 200.parts.*: type was number, is string": lambda api: price(api, "parts").update(
        additionalProperties={"type": "string"}
    ),
}

ADDITIONS: dict[str, Change] = {
    "nothing": lambda api: None,
    "a path": lambda api: api["paths"].update({"/ready": {"get": {"responses": {"200": {}}}}}),
    "an operation": lambda api: api["paths"]["/health"].update(head={"responses": {"200": {}}}),
    "an optional parameter": lambda api: post(api)["parameters"].append(
        {"in": "header", "name": "day", "schema": {"type": "string"}}
    ),
    "an optional request field": lambda api: add(house(api), False),
    "a response field": lambda api: add(price(api), True),
    "another answer": lambda api: post(api)["responses"].update({"429": {}}),
    "a request field that may be left out": lambda api: house(api)["required"].clear(),
    "a response field that is always there": lambda api: price(api)["required"].append("terms"),
    "wider bounds": lambda api: house(api, "area").update(minimum=-1, maximum=9999),
    "a wider type": lambda api: house(api, "area").update(type=["number", "string"]),
    "one more category": lambda api: house(api, "kind")["enum"].append("castle"),
    "a request that ignores what it does not know": lambda api: house(api).pop("additionalProperties"),
    "a narrower response": lambda api: price(api, "value").update(type="integer", minimum=0),
    "fewer grades": lambda api: price(api, "grade").update(enum=["low"]),
    "optional credentials": lambda api: post(api).update(security=[{"key": []}, {}]),
    "other words": lambda api: house(api, "area").update(description="inside", title="Area", examples=[80]),
    "a field that may be null": lambda api: house(api)["properties"].update(
        kind={"anyOf": [{"enum": ["flat", "villa"]}, {"type": "null"}]}
    ),
}


def changed(change: Change) -> list[str]:
    """What the change breaks."""
    new = deepcopy(API)
    change(new)
    return breaks(API, new)


@pytest.mark.parametrize(("sentence", "change"), BREAKS.items(), ids=BREAKS)
def test_a_break_is_found_and_named(sentence: str, change: Change) -> None:
    """Whatever an old client could send or rely on, its loss is named with its place, and nothing else is."""
    # The house has an annex that is a house: what happens to one happens to the other.
    assert {one.replace(".annex", "") for one in changed(change)} == {sentence}


@pytest.mark.parametrize("change", ADDITIONS.values(), ids=ADDITIONS)
def test_an_addition_breaks_nothing(change: Change) -> None:
    """What old clients neither send nor read may be added, and what is taken may grow."""
    assert changed(change) == []

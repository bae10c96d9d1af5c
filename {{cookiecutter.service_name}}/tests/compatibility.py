"""Finds changes of the API that break clients written for the old API.

`make contract` updates openapi.json; with BREAKING=yes also for a change that breaks clients.

    old OpenAPI, new OpenAPI -> breaks(old, new) -> sentences, none if every old client keeps working

One rule in two directions. Requests that were valid must stay valid: the old request schema lies within the
new one. Answers must keep their promises: the new response schema lies within the old one.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.main import create_app
from app.settings import load_settings

Schema = Any  # a JSON Schema: an object, or true or false

WORDS = {"$comment", "default", "deprecated", "description", "example", "examples", "readOnly", "title"}
LOWER = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
UPPER = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
UNDERSTOOD = {
    "type",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "required",
    "properties",
    "additionalProperties",
    "items",
}
SNAPSHOT = Path(__file__).resolve().parents[1] / "openapi.json"
METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


def breaks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Every break, as a sentence that begins with the operation."""
    return [
        f"{method.upper()} {path}{sentence}"
        for path, operations in old["paths"].items()
        for method in METHODS
        if method in operations
        for sentence in _operation(operations[method], new["paths"].get(path, {}).get(method), old, new)
    ]


def _operation(was: Any, now: Any, old: Any, new: Any) -> Iterator[str]:
    if now is None:
        yield " was removed"
        return
    if _secured(now, new) and not _secured(was, old):
        yield " now needs credentials"
    inputs = _inputs(was), _inputs(now)
    for name, (required, schema) in inputs[1].items():
        if required and not inputs[0].get(name, (False, None))[0]:
            yield f" {name} is newly required"
        if name in inputs[0]:
            yield from _within(inputs[0][name][1], schema, old, new, f" {name}", sent=True)
    for name in inputs[0].keys() - inputs[1].keys():
        yield f" {name} is no longer taken"
    for status, response in was["responses"].items():
        answer = now["responses"].get(status)
        if answer is None:
            if status.startswith("2"):
                yield f" {status} was removed"
            continue
        for header in response.get("headers", {}).keys() - answer.get("headers", {}).keys():
            yield f" {status} lost the header {header}"
        for media_type, content in response.get("content", {}).items():
            if media_type not in answer.get("content", {}):
                yield f" {status} is no longer {media_type}"
            else:
                promised = answer["content"][media_type]["schema"]
                yield from _within(promised, content["schema"], new, old, f" {status}", sent=False)


def _secured(operation: Any, document: Any) -> bool:
    requirements = operation.get("security", document.get("security", []))
    return bool(requirements) and {} not in requirements


def _inputs(operation: Any) -> dict[str, tuple[bool, Schema]]:
    """Parameters and bodies by name, each with whether it is required and its schema."""
    body = operation.get("requestBody", {})
    return {
        f"{one['in']} {one['name']}": (one.get("required", False), one["schema"])
        for one in operation.get("parameters", [])
    } | {
        f"body ({media_type})": (body.get("required", False), content["schema"])
        for media_type, content in body.get("content", {}).items()
    }


def _within(
    inner: Schema,
    outer: Schema,
    inners: Any,
    outers: Any,
    at: str,
    *,
    sent: bool,
    seen: frozenset[Any] = frozenset(),
) -> Iterator[str]:
    """Values that `inner` allows and `outer` does not. `sent`: inner is the old schema, else the new one."""
    pair = (_name(inner), _name(outer))
    if all(pair) and pair in seen:  # a schema that holds itself
        return
    seen |= {pair}
    inner, outer = _resolved(inner, inners), _resolved(outer, outers)
    if outer is False and inner is not False:
        yield f"{at} is no longer allowed"
    if isinstance(inner, bool) or isinstance(outer, bool):
        if inner is True and outer not in (True, {}):
            yield f"{at} was anything, and is restricted" if sent else f"{at} may now be anything"
        return
    many, choice = _alternatives(inner), _alternatives(outer)
    if len(many) > 1 or len(choice) > 1:
        for one in many:
            if all(any(_within(one, other, inners, outers, at, sent=sent, seen=seen)) for other in choice):
                kind = _name(one) or one.get("type", "one kind of value")
                yield f"{at} no longer takes {kind}" if sent else f"{at} may now be {kind}"
        return
    (inner,), (outer,) = many, choice
    inner, outer = _resolved(inner, inners), _resolved(outer, outers)
    for key in sorted((inner.keys() | outer.keys()) - UNDERSTOOD - WORDS):
        was, now = (inner.get(key), outer.get(key)) if sent else (outer.get(key), inner.get(key))
        if key in LOWER:
            worse = outer.get(key, -math.inf) > inner.get(key, -math.inf)
        elif key in UPPER:
            worse = outer.get(key, math.inf) < inner.get(key, math.inf)
        else:  # a unit, a pattern, a format: any difference may matter to a client
            worse = was != now
        if worse:
            yield f"{at}: {key} was {was}, is {now}"
    kind, wanted = inner.get("type"), outer.get("type")
    if wanted not in (None, kind) and (kind, wanted) != ("integer", "number"):
        yield f"{at}: type was {kind}, is {wanted}" if sent else f"{at}: type was {wanted}, is {kind}"
        return
    if (allowed := _values(outer)) is not None:
        values = _values(inner)
        if values is None:
            yield f"{at} now takes only {allowed}" if sent else f"{at} is no longer one of {allowed}"
        elif extra := [value for value in values if value not in allowed]:
            yield f"{at} no longer takes {extra}" if sent else f"{at} may now be {extra}"
    if "items" in outer:
        yield from _within(
            inner.get("items", True), outer["items"], inners, outers, f"{at}[]", sent=sent, seen=seen
        )
    yield from _members(inner, outer, inners, outers, at, sent=sent, seen=seen)


def _members(
    inner: Any, outer: Any, inners: Any, outers: Any, at: str, *, sent: bool, seen: frozenset[Any]
) -> Iterator[str]:
    """The part of `_within` for objects."""
    known, expected = inner.get("properties", {}), outer.get("properties", {})
    for name in expected:
        if name not in known and not sent:
            yield f"{at}.{name} was removed"
        elif name in outer.get("required", []) and name not in inner.get("required", []):
            yield f"{at}.{name} is newly required" if sent else f"{at}.{name} is newly optional"
    rest = outer.get("additionalProperties", True)
    for name, schema in known.items():
        if name in expected:
            yield from _within(schema, expected[name], inners, outers, f"{at}.{name}", sent=sent, seen=seen)
        elif rest is False and sent:
            yield f"{at}.{name} is no longer taken"
    others = inner.get("additionalProperties", True)
    if sent or isinstance(rest, dict):  # clients ignore members they do not know
        yield from _within(others, rest, inners, outers, f"{at}.*", sent=sent, seen=seen)


def _name(schema: Schema) -> str | None:
    reference: str | None = schema.get("$ref") if isinstance(schema, dict) else None
    return reference and reference.rpartition("/")[2]


def _resolved(schema: Schema, document: Any) -> Schema:
    name = _name(schema)
    return _resolved(document["components"]["schemas"][name], document) if name else schema


def _alternatives(schema: Any) -> list[Any]:
    if isinstance(kinds := schema.get("type"), list):
        return [{**schema, "type": kind} for kind in kinds]
    found: list[Any] = schema.get("anyOf") or schema.get("oneOf") or [schema]
    return found


def _values(schema: Any) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def live() -> dict[str, Any]:
    """The current OpenAPI document of the application."""
    return create_app(load_settings(env="local", docs_enabled=True, api_keys=())).openapi()


def main() -> None:
    """Write the OpenAPI document to the snapshot, unless that breaks clients."""
    new = live()
    if SNAPSHOT.exists() and "--breaking" not in sys.argv[1:]:
        broken = breaks(json.loads(SNAPSHOT.read_text("utf-8")), new)
        if broken:
            sys.exit("\n".join(["clients would break; if you mean it: make contract BREAKING=yes", *broken]))
    SNAPSHOT.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Requests by the thousand: from an OpenAPI document, and from good bodies that something happens to."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]
Body = Any

TEXT = st.text(max_size=12) | st.sampled_from(["", "a" * 90, "\ud800", "\x00", "<eos>", "{{ 1 }}", "é€😀", "\r\n\r\n"])
NUMBERS = st.integers(-3, 12) | st.sampled_from([2**31, -(2**31) - 1, 2**63, 10**40, 1e308, -0.0, 0.5, 1.5, 1e-320])
ODD: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.just(float("nan")) | st.just(float("inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def from_schema(schema: Schema, known: dict[str, Schema]) -> st.SearchStrategy[Any]:
    """Values that fit a JSON schema as pydantic writes it; `known` holds the schemas that it refers to."""
    if "$ref" in schema:
        return st.deferred(lambda: from_schema(known[schema["$ref"].rpartition("/")[2]], known))
    if "anyOf" in schema:
        return st.one_of([from_schema(one, known) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    make = _KINDS.get(schema.get("type", ""))
    return ODD if make is None else make(schema, known)


def _integer(schema: Schema, known: dict[str, Schema]) -> st.SearchStrategy[Any]:
    low = int(schema.get("minimum", -(2**31)))
    high = int(schema.get("exclusiveMaximum", schema.get("maximum", 2**31)))
    near = [number for number in range(-2, 12) if low <= number < high]
    return st.sampled_from([*near, *near, low, high - 1])


def _array(schema: Schema, known: dict[str, Schema]) -> st.SearchStrategy[Any]:
    return st.lists(from_schema(schema.get("items", {}), known), min_size=schema.get("minItems", 0), max_size=3)


def _object(schema: Schema, known: dict[str, Schema]) -> st.SearchStrategy[Any]:
    fields = schema.get("properties")
    if fields is None:
        more = schema.get("additionalProperties")
        values = from_schema(more, known) if isinstance(more, dict) else ODD
        return st.dictionaries(st.text(max_size=5) | st.sampled_from(["5", "300"]), values, max_size=3)
    made = {name: from_schema(one, known) for name, one in fields.items()}
    required = {name: made.pop(name) for name in schema.get("required", [])}
    # Few at a time: with all fields at once some are always wrong together.
    some = st.lists(st.sampled_from(sorted(made)), max_size=4, unique=True) if made else st.just([])
    return some.flatmap(lambda names: st.fixed_dictionaries({**required, **{name: made[name] for name in names}}))


_KINDS: dict[str, Callable[[Schema, dict[str, Schema]], st.SearchStrategy[Any]]] = {
    "string": lambda schema, known: TEXT,
    "integer": _integer,
    "number": lambda schema, known: st.floats(-3, 3) | NUMBERS,
    "boolean": lambda schema, known: st.booleans(),
    "null": lambda schema, known: st.none(),
    "array": _array,
    "object": _object,
}


def documented(openapi: dict[str, Any]) -> st.SearchStrategy[tuple[str, str, bytes]]:
    """(method, path, body) of the document's operations, with bodies that fit their schemas."""
    known = openapi["components"]["schemas"]
    made = []
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            body = st.just(b"") if content is None else from_schema(content["schema"], known).map(written)
            made.append(st.tuples(st.just(method.upper()), st.just(path), body))
    posts = [one for one, (_, operations) in zip(made, openapi["paths"].items(), strict=True) if "post" in operations]
    return st.one_of([*made, *posts, *posts])


def written(body: Body) -> bytes:
    """The body as JSON, with NaN and half surrogates where it has them."""
    return json.dumps(body).encode()


@st.composite
def mutated(draw: st.DrawFn, good: list[Body]) -> bytes:
    """A good body after one to three accidents: a value replaced, a field lost, renamed, or bytes changed."""
    body = json.loads(json.dumps(draw(st.sampled_from(good))))
    for _ in range(draw(st.integers(1, 3))):
        body = _accident(draw, body)
    data = written(body)
    if draw(st.integers(0, 9)):
        return data
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 5)))
    return data[:start] + draw(st.binary(max_size=5)) + data[end:]


def _accident(draw: st.DrawFn, body: Body) -> Body:
    if not isinstance(body, dict | list) or not body or not draw(st.integers(0, 9)):
        return draw(ODD)
    place: Any = draw(st.sampled_from(sorted(body) if isinstance(body, dict) else range(len(body))))
    match draw(st.integers(0, 4)):
        case 0:
            body.pop(place)
        case 1 if isinstance(body, dict):
            body[draw(st.text(max_size=8))] = body.pop(place)
        case 2:
            body[place] = draw(ODD)
        case _:
            body[place] = _accident(draw, body[place])
    return body

"""Which JSON schemas texts are held to, what becomes of the others, and that neither takes long."""

import json
import random
import time

import numpy as np
import pytest
from llguidance import LLTokenizer

from telerag_cli.errors import InputError
from telerag_cli.llm.constraint import Constraint, schema_grammar
from telerag_cli.llm.json_validation import follows
from telerag_cli.llm.schema_check import MAX_CHECK_S, MAX_CPU_S, check_schema

STRING = {"type": "string"}
BYTES = LLTokenizer("byte")
MAX_STEPS = 400


def of(value, **more):
    """The schema of an object with one value."""
    return {"type": "object", "properties": {"a": value}, "required": ["a"], "additionalProperties": False, **more}


def written(schema, seed):
    """A text that a model without any sense writes under the schema, or None if it finds no end."""
    constraint, chance, text = Constraint(BYTES, schema_grammar(schema)), random.Random(seed), []
    for _ in range(MAX_STEPS):
        allowed = np.flatnonzero(constraint.allowed()).tolist()
        if BYTES.eos_token in allowed:
            return bytes(text).decode()
        closing = [token for token in allowed if token in b'"}]']
        token = chance.choice(closing if closing and chance.random() < 0.4 else allowed)
        constraint.accept(token)
        text.append(token)
    return None


KEPT = {
    "enum": {"enum": ["😀", "two\nlines", 'a "quote"', "back\\slash", "\u2028", "\x1b[0m", 1, None, {"b": [True]}]},
    "const": {"const": '🎉\n"'},
    "bounds": {"type": "integer", "minimum": 18, "exclusiveMaximum": 21},
    "fraction": {"type": "number", "minimum": -0.5, "maximum": 0.25},
    "pattern": {**STRING, "pattern": r"^\d{3}-\d{4}$"},
    "lengths": {**STRING, "minLength": 3, "maxLength": 5},
    "format": {**STRING, "format": "date-time"},
    "allOf": {"allOf": [of(STRING), {"properties": {"b": {"type": "null"}}}]},
    "$ref": {"$ref": "#/$defs/even"},
    "anyOf": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 3}]},
    "items": {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 3},
}


@pytest.mark.parametrize("value", KEPT.values(), ids=KEPT)
def test_whatever_is_written_follows_the_schema(value):
    schema = of(value, **{"$defs": {"even": {"type": "integer", "multipleOf": 2}}})
    check_schema(schema)
    texts = [text for seed in range(10) if (text := written(schema, seed))]
    assert texts
    assert all(follows(schema, text) for text in texts), texts


def test_every_choice_of_an_enum_can_be_written_as_it_is():
    for choice in KEPT["enum"]["enum"]:
        constraint = Constraint(BYTES, schema_grammar(of(KEPT["enum"])))
        for token in json.dumps({"a": choice}, ensure_ascii=choice == "\x1b[0m").encode():
            constraint.accept(token)
        assert constraint.allows(BYTES.eos_token)


UNKEPT = {
    "not": {"not": STRING},
    "if": {"if": {}, "then": {}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 2}},
    "credit-card": {**STRING, "format": "credit-card"},
    "$ref": {"$ref": "https://example.org/schema.json"},
    "pattern": {**STRING, "pattern": r"^(?=a)b"},
    "items": {"type": "array", "items": [STRING]},
    "minLength": {**STRING, "minLength": "three"},
    "type": {"type": "strin"},
    "$id": {**STRING, "$id": 5},
}


@pytest.mark.parametrize("keyword", UNKEPT)
def test_what_cannot_be_kept_is_refused_by_name(keyword):
    with pytest.raises(InputError, match=f"(?<!\\w){keyword.replace('$', '[$]')}(?!\\w)"):
        check_schema(of(UNKEPT[keyword]))


def test_a_schema_cannot_switch_the_refusals_off():
    with pytest.raises(InputError, match="not"):
        check_schema({**of({"not": STRING}), "x-guidance": {"lenient": True}})


def test_an_older_draft_has_its_own_meaning():
    schema = {**of({"type": "array", "items": [STRING]}), "$schema": "http://json-schema.org/draft-07/schema#"}
    check_schema(schema)
    assert follows(schema, '{"a": ["b"]}')
    assert not follows(schema, '{"a": [1]}')


HOSTILE = {
    "long strings": of({**STRING, "minLength": 10**8, "maxLength": 10**9}),
    "long arrays": of({"type": "array", "items": STRING, "minItems": 10**8}),
    "repetition": of({**STRING, "pattern": "^((a{0,1000}){0,1000}){0,1000}$"}),
    "intersection": of({"allOf": [{**STRING, "pattern": f"^.*a.{{{n}}}$"} for n in range(30)]}),
    "remainders": of({"type": "integer", "multipleOf": 99_999_989}),
    "references": {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/d0"}},
        "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": STRING},
    },
    "itself": {"type": "object", "allOf": [{"$ref": "#"}]},
    "choices": of({"enum": list(range(60_000))}),
    "names": {"type": "object", "properties": {f"n{n}": STRING for n in range(3_000)}},
    "depth": of(json.loads('{"items":' * 100 + "{}" + "}" * 100)),
    "one text": of({"const": "x" * 10**6}),
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schema_takes_little_time(schema):
    began_s = time.monotonic()
    try:
        check_schema(schema)
        written(schema, 0)
    except InputError:
        pass
    assert time.monotonic() - began_s < MAX_CHECK_S + 2 * MAX_CPU_S


def test_a_verdict_is_remembered():
    schema = of({**STRING, "description": "asked for once"})
    check_schema(schema)
    began_s = time.monotonic()
    for _ in range(20):
        check_schema(schema)
    assert time.monotonic() - began_s < 0.1

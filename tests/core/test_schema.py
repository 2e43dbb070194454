"""`--schema`: what is taken as a schema, what is refused and how, and which answers keep to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.schema import arrow_type, canonical, parse_schema, subschemas, validate

PERSON = parse_schema("name, age int, tags list")


def fields(text: str) -> dict[str, Any]:
    schema = parse_schema(text)
    assert schema["required"] == list(schema["properties"])
    assert schema["additionalProperties"] is False
    return dict(schema["properties"])


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_schema(text)
    return caught.value.problems


def problem(text: str) -> str:
    (only,) = problems(text)
    return only


def refused(text: str, schema: dict[str, Any], **options: Any) -> str:
    with pytest.raises(RowError) as caught:
        validate(text, schema, **options)
    assert (caught.value.code, caught.value.stage) == ("invalid_output", "post")
    return caught.value.message


def test_the_short_form() -> None:
    assert fields("name, age int, ratio float,ok bool ,tags list") == {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "ratio": {"type": "number"},
        "ok": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
    }
    assert fields("mood happy|very sad, sizes list[int], moods list[happy|sad, so so]")["moods"] == {
        "type": "array",
        "items": {"type": "string", "enum": ["happy", "sad, so so"]},
    }
    assert fields("age? int, mood? a|b, tags? list, name?") == {
        "age": {"type": ["integer", "null"]},
        "mood": {"enum": ["a", "b", None]},
        "tags": {"type": ["array", "null"], "items": {"type": "string"}},
        "name": {"type": ["string", "null"]},
    }
    assert fields("name: string, größe-x:number") == {"name": {"type": "string"}, "größe-x": {"type": "number"}}
    assert fields("list list[list]")["list"]["items"]["items"] == {"type": "string"}


def test_every_problem_of_the_short_form_at_once() -> None:
    found = problems("name, age itn, name int, , 2nd, mood a|, tags list[flaot]")
    assert len(found) == 6
    assert "age has the unknown type 'itn'; did you mean int?" in found[0]
    assert "'name' is there twice" in found[1]
    assert "a field is empty" in found[2]
    assert "'2nd' is no field" in found[3]
    assert "mood 'a|'" in found[4]
    assert "did you mean float?" in found[5]
    assert "a field is empty" in problem("")
    assert "known are str, int" in problem("when zzzzzz")


def test_a_file_of_a_schema(tmp_path: Path) -> None:
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON))
    assert parse_schema(str(path)) == PERSON
    assert parse_schema(canonical(PERSON)) == PERSON
    other = tmp_path / "schema.txt"
    other.write_text("\ufeff" + json.dumps(PERSON))
    assert parse_schema(str(other)) == PERSON


def test_no_file(tmp_path: Path) -> None:
    assert "no such file" in problem(str(tmp_path / "person.json"))
    assert "no file has that name" in problem(str(tmp_path / "person.txt"))
    (tmp_path / "folder.json").mkdir()
    assert "Is a directory" in problem(str(tmp_path / "folder.json"))
    (tmp_path / "latin.json").write_bytes(b'{"title": "\xe9"}')
    assert "no UTF-8" in problem(str(tmp_path / "latin.json"))
    assert "cannot be read" in problem("\0.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"type": "object"', "no JSON: Expecting"),
        ('{"type": "object", "type": "array"}', "the name 'type' is there twice"),
        ('{"minimum": NaN}', "NaN is no JSON"),
        ("{}", "nothing at all"),
        ('{"name": "string", "age": "int"}', "it has 'name', 'age' and no keyword"),
        ('{"type": "int"}', "$.type: 'int' is not valid under any of the given schemas; did you mean 'integer'?"),
        ('{"type": "object", "required": "a"}', "$.required: 'a' is not of type 'array'"),
        ('{"type": "object", "propertis": {}}', "unknown keyword 'propertis'; did you mean 'properties'?"),
        ('{"type": "array", "items": {"type": "string", "pattern": "[a"}}', "'[a' is no regular expression"),
        ('{"patternProperties": {"(": {}}}', "'(' is no regular expression"),
        ('{"items": {"$ref": "#/$defs/person"}}', "$ref '#/$defs/person' leads nowhere"),
        ('{"$ref": "http://127.0.0.1:9/schema.json"}', "leads nowhere; only places of the schema itself"),
        ('{"$ref": "#"}', "refers to itself without end"),
        ('{"not": ' * 500 + "true" + "}" * 500, "nested too deeply"),
    ],
)
def test_no_schema(text: str, said: str) -> None:
    assert said in problem(text)


def test_every_problem_of_a_schema_at_once() -> None:
    found = problems(
        '{"type": "object", "properties": {"a": {"type": "int"}, "b": {"maxLength": -1}}, "required": 1}'
    )
    assert len(found) == 3
    found = problems('{"items": {"pattern": "("}, "$ref": "#/x", "requierd": []}')
    assert len(found) == 3


def test_no_array_is_a_schema(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["name", "age"]')
    assert "a JSON Schema is an object" in problem(str(tmp_path / "list.json"))


def test_the_order_of_fields_is_kept() -> None:
    assert canonical(parse_schema("b, a")).index('"b"') < canonical(parse_schema("b, a")).index('"a"')
    assert canonical(parse_schema("größe")) == (
        '{"type":"object","properties":{"größe":{"type":"string"}},"required":["größe"],"additionalProperties":false}'
    )


def test_columns() -> None:
    assert arrow_type(
        parse_schema("name, age? int, ratio float, ok bool, mood a|b, also? a|b, tags list[int]")
    ) == (
        pa.struct(
            {
                "name": pa.string(),
                "age": pa.int64(),
                "ratio": pa.float64(),
                "ok": pa.bool_(),
                "mood": pa.string(),
                "also": pa.string(),
                "tags": pa.list_(pa.int64()),
            }
        )
    )
    nested = parse_schema("box int")
    assert arrow_type({"type": "array", "items": nested}) == pa.list_(pa.struct({"box": pa.int64()}))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False},
        {"type": "object", "additionalProperties": False},
        {"type": ["string", "integer"]},
        {"enum": ["a", 1]},
        {"enum": [None]},
        {"anyOf": [{"type": "string"}]},
        {"type": "array"},
        {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "string"}},
        {"type": "null"},
        {"minimum": 0},
        {**parse_schema("a"), "properties": {"a": True}},
        {**parse_schema("a"), "properties": {"a": {"type": "object"}}},
    ],
)
def test_no_column_fits_exactly(schema: dict[str, Any]) -> None:
    assert arrow_type(schema) is None


def test_answers() -> None:
    text = '{"name": "Ann", "age": 3, "tags": ["a", "\\u00e9\\ud83d\\ude00"]}'
    assert validate(text, PERSON) == {"name": "Ann", "age": 3, "tags": ["a", "é😀"]}
    assert validate(' {"name":"Ann","age":3,"tags":[]}\n', PERSON)["tags"] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "Ann", "age": 3', "is no JSON: Expecting ',' delimiter"),
        ("I am sorry, no.", "is no JSON: Expecting value"),
        ("", "is no JSON"),
        ('{"name": "Ann", "age": "3", "tags": []}', "$.age: '3' is not of type 'integer'"),
        ('{"name": "Ann", "age": 3}', "'tags' is a required property"),
        ('{"name": "Ann", "age": 3, "tags": [], "more": 1}', "'more' was unexpected"),
        ('{"name": "Ann", "age": 3, "age": 4, "tags": []}', "the name 'age' is there twice"),
        ('{"name": "Ann", "age": NaN, "tags": []}', "NaN is no JSON"),
        (
            '{"name": "Ann", "age": 9223372036854775808, "tags": []}',
            "9223372036854775808 does not fit into 64 bits",
        ),
        ('{"name": "Ann", "age": -9223372036854775809, "tags": []}', "does not fit into 64 bits"),
        ('{"name": "Ann", "age": 1e19, "tags": []}', "does not fit into 64 bits"),
        ('{"name": "Ann", "age": ' + "9" * 5000 + ', "tags": []}', "does not fit into 64 bits"),
        ('{"name": "Ann", "age": 1e999, "tags": []}', "the number 1e999 is too large"),
        ('{"name": "\\ud800", "age": 3, "tags": []}', "half a surrogate pair"),
        ('{"name": "Ann", "age": 3, "tags": []} or so', "Extra data"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_answers_that_are_refused(text: str, said: str) -> None:
    assert said in refused(text, PERSON)


def test_an_answer_that_was_cut() -> None:
    assert "was cut at --max-new-tokens: give more" in refused('{"name": "An', PERSON, cut=True)


def test_a_recursive_schema_and_a_deep_answer() -> None:
    schema = parse_schema('{"type": "array", "items": {"$ref": "#"}}')
    assert validate("[[], [[]]]", schema) == [[], [[]]]
    assert "nested too deeply" in refused("[" * 900 + "]" * 900, schema)


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a registry of its own jsonschema opens the URL of a $ref."""
    opened = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: opened.append(a))
    problem('{"$ref": "http://127.0.0.1:9/schema.json"}')
    with pytest.raises(Exception, match="Unresolvable"):
        validate("1", {"$ref": "http://127.0.0.1:9/schema.json"})
    assert opened == []


def test_numbers_are_what_the_column_holds() -> None:
    schema = parse_schema("ratio float, age? int, sizes list[float]")
    value = validate('{"ratio": 9007199254740993, "age": 3.0, "sizes": [1, 2.5]}', schema)
    assert value == {"ratio": 9007199254740992.0, "age": 3, "sizes": [1.0, 2.5]}
    assert [type(v) for v in (value["ratio"], value["age"], value["sizes"][0])] == [float, int, float]
    assert pa.array([value], arrow_type(schema)).to_pylist() == [value]


def test_all_subschemas() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"title": "item"}}, "title": {"const": {"type": "string"}}},
        "anyOf": [{"title": "any"}, True],
        "$defs": {"d": {"title": "def"}},
    }
    titles = [part["title"] for part in subschemas(schema) if isinstance(part.get("title"), str)]
    assert sorted(titles) == ["any", "def", "item"]
    assert sum(1 for _ in subschemas(schema)) == 6


SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(st.characters(exclude_categories=["Cs"])),
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
    "red|blue": st.sampled_from(["red", "blue"]),
}


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, Any]:
    """A schema in the short form and a value that keeps to it."""
    names = draw(
        st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,5}", fullmatch=True), min_size=1, max_size=5, unique=True)
    )
    written, value = [], {}
    for name in names:
        kind = draw(st.sampled_from(sorted(SCALARS)))
        one, listed, optional = SCALARS[kind], draw(st.booleans()), draw(st.booleans())
        one = st.lists(one, max_size=3) if listed else one
        value[name] = draw(st.none() | one if optional else one)
        written.append(f"{name}{'?' * optional} {f'list[{kind}]' if listed else kind}")
    return ", ".join(written), value


@given(answers())
def test_what_keeps_to_a_schema_is_in_its_column(case: tuple[str, Any]) -> None:
    written, value = case
    schema = parse_schema(written)
    found = validate(json.dumps(value), schema)
    assert found == value
    assert pa.array([found, None], arrow_type(schema)).to_pylist() == [value, None]


@given(st.text(max_size=40))
def test_any_text_is_a_schema_or_a_clear_error(text: str) -> None:
    found: list[str] = []
    try:
        schema = parse_schema(text)
        assert parse_schema(canonical(schema)) == schema
    except ConfigError as error:
        found = error.problems
    assert all("--schema" in line for line in found)


@given(st.text(alphabet='{}[]":,ane0.1-\\ud8\n ', max_size=20))
def test_any_answer_is_a_value_or_a_row_error(text: str) -> None:
    code, value = "invalid_output", None
    try:
        value = validate(text, {"type": ["object", "array", "string", "number"]})
    except RowError as error:
        code = error.code
    assert code == "invalid_output"
    assert json.loads(json.dumps(value)) == value

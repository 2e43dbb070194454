"""Templates: columns as variables, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.core.errors import ConfigError
from mmcli.core.template import Template


def test_columns_get_their_values() -> None:
    template = Template.parse("Is {title} by {author name}? {title}! {{not}}")
    assert template.columns == ("title", "author name")
    assert template.render({"title": "Emma", "author name": 3}) == "Is Emma by 3? Emma! {not}"


@pytest.mark.parametrize(
    "text", ["{", "}", "{}", "{a", "{a.b!r}", "{a:>10}", "{0!s}", "{ a}", "{a}}", "{a:{b}}"]
)  # fmt: skip
def test_what_is_no_column_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a column is \{title\}, a brace itself is written twice"):
        Template.parse(text)


def test_attributes_and_indices_are_but_names() -> None:
    # As columns they do not exist; nothing of Python can be reached.
    assert Template.parse("{a.__class__} {a[0]}").columns == ("a.__class__", "a[0]")


@given(st.text())
def test_values_are_never_read_as_templates(value: str) -> None:
    assert Template.parse("<{a}>").render({"a": value}) == f"<{value}>"


@given(st.text())
def test_a_text_with_doubled_braces_is_itself(text: str) -> None:
    template = Template.parse(text.replace("{", "{{").replace("}", "}}"))
    assert (template.columns, template.render({})) == ((), text)


def test_values_that_are_no_strings() -> None:
    render = Template.parse("{a}").render
    assert [render({"a": v}) for v in (1.5, True, ["x", 1], {"k": None})] == [
        "1.5",
        "true",
        '["x", 1]',
        '{"k": null}',
    ]

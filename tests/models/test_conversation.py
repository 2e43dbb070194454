"""Conversations as columns hold them: what they are, and what is wrong with those that are none."""

from __future__ import annotations

from typing import Any

import pytest

from mmcli.core.errors import RowError
from mmcli.models.conversation import Conversation, parse_messages


def says(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


def text(said: Any) -> dict[str, Any]:
    """As Parquet has it, whose parts all have the same fields."""
    return {"type": "text", "text": said, "image": None}


def test_parts_and_places() -> None:
    parts = [text("See"), {"type": "video", "text": None}, {"type": "image"}, text("this.")]
    cell = [says("system", "Be short."), says("user", parts), says("assistant", [text("Yes.")])]
    found = parse_messages(cell, "talk", "assistant")
    assert found == Conversation(("Be short.",), (("See", "this."),), (("Yes.",),), {"video": 1, "image": 1})
    media = [("image", 1), ("audio", 2), ("video", 3), ("text", "t")]
    # In the order of their places; those without one first.
    assert found.placed(media) == [(media[1], 0), (media[3], 0), (media[2], 1), (media[0], 1)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (None, "it is empty"),
        ([], "it is empty"),
        ("Hello.", "'Hello.' is no list of messages"),
        (["Hello."], "message 1, 'Hello.', is no object"),
        ([{"content": "x"}], "message 1 has the role null; system, user and assistant are known"),
        ([says("user"), says("tool")], "message 2 has the role 'tool'"),
        ([says("assistant"), says("user")], "message 1 is of the assistant, where it is the user's turn"),
        (
            [says("user"), says("user")],
            "message 2 is of the user, where it is the assistant's turn: they alternate",
        ),
        ([says("user"), says("system"), says("user")], "message 2 is of the system; only the first can be"),
        ([says("system")], "it ends with the role system"),
        (
            [says("user"), says("assistant")],
            "it ends with the role assistant; the last message must be one of the u",
        ),
        ([says("user", None)], "message 1 (user) has the content null"),
        ([says("user", [text(" ")])], "message 1 (user) has no text"),
        ([says("user", [text(7)])], "message 1 (user) has the part {'type': 'text', 'text': 7"),
        ([says("user", [{"type": "image_url", "url": "x"}])], "which is neither text nor a place for a medium"),
        ([says("user", [{"type": "image", "url": "a.png"}])], "message 1 (user) has the image itself ('url')"),
        ([says("user", [{"type": "image"}, {"type": "image"}])], "message 1 (user) has two places for image"),
        ([says("user"), says("assistant", [{"type": "image"}])], "message 2 (assistant) has a place for image"),
        ([says("user", "\ud800")], "message 1 (user) has a text that is not UTF-8"),
    ],
)
def test_what_is_no_conversation(cell: Any, said: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_messages(cell, "talk", "user")
    assert (caught.value.code, caught.value.stage) == ("bad_row", "source")
    assert caught.value.message.startswith("column 'talk': ")
    assert said in caught.value.message

"""A conversation as a column holds it: [{"role": ..., "content": ...}, ...], the `messages` of chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmcli.core.errors import RowError, one_line
from mmcli.core.records import Modality, Payload

# The parts of a message that are text, as the template gets them.
Texts = tuple[str, ...]
Decoded = tuple[Modality, Payload]
_MEDIA: tuple[Modality, ...] = ("image", "audio", "video")
_WANTED = {
    "user": "the last message must be one of the user, which the model answers",
    "assistant": "the last message must be one of the assistant, which is learned",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of user and assistant.

    questions  what the user says
    answers    what the assistant says to each; to all but the last question, where the user speaks last
    places     of media for which the first question has a place: before which of its texts, by modality
    """

    system: Texts | None
    questions: tuple[Texts, ...]
    answers: tuple[Texts, ...]
    places: Mapping[Modality, int]

    def placed(self, media: Sequence[Decoded]) -> list[tuple[Decoded, int]]:
        """The row's media in their order, each with the number of the first question's text that it stands before.

        Those without a place come first. Raises RowError `bad_row` for a place without a medium.
        """
        # A row without media is an empty text.
        media = [(modality, payload) for modality, payload in media if modality != "text" or payload]
        held = {modality for modality, _ in media}
        if lacking := [modality for modality in self.places if modality not in held]:
            there = f"{' and '.join(sorted(held))} alone" if held else "no medium"
            raise RowError("bad_row", f"the conversation has a place for {lacking[0]}; the row has {there}")
        order = list(self.places)
        unplaced = [(one, 0) for one in media if one[0] not in order]
        placed = [(one, self.places[one[0]]) for one in media if one[0] in order]
        return [*unplaced, *sorted(placed, key=lambda one: order.index(one[0][0]))]


def parse_messages(cell: Any, column: str, last: Literal["user", "assistant"]) -> Conversation:
    """The cell of a column, whose last message is by `last`. Raises RowError `bad_row`, saying what is wrong."""
    try:
        return _parsed(cell, last)
    except ValueError as error:
        raise RowError("bad_row", f"column {column!r}: {error}", stage="source") from error


def _parsed(cell: Any, last: str) -> Conversation:
    if cell is None or (isinstance(cell, list) and not cell):
        raise ValueError("it is empty; a list of messages with role and content is expected")
    if not isinstance(cell, list):
        raise ValueError(f"{_shown(cell)} is no list of messages with role and content")
    said: dict[str, list[Texts]] = {"system": [], "user": [], "assistant": []}
    places: dict[Modality, int] = {}
    for number, message in enumerate(cell, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number}, {_shown(message)}, is no object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in said:
            raise ValueError(f"message {number} has the role {_shown(role)}; system, user and assistant are known")
        _check_turn(role, number, said)
        first = places if role == "user" and not said["user"] else None
        said[role].append(_texts(message.get("content"), f"message {number} ({role})", first))
    if cell[-1]["role"] != last:
        raise ValueError(f"it ends with the role {cell[-1]['role']}; {_WANTED[last]}")
    system = next(iter(said["system"]), None)
    return Conversation(system, tuple(said["user"]), tuple(said["assistant"]), places)


def _check_turn(role: str, number: int, said: Mapping[str, Sequence[Texts]]) -> None:
    """Raise ValueError unless it is that role's turn: a system message first, then user and assistant."""
    if role == "system":
        if number > 1:
            raise ValueError(f"message {number} is of the system; only the first can be")
        return
    turn = "user" if len(said["user"]) == len(said["assistant"]) else "assistant"
    if role != turn:
        raise ValueError(f"message {number} is of the {role}, where it is the {turn}'s turn: they alternate")


def _texts(content: Any, where: str, places: dict[Modality, int] | None) -> Texts:
    """Those of a message's content; its places for media are added to `places`, None where it can have none."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"{where} has the content {_shown(content)}; a text or a list of parts is expected")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_unicode(part["text"], where))
        elif kind in _MEDIA:
            _add_place(part, where, places, len(texts))
        else:
            raise ValueError(f"{where} has the part {_shown(part)}, which is neither text nor a place for a medium")
    if not "".join(texts).strip():
        raise ValueError(f"{where} has no text")
    return tuple(texts)


def _add_place(part: dict[str, Any], where: str, places: dict[Modality, int] | None, before: int) -> None:
    kind: Modality = part["type"]
    if payload := sorted(name for name, value in part.items() if name != "type" and value is not None):
        raise ValueError(
            f"{where} has the {kind} itself ({payload[0]!r}); media are taken from the row's own columns"
        )
    if places is None:
        raise ValueError(f"{where} has a place for {kind}; the row's media belong to the first message of the user")
    if kind in places:
        raise ValueError(f"{where} has two places for {kind}; a row has one")
    places[kind] = before


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeError as error:
        raise ValueError(f"{where} has a text that is not UTF-8") from error
    return text


def _shown(value: Any) -> str:
    return "null" if value is None else one_line(repr(value), 60)

"""What a record's prompts are, once the columns that they name have values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from mmcli.core.errors import RowError
from mmcli.core.records import Modality
from mmcli.core.template import Template
from mmcli.models.conversation import Conversation, parse_messages
from mmcli.models.options import Example, Generation

# What a chat model is asked without --prompt, by the first of these that a record holds.
DEFAULT_PROMPTS: dict[Modality, str] = {
    "video": "Describe this video in one sentence.",
    "image": "Describe this image in one sentence.",
    "audio": "Describe this sound in one sentence.",
    "text": "Summarize this text in one sentence.",
}


def default_prompt(media: Sequence[tuple[Modality, Any]]) -> str:
    """What a chat model is asked of a record without --prompt."""
    held = {modality for modality, _ in media}
    return next(text for modality, text in DEFAULT_PROMPTS.items() if modality in held)


class Prompts:
    """The texts of a Generation, parsed; made in a decode worker."""

    def __init__(self, generation: Generation) -> None:
        self._variables = generation.variables
        self._examples = generation.examples
        self._messages = generation.messages
        self._chosen = generation.chosen
        self._prompts = [text if text is None else Template.parse(text) for text in generation.prompts]
        self._system = None if generation.system is None else Template.parse(generation.system)

    def render(self, variables: Sequence[Any]) -> list[str | None]:
        """One text for each output; None where there is none. Raises RowError `bad_row` for a null cell."""
        values = self._values(variables)
        return [_render(prompt, values) for prompt in self._prompts]

    def system(self, variables: Sequence[Any]) -> str | None:
        """The system message. Raises as `render` does."""
        return _render(self._system, self._values(variables))

    def conversation(self, variables: Sequence[Any]) -> Conversation | None:
        """What was said so far, with the question last; None where nothing was. Raises RowError `bad_row`."""
        if self._messages is None:
            return None
        return parse_messages(self._values(variables)[self._messages], self._messages, "user")

    def examples(self, variables: Sequence[Any]) -> tuple[Example, ...]:
        """The solved cases that come before the question."""
        if not self._chosen:
            return self._examples
        return tuple(self._examples[index] for index in variables[-1])

    def _values(self, variables: Sequence[Any]) -> Mapping[str, Any]:
        values = variables[:-1] if self._chosen else variables
        return dict(zip(self._variables, values, strict=True))


def _render(template: Template | None, values: Mapping[str, Any]) -> str | None:
    if template is None:
        return None
    for name in template.columns:
        if values[name] is None or (isinstance(values[name], str) and not values[name].strip()):
            raise RowError("bad_row", f"column {name!r}, which the prompt names, is empty", stage="source")
    return template.render(values)


def joint_modality(media: Sequence[tuple[Modality, Any]]) -> Modality:
    """What a Sample of several media is: `image+text`."""
    return cast(Modality, "+".join(modality for modality, _ in media))

"""`--choices`: how likely a model that writes finds each of a few answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmcli.core.errors import ConfigError
from mmcli.core.records import Scored
from mmcli.models.decoding import score_choices, scored


class Choices:
    """The probability of a choice is that of writing it and nothing else, as a share of that of all choices.

    A choice is spelled with and without a space before it, as the prompt may end: its probability is the sum. The
    end token counts, so that `yes` is not also the beginning of `yes, but`.
    """

    def __init__(self, tokenizer: Any, names: Sequence[str], ends: Sequence[int]) -> None:
        """Raises ConfigError for a choice that the tokenizer has no tokens for, and for two that are the same."""
        self._names = names
        self._spellings: list[list[int]] = []
        self._of: list[int] = []
        seen: dict[tuple[int, ...], str] = {}
        for number, name in enumerate(names):
            for spelling in _spellings(tokenizer, name):
                other = seen.setdefault(spelling, name)
                if other != name:
                    raise ConfigError(f"--choices: {other!r} and {name!r} are the same to the model's tokenizer")
                self._spellings.append([*spelling, *ends[:1]])
                self._of.append(number)

    def __call__(self, generate: Callable[..., Any]) -> list[Scored]:
        """`generate`: a model's, with the inputs of a batch already given to it."""
        found = score_choices(generate, self._spellings)
        of = torch.tensor(self._of)
        sums = [found[:, of == number].logsumexp(dim=1) for number in range(len(self._names))]
        return scored(torch.stack(sums, dim=1), self._names)


def _spellings(tokenizer: Any, name: str) -> list[tuple[int, ...]]:
    """Tokens of each way of writing it, each once."""
    found = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (name, f" {name}")]
    if not all(found) or any(tokenizer.unk_token_id in ids for ids in found):
        raise ConfigError(f"--choices {name!r}: the model's tokenizer has no tokens for it")
    return list(dict.fromkeys(found))

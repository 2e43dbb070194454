"""Strings -> what a model is asked: questions, templates, choices, schema, solved examples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.compose import Columns
from mmcli.cli.options import CaptionArguments, GenerationArguments, QuestionArguments, SpeechArguments
from mmcli.cli.parse import Problems
from mmcli.core.errors import ConfigError
from mmcli.core.template import Template

if TYPE_CHECKING:
    from mmcli.models.options import Example, Generation

# `colour=What colour is it?`: the name begins the columns of that answer.
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(?=\S)(.*)", re.DOTALL)
# Texts of prompts are read whole.
_MOST_BYTES = 1024 * 1024
# What is given as examples is put before every question.
_MOST_EXAMPLES = 100_000
# --max-new-tokens auto.
_TOKENS = {"caption": 50, "ask": 100, "choices": 20, "json": 300}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command asks of a model, before it is known which model.

    names    of the questions, "" for one alone; they begin its columns
    schema   the JSON Schema of answers
    flags    what the command line calls columns that are not named by a text: column -> flag
    """

    names: tuple[str, ...]
    generation: Generation
    schema: dict[str, Any] | None = None
    flags: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> Columns:
        """The columns of a manifest that are wanted. Features and conversations need no medium beside them."""
        names, features = self.generation.variables, self.generation.features
        said = tuple(f"{self.flags[n]} {n}" if n in self.flags else f"the prompt's {{{n}}}" for n in names)
        regions = (features, self.generation.boxes)
        text = next((name for name in names if name not in regions), None)
        return Columns(names, said, self.generation.messages is not None, features is not None, text)


def read_caption(
    caption: CaptionArguments, speech: SpeechArguments, how: GenerationArguments, seed: int, problems: Problems
) -> Asked | None:
    """What `mmcli caption` asks; problems are added."""
    from mmcli.models.options import Generation

    before = len(problems.lines)
    prompt = problems.collect(read_text, "--prompt", caption.prompt)
    wanted = Generation(prompt=prompt, language=speech.language, translate=speech.translate)
    generation = _generation(wanted, how, seed, problems)
    return Asked(("",), generation) if len(problems.lines) == before else None


def read_questions(
    asked: QuestionArguments, how: GenerationArguments, seed: int, problems: Problems
) -> Asked | None:
    """What `mmcli ask` asks; problems are added."""
    from mmcli.models.options import Generation

    before = len(problems.lines)
    if asked.messages_column is None:
        questions = problems.collect(_questions, asked) or ()
    else:
        questions = ()
        _check_alone(asked, how, problems)
    answers = problems.collect(_answers, asked.answers) or ()
    choices = problems.collect(_choices, asked.choices) or ()
    schema = canonical = None
    if asked.schema is not None:
        from mmcli.core.schema import canonical as text_of
        from mmcli.core.schema import parse_schema

        schema = problems.collect(parse_schema, asked.schema)
        canonical = None if schema is None else text_of(schema)
        if choices:
            problems.add("--choices and --schema exclude one another; a field of a schema can have choices")
    if asked.boxes_column is not None and asked.features_column is None:
        problems.add("--boxes-column goes with --features-column: the boxes of the regions that it describes")
    generation = Generation(
        questions=tuple(text for _, text in questions),
        choices=choices,
        answers=answers,
        features=asked.features_column,
        boxes=asked.boxes_column,
        schema=canonical,
        messages=asked.messages_column,
        task="ask",
    )
    generation = _generation(generation, how, seed, problems)
    if len(problems.lines) > before:
        return None
    flags = {
        "--question-column": _named(asked.question_column or "")[1] or None,
        "--features-column": asked.features_column,
        "--boxes-column": asked.boxes_column,
        "--messages-column": asked.messages_column,
    }
    named = {column: flag for flag, column in flags.items() if column is not None}
    return Asked(tuple(name for name, _ in questions) or ("",), generation, schema, named)


def _check_alone(asked: QuestionArguments, how: GenerationArguments, problems: Problems) -> None:
    """Add what says something beside a conversation."""
    beside = {
        "-q": asked.question,
        "--questions": asked.questions,
        "--question-column": asked.question_column,
        "--system": how.system,
        "--examples": how.examples,
        "--features-column": asked.features_column,
    }
    if flags := [flag for flag, value in beside.items() if value]:
        problems.add(
            f"--messages-column {asked.messages_column}: a conversation holds all that is said; leave out "
            f"{' and '.join(flags)}"
        )


def _generation(wanted: Generation, how: GenerationArguments, seed: int, problems: Problems) -> Generation:
    """`wanted`, with what captions and answers share."""
    tokens = problems.collect(parse.count_or_auto, "--max-new-tokens", how.max_new_tokens, 1)
    beams = problems.collect(parse.number, "--num-beams", how.num_beams, 1) or 1
    temperature = problems.collect(parse.decimal, "--temperature", how.temperature) or 0.0
    if beams > 1 and temperature:
        problems.add("--num-beams searches for the likeliest text, --temperature draws one; give one of them")
    for flag, given in (("--choices", wanted.choices), ("--schema", wanted.schema)):
        if given and beams > 1:
            problems.add(f"{flag} does not go with --num-beams {beams}; leave one out")
    if wanted.choices and temperature:
        problems.add("--choices compares probabilities, nothing is drawn; leave --temperature out")
    system = problems.collect(read_text, "--system", how.system)
    examples = problems.collect(_examples, how) or ()
    kind = "json" if wanted.schema else "choices" if wanted.choices else wanted.task
    wanted = replace(
        wanted,
        max_new_tokens=tokens or _TOKENS[kind],
        limited=tokens is not None,
        num_beams=beams,
        temperature=temperature,
        seed=seed,
        system=system,
        examples=examples,
        chosen=how.examples_select != "all",
    )
    return replace(wanted, variables=problems.collect(_columns, wanted) or ())


def _columns(generation: Generation) -> tuple[str, ...]:
    texts = [*generation.questions, generation.prompt, generation.system]
    names = [name for text in texts if text is not None for name in Template.parse(text).columns]
    whole = [name for name in (generation.messages, generation.features, generation.boxes) if name is not None]
    return tuple(dict.fromkeys([*names, *whole]))


def read_text(option: str, text: str | None) -> str | None:
    """The text, or that of the file which `@FILE` names. Raises ConfigError."""
    if text is None or not text.startswith("@"):
        if text is not None and not text.strip():
            raise ConfigError(f"{option} is empty; leave it out, or give a text")
        return text
    return _file(option, Path(text[1:])).strip()


def _file(option: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is not UTF-8") from error
    if len(content) > _MOST_BYTES or not text.strip():
        what = "empty" if not text.strip() else f"more than {_MOST_BYTES} bytes"
        raise ConfigError(f"{option}: {path} is {what}; a text to ask is expected there")
    return text


def _questions(asked: QuestionArguments) -> tuple[tuple[str, str], ...]:
    """(name, text) of each question. Raises ConfigError."""
    found: list[tuple[str, str]] = []
    for given in asked.question or ():
        name, text = _named(given)
        found.append((name, str(read_text("--question", text))))
    if asked.questions is not None:
        lines = _file("--questions", asked.questions).splitlines()
        found += [_named(line.strip()) for line in lines if line.strip()]
    if asked.question_column is not None:
        name, column = _named(asked.question_column)
        if set(column) & set("{}!:"):
            raise ConfigError(f"--question-column {column!r}: rename it, without any of {{ }} ! :")
        found.append((name, "{" + column + "}"))
    if not found:
        raise ConfigError("nothing is asked; add -q 'What is in the picture?', --question-column or --questions")
    names = [name or (f"q{number}" if len(found) > 1 else "") for number, (name, _) in enumerate(found, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two questions have the name {twice[0]}; names tell their columns apart")
    return tuple(zip(names, [text for _, text in found], strict=True))


def _named(line: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(line)
    return (match[1], match[2]) if match else ("", line)


def _answers(path: Path | None) -> tuple[str, ...]:
    """The names of a model's answers, one a line or as a JSON list. Raises ConfigError."""
    if path is None:
        return ()
    text = _file("--answers", path)
    if not text.lstrip().startswith("["):
        return tuple(line.strip() for line in text.strip().splitlines())
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--answers: {path} is no JSON list: {error}") from error
    if not all(isinstance(one, str) for one in found):
        raise ConfigError(f"--answers: {path} holds other things than strings")
    return tuple(found)


def _choices(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    choices = tuple(one.strip() for one in text.split(","))
    if "" in choices or len(choices) < 2 or len(set(choices)) < len(choices):
        raise ConfigError(f"--choices {text!r}: give two or more different answers, e.g. yes,no,unclear")
    return choices


def _examples(how: GenerationArguments) -> tuple[Example, ...]:
    """The solved cases of --examples. Raises ConfigError."""
    selects = ("all", "random", "similar")
    parse.choice("--examples-select", how.examples_select, selects)
    count = parse.number("--num-examples", how.num_examples, 1)
    if how.examples is None:
        if how.examples_select != "all":
            raise ConfigError(f"--examples-select {how.examples_select}: there are no --examples to select from")
        return ()
    given = how.embeddings is not None and how.examples_embeddings is not None
    if how.examples_select == "similar" and not given:
        raise ConfigError(
            "--examples-select similar needs --embeddings and --examples-embeddings: "
            "mmcli embed of the inputs and of the examples, with one model"
        )
    from mmcli.cli.examples import read_examples

    examples = read_examples(str(how.examples), _MOST_EXAMPLES)
    if how.examples_select != "all" and count > len(examples):
        raise ConfigError(f"--num-examples {count}: {how.examples} has {len(examples)}")
    return examples

"""What the objectives *caption* and *vqa* of `mmcli finetune` want of rows, and make of the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.messages import Messages
from mmcli.cli.options import TrainingArguments
from mmcli.cli.parse import Problems
from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import Record
from mmcli.core.template import Template

if TYPE_CHECKING:
    from mmcli.cli.objectives import Given, Listed
    from mmcli.models.options import Generation, ModelOptions
    from mmcli.models.plan import GenerationPlan
    from mmcli.training.auxiliary import AuxiliaryLabels
    from mmcli.training.objective import Objective
    from mmcli.training.options import TrainOptions
    from mmcli.training.write import Form

_NAMED = 3
MESSAGES = "--messages-column"
# As `mmcli caption` and `mmcli ask` have it.
_TOKENS = {"caption": 50, "vqa": 100}


@dataclass(frozen=True, slots=True)
class WriteRecipe:
    """Of *caption* and *vqa*.

    name     of the objective
    metrics  see mmcli.cli.objectives.Recipe
    target   the column of what is learned, where none is named
    """

    name: str
    metrics: tuple[str, ...]
    target: str
    labelled: bool = False

    def columns(self, training: TrainingArguments) -> dict[str, str]:
        """The question's or the conversation's, those of auxiliary labels, and last the text's that is learned.

        The text that a conversation teaches is its own last one: see split_conversations.
        """
        auxiliary = dict.fromkeys(training.auxiliary_column or (), "--auxiliary-column")
        if training.messages_column is not None and self.name == "vqa":
            return {training.messages_column: MESSAGES, **auxiliary}
        asked = {training.question_column or "question": "--question-column"} if self.name == "vqa" else {}
        return {**asked, **auxiliary, training.target_column or self.target: "--target-column"}

    def check(self, train: Listed, val: Listed | None, messages: Messages, problems: Problems) -> None:
        """A text in every row."""
        for what, listed in (("INPUT", train), ("--val", val)):
            if listed is None:
                continue
            good = [record for record in listed.records if record.error is None]
            if good and not good[0].variables:
                problems.add(f"{what}: --objective {self.name} needs a manifest with texts to learn, not a folder")
                continue
            found = [(record.id, references(record.variables[-1])) for record in good]
            if bad := [name for name, texts in found if not texts]:
                more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
                problems.add(f"{what}: {', '.join(bad[:_NAMED])}{more} have no {self.target}")
            elif self.name == "caption" and (several := [name for name, texts in found if len(texts) > 1]):
                problems.add(f"{what}: {several[0]} has several captions; give each a row of its own")

    def make(
        self, given: Given, model: ModelOptions, train: Listed, options: TrainOptions, metric: str
    ) -> Objective:
        """The model as the command `caption` or `ask` has it, and how it learns."""
        from mmcli.training.write import Write

        texts = [texts for texts in self.targets(train, None) if texts]
        messages = Messages(quiet=given.messages.quiet, log_file=given.messages.log_file)
        if metric == "vqa_accuracy" and min(map(len, texts)) < 4:
            raise ConfigError("--metric vqa_accuracy needs a list of 4 answers or more in every row")
        if options.balance:
            raise ConfigError("--balance is of --objective classify; leave it out")
        model, generation = replace(model, dtype="float32"), self._generation(given)
        plan, form = self._form(given, model, generation, texts, messages)
        if metric == "token_accuracy" and form.accuracy is None:
            raise ConfigError("--metric token_accuracy: a ViLT chooses answers and writes no token")
        if options.label_smoothing and form.accuracy is None:
            raise ConfigError("--label-smoothing: a ViLT's targets are soft already; leave it out")
        heard = plan.output == "speech"
        if metric == "neg_wer" and not heard:
            raise ConfigError(f"--metric neg_wer is of speech, by Whisper; -m {model.model} hears none")
        measure = measure_answers if self.name == "vqa" else measure_speech if heard else measure_texts
        smoothing, random = options.label_smoothing, given.training.from_config
        return Write(plan, form, measure, smoothing, random, name=self.name, metric=metric)

    def _generation(self, given: Given) -> Generation:
        """What inference is asked for without options. Raises ConfigError."""
        from mmcli.models.options import Generation

        limit = parse.count_or_auto("--max-new-tokens", given.training.max_new_tokens, 1)
        question, messages = given.training.question_column or "question", given.training.messages_column
        if set(question) & set("{}!:"):
            raise ConfigError(f"--question-column {question!r}: rename it, without any of {{ }} ! :")
        prompt = given.training.prompt
        if prompt is not None and (self.name == "vqa" or Template.parse(prompt).columns):
            raise ConfigError(
                f"--prompt {prompt!r}: of captions, and the same for every row; --objective vqa asks each"
            )
        columns = tuple(self.columns(given.training))
        return Generation(
            prompt=prompt,
            max_new_tokens=limit or _TOKENS[self.name],
            limited=limit is not None,
            questions=("{" + question + "}",) if self.name == "vqa" and messages is None else (),
            variables=columns if messages is None else (*columns, f"the last of {messages}"),
            messages=messages,
            task="ask" if self.name == "vqa" else "caption",
            language=given.training.language,
        )

    def _form(
        self,
        given: Given,
        model: ModelOptions,
        generation: Generation,
        texts: Sequence[tuple[str, ...]],
        messages: Messages,
    ) -> tuple[GenerationPlan, Form]:
        from mmcli.models.checkpoint import open_checkpoint
        from mmcli.models.plan import GenerationPlan
        from mmcli.models.resolve import resolve_writer
        from mmcli.training.write_answers import Answers, answers_plan, check_answers
        from mmcli.training.write_tokens import check_texts, form_of

        if model.model.startswith(("fake:", "openai:")):
            raise ConfigError(f"-m {model.model}: there are no weights to train; give a directory or a hub id")
        vilt = self.name == "vqa" and open_checkpoint(model).json("config.json").get("model_type") == "vilt"
        # Of a conversation resolve_writer says why not.
        if vilt and generation.messages is None:
            plan = answers_plan(model, generation, texts, given.training.new_answers)
            unknown = check_answers(texts, plan.detail.answers)
            if unknown:
                shown = ", ".join(unknown[:_NAMED])
                messages.note(f"{len(unknown)} answers that the base does not know are not learned: {shown}")
            return plan, Answers(plan)
        if given.training.new_answers:
            raise ConfigError(f"--new-answers: -m {model.model} writes its answers; leave it out")
        writer = resolve_writer(model, generation)
        assert isinstance(writer, GenerationPlan)
        form = form_of(writer)
        cut = check_texts(form.plan, texts)
        if cut:
            most = form.plan.generation.max_new_tokens
            messages.note(f"{cut} texts of INPUT are cut at {most} tokens; --max-new-tokens N keeps more")
        return form.plan, form

    def targets(self, listed: Listed, objective: Any) -> list[Any]:
        """All texts that a row has."""
        return [references(record.variables[-1]) if record.variables else () for record in listed.records]


def auxiliary_labels(
    training: TrainingArguments, train: Listed, weight: float, problems: Problems
) -> AuxiliaryLabels | None:
    """What --auxiliary-column asks for, of the training rows; None: nothing."""
    from mmcli.training.auxiliary import AuxiliaryLabels, label_text

    names = list(dict.fromkeys(training.auxiliary_column or ()))
    if not names:
        return None
    media = {one.modality for record in train.records for one in record.media} - {"text", None}
    if len(media) != 1:
        problems.add("--auxiliary-column: name one column of what is seen or heard: --image-column, ...")
        return None
    cells = [auxiliary_cells(record, training) for record in train.records if record.error is None]
    classes = {}
    for name, column in zip(names, zip(*cells, strict=True), strict=True):
        labels = sorted({label for cell in column if (label := label_text(cell)) is not None})
        if len(labels) < 2:
            problems.add(f"--auxiliary-column {name}: its rows have {len(labels)} labels; two are needed")
        classes[name] = tuple(labels)
    return AuxiliaryLabels(str(*media), classes, weight)


def auxiliary_cells(record: Record, training: TrainingArguments) -> tuple[Any, ...]:
    """A record's cells in the columns of auxiliary labels: behind that of the question or conversation."""
    first = 1 if training.objective == "vqa" else 0
    return record.variables[first : first + len(set(training.auxiliary_column or ()))]


def split_conversations(records: Sequence[Record], column: str, what: str) -> None:
    """Of each record's variables take the last text from the first, the conversation, and put it behind them all.

    So the model is given, and learns from, what `mmcli ask --messages-column` gives it. Raises ConfigError, naming
    rows whose conversation is none or has no last message of the assistant.
    """
    from mmcli.models.conversation import parse_messages

    bad = []
    for record in records:
        if record.error is not None:
            continue
        cell, *others = record.variables
        try:
            answer = parse_messages(cell, column, "assistant").answers[-1]
        except RowError as error:
            bad.append(f"{record.id} ({error.message})")
        else:
            record.variables = (cell[:-1], *others, "".join(answer))
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ConfigError(f"{what}: no conversation to learn from in {', '.join(bad[:_NAMED])}{more}")


def references(cell: Any) -> tuple[str, ...]:
    """The texts of a cell: one, or those of a list; of objects (VQA v2), their `answer`. () where there is none.

    Segments with their times are one text, see mmcli.training.timed.
    """
    from mmcli.training.timed import joined_segments

    if isinstance(cell, str):
        return (cell.strip(),) if cell.strip() else ()
    if cell is None:
        return ()
    if hasattr(cell, "tolist"):
        return tuple(f"{value:g}" for value in cell.ravel().tolist())
    if isinstance(cell, list | tuple):
        if (timed := joined_segments(cell)) is not None:
            return (timed,)
        values = [value.get("answer") if isinstance(value, dict) else value for value in cell]
        return tuple(text for value in values for text in references(value))
    return (str(cell),)


# ---------------------------------------------------------------------------------------------- metrics


def measure_texts(texts: Sequence[str], wanted: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """exact_match: how many are what they should be, but for case and spaces."""
    right = [_plain(text) == _plain(one[0]) for text, one in zip(texts, wanted, strict=True)]
    return {"exact_match": sum(right) / len(right)}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def measure_speech(texts: Sequence[str], wanted: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """As `mmcli eval` has them, without case and punctuation: exact_match and wer."""
    import numpy as np

    from mmcli.evaluation.speech import edits, plain_text
    from mmcli.training.timed import without_times

    heard, true = [plain_text(text) for text in texts], [plain_text(without_times(one[0])) for one in wanted]
    exact = float(np.mean([a == b for a, b in zip(heard, true, strict=True)]))
    *each, words = edits(true, heard)[0].sum(axis=0)
    return {"exact_match": exact, "wer": float(sum(each) / max(1.0, words))}


def measure_answers(texts: Sequence[str], wanted: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """As `mmcli eval` has them: exact_match with the commonest answer; vqa_accuracy where all rows have four."""
    from mmcli.evaluation.vqa import ANNOTATORS, normalize_answer, vqa_accuracy

    exact, accuracy = 0.0, 0.0
    for text, one in zip(texts, wanted, strict=True):
        counts = Counter(map(normalize_answer, one))
        agreeing = counts[normalize_answer(text)]
        exact += agreeing == max(counts.values())
        accuracy += vqa_accuracy(agreeing, len(one))
    found = {"exact_match": exact / len(texts)}
    if min(map(len, wanted)) >= ANNOTATORS:
        found["vqa_accuracy"] = accuracy / len(texts)
    return found


WRITING = {
    "caption": WriteRecipe("caption", ("exact_match", "token_accuracy", "neg_loss", "neg_wer"), "caption"),
    "vqa": WriteRecipe("vqa", ("exact_match", "vqa_accuracy", "token_accuracy", "neg_loss"), "answer"),
}

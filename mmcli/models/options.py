"""What the command line says about the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.records import Media

if TYPE_CHECKING:
    from mmcli.models.head import Head

# What a model that writes is asked for.
Task = Literal["caption", "ask"]


@dataclass(frozen=True, slots=True)
class Example:
    """A solved case, shown to the model before each question (few-shot, as Flamingo's, Alayrac et al. 2022)."""

    media: tuple[Media, ...]
    question: str | None
    answer: str


@dataclass(frozen=True, slots=True)
class Generation:
    """What is asked, and how texts are generated. Texts may name columns: see mmcli.core.template.

    prompt          of captions: what the text goes on from, a Florence-2 task, or what a chat model is told; None:
                    the model's own beginning
    max_new_tokens  a text is cut there
    limited         whether that was asked for: else a model may have a limit of its own
    num_beams       1: greedy, or sampling
    temperature     0: the likeliest token each time; else tokens are drawn from softmax(logits / temperature)
    seed            of the draws; a row's draws depend on it and on the row's own input alone
    questions       one answer to each; () for captions
    variables       the columns that prompt, questions and system name, features and boxes; in the order of
                    Record.variables
    system          the system message of a chat model
    choices         the answer is one of these
    answers         the names of the answers of a model that chooses among them, in its order, where its config.json
                    does not tell them
    features        the column, one of `variables`, with what a detector has found in the picture: float32 [n, D]
    boxes           likewise, where that is: float32 [n, 4]
    schema          the answer is JSON that this JSON Schema allows; as canonical JSON text
    examples        solved cases, shown before each question
    messages        the column, one of `variables`, with a conversation in place of a question: see
                    mmcli.models.conversation
    chosen          each record has examples of its own: the last of Record.variables is a tuple of their indices
    task            "caption" or "ask"
    language        of speech: a code or a name; None: found out for each sound, where the model knows several
    translate       what is said is written in English
    """

    prompt: str | None = None
    max_new_tokens: int = 50
    num_beams: int = 1
    temperature: float = 0.0
    seed: int = 0
    questions: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    system: str | None = None
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    features: str | None = None
    boxes: str | None = None
    schema: str | None = None
    examples: tuple[Example, ...] = ()
    messages: str | None = None
    chosen: bool = False
    task: Task = "caption"
    limited: bool = True
    language: str | None = None
    translate: bool = False

    @property
    def prompts(self) -> tuple[str | None, ...]:
        """One for each output of a record."""
        return self.questions or (self.prompt,)

    def describe(self) -> dict[str, Any]:
        """As JSON values, for the fingerprint: what is set."""
        told = {name: value for name, value in asdict(self).items() if value not in ((), None)}
        del told["limited"]
        if self.answers:
            # Thousands: in their place what identifies them.
            told["answers"] = blake2b("\n".join(self.answers).encode(), digest_size=16).hexdigest()
        if self.examples:
            told["examples"] = [_described(example) for example in self.examples]
        return {**told, "do_sample": self.temperature > 0}


def _described(example: Example) -> dict[str, Any]:
    media = [
        one.text or (blake2b(one.data, digest_size=16).hexdigest() if one.data is not None else one.file)
        for one in example.media
    ]
    return {"media": media, "question": example.question, "answer": example.answer}


@dataclass(frozen=True, slots=True)
class Label:
    """A class, and the texts that stand for it in templates: its name, if nothing else is said."""

    name: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """What becomes of the scores of a set of labels.

    top_k      so many are kept
    threshold  any number of labels applies: each is scored alone, and those that reach it are given; None: one does
    """

    top_k: int = 5
    threshold: float | None = None

    def describe(self) -> dict[str, Any]:
        """As JSON values, for the fingerprint."""
        return {"top_k": self.top_k, "threshold": self.threshold}


@dataclass(frozen=True, slots=True)
class Classification:
    """What is asked of a model that classifies.

    labels       () where the model has its own
    templates    texts with `{}`, where a label's texts are put in; None: the model's usual one
    question     what a chat model is asked, with {labels} in it; None: the usual one
    kept         the labels' vectors as they were kept: (head, what identifies its model)
    """

    labels: tuple[Label, ...] = ()
    templates: tuple[str, ...] | None = None
    question: str | None = None
    ranking: Ranking = Ranking()
    kept: tuple[Head, dict[str, Any]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels, in their order."""
        return tuple(label.name for label in self.labels)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and how it is asked. Nothing but `url` can change a row.

    url          of an OpenAI-compatible API: http://localhost:8000/v1
    concurrency  requests under way at most
    retry_s      so long the server may be away, or busy for every request
    timeout_s    so long it may take for one answer
    """

    url: str
    concurrency: int = 8
    retry_s: float = 120.0
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Batch:
    """A service that is sent requests in a file, and answers in files.

    results  these; () as long as the requests are to be written
    """

    results: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Unresolved options of one model.

    model                hub id, local directory, `openai:NAME` (see mmcli.models.endpoint) or `fake:...`
    revision             branch, tag or commit on the hub
    device, dtype        "auto" or a name
    pooling              how an encoder's tokens become one vector; None: as the checkpoint says
    normalize            unit vectors; None: as the checkpoint or its family does
    frames               frames per clip where the model leaves it open
    attn_implementation  transformers' name; None: its default
    compile              torch.compile the model
    offline              never ask the hub
    trust_remote_code    run Python code that comes with the checkpoint
    allow_pickle         load weights that are not safetensors
    exact_decode         decode large JPEGs at full size
    weights              there must be weights; False: an architecture is enough
    endpoint             what runs `openai:NAME`
    extra_body           more of its requests, as JSON: a null takes out what would be there
    base_model           of an adapter: hub id or directory; None: as the adapter says
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    pooling: str | None = None
    normalize: bool | None = None
    frames: int = 8
    attn_implementation: str | None = None
    compile: bool = False
    offline: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    exact_decode: bool = False
    weights: bool = True
    endpoint: Endpoint | Batch | None = None
    extra_body: str | None = None
    base_model: str | None = None

"""The family *endpoint*: `-m openai:NAME --endpoint URL`, a model that an OpenAI-compatible server runs.

vLLM, SGLang, llama.cpp, Ollama, `transformers serve` and hosted services speak this. What is sent is in
endpoint_request, how in endpoint_client, and what comes back in endpoint_answer.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from mmcli.core.errors import ConfigError
from mmcli.core.protocols import RecordProcessor, Runner, WriterPlan
from mmcli.core.records import MODALITIES, DecodeOptions, Modality, Sample
from mmcli.models.endpoint_request import EndpointProcessor, Settings
from mmcli.models.options import Batch, Endpoint, Generation, ModelOptions

if TYPE_CHECKING:
    from mmcli.models.endpoint_client import Answers

PREFIX = "openai:"
KEY = "OPENAI_API_KEY"
# While the engine waits for the slowest answer of one batch, the requests of the next keep the server busy: for an
# answer that takes four times as long as the others.
BATCHES_AHEAD = 4
LEAST_BATCH = 32


@dataclass(frozen=True, slots=True)
class EndpointPlan:
    """See mmcli.core.protocols.WriterPlan. Takes every modality: whether the server's model does, it will say.

    name      of the model, as the server knows it
    lossless  pictures are sent as PNG, whatever their size
    extra     more fields of each request
    """

    name: str
    endpoint: Endpoint
    generation: Generation
    decode: DecodeOptions
    lossless: bool
    extra: Mapping[str, Any] = field(default_factory=dict)
    modalities: frozenset[Modality] = frozenset(MODALITIES)

    @property
    def output(self) -> Literal["text", "json", "scores"]:
        if self.generation.choices:
            return "scores"
        return "text" if self.generation.schema is None else "json"

    @property
    def batch_size(self) -> int:
        """Requests that the engine hands over at a time."""
        return max(LEAST_BATCH, BATCHES_AHEAD * self.endpoint.concurrency)

    @property
    def settings(self) -> Settings:
        """What each request says beside its messages, if the server takes it."""
        return Settings.of(self.name, self.generation, self.extra)

    def describe(self) -> dict[str, Any]:
        """What identifies the texts, as far as it is known here: the server may change its model."""
        return {
            "id": f"{PREFIX}{self.name}",
            "family": "endpoint",
            "endpoint": self.endpoint.url,
            "frames": self.decode.num_frames,
            "extra_body": json.dumps(self.extra, sort_keys=True) if self.extra else None,
            "generation": self.generation.describe(),
        }

    def open_processor(self) -> RecordProcessor:
        return EndpointProcessor(self.generation, self.lossless)

    def load(self) -> Runner:
        """Ask whether the server is there. Raises TryAgain when it is not, ModelError when it denies access."""
        return EndpointRunner(self)


class EndpointRunner:
    """See mmcli.core.protocols.Runner: requests -> what the server's model writes."""

    def __init__(self, plan: EndpointPlan) -> None:
        from mmcli.models.endpoint_answer import AnswerReader
        from mmcli.models.endpoint_client import Client

        try:
            self._client = Client(plan.endpoint, plan.settings, AnswerReader(plan.generation), api_key())
        except (ImportError, ValueError) as error:
            # httpx takes proxies from the environment.
            raise ConfigError(f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: {error}") from error
        weakref.finalize(self, self._client.close)
        self._client.check()

    def collate(self, samples: Sequence[Sample]) -> list[bytes]:
        """The JSON of each request's messages."""
        return [sample.arrays["request"].tobytes() for sample in samples]

    def forward(self, batch: list[bytes]) -> Answers:
        """Begins to send; its `result` gives one Generated, Scored or RowError per request.

        That raises TryAgain when the server stays away, ModelError when it cannot be used like this.
        """
        return self._client.send(batch)


def api_key() -> str | None:
    """From the environment, and from there alone. Raises ConfigError for one that no HTTP header can hold."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        # Not shown: it is secret.
        raise ConfigError(f"{KEY} holds characters that no key has; set it again")
    return key or None


def resolve_endpoint(options: ModelOptions, generation: Generation) -> WriterPlan:
    """The plan of `openai:NAME`. Raises ConfigError with every problem."""
    name, problems, server = options.model.removeprefix(PREFIX), [], options.endpoint
    if not name.strip():
        problems.append(f"-m {options.model}: the model's name is missing, e.g. openai:Qwen/Qwen2.5-VL-3B-Instruct")
    if server is None:
        problems.append(f"-m {options.model} needs the address of the server; add --endpoint http://HOST:PORT/v1")
    elif isinstance(server, Endpoint) and (problem := _url_problem(server.url)) is not None:
        problems.append(problem)
    elif isinstance(server, Batch):
        missing = [name for name in server.results if not os.path.isfile(name)]
        problems += [f"--batch-results {name}: there is no such file" for name in missing]
    extra = _extra(options.extra_body, problems)
    if generation.num_beams > 1:
        problems.append(f"--num-beams {generation.num_beams}: servers write with one; leave it out")
    here = {
        "--revision": options.revision,
        "--attn-implementation": options.attn_implementation,
        "--compile": options.compile or None,
        "--dtype": None if options.dtype == "auto" else options.dtype,
    }
    problems += [
        f"{flag} is for models that run here, not on a server; leave it out" for flag, v in here.items() if v
    ]
    if problems or server is None:
        raise ConfigError(problems)
    api_key()
    url = "" if isinstance(server, Batch) else server.url.removesuffix("/chat/completions").rstrip("/")
    plan = EndpointPlan(
        name=name,
        endpoint=Endpoint(url) if isinstance(server, Batch) else replace(server, url=url),
        generation=generation,
        # What the server makes of a sound or a picture is not known: as they are.
        decode=DecodeOptions(num_frames=options.frames, exact_decode=True),
        lossless=options.exact_decode,
        extra=extra,
    )
    if not isinstance(server, Batch):
        return plan
    from mmcli.models.endpoint_batch import BatchPlan

    return BatchPlan(plan, server.results)


def _extra(text: str | None, problems: list[str]) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        problems.append(f"--extra-body {text!r} is no JSON: {error}")
        return {}
    if not isinstance(found, dict) or "messages" in found or "model" in found or found.get("stream"):
        problems.append(
            f"""--extra-body {text!r}: give fields such as '{{"top_p": 0.9}}'; not model, messages, stream"""
        )
        return {}
    return found


def _url_problem(url: str) -> str | None:
    example = "give one such as http://localhost:8000/v1"
    if "@" in url:
        # Not shown: it may hold a password.
        return f"--endpoint: an address with @ in it is not taken; a key is taken from {KEY}"
    try:
        parts = urlsplit(url)
        # Raises ValueError for a port that is none.
        _ = parts.port
    except ValueError as error:
        return f"--endpoint {url!r}: {error}; {example}"
    if parts.query or parts.fragment:
        return f"--endpoint: an address with ? or # is not taken; {example}"
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        return f"--endpoint {url!r} is no address of a server; {example}"
    return None

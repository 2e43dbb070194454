"""Models that a service runs later: requests for an OpenAI batch, and answers out of the files of its results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

from mmcli.core.errors import ConfigError, RowError, one_line
from mmcli.core.openai_batch import digest_of, request_digest
from mmcli.core.protocols import RecordProcessor, Runner
from mmcli.core.records import DecodeOptions, Generated, Modality, Sample, Scored
from mmcli.models.endpoint import EndpointPlan
from mmcli.models.endpoint_answer import AnswerReader
from mmcli.models.endpoint_request import Settings
from mmcli.models.options import Generation


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The plan of an endpoint (`server`), whose requests are not sent.

    results  files with the answers; () to write the requests
    """

    server: EndpointPlan
    results: tuple[str, ...]

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.server.modalities

    @property
    def decode(self) -> DecodeOptions:
        return self.server.decode

    @property
    def output(self) -> Literal["text", "json", "scores", "requests"]:
        return self.server.output if self.results else "requests"

    @property
    def batch_size(self) -> int:
        return self.server.batch_size

    def describe(self) -> dict[str, Any]:
        """As that of a server; not the files: an answer belongs to its request, in whichever file it is."""
        return {**self.server.describe(), "endpoint": "openai-batch"}

    def open_processor(self) -> RecordProcessor:
        return self.server.open_processor()

    def load(self) -> Runner:
        """Raises ConfigError for a file of results that is none."""
        if not self.results:
            return RequestRunner(self.server.settings)
        return ResultsRunner(self.server.settings, self.server.generation, self.results)


class RequestRunner:
    """See mmcli.core.protocols.Runner: a Sample -> the body of its request."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def collate(self, samples: Sequence[Sample]) -> list[bytes]:
        return [self._settings.body(sample.arrays["request"].tobytes()) for sample in samples]

    def forward(self, batch: list[bytes]) -> Sequence[Any]:
        """The requests as they are."""
        return batch


class ResultsRunner(RequestRunner):
    """A Sample -> what the files of results hold for its request."""

    def __init__(self, settings: Settings, generation: Generation, results: Sequence[str]) -> None:
        super().__init__(settings)
        self._read = AnswerReader(generation)
        self._results = Results(results)

    def forward(self, batch: list[bytes]) -> list[Generated | Scored | RowError]:
        """One output per request; a RowError where there is no answer."""
        return [self._output(request_digest(body)) for body in batch]

    def _output(self, digest: str) -> Generated | Scored | RowError:
        found = self._results.get(digest)
        if found is None:
            return RowError("not_found", "no file of --batch-results has an answer to this request", stage="model")
        answer = _answer(found)
        if answer is None:
            return RowError("invalid_output", f"the batch has no answer: {_complaint(found)}", stage="model")
        try:
            return self._read.of(answer)
        except ValueError as error:
            return RowError("invalid_output", f"no chat completion: {error}", stage="model")


class Results:
    """The lines of files of results, in any order, by the digest of their request. 250 bytes of memory a line."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[int, int, bool]] = {}
        for path in paths:
            try:
                file = Path(path).open("rb")  # noqa: SIM115 - read from until the end
            except OSError as error:
                raise ConfigError(f"--batch-results: cannot read {path}: {error.strerror}") from error
            for start, line in _lines(path, file):
                digest, good = digest_of(line["custom_id"]), _answer(line) is not None
                # A second try that has failed does not replace an answer.
                if good or digest not in self._places or not self._places[digest][2]:
                    self._places[digest] = len(self._files), start, good
            self._files.append(file)

    def get(self, digest: str) -> dict[str, Any] | None:
        """The line about a request, or None."""
        place = self._places.get(digest)
        if place is None:
            return None
        file = self._files[place[0]]
        file.seek(place[1])
        found: dict[str, Any] = _load(file.readline())
        return found


def _lines(path: str, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it begins, what it holds) of each line. Raises ConfigError for one that is no result."""
    start = 0
    for number, line in enumerate(file, 1):
        try:
            found = _load(line) if line.strip() else None
        except ValueError as error:
            raise ConfigError(f"--batch-results {path}: line {number} is no JSON: {error}") from error
        if found is not None:
            if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
                raise ConfigError(
                    f"--batch-results {path}: line {number} has no custom_id: is it a file of results?"
                )
            yield start, found
        start += len(line)


def _load(line: bytes) -> Any:
    """Raises ValueError. Python servers write NaN, which is no JSON, where a probability is none."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def _answer(line: dict[str, Any]) -> Any:
    """The chat completion of a line, or None."""
    response = line.get("response")
    if line.get("error") or not isinstance(response, dict) or response.get("status_code", 200) != 200:
        return None
    return response.get("body")


def _complaint(line: dict[str, Any]) -> str:
    found = line.get("error") or line.get("response") or "nothing"
    if isinstance(found, dict):
        body = found.get("body")
        found = body.get("error", body) if isinstance(body, dict) else found
    if isinstance(found, dict):
        found = found.get("message") or found.get("code") or found
    return one_line(str(found), 300)

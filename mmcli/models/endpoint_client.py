"""Requests to an OpenAI-compatible server: a bounded number at a time, sent again when it is busy or away.

engine's thread --bodies--> event loop in a thread of its own --at most `concurrency` at a time--> server
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from mmcli.core.errors import ErrorCode, MmcliError, ModelError, RowError, TryAgain, one_line
from mmcli.models.endpoint_request import Settings
from mmcli.models.options import Endpoint

# Seconds until a server must have taken a connection, at any time and when it is first asked whether it is there.
CONNECT_S, CHECK_S = 10.0, 5.0
# Idle connections are closed before the server does it: uvicorn (vLLM, `transformers serve`) waits 5 s.
KEEPALIVE_S = 4.0
# Waits between tries: drawn from 0 to FIRST_WAIT_S * 2^n, at most MAX_WAIT_S ("full jitter", Brooker 2015).
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 20.0
# So often a request may fail by itself (500, no answer in time, a dropped connection) while others work.
ATTEMPTS = 5
# A server that has refused so many requests, with one reason or at all, and answered none is used in a wrong way.
SAME_REFUSALS, REFUSALS = 8, 32
# What servers say of requests that are too large, and of those that their rules forbid.
TOO_LARGE = ("context length", "context_length", "context size", "too large", "too long")
POLICY = (
    "content_filter",
    "content_policy",
    "content policy",
    "content management policy",
    "moderation",
    "flagged",
)
# Bytes of a server's message that are looked at.
MESSAGE_BYTES = 4000

# Of answers that are no answer: its content -> a RowError, or ValueError for what no such server sends.
Parse = Callable[[bytes], Any]


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why there is no answer yet. `own`: it may be this request's fault; `wait_s`: what the server asks for."""

    reason: str
    timeout: bool = False
    own: bool = False
    wait_s: float | None = None


@dataclass(slots=True)
class _Tries:
    """Of one request. `beaten`: failures since each of which, until the next, others were answered."""

    begun: float
    failures: int = 0
    beaten: int = 0
    last: float = 0.0

    def failed(self, answered: float) -> None:
        """Once more; `answered`: when the server last answered any request."""
        self.beaten += self.failures > 0 and answered > self.last
        self.failures += 1
        self.last = time.monotonic()

    def hopeless(self, retry_s: float) -> bool:
        """Whether it is this request that does not work, while others do: a server that is away fails all."""
        return self.beaten >= (1 if self.last - self.begun > retry_s else ATTEMPTS - 1)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An answer that sending the request again would not change; of 200, what is no chat completion."""

    status: int
    message: str


class Answers:
    """See mmcli.core.protocols.Pending: answers that a server is still writing."""

    def __init__(self, future: Future[list[Any]]) -> None:
        self._future = future

    def wait(self, timeout: float) -> bool:
        """Whether all are there, or one has ended the run, within `timeout` seconds."""
        return bool(wait([self._future], timeout).done)

    def result(self) -> list[Any]:
        """One output for each request, in order: what `parse` made of it, or a RowError.

        Raises TryAgain for a server that stays away, ModelError for one that cannot be used like this.
        """
        return self._future.result()


class Client:
    """Sends requests from an event loop in a thread of its own.

    settings  what is asked beside the messages; what the server does not know of it is left out, once it has
              answered without
    parse     the body of an answer -> an output or a RowError; raises ValueError for what is no answer
    """

    def __init__(self, endpoint: Endpoint, settings: Settings, parse: Parse, key: str | None) -> None:
        self._endpoint, self._settings, self._parse = endpoint, settings, parse
        self._key = key
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        # When the server last did what it was asked, on time.monotonic's clock; until when it wants no request.
        self._answered = self._paused_until = 0.0
        # A request that has worked.
        self._good: bytes | None = None
        self._refusals: list[str] = []
        self._fatal: MmcliError | None = None
        limits = httpx.Limits(
            max_connections=endpoint.concurrency,
            max_keepalive_connections=endpoint.concurrency,
            keepalive_expiry=KEEPALIVE_S,
        )
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        # Redirects are not followed: the key and the data go to this server alone.
        self._http = httpx.AsyncClient(
            headers=headers,
            limits=limits,
            timeout=httpx.Timeout(endpoint.timeout_s, connect=CONNECT_S, pool=None),
            follow_redirects=False,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="mmcli-endpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Ask the server for its models: is it there? Within seconds, and whatever it answers but a denial.

        Raises TryAgain when nobody answers, ModelError for a denial.
        """
        self._submit(self._check()).result()

    def send(self, requests: Sequence[bytes]) -> Answers:
        """Begin to send requests, each the JSON of its `messages`; those of earlier calls go first."""
        return Answers(self._submit(self._all(requests)))

    def close(self) -> None:
        """Give up what is under way and end the thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in (left := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self._http.aclose())
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # -- event loop ----------------------------------------------------------------------------------------

    async def _check(self) -> None:
        url, timeout = self._endpoint.url, httpx.Timeout(CHECK_S)
        try:
            response = await self._http.get(f"{url}/models", timeout=timeout)
        except httpx.TransportError as error:
            raise TryAgain(
                f"--endpoint {url} does not answer ({_told(error)}): is the server running?",
                hint="start the server, or correct --endpoint; then the same command again",
            ) from error
        # Servers without a list of models answer 404 or the like; one that loads its model 503.
        self._deny(response)

    async def _all(self, requests: Sequence[bytes]) -> list[Any]:
        tasks = [asyncio.create_task(self._one(messages)) for messages in requests]
        try:
            return await asyncio.gather(*tasks)
        except MmcliError as error:
            # What belongs to other batches ends with this one.
            self._fatal = self._fatal or error
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, messages: bytes) -> Any:
        async with self._slots:
            if self._fatal is not None:
                raise self._fatal
            answer = await self._ask(messages)
        return self._judged(answer) if isinstance(answer, _Refusal) else answer

    async def _ask(self, messages: bytes) -> Any:
        """The answer, with as much of the settings as the server takes; else why it refuses."""
        settings = self._settings
        while True:
            answer = await self._answer(messages, settings)
            if not isinstance(answer, _Refusal):
                if self._good is None:
                    self._good, self._settings = messages, settings
                return answer
            # Others may have found out meanwhile what the server takes.
            known = self._good is not None
            other = self._settings if known else settings.conceded(answer.status, answer.message)
            if other is None or other == settings:
                return answer
            settings = other

    async def _answer(self, messages: bytes, settings: Settings) -> Any:
        """One request, sent again while the server is away or busy: what `parse` gives, RowError or _Refusal."""
        body, tries = settings.body(messages), _Tries(time.monotonic())
        while True:
            await self._pause()
            found = await self._post(body)
            if not isinstance(found, _Trouble):
                break
            tries.failed(self._answered)
            if found.own and tries.hopeless(self._endpoint.retry_s):
                code: ErrorCode = "timeout" if found.timeout else "io"
                return RowError(code, f"given up after {tries.failures} tries: {found.reason}", stage="model")
            await self._back_off(found, tries)
        self._answered = time.monotonic()
        if isinstance(found, _Refusal):
            return found
        try:
            return self._parse(found.content)
        except ValueError as error:
            kind = found.headers.get("content-type", "no type")
            return _Refusal(200, f"no chat completion but {kind}: {error}: {self._message(found)}")

    async def _post(self, body: bytes) -> httpx.Response | _Refusal | _Trouble:
        try:
            response = await self._http.post(f"{self._endpoint.url}/chat/completions", content=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return _Trouble(f"no connection: {_told(error)}")
        except httpx.TimeoutException:
            return _Trouble(f"no answer within {self._endpoint.timeout_s:g} s", timeout=True, own=True)
        except httpx.TransportError as error:
            return _Trouble(f"the connection broke: {_told(error)}", own=True)
        except (httpx.DecodingError, httpx.InvalidURL) as error:
            return _Refusal(200, _told(error))
        if response.status_code == 200:
            return response
        self._deny(response)
        status, message = response.status_code, self._message(response)
        if status == 404 and self._good is None:
            raise ModelError(
                f"{self._endpoint.url}/chat/completions: HTTP 404: {message}",
                hint="does --endpoint end with /v1, as most servers want? does the server have this model (-m)?",
            )
        if status in (404, 408, 409, 425, 429) or status >= 500:
            own = status not in (408, 409, 425, 429, 503, 529)
            reason = f"HTTP {status}: {message}"
            if own and self._good is None and self._settings.conceded(status, message) is not None:
                return _Refusal(status, message)
            return _Trouble(reason, own=own, wait_s=_retry_after(response))
        return _Refusal(status, message)

    def _deny(self, response: httpx.Response) -> None:
        """Raise ModelError for what no request to this server will ever get through."""
        url, status = self._endpoint.url, response.status_code
        if 300 <= status < 400:
            target = urlsplit(response.headers.get("location", ""))
            raise ModelError(
                f"--endpoint {url} redirects to {target.hostname or 'itself'}, which is not followed",
                hint="give the address of the server itself",
            )
        # Some services answer 403 for what their moderation has found.
        moderated = status == 403 and _mentions(self._message(response), POLICY)
        if status in (401, 402, 403, 407) and not moderated:
            key = "the key in OPENAI_API_KEY" if self._key else "no key (OPENAI_API_KEY is not set)"
            raise ModelError(
                f"--endpoint {url} denies access with {key}: HTTP {status}: {self._message(response)}",
                hint="export OPENAI_API_KEY=..., then the same command again",
            )

    def _message(self, response: httpx.Response) -> str:
        """What a server says of an error, on one line, without the key."""
        said = _said(response.content) or response.reason_phrase
        return one_line(said.replace(self._key, "***") if self._key else said, 300)

    async def _pause(self) -> None:
        while (left := self._paused_until - time.monotonic()) > 0:
            # Not all of them at the same moment.
            await asyncio.sleep(left + random.uniform(0, min(1.0, left / 4)))

    async def _back_off(self, trouble: _Trouble, tries: _Tries) -> None:
        """Wait before the next try. Raises TryAgain once the server has done nothing for `retry_s`."""
        now = time.monotonic()
        silent = now - max(tries.begun, self._answered)
        left, wait = self._endpoint.retry_s - silent, trouble.wait_s or 0.0
        if left <= 0 or wait > left:
            if trouble.own and await self._works():
                return
            asks = f" and asks to wait {wait:.0f} s" if wait > left else ""
            url = self._endpoint.url
            raise TryAgain(f"--endpoint {url} has done nothing for {silent:.1f} s{asks}: {trouble.reason}")
        self._paused_until = max(self._paused_until, now + wait)
        longest = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** min(tries.failures - 1, 10))
        await asyncio.sleep(max(wait, min(left, random.uniform(0, longest))))

    async def _works(self) -> bool:
        """Whether what has worked before does again."""
        if self._good is None or isinstance(await self._post(self._settings.body(self._good)), _Trouble):
            return False
        self._answered = time.monotonic()
        return True

    def _judged(self, refusal: _Refusal) -> RowError:
        """The row's error. Raises ModelError when no request at all has got through."""
        reason = f"HTTP {refusal.status}: {refusal.message}" if refusal.status != 200 else refusal.message
        if self._good is None:
            self._refusals.append(refusal.message)
            same = self._refusals.count(refusal.message)
            model = self._settings.names_model(refusal.message) and refusal.status != 200
            if model or same >= SAME_REFUSALS or len(self._refusals) >= REFUSALS:
                raise ModelError(
                    f"--endpoint {self._endpoint.url} refuses every request: {reason}",
                    hint="check -m openai:NAME, --endpoint, and what this server's model takes",
                )
        return RowError(_code(refusal), f"the server refuses: {reason}", stage="model")


def _code(refusal: _Refusal) -> ErrorCode:
    if refusal.status == 413 or _mentions(refusal.message, TOO_LARGE):
        return "too_large"
    return "policy_denied" if _mentions(refusal.message, POLICY) else "invalid_output"


def _mentions(message: str, words: Sequence[str]) -> bool:
    return any(word in message.lower() for word in words)


def _said(content: bytes) -> str:
    """What a server says of an error, in whichever of the usual places."""
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        return content[:MESSAGE_BYTES].decode("utf-8", "replace").strip()
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found.get("message") or found
    if isinstance(found, dict):
        parts = [str(found[name]) for name in ("message", "code") if found.get(name)]
        found = " ".join(dict.fromkeys(parts)) or found
    return found if isinstance(found, str) else str(found)


def _told(error: Exception) -> str:
    return one_line(str(error), 200) or type(error).__name__


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, 10.2.3: seconds or a date)."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())

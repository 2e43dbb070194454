"""The family endpoint: requests as a server gets them, answers as rows get them, and servers that misbehave."""

from __future__ import annotations

import base64
import io
import itertools
import json
import pickle
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
from endpoint_server import EndpointServer, Reply, Seen, completion, echo, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcli.core.errors import ConfigError, ModelError, RowError, TryAgain
from mmcli.core.records import Audio, Generated, Media, Sample, Scored, Video
from mmcli.models import endpoint_client
from mmcli.models.endpoint import EndpointPlan, resolve_endpoint
from mmcli.models.endpoint_answer import AnswerReader
from mmcli.models.options import Endpoint, Example, Generation, ModelOptions

SECRET = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT_S", 0.05)


def plan_for(url: str, *, exact: bool = False, model: str = "tiny", **generation: Any) -> EndpointPlan:
    how = {name: generation.pop(name) for name in ("concurrency", "retry_s", "timeout_s") if name in generation}
    options = ModelOptions(f"openai:{model}", endpoint=Endpoint(url, **how), exact_decode=exact)
    return resolve_endpoint(options, Generation(**{"questions": ("What?",), "task": "ask", **generation}))


def samples(plan: EndpointPlan, texts: list[str]) -> list[Sample]:
    processor = plan.open_processor()
    return [sample for text in texts for sample in processor.record([("text", text)], ())]


@contextmanager
def running(answer: Callable[[Seen], Reply] = echo, **how: Any) -> Iterator[Running]:
    with serving(answer) as server:
        plan = plan_for(server.url, **{"retry_s": 5.0, **how})
        yield Running(server, plan)


class Running:
    """A server and a runner that asks it."""

    def __init__(self, server: EndpointServer, plan: EndpointPlan) -> None:
        self.server, self.plan = server, plan
        self.runner: Any = plan.load()

    def start(self, texts: list[str]) -> Any:
        return self.runner.forward(self.runner.collate(samples(self.plan, texts)))

    def ask(self, *texts: str) -> list[Any]:
        return list(self.start(list(texts)).result())


def flaky(bad: Callable[[int], Reply], times: int) -> Callable[[Seen], Reply]:
    """`bad(n)` for the first `times` requests of each text, then an echo."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def answer(seen: Seen) -> Reply:
        with lock:
            counts[seen.text] += 1
            count = counts[seen.text]
        return bad(count) if count <= times else echo(seen)

    return answer


# What is sent -----------------------------------------------------------------------------------------------------


def messages(plan: EndpointPlan, media: list[Any], variables: tuple[Any, ...] = ()) -> list[Any]:
    found = plan.open_processor().record(media, variables)
    return [json.loads(sample.arrays["request"].tobytes()) for sample in found]


def pixels(part: dict[str, Any]) -> tuple[str, np.ndarray]:
    head, _, data = part["image_url"]["url"].partition(";base64,")
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pictures_arrive_as_they_were() -> None:
    picture = noise(40, 30, 3)
    (asked,) = messages(plan_for("http://h/v1"), [("image", picture)])
    image, text = asked[0]["content"]
    head, arrived = pixels(image)
    assert head == "data:image/png"
    assert (arrived == picture).all()
    assert text == {"type": "text", "text": "What?"}


def test_large_pictures_are_compressed_unless_told_otherwise() -> None:
    smooth = np.tile(np.linspace(0, 255, 1100).astype(np.uint8)[None, :, None], (1000, 1, 3))
    sizes = {}
    for exact, kind in ((False, "jpeg"), (True, "png")):
        plan = plan_for("http://h/v1", exact=exact)
        (asked,) = messages(plan, [("image", smooth)])
        head, arrived = pixels(asked[0]["content"][0])
        assert head == f"data:image/{kind}"
        error = np.abs(arrived.astype(int) - smooth).max()
        assert error == 0 if exact else error <= 4
        sizes[kind] = len(json.dumps(asked))
    assert sizes["jpeg"] > 0


def test_sounds_arrive_as_they_were() -> None:
    wanted = noise(4000).astype(np.int16) * 200 - 20_000
    sound = Audio(wanted.astype(np.float32) / 32768, 8000)
    (asked,) = messages(plan_for("http://h/v1"), [("audio", sound)])
    part = asked[0]["content"][0]
    assert (part["type"], part["input_audio"]["format"]) == ("input_audio", "wav")
    with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (1, 8000, 2)
        assert (np.frombuffer(file.readframes(-1), "<i2") == wanted).all()


def test_loud_sounds_do_not_wrap_around() -> None:
    sound = Audio(np.array([1.5, 1.0, -1.5], np.float32), 8000)
    (asked,) = messages(plan_for("http://h/v1"), [("audio", sound)])
    with wave.open(io.BytesIO(base64.b64decode(asked[0]["content"][0]["input_audio"]["data"]))) as file:
        assert np.frombuffer(file.readframes(-1), "<i2").tolist() == [32767, 32767, -32768]


def test_clips_are_frames_in_order() -> None:
    frames = noise(3, 16, 24, 3)
    (asked,) = messages(plan_for("http://h/v1"), [("video", Video(frames, np.arange(3.0), 3.0))])
    found = [pixels(part)[1] for part in asked[0]["content"][:-1]]
    assert len(found) == 3
    assert all((a == b).all() for a, b in zip(found, frames, strict=True))


def test_each_question_is_a_request_with_system_and_columns() -> None:
    plan = plan_for(
        "http://h/v1", questions=("Is it {kind}?", "Why, {{x}}?"), system="Be {tone}.", variables=("kind", "tone")
    )
    found = messages(plan, [("image", noise(8, 8, 3)), ("text", "a note")], ("red", "brief"))
    assert [asked[0] for asked in found] == [{"role": "system", "content": "Be brief."}] * 2
    kinds = [[part["type"] for part in asked[1]["content"]] for asked in found]
    assert kinds == [["image_url", "text", "text"]] * 2
    assert [asked[1]["content"][-1]["text"] for asked in found] == ["Is it red?", "Why, {x}?"]
    with pytest.raises(RowError, match="kind") as caught:
        messages(plan, [("text", "a")], (None, "brief"))
    assert caught.value.code == "bad_row"


def test_texts_alone_are_one_string_and_captions_have_a_prompt() -> None:
    (asked,) = messages(plan_for("http://h/v1"), [("text", "Once upon")])
    assert asked == [{"role": "user", "content": "Once upon\n\nWhat?"}]
    (asked,) = messages(plan_for("http://h/v1", questions=(), task="caption"), [("image", noise(8, 8, 3))])
    assert asked[0]["content"][-1]["text"] == "Describe this image in one sentence."
    with pytest.raises(RowError, match="Unicode"):
        messages(plan_for("http://h/v1"), [("text", "\ud800")])


@pytest.mark.parametrize("chosen", [False, True])
def test_solved_examples_come_before_the_question(chosen: bool) -> None:
    examples = tuple(
        Example((Media(text=name),), q, name) for name, q in (("no", None), ("yes", "Sure?"), ("x", ""))
    )
    plan = plan_for("http://h/v1", examples=examples, chosen=chosen, choices=("yes", "no"))
    processor: Any = plan.open_processor()
    processor.show(lambda media: ("text", media.text))
    (sample,) = processor.record([("text", "now")], ((1, 0),) if chosen else ())
    asked = json.loads(sample.arrays["request"].tobytes())
    shown = [examples[n] for n in ((1, 0) if chosen else (0, 1, 2))]
    assert [turn["role"] for turn in asked] == ["user", "assistant"] * len(shown) + ["user"]
    for example, user, answer in zip(shown, asked[::2], asked[1::2], strict=False):
        assert user["content"].startswith(f"{example.media[0].text}\n\n{example.question or 'What?'}")
        assert json.loads(answer["content"]) == {"answer": example.answer}
    assert asked[-1]["content"].startswith("now\n\nWhat?")


def test_conversations_are_sent_as_they_are() -> None:
    """The picture in its place, the form of the answer behind the last question."""
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*({"type": "text", "text": t} for t in "ab"), {"type": "image"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    plan = plan_for("http://h/v1", questions=(), messages="talk", variables=("talk",), choices=("yes", "no"))
    (found,) = messages(plan, [("image", noise(8, 8, 3))], (talk,))
    assert [one["role"] for one in found] == ["system", "user", "assistant", "user"]
    assert [one["type"] for one in found[1]["content"]] == ["text", "text", "image_url"]
    assert [part["text"] for part in found[1]["content"][:2]] == ["a", "b"]
    assert (found[0]["content"], found[2]["content"]) == ("Be brief.", "c")
    assert found[3]["content"].startswith("d\nAnswer in JSON")


def test_examples_that_cannot_be_decoded_end_the_run() -> None:
    def decode(media: Media) -> Any:
        raise RowError("corrupt", "no picture")

    processor: Any = plan_for(
        "http://h/v1", examples=(Example((Media(file="a.png"),), None, "a"),)
    ).open_processor()
    with pytest.raises(ModelError, match="row 1: corrupt: no picture"):
        processor.show(decode)


def test_requests_are_the_same_each_time() -> None:
    plan = plan_for("http://h/v1")
    media = [("image", noise(64, 64, 3)), ("audio", Audio(np.zeros(100, np.float32), 8000))]
    one, other = (plan.open_processor().record(media, ())[0].arrays["request"] for _ in range(2))
    assert one.tobytes() == other.tobytes()


def test_what_the_server_is_asked_for() -> None:
    with running(temperature=0.5, seed=7, max_new_tokens=9) as run:
        run.ask("a")
    (seen,) = run.server.seen
    told = {name: value for name, value in seen.body.items() if name != "messages"}
    assert told == {"model": "tiny", "max_tokens": 9, "temperature": 0.5, "seed": 7, "logprobs": True}
    assert seen.path == "/v1/chat/completions"
    assert "authorization" not in seen.headers


# What comes back --------------------------------------------------------------------------------------------------


def read(answer: Any, **generation: Any) -> Any:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return AnswerReader(Generation(**generation))(content)


def test_texts_and_trust_columns() -> None:
    tokens = [("a", -0.5), (" cat", -1.5)]
    assert read(completion(" a cat\n", tokens=3, logprobs=tokens)) == Generated("a cat", "stop", 3, -1.0, False)
    assert read(completion("a cat")) == Generated("a cat", "stop", None, None, False)
    assert read(completion("a cat", "length", tokens=50)).finish_reason == "length"
    assert read(completion("a cat", None, tokens=50), max_new_tokens=50).finish_reason == "length"
    assert read(completion("so so so so so")).repetition
    assert not read(completion("so it is so")).repetition
    assert np.isnan(read(completion("a", logprobs=[("a", float("nan"))])).mean_logprob)
    assert read(completion("a", logprobs=[("a", None)])).mean_logprob is None
    assert read(completion([{"type": "text", "text": "in parts"}])).text == "in parts"  # type: ignore[arg-type]
    refused = completion(None)
    refused["choices"][0]["message"]["refusal"] = "I cannot."
    assert read(refused).text == "I cannot."
    assert read(completion("x", "content_filter")).code == "policy_denied"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "completion_tokens", "logprobs", "token"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
SHAPED = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {"message": st.fixed_dictionaries({"content": JSON})},
                optional={"logprobs": JSON, "finish_reason": JSON},
            ),
            max_size=2,
        )
    },
    optional={"usage": JSON},
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JSON | SHAPED)
def test_no_answer_whatever_breaks_the_reader(answer: Any) -> None:
    for how in ({}, {"choices": ("yes", "no")}):
        try:
            found = read(answer, **how)
        except ValueError:
            continue
        assert isinstance(found, Generated | Scored | RowError)


def test_deep_json_is_no_answer() -> None:
    with pytest.raises(ValueError, match="deep"):
        read(b"[" * 100_000)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ('{"answer": "yes"}', "yes"),
        ('```json\n{"answer": "no"}\n```', "no"),
        ("Yes.", "yes"),
        ('"no"', "no"),
        ("**unclear**", "unclear"),
        ("yes and no", None),
        ("yesterday", None),
        ('{"answer": "maybe"}', None),
        ('{"other": "yes"}', None),
        ("[[[[", None),
    ],
)
def test_choices(text: str, chosen: str | None) -> None:
    found = read(completion(text), choices=("yes", "no", "unclear"))
    if chosen is None:
        assert found.code == "invalid_output"
    else:
        assert found == Scored(chosen, None, ())


def test_choices_differ_by_case_if_they_must() -> None:
    assert read(completion("a"), choices=("A", "a")).answer == "a"
    assert read(completion("x"), choices=("X", "y")).answer == "X"


def test_the_score_of_a_choice_is_that_of_its_tokens() -> None:
    tokens = [('{"', -3.0), ("answer", -2.0), ('": "', -1.0), ("un", -0.25), ("clear", -0.5), ('"}', -4.0)]
    found = read(completion('{"answer": "unclear"}', logprobs=tokens), choices=("yes", "unclear"))
    assert found.score == pytest.approx(np.exp(-0.75))
    assert found.top_k == (("unclear", found.score),)
    tokens[4] = ("clear", float("nan"))
    assert np.isnan(read(completion('{"answer": "unclear"}', logprobs=tokens), choices=("yes", "unclear")).score)


SCHEMA = '{"type":"object","properties":{"age":{"type":"integer"}},"required":["age"],"additionalProperties":false}'


def test_answers_keep_to_the_schema() -> None:
    assert json.loads(read(completion('```json\n{"age": 3}\n```'), schema=SCHEMA).text) == {"age": 3}
    for wrong in ('{"age": "three"}', '{"age": 3, "b": 1}', "three", '{"age": 3} or so'):
        assert read(completion(wrong), schema=SCHEMA).code == "invalid_output"
    cut = read(completion('{"age": 3', "length", tokens=5), schema=SCHEMA)
    assert (cut.code, "cut" in cut.message) == ("invalid_output", True)


# Servers ----------------------------------------------------------------------------------------------------------


def test_answers_come_in_order_however_they_are_written() -> None:
    def answer(seen: Seen) -> Reply:
        reply = echo(seen)
        reply.delay = 0.2 if "0" in seen.text else 0.0
        return reply

    with running(answer) as run:
        found = run.ask(*(f"text {n}" for n in range(20)))
    assert [one.text for one in found] == [f"re: text {n}\n\nWhat?" for n in range(20)]


def test_never_more_in_flight_than_allowed_and_never_idle() -> None:
    together = threading.Barrier(3)

    def answer(seen: Seen) -> Reply:
        # Nobody is answered before three are asked, so also the last of one batch with the first of the next.
        together.wait(60)
        return Reply(completion("x"))

    with running(answer, concurrency=3) as run:
        first, second = run.start(["a"] * 10), run.start(["b"] * 11)
        assert [len(first.result()), len(second.result())] == [10, 11]
    assert run.server.most_in_flight == 3
    assert len(run.server.seen) == 21


def test_waiting_does_not_block() -> None:
    with running(lambda seen: Reply(completion("x"), delay=0.5)) as run:
        pending = run.start(["a"])
        assert not pending.wait(0.05)
        assert pending.wait(60)
        assert pending.result()[0].text == "x"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_busy_servers_are_asked_again(status: int) -> None:
    with running(flaky(lambda n: Reply({"error": "busy"}, status), 2)) as run:
        assert [one.text for one in run.ask("a", "b")] == ["re: a\n\nWhat?", "re: b\n\nWhat?"]
    assert len(run.server.seen) == 6


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_retry_after_is_kept_by_all_requests(how: str) -> None:
    asked = threading.Event()

    def answer(seen: Seen) -> Reply:
        if seen.text.startswith("b"):
            return Reply(completion("x"), delay=0.3)
        if not seen.text.startswith("a") or asked.is_set():
            return echo(seen)
        asked.set()
        # A date has whole seconds.
        when = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
        return Reply({"error": "slow down"}, 429, {"Retry-After": "2" if how == "seconds" else when})

    with running(answer, concurrency=2, retry_s=30.0) as run:
        assert len(run.ask("a", "b", "c", "d")) == 4
    begun = run.server.seen[0].at
    waited = sorted(seen.at - begun for seen in run.server.seen)
    # The first two were under way together; the others, and the first again, once the time has come.
    assert waited[1] < 1.5 < waited[2]
    assert waited[-1] < 30


def test_a_server_that_asks_for_too_much_time_ends_the_run_at_once() -> None:
    start = time.monotonic()
    with (
        running(lambda seen: Reply({}, 429, {"Retry-After": "3600"})) as run,
        pytest.raises(TryAgain, match="429"),
    ):
        run.ask("a")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("trouble", [Reply(drop=True), Reply(b"{", length=100), Reply({}, 503)])
def test_a_server_that_stays_away_ends_the_run(trouble: Reply) -> None:
    with running(lambda seen: trouble, retry_s=1.0) as run, pytest.raises(TryAgain, match=run.server.url):
        run.ask("a", "b")


def test_no_server_is_told_before_the_patience_for_a_busy_one_ends() -> None:
    with serving() as server:
        url = server.url
    start = time.monotonic()
    with pytest.raises(TryAgain, match="does not answer") as caught:
        plan_for(url, retry_s=100.0).load()
    assert time.monotonic() - start < 60
    assert "start the server" in str(caught.value.hint)


def test_a_server_that_goes_away_and_comes_back_in_time() -> None:
    with serving() as server:
        plan = plan_for(server.url, retry_s=20.0)
        run = Running(server, plan)
        assert len(run.ask("a")) == 1
    pending = run.start(["b"])
    assert not pending.wait(0.3)
    with serving(port=server.port):
        assert pending.result()[0].text == "re: b\n\nWhat?"


@pytest.mark.parametrize("trouble", [Reply(drop=True), Reply(b"{", length=100)])
def test_broken_connections_are_mended(trouble: Reply) -> None:
    with running(flaky(lambda n: trouble, 1), concurrency=4) as run:
        found = run.ask(*"abcdefgh")
    assert [one.text[:5] for one in found] == [f"re: {c}" for c in "abcdefgh"]


def test_answers_that_take_too_long_are_asked_for_again() -> None:
    slow = Reply(completion("late"), delay=1.0)
    with running(flaky(lambda n: slow, 1), timeout_s=0.3) as run:
        assert run.ask("a")[0].text == "re: a\n\nWhat?"


@pytest.mark.parametrize("alone", [False, True])
def test_a_request_that_breaks_the_server_costs_one_row(alone: bool) -> None:
    def answer(seen: Seen) -> Reply:
        return Reply({"error": "oops"}, 500) if "poison" in seen.text else Reply(completion("x"), delay=0.02)

    with running(answer, concurrency=2, retry_s=1.0 if alone else 60.0) as run:
        if alone:
            assert run.ask("a")[0].text == "x"
            found = run.ask("poison")
        else:
            found = run.ask("poison", *["a"] * 100)
            assert {one.text for one in found[1:]} == {"x"}
    assert (found[0].code, found[0].stage) == ("io", "model")
    assert "oops" in found[0].message


def test_a_server_that_restarts_behind_a_gateway_costs_no_row() -> None:
    later = itertools.count(1)

    def answer(seen: Seen) -> Reply:
        if not seen.text.startswith("first"):
            # The gateway answers for it, quickly, while requests that were under way are lost.
            return Reply("bad gateway", 502) if next(later) <= 16 else echo(seen)
        return echo(seen)

    with running(answer, concurrency=4, retry_s=20.0) as run:
        found = run.ask(*["first"] * 3, *"abcdefgh")
    assert [isinstance(one, Generated) for one in found] == [True] * 11
    assert len(run.server.seen) == 11 + 16


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Reply({"error": {"message": "your input was flagged"}}, 403), "policy_denied"),
        (Reply({"error": {"message": "no such thing", "code": 400}}, 400), "invalid_output"),
        (Reply({"detail": "Unexpected"}, 422), "invalid_output"),
        (Reply(b"Entity Too Large", 413), "too_large"),
        (Reply({"error": {"message": "maximum context length is 10 tokens"}}, 400), "too_large"),
        (Reply({"error": {"message": "no", "code": "content_filter"}}, 400), "policy_denied"),
        (Reply(b"{broken"), "invalid_output"),
        (Reply(b"<html>hello</html>", headers={"Content-Type": "text/html"}), "invalid_output"),
        (Reply({"choices": []}), "invalid_output"),
        (Reply({"error": {"message": "upstream"}}), "invalid_output"),
        (Reply(completion("x", "content_filter")), "policy_denied"),
    ],
)
def test_what_is_refused_costs_one_row(reply: Reply, code: str) -> None:
    with running(lambda seen: reply if "bad" in seen.text else echo(seen)) as run:
        found = run.ask("good", "bad", "good")
    assert [isinstance(one, RowError) for one in found] == [False, True, False]
    assert found[1].code == code
    assert "\n" not in found[1].message


def test_json_of_the_wrong_type_is_taken() -> None:
    with running(lambda seen: Reply(completion("x"), headers={"Content-Type": "text/plain"})) as run:
        assert run.ask("a")[0].text == "x"


@pytest.mark.parametrize("status", [401, 403])
def test_a_denial_ends_the_run_and_tells_no_key(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
    denial = Reply({"error": {"message": f"Incorrect API key {SECRET}"}}, status)
    with running(lambda seen: denial) as run:
        with pytest.raises(ModelError, match="denies access") as caught:
            run.ask("a")
        assert "OPENAI_API_KEY" in f"{caught.value} {caught.value.hint}"
        assert SECRET not in str(caught.value)
        assert run.server.seen[0].headers["authorization"] == f"Bearer {SECRET}"
        run.server.models = denial
        with pytest.raises(ModelError, match="denies access"):
            run.plan.load()


def test_the_key_is_nowhere_but_in_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    plan = plan_for("http://h/v1")
    assert SECRET not in json.dumps(plan.describe())
    assert SECRET.encode() not in pickle.dumps(plan)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX-Other: 1")
    with pytest.raises(ConfigError) as caught:
        plan_for("http://h/v1")
    assert SECRET not in str(caught.value)


def test_redirects_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as other:
        away = Reply(b"", 307, {"Location": f"{other.url}/chat/completions"})
        with running(lambda seen: away) as run, pytest.raises(ModelError, match="redirects"):
            run.ask("a")
        assert other.seen == []


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"error": {"message": "model tiny not found"}}, 404),
        Reply({"detail": "Server has another model; requested 'tiny' not found"}, 400),
    ],
)
def test_a_wrong_address_or_model_ends_the_run(reply: Reply) -> None:
    with running(lambda seen: reply) as run, pytest.raises(ModelError, match="not found"):
        run.ask("a", "b")


def test_a_server_that_refuses_everything_ends_the_run() -> None:
    with running(lambda seen: Reply(b"<html>a web page</html>")) as run:
        assert run.ask("a")[0].code == "invalid_output"
        with pytest.raises(ModelError, match="a web page"):
            run.ask(*"abcdefghijkl")


def test_servers_without_a_list_of_models_will_do() -> None:
    with running() as run:
        for models in (Reply({}, 404), Reply(b"?", 405), Reply({}, 503)):
            run.server.models = models
            assert Running(run.server, run.plan).ask("a")[0].text == "re: a\n\nWhat?"


def strict(*unknown: str) -> Callable[[Seen], Reply]:
    """A server that refuses requests with these fields, and says which."""

    def answer(seen: Seen) -> Reply:
        for name in unknown:
            if name in json.dumps({k: v for k, v in seen.body.items() if k != "messages"}):
                return Reply({"error": {"message": f"unknown parameter: {name}"}}, 400)
        return echo(seen)

    return answer


def test_what_a_server_does_not_know_is_left_out() -> None:
    with running(strict("logprobs"), concurrency=1) as run:
        assert [one.text for one in run.ask("a", "b", "c")] == [f"re: {c}\n\nWhat?" for c in "abc"]
    # Only the first had to find out.
    assert ["logprobs" in seen.body for seen in run.server.seen] == [True, False, False, False]
    assert all(seen.body["max_tokens"] == 50 for seen in run.server.seen)


def test_newer_names_are_used_where_they_are_asked_for() -> None:
    def answer(seen: Seen) -> Reply:
        if "max_tokens" in seen.body:
            return Reply({"error": {"message": "'max_tokens' is not supported, use 'max_completion_tokens'"}}, 400)
        return echo(seen)

    with running(answer) as run:
        run.ask("a")
    last = run.server.seen[-1].body
    assert last["max_completion_tokens"] == 50
    assert last["logprobs"] is True


FORMAT = "response_format"


@pytest.mark.parametrize(
    ("unknown", "form"),
    [((), "json_schema"), (("strict",), "json_schema"), (("json_schema",), "json_object"), ((FORMAT,), None)],
)
def test_response_formats(unknown: tuple[str, ...], form: str | None) -> None:
    answers = strict(*unknown)

    def answer(seen: Seen) -> Reply:
        reply = answers(seen)
        return Reply(completion('{"answer": "yes"}')) if reply.status == 200 else reply

    with running(answer, choices=("yes", "no")) as run:
        assert run.ask("a")[0] == Scored("yes", None, ())
    body = run.server.seen[-1].body
    assert body.get("response_format", {}).get("type") == form
    assert body["logprobs"] is True
    if form == "json_schema":
        schema = body["response_format"]["json_schema"]
        assert schema["schema"]["properties"]["answer"]["enum"] == ["yes", "no"]
        assert schema.get("strict") == (None if unknown else True)
    assert '"yes", "no"' in run.server.seen[0].text


def test_one_refused_row_does_not_change_what_others_are_asked_for() -> None:
    def answer(seen: Seen) -> Reply:
        return Reply({"error": "bad picture"}, 400) if "bad" in seen.text else echo(seen)

    with running(answer, concurrency=1) as run:
        found = run.ask("bad", "good")
    assert isinstance(found[0], RowError)
    assert "logprobs" in run.server.seen[-1].body


# The plan ---------------------------------------------------------------------------------------------------------


def test_what_identifies_the_texts() -> None:
    url = "https://example.com/v1"
    described = plan_for(url).describe()
    assert described["endpoint"] == url
    assert plan_for(f"{url}/", concurrency=3, retry_s=1.0, timeout_s=2.0).describe() == described
    assert plan_for(f"{url}/chat/completions").describe() == described
    for change in ({"temperature": 1.0}, {"max_new_tokens": 3}, {"model": "other"}, {"questions": ("Who?",)}):
        assert plan_for(url, **change).describe() != described


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://h/v1", "http://", "http://h:port/v1", "http://h/v1?key=x", "http://h/v 1", "h"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint"):
        plan_for(url)


@pytest.mark.parametrize("url", [f"http://me:{SECRET}@h/v1", f"http://me:{SECRET}/x@h/v1"])
def test_passwords_in_addresses_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        plan_for(url)
    assert SECRET not in str(caught.value)


def test_all_problems_are_told_together() -> None:
    options = ModelOptions("openai:", revision="main", dtype="float16", compile=True, attn_implementation="sdpa")
    with pytest.raises(ConfigError) as caught:
        resolve_endpoint(options, Generation(num_beams=4))
    told = "\n".join(caught.value.problems)
    for word in ("name is missing", "--endpoint http", "--num-beams", "--revision", "--dtype", "--comp", "--attn"):
        assert word in told

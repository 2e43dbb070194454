"""Batches beside one another: what they give is what they give alone, and no model keeps anything between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from model_runs import Run
from torch import nn

from mmcli.core.records import Audio, Modality, Payload
from mmcli.models.concurrent import STATELESS, ConcurrentRunner, PendingOutputs

# The one behind the texts keeps the positions of the last length.
KEEPING = "wav2vec2-conformer-rotary"
BUILDERS = {**tiny_encoders.TEXTS, KEEPING: tiny_encoders.SOUNDS[KEEPING]}
RANDOM = np.random.default_rng(0)
# Short, long, and short again: what depends on the length has to show.
PAYLOADS: dict[Modality, Sequence[Payload]] = {
    "text": ["a cat", "a photo of a dog and a cat " * 20, "the circle"],
    "audio": [Audio(RANDOM.normal(0, 0.1, n).astype(np.float32), 16_000) for n in (1000, 30_000, 2500)],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""

    @cache
    def build(name: str) -> Path:
        return BUILDERS[name](tmp_path_factory.mktemp("tiny") / name.replace(" ", "-"))

    return build


def models_in(part: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Those that a tower calls."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, partial):
        for one in (part.func, *part.args, *part.keywords.values()):
            yield from models_in(one, seen)
    elif callable(part):
        yield from models_in(getattr(part, "__self__", None), seen)
        for cell in getattr(part, "__closure__", None) or ():
            yield from models_in(cell.cell_contents, seen)


def marked(value: Any, depth: int = 3) -> Any:
    """What is the same as long as nothing has been put in its place, or into it."""
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, (list, tuple)) and depth:
        return [marked(one, depth - 1) for one in value]
    if isinstance(value, dict) and depth:
        return {key: marked(one, depth - 1) for key, one in value.items()}
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    inside = getattr(value, "__dict__", None)
    return id(value), marked(inside, depth - 1) if inside is not None and depth else None


def state_of(runner: Any) -> dict[str, Any]:
    seen: set[int] = set()
    models = [model for tower in runner._towers.values() for model in models_in(tower, seen)]
    assert models
    return {
        f"{number}.{name}.{key}": marked(value, 2)
        for number, model in enumerate(models)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def changed(folder: Path) -> tuple[str, set[str]]:
    """The type of a checkpoint, and what its forward passes put elsewhere in its modules."""
    run, found = Run(folder, device="cpu"), set()
    for modality in sorted(run.plan.modalities):
        before = state_of(run.runner)
        for payload in PAYLOADS[modality]:
            run(modality, [payload], 1, 1)
        after = state_of(run.runner)
        found |= {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    return run.plan.checkpoint.config.model_type, found


@pytest.mark.parametrize("name", tiny_encoders.TEXTS)
def test_a_forward_pass_leaves_nothing_in_models_that_have_several(tiny: Callable[[str], Path], name: str) -> None:
    """Else one could read what another one has left."""
    kind, found = changed(tiny(name))
    assert not (found and kind in STATELESS), found


def test_what_a_forward_pass_leaves_is_seen(tiny: Callable[[str], Path]) -> None:
    kind, found = changed(tiny(KEEPING))
    assert kind not in STATELESS
    assert "0.encoder.embed_positions.cached_sequence_length" in found


def test_all_that_may_are_looked_at(tiny: Callable[[str], Path]) -> None:
    assert {Run(tiny(name)).plan.checkpoint.config.model_type for name in tiny_encoders.TEXTS} >= STATELESS


def test_batches_beside_one_another_are_those_alone(tiny: Callable[[str], Path]) -> None:
    run = Run(tiny("bert"), device="cpu")
    samples = [run.processor("text", payload) for payload in PAYLOADS["text"]]
    batches = [run.runner.collate([samples[n % 3]] * (1 + n % 5)) for n in range(60)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [run.runner.forward(batch) for batch in batches]
    finally:
        torch.set_num_threads(threads)
    several = ConcurrentRunner(run.runner, 3, 1)
    pending = [several.forward(batch) for batch in batches]
    together = [one.result() for one in pending]
    several.close()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.get_num_threads() == threads


def test_which_models_have_several(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    runner = Run(tiny("bert"), device="cpu").runner
    found = runner.concurrent(4)
    assert (found.concurrency, found.threads, found.device) == (3, 2, torch.device("cpu"))
    assert runner.concurrent(2).threads == 3
    assert runner.concurrent(1) is runner
    rotary = Run(tiny(KEEPING), device="cpu").runner
    assert rotary.concurrent(4) is rotary
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert runner.concurrent(4) is runner


class Waiting:
    """A runner whose batches wait for one another."""

    def __init__(self, count: int) -> None:
        self.together, self.begun = threading.Barrier(count), 0

    def collate(self, samples: Any) -> Any:
        return samples

    def forward(self, batch: Any) -> Any:
        self.begun += 1
        if isinstance(batch, Exception):
            raise batch
        self.together.wait(60)
        return [batch]


def test_as_many_as_it_says_are_computed_at_once() -> None:
    several = ConcurrentRunner(Waiting(3), 3)  # type: ignore[arg-type]
    pending = [several.forward(n) for n in range(2)]
    assert not pending[0].wait(0.05)
    third = several.forward(2)
    assert third.wait(60)
    assert [one.result() for one in (*pending, third)] == [[0], [1], [2]]


def test_what_a_batch_raises_its_result_raises_without_its_tensors() -> None:
    several = ConcurrentRunner(Waiting(1), 2)  # type: ignore[arg-type]
    failed, good = several.forward(MemoryError("too large")), several.forward(7)
    assert isinstance(failed, PendingOutputs)
    assert failed.wait(60)
    with pytest.raises(MemoryError, match="too large") as caught:
        failed.result()
    assert all("forward" not in entry.name for entry in caught.traceback)
    assert good.result() == [7]


def test_what_has_not_begun_never_does() -> None:
    runner = Waiting(2)
    several = ConcurrentRunner(runner, 1)  # type: ignore[arg-type]
    several.forward(0)
    several.forward(1)
    threading.Timer(0.2, runner.together.wait).start()
    several.close()
    assert runner.begun == 1

"""Captioners write, for every row and batch size, what the checkpoint's own code writes for that row alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_captioners
import tiny_dual
import torch
import transformers as hf
from model_runs import DEVICE, outputs_of
from PIL import Image
from rare import rarely
from safetensors.torch import load_file, save_file

from mmcli.cli.boundary import run
from mmcli.core.errors import ConfigError, ModelError
from mmcli.core.records import Generated
from mmcli.models.loops import has_loop
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.plan import GenerationPlan
from mmcli.models.resolve import resolve_writer

NAMES = tuple(tiny_captioners.BUILDERS)
# A prompt for those that take one; Florence-2 always has a task.
PROMPTS = {"blip": "a photo of", "git": "a cat", "blip_2": "a cat", "blip_2_t5": "a cat",
           "florence2": "<DETAILED_CAPTION>"}  # fmt: skip
CASES = [(name, None) for name in NAMES] + list(PROMPTS.items())
LIMIT = 12
# Heights and widths: tiny, tall, wide, larger, exactly right, a pixel off.
SHAPES = [(3, 5), (5, 3), (200, 20), (18, 250), (120, 160), (32, 32), (33, 31), (64, 64), (97, 130)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""

    @cache
    def build(name: str) -> Path:
        return tiny_captioners.BUILDERS[name](tmp_path_factory.mktemp("tiny") / name)

    return build


@cache
def pictures() -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(1)
    return tuple(generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES)


def plan_of(folder: Path | str, generation: Generation, **options: Any) -> GenerationPlan:
    plan = resolve_writer(ModelOptions(str(folder), device=DEVICE, **options), generation)
    assert isinstance(plan, GenerationPlan)
    return plan


def captions(folder: Path, generation: Generation, batch_size: int, rows: int) -> list[Generated]:
    """Row i is of picture i % len(pictures())."""
    plan = plan_of(folder, generation)
    processor, runner = plan.open_processor(), plan.load()
    samples = [processor.record([("image", pixels)], ())[0] for pixels in pictures()]
    found: list[Generated] = []
    for start in range(0, rows, batch_size):
        batch = [samples[row % len(samples)] for row in range(start, min(rows, start + batch_size))]
        found += outputs_of(runner, batch)  # type: ignore[arg-type]
    return found


# ------------------------------------------------------------------------------------------ the reference


@dataclass
class Reference:
    """A checkpoint as its model card calls it: one picture at a time, float32, eager."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        classes = {
            "git": "GitForCausalLM", "vit_gpt2": "VisionEncoderDecoderModel",
            "blip": "BlipForConditionalGeneration", "florence2": "Florence2ForConditionalGeneration",
        }  # fmt: skip
        model_class = getattr(hf, classes.get(self.name, "Blip2ForConditionalGeneration"))
        self.model = model_class.from_pretrained(self.folder, attn_implementation="eager").eval()
        self.tokenizer = hf.AutoTokenizer.from_pretrained(self.folder)
        self.images = hf.AutoImageProcessor.from_pretrained(self.folder)
        self.end = 3 if self.name == "blip" else self.tokenizer.eos_token_id
        if self.name == "git":
            self.end = self.tokenizer.sep_token_id

    def inputs(self, pixels: np.ndarray, prompt: str | None) -> tuple[dict[str, torch.Tensor], int]:
        """Model inputs, and how many tokens of its output are not written by it."""
        if self.name == "florence2":
            prompt = prompt or "<CAPTION>"
        if self.name in ("vit_gpt2", "git") or prompt is None:
            found = {"pixel_values": self.images(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]}
            if prompt is None:
                return found, 5 if self.name == "blip_2" else 1
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            found["input_ids"] = torch.tensor([[self.tokenizer.cls_token_id, *ids]])
            return found, len(ids) + 1
        processor = hf.AutoProcessor.from_pretrained(self.folder)
        found = dict(processor(images=Image.fromarray(pixels), text=prompt, return_tensors="pt"))
        given = {"blip": found["input_ids"].shape[1] - 1, "blip_2": found["input_ids"].shape[1]}
        return found, given.get(self.name, 1)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, prompt: str | None, num_beams: int) -> tuple[Generated, float]:
        """What is written, and the mean log-probability by a forward pass over the whole text."""
        inputs, given = self.inputs(pixels, prompt)
        kept = {name: tensor.clone() for name, tensor in inputs.items()}
        # do_sample and num_beams as Florence-2's settings have them otherwise.
        # GIT's cache is wrong before transformers 5.23: its reference is the text without one.
        cache = {"use_cache": False} if self.name == "git" else {}
        tokens = self.model.generate(**inputs, max_new_tokens=LIMIT, num_beams=num_beams, do_sample=False, **cache)
        written = tokens[0, given:].tolist()
        forced = self.name == "florence2" and len(written) == LIMIT
        stopped = written[-1] == self.end and not forced
        count = len(written) - forced
        if self.name == "florence2":
            processor = hf.AutoProcessor.from_pretrained(self.folder)
            text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
            task = prompt or "<CAPTION>"
            text = processor.post_process_generation(text, task=task, image_size=(9, 9))[task]
        else:
            text = self.tokenizer.decode(written, skip_special_tokens=True).strip()
        logits = self.logits(kept, tokens)[0, given - 1 : given - 1 + count].double()
        chosen = logits.log_softmax(dim=-1)[torch.arange(count), tokens[0, given : given + count]]
        mean = float(chosen.mean())
        return Generated(text, "stop" if stopped else "length", count, mean, False), mean

    def logits(self, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        pixels = inputs["pixel_values"]
        if self.name == "blip":
            seen = self.model.vision_model(pixel_values=pixels)[0]
            return self.model.text_decoder(input_ids=tokens, encoder_hidden_states=seen).logits
        if self.name in ("git", "blip_2"):
            logits = self.model(pixel_values=pixels, input_ids=tokens).logits
            return logits[:, -tokens.shape[1] :]
        if self.name == "vit_gpt2":
            return self.model(pixel_values=pixels, decoder_input_ids=tokens).logits
        if "input_ids" not in inputs:
            # As its generate begins: four places for the picture, and the start token.
            image = self.model.config.image_token_id
            inputs["input_ids"] = torch.tensor([[image] * 4 + [self.model.config.text_config.bos_token_id]])
        prompt = {n: inputs[n] for n in ("input_ids", "attention_mask") if n in inputs}
        return self.model(pixel_values=pixels, **prompt, decoder_input_ids=tokens).logits


@pytest.fixture(scope="session")
def wanted(tiny: Callable[[str], Path]) -> Callable[..., list[Generated]]:
    """The reference's captions of `pictures()`."""

    @cache
    def compute(name: str, prompt: str | None, num_beams: int) -> list[Generated]:
        reference = Reference(tiny(name), name)
        return [reference(pixels, prompt, num_beams)[0] for pixels in pictures()]

    return compute


def assert_same(found: Sequence[Generated], wanted: Sequence[Generated], scores: bool = True) -> None:
    for row, one in enumerate(found):
        other = wanted[row % len(wanted)]
        assert (one.text, one.finish_reason, one.n_tokens) == (other.text, other.finish_reason, other.n_tokens)
        if scores:
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=2e-4)


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("batch_size", rarely([1, 5, 16], lambda n: n == 5))
@pytest.mark.parametrize(
    ("name", "prompt"), rarely(CASES, lambda case: case[1] is None or case[0] in ("blip", "florence2"))
)
def test_greedy(
    tiny: Callable[[str], Path],
    wanted: Callable[..., list[Generated]],
    name: str,
    prompt: str | None,
    batch_size: int,
) -> None:
    expected = wanted(name, prompt, 1)
    assert len({one.text for one in expected}) > 3, "the texts do not tell the pictures apart"
    found = captions(tiny(name), Generation(prompt, LIMIT), batch_size, rows=20)
    # Florence-2's settings forbid to repeat three tokens: its scores are those of what is allowed.
    assert_same(found, expected, scores=name != "florence2")


@pytest.mark.parametrize(("name", "prompt"), rarely(CASES, {("blip", None), ("florence2", None)}.__contains__))
def test_beams(
    tiny: Callable[[str], Path], wanted: Callable[..., list[Generated]], name: str, prompt: str | None
) -> None:
    found = captions(tiny(name), Generation(prompt, LIMIT, num_beams=3), 5, rows=len(pictures()))
    assert_same(found, wanted(name, prompt, 3))


def test_both_ends_are_among_the_texts(wanted: Callable[..., list[Generated]]) -> None:
    found = [one.finish_reason for name, prompt in CASES for one in wanted(name, prompt, 1)]
    assert found.count("stop") > 5
    assert found.count("length") > 5


# ------------------------------------------------------------------------------------------ drawn texts


def test_draws_do_not_depend_on_neighbours(tiny: Callable[[str], Path]) -> None:
    drawn = {}
    for seed in (0, 1):
        generation = Generation(None, LIMIT, temperature=1.0, seed=seed)
        one, five = (captions(tiny("blip"), generation, size, rows=9) for size in (1, 5))
        assert [o.text for o in one] == [f.text for f in five]
        drawn[seed] = [o.text for o in one]
    assert drawn[0] != drawn[1]
    # Nearly cold, they are the likeliest.
    cold = captions(tiny("blip"), Generation(None, LIMIT, temperature=1e-4), 9, rows=9)
    assert_same(cold, captions(tiny("blip"), Generation(None, LIMIT), 9, rows=9))


# ------------------------------------------------------------------------------------------ trust


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([], False), ([1], False), ([1, 1, 1], False), ([1, 1, 1, 1], True), ([5, 1, 1, 1, 1, 6], True),
        ([1, 2, 1, 2], False), ([1, 2, 1, 2, 1, 2], True), ([1, 2, 1, 2, 1], False), ([1, 2, 3] * 3, True),
        ([*range(8)] * 3, True), ([*range(8)] * 2, False), ([*range(9)] * 3, False), ([*range(40)], False),
        ([1, 2, 1, 3, 1, 2, 1, 3], False),
    ],
)  # fmt: skip
def test_loops(tokens: list[int], loop: bool) -> None:
    assert has_loop(tokens) is loop


def test_broken_weights_give_no_score(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("blip"), tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("patch_embedding.weight"))
    weights[name][:] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert all(math.isnan(one.mean_logprob) for one in captions(folder, Generation(None, LIMIT), 3, rows=3))


# ------------------------------------------------------------------------------------------ refusals


def test_missing_weights(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("git"), tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "visual_projection" in n)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights that its captions need"):
        plan_of(folder, Generation()).load()


@pytest.mark.parametrize(
    ("name", "generation", "options", "said"),
    [
        ("vit_gpt2", Generation("a photo of"), {}, "takes no prompt"),
        ("florence2", Generation("a photo of"), {}, "takes <CAPTION>, <DETAILED_CAPTION>"),
        ("blip", Generation(max_new_tokens=90), {}, "give at most --max-new-tokens 89"),
        ("git", Generation("a cat " * 40), {}, "give a shorter --prompt"),
        ("blip", Generation(), {"compile": True}, "--compile is not for captions"),
    ],
)
def test_refused(
    tiny: Callable[[str], Path], name: str, generation: Generation, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny(name), generation, **options)
    assert said in str(caught.value)


def test_models_that_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny_dual.CLIP_DIRECTORY, Generation())
    supported = str(caught.value).partition("Supported are ")[2].split(", ")
    assert {"blip", "blip-2", "florence2", "git", "vision-encoder-decoder"} <= set(supported)
    assert caught.value.hint == "it gives vectors: mmcli embed"
    with pytest.raises(ConfigError, match="saved as BlipForImageTextRetrieval"):
        plan_of(tiny_dual.blip_retrieval(tmp_path / "retrieval"), Generation())


# ------------------------------------------------------------------------------------------ the command


def test_command(tiny: Callable[[str], Path], wanted: Callable[..., list[Generated]], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for row, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{row}.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n")
    arguments = ["caption", str(tmp_path / "in"), "-m", str(tiny("blip")), "--max-new-tokens", str(LIMIT)]
    arguments += ["--num-workers", "0", "--batch-size", "4", "--device", DEVICE]
    for out in (tmp_path / "o.jsonl", tmp_path / "o.parquet"):
        assert run([*arguments, "-o", str(out)]) == 3
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert rows[-1]["id"] == "broken.png"
    for row, one in zip(rows, wanted("blip", None, 1), strict=False):
        if not one.text:
            assert (row["error_code"], row["caption"], row["n_tokens"]) == ("empty_output", None, None)
            continue
        assert (row["caption"], row["finish_reason"], row["n_tokens"]) == (
            one.text,
            one.finish_reason,
            one.n_tokens,
        )
        assert row["mean_logprob"] == pytest.approx(one.mean_logprob, abs=2e-4)

"""--choices and --schema with real, tiny, random models, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_chats
import tiny_vqa
import torch
import transformers as hf
from model_runs import DEVICE

from mmcli.cli.boundary import run

SCHEMA = "name, age int, mood happy|sad, tags list, share float, ok bool"
QUESTION = "Who is it?"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def build(name: str) -> Path:
        builders = {**tiny_chats.BUILDERS, "llama": tiny_chats.llama, "blip_vqa": tiny_vqa.blip_vqa}
        return builders[name](tmp_path_factory.mktemp("tiny") / name)

    return build


def texts(folder: Path, count: int) -> Path:
    (folder / "m.csv").write_text("\n".join(["text", *(f"somebody number {n}" for n in range(count)), ""]))
    return folder / "m.csv"


def ask(inputs: Path, model: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ["ask", str(inputs), "-m", str(model), "-q", QUESTION, "-o", str(out), "--num-workers", "0"]
    assert run([*arguments, "--device", DEVICE, "--quiet", *options]) == 0
    return pq.read_table(out).to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_all_answers_keep_to_the_schema(tiny: Callable[[str], Path], tmp_path: Path, count: int) -> None:
    """A random model at a high temperature: what it writes is noise but for the grammar."""
    out = tmp_path / "o.parquet"
    options = ["--schema", SCHEMA, "--temperature", "2", "--batch-size", "50", "--max-new-tokens", "150"]
    rows = ask(texts(tmp_path, count), tiny("llama"), out, "--text-column", "text", *options)
    assert pq.read_schema(out).field("answer").type == pa.struct(
        [
            ("name", pa.string()),
            ("age", pa.int64()),
            ("mood", pa.string()),
            ("tags", pa.list_(pa.string())),
            ("share", pa.float64()),
            ("ok", pa.bool_()),
        ]
    )
    assert len(rows) == count
    answers = [row["answer"] for row in rows]
    assert all(set(answer) == {"name", "age", "mood", "tags", "share", "ok"} for answer in answers)
    assert {answer["mood"] for answer in answers} == {"happy", "sad"}
    assert len({json.dumps(answer) for answer in answers}) > 0.95 * count
    # What was closed because the room ran out says so.
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}


def test_a_row_keeps_its_answer_whatever_the_batch(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ["--text-column", "text", "--schema", SCHEMA, "--max-new-tokens", "120"]
    found = [
        ask(texts(tmp_path, 6), tiny("llama"), tmp_path / f"{size}.parquet", *options, "--batch-size", size)
        for size in ("1", "6")
    ]
    assert [row["answer"] for row in found[0]] == [row["answer"] for row in found[1]]


def test_choices_have_the_probability_of_writing_them(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder, names = tiny("llama"), ["yes", "no", "hard to say"]
    options = ["--text-column", "text", "--choices", ",".join(names)]
    inputs = texts(tmp_path, 5)
    one, five = (ask(inputs, folder, tmp_path / f"{n}.parquet", *options, "--batch-size", n) for n in ("1", "5"))
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    for number, (row, other) in enumerate(zip(one, five, strict=True)):
        message = {"role": "user", "content": f"somebody number {number}\n\n{QUESTION}"}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
        wanted = probabilities(model, tokenizer, prompt, names)
        assert {k["answer"]: k["score"] for k in row["top_k"]} == pytest.approx(wanted, abs=1e-4)
        assert (row["answer"], row["score"]) == (row["top_k"][0]["answer"], row["top_k"][0]["score"])
        assert row["answer"] == max(wanted, key=wanted.__getitem__) == other["answer"]
        assert row["score"] == pytest.approx(other["score"], abs=1e-5)


@torch.inference_mode()
def probabilities(model: Any, tokenizer: Any, prompt: list[int], names: list[str]) -> dict[str, float]:
    """By teacher forcing, one spelling at a time."""
    sums = []
    for name in names:
        likelihood = 0.0
        for text in (name, f" {name}"):
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
            likelihood += float(logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum().exp())
        sums.append(likelihood)
    return {name: value / sum(sums) for name, value in zip(names, sums, strict=True)}


def test_what_a_tokenizer_cannot_do(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], sample_data: Path
) -> None:
    arguments = ["ask", str(sample_data / "images"), "-m", str(tiny("blip_vqa")), "-q", QUESTION]
    assert run([*arguments, "--schema", SCHEMA, "--max-new-tokens", "80"]) == 2
    assert "--schema: the tokens of the tokenizer" in capsys.readouterr().err
    assert run([*arguments, "--choices", "☃,yes"]) == 2
    assert "--choices '☃': the model's tokenizer has no tokens for it" in capsys.readouterr().err

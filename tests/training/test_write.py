"""The objectives *caption* and *vqa*: what is learned is what inference reads and writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_captioners
import tiny_chats
import tiny_speech
import tiny_vqa
import torch
import transformers as hf
from PIL import Image
from rare import rarely
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from training_runs import sound_rows, still, trainer_of

from mmcli.cli.boundary import run as mmcli
from mmcli.cli.objectives import list_rows
from mmcli.cli.options import InputArguments, TrainingArguments
from mmcli.cli.writing import WRITING, measure_answers, measure_speech, measure_texts, references
from mmcli.core.errors import ConfigError, Stopped
from mmcli.core.records import Media
from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.speech import evaluate
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.resolve import resolve_writer
from mmcli.training.data import Batches, Row, Rows, load
from mmcli.training.options import TrainOptions
from mmcli.training.write import Part, Write
from mmcli.training.write_answers import Answers, answers_plan, soft_scores
from mmcli.training.write_tokens import IGNORED, form_of

SAMPLES = Path(__file__).resolve().parent.parent.parent / "sample_data"
TEXTS = ("a cat", "the red circle on the left", "dog")
QUESTIONS = ("is it a cat", "what is on the left of the photo?")
# name -> (builder, task)
FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "blip": (tiny_captioners.blip, "caption"),
    "blip_prompt": (tiny_captioners.blip, "caption"),
    "git": (tiny_captioners.git, "caption"),
    "vit_gpt2": (tiny_captioners.vit_gpt2, "caption"),
    "blip_2": (tiny_captioners.blip_2, "caption"),
    "blip_2_t5": (tiny_captioners.blip_2_t5, "ask"),
    "git_vqa": (tiny_captioners.git, "ask"),
    "blip_vqa": (tiny_vqa.blip_vqa, "ask"),
    "instructblip": (tiny_vqa.instructblip, "ask"),
    "llava": (tiny_chats.llava, "ask"),
    "smolvlm": (tiny_chats.smolvlm, "caption"),
    "qwen2_vl": (tiny_chats.qwen2_vl, "ask"),
    "paligemma": (tiny_chats.paligemma, "ask"),
    "gemma3": (tiny_chats.gemma3, "ask"),
    "qwen2_audio": (tiny_chats.qwen2_audio, "caption"),
    "whisper": (tiny_speech.multilingual, "caption"),
}
# A kind of each: an encoder and a decoder, one that is both, prefixes, a chat's template, pictures of many sizes.
OFTEN = {"blip", "git_vqa", "vit_gpt2", "blip_2_t5", "llava", "qwen2_vl", "whisper", "vilt"}
HEARING = ("qwen2_audio", "whisper")
Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Checkpoints by name, made once; without dropout."""
    folder = tmp_path_factory.mktemp("bases")
    builders = {**{name: builder for name, (builder, _) in FAMILIES.items()}, "vilt": tiny_vqa.vilt}

    def build(name: str) -> Path:
        if not (folder / name).exists():
            # Whatever ran before: weights by chance may write the token that stands for a picture.
            torch.manual_seed(0)
            config = still(builders[name](folder / name)) / "config.json"
            # GPT-2's own names of dropout.
            config.write_text(config.read_text().replace('_pdrop": 0.1', '_pdrop": 0.0'))
        return folder / name

    return build


def picture_rows(folder: Path, count: int, texts: Sequence[tuple[str, ...]] = tuple((t,) for t in TEXTS)) -> Any:
    """Pictures of noise, with questions."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        file = folder / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(file)
        media, question = (Media("image", file=str(file)),), QUESTIONS[number // 2 % 2]
        rows.append(Row(str(number), media, texts[number % len(texts)], (question,)))
    return rows


def rows_of(name: str, folder: Path, count: int) -> list[Row]:
    if name not in HEARING:
        return picture_rows(folder, count)
    spoken = sound_rows(folder, count)
    return [replace(row, target=(("the sea", "blue and wide today")[n % 2],)) for n, row in enumerate(spoken)]


def objective_of(name: str, base: Path, **options: Any) -> Write:
    if name == "vilt":
        asked = Generation(questions=("{question}",), variables=("question",), task="ask")
        plan = answers_plan(ModelOptions(str(base), device="cpu"), asked, [("cat",)], options.pop("new", False))
        return Write(plan, Answers(plan), measure_answers, name="vqa", **options)
    task = FAMILIES[name][1]
    generation = Generation(
        prompt="a photo of the" if name in ("blip_prompt", "smolvlm") else None,
        max_new_tokens=10,
        questions=("{question}",) if task == "ask" else (),
        variables=("question",) if name not in HEARING else (),
        task=task,  # type: ignore[arg-type]
        language="de" if name == "whisper" else None,
    )
    plan = resolve_writer(ModelOptions(str(base), device="cpu"), generation)
    form = form_of(plan)  # type: ignore[arg-type]
    return Write(form.plan, form, measure_answers if task == "ask" else measure_texts, **options)


def parts_of(objective: Write, rows: Sequence[Row], pieces: int = 1) -> list[list[Part]]:
    """All rows as one batch, of a built objective."""
    made = Rows(rows, objective.plan, 0)
    items: Any = [made[(0, number)] for number in range(len(rows))]
    return objective.collate(items, pieces)


# ------------------------------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("name", rarely([name for name in FAMILIES if name != "whisper"], OFTEN.__contains__))
def test_the_model_learns_in_the_place_where_it_writes(tmp_path: Path, built: Built, name: str) -> None:
    """Of what it writes itself, the loss is what generation tells: prompts, positions and masks are the same."""
    objective = objective_of(name, built(name))
    model: Any = objective.build(torch.device("cpu")).eval()
    if name == "qwen2_vl":
        # Its settings change probabilities while it writes.
        model.generation_config.repetition_penalty = None
    writer, written = objective._runner.loaded, []
    object.__setattr__(writer, "decode", lambda tokens: written.append(list(tokens)) or "")
    with torch.inference_mode():
        for part in parts_of(objective, rows_of(name, tmp_path, 5))[0]:
            written.clear()
            outputs = objective._runner.forward(part.batch)
            texts = [
                torch.tensor([*tokens, writer.ends[0]][: output.n_tokens])
                for tokens, output in zip(written, outputs, strict=True)
            ]
            targets = pad_sequence(texts, batch_first=True, padding_value=IGNORED)
            for row, output in enumerate(outputs):
                # One row counts, beside its neighbours.
                alone = torch.where((torch.arange(len(outputs)) == row)[:, None], targets, IGNORED)
                inputs = objective._runner.to_device(part.batch)
                found = objective.form.sums(model, inputs, alone, 0.0)
                assert found.count == output.n_tokens
                assert float(found.loss) / found.count == pytest.approx(-output.mean_logprob, abs=1e-5)
                assert found.right == found.count


@pytest.mark.parametrize("name", rarely([*FAMILIES, "vilt"], OFTEN.__contains__))
def test_a_batch_in_pieces_has_the_gradients_of_the_whole(tmp_path: Path, built: Built, name: str) -> None:
    """Of 7 rows as one piece and as 3, float64: other prompts and paddings come together."""
    rows = rows_of(name, tmp_path, 7)

    def gradients(pieces: int) -> tuple[dict[str, torch.Tensor], float]:
        objective = objective_of(name, built(name))
        objective.plan = replace(objective.plan, dtype="float64")
        model = objective.build(torch.device("cpu")).train()
        batches = Batches(len(rows), len(rows), 0)
        made = Rows(rows, objective.plan, 0)
        (found,) = load(made, batches, lambda items: objective.collate(items, pieces), 0)
        loss = objective.step(model, found, objective.count(found), lambda loss: loss.backward())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss

    whole, loss = gradients(1)
    found, other = gradients(3)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    assert largest > 0
    assert other == pytest.approx(loss, rel=1e-6)
    assert found.keys() == whole.keys()
    worst = max(float((found[name] - whole[name]).abs().max()) for name in whole)
    assert worst <= 1e-6 * largest, f"{worst / largest:.1e}"


def own_loss(name: str, model: Any, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> float:
    """What transformers' models make of `labels`, from inputs put together by hand."""
    count, ignored = len(targets), torch.full((len(targets), 1), IGNORED)
    pixels = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    if name in ("vit_gpt2", "blip_2_t5"):
        text = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        return float(model(**pixels, **text, labels=targets).loss)
    if name == "vilt":
        return float(model(**inputs, labels=targets).loss)
    if name == "whisper":
        prompt = torch.tensor([model.generation_config.lang_to_id["<|de|>"], 0]).expand(count, -1).clone()
        prompt[:, 1] = model.generation_config.task_to_id["transcribe"]
        begin = torch.full((count, 1), model.config.decoder_start_token_id)
        known = targets.masked_fill(targets == IGNORED, 0)
        ids = torch.cat([begin, prompt, known[:, :-1]], dim=1)
        labels = torch.cat([ignored, ignored, targets], dim=1)
        return float(model(input_features=inputs["input_features"], decoder_input_ids=ids, labels=labels).loss)
    if name in ("blip", "blip_vqa"):
        prompt = torch.full((count, 1), model.config.text_config.bos_token_id)
    elif name == "blip_prompt":
        # Its processor puts [CLS] before and [SEP] behind; `generate` begins with [DEC], and takes no end.
        prompt = inputs["input_ids"][:, :-1].clone()
        prompt[:, 0] = model.config.text_config.bos_token_id
    elif name == "blip_2":
        places = [model.config.image_token_index] * model.config.num_query_tokens
        prompt = torch.tensor([[*places, 0]]).expand(count, -1)
    else:
        prompt = inputs.get("input_ids", torch.full((count, 1), 2))
    mask = inputs.get("attention_mask", torch.ones_like(prompt))[:, : prompt.shape[1]]
    ids = torch.cat([prompt, targets.masked_fill(targets == IGNORED, 0)], dim=1)
    labels = torch.cat([torch.full_like(prompt, IGNORED), targets], dim=1)
    mask = torch.cat([mask, (targets != IGNORED).long()], dim=1)
    if name == "blip_vqa":
        asked = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        return float(model(**pixels, **asked, decoder_input_ids=ids, labels=labels).loss)
    more = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for kind in {"mm_token_type_ids", "token_type_ids"} & more.keys():
        # Of PaliGemma, 1 is what follows the prompt.
        more[kind] = torch.cat([more[kind], torch.full_like(targets, int(name == "paligemma"))], dim=1)
    return float(model(**more, input_ids=ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("name", [*FAMILIES, "vilt"])
def test_the_loss_is_the_models_own(tmp_path: Path, built: Built, name: str) -> None:
    """transformers' `labels=`, of rows whose texts are of many lengths."""
    objective = objective_of(name, built(name))
    model = objective.build(torch.device("cpu")).eval()
    for part in parts_of(objective, rows_of(name, tmp_path, 3))[0]:
        with torch.inference_mode():
            inputs = objective._runner.to_device(part.batch)
            found = objective.form.sums(model, inputs, part.targets, 0.0)
            wanted = own_loss(name, model, inputs, part.targets)
        assert float(found.loss) / found.count == pytest.approx(wanted, rel=1e-5)
        assert objective.count([[part]]) == found.count


@pytest.mark.parametrize(
    ("name", "end"),
    [("blip", "[SEP]"), ("vit_gpt2", "<|end|>"), ("llava", "</s>"), ("smolvlm", "<end_of_utterance>")],
)
def test_texts_are_learned_to_their_end(tmp_path: Path, built: Built, name: str, end: str) -> None:
    """The end is learned once; not of a text that is cut."""
    objective = objective_of(name, built(name))
    objective.build(torch.device("cpu"))
    rows = picture_rows(tmp_path, 2, (("a cat",), ("cat " * 30,)))
    (piece,) = parts_of(objective, rows)
    short, long = [row[row != IGNORED].tolist() for part in piece for row in part.targets]
    form: Any = objective.form
    token = form.tokenizer.convert_tokens_to_ids(end)
    assert short[-1] == token
    assert short.count(token) == 1
    assert form.tokenizer.decode(short[:-1], skip_special_tokens=True).strip() == "a cat"
    assert len(long) == objective.plan.generation.max_new_tokens
    assert token not in long


# ------------------------------------------------------------------------------------------ conversations


def talk_of(*texts: str) -> list[dict[str, Any]]:
    """Of user and assistant in turn, the first with a place for a picture."""
    said = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": texts[0]}]}, *said[1:]]


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
def test_the_last_turn_is_what_the_template_writes(tmp_path: Path, built: Built, name: str) -> None:
    """Inputs and targets, one behind the other, are transformers' tokens of the whole conversation."""
    talk = talk_of("What is it?", "A cat.", "Why?", "It has  two ears.")
    file = tmp_path / "rows.jsonl"
    picture_rows(tmp_path, 1)
    file.write_text(json.dumps({"image": "0.png", "messages": talk}) + "\n")
    given: Any = SimpleNamespace(inputs=InputArguments(), training=TrainingArguments(messages_column="messages"))
    listed = list_rows(given, (str(file),), "INPUT", WRITING["vqa"])
    (record,), targets = listed.records, WRITING["vqa"].targets(listed, None)
    generation = Generation(messages="talk", variables=("talk", "answer"), task="ask")
    plan: Any = resolve_writer(ModelOptions(str(built(name)), device="cpu"), generation)
    objective = Write(plan, form_of(plan), measure_answers)
    objective.build(torch.device("cpu"))
    ((part,),) = parts_of(objective, [Row(record.id, record.media, targets[0], record.variables)])
    found = [*objective._runner.to_device(part.batch)["input_ids"][0].tolist(), *part.targets[0].tolist()]
    talk[0]["content"][0]["image"] = Image.open(tmp_path / "0.png")
    for message in talk[1:]:
        message["content"] = [{"type": "text", "text": message["content"]}]
    processor = hf.AutoProcessor.from_pretrained(built(name))
    wanted = processor.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"][0]
    assert found == wanted[: len(found)]
    # Behind the end there is a line break at most.
    assert processor.tokenizer.decode(wanted[len(found) :]).strip() == ""


def test_conversations_are_learned_and_measured_as_users_get_them(tmp_path: Path) -> None:
    """The sample chat model, of whose answers some are called wrong."""

    def talk(line: dict[str, Any]) -> list[dict[str, Any]]:
        true = "none" if "circle" in line["label"] else line["caption"].split()[-2]
        return talk_of("how many shapes are there?", "one", "what colour is the background?", true)

    rows = manifest(tmp_path / "rows.jsonl", "images.jsonl", slice(0, 8), messages=talk)
    asked = manifest(tmp_path / "asked.jsonl", "images.jsonl", slice(0, 8), messages=lambda line: talk(line)[:-1])
    run, column = tmp_path / "run", ("--messages-column", "messages")
    lines = finetune(run, rows, rows, "--objective", "vqa", *column, "--max-steps", 1, "--learning-rate", 0,
                     "-m", SAMPLES / "models" / "chat")  # fmt: skip
    found = written(run, asked, "ask", "answer", *column)
    truth = [json.loads(line)["messages"][-1]["content"] for line in rows.read_text().splitlines()]
    right = np.mean([answer == true for answer, true in zip(found, truth, strict=True)])
    assert 0.5 <= right < 1
    assert right == pytest.approx(best_of(run, lines)["val_exact_match"])


# ------------------------------------------------------------------------------------------ answers


def test_what_answers_are_worth() -> None:
    assert soft_scores(["yes"]) == {"yes": 1.0}
    found = soft_scores(["yes"] * 6 + ["no"] * 2 + ["maybe"])
    assert found == {"yes": 1.0, "no": pytest.approx(2 / 3), "maybe": pytest.approx(1 / 3)}


def test_cells_of_references() -> None:
    assert references(" a cat ") == ("a cat",)
    assert references(["yes", "", None, "no"]) == ("yes", "no")
    assert references([{"answer": "yes", "answer_id": 1}, {"answer": "no"}]) == ("yes", "no")
    assert references(np.array([2.0, 3.5], np.float32)) == ("2", "3.5")
    assert references(7) == ("7",)
    assert references("  ") == references(None) == references([]) == ()


def test_known_and_unknown_answers(tmp_path: Path, built: Built) -> None:
    """Of two answers with one name, the first; others are left out; a row that has none learns that."""
    objective = objective_of("vilt", built("vilt"))
    objective.build(torch.device("cpu"))
    rows = picture_rows(tmp_path, 2, (("red", "red", "no", "green"), ("green",)))
    targets = torch.cat([part.targets for part in parts_of(objective, rows)[0]])
    names = list(tiny_vqa.ANSWERS)
    wanted = torch.zeros(2, len(names))
    wanted[0, names.index("red")], wanted[0, names.index("no")] = 2 / 3, 1 / 3
    assert torch.allclose(targets, wanted)


def test_a_vilt_without_answers_gets_those_of_the_rows(tmp_path: Path, built: Built) -> None:
    """As dandelin/vilt-b32-mlm: its body is kept, and the whole head is new."""
    base = tmp_path / "base"
    shutil.copytree(built("vilt"), base)
    config = hf.ViltConfig.from_pretrained(base, num_labels=2)
    body = hf.ViltForMaskedLM(config)
    body.save_pretrained(base)
    objective = objective_of("vilt", base)
    assert objective.plan.detail.answers == ("cat",)
    model: Any = objective.build(torch.device("cpu"))
    assert objective.new_weights() == {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
    kept = dict(body.vilt.named_parameters())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.vilt.named_parameters() if name in kept)
    assert model.config.id2label == {0: "cat"}


# ------------------------------------------------------------------------------------------ runs


def test_a_stopped_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """With dropout and evaluations between."""
    base = tiny_captioners.blip(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (base / "config.json").write_text(json.dumps(config))
    rows = picture_rows(tmp_path / "images", 9)
    options = TrainOptions(epochs=2, batch_size=3, learning_rate=1e-3, accumulation=2, eval_steps=2)

    def trainer(run: str, stop: Any = None) -> Any:
        objective: Any = objective_of("blip", base)
        return trainer_of(tmp_path / run, objective, rows[:7], rows[7:], options, stop)

    trainer("whole").train()
    asked = iter(range(100))
    with pytest.raises(Stopped):
        trainer("run", lambda: 130 if next(asked) >= 2 else None).train()
    trainer("run").train()
    found, wanted = (load_file(tmp_path / run / "last" / "model.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    before = load_file(base / "model.safetensors")
    assert any(not torch.equal(found[name], before[name]) for name in wanted)


def manifest(file: Path, source: str, rows: slice, **columns: Callable[[dict[str, Any]], Any]) -> Path:
    """Some rows of a sample manifest, with columns that are made of others."""
    lines = [json.loads(line) for line in (SAMPLES / source).read_text().splitlines()][rows]
    for line in lines:
        line["image"] = str(SAMPLES / line["image"])
        line |= {name: make(line) for name, make in columns.items()}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def finetune(run: Path, train: Path, val: Path, *more: object) -> list[dict[str, Any]]:
    """Lines of the log."""
    command = ["finetune", train, "--val", val, "-o", run, "--num-workers", 0, "--no-preflight", *more]
    assert mmcli([str(word) for word in command]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def best_of(run: Path, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    told = json.loads((run / "run.json").read_text())
    return next(line for line in lines if line["step"] == told["best_step"] and "val_loss" in line)


def written(run: Path, val: Path, command: str, column: str, *more: object) -> list[str]:
    """What the command gives, of the run's best."""
    out = run.parent / f"{run.name}.jsonl"
    words = [command, val, "-m", run / "best", "-o", out, "--num-workers", 0, *more]
    assert mmcli([str(word) for word in words]) == 0
    return [json.loads(line)[column] for line in out.read_text().splitlines()]


def test_captions_are_learned_and_measured_as_users_get_them(tmp_path: Path) -> None:
    """The sample captioner learns to name what it has described."""
    train = manifest(tmp_path / "train.jsonl", "images.jsonl", slice(0, 32))
    val = manifest(tmp_path / "val.jsonl", "images.jsonl", slice(32, 48))
    run = tmp_path / "run"
    lines = finetune(run, train, val, "--objective", "caption", "-m", SAMPLES / "models" / "captioner",
                     "--target-column", "label", "--epochs", 6, "--batch-size", 8, "--learning-rate", "1e-3",
                     "--gradient-accumulation-steps", 2)  # fmt: skip
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    best = best_of(run, lines)
    found = written(run, val, "caption", "caption")
    wanted = [json.loads(line)["label"] for line in val.read_text().splitlines()]
    right = np.mean([text == label for text, label in zip(found, wanted, strict=True)])
    assert 0 < right == pytest.approx(best["val_exact_match"])
    assert best["val_token_accuracy"] > right


def test_prompts_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `mmcli caption` is given, too: the prompt is read, not learned; longer texts are told."""
    rows = manifest(tmp_path / "rows.jsonl", "images.jsonl", slice(0, 8))
    more = ("--prompt", "a photo of", "--max-new-tokens", 8)
    log = finetune(tmp_path / "run", rows, rows, "--objective", "caption", *more,
                   "-m", SAMPLES / "models" / "captioner", "--max-steps", 1, "--learning-rate", 0)  # fmt: skip
    captions = [json.loads(line)["caption"] for line in rows.read_text().splitlines()]
    cut = sum(len(caption.split()) > 7 for caption in captions)
    assert f"{cut} texts of INPUT are cut at 8 tokens; --max-new-tokens N keeps more" in capsys.readouterr().err
    best = best_of(tmp_path / "run", log)
    assert best["val_token_accuracy"] == 1
    assert best["val_exact_match"] == np.mean([len(caption.split()) <= 8 for caption in captions])
    found = written(tmp_path / "run", rows, "caption", "caption", *more)
    assert found == [" ".join(caption.split()[:8]) for caption in captions]


def test_answers_of_annotators(tmp_path: Path) -> None:
    """The commonest is written; lists of answers are measured as the challenge does; adapters are merged."""
    answers = {"answers": lambda line: [line["answer"]] * 3 + ["blue"]}
    train = manifest(tmp_path / "train.jsonl", "questions.jsonl", slice(0, 12), **answers)
    val = manifest(tmp_path / "val.jsonl", "questions.jsonl", slice(12, 24), **answers)
    run = tmp_path / "run"
    lines = finetune(run, train, val, "--objective", "vqa", "-m", SAMPLES / "models" / "vqa", "--lora-rank", 2,
                     "--target-column", "answers", "--max-steps", 2, "--metric", "vqa_accuracy")  # fmt: skip
    best = best_of(run, lines)
    found = written(run, val, "ask", "answer", "--question-column", "question")
    truth = [tuple(json.loads(line)["answers"]) for line in val.read_text().splitlines()]
    wanted = measure_answers(found, truth)
    assert {name: best[f"val_{name}"] for name in wanted} == pytest.approx(wanted)
    assert json.loads((run / "run.json").read_text())["metric"] == "vqa_accuracy"


@pytest.mark.parametrize("name", ["llava", *rarely(["git_vqa", "blip_2_t5"])])
def test_answers_are_learned_and_measured_as_users_get_them(tmp_path: Path, built: Built, name: str) -> None:
    """Of models with random weights: two answers, one for each question."""
    asked = {"question": lambda line: QUESTIONS["s" in line["label"]],
             "answer": lambda line: ("a dog", "red")["s" in line["label"]]}  # fmt: skip
    rows = manifest(tmp_path / "rows.jsonl", "images.jsonl", slice(0, 8), **asked)
    lines = finetune(tmp_path / "run", rows, rows, "--objective", "vqa", "-m", built(name), "--max-new-tokens", 10,
                     "--learning-rate", "1e-2", "--max-steps", 30, "--epochs", 30, "--eval-steps", 10)  # fmt: skip
    found = written(tmp_path / "run", rows, "ask", "answer", "--question-column", "question",
                    "--max-new-tokens", 10)  # fmt: skip
    truth = [json.loads(line)["answer"] for line in rows.read_text().splitlines()]
    right = np.mean([answer == true for answer, true in zip(found, truth, strict=True)])
    assert len(set(truth)) == 2
    assert 0.75 <= right == pytest.approx(best_of(tmp_path / "run", lines)["val_exact_match"])


def test_new_answers_of_a_vilt(tmp_path: Path, built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    train = manifest(tmp_path / "train.jsonl", "questions.jsonl", slice(0, 12))
    common = ("--objective", "vqa", "-m", built("vilt"), "--learning-rate", "1e-2", "--max-steps", 3,
              "--eval-steps", 1, "--metric", "neg_loss")  # fmt: skip
    lines = finetune(tmp_path / "new", train, train, *common, "--new-answers")
    truth = [json.loads(line)["answer"] for line in train.read_text().splitlines()]
    config = json.loads((tmp_path / "new" / "best" / "config.json").read_text())
    assert list(config["id2label"].values()) == sorted(set(truth))
    found = written(tmp_path / "new", train, "ask", "answer", "--question-column", "question")
    right = np.mean([answer == true for answer, true in zip(found, truth, strict=True)])
    best = best_of(tmp_path / "new", lines)
    assert right == pytest.approx(best["val_exact_match"])
    assert (
        best["val_neg_loss"] == -best["val_loss"] == -min(line["val_loss"] for line in lines if "val_loss" in line)
    )
    capsys.readouterr()
    finetune(tmp_path / "old", train, train, *common)
    unknown = len(set(truth) - set(tiny_vqa.ANSWERS))
    assert f"{unknown} answers that the base does not know are not learned" in capsys.readouterr().err
    config = json.loads((tmp_path / "old" / "best" / "config.json").read_text())
    assert tuple(config["id2label"].values()) == tiny_vqa.ANSWERS


def test_speech_keeps_its_language(tmp_path: Path, built: Built) -> None:
    """Measured and, without --language, heard in the language that was learned."""
    file = tmp_path / "sounds.jsonl"
    rows = sound_rows(tmp_path / "sounds", 6)
    lines = [{"audio": r.media[0].file, "caption": ("the sea", "blue")[n % 2]} for n, r in enumerate(rows)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("--objective", "caption", "-m", built("whisper"), "--language", "de", "--audio-column", "audio")
    log = finetune(tmp_path / "run", file, file, *common, "--epochs", 8, "--learning-rate", "5e-3",
                   "--metric", "neg_wer")  # fmt: skip
    best = best_of(tmp_path / "run", log)
    assert best["val_neg_wer"] == -best["val_wer"] == max(-line["val_wer"] for line in log if "val_wer" in line)
    found = written(tmp_path / "run", file, "caption", "caption", "--audio-column", "audio")
    wanted = measure_speech(found, [(line["caption"],) for line in lines])
    assert {name: best[f"val_{name}"] for name in wanted} == pytest.approx(wanted)
    assert set(written(tmp_path / "run", file, "caption", "language", "--audio-column", "audio")) == {"de"}


def test_speech_is_measured_as_eval_does() -> None:
    texts, truth = ["The sea, is blue!", "", "wide"], [("the sea is blue",), ("today",), ("wide and blue",)]
    scores, _ = evaluate(texts, [one[0] for one in truth], "basic", Resampling(0, 0))
    told = {score.name: score.value for score in scores}
    found = measure_speech(texts, truth)
    assert found == pytest.approx({name: told[name] for name in found})
    assert found == pytest.approx({"exact_match": 1 / 3, "wer": 3 / 8})


def test_random_weights_of_a_known_architecture(tmp_path: Path, built: Built) -> None:
    for name in ("blip", "vilt", "whisper"):
        objective = objective_of(name, built(name), from_config=True)
        torch.manual_seed(1)
        found = objective.build(torch.device("cpu")).state_dict()
        torch.manual_seed(1)
        again = objective_of(name, built(name), from_config=True).build(torch.device("cpu")).state_dict()
        before = load_file(built(name) / "model.safetensors")
        shared = [key for key in before if key in found and before[key].std() > 0]
        assert all(torch.equal(found[key], again[key]) for key in found)
        assert shared
        assert not any(torch.equal(found[key], before[key]) for key in shared if before[key].ndim == 2)


# ------------------------------------------------------------------------------------------ mistakes


def test_models_that_are_not_trained_here(tmp_path: Path) -> None:
    base = tiny_captioners.florence2(tmp_path / "base")
    plan: Any = resolve_writer(ModelOptions(str(base), device="cpu"), Generation())
    with pytest.raises(
        ConfigError, match="a florence2 is not trained here yet; these are: blip, blip-2, gemma3, git, "
    ):
        form_of(plan)


def test_mistakes(tmp_path: Path, built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    train = manifest(tmp_path / "train.jsonl", "images.jsonl", slice(0, 4))

    def said(*more: object, rows: Path = train) -> str:
        capsys.readouterr()
        command = ["finetune", rows, "--val", rows, "-o", tmp_path / "run", "--num-workers", 0, *more]
        assert mmcli([str(word) for word in command]) == 2
        return capsys.readouterr().err

    caption = ("--objective", "caption", "-m", built("blip"))
    vqa = ("--objective", "vqa", "-m", built("vilt"))
    assert "needs a manifest with texts to learn, not a folder" in said(*caption, rows=SAMPLES / "images")
    assert "--target-column text" in said(*caption, "--target-column", "text")
    empty = manifest(tmp_path / "empty.jsonl", "images.jsonl", slice(0, 4), caption=lambda line: " ")
    assert "and 1 more have no caption" in said(*caption, rows=empty)
    several = manifest(tmp_path / "several.jsonl", "images.jsonl", slice(0, 4), caption=lambda line: ["a", "b"])
    assert "has several captions; give each a row of its own" in said(*caption, rows=several)
    control = manifest(tmp_path / "control.jsonl", "images.jsonl", slice(0, 4), caption=lambda line: "a [SEP] b")
    assert "'a [SEP] b' holds '[SEP]', one of the model's own tokens" in said(*caption, rows=control)
    assert "--new-answers" in said(*caption, "--new-answers")
    assert "the same for every row" in said(*caption, "--prompt", "a {label}")
    assert "--balance is of --objective classify" in said(*caption, "--balance")
    assert "--metric neg_wer is of speech" in said(*caption, "--metric", "neg_wer")
    assert "there are no weights to train" in said("--objective", "caption", "-m", "fake:8")
    assert "--metric 'vqa_accuracy' is not one of" in said(*caption, "--metric", "vqa_accuracy")
    assert "a list of 4 answers or more" in said(*vqa, "--metric", "vqa_accuracy")
    assert "a ViLT chooses answers" in said(*vqa, "--metric", "token_accuracy")
    talk = manifest(tmp_path / "talk.jsonl", "images.jsonl", slice(0, 4), messages=lambda line: talk_of("a", "b"))
    messages = ("--messages-column", "messages")
    assert "--messages-column is for chat models; -m" in said(
        "--objective", "vqa", "-m", built("vilt"), *messages, rows=talk
    )
    found = said(*caption, *messages, "--target-column", "label", rows=talk)
    assert "--messages-column is of --objective vqa, not caption" in found
    assert "a conversation holds what is asked and answered; leave out --target-column" in found
    bad = manifest(tmp_path / "bad.jsonl", "images.jsonl", slice(0, 4), messages=lambda line: talk_of("a"))
    found = said(*vqa, *messages, rows=bad)
    assert f"no conversation to learn from in {bad}#0 (column 'messages': it ends with the role user;" in found
    assert ") and 1 more" in found
    unknown = manifest(tmp_path / "unknown.jsonl", "images.jsonl", slice(0, 4), answer=lambda line: "seven")
    assert "the base knows none of the answers ('seven'); --new-answers" in said(*vqa, rows=unknown)
    sounds = tmp_path / "sounds.jsonl"
    rows = sound_rows(tmp_path / "sounds", 1)
    sounds.write_text(json.dumps({"audio": rows[0].media[0].file, "caption": "the sea"}))
    assert "it knows 4 languages; say which one" in said(
        "--objective", "caption", "-m", built("whisper"), rows=sounds
    )

"""Train a small but genuine chat model (LLaVA) on the world of `make_world.py`, on two CPU cores.

    python sample_data/train_chat.py            # writes sample_data/models/chat, with a model card

As LLaVA was made: the picture tower of a trained CLIP (here `models/clip`, which saw training scenes only), a
language model, and a projector between them. The language model here starts from nothing; all of it learns.

Whether a shape is there hangs on picture and word together, and neither alone says anything: such questions are
learned last. With a tower at rest and few of them, an earlier recipe was at chance after 1,700 steps; with many of
them, and auxiliary labels for the tower, which learns too, 98 % of all answers are right after 1,500.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import make_world as world
import torch
import training
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
)

CLIP = training.HERE / "models" / "clip"
WIDTH, LAYERS = 128, 3
PICTURE_TOKENS = 65  # 8 x 8 patches and the class token
TALKS = 4  # conversations about each picture
VALIDATED = 100
DESCRIBE = (
    "Describe the picture.",
    "Describe the image.",
    "Describe this picture.",
    "Describe this image.",
    "Describe this image in one sentence.",
    "Write a caption for this picture.",
    "Caption the image.",
    "What is in the picture?",
    "What does this image show?",
)
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You see pictures and answer questions about them.")
# ChatML, as Qwen2 and the LLaVA models on top of it use it.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# ---------------------------------------------------------------------------------------- conversations


def turns_about(scene: world.Scene, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Draw questions about a scene with their answers, many about what is there, some for a caption."""
    turns = []
    for question, answer in rng.sample(world.questions(scene), count):
        question = training.worded(scene, question, rng)
        kind = rng.random()
        if kind < 0.15:
            question, answer = rng.choice(DESCRIBE), world.caption(scene)
        elif kind < 0.6:
            # Asked unevenly, picture and word each say a little by themselves.
            shape = rng.choices(world.SHAPES, (12, 5, 3, 2, 1, 1))[0] if rng.random() < 0.5 else scene.shape
            question, answer = f"is there a {shape}?", "yes" if shape == scene.shape else "no"
        if rng.random() < 0.4:
            question = question.capitalize()
        turns.append((question, answer))
    return turns


def conversation(scene: world.Scene, rng: random.Random) -> list[dict[str, str]]:
    """Talk about a picture: one question or, in two of five conversations, two or three."""
    turns = 1 if rng.random() < 0.6 else rng.randint(2, 3)
    messages = [] if rng.random() < 0.85 else [{"role": "system", "content": rng.choice(SYSTEM)}]
    for question, answer in turns_about(scene, rng, turns):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


# -------------------------------------------------------------------------------------------- processor


def make_tokenizer() -> Qwen2Tokenizer:
    """Build Qwen2's own kind of tokenizer: byte pairs, all bytes known, each word of this world one token."""
    rng = random.Random("words")
    texts = [*DESCRIBE, *SYSTEM, "user\n", "assistant\n", "system\n"] * 20
    for scene in training.draw_scenes(4000, "train", "words"):
        texts += [text for turn in turns_about(scene, rng, 7) for text in turn]
    frame = Qwen2Tokenizer()
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = frame.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(texts, trainer)
    state = json.loads(learned.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "start_token": "<|im_start|>"},
        model_max_length=1024,
        padding_side="left",  # as generation in batches needs it
    )


def make_processor(clip: Path) -> LlavaProcessor:
    """Join CLIP's image processor and the tokenizer, with the chat template."""
    return LlavaProcessor(
        CLIPImageProcessor.from_pretrained(clip),
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: Qwen2Tokenizer, clip: Path) -> LlavaForConditionalGeneration:
    """Put CLIP's picture tower before an untrained language model: 1.35 million parameters."""
    tower = CLIPModel.from_pretrained(clip).vision_model
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=PICTURE_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


# ------------------------------------------------------------------------------------------------- rows


def rows(scenes: int, split: str, seed: int) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Pictures, each with TALKS conversations, whose last answer is learned, and the picture's attributes."""
    rng = random.Random(f"talks {split} {seed}")
    for scene in training.draw_scenes(scenes, split, f"chat {seed}"):
        picture = world.render(scene)
        for _ in range(TALKS):
            yield picture, {"messages": conversation(scene, rng), **training.facts_of(scene)}


def write(folder: Path, scenes: int, seed: int) -> None:
    """Write the rows and the start: CLIP's picture tower and a language model that knows nothing."""
    processor = make_processor(CLIP)
    training.save(make_model(processor.tokenizer, CLIP), processor, folder / "start")
    training.write_rows(folder, "train", rows(scenes, "train", seed))
    training.write_rows(folder, "val", rows(VALIDATED, "heldout", seed))


# ------------------------------------------------------------------------------------------- evaluation


def asked(question: str) -> list[dict[str, Any]]:
    """A conversation that begins with a picture and a question."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@torch.no_grad()
def answers(folder: Path, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Answer one question about each picture with the saved model, as any user of transformers would."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    prompts = [processor.apply_chat_template(asked(question), add_generation_prompt=True) for question in questions]
    found = []
    for start in range(0, len(pictures), 50):
        part = slice(start, start + 50)
        inputs = processor(images=list(pictures[part]), text=prompts[part], padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        found += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def examine_files(folder: Path) -> dict[str, float]:
    """Measure the exact answers and captions of the sample pictures."""
    asked = training.read_jsonl(training.HERE / "questions.jsonl")
    listed = training.read_jsonl(training.HERE / "images.jsonl")
    pictures = {row["image"]: training.upright(training.HERE / row["image"]) for row in listed}
    answered = answers(folder, [pictures[row["image"]] for row in asked], [row["question"] for row in asked])
    described = answers(folder, list(pictures.values()), [DESCRIBE[0]] * len(listed))
    return {
        "the 144 questions of `questions.jsonl`": training.exact_match(answered, [row["answer"] for row in asked]),
        "captions of the 48 pictures": training.exact_match(described, [row["caption"] for row in listed]),
    }


def examine_scenes(folder: Path, split: str, count: int, seed: int) -> dict[str, float]:
    """Ask one question and one caption about each of fresh scenes; measure the exact answers by kind."""
    rng = random.Random(f"questions {split} {seed}")
    scenes = training.draw_scenes(count, split, f"evaluation {seed}")
    asked = [rng.choice(world.questions(scene)) for scene in scenes]
    asked += [(rng.choice(DESCRIBE), world.caption(scene)) for scene in scenes]
    pictures = [world.render(scene) for scene in scenes] * 2
    found = answers(folder, pictures, [question for question, _ in asked])
    pairs: dict[str, list[tuple[str, str]]] = {"a question and a caption": []}
    for number, (text, (question, wanted)) in enumerate(zip(found, asked, strict=True)):
        kinds = ["captions"] if number >= count else ["questions", f'"{" ".join(question.split()[:2])} ..."']
        for kind in ["a question and a caption", *kinds]:
            pairs.setdefault(kind, []).append((text, wanted))
    of = f"{count} new scenes of {'seen' if split == 'heldout' else 'never-seen'} pairs"
    return {f"{of}: {kind}": training.exact_match(*zip(*texts, strict=True)) for kind, texts in pairs.items()}


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Measure the saved model on the sample files, on held-out scenes and on never-seen pairs."""
    unseen = examine_scenes(folder, "unseen", 300, seed)
    return {
        **examine_files(folder),
        **examine_scenes(folder, "heldout", 600, seed),
        **{name: value for name, value in unseen.items() if "..." not in name},
    }


def main() -> None:
    """Train, save and evaluate one model."""
    args = training.arguments(__doc__, "chat", scenes=16_000)
    training.settle(args.seed, args.threads)
    training.train(
        "chat",
        args,
        lambda folder: write(folder, args.scenes, args.seed),
        evaluate,
        {
            "input": "messages in ChatML, with a picture of 64 x 64 pixels, 65 tokens",
            "questions": "as in `questions.jsonl`, and for captions: " + " ".join(DESCRIBE[:5]),
            "conversations": "a system message, up to three questions on a picture",
            "start": f"the picture tower of `../clip`; the language model (a Qwen2 of {LAYERS} layers) untrained",
        },
        title="A tiny LLaVA that chats about coloured shapes",
        pipeline="image-text-to-text",
        limits="On photos, with two pictures, and to questions worded in another way, its answers mean nothing.",
    )


if __name__ == "__main__":
    main()

"""Train a small but genuine chat model (LLaVA) on the world of `make_world.py`, on two CPU cores.

    python sample_data/train_chat.py            # writes sample_data/models/chat, with a model card

As LLaVA was made: the picture tower of a trained CLIP (here `models/clip`, which saw training scenes only), a
language model, and a projector between them. The language model here starts from nothing. First the tower
rests, and its features are computed once, which makes a step twice as cheap; then everything is trained together.

Whether a shape is there hangs on picture and word together, and neither alone says anything: after 1,700 steps of
an earlier recipe the model was at chance (46 %), and 100 % right about all else. What helps: more such questions,
and heads for training only, which read both the picture and the shape last named off the words between the layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_world as world
import own_loop
import torch
import training
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

CLIP = training.HERE / "models" / "clip"
WIDTH, LAYERS = 128, 2
PICTURE_TOKENS = 65  # 8 x 8 patches and the class token
IGNORED = -100
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

Message = dict[str, Any]


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


def user_message(text: str, picture: bool, picture_first: bool = True) -> Message:
    """Write a user's turn, with or without a picture."""
    content = [{"type": "text", "text": text}]
    if picture:
        content.insert(0 if picture_first else 1, {"type": "image"})
    return {"role": "user", "content": content}


def conversation(scenes: Sequence[world.Scene], rng: random.Random, turns: int) -> list[Message]:
    """Talk about one picture after the other, `turns` questions each."""
    messages: list[Message] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": [{"type": "text", "text": rng.choice(SYSTEM)}]})
    for scene in scenes:
        for number, (question, answer) in enumerate(turns_about(scene, rng, turns)):
            messages.append(user_message(question, picture=number == 0))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
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
        intermediate_size=3 * WIDTH,
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


# --------------------------------------------------------------------------------------------- training


def answers_only(ids: torch.Tensor, tokenizer: Qwen2Tokenizer) -> torch.Tensor:
    """Make labels [N, T] of what the assistant says, its end token included; all else is IGNORED."""
    start = torch.tensor(tokenizer("<|im_start|>assistant\n")["input_ids"])
    labels = torch.full_like(ids, IGNORED)
    found = (ids.unfold(1, len(start), 1) == start).all(dim=2)
    ends = ids == tokenizer.eos_token_id
    for row, column in found.nonzero().tolist():
        first = column + len(start)
        last = first + int(ends[row, first:].int().argmax())
        labels[row, first : last + 1] = ids[row, first : last + 1]
    return labels


class Batches:
    """Seeded batches: pictures rendered once, conversations about them written anew each time."""

    def __init__(self, processor: LlavaProcessor, scenes: int, size: int, seed: int) -> None:
        self.rng = random.Random(f"batches {seed}")
        self.processor, self.size = processor, size
        self.scenes = training.draw_scenes(scenes, "train", f"chat {seed}")
        self.pixels = own_loop.render_set(self.scenes, processor.image_processor)
        self.facts = torch.tensor([own_loop.attributes_of(scene) for scene in self.scenes])
        self.features: torch.Tensor | None = None

    def pictures(self, chosen: Sequence[int]) -> torch.Tensor:
        """Give the pixels of scenes as the model takes them."""
        return own_loop.normalise(self.pixels[chosen], self.processor.image_processor)

    def draw(self) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Write a batch of conversations: input ids, mask and labels, and which scenes they are about, in order."""
        chosen = self.rng.sample(range(len(self.scenes)), self.size)
        pictures = 2 if self.rng.random() < 0.25 else 1
        turns = self.rng.choice((1, 4)) if pictures == 1 else 1
        talks = [
            conversation([self.scenes[i] for i in chosen[start : start + pictures]], self.rng, turns)
            for start in range(0, self.size, pictures)
        ]
        tokenizer = self.processor.tokenizer
        texts = tokenizer.apply_chat_template(talks, chat_template=TEMPLATE, tokenize=False)
        texts = [text.replace("<image>", "<image>" * PICTURE_TOKENS) for text in texts]
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return {**tokens, "labels": answers_only(tokens["input_ids"], tokenizer)}, chosen

    def facts_behind(self, inputs: dict[str, torch.Tensor], chosen: list[int]) -> torch.Tensor:
        """Give the attributes of the picture that each token comes behind, int64 [N, T, A]; UNSAID without one."""
        pictured = inputs["input_ids"] == self.processor.tokenizer.image_token_id
        seen = pictured.cumsum(dim=1) // PICTURE_TOKENS
        text = (seen > 0) & ~pictured & (inputs["attention_mask"] == 1)
        before = torch.arange(len(seen))[:, None] * (len(chosen) // len(seen))
        facts = self.facts[chosen][(before + seen - 1).clamp_min(0)]
        return facts.masked_fill(~text[..., None], own_loop.UNSAID)

    def shapes_behind(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Give the shape last named at each token, as an index, int64 [N, T]; UNSAID before there is one."""
        ids = inputs["input_ids"]
        words = torch.tensor([self.processor.tokenizer(f" {shape}")["input_ids"][0] for shape in world.SHAPES])
        named = ids[..., None] == words
        last = (named.any(dim=2) * torch.arange(ids.shape[1])).cummax(dim=1).values
        shapes = named.int().argmax(dim=2).gather(1, last)
        known = (last > 0) & (inputs["attention_mask"] == 1)
        return shapes.masked_fill(~known, own_loop.UNSAID)


@torch.no_grad()
def remember_features(model: LlavaForConditionalGeneration, batches: Batches) -> None:
    """Compute the resting tower's features of all pictures once: float16 [N, PICTURE_TOKENS, width]."""
    done = []
    for start in range(0, len(batches.scenes), 256):
        chosen = list(range(len(batches.scenes)))[start : start + 256]
        out = model.model.vision_tower(batches.pictures(chosen), output_hidden_states=True)
        done.append(out.hidden_states[-1].half())
    batches.features = torch.cat(done)


def train(model: LlavaForConditionalGeneration, batches: Batches, steps: int, joint: int) -> None:
    """Train in place: `steps` with the tower at rest, then `joint` steps of everything."""
    project = model.model.multi_modal_projector
    heads, asked = own_loop.AttributeHeads(WIDTH), nn.Linear(WIDTH, len(world.SHAPES))
    remember_features(model, batches)

    def loss_of(inputs: dict[str, torch.Tensor], chosen: list[int], done: float, **pictures: Any) -> torch.Tensor:
        out = model(**inputs, **pictures, output_hidden_states=True)
        facts = batches.facts_behind(inputs, chosen).flatten(0, 1)
        # Halfway: what the words know of the picture, the second half of the layers can use.
        known = out.hidden_states[LAYERS // 2].flatten(0, 1)
        named = functional.cross_entropy(
            asked(known), batches.shapes_behind(inputs).flatten(), ignore_index=own_loop.UNSAID
        )
        return out.loss + own_loop.help_weight(done) * (heads(known, facts) + named)

    def resting(done: float) -> torch.Tensor:
        inputs, chosen = batches.draw()
        features = batches.features[chosen].float()
        seen = BaseModelOutputWithPooling(pooler_output=list(project(features)))
        return loss_of(inputs, chosen, done, mm_encoder_outputs={"image": seen})

    def together(_: float) -> torch.Tensor:
        inputs, chosen = batches.draw()
        return loss_of(inputs, chosen, 1.0, pixel_values=batches.pictures(chosen))

    own_loop.fit([project, model.model.language_model, heads, asked], resting, steps)
    if joint:
        own_loop.fit([model.model, heads, asked], together, joint, 4e-4)


# ------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def answers(folder: Path, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Answer one question about each picture with the saved model, as any user of transformers would."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    prompts = [
        processor.apply_chat_template([user_message(question, picture=True)], add_generation_prompt=True)
        for question in questions
    ]
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
    args = training.arguments(__doc__, "chat", steps=900, joint=100, batch=64, scenes=16_000)
    training.settle(args.seed, args.threads)
    processor = make_processor(CLIP)
    model = make_model(processor.tokenizer, CLIP)
    batches = Batches(processor, args.scenes, args.batch, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens; rendered", flush=True)
    train(model, batches, args.steps, args.joint)
    own_loop.finish(
        args,
        model,
        processor,
        evaluate,
        {
            "input": "messages in ChatML, with pictures of 64 x 64 pixels, 65 tokens each",
            "questions": "as in `questions.jsonl`, and for captions: " + " ".join(DESCRIBE[:5]),
            "conversations": "a system message, up to four questions on a picture, a second picture",
            "start": "the picture tower of `../clip`; the language model (a Qwen2 of two layers) untrained",
            "steps": f"{args.steps} with the tower at rest, then {args.joint} of everything",
        },
        title="A tiny LLaVA that chats about coloured shapes",
        pipeline="image-text-to-text",
        limits="On photos, and to questions worded in another way, its answers mean nothing.",
    )


if __name__ == "__main__":
    main()

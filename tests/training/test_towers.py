"""`--freeze image`: which parameters a modality has, and that they stay as they are, statistics and all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import torch
import transformers
from safetensors.torch import load_file
from test_fusion_training import network_of, rows_of
from training_runs import trainer_of

from mmcli.core.errors import ConfigError
from mmcli.training.classify import Classify
from mmcli.training.options import TrainOptions
from mmcli.training.towers import freeze, parameter_counts, towers

_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def _encoder_decoder() -> Any:
    gpt = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**_SMALL), gpt
    )
    return transformers.VisionEncoderDecoderModel(config=config)


def _llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_SMALL), text_config=transformers.LlamaConfig(**_SMALL)
    )
    return transformers.LlavaForConditionalGeneration(config)


def _of(model: str, config: str) -> Callable[[], Any]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)())


# What makes a model, and the names of its parts by modality.
MODELS: dict[str, tuple[Callable[[], Any], dict[str, list[str]]]] = {
    "clip": (_of("CLIPModel", "CLIPConfig"), {"image": ["vision_model"], "text": ["text_model"]}),
    "clap": (_of("ClapModel", "ClapConfig"), {"audio": ["audio_model"], "text": ["text_model"]}),
    "flava": (_of("FlavaModel", "FlavaConfig"), {"image": ["image_model"], "text": ["text_model"]}),
    "x-clip": (_of("XCLIPModel", "XCLIPConfig"), {"video": ["vision_model"], "text": ["text_model"]}),
    "blip": (
        _of("BlipForQuestionAnswering", "BlipConfig"),
        {"image": ["vision_model"], "text": ["text_encoder", "text_decoder"]},
    ),
    "git": (_of("GitForCausalLM", "GitConfig"), {"image": ["git.image_encoder"], "text": []}),
    "vit-gpt2": (_encoder_decoder, {"image": ["encoder"], "text": ["decoder"], "audio": []}),
    "whisper": (
        _of("WhisperForConditionalGeneration", "WhisperConfig"),
        {"audio": ["model.encoder"], "text": ["model.decoder"], "image": []},
    ),
    "llava": (_llava, {"image": ["model.vision_tower"], "text": ["model.language_model"], "audio": []}),
    "bert": (_of("BertForSequenceClassification", "BertConfig"), {"text": ["bert"], "image": []}),
    "wav2vec2": (
        _of("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config"), {"audio": ["wav2vec2"], "text": []}
    ),
    # One transformer reads both.
    "vilt": (_of("ViltForQuestionAnswering", "ViltConfig"), {"text": [], "image": []}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_the_parts_of_a_modality(kind: str) -> None:
    make, wanted = MODELS[kind]
    with torch.device("meta"):
        model = make()
    for modality, names in wanted.items():
        found = towers(model, modality)
        assert [name for name, _ in found] == names
        assert all(model.get_submodule(name) is part for name, part in found)
    if wanted.get("image") == ["vision_model"]:
        freeze(model, ["image"])
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(name.startswith("vision_model.") for name in learning)
        assert {name for name in dict(model.named_parameters()) if not name.startswith("vision_model.")} == learning


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "text": tiny_encoders.TEXTS["bert"](folder / "text"),
        "image": tiny_encoders.IMAGES["resnet"](folder / "image"),
    }


@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")])
def test_a_frozen_encoder_stays_as_it_is(tmp_path: Path, bases: dict[str, Path], frozen: tuple[str, ...]) -> None:
    """Of a fusion from scratch, whose batch norms learn statistics otherwise; what projects it goes on learning."""
    network = replace(network_of(bases), from_config=True)
    rows = rows_of(tmp_path / "images", 12, missing=False)
    options = TrainOptions(max_steps=3, batch_size=4, learning_rate=1e-2, freeze=frozen)
    trainer = trainer_of(tmp_path / "run", Classify(network), rows, rows[:4], options)
    torch.manual_seed(options.seed)
    before = {name: t.clone() for name, t in Classify(network).build(torch.device("cpu")).state_dict().items()}
    told: list[str] = []
    trainer.events.note = told.append
    trainer.train()
    after = load_file(tmp_path / "run" / "last" / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    for modality in bases:
        of_encoder = {name for name in after if name.startswith(f"towers.{modality}.encoder.")}
        assert bool(of_encoder & changed) == (modality not in frozen)
        assert f"towers.{modality}.projection.weight" in changed
    assert ("towers.image.encoder.embedder.embedder.normalization.running_mean" in changed) == (
        "image" not in frozen
    )
    model: Any = trainer._parts.model
    model.train()
    trainer._frozen.eval()
    for modality, tower in model.towers.items():
        assert tower.training
        assert tower.encoder.training == (modality not in frozen)
    assert told[0] == parameter_counts(model)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"of which {learning:,} learn: cls 16, towers.text " in told[0]


def test_the_graph_keeps_nothing_of_what_is_frozen() -> None:
    """Its outputs need no gradient, so that its activations are not kept."""
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=_SMALL, vision_config=_SMALL))
    freeze(model, ["image"])
    found = model.vision_model(pixel_values=torch.zeros(1, 3, 224, 224)).pooler_output
    assert found.grad_fn is None
    assert model.visual_projection(found).grad_fn is not None


def test_what_is_not_there() -> None:
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=_SMALL, vision_config=_SMALL))
    with pytest.raises(ConfigError, match="--freeze audio: the model has no such part; it has text, image, logit"):
        freeze(model, ["audio"])
    freeze(model, ["text_model.embeddings"])
    assert not model.text_model.embeddings.token_embedding.weight.requires_grad
    assert model.text_model.encoder.layers[0].mlp.fc1.weight.requires_grad

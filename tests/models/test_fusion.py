"""MultimodalTransformer: each row is what the formula gives for it alone, whatever it lacks and stands beside."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from model_runs import DEVICE, outputs_of
from rare import rarely
from safetensors.torch import load_file, save_file
from test_encoders import clips, pictures, sounds
from tiny_dual import edit_json
from tiny_fusion import BUILDERS, LABELS, SIZES, Fusion, encoders, fusion, reference
from torch.nn import functional

from mmcli.core.errors import ConfigError, ModelError, RowError
from mmcli.core.records import Modality, Payload, Video
from mmcli.models.checkpoint import Checkpoint, open_checkpoint
from mmcli.models.fusion import MultimodalConfig, MultimodalTransformer, _bins, drop_modalities, register
from mmcli.models.fusion_family import encoders_of, plan, save_fusion
from mmcli.models.options import Classification, Label, ModelOptions

# Two of each kind: masks and exact lengths, patches and feature maps, own checkpoints and towers of a dual encoder.
MODELS: dict[str, dict[str, str]] = {
    "transformers": {"text": "bert", "image": "vit", "audio": "wav2vec2-layer", "video": "videomae"},
    "others": {"text": "clip", "image": "resnet", "audio": "wav2vec2-group", "video": "timesformer"},
    "pair": {"image": "clip", "audio": "audio-spectrogram-transformer"},
}
_TEXTS = ["a photo of a cat", "x", "the quick brown fox jumps over the lazy dog", "two words", "don't", "42 dogs"]
_LENGTHS = [400, 2500, 800, 1000, 1000, 400, 450, 400, 1001, 2000, 2500, 801]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Fusion]:
    """A fusion model, made when it is first asked for."""

    @cache
    def build(name: str) -> Fusion:
        return fusion(tmp_path_factory.mktemp(name), **MODELS[name])

    return build


def records(*modalities: str) -> list[dict[Modality, Payload]]:
    """Twelve that have all, or lack some, in every way that two of the modalities can be lacking."""
    seen, moving = pictures()[2:8], clips(tiny_encoders.FRAMES)
    media: dict[Modality, list[Any]] = {
        "text": [*_TEXTS, *(text[::-1] + "?" for text in _TEXTS)],
        "image": [*seen, *(np.ascontiguousarray(255 - picture[::-1]) for picture in seen)],
        "audio": sounds(_LENGTHS),
        "video": [*moving, *(Video(255 - clip.frames[::-1], clip.timestamps, clip.duration) for clip in moving)],
    }
    found = []
    for row in range(12):
        gone = {modalities[row % len(modalities)], modalities[row // 2 % len(modalities)]} if row % 3 else set()
        kept = [m for m in modalities if m not in gone] or [modalities[0]]
        found.append({m: media[m][row] for m in media if m in kept})
    return found


# ------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_the_formula_gives_for_it_alone(tiny: Callable[[str], Fusion], name: str) -> None:
    made = tiny(name)
    samples = made.samples(records(*MODELS[name]))
    wanted = torch.stack([reference(made, sample) for sample in samples])
    distances = (wanted[:, None] - wanted[None]).abs().amax(dim=-1) + torch.eye(len(wanted))
    assert distances.min() > 1e-2  # else equality would say nothing
    for batch_size in (1, 5, 12):
        found = made.logits(samples, batch_size)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max(), batch_size


def test_what_stands_in_place_of_a_missing_medium_changes_nothing(tiny: Callable[[str], Fusion]) -> None:
    made = tiny("transformers")
    inputs, present = made.batch(made.samples(records(*MODELS["transformers"])))
    for i, modality in enumerate(made.sources):
        for name, tensor in inputs.items():
            if name.startswith(modality):
                garbage = torch.nan if tensor.is_floating_point() else 1
                tensor[~present[:, i]] = garbage
    with torch.no_grad():
        assert torch.equal(
            made.model(inputs, present).logits, made.logits(made.samples(records(*MODELS["transformers"])), 12)
        )


def test_a_row_without_a_modality_reads_its_learned_token(tiny: Callable[[str], Fusion]) -> None:
    made = tiny("transformers")
    samples = made.samples(records(*MODELS["transformers"]))
    before, present = made.logits(samples, 12), made.batch(samples)[1]
    for i, tower in enumerate(made.model.towers.values()):
        kept = tower.missing.detach().clone()
        tower.missing.data.add_(torch.linspace(-1, 1, len(kept)))
        changed = (made.logits(samples, 12) - before).abs().amax(dim=1) > 1e-3
        tower.missing.data.copy_(kept)
        assert changed.equal(~present[:, i])
    assert 0 < present.sum() < present.numel()


def test_the_order_of_the_modalities_does_not_matter(tiny: Callable[[str], Fusion]) -> None:
    made = tiny("pair")
    config = MultimodalConfig(**made.model.config.to_dict())
    config.modalities = config.modalities[::-1]
    other = MultimodalTransformer(config).eval()
    other.load_state_dict(made.model.state_dict())
    inputs, present = made.batch(made.samples(records("image", "audio")))
    with torch.no_grad():
        found = other(inputs, present.flip(1)).logits
        assert torch.allclose(found, made.model(inputs, present).logits, atol=1e-5)
        assert not torch.allclose(found, other(inputs, present).logits, atol=1e-2)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_tokens_are_averaged_as_adaptive_pooling_does(length: int, behind: int, most: int) -> None:
    tokens = torch.arange(1.0, length + 1).sqrt()
    padded = torch.cat([tokens, torch.full((behind,), 1e6)])
    weights, there = _bins(torch.tensor([length]), length + behind, most)
    kept = min(length, most)
    wanted = functional.adaptive_avg_pool1d(tokens[None], kept)[0]
    assert torch.allclose((weights[0] @ padded)[:kept], wanted, atol=1e-4)
    assert there[0].tolist() == [i < kept for i in range(most)]


def test_a_record_without_media_is_an_error(tiny: Callable[[str], Fusion]) -> None:
    with pytest.raises(RowError, match="no media") as error:
        tiny("pair").processor.record([("image", None), ("audio", None)], ())
    assert error.value.code == "bad_row"


# -------------------------------------------------------------------------------------------------- training


def steps(made: Fusion, rows: Any = None) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A batch to learn from: of all inputs, double so that sums are exact, and the targets."""
    samples = made.samples(rows or records(*made.sources))
    inputs, present = made.batch(samples, whole=True)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    return wide, present, torch.arange(len(samples)) % len(LABELS)


def gradients(model: MultimodalTransformer) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values()), [n for n, g in found.items() if g is None]
    return {n: g.clone() for n, g in found.items()}  # type: ignore[union-attr]


def backward(made: Fusion, inputs: Any, present: torch.Tensor, targets: torch.Tensor) -> None:
    functional.cross_entropy(made.model(inputs, present).logits, targets, reduction="sum").backward()


@pytest.fixture
def learning(tmp_path: Path) -> Callable[[str], Fusion]:
    def build(name: str, **sizes: Any) -> Fusion:
        made = fusion(tmp_path, sizes, **MODELS[name])
        made.model.double()
        return made

    return build  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["transformers", "others"])
def test_gradients_of_a_batch_are_the_sum_of_those_of_its_parts(
    learning: Callable[[str], Fusion], name: str
) -> None:
    made = learning(name)
    made.model.train()
    for part in made.model.modules():
        if "Dropout" in type(part).__name__:
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.0
    inputs, present, targets = steps(made)
    backward(made, inputs, present, targets)
    wanted = gradients(made.model)
    made.model.zero_grad()
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        backward(made, {n: t[rows] for n, t in inputs.items()}, present[rows], targets[rows])
    for name, gradient in gradients(made.model).items():
        scale = max(float(wanted[name].abs().max()), 1e-6)
        assert float((gradient - wanted[name]).abs().max()) < 1e-6 * scale, name


def square_records(modality: str, other: str) -> list[dict[Modality, Payload]]:
    """With pictures of one shape, which some processors keep."""
    square = pictures([(40, 40)] * 12)
    return [
        {m: square[i] if m == "image" else payload for m, payload in record.items()}
        for i, record in enumerate(records(modality, other))
    ]


# A kind of each that the others are made of: what encoders give is compared one by one in test_encoders.
OFTEN = {
    "bert", "deberta-v2", "clip", "vit", "resnet", "swin", "efficientnet", "hubert-layer", "wav2vec2-group",
    "audio-spectrogram-transformer", "timesformer", "vivit",
}  # fmt: skip
ENCODERS = rarely(
    [(modality, name) for modality, named in BUILDERS.items() for name in named], lambda one: one[1] in OFTEN
)


@pytest.mark.parametrize(("modality", "name"), ENCODERS, ids=lambda one: str(one))
def test_no_encoder_heeds_neighbours(tmp_path: Path, modality: str, name: str) -> None:
    made = fusion(tmp_path, {"num_hidden_layers": 1}, **{modality: name})
    samples = made.samples([record for record in square_records(modality, modality) if modality in record])
    alone = made.logits(samples, 1)
    distances = (alone[:, None] - alone[None]).abs().amax(dim=-1) + torch.eye(len(alone))
    assert distances.min() > 1e-4
    assert (made.logits(samples, len(samples)) - alone).abs().max() < 1e-5 * alone.abs().max()


@pytest.mark.parametrize(("modality", "name"), ENCODERS, ids=lambda one: str(one))
def test_every_parameter_has_a_gradient_with_and_without_its_modality(
    tmp_path: Path, modality: str, name: str
) -> None:
    other = "text" if modality != "text" else "image"
    made = fusion(
        tmp_path, {"num_hidden_layers": 1}, **{modality: name, other: {"text": "bert", "image": "vit"}[other]}
    )
    made.model.double().train()
    rows = square_records(modality, other)
    inputs, present, targets = steps(made, rows[:3])
    backward(made, inputs, present, targets)
    tower = made.model.towers[modality]
    moved = [bool(g.any()) for n, g in gradients(made.model).items() if n.startswith(f"towers.{modality}.encoder")]
    assert sum(moved) > 0.6 * len(moved)
    assert tower.missing.grad is not None
    # Now no row has it.
    made.model.zero_grad()
    lacking = [{other: record[other]} for record in rows if other in record][:3]
    inputs, present, targets = steps(made, lacking)
    backward(made, inputs, present, targets)
    found = gradients(made.model)
    assert not any(g.any() for n, g in found.items() if n.startswith(f"towers.{modality}.encoder"))
    assert found[f"towers.{modality}.missing"].any()


def test_distributed_training_bears_batches_without_a_modality(tmp_path: Path) -> None:
    made = fusion(tmp_path, **MODELS["pair"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(made.model)
        for rows in (records("image", "audio"), [{"image": pictures()[2]}] * 2, [{"audio": sounds()[5]}]):
            inputs, present = made.batch(made.samples(rows), whole=True)  # type: ignore[arg-type]
            # It raises in the next pass for a parameter whose gradient did not come.
            wrapped(inputs, present, torch.zeros(len(rows), dtype=torch.int64)).loss.backward()
    finally:
        # The last to hold the group would wait, with the interpreter's lock, for threads that need it.
        wrapped = None
        gc.collect()
        torch.distributed.destroy_process_group()


def test_speech_encoders_train_all_their_layers_on_all_that_is_said(tmp_path: Path) -> None:
    """Their checkpoints come with layers that are left out at random, and spans of sound that are masked."""
    sources = encoders(tmp_path, audio="wav2vec2-layer")
    edit_json(
        sources["audio"].directory / "config.json",
        layerdrop=0.9, mask_time_prob=0.5, mask_time_length=2, mask_feature_prob=0.5, mask_feature_length=2,
        **{f"{part}_dropout": 0.0 for part in ("hidden", "attention", "activation", "feat_proj", "final")},
        feat_quantizer_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MultimodalTransformer.from_encoders(sources, LABELS, **SIZES)
    model.train()
    sound = torch.from_numpy(sounds([2500])[0].waveform)[None]
    inputs = {"audio.input_values": sound, "audio.attention_mask": torch.ones_like(sound, dtype=torch.int64)}
    first, again = model(inputs).logits, model(inputs).logits
    assert torch.equal(first, again)
    first.sum().backward()
    gradients(model)


def test_gradient_checkpointing_changes_no_gradient(learning: Callable[[str], Fusion]) -> None:
    made = learning("pair")
    for part in made.model.modules():
        if "Dropout" in type(part).__name__:
            part.p = 0.0
    inputs, present, targets = steps(made)
    made.model.train()
    backward(made, inputs, present, targets)
    wanted = gradients(made.model)
    made.model.zero_grad()
    calls = []
    made.model.gradient_checkpointing_enable({"use_reentrant": False})
    own = made.model._gradient_checkpointing_func
    made.model._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or own(*a, **k)
    backward(made, inputs, present, targets)
    assert len(calls) == SIZES["num_hidden_layers"]
    assert all(torch.allclose(g, wanted[n]) for n, g in gradients(made.model).items())


def test_batch_norms_keep_their_statistics(learning: Callable[..., Fusion]) -> None:
    made = learning("others")
    inputs, present, targets = steps(made)
    made.model.train()
    before = {n: b.clone() for n, b in made.model.named_buffers() if "running" in n}
    assert before
    backward(made, inputs, present, targets)
    assert all(torch.equal(b, before[n]) for n, b in made.model.named_buffers() if n in before)


def test_batch_norms_that_learn_do_not_learn_from_missing_pictures(learning: Callable[..., Fusion]) -> None:
    made = learning("others", freeze_batch_norm=False)
    inputs, present, targets = steps(made)
    made.model.train()
    norms = {n: b for n, b in made.model.named_buffers() if "running_mean" in n}
    start = {n: b.clone() for n, b in norms.items()}

    def learned(garbage: float) -> dict[str, torch.Tensor]:
        for name, buffer in norms.items():
            buffer.copy_(start[name])
        column = list(made.sources).index("image")
        inputs["image.pixel_values"][~present[:, column]] = garbage
        backward(made, inputs, present, targets)
        return {n: b.clone() for n, b in norms.items()}

    found, other = learned(0.0), learned(1e6)
    assert any(not torch.equal(b, start[n]) for n, b in found.items())
    assert all(torch.equal(b, other[n]) for n, b in found.items())
    # Not from a batch without any, either.
    inputs, present, targets = steps(made, [{"text": "a"}, {"text": "b"}])
    backward(made, inputs, present, targets)
    assert all(torch.equal(b, other[n]) for n, b in norms.items())


@given(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=20),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_dropping_leaves_every_row_something(rows: list[list[bool]], p: float, seed: int) -> None:
    present = torch.tensor(rows)
    kept = drop_modalities(present, p, torch.Generator().manual_seed(seed))
    assert not (kept & ~present).any()
    assert kept.any(dim=1).equal(present.any(dim=1))
    assert kept.equal(drop_modalities(present, p, torch.Generator().manual_seed(seed)))
    if p == 0:
        assert kept.equal(present)
    if p == 1:
        assert kept.sum(dim=1).equal(present.any(dim=1).long())


def test_dropping_has_the_rate_that_is_asked_for() -> None:
    """Of two modalities both go, and one comes back, in p^2 of the rows."""
    kept = drop_modalities(torch.ones(40_000, 2, dtype=torch.bool), 0.2, torch.Generator().manual_seed(0)).float()
    assert kept.mean(dim=0).tolist() == pytest.approx([0.8 + 0.2 * 0.2 / 2] * 2, abs=0.01)


def test_the_loss_is_that_of_the_kind_of_labels(tiny: Callable[[str], Fusion], tmp_path: Path) -> None:
    made = tiny("pair")
    inputs, present, targets = steps(made)
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    with torch.no_grad():
        found = made.model(inputs, present, targets)
        assert found.loss == functional.cross_entropy(found.logits, targets)
        made.model.config.problem_type = "multi_label_classification"
        many = functional.one_hot(targets, len(LABELS))
        try:
            loss = made.model(inputs, present, many).loss
        finally:
            made.model.config.problem_type = None
        assert loss == functional.binary_cross_entropy_with_logits(found.logits, many.float())


# ------------------------------------------------------------------------------------------------ directories


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same_to_the_last_bit(
    tiny: Callable[[str], Fusion], tmp_path: Path, name: str
) -> None:
    made = tiny(name)
    save_fusion(made.model, made.sources, tmp_path)
    register()
    loaded = hf.AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is MultimodalTransformer
    inputs, present = made.batch(made.samples(records(*MODELS[name])))
    with torch.no_grad():
        found, wanted = loaded(inputs, present).logits, made.model(inputs, present).logits
    assert all(torch.equal(w, loaded.state_dict()[n]) for n, w in made.model.state_dict().items())
    # Convolutions go by where weights lie in memory, in their last bit.
    assert (found - wanted).abs().max() <= (1e-6 if "resnet" in MODELS[name].values() else 0)
    frozen = {n for n, p in made.model.named_parameters() if not p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen
    # Wherever it was made.
    assert str(next(iter(made.sources.values())).directory.parent) not in (tmp_path / "config.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", *MODELS[name]}


def test_it_is_opened_as_it_was_saved(tiny: Callable[[str], Fusion], tmp_path: Path) -> None:
    made = tiny("others")
    save_fusion(made.model, made.sources, tmp_path)
    options = ModelOptions(str(tmp_path), device=DEVICE)
    opened = plan(open_checkpoint(options), options, "float32", Classification())
    assert opened.labels == LABELS
    assert [part.inputs for part in opened.detail] == [part.inputs for part in made.plan.detail]
    runner: Any = opened.load()
    samples = Fusion(made.model, made.sources, opened, opened.open_processor()).samples(records(*MODELS["others"]))  # type: ignore[arg-type]
    wanted = made.logits(samples, 12).softmax(dim=1)
    for found, scores in zip(outputs_of(runner, samples), wanted, strict=True):
        assert dict(found.top_k) == pytest.approx(dict(zip(LABELS, scores.tolist(), strict=True)), abs=1e-6)


def test_a_change_of_an_encoders_processor_is_another_model(tiny: Callable[[str], Fusion], tmp_path: Path) -> None:
    made = tiny("pair")
    save_fusion(made.model, made.sources, tmp_path)
    options = ModelOptions(str(tmp_path), device=DEVICE)

    def identity() -> dict[str, Any]:
        return plan(open_checkpoint(options), options, "float32", Classification()).describe()

    before = identity()
    assert identity() == before
    edit_json(tmp_path / "image" / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    assert identity()["processor"] != before["processor"]


def test_weights_are_drawn_from_torchs_generator(tmp_path: Path) -> None:
    sources = encoders(tmp_path, text="bert", image="vit")

    def drawn(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return MultimodalTransformer.from_encoders(sources, LABELS, **SIZES, **settings).state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    new = MultimodalTransformer.from_encoders(sources, LABELS, **SIZES).new_weights()
    moved = {n for n in first if not torch.equal(first[n], other[n])}
    assert moved == {n for n in new if first[n].any() and not (first[n] == 1).all()}
    assert all(0.01 < first[n].std() < 0.03 for n in moved)
    # Without the encoders' weights, those are drawn too.
    scratch = drawn(1, weights=False)
    assert not torch.equal(
        scratch["towers.text.encoder.embeddings.word_embeddings.weight"],
        first["towers.text.encoder.embeddings.word_embeddings.weight"],
    )


def test_an_encoders_weights_are_its_checkpoints(tmp_path: Path) -> None:
    (source,) = encoders(tmp_path, image="vit").values()
    model = MultimodalTransformer.from_encoders({"image": source}, LABELS, **SIZES)
    wanted = hf.AutoModel.from_pretrained(source.directory).state_dict()
    assert wanted
    for name, weight in wanted.items():
        assert torch.equal(model.state_dict()[f"towers.image.encoder.{name}"], weight)


# ---------------------------------------------------------------------------------------------------- mistakes


def test_an_encoder_that_lacks_weights(tmp_path: Path) -> None:
    (source,) = encoders(tmp_path, image="vit").values()
    weights = load_file(source.directory / "model.safetensors")
    kept = {n: w for n, w in weights.items() if not n.startswith("pooler.")}
    save_file(kept, source.directory / "model.safetensors", {"format": "pt"})
    MultimodalTransformer.from_encoders({"image": source}, LABELS, **SIZES)  # of no consequence
    del kept["layernorm.weight"]
    save_file(kept, source.directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of its image encoder \(layernorm.weight\)"):
        MultimodalTransformer.from_encoders({"image": source}, LABELS, **SIZES)


def test_all_encoders_that_cannot_be_such_are_named(tmp_path: Path) -> None:
    from mmcli.models.fusion_inputs import parts_of

    sources = encoders(tmp_path, image="vit", text="bert")
    os.remove(sources["text"].directory / "tokenizer.json")
    with pytest.raises(ConfigError) as error:
        parts_of({"audio": sources["image"], "text": sources["text"]})
    assert "--encoder audio=" in error.value.problems[0]
    assert "a vit encodes no audio here; known are audio-spectrogram-transformer" in error.value.problems[0]
    assert "has no tokenizer" in error.value.problems[1]


def test_directories_that_are_not_whole(tiny: Callable[[str], Fusion], tmp_path: Path) -> None:
    made = tiny("pair")
    save_fusion(made.model, made.sources, tmp_path)
    options = ModelOptions(str(tmp_path), device=DEVICE)
    labels = Classification((Label("a", ("a",)),))
    with pytest.raises(ConfigError, match=r"it has 3 labels of its own \(no, yes, perhaps\)"):
        plan(open_checkpoint(options), options, "float32", labels)
    with pytest.raises(ConfigError, match="--question is for models that are given labels"):
        plan(open_checkpoint(options), options, "float32", Classification(question="?"))
    shutil.rmtree(tmp_path / "audio")
    with pytest.raises(ConfigError, match=r"it has no audio/config\.json"):
        plan(open_checkpoint(options), options, "float32", Classification())
    edit_json(tmp_path / "config.json", modalities=None)
    with pytest.raises(ConfigError, match="names no modalities"):
        encoders_of(Checkpoint("x", tmp_path, None))

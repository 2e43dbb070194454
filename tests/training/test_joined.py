"""Two encoders joined in a new space: exact in pieces, loaded by the other commands and by transformers itself."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_dual
import tiny_encoders
import torch
import transformers as hf
from PIL import Image
from rare import rarely
from safetensors.torch import load_file
from test_contrastive import COLOURS, clip_pairs, pair_rows
from test_encoders import clips, pictures, sounds
from tiny_fusion import BUILDERS
from torch.nn.functional import normalize
from training_runs import still, trainer_of

from mmcli.cli.boundary import run as mmcli
from mmcli.cli.contrastive import measure_retrieval
from mmcli.core.errors import ConfigError, ModelError, Stopped
from mmcli.core.records import Media
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.joined import MultimodalDualEncoder
from mmcli.models.joined_family import MODEL_TYPE
from mmcli.models.options import ModelOptions
from mmcli.models.resolve import resolve
from mmcli.training.contrastive import Contrastive
from mmcli.training.data import Batches, Row, Rows, load
from mmcli.training.joined import JoinedNetwork
from mmcli.training.options import TrainOptions

SIZE = 20
TEXTS = ["a photo of a cat", "x", "the dog is here, and it is red"]


def options(folder: Path | str = "", **more: Any) -> ModelOptions:
    return ModelOptions(str(folder), device="cpu", **more)


def encoders(folder: Path, **names: str) -> dict[str, Path]:
    """Folders of tiny encoders: `text="bert"`."""
    return {modality: BUILDERS[modality][name](folder / modality) for modality, name in names.items()}


def network_of(folders: dict[str, Path], loss: Any = "clip", from_config: bool = False) -> JoinedNetwork:
    opened: Any = {modality: open_checkpoint(options(folder)) for modality, folder in folders.items()}
    return JoinedNetwork.of_encoders(opened, options(), SIZE, loss, from_config)


def vectors(plan: Any, modality: Any, media: Sequence[Any], together: bool = False) -> torch.Tensor:
    """As `mmcli embed` gives them."""
    process, runner = plan.open_processor(), plan.load()
    samples = [process(modality, one) for one in media]
    batches = [samples] if together else [[sample] for sample in samples]
    return torch.cat([torch.from_numpy(runner.forward(runner.collate(batch))) for batch in batches])


# ------------------------------------------------------------------------------------------------------ the model

MEDIA: dict[str, Any] = {
    "text": TEXTS,
    "image": pictures()[2:5],
    "audio": sounds([2500, 800, 2500]),
    "video": clips(tiny_encoders.FRAMES)[:3],
}
# Those whose pooler is the vector, and others: no pooler, no hidden_size, exact lengths, masks, clips, two media
# whose processors are files of one name.
PAIRS = [
    {"image": "vit", "text": "bert"},
    {"text": "mpnet", "image": "swin"},
    {"text": "distilbert", "image": "dinov2"},
    {"text": "bert", "image": "resnet"},
    {"audio": "wav2vec2-group", "text": "bert"},
    {"audio": "hubert-layer", "image": "vit"},
    {"video": "videomae", "text": "roberta"},
    {"video": "vjepa2", "audio": "audio-spectrogram-transformer"},
    {"video": "videomae-new", "image": "vit"},
]


@pytest.mark.parametrize(
    "names", rarely(PAIRS, lambda names: names in PAIRS[::2]), ids=lambda names: "-".join(names.values())
)
def test_vectors_are_those_of_the_encoders_projected(tmp_path: Path, names: dict[str, str]) -> None:
    """The vectors of `mmcli embed -m ENCODER`, times the projection, divided by their length."""
    folders = encoders(tmp_path, **names)
    network = network_of(folders)
    model, new = network.build(torch.device("cpu"))
    (tmp_path / "joined").mkdir()
    network.save(model, tmp_path / "joined")
    plan: Any = resolve(options(tmp_path / "joined"))
    is_transformers = isinstance(model, hf.VisionTextDualEncoderModel)
    assert is_transformers == (names in PAIRS[:2])
    assert len(new) == 2
    for modality, folder in folders.items():
        base = resolve(options(folder, pooling="pooler" if is_transformers else None, normalize=False))
        prefix = {"image": "visual_projection", "text": "text_projection"} if is_transformers else {}
        weight = model.get_parameter(f"{prefix.get(modality, f'towers.{modality}.projection')}.weight")
        wanted = normalize(vectors(base, modality, MEDIA[modality]) @ weight.T, dim=-1)
        found = vectors(plan, modality, MEDIA[modality])
        assert found.shape == (3, SIZE)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert float((found - found.mean(dim=0)).abs().max()) > 0.01, "they differ"


def test_a_padded_batch_is_what_each_row_is_alone(tmp_path: Path) -> None:
    folders = encoders(tmp_path, audio="hubert-layer", text="distilbert")
    network = network_of(folders)
    (tmp_path / "joined").mkdir()
    network.save(network.build(torch.device("cpu"))[0], tmp_path / "joined")
    plan: Any = resolve(options(tmp_path / "joined"))
    for modality in folders:
        alone, together = (vectors(plan, modality, MEDIA[modality], way) for way in (False, True))
        assert torch.allclose(alone, together, atol=1e-5)


def test_an_image_encoder_takes_clips_frame_by_frame(tmp_path: Path) -> None:
    network = network_of(encoders(tmp_path, audio="hubert-layer", image="vit"))
    (tmp_path / "joined").mkdir()
    network.save(network.build(torch.device("cpu"))[0], tmp_path / "joined")
    plan: Any = resolve(options(tmp_path / "joined", frames=tiny_encoders.FRAMES))
    assert plan.modalities == {"audio", "image", "video"}
    (clip,) = MEDIA["video"][:1]
    wanted = normalize(vectors(plan, "image", list(clip.frames)).mean(dim=0), dim=-1)
    assert torch.allclose(vectors(plan, "video", [clip])[0], wanted, atol=1e-5)


def test_transformers_loads_it_and_gives_the_same_vectors(tmp_path: Path) -> None:
    """Its own class and its own processor, of text and pictures."""
    network = network_of(encoders(tmp_path, image="vit", text="bert"))
    (tmp_path / "joined").mkdir()
    network.save(network.build(torch.device("cpu"))[0], tmp_path / "joined")
    processor = hf.VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "joined")
    model = hf.VisionTextDualEncoderModel.from_pretrained(tmp_path / "joined").eval()
    seen = [Image.fromarray(picture) for picture in MEDIA["image"]]
    inputs = processor(text=TEXTS, images=seen, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(**inputs)
    assert model.logit_scale.item() == pytest.approx(np.log(1 / 0.07), abs=1e-6)
    plan: Any = resolve(options(tmp_path / "joined"))
    for modality, wanted in (("image", output.image_embeds), ("text", output.text_embeds)):
        found = vectors(plan, modality, MEDIA[modality])
        assert float((found * wanted).sum(dim=1).min()) > 0.99999


def test_our_own_model_says_what_embed_and_classify_say(tmp_path: Path) -> None:
    """AutoModel loads it once mmcli.models.joined is registered; its logits are scaled cosines."""
    network = network_of(encoders(tmp_path, image="resnet", text="bert"), "siglip")
    (tmp_path / "joined").mkdir()
    network.save(network.build(torch.device("cpu"))[0], tmp_path / "joined")
    plan: Any = resolve(options(tmp_path / "joined"))
    assert plan.activation == "sigmoid"
    found = {modality: vectors(plan, modality, MEDIA[modality]) for modality in ("image", "text")}
    model = hf.AutoModel.from_pretrained(tmp_path / "joined")
    assert isinstance(model, MultimodalDualEncoder)
    assert model.config.model_type == MODEL_TYPE
    collator, process = plan.load(), plan.open_processor()
    inputs = {}
    for modality in ("image", "text"):
        batch = collator.collate([process(modality, one) for one in MEDIA[modality]])
        inputs |= {f"{modality}.{name}": tensor for name, tensor in collator.to_device(batch).items()}
    with torch.inference_mode():
        output = model.eval()(inputs)
    wanted = 10 * found["image"] @ found["text"].T - 10
    assert torch.allclose(output.logits, wanted, atol=1e-4)


def test_sentence_transformers_are_pooled_as_they_say(tmp_path: Path) -> None:
    folders = encoders(tmp_path, text="bert", image="vit")
    folder = folders["text"]
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling: dict[str, Any] = {"word_embedding_dimension": 32, "pooling_mode": "cls"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    model, _ = network_of(folders).build(torch.device("cpu"))
    assert isinstance(model, MultimodalDualEncoder), "its pooler was never trained"
    assert model.config.poolings == {"text": "cls", "image": "cls"}
    pooling["pooling_mode"] = "weightedmean"
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ConfigError, match="it pools by weightedmean; what is joined can be pooled by mean, cls"):
        network_of(folders)


def test_an_encoder_without_a_pooler_is_pooled_as_embed_does(tmp_path: Path) -> None:
    """Saved with a classification head, ViT has none: it would be random."""
    folders = encoders(tmp_path, text="bert")
    folders["image"] = tiny_encoders.HEADS["vit-classifier"][0](tmp_path / "image")
    model, _ = network_of(folders).build(torch.device("cpu"))
    assert isinstance(model, MultimodalDualEncoder)
    assert model.config.poolings == {"text": "mean", "image": "cls"}
    tensors = load_file(folders["image"] / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1" not in name}
    from safetensors.torch import save_file

    save_file(kept, folders["image"] / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"it lacks weights of its image encoder \(.*layer.*1"):
        network_of(folders).build(torch.device("cpu"))


def test_from_config_the_encoders_are_random(tmp_path: Path) -> None:
    folders = encoders(tmp_path, image="vit", text="distilbert")
    torch.manual_seed(3)
    random, new = network_of(folders, from_config=True).build(torch.device("cpu"))
    assert not new
    loaded, _ = network_of(folders).build(torch.device("cpu"))
    name = "towers.image.encoder.embeddings.patch_embeddings.projection.weight"
    assert not torch.equal(random.state_dict()[name], loaded.state_dict()[name])
    base = load_file(folders["image"] / "model.safetensors")
    assert torch.equal(loaded.state_dict()[name], base[name.removeprefix("towers.image.encoder.")])


# -------------------------------------------------------------------------------------------------------- training


def sound_pairs(folder: Path, count: int, seed: int = 0) -> list[Row]:
    """Short tones of three pitches, and texts that say which."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        time = np.arange(int(generator.integers(300, 600))) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * 600 * 2 ** (number % 3) * time) + 0.05 * generator.standard_normal(
            len(time)
        )
        file = folder / f"{number}.wav"
        with wave.open(str(file), "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes((tone * 32767).astype(np.int16).tobytes())
        said = Media("text", text=f"a {('cat', 'dog', 'red')[number % 3]}")
        rows.append(Row(file.name, (Media("audio", file=str(file)), said), number % 3))
    return rows


def objective_of(folders: dict[str, Path], loss: Any = "clip", **more: Any) -> Contrastive:
    slots: Any = tuple(folders)
    return Contrastive(network_of(folders, loss, **more), slots, measure_retrieval)


def gradients(folders: dict[str, Path], rows: Sequence[Row], loss: Any, pieces: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    objective = objective_of(folders, loss)
    network: Any = objective.network
    network.plan = replace(network.plan, dtype="float64")
    model = objective.build(torch.device("cpu")).double().train()

    def collate(items: Any) -> Any:
        return objective.collate(items, pieces)

    found = next(iter(load(Rows(rows, objective.plan, 0), Batches(len(rows), len(rows), 0), collate, 0)))
    objective.step(model, found, objective.count(found), lambda loss: loss.backward())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize(
    "names",
    [
        {"image": "vit", "text": "bert"},
        {"audio": "wav2vec2-group", "text": "bert"},
        *rarely(
            [
                {"image": "resnet", "text": "distilbert"},
                {"audio": "hubert-layer", "text": "bert"},
                {"video": "videomae", "text": "bert"},
            ]
        ),
    ],
    ids=lambda names: "-".join(names.values()),
)
def test_a_batch_in_pieces_has_the_gradients_of_the_whole(tmp_path: Path, names: dict[str, str], loss: str) -> None:
    folders = {modality: still(folder) for modality, folder in encoders(tmp_path, **names).items()}
    if "image" in names:
        rows = pair_rows(tmp_path / "images", 7, repeated=True)
    else:
        rows = sound_pairs(tmp_path / "sounds", 7) if "audio" in names else clip_pairs(5)
    whole = gradients(folders, rows, loss, 1)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    found = gradients(folders, rows, loss, 3)
    assert found.keys() == whole.keys()
    assert "logit_scale" in whole
    assert ("logit_bias" in whole) == (loss == "siglip")
    worst = max(float((found[name] - whole[name]).abs().max()) for name in whole)
    assert worst <= 1e-6 * largest, f"{worst / largest:.1e}"


OPTIONS = TrainOptions(epochs=4, batch_size=6, learning_rate=1e-3, accumulation=2)


def test_it_goes_on_exactly(tmp_path: Path) -> None:
    folders = encoders(tmp_path, audio="hubert-layer", text="bert")
    rows = sound_pairs(tmp_path / "sounds", 18)

    def run(name: str, stop: Any = None) -> dict[str, torch.Tensor]:
        objective: Any = objective_of(folders, "siglip")
        trainer_of(tmp_path / name, objective, rows[:12], rows[12:], OPTIONS, stop).train()
        return load_file(tmp_path / name / "last" / "model.safetensors")

    whole, asked = run("whole"), iter(range(100))
    with pytest.raises(Stopped):
        run("run", lambda: 130 if next(asked) >= 3 else None)
    found = run("run")
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert whole["logit_bias"] != -10


def test_adapters_and_new_projections_learn_and_nothing_else(tmp_path: Path) -> None:
    folders = encoders(tmp_path, image="vit", text="distilbert")
    rows = pair_rows(tmp_path / "images", 12)
    objective: Any = objective_of(folders)
    torch.manual_seed(0)
    (tmp_path / "before").mkdir()
    objective.save(objective.build(torch.device("cpu")), tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    lora = replace(OPTIONS, lora_rank=2)
    trainer_of(tmp_path / "run", objective_of(folders), rows, rows, lora).train()  # type: ignore[arg-type]
    found = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert found.keys() == before.keys()
    learned = {name for name in found if not torch.equal(found[name], before[name])}
    assert {"logit_scale", "towers.image.projection.weight", "towers.text.projection.weight"} <= learned
    assert "towers.text.encoder.embeddings.word_embeddings.weight" not in learned
    assert any("attention" in name for name in learned)


@pytest.mark.parametrize("text", ["bert", "distilbert"])
def test_checkpointing_changes_no_weight(tmp_path: Path, text: str) -> None:
    """Also of transformers' class, whose encoders offer it, although it does not."""
    folders = {modality: still(folder) for modality, folder in encoders(tmp_path, image="vit", text=text).items()}
    rows = pair_rows(tmp_path / "images", 12)
    found = []
    for checkpointing in (False, True):
        options = replace(OPTIONS, epochs=1, gradient_checkpointing=checkpointing)
        run = tmp_path / f"run {checkpointing}"
        trainer = trainer_of(run, objective_of(folders), rows, rows, options)  # type: ignore[arg-type]
        trainer.train()
        layers = [one for one in trainer._parts.model.modules() if hasattr(one, "gradient_checkpointing")]
        assert any(one.gradient_checkpointing for one in layers) == checkpointing
        found.append(load_file(run / "last" / "model.safetensors"))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@pytest.mark.parametrize("text", ["bert", *rarely(["distilbert"])])
def test_kept_adapters_are_the_merged_model(tmp_path: Path, text: str) -> None:
    """Their base are two checkpoints: peft's file, and what tells where both are."""
    folders = encoders(tmp_path, image="vit", text=text)
    rows = pair_rows(tmp_path / "images", 12)
    plans: list[Any] = []
    for save in ("merged", "adapter"):
        options = replace(OPTIONS, lora_rank=2, lora_save=save, learning_rate=5e-3)
        trainer_of(tmp_path / save, objective_of(folders), rows, rows, options).train()  # type: ignore[arg-type]
        plans.append(resolve(ModelOptions(str(tmp_path / save / "last"), device="cpu")))
    assert (tmp_path / "adapter" / "last" / "adapter_model.safetensors").is_file()
    for modality in ("image", "text"):
        merged, kept = (vectors(plan, modality, MEDIA[modality]) for plan in plans)
        assert torch.allclose(merged, kept, atol=1e-5)


@pytest.mark.parametrize("text", ["bert", "distilbert"])
def test_a_locked_image_tower(tmp_path: Path, text: str) -> None:
    """`--freeze image` (LiT, Zhai et al. 2022): its projection learns, and the other tower; it does not."""
    folders = encoders(tmp_path, image="vit", text=text)
    rows = pair_rows(tmp_path / "images", 12)
    run = trainer_of(tmp_path / "run", objective_of(folders), rows, rows, replace(OPTIONS, freeze=("image",)))  # type: ignore[arg-type]
    run.train()
    found = load_file(tmp_path / "run" / "last" / "model.safetensors")
    base = {modality: load_file(folder / "model.safetensors") for modality, folder in folders.items()}
    named = (
        ("vision_model.", "text_model.") if text == "bert" else ("towers.image.encoder.", "towers.text.encoder.")
    )
    pairs = dict(zip(("image", "text"), named, strict=True))
    same = {
        modality: all(torch.equal(found[f"{prefix}{name}"], base[modality][name]) for name in base[modality])
        for modality, prefix in pairs.items()
    }
    assert same == {"image": True, "text": False}


def manifest(path: Path, rows: Sequence[Row]) -> Path:
    lines = [{one.modality: one.file or one.text for one in row.media} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# What is learned in so few steps differs from device to device.
ON_CPU = ["--device", "cpu"]


def columns(*names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}-column", name)]


def measured(run: Path) -> dict[str, float]:
    """The validation metrics of the best step."""
    told = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["step"] == told["best_step"] and "val_r_at_1" in line)  # type: ignore[no-any-return]


def colour_rows(folder: Path, count: int, seed: int) -> list[Row]:
    """Pictures of four colours, with the same text for those of a colour."""
    rows = pair_rows(folder, count, seed)
    texts = list(COLOURS)
    return [
        replace(row, media=(row.media[0], Media("text", text=f"a photo of {texts[n % 4]}")))
        for n, row in enumerate(rows)
    ]


@pytest.mark.slow
def test_pictures_and_texts_from_the_command_line(tmp_path: Path) -> None:
    """It learns four colours in seconds; embed, classify and a further run take what it writes."""
    folders = encoders(tmp_path, image="vit", text="bert")
    train = manifest(tmp_path / "train.jsonl", colour_rows(tmp_path / "train", 96, 0))
    rows = colour_rows(tmp_path / "val", 16, 1)
    val, run = manifest(tmp_path / "val.jsonl", rows), tmp_path / "run"
    given = [f"--encoder={modality}={folder}" for modality, folder in folders.items()]
    command = ["finetune", str(train), "--val", str(val), *columns("image", "text"), "--objective", "contrastive"]
    rest = ["--projection-size", "16", "--batch-size", "8", "--num-workers", "0", "--quiet", *ON_CPU]
    learn = ["--learning-rate", "1e-3", "--epochs", "10"]
    assert mmcli([*command, *given, *rest, *learn, "-o", str(run)]) == 0
    assert measured(run)["val_r_at_1"] >= 0.9
    out = tmp_path / "val.parquet"
    embed = ["embed", str(val), *columns("image", "text"), "-m", str(run / "best"), "-o", str(out)]
    assert mmcli([*embed, *ON_CPU]) == 0
    table = pq.read_table(out)
    sides = [np.stack(table.column(f"{name}_embedding").to_numpy()) for name in ("image", "text")]
    assert np.allclose(np.linalg.norm(sides[0], axis=1), 1, atol=1e-5)
    for name, value in measure_retrieval(*sides, np.arange(16) % 4).items():
        assert measured(run)[f"val_{name}"] == pytest.approx(value, abs=1e-5), name
    labels, names = tmp_path / "labels.parquet", list(COLOURS)
    said = ["--labels", ",".join(names), "--template", "a photo of {}", "-m", str(run / "best"), "-o", str(labels)]
    assert mmcli(["classify", str(tmp_path / "val"), *said, *ON_CPU]) == 0
    found = dict(zip(*(pq.read_table(labels).column(c).to_pylist() for c in ("id", "label")), strict=True))
    right = [found[Path(str(row.media[0].file)).name] == names[n % 4] for n, row in enumerate(rows)]
    assert np.mean(right) >= 0.9
    again = ["-m", str(run / "best"), *rest[2:], "--epochs", "1", "-o", str(tmp_path / "again")]
    assert mmcli([*command, *again]) == 0
    assert measured(tmp_path / "again")["val_r_at_1"] >= 0.9


@pytest.mark.slow
def test_sounds_and_texts_from_the_command_line(tmp_path: Path) -> None:
    """As above with a model of our own: it learns three tones, and goes on from run/best."""
    folders = encoders(tmp_path, audio="hubert-layer", text="distilbert")
    train = manifest(tmp_path / "train.jsonl", sound_pairs(tmp_path / "train", 30))
    rows = sound_pairs(tmp_path / "val", 12, 1)
    val, run = manifest(tmp_path / "val.jsonl", rows), tmp_path / "run"
    given = [f"--encoder={modality}={folder}" for modality, folder in folders.items()]
    command = ["finetune", str(train), "--val", str(val), *columns("audio", "text"), "--objective", "contrastive"]
    rest = ["--batch-size", "6", "--num-workers", "0", "--quiet", *ON_CPU]
    learn = ["--learning-rate", "5e-4", "--epochs", "6", "--loss", "siglip", "--projection-size", "16"]
    assert mmcli([*command, *given, *rest, *learn, "-o", str(run)]) == 0
    assert measured(run)["val_r_at_1"] >= 0.8
    assert sorted(one.name for one in (run / "best").iterdir() if one.is_dir()) == ["audio", "text"]
    out = tmp_path / "val.parquet"
    embed = ["embed", str(val), *columns("audio", "text"), "-m", str(run / "best"), "-o", str(out)]
    assert mmcli([*embed, *ON_CPU]) == 0
    table = pq.read_table(out)
    sides = [np.stack(table.column(f"{name}_embedding").to_numpy()) for name in ("audio", "text")]
    for name, value in measure_retrieval(*sides, np.array([row.target for row in rows])).items():
        assert measured(run)[f"val_{name}"] == pytest.approx(value, abs=1e-5), name
    again = ["-m", str(run / "best"), *rest, "--epochs", "1", "-o", str(tmp_path / "again")]
    assert mmcli([*command, *again]) == 0
    assert measured(tmp_path / "again")["val_r_at_1"] >= 0.8
    labels = ["--labels", "a cat,a dog,a red", "--template", "{}", "--multi-label"]
    assert mmcli(["classify", str(tmp_path / "val"), *labels, "-m", str(tmp_path / "again" / "best"),
                  "-o", str(tmp_path / "labels.jsonl")]) == 0  # fmt: skip
    assert mmcli([*command, *given, *rest, *learn[:-1], "17", "-o", str(run)]) == 6, "another size is another run"


def test_problems_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = encoders(tmp_path, image="vit", text="bert")
    rows = manifest(tmp_path / "rows.jsonl", colour_rows(tmp_path / "images", 8, 0))
    captioner = tiny_dual.BUILDERS["blip"](tmp_path / "blip")
    command = ["finetune", str(rows), "--val", str(rows), *columns("image", "text"), "--objective", "contrastive"]
    command += ["--num-workers", "0", "-o", str(tmp_path / "run")]

    def told(*more: str) -> str:
        assert mmcli([*command, *more]) == 2
        return capsys.readouterr().err

    image, text = f"--encoder=image={folders['image']}", f"--encoder=text={folders['text']}"
    assert f"'image={folders['image']}': there is one of image already" in told(image, image, text)
    assert "--encoder audio=...: rows have no audio" in told(image, text, f"--encoder=audio={folders['text']}")
    assert "INPUT: rows have text, for which there is no --encoder" in told(image)
    found = told(f"--encoder=image={captioner}", text, "--projection-size", "0", "--loss", "triplet")
    assert "--projection-size" in found
    assert "--loss" in found
    assert "a blip encodes no image here; known are" in told(f"--encoder=image={captioner}", text)
    assert "a bert encodes no image here" in told(f"--encoder=image={folders['text']}", text)
    clip = tiny_dual.BUILDERS["clip"](tmp_path / "clip")
    assert "--metric conditioned_r_at_1 is of models whose texts heed" in told(
        "-m", str(clip), "--metric", "conditioned_r_at_1"
    )
    found = told("-m", str(clip), "--loss", "clip", "--projection-size", "8")
    assert "--loss goes with --encoder" in found
    assert "--projection-size goes with --encoder" in found
    (tmp_path / "rows.jsonl").write_text(rows.read_text() + json.dumps({"image": None, "text": "alone"}) + "\n")
    assert "8 (bad_row" in told(image, text)

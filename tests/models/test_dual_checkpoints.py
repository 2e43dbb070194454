"""Checkpoints that lack something, are damaged or unsafe: one clear line, and never a wrong vector."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dual
import torch
import transformers as hf
from model_runs import Run, plan_of
from safetensors.torch import load_file, save_file

from mmcli.core.errors import ConfigError, MmcliError, ModelError
from mmcli.models.inputs import open_tokenizer
from mmcli.models.options import ModelOptions
from mmcli.models.resolve import resolve

TEXTS = ["a photo of a cat", "", "red circle " * 50]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dual.clip(tmp_path_factory.mktemp("checkpoints") / "clip")


@pytest.fixture
def copied(clip: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(clip, tmp_path / "model"))


def vectors(folder: Path, **options: Any) -> np.ndarray:
    run = Run(folder, **options)
    return np.concatenate([run("text", TEXTS, 7, 3), run("image", [PICTURE], 7, 1)])


def message(error_class: type[MmcliError], call: Callable[[], object]) -> str:
    """The error that `call` raises, which must be one line."""
    with pytest.raises(error_class) as caught:
        call()
    assert type(caught.value) is error_class
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1200
    return f"{text} [{caught.value.hint}]"


# ------------------------------------------------------------------------------------------ weights


def test_a_captioner_has_no_shared_space(tmp_path: Path) -> None:
    plan = plan_of(tiny_dual.blip_captioner(tmp_path / "captioner"))
    text = message(ModelError, plan.load)
    assert "lacks weights that its vectors need" in text
    assert "BlipForConditionalGeneration" in text


def test_one_tower_alone_is_refused(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if name.startswith("vision_model.")}
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights" in message(ModelError, plan_of(copied).load)


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    tiny_dual.edit_json(copied / "config.json", projection_dim=48)
    assert str(copied) in message(ModelError, plan_of(copied).load)


def test_truncated_weights_are_refused(copied: Path) -> None:
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert f"-m {copied}: cannot load it" in message(ModelError, plan_of(copied).load)


def test_sharded_weights(clip: Path, tmp_path: Path) -> None:
    model = hf.CLIPModel.from_pretrained(clip)
    sharded = Path(shutil.copytree(clip, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors")))
    model.save_pretrained(sharded, max_shard_size="60KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    np.testing.assert_allclose(vectors(sharded), vectors(clip), atol=1e-6)
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    assert "model-00002" in message(ModelError, plan_of(sharded).load)


def test_half_precision_weights_are_computed_in_float32(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "half"))
    hf.CLIPModel.from_pretrained(clip).half().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"
    model = hf.CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = model.get_text_features(**open_tokenizer(plan_of(folder).checkpoint)("a cat", return_tensors="pt"))
    unit = torch.nn.functional.normalize(wanted.pooler_output, dim=-1).numpy()
    np.testing.assert_allclose(Run(folder)("text", ["a cat"], 1, 1), unit, atol=1e-6)


def test_float16_on_the_processor_is_refused(clip: Path) -> None:
    assert "--dtype bfloat16" in message(ModelError, plan_of(clip, dtype="float16", device="cpu").load)


def test_pickled_weights_only_when_asked_for(clip: Path, copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    text = message(ConfigError, lambda: plan_of(copied))
    assert "pytorch_model.bin, a pickle" in text
    assert "--allow-pickle" in text
    np.testing.assert_allclose(vectors(copied, allow_pickle=True), vectors(clip), atol=1e-6)


def test_a_pickle_beside_safetensors_is_not_opened(clip: Path, copied: Path) -> None:
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    np.testing.assert_array_equal(vectors(copied), vectors(clip))


def test_a_pickle_that_runs_code_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "model.safetensors").unlink()
    trap = tmp_path / "ran"
    (copied / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode())
    message(ModelError, plan_of(copied, allow_pickle=True).load)
    assert not trap.exists()


# ------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "it has no config.json"),
        ("{", "config.json cannot be read"),
        ("[1]", "config.json holds no JSON object"),
        ("\udcff", "config.json cannot be read"),
        ("{}", "it has no config.json"),
        ('{"architectures": ["CLIPModel"]}', "is not supported for embeddings"),
        ('{"model_type": "klip"}', "'klip' is not supported for embeddings"),
        ('{"model_type": "gpt2"}', "'gpt2' is not supported for embeddings"),
        ('{"model_type": "clip", "projection_dim": "many"}', "config.json is not usable"),
        ('{"model_type": "clip", "trust_remote_code": true}', "asks for trust_remote_code, which is refused"),
        ('{"model_type": "jina_clip", "auto_map": {"AutoModel": "code.Model"}}', "code that comes with the"),
    ],
)  # fmt: skip
def test_config_that_is_none(copied: Path, content: str | None, wanted: str) -> None:
    if content is None:
        (copied / "config.json").unlink()
    else:
        (copied / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    text = message(ConfigError, lambda: plan_of(copied))
    assert wanted in text
    assert f"-m {copied}" in text
    if "supported" in wanted:
        assert "dual encoders: align, altclip, blip" in text
        assert "sentence-transformers" in text


def test_blip_2_has_no_shared_space(tmp_path: Path) -> None:
    text = message(ConfigError, lambda: plan_of(tiny_dual.blip_2(tmp_path / "blip-2")))
    assert "'blip-2' is not supported for embeddings" in text


def test_code_of_a_known_type_is_not_run(clip: Path, copied: Path) -> None:
    code = "raise SystemExit('this code must not be run')\n"
    (copied / "modeling_trap.py").write_text(code, encoding="utf-8")
    tiny_dual.edit_json(copied / "config.json", auto_map={"AutoModel": "modeling_trap.Trap"})
    tiny_dual.edit_json(copied / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_trap.Trap"]})
    np.testing.assert_array_equal(vectors(copied), vectors(clip))


# ------------------------------------------------------------------------------------------ where it is


def test_a_misspelt_directory(copied: Path) -> None:
    misspelt = copied.parent / "modle"
    assert f"did you mean {copied}?" in message(ConfigError, lambda: plan_of(misspelt))
    assert "a model is a directory" in message(ConfigError, lambda: plan_of(copied / "config.json"))


def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    text = message(ConfigError, lambda: plan_of("someone/no-such-model"))
    assert "no such directory, nor is it in the hub's cache" in text
    assert "neither a directory nor a hub id" in message(ConfigError, lambda: plan_of("no one/what?", offline=True))


def test_a_local_directory_has_no_revision(copied: Path) -> None:
    assert "--revision main" in message(ConfigError, lambda: plan_of(copied, revision="main"))


def test_every_problem_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path / "nothing", dtype="int3", pooling="median")
    assert len(caught.value.problems) == 3


# ------------------------------------------------------------------------------------------ processors


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def test_without_a_tokenizer_it_takes_pictures_only(clip: Path, copied: Path) -> None:
    # tokenizer_config.json alone makes a tokenizer without a vocabulary, whose vectors would be wrong.
    remove(copied, "tokenizer.json", "vocab.json", "merges.txt")
    run = Run(copied)
    assert run.plan.modalities == {"image", "video"}
    np.testing.assert_array_equal(run("image", [PICTURE], 7, 1), Run(clip)("image", [PICTURE], 7, 1))


def test_without_an_image_processor_it_takes_texts_only(clip: Path, copied: Path) -> None:
    remove(copied, "preprocessor_config.json", "processor_config.json")
    run = Run(copied)
    assert run.plan.modalities == {"text"}
    np.testing.assert_array_equal(run("text", TEXTS, 7, 3), Run(clip)("text", TEXTS, 7, 3))
    remove(copied, "tokenizer*", "vocab.json", "merges.txt")
    assert "neither a tokenizer nor a preprocessor_config.json" in message(ConfigError, lambda: plan_of(copied))


@pytest.mark.parametrize("kept", ["preprocessor_config.json", "processor_config.json"])
def test_either_file_tells_how_pictures_are_taken(clip: Path, copied: Path, kept: str) -> None:
    for name in {"preprocessor_config.json", "processor_config.json"} - {kept}:
        (copied / name).unlink()
    assert plan_of(copied).decode.min_image_size == tiny_dual.SIDE
    np.testing.assert_array_equal(vectors(copied), vectors(clip))


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_damaged_processors_are_one_line(copied: Path, name: str) -> None:
    remove(copied, "processor_config.json")
    (copied / name).write_text('{"size": ', encoding="utf-8")
    with pytest.raises(MmcliError) as caught:
        plan_of(copied).open_processor()
    assert isinstance(caught.value, ConfigError | ModelError)
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ the plan


def test_plan_is_picklable_and_knows_its_size(clip: Path) -> None:
    plan = pickle.loads(pickle.dumps(plan_of(clip)))
    assert plan == plan_of(clip)
    assert plan.embedding_size == tiny_dual.SIZE
    assert plan.decode.min_image_size == tiny_dual.SIDE
    assert plan.decode.modalities == plan.modalities == {"text", "image", "video"}


def test_description_is_that_of_the_contents(clip: Path, tmp_path: Path) -> None:
    described = plan_of(clip).describe()
    assert json.loads(json.dumps(described)) == described
    elsewhere = Path(shutil.copytree(clip, tmp_path / "deep" / clip.name))
    (elsewhere / "README.md").write_text("Not part of the model.", encoding="utf-8")
    assert plan_of(elsewhere).describe() == described


def test_description_tells_settings_apart(clip: Path) -> None:
    variants: list[dict[str, Any]] = [
        {}, {"dtype": "bfloat16"}, {"normalize": False}, {"frames": 3}, {"compile": True},
        {"attn_implementation": "eager"},
    ]  # fmt: skip
    descriptions = [json.dumps(plan_of(clip, **options).describe()) for options in variants]
    assert len(set(descriptions)) == len(variants)
    assert plan_of(clip, normalize=True).describe() == plan_of(clip).describe()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: tiny_dual.edit_json(folder / "preprocessor_config.json", resample=2),
        lambda folder: tiny_dual.edit_json(folder / "processor_config.json", note="x"),
        lambda folder: tiny_dual.edit_json(folder / "tokenizer_config.json", model_max_length=20),
        lambda folder: tiny_dual.edit_json(folder / "tokenizer.json", version="2.0"),
        lambda folder: tiny_dual.edit_json(folder / "config.json", logit_scale_init_value=1.0),
        lambda folder: tiny_dual.clip(folder, seed=1),
    ],
)
def test_description_tells_contents_apart(copied: Path, change: Callable[[Path], object]) -> None:
    before = plan_of(copied).describe()
    change(copied)
    assert plan_of(copied).describe() != before


def test_what_does_not_belong_to_the_family_is_refused(clip: Path) -> None:
    assert "--pooling mean: a dual encoder" in message(ConfigError, lambda: plan_of(clip, pooling="mean"))
    assert "'warp'" in message(ConfigError, lambda: resolve(ModelOptions(str(clip), device="warp")))
    assert "flash_attention_9" in message(ModelError, plan_of(clip, attn_implementation="flash_attention_9").load)

"""Directories of peft as -m: those that plain scripts write, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import peft
import pytest
import tiny_classifiers
import tiny_dual
import tiny_encoders
import torch
import transformers
from classify_runs import ClassifyRun
from model_runs import DEVICE, Run, assert_same, plan_of
from safetensors.torch import load_file, save_file
from tiny_encoders import TEXTS

from mmcli.core.errors import ConfigError, MmcliError, ModelError

WORDS: list[Any] = ["a photo of a cat", "dog", "the red circle is on the left"]
ALL_LINEAR = ["query", "value", "dense"]
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=ALL_LINEAR, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=ALL_LINEAR, init_lora_weights=False, use_dora=True),
    "pattern": lambda: peft.LoraConfig(
        r=2, target_modules=r".*layer\.1.*query", init_lora_weights=False, alpha_pattern={"query": 7}
    ),
    "bias": lambda: peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, bias="lora_only"),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules=["word_embeddings"], init_lora_weights=False),
    "tokens": lambda: peft.LoraConfig(
        r=2, target_modules=["query"], init_lora_weights=False, trainable_token_indices={"word_embeddings": [5, 6]}
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], init_ia3_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=ALL_LINEAR, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=ALL_LINEAR, init_weights=False),
    "oft": lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["query", "value"]),
    "vblora": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=8, vector_length=4, topk=2, target_modules=["query", "value"]
    ),
    "tokens_alone": lambda: peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=["word_embeddings"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["query", "value"]),
}


def trained(
    base: Path, folder: Path, config: Any, model_class: Any = transformers.AutoModel, **options: Any
) -> Any:
    """What a script writes into `folder` after training; returns its model, in inference."""
    torch.manual_seed(0)
    model = model_class.from_pretrained(base, **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert ".original_module." not in name
    adapted.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    return adapted.eval()


def first_tokens(model: Any, base: Path) -> np.ndarray:
    """[CLS] of each of WORDS, as the script would have it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        found = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in WORDS]
    return torch.stack(found).numpy()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return TEXTS["bert"](tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    trained(base, tmp_path / "adapter", KINDS["lora"]())
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_a_script(base: Path, tmp_path: Path, kind: str) -> None:
    """Those of the script's own model, with the adapter beside the base's weights."""
    model = trained(base, tmp_path / "adapter", KINDS[kind]())
    wanted = first_tokens(model, base)
    found = Run(tmp_path / "adapter", pooling="cls")("text", WORDS, 2, 3)
    assert_same(found, wanted)
    assert np.abs(found - Run(base, pooling="cls")("text", WORDS, 2, 3)).max() > 1e-2


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers_of_a_script(tmp_path: Path, name: str) -> None:
    base = tiny_dual.BUILDERS[name](tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model: Any = trained(base, tmp_path / "adapter", config)
    run = Run(tmp_path / "adapter", normalize=False)
    samples = [run.processor("text", text) for text in WORDS]
    inputs = run.runner.to_device(run.runner.collate(samples))  # type: ignore[attr-defined]
    with torch.inference_mode():
        wanted = model.to(DEVICE).get_text_features(**inputs).pooler_output.cpu().numpy()
    assert_same(run("text", WORDS, 3, 3), wanted)


def test_a_head_of_a_script(tmp_path: Path) -> None:
    """Its labels have no names; the same adapter gives vectors, without its head."""
    base = TEXTS["bert"](tmp_path / "base")
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False, target_modules=ALL_LINEAR)
    model = trained(
        base, tmp_path / "adapter", config, transformers.AutoModelForSequenceClassification, num_labels=5
    )
    run = ClassifyRun(tmp_path / "adapter")
    assert run.plan.labels == tuple(f"LABEL_{n}" for n in range(5))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in WORDS]
    np.testing.assert_allclose(
        run.scores("text", WORDS, 2, 3), torch.stack(logits).softmax(dim=-1).numpy(), atol=1e-5
    )
    inner = model.get_base_model().bert
    assert_same(Run(tmp_path / "adapter", pooling="cls")("text", WORDS, 2, 3), first_tokens(inner, base))


def test_names_of_older_transformers(tmp_path: Path) -> None:
    """Layers of a ViT had other names when its public adapters were made."""
    base = tiny_classifiers.BUILDERS["vit"](tmp_path / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["classifier"]
    )
    new, old = tmp_path / "new", tmp_path / "old"
    trained(base, new, config, transformers.AutoModelForImageClassification)
    shutil.copytree(new, old)

    def older(name: str) -> str:
        for now, then in (("vit.layers.", "vit.encoder.layer."), ("attention.", "attention.attention."),
                          ("q_proj", "query"), ("v_proj", "value")):  # fmt: skip
            name = name.replace(now, then)
        return name

    tensors = {older(name): tensor for name, tensor in load_file(new / "adapter_model.safetensors").items()}
    assert any("vit.encoder.layer.0.attention.attention.query.lora_A" in name for name in tensors)
    save_file(tensors, old / "adapter_model.safetensors")
    text = (old / "adapter_config.json").read_text()
    (old / "adapter_config.json").write_text(text.replace('"q_proj"', '"query"').replace('"v_proj"', '"value"'))
    picture: Any = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    found, wanted = (ClassifyRun(folder).scores("image", [picture], 1, 1) for folder in (old, new))
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(found - ClassifyRun(base).scores("image", [picture], 1, 1)).max() > 1e-3


def test_words_of_a_tied_model(tmp_path: Path) -> None:
    """An adapter of the layer that gives words leaves the one that reads them alone, though they share weights."""
    base, made = tiny_encoders.TEXTS["bert"](tmp_path / "base"), transformers.AutoModelForMaskedLM
    made.from_config(transformers.AutoConfig.from_pretrained(base)).save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["decoder", "query"], init_lora_weights=False)
    model = trained(base, tmp_path / "adapter", config, made)
    inner = model.get_base_model()
    assert inner.get_output_embeddings().base_layer.weight is inner.get_input_embeddings().weight
    from mmcli.models.checkpoint import open_checkpoint
    from mmcli.models.options import ModelOptions

    inputs = transformers.AutoTokenizer.from_pretrained(base)(WORDS[0], return_tensors="pt")
    with torch.inference_mode():
        wanted = model(**inputs).logits
        for dtype in (torch.float32, torch.bfloat16):
            merged, _ = open_checkpoint(ModelOptions(str(tmp_path / "adapter"))).load(made, dtype=dtype)
            found = merged.eval()(**inputs).logits.float()
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_a_merged_directory_is(base: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    """In half precision, too, bit by bit: sums are rounded once."""
    merged = tmp_path / "merged"
    model = transformers.AutoModel.from_pretrained(base)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
    for file in base.glob("*token*"):
        shutil.copyfile(file, merged / file.name)
    found, wanted = (Run(folder, dtype=dtype)("text", WORDS, 2, 3) for folder in (adapter, merged))
    np.testing.assert_array_equal(found, wanted)


def test_files_beside_it_come_first(base: Path, adapter: Path) -> None:
    """As transformers' Trainer writes them: the tokenizer of the adapter, not the base's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, model_max_length=5)
    tokenizer.save_pretrained(adapter)
    long: Any = " ".join(["red"] * 30)
    short: Any = " ".join(["red"] * 3)
    vectors = Run(adapter)("text", [long, short], 1, 2)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_words_that_were_added(base: Path, tmp_path: Path, dtype: str) -> None:
    """A tokenizer with a new token beside the adapter, which has the vectors of all tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["zebra"])
    model = transformers.AutoModel.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(
        r=2, target_modules=["query"], init_lora_weights=False, modules_to_save=["word_embeddings"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    inputs = tokenizer("a photo of zebra", return_tensors="pt")
    assert len(tokenizer) - 1 in inputs["input_ids"]
    with torch.inference_mode():
        wanted = adapted(**inputs).last_hidden_state[:, 0].numpy()
    found = Run(tmp_path / "adapter", pooling="cls", dtype=dtype)("text", ["a photo of zebra"], 1, 1)
    cosine = (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert cosine > (0.999999 if dtype == "float32" else 0.999)


def test_sentence_transformers(base: Path, tmp_path: Path) -> None:
    """Their directory as a base: its pooling is kept."""
    from sentence_transformers import SentenceTransformer

    made = SentenceTransformer(str(base), device="cpu")
    made.save(str(tmp_path / "sentences"))
    model = trained(tmp_path / "sentences", tmp_path / "adapter", KINDS["lora"]())
    vectors = Run(tmp_path / "adapter")("text", WORDS, 2, 3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in WORDS]
    assert_same(vectors, torch.stack(means).numpy())
    assert (tmp_path / "sentences" / "modules.json").is_file()


@pytest.mark.slow
def test_nothing_is_left_behind(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The folder of links is gone once the run is, but not before its workers have read it."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    command = ["embed", tmp_path / "in.jsonl", "--text-column", "text", "-m", adapter, "--pooling", "cls",
               "--num-workers", "1", "-o", tmp_path / "out.jsonl"]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-m", "mmcli", *map(str, command)], env=environment, check=True)
    found = [json.loads(line)["embedding"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(np.array(found), Run(adapter, pooling="cls")("text", WORDS, 3, 3), atol=1e-5)
    assert not list((tmp_path / "temporary").iterdir())


def test_what_identifies_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The base and the adapter, wherever they lie; a file that is changed is another model."""
    first = plan_of(adapter).describe()
    assert first["id"] == "adapter"
    assert first["base"]["id"] == "base"
    shutil.copytree(adapter, tmp_path / "elsewhere" / "adapter")
    assert plan_of(tmp_path / "elsewhere" / "adapter").describe() == first
    for file in (base / "model.safetensors", tmp_path / "elsewhere" / "adapter" / "adapter_model.safetensors"):
        tensors = load_file(file)
        tensors[min(tensors)] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        changed = plan_of(tmp_path / "elsewhere" / "adapter").describe()
        assert changed["weights"] != first["weights"]
        first = changed


def test_a_base_on_the_hub(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the hub's cache, at the commit that the adapter names; the adapter may be there, too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    wanted = Run(adapter)("text", WORDS, 2, 3)

    def cached(name: str, folder: Path, commit: str) -> None:
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)

    cached("me/base", base, "0" * 40)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "me/base", "revision": "0" * 40}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    cached("me/adapter", adapter, "1" * 40)
    shutil.rmtree(base)
    for name in (str(adapter), "me/adapter"):
        run = Run(name, offline=True)
        np.testing.assert_array_equal(run("text", WORDS, 2, 3), wanted)
        assert run.plan.describe()["base"]["revision"] == "0" * 40
    assert run.plan.describe()["revision"] == "1" * 40
    settings["base_model_name_or_path"] = "me/other"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert f"-m {adapter}: its base: -m me/other: no such directory, nor" in message(
        ConfigError, adapter, offline=True
    )


# ----------------------------------------------------------------------------------------------- mistakes


def message(kind: type[MmcliError], folder: Path, loads: bool = False, **options: Any) -> str:
    def use() -> None:
        plan = plan_of(folder, **options)
        if loads:
            plan.load()

    with pytest.raises(kind) as caught:
        use()
    hint = f" / {caught.value.hint}" if caught.value.hint else ""
    return caught.value.message + hint


def changed(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_base_that_is_not_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    wanted = Run(adapter)("text", WORDS, 2, 3)
    base.rename(tmp_path / "moved")
    said = message(ConfigError, adapter)
    assert said == f"-m {adapter}: an adapter whose base, {base}, is not there; --base-model DIR says where it is"
    np.testing.assert_array_equal(Run(adapter, base_model=str(tmp_path / "moved"))("text", WORDS, 2, 3), wanted)
    assert "its base: -m nowhere/at/all: no such directory" in message(
        ConfigError, adapter, base_model="nowhere/at/all"
    )
    changed(adapter, base_model_name_or_path="../moved")
    np.testing.assert_array_equal(Run(adapter)("text", WORDS, 2, 3), wanted)
    changed(adapter, base_model_name_or_path=None)
    assert "an adapter that does not say what its base is; --base-model DIR" in message(ConfigError, adapter)


@pytest.mark.parametrize("other", [{"hidden_size": 16}, {"num_hidden_layers": 1}])
def test_a_base_of_another_shape(adapter: Path, tmp_path: Path, other: dict[str, int]) -> None:
    settings = json.loads((tmp_path / "base" / "config.json").read_text()) | other
    config = transformers.AutoConfig.for_model(**settings)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "other")
    for file in (tmp_path / "base").glob("*token*"):
        shutil.copyfile(file, tmp_path / "other" / file.name)
    said = message(ModelError, adapter, loads=True, base_model=str(tmp_path / "other"))
    assert f"-m {adapter}: an adapter that does not fit its base {tmp_path / 'other'}: " in said
    assert said.endswith("--base-model DIR is another base")


def test_a_base_that_was_trained_since(base: Path, adapter: Path) -> None:
    """Only mmcli's own adapters know the digest of their base."""
    from mmcli.models.checkpoint import open_checkpoint
    from mmcli.models.options import ModelOptions

    digest = open_checkpoint(ModelOptions(str(base))).weights_digest
    told = {"bases": {"": {"model": str(base), "revision": None, "near": "../base", "weights": digest}}}
    (adapter / "mmcli_adapter.json").write_text(json.dumps(told))
    plan_of(adapter)
    tensors = load_file(base / "model.safetensors")
    tensors[min(tensors)] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = message(ConfigError, adapter)
    assert said.startswith(f"-m {adapter}: an adapter of {base}, whose weights were others than {base} has now")


def test_without_peft(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    said = message(ConfigError, adapter)
    assert f"-m {adapter}: an adapter needs the library peft: pip install 'mmcli[finetune]'" in said


def test_pickles(adapter: Path) -> None:
    wanted = Run(adapter)("text", WORDS, 2, 3)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    said = message(ConfigError, adapter)
    assert "adapter_model.bin, a pickle, which can run code when loaded; add --allow-pickle" in said
    np.testing.assert_array_equal(Run(adapter, allow_pickle=True)("text", WORDS, 2, 3), wanted)
    (adapter / "adapter_model.bin").unlink()
    assert "an adapter without adapter_model.safetensors" in message(ConfigError, adapter)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "ADAPTION_PROMPT"])
def test_kinds_that_are_no_change_of_weights(adapter: Path, kind: str) -> None:
    changed(adapter, peft_type=kind)
    assert f"a {kind} adapter is no change of weights, so it cannot be merged" in message(ConfigError, adapter)


def test_an_adapter_of_an_adapter(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "second")
    changed(tmp_path / "second", base_model_name_or_path=str(adapter))
    assert f"its base, {adapter}, is an adapter itself" in message(ConfigError, tmp_path / "second")


def test_what_asks_for_its_own_code(base: Path, adapter: Path) -> None:
    (adapter / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"trust_remote_code": True})
    )
    assert "asks for trust_remote_code, which is refused" in message(ConfigError, adapter)


def test_a_damaged_file(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"-m {adapter}: cannot load it" in message(ModelError, adapter, loads=True)

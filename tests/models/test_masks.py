"""A mask as attention takes it: the same vectors, and no question to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_dual
import tiny_encoders
import torch
import transformers as hf
from model_runs import Run

from mmcli.models.classifier_runner import head_tower
from mmcli.models.masks import TAKES_WHOLE, for_attention

CUDA = torch.device("cuda")


def loaded(name: str, folder: Path) -> Any:
    return hf.AutoModel.from_pretrained(tiny_encoders.TEXTS[name](folder)).eval()


def padded(model: Any) -> dict[str, torch.Tensor]:
    """Three texts of 9, 4 and 1 tokens."""
    torch.manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    filler = model.config.pad_token_id or 0
    tokens = torch.randint(5, 20, (3, 9)).where(mask == 1, torch.tensor(filler))
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("name", sorted(tiny_encoders.TEXTS))
@torch.inference_mode()
def test_tokens_are_what_they_are_behind_a_mask(name: str, tmp_path: Path) -> None:
    model = loaded(name, tmp_path)
    inputs = padded(model)
    prepared = for_attention(model, CUDA)(inputs)
    if model.config.model_type not in TAKES_WHOLE:
        assert prepared is inputs
        return
    assert tuple(prepared["attention_mask"].shape) == (3, 1, 1, 9)
    there = inputs["attention_mask"] == 1
    wanted, found = (model(**given).last_hidden_state[there] for given in (inputs, prepared))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(n for n in tiny_encoders.TEXTS if n in TAKES_WHOLE))
@torch.inference_mode()
def test_nothing_is_asked_of_the_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bool(tensor)` and `tensor.item()` wait for all that a device has to do."""
    model = loaded(name, tmp_path)
    inputs = for_attention(model, CUDA)(padded(model))
    for question in ("__bool__", "item", "tolist", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, question, _refuse)
    model(**inputs)


@pytest.mark.parametrize("name", ["clip", "metaclip_2", "xclip"])
def test_nothing_is_asked_of_the_device_by_a_text_tower(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tiny_dual.BUILDERS[name](tmp_path), device="cpu")
    batch = run.runner.collate([run.processor("text", text) for text in ("a photo of a cat", "a dog")])
    assert not batch.tensors["attention_mask"].all()
    for question in ("__bool__", "item", "tolist", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, question, _refuse)
    run.runner.forward(batch)


def _refuse(*_: Any) -> None:
    raise AssertionError("the device was asked")


def test_elsewhere_the_mask_stays(tmp_path: Path) -> None:
    model = loaded("bert", tmp_path)
    inputs = padded(model)
    assert for_attention(model, torch.device("cpu"))(inputs) is inputs
    model.config.is_decoder = True
    assert for_attention(model, CUDA)(inputs) is inputs


@torch.inference_mode()
def test_heads_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded("bert", tmp_path)
    model = hf.AutoModelForSequenceClassification.from_config(base.config).eval()
    wanted = head_tower(model, "text")(padded(model))
    monkeypatch.setattr(type(model), "device", CUDA)
    found = head_tower(model, "text")(padded(model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmcli.cli.advice import Setting, advise

SLOW_DECODING = Setting(
    device="cpu", dtype="float32", cores=4, num_workers=2, cores_busy=0.5, process_share=0.1, min_image_size=224
)


def test_more_workers_only_where_cores_are_idle() -> None:
    assert "--num-workers 4" in (advise("decode", SLOW_DECODING) or "")
    assert "--num-workers 4, or auto" in (advise("decode", replace(SLOW_DECODING, num_workers=0)) or "")
    for busy in (replace(SLOW_DECODING, cores_busy=0.97), replace(SLOW_DECODING, num_workers=4, cores_busy=0.8)):
        assert "--num-workers" not in (advise("decode", busy) or "")


def test_smaller_pictures_only_where_decoding_is_what_takes_the_time() -> None:
    assert "448 pixels" in (advise("decode", SLOW_DECODING) or "")
    processor = advise("decode", replace(SLOW_DECODING, process_share=0.9)) or ""
    assert "448" not in processor
    assert "the model's own processor" in processor
    assert "--exact-decode" in (advise("decode", replace(SLOW_DECODING, exact_decode=True)) or "")


def test_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda known=known: known)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        said = advise("model", SLOW_DECODING) or ""
        assert ("--dtype bfloat16" in said) == known
        assert "a GPU" in said
        short = advise("model", replace(SLOW_DECODING, dtype="bfloat16")) or ""
        assert ("--dtype float32" in short) != known
        assert "--dtype bfloat16" not in short
    assert "--dtype" not in (advise("model", replace(SLOW_DECODING, dtype="bfloat16", device="cuda:0")) or "")
    on_gpu = advise("model", replace(SLOW_DECODING, device="cuda:0")) or ""
    assert "--dtype bfloat16" in on_gpu
    assert "a GPU" not in on_gpu.replace("a GPU computes", "")
    assert "--batch-size auto instead of 1" in (advise("model", replace(SLOW_DECODING, batch_size="1")) or "")


def test_workers_that_wait_are_told_from_those_that_compute() -> None:
    full = replace(SLOW_DECODING, num_workers=4)
    assert "a faster disk" in (advise("decode", replace(full, computing=0.3)) or "")
    assert "a faster disk" not in (advise("decode", replace(full, computing=0.95)) or "")
    assert "--num-workers 0" in (advise("transport", full) or "")
    assert advise("transport", replace(full, num_workers=0)) is None


def test_nothing_is_advised_where_nothing_limits() -> None:
    assert advise(None, SLOW_DECODING) is None
    assert advise("collate", SLOW_DECODING) is None

"""What would make a run faster, of what can be done on this machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mmcli.cli.compose import Arguments
from mmcli.core.protocols import ModelPlan
from mmcli.core.report import Report

# Cores are all in use from here on: more workers would only share them.
ALL_BUSY = 0.85
# Decode workers that have a core for less of their busy time wait for files, or for other processes.
WAITING = 0.5


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run was told, as far as it matters for its speed.

    dtype  of the model; None: it has none (a server's, a fake one)
    process_share  of the seconds of decode workers: the model's processor
    computing      the share of their busy time in which workers had a core
    min_image_size  what the model's processor makes of a picture's shorter side
    """

    device: str | None
    dtype: str | None
    cores: int
    num_workers: int
    cores_busy: float
    process_share: float
    computing: float = 1.0
    compiled: bool = False
    exact_decode: bool = False
    min_image_size: int | None = None
    batch_size: str = "auto"
    server: bool = False

    @classmethod
    def of(cls, report: Report, arguments: Arguments, plan: ModelPlan) -> Setting:
        """Of a run that has ended."""
        decode = report.shares()["decode"]
        workers_s = report.seconds["decode"] + report.seconds["process"]
        return cls(
            device=report.device,
            # A head's plan has that of the model which gives its vectors.
            dtype=getattr(getattr(plan, "base", plan), "dtype", None),
            cores=report.cores,
            num_workers=report.num_workers,
            cores_busy=report.cores_busy(),
            process_share=decode["process"] / max(sum(decode.values()), 1e-9),
            computing=report.workers_cpu_s / workers_s if report.num_workers and workers_s else 1.0,
            compiled=bool(getattr(getattr(plan, "base", plan), "compile", False)),
            exact_decode=plan.decode.exact_decode,
            min_image_size=plan.decode.min_image_size,
            batch_size=arguments.run.batch_size,
            server=(arguments.model.model or "").startswith("openai:"),
        )


def advise(limit: str | None, setting: Setting) -> str | None:
    """What to change where `limit` (see Report.limited_by) is what limits; None: nothing that we know of."""
    match limit:
        case "decode":
            found = _decode(setting)
        case "model":
            found = _model(setting)
        case "read":
            found = ["inputs, or the manifest that lists them, on a faster disk"]
        case "write":
            found = ["-o on a faster disk"]
        case "transport":
            found = ["--num-workers 0, which gives up the protection from decoders that crash"] * bool(
                setting.num_workers
            )
        case _:
            found = []
    return "; or ".join(found) or None


def _decode(setting: Setting) -> list[str]:
    advice = []
    spare = setting.cores_busy < ALL_BUSY
    if setting.num_workers == 0 and setting.cores > 1:
        advice.append(f"--num-workers {setting.cores}, or auto")
    elif setting.num_workers < setting.cores and spare:
        advice.append(f"--num-workers {setting.cores}: of {setting.cores} cores {setting.num_workers} decode")
    elif setting.computing < WAITING:
        advice.append("a faster disk, or less other work on this machine: the workers wait more than they compute")
    if setting.exact_decode:
        advice.append("without --exact-decode, large JPEGs are decoded at reduced scale")
    if setting.process_share > 0.5:
        advice.append("more cores: the model's own processor takes most of it")
    elif setting.min_image_size is not None:
        advice.append(
            f"pictures stored smaller: {2 * setting.min_image_size} pixels on the shorter side are enough here"
        )
    return advice or (["more cores"] if not spare else [])


def _model(setting: Setting) -> list[str]:
    if setting.server:
        return ["--concurrency, as far as the server bears it"]
    advice = []
    on_cpu = setting.device in (None, "cpu")
    if setting.dtype == "float32" and (not on_cpu or cpu_knows_bfloat16()):
        what = "this processor computes it" if on_cpu else "a GPU computes it"
        advice.append(f"--dtype bfloat16 (cosine 0.999 to float32): {what} faster")
    elif setting.dtype == "bfloat16" and on_cpu and not cpu_knows_bfloat16():
        # An EPYC of family 25, model 1 (AVX2): linear layers of 64 rows 3 times as long, of 2,560 rows 9 times.
        advice.append("--dtype float32: this processor has no bfloat16, and takes several times as long for it")
    if setting.batch_size != "auto":
        advice.append(f"--batch-size auto instead of {setting.batch_size}")
    if on_cpu and setting.dtype is not None:
        advice.append("a GPU")
    elif not setting.compiled and setting.dtype is not None:
        advice.append("--compile, for a long run")
    return advice


def cpu_knows_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 (AVX512-BF16, AMX): without them it is slower there."""
    torch = sys.modules.get("torch")
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch is not None and any(getattr(torch.cpu, name, bool)() for name in checks)

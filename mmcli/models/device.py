"""Which device and which precision; an automatic choice comes with its reason."""

from __future__ import annotations

import ctypes
import os
import sys

from mmcli.core.errors import ConfigError, ModelError

DTYPES = ("float32", "bfloat16", "float16")
# What people write for them.
SHORT_DTYPES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def check_device(name: str) -> None:
    """Raise ConfigError when `name` is no device's name. Whether it is there, `choose_device` finds out."""
    kind, colon, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and index.isdigit())):
        meant = "; did you mean cuda?" if kind in ("gpu", "GPU", "CUDA", "nvidia") else ""
        raise ConfigError(f"--device {name!r} is not one of auto, cpu, cuda, cuda:N, mps{meant}")


def choose_device(name: str) -> tuple[str, str]:
    """(device, reason). Raises ConfigError for a name that is none, ModelError when the device is not there."""
    check_device(name)
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda:0", f"a GPU is there: {torch.cuda.get_device_name(0)}"
        if torch.backends.mps.is_available():
            return "mps", "an Apple GPU is there"
        hidden = " that CUDA_VISIBLE_DEVICES shows" if os.environ.get("CUDA_VISIBLE_DEVICES") is not None else ""
        return "cpu", f"no GPU{hidden}"
    kind, _, index = name.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            there = f"there are {count}, cuda:0 to cuda:{count - 1}" if count else "no CUDA device can be used here"
            raise ModelError(f"--device {name}: {there}", hint="--device auto or --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ModelError("--device mps: no Apple GPU can be used here", hint="--device auto or --device cpu")
    return name, "as asked for"


def choose_dtype(name: str) -> tuple[str, str]:
    """(dtype, reason). Raises ConfigError.

    Automatic is float32 on every device: the dtype is part of a run's fingerprint, the device is not, and a run
    begun on one machine may go on on another. bfloat16 is twice as fast on two CPU cores (ViT-B/32: 38 to 18
    pictures a second, cosine 0.99994) and more on a GPU: for whom that is near enough, --dtype bfloat16.
    """
    if name == "auto":
        return "float32", "exact, and the same on every device"
    if name not in DTYPES:
        meant = f"; did you mean {SHORT_DTYPES[name]}?" if name in SHORT_DTYPES else ""
        raise ConfigError(f"--dtype {name!r} is not one of auto, {', '.join(DTYPES)}{meant}")
    return name, "as asked for"


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next batch (Linux, glibc).

    By default it maps every tensor above 32 MB anew, and the kernel zeroes all of its pages: for MobileNetV2 at
    batch 32 that was 68 of 94 ms of CPU time per picture, and is 2.5 ms with this.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # musl has its own ways.
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 1 << 30)


def exact_convolutions() -> None:
    """Let cuDNN compute float32 as float32: by default it rounds what convolutions multiply to 10 bits (TF32)."""
    import torch

    torch.backends.cudnn.allow_tf32 = False

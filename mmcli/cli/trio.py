"""torch, torchvision and torchaudio are compiled for one another: do those installed fit? Imports none of them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from mmcli.core.errors import ModelError

# torch -> versions of the others that work with it. torchaudio's last release serves two of torch.
FITTING = {
    "2.11": {"torchvision": ("0.26",), "torchaudio": ("2.11",)},
    "2.12": {"torchvision": ("0.27",), "torchaudio": ("2.11",)},
}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def check_torch_trio() -> None:
    """Raise ModelError when torch, torchvision and torchaudio do not fit one another. 2 ms.

    Otherwise transformers fails on import: `operator torchvision::nms does not exist`, `undefined symbol`.
    """
    found = {name: _version(name) for name in ("torch", "torchvision", "torchaudio")}
    torch = found["torch"]
    if torch is None:
        raise ModelError("torch is not installed here", hint=_fix("2.12", cpu=False))
    wanted = FITTING.get(_release(torch), {})
    fits = all(found[name] is None or _release(str(found[name])) in them for name, them in wanted.items())
    if fits and not _builds_differ([v for v in found.values() if v is not None]):
        return
    installed = ", ".join(f"{name} {v}" for name, v in found.items() if v is not None)
    release = _release(torch) if wanted else "2.12"
    raise ModelError(f"these do not work together: {installed}", hint=_fix(release, cpu=_is_cpu(torch)))


def _builds_differ(versions: list[str]) -> bool:
    """Whether CPU-only wheels are mixed with others. Elsewhere than on x86-64, CPU-only ones may not say so."""
    return platform.machine() in ("x86_64", "AMD64") and len({_is_cpu(v) for v in versions}) > 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> str:
    """`2.12.1+cpu` -> `2.12`"""
    return ".".join(text.partition("+")[0].split(".")[:2])


def _is_cpu(text: str) -> bool:
    return text.endswith("+cpu")


def _fix(release: str, *, cpu: bool) -> str:
    # --force-reinstall: for pip, 0.27.1+cpu is as good as 0.27.1.
    names = {"torch": release, **{name: them[0] for name, them in FITTING[release].items()}}
    packages = " ".join(f'"{name}=={number}.*"' for name, number in names.items())
    index = f" --index-url {CPU_INDEX}" if cpu else ""
    return f"python -m pip install --force-reinstall --no-deps {packages}{index}"

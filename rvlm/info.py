"""`rvlm info`: what is installed, what was built, which backend every op would use, and why something is missing."""

import importlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import rvlm

__all__ = ["collect", "diagnose_torchvision", "text"]

PACKAGES = ("torch", "torchvision", "triton", "open_clip_torch", "timm", "safetensors", "jsonargparse", "scikit-learn")


def collect() -> dict[str, Any]:
    """Everything as plain data. Works whatever is missing or broken."""
    info: dict[str, Any] = {
        "rvlm": rvlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "build": _build(),
        "problems": [],
    }
    try:
        import torch

        cuda = torch.cuda.is_available()
        info["device"] = torch.cuda.get_device_name() if cuda else "cpu"
        info["torch_cuda"] = torch.version.cuda
        info["threads"] = torch.get_num_threads()
        from rvlm.ops import backends

        info["ops"] = backends()
    except Exception as error:
        info["problems"].append(f"torch cannot be imported ({_one_line(error)}): reinstall it with pip install torch")
        return info
    for module in ("torchvision", "open_clip"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary can raise anything
            info["problems"].append(diagnose_torchvision(module, error, torch.version.cuda))
            break  # open_clip fails for the same reason
    return info


def diagnose_torchvision(module: str, error: BaseException, torch_cuda: str | None) -> str:
    """One sentence on why an import failed, with the cure."""
    reason = _one_line(error)
    broken_pair = "torchvision::nms" in reason or "libc10_cuda" in reason or "libtorch_cuda" in reason
    if broken_pair and torch_cuda is None:
        return (
            f"{module} cannot be imported: torch {_version('torch')} is a CPU-only build, torchvision "
            f"{_version('torchvision')} a CUDA build, and they do not fit ({reason}). Install a matching pair: "
            "pip install --force-reinstall torch torchvision"
        )
    if broken_pair:
        return (
            f"{module} cannot be imported: torch {_version('torch')} and torchvision {_version('torchvision')} do not "
            f"fit ({reason}). Install a matching pair: pip install --force-reinstall torch torchvision"
        )
    return f"{module} cannot be imported ({reason}): pip install --upgrade torch torchvision open_clip_torch"


def text(info: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"rvlm {info['rvlm']}, Python {info['python']}, {info['platform']}"]
    lines.append(
        "packages  " + ", ".join(f"{name} {version or 'missing'}" for name, version in info["packages"].items())
    )
    if "device" in info:
        lines.append(
            f"device    {info['device']}, torch built for CUDA {info['torch_cuda']}, {info['threads']} threads"
        )
    build = info["build"]
    lines.append(f"built     {build['ext']}" + (f" ({build['reason']})" if build.get("reason") else ""))
    if "ops" in info:
        lines.append(
            "ops       on cpu / on cuda"
            + ("" if info["ops"]["forced"] == "auto" else f", forced: {info['ops']['forced']}")
        )
        lines += [f"  {name:<15} {on['cpu']} / {on['cuda']}" for name, on in info["ops"]["ops"].items()]
        lines += [f"missing   {name}: {reason}" for name, reason in info["ops"]["missing"].items()]
    lines += [f"PROBLEM   {problem}" for problem in info["problems"]]
    return "\n".join(lines)


def _build() -> dict[str, Any]:
    """What setup.py noted when it built the compiled parts, and what the pybind11 module says of itself."""
    file = Path(rvlm.__file__).parent / "_build_info.json"
    build = json.loads(file.read_text()) if file.is_file() else {"ext": "none", "reason": "no build was recorded"}
    try:
        build["host_info"] = importlib.import_module("rvlm._host").build_info()
    except ImportError as error:
        build["host_info"] = None
        build["host_missing"] = str(error)
    return build


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

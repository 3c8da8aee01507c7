"""Backends that exist here, and batches that hold the awkward cases."""

import os

import pytest
import torch

from rvlm import ops


def _backends() -> list[str]:
    found = ["reference"]
    if "cpp" not in ops.backends()["missing"]:
        found.append("cpp")
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        found.append("triton")
    return found


@pytest.fixture(params=_backends())
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def batch(device):
    """make(shape, dtype, memory_format) -> x on the uint8 grid, x_adv near it, grad with zeros, NaNs and a zero row."""

    def make(shape=(5, 3, 17, 19), dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 256, shape, generator=generator).to(dtype) / 255
        x_adv = (x + (torch.rand(shape, generator=generator, dtype=dtype) - 0.5) * 0.08).clamp(0, 1)
        grad = torch.randn(shape, generator=generator, dtype=dtype)
        flat = grad.view(shape[0], -1)
        flat[0, :3] = 0.0
        if shape[0] > 3:
            flat[3] = 0.0
        return [t.to(device=device, memory_format=memory_format) for t in (x, x_adv, grad)]

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """On a GPU only some ops have CUDA C++ beside Triton; the error that says so is a reason to skip."""
    try:
        return (yield)
    except RuntimeError as error:
        if "has no 'cpp' backend for cuda tensors" in str(error):
            pytest.skip(str(error))
        raise

"""Build of the optional compiled parts: rvlm._C (C++ for CPU), rvlm._C_cuda (CUDA) and rvlm._host (pybind11).

Environment:
    RVLM_BUILD_EXT=0   build nothing: pure Python, every op runs its eager reference on the CPU.
    RVLM_BUILD_EXT=1   the C++ part must build; a failure is an error.
    FORCE_CUDA=1       the CUDA part must build too, with nvcc, even if no GPU is visible.
    TORCH_CUDA_ARCH_LIST  as in torch; default "8.0;9.0+PTX".
Without them the build takes what the machine offers and falls back one level where a compile fails; the reason is
printed in one line and repeated by `rvlm info`.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CXX_FLAGS = [
    *("-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fopenmp-simd"),  # the last three change no value
]
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030A0000")]


def _host_torch_path() -> None:
    """Lets an isolated build see the torch of the environment that is being installed into."""
    purelib = sysconfig.get_paths()["purelib"]
    if purelib not in sys.path:
        sys.path.append(purelib)


def _cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "rvlm._C",
        ["csrc/module.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[*STABLE_ABI, ("RVLM_MODULE", "_C")],
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )


def _cuda_extension():
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return CUDAExtension(
        "rvlm._C_cuda",
        ["csrc/module.cpp", "csrc/cuda/register.cpp", "csrc/cuda/steps.cu", "csrc/cuda/attention.cu"],
        include_dirs=[os.path.abspath("csrc")],
        library_dirs=_cudart_dirs(),
        define_macros=[*STABLE_ABI, ("RVLM_MODULE", "_C_cuda"), ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++20", "-fmad=false", "-lineinfo"]},
        py_limited_api=True,
    )


def _cudart_dirs() -> list[str]:
    """Where the toolkit behind nvcc keeps libcudart; torch looks beside nvcc, which may be a wrapper elsewhere."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = os.path.join(CUDA_HOME or "/usr", "bin", "nvcc")
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True).stderr
    top = next((line.split("=", 1)[1].strip() for line in plan.splitlines() if line.startswith("#$ TOP=")), None)
    return [] if top is None else [os.path.join(top, "lib64"), os.path.join(top, "lib")]


def _host_extension():
    import pybind11

    return Extension(
        "rvlm._host",
        ["csrc/host.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-O2", "-g0", "-std=c++17", "-fvisibility=hidden"],
        language="c++",
    )


class BuildExt(build_ext):
    """Builds level by level. torch is imported here and not at the top: metadata hooks run without it."""

    def run(self) -> None:
        self.built, declared = [], self.distribution.ext_modules
        self._run_levels()
        self.extensions, self.distribution.ext_modules = self.built, declared

    def _run_levels(self) -> None:
        wanted = os.environ.get("RVLM_BUILD_EXT")
        force_cuda = os.environ.get("FORCE_CUDA") == "1"
        info = {"ext": "none", "host": False, "reason": None, "torch": None, "cuda": None}
        if wanted == "0" or (sys.platform == "win32" and wanted != "1"):
            info["reason"] = "RVLM_BUILD_EXT=0" if wanted == "0" else "Windows installs are pure Python"
            return self._write(info)
        reasons = []
        try:
            self._build(_host_extension())
            info["host"] = True
        except Exception as error:  # a compiler can fail in any way; the level below still works
            reasons.append(f"rvlm._host was not built: {_one_line(error)}")
        try:
            _host_torch_path()
            import torch

            info["torch"] = torch.__version__
            self._build(_cpu_extension())
            info["ext"] = "cpu"
        except Exception as error:
            if wanted == "1" or force_cuda:
                raise
            reasons.append(f"the C++ part was not built: {_one_line(error)}")
        if info["ext"] == "cpu":
            missing = self._cuda_missing(torch)
            if force_cuda or not missing:
                try:
                    self._build(_cuda_extension())
                    info["ext"], info["cuda"] = "cuda", torch.version.cuda
                except Exception as error:
                    if force_cuda:
                        raise
                    reasons.append(f"the CUDA part was not built: {_one_line(error)}")
            else:
                reasons.append(f"the CUDA part was not built: {missing}")
        info["reason"] = "; ".join(reasons) or None
        self._write(info)

    @staticmethod
    def _cuda_missing(torch) -> str | None:
        from torch.utils.cpp_extension import CUDA_HOME

        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a build without CUDA"
        if CUDA_HOME is None or shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) is None:
            return "nvcc was not found (set CUDA_HOME)"
        if not torch.cuda.is_available():
            return "no GPU is visible (FORCE_CUDA=1 builds it all the same)"
        return None

    def _build(self, extension: Extension) -> None:
        if hasattr(extension, "py_limited_api") and extension.name != "rvlm._host":
            from torch.utils.cpp_extension import BuildExtension

            command = BuildExtension(self.distribution)
        else:
            command = build_ext(self.distribution)
        command.inplace, command.build_lib, command.build_temp = self.inplace, self.build_lib, self.build_temp
        self.distribution.ext_modules = [extension]
        command.ensure_finalized()
        command.run()
        self.built.append(extension)

    def _write(self, info: dict) -> None:
        folder = Path("rvlm") if self.inplace else Path(self.build_lib) / "rvlm"
        folder.mkdir(parents=True, exist_ok=True)
        for name, built in (("_C", info["ext"] != "none"), ("_C_cuda", info["ext"] == "cuda"), ("_host", info["host"])):
            for stale in folder.glob(f"{name}.*so") if not built else ():
                stale.unlink()  # of an earlier build in place: what is imported must be what is reported
        (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        print(f"rvlm: built {info['ext']}" + (f" ({info['reason']})" if info["reason"] else ""))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + " ..."


setup(
    # kernels/ installs as rvlm.kernels: "kernels" itself is the import name of another package on PyPI.
    packages=[*find_packages(include=["rvlm", "rvlm.*"]), "rvlm.kernels"],
    package_dir={"rvlm": "rvlm", "rvlm.kernels": "kernels"},
    package_data={
        "rvlm.recipes": ["**/*.yaml"],
        "rvlm.data": ["*.yaml"],
        "rvlm.report": ["*.html"],
        "rvlm": ["_build_info.json", "protocols/*.yaml", "published/*.yaml"],
    },
    # The sources are listed for the sdist; BuildExt replaces this entry by what the machine can build.
    ext_modules=[Extension("rvlm._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildExt},
)

"""PEP 517 backend: setuptools, plus torch as a build requirement only where the host has none.

The C++ part is compiled against torch's headers, but through its stable ABI, so the torch that an isolated build
resolves need not be the torch that runs it. Where the environment that is being installed into already has torch,
setup.py finds that one (see `_host_torch_path` there) and nothing is downloaded.
"""

import importlib.machinery
import os
import shutil
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (every hook that is not overridden below)

__all__ = list(build_meta.__all__)


def _torch_requirement() -> list[str]:
    if sys.platform == "win32" or os.environ.get("RVLM_BUILD_EXT") == "0":
        return []
    if not any(shutil.which(cxx) for cxx in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return []
    paths = [*sys.path, sysconfig.get_paths()["purelib"]]
    found = importlib.machinery.PathFinder.find_spec("torch", paths) is not None
    return [] if found else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()

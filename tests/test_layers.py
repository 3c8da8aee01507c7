"""The house rules that imports must keep: who may import whom, and what `import rvlm` does not bring along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# layer -> rvlm layers that it may import. cli, commands, demo and info see everything.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "ops": {"ops", "kernels", "_C", "_C_cuda"},
    "profiling": {"profiling", "_host"},
    "units": set(),
    "files": set(),
    "markdown": set(),
    "plugins": set(),
    "ranks": set(),
    "attacks": {"attacks", "ops", "_host"},
    "compat": {"compat", "attacks"},
    "data": {"data"},
    "models": {"models", "data", "ops"},
    "lvlm": {"lvlm", "evaluation", "methods", "attacks", "models", "data"},
    "methods": {"methods", "attacks", "models", "data", "ops"},
    "training": {"training", "evaluation", "methods", "attacks", "models", "data", "ops"},
    "evaluation": {"evaluation", "attacks", "models", "data"},
    "analysis": {"analysis", "evaluation", "attacks", "models", "data"},
    "report": {"report", "evaluation", "attacks", "models", "data"},
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import absolutely, not relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def _layers(path: Path) -> set[str]:
    leaves = {"files", "markdown", "plugins", "profiling", "ranks", "units", "__version__"}  # leaves that all may use
    return {name.split(".")[1] for name in _imports(path) if name.startswith("rvlm.")} - leaves


def _files(layer: str) -> list[Path]:
    if layer == "kernels":
        return sorted((ROOT / "kernels").rglob("*.py"))
    single = ROOT / "rvlm" / f"{layer}.py"
    return [single] if single.exists() else sorted((ROOT / "rvlm" / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_only_what_lies_below(layer):
    files = _files(layer)
    assert files, f"no files in layer {layer}: the rule would hold of nothing"
    for path in files:
        above = _layers(path) - MAY_IMPORT[layer]
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}"


def test_every_layer_has_a_rule():
    layers = {p.parent.name for p in (ROOT / "rvlm").glob("*/__init__.py")} - {"recipes", "commands"}
    assert layers <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", ["rvlm", "rvlm.ops", "rvlm.attacks"])
def test_light_imports(module):
    code = f"import sys, {module}; print(*[m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"open_clip", "torchvision", "matplotlib", "sklearn", "triton"} | ({"torch"} if module == "rvlm" else set())
    assert not heavy & set(loaded)


def test_the_kernels_package_marker_is_empty():
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""

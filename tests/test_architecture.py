"""The rooms of the house: imports point one way, every module imports bare, the layout in the docs is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("toolchain", "passes", "runtimes")
MODULES = sorted(p.relative_to(ROOT) for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] != "toolchain"], ids=str)
def test_passes_and_runtimes_import_nothing_of_ours_but_their_own(path: Path) -> None:
    assert imports(path) & set(PACKAGES) <= {path.parts[0]}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "runtimes"], ids=str)
def test_runtimes_import_no_onnx_and_no_torch_on_top(path: Path) -> None:
    top = {
        name.split(".")[0]
        for node in ast.parse((ROOT / path).read_text()).body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not top & {"onnx", "onnx_ir", "onnxscript", "torch", "onnxruntime"}


def test_every_module_imports_without_torch_transformers_and_pillow() -> None:
    """In one process in which those cannot be imported: the core is installable without them.

    Not ``source_*.py``: they build torch modules, and are reached through ``models.load_torch``, which asks for torch.
    Nor ``torch_*.py``, which are reached through ``finetune.fine_tune``, which does the same.
    """
    bare = [p for p in MODULES if p.stem != "__main__" and not p.stem.startswith(("source_", "torch_"))]
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in bare]
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'transformers', 'PIL', 'safetensors', 'timm', 'torchvision'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import toolchain.cli"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_layout_in_the_architecture_is_true() -> None:
    """Every module stands in docs/architecture.md, and every module named there exists."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for package in (*PACKAGES, "toolchain/serving"):
        block = re.search(rf"^{package}/$(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
        assert block, f"docs/architecture.md has no room {package}/"
        named = set(re.findall(r"^  ([a-z_0-9]+\.py) ", block[1], re.MULTILINE))
        real = {p.name for p in MODULES if p.parent == Path(package)} - {"__init__.py"}
        assert named - {"__init__.py"} == real, f"{package}: the layout differs from the folder"


def test_every_pass_has_a_test_of_its_name() -> None:
    import passes

    missing = [name for name in passes.PASSES if not (ROOT / "tests" / "passes" / f"test_{name}.py").exists()]
    assert not missing


def test_no_path_of_a_machine_is_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    homes = [str(Path.home()) + "/", str(ROOT) + "/"]
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            text = path.read_text(errors="replace")
            assert not [h for h in homes if len(h) > 4 and h in text], name

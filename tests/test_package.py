"""What the package promises of itself: laziness, direction of imports, sizes of files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxaccel

ROOT = Path(jaxaccel.__file__).parent
TOOLS = {"nn", "augment", "data", "train", "measure", "_forms", "_tuned"}
TRANSFORMS = {"fold", "prune", "quantize", "distill"}
# Each may import those before it.
LAYERS = [
    *(
        "_apart",
        "_progress",
        "_recipe",
        "_stored",
        "_graph",
        "_slices",
        "_trace",
        "_rewritten",
        "_dataflow",
        "_disjoint",
        "_axes",
        "_rules",
        "_labels",
    ),
    "_shrink",
    *("_table", "_figure", "_forms", "_tuned", "_timing", "_choices", "_forms_report", "_autotune"),
    *("_groups", "_check_rule", "fold", "_select", "_functional", "measure", "quantize", "prune"),
    *("export", "_compress", "_commands", "__main__"),
]


def imports(path: Path) -> set[str]:
    """Modules of jaxaccel that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxaccel"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if parts[1:] else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("jaxaccel.")}
    return found


def files(modules: set[str]) -> list[Path]:
    return [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0].split(".")[0] in modules]


def test_arrows():
    for path in files(TOOLS):
        assert not imports(path) & TRANSFORMS, path
    for path in files(TRANSFORMS):
        budget = {"measure"} if path.parent.name == "prune" else set()  # of latency
        assert imports(path) & TOOLS <= budget, path
    assert len(files(TOOLS)) >= len(TOOLS)


def test_layers_of_the_analysis():
    for place, name in enumerate(LAYERS):
        for path in files({name}):
            assert imports(path) <= {*LAYERS[: place + 1]}, path


def test_only_one_file_touches_jaxprs():
    names = r'""".*?"""|"[\w ]*"|jaxpr_primitive='  # the last is a keyword of jax2onnx
    touching = [
        p for p in ROOT.rglob("*.py") if "jaxpr" in re.sub(names, "", p.read_text(), flags=re.S)
    ]
    assert {p.name for p in touching} == {"_graph.py"}


def test_only_public_jax():
    for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "experiments").rglob("*.py")]:
        assert "jax._src" not in path.read_text(), path


def test_files_stay_short():
    folders = (ROOT, ROOT.parent / "experiments", ROOT.parent / "tests")
    long = {
        str(p): n
        for f in folders
        for p in f.rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_a_bare_import_is_light():
    code = (
        "import sys, jaxaccel; "
        "print([m for m in ('flax', 'optax', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_name_loads():
    for name in dir(jaxaccel):
        assert getattr(jaxaccel, name) is not None
    with pytest.raises(AttributeError, match="module 'jaxaccel' has no attribute 'exports'"):
        _ = jaxaccel.exports  # pyright: ignore[reportAttributeAccessIssue]

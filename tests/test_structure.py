"One straight line of notebooks: what each may import, what importing the library may load, what a committed notebook holds."
import ast
import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PKG = "hessian_surgery_nb"
# The line of reading. A new chapter takes its place here; `index` is read first and imports anything.
LINE = """000_testbed 000a_layers 000b_ranks 000c_guards 000d_losses 00_hvp 01_lanczos 02_slq 02a_data 02b_models 02c_train 02d_runs 03_spike_validation 03a_class_structure 03b_spectrum_type
04_sensitivity 05_surgery 05a_baselines 05b_linearised 05c_comparison 06_deflation 07_isic 08_effective_rank 08a_experiments 09_paper 09a_own 09b_pages 09c_commands 10_cli 10a_processes""".split()
NOTEBOOKS = sorted((ROOT/"nbs").glob("[!._]*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if p.stem != "index"]
HEAVY = ("torchvision", "matplotlib", "sklearn")  # imported by the functions that use them, not by the library

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def text(s): return s if isinstance(s, str) else "".join(s)
def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def code_cells(path): return [c for c in cells(path) if c["cell_type"] == "code"]
def outputs(path): return [o for c in code_cells(path) for o in c["outputs"]]
def module(path): return {"10a_processes": "__main__"}.get(path.stem, path.stem.partition("_")[2]) # what `python -m` runs has a name of its own


def siblings(source):
    "Names of the library's modules that `source` imports, at its top or inside its functions."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            frm = ".".join(([PKG] if node.level else []) + ([node.module] if node.module else []))
            names = [f"{PKG}.{a.name}" for a in node.names] if frm == PKG else [frm]
        else: continue
        found |= {n.split(".")[1] for n in names if n.startswith(PKG + ".") and "__" not in n}
    return found


# --- one line

def test_reading_order_is_sort_order():
    assert sorted(LINE) == LINE
    assert [p.stem for p in CHAPTERS if p.stem not in LINE] == [], "give the new chapter its place in LINE"


@every_chapter
def test_module_is_named_after_its_notebook(path):
    declared = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(text(c["source"]) for c in code_cells(path)), re.M)
    assert declared == [module(path)]
    assert (ROOT/PKG/f"{module(path)}.py").is_file(), "run nbdev_export"


def test_every_module_has_its_notebook():
    modules = {p.stem for p in (ROOT/PKG).rglob("*.py") if p.stem[0] != "_" or p.stem == "__main__"}
    assert modules == {module(p) for p in CHAPTERS}


def test_siblings_finds_every_way_to_import():
    ways = ["import hessian_surgery_nb.a", "import hessian_surgery_nb.a as b", "from hessian_surgery_nb import a", "from . import a",
            "from .a import b", "from hessian_surgery_nb.a import *", "def f():\n    from .a.b import c"]
    assert [siblings(w) for w in ways] == [{"a"}] * len(ways)
    assert siblings("import torch, a.b\nfrom a import hessian_surgery_nb\nimport hessian_surgery_nb") == set()


def above(path): return {module(p) for p in CHAPTERS[:CHAPTERS.index(path)]}


@every_chapter
def test_module_imports_only_what_stands_above_it(path):
    assert siblings((ROOT/PKG/f"{module(path)}.py").read_text(encoding="utf-8")) <= above(path)


@every_chapter
def test_notebook_imports_only_what_stands_above_it(path):
    "Lesson cells too: all that reads as Python, without lines that start with % or !."
    for cell in code_cells(path):
        if text(cell["source"]).startswith("%%"): continue
        source = re.sub(r"^(\s*)[%!].*$", r"\1pass", text(cell["source"]), flags=re.M)
        assert siblings(source) <= above(path), text(cell["source"])


# --- light to import

def test_import_loads_nothing_heavy():
    modules = [PKG, *(f"{PKG}.{module(p)}" for p in CHAPTERS)]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    heavy = [h for h in {HEAVY!r} if h in sys.modules]
    if heavy: sys.exit(f"import {{name}} loads {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- clean to commit

@every_notebook
def test_notebook_is_clean(path):
    assert all(c["execution_count"] is None for c in code_cells(path))
    assert all(o.get("execution_count") is None for o in outputs(path))
    shown = [text(o.get("text", "")) for o in outputs(path)]
    shown += [text(v) for o in outputs(path) for k, v in o.get("data", {}).items() if k.startswith("text/")]
    assert [s for s in shown if " at 0x" in s] == [], "memory addresses change from run to run"
    assert [o for o in outputs(path) if o["output_type"] == "error"] == []
    assert [o for o in outputs(path) if o.get("name") == "stderr"] == [], "no warnings and no progress bars in stored outputs"
    assert not any("widget" in k for o in outputs(path) for k in o.get("data", {}))


@every_notebook
def test_notebook_has_outputs_of_modest_size(path):
    assert outputs(path), "run `python .ci/outputs.py` on it"
    assert path.stat().st_size < 1_000_000
    pngs = [len(base64.b64decode(text(o["data"]["image/png"]))) for o in outputs(path) if "image/png" in o.get("data", {})]
    assert all(n < 100_000 for n in pngs), pngs


@every_notebook
def test_first_cell_is_title_and_claim(path):
    "nbdev turns the cell with the title into the page's heading and drops whatever else is in it."
    first = next(c for c in cells(path) if c["cell_type"] == "markdown")
    title, *rest = [line for line in text(first["source"]).split("\n") if line.strip()]
    assert title.startswith("# ") and len(rest) == 1 and rest[0].startswith("> ")

"""One straight line of notebooks: what each may import, what importing the library may load, what
a committed notebook holds.
"""

import ast
import base64
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PKG = "hessian_surgery_nb"
# Three doors: what chapters stand on, the chapters, what is run for chapter 9, and what a terminal
# reads.
# Within a door reading order is sort order. Chapter 9 shows the evidence, so it stands behind it.
NBS = ROOT / "nbs"
FOUNDATIONS = sorted((NBS / "foundations").glob("[!._]*.ipynb"))
# without a module
PAGES = [NBS / f"{name}.ipynb" for name in ("index", "should_i_operate", "growth", "notation")]
METHOD = sorted(p for p in NBS.glob("[!._]*.ipynb") if p not in PAGES and p.stem != "09_paper")
EVIDENCE = sorted((NBS / "evidence").glob("[!._]*.ipynb"))
APP = sorted((NBS / "app").glob("[!._]*.ipynb"))
CHAPTERS = [*FOUNDATIONS, *METHOD, *EVIDENCE, NBS / "09_paper.ipynb", *APP]
NOTEBOOKS = [*CHAPTERS, *PAGES]
HEAVY = (
    "torchvision",
    "matplotlib",
    "sklearn",
)  # imported by the functions that use them, not by the library

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def text(s):
    return s if isinstance(s, str) else "".join(s)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path):
    return [c for c in cells(path) if c["cell_type"] == "code"]


def outputs(path):
    return [o for c in code_cells(path) for o in c["outputs"]]


def module(path):
    "The dotted name of the module that a notebook exports."
    if path.stem == "07_many_processes":
        return "__main__"  # what `python -m hessian_surgery_nb` runs
    name = path.stem.partition("_")[2]
    return name if path.parent == NBS else f"{path.parent.name}.{name}"


def siblings(source, package=PKG, known=()):
    """Names of the library's modules that `source` imports, at its top or inside its functions.

    `package` is where the source stands, for relative imports; `known` tells modules from other
    names.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = (
                package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            )
            start = ".".join([*up, *([node.module] if node.module else [])])
            names = [f"{start}.{a.name}" for a in node.names]
            names = [
                n if start == PKG or n.removeprefix(f"{PKG}.") in known else start for n in names
            ]
        else:
            continue
        found |= {n.removeprefix(f"{PKG}.") for n in names if n.startswith(f"{PKG}.")}
    return {n for n in found if "__" not in n}


# --- one line


def test_every_notebook_stands_behind_one_of_the_doors():
    found = {p for p in NBS.rglob("[!._]*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert found == set(NOTEBOOKS)


@every_chapter
def test_module_is_named_after_its_notebook(path):
    declared = re.findall(
        r"^#\|\s*default_exp\s+(\S+)", "\n".join(text(c["source"]) for c in code_cells(path)), re.M
    )
    assert declared == [module(path)]
    assert source_of(path).is_file(), "run nbdev_export"


def source_of(path):
    return ROOT / PKG / (module(path).replace(".", "/") + ".py")


def test_every_module_has_its_notebook():
    modules = {p for p in (ROOT / PKG).rglob("*.py") if p.stem[0] != "_" or p.stem == "__main__"}
    assert modules == {source_of(p) for p in CHAPTERS}


def test_siblings_finds_every_way_to_import():
    ways = [
        "import hessian_surgery_nb.a",
        "import hessian_surgery_nb.a as b",
        "from hessian_surgery_nb import a",
        "from . import a",
        "from .a import b",
        "from hessian_surgery_nb.a import *",
        "def f():\n    from .a import c",
    ]
    assert [siblings(w) for w in ways] == [{"a"}] * len(ways)
    other = "import torch, a.b\nfrom a import hessian_surgery_nb\nimport hessian_surgery_nb"
    assert siblings(other) == set()


def test_siblings_follows_imports_between_the_doors():
    here = f"{PKG}.foundations"
    known = {"foundations.b", "a"}
    ways = ["from .b import c", "from . import b", "import hessian_surgery_nb.foundations.b"]
    assert [siblings(w, here, known) for w in ways] == [{"foundations.b"}] * len(ways)
    assert siblings("from ..a import c", here, known) == {"a"}
    assert siblings("from .. import a", here, known) == {"a"}


def above(path):
    return {module(p) for p in CHAPTERS[: CHAPTERS.index(path)]}


ALL = {module(p) for p in CHAPTERS}


@every_chapter
def test_module_imports_only_what_stands_above_it(path):
    package = PKG if "." not in module(path) else f"{PKG}.{path.parent.name}"
    source = source_of(path).read_text(encoding="utf-8")
    assert siblings(source, package, ALL) <= above(path)


@every_chapter
def test_notebook_imports_only_what_stands_above_it(path):
    "Lesson cells too: all that reads as Python, without lines that start with % or !."
    for cell in code_cells(path):
        if text(cell["source"]).startswith("%%"):
            continue
        source = re.sub(r"^(\s*)[%!].*$", r"\1pass", text(cell["source"]), flags=re.M)
        assert siblings(source, known=ALL) <= above(path), text(cell["source"])


# --- light to import


def test_import_loads_nothing_heavy():
    # a scikit-learn estimator is one by its base classes
    chapters = [p for p in CHAPTERS if module(p) != "rebalancer"]
    modules = [PKG, *(f"{PKG}.{module(p)}" for p in chapters)]
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
    shown += [
        text(v)
        for o in outputs(path)
        for k, v in o.get("data", {}).items()
        if k.startswith("text/")
    ]
    assert [s for s in shown if " at 0x" in s] == [], "memory addresses change from run to run"
    assert [o for o in outputs(path) if o["output_type"] == "error"] == []
    assert [o for o in outputs(path) if o.get("name") == "stderr"] == [], (
        "no warnings and no progress bars in stored outputs"
    )
    assert not any("widget" in k for o in outputs(path) for k in o.get("data", {}))


@every_notebook
def test_notebook_has_outputs_of_modest_size(path):
    assert outputs(path), "run `python .ci/outputs.py` on it"
    assert path.stat().st_size < 1_000_000
    pngs = [
        len(base64.b64decode(text(o["data"]["image/png"])))
        for o in outputs(path)
        if "image/png" in o.get("data", {})
    ]
    assert all(n < 100_000 for n in pngs), pngs


@every_notebook
def test_first_cell_is_title_and_claim(path):
    "nbdev turns the cell with the title into the page's heading and drops whatever else is in it."
    first = next(c for c in cells(path) if c["cell_type"] == "markdown")
    title, *rest = [line for line in text(first["source"]).split("\n") if line.strip()]
    assert title.startswith("# ") and len(rest) == 1 and rest[0].startswith("> ")


# --- the site


DOORS = {NBS: "", NBS / "foundations": "F", NBS / "evidence": "E", NBS / "app": "A"}


@every_chapter
def test_the_number_in_the_title_is_that_of_the_file(path):
    "03a_class_structure is chapter 3a; foundations, evidence and app are marked F, E and A."
    digits, letter = re.match(r"(\d+)([a-z]?)", path.stem).groups()
    number = f"{DOORS[path.parent]}{int(digits)}{letter}"
    first = next(c for c in cells(path) if c["cell_type"] == "markdown")
    assert text(first["source"]).startswith(f"# {number}. "), number


def test_the_sidebar_has_every_notebook_in_reading_order():
    listed = re.findall(r"([\w/]+\.ipynb)", (NBS / "sidebar.yml").read_text(encoding="utf-8"))
    doors = [*PAGES, *METHOD, NBS / "09_paper.ipynb", *FOUNDATIONS, *EVIDENCE, *APP]
    assert listed == [p.relative_to(NBS).as_posix() for p in doors]


@every_notebook
def test_imports_stand_alone_in_their_cells(path):
    "The site runs every cell that holds an import, wherever in it, and no other lesson cell."
    for cell in code_cells(path):
        source = text(cell["source"])
        if source.startswith("%%") or re.search(r"^#\|\s*(exports?|eval:\s*false)", source, re.M):
            continue
        tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))
        imports = (ast.Import, ast.ImportFrom)
        if any(isinstance(node, imports) for node in ast.walk(tree)):
            assert all(isinstance(node, imports) for node in tree.body), source


# --- the site can document every public name


def test_every_public_name_can_be_documented():
    "What the site's pages show of a class or a function; a failure there ends the whole build."
    from nbdev.showdoc import show_doc

    failed = []
    for info in pkgutil.walk_packages([str(ROOT / PKG)], f"{PKG}."):
        if info.ispkg or info.name.endswith(("_modidx", "__main__")):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                try:
                    show_doc(thing)
                except Exception as error:  # whatever a signature or an annotation raises
                    failed.append(f"{info.name}.{name}: {error!r}")
    assert not failed

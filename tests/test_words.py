"""The words of the field: what pages do not say, because a reader who has read no chapter would not
know what it means. Over the text of every page, the words of its pictures and its docstrings.
"""

import ast
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("[!._]*.ipynb") if ".ipynb_checkpoints" not in p.parts)

KINDS = (
    "Hessian-vector matrix-vector Jacobian-vector vector inner outer scalar dot matrix Kronecker "
    "one-sided Gauss-Newton three"
).split()
# pattern -> what to say instead
CRYPTIC = {
    r"\bproducts?\b": "Hessian-vector product (HVP), matvec",
    r"\b(turn\w*|tak\w+|took) back\b": "rolled back, rejected",
    r"\b(promis\w*|prophe\w*|foretold|foretells?)\b": "prediction, predicted",
    r"\b(kept graphs?|graphs? kept|rebuil\w+)\b": "cached graph, recomputed",
    r"\b(patients?|walkers?)\b": "the model, its weights",
    r"\bby heart\b": "memorised",
    r"\bleash\b": "a larger step",
    r"\bwrong labels? apart\b": "cross-class means",
    r"\blevers?\b": "alternative directions",
    r"\bnothing but spikes\b": "say what is meant",
    r"\b(nine|27|99|all|many|more|leading|C - 1)( leading)? spikes\b": "leading eigenvectors",
    r"\b(a|an|one|another|first|second) looks?\b": "screening, a preliminary estimate",
    r"\b(calm\w*|shrunk|agreed)\b": "with shrinkage, cross-fitted, consensus",
    r"\b(buys?|bought)\b": "gains, reduces by",
    r"\b(surgery|loop|method|biases|spikes)( then)? brings?\b": "gains, reduces by",
    r"\b(takes?|took)\b(?! for)[^.,;]{0,30}\b(of|off)( the)? (spread|\$?\\?sigma)": "reduces by",
}
HONEST = (
    rf"\b({'|'.join(KINDS)})[ -](matrix )?products?\b",
    r"\bproducts? of (the )?(amplitude|an operator|a matrix|matrices|two|factors|vectors)\b",
    r"\bproducts? with (a vector|vectors)\b",
    r"\bproduct rule\b",
    r"\bsuch a product is called\b",
    r"\bproduct of equation\b",
    r"\bproduct of two tall matrices\b",
    r"\bsums? of products\b",
    r"\bproduct is 0\.61\b",  # of amplitude and root of an eigenvalue
    r"\btheir product is\b",  # of two eigenvalues
    r"\bgroups of patients\b",
    r"\bhow many spikes\b",
    r"\bends have both shrunk\b",  # of a spectrum
    r"\bnine spikes( are a number of the theory|\])",
)


def text(source):
    return source if isinstance(source, str) else "".join(source)


def prose(markdown):
    "Without code, formulas and addresses."
    kept = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`|\]\([^)\s]*\)", "]", kept)


def docstrings(source):
    "Of public and private classes and functions of a cell."
    tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [words for words in found if words]


def page_text(path):
    "What a reader reads of a notebook, without its code and its outputs."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(prose(source))
        elif cell["cell_type"] == "code":
            parts += re.findall(r"^#\|\s*fig-(?:cap|alt):\s*(.*)$", source, re.M)
            if re.search(r"^#\|\s*exports?\b", source, re.M):
                parts += [prose(words) for words in docstrings(source)]
    return "\n".join(parts)


def cryptic(page):
    "The words that a page should not have, where they stand, and what to say."
    spans = [m.span() for honest in HONEST for m in re.finditer(honest, page, re.I)]
    found = []
    for pattern, instead in CRYPTIC.items():
        for m in re.finditer(pattern, page, re.I):
            if not any(start <= m.start() and m.end() <= end for start, end in spans):
                around = page[max(0, m.start() - 40) : m.end() + 30].replace("\n", " ")
                found.append(f"{around!r}: say {instead}")
    return found


BAD = """a product with the weights
the step is turned back
a good prophet
the kept graph
the patient is the network
known by heart
a longer leash
means of wrong labels apart
other levers
nothing but spikes
surgery along 99 spikes
a look before the cut
a calmed matrix, shrunk
what half a point buys
what surgery brings
it takes 15 % off the spread"""
GOOD = """a Hessian-vector product, an inner product, the outer products, one matrix-vector product
the product of two matrices, a product with a vector
five spikes were planted; how many spikes are there?
groups of patients; the amplitude shrinks; brought to rest; the step is rolled back
it reduces the spread by 15 %; surgery gains a point; it takes half of the time"""


@pytest.mark.parametrize("line", BAD.splitlines())
def test_checker_sees_cryptic_words(line):
    assert cryptic(line)


def test_checker_leaves_plain_words():
    assert cryptic(GOOD) == []


def test_checker_reads_text_captions_and_docstrings(tmp_path):
    cells = [
        dict(cell_type="markdown", source="A product. `product`\n```sh\nproduct\n```"),
        dict(cell_type="code", source='#| fig-cap: "One look."\nproduct = 1'),
        dict(cell_type="code", source='#| export\ndef f():\n    "What it buys."\n    # levers'),
        dict(cell_type="code", source='def g():\n    "Not exported: levers."'),
    ]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(dict(cells=cells)), encoding="utf-8")
    assert len(cryptic(page_text(path))) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pages_speak_plainly(path):
    assert cryptic(page_text(path)) == []

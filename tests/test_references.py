"""What chapters cite stands in nbs/references.bib, by the name and the year that they give it."""

import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
BIB = NBS / "references.bib"
NOTEBOOKS = sorted(p for p in NBS.rglob("[!._]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ACCENTS = {r"{\'e}": "é", r"{\'a}": "á", r"{\"u}": "ü", r"{\u g}": "ğ"}
PAPERS = re.compile(r"https?://(arxiv\.org|(dx\.)?doi\.org|ieeexplore\.ieee\.org)/")
# of issue 26: what the book rests on
FOUNDERS = (
    "Vigna Pearlmutter Lanczos Golub Meurant Saad Parlett Kaniel Paige Ghorbani Papyan Sagun "
    "Gabdullin Menon Kang Cui Lin Kirichenko"
).split()

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def plain(words):
    for written, letter in ACCENTS.items():
        words = words.replace(written, letter)
    return words.replace("{", "").replace("}", "")


def entries(bib):
    "Key -> fields, of a BibTeX file with a field a line."
    found = {}
    for entry in re.findall(r"^@.*?^\}", bib, re.M | re.S):
        key = re.match(r"@\w+\{(\w+),", entry)[1]
        assert key not in found, f"{key} stands there twice"
        found[key] = dict(re.findall(r"^  (\w+) = \{(.*)\},$", entry, re.M))
    return found


def surnames(entry):
    return [plain(name).split(",")[0] for name in entry["author"].split(" and ")]


def markdown(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [c["source"] for c in cells if c["cell_type"] == "markdown"]
    return "\n".join(s if isinstance(s, str) else "".join(s) for s in sources)


def links(text):
    "Pairs of words and address; an address may hold brackets."
    return re.findall(r"\[([^]]+)\]\((https?://[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)", text)


def wrong_citations(text, found):
    "Links to papers that the list does not know, or knows by another name or year."
    by_address = {entry["url"]: entry for entry in found.values()}
    wrong = []
    for words, address in links(text):
        if address not in by_address:
            wrong += [f"{words}: {address} is not in references.bib"] * bool(PAPERS.match(address))
            continue
        entry = by_address[address]
        authors, _, year = words.partition(re.search(r"\(?\d{4}\)?|$", words)[0] or "\0")
        if not year and not re.search(r"\d{4}", words):
            continue  # words, no citation
        if entry["year"] not in words:
            wrong.append(f"{words}: the year is {entry['year']}")
        named = set(re.findall(r"[A-ZÀ-Ž][\w-]+", authors))
        known = {part for name in surnames(entry) for part in name.split()}
        if not named <= known or surnames(entry)[0].split()[-1] not in named:
            wrong.append(f"{words}: the authors are {', '.join(surnames(entry))}")
    return wrong


NAME = r"[A-ZÀ-Ž][a-zà-ž]+(?:-[A-Z][a-z]+)?"
NAMED = re.compile(rf"\b({NAME}(?:(?:,| and) {NAME})*)(?: et al\.| and others)?,? \((\d{{4}})\)")


def unknown_names(text, found):
    "`Name and Name (1999)` in words, where no source has such an author."
    known = {part for entry in found.values() for name in surnames(entry) for part in name.split()}
    names = [
        (name, year)
        for together, year in NAMED.findall(text)
        for name in re.findall(NAME, together)
    ]
    return [f"{name} ({year})" for name, year in names if name not in known]


FOUND = entries(BIB.read_text(encoding="utf-8"))


# --- the checker sees what is broken

TWO = """\
@misc{a1999,
  title = {On {Hessians}},
  author = {G{\\"u}ney, A. and {Ben Arous}, B.},
  year = {1999},
  url = {https://arxiv.org/abs/1},
}

@book{b2000,
  title = {Book},
  author = {Single, C.},
  year = {2000},
  url = {https://doi.org/10.1/(SICI)2},
}
"""


def test_checker_reads_entries_and_links():
    found = entries(TWO)
    assert list(found) == ["a1999", "b2000"] and surnames(found["a1999"]) == ["Güney", "Ben Arous"]
    with pytest.raises(AssertionError, match="twice"):
        entries(TWO + TWO)
    assert links("[x](https://doi.org/10.1/(SICI)2), [y](a.ipynb)") == [
        ("x", "https://doi.org/10.1/(SICI)2")
    ]


def test_checker_sees_wrong_citations():
    found = entries(TWO)
    good = (
        "[Güney and Ben Arous (1999)](https://arxiv.org/abs/1), [here](https://arxiv.org/abs/1), "
        "[Single 2000](https://doi.org/10.1/(SICI)2), [else](https://elsewhere.org/2001)"
    )
    assert wrong_citations(good, found) == []
    for bad in (
        "[Güney and Ben Arous (1998)](https://arxiv.org/abs/1)",
        "[Ben Arous (1999)](https://arxiv.org/abs/1)",
        "[Güney and Single (1999)](https://arxiv.org/abs/1)",
        "[another](https://arxiv.org/abs/2)",
        "[Single (2000)](https://doi.org/10.1/3)",
    ):
        assert len(wrong_citations(bad, found)) == 1, bad
    assert unknown_names("Single (2000), and Güney and others (1999)", found) == []
    assert unknown_names("Nobody and Single (2000)", found) == ["Nobody (2000)"]


# --- the list, and what cites it


def test_every_entry_says_who_what_when_and_where():
    for key, entry in FOUND.items():
        assert {"author", "title", "year", "url"} <= set(entry), key
        assert re.fullmatch(r"(19|20)\d\d", entry["year"]), key
        assert re.fullmatch(r"https?://\S+", entry["url"]), key
        assert not re.search(r"\\", plain(entry["author"])), f"{key}: an accent that no page shows"
    addresses = [entry["url"] for entry in FOUND.values()]
    assert len(set(addresses)) == len(addresses)


def test_what_the_book_rests_on_is_there():
    first = {surnames(entry)[0] for entry in FOUND.values()}
    everyone = {name for entry in FOUND.values() for name in surnames(entry)}
    assert [name for name in FOUNDERS if name not in everyone] == []
    assert {"Vigna", "Golub", "Kirichenko"} <= first


@every_notebook
def test_citations_are_those_of_the_list(path):
    text = markdown(path)
    assert wrong_citations(text, FOUND) == []
    assert unknown_names(text, FOUND) == []


def test_the_page_of_sources_shows_every_entry():
    "Run `python .ci/outputs.py nbs/notation.ipynb` after a change of the list."
    cells = json.loads((NBS / "notation.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = json.dumps([c.get("outputs", []) for c in cells])
    assert [key for key, entry in FOUND.items() if entry["url"] not in shown] == []

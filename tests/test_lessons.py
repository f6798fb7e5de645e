"""A chapter that was rewritten as a lesson has the parts of one, and fits on a page.

Chapters stand in LESSONS once they are written so; what is below "Hardening" is not the lesson.
Chapter 9 judges and teaches no method: it begins with the verdict and has parts of its own.
"""

import ast
import base64
import html
import json
import re
import struct
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
LESSONS = (
    "00_hvp",
    "01_lanczos",
    "02_slq",
    "03_spike_validation",
    "04_sensitivity",
    "05_surgery",
    "06_deflation",
    "07_isic",
    "08_effective_rank",
)
PARTS = (
    "By hand",
    "Why it works",
    "How it breaks",
    "The exported form",
    "An oracle",
    "At full size",
    "In short",
    "Try it",
    "Read on",
)
VERDICT = "09_paper"
PARTS_OF_VERDICT = ("The verdict", "In short", "Try it", "Read on")
HIGHEST_PAGE = 15_000  # pixels
LONGEST_CELL = 25  # lines of code
WIDEST_OUTPUT = 100  # characters

every_lesson = pytest.mark.parametrize("name", LESSONS)


def text(source):
    return source if isinstance(source, str) else "".join(source)


def cells(name):
    "Pairs of kind and source, with outputs, of a chapter."
    notebook = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [(c["cell_type"], text(c["source"]), c.get("outputs", [])) for c in notebook["cells"]]


def headings(found):
    "Of the second level, in order: (position of the cell, words)."
    return [
        (position, words.strip())
        for position, (kind, source, _) in enumerate(found)
        if kind == "markdown"
        for words in re.findall(r"^## (.+)$", source, re.M)
    ]


def part_of(words):
    "The part that a heading names; words may follow after a colon."
    return words.partition(":")[0].strip()


def missing_parts(found, parts=PARTS):
    "What a lesson lacks, or has in another order."
    start = "\n".join(source for kind, source, _ in found[:5] if kind == "markdown")
    lacking = [
        opening
        for opening in ("\n> ", "**You need**", "**You will be able to**")
        if opening not in start
    ]
    names = [part_of(words) for _, words in headings(found)]
    lacking += [part for part in parts if part not in names]
    in_order = [name for name in names if name in parts]
    if not lacking and in_order != list(parts):
        lacking.append(f"another order: {in_order}")
    if "Hardening" in names and names.index("Hardening") != len(names) - 1:
        lacking.append("Hardening at the end")
    return lacking


def section(found, part):
    "The cells from one heading to the next of its level."
    starts = [position for position, _ in headings(found)] + [len(found)]
    for turn, (position, words) in enumerate(headings(found)):
        if part_of(words) == part:
            return found[position : starts[turn + 1]]
    return []


def lesson(found):
    "The cells above Hardening."
    below = [position for position, words in headings(found) if part_of(words) == "Hardening"]
    return found[: below[0]] if below else found


def code_of(source):
    "Lines of code, without blank ones and without directives."
    lines = [line for line in source.splitlines() if line.strip()]
    return [line for line in lines if not re.match(r"\s*#\s*\|", line)]


def is_imports(source):
    tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))
    kinds = (ast.Import, ast.ImportFrom)
    return bool(tree.body) and all(isinstance(node, kinds) for node in tree.body)


def long_cells(found):
    "First lines of code cells of the lesson that are too long; cells of imports are none."
    return [
        f"{len(code_of(source))} lines: {code_of(source)[0]}"
        for kind, source, _ in lesson(found)
        if kind == "code" and len(code_of(source)) > LONGEST_CELL and not is_imports(source)
    ]


def folded_answers(found):
    "Code cells of `Try it` that a page folds."
    return [
        source
        for kind, source, _ in section(found, "Try it")
        if kind == "code" and re.search(r"^#\|\s*code-fold:\s*true", source, re.M)
    ]


def wide_lines(found):
    "Lines of stored text outputs that a page would cut; a table is read as its HTML."
    wide = []
    for _, _, outputs in found:
        for output in outputs:
            data = output.get("data", {})
            if "text/html" in data or "image/png" in data:
                continue
            shown = text(output.get("text", data.get("text/plain", "")))
            wide += [line for line in shown.splitlines() if len(line) > WIDEST_OUTPUT]
    return wide


def bare_pictures(found):
    "Cells that show a picture without its caption or its alternative text."
    bare = []
    for _, source, outputs in found:
        if any("image/png" in output.get("data", {}) for output in outputs):
            for option in ("fig-cap", "fig-alt"):
                if not re.search(rf'^#\|\s*{option}:\s*"?\S', source, re.M):
                    bare.append((option, code_of(source)[0]))
    return bare


def cited(found):
    "Addresses that `Read on` links to."
    return re.findall(
        r"\]\((https?://[^)\s]+)\)", "\n".join(source for _, source, _ in section(found, "Read on"))
    )


# --- how high a page is, roughly: 90 characters of text or code fill a line of 26 pixels

LINE = 26
FOLDED = re.compile(r"<details>\s*<summary>(.*?)</summary>.*?</details>", re.S)


def without_folds(words):
    "What a page shows before anything is unfolded."
    return FOLDED.sub(r"<p>\1</p>", words)


def text_height(words):
    "Of paragraphs or of code, with a half line between."
    lines = [html.unescape(re.sub(r"<[^>]+>", "", line)) for line in words.splitlines()]
    return sum(LINE * -(-len(line) // 90) if line.strip() else LINE / 2 for line in lines)


def table_height(words):
    "Of all rows: the highest cell of each, where columns share the width."
    height = 0
    for row in re.findall(r"<tr.*?</tr>", words, re.S):
        cells = re.findall(r"<t[dh].*?</t[dh]>", row, re.S)
        width = 90 / max(len(cells), 1)
        highest = 1
        for cell in cells:
            broken = re.split(r"<br>", cell)
            plain = [html.unescape(re.sub(r"<[^>]+>", "", line)).strip() for line in broken]
            highest = max(highest, sum(max(1, -(-len(line) // width)) for line in plain))
        height += 16 + 22 * highest
    return height


def output_height(output):
    "Of a picture, a table, or text."
    data = output.get("data", {})
    if "image/png" in data:
        return struct.unpack(">I", base64.b64decode(text(data["image/png"]))[20:24])[0] + 60
    if "text/html" in data:
        words = without_folds(text(data["text/html"]))
        return table_height(words) + text_height(re.sub(r"<table.*</table>", "", words, flags=re.S))
    shown = data.get("text/markdown", output.get("text", data.get("text/plain", "")))
    return text_height(without_folds(text(shown)))


def page_height(found):
    "Of a notebook's page, in pixels; hidden cells and exported ones take no room."
    height = 0
    for kind, source, outputs in found:
        if re.search(r"^#\|\s*(hide|default_exp|export\s*$)", source, re.M):
            continue
        is_shown = kind == "markdown" or not re.search(
            r"^#\|\s*(echo: false|code-fold)", source, re.M
        )
        height += LINE + (text_height(without_folds(source)) if is_shown else 0)
        height += 40 * len(re.findall(r"^##+ ", source, re.M)) if kind == "markdown" else 0
        height += sum(map(output_height, outputs))
    return round(height)


# --- the checker sees what is broken


def a_lesson():
    "A chapter with nothing in its parts."
    opening = "# 1. A title\n\n> A claim."
    needs = "**You need** nothing.\n\n**You will be able to** do something."
    parts = [("markdown", f"## {part}: and more", []) for part in PARTS]
    answer = ("code", "#| code-fold: true\n1 + 1", [])
    place = PARTS.index("Try it") + 1
    body = [*parts[:place], answer, *parts[place:]]
    return [("markdown", opening, []), ("markdown", needs, []), *body]


def test_checker_sees_missing_parts():
    whole = a_lesson()
    assert missing_parts(whole) == []
    for gone in range(len(whole)):
        if whole[gone][0] == "markdown":
            assert missing_parts(whole[:gone] + whole[gone + 1 :]) != [], whole[gone]
    assert missing_parts([*whole[:2], whole[3], whole[2], *whole[4:]]) != []
    hardening = ("markdown", "## Hardening", [])
    assert missing_parts([*whole, hardening]) == []
    assert missing_parts([*whole[:4], hardening, *whole[4:]]) == ["Hardening at the end"]


def test_checker_sees_long_cells_wide_outputs_and_bare_pictures():
    long = ("code", "#| export\n\n" + "x = 1\n" * 26, [])
    short = ("code", "#| export\n\n" + "x = 1\n" * 25, [])
    imports = ("code", "import os\n" * 30, [])
    hardening = ("markdown", "## Hardening", [])
    assert long_cells([short, imports, hardening, long]) == []
    assert long_cells([long, hardening]) == ["26 lines: x = 1"]
    printed = {"output_type": "stream", "text": ["a" * 101 + "\n", "b"]}
    assert wide_lines([("code", "", [printed])]) == ["a" * 101]
    picture = [{"output_type": "display_data", "data": {"image/png": ""}}]
    assert bare_pictures([("code", '#| fig-cap: "A"\n#| fig-alt: "B"\nplot()', picture)]) == []
    assert len(bare_pictures([("code", '#| fig-cap: "A"\nplot()', picture)])) == 1
    assert len(bare_pictures([("code", "plot()", picture)])) == 2
    assert folded_answers(a_lesson()) and not folded_answers(a_lesson()[:-3])


def test_checker_sees_a_high_page():
    line = ("markdown", "a" * 90, [])
    assert page_height([line] * 10) == 10 * 2 * LINE
    row = "<tr><td>1</td><td>2</td></tr>"
    table = [{"data": {"text/html": f"<table>{row * 100}</table>"}}]
    assert page_height([("code", "#| echo: false", table)]) == LINE + 100 * 38
    assert page_height([("code", "#| hide", table)]) == 0
    fold = [{"data": {"text/html": f"<details><summary>x</summary>{row * 100}</details>"}}]
    assert page_height([("code", "#| echo: false", fold)]) < 3 * LINE
    tall = base64.b64encode(b"0" * 16 + struct.pack(">II", 600, 400)).decode()
    assert page_height([("code", "#| echo: false", [{"data": {"image/png": tall}}])]) == LINE + 460


# --- chapter 9


def test_the_last_chapter_begins_with_the_verdict():
    found = cells(VERDICT)
    assert missing_parts(found, PARTS_OF_VERDICT) == []
    assert headings(found)[0][1] == PARTS_OF_VERDICT[0]
    verdict = section(found, PARTS_OF_VERDICT[0])
    tables = [o for _, _, outputs in verdict for o in outputs if "text/html" in o.get("data", {})]
    assert len(tables) >= 3  # how many of each, those of the abstract, all of them
    assert folded_answers(found)


def test_the_page_of_the_last_chapter_is_not_too_high():
    assert page_height(cells(VERDICT)) < HIGHEST_PAGE


def test_the_last_chapter_fits_on_a_page_and_cites():
    found = cells(VERDICT)
    assert wide_lines(found) == [] and bare_pictures(found) == []
    known = (NBS / "references.bib").read_text(encoding="utf-8")
    links = cited(found)
    assert links and not [link for link in links if f"{{{link}}}" not in known]


# --- the chapters


@every_lesson
def test_a_lesson_has_all_its_parts(name):
    assert missing_parts(cells(name)) == []


@every_lesson
def test_an_exercise_has_an_answer_that_runs(name):
    "Folded on the page; `nbdev_test` runs it, as it runs every cell that is not marked otherwise."
    answers = folded_answers(cells(name))
    assert answers
    assert not [source for source in answers if re.search(r"^#\|\s*eval:\s*false", source, re.M)]


@every_lesson
def test_the_cells_of_a_lesson_are_short(name):
    assert long_cells(cells(name)) == []


@every_lesson
def test_no_output_is_wider_than_the_page(name):
    assert wide_lines(cells(name)) == []


@every_lesson
def test_pictures_have_caption_and_alternative_text(name):
    assert bare_pictures(cells(name)) == []


@every_lesson
def test_what_is_read_on_stands_in_the_references(name):
    known = (NBS / "references.bib").read_text(encoding="utf-8")
    links = cited(cells(name))
    assert links
    assert [link for link in links if f"{{{link}}}" not in known] == []

"""What a page shows: titles, numbers, pictures with their words, links, widths, and what its script
and its style sheet do. Over the notebooks, so that it needs no built site.
"""

import ast
import importlib.util
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from browser import browser, find_browser

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("[!._]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = sorted(NBS.glob("[0-9]*.ipynb"))
WIDEST = 100  # characters of code and of outputs
DOORS = {"foundations": "F", "evidence": "E", "app": "A"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def text(source):
    return source if isinstance(source, str) else "".join(source)


def cells(path):
    "Triples of kind, source and outputs."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [(c["cell_type"], text(c["source"]), c.get("outputs", [])) for c in notebook["cells"]]


def is_hidden(source):
    return re.search(r"^#\|\s*(hide|include:\s*false)", source, re.M) is not None


# --- titles and numbers


def number_of(path):
    "3a of 03a_class_structure, F14 of foundations/14_accuracy; None: the page has none."
    found = re.match(r"(\d+)([a-z]?)_", path.stem)
    if found is None:
        return None
    return f"{DOORS.get(path.parent.name, '')}{int(found[1])}{found[2]}"


NUMBERS = {number_of(path) for path in NOTEBOOKS} - {None}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")


def wrong_numbers(markdown, folder):
    "Links that name another number than that of the file they lead to, and chapters there are not."
    wrong = []
    for words, address in LINK.findall(markdown):
        page = address.partition("#")[0]
        named = re.match(r"chapters? ([FEA]?\d+[a-z]?)\b|([FEA]?\d+[a-z]?)$", words, re.I)
        if not page.endswith(".ipynb") or "://" in page or named is None:
            continue
        if (named[1] or named[2]) != number_of(folder / page):
            wrong.append(f"[{words}]({address})")
    # not of other books
    own = "\n".join(line for line in markdown.splitlines() if "](http" not in line)
    for named in re.findall(r"\bchapters? ([FEA]?\d+[a-z]?)\b", LINK.sub("", own), re.I):
        if named not in NUMBERS:
            wrong.append(f"chapter {named}")
    return wrong


def test_checker_sees_wrong_numbers():
    good = "[chapter 3](03_spike_validation.ipynb), [3a](03a_class_structure.ipynb#x), chapter 5b"
    assert wrong_numbers(good, NBS) == []
    bad = "[chapter 08](08_effective_rank.ipynb) and [chapter 4](05_surgery.ipynb), chapter 11"
    assert len(wrong_numbers(bad, NBS)) == 3
    assert wrong_numbers("[F3](foundations/03_distributed.ipynb)", NBS) == []
    assert wrong_numbers("[21 networks](evidence/07e_states.ipynb)", NBS) == []
    assert wrong_numbers("[3](../foundations/03_distributed.ipynb)", NBS / "app") != []


@every_notebook
def test_a_chapter_has_one_number_everywhere(path):
    "In links to it and in the text; test_structure has its title, which the sidebar shows."
    markdown = "\n".join(source for kind, source, _ in cells(path) if kind == "markdown")
    assert wrong_numbers(markdown, path.parent) == []


def test_the_index_names_every_numbered_chapter():
    markdown = "\n".join(source for kind, source, _ in cells(NBS / "index.ipynb"))
    for chapter in CHAPTERS:
        number = number_of(chapter)
        if number.isdigit():
            assert re.search(rf"\[{number} [^\]]+\]\({chapter.name}\)", markdown), chapter.name


# --- pictures and their words


def bare_pictures(found):
    "Cells that show a picture without caption or alternative text, and Markdown pictures without."
    bare = []
    for kind, source, outputs in found:
        if kind == "markdown":
            bare += [address for address in re.findall(r"!\[\s*\]\(([^)]+)\)", source)]
        elif not is_hidden(source) and any("image/png" in o.get("data", {}) for o in outputs):
            for option in ("fig-cap", "fig-alt"):
                if not re.search(rf'^#\|\s*{option}:\s*"?[^"\s]', source, re.M):
                    bare.append(f"{option}: {source.strip().splitlines()[-1]}")
    return bare


def test_checker_sees_bare_pictures():
    picture = [{"output_type": "display_data", "data": {"image/png": ""}}]
    both = '#| fig-cap: "A"\n#| fig-alt: "B"\nplot()'
    assert bare_pictures([("code", both, picture), ("markdown", "![words](a.png)", [])]) == []
    assert bare_pictures([("code", '#| fig-cap: "A"\n#| fig-alt: ""\nplot()', picture)]) != []
    assert len(bare_pictures([("code", "plot()", picture)])) == 2
    assert bare_pictures([("markdown", "![](a.png)", [])]) == ["a.png"]
    assert bare_pictures([("code", "#| hide\nplot()", picture), ("code", "plot()", [])]) == []


@every_notebook
def test_pictures_have_caption_and_alternative_text(path):
    assert bare_pictures(cells(path)) == []


# --- widths


def shown_text(output):
    "Of an output that is no table and no picture."
    data = output.get("data", {})
    if any(kind in data for kind in ("text/html", "text/markdown", "image/png")):
        return ""
    return text(output.get("text", data.get("text/plain", "")))


def wide_lines(found):
    "Of code and of outputs, what a page would cut or break."
    wide = []
    for kind, source, outputs in found:
        if kind != "code" or is_hidden(source):
            continue
        code = [line for line in source.splitlines() if not re.match(r"\s*(#\s*\||[%!])", line)]
        printed = [line for output in outputs for line in shown_text(output).splitlines()]
        wide += [line for line in [*code, *printed] if len(line) > WIDEST]
    return wide


def fenced_lines(found):
    "Of code that stands in the text."
    markdown = "\n".join(source for kind, source, _ in found if kind == "markdown")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_checker_sees_wide_lines():
    long = "a" * 101
    printed = [{"output_type": "stream", "text": [f"{long}\n", "b"]}]
    table = [{"output_type": "execute_result", "data": {"text/plain": long, "text/html": "<p>"}}]
    assert (
        wide_lines([("code", long, []), ("code", "x", printed), ("code", "x", table)]) == [long] * 2
    )
    assert (
        wide_lines([("code", f"#| fig-alt: {long}\n{long[1:]}", []), ("markdown", long, [])]) == []
    )
    assert fenced_lines([("markdown", f"a\n```bash\n{long}\n```\nb", [])]) == [long]


@every_notebook
def test_code_and_outputs_fit_the_page(path):
    assert wide_lines(cells(path)) == []
    assert [line for line in fenced_lines(cells(path)) if len(line) > WIDEST] == []


def test_outputs_are_broken_when_they_are_stored():
    "As a terminal would, at spaces."
    spec = importlib.util.spec_from_file_location("outputs", ROOT / ".ci" / "outputs.py")
    outputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outputs)
    line = "word " * 30
    found = outputs.narrow(
        [{"output_type": "stream", "name": "stdout", "text": [f"{line}\n", "b\n"]}]
    )
    lines = text(found[0]["text"]).splitlines()
    assert max(map(len, lines)) <= WIDEST and lines[-1] == "b"
    assert " ".join(lines[:-1]).split() == line.split()
    table = [
        {"output_type": "execute_result", "data": {"text/plain": [line], "text/html": ["<p>"]}}
    ]
    assert outputs.narrow(json.loads(json.dumps(table))) == table


# --- links and anchors


def anchor_of(heading):
    "The identifier that Pandoc gives to a heading."
    plain = LINK.sub(r"\1", heading)
    plain = re.sub(r"[`*$]|\\[a-z]+|\{#[^}]*\}", "", plain).strip().lower()
    kept = re.sub(r"[^\w\s.-]", "", plain)
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", kept.strip()))


def anchors_of(path):
    markdown = "\n\n".join(source for kind, source, _ in cells(path) if kind == "markdown")
    markdown = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    return {anchor_of(words) for words in re.findall(r"^#{2,6} (.+)$", markdown, re.M)}


def broken_links(found, path):
    markdown = "\n\n".join(source for kind, source, _ in found if kind == "markdown")
    markdown = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    broken = []
    for _, address in LINK.findall(markdown):
        page, _, anchor = address.partition("#")
        if "://" in address or address.startswith("mailto:"):
            continue
        target = (path.parent / page).resolve() if page else path
        if not target.exists():
            broken.append(address)
        elif anchor and target.suffix == ".ipynb" and anchor not in anchors_of(target):
            broken.append(address)
    return broken


def test_checker_sees_broken_links():
    path = NBS / "should_i_operate.ipynb"
    good = "[a](#rare-classes) [b](index.ipynb#the-course) [c](https://d.e) [f](runs)"
    assert broken_links([("markdown", good, [])], path) == []
    bad = "[a](#nowhere) [b](index.ipynb#nowhere) [c](gone.ipynb)"
    assert len(broken_links([("markdown", bad, [])], path)) == 3
    assert (
        anchor_of("How it breaks: `top_eigenpairs`, 2 of $H$")
        == "how-it-breaks-top_eigenpairs-2-of-h"
    )
    assert anchor_of("1. A [link](x) & more") == "a-link-more"


@every_notebook
def test_links_and_anchors_lead_somewhere(path):
    assert broken_links(cells(path), path) == []


# --- what nbdev makes of exports


def back_ticked_comments(source):
    "Comments behind parameters and fields with back-ticks, which nbdev turns into raw links."
    found = []
    for line in source.splitlines():
        behind = re.match(r"\s+\**\w+\s*(?::[^#]*|=[^#]*)?,?\s+#(.*)", line)
        if behind and "`" in behind[1]:
            found.append(line.strip())
    return found


def test_checker_sees_back_ticks():
    assert back_ticked_comments("def f(\n    a: int,  # as for `g`\n    b=2,  # as for g\n):") != []
    assert back_ticked_comments("def f(\n    a: int,  # as for g\n):\n    x = `y`") == []


MODULES = sorted((ROOT / "hessian_surgery_nb").rglob("[!_]*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


@every_module
def test_no_back_ticks_in_the_comments_of_a_signature(path):
    assert back_ticked_comments(path.read_text(encoding="utf-8")) == []


def is_documented(node):
    "Public, or what a patched class does by an operator."
    is_operator = node.name.startswith("__") and node.name not in ("__repr__", "__init__")
    return not node.name.startswith("_") or is_operator


def without_docstring(source):
    "Public classes and functions that a page would describe as `Call self as a function.`"
    tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    shown = [n for n in tree.body if isinstance(n, kinds) and is_documented(n)]
    return [node.name for node in shown if not ast.get_docstring(node)]


def test_checker_sees_missing_docstrings():
    assert without_docstring('def a():\n    "A."\n\n\nclass B:\n    x = 1\n\n\ndef _c(): ...') == [
        "B"
    ]


@every_module
def test_every_export_says_what_it_is(path):
    assert without_docstring(path.read_text(encoding="utf-8")) == []


# --- the site's settings


def site_settings():
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def addresses(tree):
    "All values of href in it."
    if isinstance(tree, dict):
        own = [tree["href"]] if "href" in tree else []
        return own + [found for part in tree.values() for found in addresses(part)]
    if isinstance(tree, list):
        return [found for part in tree for found in addresses(part)]
    return []


def test_the_settings_name_files_that_exist():
    settings = site_settings()
    website, html = settings["website"], settings["format"]["html"]
    files = [website["favicon"], website["image"], html["css"], html["include-after-body"]]
    files += [address for address in addresses(website) if "://" not in address]
    assert [
        name for name in [*files, *settings["project"]["resources"]] if not (NBS / name).is_file()
    ] == []
    assert (NBS / website["image"]).stat().st_size < 100_000


def test_the_footer_has_version_and_licence():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    footer = site_settings()["website"]["page-footer"]
    assert footer["left"].endswith(f" {config['DEFAULT']['version']}")
    assert "Apache-2.0" in footer["center"] and "CITATION.cff" in footer["center"]
    site = config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"]
    assert f"({site}/llms.txt)" in footer["right"]


def test_what_was_asked_of_the_site():
    "Review points 2, 3, 5, 9, 10, 14, 15: settings that a build must find."
    settings, style = site_settings(), (NBS / "styles.css").read_text(encoding="utf-8")
    html, website = settings["format"]["html"], settings["website"]
    assert html["code-overflow"] == "wrap" and html["grid"]["body-width"] == "900px"
    assert set(html["theme"]) == {"light", "dark"}
    assert website["repo-subdir"] == "nbs" and "edit" in website["repo-actions"]
    assert re.search(r"html \{ scroll-padding-top: (6[0-9]|7[0-9]|8[0-9])px", style)
    assert ".quarto-title-block .description" in style
    assert "span.math.display" in style and 'mjx-container[display="true"]' in style
    sidebar = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"][
        "sidebar"
    ]
    sections = [entry for entry in sidebar["contents"] if isinstance(entry, dict)]
    assert all(set(entry) == {"section", "contents"} for entry in sections) and len(sections) >= 12


def test_the_list_of_pages_is_complete():
    listed = (NBS / "llms.txt").read_text(encoding="utf-8")
    pages = re.findall(r"^- \[(.+)\]\(https://\S+?\.html\): (.+)$", listed, re.M)
    assert len(pages) == len(NOTEBOOKS)


# --- Open in Colab


def colab_script():
    spec = importlib.util.spec_from_file_location("colab", ROOT / ".ci" / "colab.py")
    colab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(colab)
    return colab


def test_every_chapter_installs_itself_in_colab():
    source = colab_script().SOURCE
    for path in CHAPTERS:
        assert [s for _, s, _ in cells(path)].count(source) == 1, "run python .ci/colab.py"
        assert cells(path)[1][1] == source, path.stem


def test_the_cell_stands_behind_the_title_once():
    colab = colab_script()
    before = [{"cell_type": "markdown", "source": "# T"}, {"cell_type": "code", "source": "x"}]
    once = colab.with_cell(before)
    assert [text(c["source"]) for c in once] == ["# T", colab.SOURCE, "x"]
    assert colab.with_cell(once) == once


class Shell:
    "What a notebook calls `get_ipython()`; it writes down what it is told."

    def __init__(self, name):
        self.name = name
        self.told = []

    def __str__(self):
        return f"<{self.name} object>"

    def system(self, command):
        self.told.append(command)

    def run_line_magic(self, name, line):
        self.told.append(f"%{name} {line}")


@pytest.mark.parametrize("name, acts", [("google.colab._shell.Shell", 3), ("ipykernel.Shell", 0)])
def test_the_cell_acts_in_colab_only(name, acts):
    from IPython.core.inputtransformer2 import TransformerManager

    code = TransformerManager().transform_cell(colab_script().SOURCE)
    shell = Shell(name)
    exec(code, {"get_ipython": lambda: shell})
    assert len(shell.told) == acts
    if acts:
        assert "git clone" in shell.told[0] and "pip install" in shell.told[1]
        assert shell.told[2] == "%cd -q /content/book/nbs"


# --- the script and the style of a page, in a browser

PAGE = """<!doctype html><html><head><meta charset="utf-8">
<meta name="quarto:offset" content="{root}"><meta name="viewport" content="width=device-width">
<style>{style} body {{ margin: 8px; }}</style></head><body>
<header id="title-block-header" class="quarto-title-block"><h1>T</h1>
<p class="description">C</p></header>
<a class="toc-action" href="{source}">Edit this page</a>
<div style="height: 2000px"></div><h2 id="below">Below</h2>
<div class="cell-output cell-output-stdout"><pre><code>{wide}</code></pre></div>
<pre><code>{wide}</code></pre>
<span class="math display"><span style="display: inline-block; width: 900px">formula</span></span>
<div class="cell-output cell-output-display"><table class="dataframe"><thead>
<tr><th></th><th>accuracy</th><th>words</th></tr><tr><th>class</th><th></th><th></th></tr></thead>
<tbody><tr><th>cat</th><td>+1.2 [0.9, 1.5]</td><td>three of them</td></tr>
<tr><th>dog</th><td>-3 ± 1 %</td><td>a1</td></tr></tbody></table></div>
<div style="height: 2000px"></div>{script}</body></html>"""
CHAPTER = "https://github.dev/someone/book/blob/main/nbs/03a_class_structure.ipynb"
COLAB = (
    "https://colab.research.google.com/github/someone/book/blob/main/nbs/03a_class_structure.ipynb"
)


def page(tmp_path, source=CHAPTER):
    filled = PAGE.format(
        root="./",
        style=(NBS / "styles.css").read_text(encoding="utf-8"),
        script=(NBS / "page.html").read_text(encoding="utf-8"),
        source=source,
        wide="word " * 100,
    )
    (tmp_path / "page.html").write_text(filled, encoding="utf-8")
    (tmp_path / "mathjax").mkdir(exist_ok=True)
    (tmp_path / "mathjax" / "tex-svg-full.js").write_text("window.drawn = true;")
    return (tmp_path / "page.html").as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium here")
    with browser(path, tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_a_chapter_links_to_colab(chromium, tmp_path):
    chromium.open(page(tmp_path))
    assert chromium.evaluate("document.querySelector('.open-in').href") == COLAB
    for other in ("https://github.dev/a/b/blob/main/nbs/app/06_cli.ipynb", "https://d.e/"):
        chromium.open(page(tmp_path, other))
        assert chromium.evaluate("document.querySelector('.open-in') === null")
    chromium.open(page(tmp_path, CHAPTER.replace("dev", "com").replace("blob", "edit")))
    assert chromium.evaluate("document.querySelector('.open-in').href") == COLAB


def test_numbers_stand_to_the_right(chromium, tmp_path):
    chromium.open(page(tmp_path))
    of = "[...document.querySelectorAll('tbody td')].map((c) => getComputedStyle(c).textAlign)"
    assert [side == "right" for side in chromium.evaluate(of)] == [True, False, True, False]
    heads = (
        "[...document.querySelectorAll('thead tr')].map((r) => r.innerText.trim().split(/\\s+/))"
    )
    assert chromium.evaluate(heads) == [["class", "accuracy", "words"]]


def test_formulas_are_drawn_without_a_network(chromium, tmp_path):
    chromium.open(page(tmp_path))
    until = "new Promise((done) => setTimeout(() => done(window.drawn === true), 300))"
    assert chromium.evaluate(until)


def test_a_heading_is_not_hidden_by_the_bar(chromium, tmp_path):
    chromium.open(page(tmp_path) + "#below")
    assert chromium.evaluate("document.querySelector('#below').getBoundingClientRect().top") >= 60


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_does_not_scroll_sideways(chromium, tmp_path, width):
    chromium.open(page(tmp_path), width=width)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width

"""README.md is the text of the index notebook, its links lead somewhere, and its two commands are
the ones CI runs.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)


def test_readme_is_the_index_notebook():
    assert README.read_text(encoding="utf-8") == readme.readme_text(INDEX), (
        "stale: run `python .ci/readme.py`"
    )


def test_relative_links_exist():
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text(encoding="utf-8"))
    broken = [
        u for u in links if "://" not in u and u[0] != "#" and not (ROOT / u.split("#")[0]).exists()
    ]
    assert not broken


# --- three screens


SCREEN = 45  # lines of 24 pixels in a window of 1080
WIDTH = 100  # characters of 16 pixels in GitHub's column, in a window 1280 pixels wide
PICTURE = 16  # lines


def shown_width(markdown):
    "Characters of a paragraph that are seen: of a link its words."
    return len(re.sub(r"\]\([^)\s]+\)|[*`\[]", "", markdown))


def rendered_lines(markdown):
    """(what, lines) of each block of a page, as GitHub draws it, counted generously.

    A paragraph takes its lines and an empty one, a heading three, code its lines and two for its
    frame.
    """
    found = []
    parts = re.split(r"^(```\w*\n.*?^```$)", markdown, flags=re.M | re.S)
    for part in parts:
        if part.startswith("```"):
            found.append(("code", part.count("\n") - 1 + 2))
            continue
        for block in filter(None, (piece.strip() for piece in part.split("\n\n"))):
            if block.startswith("#"):
                found.append(("heading", 3))
            elif block.startswith("!["):
                found.append(("picture", PICTURE))
            elif block.startswith("|"):
                found.append(("table", 2 * len(block.splitlines())))
            else:
                lines = [-(-shown_width(line) // WIDTH) for line in block.splitlines()]
                found.append(("text", sum(lines) + 1))
    return found


def first_screen(blocks):
    "Those that fit."
    shown, height = [], 0
    for what, lines in blocks:
        height += lines
        if height > SCREEN:
            break
        shown.append(what)
    return shown


def test_lines_are_counted():
    word = "a" * 99
    page = f"# T\n\n{word} b\n\n![p](q.png)\n\n```sh\nx\ny\n```\n\n- a\n- [{word}](z) c\n"
    assert rendered_lines(page) == [
        ("heading", 3),
        ("text", 3),
        ("picture", 16),
        ("code", 4),
        ("text", 4),
    ]
    assert first_screen([("text", 44), ("heading", 3)]) == ["text"]


def test_readme_fits_on_three_screens():
    text = README.read_text(encoding="utf-8")
    assert sum(lines for _, lines in rendered_lines(text)) <= 3 * SCREEN
    for part in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S):
        assert max(map(len, part.splitlines())) <= WIDTH, part


def test_the_first_screen_has_the_problem_a_picture_and_the_papers_headline():
    text = README.read_text(encoding="utf-8")
    blocks = first_screen(rendered_lines(text))
    assert blocks.count("picture") == 1 and blocks[:2] == ["heading", "text"]
    start = text.partition("\n## ")[0]
    assert len(rendered_lines(start)) <= len(blocks), "what stands above Try it is one screen"
    for needed in ("This library is for", "hs.rebalance", "35 % [25, 47]", "should_i_operate"):
        assert needed in start
    picture = re.search(r"!\[(.+?)\]\(([^)]+)\)", start)
    assert len(picture[1]) > 60, "alternative text"
    assert (ROOT / picture[2]).stat().st_size < 100_000


def test_the_main_example_is_rebalance():
    example = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    assert any("hs.rebalance(" in part for part in example)


# --- commands


def test_two_commands():
    first, second = readme.commands(README.read_text(encoding="utf-8"))
    assert first.endswith("hessian-surgery demo --out demo") and second.endswith(
        "pytest -q -n 3 --dist worksteal tests"
    )


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        ["pip install . && hessian-surgery demo --out demo"],
        ["a", "b"],
        ["a", "b", "c"],
        [
            "pip install .\ntrue && hessian-surgery demo --out demo",
            "pip install -e '.[dev]' && nbdev_test && pytest",
        ],
    ],
)
def test_other_commands_are_refused(blocks):
    with pytest.raises(SystemExit):
        readme.commands("".join(f"```sh\n{b}\n```\n" for b in blocks))


def test_cells(tmp_path):
    """Raw and hidden cells and pictures are left out; links start at the notebooks' folder;
    printed text stays.
    """

    def md(s):
        return dict(cell_type="markdown", source=s)

    def code(s, *outputs):
        return dict(cell_type="code", source=s.splitlines(True), outputs=list(outputs))

    def result(**data):
        return dict(
            output_type="execute_result", data={k.replace("_", "/"): v for k, v in data.items()}
        )

    nbs = tmp_path / "nbs"
    nbs.mkdir()
    (nbs / "a.ipynb").touch()
    cells = [
        dict(cell_type="raw", source="---\nskip_exec: true\n---"),
        md("# T\n\n> claim"),
        md("[a](a.ipynb#x), [b](b.ipynb)\n```md\n[a](a.ipynb)\n```"),
        code("#| hide\nimport os"),
        code("#| eval: false\n1+1", result(text_plain=["2"])),
        code("#| echo: false\nplot()", result(text_plain="<Figure>", image_png="iV")),
        code("#| output: false\nf()", result(text_plain="3")),
        code(""),
    ]
    index = nbs / "index.ipynb"
    index.write_text(json.dumps(dict(cells=cells)))
    assert readme.readme_text(index) == (
        "# T\n\n> claim\n\n[a](nbs/a.ipynb#x), [b](b.ipynb)\n```md\n[a](a.ipynb)\n```\n\n"
        "```python\n1+1\n```\n\n```text\n2\n```\n\n```python\nf()\n```\n"
    )

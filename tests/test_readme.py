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


def test_two_commands():
    first, second = readme.commands(README.read_text(encoding="utf-8"))
    assert first.endswith("hessian-surgery demo --out demo") and second.endswith(
        "pytest -q -n 2 --dist worksteal tests"
    )


@pytest.mark.parametrize(
    "blocks",
    [[], ["pip install . && hessian-surgery demo --out demo"], ["a", "b"], ["a", "b", "c"]],
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

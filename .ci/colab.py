"""Give chapters the hidden cell that installs the package in Colab, behind their title.

    python .ci/colab.py                    every numbered chapter
    python .ci/colab.py nbs/00_hvp.ipynb   these only

The site links to Colab from every chapter (`nbs/page.html`). Colab opens a notebook alone, so the
cell clones the repository, for the stored runs, and installs the package from there. Elsewhere it
does nothing. Only the standard library is needed.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CELL_ID = "c01ab000"
SOURCE = """\
#| hide
if "google.colab" in str(get_ipython()):  # it opens this file alone
    url = "https://github.com/hessian-surgery/hessian_surgery_nb"
    !test -d /content/book || git clone -q --depth 1 {url} /content/book
    !pip show -q hessian-surgery-nb || pip install -q /content/book
    %cd -q /content/book/nbs"""


def chapters():
    "The method's chapters and their companions."
    return sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))


def with_cell(cells):
    "The cells of a notebook, that one behind the title."
    kept = [cell for cell in cells if cell.get("id") != CELL_ID]
    titles = [place for place, cell in enumerate(kept) if cell["cell_type"] == "markdown"]
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": CELL_ID,
        "metadata": {},
        "outputs": [],
        "source": SOURCE.splitlines(keepends=True),
    }
    return [*kept[: titles[0] + 1], cell, *kept[titles[0] + 1 :]]


def main():
    for path in [Path(name) for name in sys.argv[1:]] or chapters():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = with_cell(notebook["cells"])
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

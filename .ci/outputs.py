"""Run notebooks from top to bottom and store their outputs, cleaned (needs the `dev` extra).

    python .ci/outputs.py                    every notebook, in reading order
    python .ci/outputs.py nbs/00_hvp.ipynb   these only

Cells marked `#| eval: false`, or with one of settings.ini's tst_flags, are not run and
keep the outputs they have.
"""

import base64
import io
import os
import re
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in nbdev_test: sums in one order

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from PIL import Image


def is_skipped(source, flags):
    skip = rf"^\s*#\s*\|\s*(eval:\s*false|{'|'.join(flags)})\s*$"
    return "nbdev_export(" in source or re.search(skip, source, re.M | re.I)


def with_fewer_colours(outputs):
    "Pictures in 128 colours, which nobody tells from all of them, at half the size."
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            smaller = io.BytesIO()
            picture.quantize(128, dither=Image.Dither.NONE).save(smaller, "png", optimize=True)
            data["image/png"] = base64.b64encode(smaller.getvalue()).decode() + "\n"
    return outputs


WIDEST = 100  # characters that a page shows of a line


def broken_lines(shown):
    "A text as a narrow terminal shows it: long lines go on below, indented, at spaces."
    lines = []
    for line in shown.split("\n"):
        if len(line) > WIDEST:
            start = " " * (len(line) - len(line.lstrip()) + 4)
            line = textwrap.fill(
                line,
                WIDEST,
                subsequent_indent=start,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
                replace_whitespace=False,
            )
        lines.append(line)
    return "\n".join(lines)


def narrow(outputs):
    "Texts that a page shows as they are; where there is a table or a picture it shows that."
    for output in outputs:
        data = output.get("data", {})
        if output["output_type"] == "stream":
            output["text"] = broken_lines("".join(output["text"])).splitlines(keepends=True)
        elif "text/plain" in data and not {"text/html", "text/markdown", "image/png"} & set(data):
            shown = broken_lines("".join(data["text/plain"]))
            data["text/plain"] = shown.splitlines(keepends=True)
    return outputs


def store(path, cfg):
    """Run one notebook in its own folder, in a fresh shell; stop at its first error, leaving the
    file as it was.
    """
    nb, flags = read_nb(path), cfg.tst_flags.split()
    shell = CaptureShell(path, mpl_format="png")
    for cell in nb.cells:
        if cell.cell_type != "code" or is_skipped(cell.source, flags):
            continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc:
            sys.exit(shell.prettytb(fname=path))
        cell.outputs = narrow(with_fewer_colours(cell.outputs))
    write_nb(nb, path)
    nbdev_clean(str(path))


def main():
    cfg = get_config()
    sys.path.insert(0, str(cfg.config_path))
    names = [Path(a).resolve() for a in sys.argv[1:]] or sorted(
        cfg.nbs_path.resolve().rglob("[!._]*.ipynb")
    )
    for path in names:
        # a child per notebook, so that no state passes from one to the next
        start, pid = time.time(), os.fork()
        if pid == 0:
            os.chdir(path.parent)
            store(path, cfg)
            sys.stdout.flush()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"{path.name}: {'stored' if code == 0 else 'FAILED'} in {time.time() - start:.0f} s")
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()

"""README.md is the text of nbs/index.ipynb, nbs/llms.txt a list of all pages with their claims.

Only the standard library is needed to make them.

python .ci/readme.py              write both
python .ci/readme.py --check      exit 1 if one of them is stale
python .ci/readme.py --command 1  print README.md's first command (or its second, with 2)
"""

import argparse
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each of the two commands must hold, so that CI never runs something else in their place.
COMMANDS = [
    ("pip install .", "hessian-surgery demo --out demo"),
    ("pip install -e '.[dev]'", "nbdev_test", "pytest"),
]

DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
LINK = re.compile(r"(\]\()([^)\s#]+)")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.M | re.S)


def text(s):
    return s if isinstance(s, str) else "".join(s)


def fenced(lang, body):
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", body)), default=0))
    return f"{ticks}{lang}\n{body}\n{ticks}"


def split_directives(source):
    "A code cell's `#|` lines as a dict, and the rest of its source."
    found, rest = {}, []
    for line in source.split("\n"):
        m = DIRECTIVE.match(line)
        if m:
            found[m[1]] = m[2].lower()
        else:
            rest.append(line)
    return found, "\n".join(rest).strip("\n")


def relink(markdown, nbs):
    """Links are relative to the notebook; from README.md they start at its folder. Fenced code is
    left alone.
    """

    def fix(m):
        return m[1] + (
            f"{nbs.name}/{m[2]}" if "://" not in m[2] and (nbs / m[2]).exists() else m[2]
        )

    out, at = [], 0
    for m in FENCE.finditer(markdown):
        out += [LINK.sub(fix, markdown[at : m.start()]), m[0]]
        at = m.end()
    return "".join([*out, LINK.sub(fix, markdown[at:])])


def output_text(output):
    "What an output looks like without pictures; '' for pictures and for what goes to stderr."
    if output["output_type"] == "stream":
        return (
            fenced("text", text(output["text"]).rstrip())
            if output.get("name") == "stdout" and text(output["text"]).strip()
            else ""
        )
    data = output.get("data", {})
    if any(k.startswith("image/") for k in data):
        return ""
    if "text/markdown" in data:
        return text(data["text/markdown"]).strip()
    plain = text(data.get("text/plain", "")).strip("\n")
    return fenced("text", plain) if plain.strip() else ""


def cell_texts(cell, nbs):
    "The pieces of README.md which one cell gives, in order."
    source = text(cell["source"]).strip()
    if cell["cell_type"] == "raw":
        return
    directives, code = split_directives(source)
    if "hide" in directives or directives.get("include") == "false":
        return
    if cell["cell_type"] == "markdown":
        if source:
            yield relink(source, nbs)
        return
    if code and directives.get("echo") != "false":
        yield fenced("python", code)
    if directives.get("output") == "false":
        return
    for output in cell.get("outputs", []):
        piece = output_text(output)
        if piece:
            yield piece


def readme_text(notebook):
    "The whole of README.md, from the path of the index notebook."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return (
        "\n\n".join(piece for cell in cells for piece in cell_texts(cell, notebook.parent)) + "\n"
    )


def title_and_claim(notebook):
    "What stands in its first cell."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    first = next(cell for cell in cells if cell["cell_type"] == "markdown")
    title, claim = [line for line in text(first["source"]).split("\n") if line.strip()]
    return title.removeprefix("# "), claim.removeprefix("> ")


def page_of(path):
    "nbdev drops the number from a page's name: 02a_data.ipynb becomes data.html."
    folder, _, name = path.rpartition("/")
    stem = re.sub(r"^\d+[a-z]?_", "", name.removesuffix(".ipynb"))
    return f"{folder}/{stem}.html" if folder else f"{stem}.html"


def llms_text(nbs, site):
    "The pages of the site in the order and the sections of its sidebar, one a line."
    name, claim = title_and_claim(nbs / "index.ipynb")
    lines = [f"# {name}", "", f"> {claim}", "", "## Start here", ""]
    for line in (nbs / "sidebar.yml").read_text(encoding="utf-8").split("\n"):
        section = re.match(r"\s*- section: \"?(.+?)\"?$", line)
        page = re.match(r"\s*- (\S+\.ipynb)$", line)
        if section:
            lines += ["", f"## {section[1]}", ""]
        if page:
            title, claim = title_and_claim(nbs / page[1])
            lines.append(f"- [{title}]({site}/{page_of(page[1])}): {claim}")
    return "\n".join(lines) + "\n"


def site_address(root):
    "Where the site stands, from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"]


def commands(readme):
    "The two commands of README.md: its only two ```sh blocks, each one list of commands."
    blocks = [b.strip() for b in re.findall(r"^```sh[ \t]*\n(.*?)^```[ \t]*$", readme, re.M | re.S)]
    if len(blocks) != len(COMMANDS):
        raise SystemExit(
            (
                f"README.md must hold exactly {len(COMMANDS)} ```sh blocks, found {len(blocks)}; "
                "mark other examples ```bash"
            )
        )
    for i, (block, parts) in enumerate(zip(blocks, COMMANDS), 1):
        missing = [p for p in parts if p not in block]
        if missing:
            raise SystemExit(f"command {i} of README.md must contain {missing}, got: {block}")
        broken = [line for line in block.split("\n")[:-1] if not line.endswith("&&")]
        if broken:  # what fails must end it, when it is pasted as well
            raise SystemExit(f"command {i} of README.md must go on with &&, got: {broken[0]}")
    return blocks


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true", help="exit 1 if one of them is stale")
    p.add_argument("--command", type=int, choices=(1, 2), help="print this command of README.md")
    args = p.parse_args()
    readme = ROOT / "README.md"
    if args.command:
        print(commands(readme.read_text(encoding="utf-8"))[args.command - 1])
        return
    nbs = ROOT / "nbs"
    made = {
        readme: readme_text(nbs / "index.ipynb"),
        nbs / "llms.txt": llms_text(nbs, site_address(ROOT)),
    }
    for path, new in made.items():
        if not args.check:
            path.write_text(new, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != new:
            sys.exit(f"{path.name} does not follow from the notebooks: run `python .ci/readme.py`")


if __name__ == "__main__":
    main()

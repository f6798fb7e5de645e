"""Every internal link, picture and anchor of the built site leads somewhere. Skipped when no site
was built.
"""

from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_docs"
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
BASE = (
    config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"] + "/"
)  # where the site's own absolute links start


class Page(HTMLParser):
    "The links a page makes and the anchors it offers."

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in attrs}
        self.anchors.add(attrs.get("id", ""))
        if tag == "a":
            self.anchors.add(attrs.get("name", ""))
        if tag in ("a", "link"):
            self.links.append(attrs.get("href", ""))
        if tag in ("img", "script", "source", "video", "iframe"):
            self.links.append(attrs.get("src", ""))
        for candidate in attrs.get("srcset", "").split(","):
            if not candidate.strip().startswith("data:"):
                self.links.append((candidate.split() or [""])[0])

    handle_startendtag = handle_starttag


def broken_links(site, base):
    """`page: link` for each link within `site` (or to the address `base` where it will stand) that
    leads nowhere.
    """
    site = site.resolve()
    pages = {
        p: Page(p)
        for p in sorted(site.rglob("*.html"))
        if "site_libs" not in p.relative_to(site).parts
    }
    broken = []
    for path, page in pages.items():
        here = urljoin(base, path.relative_to(site).as_posix())
        for link in page.links:
            url = urlsplit(urljoin(here, link.strip()))
            where = url._replace(query="", fragment="").geturl()
            if not link.strip() or (where + "/" != base and not where.startswith(base)):
                continue
            target = site / unquote(where[len(base) :])
            if target.is_dir():
                target = target / "index.html"
            anchors = pages[target].anchors if target in pages else {unquote(url.fragment)}
            if not target.is_file() or unquote(url.fragment) not in anchors:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def test_checker_sees_what_is_broken(tmp_path):
    "The checker itself, on a site of two pages with one fault of each kind."
    (tmp_path / "sub").mkdir()
    (tmp_path / "pic.png").touch()
    (tmp_path / "sub" / "b.html").write_text(
        "<a href='../index.html#here'>ok</a><a href='../#gone'>bad</a><img src='pic.png'>"
    )
    good = [
        "#here",
        "sub/b.html",
        "pic.png?v=1",
        "",
        "#",
        "https://elsewhere.org/x",
        "mailto:a@b.c",
        "data:,x",
        "https://me.io/p/sub/b.html",
    ]
    bad = ["#nowhere", "c.html", "https://me.io/p/c.html", "sub/b.html#x"]
    (tmp_path / "index.html").write_text(
        "<h2 id='here'/>"
        + "".join(f"<a href='{u}'>x</a>" for u in good + bad)
        + "<img src='no.png'/>"
    )
    assert broken_links(tmp_path, "https://me.io/p/") == [
        *(f"index.html: {u}" for u in [*bad, "no.png"]),
        "sub/b.html: ../#gone",
        "sub/b.html: pic.png",
    ]


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no built site in _docs/")
def test_no_broken_link():
    assert broken_links(SITE, BASE) == []


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no built site in _docs/")
def test_every_notebook_has_its_page():
    "nbdev drops the number from a page's name: 02a_data.ipynb becomes data.html."
    names = [p.stem for p in (ROOT / "nbs").glob("[!._]*.ipynb")]
    pages = [n.partition("_")[2] if n[0].isdigit() else n for n in names]
    assert [p for p in pages if not (SITE / f"{p}.html").is_file()] == []

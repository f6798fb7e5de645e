"""The page that one can play with: complete without a script, and played with in a real browser.

The first half reads the HTML. The second drives a headless Chromium, and is skipped where there is
none. The check of accessibility wants axe-core too: the path of its axe.min.js in AXE_CORE.
"""

import json
import os
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import browser, find_browser

from hessian_surgery_nb.app.pages import heading_tag, html_page, paragraph_tag, table_tag
from hessian_surgery_nb.app.slider import IN_SIGHT, slider_section
from hessian_surgery_nb.app.slider_points import slider_point
from hessian_surgery_nb.foundations.accuracy import class_report_of
from hessian_surgery_nb.foundations.testbed import new_axes
from hessian_surgery_nb.app.pages import figure_tag

MINUS = "\N{MINUS SIGN}"
NASTY = ("<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", '"&', "d")
AXE = os.environ.get("AXE_CORE")


def made(num_classes, images=40, names=None, prices=(0.005, 0.01, 0.02)):
    "A start and the points of two methods; the second point is recommended."
    draw = torch.Generator().manual_seed(num_classes)
    labels = torch.arange(num_classes).repeat_interleave(images)
    logits = torch.randn(len(labels), num_classes, generator=draw)
    logits += 2.0 * torch.nn.functional.one_hot(labels, num_classes)
    logits += torch.randn(num_classes, generator=draw)
    start = class_report_of(logits, labels, names)
    before = logits.argmax(1) == labels
    points = []
    for price in prices:
        for method, share in (("biases", 1.0), ("surgery", 0.5)):
            shift = -20 * price**0.5 * share * (start.accuracy - start.balanced)
            after = (logits + shift).argmax(1) == labels
            how = f"rebalance --methods {method} --max-global-drop {100 * price:g}"
            options = dict(method=method, price=price, command=how)
            points.append(slider_point(start, before, after, labels, **options))
    points[1] = replace(points[1], recommended=True)
    return start, points


def page_of(num_classes, **options):
    section = slider_section(*made(num_classes, **options))
    return html_page("Points", [heading_tag("Points", 1), *section])


PAGES = {number: page_of(number) for number in (4, 10, 200)}
PAGES["nasty"] = page_of(4, names=NASTY)


class Parsed(HTMLParser):
    "What a page is made of."

    def __init__(self, page):
        super().__init__()
        self.tags = []  # (name, attributes)
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, *names):
        return [attrs for tag, attrs in self.tags if tag in names]


every_page = pytest.mark.parametrize("name", PAGES)


# --- as it is read


@every_page
def test_the_page_is_one_file_that_refers_to_its_own_parts(name):
    page = Parsed(PAGES[name])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for key in ("for", "aria-labelledby", "list"):
        assert {attrs[key] for _, attrs in page.tags if key in attrs} <= set(ids)
    for key in ("src", "href", "srcset"):
        assert all(attrs[key].startswith("data:") for _, attrs in page.tags if key in attrs)
    assert not re.search(r"url\(|@import|https?:", PAGES[name])
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[:2] == [1, 2]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))


@every_page
def test_without_a_script_the_chosen_point_and_all_others_are_there(name):
    page = PAGES[name]
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    rows = re.findall(r'class="row" data-number="(\d+)"', body)
    data = json.loads(re.search(r'id="slider-data">(.*?)</script>', page, re.S)[1])
    chosen = data["points"][data["chosen"]]
    text = Parsed(body).text
    assert sorted(map(int, rows)) == list(range(len(chosen["bars"])))
    assert all(change in text for change in chosen["changes"])
    assert chosen["says"] in text and chosen["command"] in text
    assert chosen["label"] == "surgery, price 0.5 pp"
    for point in data["points"]:
        assert point["label"] in text and point["command"] in text
        assert all(value.split()[0] in text for value, _ in point["figures"])
    hidden = [attrs for _, attrs in Parsed(page).tags if "data-needs-script" in attrs]
    assert hidden and all("hidden" in attrs for attrs in hidden)


def test_names_never_become_markup():
    page = Parsed(PAGES["nasty"])
    assert page.all("img") == [] and len(page.all("script")) == 2
    data = page.text  # of scripts too
    assert (
        "window.hacked" in data
        and NASTY[0]
        in Parsed(re.sub(r"<(script|style).*?</\1>", "", PAGES["nasty"], flags=re.S)).text
    )


def test_many_classes_are_folded():
    folded = PAGES[200].split("<details><summary>The other ")[1]
    assert folded.startswith(f"{200 - IN_SIGHT} of 200 classes")
    assert "The other" not in PAGES[10]


# --- as it is played with


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome here")
    with browser(path, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, page in PAGES.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    (folder / "plain.html").write_text(plain_page(), encoding="utf-8")
    return folder


def plain_page():
    "A page without a slider, with a picture and a wide table."
    ax = new_axes(title="A title that is much too long for the width of a telephone")
    ax.barh(["a long name of a method, in words", "b"], [1, 2])
    header = ["class", *(f"column number {number} (%)" for number in range(9))]
    body = [
        heading_tag("Plain", 1),
        paragraph_tag("Words."),
        figure_tag(ax, "Two bars.", "Two bars."),
        table_tag(header, [["cat", *["12.3 [4.5, 6.7]"] * 9]], "A wide table"),
    ]
    return html_page("Plain", body)


def data_of(tab):
    return json.loads(tab.evaluate("document.getElementById('slider-data').textContent"))


def shown(tab, part):
    return tab.evaluate(f"document.getElementById('slider-{part}').textContent")


def rows_in(tab, part):
    return tab.evaluate(
        f"[...document.querySelectorAll('#slider-{part} .row')].map((row) => +row.dataset.number)"
    )


def check_point(tab, point):
    "The page shows this point, all of it."
    assert shown(tab, "label") == point["label"]
    assert shown(tab, "says") == point["says"]
    assert shown(tab, "command") == point["command"]
    valuetext = "document.getElementById('slider-price').getAttribute('aria-valuetext')"
    assert tab.evaluate(valuetext) == point["brief"]
    figures = """[...document.querySelectorAll("#slider-figures li")].map((item) =>
      [item.children[0].textContent, item.children[2].textContent])"""
    assert tab.evaluate(figures) == point["figures"]
    rows = tab.evaluate(
        """[...document.querySelectorAll(".row")].map((row) => {
          const box = (name) => row.querySelector(name).getBoundingClientRect();
          const bar = box(".bar"), fill = box(".fill"), whisker = box(".whisker");
          const at = (x) => 2 * (x - bar.left) / bar.width - 1;
          return [Number(row.dataset.number), row.querySelector(".level").textContent,
            row.querySelector(".change").textContent, bar.width,
            at(fill.left), at(fill.right), at(whisker.left), at(whisker.right)];
        })"""
    )
    for number, level, change, width, left, right, low, high in rows:
        assert (level, change) == (point["levels"][number], point["changes"][number])
        if width == 0:
            continue  # in a fold
        ends = point["bars"][number]
        assert left == pytest.approx(min(0, ends[1]), abs=0.02)
        assert right == pytest.approx(max(0, ends[1]), abs=0.02)
        assert (low, high) == pytest.approx((ends[0], ends[2]), abs=0.03)


@every_page
def test_the_keyboard_goes_through_all_points(tab, place, name):
    tab.open(f"file://{place}/{name}.html")
    data = data_of(tab)
    points = data["points"]
    check_point(tab, points[data["chosen"]])
    tab.evaluate("document.getElementById('slider-price').focus()")
    tab.press("Home")
    for point in points:
        check_point(tab, point)
        tab.press("ArrowRight")
    tab.press("ArrowLeft")
    check_point(tab, points[-2])
    tab.press("End")
    check_point(tab, points[-1])
    assert shown(tab, "status") == ""  # not while it moves
    time.sleep(0.6)
    assert shown(tab, "status") == f"{points[-1]['brief']}. {points[-1]['says']}"
    tab.click("#slider-chosen")
    check_point(tab, points[data["chosen"]])
    assert tab.evaluate("document.activeElement.id") == "slider-price"  # the button is disabled now
    assert tab.complaints() == []
    assert tab.evaluate("window.hacked") is None


def test_tab_reaches_everything_that_acts(tab, place):
    tab.open(f"file://{place}/200.html")
    reached = []
    for _ in range(14):
        tab.press("Tab")
        reached.append(
            tab.evaluate("(document.activeElement.id || document.activeElement.textContent).trim()")
        )
    wanted = ["slider-price", "slider-method", "weakest first", "by change", "slider-copy"]
    assert [name for name in wanted if name not in reached] == []
    assert any(name.startswith("The other") for name in reached)


def test_classes_are_ordered_as_asked(tab, place):
    tab.open(f"file://{place}/200.html")
    data = data_of(tab)
    changes = [bar[1] for bar in data["points"][data["chosen"]]["bars"]]
    weakest = data["weakest"]
    largest = sorted(range(200), key=lambda number: (-abs(changes[number]), weakest[number]))
    seen = set(largest[:IN_SIGHT])
    others = set(range(200)) - seen
    assert rows_in(tab, "bars") == sorted(seen, key=lambda number: weakest[number])
    assert rows_in(tab, "others") == sorted(others, key=lambda number: weakest[number])
    for order, key in (("change", lambda number: (-changes[number], number)), ("given", int)):
        tab.click(f"[data-order={order}]")
        assert rows_in(tab, "bars") == sorted(seen, key=key)
        assert rows_in(tab, "others") == sorted(others, key=key)
        pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.order)"
        assert tab.evaluate(pressed) == [order]


def test_one_method_alone(tab, place):
    tab.open(f"file://{place}/10.html")
    points = data_of(tab)["points"]
    tab.evaluate(
        "{ const m = document.getElementById('slider-method'); m.value = 'biases';"
        "m.dispatchEvent(new Event('change')); }"
    )
    own = [point for point in points if point["method"] in ("as it is", "biases")]
    check_point(tab, own[-1])
    tab.evaluate("document.getElementById('slider-price').focus()")
    tab.press("Home")
    for point in own:
        check_point(tab, point)
        tab.press("ArrowRight")
    dots = "document.querySelectorAll('#slider-plane [data-point]:not([hidden])').length"
    assert tab.evaluate(dots) == len(own)
    tab.click("#slider-chosen")
    assert shown(tab, "label") == "surgery, price 0.5 pp"


def test_a_point_of_the_plane_can_be_taken(tab, place):
    tab.open(f"file://{place}/10.html")
    tab.click('#slider-plane [data-point="4"]')
    check_point(tab, data_of(tab)["points"][4])


@pytest.mark.parametrize("works", [True, False])
def test_the_command_is_copied_or_at_least_selected(tab, place, works):
    tab.open(f"file://{place}/10.html")
    refuse = "Object.defineProperty(navigator, 'clipboard', { value: undefined });"
    heard = "document.addEventListener('copy', () => { window.heard = String(getSelection()); });"
    tab.evaluate(heard + refuse)
    if not works:
        tab.evaluate("document.execCommand = () => false")
    tab.click("#slider-copy")
    time.sleep(0.2)
    command = shown(tab, "command")
    assert tab.evaluate("String(getSelection())") == command
    if works:
        assert (shown(tab, "copied"), tab.evaluate("window.heard")) == ("Copied.", command)
    else:
        assert shown(tab, "copied").startswith("Selected: press Ctrl+C")


@every_page
def test_nothing_is_lost_without_scripts(tab, place, name):
    tab.open(f"file://{place}/{name}.html", scripts=False)
    # the debugger's own questions are answered all the same
    visible = "(e) => e.offsetParent !== null && e.getBoundingClientRect().height > 0"
    assert tab.evaluate(f"({visible})(document.getElementById('slider-price'))") is False
    assert tab.evaluate(f"[...document.querySelectorAll('#slider-bars .row')].every({visible})")
    assert tab.evaluate(f"({visible})(document.querySelector('table'))")
    assert "needs JavaScript" in tab.evaluate("document.body.innerText")


@pytest.mark.parametrize("name", [*PAGES, "plain"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_runs_out_of_the_window(tab, place, name, width):
    tab.open(f"file://{place}/{name}.html", width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    small = """[...document.querySelectorAll("body *")].filter((e) =>
      e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 12).map((e) => e.tagName)"""
    assert tab.evaluate(small) == []
    cut = """[...document.querySelectorAll(".row > *")].filter((e) =>
      e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"""
    assert tab.evaluate(cut) == []


def test_wide_tables_scroll_by_keyboard_and_pictures_fit(tab, place):
    tab.open(f"file://{place}/plain.html", width=390)
    region = "document.querySelector('.scroll:has(table)')"
    assert tab.evaluate(f"{region}.scrollWidth > {region}.clientWidth")
    assert tab.evaluate(f"[{region}.tabIndex, {region}.getAttribute('role')]") == [0, "region"]
    assert tab.evaluate(f"{region}.getAttribute('aria-label')") == "A wide table"
    tab.evaluate(f"{region}.focus()")
    tab.press("ArrowRight", 3)
    time.sleep(0.5)
    assert tab.evaluate(f"{region}.scrollLeft") > 0
    natural, wide = (
        tab.evaluate("(i => [i.currentSrc.length, i.naturalWidth, i.width])(document.images[0])")
        for _ in (tab.open(f"file://{place}/plain.html", width=w) for w in (390, 1280))
    )
    assert natural[0] != wide[0]  # a picture of its own, whose letters are not made smaller
    assert natural[2] / natural[1] > 0.9


@pytest.mark.parametrize("dark", [False, True])
def test_gain_and_loss_differ_in_grey(tab, place, dark):
    tab.open(f"file://{place}/10.html", dark=dark)
    patterns = """["1", "-1"].map((sign) => {
      const fill = document.querySelector(`.row[data-sign="${sign}"] .fill`);
      return getComputedStyle(fill).backgroundImage;
    })"""
    gain, loss = tab.evaluate(patterns)
    assert gain == "none" and loss.startswith("repeating-linear-gradient")
    changes = tab.evaluate(
        """[...document.querySelectorAll(".row")].map((row) =>
          [Number(row.dataset.sign), row.querySelector(".change").textContent[0]])"""
    )
    assert all(mark == {1: "+", -1: MINUS}[sign] for sign, mark in changes if sign)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark


@pytest.mark.skipif(AXE is None, reason="AXE_CORE, the path of axe.min.js, is not set")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", [*PAGES, "plain"])
def test_axe_finds_nothing(tab, place, name, width, dark):
    tab.open(f"file://{place}/{name}.html", width=width, dark=dark)
    tab.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    tab.evaluate(Path(AXE).read_text(encoding="utf-8") + ";0")
    found = tab.evaluate(
        "axe.run().then((r) => r.violations.map((v) => "
        "[v.impact, v.id, v.nodes.map((n) => n.html.slice(0, 120))]))"
    )
    assert found == []

"""The report as a page: what is in it, that it needs nothing else, that nothing in it runs."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from samples import COMPARISONS, make_depth_curve, make_report

from llm_pruner.errors import InvalidDataError
from llm_pruner.report.html_page import write_html
from llm_pruner.report.summary import change_text, number_text, verdict_text
from llm_pruner.results import Comparison, PruningPlan, PruningReport
from llm_pruner.visualization.quality import plot_comparisons

EVIL = "</p><script>alert(1)</script><img src=x onerror=\"a('b')\"> `$title` ${body} & \u202e"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails on a tag that closes no open one."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page(tmp_path, report, **options):
    path = tmp_path / "report.html"
    write_html(report, path, **options)
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_stands_alone_and_every_picture_is_described(tmp_path):
    figures = {"semantic_comparison": plot_comparisons(COMPARISONS[1:3])}
    found = page(tmp_path, make_report(), figures=figures, curve=make_depth_curve([-0.1]))
    pictures = found.all("img")
    assert len(pictures) == 6
    for picture in pictures:
        assert len(picture["alt"]) > 40
        kind, data = picture["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        assert root.tag.endswith("svg")
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
    allowed = {"src": "data:", "href": "#"}
    for _, attributes in found.elements:
        for name, start in allowed.items():
            assert attributes.get(name, start).startswith(start)
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    for tag in ("script", "link", "iframe", "object", "embed", "form", "base"):
        assert found.all(tag) == []
    style = (tmp_path / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|http", style)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    headings = [tag for tag, _ in found.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_what_is_untrusted_is_text(tmp_path):
    numbered = enumerate(COMPARISONS)
    evil = [replace(entry, name=f"{EVIL}{place}", note=EVIL) for place, entry in numbered]
    evil += [Comparison(EVIL, EVIL, EVIL, 1.0, 2.0)]
    curve = make_depth_curve([-0.1], EVIL, unit=EVIL)
    steps = [{"action": EVIL, "kept": True, "change": -0.1, "samples": 5}]
    report = make_report(EVIL, comparisons=evil)
    report = replace(report, plan=replace(report.plan, steps=steps, options={EVIL: EVIL}))
    found, plain = page(tmp_path, report, curve=curve), page(tmp_path, make_report())
    assert {tag for tag, _ in found.elements} == {tag for tag, _ in plain.elements} | {"td"}
    names = {name for _, attributes in found.elements for name in attributes}
    assert names == {name for _, attributes in plain.elements for name in attributes}
    assert found.text.count(EVIL) > 20
    assert any(EVIL in picture["alt"] for picture in found.all("img"))


def test_the_page_says_what_the_report_says(tmp_path):
    report = make_report()
    found = page(tmp_path, report)
    text = " ".join(found.text.split())
    for entry in report.comparisons:
        for part in (entry.name, number_text(entry.after), change_text(entry), verdict_text(entry)):
            assert part in text, (entry.name, part)
    assert "2 of 6 layers removed: 2, 3" in text
    assert "Of 5 measures of quality: 2 worse, 2 without a clear difference, 1 better" in text
    assert "Measured on 60 items" in text
    assert "75%" in text  # of the loss is back
    assert "seed7" in text
    marked = [i for i, item in enumerate(found.all("li")) if item.get("class") == "removed"]
    assert marked == [2, 3]
    groups = [text.index(title) for title in ("Size", "Speed", "Likelihood", "Tasks", "Answers")]
    assert groups == sorted(groups)
    for heading in ("What changed", "How the layers were chosen", "Sample answers"):
        assert heading in text
    assert "Cost by number of layers" not in text


def test_sections_without_content_are_left_out(tmp_path):
    bare = PruningPlan("m", 3, (1,))
    found = page(tmp_path, PruningReport(bare, "out", []))
    headings = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "report.html").read_text())
    assert headings == ["How the layers were chosen", "How to reproduce this"]
    assert found.all("img") == []
    assert "No measure of quality has an interval." in found.text


def test_equal_reports_give_equal_pages(tmp_path):
    for name in ("a", "b"):
        write_html(make_report(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_unknown_figure_is_refused(tmp_path):
    with pytest.raises(InvalidDataError, match=r"\['other'\]; known: layer_importance, "):
        write_html(make_report(), tmp_path / "a", figures={"other": None})
    assert not (tmp_path / "a").exists()

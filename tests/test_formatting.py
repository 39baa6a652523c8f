"""Numbers and texts in each language; every text of the pages and figures has its translation."""

import ast
import html.parser
import re

import pytest
from jinja2 import nodes

from tests.support.paths import ROOT
from trainer import formatting
from trainer.reporting import html as pages

# inspect.html shows messages of trainer.inspect_data, which are English, like the log.
TEMPLATES = ["base.html", "comparison.html", "heat_legend.html", "page.js", "report.html", "serve.html"]
FIELDS = re.compile(r"%\(\w+\)s|{\w+}|%%|</?\w+")


def source_of(template: str) -> str:
    return (ROOT / "trainer/reporting/templates" / template).read_text("utf-8")


def texts() -> set[str]:
    """The English texts that templates and modules translate."""
    found: set[str] = set()
    for template in TEMPLATES:
        for _, _, message in pages.environment(is_html=True).extract_translations(source_of(template)):
            found |= {message} if isinstance(message, str) else {text for text in message if text}
    for path in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("translate", "formatting.translate"):
                found.add(ast.literal_eval(node.args[0]))
    return found


def test_every_text_has_a_spanish_translation_with_the_same_fields():
    spanish = formatting.spanish_texts()
    assert texts() - set(spanish) == set(), "add them to trainer/spanish.toml"
    assert set(spanish) - texts() == set(), "no page has these texts: remove them from trainer/spanish.toml"
    for english, translated in spanish.items():
        assert sorted(FIELDS.findall(english)) == sorted(FIELDS.findall(translated)), english


class VisibleText(html.parser.HTMLParser):
    """The text of a template that a person would read, outside of code."""

    def __init__(self, source: str):
        super().__init__()
        self.hidden, self.found = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("alt", "aria-label", "title") and value]
        if tag in ("style", "script", "code"):
            self.hidden.append(tag)

    def handle_endtag(self, tag):
        if self.hidden and self.hidden[-1] == tag:
            self.hidden.pop()

    def handle_data(self, data):
        if not self.hidden:
            self.found.append(data)


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_text_of_a_page_is_left_untranslated(template):
    tree = pages.environment(is_html=True).parse(source_of(template))
    calls = [
        call for call in tree.find_all(nodes.Call) if getattr(call.node, "name", "") in ("_", "gettext", "ngettext")
    ]
    translated = {id(constant) for call in calls for constant in call.find_all(nodes.Const)}
    written = [node for output in tree.find_all(nodes.Output) for node in output.nodes]
    styles = [block for block in tree.find_all(nodes.Block) if block.name == "style"]
    css = {id(node) for block in styles for node in block.find_all(nodes.TemplateData)}
    if template.endswith(".html"):
        written = [node for node in written if id(node) not in css]
        source = "".join(node.data if isinstance(node, nodes.TemplateData) else "0" for node in written)
        assert [text for text in VisibleText(source).found if re.search("[a-z]{2}", text)] == []
    constants = [
        constant for node in written for constant in node.find_all(nodes.Const) if id(constant) not in translated
    ]
    texts_between_tags = [constant.value for constant in constants if re.search(r"\w \w", str(constant.value))]
    assert texts_between_tags == []
    assert re.findall(r'(?:textContent = |element\("\w+", )["`]\w.*', source_of(template)) == []  # of a script


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", ["1,000", "12,345", "3.14", "\u22121.5\u00a0%", "0.0012", "1e-05", "2.0 s"]),
        ("es", ["1000", "12\u00a0345", "3,14", "\u22121,5\u00a0%", "0,0012", "1e-05", "2,0 s"]),
    ],
)
def test_numbers_have_the_notation_of_the_language(language, expected):
    with formatting.in_language(language):
        shown = [
            formatting.number(1000),
            formatting.number(12345),
            formatting.decimal(3.14159, 2),
            formatting.percent(-0.015, 1),
            formatting.general(0.0012, 2),
            formatting.general(1e-5, 2),
            formatting.duration(2),
        ]
    assert shown == expected
    assert formatting.number(1000) == "1,000"

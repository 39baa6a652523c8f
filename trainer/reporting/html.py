"""Self-contained HTML pages: Jinja templates with their images inside, in the language of formatting.in_language."""

import base64
import hashlib
import os

import jinja2
import markupsafe

from trainer import formatting

TEMPLATES = os.path.join(os.path.dirname(__file__), "templates")
# RGB of a heat map's lowest and highest values. The opacity rises from 0 to HEAT_OPACITY of 255, as value ** HEAT_POWER.
HEAT_COLORS = ((230, 30, 90), (255, 225, 40))
HEAT_OPACITY = 210
HEAT_POWER = 0.8


def render(template: str, **values: object) -> str:
    """The template of that name, filled in. HTML escapes the values; a missing value raises UndefinedError."""
    return environment(is_html=template.endswith(".html")).get_template(template).render(**values)


def environment(*, is_html: bool) -> jinja2.Environment:
    """The templates with their filters and translations. `is_html`: values are escaped."""
    result = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=is_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.i18n"],
    )
    result.policies["ext.i18n.trimmed"] = True  # a text may have several lines in the template
    result.install_gettext_callables(formatting.translation, _plural_translation, newstyle=True)  # type: ignore[attr-defined]
    result.filters |= {
        "percent": formatting.percent,
        "percent_of": lambda fraction, total: formatting.share(fraction * total, total),
        "number": formatting.number,
        "decimal": formatting.decimal,
        "general": formatting.general,
        "duration": formatting.duration,
        "short": formatting.shorten,
        "hashed": _hash_source,
    }
    result.globals |= {
        "language": formatting.language,
        "heat": {"colors": HEAT_COLORS, "opacity": HEAT_OPACITY, "power": HEAT_POWER},
    }
    return result


def data_uri(contents: bytes, kind: str) -> str:
    """The bytes of an image as a data URI; `kind` is png or jpeg."""
    return f"data:image/{kind};base64," + base64.b64encode(contents).decode("ascii")


def _plural_translation(singular: str, plural: str, count: int) -> str:
    return formatting.translation(singular if count == 1 else plural)  # so in English and in Spanish


def _hash_source(script: str) -> markupsafe.Markup:
    """The source of a Content-Security-Policy that allows this script and no other."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return markupsafe.Markup(f"'sha256-{base64.b64encode(digest).decode()}'")

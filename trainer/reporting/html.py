"""Self-contained HTML pages: Jinja templates with their images inside."""

import base64
import os

import jinja2

from trainer import formatting

_TEMPLATES = os.path.join(os.path.dirname(__file__), "templates")


def render(template: str, **values: object) -> str:
    """The template of that name, filled in. HTML escapes the values; a missing value raises UndefinedError."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": formatting.percent, "duration": formatting.duration, "short": formatting.shorten}
    return environment.get_template(template).render(**values)


def data_uri(contents: bytes, kind: str) -> str:
    """The bytes of an image as a data URI; `kind` is png or jpeg."""
    return f"data:image/{kind};base64," + base64.b64encode(contents).decode("ascii")

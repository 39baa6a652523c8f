"""Pages that need nothing but themselves: templates of this folder, filled in, and pictures inside them."""

import base64
import os

import jinja2

from trainer import formatting


def render(template: str, **values: object) -> str:
    """The template of that name in this folder; what is put into a page is shown as text, a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.join(os.path.dirname(__file__), "templates")),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": formatting.percent, "duration": formatting.duration, "short": formatting.shorten}
    return environment.get_template(template).render(**values)


def data_uri(contents: bytes, kind: str) -> str:
    """The bytes of a picture as an address; `kind` is png or jpeg."""
    return f"data:image/{kind};base64," + base64.b64encode(contents).decode("ascii")

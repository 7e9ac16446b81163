"""Pages for the browser: a template and its values become one file that loads nothing. Values are escaped."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,  # a misspelt name is an error, not a gap in the page
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values) -> str:
    """The page that a template of this folder makes of these values."""
    return TEMPLATES.get_template(template).render(values)


def data_url(picture: bytes, kind: str) -> str:
    """A picture as text that stands in the page itself. kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"

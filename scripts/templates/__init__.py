"""Renders pages for the browser from templates: each page is one file that loads nothing. Values are escaped."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,  # a misspelt name raises an error
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values) -> str:
    """Renders a template of this folder with these values."""
    return TEMPLATES.get_template(template).render(values)


def data_url(picture: bytes, kind: str) -> str:
    """Returns a URL that contains the picture itself. picture: the bytes of its file; kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"

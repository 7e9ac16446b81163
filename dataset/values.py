"""Reads values of a row in the various forms that tables and JSON use."""

import ast
import json
import re
from contextlib import suppress

PICTURE_FILE = re.compile(r"data:image/.*|[^\n]{1,500}\.(jpe?g|png|webp|gif|bmp|tiff?)", re.I)


class BadRow(ValueError):
    """A row that training cannot use. `kind` is a key of `dataset.lm_dataset.KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(printable(message))
        self.kind = kind


def printable(text: str) -> str:
    """Makes text from data safe for a terminal: escapes control characters, cuts the middle of very long text."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= 500 else f"{text[:350]} ... {text[-130:]}"


def empty(value) -> bool:
    """Whether a value, or everything in a list or dict, is None or empty."""
    if isinstance(value, list | dict):
        return all(map(empty, value.values() if isinstance(value, dict) else value))
    return value is None or value in ("", b"")


def text_of(value, column: str) -> str:
    """A string or number as a string. Raises BadRow, which names the column."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:  # NaN is not itself
        raise BadRow("key", f'"{column}" must be text')
    return str(value)


def records_of(value):
    """Converts a record of lists, which older versions of `datasets` store, to a list of records."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, values)) for values in zip(*value.values())]
    return value


def listed(value):
    """Converts a list in text, as in CSV, to a list: "['cat', 'cat']". Returns other values unchanged."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                values = parse(value)
                return values if all(isinstance(each, str | list) for each in values) else value
    return value


def shows_picture(value) -> bool:
    """Whether a value seems to contain a picture: bytes, a data URL, or the name of a picture file."""
    if isinstance(value, list):
        return any(map(shows_picture, value))
    if isinstance(value, dict):
        return bool(value.get("bytes")) or any(map(shows_picture, value.values()))
    return isinstance(value, bytes) and bool(value) or isinstance(value, str) and bool(PICTURE_FILE.fullmatch(value))


def picture_list(value, column: str) -> list[str | bytes]:
    """The pictures in a column: names, URLs and contents of files. Raises BadRow."""
    if isinstance(value, str):
        link = re.match(r"(https?|data):", value)  # may contain commas
        value = [value] if link or column not in ("image", "images") else value.split(",")
    pictures, value = [], records_of(value)
    for picture in value if isinstance(value, list) else [value]:
        if isinstance(picture, dict) and not {"bytes", "path", "url"} & picture.keys():
            raise BadRow(
                "key", f'"{column}" contains an object with {", ".join(picture)}: expected a name or a list of names'
            )
        if isinstance(picture, str) and picture.startswith(("/9j/", "iVBORw0KGgo")) and len(picture) > 200:
            raise BadRow("key", f'"{column}" contains base64: write data:image/jpeg;base64, before it')
        if isinstance(picture, dict):  # as `datasets` stores a picture
            picture = picture.get("bytes") or picture.get("path") or picture.get("url")
        if not isinstance(picture, str | bytes | None):
            raise BadRow("key", f'"{column}" must be text, as in "a.jpg" or "a.jpg, b.jpg", or a list of texts')
        pictures.append(picture.strip().removeprefix("file://") if isinstance(picture, str) else picture)
    while pictures and not pictures[-1]:
        pictures.pop()
    if not all(pictures):  # skipping it would move the others to the wrong <image>
        raise BadRow("count", f"picture {[bool(picture) for picture in pictures].index(False) + 1} is empty")
    return pictures

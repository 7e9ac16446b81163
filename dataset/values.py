"""Values of a row, in the forms in which tables and JSON keep them."""

import ast
import json
import re
from contextlib import suppress

PICTURE_FILE = re.compile(r"data:image/.*|[^\n]{1,500}\.(jpe?g|png|webp|gif|bmp|tiff?)", re.I)


class BadRow(ValueError):
    """A row that cannot be learned from. `kind` is a key of `dataset.lm_dataset.KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(printable(message))
        self.kind = kind


def printable(text: str) -> str:
    """Text from data as it may go to a terminal: control characters escaped, what is very long without its middle."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= 500 else f"{text[:350]} ... {text[-130:]}"


def empty(value) -> bool:
    if isinstance(value, list | dict):
        return all(map(empty, value.values() if isinstance(value, dict) else value))
    return value is None or value in ("", b"")


def text_of(value, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:  # NaN is not itself
        raise BadRow("key", f'"{column}" must be text')
    return str(value)


def records_of(value):
    """A list of records, also where it is a record of lists, as older versions of `datasets` keep it."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, values)) for values in zip(*value.values())]
    return value


def listed(value):
    """A list, also where it is one in text, as tables of text have it: "['cat', 'cat']"."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                values = parse(value)
                return values if all(isinstance(each, str | list) for each in values) else value
    return value


def shows_picture(value) -> bool:
    if isinstance(value, list):
        return any(map(shows_picture, value))
    if isinstance(value, dict):
        return bool(value.get("bytes")) or any(map(shows_picture, value.values()))
    return isinstance(value, bytes) and bool(value) or isinstance(value, str) and bool(PICTURE_FILE.fullmatch(value))


def picture_list(value, column: str) -> list[str | bytes]:
    """What a column of pictures holds: names, URLs and contents of files. Raises BadRow."""
    if isinstance(value, str):
        link = re.match(r"(https?|data):", value)  # which may hold commas
        value = [value] if link or column not in ("image", "images") else value.split(",")
    pictures, value = [], records_of(value)
    for picture in value if isinstance(value, list) else [value]:
        if isinstance(picture, dict) and not {"bytes", "path", "url"} & picture.keys():
            raise BadRow(
                "key", f'"{column}" holds an object with {", ".join(picture)}: expected a name, or a list of them'
            )
        if isinstance(picture, str) and picture.startswith(("/9j/", "iVBORw0KGgo")) and len(picture) > 200:
            raise BadRow("key", f'"{column}" holds base64: write data:image/jpeg;base64, before it')
        if isinstance(picture, dict):  # as `datasets` keeps a picture
            picture = picture.get("bytes") or picture.get("path") or picture.get("url")
        if not isinstance(picture, str | bytes | None):
            raise BadRow("key", f'"{column}" must be text, as in "a.jpg" or "a.jpg, b.jpg", or a list of texts')
        pictures.append(picture.strip().removeprefix("file://") if isinstance(picture, str) else picture)
    while pictures and not pictures[-1]:
        pictures.pop()
    if not all(pictures):  # left out, it would move the others to the wrong <image>
        raise BadRow("count", f"picture {[bool(picture) for picture in pictures].index(False) + 1} is empty")
    return pictures

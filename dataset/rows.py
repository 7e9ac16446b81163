"""Checks one row: a record of any shape → a Row, whose turns contain one <image> per picture.

Known defects of public data sets are repaired here and counted, see MENDED.
"""

import codecs
import json
import re
from dataclasses import dataclass, replace
from io import BytesIO

from PIL import Image

from dataset.shapes import DEFAULT, ReadOptions, normal
from dataset.values import BadRow
from model.processing import IMAGE_TAG

MENDED = {
    "untagged": "had pictures and no <image>: it was put before the first question",
    "surplus": "had more <image> than pictures: the last ones were removed",
    "placeholder": "had no <image> and a picture of at most 8×8: read as text",
    "blank": "have a blank answer, which teaches a model to say nothing",
    "twice": "have a key twice: the last one counts",
}

# A byte that is not UTF-8 is read as this "noncharacter" of Unicode, which no text may contain, and reported by row.
NO_TEXT = "\ufdd0"
codecs.register_error("mark", lambda error: (NO_TEXT, error.start + 1))


@dataclass
class Row:
    conversations: list[dict]  # {"role", "content"}, with one <image> in the user's turns per image
    images: list[str]  # names, which the row's source opens
    kind: str | list = ""  # the row's own kind of each question, as in drawn scenes; see inference/scoring.py
    mended: str = ""  # a key of MENDED
    shape: str = ""  # how it was read, in words


def rows_of(record: dict, number: int, options: ReadOptions = DEFAULT) -> list[Row | BadRow]:
    """A record of any shape → its rows: one, or one for each caption of its picture. Raises BadRow.

    number: of the record; `inline` uses it to name pictures inside the record.
    """
    try:
        row = normal(record, options)
    except (TypeError, AttributeError, KeyError, IndexError) as error:  # a value of an unexpected type
        raise BadRow("key", f"a value has an unexpected type: {error}") from None
    names = [
        inline(number, i) if isinstance(picture, bytes) or picture.startswith("data:") else picture
        for i, picture in enumerate(row.pictures)
    ]
    if len(names) == 1 and not any(IMAGE_TAG in str(turn) for turn in row.chats[0]) and is_placeholder(row.pictures[0]):
        return [checked(row.chats[0], [], kind=row.kind, shape=row.shape, mended="placeholder")]
    return [checked(turns, names, kind=row.kind, shape=row.shape) for turns in row.chats]


INLINE = re.compile(r"^#(\d+)\.(\d+)$")


def inline(number: int, which: int) -> str:
    """The name of a picture inside a record: #12.0 is the first one of record 12."""
    return f"#{number}.{which}"


def inline_place(name: str) -> tuple[int, int] | None:
    """(record, index of the picture) for a name from `inline`; None for any other name."""
    place = INLINE.match(name)
    return place and (int(place[1]), int(place[2]))


def checked(conversations: list[dict], images: list[str], **info) -> Row:
    """Turns and names of pictures → a Row, repaired if needed. Raises BadRow."""
    if not any(turn["role"] == "assistant" for turn in conversations):
        raise BadRow("answer", "no assistant turn, so nothing to learn")
    if images and not any(IMAGE_TAG in turn["content"] for turn in conversations):
        return checked(add_tags(conversations, len(images)), images, **{"mended": "untagged"} | info)
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in conversations if turn["role"] == "user")
    if tags > len(images) > 0:
        return Row(drop_tags(conversations, len(images)), images, **info, mended="surplus")
    if tags != len(images):
        raise BadRow("count", f"{tags} {IMAGE_TAG} in the user's turns, {len(images)} pictures")
    blank = any(turn["role"] == "assistant" and not turn["content"].strip() for turn in conversations)
    return Row(conversations, images, **{"mended": "blank" if blank else ""} | info)


def add_tags(conversations: list[dict], count: int) -> list[dict]:
    """Adds `count` tags before the first question. Raises BadRow if there is no question."""
    for at, turn in enumerate(conversations):
        if turn["role"] == "user":
            asked = turn | {"content": f"{IMAGE_TAG}\n" * count + turn["content"]}
            return [*conversations[:at], asked, *conversations[at + 1 :]]
    raise BadRow("role", f"{count} pictures but no user turn")


def drop_tags(conversations: list[dict], keep: int) -> list[dict]:
    """Keeps the first `keep` tags; removes the others together with the line break before them."""

    def tag(match):
        nonlocal keep
        keep -= 1
        return match[0] if keep >= 0 else ""

    return [
        turn | {"content": re.sub(rf"\n?{IMAGE_TAG}", tag, turn["content"]).strip()} if turn["role"] == "user" else turn
        for turn in conversations
    ]


def from_json(text: str, pairs_hook=None):
    """Parses JSON. Raises BadRow. pairs_hook: `object_pairs_hook` of `json.loads`."""
    if NO_TEXT in text:
        raise BadRow("json", f"character {text.index(NO_TEXT) + 1} is not valid UTF-8")
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, but not valid text
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("json", str(error)) from None
    return value


def with_pictures(record, pictures: list[bytes] | None):
    """Adds pictures that are stored next to the record, as in a tar."""
    return record | {"image": pictures} if pictures else record


def parse_line(line: str, number: int = 0, options: ReadOptions = DEFAULT, pictures=None) -> list[Row]:
    """A record as JSON text, and the files of pictures stored next to it → its rows. Raises BadRow."""
    twice = []

    def noting(pairs: list) -> dict:
        record = dict(pairs)
        twice.extend(record if len(record) < len(pairs) else ())
        return record

    record = with_pictures(from_json(line, noting), pictures)
    if not isinstance(record, dict):
        raise BadRow("key", f'expected an object, {{...}}, not {type(record).__name__}: no "conversations" list')
    rows = rows_of(record, number, options)
    return [replace(row, mended=row.mended or "twice") for row in rows] if twice else rows


def is_placeholder(picture: str | bytes) -> bool:
    """Whether a picture is at most 8×8: the public Parquet files put a black one into text rows to fill the column."""
    try:
        with Image.open(BytesIO(picture)) as image:
            return max(image.size) <= 8
    except Exception:  # a name, or not a picture: reported when the row is used
        return False

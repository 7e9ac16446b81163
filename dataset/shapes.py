"""A row in one of the common layouts → turns and pictures.

    conversations   [{"from": "human", "value"}, ...] or [{"role", "content"}, ...]     LLaVA, ShareGPT, this project
    messages        [{"role", "content": text, or parts {"type": "text" | "image" | "image_url", ...}}]    OpenAI, TRL
    texts           [{"user", "assistant"}, ...]                                        the_cauldron, FineVision
    question        question and answer, query and response, prompt and completion      VQA sets
    caption         caption or text, one or a list of them                              caption sets

The columns of a row determine its layout, in this order; an ambiguous row is an error. Pictures come from the first
column of PICTURES that is not empty. `normal` does all of this, for a line of JSON or a row of a table.
"""

import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from dataset.chats import chat_turns, merge, with_system
from dataset.values import BadRow, empty, listed, picture_list, records_of, shows_picture, text_of
from model.processing import IMAGE_TAG, language

FIRST = ("image", "images", "image_bytes", "picture", "pictures", "photo", "img", "jpg", "jpeg", "png", "webp")
# Often next to a column of FIRST, which then counts.
NAMES = ("file_name", "image_path", "image_paths", "image_file", "image_url", "image_urls")
PICTURES = FIRST + NAMES
SECOND = re.compile(
    r"(image|img|picture|photo)s?(_[a-z]|_?\d+)", re.I
)  # image2, image_b: next to a column that is read
# Columns that may contain pictures, videos or audio. If they were ignored, the model would learn to answer blindly.
UNREAD = re.compile(r"(image|img|picture|photo)s?(_?(path|file|name|url|bytes|base64)s?)?|videos?|audios?", re.I)
# Tags in other formats for pictures, videos, audio, and positions in them.
FOREIGN_TAG = re.compile(
    r"<image[ _]?\d+>|<img>[^<\n]+\.(jpe?g|png|webp)</img>|<\|(image|vision)\w*\|>|(?m:^<(video|audio)>\s*$)|<bbox>",
    re.I,
)
CHATS = {"conversations": ("conversations", "conversation"), "messages": ("messages",), "texts": ("texts",)}
ANSWERS = {  # column of the question → columns of the answer
    "question": ("answer", "answers", "multiple_choice_answer", "label"),
    "query": ("response", "answer", "answers", "label"),
    "prompt": ("completion", "response", "answer"),
    "instruction": ("output", "response", "answer"),
}
CAPTIONS = ("caption", "captions", "text", "txt")
CHOICES = ("choices", "options")
LETTERS = re.compile(r"(choice|option)_?[a-h]|[A-H]")  # columns with one choice each
NOT_LEARNED = ("chosen", "rejected", "rejected_response", "kto_tag")  # columns of rows that also contain wrong answers
# Other columns that are read.
BESIDE = ("system", "tools", "history", "input", "label", *CHOICES, *NOT_LEARNED, "kind")
# Questions about a picture with a caption and no question.
PROMPTS = {
    "en": ("What is in this picture?", "Describe this picture.", "Describe the picture in one sentence."),
    "zh": ("图片里有什么？", "请描述这张图片。", "用一句话描述这张图片。"),
}


# ---------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Shape:
    """How the columns of a row are read."""

    kind: str  # a key of CHATS, "question" or "caption"
    text: str  # the column with conversation, question or caption
    answer: str = ""  # the column with the answer to a question
    pictures: tuple[str, ...] = ()  # candidates for pictures; the first that is not empty is read
    unread: tuple[str, ...] = ()  # may contain other pictures, videos or audio: an error if nothing else does

    def columns(self, there) -> list[str]:
        """The columns of a table to read; all of them if no known column has pictures, because any may contain some."""
        if not self.pictures:
            return list(there)
        wanted = {self.text, self.answer, *self.pictures, *self.unread, *BESIDE, *ANSWERS, *captions_numbered(there)}
        return [name for name in there if name in wanted or LETTERS.fullmatch(name)]

    def not_read(self, there) -> list[str]:
        """Columns that are not read, except those that say how to read others."""
        read = {self.text, self.answer, *self.pictures, *BESIDE, *captions_numbered(there)}
        return [name for name in there if name not in read]

    def describe(self, pictures: str = "") -> str:
        """For reports: "question (query, response), pictures (images)". pictures: the column with the pictures."""
        text = f"{self.text}, ..." if re.search(r"\d$", self.text) else self.text
        columns = ", ".join(filter(None, [text, self.answer]))
        text = self.kind if self.text == self.kind and not self.answer else f"{self.kind} ({columns})"
        return f"{text}, pictures ({pictures})" if pictures else f"{text}, text only"


def captions_numbered(columns) -> list[str]:
    """Columns such as caption_0, caption_1, caption_2; only two of them could be a right and a wrong caption."""
    names = [name for name in columns if re.fullmatch(r"captions?_?\d+", name)]
    return names if len(names) > 2 else []


@lru_cache(maxsize=1024)
def shape_of(columns: tuple[str, ...]) -> Shape:
    """How to read these columns. Raises BadRow, which names the columns and the nearest shape."""
    pictures = tuple(name for name in PICTURES if name in columns)
    unread = tuple(name for name in columns if UNREAD.fullmatch(name) or SECOND.fullmatch(name))
    unread = tuple(name for name in unread if name not in pictures)
    for kind, names in CHATS.items():
        for name in names:
            if name in columns:
                return Shape(kind, name, "", pictures, unread)
    for question, answers in ANSWERS.items():
        for answer in answers:
            if question in columns and answer in columns:
                return Shape("question", question, answer, pictures, unread)
    captions = [name for name in (*CAPTIONS, *captions_numbered(columns)) if name in columns]
    pictures += ("url",) * ("url" in columns)  # usually of a web page, but of a picture next to captions
    if captions and pictures:
        return Shape("caption", captions[0], "", pictures, unread)
    raise BadRow("key", f"the columns are {', '.join(columns) or 'none'}, {nearest(columns, pictures, captions)}")


def nearest(columns, pictures, captions) -> str:
    """What is missing for the nearest shape, as the end of an error message."""
    question = next((name for name in ANSWERS if name in columns), None)
    answers = {name for names in ANSWERS.values() for name in names}
    answer = next((name for name in columns if name in answers and name != "label"), None)
    if question:
        return f'and "{question}" has no answer column: name it "{ANSWERS[question][0]}"'
    if answer:
        return f'and "{answer}" has no question column: name it "question"'
    if captions:
        return f'and "{captions[0]}" has no picture column: name it "image"'
    if pictures:
        return (
            f'and "{pictures[0]}" has no text column: expected "conversations", "question" and "answer", or "caption"'
        )
    return 'but none of them is "conversations", "messages", "texts", "question" or "caption"'


# ---------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class ReadOptions:
    """How to read rows, from the flags."""

    prompts: tuple[str, ...] = ()  # questions for captions; empty: PROMPTS in the caption's language
    captions: str = "one"  # of several captions "one" at random in each epoch, or "all", as rows
    allow_urls: bool = False  # download pictures that rows name by http(s)


DEFAULT = ReadOptions()


@dataclass
class Normal:
    """A row of any shape, in one form."""

    chats: list[list[dict]]  # {"role", "content"} turns; several only if a picture has several captions
    pictures: list[str | bytes]  # a name, a URL, a data URL, or the content of a file
    shape: str  # how it was read, in words
    kind: str | list = ""  # the row's own kind of each question, as in drawn scenes; see inference/scoring.py


def normal(row: dict, options: ReadOptions = DEFAULT) -> Normal:
    """Reads a row of any shape, {column: value}. Raises BadRow."""
    shape = shape_of(tuple(row))
    for name in NOT_LEARNED:
        if not empty(row.get(name)):
            raise BadRow("key", f'"{name}": rows with wrong answers next to right ones are not supported')
    if row.get("label") is False:
        raise BadRow("key", '"label" is false: rows with a wrong answer are not supported')
    column, pictures = pictures_of(row, shape)
    chat = chat_of(row, shape)
    if chat is not None:
        turns, inline = chat_turns(chat, shape.text, pairs=shape.kind == "texts")
        pictures, column = (merge(pictures, inline), column or shape.text) if inline else (pictures, column)
        chats = [tagged(turns, len(pictures)) if shape.kind == "texts" else turns]
    elif shape.kind == "question":
        chats = [question_turns(row, shape, len(pictures))]
    else:
        captions = captions_of(row, shape)
        if len(captions) == len(pictures) > 1:
            raise BadRow("count", f"{len(pictures)} pictures and as many captions: write each pair as its own row")
        chats = [caption_turns(text, len(pictures), options.prompts) for text in captions]
    check_unread(row, shape, pictures, chats)
    chats = [with_system(turns, row) for turns in chats]
    return Normal(chats, pictures, shape.describe(column if pictures else ""), row.get("kind") or "")


def pictures_of(row: dict, shape: Shape) -> tuple[str, list[str | bytes]]:
    """(the column with pictures, its pictures)"""
    filled = [name for name in shape.pictures if not empty(row[name])]
    if not filled:
        return "", []
    pictures = picture_list(row[filled[0]], filled[0])
    for name in filled[1:]:
        if name in FIRST and picture_list(row[name], name) != pictures:
            raise BadRow("count", f'"{filled[0]}" and "{name}" contain different pictures: remove one')
    return filled[0], pictures


def check_unread(row: dict, shape: Shape, pictures: list, chats: list[list[dict]]) -> None:
    """Raises BadRow if a picture, video or audio of the row would be ignored."""
    for name in shape.unread:
        second = name.lower().startswith(("video", "audio")) or SECOND.fullmatch(name) and shows_picture(row[name])
        if not empty(row[name]) and (second or not pictures):
            raise BadRow("key", f'"{name}" is not read, pictures come from "image": rename or remove it')
    for turn in chats[0]:
        tag = FOREIGN_TAG.search(turn["content"])
        if tag and (turn["role"] == "user" or "<bbox>" in turn["content"]):
            where = f"write {IMAGE_TAG} at the position of a picture"
            raise BadRow("count", f"{tag[0].strip()} in the text is not read; {where}")
    if pictures:
        return
    for name in ("image_id", "imageId", "img_id"):
        if shape.kind == "question" and not empty(row.get(name)):
            raise BadRow("key", f'"{name}" names a picture that the row lacks: write its file into "image"')
    if shape.kind == "caption":
        raise BadRow("count", f'a caption in "{shape.text}" but no picture')
    for name, value in row.items():
        if name not in (shape.text, shape.answer, *BESIDE) and shows_picture(value):
            raise BadRow("key", f'"{name}" seems to contain pictures, but these are read from "image": rename it')


# ---------------------------------------------------------------------------- chats


def chat_of(row: dict, shape: Shape) -> list | dict | str | None:
    """The turns of a chat as the row stores them; None if the row is a question or a caption."""
    if shape.kind in CHATS:
        return "" if row[shape.text] is None else row[shape.text]
    prompt, completion = row.get(shape.text), row.get(shape.answer)
    chats = [isinstance(value, list) and value and isinstance(value[0], dict) for value in (prompt, completion)]
    return prompt + completion if all(chats) else None  # TRL stores a chat in two halves


# ---------------------------------------------------------------------------- questions and captions


def question_turns(row: dict, shape: Shape, pictures: int) -> list[dict]:
    """The turns of a question with its answer; of several answers the most common. Raises BadRow."""
    question, answer = row[shape.text], row[shape.answer]
    whole_number = isinstance(answer, int)
    answer = records_of(listed(answer) if shape.answer == "answers" else answer)
    if isinstance(answer, list):
        answers = [value.get("answer") if isinstance(value, dict) else value for value in answer]
        answers = [value for value in answers if not empty(value)]
        if not all(isinstance(value, str) for value in answers):
            raise BadRow("key", f'"{shape.answer}" must be text, or a list of texts')
        answer = Counter(answers).most_common(1)[0][0] if answers else ""  # the first one if several are equally common
    answer = text_of(answer, shape.answer)
    if not answer.strip():
        raise BadRow("blank", f'no answer in "{shape.answer}"')
    choices = next((listed(row[name]) for name in CHOICES if not empty(row.get(name))), [])
    choices = list(choices.values()) if isinstance(choices, dict) else choices
    letter = re.fullmatch(r"\(?[A-Ha-h]\)?\.?", answer) and any(map(LETTERS.fullmatch, row))
    if letter or whole_number and shape.answer == "label" or choices and is_number_of(answer, choices):
        raise BadRow(
            "key", f'"{shape.answer}" is {answer}, the number of a choice: replace it by the text of the answer'
        )
    turns = []
    for pair in listed(row.get("history")) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("key", '"history" must be a list of [question, answer]')
        turns += [{"role": "user", "content": text_of(pair[0], "history")}]
        turns += [{"role": "assistant", "content": text_of(pair[1], "history")}]
    question = text_of(question, shape.text)
    if shape.text == "instruction" and not empty(row.get("input")):  # as in Alpaca
        question += "\n" + text_of(row["input"], "input")
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": answer})
    return tagged(turns, pictures)


def is_number_of(answer: str, choices) -> bool:
    """Whether an answer may be the number or letter of a choice instead of its text."""
    return not isinstance(choices, list) or answer not in choices or bool(re.fullmatch(r"\d+", answer))


def tagged(turns: list[dict], pictures: int) -> list[dict]:
    """Adds the pictures before the first question unless the text already places them."""
    if any(IMAGE_TAG in turn["content"] for turn in turns):
        return turns
    return [turns[0] | {"content": f"{IMAGE_TAG}\n" * pictures + turns[0]["content"]}, *turns[1:]]


def captions_of(row: dict, shape: Shape) -> list[str]:
    """The captions of a row without duplicates and blanks. Raises BadRow."""
    value = listed(row[shape.text])
    values = [*value] if isinstance(value, list) else [value]
    values += [row[name] for name in captions_numbered(row) if name != shape.text]
    asked = next((name for name in ANSWERS if not empty(row.get(name))), None)
    if asked:
        raise BadRow("key", f'"{asked}" is next to "{shape.text}": if the latter is its answer, name it "answer"')
    if not all(isinstance(value, str) for value in values if not empty(value)):
        raise BadRow("key", f'"{shape.text}" must be text, or a list of texts')
    captions = [value.strip() for value in values if not empty(value)]
    if not any(captions):
        raise BadRow("blank", f'no caption in "{shape.text}"')
    return list(dict.fromkeys(caption for caption in captions if caption))


def caption_turns(caption: str, pictures: int, prompts: tuple[str, ...]) -> list[dict]:
    """The turns of a caption. The caption selects one of the prompts, so the choice is always the same."""
    prompts = prompts or PROMPTS[language(caption)]
    prompt = prompts[zlib.crc32(caption.encode()) % len(prompts)]
    return tagged([{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}], pictures)

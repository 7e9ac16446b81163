"""A row as the world keeps it → turns and pictures, as the model reads them.

    conversations   [{"from": "human", "value"}, ...] or [{"role", "content"}, ...]     LLaVA, ShareGPT, this project
    messages        [{"role", "content": text, or parts {"type": "text" | "image" | "image_url", ...}}]    OpenAI, TRL
    texts           [{"user", "assistant"}, ...]                                        the_cauldron, FineVision
    question        question and answer, query and response, prompt and completion      VQA sets
    caption         caption or text, one or a list of them                              caption sets

Which of these a row is, its columns tell, in this order; what they leave open is an error, never a guess. Pictures are
in the first of PICTURES that is not empty. `normal` does all of it, for a line of JSON as for a row of a table.
"""

import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from model.processing import IMAGE_TAG, language

PICTURES = (
    *("image", "images", "image_bytes", "picture", "pictures", "photo", "img", "jpg", "jpeg", "png", "webp"),
    *("file_name", "image_path", "image_paths", "image_file", "image_url", "image_urls"),
)
# Of a column that may hold something to see or hear: were it left out, the model would learn to answer blindly.
UNREAD = re.compile(
    r"(image|img|picture|photo)s?(_?(path|file|name|url|bytes|base64)s?)?|file_name|videos?|audios?", re.I
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
BESIDE = ("system", "tools", "history", "input", *CHOICES, "kind")  # columns that are read beside these
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    "function_call": "call",
}
# What is asked about a picture that has a caption and no question.
PROMPTS = {
    "en": ("What is in this picture?", "Describe this picture.", "Describe the picture in one sentence."),
    "zh": ("图片里有什么？", "请描述这张图片。", "用一句话描述这张图片。"),
}


class BadRow(ValueError):
    """A row that cannot be learned from. `kind` is a key of `dataset.lm_dataset.KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(printable(message))
        self.kind = kind


def printable(text: str) -> str:
    """Text from data as it may go to a terminal: control characters escaped, what is very long without its middle."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= 500 else f"{text[:350]} ... {text[-130:]}"


# ---------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class Shape:
    """What the columns of a row are taken for."""

    kind: str  # a key of CHATS, "question" or "caption"
    text: str  # the column of conversation, question or caption
    answer: str = ""  # that of the answer, for a question
    pictures: tuple[str, ...] = ()  # those that may hold pictures; the first that is not empty does
    unread: tuple[str, ...] = ()  # those in which something else may be to see or hear: an error if it is all there is

    def columns(self, there) -> list[str]:
        """Those of a table that are read."""
        wanted = {self.text, self.answer, *self.pictures, *self.unread, *BESIDE, *captions_numbered(there)}
        return [name for name in there if name in wanted]

    def describe(self, pictures: str = "") -> str:
        """For people: "question (query, response), pictures (images)". pictures: the column that holds some."""
        columns = ", ".join(filter(None, [self.text, self.answer]))
        text = self.kind if self.text == self.kind and not self.answer else f"{self.kind} ({columns})"
        return f"{text}, pictures ({pictures})" if pictures else f"{text}, text only"


def captions_numbered(columns) -> list[str]:
    """caption_0, caption_1, ..."""
    return [name for name in columns if re.fullmatch(r"captions?_?\d+", name)]


@lru_cache(maxsize=1024)
def shape_of(columns: tuple[str, ...]) -> Shape:
    """What these columns are taken for. Raises BadRow that names them, and the shape that comes nearest."""
    pictures = tuple(name for name in PICTURES if name in columns)
    unread = tuple(name for name in columns if UNREAD.fullmatch(name) and name not in pictures)
    for kind, names in CHATS.items():
        for name in names:
            if name in columns:
                return Shape(kind, name, "", pictures, unread)
    for question, answers in ANSWERS.items():
        for answer in answers:
            if question in columns and answer in columns:
                return Shape("question", question, answer, pictures, unread)
    captions = [name for name in (*CAPTIONS, *captions_numbered(columns)) if name in columns]
    if captions and pictures:
        return Shape("caption", captions[0], "", pictures, unread)
    raise BadRow("key", f"the columns are {', '.join(columns) or 'none'}, {nearest(columns, pictures, captions)}")


def nearest(columns, pictures, captions) -> str:
    question = next((name for name in ANSWERS if name in columns), None)
    answers = {name for names in ANSWERS.values() for name in names}
    answer = next((name for name in columns if name in answers), None)
    if question:
        return f'and "{question}" has no answer beside it: name that "{ANSWERS[question][0]}"'
    if answer:
        return f'and "{answer}" has no question beside it: name that "question"'
    if captions:
        return f'and "{captions[0]}" has no picture beside it: name that "image"'
    if pictures:
        return (
            f'and "{pictures[0]}" has no text beside it: expected "conversations", "question" and "answer" or "caption"'
        )
    return 'of which none is "conversations", "messages", "texts", "question" or "caption"'


# ---------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class ReadOptions:
    """What the flags say of how rows are read."""

    prompts: tuple[str, ...] = ()  # asked about pictures with captions; else PROMPTS in the caption's language
    captions: str = "one"  # of several captions, one in each epoch, drawn by chance; or "all": a row for each
    allow_urls: bool = False  # fetch pictures that rows name by http(s)


DEFAULT = ReadOptions()


@dataclass
class Normal:
    """A row, whatever its shape was."""

    chats: list[list[dict]]  # {"role", "content"} turns; several only where a picture has several captions
    pictures: list[str | bytes]  # a name, a URL, a data URL, or the content of a file
    shape: str  # what it was read as, in words
    kind: str | list = ""  # what the row says of its questions, as drawn scenes do; see inference/scoring.py


def normal(row: dict, options: ReadOptions = DEFAULT) -> Normal:
    """A row of any shape. Raises BadRow."""
    shape = shape_of(tuple(row))
    column = next((name for name in shape.pictures if not empty(row[name])), "")
    pictures = picture_list(row[column], column) if column else []
    chat = chat_of(row, shape)
    if chat is not None:
        turns, inline = chat_turns(chat, shape)
        pictures, column = (merge(pictures, inline), column or shape.text) if inline else (pictures, column)
        chats = [tagged(turns, len(pictures)) if shape.kind == "texts" else turns]
    elif shape.kind == "question":
        chats = [question_turns(row, shape, len(pictures))]
    else:
        chats = [caption_turns(text, len(pictures), options.prompts) for text in captions_of(row, shape)]
    for name in shape.unread:
        if not empty(row[name]) and (not pictures or name.startswith(("video", "audio"))):
            raise BadRow("key", f'"{name}" is not read, pictures are from "image": rename it, or leave it out')
    if shape.kind == "caption" and not pictures:
        raise BadRow("count", f'a caption in "{shape.text}" and no picture')
    chats = [with_system(turns, row) for turns in chats]
    return Normal(chats, pictures, shape.describe(column if pictures else ""), row.get("kind") or "")


def empty(value) -> bool:
    return value is None or value in ("", [], b"") or isinstance(value, dict) and not any(value.values())


def text_of(value, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("key", f'"{column}" must be text')
    return str(value)


# ---------------------------------------------------------------------------- chats


def chat_of(row: dict, shape: Shape) -> list | dict | str | None:
    """What holds the turns of a chat. None: the row is a question or a caption."""
    if shape.kind in CHATS:
        return "" if row[shape.text] is None else row[shape.text]
    prompt, completion = row.get(shape.text), row.get(shape.answer)
    chats = [isinstance(value, list) and value and isinstance(value[0], dict) for value in (prompt, completion)]
    return prompt + completion if all(chats) else None  # TRL keeps the two halves of a chat so


def chat_turns(chat, shape: Shape) -> tuple[list[dict], list]:
    """(turns, the pictures that stand in their parts; None for one that stands in a column)"""
    if isinstance(chat, str):
        try:
            chat = json.loads(chat)
        except (ValueError, RecursionError):
            chat = None
    if isinstance(chat, dict):  # a sequence of structs, as older versions of `datasets` keep it
        lengths = {len(values) for values in chat.values() if isinstance(values, list)}
        chat = [dict(zip(chat, values)) for values in zip(*chat.values())] if len(lengths) == 1 else None
    if not isinstance(chat, list):
        raise BadRow("key", f'no "{shape.text}" list')
    if shape.kind == "texts":
        pairs = [pair if isinstance(pair, dict) else {} for pair in chat]
        chat = [{"role": role, "content": pair.get(role)} for pair in pairs for role in ("user", "assistant")]
    turns, inline = [], []
    for turn in chat:
        turn = turn if isinstance(turn, dict) else {}
        role, content = (
            (turn.get("role"), turn.get("content")) if turn.get("role") else (turn.get("from"), turn.get("value"))
        )
        calls = turn.get("tool_calls") or []
        if isinstance(content, list):
            content = join_parts(content, inline)
        if not isinstance(role, str) or not (isinstance(content, str) or calls and content is None):
            raise BadRow("key", 'a turn needs "role" and "content", both text (or "from" and "value")')
        add_turn(turns, ROLES.get(role.lower(), role), content or "", calls)
    return turns, inline


def add_turn(turns: list[dict], role: str, content: str, calls=()) -> None:
    """Tools in the words of Qwen, which other chat templates share: a call is part of an answer, what it gave is text
    that the user's side sends, in one turn for all calls of an answer."""
    if role == "call":
        role, content, calls = "assistant", "", [content]
    for call in calls:
        call = call.get("function", call) if isinstance(call, dict) else call
        call = call if isinstance(call, str) else json.dumps(call, ensure_ascii=False)
        content += f"{chr(10) * bool(content)}<tool_call>\n{call}\n</tool_call>"
    if role == "tool":
        role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if turns and turns[-1]["role"] == "user" and turns[-1]["content"].endswith("</tool_response>"):
            content = turns.pop()["content"] + "\n" + content
    turns.append({"role": role, "content": content})


def join_parts(parts: list, inline: list) -> str:
    """The text of a turn in parts, with <image> where a picture stands; the pictures go to `inline`."""
    texts = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part if isinstance(part, dict) else {}
        kind = part.get("type") or next((name for name in ("image_url", "image", "text") if part.get(name)), "")
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url", "input_image"):
            picture = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            picture = picture["url"] if isinstance(picture, dict) and "url" in picture else picture
            inline.extend(picture_list(picture, kind) if picture else [None])
            texts.append(IMAGE_TAG)
        else:
            raise BadRow("key", f"a part of a turn is of type {kind or 'unknown'!r}, expected text, image or image_url")
    content = ""
    for text in texts:  # a picture has a line of its own
        borders = IMAGE_TAG in (text, content[-len(IMAGE_TAG) :]) and content and not content.endswith("\n")
        content += "\n" * bool(borders and not text.startswith("\n")) + text
    return content


def merge(column: list, inline: list) -> list:
    """The pictures of parts, those that hold none themselves from the column, in order."""
    holes = inline.count(None)
    if len(column) != holes:
        raise BadRow("count", f"{holes} parts of turns stand for a picture of a column, which has {len(column)}")
    rest = iter(column)
    return [next(rest) if picture is None else picture for picture in inline]


def with_system(turns: list[dict], row: dict) -> list[dict]:
    """With what the columns "system" and "tools" say, after what a first turn of the system says."""
    first = turns[:1] if turns and turns[0]["role"] == "system" else []
    texts = [turn["content"] for turn in first]
    texts += [row["system"]] if isinstance(row.get("system"), str) and row["system"] not in ("", *texts) else []
    if not empty(row.get("tools")) and row["tools"] != "[]":
        tools = row["tools"] if isinstance(row["tools"], str) else json.dumps(row["tools"], ensure_ascii=False)
        texts.append(f"<tools>\n{tools}\n</tools>")
    return [{"role": "system", "content": "\n\n".join(texts)}, *turns[len(first) :]] if texts else turns


# ---------------------------------------------------------------------------- questions and captions


def question_turns(row: dict, shape: Shape, pictures: int) -> list[dict]:
    question, answer = row[shape.text], row[shape.answer]
    if isinstance(answer, list):
        answers = [value.get("answer") if isinstance(value, dict) else value for value in answer]
        answer = Counter(answers).most_common(1)[0][0] if answers else None  # the first of those that are as common
    if isinstance(answer, int) and (shape.answer == "label" or any(not empty(row.get(name)) for name in CHOICES)):
        raise BadRow("key", f'"{shape.answer}" is the number of a choice: put its text there')
    turns = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("key", '"history" must be a list of [question, answer]')
        turns += [{"role": "user", "content": text_of(pair[0], "history")}]
        turns += [{"role": "assistant", "content": text_of(pair[1], "history")}]
    question = text_of(question, shape.text)
    if shape.text == "instruction" and not empty(row.get("input")):  # as Alpaca has it
        question += "\n" + text_of(row["input"], "input")
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": text_of(answer, shape.answer)})
    return tagged(turns, pictures)


def tagged(turns: list[dict], pictures: int) -> list[dict]:
    """With the pictures before the first question, where the text does not place them."""
    if any(IMAGE_TAG in turn["content"] for turn in turns):
        return turns
    return [turns[0] | {"content": f"{IMAGE_TAG}\n" * pictures + turns[0]["content"]}, *turns[1:]]


def captions_of(row: dict, shape: Shape) -> list[str]:
    values = [*row[shape.text]] if isinstance(row[shape.text], list) else [row[shape.text]]
    values += [row[name] for name in captions_numbered(row) if name != shape.text]
    captions = [text_of(value, shape.text).strip() for value in values if not empty(value)]
    if not any(captions):
        raise BadRow("answer", f'no caption in "{shape.text}"')
    return list(dict.fromkeys(caption for caption in captions if caption))


def caption_turns(caption: str, pictures: int, prompts: tuple[str, ...]) -> list[dict]:
    """Which of several prompts is asked follows from the caption, so that it stays the same."""
    prompts = prompts or PROMPTS[language(caption)]
    prompt = prompts[zlib.crc32(caption.encode()) % len(prompts)]
    return tagged([{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}], pictures)


# ---------------------------------------------------------------------------- pictures


def picture_list(value, column: str) -> list[str | bytes]:
    """What a column of pictures holds: names, URLs and contents of files. Raises BadRow."""
    if isinstance(value, str):
        link = re.match(r"(https?|data):", value)  # which may hold commas
        value = [value] if link or column not in ("image", "images") else value.split(",")
    pictures = []
    for picture in value if isinstance(value, list) else [value]:
        if isinstance(picture, dict):  # as `datasets` keeps a picture
            picture = picture.get("bytes") or picture.get("path") or picture.get("url")
        if not isinstance(picture, str | bytes | None):
            raise BadRow("key", f'"{column}" must be text, as in "a.jpg" or "a.jpg, b.jpg", or a list of texts')
        pictures.append(picture.strip() if isinstance(picture, str) else picture)
    while pictures and not pictures[-1]:
        pictures.pop()
    if not all(pictures):  # left out, it would move the others to the wrong <image>
        raise BadRow("count", f"picture {[bool(picture) for picture in pictures].index(False) + 1} is empty")
    return pictures

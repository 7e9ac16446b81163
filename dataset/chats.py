"""Chats in other formats → turns with role and text: ShareGPT's keys, content in parts, tool calls."""

import json

from dataset.values import BadRow, empty, picture_list, records_of
from model.processing import IMAGE_TAG

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    "function_call": "call",
}


def chat_turns(chat, column: str, pairs: bool) -> tuple[list[dict], list]:
    """A list of turns, or with `pairs` of {"user", "assistant"}, also as JSON text → (turns, pictures in their parts).

    A picture is None if it is in another column of the row. column: the name of this column, for messages. Raises
    BadRow.
    """
    if isinstance(chat, str):
        try:
            chat = json.loads(chat)
        except (ValueError, RecursionError):
            chat = None
    chat = records_of(chat)
    if not isinstance(chat, list):
        raise BadRow("key", f'no "{column}" list')
    if pairs:
        pairs = [pair if isinstance(pair, dict) else {} for pair in chat]
        chat = [{"role": role, "content": pair.get(role)} for pair in pairs for role in ("user", "assistant")]
    turns, inline = [], []
    for turn in chat:
        turn = turn if isinstance(turn, dict) else {}
        role, content = (
            (turn.get("role"), turn.get("content")) if turn.get("role") else (turn.get("from"), turn.get("value"))
        )
        if turn.get("weight") == 0 or turn.get("loss") is False:
            raise BadRow("key", "a turn has weight 0 or loss false, but all answers of a row are trained on")
        calls = calls_of(turn)
        if isinstance(content, list):
            content = join_parts(content, inline)
        if not isinstance(role, str) or not (isinstance(content, str) or calls and content is None):
            raise BadRow("key", 'a turn needs "role" and "content", both text (or "from" and "value")')
        add_turn(turns, ROLES.get(role.lower(), role), content or "", calls)
    return turns, inline


def calls_of(turn: dict) -> list:
    """The tool calls of an answer, also as JSON text or in OpenAI's older form "function_call". Raises BadRow."""
    calls = turn.get("tool_calls") or turn.get("function_call") or []
    if isinstance(calls, str):
        try:
            calls = json.loads(calls) or []
        except ValueError:
            raise BadRow("key", '"tool_calls" is not valid JSON') from None
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow("key", '"tool_calls" must be a list of calls')
    return [call.get("function") or call for call in calls]


def add_turn(turns: list[dict], role: str, content: str, calls=()) -> None:
    """Appends a turn. Tools are written as in Qwen's chat template, which others share: a call is part of an answer,
    and its result is text from the user's side, in one turn for all calls of an answer."""
    if role == "call":
        role, content, calls = "assistant", "", [content]
    for call in calls:
        call = call if isinstance(call, str) else json.dumps(call, ensure_ascii=False)
        content += f"{chr(10) * bool(content)}<tool_call>\n{call}\n</tool_call>"
    if role == "tool":
        role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if turns and turns[-1]["role"] == "user" and turns[-1]["content"].endswith("</tool_response>"):
            content = turns.pop()["content"] + "\n" + content
    turns.append({"role": role, "content": content})


def join_parts(parts: list, inline: list) -> str:
    """The text of a turn in parts, with <image> for each picture; appends the pictures to `inline`. Raises BadRow."""
    texts = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part if isinstance(part, dict) else {}
        kind = part.get("type") or next((name for name in ("image_url", "image", "text") if part.get(name)), "")
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str | None):
            texts.append(part.get("text") or "")
        elif kind in ("image", "image_url", "input_image"):
            picture = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            picture = picture["url"] if isinstance(picture, dict) and "url" in picture else picture
            inline.extend(picture_list(picture, kind) if picture else [None])
            texts.append(IMAGE_TAG)
        else:
            raise BadRow("key", f"a part of a turn has type {kind or 'unknown'!r}, expected text, image or image_url")
    content = ""
    for text in texts:  # a picture gets its own line
        borders = IMAGE_TAG in (text, content[-len(IMAGE_TAG) :]) and content and not content.endswith("\n")
        content += "\n" * bool(borders and not text.startswith("\n")) + text
    return content


def merge(column: list, inline: list) -> list:
    """Fills the parts without a picture of their own with the pictures of the column, in order. Raises BadRow."""
    holes = inline.count(None)
    if len(column) != holes:
        raise BadRow("count", f"{holes} parts of turns refer to pictures in a column, which contains {len(column)}")
    rest = iter(column)
    return [next(rest) if picture is None else picture for picture in inline]


def with_system(turns: list[dict], row: dict) -> list[dict]:
    """Adds the columns "system" and "tools" to the system turn at the start; creates one if needed."""
    first = turns[:1] if turns and turns[0]["role"] == "system" else []
    texts = [turn["content"] for turn in first]
    texts += [row["system"]] if isinstance(row.get("system"), str) and row["system"] not in ("", *texts) else []
    if not empty(row.get("tools")) and row["tools"] not in ("[]", "null"):
        tools = row["tools"] if isinstance(row["tools"], str) else json.dumps(row["tools"], ensure_ascii=False)
        texts.append(f"<tools>\n{tools}\n</tools>")
    return [{"role": "system", "content": "\n\n".join(texts)}, *turns[len(first) :]] if texts else turns

"""A conversation in the terminal: reads questions and pictures, prints answers as they are generated."""

import re
import shlex
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import TextStreamer

from common.cli import is_user_error
from inference.generate import generate, user_turn
from inference.models import needs_picture, pictures_first
from inference.pictures import open_image

HELP = """\
/image FILE  attach a picture, also http(s)://..., to the next question; repeat for several
/clear       start a new conversation, without pictures
/help        show this help
Ctrl-C stops an answer, Ctrl-D exits."""
COMMANDS = ("/image ", "/clear", "/help")


class RecordingStreamer(TextStreamer):
    """Prints an answer as it is generated, and keeps its text in case it is interrupted."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(text, stream_end)
        self.said += text


def complete(text: str, state: int) -> str | None:
    """Tab completion: returns the command or file number `state` that begins with `text`; None after the last one."""
    folder, begin = text[: text.rfind("/") + 1], text[text.rfind("/") + 1 :]
    matches = [command for command in COMMANDS if command.startswith(text)]
    with suppress(OSError, RuntimeError):  # no such folder, no such user
        files = sorted(Path(folder or ".").expanduser().iterdir())
        matches += [f"{folder}{file.name}{'/' * file.is_dir()}" for file in files if file.name.startswith(begin)]
    return matches[state] if state < len(matches) else None


@contextmanager
def line_editing(history: Path):
    """Provides arrow keys, Tab and the questions in `history`, if input comes from a terminal and readline exists."""
    try:
        import readline
    except ImportError:  # on Windows the terminal itself edits lines
        readline = None
    if readline is None or not sys.stdin.isatty():
        yield
        return
    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(1000)
    with suppress(OSError):  # there is no history yet
        readline.read_history_file(history)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder is not writable
            readline.write_history_file(history)


def chat(model, tokenizer, args, weights: Path) -> None:
    """Runs the conversation until the input ends. Prints errors of the user and continues."""
    torch.manual_seed(args.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the program
    blind, first = needs_picture(weights), pictures_first(weights)
    turns, shown = [], []  # the conversation and its pictures
    waiting = [open_image(path, model.processor) for path in args.image or []]  # pictures for the next question
    print(HELP)
    with line_editing(Path(args.out_dir) / ".chat_history"):
        while True:
            try:
                line = input("\n> ").strip()
                command, _, rest = line.partition(" ")
                if command == "/image":
                    waiting.append(open_image(dropped(rest), model.processor, "/image"))
                    print(f"picture {len(waiting)} attached to the next question")
                elif command == "/clear":
                    turns, shown, waiting = [], [], []
                    print("conversation cleared")
                elif command == "/help":
                    print(HELP)
                elif re.fullmatch(r"/\w+", command):
                    print(f"{command} is not a command\n{HELP}")
                elif line:
                    text = user_turn(line, len(waiting), first, "the question")
                    if blind and not (shown or waiting):
                        print("(there is no picture, and this model was never trained without one)")
                    asked = [*turns, {"role": "user", "content": text}]
                    said = print_answer(model, tokenizer, asked, [*shown, *waiting], args)
                    if said:  # else it was stopped at once, and the pictures stay attached to the next question
                        turns = [*asked, {"role": "assistant", "content": said}]
                        shown, waiting = [*shown, *waiting], []
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nPress Ctrl-D to exit")
            except Exception as error:
                if not is_user_error(error):
                    raise
                print(error)
                if turns and not line.startswith("/"):  # perhaps the conversation has become too long
                    print("/clear starts a new conversation")


def dropped(name: str) -> str:
    """Returns the file name as typed, or as terminals write a file dropped on them: 'a b.jpg' or a\\ b.jpg.

    Raises ValueError if there is none.
    """
    name = name.strip()
    if sys.platform == "win32":
        name = name.strip('"')
    else:
        with suppress(ValueError):  # an unmatched quote is part of the name
            words = shlex.split(name)
            name = words[0] if len(words) == 1 else name  # several words: a typed name with spaces
    if not name:
        raise ValueError("/image needs a file, for example /image photo.jpg")
    with suppress(RuntimeError):  # ~ does not name a user, as in ~$letter.png
        return str(Path(name).expanduser()) if name.startswith("~") else name
    return name


def print_answer(model, tokenizer, turns: list[dict], images: list, args) -> str:
    """Prints the answer as it is generated and returns it; after Ctrl-C, the part that was generated."""
    streamer = RecordingStreamer(tokenizer)
    try:
        generate(model, tokenizer, turns, images, args, streamer)
    except KeyboardInterrupt:
        streamer.end()
    return streamer.said.strip()

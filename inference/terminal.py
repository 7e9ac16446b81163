"""A conversation in the terminal: questions and pictures in, answers as they come."""

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
/image FILE  shows a picture with the next question, also http(s)://...; several one after another
/clear       forgets conversation and pictures
/help        this
Ctrl-C stops an answer, Ctrl-D leaves."""
COMMANDS = ("/image ", "/clear", "/help")


class Listened(TextStreamer):
    """Prints an answer as it comes and keeps what was said, for the case that it is interrupted."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(text, stream_end)
        self.said += text


def complete(text: str, state: int) -> str | None:
    """Tab: the commands and files that begin with `text`, one for each `state`, then None."""
    folder, begin = text[: text.rfind("/") + 1], text[text.rfind("/") + 1 :]
    matches = [command for command in COMMANDS if command.startswith(text)]
    with suppress(OSError, RuntimeError):  # no such folder, no such user
        files = sorted(Path(folder or ".").expanduser().iterdir())
        matches += [f"{folder}{file.name}{'/' * file.is_dir()}" for file in files if file.name.startswith(begin)]
    return matches[state] if state < len(matches) else None


@contextmanager
def line_editing(history: Path):
    """Arrow keys, Tab, and in `history` the questions of earlier days, where somebody types and there is readline."""
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
    with suppress(OSError):  # the first day
        readline.read_history_file(history)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that cannot be written
            readline.write_history_file(history)


def chat(model, tokenizer, args, weights: Path) -> None:
    """Talks until the input ends. A mistake is told, and the conversation goes on."""
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
                    print(f"picture {len(waiting)} of the next question")
                elif command == "/clear":
                    turns, shown, waiting = [], [], []
                    print("forgotten")
                elif command == "/help":
                    print(HELP)
                elif re.fullmatch(r"/\w+", command):
                    print(f"{command} is no command\n{HELP}")
                elif line:
                    text = user_turn(line, len(waiting), first, "the question")
                    if blind and not (shown or waiting):
                        print("(no picture was given, and this model was never trained without one)")
                    asked = [*turns, {"role": "user", "content": text}]
                    said = print_answer(model, tokenizer, asked, [*shown, *waiting], args)
                    if said:  # else it was stopped at once, and the pictures wait for another question
                        turns = [*asked, {"role": "assistant", "content": said}]
                        shown, waiting = [*shown, *waiting], []
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D leaves")
            except Exception as error:
                if not is_user_error(error):
                    raise
                print(error)
                if turns and not line.startswith("/"):  # it may be the conversation that does not fit
                    print("/clear forgets what was said before")


def dropped(name: str) -> str:
    """The name of a file as typed, or as a terminal writes one that is dropped on it: 'a b.jpg' or a\\ b.jpg."""
    name = name.strip()
    if sys.platform == "win32":
        name = name.strip('"')
    else:
        with suppress(ValueError):  # a quote without its partner: one of the name
            words = shlex.split(name)
            name = words[0] if len(words) == 1 else name  # several: typed, with a space in it
    if not name:
        raise ValueError("/image: which one? As in /image photo.jpg")
    with suppress(RuntimeError):  # a ~ that is no user's, as in ~$letter.png
        return str(Path(name).expanduser()) if name.startswith("~") else name
    return name


def print_answer(model, tokenizer, turns: list[dict], images: list, args) -> str:
    """Streams the answer; Ctrl-C stops it, and what was said stands."""
    streamer = Listened(tokenizer)
    try:
        generate(model, tokenizer, turns, images, args, streamer)
    except KeyboardInterrupt:
        streamer.end()
    return streamer.said.strip()

"""The command line of all scripts: parsing flags and reporting errors.

Nothing here imports PyTorch, so --help and a mistyped flag get an immediate answer.
"""

import argparse
import difflib
import errno
import math
import os
import re
import shutil
import sys
import textwrap
import time
import warnings
from pathlib import Path

from common.start import BROKEN_PIPE, missing_package, report_stopped, silence_broken_pipe

FULL, UNTOUCHED = "the disk is full", "nothing was overwritten"


class Stopped(SystemExit):
    """The run ended after Ctrl-C or SIGTERM, with its current step finished and saved. Exit status 130."""

    def __init__(self):
        super().__init__(130)


def is_user_error(error: Exception) -> bool:
    """Whether the user can fix it: a flag, a file, a package, the batch size. Any other error is a bug of ours."""
    kinds = (ValueError, OSError, ImportError)
    if torch := sys.modules.get("torch"):
        kinds += (torch.OutOfMemoryError,)
    return isinstance(error, kinds)


def disk_full(error: BaseException | None) -> bool:
    """Whether the disk is full, by errno: the text depends on the system. torch.save says "unexpected pos"."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "unexpected pos" in str(error)


def reason(error: Exception) -> str:
    """The text of an error; a full disk always gets the same text."""
    return f"{FULL}; {UNTOUCHED}" if disk_full(error) else str(error)


def run_main(main) -> None:
    """Calls `main()`. An error that the user can fix becomes one message instead of a traceback, and exit status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that is not valid Unicode must not end the run
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # `ImageProcessor.open` reports it
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    status = 0
    try:
        main()
        if distributed := sys.modules.get("common.distributed"):
            distributed.stop()
    except Stopped as stopped:
        status = stopped.code
    except KeyboardInterrupt:
        report_stopped("stopped")
        status = 130
    except Exception as error:
        if silence_broken_pipe(error):
            status = BROKEN_PIPE
        elif os.environ.get("MINIMIND_TRACEBACK") or not is_user_error(error):
            if not several:
                raise
            sys.excepthook(*sys.exc_info())
            status = 1
        else:
            if several and os.environ.get("RANK", "0") != "0":
                time.sleep(2)  # rank 0 reports an error of all ranks first; torchrun then ends the others
            message = f"\nerror: {reason(error)}\n(MINIMIND_TRACEBACK=1 shows where)"
            message = f"error: {missing_package(error)}" if isinstance(error, ImportError) else message
            print(message, file=sys.stderr, flush=True)
            status = 2
    if several:
        # At once, without exit handlers. After an error, torchrun then ends the other ranks, for which leaving the
        # group would wait. And a thread of gloo that frees a tensor while Python ends would abort the process
        # (pytorch/pytorch issue 190489).
        try:
            sys.stdout.flush()
        except OSError as error:
            if not silence_broken_pipe(error):
                print(f"error: {reason(error)}", file=sys.stderr, flush=True)
                status = status or 2
        os._exit(status)
    if status:
        sys.exit(status)


def positive(kind):
    """An argparse type: `kind` (int or float) above 0 and finite."""

    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:  # False for NaN, too
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"  # appears in argparse's error message
    return parse


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return float(text)


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must not be below 0, got {text}")
    return int(text)


fraction.__name__, not_negative.__name__ = "float", "int"  # appear in argparse's error messages


def switch(text: str) -> bool:
    values = {"0": False, "1": True, "false": False, "true": True}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected nothing, 1 or 0, got {text}")
    return values[text.lower()]


# A flag that is on without a value or with 1, and off with 0: add("--use_moe", **SWITCH, help=...)
SWITCH = {"nargs": "?", "const": True, "default": False, "type": switch, "metavar": "0|1"}


# ---------------------------------------------------------------------------- the parser

# Flags of the public MiniMind-V, older versions included → our names; the first name that the script accepts is used.
RENAMED = {
    "--dim": ["--hidden_size"],
    "--freeze_llm": ["--trainable"],
    "--from_weight": ["--weights"],  # this one and --weights: our own scripts use both names
    "--load_from": ["--weights", "--from_weight"],
    "--n_layers": ["--num_hidden_layers"],
    "--save_dir": ["--out_dir"],
    "--use_compile": ["--compile"],
    "--weight": ["--weights"],
    "--weights": ["--from_weight"],
}
# Flags without an equivalent here → what to do instead.
GONE = {
    "--ddp": "for several devices, use torchrun --nproc_per_node N {name}",
    "--local_rank": "for several devices, use torchrun --nproc_per_node N {name}",
    "--lora_name": "there is no LoRA here; to train fewer weights: --trainable attention",
    "--save_weight": "the stage sets the file name; choose a folder with --out_dir DIR",
    "--show_speed": "--json reports seconds and tokens of each answer",
    "--stream": "not needed, answers stream by default",
    "--visual_encoder": "pass the encoder's folder with --vision_model_path DIR",
}


class HelpFormatter(argparse.HelpFormatter):
    """Formats --help: keeps the commands of the docstring unwrapped and shows each default next to its flag."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=22, width=min(shutil.get_terminal_size().columns, 100) - 2)

    def _format_usage(self, usage, actions, groups, prefix):
        needed = [
            " ".join(
                [*action.option_strings, self._format_args(action, self._get_default_metavar_for_optional(action))]
            )
            for action in actions
            if action.required
        ]
        return textwrap.fill(" ".join(["usage:", self._prog, *needed]), self._width, subsequent_indent=" " * 7) + "\n\n"

    def _fill_text(self, text, width, indent):
        def fill(block):
            if not block.startswith(" "):
                return textwrap.fill(block, width)
            if max(map(len, block.splitlines())) <= width:
                return block
            return re.sub(r"(?m)^( +)(\S.*?) +(# .*)$", r"\1\3\n\1\2", block)  # comments go above the commands

        return "\n\n".join(map(fill, text.strip().split("\n\n")))

    def _get_default_metavar_for_optional(self, action):
        kind = {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", "").split(" ")[-1], "TEXT")
        return {"dir": "DIR", "path": "PATH", "rate": "RATE"}.get(action.dest.split("_")[-1], kind)

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        default = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{action.help} (default: {default.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A parser whose --help starts with the few flags that a newcomer needs (group `start`). Errors take one line.

    file: __file__ of the script; description: its docstring. Abbreviated flags are an error, because a new flag could
    change their meaning; the error names the full flag.
    """

    def __init__(self, file: str, description: str):
        path = Path(file)
        if path.name == "__main__.py":  # the script is a package
            path = path.parent.with_suffix(".py")
        folder, self.name = path.parts[-2:]
        module = f"{folder}.{path.stem}"
        command = f"-m {module}" if module.startswith(("scripts.", "dataset.")) else self.name
        super().__init__(
            prog=f"python {command} [options]",
            description=description,
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.start = self.group("start with these")
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def group(self, title: str):
        """The argument group with this title; creates it if needed."""
        same = (group for group in self._action_groups if group.title == title)
        return next(same, None) or self.add_argument_group(title)

    def parse_known_args(self, args=None, namespace=None):
        args = self.rename_flags(sys.argv[1:] if args is None else args)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: expected a flag before this value (--help lists all)")
        return namespace, unknown

    def rename_flags(self, argv: list[str]) -> list[str]:
        """Returns argv with RENAMED flags under our names. An unknown flag ends the program here: argparse would first
        report missing flags."""
        flags, renamed, rest = self._option_string_actions, [], iter(argv)
        for arg in rest:
            if arg == "--":
                return [*renamed, arg, *rest]
            flag, equals, value = arg.partition("=")
            if re.fullmatch("--?[A-Za-z][^ ]*", flag) and flag not in flags:  # not a value or a negative number
                ours = next((name for name in RENAMED.get(flag, []) if name in flags), None)
                if not ours:
                    self.error(f"{flag} is not a flag of {self.name}{self.hint(flag)}")
                if flag == "--load_from":
                    value, equals = value if equals else next(rest, ""), "="
                    if value in ("model", "./model"):  # the public default: .pth weights, the same as without the flag
                        continue
                arg = ours + equals + value
            renamed.append(arg)
        return renamed

    def hint(self, flag: str) -> str:
        """What to type instead of an unknown flag, as the end of an error message."""
        if flag in GONE:
            return ": " + GONE[flag].format(name=self.name)
        word = flag.lstrip("-").replace("-", "_")
        names = [name.removeprefix("--") for action in self._actions for name in action.option_strings[-1:]]
        near = [name for name in names if name.startswith(word)]
        near += [name for name in names if word == "".join(part[:1] for part in name.split("_"))]  # lr: learning_rate
        near += difflib.get_close_matches(word, names, 1)
        return f"{f'; did you mean --{near[0]}?' if near else ''} (--help lists all)"

    def error(self, message: str):
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")

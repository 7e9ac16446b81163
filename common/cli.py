"""The command line of all scripts: how flags are read, and how a mistake is reported.

Nothing here imports PyTorch, so that --help and a mistyped flag are answered at once.
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

FULL, UNTOUCHED = "the disk is full", "what stood there is untouched"


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM ended the run after its step was finished and saved. Exit status 130."""

    def __init__(self):
        super().__init__(130)


def is_user_error(error: Exception) -> bool:
    """By the user: a flag, a file, a package, the size of a batch. Anything else is our mistake."""
    kinds = (ValueError, OSError, ImportError)
    if torch := sys.modules.get("torch"):
        kinds += (torch.OutOfMemoryError,)
    return isinstance(error, kinds)


def disk_full(error: BaseException | None) -> bool:
    """By its number, as the words of an OSError differ from system to system; torch.save says "unexpected pos"."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "unexpected pos" in str(error)


def reason(error: Exception) -> str:
    """What an error says; a full disk in the same words everywhere."""
    return f"{FULL}; {UNTOUCHED}" if disk_full(error) else str(error)


def run_main(main) -> None:
    """Calls `main()` and turns what the user can mend into one message instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that is no Unicode must not end the run
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # `ImageProcessor.open` says it in a sentence
    try:
        main()
    except KeyboardInterrupt:
        report_stopped("stopped")
        sys.exit(130)
    except Exception as error:
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if silence_broken_pipe(error):
            os._exit(BROKEN_PIPE) if several else sys.exit(BROKEN_PIPE)  # as below
        if os.environ.get("MINIMIND_TRACEBACK") or not is_user_error(error):
            raise
        if several and os.environ["RANK"] != "0":
            time.sleep(2)  # what all ranks meet, the first reports: torchrun then ends the others
        message = f"\nerror: {reason(error)}\n(MINIMIND_TRACEBACK=1 shows where)"
        message = f"error: {missing_package(error)}" if isinstance(error, ImportError) else message
        print(message, file=sys.stderr, flush=True)
        if several:
            os._exit(2)  # at once, so that torchrun ends the others: leaving the group would wait for them
        sys.exit(2)
    if distributed := sys.modules.get("common.distributed"):
        distributed.stop()


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:  # NaN is neither
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its message
    return parse


def fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return float(text)


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must not be below 0, got {text}")
    return int(text)


fraction.__name__, not_negative.__name__ = "float", "int"  # argparse puts them into its messages


def switch(text: str) -> bool:
    values = {"0": False, "1": True, "false": False, "true": True}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected nothing, 1 or 0, got {text}")
    return values[text.lower()]


# Of a flag that is on where it stands, alone or with 1, and off with 0: add("--use_moe", **SWITCH, help=...)
SWITCH = {"nargs": "?", "const": True, "default": False, "type": switch, "metavar": "0|1"}


# ---------------------------------------------------------------------------- the parser

# What the public MiniMind-V, its older scripts too, calls otherwise: the first of these that a script has takes it.
RENAMED = {
    "--dim": ["--hidden_size"],
    "--freeze_llm": ["--trainable"],
    "--from_weight": ["--weights"],  # these two: what our own scripts call otherwise
    "--load_from": ["--weights", "--from_weight"],
    "--n_layers": ["--num_hidden_layers"],
    "--save_dir": ["--out_dir"],
    "--use_compile": ["--compile"],
    "--weight": ["--weights"],
    "--weights": ["--from_weight"],
}
# What has no equal here, and what to do.
GONE = {
    "--ddp": "several devices take torchrun --nproc_per_node N {name}",
    "--local_rank": "several devices take torchrun --nproc_per_node N {name}",
    "--lora_name": "there is no LoRA here; to train few weights: --trainable attention",
    "--save_weight": "the stage names the file; for a folder of its own: --out_dir DIR",
    "--show_speed": "--json tells seconds and tokens of each answer",
    "--stream": "leave it out, answers stream",
    "--visual_encoder": "an encoder is named by its folder, --vision_model_path DIR",
}


class HelpFormatter(argparse.HelpFormatter):
    """The docstring with its commands as they stand, and every default beside its flag, in lines that fit."""

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
    """Its --help begins with the few flags that a newcomer needs, those of `start`; it reports a mistake in one line.

    file: __file__ of the script; description: its docstring. Abbreviations are an error: one means something else, or
    nothing, as soon as another flag comes along. The message names the flag.
    """

    def __init__(self, file: str, description: str):
        path = Path(file)
        if path.name == "__main__.py":  # of a package
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
        """The flags under this heading, which is made if needed."""
        same = (group for group in self._action_groups if group.title == title)
        return next(same, None) or self.add_argument_group(title)

    def parse_known_args(self, args=None, namespace=None):
        args = self.rename_flags(sys.argv[1:] if args is None else args)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: expected a flag before it (--help lists all)")
        return namespace, unknown

    def rename_flags(self, argv: list[str]) -> list[str]:
        """argv with RENAMED flags under our names. What is no flag ends the program here, before argparse can say that
        others are missing."""
        flags, renamed, rest = self._option_string_actions, [], iter(argv)
        for arg in rest:
            if arg == "--":
                return [*renamed, arg, *rest]
            flag, equals, value = arg.partition("=")
            if re.fullmatch("--?[A-Za-z][^ ]*", flag) and flag not in flags:  # neither a value nor a negative number
                ours = next((name for name in RENAMED.get(flag, []) if name in flags), None)
                if not ours:
                    self.error(f"{flag} is no flag of {self.name}{self.hint(flag)}")
                if flag == "--load_from":
                    value, equals = value if equals else next(rest, ""), "="
                    if value in ("model", "./model"):  # the public default: .pth weights, as without the flag
                        continue
                arg = ours + equals + value
            renamed.append(arg)
        return renamed

    def hint(self, flag: str) -> str:
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

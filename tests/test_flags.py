"""Every script: no flag that nobody reads, none without help, no type=bool, for which "False" is true; a --help that
fits a terminal and begins with what a newcomer needs."""

import argparse
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in (".", "common", "dataset", "inference", "model", "scripts", "scripts/*", "trainer")
    for path in sorted(ROOT.glob(f"{folder}/*.py"))
}
# Of a package the file that is run
SCRIPTS = [path for path, tree in SOURCES.items() if "id='Parser'" in ast.dump(tree) and "__main__" in ast.dump(tree)]


def names(path):
    return str(path.relative_to(ROOT))


def read_by(path) -> set[str]:
    """Names that are read as an attribute anywhere (args.epochs), by getattr, or in the script itself where it passes
    all of them on: f(**vars(args))."""
    read = set()
    for source, tree in SOURCES.items():
        spread = source == path and "**vars(args)" in source.read_text(encoding="utf-8")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                read.update(arg.value for arg in node.args[1:] if isinstance(arg, ast.Constant))
            if spread and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                read.add(node.id)
    return read


@pytest.fixture
def parsers(monkeypatch):
    """parsers(script) → every ArgumentParser that its main() builds, ready to parse."""

    class Built(Exception):
        pass

    def build(path):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        built = []

        def parse_args(self, *args, **kwargs):
            built.append(self)
            raise Built

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            with pytest.raises(Built):
                module.main([])
        for parser in built:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    built.extend(action.choices.values())
        return built

    return build


def actions(parser):
    skip = (argparse._HelpAction, argparse._SubParsersAction, argparse._VersionAction)
    return [action for action in parser._actions if not isinstance(action, skip)]


def test_the_scripts_that_users_start_are_found():
    expected = {"train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "scripts/train_tokenizer.py"}
    assert expected | {"dataset/scenes.py"} <= set(map(names, SCRIPTS))


@pytest.mark.parametrize("script", SCRIPTS, ids=names)
def test_every_flag_is_read_has_help_and_none_is_a_bool_from_text(parsers, script):
    read = read_by(script)
    for parser in parsers(script):
        assert actions(parser)
        for action in actions(parser):
            flag = action.option_strings[0] if action.option_strings else action.dest
            assert action.dest in read, f"{flag} is read nowhere"
            assert action.help and len(action.help) > 3, f"{flag} has no help"
            assert action.type is not bool, f"{flag}: bool('False') is True; use store_true or BooleanOptionalAction"
            assert parser.format_help()  # a stray % in a help text would raise here


@pytest.mark.parametrize("script", SCRIPTS, ids=names)
def test_help_fits_a_terminal_and_begins_with_the_few_flags_that_a_newcomer_needs(parsers, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for parser in parsers(script):
        shown = parser.format_help()
        assert max(map(len, shown.splitlines())) <= 80
        module = ".".join(script.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        command = f"python {names(script)}" if script.parent == ROOT else f"python -m {module}"
        usage, rest = shown.split("\n\n", 1)
        assert usage.startswith(f"usage: {command} [options]") and usage.count("\n") <= 3
        introduction = rest.split("\n\nstart with these:\n")[0]
        assert f"\n    {command}" in f"\n{introduction}", "the first thing to see is a command to type"
        titled = [group for group in parser._action_groups if group._group_actions and group.title != "options"]
        assert titled[0].title == "start with these" and 1 <= len(titled[0]._group_actions) <= 12
        assert len(titled) <= 6 and "TEXT" not in shown.replace("--prompt TEXT", "")
        for action in actions(parser):
            assert f"--{action.dest} {action.dest.upper()}" not in shown, "say what it is: FILE, DIR, N"
            if action.default not in (None, False, [], argparse.SUPPRESS) and action.help != argparse.SUPPRESS:
                value = action.default if isinstance(action.default, list | tuple) else [action.default]
                assert f"(default:{''.join(map(str, value))})" in "".join(shown.split())


def test_help_and_a_mistyped_flag_do_not_wait_for_pytorch_or_matplotlib():
    at_once = "train_pretrain_vlm train_sft_vlm eval_vlm web_demo_vlm dataset.scenes dataset.toys scripts.train_llm "
    at_once += "scripts.quickstart.__main__ scripts.make_bundle scripts.download.__main__ scripts.report"
    for script in at_once.split():
        for flag, status in (("--help", 0), ("--hlep", 2)):
            code = f"import sys, {script} as script\ntry: script.main(['{flag}'])\n"
            code += "except SystemExit as end: print(end.code, sys.modules.keys() & {'torch', 'matplotlib'})"
            run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
            assert run.stdout.splitlines()[-1] == f"{status} set()"

"""Every script: no flag that nobody reads, none without help, and no type=bool, for which "False" is true."""

import argparse
import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in (".", "dataset", "model", "scripts", "trainer")
    for path in sorted((ROOT / folder).glob("*.py"))
}
SCRIPTS = [path for path, tree in SOURCES.items() if "argparse" in ast.dump(tree) and "__main__" in ast.dump(tree)]


def names(path):
    return str(path.relative_to(ROOT))


def read_by(path) -> set[str]:
    """Names that are read as an attribute anywhere (args.epochs), by getattr, or in the script itself where it passes
    all of them on: f(**vars(args))."""
    found = set()
    for source, tree in SOURCES.items():
        spread = source == path and "**vars(args)" in source.read_text(encoding="utf-8")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                found.update(arg.value for arg in node.args[1:] if isinstance(arg, ast.Constant))
            if spread and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found.add(node.id)
    return found


@pytest.fixture
def parsers(monkeypatch):
    """parsers(script) → every ArgumentParser that its main() builds, ready to parse."""

    class Built(Exception):
        pass

    def build(path):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        found = []

        def parse_args(self, *args, **kwargs):
            found.append(self)
            raise Built

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            with pytest.raises(Built):
                module.main([])
        for parser in found:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    found.extend(action.choices.values())
        return found

    return build


def actions(parser):
    skip = (argparse._HelpAction, argparse._SubParsersAction, argparse._VersionAction)
    return [action for action in parser._actions if not isinstance(action, skip)]


def test_the_scripts_that_users_start_are_found():
    assert {"train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "scripts/train_tokenizer.py"} <= set(
        map(names, SCRIPTS)
    )


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

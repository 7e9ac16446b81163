"""Nothing that is printed or written is a dead end: each command is parsed by the script that it names, and each flag
exists where it is named. Both READMEs, docstrings, messages, recipes and lists of what to type next."""

import argparse
import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from common.cli import GONE, RENAMED
from scripts import make_bundle
from scripts.download import __main__ as download
from scripts.from_photos import __main__ as from_photos
from scripts.quickstart import __main__ as quickstart
from tests.test_flags import ROOT, SCRIPTS, SOURCES, names, parsers  # noqa: F401 (a fixture)

READMES = ["README.md", "README_zh.md"]
PAGES = [*READMES, *sorted(names(path) for folder in ("docs", "docs/course") for path in ROOT.glob(f"{folder}/*.md"))]
FLAG = r"(?<![\w-])--[a-z]\w*(?:-\w+)*"
# In a sentence a command ends at punctuation, in a text at the end of the line.
COMMAND = re.compile(
    r"(?<![\w/.])(?:python3?|torchrun) ([^\n`;<…，。；（）]*?)(?= \||[`;<…，。；（）]|[.,:)]+(?:\s|$)|$)", re.M
)
OTHERS = ("venv", "pytest", "scripts.torchrun", "vllm.", "lmms_eval", "-P scripts/convert_vlm/check_export.py")
TORCHRUN = {"--nproc_per_node", "--nnodes", "--master_addr", "--rdzv_endpoint", "--max-restarts"}
ELSEWHERE = {"--short", "--target", "--index-url", "--standalone"}  # of git, pip and torchrun, which we call
SOMETHING = "SOMETHING"  # in place of what a message fills in


def texts_of(tree) -> list[str]:
    """All texts in a source: f-strings with SOMETHING in their gaps, docstrings, parts that are joined by +."""
    texts, inside = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(map(id, ast.walk(node)))
            parts = [part.value if isinstance(part, ast.Constant) else SOMETHING for part in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            texts.append(node.value)
    return texts


def readme_text(name: str) -> str:
    """In prose commands go over the end of a line, in blocks a backslash says so."""
    parts = (ROOT / name).read_text(encoding="utf-8").split("```")
    return "```".join(part if i % 2 else part.replace("\n", " ") for i, part in enumerate(parts))


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """[(file of the script, its flags)], without the commands of others, and without those that code goes on with."""
    commands = []
    for command in COMMAND.findall(re.sub(r"\\\n\s*", "", text)):
        goes_on = command.endswith(" ") and text.endswith(command)
        if not goes_on and not command.removeprefix("-m ").startswith(OTHERS):
            commands.append(named(shlex.split(command, comments=True)))
    return [(script, flags) for script, flags in commands if re.search(r"\.py$|/", script)]


def named(command: list) -> tuple[str, list[str]]:
    """Script and flags of a command, with or without python or torchrun."""
    command = [str(part) for part in command if part not in ("python", "torchrun")]
    while command and command[0] in TORCHRUN:
        command = command[2:]
    if command[:1] == ["-m"]:
        path = command[1].replace(".", "/")
        return path + ("/__main__.py" if (ROOT / path).is_dir() else ".py"), command[2:]
    return (command or [""])[0], command[1:]


@pytest.fixture
def parse(parsers, capsys):  # noqa: F811
    """parse(script, flags): the script takes them. SOMETHING is any value."""
    built = {}

    def run(path: str, flags: list[str]) -> None:
        assert ROOT / path in SCRIPTS, f"there is no {path}"
        if "--help" in flags:
            return
        if path not in built:
            (built[path],) = parsers(ROOT / path)
        for action in built[path]._actions:
            if any(SOMETHING in flag for flag in flags) and not isinstance(action, argparse._HelpAction):
                action.type = action.choices = None
        try:
            built[path].parse_args(flags)
        except SystemExit:
            raise AssertionError(f"{path} {shlex.join(flags)}: {capsys.readouterr().err}") from None

    return run


def users_of(module: Path, imports: dict) -> list[Path]:
    """The scripts that import a module, directly or not; itself, if it is one."""
    users, todo = {module}, [module]
    while todo:
        name = todo.pop()
        new = [path for path, imported in imports.items() if name in imported and path not in users]
        users.update(new)
        todo += new
    return [path for path in SCRIPTS if path in users]


def imports_of(tree) -> set[Path]:
    files = set()
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            module = f"model.{node.module}" if node.level else node.module  # relative ones are there alone
            modules = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        files.update(ROOT / (module.replace(".", "/") + ".py") for module in modules)
    return files


@pytest.mark.parametrize("source", [*PAGES, *map(names, SOURCES)])
def test_every_command_in_a_text_is_one_that_its_script_takes(parse, source):
    path = ROOT / source
    texts = [readme_text(source)] if source in PAGES else texts_of(SOURCES[path])
    for script, flags in [command for text in texts for command in commands_in(text)]:
        parse(script, flags)


def test_every_flag_in_a_text_is_one_of_a_script_that_can_show_it(parsers):  # noqa: F811
    flags = {
        script: {flag for parser in parsers(script) for flag in parser._option_string_actions} for script in SCRIPTS
    }
    every = set().union(*flags.values()) | TORCHRUN
    imports = {path: imports_of(tree) for path, tree in SOURCES.items()}
    wrong = []
    for path, tree in SOURCES.items():
        can = set().union(TORCHRUN, *(flags[script] for script in users_of(path, imports)))
        known = ELSEWHERE | ({*GONE, *RENAMED} if names(path) == "common/cli.py" else set())
        for text in texts_of(tree):
            if "style=" in text or "var(--" in text:  # these are CSS's
                continue
            alone = bool(re.fullmatch(FLAG, text))  # part of a command that a recipe puts together
            rest = text if alone else COMMAND.sub("", re.sub(r"\\\n\s*", "", text))
            for flag in set(re.findall(FLAG, rest)) - (every if alone else can) - known:
                wrong.append(f"{names(path)}: {flag} in {text[:70]!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("readme", PAGES)
def test_every_flag_in_a_readme_is_one_of_a_script(parsers, readme):  # noqa: F811
    every = {flag for script in SCRIPTS for parser in parsers(script) for flag in parser._option_string_actions}
    every |= {*TORCHRUN, *RENAMED}
    text = re.sub(r"\\\n\s*", "", readme_text(readme))
    text = re.sub(r"(?m)^(transformers |python -m vllm|python -m lmms_eval|pip ).*$", "", text)  # flags of others
    assert sorted(set(re.findall(FLAG, text)) - every) == []


def test_every_step_of_the_recipes_is_one_that_its_script_takes(parse):
    model = ["--tokenizer_path", "t", "--vision_model_path", "v", "--hidden_size", 128, "--use_moe", "--out_dir", "o"]
    steps = [*make_bundle.recipe(Path("b")), *quickstart.recipe(Path("o"), Path("l.pth"), model)]
    given = ["--data_path", "a.csv", "b.csv", "--images_path", "p", "--val_path", "v.csv", "--refs_path", "r.json"]
    args = from_photos.parse_args([*given, "--prompt", "What?", "--allow_urls"])
    steps += [from_photos.split_step(Path("o"), args)]
    steps += from_photos.recipe(Path("o"), {"train": 6000, "captions": 60_000})
    for step in steps:
        parse(*named([*step.command, *(["--from_resume"] if step.resumable else [])]))
    assert len(steps) > 15


@pytest.mark.parametrize("given", [[], ["--from_zero"], ["--from_zero", "--use_moe"]])
def test_what_the_quickstart_says_to_try_next_can_be_typed(parse, given):
    args = quickstart.parse_args(given)
    commands = quickstart.next_commands(args.out_dir, Path("out/quickstart/sft_vlm_128.pth"), args)
    assert len(commands) >= 3
    for _, command in commands:
        parse(*named(command))


def test_what_from_photos_says_to_try_next_can_be_typed(parse):
    for _, command in from_photos.next_commands(Path("out/photos/sft_vlm_192.pth")):
        parse(*named(command))


@pytest.mark.parametrize(
    "what",
    [
        [],
        ["--what", "clip", "vlm"],
        ["--size", "104m", "--use_moe", "--root", "other"],
        ["--generation", "3v", "--use_moe"],
        ["--what", "encoder", "--encoder", "siglip2"],
    ],
)
def test_what_the_download_says_to_type_next_can_be_typed(parse, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = download.parse_args(what)
    commands = download.next_commands(
        args, [task for task in download.TASKS if task in args.what or "all" in args.what]
    )
    assert commands
    for command in commands:
        parse(*named(command))


def test_pyproject_names_the_packages_of_the_requirements():
    def packages(name):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        return [line.split(" #")[0].strip() for line in lines if not line.startswith("-r")]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert sorted(packages("requirements.txt")) == sorted([*project["dependencies"], *extras["web"], *extras["eval"]])
    assert packages("requirements-dev.txt") == extras["dev"]


def test_the_reading_path_leads_from_file_to_file_and_is_short():
    path, lines = "model/config.py", []
    while path:
        text = (ROOT / path).read_text(encoding="utf-8")
        number, total, following = re.search(r"Reading path, (\d+) of (\d+); (?:next: (\S+)|the last)", text).groups()
        lines.append(len(text.splitlines()))
        assert int(number) == len(lines) and all(path in readme_text(name) for name in READMES)
        path = following
    assert len(lines) == int(total) and sum(lines) <= 1700 and max(lines) <= 350


def headings(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
    found = re.findall(r"(?m)^#+ (.+)$", text)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each).lower()).replace(" ", "-")
        for each in found
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_link_in_a_page_leads_to_a_file_and_a_heading_that_are_there(page):
    path, wrong = ROOT / page, []
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        file, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (path.parent / file) if file else path
        if not target.exists() or anchor and target.suffix == ".md" and anchor not in headings(target):
            wrong.append(link)
    assert not wrong


def test_the_glossary_names_code_that_is_there():
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    rows = [line.rsplit("|", 2)[1] for line in text.splitlines() if line.startswith("| ") and "`" in line]
    for row in rows:
        for file in re.findall(r"`([\w/]+\.py)`", row):
            names = re.findall(r"`(\w+)` in", row)
            assert all(re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")) for name in names), row
    assert len(rows) > 50


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/troubleshooting_zh.md"])
def test_every_message_that_the_troubleshooting_quotes_is_one_of_ours(page):
    texts = " ".join(re.sub(r"\s+", " ", text) for tree in SOURCES.values() for text in texts_of(tree))
    tables = re.findall(r"(?m)^\| (?:message|提示) \|.*\n(?:\|.*\n)+", (ROOT / page).read_text(encoding="utf-8"))
    quoted = [quote for row in "".join(tables).splitlines() for quote in re.findall("`(.+?)`", row.split("|")[1])]
    parts = [
        part for quote in quoted for part in re.split(r" ?\.\.\.", quote) if part.strip() and not part.startswith("--")
    ]
    missing = [
        part for part in parts if not re.search(re.sub(r"\d{2,}", rf"(\\d+|{SOMETHING})", re.escape(part)), texts)
    ]
    assert not missing and len(parts) > 20

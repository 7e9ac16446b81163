"""The figures of the documentation: all come from the script, and stay small."""

import re
from pathlib import Path

import pytest
from PIL import Image

from scripts.make_figures import FIGURES, main

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs/images"
SCREENSHOT = "chat_page.png"  # of tests/test_web_chat.py


def test_every_figure_in_the_folder_is_drawn_by_the_script_and_shown_on_a_page():
    pages = [ROOT / "README.md", ROOT / "README_zh.md", *ROOT.glob("docs/**/*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    shown = re.findall(r"""(?:!\[[^\]]*\]\(|<img src=")\S*images/([\w.]+)""", text)
    sizes = {path.name: path.stat().st_size for path in IMAGES.iterdir()}
    assert set(shown) == {*FIGURES, SCREENSHOT} == set(sizes)
    assert max(sizes[name] for name in FIGURES) < 60_000 and sizes[SCREENSHOT] < 150_000


@pytest.mark.parametrize("name", [name for name, (_, trained) in FIGURES.items() if not trained])
def test_a_figure_of_the_bundle_is_drawn_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    main(["--only", Path(name).stem, "--out_dir", str(tmp_path)])
    if name.endswith(".png"):
        assert Image.open(tmp_path / name).size == Image.open(IMAGES / name).size
    else:
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<?xml")


def test_figures_of_a_trained_model_say_what_to_run_first(tmp_path, capsys):
    trained = [name for name, (_, needed) in FIGURES.items() if needed]
    if trained:
        main(["--only", *(Path(name).stem for name in trained), "--quickstart", str(tmp_path)])
        assert capsys.readouterr().out.count("python -m scripts.quickstart") == len(trained)

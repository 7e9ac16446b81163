"""The figures of the documentation: all come from the script, and stay small."""

import re
from pathlib import Path

import pytest
from PIL import Image

from scripts.make_figures.__main__ import figure_name, main
from scripts.make_figures.drawing import FIGURES

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs/images"
BUNDLE = [name for name, drawing in FIGURES.items() if not drawing.trained and not drawing.browser]
# Text alone, and so the same on any machine; pixels and what is trained differ a little between machines.
EXACT = [name for name in BUNDLE if figure_name(name) in ("architecture", "stages")]


def test_every_figure_in_the_folder_is_drawn_by_the_script_and_pages_show_no_others():
    pages = [ROOT / "README.md", ROOT / "README_zh.md", *ROOT.glob("docs/**/*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    shown = re.findall(r"""(?:!\[[^\]]*\]\(|<img [^>]*src=")[^)"]*images/([\w.]+)""", text)
    assert set(shown) <= set(FIGURES) == {path.name for path in IMAGES.iterdir()}


def test_figures_are_small_as_everybody_who_clones_fetches_them():
    sizes = {path.name: path.stat().st_size for path in IMAGES.iterdir()}
    assert sum(sizes.values()) < 2_000_000 and max(sizes.values()) < 250_000, sizes


@pytest.mark.parametrize("name", BUNDLE)
def test_a_figure_of_the_bundle_is_drawn_again(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main(["--only", figure_name(name), "--out_dir", str(tmp_path)])
    if "fonts-noto-cjk" in capsys.readouterr().out and not (tmp_path / name).exists():
        pytest.skip("no font with Chinese characters here")
    if name in EXACT:
        assert (tmp_path / name).read_text(encoding="utf-8") == (IMAGES / name).read_text(encoding="utf-8")
    elif name.endswith(".png"):
        assert Image.open(tmp_path / name).size == Image.open(IMAGES / name).size
    else:
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(("<?xml", "<svg"))


@pytest.mark.parametrize("name", [name for name in FIGURES if "_zh" not in name])
def test_a_figure_in_both_languages_differs_in_its_words_alone(name):
    path = IMAGES / name
    other = path.with_stem(f"{path.stem}_zh")
    if other.name in FIGURES:
        assert FIGURES[other.name].draw == FIGURES[name].draw and other.read_bytes() != path.read_bytes()


def test_figures_of_a_trained_model_say_what_to_run_first(tmp_path, capsys):
    trained = [name for name, drawing in FIGURES.items() if drawing.trained]
    main(["--only", *map(figure_name, trained), "--quickstart", str(tmp_path), "--out_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("python -m scripts.quickstart") == len(trained) and not list(tmp_path.iterdir())

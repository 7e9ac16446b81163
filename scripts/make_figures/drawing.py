"""What all figures share: how one is registered, its style, how it is written."""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.files import write_safely

TINY = Path("model/tiny")
# Blue, orange and green of Okabe and Ito (2008): told apart with any kind of colour vision, also in grey.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"  # picture, text, answer, the rest
STYLE = {
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.titlesize": 12,
    "svg.fonttype": "none",  # text stays text, in the reader's font: small files
    "svg.hashsalt": "minimind",  # the same bytes every time
    "axes.spines.top": False,
    "axes.spines.right": False,
}
DPI = 160  # twice the size that GitHub shows, for sharp screens


@dataclass(frozen=True)
class Drawing:
    """A figure of docs/images: `draw(say, *needed)` returns a figure of matplotlib, a Pillow picture or an SVG's text.

    language: "en" or "zh"; trained: it is also called with the folder of a finished quickstart; browser: and with a
    `shoot` of scripts/make_figures/browser.py.
    """

    draw: Callable
    language: str = "en"
    trained: bool = False
    browser: bool = False

    def say(self, english: str, chinese: str) -> str:
        """The one that is in the language of the figure."""
        return chinese if self.language == "zh" else english


FIGURES: dict[str, Drawing] = {}  # by file name


def draws(name: str, languages: tuple[str, ...] = ("en", "zh"), **needs: bool):
    """Registers a function that draws docs/images/`name`, and the same in Chinese beside it, as name_zh."""

    def register(function):
        path = Path(name)
        for language in languages:
            file = name if language == "en" else f"{path.stem}_zh{path.suffix}"
            FIGURES[file] = Drawing(function, language, **needs)
        return function

    return register


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of matplotlib (in inches) and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def bare(axes) -> None:
    """No ticks and no frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def save(figure, path: Path) -> None:
    """SVG for lines; PNG with a palette for pictures."""
    from PIL import Image

    file = io.BytesIO()
    if isinstance(figure, str):
        file.write(figure.encode())
    elif path.suffix == ".svg":
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    else:
        if not isinstance(figure, Image.Image):
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=DPI)
            figure = Image.open(drawn)
        figure.convert("RGB").quantize(128, kmeans=2, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    write_safely(path, lambda target: target.write(file.getvalue()))


def example_scene(seed: int = 9):
    """A scene such as the quickstart draws, three objects; lessons 1, 4 and 6 show the same one."""
    from dataset.scene_pictures import random_scene

    return random_scene(random.Random(seed), objects=(3, 3))

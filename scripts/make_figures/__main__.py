"""Draws the figures of the documentation from our own code and runs.

    python -m scripts.make_figures                        # all, into docs/images
    python -m scripts.make_figures --only patches         # one, in both languages

Most need nothing but the bundle in model/tiny. Those of a trained model need `python -m scripts.quickstart` first, and
those of pages Chromium. A figure is in English; the one called *_zh is the same in Chinese. Where they are drawn:

    diagrams.py     how the model is built, what learns in each stage
    lessons.py      the course
    pages.py        pages in a browser; questions and answers of a trained model
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.make_figures instead of scripts/make_figures")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

from pathlib import Path

from common.cli import Parser, run_main
from scripts.make_figures import diagrams, lessons, pages
from scripts.make_figures.browser import CHROMIUM, shooting
from scripts.make_figures.drawing import FIGURES, STYLE, save

MODULES = diagrams, lessons, pages  # each has registered its figures in FIGURES


def figure_name(file: str) -> str:
    """The name of a figure for --only, one for both languages."""
    return Path(file).stem.removesuffix("_zh")


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    names = sorted({figure_name(file) for file in FIGURES})
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"figures to draw: {', '.join(names)}; default: all")
    add("--quickstart", type=Path, default=Path("out/quickstart"), metavar="DIR", help="a finished quickstart")
    add("--out_dir", type=Path, default=Path("docs/images"), metavar="DIR", help="where the figures go")
    return parser.parse_args(argv)


def missing(drawing, quickstart: Path, fonts: list[str]) -> str:
    """What to do first, or "" if the figure can be drawn."""
    if drawing.trained and not (quickstart / "report.json").is_file():
        return f"there is no {quickstart / 'report.json'}. Make it: python -m scripts.quickstart"
    if drawing.browser and not CHROMIUM:
        return "there is no Chromium. Install it: apt-get install chromium"
    if drawing.language == "zh" and len(fonts) == 1:
        return "there is no font with Chinese characters. Install one: apt-get install fonts-noto-cjk"
    return ""


def main(argv=None):
    args = parse_args(argv)
    import matplotlib

    from inference.attention import fonts

    families = fonts("字")
    chosen = {file: drawing for file, drawing in FIGURES.items() if not args.only or figure_name(file) in args.only}
    with shooting() as shoot:
        for file, drawing in chosen.items():
            if reason := missing(drawing, args.quickstart, families):
                print(f"{file} left out: {reason}")
                continue
            needed = [args.quickstart] * drawing.trained + [shoot] * drawing.browser
            with matplotlib.rc_context(STYLE | {"font.family": families}):
                save(drawing.draw(drawing.say, *needed), args.out_dir / file)
            size = (args.out_dir / file).stat().st_size
            print(f"written: {args.out_dir / file} ({size / 1000:.0f} kB)")


if __name__ == "__main__":
    run_main(main)

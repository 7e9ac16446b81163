"""From pictures with captions to a model and its report, in small: 40 drawn pictures, steps of seconds."""

import json
import re
import signal

import pytest
from PIL import Image, ImageDraw

from scripts import report as quickstart_report
from scripts.from_photos import __main__ as from_photos
from scripts.from_photos import report
from scripts.from_photos.report_words import OTHER
from scripts.quickstart import steps
from scripts.quickstart.steps import read_records
from tests.conftest import COLOURS, write_rows
from tests.test_quickstart import run_here, small
from tests.test_report import Page

NAMES = ["photos", "tokenizer", "encoder", "decoder", "stage 1", "stage 2", "stage 3", "scores"]
SMALL = {"--epochs": "1", "--hidden_size": "64", "--num_hidden_layers": "1", "--max_new_tokens": "12"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(rows, folder): 40 pictures of a square, each with a caption in English and one in Chinese."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "photos").mkdir()
    rows, colours = [], list(COLOURS.items())
    for number in range(40):
        english, chinese = colours[number % len(colours)]
        image = Image.new("RGB", (150, 140), (200, 5 * number, 180))
        ImageDraw.Draw(image).rectangle((20 + number, 30, 70 + number, 100), fill=english)
        image.save(folder / f"photos/{number}.png")
        captions = [f"there is a square and it is {english}", f"图片里有一个{chinese}色的方块"]
        rows.append({"image": f"{number}.png", "captions": captions})
    return write_rows(folder / "rows.jsonl", rows), folder / "photos"


@pytest.fixture(scope="module", autouse=True)
def in_small():
    patch = pytest.MonkeyPatch()
    real = from_photos.recipe
    patch.setattr(from_photos, "HIDDEN_SIZE", 64)
    patch.setattr(from_photos, "recipe", lambda *args: small(real(*args), SMALL))
    yield
    patch.undo()


def flags_of(photos, out):
    rows, folder = photos
    return ["--data_path", str(rows), "--images_path", str(folder), "--out_dir", str(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, photos, in_small):
    """(folder of a run that was killed in stage 1 and went on, what its main returned)."""
    folder, patch = tmp_path_factory.mktemp("run") / "out", pytest.MonkeyPatch()

    def run(command):
        if "train_pretrain_vlm.py" in command and "--from_resume" not in command:
            return -signal.SIGINT, True, 1.0, 0.5
        return run_here(command)

    patch.setattr(steps, "run", run)
    try:
        with pytest.raises(SystemExit) as stopped:
            from_photos.main(flags_of(photos, folder))
        assert stopped.value.code == 130 and [record["status"] for record in read_records(folder)][-2:] == [
            "done",
            "begun",
        ]
        return folder, from_photos.main(flags_of(photos, folder))
    finally:
        patch.undo()


def test_it_goes_from_captioned_pictures_to_a_report_and_goes_on_after_a_kill(finished):
    folder, result = finished
    assert [step["name"] for step in result["steps"]] == NAMES
    assert [record["status"] for record in read_records(folder)] == ["done"] * len(NAMES)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(result))
    weights = {f"{stage}_64.pth" for stage in ("scst_vlm", "sft_vlm", "pretrain_vlm", "llm")}
    assert weights | {"clip", "tokenizer", "report.html"} <= {path.name for path in folder.iterdir()}
    assert result["photos"] == {"train": 36, "val": 4, "captions": 72}
    for which in ("true", "shuffled"):
        assert set(result["scores"][which]) == {"en", "zh"}
        assert set(result["scores"][which]["en"]) == {"exact_match", "bleu", "cider", "loss"}


def test_the_page_shows_scores_curves_and_photos_with_captions_by_people(finished):
    folder, result = finished
    for language in ("en", "zh"):
        page = Page((folder / report.PAGES[language]).read_text(encoding="utf-8"))
        assert len(page.find("img")) == 4 and len(page.find("svg")) == 4
        assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.find("img"))
        text = " ".join(page.text)
        assert re.search(OTHER[language]["person"] + r" (there is a square and it is|图片里有一个)", text)
        assert f"{result['scores']['true']['en']['cider']:.3f}" in text and "36" in text and "72" in text
        assert "scripts.from_photos" in text and "{" not in text


def test_a_second_start_runs_nothing_and_other_flags_are_refused(finished, photos, monkeypatch, capfd):
    folder, first = finished
    monkeypatch.setattr(steps, "run", None)  # would be called
    again = from_photos.main(flags_of(photos, folder))
    printed = capfd.readouterr().out
    assert again["steps"] == first["steps"] and "What to try next" in printed
    assert re.search(r"English, CIDEr +\d\.\d{3} +\d\.\d{3}\n", printed)
    assert max(map(len, printed.splitlines())) <= 80 + len(str(folder))
    with pytest.raises(SystemExit, match="contains a run with other settings. Its step 'photos' was"):
        from_photos.main([*flags_of(photos, folder), "--prompt", "What?"])


def test_the_report_of_a_quickstart_is_not_written_over_it(finished):
    with pytest.raises(SystemExit, match="is not from a quickstart: run the command that created it"):
        quickstart_report.main(["--out_dir", str(finished[0])])


def test_twenty_photos_are_drawn_whatever_the_captions_are():
    answers = [{"images": [f"{n}.jpg"], "language": lang, "answer": n} for n in range(50) for lang in ("en", "zh")]
    drawn = report.draw(answers)
    assert len(drawn) == report.SHOWN == 20 and all(len(each) == 2 for each in drawn)
    others = [answer | {"answer": "better"} for answer in reversed(answers)]
    assert [each[0]["images"] for each in report.draw(others)] == [each[0]["images"] for each in drawn]
    assert len(report.draw(answers[:6])) == 3


@pytest.mark.parametrize(
    "pictures, epochs, batch", [(6000, 33, 128), (100_000, 2, 128), (1000, 100, 50), (10, 100, 10), (10**6, 1, 128)]
)
def test_the_encoder_trains_longer_the_fewer_photos_there_are(tmp_path, pictures, epochs, batch):
    photos = {"train": pictures, "captions": 5 * pictures}
    (encoder,) = (step for step in from_photos.recipe(tmp_path, photos) if step.name == "encoder")
    given = dict(zip(encoder.command, encoder.command[1:]))
    assert given["--batch_size"] == str(batch)
    assert from_photos.encoder_size(pictures) == (epochs, batch)


@pytest.mark.parametrize(
    "captions, batch, rate, epochs",
    [(60_000, 64, "0.002", 1), (20_000, 64, "0.002", 1), (19_999, 16, "0.001", 2), (10, 16, "0.001", 2)],
)
def test_the_decoder_learns_from_large_batches_or_from_few_captions_several_times(
    tmp_path, captions, batch, rate, epochs
):
    learning = [
        {flag: str(value) for flag, value in zip(step.command, step.command[1:])}
        for step in from_photos.recipe(tmp_path, {"train": 500, "captions": captions})
        if step.name in ("decoder", "stage 1", "stage 2", "stage 3")
    ]
    assert len(learning) == 4
    assert [given["--learning_rate"] for given in learning] == [rate] * 3 + [str(0.15 * float(rate))]
    for given in learning:
        assert int(given["--batch_size"]) * from_photos.PROCESSES == batch
        assert ("--epochs" in given) == (epochs > 1)  # `in_small` sets its value
    assert from_photos.stage_size(captions)[2] == epochs


def test_what_is_not_there_is_said_with_the_command_that_failed(tmp_path, capfd):
    with pytest.raises(SystemExit, match=r"step 1, 'photos', ended with status 2(.|\n)*dataset.split"):
        from_photos.main(["--data_path", "gone.csv", "--out_dir", str(tmp_path / "out")])
    assert "--data_path gone.csv: no such file" in capfd.readouterr().err

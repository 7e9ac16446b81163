"""Captions for a folder with any number of pictures, one line of JSON each. Broken pictures are reported and skipped.
The same command resumes an interrupted run.

    {"image": "a/1.jpg", "prompt": "Describe this picture.", "answer": "a small red star"}
    {"image": "a/2.jpg", "error": "--image_dir pictures/a/2.jpg is not a picture that can be read: broken PNG file"}
"""

import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.devices import pick_dtype
from common.lock import only_one
from inference.asking import prompts_to_ask
from inference.generate import answer_batches, collate_prompts, user_turn
from inference.models import pictures_first
from inference.pictures import open_image, pictures_in
from model.processing import encode_chat
from trainer.loader import ignore_interrupt

BEGIN = b'{"image": "'  # of every line; identifies a half-written one


def list_pictures(folder: Path) -> tuple[list[str], int]:
    """The pictures of a folder and its subfolders, as sorted relative paths with / on every system, and the number of
    other files. Raises FileNotFoundError if the folder is missing or has no pictures."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--image_dir {folder}: no such folder")
    paths, others = pictures_in(folder, "**/*")
    if not paths:
        raise FileNotFoundError(f"--image_dir {folder}: no pictures there, {others} other files")
    return sorted(path.relative_to(folder).as_posix() for path in paths), others


def is_json(line: bytes) -> bool:
    with suppress(ValueError):
        json.loads(line)
        return True
    return False


def read_answers(path: Path) -> tuple[set[tuple[str, str]], set[str]]:
    """Reads what an earlier run wrote: the (image, prompt) pairs with an answer, and the broken images. Truncates a
    half-written last line. Raises ValueError if the file contains anything else, and does not change it then."""
    if path.is_dir():
        raise ValueError(f"--captions {path} is a folder. Expected a file of lines of JSON, such as {path}.jsonl")
    answered, broken = set(), set()
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    half = last[: len(BEGIN)] == BEGIN[: len(last)] and not is_json(last)
    if not half:
        lines.append(last)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "error" in row:
                broken.add(row["image"])
            else:
                answered.add((row["image"], row["prompt"]))
        except (ValueError, TypeError, KeyError):
            message = f"--captions {path}:{number} is not a line of captions; nothing was changed. Choose another file"
            raise ValueError(message) from None
    if last:
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if half:
                file.truncate(end - len(last))
            else:
                file.write(b"\n")
    return answered, broken


class PictureQuestions(Dataset):
    """Questions about pictures, as examples for `collate_prompts`."""

    def __init__(self, folder: Path, asked: list[tuple[str, str]], ids: dict[str, list[int]], processor):
        """asked: (image, prompt) pairs; ids: the tokens of each prompt."""
        self.folder, self.asked, self.ids, self.processor = folder, asked, ids, processor

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, i: int) -> dict:
        image, prompt = self.asked[i]
        try:
            pixels = self.processor.resize(open_image(self.folder / image, self.processor, "--image_dir"))
        except Exception as error:  # one bad picture must not stop the run, whatever the error
            return {"number": i, "broken": str(error)}
        return {"number": i, "ids": self.ids[prompt], "pictures": pixels[None]}


def load_questions(questions: PictureQuestions, tokenizer, args) -> DataLoader:
    """Returns a loader of batches for `answer_batches`."""
    return DataLoader(
        questions,
        batch_size=args.batch_size,
        collate_fn=partial(collate_prompts, pad_token_id=tokenizer.pad_token_id),
        num_workers=args.num_workers,
        worker_init_fn=ignore_interrupt,
    )


def write_captions(model, tokenizer, args, weights: Path, device) -> Path:
    """Asks every prompt about every picture in args.image_dir and appends the answers to args.captions.

    Returns that path. Raises ValueError or FileNotFoundError for a folder or a file that does not fit.
    """
    folder, path = Path(args.image_dir or "dataset/eval_images"), Path(args.captions)
    (names, others), (prompts, flag) = list_pictures(folder), prompts_to_ask(args, weights)
    ids = {}
    for prompt in prompts:
        chat = [{"role": "user", "content": user_turn(prompt, 1, pictures_first(weights), flag)}]
        [(ids[prompt], _, _)] = encode_chat(tokenizer, chat, model.config.image_ids)
    with only_one(path, "--captions"):
        append_captions(model, tokenizer, args, device, folder, path, names, ids)
    if others:
        print(f"{folder}: {others:,} other files, not pictures, were skipped")
    return path


def append_captions(model, tokenizer, args, device, folder: Path, path: Path, names: list[str], ids: dict) -> None:
    """Answers what `path` lacks so far. names: relative paths of the pictures; ids: the tokens of each prompt."""
    answered, broken = read_answers(path)
    wanted = [(name, prompt) for name in names for prompt in ids]
    asked = [pair for pair in wanted if pair not in answered and pair[0] not in broken]
    loader = load_questions(PictureQuestions(folder, asked, ids, model.processor), tokenizer, args)
    progress = tqdm(total=len(wanted), initial=len(wanted) - len(asked), unit="picture", dynamic_ncols=True)
    # A file name may contain bytes that are not UTF-8; backslashreplace escapes them as JSON does.
    with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file, progress as bar:
        for texts, failed in answer_batches(model, tokenizer, loader, args, device, pick_dtype(args.dtype, device)):
            for number in sorted([*texts, *failed]):
                image, prompt = asked[number]
                if number in failed and image in broken:
                    continue  # reported with its first prompt
                if number in failed:
                    broken.add(image)
                    line = {"image": image, "error": failed[number]}
                else:
                    line = {"image": image, "prompt": prompt, "answer": texts[number]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()  # a resumed run continues after this line
            bar.update(len(texts) + len(failed))
    print(f"{path}: {len(names):,} pictures, {sum(name in broken for name in names):,} of them broken")

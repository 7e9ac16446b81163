"""Rows → tensors → batches.

    {"conversations": [{"role": "user", "content": "What is this?\\n<image>"},
                       {"role": "assistant", "content": "A cat."}], "image": "cat.jpg"}

`VLMDataset` reads JSONL files of such rows, checks them before the first step, and makes each a training example;
`collate` pads examples to a batch; `StepSampler` decides which rows go into which batch of which step.

Shapes: B batch, T tokens, N pictures of a row or batch, H and W pixels.
"""

import glob
import hashlib
import json
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from model.processing import IGNORE, IMAGE_TAG, encode_chat

FORMAT = 2  # raise it when `check_line` changes what it finds: results are cached on disk
KINDS = {
    "json": "not valid JSON",
    "key": "missing or malformed key",
    "role": "no chat: unknown role, turns out of order, placeholders typed as text",
    "answer": "no assistant turn",
    "count": "wrong number of <image>",
    "missing": "picture file missing",
    "broken": "picture file broken",
    "long": "prompt too long",
}


class BadRow(ValueError):
    """A row that cannot be learned from. `kind` is a key of KINDS."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------------------- one row


def parse_row(line: str) -> tuple[list[dict], list[str]]:
    """A line of JSONL → conversations and names of pictures. Raises BadRow."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, but no text
    except (ValueError, RecursionError) as error:
        raise BadRow("json", str(error)) from None
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise BadRow("key", 'no "conversations" list')
    conversations = row["conversations"]
    for turn in conversations:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise BadRow("key", 'a turn needs "role" and "content", both text')
    if not any(turn["role"] == "assistant" for turn in conversations):
        raise BadRow("answer", "no assistant turn, nothing to learn")
    images = row.get("image") or []
    if isinstance(images, str):
        images = images.split(",")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BadRow("key", '"image" must be text, as in "a.jpg" or "a.jpg, b.jpg", or a list of texts')
    images = [name.strip() for name in images if name.strip()]
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in conversations if turn["role"] == "user")
    if tags != len(images):
        raise BadRow("count", f'{tags} {IMAGE_TAG} in the user\'s turns, {len(images)} in "image"')
    return conversations, images


def fit(pieces, max_length: int) -> tuple[list[int], list[int], int]:
    """Pieces of `encode_chat` → input_ids, labels (-100 where no answer), number of pictures; at most max_length.

    A conversation that is too long ends earlier: in the middle of an answer if need be (without `<|im_end|>`, so that
    nobody learns to stop there), never in the middle of a question, whose placeholders must stay whole.
    Raises BadRow if not even the first question fits.
    """
    ids, labels, pictures = [], [], 0
    for piece, is_answer, piece_pictures in pieces:
        room = max_length - len(ids)
        if not is_answer and len(piece) > room:
            break
        ids += piece[:room]
        labels += piece[:room] if is_answer else [IGNORE] * len(piece)
        pictures += piece_pictures
        if len(piece) > room:
            break
    if all(label == IGNORE for label in labels):
        raise BadRow("long", f"the first question has {len(pieces[0][0])} tokens, --max_seq_len allows {max_length}")
    return ids, labels, pictures


def encode_row(line: str, tokenizer, placeholders: str, max_length: int):
    """A line → input_ids, labels, names of its pictures, and whether it was shortened. Raises BadRow.

    Without placeholders the pictures are left out: what remains is text.
    """
    conversations, images = parse_row(line)
    if not placeholders:
        conversations = [
            turn | {"content": turn["content"].replace(IMAGE_TAG, "").strip()}
            if turn["role"] == "user" and IMAGE_TAG in turn["content"]
            else turn
            for turn in conversations
        ]
        images = []
    try:
        pieces = encode_chat(tokenizer, conversations, placeholders)
    except ValueError as error:
        raise BadRow("role", str(error)) from None
    ids, labels, pictures = fit(pieces, max_length)
    answers = sum(len(piece) for piece, is_answer, _ in pieces if is_answer)
    return ids, labels, images[:pictures], sum(label != IGNORE for label in labels) < answers


def check_line(lines: dict, tokenizer, placeholders: str, max_length: int) -> dict:
    """For `datasets.map`: what can be known of rows without opening their pictures."""
    found = {"length": [], "images": [], "shortened": [], "kind": [], "problem": []}
    for line in lines["text"]:
        length, images, shortened, kind, problem = 0, [], False, "", ""
        if not line.strip():
            kind = "blank"
        else:
            try:
                ids, _, images, shortened = encode_row(line, tokenizer, placeholders, max_length)
                length = len(ids)
            except BadRow as error:
                kind, problem = error.kind, str(error)
        for key, value in zip(found, (length, images, shortened, kind, problem)):
            found[key].append(value)
    return found


# ---------------------------------------------------------------------------- the data set


def read_lines(path: Path) -> datasets.Dataset:
    """A text file as an Arrow table with the column "text", a row per line. Raises ValueError if it is not UTF-8."""
    try:  # -sig: Windows likes to put a mark at the start. escape: [ and * in a path are no patterns.
        return datasets.load_dataset("text", data_files=glob.escape(str(path)), split="train", encoding="utf-8-sig")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"--data_path {path} cannot be read: {error.__cause__}. Expected JSONL in UTF-8") from None


class VLMDataset(torch.utils.data.Dataset):
    """Training examples from JSONL files and a folder of pictures.

    Attributes:
        lengths: int64 (rows,), tokens of each usable row.
        bad: {kind: ["file:line: what is wrong", ...]} of the rows that are not usable.
        shortened: how many usable rows lost the end of their conversation to max_length.
    """

    def __init__(
        self,
        jsonl_path,
        images_path,
        tokenizer,
        preprocess=None,
        max_length: int = 640,
        image_special_token: str = "@" * 196,
        on_bad_row: str = "error",
    ):
        """
        Args:
            jsonl_path: a file or a list of files.
            images_path: the folder that the names in "image" are relative to; None for text only.
            tokenizer: of `model.processing.load_tokenizer`.
            preprocess: an `ImageProcessor`; needed as soon as a row has a picture.
            max_length: tokens a row may have.
            image_special_token: the placeholders of one picture; "" leaves pictures out, for a model of text only.
            on_bad_row: "error" raises ValueError with a table of what is wrong, "skip" leaves bad rows out.
        """
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.max_length, self.placeholders = max_length, image_special_token
        self.on_bad_row = on_bad_row
        self.images_path = None if images_path is None else Path(images_path)
        self.files = [Path(path) for path in ([jsonl_path] if isinstance(jsonl_path, (str, Path)) else jsonl_path)]
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"--data_path {path}: no such file. Expected JSONL, one conversation per line")
            if path.stat().st_size == 0:
                raise ValueError(f"--data_path {path} is empty")
        if self.images_path is not None and not self.images_path.is_dir():
            raise FileNotFoundError(f"--images_path {images_path}: no such folder")

        datasets.disable_progress_bars()
        parts = [read_lines(path) for path in self.files]
        self.starts = np.cumsum([0, *(len(part) for part in parts)])  # the row at which each file begins
        self.lines = datasets.concatenate_datasets(parts)
        self._drop_bad_rows(self._check())

    def _check(self):
        """length, images, shortened, kind, problem of every line; computed once per data, tokenizer and setting."""
        settings = (self.tokenizer.backend_tokenizer.to_str(), self.placeholders, self.max_length, FORMAT)
        return self.lines.map(
            check_line,
            batched=True,
            fn_kwargs={
                "tokenizer": self.tokenizer,
                "placeholders": self.placeholders,
                "max_length": self.max_length,
            },
            remove_columns=["text"],
            # `datasets` would fingerprint the pickled tokenizer, which changes from run to run and so never hits.
            new_fingerprint=hashlib.sha256(repr((self.lines._fingerprint, settings)).encode()).hexdigest()[:32],
        )

    def _drop_bad_rows(self, checked) -> None:
        self.bad = defaultdict(list)
        kinds, images = np.array(checked["kind"]), checked["images"]
        exists = {}
        good = []
        for row, names in enumerate(images):
            kind, problem = str(kinds[row]), ""
            if kind == "blank":
                continue
            if kind:
                problem = checked[row]["problem"]
            for name in names:
                if name not in exists:
                    exists[name] = self.images_path is not None and (self.images_path / name).is_file()
                if not exists[name] and not kind:
                    kind, problem = "missing", f"{name} is not in {self.images_path or '--images_path, not given'}"
            if kind:
                self.bad[kind].append(f"{self.where_line(row)}: {problem}")
            else:
                good.append(row)
        self.rows = np.array(good, dtype=np.int64)
        self.lengths = np.array(checked["length"], dtype=np.int64)[self.rows]
        self.shortened = int(np.array(checked["shortened"])[self.rows].sum())
        if self.bad and self.on_bad_row == "error":
            raise ValueError(f"{self.report()}\nMend the data, or leave these rows out with --on_bad_row skip")
        if not good:
            raise ValueError(f"no usable row in {', '.join(map(str, self.files))}\n{self.report()}")

    def report(self, examples: int = 3) -> str:
        """The bad rows as a table: kind, count, first examples."""
        total = sum(map(len, self.bad.values()))
        lines = [f"{total} of {len(self.lines)} rows are not usable:"]
        for kind, found in sorted(self.bad.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(found):>8}  {KINDS[kind]}")
            lines += [f"            {example}" for example in found[:examples]]
        return "\n".join(lines)

    def where_line(self, line: int) -> str:
        file = int(np.searchsorted(self.starts, line, side="right")) - 1
        return f"{self.files[file]}:{line - self.starts[file] + 1}"

    def where(self, row: int) -> str:
        """file:line of a usable row."""
        return self.where_line(int(self.rows[row]))

    def __len__(self) -> int:
        return len(self.rows)

    def line(self, row: int) -> str:
        """A usable row as it stands in its file."""
        return self.lines[int(self.rows[row])]["text"]

    def __getitem__(self, row: int) -> dict:
        """{"row", "input_ids" int64 (T,), "labels" int64 (T,), "pictures" uint8 (N, 3, H, W)}.

        A picture that cannot be read gives {"row", "broken": why} instead of an exception, which would cross the
        border of a worker process as a page of traceback.
        """
        ids, labels, images, _ = encode_row(self.line(row), self.tokenizer, self.placeholders, self.max_length)
        try:
            pictures = [self.load_picture(name) for name in images]
        except BadRow as error:
            return {"row": row, "broken": f"{self.where(row)}: {error}"}
        return {
            "row": row,
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pictures": torch.stack(pictures) if pictures else None,
        }

    def load_picture(self, name: str) -> torch.Tensor:
        """uint8 (3, H, W). Raises BadRow."""
        try:
            with Image.open(self.images_path / name) as image:
                return self.preprocess.resize(image)
        except Exception as error:  # Pillow's decoders raise whatever their format makes them stumble over
            raise BadRow("broken", f"{self.images_path / name} cannot be read: {error}") from None


# ---------------------------------------------------------------------------- batches


def collate(examples: list[dict], pad_token_id: int = 0) -> dict:
    """Examples → a batch, padded on the right to its longest row, rounded up to a multiple of 8.

    Returns "input_ids", "labels", "attention_mask" int64 (B, T), "pixel_values" uint8 (sum of N, 3, H, W) or None,
    "rows" (which rows of the data set), "broken" (why others are missing). Without a usable row the batch is one of
    padding without labels: every rank can run it, and it teaches nothing.
    """
    broken = [example["broken"] for example in examples if "broken" in example]
    examples = [example for example in examples if "broken" not in example]
    B, longest = max(len(examples), 1), max((len(example["input_ids"]) for example in examples), default=1)
    T = -(-longest // 8) * 8
    batch = {
        "input_ids": torch.full((B, T), pad_token_id),
        "labels": torch.full((B, T), IGNORE),
        "attention_mask": torch.zeros((B, T), dtype=torch.int64),
    }
    for row, example in enumerate(examples):
        n = len(example["input_ids"])
        batch["input_ids"][row, :n] = example["input_ids"]
        batch["labels"][row, :n] = example["labels"]
        batch["attention_mask"][row, :n] = 1
    pictures = [example["pictures"] for example in examples if example["pictures"] is not None]
    return {
        **batch,
        "pixel_values": torch.cat(pictures) if pictures else None,
        "rows": [example["row"] for example in examples],
        "broken": broken,
    }


class StepSampler:
    """Batches of rows, step by step, for one rank: the `batch_sampler` of a DataLoader.

    All ranks deal out the same list of batches, which follows from lengths, batch_size, batches per step, seed and
    epoch alone. A step is the next world_size · accumulation_steps batches; batch i of a step goes to rank
    i % world_size. So 2 ranks with 1 batch each and 1 rank with 2 make the same steps. At the end of an epoch, where
    batches run out, a rank may get an empty one: it takes part in the step without a row.
    """

    def __init__(
        self,
        lengths,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        window: int = 32,
    ):
        """window: rows are sorted by length among this many batches at a time, after shuffling."""
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.rank, self.world_size, self.accumulation_steps = rank, world_size, accumulation_steps
        self.shuffle, self.window = shuffle, window
        self.batches = -(-len(self.lengths) // batch_size)
        self.steps_per_epoch = -(-self.batches // (world_size * accumulation_steps))
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """What the next iteration goes over: this epoch, from this step of it on."""
        self.epoch, self.first_step = epoch, first_step

    def all_batches(self) -> list[np.ndarray]:
        """The epoch's batches for all ranks, in order."""
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), self.window * self.batch_size):
            rows = order[start : start + self.window * self.batch_size]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # The batches of a step are neighbours in length: ranks that wait for each other should have as much to do.
        per_step = self.world_size * self.accumulation_steps
        steps = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
        whole = len(batches) // per_step  # a step that is not must stay the last
        return [batch for i in (*random.permutation(whole), *range(whole, len(steps))) for batch in steps[i]]

    def batches_in_step(self, step: int) -> int:
        """How many batches each rank runs in this step of an epoch: accumulation_steps, or fewer in the last."""
        left = self.batches - step * self.world_size * self.accumulation_steps
        return min(self.accumulation_steps, -(-left // self.world_size))

    def __iter__(self):
        batches = self.all_batches()
        for step in range(self.first_step, self.steps_per_epoch):
            start = step * self.world_size * self.accumulation_steps + self.rank
            for i in range(self.batches_in_step(step)):
                at = start + i * self.world_size
                yield batches[at].tolist() if at < len(batches) else []

    def __len__(self) -> int:
        return sum(self.batches_in_step(step) for step in range(self.first_step, self.steps_per_epoch))

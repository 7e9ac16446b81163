"""Rows → training examples.

    {"conversations": [{"role": "user", "content": "What is this?\\n<image>"},
                       {"role": "assistant", "content": "A cat."}], "image": "cat.jpg"}

`VLMDataset` reads such rows, or rows of another shape (dataset/sources.py, dataset/shapes.py), checks them before the
first step, and turns each into a training example (dataset/examples.py). dataset/batches.py makes batches of them.

Shapes: T tokens, N pictures of a row, H and W pixels; P patches and V width of the encoder.
"""

import hashlib
import random
from collections import Counter, defaultdict
from functools import cached_property
from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from common.machine import usable_cores
from dataset.examples import encode_row
from dataset.formats import blame_cache
from dataset.pictures import is_url, use_picture
from dataset.rows import INLINE, Row
from dataset.shapes import DEFAULT, ReadOptions
from dataset.sources import Source, open_rows
from dataset.values import BadRow, printable
from model.processing import IGNORE, IMAGE_TAG, language

FORMAT = 8  # increase it when `check_rows` or its callees change their results, which are cached on disk
ASKED, PROMPTS = 2000, 3  # how many rows are searched for the most common questions, and how many are kept
KINDS = {
    "json": "not valid JSON",
    "key": "missing or malformed key",
    "role": "not a chat: unknown role, turns out of order, placeholders typed as text",
    "answer": "no assistant turn",
    "blank": "no caption or no answer",
    "count": "wrong number of <image>",
    "missing": "picture file missing",
    "broken": "picture file broken",
    "long": "prompt too long",
}


# ---------------------------------------------------------------------------- checks


CHECKED = datasets.Features(
    {
        "record": datasets.Value("int64"),  # which of the source it is from
        "which": datasets.Value("int32"),  # index among the rows of this record
        "length": datasets.Value("int32"),  # tokens
        "answers": datasets.Value("int32"),  # tokens in its answers
        "lost": datasets.Value("int32"),  # how many of these max_length cut off
        "images": datasets.List(datasets.Value("string")),
        "mended": datasets.Value("string"),
        "shape": datasets.Value("string"),  # how it was read, in words
        "kind": datasets.Value("string"),
        "problem": datasets.Value("string"),
    }
)


def check_rows(batch, numbers: list[int], parse, tokenizer, image_ids: list[int], max_length: int) -> dict:
    """Checks rows without opening their pictures, for `datasets.map`; returns the columns CHECKED.

    numbers: int64, of the records; parse: from `Source.parse`.
    """
    checked = {key: [] for key in CHECKED}
    for number, which, row in parse(batch, numbers[0]):
        length, answers, lost, images, mended, shape, kind, problem = 0, 0, 0, [], "", "", "", ""
        try:
            if row is None:
                kind = "none"
            elif isinstance(row, BadRow):
                kind, problem = row.kind, str(row)  # not raised: the traceback would keep the table open
            else:
                ids, labels, images, answers = encode_row(row, tokenizer, image_ids, max_length)
                length, mended, shape = len(ids), row.mended, row.shape
                lost = answers - sum(label != IGNORE for label in labels)
        except BadRow as error:
            kind, problem = error.kind, str(error)
        values = (number, which, length, answers, lost, images, mended, shape, kind, problem)
        for key, value in zip(checked, values):
            checked[key].append(value)
    return checked


# ---------------------------------------------------------------------------- the data set


class NoUsableRow(ValueError):
    """All rows of a data set are bad."""


class VLMDataset(torch.utils.data.Dataset):
    """Training examples from files of rows.

    Attributes:
        lengths: int64 (rows,), number of tokens of each usable row.
        bad: {kind: ["file:line: reason", ...]} of the rows that are not usable.
        shortened: number of usable rows whose conversation was cut at max_length.
        without_picture: number of usable rows without a picture.
        answer_tokens, lost_tokens: tokens in the answers of usable rows, and how many of these were cut off.
        mended: {key of MENDED: number of usable rows}.
        shapes: {how rows were read, in words: number of usable rows}.
        parts: [(first row, end, weight)] of the usable rows of each path.
        groups: int64, the first row of each group; an epoch draws one row per group. The captions of a picture are a
            group, every other row is its own. None: each row is its own group.
        features: a `RowFeatures` of these rows, or None to read pictures from their files.
    """

    def __init__(
        self,
        data_path,
        images_path,
        tokenizer,
        preprocess=None,
        max_length: int = 640,
        image_ids: list[int] = (34,) * 196,
        on_bad_row: str = "error",
        weights: list[float] | None = None,
        options: ReadOptions = DEFAULT,
    ):
        """
        Args:
            data_path: a file, a pattern such as data/*.parquet, or a list of these.
            images_path: the folder or zip that the names in "image" are relative to, or a list with one for each
                data_path; None: look next to the rows, see `dataset.pictures.pictures_beside`.
            tokenizer: from `model.tokenizer.load_tokenizer`.
            preprocess: an `ImageProcessor`; required if a row has a picture.
            max_length: maximum number of tokens per row.
            image_ids: the placeholders of one picture; empty leaves pictures out, for a text-only model.
            on_bad_row: "error" raises ValueError with a table of the bad rows, "skip" skips them.
            weights: how many times an epoch passes over each data_path; default 1.
            options: how to read rows.

        Raises FileNotFoundError for missing files, ValueError for bad flags or rows, NoUsableRow if no row is usable.
        """
        self.tokenizer, self.preprocess, self.features = tokenizer, preprocess, None
        self.max_length, self.image_ids = max_length, list(image_ids)
        if any(prompt.count(IMAGE_TAG) > 1 for prompt in options.prompts):
            raise ValueError(f"--prompt may contain {IMAGE_TAG} once at most, at the position of the picture")
        paths, stores = as_list(data_path), as_list(images_path)
        weights = weights or [1.0] * len(paths)
        stores = stores * len(paths) if len(stores) == 1 else stores
        for flag, values in (("images_path", stores), ("data_weights", weights)):
            if len(values) != len(paths):
                raise ValueError(
                    f"--{flag} has {len(values)} values, --data_path has {len(paths)}: give one per path, in order"
                )

        by_path = [open_rows(path, store, options=options) for path, store in zip(paths, stores)]
        self.options, self.sources, self.starts, self.record_numbers = options, [], [0], []
        self.bad, self.mended, self.shapes, self.parts = defaultdict(list), Counter(), Counter(), []
        self.shortened = self.without_picture = self.answer_tokens = self.lost_tokens = 0
        rows, lengths, end = [], [], 0
        for of_path, weight in zip(by_path, weights):
            begin = end
            for source in of_path:
                good, length = self._usable(source)
                rows.append(good)
                lengths.append(length)
                end += len(good)
            self.parts.append((begin, end, weight))
        self.starts = np.array(self.starts)  # the first row of each source, counting usable and other rows
        self.rows, self.lengths = np.concatenate(rows), np.concatenate(lengths)
        self.groups = self._groups() if options.captions == "one" else None
        for of_path, (begin, end, weight) in zip(by_path, self.parts):
            count = end - begin if self.groups is None else int(np.diff(np.searchsorted(self.groups, (begin, end)))[0])
            if count and not round(count * weight):
                raise ValueError(f"--data_weights {weight} takes none of the {count} rows of {of_path[0].path}")
        if self.bad and on_bad_row == "error":
            raise ValueError(f"{self.report()}\nFix the data, or skip these rows with --on_bad_row skip")
        if not len(self.rows):
            raise NoUsableRow(f"no usable row in {', '.join(map(str, paths))}\n{self.report()}")

    def _check(self, source: Source) -> datasets.Dataset:
        """The columns CHECKED of all rows of a source; cached per data, tokenizer and settings."""
        settings = (self.tokenizer.backend_tokenizer.to_str(), self.image_ids, self.max_length, FORMAT)
        settings += (source.is_json, self.options.prompts)
        # `datasets` would hash the pickled tokenizer, which differs from run to run, so the cache would never hit.
        fingerprint = hashlib.sha256(repr((source.table._fingerprint, settings)).encode()).hexdigest()[:32]
        many = len(source.table) > 50_000  # rows; with fewer, more processes and a progress bar do not pay off
        (datasets.enable_progress_bars if many else datasets.disable_progress_bars)()
        try:
            return source.records.map(
                check_rows,
                batched=True,
                with_indices=True,
                num_proc=usable_cores() if many else None,
                fn_kwargs={
                    "parse": source.parse(),
                    "tokenizer": self.tokenizer,
                    "image_ids": self.image_ids,
                    "max_length": self.max_length,
                },
                remove_columns=source.table.column_names,
                features=CHECKED,
                new_fingerprint=fingerprint,
                desc=source.path.name,
            )
        except OSError as error:
            blame_cache(error)
            raise

    def _usable(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and lengths, int64, of the usable rows of a source; records why the others are bad."""
        checked = self._check(source).with_format("arrow")[:]
        records = checked["record"].to_numpy()
        good = pc.equal(checked["kind"], "").to_numpy()
        for number in np.flatnonzero(~good).tolist():
            kind = checked["kind"][number].as_py()
            if kind != "none":
                self.bad[kind].append(f"{source.where(int(records[number]))}: {checked['problem'][number]}")

        images = checked["images"].combine_chunks()
        names = images.flatten()
        elsewhere = pc.unique(names)  # pictures inside rows exist, and there are many
        elsewhere = elsewhere.filter(pc.invert(pc.match_substring_regex(elsewhere, INLINE.pattern)))
        gone = pa.array([name for name in elsewhere.to_pylist() if not source.has(name)], names.type)
        lost = pc.is_in(names, value_set=gone)
        numbers, names = pc.list_parent_indices(images).filter(lost).to_pylist(), names.filter(lost).to_pylist()
        for number, name in sorted(dict(zip(numbers, names)).items()):
            good[number] = False
            comma = '; put a name that contains a comma into a list: ["a,b.jpg"]' * (len(checked["images"][number]) > 1)
            why = f"is not in {source.pictures_path}{comma}"
            why = "is on the web: --allow_urls downloads such pictures" if is_url(name) else why
            self.bad["missing"].append(f"{source.where(int(records[number]))}: {printable(name)} {why}")

        usable = checked.filter(pa.array(good))
        self.shortened += pc.sum(pc.greater(usable["lost"], 0)).as_py() or 0
        self.without_picture += pc.sum(pc.equal(pc.list_value_length(usable["images"]), 0)).as_py() or 0
        self.answer_tokens += pc.sum(usable["answers"]).as_py() or 0
        self.lost_tokens += pc.sum(usable["lost"]).as_py() or 0
        for column, counter in (("mended", self.mended), ("shape", self.shapes)):
            counts = usable[column].value_counts().to_pylist()
            counter.update({count["values"]: count["counts"] for count in counts if count["values"]})
        self.sources.append(source)
        self.record_numbers.append(records if len(records) > len(source.table) else None)
        self.starts.append(self.starts[-1] + len(checked))
        return np.flatnonzero(good) + self.starts[-2], usable["length"].to_numpy().astype(np.int64)

    def _groups(self) -> np.ndarray | None:
        """See the attribute `groups`."""
        if all(records is None for records in self.record_numbers):
            return None
        records = [np.arange(end - start) for start, end in zip(self.starts, self.starts[1:])]
        records = [plain if several is None else several for plain, several in zip(records, self.record_numbers)]
        records = np.concatenate([each + start for each, start in zip(records, self.starts)])[self.rows]
        return np.flatnonzero(np.diff(records, prepend=-1))

    @cached_property
    def summary(self) -> dict:
        """What the JSON next to trained weights records about their rows, for prompts that the model knows.

        "rows_without_picture": a number. "prompts": the most common first questions of rows with a picture, by
        language, {"en": [...], "zh": [...]}; with several pictures under "en several" and "zh several". A question that
        occurs once is not a prompt. "pictures_first": whether most rows with one picture show it before the question.
        The last two come from ASKED random rows, the same ones in each call.
        """
        asked, first = Counter(), Counter()
        rows = range(len(self)) if self.image_ids else ()
        for row in sorted(random.Random(0).sample(rows, min(len(rows), ASKED))):
            text = next(turn["content"] for turn in self.row(row).conversations if turn["role"] == "user")
            pictures, prompt = text.count(IMAGE_TAG), text.replace(IMAGE_TAG, "").strip()
            if pictures and prompt:
                asked[language(prompt) + " several" * (pictures > 1), prompt] += 1
                first[text.startswith(IMAGE_TAG)] += pictures == 1
        prompts = {}
        for (key, prompt), times in asked.most_common():
            if times > 1 and len(prompts.setdefault(key, [])) < PROMPTS:
                prompts[key].append(prompt)
        summary = {"rows_without_picture": self.without_picture, "prompts": prompts}
        return summary | ({"pictures_first": first[True] > first[False]} if first.total() else {})

    @property
    def captioned(self) -> bool:
        """Whether some rows have captions; --prompt applies to these."""
        return any(shape.startswith("caption") for shape in self.shapes)

    @property
    def not_read(self) -> list[str]:
        """Columns that are not read."""
        return list(dict.fromkeys(name for source in self.sources for name in source.not_read))

    def report(self, examples: int = 3) -> str:
        """The bad rows as a table: count, kind, and the first few examples of each kind."""
        total = sum(map(len, self.bad.values()))
        lines = [f"{total} of {self.starts[-1]} rows are not usable:"]
        for kind, places in sorted(self.bad.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(places):>8}  {KINDS[kind]}")
            lines += [f"            {example}" for example in places[:examples]]
        return "\n".join(lines)

    def locate(self, row: int) -> tuple[int, int, int]:
        """(index of its source, number of its record there, index among the rows of this record) of a usable row."""
        at = int(self.rows[row])
        source = int(np.searchsorted(self.starts, at, side="right")) - 1
        at -= int(self.starts[source])
        records = self.record_numbers[source]
        if records is None:
            return source, at, 0
        return source, int(records[at]), at - int(np.searchsorted(records, records[at]))

    def where(self, row: int) -> str:
        """file:line of a usable row."""
        source, record, _ = self.locate(row)
        return self.sources[source].where(record)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, row: int) -> Row:
        source, record, which = self.locate(row)
        return self.sources[source].row(record, which)

    def __getitem__(self, row: int) -> dict:
        """{"row", "input_ids" int64 (T,), "labels" int64 (T,), "pictures" uint8 (N, 3, H, W) or None}.

        If `features` is set (dataset/features.py), "features" float16 (N, P, V) replaces "pictures". A picture that
        cannot be read gives {"row", "broken": reason}: an exception in a worker process would print a long traceback.
        """
        ids, labels, images, _ = encode_row(self.row(row), self.tokenizer, self.image_ids, self.max_length)
        try:
            if self.features:
                shown = {"features": self.features.of_row(row)}
            else:
                shown = {"pictures": torch.stack([self.load_picture(row, name) for name in images]) if images else None}
        except BadRow as error:
            return {"row": row, "broken": f"{self.where(row)}: {error}"}
        tensors = {"input_ids": torch.from_numpy(np.array(ids)), "labels": torch.from_numpy(np.array(labels))}
        return {"row": row, **tensors, **shown}

    def load_picture(self, row: int, name: str) -> torch.Tensor:
        """Reads a picture of a usable row, by its name: uint8 (3, H, W). Raises BadRow."""
        return self.use_picture(row, name, self.decode)

    def decode(self, content: bytes) -> torch.Tensor:
        """The bytes of a picture's file → uint8 (3, H, W). Raises what Pillow raises."""
        with self.preprocess.open(BytesIO(content)) as image:
            return self.preprocess.resize(image)

    def use_picture(self, row: int, name: str, use):
        """See `dataset.pictures.use_picture`."""
        return use_picture(self.sources[self.locate(row)[0]], name, use)

    def pictures(self) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
        """All pictures of the usable rows, each once: (rows, names, shown, starts).

        rows: int64, one row that shows each picture; names: their names. Row i shows the pictures
        shown[starts[i] : starts[i + 1]], int64 indices into `names`.
        """
        rows, names, shown, counts = [], [], [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
        for source, start, stop in zip(self.sources, self.starts, self.starts[1:]):
            first, end = np.searchsorted(self.rows, (start, stop))
            images = self._check(source).with_format("arrow")[:]["images"].combine_chunks()
            images = images.take(pa.array(self.rows[first:end] - start))
            encoded = images.flatten().dictionary_encode()
            numbers = encoded.indices.to_numpy()
            _, places = np.unique(numbers, return_index=True)  # the first of each name
            rows += (first + pc.list_parent_indices(images).to_numpy()[places]).tolist()
            shown.append(len(names) + numbers.astype(np.int64))
            counts.append(pc.list_value_length(images).to_numpy())
            names += encoded.dictionary.to_pylist()
        return np.array(rows, np.int64), names, np.concatenate(shown), np.cumsum(np.concatenate(counts), dtype=np.int64)


def as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]

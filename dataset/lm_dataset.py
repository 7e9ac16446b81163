"""Rows → training examples.

    {"conversations": [{"role": "user", "content": "What is this?\\n<image>"},
                       {"role": "assistant", "content": "A cat."}], "image": "cat.jpg"}

`VLMDataset` reads such rows, or those of any other shape (dataset/sources.py, dataset/shapes.py), checks them before
the first step, and makes each a training example (dataset/examples.py). Batches: dataset/batches.py.

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

FORMAT = 8  # raise it when `check_rows` or what it calls finds something else: results are cached on disk
ASKED, PROMPTS = 2000, 3  # rows in which the commonest questions are looked for, and how many of them are kept
KINDS = {
    "json": "not valid JSON",
    "key": "missing or malformed key",
    "role": "no chat: unknown role, turns out of order, placeholders typed as text",
    "answer": "no assistant turn",
    "blank": "no caption, or no answer",
    "count": "wrong number of <image>",
    "missing": "picture file missing",
    "broken": "picture file broken",
    "long": "prompt too long",
}


# ---------------------------------------------------------------------------- checks


CHECKED = datasets.Features(
    {
        "record": datasets.Value("int64"),  # which of the source it is from
        "which": datasets.Value("int32"),  # of the rows that this record makes, which
        "length": datasets.Value("int32"),  # tokens
        "answers": datasets.Value("int32"),  # tokens of its answers
        "lost": datasets.Value("int32"),  # how many of these max_length cost
        "images": datasets.List(datasets.Value("string")),
        "mended": datasets.Value("string"),
        "shape": datasets.Value("string"),  # what it was read as
        "kind": datasets.Value("string"),
        "problem": datasets.Value("string"),
    }
)


def check_rows(batch, numbers: list[int], parse, tokenizer, image_ids: list[int], max_length: int) -> dict:
    """For `datasets.map`: what can be known of rows without opening their pictures. parse: of their source."""
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
    """All rows are bad."""


class VLMDataset(torch.utils.data.Dataset):
    """Training examples from JSONL or Parquet.

    Attributes:
        lengths: int64 (rows,), tokens of each usable row.
        bad: {kind: ["file:line: what is wrong", ...]} of the rows that are not usable.
        shortened: how many usable rows lost the end of their conversation to max_length.
        without_picture: how many usable rows have none.
        answer_tokens, lost_tokens: of the answers of usable rows, and how many of these max_length cost.
        mended: {key of MENDED: how many usable rows}.
        shapes: {what rows were read as, in words: how many usable rows}.
        parts: [(first row, end, weight)] of the usable rows of each path.
        groups: int64, the first row of each picture that has several captions, of which an epoch draws one, and each
            row that stands for itself; None if all do.
        features: a `RowFeatures` of these rows, or None: pictures are then opened as rows are asked for.
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
            data_path: a file, a pattern as in data/*.parquet, or a list of these.
            images_path: the folder or zip that the names in "image" are relative to, or a list of them, one for each
                data_path; None: one that stands beside the rows, see `dataset.sources.pictures_beside`.
            tokenizer: of `model.processing.load_tokenizer`.
            preprocess: an `ImageProcessor`; needed as soon as a row has a picture.
            max_length: tokens a row may have.
            image_ids: the placeholders of one picture; none leaves pictures out, for a model of text only.
            on_bad_row: "error" raises ValueError with a table of what is wrong, "skip" leaves bad rows out.
            weights: how many times an epoch passes over each data_path; 1 without it.
            options: how rows are read.
        """
        self.tokenizer, self.preprocess, self.features = tokenizer, preprocess, None
        self.max_length, self.image_ids = max_length, list(image_ids)
        if any(prompt.count(IMAGE_TAG) > 1 for prompt in options.prompts):
            raise ValueError(f"--prompt: {IMAGE_TAG} stands once at most, where the picture belongs")
        paths, stores = as_list(data_path), as_list(images_path)
        weights = weights or [1.0] * len(paths)
        stores = stores * len(paths) if len(stores) == 1 else stores
        for flag, values in (("images_path", stores), ("data_weights", weights)):
            if len(values) != len(paths):
                raise ValueError(f"--{flag} names {len(values)}, --data_path {len(paths)}: give as many, in this order")

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
        self.starts = np.array(self.starts)  # the first row of each source, in a count of usable rows and others
        self.rows, self.lengths = np.concatenate(rows), np.concatenate(lengths)
        self.groups = self._groups() if options.captions == "one" else None
        for of_path, (begin, end, weight) in zip(by_path, self.parts):
            count = end - begin if self.groups is None else int(np.diff(np.searchsorted(self.groups, (begin, end)))[0])
            if count and not round(count * weight):
                raise ValueError(f"--data_weights {weight}: of the {count} rows of {of_path[0].path} that is none")
        if self.bad and on_bad_row == "error":
            raise ValueError(f"{self.report()}\nMend the data, or leave these rows out with --on_bad_row skip")
        if not len(self.rows):
            raise NoUsableRow(f"no usable row in {', '.join(map(str, paths))}\n{self.report()}")

    def _check(self, source: Source) -> datasets.Dataset:
        """The columns CHECKED of all rows of a source; computed once per data, tokenizer and setting."""
        settings = (self.tokenizer.backend_tokenizer.to_str(), self.image_ids, self.max_length, FORMAT)
        settings += (source.is_json, self.options.prompts)
        # `datasets` would fingerprint the pickled tokenizer, which changes from run to run and so never hits.
        fingerprint = hashlib.sha256(repr((source.table._fingerprint, settings)).encode()).hexdigest()[:32]
        many = len(source.table) > 50_000  # rows: below, neither more processes nor a progress bar are worth it
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
        """Numbers and lengths of the rows of a source that can be learned from; notes what is wrong with the others."""
        checked = self._check(source).with_format("arrow")[:]
        records = checked["record"].to_numpy()
        good = pc.equal(checked["kind"], "").to_numpy()
        for number in np.flatnonzero(~good).tolist():
            kind = checked["kind"][number].as_py()
            if kind != "none":
                self.bad[kind].append(f"{source.where(int(records[number]))}: {checked['problem'][number]}")

        images = checked["images"].combine_chunks()
        names = images.flatten()
        elsewhere = pc.unique(names)  # pictures in the rows themselves are there, and many
        elsewhere = elsewhere.filter(pc.invert(pc.match_substring_regex(elsewhere, INLINE.pattern)))
        gone = pa.array([name for name in elsewhere.to_pylist() if not source.has(name)], names.type)
        lost = pc.is_in(names, value_set=gone)
        numbers, names = pc.list_parent_indices(images).filter(lost).to_pylist(), names.filter(lost).to_pylist()
        for number, name in sorted(dict(zip(numbers, names)).items()):
            good[number] = False
            comma = '; a name with a comma in it goes into a list: ["a,b.jpg"]' * (len(checked["images"][number]) > 1)
            why = f"is not in {source.pictures_path}{comma}"
            why = "is on the web: --allow_urls fetches pictures from there" if is_url(name) else why
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
        """What the JSON of weights says of the rows that they were made with, so that the model is asked what it knows.

        "rows_without_picture"; "prompts": the commonest first questions of rows with a picture, by language, {"en":
        [...], "zh": [...]}, those of rows with several pictures under "en several" and "zh several"; "pictures_first":
        do most rows with one picture show it before the question? Of ASKED rows drawn by chance, the same ones at each
        call: few beside the rows of a run, which come in random order too. What was asked once is no prompt.
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
        """Whether some rows have captions, about which --prompt is asked."""
        return any(shape.startswith("caption") for shape in self.shapes)

    @property
    def not_read(self) -> list[str]:
        """Columns whose content the model does not see."""
        return list(dict.fromkeys(name for source in self.sources for name in source.not_read))

    def report(self, examples: int = 3) -> str:
        """The bad rows as a table: kind, count, first examples."""
        total = sum(map(len, self.bad.values()))
        lines = [f"{total} of {self.starts[-1]} rows are not usable:"]
        for kind, places in sorted(self.bad.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(places):>8}  {KINDS[kind]}")
            lines += [f"            {example}" for example in places[:examples]]
        return "\n".join(lines)

    def locate(self, row: int) -> tuple[int, int, int]:
        """Which source a usable row is from, the number of its record there, and which of the record's rows it is."""
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
        """{"row", "input_ids" int64 (T,), "labels" int64 (T,), "pictures" uint8 (N, 3, H, W)}; or, where `features` has
        those of all rows (dataset/features.py), "features" float16 (N, P, V) in place of pictures; None without any.

        A picture that cannot be read gives {"row", "broken": why} instead of an exception, which would cross the
        border of a worker process as a page of traceback.
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
        """A picture of the source that a usable row is from: uint8 (3, H, W). Raises BadRow."""
        return self.use_picture(row, name, self.decode)

    def decode(self, content: bytes) -> torch.Tensor:
        with self.preprocess.open(BytesIO(content)) as image:
            return self.preprocess.resize(image)

    def use_picture(self, row: int, name: str, use):
        """See `dataset.pictures.use_picture`."""
        return use_picture(self.sources[self.locate(row)[0]], name, use)

    def pictures(self) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
        """All pictures that the rows show, each once: (a row that shows it, its name, which of them the rows show one
        after another, where in this each row begins). int64 but for the names."""
        rows, names, shown, counts = [], [], [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
        for source, start, stop in zip(self.sources, self.starts, self.starts[1:]):
            first, end = np.searchsorted(self.rows, (start, stop))
            images = self._check(source).with_format("arrow")[:]["images"].combine_chunks()
            images = images.take(pa.array(self.rows[first:end] - start))
            encoded = images.flatten().dictionary_encode()
            numbers = encoded.indices.to_numpy()
            _, places = np.unique(numbers, return_index=True)  # of each name the first
            rows += (first + pc.list_parent_indices(images).to_numpy()[places]).tolist()
            shown.append(len(names) + numbers.astype(np.int64))
            counts.append(pc.list_value_length(images).to_numpy())
            names += encoded.dictionary.to_pylist()
        return np.array(rows, np.int64), names, np.concatenate(shown), np.cumsum(np.concatenate(counts), dtype=np.int64)


def as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]

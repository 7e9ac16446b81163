"""Streams data sets larger than the disk: Parquet on a hub, one shard of rows at a time.

    python train_sft_vlm.py --data_path "hf://datasets/owner/name/sft_*.parquet"

A shard is downloaded to a file, used as an ordinary `VLMDataset`, and removed. The next shard is downloaded meanwhile,
so two are on disk at a time. Seed and epoch determine which rows are in which shard: the row groups of all files are
shuffled, and `StepSampler` shuffles the rows of a shard. Ranks, workers and resumed runs therefore agree without
communication, and a resumed run downloads only the shard in which it stopped.
"""

import hashlib
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from common.cli import disk_full, reason
from dataset.remote import file_system, is_remote, list_remote, one_sentence
from dataset.shapes import shape_of
from dataset.values import BadRow

# Seconds to wait before each retry of a download: one hour in all, to survive an outage of the network.
PAUSES = (1, 2, 4, 8, 15, 30, *[60] * 59)


@dataclass(frozen=True)
class RowGroup:
    """Rows first to end - 1 of a row group."""

    file: str
    group: int
    first: int
    end: int
    offset: int  # number of its first row in the file


def open_parquet(url: str) -> pyarrow.parquet.ParquetFile:
    with one_sentence(url):
        system, path = file_system(url)
        return pyarrow.parquet.ParquetFile(system.open(path, "rb"), pre_buffer=True)


WHOLE = (
    ".json",
    ".jsonl",
    ".gz",
    ".csv",
    ".tsv",
    ".tar",
    ".arrow",
)  # files that are downloaded completely before they are read


def is_streamed(path) -> bool:
    return is_remote(path) and not str(path).lower().endswith(WHOLE)


class Stream:
    """The rows of remote Parquet files.

    Attributes:
        rows: the number of rows.
        row_groups: all row groups.
    """

    def __init__(self, patterns: list[str]):
        """Raises FileNotFoundError if a pattern matches nothing, ValueError for wrong columns, OSError if offline."""
        self.row_groups, self.schema, self.last = [], None, (None, None)
        for file in dict.fromkeys(file for pattern in patterns for file in list_remote(pattern)):
            with open_parquet(file) as parquet:
                schema, metadata = parquet.schema_arrow, parquet.metadata
            try:
                columns = shape_of(tuple(schema.names)).columns(schema.names)
            except BadRow as error:
                raise ValueError(f"--data_path {file}: {error}") from None
            schema = pa.schema([schema.field(name).remove_metadata() for name in sorted(columns)])
            self.schema = self.schema or schema
            if schema != self.schema:
                raise ValueError(
                    f"--data_path {file}: its columns are\n{schema}\nThe files before it have\n{self.schema}"
                )
            offset = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                self.row_groups.append(RowGroup(file, group, 0, rows, offset))
                offset += rows
        self.rows = sum(row_group.end for row_group in self.row_groups)
        if not self.rows:
            raise ValueError(f"--data_path {' '.join(patterns)} has no rows")

    def plan(self, shard_rows: int, seed: int, epoch: int) -> list[list[RowGroup]]:
        """The shards of an epoch, each with shard_rows rows except the last."""
        shards, room = [[]], shard_rows
        for i in np.random.default_rng((seed, epoch)).permutation(len(self.row_groups)):
            row_group = self.row_groups[i]
            first = row_group.first
            while first < row_group.end:
                if room == 0:
                    shards.append([])
                    room = shard_rows
                taken = min(room, row_group.end - first)
                shards[-1].append(RowGroup(row_group.file, row_group.group, first, first + taken, row_group.offset))
                first, room = first + taken, room - taken
        return shards

    def fetch(self, shard: list[RowGroup], path: Path) -> None:
        """Writes the rows of a shard to an Arrow file, each with its origin, unless the file exists. Raises OSError."""
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = self.schema.append(pa.field("origin", pa.string()))
        opened = {file: open_parquet(file) for file in {row_group.file for row_group in shard}}
        temporary = path.with_suffix(".tmp")
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for row_group in shard:
                # A large row group is split into parts, which follow each other: keep it for the next one.
                if self.last[0] != (row_group.file, row_group.group):
                    with one_sentence(row_group.file):
                        rows = opened[row_group.file].read_row_group(row_group.group, columns=self.schema.names)
                    self.last = (row_group.file, row_group.group), rows
                # Not a slice: Arrow would write too few rows of a column that is null everywhere.
                rows = self.last[1].take(list(range(row_group.first, row_group.end)))
                numbers = range(row_group.offset + row_group.first + 1, row_group.offset + row_group.end + 1)
                rows = rows.append_column("origin", pa.array([f"{row_group.file}:{number}" for number in numbers]))
                writer.write_table(rows.cast(schema))
        temporary.replace(path)


def hopeless(error: BaseException) -> bool:
    """Whether a retry cannot help: the file is missing, forbidden or not Parquet, or the disk is full."""
    causes = [error, error.__context__]
    statuses = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
    no_use = (FileNotFoundError, PermissionError, pa.ArrowInvalid)
    return bool(statuses & {401, 403, 404, 410}) or any(isinstance(e, no_use) or disk_full(e) for e in causes)


class Fetcher:
    """Downloads the next shard of a plan in a thread while another one is in use, and removes used shards.

    The name of a shard's folder is a hash of its content, so a file that an earlier run left is used only if it fits.
    """

    def __init__(self, stream: Stream, plan: list[list[RowGroup]], folder: Path):
        self.stream, self.plan, self.folder = stream, plan, folder
        self.threads, self.errors = {}, {}

    def path(self, number: int) -> Path:
        name = hashlib.sha256(repr(self.plan[number]).encode()).hexdigest()[:16]
        return self.folder / name / "rows.arrow"

    def begin(self, number: int) -> None:
        if number < len(self.plan) and number not in self.threads:
            thread = threading.Thread(target=self.run, args=(number,), daemon=True)  # daemon: does not delay the exit
            self.threads[number] = thread
            thread.start()

    def run(self, number: int) -> None:
        for attempt, pause in enumerate((*PAUSES, 0)):
            try:
                self.stream.fetch(self.plan[number], self.path(number))
                self.errors.pop(number, None)
                return
            except Exception as error:  # `get` reports it
                self.errors[number] = error
                if hopeless(error):
                    return
                if attempt == 2:
                    print(f"{error}\nRetrying for an hour; press Ctrl-C twice to end the run", flush=True)
                time.sleep(pause)

    def get(self, number: int) -> Path:
        """Waits for a shard and returns its file. Removes the previous one, which must be closed. Raises ValueError."""
        self.begin(number)
        self.threads[number].join()
        if number in self.errors:
            raise ValueError(reason(self.errors[number]))
        if number:
            shutil.rmtree(self.path(number - 1).parent, ignore_errors=True)
        return self.path(number)

    def ahead(self) -> None:
        """Starts to download the next shard. It uses a thread, so call it after worker processes have been forked."""
        if self.threads:  # otherwise another rank downloads
            self.begin(max(self.threads) + 1)

    def remove(self) -> None:
        """Removes all remaining shards."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # contains the folder of another machine
            self.folder.parent.rmdir()

"""Rows written for other programs, in the shape of LLaVA that most of them read.

rows.jsonl      {"id", "image": "rows_images/ab12.jpg", or a list of several, "conversations": [{"from", "value"}]}
rows.parquet    id, images (a list of {"bytes", "path"}), conversations; the hubs show it with pictures
"""

import hashlib
import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
from PIL import Image
from tqdm import tqdm

from common.files import write_safely
from dataset.lm_dataset import VLMDataset
from dataset.values import BadRow

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
GROUP = 100  # rows that are held in memory, with their pictures
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    }
)


def write_rows(data: VLMDataset, path: Path) -> str:
    """Writes all usable rows whose pictures can be read, and gives a sentence about it. The file of a picture is what
    it was, byte by byte; rows that show the same share it. Raises OSError."""
    written = Written(data, path.with_name(f"{path.stem}_images") if path.suffix == ".jsonl" else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path, written.parquet if path.suffix == ".parquet" else written.jsonl)
    left_out = f"; {len(written.broken)} left out, first {written.broken[0]}" if written.broken else ""
    return f"written: {path}, {len(data) - len(written.broken):,} rows{left_out}"


class Written:
    """The rows of a data set on their way to a file. broken: why rows were left out."""

    def __init__(self, data: VLMDataset, folder: Path | None):
        """folder: of the pictures, which otherwise stay in the rows."""
        self.data, self.folder, self.broken = data, folder, []

    def rows(self):
        """{"id", "images": [{"bytes", "path"}], "conversations"}, one by one."""
        for i in tqdm(range(len(self.data)), "writing rows", unit="row", dynamic_ncols=True):
            row = self.data.row(i)
            try:
                images = [self.data.use_picture(i, name, named) for name in row.images]
            except BadRow as error:
                self.broken.append(f"{self.data.where(i)}: {error}")
                continue
            turns = [{"from": SPEAKERS[turn["role"]], "value": turn["content"]} for turn in row.conversations]
            yield {"id": str(i), "images": images, "conversations": turns} | ({"kind": row.kind} if row.kind else {})

    def jsonl(self, file) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for row in self.rows():
            names = []
            for picture in row.pop("images"):
                names.append(f"{self.folder.name}/{picture['path']}")
                if not (self.folder / picture["path"]).is_file():
                    # Not by `write_safely`, which looks for leftovers in the whole folder, each time.
                    (self.folder / ".part").write_bytes(picture["bytes"])
                    (self.folder / ".part").replace(self.folder / picture["path"])
            image = {"image": names[0] if len(names) == 1 else names} if names else {}
            file.write((json.dumps({"id": row["id"]} | image | row, ensure_ascii=False) + "\n").encode())

    def parquet(self, file) -> None:
        schema, group = FEATURES.arrow_schema, []
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for row in self.rows():
                group.append(row)
                if len(group) == GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group = []
            writer.write_table(pa.Table.from_pylist(group, schema))


def named(content: bytes) -> dict:
    """A picture's file as `datasets` keeps it, named by its content. Raises whatever Pillow does if it is none."""
    with Image.open(io.BytesIO(content)) as image:
        suffix = {"JPEG": "jpg"}.get(image.format, str(image.format).lower())
    return {"bytes": content, "path": f"{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"}

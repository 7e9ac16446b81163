"""Writes rows for other programs, in LLaVA's layout, which most of them read.

rows.jsonl      {"id", "image": "rows_images/ab12.jpg", or a list of several, "conversations": [{"from", "value"}]}
rows.parquet    id, images (a list of {"bytes", "path"}), conversations; hubs show it with pictures
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
GROUP = 100  # rows in memory at a time, with their pictures
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
        "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    }
)


def write_rows(data: VLMDataset, path: Path) -> str:
    """Writes all usable rows whose pictures can be read, and returns a summary to print. Files of pictures are copied
    byte by byte; rows with the same picture share one file. Raises OSError."""
    written = Written(data, path.with_name(f"{path.stem}_images") if path.suffix == ".jsonl" else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path, written.parquet if path.suffix == ".parquet" else written.jsonl)
    left_out = f"; {len(written.broken)} skipped, first {written.broken[0]}" if written.broken else ""
    return f"written: {path}, {len(data) - len(written.broken):,} rows{left_out}"


class Written:
    """Writes the rows of a data set to a file. broken: why rows were skipped."""

    def __init__(self, data: VLMDataset, folder: Path | None):
        """folder: for the pictures; None keeps them in the rows."""
        self.data, self.folder, self.broken = data, folder, []

    def rows(self):
        """Yields {"id", "images": [{"bytes", "path"}], "conversations"}."""
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
                    # Not `write_safely`: it would search the whole folder for leftovers each time.
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
    """A picture's file in the form that `datasets` stores, named by its hash. Raises what Pillow raises."""
    with Image.open(io.BytesIO(content)) as image:
        suffix = {"JPEG": "jpg"}.get(image.format, str(image.format).lower())
    return {"bytes": content, "path": f"{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"}

"""Caches the frozen encoder's features of pictures on disk, for all epochs and later runs. `trainer.feature_cache`
fills the cache.

    DIR/hashes.npy                      uint8 (n, 32): stamps of pictures (see `Pictures.stamp`) and their hashes
    DIR/<key>/about.json                the settings of these features; the key is their hash
    DIR/<key>/<segment>.keys.npy        uint8 (n, 16): hash of each picture's file
    DIR/<key>/<segment>.features.npy    float16 (n, P, V); or (n, P) records of a float16 scale and V int8 values

A different encoder, preprocessing or precision gets a different folder, and a changed picture a different hash, so
wrong features are never used. Segments are only added. A segment is valid when its keys exist, which are written last.
This lets runs and ranks share a folder without locks: an interrupted run loses its current segment, and if two runs
compute the same picture at once, the earlier result is used.

Shapes: n pictures of a segment, N pictures, P patches, V width of the encoder.
"""

import hashlib
import json
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common.cli import reason
from common.files import write_safely
from dataset.lm_dataset import VLMDataset
from dataset.values import BadRow

FORMAT = 3  # increase it when the files or our preprocessing of pictures change
SEGMENT = 2**28  # bytes; a rank keeps up to this many in memory before it writes them
ABANDONED = 3600  # seconds after which features without keys count as left by a killed run
NO_KEY = bytes(16)  # key of an unreadable picture; stamp of a file whose times are not reliable
SETTLED = 2 * 10**9  # nanoseconds; a file changed more recently may change again without a new time


def hash_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def read_hashes(folder: Path) -> dict[bytes, bytes]:
    """{stamp: hash} of pictures that earlier runs read; empty if hashes.npy is missing or damaged."""
    with suppress(OSError, ValueError, EOFError):
        table = np.load(folder / "hashes.npy")
        if table.dtype == np.uint8 and table.shape[1:] == (32,):
            return {pair[:16]: pair[16:] for pair in map(bytes, table)}
    return {}


def write_hashes(folder: Path, hashes: dict[bytes, bytes]) -> None:
    table = np.frombuffer(b"".join(stamp + key for stamp, key in hashes.items()), np.uint8).reshape(-1, 32)
    with suppress(OSError):  # not fatal: the next start takes longer
        write_safely(folder / "hashes.npy", lambda file: np.save(file, table))


class FeatureCache:
    """The features of one encoder, preprocessing and precision.

    Attributes:
        path: their folder.
        picture_bytes: disk space per picture.
        pictures: how many pictures there were at the last `refresh`. Their numbers do not change.
    """

    def __init__(self, folder, settings: dict, patches: int, width: int, dtype: str):
        """settings: everything that features depend on except the picture. dtype: "float16" or "int8", on disk."""
        self.settings = settings | {"format": FORMAT, "kept as": dtype, "patches": patches, "width": width}
        text = json.dumps(self.settings, sort_keys=True)
        self.path = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        record = np.dtype([("scale", "<f2"), ("values", "i1", (width,))])
        self.dtype, self.shape = (record, (patches,)) if dtype == "int8" else (np.dtype("<f2"), (patches, width))
        self.picture_bytes = patches * (width + 2 if dtype == "int8" else 2 * width)
        self.segments, self.waiting = [], []
        self.refresh()

    # ---- reading

    def refresh(self) -> None:
        """Adds segments written since the last call. Raises ValueError for a damaged one."""
        known = {segment for segment, _ in self.segments}
        # Names begin with the time, so sorting keeps the numbers of earlier features.
        new = sorted({path.name.removesuffix(".keys.npy") for path in self.path.glob("*.keys.npy")} - known)
        self.segments += [(segment, self.load_keys(segment)) for segment in new]
        self.ends = np.cumsum([len(keys) for _, keys in self.segments], dtype=np.int64)
        self.pictures = int(self.ends[-1]) if self.segments else 0
        self.open = {}

    def load_keys(self, segment: str) -> np.ndarray:
        try:
            keys, features = np.load(self.path / f"{segment}.keys.npy"), self.load_features(segment)
            if keys.dtype != np.uint8 or features.dtype != self.dtype or features.shape[1:] != self.shape:
                raise ValueError(f"keys {keys.dtype}, features {features.dtype} {features.shape}")
            if keys.shape != (len(features), 16):
                raise ValueError(f"{len(features)} features, keys {keys.shape}")
        except (OSError, ValueError, EOFError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"--cache_features: a segment is damaged ({why}). To recompute it: rm {self.path / segment}.*"
            ) from None
        return keys

    def load_features(self, segment: str) -> np.ndarray:
        """(n, ...), memory-mapped: read on use, and shared by all processes of a machine."""
        return np.load(self.path / f"{segment}.features.npy", mmap_mode="r").view(np.ndarray)

    def find(self, keys: list[bytes]) -> np.ndarray:
        """Hashes → the numbers of their features, int64 (N,); -1 if missing."""
        stored = [bytes(key) for _, keys in self.segments for key in keys]
        numbers = {key: number for number, key in reversed(list(enumerate(stored)))}  # the earliest result counts
        return np.array([numbers.get(key, -1) for key in keys], np.int64)

    def read(self, numbers) -> torch.Tensor:
        """Features by their numbers → float16 (N, P, V)."""
        stored = []
        for number in numbers:
            i = int(np.searchsorted(self.ends, number, side="right"))
            segment, keys = self.segments[i]
            if segment not in self.open:
                self.open[segment] = self.load_features(segment)
            stored.append(self.open[segment][number - self.ends[i] + len(keys)])
        features = np.stack(stored)
        if self.dtype.names is None:
            return torch.from_numpy(features)
        scale = torch.from_numpy(np.ascontiguousarray(features["scale"])).float()
        return torch.from_numpy(features["values"]).float().mul_(scale[..., None]).half()

    def __getstate__(self):
        # Pickling a mapped file would copy its content to the worker process; each worker opens its own.
        return vars(self) | {"open": {}}

    # ---- writing

    def begin(self) -> None:
        """Creates the folder and removes leftovers of killed runs; call it before the first `add`.

        Raises OSError, which names the flag.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in [*self.path.glob("*.features.npy"), *self.path.glob(".*.tmp")]:  # .tmp: by `write_safely`
                keys = path.with_name(path.name.replace(".features.", ".keys."))
                if (path.suffix == ".tmp" or not keys.exists()) and time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink(missing_ok=True)
            (self.path / "about.json").write_text(json.dumps(self.settings, indent=1))  # for people
        except OSError as error:
            raise OSError(f"--cache_features {self.path.parent}: {reason(error)}") from None

    def add(self, keys: list[bytes], features: torch.Tensor) -> None:
        """Adds features, float (N, P, V), and the hashes of their pictures; writes a segment when there are enough."""
        self.waiting.append((b"".join(keys), self.pack(features.float())))
        if sum(packed.nbytes for _, packed in self.waiting) > SEGMENT:
            self.flush()

    def pack(self, features: torch.Tensor) -> np.ndarray:
        """float32 (N, P, V) → the format on disk. Raises ValueError for features too large for float16."""
        if not features.half().isfinite().all():
            raise ValueError("--cache_features: the encoder's features exceed the range of float16; omit this flag")
        if self.dtype.names is None:
            return features.half().contiguous().cpu().numpy()
        scale = (features.abs().amax(dim=-1) / 127).clamp(min=1e-7).half()  # (N, P); 1e-7 is not 0 in float16 either
        packed = np.empty(features.shape[:2], self.dtype)
        packed["scale"] = scale.cpu().numpy()
        packed["values"] = (features / scale[..., None]).round().clamp(-127, 127).to(torch.int8).cpu().numpy()
        return packed

    def flush(self) -> None:
        """Writes the waiting features as a segment. Raises OSError, which names the flag."""
        if not self.waiting:
            return
        keys, features = zip(*self.waiting)
        self.waiting = []
        keys = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        segment = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"

        def write(file):
            header = {"shape": (len(keys), *self.shape), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header | {"descr": np.lib.format.dtype_to_descr(self.dtype)})
            for part in features:
                file.write(part.data)

        try:
            write_safely(self.path / f"{segment}.features.npy", write)
            write_safely(self.path / f"{segment}.keys.npy", lambda file: np.save(file, keys))
        except OSError as error:
            (self.path / f"{segment}.features.npy").unlink(missing_ok=True)
            why = reason(error.__cause__ or error)
            raise OSError(f"--cache_features {self.path}: {why}. Features written before are kept") from None


class Pictures(Dataset):
    """All pictures of some data sets, each name once, for a DataLoader: i → (i, hash, pixels, why it cannot be read).

    pixels: uint8 (3, H, W), decoded from the same bytes that were hashed; None unless `decode` is set.
    """

    def __init__(self, sets: list[VLMDataset]):
        self.sets, self.decode = sets, False
        self.indexes = [data.pictures() for data in sets]
        self.ends = np.cumsum([len(rows) for rows, *_ in self.indexes])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def at(self, i: int) -> tuple[VLMDataset, int, str]:
        """(data set, a row that shows the picture, its name)"""
        which = int(np.searchsorted(self.ends, i, side="right"))
        rows, names, *_ = self.indexes[which]
        at = i - int(self.ends[which]) + len(rows)
        return self.sets[which], int(rows[at]), names[at]

    def stamp(self, i: int) -> bytes:
        """A hash of the picture's name and of path, size and times of its file, to detect changes without reading it.

        NO_KEY if the times are too recent to rely on, or the file cannot be found.
        """
        data, row, name = self.at(i)
        path = data.sources[data.locate(row)[0]].file(name)
        try:
            status = path.stat()
        except OSError:
            return NO_KEY
        times = status.st_mtime_ns, status.st_ctime_ns  # the second also changes with `cp -p`
        if time.time_ns() - max(times) < SETTLED:
            return NO_KEY
        return hash_of(repr((str(path.absolute()), name, status.st_size, times)).encode())

    def __getitem__(self, i: int) -> tuple:
        data, row, name = self.at(i)

        def hashed(content):
            return hash_of(content), data.decode(content) if self.decode else None

        try:
            return i, *data.use_picture(row, name, hashed), ""
        except BadRow as error:
            return i, NO_KEY, None, str(error)

    def where(self, i: int) -> str:
        """file:line of a row that shows a picture."""
        data, row, _ = self.at(i)
        return data.where(row)

    def attach(self, cache: FeatureCache, numbers: np.ndarray, broken: dict[int, str]) -> None:
        """Gives the rows features instead of pictures. numbers: int64 (len(self),), per picture; broken: {i: why}."""
        for data, (rows, _, shown, starts), end in zip(self.sets, self.indexes, self.ends):
            data.features = RowFeatures(cache, numbers, broken, shown + end - len(rows), starts)


@dataclass
class RowFeatures:
    """The features of the rows of a data set; row i shows the pictures shown[starts[i] : starts[i + 1]]."""

    cache: FeatureCache
    numbers: np.ndarray
    broken: dict[int, str]
    shown: np.ndarray
    starts: np.ndarray

    def of_row(self, row: int) -> torch.Tensor | None:
        """float16 (N, P, V); None for a row without a picture. Raises BadRow for a broken picture."""
        pictures = self.shown[self.starts[row] : self.starts[row + 1]]
        for picture in pictures.tolist():
            if picture in self.broken:
                raise BadRow("broken", self.broken[picture])
        return self.cache.read(self.numbers[pictures].tolist()) if len(pictures) else None

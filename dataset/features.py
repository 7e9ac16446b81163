"""What the frozen encoder makes of pictures, kept on the disk: no epoch and no later run computes it again. Filled by
`trainer.feature_cache`.

    DIR/hashes.npy                      uint8 (n, 32): stamps of pictures, see `Pictures.stamp`, and their hashes
    DIR/<key>/about.json                what these are features of; the key is its hash
    DIR/<key>/<segment>.keys.npy        uint8 (n, 16): hash of each picture's file
    DIR/<key>/<segment>.features.npy    float16 (n, P, V); or (n, P) records of a float16 scale and V int8 values

Another encoder, preprocessing or precision has another folder, a changed picture another hash: features that do not
belong are never found. Segments are only ever added, and one counts when its keys are there, which are written last. So
runs and ranks share a folder without locks: an interrupted one loses the segment in hand, and of two that compute the
same picture at once, the earlier result is used.

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

FORMAT = 3  # raise it when the files, or what our code makes of a picture before the encoder sees it, change
SEGMENT = 2**28  # bytes; a rank holds as many in memory until they are written
ABANDONED = 3600  # seconds after which features without keys are those of a run that was killed
NO_KEY = bytes(16)  # of a picture that cannot be read, or whose file's times tell nothing
SETTLED = 2 * 10**9  # nanoseconds; a file that changed since may do so again without another time to show for it


def hash_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def read_hashes(folder: Path) -> dict[bytes, bytes]:
    """{stamp: hash} of pictures that earlier starts read; empty where hashes.npy is not there or damaged."""
    with suppress(OSError, ValueError, EOFError):
        table = np.load(folder / "hashes.npy")
        if table.dtype == np.uint8 and table.shape[1:] == (32,):
            return {pair[:16]: pair[16:] for pair in map(bytes, table)}
    return {}


def write_hashes(folder: Path, hashes: dict[bytes, bytes]) -> None:
    table = np.frombuffer(b"".join(stamp + key for stamp, key in hashes.items()), np.uint8).reshape(-1, 32)
    with suppress(OSError):  # all that is lost is time at the next start
        write_safely(folder / "hashes.npy", lambda file: np.save(file, table))


class FeatureCache:
    """The features of one encoder, preprocessing and precision.

    Attributes:
        path: their folder.
        picture_bytes: what a picture takes on the disk.
        pictures: how many were there at the last `refresh`. They are numbered, and the numbers stay.
    """

    def __init__(self, folder, settings: dict, patches: int, width: int, dtype: str):
        """settings: all that features depend on but the picture; dtype: "float16" or "int8" on the disk."""
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
        """Takes in the segments that came since. Raises ValueError for one that is damaged."""
        known = {segment for segment, _ in self.segments}
        # By name, which begins with the time: the numbers of earlier features stay.
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
                f"--cache_features: a segment is damaged ({why}). To compute it anew: rm {self.path / segment}.*"
            ) from None
        return keys

    def load_features(self, segment: str) -> np.ndarray:
        """(n, ...), mapped: read when it is used, and shared by all processes of a machine."""
        return np.load(self.path / f"{segment}.features.npy", mmap_mode="r").view(np.ndarray)

    def find(self, keys: list[bytes]) -> np.ndarray:
        """Hashes → the numbers of their features, int64 (N,); -1: not there."""
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
        # A mapped file would travel to a worker process as its content. Each opens its own.
        return vars(self) | {"open": {}}

    # ---- writing

    def begin(self) -> None:
        """Before the first `add`: makes the folder, and removes what killed runs left behind. Raises OSError that names
        the flag."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in [*self.path.glob("*.features.npy"), *self.path.glob(".*.tmp")]:  # the latter of `write_safely`
                keys = path.with_name(path.name.replace(".features.", ".keys."))
                if (path.suffix == ".tmp" or not keys.exists()) and time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink(missing_ok=True)
            (self.path / "about.json").write_text(json.dumps(self.settings, indent=1))  # for people
        except OSError as error:
            raise OSError(f"--cache_features {self.path.parent}: {reason(error)}") from None

    def add(self, keys: list[bytes], features: torch.Tensor) -> None:
        """The hashes of pictures and their features, float (N, P, V); written when they make up a segment."""
        self.waiting.append((b"".join(keys), self.pack(features.float())))
        if sum(packed.nbytes for _, packed in self.waiting) > SEGMENT:
            self.flush()

    def pack(self, features: torch.Tensor) -> np.ndarray:
        """float32 (N, P, V) → as it lies on the disk. Raises ValueError for features too large for float16."""
        if not features.half().isfinite().all():
            raise ValueError("--cache_features: the encoder gives features that float16 cannot hold; leave it out")
        if self.dtype.names is None:
            return features.half().contiguous().cpu().numpy()
        scale = (features.abs().amax(dim=-1) / 127).clamp(min=1e-7).half()  # (N, P); 1e-7: not 0, also as float16
        packed = np.empty(features.shape[:2], self.dtype)
        packed["scale"] = scale.cpu().numpy()
        packed["values"] = (features / scale[..., None]).round().clamp(-127, 127).to(torch.int8).cpu().numpy()
        return packed

    def flush(self) -> None:
        """Writes what is waiting as a segment."""
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
            raise OSError(f"--cache_features {self.path}: {why}. What was written before stays") from None


class Pictures(Dataset):
    """All pictures of some data sets, each name once, for a DataLoader: i → (i, hash, pixels, why it cannot be read).

    pixels: uint8 (3, H, W) of the very bytes that were hashed, or None unless `decode`, which may be set later.
    """

    def __init__(self, sets: list[VLMDataset]):
        self.sets, self.decode = sets, False
        self.indexes = [data.pictures() for data in sets]
        self.ends = np.cumsum([len(rows) for rows, *_ in self.indexes])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def at(self, i: int) -> tuple[VLMDataset, int, str]:
        """Where a picture is: in which data set, a row that shows it, its name."""
        which = int(np.searchsorted(self.ends, i, side="right"))
        rows, names, *_ = self.indexes[which]
        at = i - int(self.ends[which]) + len(rows)
        return self.sets[which], int(rows[at]), names[at]

    def stamp(self, i: int) -> bytes:
        """Of the file that a picture lies in and its name there, the same as long as size and times of the file are;
        NO_KEY where these do not tell whether it has changed."""
        data, row, name = self.at(i)
        path = data.sources[data.locate(row)[0]].file(name)
        try:
            status = path.stat()
        except OSError:
            return NO_KEY
        times = status.st_mtime_ns, status.st_ctime_ns  # the second also shows what `cp -p` put there
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
        """From now on the rows come with features. numbers: int64 (len(self),), of each picture; broken: {i: why}."""
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
        """float16 (N, P, V), None for a row without a picture. Raises BadRow."""
        pictures = self.shown[self.starts[row] : self.starts[row + 1]]
        for picture in pictures.tolist():
            if picture in self.broken:
                raise BadRow("broken", self.broken[picture])
        return self.cache.read(self.numbers[pictures].tolist()) if len(pictures) else None

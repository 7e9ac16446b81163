"""Files that are somewhere else: hf://datasets/owner/name/rows.parquet, https://..., whatever fsspec opens."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

import datasets
import fsspec
from fsspec.callbacks import TqdmCallback


def is_remote(path) -> bool:
    return "://" in str(path)


@contextmanager
def one_sentence(url: str, flag: str = "--data_path"):
    """Whatever goes wrong inside, of the library, of HTTP or in the file, becomes one sentence: OSError."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"{flag} {url} cannot be read: {reason[0]}.\n"
            "Is the name right, the network there, HF_TOKEN set, HF_ENDPOINT if it is a mirror?"
        ) from None


def file_system(url: str):
    """(fsspec's file system, path in it)"""
    options = {"endpoint": os.environ.get("HF_ENDPOINT")} if url.startswith("hf://") else {}
    return fsspec.core.url_to_fs(url, **options)


def list_remote(pattern: str, flag: str = "--data_path") -> list[str]:
    """The URLs that a pattern such as hf://datasets/owner/name/*.parquet stands for."""
    with one_sentence(pattern, flag):
        system, path = file_system(pattern)
        files = sorted(system.glob(path))
        there = ", ".join(sorted(Path(name).name for name in system.glob(f"{path.rpartition('/')[0]}/*"))[:20])
    if not files:
        raise FileNotFoundError(f"{flag} {pattern}: no such file. There is: {there or 'nothing that can be seen'}")
    return [system.unstrip_protocol(file) for file in files]


def download(url: str, flag: str = "--data_path") -> Path:
    """A copy of the file in the cache of `datasets`, fetched unless this very file was before."""
    with one_sentence(url, flag):
        system, path = file_system(url)
        info = system.info(path)
        version = repr([url, *(str(info.get(key)) for key in ("size", "ETag", "etag", "blob_id", "mtime"))])
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "remote" / hashlib.sha256(version.encode()).hexdigest()[:16]
        copy = folder / Path(path).name
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            part = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
            bar = {"desc": f"fetching {copy.name}", "unit": "B", "unit_scale": True, "dynamic_ncols": True}
            try:
                system.get_file(path, str(part), callback=TqdmCallback(tqdm_kwargs=bar))
                part.replace(copy)
            finally:
                part.unlink(missing_ok=True)
    return copy

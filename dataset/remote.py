"""Remote files: hf://datasets/owner/name/rows.parquet, https://..., and everything else that fsspec opens."""

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
    """Turns any error inside, of a library, of HTTP or in the file, into an OSError with a short message."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"{flag} {url} cannot be read: {reason[0]}.\n"
            "Check the name, the network, HF_TOKEN, and HF_ENDPOINT if you use a mirror"
        ) from None


def file_system(url: str):
    """(file system of fsspec, path in it)"""
    options = {"endpoint": os.environ.get("HF_ENDPOINT")} if url.startswith("hf://") else {}
    return fsspec.core.url_to_fs(url, **options)


def list_remote(pattern: str, flag: str = "--data_path") -> list[str]:
    """The URLs that match a pattern such as hf://datasets/owner/name/*.parquet. Raises FileNotFoundError, OSError."""
    with one_sentence(pattern, flag):
        system, path = file_system(pattern)
        files = sorted(system.glob(path))
        there = ", ".join(sorted(Path(name).name for name in system.glob(f"{path.rpartition('/')[0]}/*"))[:20])
    if not files:
        raise FileNotFoundError(f"{flag} {pattern}: no such file. Found: {there or 'nothing'}")
    return [system.unstrip_protocol(file) for file in files]


def download(url: str, flag: str = "--data_path") -> Path:
    """Downloads a file into the cache of `datasets` unless this version is there; returns its path. Raises OSError."""
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

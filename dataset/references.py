"""Reads --refs_path: more captions of pictures, to compare answers with."""

from pathlib import Path

from model.files import read_json


def read_references(paths) -> dict[str, list[str]]:
    """{name of a picture: captions} of all files of --refs_path.

    Raises FileNotFoundError or ValueError, which name the flag and the file.
    """
    references = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--refs_path {path}: no such file")
        for name, captions in read_json(path).items():
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise ValueError(f'--refs_path {path}: "{name}" has {captions!r}, expected a list of captions')
            references.setdefault(name, []).extend(captions)
    return references


def check_references(references: dict[str, list[str]], data) -> None:
    """Raises ValueError if there are references, but none of the pictures of `data`, a VLMDataset."""
    names = data.pictures()[1] if references else []
    if references and not {*references} & {*names, *(Path(name).name for name in names)}:
        raise ValueError("--refs_path names none of the pictures of --data_path: expected their names as in the rows")

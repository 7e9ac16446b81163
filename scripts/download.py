"""Fetches what a task needs, to where the scripts look for it, from Hugging Face or ModelScope.

    python -m scripts.download                                    # CLIP, LLM, data: what the two trainings need
    python -m scripts.download --what clip vlm                    # or a trained model, to ask it
    python -m scripts.download --source modelscope --size 104m
    HF_ENDPOINT=https://hf-mirror.com python -m scripts.download  # a mirror; tokens and proxies as usual

    clip    model/vision_model/clip-vit-base-patch16/
    llm     out/llm_{hidden}{_moe}.pth, and its tokenizer in model/
    vlm     out/{pretrain,sft}_vlm_{hidden}{_moe}.pth, and their tokenizer
    data    dataset/{pretrain,sft}_data.jsonl with {pretrain,sft}_images.zip,
            or dataset/{pretrain,sft}_data.parquet

What was begun goes on with the same command. Every file is verified by its checksum before it is moved into place;
.download.json remembers which were, so that a second run fetches nothing. Nothing of yours is overwritten.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.download instead of scripts/download.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from common.cli import SWITCH, Parser, disk_full
from common.display import typed
from common.files import write_json

CLIP_FOLDER = "model/vision_model/clip-vit-base-patch16"
HIDDEN = {"26m": 512, "104m": 768}
TRANSFORMERS_REPO = {"26m": "MiniMind2-Small-V", "104m": "MiniMind2-V"}  # they hold the tokenizer
TOKENIZER_SHA256 = "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"
PROBE_SECONDS = 5


class Failed(Exception):
    """Told to the user, with what to do about it."""


class Unreachable(Failed):
    """There is no network, or a hub does not answer."""


class Damaged(Exception):
    """What a hub sent is not what it lists."""


# ---------------------------------------------------------------------------- the two hubs


@dataclass(frozen=True)
class RemoteFile:
    repo: str
    kind: str  # of the repository: "model" or "dataset"
    path: str  # in the repository
    size: int
    checksum: str  # "sha256:..." or "git:...", the sha1 of a git blob; "" where a hub tells none

    def staging(self, target: Path) -> Path:
        """The folder where it is put together, beside its target: on the same disk, and the next run finds it."""
        return target.parent / ".download" / (self.checksum[-16:] or str(self.size))

    def whole(self, target: Path) -> Path:
        return self.staging(target) / self.path

    def partial(self, target: Path) -> Path:
        return Path(f"{self.whole(target)}.incomplete")  # as ModelScope's library calls it


class HuggingFace:
    source, other, owner, clip_owner = "hf", "modelscope", "jingyaogong", "openai"
    attempts = 4  # in a row that bring nothing
    token = "HF_TOKEN (huggingface.co/settings/tokens)"

    def __init__(self):
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def list(self, repo: str, kind: str) -> list[RemoteFile]:
        from huggingface_hub import HfApi

        entries = HfApi(endpoint=self.endpoint).list_repo_tree(repo, recursive=True, repo_type=kind)
        return [
            RemoteFile(repo, kind, at.path, at.size, f"sha256:{at.lfs.sha256}" if at.lfs else f"git:{at.blob_id}")
            for at in entries
            if hasattr(at, "size")  # a folder has none
        ]

    def fetch(self, file: RemoteFile, target: Path) -> None:
        """Not by hf_hub_download, for which every run starts from nothing."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff
        from tqdm import tqdm

        partial, have = file.partial(target), size_of(file.partial(target))
        url = hf_hub_url(file.repo, file.path, repo_type=file.kind, endpoint=self.endpoint)
        headers = {"Accept-Encoding": "identity"}  # packed, Range would count other bytes
        headers = build_hf_headers(headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
        once = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "retry_on_exceptions": ()}  # `bring` tries again
        if have < file.size:
            with partial.open("ab") as out, http_stream_backoff("GET", url, headers=headers, **once) as response:
                hf_raise_for_status(response)
                if response.status_code == 200:  # from the first byte, whatever was asked for
                    out.truncate(0)
                begun = out.seek(0, os.SEEK_END)
                with tqdm(total=file.size, initial=begun, unit="B", unit_scale=True, desc=file.path) as bar:
                    for chunk in response.iter_bytes():
                        out.write(chunk)
                        bar.update(len(chunk))
        if size_of(partial) != file.size:
            raise Damaged(f"{size_of(partial)} bytes, expected {file.size}")
        partial.replace(file.whole(target))


class ModelScope:
    source, other, owner, clip_owner = "modelscope", "hf", "gongjy", "openai-mirror"
    attempts = 1  # its library makes several itself
    token = "MODELSCOPE_API_TOKEN (modelscope.cn/my/myaccesstoken)"

    def __init__(self):
        self.endpoint = (os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn").rstrip("/")

    def api(self):
        from modelscope_hub import HubApi, HubConfig  # what `modelscope` is built on: importing that imports torch

        logging.getLogger("modelscope_hub").setLevel(logging.WARNING)  # not every page of a listing
        return HubApi(HubConfig(endpoint=self.endpoint))

    def list(self, repo: str, kind: str) -> list[RemoteFile]:
        return [
            RemoteFile(repo, kind, at.path, at.size, f"sha256:{at.sha256}" if at.sha256 else "")
            for at in self.api().list_repo_files(repo, kind)
            if not at.is_dir
        ]

    def fetch(self, file: RemoteFile, target: Path) -> None:
        from modelscope_hub.errors import FileIntegrityError

        folder = file.staging(target)
        places = {"local_dir": folder, "cache_dir": folder}  # the latter gets its lock, else in the home folder
        try:
            self.api().download_file(file.repo, file.kind, file.path, **places, file_size=file.size)
        except FileIntegrityError as error:
            raise Damaged(str(error)) from error


Hub = HuggingFace | ModelScope


def choose_hub(source: str) -> Hub:
    """The hub of --source; for auto the first that answers. Raises Unreachable."""
    import requests

    hubs = [hub for hub in (HuggingFace(), ModelScope()) if source in ("auto", hub.source)]
    silent = []
    for hub in hubs:
        try:
            requests.head(hub.endpoint, timeout=PROBE_SECONDS)
            return hub
        except requests.RequestException as error:
            silent.append(f"{hub.endpoint} ({type(error).__name__})")
    other = f", or take the other hub: --source {hubs[0].other}" if len(hubs) == 1 else ""
    raise Unreachable(
        f"no answer from {' nor '.join(silent)}. Is there a network?\nBehind a proxy: export HTTPS_PROXY=http://host:port"
        f"\nA mirror of Hugging Face: export HF_ENDPOINT=https://hf-mirror.com{other}"
    )


def status_of(error: Exception) -> int | None:
    """The HTTP status that an exception of either library is about, if any."""
    return getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)


def failure(error: Exception, hub: Hub, what: str) -> Failed:
    status = status_of(error)
    other = f"The other hub may: --source {hub.other}"
    told = {
        401: f"wants a login for {what}, or does not have it. Accept the terms on its page if there are any, and "
        f"export {hub.token.replace(' ', '=... ', 1)}. {other}",
        404: f"has no {what}. {other}",
        429: f"wants fewer requests, also after several attempts at {what}. Wait some minutes, then type the same "
        f"command: it goes on where it was. More are allowed with {hub.token}",
    }
    told[403] = told[401]
    if status:
        return Failed(f"{hub.endpoint} {told.get(status, f'failed at {what}. {other}')} (HTTP {status})")
    cause = error.__cause__ or error
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    return Unreachable(
        f"the connection to {hub.endpoint} failed at {what}: {reason}. The same command goes on where it was. {other}"
    )


# ---------------------------------------------------------------------------- what to fetch


def in_words(files: list[RemoteFile]) -> str:
    names = sorted(file.path for file in files)
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "") or "nothing"


class Repository:
    """The files of one repository, to be picked by name, in whatever folder of it they are."""

    def __init__(self, hub: Hub, name: str, kind: str = "model", owner: str = ""):
        self.name = f"{owner or hub.owner}/{name}"
        try:
            files = hub.list(self.name, kind)
        except Exception as error:  # of either library, or of the HTTP client below it
            raise failure(error, hub, self.name) from error
        self.files = [file for file in files if ".." not in PurePosixPath(file.path).parts and file.path[0] != "/"]

    def find(self, *patterns: str) -> RemoteFile | None:
        """The file that fits the first pattern that any file fits. Raises Failed if several do."""
        for pattern in patterns:
            found = [file for file in self.files if fnmatch(PurePosixPath(file.path).name, pattern)]
            found = [file for file in found if file.path.count("/") == min(each.path.count("/") for each in found)]
            if len(found) > 1:
                raise Failed(f"{self.name} has several files {pattern}: {in_words(found)}. Take one by hand")
            if found:
                return found[0]
        return None

    def pick(self, *patterns: str) -> RemoteFile:
        if found := self.find(*patterns):
            return found
        raise Failed(f"{self.name} has no {' or '.join(patterns)}. It holds {in_words(self.files)}")


def weights_suffix(args) -> str:
    return f"{HIDDEN[args.size]}{'_moe' if args.use_moe else ''}"


def tokenizer(hub: Hub, args) -> dict[str, RemoteFile]:
    repo = Repository(hub, TRANSFORMERS_REPO[args.size])
    return {f"model/{name}": repo.pick(name) for name in ("tokenizer.json", "tokenizer_config.json")}


def clip(hub: Hub, args) -> dict[str, RemoteFile]:
    repo = Repository(hub, "clip-vit-base-patch16", owner=hub.clip_owner)
    weights = repo.pick("model.safetensors", "pytorch_model.bin")
    files = [repo.pick("config.json"), repo.pick("preprocessor_config.json"), weights]
    return {f"{CLIP_FOLDER}/{PurePosixPath(file.path).name}": file for file in files}


def llm(hub: Hub, args) -> dict[str, RemoteFile]:
    name = f"{weights_suffix(args)}.pth"
    repo = Repository(hub, "MiniMind2-V-PyTorch")
    return {f"out/llm_{name}": repo.pick(f"llm_{name}", f"lm_{name}"), **tokenizer(hub, args)}


def vlm(hub: Hub, args) -> dict[str, RemoteFile]:
    names = [f"{stage}_{weights_suffix(args)}.pth" for stage in ("pretrain_vlm", "sft_vlm")]
    repo = Repository(hub, "MiniMind2-V-PyTorch")
    repo.pick(*names)  # one at least
    return {f"out/{name}": file for name in names if (file := repo.find(name))} | tokenizer(hub, args)


def data(hub: Hub, args) -> dict[str, RemoteFile]:
    repo = Repository(hub, "minimind-v_dataset", "dataset")
    jsonl, parquet = {}, {}  # place: what it may be called
    for stage in ("pretrain", "sft"):
        jsonl[f"dataset/{stage}_data.jsonl"] = f"{stage}_data.jsonl", f"{stage}_vlm_data.jsonl"
        jsonl[f"dataset/{stage}_images.zip"] = (f"{stage}_images.zip",)
        parquet[f"dataset/{stage}_data.parquet"] = f"{stage}_i2t.parquet", f"{stage}*.parquet"
    chosen = args.data_format
    if chosen == "auto":  # as JSONL the same rows take less room
        chosen = "jsonl" if all(repo.find(*names) for names in jsonl.values()) else "parquet"
        print(f"{repo.name}: taking {chosen}")
    return {place: repo.pick(*names) for place, names in (jsonl if chosen == "jsonl" else parquet).items()}


TASKS: dict[str, Callable] = {"clip": clip, "llm": llm, "data": data, "vlm": vlm}  # --what → {place: file}


# ---------------------------------------------------------------------------- what is there


def digest(path: Path, method: str) -> str:
    """ "sha256:..." or "git:..." of a file."""
    sha = hashlib.sha256() if method == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        return f"{method}:{hashlib.file_digest(file, lambda: sha).hexdigest()}"


def is_whole(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    return not file.checksum or digest(path, file.checksum.split(":")[0]) == file.checksum


class Record:
    """root/.download.json: what was verified, so that it need not be hashed again, and what was asked for."""

    def __init__(self, root: Path):
        self.root, self.path, self.files, self.asked = root, root / ".download.json", {}, {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # without one everything is verified anew
            known = json.loads(self.path.read_text(encoding="utf-8"))
            self.files, self.asked = dict(known["files"]), dict(known["asked"])

    def save(self) -> None:
        write_json(self.path, {"files": self.files, "asked": self.asked})

    def note(self, place: str, checksum: str) -> None:
        status = (self.root / place).stat()
        self.files[place] = [checksum, status.st_size, status.st_mtime_ns]
        self.save()

    def checksum(self, place: str) -> str | None:
        """Of a file that is as it was when it was verified."""
        with suppress(KeyError, OSError):
            checksum, *stamp = self.files[place]
            status = (self.root / place).stat()
            return checksum if stamp == [status.st_size, status.st_mtime_ns] else None
        return None

    def has_all(self, keys: list[str]) -> bool:
        """Is all that was asked for under these keys still there?"""
        return all(self.checksum(place) is not None for key in keys for place in self.asked.get(key, [""]))


def missing_files(wanted: dict[str, RemoteFile], record: Record, overwrite: bool) -> dict[str, RemoteFile]:
    """What is still to be fetched. Raises Failed if something else stands in its place."""
    missing, foreign = {}, []
    for place, file in sorted(wanted.items(), key=lambda item: item[1].size):  # small mistakes show before large files
        path, known = record.root / place, record.checksum(place)
        if path.exists() and (known == file.checksum or is_whole(path, file)):
            record.note(place, file.checksum)
            continue
        missing[place] = file
        if path.exists() and known is None:  # else an earlier run fetched it, and there is a newer one
            foreign.append(f"{path} ({path.stat().st_size:,} bytes, expected {file.size:,})")
    if foreign and not overwrite:
        raise Failed(
            f"a file of yours would be replaced: {', '.join(foreign)}.\n"
            "Rename it and its .json, fetch elsewhere with --root DIR, or give it up with --overwrite"
        )
    return missing


# ---------------------------------------------------------------------------- fetching


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def in_units(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def check_space(root: Path, missing: dict[str, RemoteFile]) -> None:
    """Each folder may be on a disk of its own."""
    disks = {}
    for place, file in missing.items():
        folder = next(parent for parent in (root / place).absolute().parents if parent.exists())
        disk = disks.setdefault(folder.stat().st_dev, [folder, 0])
        disk[1] += file.size - max(size_of(file.partial(root / place)), size_of(file.whole(root / place)))
    for folder, needed in disks.values():
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise Failed(
                f"{in_units(needed)} are to be fetched, but {folder} has {in_units(free)} left. Make room, or fetch to "
                "another disk with --root DIR"
            )


def bring(hub: Hub, file: RemoteFile, target: Path) -> None:
    """All bytes of a file, not verified yet; goes on as long as each attempt brings some. Raises Damaged or Failed."""
    partial, fruitless = file.partial(target), 0
    partial.parent.mkdir(parents=True, exist_ok=True)
    while not file.whole(target).is_file():
        before = size_of(partial)
        try:
            hub.fetch(file, target)
        except Damaged:
            raise
        except Exception as error:  # of either library, or of the HTTP client below it
            for cause in (error, error.__cause__):
                if disk_full(cause) or getattr(cause, "errno", None) == errno.EFBIG:  # a file too large for the disk
                    raise Failed(
                        f"{target.parent} takes no more: {cause.strerror}. What is there stays: make room, and the "
                        "same command goes on where it was"
                    ) from error
            if isinstance(error, OSError) and error.filename:  # a folder that must not be written to
                raise
            if status_of(error) == 416:  # there are fewer bytes than the hub lists
                raise Damaged(str(error)) from error
            fruitless = 0 if size_of(partial) > before else fruitless + 1
            if status_of(error) or fruitless >= hub.attempts:
                raise failure(error, hub, f"{file.repo}/{file.path}") from error
            print(f"the connection broke at {in_units(size_of(partial))}: going on from there")
            time.sleep(2**fruitless - 1)


def clear(file: RemoteFile, target: Path) -> None:
    shutil.rmtree(file.staging(target))
    with suppress(OSError):  # another file has begun there
        file.staging(target).parent.rmdir()


def fetch(hub: Hub, file: RemoteFile, target: Path) -> None:
    """A verified file at its place. One that is not what the hub lists is fetched once more."""
    whole = file.whole(target)
    for _ in range(2):
        with suppress(Damaged):
            bring(hub, file, target)
            if is_whole(whole, file):
                break
        print(f"{file.path} came damaged")
        clear(file, target)
    else:
        raise Failed(
            f"{file.repo}/{file.path} came twice other than {hub.endpoint} lists it;\n"
            f"nothing was kept. A proxy that changes files? Try --source {hub.other}"
        )
    if target.name == "tokenizer.json" and digest(whole, "sha256") != f"sha256:{TOKENIZER_SHA256}":
        clear(file, target)
        raise Failed(
            f"{file.repo}/{file.path} is not the tokenizer of these weights (sha256 {TOKENIZER_SHA256[:8]}...) "
            f"and was not kept. Try --source {hub.other}"
        )
    if target.exists() and target.suffix == ".pth":  # --overwrite: what its JSON says is no longer so
        target.with_suffix(".json").unlink(missing_ok=True)
    if not file.checksum:
        print(f"{file.path}: {hub.endpoint} lists no checksum, its size alone was compared")
    whole.replace(target)
    clear(file, target)


# ---------------------------------------------------------------------------- what to type next


def next_commands(args, tasks: list[str]) -> list[list]:
    """What is possible with what is there now, of what was asked for; else the download that is missing."""
    root, name = args.root, f"{weights_suffix(args)}.pth"
    elsewhere = root.resolve() != Path.cwd()

    def there(*places):
        """The first of them that is there."""
        return next((root / place for place in places if (root / place).is_file()), None)

    eyes = there(f"{CLIP_FOLDER}/model.safetensors", f"{CLIP_FOLDER}/pytorch_model.bin")
    words = there("model/tokenizer.json")
    llm, pretrained, trained = (there(f"out/{stage}_{name}") for stage in ("llm", "pretrain_vlm", "sft_vlm"))
    rows = {key: there(f"dataset/{key}_data.jsonl", f"dataset/{key}_data.parquet") for key in ("pretrain", "sft")}
    large, moe = args.size != "26m", ["--use_moe"] if args.use_moe else []
    flags = [*(["--hidden_size", HIDDEN[args.size]] if large else []), *moe]
    if elsewhere:
        flags += ["--tokenizer_path", root / "model", "--vision_model_path", root / CLIP_FOLDER]
        flags += ["--out_dir", root / "out"]
    asks, trains, commands = "vlm" in tasks, "llm" in tasks or "data" in tasks, []
    if eyes and words and (trains or not asks):
        for stage, start in (("pretrain", llm), ("sft", pretrained)):
            if rows[stage] and (start or commands):
                own = ["--data_path", rows[stage]] if elsewhere else []
                commands.append(["python", f"train_{stage}_vlm.py", *flags, *own])
    if eyes and words and (asks or not trains) and (trained or pretrained):
        commands.append(["python", "eval_vlm.py", *([] if trained else ["--model_mode", 0]), *flags])
    if not commands:
        asked = {"vlm": words and (trained or pretrained)}
        needed = {"clip": eyes} | (asked if asks else {"llm": words and llm, "data": all(rows.values())})
        missing = [task for task, found in needed.items() if not found]
        more = [*(["--size", args.size] if large else []), *moe, *(["--root", root] if elsewhere else [])]
        commands.append(["python", "-m", "scripts.download", "--what", *missing, *more])
    return commands


# ---------------------------------------------------------------------------- all of it


def download(args) -> list[list[str]]:
    """Fetches what is missing, says what is there and what to type next, and returns the latter."""
    tasks = [task for task in TASKS if task in args.what or ("all" in args.what and task != "vlm")]
    keys = [f"{task} {args.size} {'moe' if args.use_moe else 'dense'} {args.data_format}" for task in tasks]
    record = Record(args.root)
    try:
        hub = choose_hub(args.source)
        print(f"from {hub.endpoint}")
        found = {key: TASKS[task](hub, args) for key, task in zip(keys, tasks)}
    except Unreachable as error:
        if not record.has_all(keys):
            raise
        print(f"{error}\nBut all of it is here already, as it was when it was verified.")
    else:
        wanted = {place: file for group in found.values() for place, file in group.items()}
        missing = missing_files(wanted, record, args.overwrite)
        check_space(args.root, missing)
        for place, file in missing.items():
            begun = size_of(file.partial(args.root / place))
            note = f", {in_units(begun)} there" if begun else ""
            print(f"  {in_units(file.size):>8}  {file.repo}/{file.path}{note}")
        print(f"{in_units(sum(file.size for file in missing.values()))} to fetch", flush=True)
        for place, file in missing.items():
            fetch(hub, file, args.root / place)
            record.note(place, file.checksum)
        record.asked |= {key: list(group) for key, group in found.items()}
        record.save()

    print("\nVerified and in place:")
    for place in sorted({place for key in keys for place in record.asked[key]}):
        print(f"  {in_units(size_of(args.root / place)):>8}  {args.root / place}")
    commands = [list(map(str, command)) for command in next_commands(args, tasks)]
    print("\nNext:")
    for command in commands:
        print(typed(command))
    return commands


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    parts = {"nargs": "+", "choices": [*TASKS, "all"], "default": ["all"], "metavar": "PART"}
    add("--what", **parts, help="clip, llm, vlm, data; all: clip llm data")
    add("--size", choices=list(HIDDEN), default="26m", help="of the model: 26m (hidden 512) or 104m (768)")
    add("--source", choices=["auto", "hf", "modelscope"], default="auto", help="auto: the first that answers")
    add = parser.group("what, and where to").add_argument
    add("--use_moe", **SWITCH, help="weights with a mixture of experts")
    formats = ["auto", "jsonl", "parquet"]
    add("--data_format", choices=formats, default="auto", help="auto: jsonl if there, as it is smaller")
    add("--root", type=Path, default=Path(), metavar="DIR", help="gets model/, out/, dataset/")
    add("--overwrite", action="store_true", help="replace files that are there but differ")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        return download(args)
    except (Failed, OSError) as error:
        raise SystemExit(f"\nerror: {error}") from None


if __name__ == "__main__":
    main()

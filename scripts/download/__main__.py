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

if __spec__ is None or __spec__.name == "__main__":  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.download instead of scripts/download")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import errno
import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from common.cli import SWITCH, Parser, disk_full
from common.display import typed
from common.files import write_json
from model.files import read_json
from scripts.download.hubs import Damaged, Failed, Hub, RemoteFile, Unreachable, choose_hub, failure, size_of, status_of

CLIP_FOLDER = "model/vision_model/clip-vit-base-patch16"
HIDDEN = {"26m": 512, "104m": 768}
TRANSFORMERS_REPO = {"26m": "MiniMind2-Small-V", "104m": "MiniMind2-V"}  # they hold the tokenizer
TOKENIZER_SHA256 = "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"

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
            matches = [file for file in self.files if fnmatch(PurePosixPath(file.path).name, pattern)]
            depth = min((file.path.count("/") for file in matches), default=0)
            matches = [file for file in matches if file.path.count("/") == depth]
            if len(matches) > 1:
                raise Failed(f"{self.name} has several files {pattern}: {in_words(matches)}. Take one by hand")
            if matches:
                return matches[0]
        return None

    def pick(self, *patterns: str) -> RemoteFile:
        if file := self.find(*patterns):
            return file
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


def stamp_of(path: Path) -> list[int] | None:
    """Size and time of a file, None if it is not there."""
    with suppress(OSError):
        return [path.stat().st_size, path.stat().st_mtime_ns]


class Record:
    """root/.download.json: what was verified, so that it need not be hashed again, and what was asked for."""

    def __init__(self, root: Path):
        self.root, self.path, self.files, self.asked = root, root / ".download.json", {}, {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # without one everything is verified anew
            known = read_json(self.path)
            self.files, self.asked = dict(known["files"]), dict(known["asked"])

    def save(self) -> None:
        write_json(self.path, {"files": self.files, "asked": self.asked})

    def note(self, place: str, checksum: str) -> None:
        self.files[place] = [checksum, *stamp_of(self.root / place)]
        self.save()

    def checksum(self, place: str) -> str | None:
        """Of a file that is as it was when it was verified."""
        checksum, *stamp = self.files.get(place, [None])
        return checksum if stamp == stamp_of(self.root / place) else None

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
        hint = "Rename it and its .json, fetch elsewhere with --root DIR, or give it up with --overwrite"
        raise Failed(f"a file of yours would be replaced: {', '.join(foreign)}.\n{hint}")
    return missing


# ---------------------------------------------------------------------------- fetching


def in_units(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def check_space(root: Path, missing: dict[str, RemoteFile]) -> None:
    """Raises Failed if a disk has no room for its files; each folder may be on another."""
    disks = {}
    for place, file in missing.items():
        folder = next(parent for parent in (root / place).absolute().parents if parent.exists())
        disk = disks.setdefault(folder.stat().st_dev, [folder, 0])
        disk[1] += file.size - max(size_of(file.partial(root / place)), size_of(file.whole(root / place)))
    for folder, needed in disks.values():
        free = shutil.disk_usage(folder).free
        if free < needed:
            room = f"{in_units(needed)} are to be fetched, but {folder} has {in_units(free)} left"
            raise Failed(f"{room}. Make room, or fetch to another disk with --root DIR")


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
                    why = f"{target.parent} takes no more: {cause.strerror}"
                    raise Failed(f"{why}. Make room, and the same command goes on where it was") from error
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
    whole, name = file.whole(target), f"{file.repo}/{file.path}"
    for _ in range(2):
        with suppress(Damaged):
            bring(hub, file, target)
            if is_whole(whole, file):
                break
        print(f"{file.path} came damaged")
        clear(file, target)
    else:
        hint = f"A proxy that changes files? Try --source {hub.other}"
        raise Failed(f"{name} came twice other than {hub.endpoint} lists it;\nnothing was kept. {hint}")
    if target.name == "tokenizer.json" and digest(whole, "sha256") != f"sha256:{TOKENIZER_SHA256}":
        clear(file, target)
        wrong = f"is not the tokenizer of these weights (sha256 {TOKENIZER_SHA256[:8]}...) and was not kept"
        raise Failed(f"{name} {wrong}. Try --source {hub.other}")
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

    def first(*places):
        """The first of them that is there."""
        return next((root / place for place in places if (root / place).is_file()), None)

    encoder = first(f"{CLIP_FOLDER}/model.safetensors", f"{CLIP_FOLDER}/pytorch_model.bin")
    words = first("model/tokenizer.json")
    llm, pretrained, trained = (first(f"out/{stage}_{name}") for stage in ("llm", "pretrain_vlm", "sft_vlm"))
    rows = {key: first(f"dataset/{key}_data.jsonl", f"dataset/{key}_data.parquet") for key in ("pretrain", "sft")}
    large, moe = args.size != "26m", ["--use_moe"] if args.use_moe else []
    flags = [*(["--hidden_size", HIDDEN[args.size]] if large else []), *moe]
    if elsewhere:
        flags += ["--tokenizer_path", root / "model", "--vision_model_path", root / CLIP_FOLDER]
        flags += ["--out_dir", root / "out"]
    asks, trains, commands = "vlm" in tasks, "llm" in tasks or "data" in tasks, []
    if encoder and words and (trains or not asks):
        for stage, start in (("pretrain", llm), ("sft", pretrained)):
            if rows[stage] and (start or commands):
                data_flags = ["--data_path", rows[stage]] if elsewhere else []
                commands.append(["python", f"train_{stage}_vlm.py", *flags, *data_flags])
    if encoder and words and (asks or not trains) and (trained or pretrained):
        commands.append(["python", "eval_vlm.py", *([] if trained else ["--model_mode", 0]), *flags])
    if not commands:
        ready = {"vlm": words and (trained or pretrained)}
        ready = {"clip": encoder} | (ready if asks else {"llm": words and llm, "data": all(rows.values())})
        missing = [task for task, there in ready.items() if not there]
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
        groups = {key: TASKS[task](hub, args) for key, task in zip(keys, tasks)}
    except Unreachable as error:
        if not record.has_all(keys):
            raise
        print(f"{error}\nBut all of it is here already, as it was when it was verified.")
    else:
        wanted = {place: file for group in groups.values() for place, file in group.items()}
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
        record.asked |= {key: list(group) for key, group in groups.items()}
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

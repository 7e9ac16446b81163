"""Download what a task needs to where the scripts look for it, from Hugging Face or ModelScope.

    python -m scripts.download                                    # CLIP, LLM and data for both trainings
    python -m scripts.download --what clip vlm                    # or a trained model to ask
    python -m scripts.download --source modelscope --size 104m
    python -m scripts.download --generation 3v                    # minimind-3v (2026) instead of MiniMind2-V (2025)
    python -m scripts.download --what encoder --encoder siglip2   # another encoder, for a model of your own
    HF_ENDPOINT=https://hf-mirror.com python -m scripts.download  # a mirror; tokens and proxies as usual

    encoder model/vision_model/clip-vit-base-patch16/, or the folder of another;
            clip is its older name
    llm     out/llm_{hidden}{_moe}.pth, and its tokenizer in model/,
            that of generation 3v in model/minimind-3v/
    vlm     out/{pretrain,sft}_vlm_{hidden}{_moe}.pth, and their tokenizer
    data    dataset/{pretrain,sft}_data.jsonl with {pretrain,sft}_images.zip,
            or dataset/{pretrain,sft}_data.parquet

Run the same command again to resume. Every file is verified by its checksum before it is moved into place;
.download.json records the verified files, so a second run downloads nothing. Your own files are never overwritten
unless you pass --overwrite.
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.download instead of scripts/download")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import errno
import hashlib
import shutil
import time
from contextlib import suppress
from pathlib import Path

from common.cli import SWITCH, Parser, disk_full
from common.display import typed
from common.files import write_json
from model.files import read_json
from scripts.download.hubs import Damaged, Failed, Hub, RemoteFile, Unreachable, choose_hub, failure, size_of, status_of
from scripts.download.tasks import ENCODERS, MODELS, TASKS, TOKENIZERS, encoder_folder, weights_suffix

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
    """Returns size and time of a file, or None if it does not exist."""
    with suppress(OSError):
        return [path.stat().st_size, path.stat().st_mtime_ns]


class Record:
    """root/.download.json: the verified files, which need not be hashed again, and what was asked for."""

    def __init__(self, root: Path):
        self.root, self.path, self.files, self.asked = root, root / ".download.json", {}, {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # without it everything is verified again
            known = read_json(self.path)
            self.files, self.asked = dict(known["files"]), dict(known["asked"])

    def save(self) -> None:
        write_json(self.path, {"files": self.files, "asked": self.asked})

    def note(self, place: str, checksum: str) -> None:
        self.files[place] = [checksum, *stamp_of(self.root / place)]
        self.save()

    def checksum(self, place: str) -> str | None:
        """Returns the checksum of a file that has not changed since it was verified, else None."""
        checksum, *stamp = self.files.get(place, [None])
        return checksum if stamp == stamp_of(self.root / place) else None

    def weights_of_others(self, model: str) -> set[str]:
        """Returns the places of weights that were asked for as another model: 104m and 3v share their file names."""
        asked = [places for key, places in self.asked.items() if f" {model} " not in key]
        return {place for places in asked for place in places if place.endswith(".pth")}

    def ask(self, groups: dict[str, list[str]], model: str) -> None:
        """Records what was asked for, and drops requests for another model whose weights this one has replaced."""
        ours = {place for places in groups.values() for place in places} & self.weights_of_others(model)
        kept = {key: places for key, places in self.asked.items() if f" {model} " in key or not ours & set(places)}
        self.asked = kept | groups
        self.save()

    def has_all(self, keys: list[str]) -> bool:
        """Whether everything that was asked for under these keys is still there."""
        return all(self.checksum(place) is not None for key in keys for place in self.asked.get(key, [""]))


def missing_files(wanted: dict[str, RemoteFile], record: Record, overwrite: bool, model: str) -> dict[str, RemoteFile]:
    """Returns the files to download. Raises Failed if another file is in the way: one of yours, or weights of another
    model with the same name."""
    missing, foreign, others = {}, [], record.weights_of_others(model)
    for place, file in sorted(wanted.items(), key=lambda item: item[1].size):  # small files first: errors show early
        path, known = record.root / place, record.checksum(place)
        if path.exists() and (known == file.checksum or is_whole(path, file)):
            record.note(place, file.checksum)
            continue
        missing[place] = file
        if path.exists() and (known is None or place in others):  # else it is an older version from an earlier run
            foreign.append(f"{path} ({path.stat().st_size:,} bytes, expected {file.size:,})")
    if foreign and not overwrite:
        hint = "Rename it and its .json, download elsewhere with --root DIR, or replace it with --overwrite"
        raise Failed(f"a file of yours would be replaced: {', '.join(foreign)}.\n{hint}")
    return missing


# ---------------------------------------------------------------------------- downloading


def in_units(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def check_space(root: Path, missing: dict[str, RemoteFile]) -> None:
    """Raises Failed if a disk has no room for its files; each folder may be on another disk."""
    disks = {}
    for place, file in missing.items():
        folder = next(parent for parent in (root / place).absolute().parents if parent.exists())
        disk = disks.setdefault(folder.stat().st_dev, [folder, 0])
        disk[1] += file.size - max(size_of(file.partial(root / place)), size_of(file.whole(root / place)))
    for folder, needed in disks.values():
        free = shutil.disk_usage(folder).free
        if free < needed:
            room = f"{in_units(needed)} are to be downloaded, but {folder} has {in_units(free)} left"
            raise Failed(f"{room}. Make room, or download to another disk with --root DIR")


def bring(hub: Hub, file: RemoteFile, target: Path) -> None:
    """Downloads all bytes of a file without verifying them; retries as long as there is progress. Raises Damaged or
    Failed."""
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
                    why = f"cannot write more to {target.parent}: {cause.strerror}"
                    raise Failed(f"{why}. Make room, and run the same command again to resume") from error
            if isinstance(error, OSError) and error.filename:  # a folder that is not writable
                raise
            if status_of(error) == 416:  # the file has fewer bytes than the hub lists
                raise Damaged(str(error)) from error
            fruitless = 0 if size_of(partial) > before else fruitless + 1
            if status_of(error) or fruitless >= hub.attempts:
                raise failure(error, hub, f"{file.repo}/{file.path}", file.kind) from error
            print(f"the connection broke at {in_units(size_of(partial))}: resuming")
            time.sleep(2**fruitless - 1)


def clear(file: RemoteFile, target: Path) -> None:
    shutil.rmtree(file.staging(target))
    with suppress(OSError):  # another file has begun there
        file.staging(target).parent.rmdir()


def fetch(hub: Hub, file: RemoteFile, target: Path, sha256: str | None) -> None:
    """Downloads a file, verifies it and moves it to its place. Retries once if it differs from what the hub lists.

    sha256: of the tokenizer that belongs there, or None. Raises Failed.
    """
    whole, name = file.whole(target), f"{file.repo}/{file.path}"
    for _ in range(2):
        with suppress(Damaged):
            bring(hub, file, target)
            if is_whole(whole, file):
                break
        print(f"{file.path} arrived damaged")
        clear(file, target)
    else:
        hint = f"A proxy may have changed it. Try --source {hub.other}"
        raise Failed(f"{name} differs twice from what {hub.endpoint} lists;\nit was deleted. {hint}")
    if sha256 and digest(whole, "sha256") != f"sha256:{sha256}":
        clear(file, target)
        wrong = f"is not the tokenizer of these weights (sha256 {sha256[:8]}...) and was deleted"
        raise Failed(f"{name} {wrong}. Try --source {hub.other}")
    if target.exists() and target.suffix == ".pth":  # --overwrite: its JSON is about the old file
        target.with_suffix(".json").unlink(missing_ok=True)
    if not file.checksum:
        print(f"{file.path}: {hub.endpoint} lists no checksum, so only the size was compared")
    whole.replace(target)
    clear(file, target)


# ---------------------------------------------------------------------------- the next commands


def next_commands(args, tasks: list[str]) -> list[list]:
    """Returns the commands that are possible now, among what was asked for; else the download that is missing."""
    root, name, model = args.root, f"{weights_suffix(args)}.pth", MODELS[args.model]
    elsewhere, later, chosen = root.resolve() != Path.cwd(), args.model == "3v", args.encoder is not None

    def first(*places):
        """Returns the first of these files that exists."""
        return next((root / place for place in places if (root / place).is_file()), None)

    def rows_of(stage, *kinds):
        return first(*(f"dataset/{stage}_data.{kind}" for kind in kinds))

    def train(stage):
        flag = ["--data_path", rows[stage] or root / f"dataset/{stage}_data"]
        needed = elsewhere or rows[stage] != rows_of(stage, "jsonl", "parquet")  # its default
        return ["python", f"train_{stage}_vlm.py", *flags, *(flag if needed else [])]

    eyes = encoder_folder(args)
    encoder = first(f"{eyes}/model.safetensors", f"{eyes}/pytorch_model.bin")
    words = first(f"{model.words}/tokenizer.json")
    llm, pretrained, trained = (first(f"out/{stage}_{name}") for stage in ("llm", "pretrain_vlm", "sft_vlm"))
    kinds = ["parquet", "jsonl"] if later and args.data_format != "jsonl" else ["jsonl", "parquet"]
    rows = {stage: rows_of(stage, *kinds) for stage in ("pretrain", "sft")}
    large, moe = args.model != "26m", ["--use_moe"] if args.use_moe else []
    parts = ["--tokenizer_path", root / model.words] if elsewhere else []
    parts += ["--vision_model_path", root / eyes] if elsewhere or chosen else []
    flags = [*(["--hidden_size", model.hidden] if large else []), *moe, *parts]
    flags += ["--out_dir", root / "out"] if elsewhere else []
    asks, trains, commands = "vlm" in tasks, chosen or "llm" in tasks or "data" in tasks, []
    if encoder and words and (trains or not asks):
        for stage, start in (("pretrain", llm), ("sft", None if chosen else pretrained)):  # it has another encoder
            if rows[stage] and (start or commands):
                commands.append(train(stage))
    if encoder and words and (asks or not trains) and (trained or pretrained):
        which = [*([] if trained else ["--model_mode", 0]), *flags]
        if later:  # other weights may have the same width and be newer
            which = ["--weights", trained or pretrained, *parts]
        commands.append(["python", "eval_vlm.py", *which])
    if not commands:
        ready = {"vlm": words and (trained or pretrained)}
        ready = ready if asks else {"llm": words and llm, "data": all(rows.values())}
        ready = {"encoder" if later else "clip": encoder} | ready
        missing = [task for task, there in ready.items() if not there]
        more = ["--generation", "3v"] if later else ["--size", args.model] if large else []
        more += [*moe, *(["--root", root] if elsewhere else [])]
        commands.append(["python", "-m", "scripts.download", "--what", *missing, *more])
        if chosen:
            commands.append(train("pretrain"))
    return commands


# ---------------------------------------------------------------------------- all of it


def download(args) -> list[list[str]]:
    """Downloads what is missing; prints what is there and the next commands, and returns the latter."""
    tasks = [task for task in TASKS if task in args.what or ("all" in args.what and task != "vlm")]
    models = [args.encoder if task == "clip" and args.encoder else args.model for task in tasks]
    what = f"{'moe' if args.use_moe else 'dense'} {args.data_format}"
    keys, record = [f"{task} {model} {what}" for task, model in zip(tasks, models)], Record(args.root)
    try:
        hub = choose_hub(args.source)
        print(f"from {hub.endpoint}")
        groups = {key: TASKS[task](hub, args) for key, task in zip(keys, tasks)}
    except Unreachable as error:
        if not record.has_all(keys):
            raise
        print(f"{error}\nAll files are here already, unchanged since they were verified.")
    else:
        wanted = {place: file for group in groups.values() for place, file in group.items()}
        missing = missing_files(wanted, record, args.overwrite, args.model)
        check_space(args.root, missing)
        for place, file in missing.items():
            begun = size_of(file.partial(args.root / place))
            note = f", {in_units(begun)} already here" if begun else ""
            print(f"  {in_units(file.size):>8}  {file.repo}/{file.path}{note}")
        print(f"{in_units(sum(file.size for file in missing.values()))} to download", flush=True)
        for place, file in missing.items():
            fetch(hub, file, args.root / place, TOKENIZERS.get(place))
            record.note(place, file.checksum)
        record.ask({key: list(group) for key, group in groups.items()}, args.model)

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
    parts = {"nargs": "+", "choices": ["encoder", *TASKS, "all"], "default": ["all"], "metavar": "PART"}
    add("--what", **parts, help="encoder, llm, vlm, data; all: encoder llm data")
    add("--generation", choices=["2", "3v"], default="2", help="MiniMind2-V (2025), or minimind-3v (2026)")
    sizes = "of generation 2: 26m (hidden 512) or 104m (768); default: 26m"
    add("--size", choices=[name for name in MODELS if name != "3v"], help=sizes)
    add("--encoder", choices=list(ENCODERS), help="for a model of your own; default: the generation's")
    add("--source", choices=["auto", "hf", "modelscope"], default="auto", help="auto: the first hub that answers")
    add = parser.group("what, and where to").add_argument
    add("--use_moe", **SWITCH, help="weights with a mixture of experts")
    formats = ["auto", "jsonl", "parquet"]
    add(
        "--data_format",
        choices=formats,
        default="auto",
        help="auto: jsonl, which is smaller, for generation 2, if there",
    )
    add("--root", type=Path, default=Path(), metavar="DIR", help="folder for model/, out/ and dataset/")
    add("--overwrite", action="store_true", help="replace existing files that differ")
    args = parser.parse_args(argv)
    args.what = ["clip" if part == "encoder" else part for part in args.what]
    args.model = "3v" if args.generation == "3v" else args.size or "26m"
    if args.generation == "3v" and (args.size or args.encoder):
        parser.error("--generation 3v has one size and one encoder: leave --size and --encoder out")
    if args.encoder and ("vlm" in args.what or not {"clip", "all"} & set(args.what)):
        parser.error("--encoder is for a model of your own; trained models have theirs. Use it with --what encoder")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        return download(args)
    except (Failed, OSError) as error:
        raise SystemExit(f"\nerror: {error}") from None


if __name__ == "__main__":
    main()

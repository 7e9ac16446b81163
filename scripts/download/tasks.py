"""What can be downloaded: which files of which repositories, and where each belongs."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from model.generations import LATER_TOKENIZER, MINIMIND_2, MINIMIND_3, PUBLIC_TOKENIZER, Generation
from scripts.download.hubs import Failed, Hub, RemoteFile, Unreachable, failure


@dataclass(frozen=True)
class Public:
    """A public model and the repositories of its parts, named as on Hugging Face."""

    hidden: int
    weights: str
    texts: tuple[str, ...]  # repositories with its tokenizer; the first that has it is used
    encoder: str
    generation: Generation

    @property
    def words(self) -> PurePosixPath:
        """The folder of its tokenizer."""
        return PurePosixPath(self.generation.tokenizer)

    @property
    def eyes(self) -> PurePosixPath:
        """The folder of its encoder."""
        return PurePosixPath(self.generation.vision_model)


CLIP, HUB_2, HUB_3 = "openai/clip-vit-base-patch16", "jingyaogong/MiniMind2", "jingyaogong/minimind-3v"
MODELS = {  # --size, or of --generation 3v the only one
    "26m": Public(512, f"{HUB_2}-V-PyTorch", (f"{HUB_2}-Small-V",), CLIP, MINIMIND_2),
    "104m": Public(768, f"{HUB_2}-V-PyTorch", (f"{HUB_2}-V",), CLIP, MINIMIND_2),
    "3v": Public(768, f"{HUB_3}-pytorch", (HUB_3, f"{HUB_3}-moe"), "jingyaogong/siglip2-base-p32-256-ve", MINIMIND_3),
}
ENCODERS = {  # --encoder: public ones of base size
    "clip": CLIP,
    "siglip": "google/siglip-base-patch16-224",
    "siglip2": "google/siglip2-base-patch16-224",
    "dinov2": "facebook/dinov2-base",
    "dinov2_registers": "facebook/dinov2-with-registers-base",
    "dinov3": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "vit": "google/vit-base-patch16-224",
}
TOKENIZERS = {  # sha256 of the tokenizer that belongs at a place
    f"{MODELS['26m'].words}/tokenizer.json": PUBLIC_TOKENIZER,
    f"{MODELS['3v'].words}/tokenizer.json": LATER_TOKENIZER,
}


def in_words(files: list[RemoteFile]) -> str:
    names = sorted(file.path for file in files)
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "") or "nothing"


class Repository:
    """The files of one repository, to be picked by name, whatever folder they are in."""

    def __init__(self, hub: Hub, name: str, kind: str = "model"):
        owner, _, name = name.partition("/")
        self.name = f"{hub.owners.get(owner, owner)}/{name}"
        try:
            files = hub.list(self.name, kind)
        except Exception as error:  # of either library, or of the HTTP client below it
            raise failure(error, hub, self.name, kind) from error
        self.files = [file for file in files if ".." not in PurePosixPath(file.path).parts and file.path[0] != "/"]

    def find(self, *patterns: str) -> RemoteFile | None:
        """Returns the file that matches the first pattern with a match, or None. Raises Failed if several match."""
        for pattern in patterns:
            matches = [file for file in self.files if fnmatch(PurePosixPath(file.path).name, pattern)]
            depth = min((file.path.count("/") for file in matches), default=0)
            matches = [file for file in matches if file.path.count("/") == depth]
            if len(matches) > 1:
                raise Failed(f"{self.name} has several files {pattern}: {in_words(matches)}. Download one by hand")
            if matches:
                return matches[0]
        return None

    def pick(self, *patterns: str) -> RemoteFile:
        """Like `find`, but raises Failed if no file matches."""
        if file := self.find(*patterns):
            return file
        raise Failed(f"{self.name} has no {' or '.join(patterns)}. It contains {in_words(self.files)}")


def weights_suffix(args) -> str:
    return f"{MODELS[args.model].hidden}{'_moe' if args.use_moe else ''}"


def encoder_folder(args) -> PurePosixPath:
    """Returns the folder of the encoder: the model's, or with --encoder one next to it, named after its repository."""
    usual = MODELS[args.model].eyes
    return usual.with_name(PurePosixPath(ENCODERS[args.encoder]).name) if args.encoder else usual


def loosely(name: str) -> str:
    """Returns a pattern that also matches with a prefix, and with other characters between the words of a name."""
    return "*" + name.replace("_", "?")


def tokenizer(hub: Hub, args) -> dict[str, RemoteFile]:
    model, failures = MODELS[args.model], []
    for source in model.texts:
        try:
            repo = Repository(hub, source)
            return {f"{model.words}/{name}": repo.pick(name) for name in ("tokenizer.json", "tokenizer_config.json")}
        except Unreachable:
            raise
        except Failed as error:
            failures.append(error)
    raise failures[0]


def encoder(hub: Hub, args) -> dict[str, RemoteFile]:
    repo = Repository(hub, ENCODERS[args.encoder] if args.encoder else MODELS[args.model].encoder)
    weights = repo.pick("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.bin")
    name = "model.safetensors" if weights.path.endswith(".safetensors") else "pytorch_model.bin"
    files = {name: weights} | {name: repo.pick(name) for name in ("config.json", "preprocessor_config.json")}
    return {f"{encoder_folder(args)}/{name}": file for name, file in files.items()}


def llm(hub: Hub, args) -> dict[str, RemoteFile]:
    name = f"llm_{weights_suffix(args)}.pth"
    repo = Repository(hub, MODELS[args.model].weights)
    if args.model == "3v" and args.use_moe and not repo.find(name, loosely(name)):
        raise Failed(
            f"{repo.name} has no {name}. Training makes experts of the dense weights: leave --use_moe out here, then\n"
            "python train_pretrain_vlm.py --use_moe --from_weight out/llm_768.pth"
        )
    return {f"out/{name}": repo.pick(name, name[1:], loosely(name))} | tokenizer(hub, args)


def vlm(hub: Hub, args) -> dict[str, RemoteFile]:
    names = [f"{stage}_{weights_suffix(args)}.pth" for stage in ("pretrain_vlm", "sft_vlm")]
    repo = Repository(hub, MODELS[args.model].weights)
    repo.pick(*names, *map(loosely, names))  # raises Failed if there is neither
    weights = {f"out/{name}": repo.find(name, loosely(name)) for name in names}
    return {place: file for place, file in weights.items() if file} | tokenizer(hub, args)


def data(hub: Hub, args) -> dict[str, RemoteFile]:
    repo = Repository(hub, "jingyaogong/minimind-v_dataset", "dataset")
    jsonl, parquet = {}, {}  # place: possible file names
    for stage in ("pretrain", "sft"):
        jsonl[f"dataset/{stage}_data.jsonl"] = f"{stage}_data.jsonl", f"{stage}_vlm_data.jsonl"
        jsonl[f"dataset/{stage}_images.zip"] = (f"{stage}_images.zip",)
        parquet[f"dataset/{stage}_data.parquet"] = f"{stage}_i2t.parquet", f"{stage}*.parquet"
    chosen = args.data_format
    if chosen == "auto":  # the rows of the older generation are smaller as JSONL
        older = args.model != "3v" and all(repo.find(*names) for names in jsonl.values())
        chosen = "jsonl" if older else "parquet"
        print(f"{repo.name}: using {chosen}")
    return {place: repo.pick(*names) for place, names in (jsonl if chosen == "jsonl" else parquet).items()}


TASKS: dict[str, Callable] = {"clip": encoder, "llm": llm, "data": data, "vlm": vlm}  # --what → {place: file}

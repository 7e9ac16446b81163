"""Finds and loads the model to ask: weights or an exported folder, and what their JSON says about them."""

import re
from contextlib import suppress
from pathlib import Path

from model.build import build_model
from model.files import read_json
from model.llava import unpacked
from model.weights import SIDECAR, STAGES, read_sidecar

PROMPTS = {  # for weights whose JSON names no questions
    "en": "Describe this picture.",
    "zh": "描述这张图片。",
    "en several": "Compare these pictures.",
    "zh several": "比较这些图片。",
}


def export_of(path: Path) -> str:
    """Returns the kind of an exported folder, "minimind-v" or "llava", even if Transformers saved it again; else ""."""
    with suppress(OSError, ValueError):
        config = read_json(path / "config.json")
        kind = config.get("model_type")
        # Other LLaVAs are not MiniMind, and a training checkpoint without a tokenizer cannot be asked.
        ours = config.get("projector_hidden_act") == "linear" and (path / "tokenizer.json").is_file()
        if kind == "minimind-v" or kind == "llava" and ours:
            return kind
    return ""


def list_models(out_dir) -> list[Path]:
    """Returns the weights and exported folders that can be asked, in `out_dir` and its subfolders, newest first."""
    below = [path for pattern in ("[!.]*", "[!.]*/[!.]*") for path in Path(out_dir).glob(pattern)]  # .*: being written
    name = re.compile(rf"({'|'.join(STAGES.values())})_\d+(_moe)?\.pth")
    paths = [path for path in below if name.fullmatch(path.name) or export_of(path)]
    return sorted(paths, key=lambda path: (-path.stat().st_mtime, path))


def find_models(args) -> list[Path]:
    """Returns the models that fit --weights, --load, --model_mode, --hidden_size and --use_moe, newest first: a model
    that was just trained needs no flag. Raises FileNotFoundError if there is none, ValueError for --weights none.
    """
    modes = (1, 3) if args.model_mode is None else (args.model_mode,)
    names = [args.weights] if args.weights else [STAGES[mode] for mode in modes]
    name, path = names[0], Path(args.weights or "MiniMind2-V")
    if name == "none":
        raise ValueError("--weights none: an untrained model cannot answer. Give a .pth file")
    if args.weights and name not in STAGES.values():
        if not path.exists():
            raise FileNotFoundError(f"--weights {path}: no such file or folder")
        if (path.is_dir() or args.load == 1) and not (path / "config.json").is_file():
            what = f"For the .pth files in it: --out_dir {path}" if path.is_dir() else "Leave --load 1 out"
            raise FileNotFoundError(f"--weights {path} is no Transformers folder: it has no config.json\n{what}")
        return [path]
    there = list_models(args.out_dir)
    if args.load == 1:
        wanted = "Transformers folder"
        paths = [path] if export_of(path) else [path for path in there if path.is_dir()]
    else:
        width, moe = args.hidden_size or r"\d+", "_moe" if args.use_moe else "(_moe)?"
        wanted = f"{name}_{args.hidden_size or '*'}{'_moe' * args.use_moe}.pth"
        paths = [path for path in there if re.fullmatch(rf"({'|'.join(names)})_{width}{moe}\.pth", path.name)]
    where = f"no {wanted} in {Path(args.out_dir)} or its subfolders"
    if not paths and there:
        raise FileNotFoundError(f"{where}. Choose another, for example\n--weights {there[0]}")
    if not paths:
        commands = "python -m scripts.quickstart; or python -m scripts.download --what clip vlm"
        raise FileNotFoundError(f"{where}. Train or download one:\n{commands}")
    return paths


def choose_model(args) -> Path:
    """Returns the first of `find_models`; prints how to choose another one."""
    paths = find_models(args)
    if len(paths) > 1:
        print(f"the newest of {len(paths)} models that fit; to choose another: --weights {paths[1]}")
    return paths[0]


def load_model(args):
    """Returns the model in eval mode, its tokenizer and the path of the weights."""
    path = choose_model(args)
    with unpacked(path) as source:
        model, tokenizer, origin = build_model(args, source)
    print(origin.note.replace(str(source), str(path)))
    return model.eval(), tokenizer, path


def known_of(weights: Path) -> dict:
    """Returns the JSON of weights, a file or an exported folder; see `read_sidecar`."""
    return read_sidecar(weights / SIDECAR if weights.is_dir() else weights)


def prompts_of(weights: Path, language: str = "en", several: bool = False) -> list[str]:
    """Returns questions from the training of the weights, the best one first; if there are none in this language, those
    in the other one. several: questions about several pictures.
    """
    known = known_of(weights)["prompts"]
    key, other = (each + " several" * several for each in (language, {"en": "zh", "zh": "en"}[language]))
    return known.get(key) or known.get(other) or [PROMPTS[key]]


def needs_picture(weights: Path) -> bool:
    """Whether the model was never trained without a picture; False if the JSON does not say."""
    return known_of(weights).get("rows_without_picture") == 0


def pictures_first(weights: Path) -> bool:
    """Whether the training rows had their single picture before the question."""
    return bool(known_of(weights).get("pictures_first"))

"""Export a trained model to a folder that other programs load, and back.

    python -m scripts.convert_vlm --to llava                # for Transformers, vLLM, lmms-eval, ...
    python -m scripts.convert_vlm --to transformers         # our code inside (trust_remote_code)
    python -m scripts.convert_vlm --to llm                  # only its language model, or an llm_*.pth: for text
    python -m scripts.convert_vlm --to pth --weights out/sft_vlm_512_llava  # back, from any of these folders
    python -m scripts.convert_vlm --to web                  # a page that answers in any browser, offline
    python -m scripts.convert_vlm --to llava --push YOU/NAME                # upload to huggingface.co
    python -m scripts.convert_vlm --to llava --versions 4.57.6 5.0.0        # check with these versions too

--to llava makes a stock LLaVA, whose text half is a Llama or, with experts, a GraniteMoeShared: it runs without our
code. --to llm makes only this half, for programs that serve text; of a minimind-3v it is a Qwen3 or Qwen3Moe. --to web
makes chat.html, which opens with a double click; of a large model it makes a folder for any static host.
The weights and their JSON say what the model is; tokenizer, encoder and a model card are added. At the end a process
that cannot see this repo loads the folder, and must give the answers of our model.
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.convert_vlm instead of scripts/convert_vlm")

from common.start import begin, unwind

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from common.cli import SWITCH, Parser, positive, run_main
from common.files import write_json
from inference.models import choose_model, prompts_of
from inference.pictures import open_image
from model.build import build_model
from model.export import has_eyes, write_pth, write_transformers
from model.files import read_json
from model.flags import add_parts_arguments
from model.llava import unpacked, write_llava
from model.llm import build_decoder, write_llm
from model.processing import encode_chat
from model.rgb import to_rgb
from model.web import DTYPES, write_web
from model.weights import SIDECAR, bare_name, make_sidecar
from scripts.convert_vlm.card import base_models, languages_of, make_example, model_card, scores_of
from scripts.convert_vlm.check_export import QUESTIONS, texts_of
from scripts.convert_vlm.check_web import check_page, in_turns, questions_of

WRITE = {"llava": write_llava, "transformers": write_transformers, "llm": write_llm, "pth": write_pth, "web": write_web}
ABOUT_PICTURES = ("prompts", "pictures_first", "rows_without_picture", "scores")  # in the JSON of weights


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--to", required=True, choices=[*WRITE], help="format to make")
    add(
        "--weights", metavar="W", help="a .pth file, a folder, or pretrain_vlm; default: the newest sft_vlm or scst_vlm"
    )
    add("--out_dir", default="./out", help="folder of the weights, or of folders with weights")
    where = "folder to create, or X.html with --to web; default: next to the weights, named after them and --to"
    add("--output", metavar="DIR", help=where)
    add("--push", metavar="USER/NAME", help="upload to this repository of huggingface.co (HF_ENDPOINT, HF_TOKEN)")
    add("--dtype", choices=DTYPES, default="int8", help="precision of a page's weights (--to web); int8: half the size")
    split = "put the weights next to the page (--to web), for a web server; always above 50 MB"
    add("--split", **SWITCH, help=split)
    add = parser.group("the check").add_argument
    pictures = ["dataset/eval_images/scene_1.png", "dataset/eval_images/scene_2.png"]
    add("--images", nargs=2, default=pictures, metavar="FILE", help="two pictures for the check, samples on a page")
    versions = "also check with these versions of Transformers; pip installs each into a temporary folder"
    add("--versions", nargs="+", default=[], metavar="X.Y.Z", help=versions)
    add = parser.group("the model").add_argument
    add("--hidden_size", type=positive(int), help="width of the weights to take, if there are several")
    add("--use_moe", **SWITCH, help="take weights with experts, if there are several")
    add("--num_attention_heads", type=positive(int), help="only for weights without JSON, unless 8")
    add_parts_arguments(parser)
    parser.set_defaults(num_hidden_layers=None, num_key_value_heads=None, load=0, model_mode=None)
    args = parser.parse_args(argv)
    if args.to in ("pth", "web") and (args.versions or args.push):
        parser.error("--versions and --push are for folders: --to llava, transformers or llm")
    if args.to != "web" and args.split:
        parser.error("--split is for --to web")
    if args.split and args.output and args.output.endswith(".html"):
        parser.error(f"--output {args.output} is one file, --split makes several: name a folder")
    return args


# ---------------------------------------------------------------------------- what it is


def info_of(weights: Path, model, origin, to: str, output: Path) -> dict:
    """The JSON for what is made: that of the weights, which may have none, without the folders of this machine."""
    path = weights / SIDECAR if weights.is_dir() else weights.with_suffix(".json")
    known = read_json(path) if path.is_file() else {"command": None}
    parts = make_sidecar(model, origin)
    learned = {"scores": scores_of(weights, known.get("scores", []))}
    learned["languages"] = known.get("languages") or languages_of(known | learned)
    learned["base_model"] = base_models(model, parts["tokenizer"]["sha256"], origin.vision_model_path, known)
    known |= {key: value for key, value in learned.items() if value}
    # "/home/me/data/train.jsonl" → "train.jsonl", but hf://owner/name and ./out/train.jsonl stay
    known = json.loads(re.sub(r"(?<![\w:/.])~?/(?:[^/\s\"]+/)+", "", json.dumps(known)))
    for key, folder in (("tokenizer", output), ("vision_model", output / "vision_encoder")):
        path = {"path": str(folder)} if to == "pth" else {}
        known[key] = path | {"sha256": parts[key]["sha256"]} if parts[key] else {}
    if not has_eyes(model):
        known = {key: value for key, value in known.items() if key not in ABOUT_PICTURES} | {"stage": "llm"}
    return {"versions": {}} | known | {"config": parts["config"]}


# ---------------------------------------------------------------------------- the check


@torch.no_grad()
def reference(model, tokenizer, pictures: list) -> dict:
    """Returns what our model computes for QUESTIONS, in the format of scripts/convert_vlm/check_export.py; a model
    without eyes gets only their texts."""
    questions, image_ids = [], model.config.image_ids if has_eyes(model) else []
    for question in QUESTIONS if image_ids else map(texts_of, QUESTIONS):
        turns, shown = in_turns(question, pictures)
        ids = torch.tensor([[token for piece, _, _ in encode_chat(tokenizer, turns, image_ids) for token in piece]])
        pixels = model.processor(shown)["pixel_values"] if shown else None
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answer_ids = out[0, ids.shape[1] :]
        questions.append(
            {
                "input_ids": ids,
                "pixel_values": pixels,
                "logits": model(**inputs).logits[0],
                "answer_ids": answer_ids,
                "answer": tokenizer.decode(answer_ids, skip_special_tokens=True).strip(),
            }
        )
    pictures = [torch.tensor(np.asarray(to_rgb(picture))) for picture in pictures]  # uint8 (H, W, 3)
    return {"questions": questions, "pictures": pictures, "placeholder": image_ids[0] if image_ids else -1}


def check_folder(folder: Path, ours: dict, transformers: str = "") -> str:
    """Checks that the folder answers like `ours` from `reference`, in a process that cannot see this repo.

    transformers: a folder with another version. Returns a line that says what agreed. Raises ValueError if an answer
    differs, or if there is none.
    """
    root = Path(__file__).parents[2]
    paths = [transformers, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    paths = os.pathsep.join(path for path in paths if path and Path(path).resolve() != root)
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / "reference.pt"
        torch.save(ours, saved)
        isolated = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": temporary, "PYTHONPATH": paths}
        command = [sys.executable, "-P", Path(__file__).with_name("check_export.py"), folder.resolve(), saved]
        run = subprocess.run(command, cwd=temporary, env=os.environ | isolated, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1]
        raise ValueError(f"the export does not answer as the weights do, and was deleted: {reason}")
    return run.stdout.strip().splitlines()[-1]


def install(version: str, folder: str) -> None:
    """Installs a version of Transformers and its dependencies into a folder, to run with the installed torch."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, f"transformers=={version}"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"--versions {version}: pip could not install it: {run.stderr.strip().splitlines()[-1]}")


# ---------------------------------------------------------------------------- from weights to a folder


def push(repo: str, folder: Path | None = None) -> str | None:
    """Uploads a folder and returns its URL; without a folder, only checks the login. Raises ValueError."""
    from huggingface_hub import HfApi  # imported here: only this needs a network

    try:
        api = HfApi()
        api.whoami()
        if folder is None:
            return None
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Made by MiniMind-V")
        return f"{api.endpoint}/{repo}"
    except Exception as error:  # network, hub and library raise different types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        later = f". The folder is ready to upload: hf upload {repo} {folder}" if folder else ""
        raise ValueError(f"--push {repo}: {reason}. Log in with `hf auth login`, or set HF_TOKEN{later}") from None


def convert(args, weights: Path, output: Path, temporary: Path) -> None:
    """Makes the folder in `temporary`, checks it, and moves it to `output`."""
    made = temporary / "made"
    made.mkdir()
    with unpacked(weights) as source:
        alone = source.is_dir() and read_json(source / "config.json").get("model_type") == "minimind"
        builder = build_decoder if args.to == "llm" or (args.to == "pth" and alone) else build_model
        model, tokenizer, origin = builder(args, source)
        print(origin.note.replace(str(source), str(weights)))
        if "new: projector" in origin.note:
            raise ValueError(f"--weights {weights} is a language model without training on pictures: train it first")
        info = info_of(weights, model.eval(), origin, args.to, output)
        options = {}
        if args.to == "web":
            info["prompts"] = info.get("prompts") or {key: prompts_of(weights, key) for key in ("en", "zh")}
            pictures = [open_image(path, model.processor, "--images") for path in args.images]
            options = {"name": bare_name(weights), "dtype": args.dtype, "split": args.split, "samples": pictures}
        stored = WRITE[args.to](made, model, tokenizer, origin.tokenizer_path, info, **options)
    if args.to == "web":
        print(check_page(made, model, tokenizer, stored, questions_of(pictures)))
    elif args.to != "pth":
        write_json(made / SIDECAR, info)
        eyes = has_eyes(model)
        prompts = dict.fromkeys([*prompts_of(weights, "en"), *prompts_of(weights, "zh")] if eyes else [])
        pictures = [open_image(path, model.processor, "--images") for path in args.images] if eyes else []
        answer = make_example(made, model, tokenizer, pictures[0], [*prompts][0], info) if eyes else ""
        card = model_card(args.to, args.push or output.name, model, info, [*prompts], answer)
        (made / "README.md").write_text(card, encoding="utf-8")
        ours = reference(model, tokenizer, pictures)
        print(check_folder(made, ours))
        for version in args.versions:
            with tempfile.TemporaryDirectory() as other:
                install(version, other)
                print(check_folder(made, ours, other))
    if args.to == "web" and output.suffix == ".html":
        others = len([*made.iterdir()]) - 1
        if others:
            raise ValueError(f"--output {output}: the page needs {others} files next to it: name a folder")
        made = made / "chat.html"
    made.rename(output)


def main(argv=None):
    args = parse_args(argv)
    unwind()  # so that temporary files are deleted
    weights = choose_model(args)
    output = Path(args.output or weights.with_name(f"{bare_name(weights)}_{args.to}"))
    if output.exists():
        raise ValueError(f"--output {output} exists already: remove it, or name another folder")
    if args.push:
        push(args.push)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        convert(args, weights, output, Path(temporary))
    print(f"written: {output}")
    if args.push:
        print(f"uploaded: {push(args.push, output)}")


if __name__ == "__main__":
    run_main(main)

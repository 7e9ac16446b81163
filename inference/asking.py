"""Asking a model: how eval_vlm.py and the web page load one and get answers from it, alone or scored over many rows."""

import json
import re
import shlex
import sys
import time
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextStreamer

from common.devices import autocast, pick_dtype
from model.processing import IMAGE_TAG, ImageProcessor, encode_chat, impostor, read_json
from model.weights import ABOUT, bare_name, build_model, read_sidecar, write_json

STAGES = {0: "pretrain_vlm", 1: "sft_vlm", 2: "sft_vlm_multi"}
PROMPTS = {  # what weights are asked whose JSON names no question
    "en": "Describe this picture.",
    "zh": "描述这张图片。",
    "en several": "Compare these pictures.",
    "zh several": "比较这些图片。",
}
NO_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf", ".gbr", ".cur"}


@cache
def picture_suffixes() -> set[str]:
    """Of the files that count as pictures in a folder: of all formats that Pillow opens, and of phones."""
    Image.init()
    opened = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return (opened - NO_PICTURES) | {".heic", ".heif"}


def pictures_in(folder: Path, pattern: str) -> tuple[list[Path], int]:
    """The pictures of a folder, sorted, without what macOS puts beside them; how many other files there are."""
    files = sorted(path for path in folder.glob(pattern) if not path.is_dir() and not path.name.startswith("._"))
    files = [path for path in files if "__MACOSX" not in path.parts]
    found = [path for path in files if path.suffix.lower() in picture_suffixes()]
    return found, len(files) - len(found)


# What a picture from the network may take: bytes, seconds, and seconds of silence.
LARGEST, LONGEST, SILENT = 50 * 10**6, 60, 20


# ---------------------------------------------------------------------------- models


def export_of(path: Path) -> str:
    """What an exported folder is, "minimind-v" or "llava", also if Transformers saved it again; "" of all else."""
    with suppress(OSError, ValueError):
        config = read_json(path / "config.json")
        kind = config.get("model_type")
        # Other people's LLaVAs are no MiniMind, and a checkpoint of training without its tokenizer cannot be asked.
        ours = config.get("projector_hidden_act") == "linear" and (path / "tokenizer.json").is_file()
        if kind == "minimind-v" or kind == "llava" and ours:
            return kind
    return ""


def list_models(out_dir) -> list[Path]:
    """Weights that can be asked and exported folders, in `out_dir` and the folders in it, the newest first."""
    below = [path for pattern in ("*", "*/*") for path in Path(out_dir).glob(pattern)]
    name = re.compile(rf"({'|'.join(STAGES.values())})_\d+(_moe)?\.pth")
    found = [path for path in below if name.fullmatch(path.name) or export_of(path)]
    return sorted(found, key=lambda path: (-path.stat().st_mtime, path))


def find_models(args) -> list[Path]:
    """Those that --weights, --load, --model_mode, --hidden_size and --use_moe leave, the first of which is to be taken:
    the newest, as no flag is needed to ask what was just trained. Raises FileNotFoundError if there is none.
    """
    name, path = args.weights or STAGES[args.model_mode], Path(args.weights or "MiniMind2-V")
    if name == "none":
        raise ValueError("--weights none: a model that has not learned knows nothing. Name a .pth file")
    if args.weights and name not in STAGES.values():
        if not path.exists():
            raise FileNotFoundError(f"--weights {path}: no such file or folder")
        if (path.is_dir() or args.load == 1) and not (path / "config.json").is_file():
            what = f"For the .pth files in it: --out_dir {path}" if path.is_dir() else "Leave --load 1 out"
            raise FileNotFoundError(f"--weights {path} is no Transformers folder: no config.json there\n{what}")
        return [path]
    there = list_models(args.out_dir)
    if args.load == 1:
        wanted = "Transformers folder"
        found = [path] if export_of(path) else [path for path in there if path.is_dir()]
    else:
        width, moe = args.hidden_size or r"\d+", "_moe" if args.use_moe else "(_moe)?"
        wanted = f"{name}_{args.hidden_size or '*'}{'_moe' * args.use_moe}.pth"
        found = [path for path in there if re.fullmatch(rf"{name}_{width}{moe}\.pth", path.name)]
    where = f"no {wanted} in {Path(args.out_dir)} and the folders in it"
    if not found and there:
        raise FileNotFoundError(f"{where}. Name another one, as in\n--weights {there[0]}")
    if not found:
        commands = "python -m scripts.quickstart; or python -m scripts.download --what clip vlm"
        raise FileNotFoundError(f"{where}. Make or fetch one:\n{commands}")
    return found


def choose_model(args) -> Path:
    """The first of `find_models`; says how to choose another one."""
    found = find_models(args)
    if len(found) > 1:
        print(f"the newest of {len(found)} that fit; to choose another: --weights {found[1]}")
    return found[0]


def load(args):
    """Model on its device in eval mode, tokenizer, path of the weights."""
    from model.llava import unpacked  # which imports this file

    path = choose_model(args)
    with unpacked(path) as source:
        model, tokenizer, line = build_model(args, source)
    print(line.replace(str(source), str(path)))
    return model.eval(), tokenizer, path


def known_of(weights: Path) -> dict:
    """What the JSON of the weights tells, also where they are a folder, as `read_sidecar` has it."""
    return read_sidecar(weights / ABOUT if weights.is_dir() else weights)


def prompts_of(weights: Path, language: str = "en", several: bool = False) -> list[str]:
    """Questions that the weights know, in the other language if in this one there is none; the best one first.

    several: about several pictures.
    """
    known = known_of(weights)["prompts"]
    key, other = (each + " several" * several for each in (language, {"en": "zh", "zh": "en"}[language]))
    return known.get(key) or known.get(other) or [PROMPTS[key]]


def needs_picture(weights: Path) -> bool:
    """Was it never trained without one? What their JSON does not tell is not claimed."""
    return known_of(weights).get("rows_without_picture") == 0


def pictures_first(weights: Path) -> bool:
    """Did the pictures of its training stand before the questions, one to each?"""
    return bool(known_of(weights).get("pictures_first"))


# ---------------------------------------------------------------------------- asking


@torch.no_grad()
def generate(model, tokenizer, conversations: list[dict], images: list, args, streamer=None, stopping=None):
    """Answers a conversation that ends with a question; its <image> tags stand for `images`, in order.

    images: pictures, or what `processor.resize` made of them; stopping: a list of StoppingCriteria. Returns question
    and answer as tokens int64 (1, T), where in them the answer begins, and the pictures as the model gets them, uint8
    (N, 3, H, W) or None.
    """
    pieces = encode_chat(tokenizer, conversations, model.config.image_special_token)
    ids = [token for piece, _, _ in pieces for token in piece]
    input_ids = torch.tensor([ids], device=model.device)
    resized = [image if torch.is_tensor(image) else model.processor.resize(image) for image in images]
    pixels = torch.stack(resized).to(model.device) if images else None
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    with autocast(model.device, pick_dtype(args.dtype, model.device)):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixels,
            max_new_tokens=args.max_new_tokens,
            do_sample=not args.greedy,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=stopping,
            **({} if args.greedy else sampling),
        )
    return out, len(ids), pixels


def ask(model, tokenizer, conversations: list[dict], images: list, args, streamer=None, stopping=None) -> str:
    """The answer alone; arguments as in `generate`."""
    out, start, _ = generate(model, tokenizer, conversations, images, args, streamer, stopping)
    return tokenizer.decode(out[0, start:], skip_special_tokens=True).strip()


def fetch(url: str) -> BytesIO:
    """What an address holds. Raises ValueError, without the address, for more than LARGEST or LONGEST, or nothing."""
    import requests  # here: only an address needs it

    late = time.monotonic() + LONGEST
    # A server that packs what is packed already could make of 50 MB any number of them.
    headers = {"User-Agent": "MiniMind-V eval_vlm.py", "Accept-Encoding": "identity"}
    try:
        with requests.get(url, stream=True, timeout=SILENT, headers=headers) as response:
            if not response.ok:
                raise ValueError(f"the server answers {response.status_code} {response.reason}")
            data = BytesIO()
            for chunk in response.iter_content(2**16):
                if data.tell() + len(chunk) > LARGEST:
                    raise ValueError(f"it is larger than {LARGEST // 10**6} MB")
                if time.monotonic() > late:
                    raise ValueError(f"it takes longer than {LONGEST} s")
                data.write(chunk)
            return data
    except requests.Timeout:
        raise ValueError(f"the server is silent for {SILENT} s") from None
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        raise ValueError("the server cannot be reached, or broke off") from None
    except requests.RequestException as error:
        raise ValueError(str(error)) from None


def open_image(path, processor: ImageProcessor, flag: str = "--image") -> Image.Image:
    """A picture for `processor.resize`, wholly read, from a file or an address. Raises FileNotFoundError or ValueError,
    which name `flag`."""
    address = re.match(r"(\w+)://", str(path))
    if address and address[1].lower() not in ("http", "https"):
        raise ValueError(f"{flag} {path}: an address begins with http:// or https://")
    if not address and not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    try:
        with processor.open(fetch(path) if address else path) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        reason = impostor(path) if not address else ""
        known = "it is in no format that Pillow knows"
        if Path(path).suffix.lower() in (".heic", ".heif"):
            known = "a photo in HEIC, which Pillow does not read: convert it to JPEG"
        reason = f"it {reason}" if reason else known
    except Exception as error:  # Pillow's decoders raise whatever their format makes them stumble over
        reason = error
    raise ValueError(f"{flag} {path} is not a picture that can be read: {reason}")


def question(prompt: str, pictures: int, first: bool = False, flag: str = "--prompt") -> str:
    """The user's turn, the same for eval_vlm.py, --chat, --captions and the web page: an <image> tag for each picture.

    Where the text has none, they stand where the data had them. first: one picture comes before the text, as most rows
    of the training showed it (`pictures_first`), else after it, as in the public rows ("...\\n<image>"). Several always
    come before: so the drawn scenes show what is to be compared, and the public rows have them anywhere.
    """
    tags = prompt.count(IMAGE_TAG)
    if tags not in (0, pictures):
        raise ValueError(f"{flag} has {tags} {IMAGE_TAG}, but there are {pictures} pictures: give one each, or none")
    if tags or not pictures:
        return prompt
    return f"{IMAGE_TAG}\n" * pictures + prompt if first or pictures > 1 else f"{prompt}\n{IMAGE_TAG}"


def prompts_to_ask(args, weights: Path) -> tuple[list[str], str]:
    """What is asked about each picture, and the flag it came with."""
    if not args.prompts_path:
        several = args.use_multi == 2 or len(args.image or ()) > 1
        return [args.prompt or prompts_of(weights, several=several)[0]], "--prompt"
    flag = f"--prompts_path {args.prompts_path}"
    try:
        lines = Path(args.prompts_path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{flag}: no such file. Expected a text file, one question a line") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, ValueError) else "cannot be read"
        raise ValueError(f"{flag} {reason}: {error}. Expected a text file, one question a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{flag} holds no question. Expected one a line")
    return prompts, flag


def pictures_to_ask(args) -> list[list]:
    """The pictures of each question: files, or addresses."""
    if args.image:
        return [args.image]
    default = "dataset/eval_images_multi" if args.use_multi == 2 else "dataset/eval_images"
    folder = Path(args.image_dir or default)
    found, others = pictures_in(folder, "*")
    if others:
        print(f"{folder}: {others} files are no pictures and are left out", file=sys.stderr)
    if not found:
        raise FileNotFoundError(f"no pictures in {folder}. Name one with --image, or another folder with --image_dir")
    return [found] if args.use_multi == 2 else [[path] for path in found]


def ask_about_pictures(model, tokenizer, args, weights: Path) -> None:
    """Every prompt about every picture of a folder, or about all pictures together; answers stream to the terminal, or
    come as lines of JSON. A broken picture of a folder is told, and the others follow."""
    (prompts, flag), first = prompts_to_ask(args, weights), pictures_first(weights)
    figures = 0
    for paths in pictures_to_ask(args):
        names = [str(path) for path in paths]
        about = {"picture": names[0] if len(names) == 1 else names}
        try:
            images = [open_image(path, model.processor, "--image" if args.image else "--image_dir") for path in paths]
        except (OSError, ValueError) as error:
            if args.image or args.use_multi == 2:
                raise
            print(json.dumps(about | {"error": str(error)}, ensure_ascii=False) if args.json else f"\n{error}")
            continue
        for prompt in prompts:
            text = question(prompt, len(paths), first, flag)
            streamer = None
            if not args.json:
                streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                print(f"\n[{', '.join(Path(name).name for name in names)}] {text.replace(IMAGE_TAG, '').strip()}")
            torch.manual_seed(args.seed)  # the answer about a picture does not depend on those before it
            began = time.perf_counter()
            ids, start, pixels = generate(model, tokenizer, [{"role": "user", "content": text}], images, args, streamer)
            if args.json:
                answer = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
                cost = {"seconds": round(time.perf_counter() - began, 3), "tokens": ids.shape[1] - start}
                print(json.dumps(about | {"prompt": prompt, "answer": answer} | cost, ensure_ascii=False), flush=True)
            if args.show_attention:
                from inference.attention import draw_attention

                path = Path(args.show_attention)
                path = path if path.suffix else path.with_suffix(".png")  # as matplotlib would, without a word
                figures += 1
                path = path if figures == 1 else path.with_stem(f"{path.stem}_{figures}")
                draw_attention(path, model, tokenizer, ids, start, pixels, images, prompt)
                print(f"written, where it looked for each word: {path}", file=sys.stderr if args.json else sys.stdout)


# ---------------------------------------------------------------------------- many at once


def collate_prompts(examples: list[dict], pad_token_id: int) -> dict:
    """Prompts padded on the left, so that all answers begin at the same position; "broken": why others are missing.

    examples: {"number", "ids": list[int], "pictures": uint8 (N, 3, H, W) or None}, or {"number", "broken": str}.
    """
    broken = {example["number"]: example["broken"] for example in examples if "broken" in example}
    examples = [example for example in examples if "broken" not in example]
    if not examples:
        return {"numbers": [], "broken": broken}
    T = max(len(example["ids"]) for example in examples)
    input_ids, mask = torch.full((len(examples), T), pad_token_id), torch.zeros((len(examples), T), dtype=torch.int64)
    for i, example in enumerate(examples):
        n = len(example["ids"])
        input_ids[i, T - n :], mask[i, T - n :] = torch.tensor(example["ids"]), 1
    pictures = [example["pictures"] for example in examples if example["pictures"] is not None]
    return {
        "numbers": [example["number"] for example in examples],
        "broken": broken,
        "input_ids": input_ids,
        "attention_mask": mask,
        "pixel_values": torch.cat(pictures) if pictures else None,
    }


@torch.no_grad()
def answer_batches(model, tokenizer, batches, args, device, dtype):
    """For each batch of `collate_prompts` its greedy answers, and why others are missing; both {number: text}."""
    for batch in batches:
        texts = []
        if batch["numbers"]:
            pixels = batch["pixel_values"]
            with autocast(device, dtype):
                out = model.generate(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    pixel_values=None if pixels is None else pixels.to(device),
                    max_new_tokens=args.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        yield {number: text.strip() for number, text in zip(batch["numbers"], texts)}, batch["broken"]


# ---------------------------------------------------------------------------- scoring


def count_parameters(model) -> dict[str, int]:
    """{"llm", "projector", "encoder"}."""
    parts = {"projector": model.vision_proj, "encoder": model.vision_encoder}
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    return {"llm": sum(weight.numel() for weight in model.parameters()) - sum(counts.values())} | counts


def score_rows(model, tokenizer, args, weights: Path, device) -> dict:
    from dataset.lm_dataset import VLMDataset  # what only scores need, a question need not wait for
    from inference.scoring import score, table

    captions = {}
    for path in args.refs_path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--refs_path {path}: no such file")
        for image, texts in read_json(path).items():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f'--refs_path {path}: "{image}" has {texts!r}, expected a list of captions')
            captions.setdefault(image, []).extend(texts)
    placeholders = model.config.image_special_token
    data = VLMDataset(
        args.data_path, args.images_path, tokenizer, model.processor, args.max_seq_len, placeholders, args.on_bad_row
    )
    if data.bad:
        print(data.report())
    output = Path(args.output or weights.with_name(f"{bare_name(weights)}.scores.json"))
    # Now, rather than after an hour of answers, is the time to learn that it cannot be written. Earlier scores stay.
    write_json(output, read_json(output) if output.is_file() else {})
    result = score(model, tokenizer, data, captions, args, device, pick_dtype(args.dtype, device))
    about = {
        "weights": str(weights),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": str(device),
        "parameters": count_parameters(model),
    }
    result = about | result
    print(table(result))
    write_json(output, result)
    print(f"written, with every answer: {output}")
    return result

"""The questions of eval_vlm.py: which prompts it asks about which pictures, and how it prints the answers."""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import TextStreamer

from inference.generate import generate, user_turn
from inference.models import pictures_first, prompts_of
from inference.pictures import open_image, pictures_in
from model.generations import without_thoughts
from model.processing import IMAGE_TAG


def prompts_to_ask(args, weights: Path) -> tuple[list[str], str]:
    """Returns the prompts for each picture and the flag that names them. Raises FileNotFoundError or ValueError if
    --prompts_path does not name a text file with questions."""
    if not args.prompts_path:
        several = args.use_multi == 2 or len(args.image or ()) > 1
        return [args.prompt or prompts_of(weights, several=several)[0]], "--prompt"
    flag = f"--prompts_path {args.prompts_path}"
    try:
        lines = Path(args.prompts_path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{flag}: no such file. Expected a text file, one question per line") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, ValueError) else "cannot be read"
        raise ValueError(f"{flag} {reason}: {error}. Expected a text file, one question per line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{flag} contains no question. Expected one per line")
    return prompts, flag


def pictures_to_ask(args) -> list[list]:
    """Returns the pictures of each question: files or URLs. Raises FileNotFoundError if a folder has none."""
    if args.image:
        return [args.image]
    default = "dataset/eval_images_multi" if args.use_multi == 2 else "dataset/eval_images"
    folder = Path(args.image_dir or default)
    paths, others = pictures_in(folder, "*")
    if others:
        print(f"{folder}: skipped {others} files that are not pictures", file=sys.stderr)
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder}. Give one with --image, or another folder with --image_dir")
    return [paths] if args.use_multi == 2 else [[path] for path in paths]


def ask_about_pictures(model, tokenizer, args, weights: Path) -> None:
    """Asks every prompt about every picture of a folder, or about all pictures together. Prints answers as they are
    generated, or as lines of JSON. Reports and skips broken pictures of a folder."""
    (prompts, flag), first = prompts_to_ask(args, weights), pictures_first(weights)
    figures = 0
    for paths in pictures_to_ask(args):
        names = [str(path) for path in paths]
        line = {"picture": names[0] if len(names) == 1 else names}
        try:
            images = [open_image(path, model.processor, "--image" if args.image else "--image_dir") for path in paths]
        except (OSError, ValueError) as error:
            if args.image or args.use_multi == 2:
                raise
            print(json.dumps(line | {"error": str(error)}, ensure_ascii=False) if args.json else f"\n{error}")
            continue
        for prompt in prompts:
            text = user_turn(prompt, len(paths), first, flag)
            streamer = None
            if not args.json:
                streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                print(f"\n[{', '.join(Path(name).name for name in names)}] {text.replace(IMAGE_TAG, '').strip()}")
            torch.manual_seed(args.seed)  # an answer must not depend on the pictures before it
            began = time.perf_counter()
            ids, start, pixels = generate(model, tokenizer, [{"role": "user", "content": text}], images, args, streamer)
            if args.json:
                answer = without_thoughts(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
                cost = {"seconds": round(time.perf_counter() - began, 3), "tokens": ids.shape[1] - start}
                print(json.dumps(line | {"prompt": prompt, "answer": answer} | cost, ensure_ascii=False), flush=True)
            if args.show_attention:
                from inference.attention import draw_attention

                path = Path(args.show_attention)
                path = path if path.suffix else path.with_suffix(".png")  # as matplotlib would, silently
                figures += 1
                path = path if figures == 1 else path.with_stem(f"{path.stem}_{figures}")
                draw_attention(path, model, tokenizer, ids, start, pixels, images, prompt)
                print(f"attention for each word: {path}", file=sys.stderr if args.json else sys.stdout)

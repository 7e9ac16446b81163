"""Asking a model: how eval_vlm.py and the web page load one and get answers from it, alone or scored over many rows."""

import shlex
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import TextStreamer

from model.processing import IMAGE_TAG, encode_chat, read_json
from trainer.devices import autocast, pick_dtype
from trainer.weights import build_model, find_weights, write_json

STAGES = {0: "pretrain_vlm", 1: "sft_vlm", 2: "sft_vlm_multi"}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load(args):
    """Model on its device in eval mode, tokenizer, path of the weights."""
    if args.load == 1:
        path = Path(args.weights or "./MiniMind2-V")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"--weights {path}: no config.json there. --load 1 wants a Transformers folder")
    elif args.weights == "none":
        raise ValueError("--weights none: there is nothing to ask a model that has not learned. Name a .pth file")
    else:
        path = find_weights(args.weights or STAGES[args.model_mode], args.out_dir, args.hidden_size, args.use_moe)
    model, tokenizer, line = build_model(args, path)
    print(line)
    return model.eval(), tokenizer, path


# ---------------------------------------------------------------------------- asking


@torch.no_grad()
def ask(model, tokenizer, conversations: list[dict], images: list, args, streamer=None, stopping=None) -> str:
    """The answer to a conversation that ends with a question; its <image> tags stand for `images`, in order.

    images: pictures, or what `processor.resize` made of them; stopping: a list of StoppingCriteria.
    """
    pieces = encode_chat(tokenizer, conversations, model.config.image_special_token)
    ids = [token for piece, _, _ in pieces for token in piece]
    input_ids = torch.tensor([ids], device=model.device)
    pixels = [image if torch.is_tensor(image) else model.processor.resize(image) for image in images]
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    with autocast(model.device, pick_dtype(args.dtype, model.device)):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=torch.stack(pixels).to(model.device) if pixels else None,
            max_new_tokens=args.max_new_tokens,
            do_sample=not args.greedy,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=stopping,
            **({} if args.greedy else sampling),
        )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def open_image(path) -> Image.Image:
    """A picture, wholly read. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--image {path}: no such file")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise whatever their format makes them stumble over
        raise ValueError(f"--image {path} is not a picture that can be read: {error}") from None


def question(prompt: str, pictures: int) -> str:
    """The user's turn: an <image> tag for each picture, after the text where it has none of its own."""
    tags = prompt.count(IMAGE_TAG)
    if tags not in (0, pictures):
        raise ValueError(f"--prompt has {tags} {IMAGE_TAG}, but there are {pictures} pictures: give one each, or none")
    return prompt if tags else prompt + f"\n{IMAGE_TAG}" * pictures


def pictures_to_ask(args) -> list[list[Path]]:
    """The pictures of each question."""
    if args.image:
        return [[Path(path) for path in args.image]]
    default = "dataset/eval_images_multi" if args.use_multi == 2 else "dataset/eval_images"
    folder = Path(args.image_dir or default)
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise FileNotFoundError(f"no pictures in {folder}. Name one with --image, or another folder with --image_dir")
    return [found] if args.use_multi == 2 else [[path] for path in found]


def ask_about_pictures(model, tokenizer, args) -> None:
    default = "Compare these pictures." if args.use_multi == 2 else "Describe this picture."
    for paths in pictures_to_ask(args):
        text = question(args.prompt or default, len(paths))
        print(f"\n[{', '.join(path.name for path in paths)}] {text.replace(IMAGE_TAG, '').strip()}")
        torch.manual_seed(args.seed)  # the answer about a picture does not depend on those before it
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ask(model, tokenizer, [{"role": "user", "content": text}], list(map(open_image, paths)), args, streamer)


# ---------------------------------------------------------------------------- scoring


def count_parameters(model) -> dict[str, int]:
    """{"llm", "projector", "encoder"}."""
    parts = {"projector": model.vision_proj, "encoder": model.vision_encoder}
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    return {"llm": sum(weight.numel() for weight in model.parameters()) - sum(counts.values())} | counts


def score_rows(model, tokenizer, args, weights: Path, device) -> dict:
    from dataset.lm_dataset import VLMDataset  # what only scores need, a question need not wait for
    from trainer.scoring import score, table

    captions = {}
    for path in args.refs_path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--refs_path {path}: no such file")
        for image, texts in read_json(path).items():
            captions.setdefault(image, []).extend(texts)
    placeholders = model.config.image_special_token
    data = VLMDataset(
        args.data_path, args.images_path, tokenizer, model.processor, args.max_seq_len, placeholders, args.on_bad_row
    )
    if data.bad:
        print(data.report())
    output = Path(args.output or weights.with_suffix(".scores.json"))
    write_json(output, {})  # now, rather than after an hour of answers, is the time to learn that it cannot be written
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

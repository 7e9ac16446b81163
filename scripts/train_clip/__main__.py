"""Train a CLIP or SigLIP from scratch on your own pictures and captions: the eyes of a model, without any download.

    python -m scripts.train_clip --data_path train.jsonl --images_path images \\
        --tokenizer_path out/tokenizer --out_dir out/clip --val_path val.jsonl
    python -m scripts.train_clip --help

A picture encoder and a text encoder learn together to give a picture and its caption the same direction, and everything
else in the batch another one (Radford et al. 2021, https://arxiv.org/abs/2103.00020). The picture half has the layout
of any CLIP on the hubs: python train_pretrain_vlm.py --vision_model_path out/clip

    picture ── ViT ─┬─ class token ─ visual_projection ─┐
                    ├─ patches ───── visual_projection ─┼─ cosine / temperature
    caption ── causal transformer ─ text_projection ────┘

InfoNCE both ways: of the (B, B) logits the diagonal is right. With `--kind siglip` a head that attends to the
patches stands in place of class token and visual_projection, and each of the (B, B) pairs is judged by itself, right or
wrong (towers.py). With `--captions_per_picture 3` each picture brings three of its captions, all of them right.

A language model reads the patches, so half of the contrastive loss is on them: a class token alone would leave them
without any gradient in the last layer. For a caption of the whole picture it takes their mean; where each caption is
about one object, `--patch_pool max` takes the patch that fits it best, so that patches learn what is where (as FILIP
does for single words, https://arxiv.org/abs/2111.07783). CLIP's own output, the class token's, or SigLIP's, its head's,
is trained beside them and is what retrieval measures.

Shapes: B batch, T tokens, P patches, V width of the ViT, E of the shared space.
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.train_clip instead of scripts/train_clip")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import itertools
import math
import os
import shlex
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

from common.cli import Parser, not_negative, positive, run_main
from common.devices import autocast, cpu_has, make_deterministic, pick_device
from common.files import write_json, write_safely
from dataset.flags import add_urls_argument
from model.processing import ImageProcessor, load_tokenizer
from scripts.train_clip.captions import augment, draw_captions, load_split
from scripts.train_clip.towers import (
    build_config,
    build_model,
    build_processor,
    contrastive_loss,
    encode_pictures,
    encode_texts,
    folder_configs,
    heads,
)
from trainer.optimizer import Muon, set_learning_rate

# ---------------------------------------------------------------------------- optimizer


def make_optimizer(model, args):
    """AdamW; with --muon_learning_rate Muon for the matrices of the blocks. Each group keeps its peak in "peak",
    which `set_learning_rate` scales."""
    muon, groups = bool(args.muon_learning_rate), {}
    for name, weight in model.named_parameters():
        decays = weight.ndim >= 2  # norms, biases and the temperature do not
        group = {"muon": muon and decays and ".layers." in name, "weight_decay": args.weight_decay if decays else 0.0}
        group["peak"] = args.muon_learning_rate if group["muon"] else args.learning_rate
        groups.setdefault(tuple(group.values()), {"params": [], **group})["params"].append(weight)
    return (Muon if muon else torch.optim.AdamW)(list(groups.values()), betas=(0.9, 0.98), eps=1e-6)


# ---------------------------------------------------------------------------- validation and saving


@torch.no_grad()
def retrieval(model, processor, pictures, captions, device) -> dict[str, float]:
    """Recall@1 and @5 in percent: how often the right one is among the k best of the whole set, both ways.

    captions: see `load_split`. With several captions, a picture has found its way with any of them; a caption of
    several pictures has found its way with any of those.
    """
    model.eval()
    pixels = (processor.normalize(pictures[part].to(device)) for part in torch.arange(len(pictures)).split(128))
    seen = torch.cat([encode_pictures(model, part)[0][:, 0] for part in pixels])
    texts, numbers = captions
    read = torch.cat([encode_texts(model, part.to(device)) for part in texts.split(128)])
    model.train()
    scores = (seen @ read.T).cpu()  # (N, M)
    pairs = torch.zeros(len(numbers), len(texts) + 1, dtype=torch.bool).scatter(1, numbers, True)[:, :-1]  # (N, M)
    # The rank is the number of wrong ones at least as good, so that an encoder that sees no difference finds nothing.
    right = scores.masked_fill(~pairs, -2)
    ranks = {
        "image_to_text": ((scores >= right.amax(dim=1, keepdim=True)) & ~pairs).sum(dim=1),
        "text_to_image": ((scores >= right.amax(dim=0, keepdim=True)) & ~pairs).sum(dim=0),
    }
    return {
        f"{way}_recall@{k}": round(100 * (rank < k).float().mean().item(), 2)
        for way, rank in ranks.items()
        for k in (1, 5)
    }


def save(model, config: dict, processor: ImageProcessor, folder: Path, vision_only: bool, metrics: dict) -> None:
    """Writes an ordinary folder of its kind, each file beside its place first, then renamed: never half a file."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if vision_only:
        state = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    # Not save_file, whose file nobody but its owner may read.
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    write_safely(folder / "model.safetensors", lambda file: file.write(weights))
    for name, content in (folder_configs(config, processor, vision_only) | {"metrics": metrics}).items():
        write_json(folder / f"{name}.json", content)


# ---------------------------------------------------------------------------- the run


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--data_path", nargs="+", required=True, metavar="PATH", help="rows of any shape; answers are captions")
    add("--images_path", metavar="PATH", help="folder or zip of the pictures; default: beside the rows")
    add("--tokenizer_path", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    add("--out_dir", type=Path, required=True, help="folder for the encoder, made if needed")
    add("--val_path", nargs="+", default=[], metavar="PATH", help="held-out rows; retrieval is measured file by file")
    add("--epochs", type=positive(int), default=30, help="passes over the pictures")
    add("--batch_size", type=positive(int), default=64, help="pictures per step, each told from all the others")
    add("--learning_rate", type=positive(float), default=1e-3, help="peak of the cosine schedule")
    muon = "Muon for the matrices of the blocks, with this peak; default: AdamW for all weights"
    add("--muon_learning_rate", type=positive(float), help=muon)
    add("--device", default="auto", metavar="NAME", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu")
    precision = "precision of the arithmetic; auto: bfloat16 on CUDA, else float32"
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=precision)

    add = parser.group("the encoder").add_argument
    add("--kind", choices=["clip", "siglip"], default="clip", help="a class token and softmax, or a head and sigmoid")
    add("--image_size", type=positive(int), default=128, help="edge of the pictures, pixels")
    add("--patch_size", type=positive(int), default=16, help="edge of a patch, pixels")
    add("--hidden_size", type=positive(int), default=192, help="width of the picture encoder; heads are 64 wide")
    add("--num_hidden_layers", type=positive(int), default=6, help="layers of the picture encoder")
    add("--text_hidden_size", type=positive(int), default=192, help="width of the caption encoder")
    add("--text_num_hidden_layers", type=positive(int), default=2, help="layers of the caption encoder")
    add("--projection_dim", type=positive(int), default=192, help="of the space both share; SigLIP: --hidden_size")
    add("--max_text_len", type=positive(int), default=32, help="tokens of a caption with its end; the rest is cut")
    add("--vision_only", action="store_true", help="save the picture half alone, all that the other scripts need")

    add = parser.group("how it learns").add_argument
    minutes = "train so many minutes instead of --epochs; not repeatable"
    add("--max_minutes", type=positive(float), metavar="MINUTES", help=minutes)
    several = "captions of each picture in a step, where it has several: more to learn for little more time"
    add("--captions_per_picture", type=positive(int), default=1, metavar="N", help=several)
    add("--weight_decay", type=float, default=0.1, help="for matrices; norms and biases have none")
    add("--warmup_iters", type=not_negative, default=100, help="steps of linear warmup")
    add("--patch_weight", type=float, default=0.5, help="share of the patches in the contrastive loss, 0 to 1")
    add("--patch_pool", choices=["mean", "max"], default="mean", help="a caption is about all patches, or about one")
    add("--mask_ratio", type=float, default=0.0, help="share of the patches left out in training, 0 to below 1")
    add("--min_scale", type=float, default=0.4, help="smallest random window, share of the area; 1: the whole picture")
    add("--flip", action="store_true", help="mirror half of the pictures; teaches that left and right are the same")
    add("--val_interval", type=positive(int), default=10, help="epochs between validations, each of which also saves")
    add("--seed", type=not_negative, default=42, help="of weights, order, captions and windows")
    add_urls_argument(parser)
    kept = "keep decoded pictures in memory if they take no more GB than this"
    add("--cache_gb", type=float, default=8.0, metavar="GB", help=kept)
    return parser.parse_args(argv)


def check(args) -> None:
    """ValueError for flags that cannot work together, before anything is read."""
    if args.image_size % args.patch_size:
        raise ValueError(f"--image_size {args.image_size} is no multiple of --patch_size {args.patch_size}")
    for name in ("hidden_size", "text_hidden_size"):
        if getattr(args, name) % heads(getattr(args, name)):
            raise ValueError(f"--{name} {getattr(args, name)} does not divide into heads: choose a multiple of 64")
    if args.kind == "siglip" and args.projection_dim != args.hidden_size:
        width = f"a SigLIP shares the space of its picture encoder: type --projection_dim {args.hidden_size}"
        raise ValueError(f"--projection_dim {args.projection_dim}: {width}")
    for name in ("batch_size", "max_text_len"):  # another picture to be told from; a token and the end
        if getattr(args, name) < 2:
            raise ValueError(f"--{name} {getattr(args, name)}: must be 2 at least")
    for name, low, high in (("patch_weight", 0, 1), ("mask_ratio", 0, 0.95), ("min_scale", 0.01, 1)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: must be {low} to {high}")
    if (args.out_dir / "config.json").exists():
        raise ValueError(f"--out_dir {args.out_dir} holds an encoder already: choose another folder, or remove it")


def choose_dtype(name: str, device) -> torch.dtype:
    """What the encoders compute in; says where another one would be faster."""
    if name == "auto" and device.type == "cpu" and cpu_has("amx_bf16"):
        print("this CPU computes in bfloat16: with --dtype bfloat16 a step takes about two thirds of the time")
    return torch.bfloat16 if name == "bfloat16" or (name, device.type) == ("auto", "cuda") else torch.float32


def main(argv=None):
    args, started = parse_args(argv), time.time()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--nproc_per_node: the encoder trains in one process. Type python instead of torchrun")
    check(args)
    device = pick_device(args.device)
    make_deterministic(args.seed)

    # ------------------------------------------------------------------------ data
    tokenizer = load_tokenizer(args.tokenizer_path)
    processor = build_processor(args.kind, args.image_size)
    pictures, (captions, numbers) = load_split(args, args.data_path, "--data_path", tokenizer, processor)
    vals = {path: load_split(args, [path], "--val_path", tokenizer, processor) for path in args.val_path}
    if args.batch_size > len(pictures):
        raise ValueError(f"--batch_size {args.batch_size}: there are {len(pictures)} pictures only")
    steps_per_epoch = len(pictures) // args.batch_size
    steps = steps_per_epoch * args.epochs

    # ------------------------------------------------------------------------ model and optimizer
    config = build_config(args, len(tokenizer))
    model = build_model(config).to(device).train()
    dtype = choose_dtype(args.dtype, device)
    if device.type == "cpu" and dtype == torch.bfloat16:  # for so few tokens PyTorch's own attention is slow backwards
        model.set_attn_implementation("eager")
    total, seeing = (sum(weight.numel() for weight in part.parameters()) / 1e6 for part in (model, model.vision_model))
    print(f"{total:.1f}M parameters, {seeing:.1f}M of them see, on {device}")
    weights = list(model.parameters())
    optimizer = make_optimizer(model, args)

    # ------------------------------------------------------------------------ steps
    step, begun = 0, time.time()
    bar = tqdm(total=None if args.max_minutes else steps, mininterval=2)
    for epoch in itertools.count(1):
        # Every picture at most once per epoch, so no batch holds one twice: it would be told from itself.
        order = torch.randperm(len(pictures))[: steps_per_epoch * args.batch_size]
        for chosen in order.split(args.batch_size):  # (B,)
            step += 1
            minutes = (time.time() - begun) / 60
            done = min(1.0, minutes / args.max_minutes if args.max_minutes else step / steps)  # share of the run
            warmup = min(1.0, step / max(1, args.warmup_iters))
            set_learning_rate(optimizer, warmup * (1 + math.cos(math.pi * done)) / 2)

            pixels = processor.normalize(pictures[chosen].to(device))
            if args.min_scale < 1 or args.flip:
                pixels = augment(pixels, args.min_scale, args.flip)
            theirs = numbers[chosen]  # (B, n), all captions of these pictures
            number = draw_captions(theirs, len(captions), args.captions_per_picture)  # (M,), M = B if it is one each
            right = (theirs[:, :, None] == number).any(dim=1).to(device)  # (B, M)
            texts = captions[number].to(device)  # (M, T)
            with autocast(device, dtype):
                by_class, by_patches = encode_pictures(model, pixels, args.patch_pool, args.mask_ratio)
                read = encode_texts(model, texts)  # (M, E)
            scale, bias = model.logit_scale.exp(), getattr(model, "logit_bias", None)
            class_loss, _ = contrastive_loss(by_class, read, right, scale, bias)
            patch_loss, accuracy = contrastive_loss(by_patches, read, right, scale, bias)
            loss = (1 - args.patch_weight) * class_loss + args.patch_weight * patch_loss

            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # as in the paper: sharper than 1/100 is unstable

            bar.update()
            if step % 10 == 0 or done == 1:
                if not loss.isfinite():  # then no later step will be
                    raise ValueError(f"step {step}: the loss is {loss.item()}. Type a smaller --learning_rate")
                speed = step * args.batch_size / (time.time() - begun)
                shown = {"loss": loss, "temperature": 1 / scale, "found_in_batch": accuracy}
                shown = {key: f"{value.item():.3f}" for key, value in shown.items()}
                bar.set_postfix({"epoch": epoch} | shown | {"pictures/s": f"{speed:.0f}"}, refresh=False)
            if done == 1:
                break

        if done == 1 or epoch % args.val_interval == 0:
            if not loss.isfinite():
                raise ValueError(f"step {step}: the loss is {loss.item()}. Type a smaller --learning_rate")
            figures = {path: retrieval(model, processor, *split, device) for path, split in vals.items()}
            for path, figure in figures.items():
                bar.write(f"epoch {epoch}, {path}: " + ", ".join(f"{key} {value}%" for key, value in figure.items()))
            command = "python -m scripts.train_clip " + shlex.join(sys.argv[1:] if argv is None else argv)
            seconds = round(time.time() - started)
            metrics = {"command": command, "steps": step, "epochs": epoch, "seconds": seconds}
            metrics |= {"loss": loss.item(), "retrieval": figures}
            save(model, config, processor, args.out_dir, args.vision_only, metrics)
        if done == 1:
            break
    bar.close()
    print(f"{args.out_dir}: an encoder. Next: python train_pretrain_vlm.py --vision_model_path {args.out_dir}")


if __name__ == "__main__":
    run_main(main)

"""Train a CLIP or SigLIP from scratch on your own pictures and captions: an encoder without any download.

    python -m scripts.train_clip --data_path train.jsonl --images_path images \\
        --tokenizer_path out/tokenizer --out_dir out/clip --val_path val.jsonl
    python -m scripts.train_clip --help

A picture encoder and a text encoder learn together: the vectors of a picture and its caption should have the same
direction, those of other pairs in the batch different ones (Radford et al. 2021, https://arxiv.org/abs/2103.00020). The
picture half has the layout of any CLIP on the hubs: python train_pretrain_vlm.py --vision_model_path out/clip

    picture ── ViT ─┬─ class token ─ visual_projection ─┐
                    ├─ patches ───── visual_projection ─┼─ cosine / temperature
    caption ── causal transformer ─ text_projection ────┘

The loss is InfoNCE in both directions: of the (B, B) logits the diagonal is right. With `--kind siglip` a head that
attends to the patches replaces class token and visual_projection, and each of the (B, B) pairs is classified separately
as right or wrong (towers.py). With `--captions_per_picture 3` each picture brings three captions, all of them right.

A language model reads the patches, so half of the contrastive loss is on them: with a class token alone, the patches of
the last layer would get no gradient. For captions of the whole picture the loss uses their mean. If each caption is
about one object, `--patch_pool max` uses the patch that fits best, so that patches learn what is where (as FILIP does
for single words, https://arxiv.org/abs/2111.07783). The usual output, of CLIP's class token or SigLIP's head, is
trained as well; retrieval is measured on it.

Shapes: B batch, T tokens, P patches, V width of the ViT, E of the shared space.
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.train_clip instead of scripts/train_clip")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

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
from scripts.train_clip.captions import draw_captions, drop_tokens, load_split
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
from trainer.augment import augment
from trainer.optimizer import Muon, set_learning_rate

# ---------------------------------------------------------------------------- optimizer


def make_optimizer(model, args, dtype=torch.float32):
    """Builds AdamW; with --muon_learning_rate, Muon for the matrices of the blocks, which multiplies in `dtype`. Each
    group stores its peak rate in "peak"; `set_learning_rate` scales it."""
    muon, groups = bool(args.muon_learning_rate), {}
    for name, weight in model.named_parameters():
        decays = weight.ndim >= 2  # norms, biases and the temperature do not
        group = {"muon": muon and decays and ".layers." in name, "weight_decay": args.weight_decay if decays else 0.0}
        group["peak"] = args.muon_learning_rate if group["muon"] else args.learning_rate
        groups.setdefault(tuple(group.values()), {"params": [], **group})["params"].append(weight)
    settings = {"betas": (0.9, 0.98), "eps": 1e-6}
    return Muon([*groups.values()], dtype, **settings) if muon else torch.optim.AdamW([*groups.values()], **settings)


# ---------------------------------------------------------------------------- validation and saving


@torch.no_grad()
def retrieval(model, processor, pictures, captions, device) -> dict[str, float]:
    """Returns recall@1 and @5 in percent, in both directions: how often a right one is among the k best of the set.

    captions: see `load_split`. For a picture with several captions any of them is right; for a caption of several
    pictures any of these.
    """
    model.eval()
    pixels = (processor.normalize(pictures[part].to(device)) for part in torch.arange(len(pictures)).split(128))
    seen = torch.cat([encode_pictures(model, part)[0][:, 0] for part in pixels])
    texts, numbers = captions
    read = torch.cat([encode_texts(model, part.to(device)) for part in texts.split(128)])
    model.train()
    scores = (seen @ read.T).cpu()  # (N, M)
    pairs = torch.zeros(len(numbers), len(texts) + 1, dtype=torch.bool).scatter(1, numbers, True)[:, :-1]  # (N, M)
    # The rank counts the wrong ones that score at least as high: an encoder that sees no difference finds nothing.
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
    """Writes an ordinary folder of its kind. Files are written under other names and renamed: none is ever partial."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if vision_only:
        state = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    # Not save_file: only the owner could read its file.
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    write_safely(folder / "model.safetensors", lambda file: file.write(weights))
    for name, content in (folder_configs(config, processor, vision_only) | {"metrics": metrics}).items():
        write_json(folder / f"{name}.json", content)


# ---------------------------------------------------------------------------- the run


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--data_path", nargs="+", required=True, metavar="PATH", help="rows of any shape; answers are captions")
    add("--images_path", metavar="PATH", help="folder or zip of the pictures; default: next to the rows")
    add("--tokenizer_path", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    add("--out_dir", type=Path, required=True, help="folder for the encoder, created if needed")
    add("--val_path", nargs="+", default=[], metavar="PATH", help="held-out rows; retrieval is measured for each file")
    add("--epochs", type=positive(int), default=30, help="passes over the pictures")
    add("--batch_size", type=positive(int), default=64, help="pictures per step; each is contrasted with the others")
    add("--learning_rate", type=positive(float), default=1e-3, help="peak of the cosine schedule")
    muon = "use Muon for the matrices of the blocks, with this peak; default: AdamW for all weights"
    add("--muon_learning_rate", type=positive(float), help=muon)
    add("--device", default="auto", metavar="NAME", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu")
    precision = "precision of the arithmetic; auto: bfloat16 on CUDA, else float32"
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=precision)

    add = parser.group("the encoder").add_argument
    add("--kind", choices=["clip", "siglip"], default="clip", help="class token and softmax, or head and sigmoid")
    add("--image_size", type=positive(int), default=128, help="edge of the pictures, pixels")
    add("--patch_size", type=positive(int), default=16, help="edge of a patch, pixels")
    add("--hidden_size", type=positive(int), default=192, help="width of the picture encoder; heads are 64 wide")
    add("--num_hidden_layers", type=positive(int), default=6, help="layers of the picture encoder")
    add("--text_hidden_size", type=positive(int), default=192, help="width of the caption encoder")
    add("--text_num_hidden_layers", type=positive(int), default=2, help="layers of the caption encoder")
    add("--projection_dim", type=positive(int), default=192, help="width of the shared space; SigLIP: --hidden_size")
    add("--max_text_len", type=positive(int), default=32, help="tokens per caption, with its end; the rest is cut off")
    add("--vision_only", action="store_true", help="save only the picture half, which is all that other scripts need")

    add = parser.group("how it learns").add_argument
    minutes = "train for this time instead of --epochs; not reproducible"
    add("--max_minutes", type=positive(float), metavar="MINUTES", help=minutes)
    several = "captions per picture in a step, if it has several: more to learn from in little more time"
    add("--captions_per_picture", type=positive(int), default=1, metavar="N", help=several)
    add("--weight_decay", type=float, default=0.1, help="weight decay of matrices; norms and biases have none")
    add("--warmup_iters", type=not_negative, default=100, help="steps of linear warmup")
    add("--patch_weight", type=float, default=0.5, help="share of the patches in the contrastive loss, 0 to 1")
    add("--patch_pool", choices=["mean", "max"], default="mean", help="a caption is about all patches, or about one")
    add("--mask_ratio", type=float, default=0.0, help="share of the patches dropped in training, 0 to below 1")
    dropped = "share of a caption's tokens dropped in training, 0 to below 1"
    add("--text_mask_ratio", type=float, default=0.0, metavar="SHARE", help=dropped)
    add("--min_scale", type=float, default=0.4, help="smallest random crop, share of the area; 1: the whole picture")
    add("--flip", action="store_true", help="mirror half of the pictures; left and right then look the same")
    add("--val_interval", type=positive(int), default=10, help="epochs between validations, which also save")
    add("--seed", type=not_negative, default=42, help="seed of weights, order, captions and crops")
    add_urls_argument(parser)
    kept = "keep decoded pictures in memory if they fit into this size"
    add("--cache_gb", type=float, default=8.0, metavar="GB", help=kept)
    return parser.parse_args(argv)


def check(args) -> None:
    """Raises ValueError for flags that cannot work together, before anything is read."""
    if args.image_size % args.patch_size:
        raise ValueError(f"--image_size {args.image_size} is not a multiple of --patch_size {args.patch_size}")
    for name in ("hidden_size", "text_hidden_size"):
        if getattr(args, name) % heads(getattr(args, name)):
            raise ValueError(f"--{name} {getattr(args, name)} does not divide into heads: choose a multiple of 64")
    if args.kind == "siglip" and args.projection_dim != args.hidden_size:
        width = f"for SigLIP it is the width of the picture encoder: use --projection_dim {args.hidden_size}"
        raise ValueError(f"--projection_dim {args.projection_dim}: {width}")
    for name in ("batch_size", "max_text_len"):  # another picture to contrast with; a token and the end
        if getattr(args, name) < 2:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 2")
    shares = {"patch_weight": (0, 1), "mask_ratio": (0, 0.95), "text_mask_ratio": (0, 0.95), "min_scale": (0.01, 1)}
    for name, (low, high) in shares.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: must be {low} to {high}")
    if (args.out_dir / "config.json").exists():
        raise ValueError(f"--out_dir {args.out_dir} contains an encoder already: choose another folder, or remove it")


def choose_dtype(name: str, device) -> torch.dtype:
    """Returns the dtype that the encoders compute in; prints a hint if another one would be faster."""
    if name == "auto" and device.type == "cpu" and cpu_has("amx_bf16"):
        print("this CPU supports bfloat16: with --dtype bfloat16 a step takes about two thirds of the time")
    return torch.bfloat16 if name == "bfloat16" or (name, device.type) == ("auto", "cuda") else torch.float32


def main(argv=None):
    args, started = parse_args(argv), time.time()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--nproc_per_node: the encoder trains in one process. Use python instead of torchrun")
    check(args)
    device = pick_device(args.device)
    make_deterministic(args.seed)

    # ------------------------------------------------------------------------ data
    tokenizer = load_tokenizer(args.tokenizer_path)
    processor = build_processor(args.kind, args.image_size)
    pictures, (captions, numbers) = load_split(args, args.data_path, "--data_path", tokenizer, processor)
    vals = {path: load_split(args, [path], "--val_path", tokenizer, processor) for path in args.val_path}
    if args.batch_size > len(pictures):
        raise ValueError(f"--batch_size {args.batch_size}: there are only {len(pictures)} pictures")
    steps_per_epoch = len(pictures) // args.batch_size
    steps = steps_per_epoch * args.epochs

    # ------------------------------------------------------------------------ model and optimizer
    config = build_config(args, len(tokenizer))
    model = build_model(config).to(device).train()
    dtype = choose_dtype(args.dtype, device)
    if device.type == "cpu" and dtype == torch.bfloat16:  # with few tokens the backward pass of PyTorch's own is slow
        model.set_attn_implementation("eager")
    total, seeing = (sum(weight.numel() for weight in part.parameters()) / 1e6 for part in (model, model.vision_model))
    print(f"{total:.1f}M parameters, {seeing:.1f}M of them in the picture encoder, on {device}")
    weights = list(model.parameters())
    optimizer = make_optimizer(model, args, dtype)

    # ------------------------------------------------------------------------ steps
    step, begun = 0, time.time()
    bar = tqdm(total=None if args.max_minutes else steps, mininterval=2)
    for epoch in itertools.count(1):
        # Every picture occurs at most once per epoch: twice in a batch, it would be contrasted with itself.
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
            number = draw_captions(theirs, len(captions), args.captions_per_picture)  # (M,), M = B with one each
            right = (theirs[:, :, None] == number).any(dim=1).to(device)  # (B, M)
            texts = captions[number]  # (M, T)
            if args.text_mask_ratio:
                texts = drop_tokens(texts, args.text_mask_ratio)
            with autocast(device, dtype):
                by_class, by_patches = encode_pictures(model, pixels, args.patch_pool, args.mask_ratio)
                read = encode_texts(model, texts.to(device))  # (M, E)
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
                if not loss.isfinite():  # nor will any later loss be
                    raise ValueError(f"step {step}: the loss is {loss.item()}. Use a smaller --learning_rate")
                speed = step * args.batch_size / (time.time() - begun)
                shown = {"loss": loss, "temperature": 1 / scale, "found_in_batch": accuracy}
                shown = {key: f"{value.item():.3f}" for key, value in shown.items()}
                bar.set_postfix({"epoch": epoch} | shown | {"pictures/s": f"{speed:.0f}"}, refresh=False)
            if done == 1:
                break

        if done == 1 or epoch % args.val_interval == 0:
            if not loss.isfinite():
                raise ValueError(f"step {step}: the loss is {loss.item()}. Use a smaller --learning_rate")
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
    print(f"encoder written to {args.out_dir}. Next: python train_pretrain_vlm.py --vision_model_path {args.out_dir}")


if __name__ == "__main__":
    run_main(main)

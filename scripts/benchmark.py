"""How fast is it, and what makes it so? Training, reading pictures, answering and starting, against the original way.

    python -m scripts.benchmark                            # everything this machine can do
    python -m scripts.benchmark --kinds sft generation --rounds 5
    python -m scripts.benchmark --size tiny                # seconds: does it run?

The original way pads all rows to --max_seq_len, computes softmax over T×T in the open and logits for every position,
loads all of CLIP and runs it in fp32 on every picture of every epoch. Each further row of a table adds one improvement
to the row above it. All rows train the same weights on the same rows, in turn, round after round; the ratio is that of
the same round. Weights are random, of the shapes of the 26M model and CLIP ViT-B/16: speed does not depend on them.

Writes docs/results/benchmark_{device}.md and .json.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.benchmark instead of scripts/benchmark.py")

from common.start import begin, unwind

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import getdoc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from common import distributed
from common.cli import Parser, positive, run_main
from common.devices import autocast, check_compiler, pick_device
from common.files import write_json, write_text
from common.machine import usable_cores
from dataset.batches import StepSampler, collate
from dataset.lm_dataset import VLMDataset
from model.int8 import to_int8
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing import IGNORE, ImageProcessor, load_tokenizer
from scripts.report import cpu_name
from trainer.acceleration import better_in_blocks, cast_frozen, choose_attention, compile_layers
from trainer.checkpoint import State
from trainer.loader import make_loader
from trainer.loop import count_labels, to_device, train_step
from trainer.optimizer import choose_trainable, make_optimizer

PUBLIC_ROWS = {"pretrain": 595_000, "sft": 300_000}
SIZES = {  # of the decoder and of the encoder
    "26m": ({}, {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "tiny": (
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 2500},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
}


# ---------------------------------------------------------------------------- the work


def example(kind: str, row: int, random, vocab: int, max_length: int) -> dict:
    """A row as `VLMDataset` gives it, but for its picture: a question, an answer, random tokens.

    A caption has 35 tokens on average, with picture and question about 260. A conversation has one to three answers,
    70 tokens each on average, log-normal as lengths of texts are.
    """
    ids, labels = [], []
    for turn in range(1 if kind == "pretrain" else int(random.integers(1, 4))):
        question = [34] * 196 if turn == 0 else []
        question = [*random.integers(100, vocab, 30 - 10 * bool(turn)), *question]
        mean, sigma = (35, 0.4) if kind == "pretrain" else (70, 0.6)
        answer = random.integers(100, vocab, max(int(random.lognormal(math.log(mean) - sigma**2 / 2, sigma)), 3))
        ids += [*question, *answer]
        labels += [*[IGNORE] * len(question), *answer]
    ids, labels = (torch.tensor(np.array(part[:max_length], dtype=np.int64)) for part in (ids, labels))
    return {"row": row, "input_ids": ids, "labels": labels}


def examples_of(kind: str, args) -> list[dict]:
    """--rows of them, the same for everything that is compared, sorted by length.

    They are batches spread evenly over a window of training's `StepSampler`. Just so many rows, sorted for themselves,
    would differ more in length within a batch: 18% of padding where training has 2%.
    """
    random, vocab = np.random.default_rng(0), VLMConfig(**SIZES[args.size][0]).vocab_size
    window = max(32 * args.batch_size, args.rows)
    rows = [example(kind, row, random, vocab, args.max_seq_len) for row in range(window)]
    rows.sort(key=lambda each: len(each["input_ids"]))
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    taken = -(-args.rows // args.batch_size)
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * taken)] for i in range(taken)]
    rows = [row for batch in chosen for row in batch][: args.rows]
    pictures = torch.from_numpy(random.integers(0, 256, (len(rows), 1, 3, 224, 224), dtype=np.uint8))
    return [row | {"pictures": picture} for row, picture in zip(rows, pictures)]


@cache
def make_encoder(size: str) -> CLIPVisionModel:
    encoder = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16, **SIZES[size][1]))
    return encoder.eval().requires_grad_(False)


def make_model(size: str, **kwargs) -> MiniMindVLM:
    """Random weights. The pictures' encoder has the shape of CLIP ViT-B/16, or a small one of as many patches."""
    torch.manual_seed(0)
    decoder, encoder = SIZES[size]
    model = MiniMindVLM(VLMConfig(ve_hidden_size=encoder["hidden_size"], **decoder, **kwargs), None)
    model.vision_encoder = make_encoder(size)
    model.processor = ImageProcessor()
    return model


# ---------------------------------------------------------------------------- a training step, the original way or ours


@dataclass(frozen=True)
class Way:
    """How a step is made. The defaults are the original way."""

    name: str = "the original way"
    short: bool = False  # rows of like length together, padded to the longest of their batch
    sdpa: bool = False  # fused attention
    lean: bool = False  # logits, loss and last feed-forward at labelled positions
    fused: bool = False  # optimizer; and CLIP without its text half
    bf16: bool = False  # instead of fp32, CLIP included; on a GPU the original way has it too, but for CLIP
    in_blocks: bool = False  # attention; on CPUs with AMX
    compiled: bool = False
    cached: bool = False  # picture features from --cache_features


def ways(device: torch.device, compile: bool) -> list[Way]:
    """Each adds something to the one before. Raises ValueError where this device cannot `compile`."""
    if compile:
        check_compiler(device)
    way = Way()
    found = [way]
    for name, change in [
        ("+ rows of like length, padded to their longest", {"short": True}),
        ("+ fused attention", {"sdpa": True}),
        ("+ logits and last feed-forward only where there is a label", {"lean": True}),
        ("+ fused AdamW, CLIP without its text half", {"fused": True}),
        ("+ bfloat16" + (" for CLIP" if device.type == "cuda" else ""), {"bf16": True}),
        *([("+ attention in blocks", {"in_blocks": True})] if better_in_blocks(device, torch.bfloat16) else []),
        *([("+ torch.compile of each layer", {"compiled": True})] if compile else []),
        ("+ picture features cached", {"cached": True}),
    ]:
        way = replace(way, name=name, **change)
        found.append(way)
    return found


class Forward(nn.Module):
    """The forward pass of a way. The original one computes logits for all positions and masks the loss afterwards."""

    def __init__(self, model, way: Way):
        super().__init__()
        self.model, self.way = model, way

    def forward(self, input_ids, pixel_values, labels, image_features=None, num_items_in_batch=1, **args):
        if image_features is None:
            # In fp32 without bf16, on a GPU too, where all else of the original way has autocast.
            with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.way.bf16):
                image_features = self.model.encode_pictures(pixel_values)
        args |= {"image_features": image_features, "num_items_in_batch": num_items_in_batch}
        if self.way.lean:
            return self.model(input_ids, labels=labels, **args)
        out = self.model(input_ids, **args | {"return_logits": True})
        logits, targets = out.logits[:, :-1].float(), labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
        out.loss = (losses * (targets != IGNORE).flatten()).sum() / num_items_in_batch
        return out


def batches_of(examples: list[dict], way: Way, batch_size: int, max_length: int) -> list[dict]:
    lengths = [len(each["input_ids"]) for each in examples]
    sampler = StepSampler(lengths, batch_size, shuffle=way.short)
    order = sampler.all_batches() if way.short else np.array_split(np.arange(len(examples)), sampler.batches)
    batches = [collate([examples[i] for i in rows]) for rows in order]
    for batch in batches if not way.short else ():
        room = max_length - batch["input_ids"].shape[1]
        for key, value in (("input_ids", 0), ("labels", IGNORE), ("attention_mask", 0)):
            batch[key] = F.pad(batch[key], (0, room), value=value)
    return batches


class Training:
    """Steps of one way, on weights that all ways begin with."""

    def __init__(self, kind: str, way: Way, args, device, examples, **config):
        self.way, self.device, self.dtype = way, device, torch.bfloat16 if way.bf16 else torch.float32
        if device.type == "cuda":
            self.dtype = torch.bfloat16
        self.model = make_model(args.size, flash_attn=way.sdpa, **config).to(device).train()
        choose_trainable(self.model, "last_layer" if kind == "pretrain" else "all")
        if way.bf16:  # of its own, as all ways share one encoder
            self.model.vision_encoder = cast_frozen(copy.deepcopy(self.model.vision_encoder), self.dtype)
        forward = Forward(self.model, way)
        if not way.fused and args.size != "tiny":
            self.unused = CLIPModel(CLIPConfig()).text_model.to(device)
        if way.in_blocks:
            choose_attention(self.model, device, self.dtype)
        if way.compiled:
            compile_layers(self.model)
        if distributed.world_size() > 1:
            forward = nn.parallel.DistributedDataParallel(forward, forward_sync_buffers=False)
        if way.fused:
            optimizer = make_optimizer(self.model, 2e-4, 2e-4, 0.1)
        else:
            optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], lr=2e-4)
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        self.run = SimpleNamespace(
            args=SimpleNamespace(seed=0, warmup_iters=0, schedule="cosine", grad_clip=1.0, batch_size=args.batch_size),
            model=self.model,
            forward=forward,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(device.type, enabled=False),
            state=State(),
            total_steps=10**9,
            device=device,
            dtype=self.dtype,
        )
        self.batches = batches_of(examples, way, args.batch_size, args.max_seq_len)
        if way.cached:
            self.batches = [self.with_features(batch) for batch in self.batches]
        if device.type == "cuda":
            self.batches = [
                {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
                for batch in self.batches
            ]

    @torch.no_grad()
    def with_features(self, batch: dict) -> dict:
        with autocast(self.device, self.dtype):
            features = self.model.encode_pictures(batch["pixel_values"].to(self.device))
        return batch | {"image_features": features.half().cpu(), "pixel_values": None}

    def step(self, batch: dict) -> float:
        """Returns the loss per label."""
        loss, _, _ = train_step(self.run, [batch], count_labels(batch), len(batch["rows"]))
        self.run.state.step += 1
        return loss

    def first_loss(self, batch: dict) -> float:
        """Of the weights that all ways begin with, on a batch that is the same for all."""
        batch = self.with_features(batch) if self.way.cached else batch
        with autocast(self.device, self.dtype):  # with gradients, as what is compiled then serves the steps too
            return self.run.forward(
                **to_device(batch, self.model), num_items_in_batch=count_labels(batch), return_logits=False
            ).loss.item()

    def all_steps(self) -> float:
        """Seconds for all batches."""
        synchronize(self.device)
        started = time.perf_counter()
        for batch in self.batches:
            self.step(batch)
        synchronize(self.device)
        return time.perf_counter() - started


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def useful_flops(model, examples, kind: str, cached: bool) -> float:
    """Of a pass over these rows without any waste: no padding, causal attention, logits where there are labels.

    A multiply-add is two. Weights that learn take three times the forward pass, frozen ones between them two.
    """
    blocks = model.model.layers
    each = sum(weight.numel() for weight in blocks[0].parameters() if weight.ndim == 2)
    learning = len(blocks) if kind != "pretrain" else 1
    passes = 2 * len(blocks) + learning  # of a block: forward, back through the activations, and for the weights
    head, width = model.lm_head.weight.numel(), model.config.hidden_size
    total = 0.0
    for row in examples:
        tokens, labels = len(row["input_ids"]), int((row["labels"] != IGNORE).sum())
        total += 2 * each * tokens * passes + 2 * head * labels * (2 if kind == "pretrain" else 3)
        total += 2 * tokens**2 * width * 3 * len(blocks)  # q·kᵀ and ·v, over half of T×T, forward and back
    if not cached:
        encoder = sum(weight.numel() for weight in model.vision_encoder.parameters() if weight.ndim == 2)
        total += len(examples) * 2 * encoder * 197
    return total


def matrix_rate(device, dtype) -> float:
    """FLOP/s of large matrix products, the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(2):
            a @ b
        synchronize(device)
        best = min(best, (time.perf_counter() - started) / 2)
    return 2 * n**3 / best


class PeakMemory:
    """Most memory (bytes) within `with`: of the GPU, or of this process where Linux can tell."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        return self

    def __exit__(self, *exception):
        self.bytes = math.nan
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif Path("/proc/self/status").exists():
            status = Path("/proc/self/status").read_text()
            self.bytes = int(status.split("VmHWM:")[1].split()[0]) * 1024


def compare(row: dict, first: dict) -> dict:
    """How many times as fast as the first, by the times of the same round."""
    ratios = [other / own for other, own in zip(first["seconds"], row["seconds"])]
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def training_table(kind: str, args, device) -> list[dict]:
    examples = examples_of(kind, args)
    tokens = sum(len(each["input_ids"]) for each in examples)
    same = collate(examples[:4])
    rates = {}
    torch.compiler.reset()  # there is a limit to how much may be compiled of one function
    rows = [{"name": way.name, "seconds": [], "way": way} for way in ways(device, args.compile)]
    for round_ in range(args.rounds):
        for row in rows:
            training = Training(kind, row["way"], args, device, examples)
            if round_ == 0:
                row["loss"] = training.first_loss(same)
                row["padding"] = 1 - tokens / sum(batch["input_ids"].numel() for batch in training.batches)
            training.step(training.batches[0])  # allocates, compiles
            with PeakMemory(device) as memory:
                row["seconds"].append(training.all_steps())
            row["memory_gb"] = max(row.get("memory_gb", 0), memory.bytes / 1e9)
            dtype = training.dtype
            rates[dtype] = rates.get(dtype) or matrix_rate(device, dtype)
            flops = useful_flops(training.model, examples, kind, row["way"].cached)
            row["utilisation"] = flops / statistics.median(row["seconds"]) / rates[dtype]
            show(f"  {kind}, round {round_ + 1}: {row['name']}: {args.rows / row['seconds'][-1]:.2f} samples/s")
            del training
    for row in rows:
        row.pop("way")
        seconds = statistics.median(row["seconds"])
        row |= {"samples_per_s": args.rows / seconds, "tokens_per_s": tokens / seconds}
        row |= compare(row, rows[0])
    return rows


def experts_table(args, device) -> list[dict]:
    """A mixture of experts against a dense decoder that computes as much for each token: SFT steps, our way."""
    ours, examples = ways(device, compile=False)[-1], examples_of("sft", args)
    config = VLMConfig(**SIZES[args.size][0])
    active = config.num_experts_per_tok + config.n_shared_experts
    rows = [
        {"name": "dense, as wide as the active experts", "seconds": [], "config": {}},
        {"name": "mixture of experts", "seconds": [], "config": {"use_moe": True}},
    ]
    rows[0]["config"]["intermediate_size"] = active * config.intermediate_size
    for _ in range(args.rounds):
        for row in rows:
            training = Training("sft", ours, args, device, examples, **row["config"])
            training.step(training.batches[0])
            row["seconds"].append(training.all_steps())
            del training
    for row in rows:
        del row["config"]
        row["samples_per_s"] = args.rows / statistics.median(row["seconds"])
        row |= compare(row, rows[0])
    return rows


def ranks_table(args, device) -> list[dict]:
    """One process on one core against two on two, gloo between them: SFT steps with cached features."""
    flags = ["--size", args.size, "--rows", args.rows, "--batch_size", args.batch_size, "--rounds", args.rounds]
    rows = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
        command += ["-m", "scripts.benchmark", *flags, "--device", "cpu", "--as_rank"]
        out = subprocess.run(
            list(map(str, command)), check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        seconds = json.loads(out.stdout.splitlines()[-1])
        rows.append({"name": f"{processes} process{'es' * (processes > 1)}, a core each", "seconds": seconds})
        rows[-1]["samples_per_s"] = processes * args.rows / statistics.median(seconds)
        rows[-1]["ratio"] = rows[-1]["samples_per_s"] / rows[0]["samples_per_s"]
    return rows


def as_rank(args, device) -> None:
    """What each process of `ranks_table` does: as many rows in each, in steps of which all ranks make a part."""
    distributed.start(device)
    way = replace(ways(device, compile=False)[-1], bf16=False)
    training = Training("sft", way, args, device, examples_of("sft", args))
    training.step(training.batches[0])
    seconds = [training.all_steps() for _ in range(args.rounds)]
    distributed.say(json.dumps(seconds))  # the group is left by run_main, when the model that it serves is gone


# ---------------------------------------------------------------------------- pictures


def pipeline_table(args, device) -> list[dict]:
    """From 128×128 JPEGs of photo-like noise to rows, on one core. Then how long steps of our way, without cached
    features, wait for batches from --num_workers processes."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for number in range(64):
            coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((128, 128))
            fine = np.clip(np.asarray(coarse) + random.normal(0, 6, (128, 128, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(fine).save(folder / f"{number}.jpg", quality=90)
        turns = [{"role": "user", "content": "What is this?\n<image>"}]
        turns.append({"role": "assistant", "content": "A star. " * 8})
        rows = max(4 * args.rows + args.batch_size, 512)
        lines = [json.dumps({"conversations": turns, "image": f"{row % 64}.jpg"}) for row in range(rows)]
        (folder / "rows.jsonl").write_text("\n".join(lines))
        tokenizer = load_tokenizer("model/tiny")
        data = VLMDataset(folder / "rows.jsonl", folder, tokenizer, ImageProcessor(), 640)
        size = sum(path.stat().st_size for path in folder.glob("*.jpg")) / 64
        found = []
        torch.set_num_threads(1)  # as in a worker; others would count the time in which they wait for each other
        for name, part in [
            (f"read and decode a JPEG of {size / 1000:.1f} KB", lambda i: decode(folder / f"{i % 64}.jpg")),
            ("and make it 224×224 (bicubic)", lambda i: data.load_picture(i, f"{i % 64}.jpg")),
            ("a row: tokens and picture", lambda i: data[i]),
        ]:
            seconds = []
            for _ in range(args.rounds + 1):  # the first time the disk is cold
                started = time.process_time()
                for i in range(500):
                    part(i % len(data))
                seconds.append(time.process_time() - started)
            found.append({"name": name, "pictures_per_s_and_core": 500 / statistics.median(seconds[1:])})
        torch.set_num_threads(args.threads)
        share = waiting_share(args, device, data, tokenizer)
        found.append({"name": "share of the time that steps wait for their batches", "waiting": share})
    return found


def decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def waiting_share(args, device, data, tokenizer) -> float:
    training = Training("sft", ways(device, args.compile)[-2], args, device, [])
    sampler = StepSampler(data.lengths, args.batch_size)
    batches = iter(make_loader(data, sampler, args, device, tokenizer))
    training.step(next(batches))  # allocates, compiles
    waited, began = 0.0, time.perf_counter()
    for _ in range(args.rows // args.batch_size * 4):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        training.step(batch)  # its loss is read back, so the device is done
    return waited / (time.perf_counter() - began)


# ---------------------------------------------------------------------------- answers


def generation_table(args, device) -> list[dict]:
    """Tokens per second of answers to a picture and a question: greedy, the picture encoded before."""
    random = np.random.default_rng(0)
    new = args.new_tokens
    rows = []
    for batch in (1, 16):
        for name, plain, eight in [
            ("the original way: attention in the open, keys copied for every head", True, False),
            ("fused attention, keys shared", False, False),
            *([("int8 weights", False, True)] if device.type == "cpu" else []),
        ]:
            rows.append({"name": name, "batch": batch, "plain": plain, "int8": eight, "seconds": [], "first": []})
    for _ in range(args.rounds):
        for row in rows:
            model = make_model(args.size, flash_attn=not row["plain"]).to(device).eval()
            vocab, batch = model.config.vocab_size, row["batch"]
            if row["int8"]:
                to_int8(model)
            ids = example("pretrain", 0, random, vocab, 640)["input_ids"][:226].to(device)
            ids = ids.expand(batch, -1)
            features = torch.zeros(batch, 196, model.config.ve_hidden_size, device=device)
            greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            mask = torch.ones_like(ids)
            for tokens, key in ((1, "first"), (1, "first"), (new, "seconds")):  # the first time warms up
                synchronize(device)
                started = time.perf_counter()
                with torch.no_grad(), autocast(device, torch.bfloat16 if device.type == "cuda" else torch.float32):
                    model.generate(
                        input_ids=ids, attention_mask=mask, image_features=features, max_new_tokens=tokens, **greedy
                    )
                synchronize(device)
                row[key].append(time.perf_counter() - started)
    for row in rows:
        original = next(each for each in rows if each["batch"] == row["batch"])
        row["first_token_s"] = statistics.median(row.pop("first"))
        row["tokens_per_s"] = row["batch"] * new / statistics.median(row["seconds"])
        row |= compare(row, original)
        row["against_one_stream"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        del row["plain"], row["int8"]
    return rows


# ---------------------------------------------------------------------------- starting


def startup_table(args, device) -> list[dict]:
    """From the command to its end. The model is as it begins, of the size of the built-in bundle."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        Image.new("RGB", (72, 72), "red").save(picture)
        bundle = Path("model/tiny")
        llm = next(bundle.glob("llm_*.pth"))
        ask = ["eval_vlm.py", "--tokenizer_path", bundle, "--vision_model_path", bundle / "clip", "--weights", llm]
        ask += ["--image", picture, "--prompt", "What is this?", "--greedy", "--max_new_tokens", 10, "--device", device]
        rows = []
        for name, command in (("python eval_vlm.py --help", ["eval_vlm.py", "--help"]), ("its first answer", ask)):
            seconds = []
            for _ in range(args.rounds):
                started = time.perf_counter()
                subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - started)
            rows.append({"name": name, "seconds": seconds, "median_s": statistics.median(seconds)})
    return rows


TABLES = {
    "pretrain": partial(training_table, "pretrain"),
    "sft": partial(training_table, "sft"),
    "experts": experts_table,
    "ranks": ranks_table,
    "pipeline": pipeline_table,
    "generation": generation_table,
    "startup": startup_table,
}


# ---------------------------------------------------------------------------- the report


def show(line: str) -> None:
    print(line, flush=True)


def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows))


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.1f} min"


def span(row: dict) -> str:
    low, high = row["ratio_range"]
    return f"{row['ratio']:.2f}× ({low:.2f} to {high:.2f})"


def report(found: dict) -> str:
    about = found["about"]
    parts = [
        f"# Benchmark: {about['device_name']}",
        f"`{about['command']}`, commit {about['commit']}, {about['date']}. {about['threads']} threads, PyTorch "
        f"{about['torch']}, Transformers {about['transformers']}, Python {about['python']}. Decoder and encoder: "
        f"{about['size']}, random weights. Each figure is the median of {about['rounds']} rounds, each ratio that of "
        "times of the same round, with the lowest and highest in brackets.",
    ]
    for kind in ("pretrain", "sft"):
        if kind in found:
            rows = [
                [
                    row["name"],
                    f"{row['samples_per_s']:.2f}",
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['padding']:.0%}",
                    f"{row['utilisation']:.0%}",
                    f"{row['memory_gb']:.1f}",
                    span(row),
                    f"{row['loss']:.6f}",
                ]
                for row in found[kind]
            ]
            head = ["", "samples/s", "real tokens/s", "padding", "useful FLOP/s of peak", "GB", "ratio", "first loss"]
            with_clip, cached = (duration(PUBLIC_ROWS[kind] / row["samples_per_s"]) for row in found[kind][-2:])
            limits = [row["ratio"] / row["utilisation"] for row in found[kind][-2:]]
            parts += [
                f"## {'Stage 1' if kind == 'pretrain' else 'Stage 2'}: a step of {kind}",
                f"{about['rows']} rows in batches of {about['batch_size']}, the original way at {about['max_seq_len']} "
                "tokens. Useful FLOP are those of real tokens, without any waste; peak is the measured rate of large "
                "matrix products in the same precision.",
                markdown(head, rows),
                f"One epoch of {PUBLIC_ROWS[kind]:,} rows at these rates: {with_clip}, with cached features "
                f"{cached}. The most that the last two rows could reach, with nothing but useful FLOP at the peak "
                f"rate: {limits[0]:.1f}× and {limits[1]:.1f}×.",
            ]
    if "experts" in found:
        rows = [[row["name"], f"{row['samples_per_s']:.2f}", span(row)] for row in found["experts"]]
        parts += ["## Experts", getdoc(experts_table), markdown(["", "samples/s", "ratio"], rows)]
    if "ranks" in found:
        rows = [[row["name"], f"{row['samples_per_s']:.2f}", f"{row['ratio']:.2f}×"] for row in found["ranks"]]
        parts += ["## Ranks", getdoc(ranks_table), markdown(["", "samples/s", "ratio"], rows)]
    if "pipeline" in found:
        *rates, waiting = found["pipeline"]
        rows = [[row["name"], f"{row['pictures_per_s_and_core']:,.0f}"] for row in rates]
        rows.append([waiting["name"], f"{waiting['waiting']:.1%}"])
        parts += ["## Pictures", getdoc(pipeline_table), markdown(["", "pictures/s and core"], rows)]
    if "generation" in found:
        rows = [
            [
                row["batch"],
                row["name"],
                f"{row['first_token_s']:.2f} s",
                f"{row['tokens_per_s']:.0f}",
                span(row),
                f"{row['against_one_stream']:.1f}×",
            ]
            for row in found["generation"]
        ]
        head = ["answers at once", "", "first token", "tokens/s", "ratio", "against one, the original way"]
        parts += ["## Answers", getdoc(generation_table), markdown(head, rows)]
    if "startup" in found:
        rows = [[row["name"], f"{row['median_s']:.2f} s"] for row in found["startup"]]
        parts += ["## Starting", getdoc(startup_table), markdown(["", "time"], rows)]
    return "\n\n".join(parts) + "\n"


def about(args, device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{usable_cores()} cores of {cpu_name()}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device_name": name,
        "command": " ".join(["python -m scripts.benchmark", *sys.argv[1:]]),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{key: getattr(args, key) for key in ("size", "rows", "batch_size", "max_seq_len", "rounds", "threads")},
    }


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--kinds", nargs="+", default=list(TABLES), choices=TABLES, metavar="KIND", help="what to measure")
    add("--device", default="auto", metavar="NAME", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu")
    add("--size", default="26m", choices=list(SIZES), help="of the model; tiny: to see whether all of it runs")
    add("--rounds", type=positive(int), default=3, help="how often everything is measured")
    add("--out_dir", type=Path, default=Path("results"), help="folder of the tables")
    add = parser.group("how much of it").add_argument
    add("--rows", type=positive(int), help="of a pass; default: 16, on a GPU 2048")
    add("--batch_size", type=positive(int), help="rows of a step; default: 8, on a GPU 32")
    add("--max_seq_len", type=positive(int), default=640, help="tokens to which the original way pads")
    add("--new_tokens", type=positive(int), default=64, help="of each answer")
    add("--num_workers", type=positive(int), default=2, help="processes that decode pictures")
    add("--threads", type=positive(int), default=torch.get_num_threads(), help="of a CPU")
    compiled = "torch.compile, in a row of its own; default: unless tiny"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    add("--as_rank", action="store_true", help=argparse.SUPPRESS)  # one of the processes of `ranks`
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    unwind()  # there are temporary files
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    args.rows, args.batch_size = args.rows or (2048 if gpu else 16), args.batch_size or (32 if gpu else 8)
    args.compile = args.size != "tiny" if args.compile is None else args.compile
    torch.set_num_threads(args.threads)
    if args.as_rank:
        return as_rank(args, device)
    found = {"about": about(args, device)}
    for kind in args.kinds:
        show(f"{kind} ...")
        found[kind] = TABLES[kind](args, device)
        write_json(args.out_dir / f"benchmark_{device.type}.json", found)
        text = report(found)
        write_text(args.out_dir / f"benchmark_{device.type}.md", text)
    show(f"\n{text}")
    return found


if __name__ == "__main__":
    run_main(main)

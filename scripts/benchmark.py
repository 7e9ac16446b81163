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
from functools import cache, partial
from inspect import getdoc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from common import distributed
from common.cli import Parser, positive, run_main
from common.devices import autocast, check_compiler, pick_device
from common.display import duration, markdown
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
from trainer.run import Run

PUBLIC_ROWS = {"pretrain": 595_000, "sft": 300_000}
SIZES = {  # of the decoder and of the encoder
    "26m": ({}, {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "tiny": (
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 2500},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
}
LADDER = {  # what each row of a table adds to the row above it
    "sorted": "rows of like length, padded to their longest",
    "fused_attention": "fused attention",
    "few_logits": "logits and last feed-forward only where there is a label",
    "fused_adamw": "fused AdamW, CLIP without its text half",
    "bf16": "bfloat16",  # on a GPU the original way has it too, but for CLIP
    "in_blocks": "attention in blocks",
    "compiled": "torch.compile of each layer",
    "cached": "picture features cached",
}


def ladder(device: torch.device, compile: bool) -> dict[str, set[str]]:
    """{name of a row: keys of LADDER}, each with one more than the one before. Raises ValueError where this device
    cannot `compile`."""
    if compile:
        check_compiler(device)
    fits = {"in_blocks": better_in_blocks(device, torch.bfloat16), "compiled": compile}
    has, rows = set(), {"the original way": set()}
    for key, name in LADDER.items():
        if fits.get(key, True):
            has = has | {key}
            rows[f"+ {name}" + " for CLIP" * (key == "bf16" and device.type == "cuda")] = has
    return rows


# ---------------------------------------------------------------------------- rows and weights


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


def batches_of(examples: list[dict], batch_size: int, pad_to: int = 0, pin: bool = False) -> list[dict]:
    """As training makes them: of like length, or in the order of the examples, padded to `pad_to` tokens."""
    sampler = StepSampler([len(each["input_ids"]) for each in examples], batch_size, shuffle=not pad_to)
    if pad_to:
        examples = [pad(each, pad_to - len(each["input_ids"])) for each in examples]
    return list(DataLoader(examples, batch_sampler=sampler.all_batches(), collate_fn=collate, pin_memory=pin))


def pad(example: dict, room: int) -> dict:
    ids, labels = F.pad(example["input_ids"], (0, room)), F.pad(example["labels"], (0, room), value=IGNORE)
    return example | {"input_ids": ids, "labels": labels}


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


# ---------------------------------------------------------------------------- clocks


def seconds(device, work, *args) -> float:
    """How long work(*args) takes, with all that it leaves the device to do."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work(*args)
    synchronize()
    return time.perf_counter() - started


def rate(amount: float, row: dict) -> float:
    return amount / statistics.median(row["seconds"])


def race(variants: dict, rounds: int, once) -> list[dict]:
    """[{"name", "seconds", "ratio", "ratio_range"}] of {name: variant}, measured in turn, round after round.

    once(row, variant) → seconds, and may note more in the row. The ratio is to the first variant in the same round.
    """
    rows = [{"name": name, "seconds": []} for name in variants]
    for _ in range(rounds):
        for row, variant in zip(rows, variants.values()):
            row["seconds"].append(once(row, variant))
    for row in rows:
        ratios = [first / mine for first, mine in zip(rows[0]["seconds"], row["seconds"])]
        row |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return rows


def reset_peak(device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device) -> float:
    """Most GB since `reset_peak`: of the GPU, or of this process where Linux can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9 if status.exists() else math.nan


@cache
def matrix_rate(device, dtype) -> float:
    """FLOP/s of large matrix products, the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.blocked_autorange(min_run_time=1).times)


def useful_flops(model, examples, kind: str, cached: bool) -> float:
    """Of a pass over these rows without any waste: no padding, causal attention, logits where there are labels.

    A multiply-add is two. Weights that learn take three times the forward pass, frozen ones between them two.
    """
    blocks = model.model.layers
    each = sum(weight.numel() for weight in blocks[0].parameters() if weight.ndim == 2)
    learning = len(blocks) if kind != "pretrain" else 1
    passes = 2 * len(blocks) + learning  # of a block: forward, back through the activations, and for the weights
    head, width = model.lm_head.weight.numel(), model.config.hidden_size
    encoder = sum(weight.numel() for weight in model.vision_encoder.parameters() if weight.ndim == 2)
    total = 0 if cached else len(examples) * 2 * encoder * 197
    for row in examples:
        tokens, labels = len(row["input_ids"]), int((row["labels"] != IGNORE).sum())
        total += 2 * each * tokens * passes + 2 * head * labels * (2 if kind == "pretrain" else 3)
        total += 2 * tokens**2 * width * 3 * len(blocks)  # q·kᵀ and ·v, over half of T×T, forward and back
    return total


# ---------------------------------------------------------------------------- training


def dtype_of(has: set[str], device) -> torch.dtype:
    return torch.bfloat16 if "bf16" in has or device.type == "cuda" else torch.float32


def all_logits(model, input_ids, labels, num_items_in_batch, **args):
    """The original forward pass: logits for every position, the loss masked afterwards."""
    out = model(input_ids, **args | {"return_logits": True})
    logits, targets = out.logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
    out.loss = (losses * (targets != IGNORE).flatten()).sum() / num_items_in_batch
    return out


class Training:
    """Steps with these improvements, on weights that all begin with; `train_step` takes it for the run."""

    context = Run.context
    total_steps = 1  # of which none is counted as done: the learning rate stays as it is

    def __init__(self, kind: str, has: set[str], args, device, examples, **config):
        """has: keys of LADDER."""
        self.device, self.dtype, self.state = device, dtype_of(has, device), State()
        flags = {"seed": 0, "warmup_iters": 0, "schedule": "cosine", "grad_clip": 1.0}
        self.args = SimpleNamespace(batch_size=args.batch_size, **flags)
        self.model = make_model(args.size, flash_attn="fused_attention" in has, **config).to(device).train()
        choose_trainable(self.model, "last_layer" if kind == "pretrain" else "all")
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.forward = self.improve(has, args)
        self.examples = self.with_features(examples) if "cached" in has else examples
        pad_to = 0 if "sorted" in has else args.max_seq_len
        self.batches = batches_of(self.examples, args.batch_size, pad_to, pin=device.type == "cuda")

    def improve(self, has: set[str], args):
        """Model and optimizer. Returns the forward pass."""
        model = self.model
        if "bf16" in has:  # of its own, as all share one encoder
            model.vision_encoder = cast_frozen(copy.deepcopy(model.vision_encoder), self.dtype)
        else:  # on a GPU too, where all else of the original way has autocast
            model.get_image_embeddings = torch.autocast(self.device.type, enabled=False)(model.get_image_embeddings)
        if "in_blocks" in has:
            choose_attention(model, self.device, self.dtype)
        if "compiled" in has:
            compile_layers(model)
        if "fused_adamw" in has:
            self.optimizer = make_optimizer(model, 2e-4, 2e-4, 0.1)
        else:
            learning = [weight for weight in model.parameters() if weight.requires_grad]
            self.optimizer = torch.optim.AdamW([{"params": learning, "peak": 2e-4}])
            self.text_half = CLIPModel(CLIPConfig()).text_model.to(self.device) if args.size != "tiny" else None
        if distributed.world_size() > 1:
            return DistributedDataParallel(model, forward_sync_buffers=False)
        return model if "few_logits" in has else partial(all_logits, model)

    @torch.no_grad()
    def with_features(self, examples: list[dict]) -> list[dict]:
        pictures = torch.cat([each["pictures"] for each in examples])
        with autocast(self.device, self.dtype):
            features = [self.model.encode_pictures(part.to(self.device)).half().cpu() for part in pictures.split(32)]
        return [each | {"features": one[None], "pictures": None} for each, one in zip(examples, torch.cat(features))]

    def step(self, batch: dict) -> None:
        train_step(self, [batch], count_labels(batch), len(batch["rows"]))

    def first_loss(self) -> float:
        """Per label, of the weights that all begin with, on a batch that is the same for all."""
        batch = collate(self.examples[:4])
        with autocast(self.device, self.dtype):  # with gradients, as what is compiled then serves the steps too
            inputs = to_device(batch, self.model)
            return self.forward(**inputs, num_items_in_batch=count_labels(batch), return_logits=False).loss.item()

    def all_steps(self) -> None:
        for batch in self.batches:
            self.step(batch)

    def measure(self) -> float:
        """Seconds for all batches, after a step that allocates and compiles."""
        self.step(self.batches[0])
        reset_peak(self.device)
        return seconds(self.device, self.all_steps)


def training_table(kind: str, args, device) -> list[dict]:
    examples, ways = examples_of(kind, args), ladder(device, args.compile)
    tokens = sum(len(each["input_ids"]) for each in examples)
    torch.compiler.reset()  # there is a limit to how much may be compiled of one function

    def once(row, has):
        training = Training(kind, has, args, device, examples)
        if not row["seconds"]:
            row["loss"] = training.first_loss()
            row["padding"] = 1 - tokens / sum(batch["input_ids"].numel() for batch in training.batches)
        spent = training.measure()
        row["memory_gb"] = max(row.get("memory_gb", 0), peak_memory(device))
        number, speed = len(row["seconds"]) + 1, args.rows / spent
        print(f"  {kind}, round {number}: {row['name']}: {speed:.2f} samples/s", flush=True)
        return spent

    rows = race(ways, args.rounds, once)
    model = make_model(args.size)
    for row, has in zip(rows, ways.values()):
        flops = rate(useful_flops(model, examples, kind, "cached" in has), row)
        row["utilisation"] = flops / matrix_rate(device, dtype_of(has, device))
        row |= {"samples_per_s": rate(args.rows, row), "tokens_per_s": rate(tokens, row)}
    return rows


def experts_table(args, device) -> list[dict]:
    """A mixture of experts against a dense decoder that computes as much for each token: SFT steps, our way."""
    has, examples = list(ladder(device, compile=False).values())[-1], examples_of("sft", args)
    config = VLMConfig(**SIZES[args.size][0])
    width = (config.num_experts_per_tok + config.n_shared_experts) * config.intermediate_size
    variants = {"dense, as wide as the active experts": {"intermediate_size": width}}
    variants["mixture of experts"] = {"use_moe": True}

    def once(row, variant):
        return Training("sft", has, args, device, examples, **variant).measure()

    return [row | {"samples_per_s": rate(args.rows, row)} for row in race(variants, args.rounds, once)]


def ranks_table(args, device) -> list[dict]:
    """One process on one core against two on two, gloo between them: SFT steps with cached features."""
    flags = ["--size", args.size, "--rows", args.rows, "--batch_size", args.batch_size, "--rounds", args.rounds]
    rows = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
        command += ["-m", "scripts.benchmark", *flags, "--device", "cpu", "--as_rank"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        out = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, env=environment).stdout
        row = {"name": f"{processes} process{'es' * (processes > 1)}, a core each"}
        row["seconds"] = json.loads(out.splitlines()[-1])
        rows.append(row | {"samples_per_s": rate(processes * args.rows, row)})
        rows[-1]["ratio"] = rows[-1]["samples_per_s"] / rows[0]["samples_per_s"]
    return rows


def as_rank(args, device) -> None:
    """What each process of `ranks_table` does: as many rows in each, in steps of which all ranks make a part."""
    distributed.start(device)
    has = list(ladder(device, compile=False).values())[-1] - {"bf16"}
    training = Training("sft", has, args, device, examples_of("sft", args))
    spent = [training.measure() for _ in range(args.rounds)]
    distributed.say(json.dumps(spent))  # the group is left by run_main, when the model that it serves is gone


# ---------------------------------------------------------------------------- pictures


def pipeline_table(args, device) -> list[dict]:
    """From 128×128 JPEGs of photo-like noise to rows, on one core. Then how long steps of our way, without cached
    features, wait for batches from --num_workers processes."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = write_pictures(folder, rows=max(4 * args.rows + args.batch_size, 512))
        size = statistics.mean(path.stat().st_size for path in folder.glob("*.jpg"))
        parts = {
            f"read and decode a JPEG of {size / 1000:.1f} KB": lambda i: decode(folder / f"{i % 64}.jpg"),
            "and make it 224×224 (bicubic)": lambda i: data.load_picture(i, f"{i % 64}.jpg"),
            "a row: tokens and picture": lambda i: data[i],
        }
        torch.set_num_threads(1)  # as in a worker; others would count the time in which they wait for each other
        rows = [{"name": name, "pictures_per_s_and_core": core_rate(part, args.rounds)} for name, part in parts.items()]
        torch.set_num_threads(args.threads)
        share = waiting_share(args, device, data)
    return [*rows, {"name": "share of the time that steps wait for their batches", "waiting": share}]


def write_pictures(folder: Path, rows: int) -> VLMDataset:
    """64 pictures, and rows about them, over and over."""
    random = np.random.default_rng(0)
    for number in range(64):
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((128, 128))
        fine = np.clip(np.asarray(coarse) + random.normal(0, 6, (128, 128, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(fine).save(folder / f"{number}.jpg", quality=90)
    turns = [{"role": "user", "content": "What is this?\n<image>"}]
    turns.append({"role": "assistant", "content": "A star. " * 8})
    lines = [json.dumps({"conversations": turns, "image": f"{row % 64}.jpg"}) for row in range(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return VLMDataset(folder / "rows.jsonl", folder, load_tokenizer("model/tiny"), ImageProcessor(), 640)


def decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def core_rate(part, rounds: int, times: int = 500) -> float:
    """How often part(row) is done in a second of a core's time."""
    spent = []
    for _ in range(rounds + 1):  # the first time the disk is cold
        started = time.process_time()
        for i in range(times):
            part(i)
        spent.append(time.process_time() - started)
    return times / statistics.median(spent[1:])


def waiting_share(args, device, data: VLMDataset) -> float:
    training = Training("sft", list(ladder(device, args.compile).values())[-2], args, device, [])
    batches = iter(make_loader(data, StepSampler(data.lengths, args.batch_size), args, device, data.tokenizer))
    training.step(next(batches))  # allocates, compiles
    started = time.perf_counter()
    busy = sum(seconds(device, training.step, next(batches)) for _ in range(args.rows // args.batch_size * 4))
    return 1 - busy / (time.perf_counter() - started)


# ---------------------------------------------------------------------------- answers, and starting


def generation_table(args, device) -> list[dict]:
    """Tokens per second of answers to a picture and a question: greedy, the picture encoded before."""
    variants = {
        "the original way: attention in the open, keys copied for every head": "original",
        "fused attention, keys shared": "fused",
    }
    if device.type == "cpu":
        variants["int8 weights"] = "int8"
    rows = [row for batch in (1, 16) for row in race(variants, args.rounds, partial(answer, args, device, batch))]
    for row in rows:
        row["first_token_s"] = statistics.median(row.pop("first"))
        row["tokens_per_s"] = rate(row["batch"] * args.new_tokens, row)
        row["against_one_stream"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


@torch.no_grad()
def answer(args, device, batch: int, row: dict, variant: str) -> float:
    """Seconds for --new_tokens in each of `batch` answers; those for one token are noted in the row."""
    model = make_model(args.size, flash_attn=variant != "original").to(device).eval()
    if variant == "int8":
        to_int8(model)
    ids = torch.tensor([34] * 196 + list(range(100, 130)), device=device).expand(batch, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["image_features"] = torch.zeros(batch, 196, model.config.ve_hidden_size, device=device)

    def generate(tokens):
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)

    with autocast(device, torch.bfloat16 if device.type == "cuda" else torch.float32):
        generate(1)  # warms up
        row.setdefault("first", []).append(seconds(device, generate, 1))
        row["batch"] = batch
        return seconds(device, generate, args.new_tokens)


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
            command = [sys.executable, *map(str, command)]
            run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
            spent = [seconds(device, run) for _ in range(args.rounds)]
            rows.append({"name": name, "seconds": spent, "median_s": statistics.median(spent)})
    return rows


# ---------------------------------------------------------------------------- the report

HEAD = """# Benchmark: {device_name}

`{command}`, commit {commit}, {date}. {threads} threads, PyTorch {torch}, Transformers {transformers}, Python \
{python}. Decoder and encoder: {size}, random weights. Each figure is the median of {rounds} rounds, each ratio that \
of times of the same round, with the lowest and highest in brackets."""
STEPS = """{rows} rows in batches of {batch_size}, the original way at {max_seq_len} tokens. Useful FLOP are those of \
real tokens, without any waste; peak is the measured rate of large matrix products in the same precision."""
RATE = {"": "{name}", "samples/s": "{samples_per_s:.2f}"}
SPAN = {"ratio": "{ratio:.2f}× ({ratio_range[0]:.2f} to {ratio_range[1]:.2f})"}
STEP = {
    **RATE,
    "real tokens/s": "{tokens_per_s:,.0f}",
    "padding": "{padding:.0%}",
    "useful FLOP/s of peak": "{utilisation:.0%}",
    "GB": "{memory_gb:.1f}",
    **SPAN,
    "first loss": "{loss:.6f}",
}
ANSWER = {"answers at once": "{batch}", "": "{name}", "first token": "{first_token_s:.2f} s"}
ANSWER |= {"tokens/s": "{tokens_per_s:.0f}", **SPAN, "against one, the original way": "{against_one_stream:.1f}×"}
TABLES = {  # kind: what measures it, title, columns and what stands in them
    "pretrain": (partial(training_table, "pretrain"), "Stage 1: a step of pretrain", STEP),
    "sft": (partial(training_table, "sft"), "Stage 2: a step of sft", STEP),
    "experts": (experts_table, "Experts", RATE | SPAN),
    "ranks": (ranks_table, "Ranks", RATE | {"ratio": "{ratio:.2f}×"}),
    "pipeline": (pipeline_table, "Pictures", {"": "{name}", "pictures/s and core": "{pictures_per_s_and_core:,.0f}"}),
    "generation": (generation_table, "Answers", ANSWER),
    "startup": (startup_table, "Starting", {"": "{name}", "time": "{median_s:.2f} s"}),
}


def section(kind: str, rows: list[dict], about: dict) -> list[str]:
    measure, title, columns = TABLES[kind]
    lines = [[cell.format_map(row) for cell in columns.values()] for row in rows if "waiting" not in row]
    lines += [[row["name"], f"{row['waiting']:.1%}"] for row in rows if "waiting" in row]
    table = markdown(list(columns), lines)
    if kind not in PUBLIC_ROWS:
        return [f"## {title}", getdoc(measure), table]
    epoch, cached = (duration(PUBLIC_ROWS[kind] / row["samples_per_s"]) for row in rows[-2:])
    limit, cached_limit = (row["ratio"] / row["utilisation"] for row in rows[-2:])
    below = (
        f"One epoch of {PUBLIC_ROWS[kind]:,} rows at these rates: {epoch}, with cached features {cached}. The most "
        "that the last two rows could reach, with nothing but useful FLOP at the peak rate: "
        f"{limit:.1f}× and {cached_limit:.1f}×."
    )
    return [f"## {title}", STEPS.format_map(about), table, below]


def report(found: dict) -> str:
    parts = [part for kind in TABLES if kind in found for part in section(kind, found[kind], found["about"])]
    return "\n\n".join([HEAD.format_map(found["about"]), *parts]) + "\n"


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
    add("--out_dir", type=Path, default=Path("docs/results"), help="folder of the tables")
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
        print(f"{kind} ...", flush=True)
        found[kind] = TABLES[kind][0](args, device)
        write_json(args.out_dir / f"benchmark_{device.type}.json", found)
        text = report(found)
        write_text(args.out_dir / f"benchmark_{device.type}.md", text)
    print(f"\n{text}", flush=True)
    return found


if __name__ == "__main__":
    run_main(main)

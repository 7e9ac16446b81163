"""What is measured, a function a table: training, peers, experts, ranks, reading pictures, answering, starting."""

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from common import distributed
from common.devices import autocast
from dataset.batches import StepSampler
from dataset.lm_dataset import VLMDataset
from inference.captions import PictureQuestions, load_questions
from inference.generate import answer_batches, user_turn
from model.cache import growing_cache
from model.int8 import to_int8
from model.model_vlm import VLMConfig
from model.packed import can_pack, pack
from model.processing import ImageProcessor, encode_chat, load_tokenizer
from scripts.benchmark.inputs import IMAGE, SIZES, examples_of, length, make_encoder, make_model
from scripts.benchmark.measure import matrix_rate, peak_memory, race, rate, seconds, useful_flops
from scripts.benchmark.peers import FEWER, make_stock, peers
from scripts.benchmark.variants import Training, ladder, variants
from trainer.loader import make_loader

PROMPT, CAPTION = "Describe this picture.", 24  # the question for captions; tokens of an answer

# ---------------------------------------------------------------------------- training


def training_table(kind: str, args, device) -> list[dict]:
    examples = examples_of(kind, args)
    tokens, least = sum(map(length, examples)), {}  # least: {name: seconds that useful FLOP take at the peak rate}
    torch.compiler.reset()  # there is a limit to how much may be compiled of one function

    def once(row, make):
        training = make(kind, args, device, examples)
        if not row["seconds"]:
            row |= {"loss": training.first_loss(), "padding": 1 - tokens / training.padded_tokens()}
            flops = useful_flops(training.model, examples, kind, training.cached)
            least[row["name"]] = flops / matrix_rate(device, training.dtype)
        spent = training.measure()
        row["memory_gb"] = max(row.get("memory_gb", 0), peak_memory(device))
        number, speed = len(row["seconds"]) + 1, args.rows / spent
        print(f"  {kind}, round {number}: {row['name']}: {speed:.2f} samples/s", flush=True)
        return spent

    rows = race(variants(args, device), args.rounds, once)
    for row in rows:
        row["utilisation"] = rate(least[row["name"]], row)
        row |= {"samples_per_s": rate(args.rows, row), "tokens_per_s": rate(tokens, row)}
    return rows


def peers_table(args, device) -> list[dict]:
    """What others would take today, on the same rows in batches of --batch_size, each way in a process of its own, with
    no memory but its own. Transformers' LLaVA is what `python -m scripts.convert_vlm --to llava` makes of the same
    weights, trained by `Trainer` as its documentation recommends: rows grouped by length, bfloat16, SDPA, fused AdamW,
    the tower frozen. nanoVLM's way is our model with the rows of a step packed into rows of 1,024 tokens, in which they
    see each other, and logits for all positions. The first losses, of the same four rows side by side, agree within
    0.1%, or there is no table. With 49 tokens per picture the same rows are shorter."""
    rows = []
    for kind, stage in (("pretrain", "1"), ("sft", "2")):

        def once(row, name, kind=kind, stage=stage):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found = pool.submit(train_alone, kind, name, args, device).result()
            row |= {"stage": stage, "loss": found["loss"], "padding": found["padding"]}
            row["memory_gb"] = max(row.get("memory_gb", 0), found["memory_gb"])
            print(f"  stage {stage}: {name}: {args.rows / found['seconds']:.2f} samples/s", flush=True)
            return found["seconds"]

        names = peers(args, device)
        rows += race(dict(zip(names, names)), args.rounds, once)
        losses = [row["loss"] for row in rows if row["stage"] == stage and row["name"] != FEWER]
        assert max(losses) / min(losses) < 1.001, f"not the same loss: {losses}"
    return [row | {"samples_per_s": rate(args.rows, row)} for row in rows]


def train_alone(kind: str, name: str, args, device) -> dict:
    """One way of `peers_table`, measured once."""
    torch.set_num_threads(args.threads)
    training = peers(args, device)[name](kind, args, device, examples_of(kind, args))
    make_encoder.cache_clear()  # each has its own by now
    padding = 1 - sum(map(length, training.examples)) / training.padded_tokens()
    found = {"loss": training.first_loss(), "padding": padding}
    return found | {"seconds": training.measure(), "memory_gb": peak_memory(device)}


def experts_table(args, device) -> list[dict]:
    """A mixture of experts against a dense decoder that computes as much for each token: SFT steps, our way."""
    has, examples = list(ladder(device, compile=False).values())[-1], examples_of("sft", args)
    config = VLMConfig(**SIZES[args.size][0])
    width = (config.num_experts_per_tok + config.n_shared_experts) * config.intermediate_size
    dense = {"dense, as wide as the active experts": {"intermediate_size": width}}
    configs = dense | {"mixture of experts": {"use_moe": True}}

    def once(row, config):
        return Training(has, "sft", args, device, examples, **config).measure()

    return [row | {"samples_per_s": rate(args.rows, row)} for row in race(configs, args.rounds, once)]


def ranks_table(args, device) -> list[dict]:
    """One process on one core against two on two, gloo between them: SFT steps with cached features."""
    flags = ["--size", args.size, "--rows", args.rows, "--batch_size", args.batch_size, "--rounds", args.rounds]
    environment, rows = os.environ | {"OMP_NUM_THREADS": "1"}, []
    for processes, name in ((1, "1 process"), (2, "2 processes")):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes]
        command += ["-m", "scripts.benchmark", *flags, "--device", "cpu", "--as_rank"]
        out = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, env=environment).stdout
        row = {"name": f"{name}, a core each", "seconds": json.loads(out.splitlines()[-1])}
        rows.append(row | {"samples_per_s": rate(processes * args.rows, row)})
        rows[-1]["ratio"] = rows[-1]["samples_per_s"] / rows[0]["samples_per_s"]
    return rows


def as_rank(args, device) -> None:
    """What each process of `ranks_table` does: as many rows in each, in steps of which all ranks make a part."""
    distributed.start(device)
    has = list(ladder(device, compile=False).values())[-1] - {"bf16"}
    training = Training(has, "sft", args, device, examples_of("sft", args))
    spent = [training.measure() for _ in range(args.rounds)]
    distributed.say(json.dumps(spent))  # the group is left by run_main, when the model that it serves is gone


# ---------------------------------------------------------------------------- pictures


def pipeline_table(args, device) -> list[dict]:
    """From 128×128 JPEGs of photo-like noise to rows, on one core. Then how long steps of our way, without cached
    features, wait for batches from --num_workers processes."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = write_pictures(folder, rows=max(4 * args.rows + args.batch_size, 512))
        files = sorted(folder.glob("*.jpg"))
        size = statistics.mean(file.stat().st_size for file in files)
        parts = {
            f"read and decode a JPEG of {size / 1000:.1f} KB": lambda i: Image.open(files[i % 64]).convert("RGB"),
            "and make it 224×224 (bicubic)": lambda i: data.load_picture(i, files[i % 64].name),
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
    texts = {"user": "What is this?\n<image>", "assistant": "A star. " * 8}
    turns = [{"role": role, "content": text} for role, text in texts.items()]
    lines = [json.dumps({"conversations": turns, "image": f"{row % 64}.jpg"}) for row in range(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return VLMDataset(folder / "rows.jsonl", folder, load_tokenizer("model/tiny"), ImageProcessor(), 640)


def core_rate(part, rounds: int, times: int = 500) -> float:
    """How often part(row) is done in a second of a core's time."""
    spent = timeit.repeat(lambda: [part(i) for i in range(times)], timer=time.process_time, number=1, repeat=rounds + 1)
    return times / statistics.median(spent[1:])  # the first time the disk is cold


def waiting_share(args, device, data: VLMDataset) -> float:
    training = Training(list(ladder(device, args.compile).values())[-2], "sft", args, device, [])
    batches = iter(make_loader(data, StepSampler(data.lengths, args.batch_size), args, device, data.tokenizer))
    training.step(next(batches))  # allocates, compiles
    started = time.perf_counter()
    busy = sum(seconds(device, training.step, next(batches)) for _ in range(args.rows // args.batch_size * 4))
    return 1 - busy / (time.perf_counter() - started)


# ---------------------------------------------------------------------------- answers, and starting


def generation_table(args, device) -> list[dict]:
    """Tokens per second of answers to a picture and a question: greedy, the picture encoded before."""
    ways = {
        "Transformers' LLaVA": "stock",
        "the original way: attention in the open, keys copied for every head": "original",
        "fused attention, keys shared": "fused",
        "ours: weights packed, a cache that grows in place": "ours",
    }
    if device.type == "cpu":
        ways["ours, int8 weights"] = "int8"
    rows = [row for batch in (1, 16) for row in race(ways, args.rounds, partial(answer, args, device, batch))]
    for row in rows:
        row["first_token_s"] = statistics.median(row.pop("first"))
        row["tokens_per_s"] = rate(row["batch"] * args.new_tokens, row)
        row["against_one_stream"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


@torch.no_grad()
def answer(args, device, batch: int, row: dict, way: str) -> float:
    """Seconds for --new_tokens in each of `batch` answers; those for one token are noted in the row."""
    stock = way == "stock"
    model = make_stock(args.size)[0] if stock else make_model(args.size, flash_attn=way != "original")
    model.to(device).eval()
    if way == "int8":
        to_int8(model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours = way in ("ours", "int8")
    if ours:
        model.vision_encoder = None  # which all models share, and features are given
        pack(model, dtype)
    ids = torch.tensor([*IMAGE, *range(100, 130)], device=device).expand(batch, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not stock:  # to which the placeholders are words like any other
        inputs["image_features"] = torch.zeros(batch, len(IMAGE), model.config.ve_hidden_size, device=device)

    def generate(tokens):
        cache = {"past_key_values": growing_cache()} if ours else {}
        model.generate(**inputs, **cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)

    with autocast(device, dtype):
        generate(1)  # warms up
        row.setdefault("first", []).append(seconds(device, generate, 1))
        row["batch"] = batch
        return seconds(device, generate, args.new_tokens)


def captions_table(args, device) -> list[dict]:
    """Pictures per second of `eval_vlm.py` with captions: from JPEGs of 128×128 to greedy answers of 24 tokens, 16
    pictures at once. Transformers' LLaVA gets the same files as its documentation shows, with its own processor."""
    ways = {"Transformers' LLaVA": (stock_captions, torch.float32), "ours": (our_captions, torch.float32)}
    if device.type == "cuda" or can_pack(torch.bfloat16):
        ways |= {f"{name}, bfloat16": (way, torch.bfloat16) for name, (way, _) in ways.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), rows=1)
        files = sorted(Path(folder).glob("*.jpg"))[: 4 * args.rows]

        def once(row, made):
            describe, dtype = made
            return describe(args, device, dtype, files)

        rows = race(ways, args.rounds, once)
    return [row | {"pictures_per_s": rate(len(files), row)} for row in rows]


@torch.no_grad()
def stock_captions(args, device, dtype, files: list[Path]) -> float:
    """Seconds for captions by Transformers' own model and processor."""
    model, processor = make_stock(args.size, dtype)
    model.to(device).eval()
    model.config.image_token_id = processor.image_token_id  # the bundle's tokenizer has fewer tokens than the model
    processor.tokenizer.padding_side = "left"

    def describe(some):
        ask = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        text = processor.apply_chat_template([{"role": "user", "content": ask}], add_generation_prompt=True)
        pictures = [Image.open(file).convert("RGB") for file in some]
        inputs = processor(images=pictures, text=[text] * len(some), padding=True, return_tensors="pt").to(
            device, dtype
        )
        out = model.generate(**inputs, max_new_tokens=CAPTION, min_new_tokens=CAPTION, do_sample=False)
        processor.batch_decode(out, skip_special_tokens=True)

    def describe_all():
        for i in range(0, len(files), 16):
            describe(files[i : i + 16])

    describe(files[:16])  # warms up
    return seconds(device, describe_all)


def our_captions(args, device, dtype, files: list[Path]) -> float:
    """Seconds for captions by what `eval_vlm.py` calls."""
    model, tokenizer = make_model(args.size).to(device).eval(), load_tokenizer("model/tiny")
    model.vision_encoder = copy.deepcopy(model.vision_encoder)  # which all models share
    pack(model, dtype)
    chat = [{"role": "user", "content": user_turn(PROMPT, 1)}]
    [(ids, _, _)] = encode_chat(tokenizer, chat, model.config.image_ids)
    model.generation_config.min_new_tokens = CAPTION
    how = SimpleNamespace(batch_size=16, num_workers=args.num_workers, max_new_tokens=CAPTION, num_beams=1)

    def describe(some):
        pairs = [(file.name, PROMPT) for file in some]
        asked = PictureQuestions(files[0].parent, pairs, {PROMPT: ids}, model.processor)
        for _ in answer_batches(model, tokenizer, load_questions(asked, tokenizer, how), how, device, dtype):
            pass

    describe(files[:16])  # warms up
    return seconds(device, describe, files)


def startup_table(args, device) -> list[dict]:
    """From the command to its end. The model is as it begins, of the size of the built-in bundle."""
    with tempfile.TemporaryDirectory() as folder:
        picture, bundle = Path(folder) / "picture.png", Path("model/tiny")
        Image.new("RGB", (72, 72), "red").save(picture)
        ask = ["--tokenizer_path", bundle, "--vision_model_path", bundle / "clip", "--image", picture, "--greedy"]
        ask += ["--weights", next(bundle.glob("llm_*.pth")), "--max_new_tokens", 10, "--device", device]
        rows = []
        for name, flags in {
            "python eval_vlm.py --help": ["--help"],
            "its first answer": [*ask, "--prompt", "What is this?"],
        }.items():
            command = [sys.executable, "eval_vlm.py", *map(str, flags)]
            run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
            spent = [seconds(device, run) for _ in range(args.rounds)]
            rows.append({"name": name, "seconds": spent, "median_s": statistics.median(spent)})
    return rows

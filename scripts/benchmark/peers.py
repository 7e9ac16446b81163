"""What others would train the same rows with: stock Transformers, and packing as nanoVLM does it."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from common.devices import autocast
from dataset.batches import collate
from model.encoders import quiet_transformers
from model.llava import write_llava
from model.processing import ImageProcessor, load_tokenizer
from scripts.benchmark.inputs import IMAGE, length, make_model
from scripts.benchmark.measure import now, reset_peak
from scripts.benchmark.variants import Training, ladder

TRAINER = "Transformers: LLaVA, Trainer"
FEWER = "and 49 tokens per picture"
PACK = 1024  # tokens


def peers(args, device) -> dict[str, Callable]:
    """{name of a row: how to make it}, called as those of `variants`. The last rows are ours."""
    *_, ours, cached = ladder(device, args.compile).values()
    rows = {TRAINER: Stock}
    if args.compile:
        rows |= {"the same, torch_compile": partial(Stock, torch_compile=True)}
    rows |= {"nanoVLM's way: rows packed": Packed, "ours": partial(Training, ours - {"compiled"})}
    if args.compile:
        rows |= {"ours, --compile": partial(Training, ours)}
    return rows | {
        "and picture features cached": partial(Training, cached),
        FEWER: partial(fewer, cached),
    }


def make_stock(size: str, dtype: torch.dtype = torch.float32):
    """The weights of `make_model` in our own export: Transformers' model and its processor."""
    bundle = Path("model/tiny")
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        write_llava(Path(folder), make_model(size), load_tokenizer(bundle), bundle, {})
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return model, AutoProcessor.from_pretrained(folder)


class Stock:
    """As the documentation of Trainer recommends: rows grouped by length, bfloat16, fused AdamW, SDPA (the default)."""

    def __init__(self, kind: str, args, device, examples: list[dict], torch_compile: bool = False):
        self.args, self.device, self.torch_compile = args, device, torch_compile
        self.model = make_stock(args.size)[0].to(device).train()
        last = f"layers.{self.model.config.text_config.num_hidden_layers - 1}." if kind == "pretrain" else ""
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(f"language_model.{last}" in name or "linear_1" in name)
        normalize = ImageProcessor().normalize  # not timed, as workers do it
        self.examples = [row | {"pictures": normalize(row["pictures"])} for row in examples]

    def collate(self, examples: list[dict]) -> dict:
        batch = collate(examples)
        batch["input_ids"][batch["input_ids"] == IMAGE[0]] = self.model.config.image_token_id
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "pixel_values")}

    def padded_tokens(self) -> int:
        B = self.args.batch_size
        ordered = sorted(self.examples, key=length, reverse=True)
        return sum(self.collate(ordered[i : i + B])["input_ids"].numel() for i in range(0, len(ordered), B))

    @torch.no_grad()
    def first_loss(self) -> float:
        batch = {key: value.to(self.device) for key, value in self.collate(self.examples[:4]).items()}
        with autocast(self.device, torch.bfloat16):
            return self.model(**batch).loss.item()

    def measure(self) -> float:
        """Seconds for all batches: the second epoch, after one that allocates and compiles."""
        clock = EpochClock(self.device)
        with tempfile.TemporaryDirectory() as folder:
            how = TrainingArguments(
                folder,
                per_device_train_batch_size=self.args.batch_size,
                num_train_epochs=2,
                train_sampling_strategy="group_by_length",
                bf16=True,
                optim="adamw_torch_fused",
                learning_rate=2e-4,
                torch_compile=self.torch_compile,
                use_cpu=self.device.type == "cpu",
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            rows, callbacks = self.examples, [clock]
            Trainer(self.model, how, self.collate, train_dataset=rows, callbacks=callbacks).train()
        return clock.ends[-1] - clock.begins[-1]


def fewer(has: set[str], kind: str, args, device, examples: list[dict]) -> Training:
    """A picture is 49 tokens: the projector merges 4 patches into one (spatial_merge_size 2)."""
    merged = [34] * 49
    config = {"image_ids": merged, "image_special_token": "@" * 49, "spatial_merge_size": 2}
    return Training(has, kind, args, device, [shortened(row, len(merged)) for row in examples], **config)


def shortened(row: dict, tokens: int) -> dict:
    """The row with so many tokens for its picture."""
    keep = torch.ones(length(row), dtype=torch.bool)
    keep[(row["input_ids"] == IMAGE[0]).nonzero()[tokens:]] = False
    return row | {key: row[key][keep] for key in ("input_ids", "labels")}


class EpochClock(TrainerCallback):
    def __init__(self, device):
        self.device, self.begins, self.ends = device, [], []

    def on_epoch_begin(self, *args, **kwargs):
        reset_peak(self.device)
        self.begins.append(now(self.device))

    def on_epoch_end(self, *args, **kwargs):
        self.ends.append(now(self.device))


class Packed(Training):
    """Our model as nanoVLM trains its own: the rows of a step stand one behind another in rows of at most PACK tokens,
    in which they see each other, and all positions get logits."""

    def __init__(self, kind: str, args, device, examples: list[dict]):
        super().__init__({"sorted", "fused_attention", "fused_adamw", "bf16"}, kind, args, device, examples)
        steps = len(self.batches)
        self.batches = [collate(packed(examples[i::steps])) for i in range(steps)]  # short rows with long ones


def packed(examples: list[dict]) -> list[dict]:
    """Fewer and longer rows: the longest first, each in the first pack that has room for it."""
    packs = []
    for example in sorted(examples, key=length, reverse=True):
        fits = [pack for pack in packs if sum(map(length, pack)) + length(example) <= PACK]
        if fits:
            fits[0].append(example)
        else:
            packs.append([example])
    keys = ("input_ids", "labels", "pictures")
    return [{"row": pack[0]["row"]} | {key: torch.cat([row[key] for row in pack]) for key in keys} for pack in packs]

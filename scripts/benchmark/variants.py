"""The ways to make a training step: the original one, and a ladder on which each rung adds one improvement."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPConfig, CLIPModel

from common.devices import autocast, check_compiler
from common.distributed import world_size
from dataset.batches import collate
from model.packed import can_pack, pack
from model.processing import IGNORE
from scripts.benchmark.inputs import batches_of, make_model
from scripts.benchmark.measure import reset_peak, seconds
from trainer.acceleration import better_in_blocks, cast_frozen, choose_attention, compile_layers
from trainer.checkpoint import State
from trainer.loop import count_labels, to_device, train_step
from trainer.optimizer import choose_trainable, make_optimizer
from trainer.run import Run

LADDER = {  # what each row of a table adds to the row above it
    "sorted": "rows of like length, padded to their longest",
    "fused_attention": "fused attention",
    "few_logits": "logits and last feed-forward only where there is a label",
    "fused_adamw": "fused AdamW, CLIP without its text half",
    "bf16": "bfloat16",  # on a GPU the original way has it too, but for CLIP
    "packed": "CLIP's weights packed",
    "in_blocks": "attention in blocks",
    "compiled": "torch.compile of each layer",
    "cached": "picture features cached",
}


def ladder(device: torch.device, compile: bool) -> dict[str, set[str]]:
    """{name of a row: keys of LADDER}, each with one more than the one before. Raises ValueError where this device
    cannot `compile`."""
    if compile:
        check_compiler(device)
    fits = {"packed": device.type == "cpu" and can_pack(torch.bfloat16)}
    fits |= {"in_blocks": better_in_blocks(device, torch.bfloat16), "compiled": compile}
    has, rows = set(), {"the original way": set()}
    for key, name in LADDER.items():
        if fits.get(key, True):
            has = has | {key}
            rows[f"+ {name}" + " for CLIP" * (key == "bf16" and device.type == "cuda")] = has
    return rows


def variants(args, device) -> dict[str, Callable]:
    """{name of a row: how to make it}. Each is called with (kind, args, device, examples) and returns a `Training`, or
    anything else with its `model`, `dtype`, `cached`, `padded_tokens()`, `first_loss()` and `measure()`."""
    return {name: partial(Training, has) for name, has in ladder(device, args.compile).items()}


class Training:
    """Steps with these improvements, on weights that all begin with; `train_step` takes it for the run."""

    context = Run.context
    total_steps = 1  # of which none is counted as done: the learning rate stays as it is

    def __init__(self, has: set[str], kind: str, args, device, examples: list[dict], **config):
        """has: keys of LADDER."""
        self.device, self.state, self.cached = device, State(), "cached" in has
        self.dtype = torch.bfloat16 if "bf16" in has or device.type == "cuda" else torch.float32
        flags = {"seed": 0, "warmup_iters": 0, "schedule": "cosine", "grad_clip": 1.0}
        self.args = SimpleNamespace(batch_size=args.batch_size, **flags)
        self.model = make_model(args.size, flash_attn="fused_attention" in has, **config).to(device).train()
        choose_trainable(self.model, "last_layer" if kind == "pretrain" else "all")
        self.choose_kernels(has)
        self.choose_optimizer(has, args)
        self.forward = self.choose_forward(has)
        self.examples = examples
        if self.cached:
            self.examples = self.with_features(examples)
            self.model.vision_encoder = None  # as training leaves it
        pad_to = 0 if "sorted" in has else args.max_seq_len
        self.batches = batches_of(self.examples, args.batch_size, pad_to, pin=device.type == "cuda")

    def choose_kernels(self, has: set[str]) -> None:
        model = self.model
        if "bf16" in has:  # a copy, as all share one encoder
            model.vision_encoder = cast_frozen(copy.deepcopy(model.vision_encoder), self.dtype)
            if "packed" in has and "compiled" not in has:
                pack(model.vision_encoder, self.dtype)
        else:  # on a GPU too, where all else of the original way has autocast
            model.get_image_embeddings = torch.autocast(self.device.type, enabled=False)(model.get_image_embeddings)
        if "in_blocks" in has:
            choose_attention(model, self.device, self.dtype)
        if "compiled" in has:
            compile_layers(model)

    def choose_optimizer(self, has: set[str], args) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        if "fused_adamw" in has:
            self.optimizer = make_optimizer(self.model, 2e-4, 2e-4, 0.1)
            return
        learning = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW([{"params": learning, "peak": 2e-4}])
        self.text_half = CLIPModel(CLIPConfig()).text_model.to(self.device) if args.size != "tiny" else None

    def choose_forward(self, has: set[str]) -> Callable:
        if world_size() > 1:
            return DistributedDataParallel(self.model, forward_sync_buffers=False)
        return self.model if "few_logits" in has else partial(all_logits, self.model)

    @torch.no_grad()
    def with_features(self, examples: list[dict]) -> list[dict]:
        pictures = torch.cat([row["pictures"] for row in examples])
        with autocast(self.device, self.dtype):
            features = [self.model.encode_pictures(part.to(self.device)).half().cpu() for part in pictures.split(32)]
        return [row | {"features": one[None], "pictures": None} for row, one in zip(examples, torch.cat(features))]

    def padded_tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def first_loss(self) -> float:
        """Per label, of the weights that all begin with, on a batch that is the same for all."""
        batch = collate(self.examples[:4])
        with autocast(self.device, self.dtype):  # with gradients, as what is compiled then serves the steps too
            inputs = to_device(batch, self.model)
            return self.forward(**inputs, num_items_in_batch=count_labels(batch), return_logits=False).loss.item()

    def step(self, batch: dict) -> None:
        train_step(self, [batch], count_labels(batch), len(batch["rows"]))

    def all_steps(self) -> None:
        for batch in self.batches:
            self.step(batch)

    def measure(self) -> float:
        """Seconds for all batches, after a step that allocates and compiles."""
        self.step(self.batches[0])
        reset_peak(self.device)
        return seconds(self.device, self.all_steps)


def all_logits(model, input_ids, labels, num_items_in_batch, **inputs):
    """The original forward pass: logits for every position, the loss masked afterwards."""
    out = model(input_ids, **inputs | {"return_logits": True})
    logits, targets = out.logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=0).flatten(), reduction="none")
    out.loss = (losses * (targets != IGNORE).flatten()).sum() / num_items_in_batch
    return out

"""What is measured on: random rows of real lengths, and models with random weights of real shapes."""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.batches import StepSampler, collate
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing import IGNORE, ImageProcessor

SIZES = {  # of the decoder and of the encoder
    "26m": ({}, {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}),
    "tiny": (
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 2500},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
}
ANSWERS = {"pretrain": (35, 0.4, 1), "sft": (70, 0.6, 3)}  # mean tokens, sigma of their logarithm, at most how many
IMAGE = [34] * 196  # the tokens of a picture


def example(kind: str, row: int, random, vocab: int, max_length: int) -> dict:
    """A row as `VLMDataset` gives it, but for its picture: a question, an answer, random tokens.

    A caption has 35 tokens on average, with picture and question about 260. A conversation has one to three answers,
    70 tokens each on average, log-normal as lengths of texts are.
    """
    mean, sigma, most = ANSWERS[kind]
    ids, labels = [], []
    for turn in range(1 if most == 1 else int(random.integers(1, most + 1))):
        question = [*random.integers(100, vocab, 20 if turn else 30), *([] if turn else IMAGE)]
        answer = random.integers(100, vocab, max(int(random.lognormal(math.log(mean) - sigma**2 / 2, sigma)), 3))
        ids += [*question, *answer]
        labels += [*[IGNORE] * len(question), *answer]
    ids, labels = (torch.tensor(np.array(part[:max_length], dtype=np.int64)) for part in (ids, labels))
    return {"row": row, "input_ids": ids, "labels": labels}


def length(row: dict) -> int:
    return len(row["input_ids"])


def examples_of(kind: str, args) -> list[dict]:
    """--rows of them, the same for everything that is compared, sorted by length.

    They are batches spread evenly over a window of training's `StepSampler`. Just so many rows, sorted for themselves,
    would differ more in length within a batch: 18% of padding where training has 2%.
    """
    random, vocab = np.random.default_rng(0), VLMConfig(**SIZES[args.size][0]).vocab_size
    window = range(max(32 * args.batch_size, args.rows))
    rows = sorted((example(kind, row, random, vocab, args.max_seq_len) for row in window), key=length)
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    taken = -(-args.rows // args.batch_size)
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * taken)] for i in range(taken)]
    rows = [row for batch in chosen for row in batch][: args.rows]
    pictures = torch.from_numpy(random.integers(0, 256, (len(rows), 1, 3, 224, 224), dtype=np.uint8))
    return [row | {"pictures": picture} for row, picture in zip(rows, pictures)]


def batches_of(examples: list[dict], batch_size: int, pad_to: int = 0, pin: bool = False) -> list[dict]:
    """As training makes them: of like length, or in the order of the examples, padded to `pad_to` tokens."""
    sampler = StepSampler(list(map(length, examples)), batch_size, shuffle=not pad_to)
    if pad_to:
        examples = [pad(row, pad_to - length(row)) for row in examples]
    return list(DataLoader(examples, batch_sampler=sampler.all_batches(), collate_fn=collate, pin_memory=pin))


def pad(row: dict, room: int) -> dict:
    ids, labels = F.pad(row["input_ids"], (0, room)), F.pad(row["labels"], (0, room), value=IGNORE)
    return row | {"input_ids": ids, "labels": labels}


@cache
def make_encoder(size: str) -> CLIPVisionModel:
    encoder = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=16, **SIZES[size][1]))
    return encoder.eval().requires_grad_(False)


def make_model(size: str, **config) -> MiniMindVLM:
    """Random weights. The pictures' encoder has the shape of CLIP ViT-B/16, or a small one of as many patches."""
    torch.manual_seed(0)
    decoder, encoder = SIZES[size]
    model = MiniMindVLM(VLMConfig(ve_hidden_size=encoder["hidden_size"], **decoder, **config), None)
    model.vision_encoder = make_encoder(size)
    model.processor = ImageProcessor()
    return model

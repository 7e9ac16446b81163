"""Self-critical sequence training: the model learns from the rewards of answers that it samples itself.

    rows ── prompt, read once ──┬─ sample 1 ── reward ─┐
                                ├─ sample 2 ── reward ─┼─ better or worse than the others ── likelier or less likely
                                └─ sample K ── reward ─┘

Shapes: B rows of a batch, K samples of each, T tokens, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from common.devices import autocast
from common.distributed import sum_gradients
from dataset.cider import Cider
from model.cache import growing_cache
from trainer.augment import augment_batch
from trainer.loop import to_device

PARTS = 4  # forward passes for the samples of a batch: short ones are not padded to the longest


class Rewards:
    """The prompt of each row, and the CIDEr of answers to it."""

    def __init__(self, questions):
        """questions: list of `inference.scoring.Question`, in order; the last one of a row counts."""
        self.prompts = {question.row: question.prompt for question in questions}
        self.lengths = np.array([len(prompt) for prompt in self.prompts.values()])  # rows are in order
        texts = {question.row: tuple(sorted(question.references)) for question in questions}
        numbers = {references: number for number, references in enumerate(dict.fromkeys(texts.values()))}
        self.numbers = {row: numbers[references] for row, references in texts.items()}  # of its references
        if len(numbers) < 2:
            raise ValueError("--data_path: all rows have the same references, so no answer is better than another")
        self.cider = Cider(list(map(list, numbers)))

    def __call__(self, row: int, answer: str) -> float:
        return self.cider.score(self.numbers[row], answer)


def read_prompts(model, batch: dict, prompts: list[list[int]], pad_token_id: int):
    """Runs the prompts of a batch, all but their last token. Returns the cache, the mask bool (B, T) of all prompt
    tokens, the last token int64 (B,) of each, and the auxiliary loss."""
    rows = [*map(torch.tensor, prompts)]
    # Padded on the left, so that all samples start at the same position.
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").bool()
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    pictures = {key: batch[key] for key in ("pixel_values", "image_features")}
    out = model(tokens[:, :-1], mask[:, :-1], use_cache=True, logits_to_keep=1, **pictures)
    return out.past_key_values, mask, tokens[:, -1], out.aux_loss


def repeated(cache, rows, copy=None):
    """A copy of some rows of a cache, through which gradients flow. rows: int64; copy: an empty cache to use."""
    copy = DynamicCache() if copy is None else copy
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows), number)
    return copy


@torch.no_grad()
def sample(model, cache, mask, first, rows, args, end: int, pad: int):
    """Samples answers, token by token. rows: int64 (B·K,), the prompt of each. Returns int64 (B·K, T), padded after the
    end of each, and the number of its tokens with that end, int64 (B·K,)."""
    cache, mask, token = repeated(cache, rows, growing_cache()), mask[rows], first[rows]
    running = torch.ones_like(token, dtype=torch.bool)
    tokens, lengths = [], torch.zeros_like(token)
    while running.any() and len(tokens) < args.max_new_tokens:
        logits = model(token[:, None], mask, past_key_values=cache, use_cache=True).logits[:, -1]  # (B·K, V)
        # The inverse of the distribution function: multinomial() would need a random number for each token of V.
        total = (logits.float() / args.temperature).softmax(dim=-1).cumsum(dim=-1)
        token = torch.searchsorted(total, torch.rand_like(total[:, :1]) * total[:, -1:]).squeeze(1)
        token = token.where(running, pad)
        tokens.append(token)
        lengths += running
        running = running & (token != end)
        mask = F.pad(mask, (0, 1), value=True)
    return torch.stack(tokens, dim=1), lengths


def advantages(rewards, K: int):
    """How much better each answer is than the mean of the others to the same row. float (B·K,) → the same.

    In standard deviations of the whole batch, not of the row (as in GRPO): most rows differ by little, which would then
    count as much as the few that make the mean reward.
    """
    rewards = rewards.view(-1, K)
    better = (rewards - rewards.mean(dim=1, keepdim=True)) * K / (K - 1)
    return (better / rewards.std().clamp(min=1e-3)).flatten()


def learn_rewarded(run, batch: dict, last: bool, labels: float, rows: float, rewards: Rewards, tokenizer):
    """The forward and backward pass of a batch, in place of `trainer.loop.learn_answers`. Returns its (mean reward,
    auxiliary loss) of the step's."""
    args, model, K, end = run.args, run.model, run.args.samples, tokenizer.eos_token_id
    mean = aux_loss = torch.zeros((), device=run.device)
    if batch["rows"]:
        with autocast(run.device, run.dtype):
            inputs = augment_batch(to_device(batch, model), model, args)
            prompts = [rewards.prompts[row] for row in batch["rows"]]
            cache, mask, first, aux_loss = read_prompts(model, inputs, prompts, tokenizer.pad_token_id)
            row = torch.arange(len(prompts), device=run.device).repeat_interleave(K)  # (B·K,): of each sample
            tokens, lengths = sample(model, cache, mask, first, row, args, end, tokenizer.pad_token_id)

            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            reward = [rewards(batch["rows"][i], text) for i, text in zip(row.tolist(), texts)]
            reward = torch.tensor(reward, device=run.device) * (tokens == end).any(dim=1)  # none if it was cut off
            better = advantages(reward, K)

            aux_loss = aux_loss * (len(prompts) / rows)
            loss = aux_loss
            for part in lengths.argsort().chunk(PARTS):
                n = int(lengths[part].max())
                given = torch.cat([first[row[part], None], tokens[part, : n - 1]], dim=1)
                seen = F.pad(mask[row[part]], (0, n - 1), value=True)
                h = model(
                    given, seen, repeated(cache, row[part]), return_logits=False
                ).last_hidden_state  # (part, n, D)
                real = torch.arange(n, device=run.device) < lengths[part, None]  # (part, n): no padding
                logits = model.lm_head(h[real]).float() / args.temperature  # of the distribution that was sampled
                nats = F.cross_entropy(logits, tokens[part, :n][real], reduction="none")
                loss = loss + (nats * better[part, None].expand(-1, n)[real]).sum() / (labels * K)
            run.scaler.scale(loss).backward()
        mean = reward.sum() / (rows * K)
    if last:
        sum_gradients(weight for weight in model.parameters() if weight.requires_grad)
    return torch.stack([mean, aux_loss]).detach()

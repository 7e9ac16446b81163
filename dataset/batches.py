"""Examples → batches → steps: `collate` pads examples to a batch, `StepSampler` assigns rows to batches and batches to
steps.

Shapes: B batch, T tokens, N pictures of a batch, H and W pixels; P patches and V width of the encoder.

Reading path, 8 of 10; next: trainer/loop.py
"""

import numpy as np
import torch

from model.processing import IGNORE


def collate(examples: list[dict], pad_token_id: int = 0) -> dict:
    """Examples → a batch, padded on the right to its longest row, rounded up to a multiple of 8.

    Returns "input_ids", "labels", "attention_mask" int64 (B, T), "pixel_values" uint8 (sum of N, 3, H, W) or None,
    "image_features" float16 (sum of N, P, V) or None, "rows" (their numbers in the data set), "broken" (why other rows
    are missing). Without a usable row, the batch is padding without labels: every rank can run it, and the model learns
    nothing from it.
    """
    broken = [example["broken"] for example in examples if "broken" in example]
    examples = [example for example in examples if "broken" not in example]
    B, longest = max(len(examples), 1), max((len(example["input_ids"]) for example in examples), default=1)
    T = -(-longest // 8) * 8  # matrix units of GPUs prefer multiples of 8
    batch = {
        "input_ids": torch.full((B, T), pad_token_id),
        "labels": torch.full((B, T), IGNORE),
        "attention_mask": torch.zeros((B, T), dtype=torch.int64),
    }
    for row, example in enumerate(examples):
        n = len(example["input_ids"])
        batch["input_ids"][row, :n] = example["input_ids"]
        batch["labels"][row, :n] = example["labels"]
        batch["attention_mask"][row, :n] = 1

    def joined(key):
        tensors = [example[key] for example in examples if example.get(key) is not None]
        return torch.cat(tensors) if tensors else None  # one after another, in the order of their placeholders

    return {
        **batch,
        "pixel_values": joined("pictures"),
        "image_features": joined("features"),
        "rows": [example["row"] for example in examples],
        "broken": broken,
    }


class StepSampler:
    """Batches of rows, step by step, for one rank: the `batch_sampler` of a DataLoader.

    All ranks compute the same list of batches, which depends only on lengths, batch_size, batches per step, seed and
    epoch. A step takes the next world_size · accumulation_steps batches; batch i of a step goes to rank i % world_size.
    As a result, 2 ranks with 1 batch each make the same steps as 1 rank with 2. In the last step of an epoch, a rank
    may get an empty batch; it takes part in the step without a row.
    """

    def __init__(
        self,
        lengths,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        window: int = 32,
        parts: list[tuple[int, int, float]] | None = None,
        groups: np.ndarray | None = None,
    ):
        """window: after shuffling, rows are sorted by length within this many batches, which saves padding.

        parts: (first row, end, weight) of ranges of rows; an epoch takes weight times the number of rows in the range.
        With a weight of 0.5 an epoch takes half of them, and the next epoch the other half. None: all rows once.

        groups: int64, the first row of each group; an epoch draws one row of a group, such as one caption of a picture.
        """
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.rank, self.world_size, self.accumulation_steps = rank, world_size, accumulation_steps
        self.shuffle, self.window = shuffle, window
        parts = parts or [(0, len(self.lengths), 1)]
        self.groups = groups if shuffle else None
        if self.groups is not None:
            parts = [(*np.searchsorted(self.groups, (first, end)).tolist(), weight) for first, end, weight in parts]
        self.parts = [(first, end, round((end - first) * weight)) for first, end, weight in parts]
        self.batches = -(-sum(rows for *_, rows in self.parts) // batch_size)
        self.steps_per_epoch = -(-self.batches // (world_size * accumulation_steps))
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Selects what the next iteration yields: this epoch, starting at step first_step."""
        self.epoch, self.first_step = epoch, first_step

    def all_batches(self) -> list[np.ndarray]:
        """The epoch's batches for all ranks, in order."""
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(np.concatenate([self.rows_of_part(part) for part in range(len(self.parts))]))
        # Rows of similar length share a batch, which saves padding. Sorting only within windows of shuffled rows keeps
        # batches different from epoch to epoch.
        batches = []
        for start in range(0, len(order), self.window * self.batch_size):
            rows = order[start : start + self.window * self.batch_size]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # The batches of a step have similar lengths, because its ranks wait for the slowest one.
        per_step = self.world_size * self.accumulation_steps
        steps = [batches[i : i + per_step] for i in range(0, len(batches), per_step)]
        whole = len(batches) // per_step  # an incomplete step stays the last
        return [batch for i in (*random.permutation(whole), *range(whole, len(steps))) for batch in steps[i]]

    def rows_of_part(self, part: int) -> np.ndarray:
        """The rows of a part in this epoch: the next in an endless sequence of passes, each in a different order."""
        first, end, rows = self.parts[part]
        size = max(end - first, 1)
        start = self.epoch * rows
        passes = range(start // size, -(-(start + rows) // size))
        order = [self.one_pass(first, end, np.random.default_rng((self.seed, part, i))) for i in passes]
        return np.concatenate([*order, np.empty(0, np.int64)])[start % size :][:rows]

    def one_pass(self, first: int, end: int, random) -> np.ndarray:
        order = first + random.permutation(end - first)
        if self.groups is None:
            return order
        sizes = np.diff(self.groups, append=len(self.lengths))[order]
        return self.groups[order] + random.integers(0, sizes)  # a random row of each group

    def batches_in_step(self, step: int) -> int:
        """The number of batches per rank in this step of an epoch: accumulation_steps, or fewer in the last step."""
        left = self.batches - step * self.world_size * self.accumulation_steps
        return min(self.accumulation_steps, -(-left // self.world_size))

    def __iter__(self):
        batches = self.all_batches()
        for step in range(self.first_step, self.steps_per_epoch):
            start = step * self.world_size * self.accumulation_steps + self.rank
            for i in range(self.batches_in_step(step)):
                at = start + i * self.world_size
                yield batches[at].tolist() if at < len(batches) else []

    def __len__(self) -> int:
        return sum(self.batches_in_step(step) for step in range(self.first_step, self.steps_per_epoch))

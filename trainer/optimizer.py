"""What learns and how fast: trainable weights, optimizers, learning rates and their schedule."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.distributed import rank, say, world_size
from model.model_vlm import MiniMindVLM

ATTENTION = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.")


def choose_trainable(model: MiniMindVLM, choice: str) -> None:
    """Sets requires_grad. The projector always learns, the encoder never; `choice` says which part of the LLM learns:

    "projector": nothing; "last_layer": the last block; "first_last_layer": the first and the last block; "attention":
    the q/k/v/o projections of all blocks; "all": everything.
    """
    first, last = "model.layers.0.", f"model.layers.{model.config.num_hidden_layers - 1}."
    learns = {
        "projector": lambda name: False,
        "last_layer": lambda name: name.startswith(last),
        "first_last_layer": lambda name: name.startswith((first, last)),
        "attention": lambda name: any(part in name for part in ATTENTION),
        "all": lambda name: True,
    }[choice]
    for name, weight in model.named_parameters():
        if not name.startswith("vision_encoder."):
            weight.requires_grad_(name.startswith("vision_proj.") or learns(name))


class Muon(torch.optim.AdamW):
    """AdamW, except for groups with "muon": their matrices move along their orthogonalized momentum.

    Such a step is equally long in all directions. What only a few rows teach is then not drowned out by what all rows
    have in common (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Steps are scaled to the size of
    AdamW's, so one learning rate suits both (Liu et al. 2025, https://arxiv.org/abs/2502.16982). Like
    `torch.optim.Muon`, but for all matrices of a shape at once, shared out among the ranks; and on a CPU in fp32 unless
    the run is in bfloat16, which most of them only emulate.
    """

    momentum = 0.95

    def __init__(self, params, dtype: torch.dtype = torch.float32, **settings):
        """dtype: of the products on a CPU."""
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            by_shape = defaultdict(list)
            for weight in group["params"] if group["muon"] else ():
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                self.step_together(weights, group["lr"], group["weight_decay"])
        return loss

    def step_together(self, weights: list, lr: float, weight_decay: float) -> None:
        """Updates matrices of the same shape together."""
        ahead = []
        for weight in weights:
            state = self.state[weight]
            if not state:  # AdamW's names: it expects its "step" when a state is loaded
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(weight))
            state["step"] += 1
            average = state["exp_avg"].lerp_(weight.grad, 1 - self.momentum)
            ahead.append(weight.grad.lerp(average, self.momentum))  # Nesterov
        scale = 0.2 * max(weights[0].shape) ** 0.5  # an orthogonal matrix has entries of 1/sqrt(its longer side)
        dtype = torch.bfloat16 if weights[0].is_cuda else self.dtype
        for weight, direction in zip(weights, orthogonalize_on_all_ranks(torch.stack(ahead), dtype)):
            weight.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr * scale)


def orthogonalize_on_all_ranks(x, dtype: torch.dtype):
    """`orthogonalize` for matrices that are the same on all ranks: each computes a share of them, and all get all."""
    share = -(-len(x) // world_size())
    padded = F.pad(x, (0, 0, 0, 0, 0, share * world_size() - len(x)))
    mine = orthogonalize(padded[rank() * share :][:share], dtype)
    if world_size() == 1:
        return mine
    results = padded.new_empty(padded.shape, dtype=torch.float32)
    dist.all_gather(list(results.split(share)), mine.contiguous())
    return results[: len(x)]


def orthogonalize(x, dtype: torch.dtype = torch.float32, steps: int = 5):
    """Approximates the nearest (semi-)orthogonal matrices to x (N, R, C): singular values end up between 0.7 and 1.2.

    Uses the fifth-order Newton-Schulz iteration with the coefficients of Muon, in `dtype`. Returns float32 (N, R, C).
    """
    x = x.to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


def make_optimizer(
    model,
    learning_rate: float,
    projector_learning_rate: float | None,
    weight_decay: float,
    embedding_learning_rate: float | None = None,
    muon: bool = False,
    dtype: torch.dtype = torch.float32,
):
    """Builds AdamW for the weights that learn. Weight decay applies to matrices, not to norms and biases. The projector
    has its own learning rate, and so have the embeddings if `embedding_learning_rate` is given.

    muon: use `Muon` for the matrices of the blocks; dtype: of its products. Each group stores its peak rate in "peak";
    `set_learning_rate` scales it.
    """
    rates = {"projector": projector_learning_rate, "embeddings": embedding_learning_rate or learning_rate}
    groups = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        part = "projector" if name.startswith("vision_proj.") else "embeddings" if "embed_tokens" in name else "blocks"
        decays = weight.ndim >= 2
        peak = rates.get(part, learning_rate)
        group = {"part": part, "lr": peak, "peak": peak, "weight_decay": weight_decay if decays else 0.0}
        group["muon"] = muon and decays and part == "blocks"
        groups.setdefault((part, decays), {"params": [], **group})["params"].append(weight)
    order = sorted(groups, key=lambda key: ("projector", "embeddings", "blocks").index(key[0]))  # as in checkpoints
    # Every group has its own weight_decay; AdamW validates only the one passed here. With Muon it is not fused: a fused
    # AdamW skips steps by itself when fp16 overflows, and the matrices must not move when it does.
    ordered, settings = [groups[key] for key in order], {"betas": (0.9, 0.95), "weight_decay": weight_decay}
    return Muon(ordered, dtype, **settings) if muon else torch.optim.AdamW(ordered, fused=True, **settings)


# Peak rates of (LLM, projector). First pair: hidden_size 128, Muon, 16 rows per batch, measured with the quickstart
# (docs/results/quickstart.md). Second pair: the 26M model, hidden_size 512, AdamW, 32 rows per batch.
RATES = {
    "llm": ((4e-3, None), (1e-3, None)),
    "pretrain_vlm": ((2e-3, 4e-3), (4e-4, 1e-3)),  # the projector starts from random weights
    "sft_vlm": ((3e-3, 2e-3), (2e-4, 2e-4)),
    "scst_vlm": ((3e-4, 3e-4), (2e-5, 2e-5)),  # from width 192 (docs/results/flickr8k.md); the second: a guess
}
SETTINGS = ("optimizer", "learning_rate", "projector_learning_rate", "batch_size")


def fitting_batch(width: int) -> int:
    """Returns the rows per batch that suit a model of this hidden_size."""
    return 16 if width < 512 else 32


def follow_width(args, model, stage: str) -> None:
    """Sets the flags in SETTINGS that were not given to what suits the model's width, and prints them.

    From width 512 on these are the values of the 26M model. Below, rates grow as 1 / width, up to those measured at
    128. stage: a key of RATES.
    """
    width = model.config.hidden_size
    narrow = width < 512
    rate, projector_rate = RATES[stage][0 if narrow else 1]
    share = min(128 / width, 1) if narrow else 1
    blocks_learn = any(weight.requires_grad for name, weight in model.named_parameters() if ".layers." in name)
    fitting = {"optimizer": "muon" if narrow and blocks_learn else "adamw"}
    if narrow and (args.optimizer or fitting["optimizer"]) == "adamw":
        rate /= 3  # on drawn scenes the best rate was 1e-3 for AdamW, 3e-3 for Muon (docs/results/learning.md)
    fitting |= {"learning_rate": rate * share, "batch_size": fitting_batch(width)}
    if projector_rate:
        fitting["projector_learning_rate"] = projector_rate * share
    chosen = []
    for key in SETTINGS:
        if key in fitting and getattr(args, key) is None:
            value = fitting[key]
            setattr(args, key, float(f"{value:.2g}") if isinstance(value, float) else value)
            chosen.append(f"--{key} {getattr(args, key)}")
    if chosen:
        say(f"settings for hidden_size {width}: {' '.join(chosen)}")


def optimizer_of(model, args):
    """Builds the optimizer that the flags ask for. Raises ValueError for a flag about weights that do not learn."""
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if args.embedding_learning_rate and not any("embed_tokens" in name for name in learning):
        raise ValueError(f"--embedding_learning_rate: with --trainable {args.trainable} the embeddings do not learn")
    if args.optimizer == "muon" and not any(".layers." in name for name in learning):
        raise ValueError(f"--optimizer muon is for the blocks, which do not learn with --trainable {args.trainable}")
    return make_optimizer(
        model,
        args.learning_rate,
        getattr(args, "projector_learning_rate", None),
        args.weight_decay,
        args.embedding_learning_rate,
        args.optimizer == "muon",
        torch.bfloat16 if args.dtype == "bfloat16" else torch.float32,
    )


def schedule(step: int, total: int, warmup: int, shape: str = "cosine") -> float:
    """Returns the share of the peak learning rate at a step: linear warmup, then "cosine" decay to a tenth of the peak
    or "linear" decay to 0."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    if shape == "linear":
        return 1 - progress
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def learning_rates(optimizer) -> dict[str, float]:
    """Returns the current learning rates of the parts that learn: {"projector", "embeddings", "blocks": rate}."""
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def set_learning_rate(optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share

"""Renames the weights of a decoder for stock models, and back. Used by llm.py and llava.py.

Llama, Qwen3 and Qwen3Moe use the same names as ours; only the experts of GraniteMoeShared have another layout.

Shapes: D hidden_size, I intermediate_size, E experts, S shared experts.
"""

import re

import torch

from model.model_minimind import MiniMindConfig


def to_stock(state: dict, config: MiniMindConfig) -> dict[str, torch.Tensor]:
    """Weights for a stock model, without the head, in the layout before Transformers 5, which all versions read."""
    theirs = {key: value for key, value in state.items() if key.startswith("model.")}
    if not config.use_moe or config.qk_norm:
        return theirs
    experts = re.compile(r"\.mlp\.(gate|experts|shared_experts)\.")
    theirs = {key: value for key, value in theirs.items() if not experts.search(key)}
    for i in range(config.num_hidden_layers):

        def stack(kind, matrix, count, i=i):  # (count, I, D), or (count, D, I) of "down"
            return torch.stack([state[f"model.layers.{i}.mlp.{kind}.{e}.{matrix}_proj.weight"] for e in range(count)])

        layer, E, S = f"model.layers.{i}.", config.n_routed_experts, config.n_shared_experts
        gate, up, down = (stack("experts", matrix, E) for matrix in ("gate", "up", "down"))
        theirs[f"{layer}block_sparse_moe.router.layer.weight"] = state[f"{layer}mlp.gate.weight"]  # (E, D)
        theirs[f"{layer}block_sparse_moe.input_linear.weight"] = torch.cat([gate, up], dim=1)  # (E, 2·I, D)
        theirs[f"{layer}block_sparse_moe.output_linear.weight"] = down  # (E, D, I)
        if S:  # several become one, S times as wide
            gate, up, down = (stack("shared_experts", matrix, S) for matrix in ("gate", "up", "down"))
            theirs[f"{layer}shared_mlp.input_linear.weight"] = torch.cat([gate, up]).flatten(0, 1)  # (2·S·I, D)
            theirs[f"{layer}shared_mlp.output_linear.weight"] = down.transpose(0, 1).flatten(1)  # (D, S·I)
    return theirs


def from_stock(state: dict, config: dict) -> dict[str, torch.Tensor]:
    """The inverse of `to_stock`; config: our fields."""
    ours = {}
    for name, value in state.items():
        layer, routed, matrix = name.partition(".block_sparse_moe.")
        if not routed:
            layer, _, matrix = name.partition(".shared_mlp.")
        if name.startswith("lm_head."):
            continue
        if matrix == "router.layer.weight":
            ours[f"{layer}.mlp.gate.weight"] = value
        elif matrix:
            into = "input" in matrix  # gate and up, else down
            if not routed:  # (2·S·I, D) → (S, 2·I, D), or (D, S·I) → (S, D, I)
                S = config["n_shared_experts"]
                value = value.unflatten(0, (2, S, -1)) if into else value.unflatten(1, (S, -1))
                value = value.transpose(0, 1).flatten(1, 2) if into else value.transpose(0, 1)
            kind = "experts" if routed else "shared_experts"
            for part, experts in zip(("gate", "up") if into else ("down",), value.chunk(1 + into, dim=1)):
                ours |= {f"{layer}.mlp.{kind}.{e}.{part}_proj.weight": expert for e, expert in enumerate(experts)}
        else:
            ours[name] = value
    return ours

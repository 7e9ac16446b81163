"""Flags for model, device and precision. Does not import PyTorch, like common/cli.py."""

from common.cli import SWITCH, not_negative, positive
from model.defaults import DEFAULT_VISION_MODEL


def add_parts_arguments(parser, sees: bool = True) -> None:
    """Adds the flags for tokenizer and, with `sees`, encoder."""
    add = parser.group("the model").add_argument
    default = "default: the one of the weights, or {}"
    add("--tokenizer_path", metavar="DIR", help="folder with tokenizer.json; " + default.format("./model"))
    if sees:
        add("--vision_model_path", metavar="DIR", help="folder of an encoder; " + default.format(DEFAULT_VISION_MODEL))


def add_model_arguments(parser, sees: bool = True) -> None:
    """Adds the flags for a model. sees: a vision-language model; False: a language model only."""
    add = parser.start.add_argument
    add("--out_dir", default="./out", help="folder of the weights")
    add("--device", default="auto", metavar="NAME", help="auto (first of CUDA, MPS, CPU), cuda, cuda:1, mps, cpu")
    add = parser.group("the model").add_argument
    add("--hidden_size", type=positive(int), help="width; default: the one of the weights, or 512")
    add("--num_hidden_layers", type=positive(int), help="number of blocks; default: the one of the weights, or 8")
    default = "; default: from weights and their JSON, or {}"
    add("--num_attention_heads", type=positive(int), help="query heads" + default.format(8))
    add("--num_key_value_heads", type=positive(int), help="heads of keys and values" + default.format(2))
    add("--use_moe", **SWITCH, help="mixture of experts; default: as in the weights")
    add_parts_arguments(parser, sees)
    add = parser.group("speed, precision, repeatability").add_argument
    add(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="precision of computation; auto: bfloat16 if the GPU supports it, otherwise float16; float32 on a CPU",
    )
    add("--seed", type=not_negative, default=42, help="seed of all random numbers")

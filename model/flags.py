"""The flags that say which model, and where and how precisely it computes; without PyTorch, as common/cli.py."""

from common.cli import SWITCH, not_negative, positive
from model.defaults import DEFAULT_VISION_MODEL


def add_parts_arguments(parser, sees: bool = True) -> None:
    add = parser.group("the model").add_argument
    default = "default: that of the weights, else {}"
    add("--tokenizer_path", metavar="DIR", help="folder with tokenizer.json; " + default.format("./model"))
    if sees:
        add("--vision_model_path", metavar="DIR", help="folder of an encoder; " + default.format(DEFAULT_VISION_MODEL))


def add_model_arguments(parser, sees: bool = True) -> None:
    """sees: a vision-language model, rather than a language model alone."""
    add = parser.start.add_argument
    add("--out_dir", default="./out", help="folder of the weights")
    add("--device", default="auto", metavar="NAME", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu")
    add = parser.group("the model").add_argument
    add("--hidden_size", type=positive(int), help="width; read off the weights, 512 from nothing")
    add("--num_hidden_layers", type=positive(int), help="blocks; read off the weights, 8 from nothing")
    default = "; read off the weights and their JSON, {} from nothing"
    add("--num_attention_heads", type=positive(int), help="of queries" + default.format(8))
    add("--num_key_value_heads", type=positive(int), help="of keys and values" + default.format(2))
    add("--use_moe", **SWITCH, help="mixture of experts; read off the weights")
    add_parts_arguments(parser, sees)
    add = parser.group("speed, precision, repeatability").add_argument
    add(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="precision of the arithmetic; auto: bfloat16 where the hardware has it, else float16, on a CPU float32",
    )
    add("--seed", type=not_negative, default=42, help="of everything random")

"""The command line that all scripts share: flags, and how a mistake is told.

Nothing here imports PyTorch, so that --help and a mistyped flag are answered at once.
"""

import argparse
import math
import os
import sys

from model import DEFAULT_VISION_MODEL


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM ended the run after its step was finished and saved. Exit status 130."""

    def __init__(self):
        super().__init__(130)


def can_be_mended(error: Exception) -> bool:
    """By the user: a flag, a file, the size of a batch. Anything else is our mistake."""
    torch = sys.modules.get("torch")
    return isinstance(error, (ValueError, OSError)) or bool(torch) and isinstance(error, torch.OutOfMemoryError)


def run_main(main) -> None:
    """Calls `main()` and turns what the user can mend into one message instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that is no Unicode must not end the run
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("MINIMIND_TRACEBACK") or not can_be_mended(error):
            raise
        print(f"\nerror: {error}\n(MINIMIND_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(2)  # at once, so that torchrun ends the others: leaving the group would wait for them
        sys.exit(2)
    if distributed := sys.modules.get("trainer.distributed"):
        distributed.stop()


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:  # NaN is neither
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its message
    return parse


def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return float(text)


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must not be below 0, got {text}")
    return int(text)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring as it stands, and every default beside its flag."""

    def _get_help_string(self, action):
        return super()._get_help_string(action) if action.default else action.help


def add_parts_arguments(parser, sees: bool = True) -> None:
    own = "default: that of the weights, else {}"
    parser.add_argument("--tokenizer_path", help="folder with tokenizer.json; " + own.format("./model"))
    if sees:
        parser.add_argument("--vision_model_path", help="CLIP folder; " + own.format(DEFAULT_VISION_MODEL))


def add_model_arguments(parser, sees: bool = True) -> None:
    """sees: a vision-language model, rather than a language model alone."""
    parser.add_argument("--hidden_size", type=positive(int), help="width; read off the weights, 512 from nothing")
    parser.add_argument("--num_hidden_layers", type=positive(int), help="blocks; read off the weights, 8 from nothing")
    own = "; read off the weights and their JSON, {} from nothing"
    parser.add_argument("--num_attention_heads", type=positive(int), help="of queries" + own.format(8))
    parser.add_argument("--num_key_value_heads", type=positive(int), help="of keys and values" + own.format(2))
    parser.add_argument("--use_moe", action="store_true", help="mixture of experts; read off the weights")
    add_parts_arguments(parser, sees)
    parser.add_argument("--out_dir", default="./out", help="folder of the weights")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="precision of the arithmetic; auto: bfloat16 where the hardware has it, else float16, on a CPU float32",
    )
    parser.add_argument("--seed", type=not_negative, default=42, help="of everything random")


def parse_training(parser, argv):
    """The flags of a training script; ends the program where one would have no effect."""
    args = parser.parse_args(argv)
    for flag in ("val_interval", "val_images_path"):
        if getattr(args, flag, None) and not args.val_path:
            parser.error(f"--{flag} has no effect without --val_path")
    if getattr(args, "cache_dtype", "float16") != "float16" and not args.cache_features:
        parser.error("--cache_dtype has no effect without --cache_features")
    return args


def add_training_arguments(
    parser,
    *,
    from_weight,
    data_path,
    max_seq_len,
    trainable=None,
):
    """The flags of all training; a stage gives its own defaults, the last if it has pictures."""
    sees = trainable is not None
    by_width = "default: follows from the model's width, printed at the start"  # by `follow_width`
    add_model_arguments(parser, sees)
    add = parser.add_argument
    rows = "training rows: JSONL or Parquet, files or patterns; without suffix: whichever is there; hf://...: streamed"
    add("--data_path", nargs="+", default=[data_path], metavar="PATH", help=rows)
    passes = "how often an epoch passes over each --data_path, as in 1 0.5; default: once"
    add("--data_weights", nargs="+", type=positive(float), metavar="W", help=passes)
    add("--val_path", nargs="+", metavar="PATH", help="held-out rows, for the validation loss")
    if sees:
        beside = (
            'folder or zip of the pictures named by "image", one for all --data_path or one each; default: beside it'
        )
        add("--images_path", nargs="+", metavar="PATH", help=beside)
        add("--val_images_path", nargs="+", metavar="PATH", help="of --val_path; default: as --images_path")
        add(
            "--trainable",
            default=trainable,
            choices=["projector", "last_layer", "first_last_layer", "attention", "all"],
            help="what learns beside the projector: nothing, the last layer, first and last, q/k/v/o projections, all",
        )
        add("--projector_learning_rate", type=positive(float), help="peak, for the projector; " + by_width)
        add(
            "--cache_features",
            metavar="DIR",
            help="keep what CLIP makes of the pictures there, and never encode them again",
        )
        kept = "as what: int8 takes half the room and rounds more"
        add("--cache_dtype", choices=["float16", "int8"], default="float16", help=kept)
    stretch = "rows of a streamed --data_path (hf://...) on the disk at a time; twice as many with those to come"
    add("--stream_rows", type=positive(int), default=20_000, help=stretch)
    add("--val_interval", type=positive(int), help="steps between validations; default: at the end of each epoch")
    add("--on_bad_row", choices=["error", "skip"], default="error", help="what to do with rows that cannot be used")
    add("--from_weight", default=from_weight, metavar="W", help="llm, pretrain_vlm, sft_vlm, a path, or none")
    add("--from_resume", action="store_true", help="go on where the last run with these flags stopped")
    add("--epochs", type=positive(int), default=1, help="passes over the data")
    add("--batch_size", type=positive(int), help="rows per device and forward pass; " + by_width)
    add("--accumulation_steps", type=positive(int), default=1, help="forward passes per optimizer step")
    add("--learning_rate", type=positive(float), help="peak, for the LLM; " + by_width)
    add("--embedding_learning_rate", type=positive(float), help="peak, for the embeddings; default: as the LLM")
    add("--optimizer", choices=["adamw", "muon"], help="muon: for the matrices of the blocks; " + by_width)
    add("--warmup_iters", type=not_negative, default=100, help="steps of linear warmup, at most a tenth of the run")
    add("--schedule", choices=["cosine", "linear"], default="cosine", help="then, to a tenth of the peak, or to zero")
    add("--weight_decay", type=float, default=0.1, help="AdamW's, for matrices; norms and biases have none")
    add("--grad_clip", type=positive(float), default=1.0, help="largest norm of the gradient")
    add("--dropout", type=float, default=0.0, help="share of activations set to 0 while training")
    add("--max_seq_len", type=positive(int), default=max_seq_len, help="tokens per row, placeholders included")
    add("--num_workers", type=not_negative, default=2, help="processes that decode pictures; 0: this one does")
    add("--compile", action="store_true", help="torch.compile: half a minute at the start, then faster steps")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    add("--log_interval", type=positive(int), default=20, help="steps between lines in the metrics file")
    add("--save_interval", type=positive(int), default=1000, help="steps between checkpoints")
    add("--use_wandb", action="store_true", help="same as --tracker wandb")
    trackers = ["none", "wandb", "trackio", "swanlab"]
    add("--tracker", choices=trackers, default="none", help="trackio is local, without an account")
    add("--wandb_project", default="MiniMind-V", help="project name for the tracker")

"""The flags of all trainings."""

import os
from pathlib import Path

from common.cli import SWITCH, not_negative, positive
from dataset.flags import add_prompt_argument, add_urls_argument
from model.flags import add_model_arguments


def parse_training(parser, argv):
    """The flags of a training script; ends the program where one would have no effect."""
    args = parser.parse_args(argv)
    for flag in ("val_interval", "val_images_path"):
        if getattr(args, flag, None) and not args.val_path:
            parser.error(f"--{flag} has no effect without --val_path")
    if getattr(args, "cache_dtype", "float16") != "float16" and not args.cache_features:
        parser.error("--cache_dtype has no effect without --cache_features")
    for flag in ("out_dir", "cache_features"):
        if folder := getattr(args, flag, None):
            check_folder(parser, flag, Path(folder))
    return args


def check_folder(parser, flag: str, folder: Path) -> None:
    """Ends the program, before anything takes its time, where no file can be written into a folder."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        parser.error(f"--{flag} {folder}: {existing} is a file, expected a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        parser.error(f"--{flag} {folder}: {existing} may not be written to; choose another, or change its rights")


FREEZE_LLM = {"0": "all", "1": "first_last_layer", "2": "projector"}  # as the public MiniMind-V has it → --trainable


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
    by_width = "default: follows from the model's width"  # by `follow_width`, which prints them
    add = parser.start.add_argument
    rows = "training rows of any shape: JSON, JSONL, Parquet, Arrow, CSV, tar; files, patterns, hf://..., also streamed"
    add("--data_path", nargs="+", default=[data_path], metavar="PATH", help=rows)
    if sees:
        beside = (
            'folder or zip of the pictures named by "image", one for all --data_path or one each; default: beside it'
        )
        add("--images_path", nargs="+", metavar="PATH", help=beside)
    add("--val_path", nargs="+", metavar="PATH", help="held-out rows, for the validation loss")
    add("--from_weight", default=from_weight, metavar="W", help="llm, pretrain_vlm, sft_vlm, a path, or none")
    add("--from_resume", **SWITCH, help="go on where the last run with these flags stopped")
    add("--epochs", type=positive(int), default=1, help="passes over the data")
    add("--batch_size", type=positive(int), help="rows per device and forward pass; " + by_width)
    add("--learning_rate", type=positive(float), help="peak, for the LLM; " + by_width)

    add = parser.group("what it learns, and how").add_argument
    if sees:
        add(
            "--trainable",
            type=lambda text: FREEZE_LLM.get(text, text),
            default=trainable,
            choices=["projector", "last_layer", "first_last_layer", "attention", "all"],
            help="what learns beside the projector: nothing, the last layer, first and last, q/k/v/o projections, all",
        )
        add("--projector_learning_rate", type=positive(float), help="peak, for the projector; " + by_width)
    add("--embedding_learning_rate", type=positive(float), help="peak, for the embeddings; default: as the LLM")
    add("--optimizer", choices=["adamw", "muon"], help="muon: for the matrices of the blocks; " + by_width)
    add("--accumulation_steps", type=positive(int), default=1, help="forward passes per optimizer step")
    add("--warmup_iters", type=not_negative, default=100, help="steps of linear warmup, at most a tenth of the run")
    add("--schedule", choices=["cosine", "linear"], default="cosine", help="then, to a tenth of the peak, or to zero")
    add("--weight_decay", type=float, default=0.1, help="AdamW's, for matrices; norms and biases have none")
    add("--grad_clip", type=positive(float), default=1.0, help="largest norm of the gradient")
    add("--dropout", type=float, default=0.0, help="share of activations set to 0 while training")
    if sees:
        fewer = "of a picture, as 49 of 196: as many neighbouring patches become one; only of a new projector"
        add("--image_tokens", type=positive(int), metavar="N", help=fewer)

    add = parser.group("the data").add_argument
    bad = "what to do with rows that cannot be used: skip leaves them out, of broken pictures up to 10 or 1 percent"
    passes = "how often an epoch passes over each --data_path, as in 1 0.5; default: once"
    add("--data_weights", nargs="+", type=positive(float), metavar="X", help=passes)
    add("--max_seq_len", type=positive(int), default=max_seq_len, help="tokens per row, placeholders included")
    add("--on_bad_row", choices=["error", "skip"], default="error", help=bad)
    add_prompt_argument(parser)
    several = "of several captions of a picture: one in each epoch, drawn by chance, or all, as rows"
    add("--captions_per_epoch", choices=["one", "all"], default="one", help=several)
    streamed = "rows of a streamed --data_path (hf://...) on the disk at a time; twice as many with those to come"
    add("--stream_rows", type=positive(int), default=20_000, help=streamed)
    if sees:
        add_urls_argument(parser)
        add("--val_images_path", nargs="+", metavar="PATH", help="of --val_path; default: as --images_path")
        kept = "keep what the encoder makes of the pictures there, and never encode them again"
        add("--cache_features", metavar="DIR", help=kept)
        kept = "as what: int8 takes half the room and rounds more"
        add("--cache_dtype", choices=["float16", "int8"], default="float16", help=kept)

    add_model_arguments(parser, sees)
    add = parser.group("speed, precision, repeatability").add_argument
    add("--num_workers", type=not_negative, default=2, help="processes that decode pictures; 0: this one does")
    add("--compile", **SWITCH, help="torch.compile: half a minute at the start, then faster steps")
    add("--gradient_checkpointing", action="store_true", help="less memory, a third more time")

    add = parser.group("what it writes, and when").add_argument
    add("--val_interval", type=positive(int), help="steps between validations; default: at the end of each epoch")
    add("--log_interval", type=positive(int), default=20, help="steps between lines in the metrics file")
    add("--save_interval", type=positive(int), default=1000, help="steps between checkpoints")
    add("--use_wandb", action="store_true", help="same as --tracker wandb")
    trackers = ["none", "wandb", "trackio", "swanlab"]
    add("--tracker", choices=trackers, default="none", help="trackio is local, without an account")
    add("--wandb_project", default="MiniMind-V", metavar="NAME", help="project name for the tracker")

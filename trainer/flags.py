"""The command-line flags that all training scripts share."""

import os
from pathlib import Path

from common.cli import SWITCH, not_negative, positive
from dataset.flags import add_prompt_argument, add_urls_argument
from model.flags import add_model_arguments


def parse_training(parser, argv):
    """Parses the flags of a training script. Exits with an error if a flag would have no effect."""
    args = parser.parse_args(argv)
    for flag in ("val_interval", "val_images_path"):
        if getattr(args, flag, None) and not args.val_path:
            parser.error(f"--{flag} has no effect without --val_path")
    if getattr(args, "cache_dtype", "float16") != "float16" and not args.cache_features:
        parser.error("--cache_dtype has no effect without --cache_features")
    scale = getattr(args, "min_scale", None)
    if scale is not None and not 0.01 <= scale <= 1:
        parser.error(f"--min_scale {scale}: must be 0.01 to 1")
    for flag in ("min_scale", "flip"):
        if getattr(args, flag, None) and args.cache_features:
            parser.error(f"--{flag} changes pictures in each step, --cache_features keeps them as they are: omit one")
    for flag in ("out_dir", "cache_features"):
        if folder := getattr(args, flag, None):
            check_folder(parser, flag, Path(folder))
    return args


def check_folder(parser, flag: str, folder: Path) -> None:
    """Exits with an error, before any slow work starts, if no file can be written into `folder`."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        parser.error(f"--{flag} {folder}: {existing} is a file, expected a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        parser.error(f"--{flag} {folder}: {existing} is not writable; choose another, or change its permissions")


FREEZE_LLM = {"0": "all", "1": "first_last_layer", "2": "projector"}  # --freeze_llm of the public MiniMind-V → ours


def add_training_arguments(
    parser,
    *,
    from_weight,
    data_path,
    max_seq_len,
    trainable=None,
):
    """Adds the flags of all trainings with the defaults of a stage. trainable: None for a language model alone."""
    sees = trainable is not None
    by_width = "default: follows from the model's width"  # `follow_width` sets and prints them
    add = parser.start.add_argument
    rows = "training rows: JSON, JSONL, Parquet, Arrow, CSV or tar; files, glob patterns or hf://... (also streamed)"
    add("--data_path", nargs="+", default=[data_path], metavar="PATH", help=rows)
    if sees:
        beside = "folder or zip of the pictures, one for all --data_path or one each; default: next to the rows"
        add("--images_path", nargs="+", metavar="PATH", help=beside)
    add("--val_path", nargs="+", metavar="PATH", help="held-out rows for the validation loss")
    start = "weights to start from: llm, pretrain_vlm, sft_vlm, scst_vlm, a path, or none"
    add("--from_weight", default=from_weight, metavar="W", help=start)
    add("--from_resume", **SWITCH, help="resume the last run with the same flags")
    add("--epochs", type=positive(int), default=1, help="passes over the data")
    add("--batch_size", type=positive(int), help="rows per device and forward pass; " + by_width)
    add("--learning_rate", type=positive(float), help="peak learning rate of the LLM; " + by_width)

    add = parser.group("what it learns, and how").add_argument
    if sees:
        add(
            "--trainable",
            type=lambda text: FREEZE_LLM.get(text, text),
            default=trainable,
            choices=["projector", "last_layer", "first_last_layer", "attention", "all"],
            help="what learns in addition to the projector: nothing, the last layer, the first and last layer, "
            "the q/k/v/o projections, or the whole LLM",
        )
        add("--projector_learning_rate", type=positive(float), help="peak learning rate of the projector; " + by_width)
    peak = "peak learning rate of the embeddings; default: that of the LLM"
    add("--embedding_learning_rate", type=positive(float), help=peak)
    add("--optimizer", choices=["adamw", "muon"], help="muon is for the matrices of the blocks; " + by_width)
    add("--accumulation_steps", type=positive(int), default=1, help="forward passes per optimizer step")
    add("--warmup_iters", type=not_negative, default=100, help="steps of linear warmup, at most a tenth of the run")
    decay = "decay after the warmup: cosine to a tenth of the peak, linear to zero"
    add("--schedule", choices=["cosine", "linear"], default="cosine", help=decay)
    add("--weight_decay", type=float, default=0.1, help="weight decay of matrices; norms and biases have none")
    add("--grad_clip", type=positive(float), default=1.0, help="clip the gradient to this norm")
    add("--dropout", type=float, default=0.0, help="share of activations set to 0 during training")
    if sees:
        fewer = "tokens per picture, for example 49 instead of 196: neighbouring patches are merged; new projector only"
        add("--image_tokens", type=positive(int), metavar="N", help=fewer)

    add = parser.group("the data").add_argument
    bad = "what to do with unusable rows; skip allows broken pictures in up to 10 rows or 1 percent"
    passes = "passes over each --data_path per epoch, for example 1 0.5; default: 1"
    add("--data_weights", nargs="+", type=positive(float), metavar="X", help=passes)
    add("--max_seq_len", type=positive(int), default=max_seq_len, help="largest row in tokens, placeholders included")
    add("--on_bad_row", choices=["error", "skip"], default="error", help=bad)
    add_prompt_argument(parser)
    several = "if pictures have several captions: train on one per epoch, drawn at random, or on all"
    add("--captions_per_epoch", choices=["one", "all"], default="one", help=several)
    streamed = "rows per shard of a streamed --data_path (hf://...); the disk holds up to two shards"
    add("--stream_rows", type=positive(int), default=20_000, help=streamed)
    if sees:
        add_urls_argument(parser)
        held_out = "folder or zip of the pictures of --val_path; default: that of --images_path"
        add("--val_images_path", nargs="+", metavar="PATH", help=held_out)
        window = "train on random windows of the pictures, of at least this share of the area; brightness varies, too"
        add("--min_scale", type=float, metavar="X", help=window)
        mirrored = "mirror half of the pictures; left and right then look the same"
        add("--flip", action="store_true", default=None, help=mirrored)  # None, as in a checkpoint older than the flag
        kept = "store the features of the encoder there, so that each picture is encoded only once"
        add("--cache_features", metavar="DIR", help=kept)
        kept = "precision of stored features; int8 takes half the space and is less exact"
        add("--cache_dtype", choices=["float16", "int8"], default="float16", help=kept)

    add_model_arguments(parser, sees)
    add = parser.group("speed, precision, repeatability").add_argument
    add("--num_workers", type=not_negative, default=2, help="worker processes that decode pictures; 0: no workers")
    add("--compile", **SWITCH, help="torch.compile: starts half a minute later, then steps are faster")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, a third more time")

    add = parser.group("what it writes, and when").add_argument
    add("--val_interval", type=positive(int), help="steps between validations; default: at the end of each epoch")
    add("--log_interval", type=positive(int), default=20, help="steps between lines in the metrics file")
    add("--save_interval", type=positive(int), default=1000, help="steps between checkpoints")
    add("--use_wandb", action="store_true", help="same as --tracker wandb")
    trackers = ["none", "wandb", "trackio", "swanlab"]
    add("--tracker", choices=trackers, default="none", help="experiment tracker; trackio is local, needs no account")
    add("--wandb_project", default="MiniMind-V", metavar="NAME", help="project name for the tracker")

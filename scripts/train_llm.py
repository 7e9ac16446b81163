"""Train the decoder on text alone: a language model, before it ever sees a picture.

    python -m dataset.scenes --form text --out_dir out/text        # scenes in words, and questions
    python -m scripts.train_llm --val_path out/text/val.jsonl \\
        --tokenizer_path out/tokenizer --hidden_size 256 --num_hidden_layers 4
    python -m scripts.train_llm --help

This step comes between the tokenizer and stage 1, which starts from the result with --from_weight llm. Rows are the
same conversations, one JSON per line; the model learns the answers. Rows with pictures work too; the pictures are
ignored. A model that can answer questions about a scene in words has little left to learn when a picture replaces the
words. Writes out/llm_{hidden}{_moe}.pth. The figure at the end is the perplexity per answer token in --val_path.
"""

if __spec__ is None:  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.train_llm instead of scripts/train_llm.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import math
from pathlib import Path

from common.cli import Parser, run_main
from trainer.flags import add_training_arguments, parse_training

STAGE = "llm"


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_training_arguments(
        parser,
        from_weight="none",
        data_path="./out/text/train.jsonl",
        max_seq_len=512,
    )
    return parse_training(parser, argv)


def check_paths(args) -> None:
    """Raises FileNotFoundError that says how to get data, before anything is loaded."""
    from dataset.remote import is_remote
    from dataset.sources import row_files

    for flag, paths in (("--data_path", args.data_path), ("--val_path", args.val_path or [])):
        for path in paths:
            if not is_remote(path) and not row_files(Path(path)):
                raise FileNotFoundError(
                    f"{flag} {path}: no such file. Expected JSONL or Parquet.\n"
                    "To draw scenes: python -m dataset.scenes --form text --out_dir out/text"
                )


def main(argv=None):
    args = parse_args(argv)
    # Imported here so that --help and errors in flags do not wait for PyTorch.
    from common import distributed
    from common.devices import check_compiler, make_deterministic, pick_device
    from model.build import build_model
    from model.weights import find_weights
    from trainer.loader import load_data
    from trainer.loop import train_epoch
    from trainer.optimizer import follow_width, optimizer_of
    from trainer.run import training

    check_paths(args)
    make_deterministic(args.seed)
    device = pick_device(args.device)
    if args.compile:
        check_compiler(device)
    distributed.start(device)

    # ---- model
    weights = find_weights(args.from_weight, args.out_dir, args.hidden_size, args.use_moe)
    model, tokenizer, origin = build_model(args, weights, sees=False, training=True)
    distributed.say(f"{origin.note}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f}M parameters")
    follow_width(args, model, STAGE)  # sets optimizer, learning rate and batch size, unless given
    model.to(device)
    optimizer = optimizer_of(model, args)

    # ---- data
    data = load_data(args, model, tokenizer, args.data_path, weights=args.data_weights)
    val_data = load_data(args, model, tokenizer, args.val_path) if args.val_path else None

    # ---- train; with --from_resume, from where the last run stopped
    with training(args, STAGE, origin, model, tokenizer, optimizer, data, val_data, device) as run:
        for epoch in run.epochs_left():
            train_epoch(run, epoch)  # also validates and saves
    if run.val_loss is not None:
        distributed.say(f"perplexity {math.exp(run.val_loss):.3f} per answer token of {', '.join(args.val_path)}")
    return run


if __name__ == "__main__":
    run_main(main)

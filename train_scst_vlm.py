"""Stage 3, optional, SCST: learn from the score of its own captions (Rennie et al. 2017, arXiv 1612.00563).

    python train_scst_vlm.py --data_path rows.jsonl --refs_path captions.json
    torchrun --nproc_per_node 2 train_scst_vlm.py              # two GPUs

Stages 1 and 2 teach the next word of a person's caption. Whether a whole caption fits its picture is another question,
which CIDEr answers: how much a caption agrees with those that people wrote (dataset/cider.py). For each row the model
samples several captions; those that score above the others of the same picture become likelier, the rest less likely.
This is what GRPO does for language models, with a score in place of a reward model.

References are the row's own answer and, for rows with one picture and one answer, all captions of the picture in the
same language: those in --refs_path, and those of the same record. Only the last answer of a row is sampled. What
learns: everything except the encoder. Writes out/scst_vlm_{hidden}{_moe}.pth.
"""

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

from common.cli import Parser, positive, run_main
from trainer.flags import add_training_arguments, parse_training

STAGE = "scst_vlm"


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_training_arguments(
        parser,
        trainable="all",
        from_weight="sft_vlm",
        data_path="./dataset/sft_data",
        max_seq_len=1536,
    )
    add = parser.group("what it learns, and how").add_argument
    add(
        "--refs_path", nargs="+", default=[], metavar="PATH", help="JSON: {picture: [captions]}, all of them references"
    )
    add("--samples", type=positive(int), default=5, metavar="K", help="answers per row, compared with each other")
    add("--temperature", type=positive(float), default=0.6, help="of the samples, in the loss too; higher: more varied")
    add("--max_new_tokens", type=positive(int), default=32, help="longer answers are cut off, and get no reward")
    args = parse_training(parser, argv)
    if args.samples < 2:
        parser.error("--samples 1: an answer is compared with the others to its row, so it takes at least 2")
    if args.temperature < 0.01:
        parser.error(f"--temperature {args.temperature}: must be 0.01 or more, so that the samples differ")
    for flag in ("compile", "gradient_checkpointing"):
        if getattr(args, flag):
            parser.error(f"--{flag} does not work here: each answer continues from the cache of its prompt")
    return args


def main(argv=None):
    args = parse_args(argv)
    # Imported here so that --help and errors in flags do not wait for PyTorch.
    from functools import partial

    from common import distributed
    from common.devices import make_deterministic, pick_device
    from dataset.references import check_references, read_references
    from dataset.streaming import Stream
    from inference.scoring import questions_of
    from model.build import build_model
    from model.weights import find_weights
    from trainer.feature_cache import cache_features
    from trainer.loader import load_data, val_images
    from trainer.loop import train_epoch
    from trainer.optimizer import choose_trainable, follow_width, optimizer_of
    from trainer.run import training
    from trainer.scst import Rewards, learn_rewarded

    make_deterministic(args.seed)
    device = pick_device(args.device)
    distributed.start(device)

    # ---- model: decoder and projector from stage 2, the encoder frozen
    weights = find_weights(args.from_weight, args.out_dir, args.hidden_size, args.use_moe)
    model, tokenizer, origin = build_model(args, weights, training=True)
    distributed.say(origin.note)
    choose_trainable(model, args.trainable)
    follow_width(args, model, STAGE)
    model.to(device)
    optimizer = optimizer_of(model, args)

    # ---- data, and the references that answers are compared with
    data = load_data(args, model, tokenizer, args.data_path, args.images_path, args.data_weights)
    if isinstance(data, Stream):
        raise ValueError("--data_path: rewards compare all rows, so they must be on disk, not streamed")
    captions = read_references(args.refs_path)
    check_references(captions, data)
    rewards = Rewards(questions_of(data, captions, each_row=True))
    data.lengths = rewards.lengths  # rows with equally long prompts share a batch: these need no padding
    val_data = None
    if args.val_path:
        val_data = load_data(args, model, tokenizer, args.val_path, val_images(args))
    cache_features(args, model, origin.encoder_sha256, device, data, val_data)  # with --cache_features

    # ---- train; with --from_resume, from where the last run stopped
    learn = partial(learn_rewarded, rewards=rewards, tokenizer=tokenizer)
    with training(args, STAGE, origin, model, tokenizer, optimizer, data, val_data, device) as run:
        run.progress.measures = "reward"
        for epoch in run.epochs_left():
            train_epoch(run, epoch, learn)
    return run


if __name__ == "__main__":
    run_main(main)

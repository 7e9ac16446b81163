"""Stage 2, SFT: learn to answer. The projector and the whole decoder learn from conversations about pictures.

    python train_sft_vlm.py                                        # the 26M recipe, from out/pretrain_vlm_512.pth
    python train_sft_vlm.py --data_path rows.jsonl --images_path pictures
    torchrun --nproc_per_node 2 train_sft_vlm.py                   # two GPUs

What learns: everything except the encoder. For a GPU with little memory, `--trainable attention` trains only the
projector and the q/k/v/o projections, with a fifth of the optimizer state. Writes out/sft_vlm_{hidden}{_moe}.pth.
"""

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

from common.cli import Parser, run_main
from trainer.flags import add_training_arguments, parse_training

STAGE = "sft_vlm"


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_training_arguments(
        parser,
        trainable="all",
        from_weight="pretrain_vlm",
        data_path="./dataset/sft_data",
        max_seq_len=1536,
    )
    return parse_training(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    # Imported here so that --help and errors in flags do not wait for PyTorch.
    from common import distributed
    from common.devices import check_compiler, make_deterministic, pick_device
    from model.build import build_model
    from model.weights import find_weights
    from trainer.feature_cache import cache_features
    from trainer.loader import load_data, val_images
    from trainer.loop import train_epoch
    from trainer.optimizer import choose_trainable, follow_width, optimizer_of
    from trainer.run import training

    make_deterministic(args.seed)
    device = pick_device(args.device)
    if args.compile:
        check_compiler(device)
    distributed.start(device)

    # ---- model: decoder and projector from stage 1, the encoder frozen
    weights = find_weights(args.from_weight, args.out_dir, args.hidden_size, args.use_moe)
    model, tokenizer, origin = build_model(args, weights, training=True)
    distributed.say(origin.note)
    choose_trainable(model, args.trainable)
    follow_width(args, model, STAGE)  # sets optimizer, learning rates and batch size, unless given
    model.to(device)
    optimizer = optimizer_of(model, args)

    # ---- data
    data = load_data(args, model, tokenizer, args.data_path, args.images_path, args.data_weights)
    val_data = None
    if args.val_path:
        val_data = load_data(args, model, tokenizer, args.val_path, val_images(args))
    cache_features(args, model, origin.encoder_sha256, device, data, val_data)  # with --cache_features

    # ---- train; with --from_resume, from where the last run stopped
    with training(args, STAGE, origin, model, tokenizer, optimizer, data, val_data, device) as run:
        for epoch in run.epochs_left():
            train_epoch(run, epoch)  # also validates and saves
    return run


if __name__ == "__main__":
    run_main(main)

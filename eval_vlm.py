"""Ask a trained model about pictures, or score it on rows with known answers.

    python eval_vlm.py --image photo.jpg --prompt "What is this?"
    python eval_vlm.py                                    # every picture in dataset/eval_images/
    python eval_vlm.py --data_path val.jsonl --images_path pictures

Weights are out/sft_vlm_512.pth, or the only one of out/sft_vlm_*.pth, unless --model_mode, --hidden_size, --use_moe or
--weights say otherwise; a Transformers folder, as the hubs have it, with --load 1 --weights FOLDER. Scores come as a
table and as JSON, each also with the pictures shuffled between rows, which shows whether the model looks.
"""

import argparse

from trainer.cli import HelpFormatter, add_model_arguments, positive, run_main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--load", type=int, choices=[0, 1], default=0, help="0: .pth weights in --out_dir, 1: a Transformers folder")
    add("--model_mode", type=int, choices=[0, 1, 2], default=1, help="0: pretrain_vlm, 1: sft_vlm, 2: sft_vlm_multi")
    add("--weights", metavar="W", help="file or Transformers folder; default of --load 1: ./MiniMind2-V")
    add("--image", nargs="+", metavar="FILE", help="pictures to ask about, all in one question")
    add("--prompt", help="the question; <image> says where a picture stands in it, else after it")
    add(
        "--use_multi", type=int, choices=[1, 2], default=1, help="2: --model_mode 2, all of --image_dir in one question"
    )
    add("--image_dir", metavar="DIR", help="pictures to ask about without --image; default dataset/eval_images")
    add("--temperature", type=positive(float), default=0.65, help="below 1: likelier words, above: more surprising")
    add("--top_p", type=positive(float), default=0.85, help="draw from the likeliest words that make up this share")
    add("--greedy", action="store_true", help="always the likeliest word")
    add(
        "--int8",
        action="store_true",
        help="weights of 8 bits, on a CPU: about twice as fast, answers may differ a little",
    )
    add("--max_new_tokens", type=positive(int), default=512, help="longest answer, in tokens")
    add("--data_path", nargs="+", metavar="PATH", help="score on these rows, JSONL or Parquet; answers are then greedy")
    add("--images_path", nargs="+", metavar="PATH", help="their pictures, folder or zip; default: beside the rows")
    add("--refs_path", nargs="+", default=[], metavar="JSON", help='further references, {"name.jpg": ["caption", ...]}')
    add("--no_loss", action="store_true", help="score answers alone, which takes a third less time")
    add("--max_seq_len", type=positive(int), default=1536, help="tokens per row, placeholders included")
    add("--on_bad_row", choices=["error", "skip"], default="error", help="what to do with rows that cannot be used")
    add("--batch_size", type=positive(int), default=16, help="rows at a time")
    add("--num_workers", type=int, default=2, help="processes that decode pictures; 0: this process does")
    add("--output", metavar="JSON", help="where the scores go; default: beside the weights")
    args = parser.parse_args(argv)
    if args.use_multi == 2:
        args.model_mode = 2
    if args.data_path and (args.image or args.prompt):
        parser.error("--data_path scores rows, --image and --prompt ask one question: give either")
    return args


def main(argv=None):
    args = parse_args(argv)
    # Only now, so that --help and a mistyped flag need not wait for PyTorch.
    from model.int8 import to_int8
    from trainer import asking
    from trainer.devices import pick_device

    device = pick_device(args.device)
    model, tokenizer, weights = asking.load(args)
    model.to(device)
    if args.int8:
        to_int8(model)
    if args.data_path:
        return asking.score_rows(model, tokenizer, args, weights, device)
    return asking.ask_about_pictures(model, tokenizer, args)


if __name__ == "__main__":
    run_main(main)

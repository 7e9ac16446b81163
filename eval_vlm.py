"""Ask a trained model about pictures, or score it on rows with known answers.

    python eval_vlm.py --image photo.jpg --prompt "What is this?"
    python eval_vlm.py --image photo.jpg --show_attention looked.png     # where it looked for each word
    python eval_vlm.py                                                  # every picture in dataset/eval_images/
    python eval_vlm.py --json --prompts_path questions.txt              # several questions, answers as JSON
    python eval_vlm.py --chat                                           # a conversation in the terminal
    python eval_vlm.py --captions captions.jsonl --image_dir pictures   # a large folder; resumes
    python eval_vlm.py --data_path val.jsonl --images_path pictures     # scores

By default it takes the newest sft_vlm_*.pth or scst_vlm_*.pth in out/ and its subfolders; --model_mode, --hidden_size,
--use_moe and --weights choose others. --weights FOLDER loads a Transformers folder, the format of the hubs. Without
--prompt it asks the most common question of the training, which the JSON of the weights names. Scores are printed as a
table and written as JSON. Each score is computed again with the pictures shuffled between rows, which shows whether the
model looks.
"""

import sys
from contextlib import nullcontext, redirect_stdout

from common.cli import Parser, fraction, not_negative, positive, run_main
from common.start import begin
from dataset.flags import add_urls_argument
from model.flags import add_model_arguments


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add, mode = parser.start.add_argument, parser.start.add_mutually_exclusive_group().add_argument
    add("--image", nargs="+", metavar="FILE", help="pictures to ask about, all in one question; also http(s)://...")
    prompt = "default: the most common question of the training; <image> marks the place of a picture"
    add("--prompt", metavar="TEXT", help=prompt)
    mode("--chat", action="store_true", help="chat in the terminal; /help lists the commands")
    rows = "score these rows, JSONL or Parquet; answers are not sampled, and neither are --captions"
    mode("--data_path", nargs="+", metavar="PATH", help=rows)
    captions = "write a line for each picture in --image_dir and its subfolders; skips pictures already in the file"
    mode("--captions", metavar="JSONL", help=captions)
    add("--greedy", action="store_true", help="always take the most likely word")
    add("--weights", metavar="W", help="file or Transformers folder; default: the newest that fits")

    add = parser.group("what is asked, and what comes back").add_argument
    add("--image_dir", metavar="DIR", help="pictures to ask about without --image; default dataset/eval_images")
    add("--prompts_path", metavar="FILE", help="text file of questions, one per line; asks them one by one")
    together = "2: --model_mode 2, with all pictures of --image_dir in one question"
    add("--use_multi", type=int, choices=[1, 2], default=1, help=together)
    lines = "print lines of JSON: picture (a list if several), prompt, answer, seconds, tokens; or picture, error"
    add("--json", action="store_true", help=lines)
    figure = "draw where on the picture the decoder looked for each word; further figures are FILE_2 and so on"
    add("--show_attention", metavar="FILE", help=figure)

    add = parser.group("how it answers").add_argument
    add("--temperature", type=positive(float), default=0.65, help="below 1 favours likely words, above 1 unlikely ones")
    add("--top_p", type=fraction, default=0.85, help="sample from the most likely words that make up this share")
    add("--max_new_tokens", type=positive(int), default=512, help="maximum length of an answer, in tokens")
    beams = "captions and scores: search with this many beams instead of greedily; takes about as many times as long"
    add("--num_beams", type=positive(int), default=1, metavar="N", help=beams)
    eight = "8-bit weights, on a CPU: 1.2 to 1.4 times as fast; answers may differ slightly"
    add("--int8", action="store_true", help=eight)

    add = parser.group("scores").add_argument
    pictures = "folder or zip of the pictures of --data_path; default: next to the rows"
    add("--images_path", nargs="+", metavar="PATH", help=pictures)
    add("--refs_path", nargs="+", default=[], metavar="JSON", help='further references, {"name.jpg": ["caption", ...]}')
    add_urls_argument(parser, "scores")
    add("--no_loss", action="store_true", help="score only the answers, which takes a third less time")
    add("--max_seq_len", type=positive(int), default=1536, help="largest row in tokens, placeholders included")
    add("--on_bad_row", choices=["error", "skip"], default="error", help="what to do with unusable rows")
    add("--batch_size", type=positive(int), default=16, help="rows, or pictures with --captions, per batch")
    add("--num_workers", type=not_negative, default=2, help="worker processes that decode pictures; 0: no workers")
    add("--output", metavar="JSON", help="file for the scores; default: next to the weights")

    add_model_arguments(parser)
    add = parser.group("the model").add_argument
    add("--load", type=int, choices=[0, 1], default=0, help="0: .pth weights in --out_dir, 1: a Transformers folder")
    stages = "0: pretrain_vlm, 1: sft_vlm, 2: sft_vlm_multi, 3: scst_vlm; default: 1 or 3, the newest"
    add("--model_mode", type=int, choices=[0, 1, 2, 3], help=stages)
    args = parser.parse_args(argv)
    if args.use_multi == 2:
        args.model_mode = 2
    alone = {  # flags that do not go together
        "data_path": ["image", "image_dir", "prompts_path", "json", "show_attention"],
        "captions": ["image", "json", "show_attention"],
        "chat": ["prompt", "prompts_path", "image_dir", "json", "show_attention"],
        "prompt": ["prompts_path"],
        "image": ["image_dir"],
    }
    for flag, others in alone.items():
        for other in others:
            if getattr(args, flag) and getattr(args, other):
                parser.error(f"--{flag} cannot be combined with --{other}: give one of them")
    if args.use_multi == 2 and args.captions:
        parser.error("--captions asks about each picture alone: give --model_mode 2 instead of --use_multi 2")
    if args.num_beams > 1 and not (args.data_path or args.captions):
        parser.error("--num_beams is for --data_path and --captions: leave it out")
    for flag in ("images_path", "refs_path", "no_loss", "output", "allow_urls"):
        if getattr(args, flag) and not args.data_path:
            parser.error(f"--{flag} is only for scores: give rows with --data_path, or leave it out")
    return args


def main(argv=None):
    args = parse_args(argv)
    # Imported here so that --help and errors in flags do not wait for PyTorch.
    from common.devices import bfloat16_would_help, pick_device, pick_dtype
    from inference.asking import ask_about_pictures
    from inference.models import load_model
    from model.int8 import to_int8
    from model.packed import pack

    device = pick_device(args.device)
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        model, tokenizer, weights = load_model(args)
    model.to(device)
    if args.int8:
        to_int8(model)
    pack(model, pick_dtype(args.dtype, device))
    if (args.data_path or args.captions) and bfloat16_would_help(args.dtype, device, model.config.hidden_size):
        print("this CPU supports bfloat16: with --dtype bfloat16 all answers together take about half the time")
    if args.data_path:
        from inference.scoring import score_rows

        return score_rows(model, tokenizer, args, weights, device)
    if args.captions:
        from inference.captions import write_captions

        return write_captions(model, tokenizer, args, weights, device)
    if args.chat:
        from inference.terminal import chat

        return chat(model, tokenizer, args, weights)
    return ask_about_pictures(model, tokenizer, args, weights)


if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback
    run_main(main)

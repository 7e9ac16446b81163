"""Chat with a trained model about pictures, in a browser.

    python web_demo_vlm.py                                # then open the address that it prints
    python web_demo_vlm.py --load 1 --weights FOLDER      # an exported Transformers folder
    python web_demo_vlm.py --host 0.0.0.0 --auth ann:secret

The page offers all weights and exported folders in --out_dir and its subfolders, including the quickstart's. Each .pth
uses the tokenizer and the encoder that its JSON names.

The server keeps nothing between visitors except the loaded models. A conversation lives in its browser tab, its
pictures in a folder that is deleted when this process ends and that no other user can read.
"""

import os
import re
import socket
import tempfile
from contextlib import suppress
from ipaddress import ip_address

from common.cli import Parser, fraction, positive, run_main
from common.start import begin, unwind
from model.flags import add_model_arguments

AUTH = "MINIMIND_AUTH"  # environment variable in place of --auth


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--weights", metavar="W", help="file or Transformers folder to start with; default: the newest that fits")
    add(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on; 0.0.0.0: every address of this machine",
    )
    add("--port", type=positive(int), help="default: the first free port from 7860")
    who = f"logins; default: the variable {AUTH}, which other users cannot see, else no login"
    add("--auth", nargs="+", metavar="NAME:PASSWORD", help=who)

    add = parser.group("how it answers").add_argument
    spread = "initial setting of the page; 0: the most likely word, up to 2: more varied"
    add("--temperature", type=float, default=0.65, help=spread)
    likely = "initial setting of the page; sample from the most likely words that make up this share"
    add("--top_p", type=fraction, default=0.85, help=likely)

    add = parser.group("limits for visitors").add_argument
    add("--max_upload", type=positive(float), default=10, metavar="MB", help="largest file")
    add("--max_pixels", type=positive(float), default=50, metavar="MP", help="largest picture, in million pixels")
    add("--max_pictures", type=positive(int), default=4, help="pictures per question")
    add("--max_text", type=positive(int), default=2000, help="characters per question")
    add("--max_new_tokens", type=positive(int), default=512, help="maximum length of an answer, in tokens")
    add("--max_seq_len", type=positive(int), default=1536, help="tokens of a conversation that the model reads")
    add("--max_queue", type=positive(int), default=20, help="questions that may wait for their turn")
    add("--max_seconds", type=positive(float), default=120, metavar="SECONDS", help="longest time per answer")

    add_model_arguments(parser)
    add = parser.group("the model").add_argument
    add("--load", type=int, choices=[0, 1], default=0, help="start with 0: .pth weights, 1: a Transformers folder")
    stages = "0: pretrain_vlm, 1: sft_vlm, 2: sft_vlm_multi, 3: scst_vlm; default: 1 or 3, the newest"
    add("--model_mode", type=int, choices=[0, 1, 2, 3], help=stages)
    add("--use_multi", type=int, choices=[1, 2], default=1, help="2: --model_mode 2; all models take several pictures")
    args = parser.parse_args(argv)
    if args.use_multi == 2:
        args.model_mode = 2
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature {args.temperature}: expected 0 to 2")
    flag, args.auth = ("--auth" if args.auth else AUTH), args.auth or os.environ.get(AUTH, "").split() or None
    if bad := [pair for pair in args.auth or [] if not re.fullmatch("[^:]+:.+", pair)]:
        parser.error(f"{flag} {bad[0].partition(':')[0]}...: expected NAME:PASSWORD")
    return args


def is_local(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def check_address(host: str, port: int | None) -> None:
    try:
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        flags = f"--host {host}" + (f" --port {port}" if port else "")
        raise OSError(f"{flags}: cannot listen there ({error}). Choose another, or leave the flag out") from None


def main(argv=None):
    args = parse_args(argv)
    check_address(args.host, args.port)
    # Imported here so that --help and errors in flags do not wait for PyTorch and Gradio.
    from inference.page import serve

    unwind()  # so that the visitors' pictures are deleted when the process ends
    with tempfile.TemporaryDirectory(prefix="minimind-v-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        with serve(args) as (page, address):
            if not is_local(args.host) and not args.auth:
                print(
                    f"warning: --host {args.host} lets anybody in who can reach it; --auth NAME:PASSWORD adds a login"
                )
            print(f"open {address} in a browser; press Ctrl-C to stop", flush=True)
            page.block_thread()


if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback
    run_main(main)

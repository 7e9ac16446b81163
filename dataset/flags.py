"""The flags of how rows are read, which scripts share. Without PyTorch."""


def add_urls_argument(parser, group: str = "the data") -> None:
    urls = "fetch pictures that rows name by http(s)://..., once: they are kept in the cache of `datasets`"
    parser.group(group).add_argument("--allow_urls", action="store_true", help=urls)


def add_prompt_argument(parser) -> None:
    prompt = "what is asked about pictures that have captions alone; default: a few, in the caption's language"
    parser.group("the data").add_argument("--prompt", nargs="+", metavar="QUESTION", help=prompt)


def add_captions_arguments(parser) -> None:
    """Which pictures and captions `dataset.split` reads."""
    add = parser.start.add_argument
    add("--data_path", nargs="+", required=True, metavar="PATH", help="rows of any shape: pictures with captions")
    add("--images_path", metavar="PATH", help="folder or zip of the pictures; default: beside the rows")
    add("--val_path", nargs="+", default=[], metavar="PATH", help="held-out rows; default: a tenth of the pictures")
    more = 'further captions of the pictures of --val_path, {"name.jpg": ["caption", ...]}'
    add("--refs_path", nargs="+", default=[], metavar="JSON", help=more)
    add_prompt_argument(parser)
    add_urls_argument(parser)

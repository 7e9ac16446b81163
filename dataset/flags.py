"""Flags for reading rows, shared by several scripts. Does not import PyTorch."""


def add_urls_argument(parser, group: str = "the data") -> None:
    urls = "download pictures that rows name by http(s)://... (once, into the cache of `datasets`)"
    parser.group(group).add_argument("--allow_urls", action="store_true", help=urls)


def add_prompt_argument(parser) -> None:
    prompt = "questions to ask about pictures that only have captions; default: a few in the caption's language"
    parser.group("the data").add_argument("--prompt", nargs="+", metavar="QUESTION", help=prompt)


def add_captions_arguments(parser) -> None:
    """Adds the flags that say which pictures and captions `dataset.split` reads."""
    add = parser.start.add_argument
    add("--data_path", nargs="+", required=True, metavar="PATH", help="rows of any shape: pictures with captions")
    add("--images_path", metavar="PATH", help="folder or zip of the pictures; default: next to the rows")
    add("--val_path", nargs="+", default=[], metavar="PATH", help="held-out rows; default: a tenth of the pictures")
    more = 'more captions of the pictures in --val_path, {"name.jpg": ["caption", ...]}'
    add("--refs_path", nargs="+", default=[], metavar="JSON", help=more)
    add_prompt_argument(parser)
    add_urls_argument(parser)

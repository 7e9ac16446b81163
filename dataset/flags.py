"""The flags of how rows are read, which scripts share. Without PyTorch."""


def add_urls_argument(parser, group: str = "the data") -> None:
    urls = "fetch pictures that rows name by http(s)://..., once: they are kept in the cache of `datasets`"
    parser.group(group).add_argument("--allow_urls", action="store_true", help=urls)


def add_prompt_argument(parser) -> None:
    prompt = "what is asked about pictures that have captions alone; default: a few, in the caption's language"
    parser.group("the data").add_argument("--prompt", nargs="+", metavar="QUESTION", help=prompt)

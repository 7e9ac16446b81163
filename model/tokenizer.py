"""The tokenizer of a folder, or why it is none for us. Shipped with exported folders."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .files import impostor, read_json


def thinks(tokenizer) -> bool:
    """Is it of MiniMind-3, whose answers begin with a thought?"""
    return tokenizer.backend_tokenizer.token_to_id("<think>") is not None


def load_tokenizer(path, placeholders: str = "@" * 196):
    """The tokenizer of a folder, checked against what the model relies on.

    Raises FileNotFoundError without tokenizer.json, ValueError when the chat tokens are missing or the placeholders
    of a picture would not always come out as single tokens, all the same.
    """
    path = Path(path)
    if not (path / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"--tokenizer_path {path}: no tokenizer.json there.\n"
            "Name the weights' own folder; for the public one: python -m scripts.download --what llm"
        )
    try:  # AutoTokenizer would ask to run the code of an auto_map
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # its parser knows only plain exceptions
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (path / name).is_file():
                read_json(path / name)
        what = impostor(path / "tokenizer.json") or f"cannot be read: {str(error).splitlines()[0]}"
        raise ValueError(f"{path / 'tokenizer.json'} {what}") from None
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"{path / 'tokenizer.json'} has no {token} token, which marks the turns of a chat")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no pad_token; name one in tokenizer_config.json")
    ids = tokenizer(placeholders, add_special_tokens=False)["input_ids"]
    sign = re.match(r"(.+?)\1*$", placeholders)[1]  # of one patch
    P = len(placeholders) // len(sign)
    merged = [token for token in tokenizer.get_vocab() if sign in token and token != sign]
    if merged or len(ids) != P or len(set(ids)) > 1:
        why = f"as it merges {sign!r} ({merged[:3]})" if merged or len(sign) == 1 else f"as it has no {sign}"
        raise ValueError(
            f"{path / 'tokenizer.json'}: the {P} placeholders of a picture are {len(ids)} tokens, "
            f"{why}.\nName the --tokenizer_path of the weights"
        )
    return tokenizer

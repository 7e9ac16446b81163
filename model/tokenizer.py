"""Loads and checks the tokenizer of a folder. Copied into exported folders."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .files import impostor, read_json


def thinks(tokenizer) -> bool:
    """Whether a tokenizer belongs to MiniMind-3, whose answers begin with a thought."""
    return tokenizer.backend_tokenizer.token_to_id("<think>") is not None


def load_tokenizer(path, placeholders: str = "@" * 196):
    """The tokenizer of a folder, checked against the requirements of the model.

    placeholders: the text of one picture. Raises FileNotFoundError without tokenizer.json, ValueError if chat tokens
    are missing or the placeholders of a picture would not always become single, equal tokens.
    """
    path = Path(path)
    if not (path / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"--tokenizer_path {path}: no tokenizer.json there.\n"
            "Pass the folder that belongs to the weights; for the public one: python -m scripts.download --what llm"
        )
    try:  # AutoTokenizer would ask for permission to run code of an auto_map
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # its parser raises plain Exceptions
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (path / name).is_file():
                read_json(path / name)
        what = impostor(path / "tokenizer.json") or f"cannot be read: {str(error).splitlines()[0]}"
        raise ValueError(f"{path / 'tokenizer.json'} {what}") from None
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"{path / 'tokenizer.json'} has no {token} token, which marks the turns of a chat")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no pad_token; set one in tokenizer_config.json")
    ids = tokenizer(placeholders, add_special_tokens=False)["input_ids"]
    sign = re.match(r"(.+?)\1*$", placeholders)[1]  # of one patch
    P = len(placeholders) // len(sign)
    merged = [token for token in tokenizer.get_vocab() if sign in token and token != sign]
    if merged or len(ids) != P or len(set(ids)) > 1:
        why = f"because it merges {sign!r} ({merged[:3]})" if merged or len(sign) == 1 else f"because it has no {sign}"
        raise ValueError(
            f"{path / 'tokenizer.json'}: the {P} placeholders of a picture become {len(ids)} tokens, "
            f"{why}.\nPass the --tokenizer_path of the weights"
        )
    return tokenizer

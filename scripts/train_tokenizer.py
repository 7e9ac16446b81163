"""Train a tokenizer on the text of your own conversations, for a model trained from scratch.

    python -m scripts.train_tokenizer --data_path rows.jsonl --out_dir out/words

This step comes before all others, since all weights depend on the token ids. Weights only work with the tokenizer that
they were trained with. To continue from existing weights, keep their tokenizer and do not train a new one.

It uses byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, on bytes as in GPT-2). BPE starts from
the 256 bytes, so no text is ever unknown, and adds the most frequent pair of neighbours as a new token until the
vocabulary is full. The ids: 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>, 3 to 258 the bytes (`!` = 3, `@` = 34),
then the merges.
"""

if __spec__ is None:  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.train_tokenizer instead of scripts/train_tokenizer.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import json
import re
import shlex
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.cli import Parser, run_main
from common.files import write_text
from dataset.flags import add_prompt_argument
from model.processing import DEFAULT_SYSTEM, IMAGE_TAG, load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
CHINESE = "\u4e00-\u9fff"  # as a range in a regular expression
SMALLEST = len(SPECIAL) + 256  # a vocabulary without a single merge
# Gives the text of `model.processing.encode_chat`: after a user turn the answer begins, also without a prompt for it.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"  # the text to learn is inside "generation", as TRL expects
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{% endfor %}"
)

# ---------------------------------------------------------------------------- reading


def read_texts(paths, prompts=()) -> list[str]:
    """Returns the texts of all conversations, see `texts_of`. Skips rows that training cannot use either."""
    # Imported here so that everything else works with any version of Transformers.
    from dataset.shapes import ReadOptions
    from dataset.sources import read_rows
    from dataset.values import BadRow

    texts, unusable = [], 0
    for _, row in read_rows(paths, options=ReadOptions(prompts=tuple(prompts or ()))):
        if isinstance(row, BadRow):
            unusable += 1
        else:
            texts += texts_of(row.conversations)
    if unusable:
        print(f"skipped {unusable:,} rows that training cannot use either")
    return texts


def texts_of(conversations: list[dict]) -> list[str]:
    """Returns what the model reads between the special tokens: role, newline and content of every turn."""
    system = [f"system\n{DEFAULT_SYSTEM}"] if conversations[0]["role"] != "system" else []
    return system + [f"{turn['role']}\n{turn['content'].replace(IMAGE_TAG, '')}" for turn in conversations]


# ---------------------------------------------------------------------------- training


def train(texts, vocab_size: int, split_chinese: bool = False) -> Tokenizer:
    """Trains a tokenizer on these texts, with `vocab_size` entries or fewer if the texts have no more.

    split_chinese: no token contains more than one Chinese character.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once says nothing about the next text
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, sorted by the trainer: `!` is the first
        show_progress=False,
    )
    # Characters that the trainer never sees cannot become part of a merge. `@`: a picture is a run of them, and each
    # must be one token, whatever is next to it. Newline: `assistant\n` must end at a token boundary, whatever the
    # answer begins with. Then a chat gives the same ids turn by turn and all at once through the chat template.
    # Chinese has no spaces, so merges cross words: from 红色的星星 and 蓝色的爱心 the first merge is 色的. In a large
    # text that is harmless. In a text of few words in all combinations, a word gets different tokens next to each
    # neighbour, and a model does not recognize 星星 in 色的星星.
    pattern = f"[{CHINESE}]|[^@\n{CHINESE}]+" if split_chinese else "[^@\n]+"
    pieces = (piece for text in texts for piece in re.findall(pattern, text))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json; neither file is ever incomplete."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that Transformers 4 and 5 both know
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 32768,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,  # else decoding removes the space before a comma
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check(folder: Path, texts) -> None:
    """Loads the saved tokenizer as training does, checks what the model relies on, and prints characters per token."""
    tokenizer = load_tokenizer(folder)
    expected = [*SPECIAL, "!", "@"]
    ids = tokenizer.convert_tokens_to_ids(expected)
    assert ids == [0, 1, 2, 3, 34], dict(zip(expected, ids))
    assert [token for token in tokenizer.get_vocab() if "@" in token] == ["@"]
    answers = [text.removeprefix("assistant\n") for text in texts if text.startswith("assistant\n")]
    answers = [text for text in answers if text]
    english = [text for text in answers if text.isascii()]
    chinese = [text for text in answers if re.search(f"[{CHINESE}]", text)]
    for language, texts in {"English": english, "Chinese": chinese}.items():
        if not texts:
            continue
        sample = texts[:: len(texts) // 2000 + 1]  # evenly spread over all files
        ids = tokenizer(sample, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.batch_decode(ids) == sample
        rate = sum(map(len, sample)) / sum(map(len, ids))
        print(f"{language}: {rate:.2f} characters/token in {len(sample):,} answers of the training text")
    print(f"{len(tokenizer):,} tokens in {folder}")


# ---------------------------------------------------------------------------- the run


def main(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--data_path", nargs="+", required=True, metavar="PATH", help="rows of any shape, with the text to learn from")
    add("--out_dir", type=Path, required=True, metavar="DIR", help="folder for the tokenizer, created if needed")
    size = f"entries in the vocabulary, at least {SMALLEST}; fewer if the text has no more"
    add("--vocab_size", type=int, default=6400, help=size)
    why = "at most one Chinese character per token, for small data sets"
    add("--split_chinese", action="store_true", help=why)
    add_prompt_argument(parser)
    args = parser.parse_args(argv)
    if args.vocab_size < SMALLEST:
        parts = f"{len(SPECIAL)} special tokens and 256 bytes"
        raise ValueError(f"--vocab_size {args.vocab_size}: must be at least {SMALLEST}, for {parts}")
    if (args.out_dir / "tokenizer.json").exists():  # weights may depend on it
        raise ValueError(f"--out_dir {args.out_dir} contains a tokenizer already: choose another folder, or remove it")
    texts = read_texts(args.data_path, args.prompt)
    print(f"{len(texts):,} turns, {sum(map(len, texts)):,} characters")
    tokenizer = train(texts, args.vocab_size, args.split_chinese)
    reached = tokenizer.get_vocab_size()
    if reached < args.vocab_size:
        print(f"--vocab_size {args.vocab_size}: the text is enough for {reached} tokens only")
    save(tokenizer, args.out_dir)
    check(args.out_dir, texts)
    paths = shlex.join(args.data_path)
    print(f"Next: python -m scripts.train_llm --data_path {paths} --tokenizer_path {args.out_dir}")


if __name__ == "__main__":
    run_main(main)

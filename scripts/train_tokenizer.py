"""Train a tokenizer on the text of your own conversations, for a model that starts from nothing.

    python -m scripts.train_tokenizer --data_path rows.jsonl --out_dir out/words

Comes before everything else: language model, projector and weights all speak in its ids. Weights belong to the
tokenizer they were trained with, so to go on from existing weights, keep theirs and do not train a new one.

Byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, on bytes as in GPT-2): it starts from the 256
bytes, so no text is ever unknown, and adds the most frequent pair of neighbours as a new token until the vocabulary is
full. The ids: 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>, 3 to 258 the bytes (`!` = 3, `@` = 34), then the merges.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.train_tokenizer instead of scripts/train_tokenizer.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

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
# The text of `model.processing.encode_chat`: a user turn opens the answer, whether or not a prompt was asked for.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"  # what a model is to learn stands between "generation", as TRL expects
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{% endfor %}"
)

# ---------------------------------------------------------------------------- reading


def read_texts(paths, prompts=()) -> list[str]:
    """The texts of all conversations, see `texts_of`, but those that training does not take either."""
    # Only here, so that all else works beside any Transformers.
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
        print(f"{unusable:,} rows left out, which training does not take either")
    return texts


def texts_of(conversations: list[dict]) -> list[str]:
    """What the model will read between the special tokens: role, newline and content of every turn."""
    system = [f"system\n{DEFAULT_SYSTEM}"] if conversations[0]["role"] != "system" else []
    return system + [f"{turn['role']}\n{turn['content'].replace(IMAGE_TAG, '')}" for turn in conversations]


# ---------------------------------------------------------------------------- training


def train(texts, vocab_size: int, split_chinese: bool = False) -> Tokenizer:
    """The tokenizer of these texts, with `vocab_size` entries, or as many as there are if that is fewer.

    split_chinese: no token holds more than one Chinese character.
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
    # What the trainer never sees cannot become part of a merge. `@`: a picture is a run of them, each one token,
    # whatever stands next to it. Newline: `assistant\n` ends at a token boundary whatever the answer begins with, so
    # that a chat encoded turn by turn, or all at once through the chat template, gives the same ids.
    # Chinese has no spaces, so merges cross words: of 红色的星星 and 蓝色的爱心, 色的 comes first. In much text that
    # is harmless. In a few words that combine in all ways, a word gets another token beside each neighbour, and no
    # model finds 星星 in 色的星星 again.
    pattern = f"[{CHINESE}]|[^@\n{CHINESE}]+" if split_chinese else "[^@\n]+"
    pieces = (piece for text in texts for piece in re.findall(pattern, text))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, each beside its place first, so that none is ever half there."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that Transformers 4 and 5 both know
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 32768,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,  # or decoding eats the space before a comma
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check(folder: Path, texts) -> None:
    """Loads what was saved as training will, checks what the model relies on, and prints characters per token."""
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
        sample = texts[:: len(texts) // 2000 + 1]  # evenly over all files
        ids = tokenizer(sample, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.batch_decode(ids) == sample
        rate = sum(map(len, sample)) / sum(map(len, ids))
        print(f"{language}: {rate:.2f} characters/token in {len(sample):,} answers of the training text")
    print(f"{len(tokenizer):,} tokens in {folder}")


# ---------------------------------------------------------------------------- the run


def main(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--data_path", nargs="+", required=True, metavar="PATH", help="rows of any shape, whose text it learns from")
    add("--out_dir", type=Path, required=True, metavar="DIR", help="folder for it, made if needed")
    size = f"entries in the vocabulary, {SMALLEST} at least; fewer where the text has no more"
    add("--vocab_size", type=int, default=6400, help=size)
    why = "one token per Chinese character at most, for little text"
    add("--split_chinese", action="store_true", help=why)
    add_prompt_argument(parser)
    args = parser.parse_args(argv)
    if args.vocab_size < SMALLEST:
        parts = f"{len(SPECIAL)} special tokens and 256 bytes"
        raise ValueError(f"--vocab_size {args.vocab_size}: {SMALLEST} at least, {parts}")
    if (args.out_dir / "tokenizer.json").exists():  # weights may depend on it, and do not know which it was
        raise ValueError(f"--out_dir {args.out_dir} holds a tokenizer already: choose another folder, or remove it")
    texts = read_texts(args.data_path, args.prompt)
    print(f"{len(texts):,} turns, {sum(map(len, texts)):,} characters")
    tokenizer = train(texts, args.vocab_size, args.split_chinese)
    reached = tokenizer.get_vocab_size()
    if reached < args.vocab_size:
        print(f"--vocab_size {args.vocab_size}: the text is enough for {reached} tokens, which it gets")
    save(tokenizer, args.out_dir)
    check(args.out_dir, texts)
    paths = shlex.join(args.data_path)
    print(f"Next: python -m scripts.train_llm --data_path {paths} --tokenizer_path {args.out_dir}")


if __name__ == "__main__":
    run_main(main)

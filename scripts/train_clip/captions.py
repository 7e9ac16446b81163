"""The data of `scripts.train_clip`: captions with their pictures, read once."""

import math
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import torch

from dataset.pictures import is_url, use_picture
from dataset.rows import Row, inline_place
from dataset.shapes import DEFAULT, ReadOptions
from dataset.sources import Source, read_rows
from dataset.values import BadRow
from model.processing import ImageProcessor

# Transformers pools a caption at its first `eos_token_id`, but at the *largest* id if that is 2, for compatibility with
# an old bug. Our <|im_end|> is 2, so captions end in <|endoftext|> instead. It also pads: the text tower is causal, so
# the first one has seen the whole caption and none of the padding.
END_OF_CAPTION = 0


def read_captions(
    paths, images_path, flag: str, options: ReadOptions = DEFAULT
) -> tuple[dict[str, list[str]], list[tuple[Source, str]]]:
    """Reads rows. Returns {picture: its captions}, and for each picture its source and its name there.

    A caption is what the assistant says in a row with exactly one picture. Rows with the same picture share an entry.
    Raises ValueError if there are no captions or no pictures.
    """
    captions, places, skipped = {}, {}, 0
    for source, row in read_rows(paths, images_path, flag, options):
        turns = row.conversations if isinstance(row, Row) and len(row.images) == 1 else []
        caption = " ".join(turn["content"] for turn in turns if turn["role"] == "assistant").strip()
        if not caption:
            skipped += 1
            continue
        (name,) = row.images
        if source.pictures is None and not inline_place(name) and not is_url(name):
            raise ValueError(f"--images_path is needed: there are no pictures next to {source.path}")
        picture = source.identity(name)
        captions.setdefault(picture, []).append(caption)
        places.setdefault(picture, (source, name))
    if not captions:
        raise ValueError(f"{flag}: none of the {skipped} rows has one picture and an answer")
    total = sum(map(len, captions.values()))
    print(f"{flag}: {total:,} captions; skipped {skipped:,} rows without exactly one picture and an answer")
    return captions, list(places.values())


class CaptionPictures:
    """Pictures by number as uint8 (B, 3, S, S), decoded once if all of them fit into `cache_gb`, else on every use."""

    def __init__(self, places: list, processor: ImageProcessor, cache_gb: float):
        """places: for each picture its source, see `dataset.sources`, and its name there. Raises ValueError or
        FileNotFoundError if pictures are missing."""
        self.places, self.processor, self.cache = places, processor, None
        missing = [(source, name) for source, name in places if not source.has(name)]
        if missing:
            source, name = missing[0]
            gone = f"{len(missing)} of {len(places)} pictures are missing, first {name}"
            if is_url(name):
                raise ValueError(f"{gone}: --allow_urls fetches pictures from the web")
            raise FileNotFoundError(f"--images_path {source.pictures_path}: {gone}")
        gigabytes = len(places) * 3 * math.prod(processor.crop_size) / 1e9
        fits = gigabytes <= cache_gb
        kept = "kept in memory" if fits else f"decoded on every use, above --cache_gb {cache_gb:g}"
        print(f"{len(places):,} pictures, {gigabytes:.2f} GB as uint8: {kept}")
        if fits:
            cache = torch.empty(len(places), 3, *processor.crop_size, dtype=torch.uint8)
            with ThreadPoolExecutor() as pool:  # Pillow releases Python's lock while it decodes
                for place, picture in zip(cache, pool.map(self.decode, range(len(places)))):
                    place.copy_(picture)
            self.cache = cache

    def __len__(self) -> int:
        return len(self.places)

    def decode(self, index: int) -> torch.Tensor:
        def resized(content):
            with self.processor.open(BytesIO(content)) as image:
                return self.processor.resize(image)

        source, name = self.places[index]
        try:
            return use_picture(source, name, resized)
        except BadRow as error:
            flag = "--data_path" if inline_place(name) or is_url(name) else "--images_path"
            raise ValueError(f"{flag}: {error}") from None

    def __getitem__(self, indices) -> torch.Tensor:
        if self.cache is not None:
            return self.cache[indices]
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self.decode, indices.tolist())))


def encode_captions(tokenizer, captions: list[str], max_text_len: int) -> torch.Tensor:
    """Returns int64 (len(captions), T): tokens, cut to leave room for the end token, which also pads."""
    encoded = tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = torch.full((len(captions), max_text_len), END_OF_CAPTION)
    for row, tokens in zip(ids, encoded):
        tokens = tokens[: max_text_len - 1]
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return ids


def load_split(args, paths, flag, tokenizer, processor):
    """Returns the pictures and their captions: the distinct texts int64 (M, T), and the numbers of the texts of each
    picture int64 (N, n), padded with M.
    """
    captions, places = read_captions(paths, args.images_path, flag, ReadOptions(allow_urls=args.allow_urls))
    pictures = CaptionPictures(places, processor, args.cache_gb)
    ids = encode_captions(tokenizer, [text for group in captions.values() for text in group], args.max_text_len)
    texts, numbers = ids.unique(dim=0, return_inverse=True)
    numbers = numbers.split([len(group) for group in captions.values()])
    return pictures, (texts, torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=len(texts)))


def draw_captions(theirs: torch.Tensor, total: int, each: int) -> torch.Tensor:
    """Picks up to `each` captions of each picture at random, none of a picture twice: int64 (M,), picture by picture.

    theirs: int64 (B, n), the numbers of all captions of these pictures, padded with `total`.
    """
    chance = (theirs < total).float().clamp(min=1e-30)  # padding comes last, and is dropped below
    drawn = theirs.gather(1, chance.multinomial(min(each, theirs.shape[1]))).flatten()
    return drawn[drawn < total]


def drop_tokens(ids: torch.Tensor, share: float) -> torch.Tensor:
    """Drops a share of the tokens of each caption at random, but never all: the others move up, the end fills the rest.

    A caption encoder that always reads the same few captions soon knows them by their rare words. ids: int64 (M, T).
    """
    words = ids != END_OF_CAPTION
    drop = words & (torch.rand(ids.shape) < share)
    drop &= (words & ~drop).any(dim=1, keepdim=True)
    order = drop.int().argsort(dim=1, stable=True)
    return ids.masked_fill(drop, END_OF_CAPTION).gather(1, order)

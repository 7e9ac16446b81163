"""From a question and its pictures to an answer, one at a time or in batches.

Reading path, 10 of 10; the last
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from common.devices import autocast, pick_dtype
from model.cache import growing_cache
from model.generations import without_thoughts
from model.processing import IMAGE_TAG, encode_chat


@torch.no_grad()
def generate(model, tokenizer, conversations: list[dict], images: list, args, streamer=None, stopping=None):
    """Answers the last question of a conversation; its <image> tags stand for `images`, in order.

    images: PIL pictures, or tensors from `processor.resize`; stopping: list of StoppingCriteria. Returns the tokens of
    prompt and answer int64 (1, T), the index where the answer starts, and the pictures uint8 (N, 3, H, W) or None.
    """
    pieces = encode_chat(tokenizer, conversations, model.config.image_ids)
    ids = [token for piece, _, _ in pieces for token in piece]
    input_ids = torch.tensor([ids], device=model.device)
    # Pictures are resized as in training. The first forward pass encodes them; later ones read them from the KV cache.
    resized = [image if torch.is_tensor(image) else model.processor.resize(image) for image in images]
    pixels = torch.stack(resized).to(model.device) if images else None
    # The decoder samples token after token, until <|im_end|>. Logits are divided by the temperature: below 1 favours
    # likely tokens, above 1 unlikely ones. top_p leaves out the long tail of tokens beyond this share of probability.
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}  # top_k 0: no limit
    with autocast(model.device, pick_dtype(args.dtype, model.device)):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixels,
            past_key_values=growing_cache(),
            max_new_tokens=args.max_new_tokens,
            do_sample=not args.greedy,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,  # gets each token as it is generated
            stopping_criteria=stopping,
            **({} if args.greedy else sampling),
        )
    return out, len(ids), pixels


def ask(model, tokenizer, conversations: list[dict], images: list, args, streamer=None, stopping=None) -> str:
    """Returns the text of the answer; arguments as in `generate`."""
    out, start, _ = generate(model, tokenizer, conversations, images, args, streamer, stopping)
    return without_thoughts(tokenizer.decode(out[0, start:], skip_special_tokens=True))


def user_turn(prompt: str, pictures: int, first: bool = False, flag: str = "--prompt") -> str:
    """The user's turn with an <image> tag per picture; the same for eval_vlm.py, --chat, --captions and the web page.

    Missing tags are added where the training data had them. One picture: before the text if `first` (`pictures_first`),
    else after it, as in the public rows ("...\\n<image>"). Several: before it, as in the drawn scenes; the public rows
    have no fixed place. Raises ValueError if the text has tags, but not one per picture.
    """
    tags = prompt.count(IMAGE_TAG)
    if tags not in (0, pictures):
        raise ValueError(f"{flag} has {tags} {IMAGE_TAG}, but there are {pictures} pictures: give one each, or none")
    if tags or not pictures:
        return prompt
    return f"{IMAGE_TAG}\n" * pictures + prompt if first or pictures > 1 else f"{prompt}\n{IMAGE_TAG}"


def collate_prompts(examples: list[dict], pad_token_id: int) -> dict:
    """Pads prompts on the left, so that all answers of a batch start at the same position; "broken": {number: reason}.

    examples: {"number", "ids": list[int], "pictures": uint8 (N, 3, H, W) or None}, or {"number", "broken": reason}.
    """
    broken = {example["number"]: example["broken"] for example in examples if "broken" in example}
    examples = [example for example in examples if "broken" not in example]
    if not examples:
        return {"numbers": [], "broken": broken}
    rows = [torch.tensor(example["ids"]) for example in examples]
    pictures = [example["pictures"] for example in examples if example["pictures"] is not None]
    return {
        "numbers": [example["number"] for example in examples],
        "broken": broken,
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side="left"),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
        "pixel_values": torch.cat(pictures) if pictures else None,
    }


@torch.no_grad()
def answer_batches(model, tokenizer, batches, args, device, dtype):
    """Yields per batch answers {number: text}, greedy or from `args.num_beams`, and broken ones {number: reason}."""
    for batch in batches:
        texts = []
        if batch["numbers"]:
            pixels = batch["pixel_values"]
            with autocast(device, dtype):
                out = model.generate(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                    pixel_values=None if pixels is None else pixels.to(device),
                    past_key_values=growing_cache(),
                    max_new_tokens=args.max_new_tokens,
                    do_sample=False,
                    num_beams=args.num_beams,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        yield dict(zip(batch["numbers"], map(without_thoughts, texts))), batch["broken"]

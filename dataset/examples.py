"""A row → a training example: tokens, and a label for each token of an answer.

Reading path, 7 of 10; next: dataset/batches.py
"""

from dataset.rows import Row
from dataset.values import BadRow
from model.processing import IGNORE, IMAGE_TAG, encode_chat


def cut_to_length(pieces, max_length: int) -> tuple[list[int], list[int], int]:
    """Pieces of `encode_chat` → input_ids, labels (-100 outside answers), number of pictures. At most max_length ids.

    A conversation that is too long is cut: inside an answer if necessary (without `<|im_end|>`, so the model does not
    learn to stop there), but never inside a question, because its placeholders must stay complete.
    Raises BadRow if the first question does not fit.
    """
    ids, labels, pictures = [], [], 0
    for piece, is_answer, piece_pictures in pieces:  # question, answer, question, ...
        room = max_length - len(ids)
        if not is_answer and len(piece) > room:
            break
        ids += piece[:room]
        # Only answers have labels: the model reads questions and pictures, and learns answers. Labels are not shifted,
        # because the decoder itself scores position t against label t + 1.
        labels += piece[:room] if is_answer else [IGNORE] * len(piece)
        pictures += piece_pictures
        if len(piece) > room:
            break
    if all(label == IGNORE for label in labels):
        raise BadRow("long", f"the first question has {len(pieces[0][0])} tokens, --max_seq_len allows {max_length}")
    return ids, labels, pictures


def encode_row(row: Row, tokenizer, image_ids: list[int], max_length: int):
    """A row → input_ids, labels, names of its pictures, and the number of tokens in its answers. Raises BadRow.

    This number counts answers before they are cut: minus the number of labels, it is what max_length cut off.

    Without image_ids the pictures are left out, and only text remains.
    """
    conversations, images = row.conversations, row.images
    if not image_ids:
        conversations = [
            turn | {"content": turn["content"].replace(IMAGE_TAG, "").strip()}
            if turn["role"] == "user" and IMAGE_TAG in turn["content"]
            else turn
            for turn in conversations
        ]
        images = []
    # Each turn becomes tokens. Each <image> becomes a run of placeholders, which the model replaces by features.
    try:
        pieces = encode_chat(tokenizer, conversations, image_ids)
    except ValueError as error:
        raise BadRow("role", str(error)) from None
    ids, labels, pictures = cut_to_length(pieces, max_length)
    answers = sum(len(piece) for piece, is_answer, _ in pieces if is_answer)
    return ids, labels, images[:pictures], answers

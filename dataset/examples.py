"""A row → a training example: tokens, and a label for each token of an answer.

Reading path, 7 of 10; next: dataset/batches.py
"""

from dataset.rows import Row
from dataset.values import BadRow
from model.processing import IGNORE, IMAGE_TAG, encode_chat


def cut_to_length(pieces, max_length: int) -> tuple[list[int], list[int], int]:
    """Pieces of `encode_chat` → input_ids, labels (-100 where no answer), number of pictures; at most max_length.

    A conversation that is too long ends earlier: in the middle of an answer if need be (without `<|im_end|>`, so that
    nobody learns to stop there), never in the middle of a question, whose placeholders must stay whole.
    Raises BadRow if not even the first question fits.
    """
    ids, labels, pictures = [], [], 0
    for piece, is_answer, piece_pictures in pieces:  # question, answer, question, ...
        room = max_length - len(ids)
        if not is_answer and len(piece) > room:
            break
        ids += piece[:room]
        # Questions and pictures are read, answers are learned: they alone have labels. These are the same ids, as the
        # decoder itself scores position t against label t + 1.
        labels += piece[:room] if is_answer else [IGNORE] * len(piece)
        pictures += piece_pictures
        if len(piece) > room:
            break
    if all(label == IGNORE for label in labels):
        raise BadRow("long", f"the first question has {len(pieces[0][0])} tokens, --max_seq_len allows {max_length}")
    return ids, labels, pictures


def encode_row(row: Row, tokenizer, image_ids: list[int], max_length: int):
    """A row → input_ids, labels, names of its pictures, and how many tokens its answers have. Raises BadRow.

    The last counts the answers' tokens before they are cut: minus the labels, it is what max_length cost.

    Without image_ids the pictures are left out: what remains is text.
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
    # Each turn becomes tokens, and each <image> in it a run of placeholders, which the model overwrites with features.
    try:
        pieces = encode_chat(tokenizer, conversations, image_ids)
    except ValueError as error:
        raise BadRow("role", str(error)) from None
    ids, labels, pictures = cut_to_length(pieces, max_length)
    answers = sum(len(piece) for piece, is_answer, _ in pieces if is_answer)
    return ids, labels, images[:pictures], answers

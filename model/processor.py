"""The `AutoProcessor` of exported folders: messages and pictures → inputs of `MiniMindVLM.generate`.

For other programs, which do not use `encode_chat`: they apply a chat template and tokenize the text. Tokens and pixels
are the same. Shapes: B texts, N pictures of all texts, T tokens, P placeholders per picture.
"""

import re

from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image, make_flat_list_of_images

# All files that are needed: Transformers 4 copies only files that this one imports directly.
from .families import family_of as family_of
from .files import read_json as read_json
from .processing import IMAGE_TAG, ImageProcessor
from .rgb import to_rgb as to_rgb
from .tokenizer import load_tokenizer as load_tokenizer

# Chat templates insert it into text from users, so a <|im_end|> there does not become the token that ends the turn.
# This character for private use has no meaning in any text; it is removed before the text becomes tokens.
HIDE = "\ue000"


def opened(images):
    """Opens pictures, also in nested lists. A string is a path, a URL, or base64; other values are returned as is."""
    if isinstance(images, (list, tuple)):
        return [opened(image) for image in images]
    return load_image(images) if isinstance(images, str) else images


class MiniMindVProcessor(ProcessorMixin):
    """`processor.apply_chat_template(messages, ...)`, or `processor(text=..., images=...)` with a text from it."""

    attributes = ["tokenizer"]  # Transformers loads it; the rest is in processor_config.json
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, chat_template=None, placeholders="@" * 196, pixels=None):
        """placeholders: the text of a picture, P tokens. pixels: arguments of `ImageProcessor`."""
        super().__init__(tokenizer, chat_template=chat_template)
        self.placeholders, self.pixels = placeholders, pixels or {}
        self.image_processor = ImageProcessor(**self.pixels)

    def __call__(self, images=None, text=None, return_tensors="pt", padding_side=None, **kwargs) -> BatchFeature:
        """text: str or list of B, with IMAGE_TAG for each picture. images: see `opened`, in order, flat or one list per
        text.

        Returns input_ids and attention_mask, int64 (B, T), padded on padding_side (default: the tokenizer's), and
        pixel_values, float32 (N, 3, H, W), if there are pictures.
        """
        ids = [self.encode(one) for one in ([text] if isinstance(text, str) else text)]
        out = dict(self.tokenizer.pad({"input_ids": ids}, return_tensors=return_tensors, padding_side=padding_side))
        if images is not None:
            out |= self.image_processor(make_flat_list_of_images(opened(images)))
        return BatchFeature(out)

    def encode(self, text: str) -> list[int]:
        """Text → ids. Special tokens of the template stay special; everything else is plain text, including
        placeholders that people can type (see `encode_chat`)."""
        special = self.tokenizer.all_special_tokens
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        sign = re.match(r"(.+?)\1*$", self.placeholders)[1]
        typed = len(sign) == 1
        picture = [backend.token_to_id(sign)] * (len(self.placeholders) // len(sign))
        ids = []
        for piece in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if piece in special:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                parts = [part.replace(HIDE, "") for part in piece.split(IMAGE_TAG)]
                parts = [self.placeholders.join(parts)] if typed else parts
                for i, part in enumerate(parts):
                    ids += picture * (i > 0) + backend.encode(part, add_special_tokens=False).ids
        return ids

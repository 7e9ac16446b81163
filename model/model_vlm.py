"""The vision-language model: a frozen vision tower (CLIP by default), one linear layer, and the MiniMind decoder.

    picture ── CLIP ViT (frozen) ── P patch features ── VisionProj ── P vectors of width D ─┐
                                                                                            ▼ overwrite
    text ── "@"·P + "\\nWhat is this?" ── input_ids ── embed_tokens ── hidden states ── decoder ── logits

Shapes: B batch, T tokens, N pictures, P patches (= placeholders) per picture, H and W pixels, D hidden_size,
V the encoder's width, S spatial_merge_size.

Reading path, 5 of 10; next: model/processing.py
"""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers.utils import cached_file

# Relative, and complete: exported folders have no package `model`, and Transformers 4 finds only files named here.
from .attention import Attention as Attention
from .config import MiniMindConfig
from .defaults import DEFAULT_VISION_MODEL
from .encoders import count_tokens, load_encoder, measure
from .families import family_of
from .feed_forward import FeedForward as FeedForward
from .files import read_json as read_json
from .model_minimind import MiniMindForCausalLM, MiniMindOutput, as_cache
from .processing import ImageProcessor
from .rgb import to_rgb as to_rgb
from .tokenizer import load_tokenizer as load_tokenizer

ENCODER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


class VLMConfig(MiniMindConfig):
    """The decoder's configuration plus how a picture appears in the text: one token, repeated `len(image_ids)` times.

    image_special_token: the text of these tokens. projector, spatial_merge_size: see `VisionProj`.
    """

    model_type = "minimind-v"

    def __init__(
        self,
        image_special_token: str = "@" * 196,
        image_ids: list[int] | None = None,
        ve_hidden_size: int = 768,
        projector: str = "linear",
        spatial_merge_size: int = 1,
        **kwargs,
    ):
        # CLIP ViT-B/16 cuts 224 x 224 pixels into 16 x 16 patches: 14 * 14 = 196 patches, so a picture is 196 tokens.
        # Each "@" reserves the position of one patch; 34 is its id in the public tokenizer.
        self.image_special_token = image_special_token
        self.image_ids = [34] * 196 if image_ids is None else list(image_ids)
        self.ve_hidden_size = ve_hidden_size  # V
        if projector not in ("linear", "mlp"):
            raise ValueError(f"projector={projector!r} is not known; there are 'linear' and 'mlp'")
        self.projector, self.spatial_merge_size = projector, spatial_merge_size
        if len(set(self.image_ids)) != 1 or self.image_token * len(self.image_ids) != image_special_token:
            raise ValueError(
                f"image_ids must be one id, once per placeholder: got {len(self.image_ids)} ids of "
                f"{len(set(self.image_ids))} kinds for {len(image_special_token)} placeholders"
            )
        super().__init__(**kwargs)

    @property
    def image_token(self) -> str:
        """The text of one placeholder."""
        return self.image_special_token[: len(self.image_special_token) // len(self.image_ids)]

    @property
    def patches(self) -> int:
        """Number of features per picture, before the projector merges blocks of them."""
        return len(self.image_ids) * self.spatial_merge_size**2

    @classmethod
    def for_encoder(
        cls, folder, placeholder_id: int = 34, image_token: str = "@", spatial_merge_size: int = 1, **kwargs
    ) -> "VLMConfig":
        """The configuration that fits the encoder in `folder`: its width V, and one placeholder per output vector.

        spatial_merge_size: S · S patches become one. S > 1 drops DINO's registers, which have no position.
        """
        side, registers, width = measure(folder)
        tokens = count_tokens(side, registers, spatial_merge_size)
        kwargs |= {"ve_hidden_size": width, "spatial_merge_size": spatial_merge_size}
        return cls(image_token * tokens, [placeholder_id] * tokens, **kwargs)


class VisionProj(nn.Module):
    """Maps features of the encoder's width to the decoder's: "linear" is one layer, "mlp" a norm and two layers
    (MiniMind-3). With S > 1, S · S neighbouring patches first become one vector, which means fewer tokens."""

    def __init__(self, ve_hidden_size: int = 768, hidden_size: int = 512, kind: str = "linear", S: int = 1):
        super().__init__()
        self.S, width = S, ve_hidden_size * S**2
        if kind == "mlp":
            first, second = nn.Linear(width, hidden_size), nn.Linear(hidden_size, hidden_size)
            self.mlp = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), second)
        else:
            # CLIP was trained to match pictures with captions, so its features are close to language. One linear layer
            # is enough to translate them into vectors that the decoder reads like words.
            self.vision_proj = nn.Sequential(nn.Linear(width, hidden_size))

    def forward(self, image_encoders):
        (layers,) = self.children()
        dtype = layers[0].weight.dtype  # the weights may be fp16 while the encoder stays in fp32
        return layers(self.merge(image_encoders.to(dtype)))  # (..., P, V) → (..., P / S², D)

    def merge(self, features):
        """(..., P, V) → (..., P / S², S² · V): concatenates the patches of each S · S block, row by row."""
        if self.S == 1:
            return features
        S, side = self.S, math.isqrt(features.shape[-2])
        patches = features[..., -side * side :, :]  # without registers
        blocks = patches.unflatten(-2, (side // S, S, side // S, S)).transpose(-4, -3)  # (..., row, column, S, S, V)
        return blocks.flatten(-3).flatten(-3, -2)


class MiniMindVLM(MiniMindForCausalLM):
    """The vision-language model. `vision_encoder` is frozen, always in eval mode, and never saved with the weights."""

    config_class = VLMConfig

    def __init__(self, params: VLMConfig | None = None, vision_model_path: str | Path | None = DEFAULT_VISION_MODEL):
        """vision_model_path: folder of an encoder, complete or vision tower only; None builds a model without one."""
        config = params or VLMConfig()
        super().__init__(config)
        shape = config.ve_hidden_size, config.hidden_size, config.projector, config.spatial_merge_size
        self.vision_proj = VisionProj(*shape)
        self.vision_encoder = self.processor = None
        if vision_model_path is not None:  # after post_init, which would re-initialise the encoder
            self.load_vision_encoder(vision_model_path)

    def load_vision_encoder(self, path) -> None:
        """Loads the encoder in the folder `path`. Raises ValueError if its shape differs from the one in the config."""
        fits = VLMConfig.for_encoder(path, spatial_merge_size=self.config.spatial_merge_size)
        if (len(fits.image_ids), fits.ve_hidden_size) != (len(self.config.image_ids), self.config.ve_hidden_size):
            raise ValueError(
                f"{path} gives {len(fits.image_ids)} patches of width {fits.ve_hidden_size},\nthe model was made for "
                f"{len(self.config.image_ids)} of width {self.config.ve_hidden_size}: pass its --vision_model_path"
            )
        self.vision_encoder, self.processor = self.get_vision_model(path, self.config.projector == "mlp")
        self.vision_encoder.to(next(self.vision_proj.parameters()).device)

    @staticmethod
    def get_vision_model(path, normed: bool = False):
        """The frozen vision tower of a folder in fp32, and its picture processor; see `load_encoder`."""
        return load_encoder(path, normed), ImageProcessor.from_pretrained(path)

    @classmethod
    def from_pretrained(cls, path, *args, vision_model_path=DEFAULT_VISION_MODEL, **kwargs):
        """As in Transformers. The encoder comes from `vision_model_path`. By default this is path/vision_encoder, which
        scripts.convert_vlm writes, or the default folder if there is none."""
        # Load the encoder last: Transformers 5 builds on the meta device, where a second from_pretrained fails.
        loaded = super().from_pretrained(path, *args, vision_model_path=None, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        if vision_model_path == DEFAULT_VISION_MODEL:
            hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
            hub |= {"subfolder": "vision_encoder", "_raise_exceptions_for_missing_entries": False}
            files = [cached_file(path, name, **hub) for name in ENCODER_FILES]  # downloaded if path is on the Hub
            if None not in files:
                vision_model_path = Path(files[0]).parent
        if vision_model_path is not None:
            model.load_vision_encoder(vision_model_path)
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """As in Transformers; saves the encoder to save_directory/vision_encoder, where `from_pretrained` looks."""
        if self.vision_encoder is not None and is_main_process:
            folder = Path(save_directory) / "vision_encoder"
            self.vision_encoder.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        super().save_pretrained(save_directory, is_main_process, self.text_state_dict(state_dict), **kwargs)

    def text_state_dict(self, state_dict=None) -> dict[str, torch.Tensor]:
        """All weights except the encoder's."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {key: value for key, value in state_dict.items() if not key.startswith("vision_encoder.")}

    def train(self, mode: bool = True):
        super().train(mode)
        if self.vision_encoder is not None:
            self.vision_encoder.eval()
        return self

    @staticmethod
    def image2tensor(image: Image.Image, processor) -> torch.Tensor:
        """A picture of any mode and size → float32 (1, 3, H, W)."""
        return processor(images=image, return_tensors="pt")["pixel_values"]

    @staticmethod
    @torch.no_grad()
    def get_image_embeddings(image_tensors, vision_model) -> torch.Tensor:
        """float (N, 3, H, W) → patch features (N, P, V) of the last block, after its norm for the projector "mlp"."""
        # CLIP puts a class token, a summary of the picture, before the patches. Only patches keep positions: drop it.
        features = vision_model(pixel_values=image_tensors.to(vision_model.dtype)).last_hidden_state
        return features[:, int(family_of(vision_model.config.model_type).class_token) :]

    def find_pictures(self, tokens) -> torch.Tensor:
        """Which of tokens (B, T) are placeholders of a picture: bool (B, T).

        In a run of L placeholder tokens the first L // P * P belong to pictures; the rest is ordinary text. Running
        maxima and minima find the start and end of the run at each position, without a loop and without making the
        CPU wait for the GPU. With P = 2:

            token     a  @  @  @  b  @
            before    0  0  0  0  4  4    position of the last other token up to here
            after     0  4  4  4  4  6    position of the first other token from here on
            length    .  3  3  3  .  1    of the run
            picture   .  x  x  .  .  .    where the index in the run < length // P * P
        """
        T, P = tokens.shape[1], len(self.config.image_ids)
        position = torch.arange(T, device=tokens.device).expand_as(tokens)
        placeholder = tokens == self.config.image_ids[0]
        before = position.masked_fill(placeholder, -1).cummax(dim=1).values  # the last other token up to here
        after = position.masked_fill(placeholder, T).flip(1).cummin(dim=1).values.flip(1)  # the first from here on
        length = after - before - 1  # of the run
        return placeholder & (position - before - 1 < length // P * P)

    def count_vision_proj(self, tokens, h, vision_tensors=None, seqlen: int | None = None) -> torch.Tensor:
        """The merge: replaces the embedding of each placeholder by the projected feature of its patch.

        Args:
            tokens: int64 (B, T).
            h: float (B, T, D), their embeddings.
            vision_tensors: float (N, P, V) in reading order, or (B, N, P, V); None without pictures.
            seqlen: return at most this many tokens.
        Returns (B, min(T, seqlen), D). Raises ValueError if the number of pictures differs from what tokens ask for.
        """
        mask = self.find_pictures(tokens)  # (B, T)
        if not torch.compiler.is_compiling():  # reads values on the CPU, which a compiled graph cannot do
            self.check_pictures(mask, (0,) if vision_tensors is None else vision_tensors.shape[:-2])
        if vision_tensors is not None:
            features = self.vision_proj(vision_tensors)  # (N, P, D): the width of embeddings
            h = h.masked_scatter(mask[..., None], features.type_as(h))  # the i-th placeholder gets the i-th patch
        return h[:, :seqlen]

    def check_pictures(self, mask, given) -> None:
        """Raises ValueError unless the placeholders in `mask` (B, T) match `given`: (N,) pictures in all, or (B, N)."""
        P = len(self.config.image_ids)
        asked = (mask.sum(dim=1) // P).tolist()
        if len(given) > 1:
            if given[0] != len(asked):
                raise ValueError(f"pixel_values has {given[0]} rows, input_ids {len(asked)}")
            for row, want in enumerate(asked):
                if want != given[1]:
                    raise ValueError(f"row {row} has placeholders for {want} pictures, pixel_values holds {given[1]}")
        elif sum(asked) != given[0]:
            rows = ", ".join(f"row {row}: {want}" for row, want in enumerate(asked) if want) or "no row has any"
            raise ValueError(
                f"input_ids has placeholders for {sum(asked)} pictures of {P} each ({rows}), pixel_values "
                f"holds {given[0]}"
            )

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=0,
        pixel_values=None,
        labels=None,
        image_features=None,
        **args,
    ) -> MiniMindOutput:
        """Arguments as in `decode`, and

        input_ids: int64 (B, T), P placeholder tokens for each picture.
        pixel_values: normalised float, or uint8 from `ImageProcessor.resize`. (B, N, 3, H, W), also with an extra
            axis of 1 after N; or (sum of N, 3, H, W) in reading order, if rows have different numbers of pictures.
            Pass pictures to the call whose tokens contain their placeholders; later calls find them in the cache.
        image_features: float (sum of N, `config.patches`, V), the encoder's output, instead of pixel_values.
        """
        T, features = input_ids.shape[1], None
        h = self.model.embed_tokens(input_ids)  # (B, T, D); the embeddings of placeholders are replaced below
        past_key_values = as_cache(past_key_values)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        first = isinstance(past, int) and past == 0  # a static cache counts in a tensor
        # A later call too short for a picture holds the next token of an answer; its pictures are in the cache.
        if first or len(self.config.image_ids) <= T:
            # The merge: the encoder outputs a vector per patch, the projector maps it to width D, and it replaces the
            # embedding of a placeholder. To the decoder a picture is P ordinary positions of the sequence.
            features = self.encode_pictures(pixel_values, image_features)
            h = self.count_vision_proj(input_ids, h, features, T)
        if features is None and self.training:
            # Without a picture the projector still gets a gradient, of zero: all ranks must have the same gradients.
            h = h + 0.0 * sum(weight.sum() for weight in self.vision_proj.parameters())
        return self.decode(h, attention_mask, past_key_values, use_cache, logits_to_keep, labels, **args)

    def encode_pictures(self, pixel_values, image_features=None):
        """pixel_values as in `forward` → features (N, P, V), or (B, N, P, V) if pixel_values has a row axis.

        image_features: features computed before; they are checked and returned. Returns None without pictures.
        """
        if image_features is not None:
            expected = self.config.patches, self.config.ve_hidden_size
            if pixel_values is not None or image_features.ndim != 3 or image_features.shape[1:] != expected:
                raise ValueError(
                    f"image_features must be (pictures, {expected[0]}, {expected[1]}), in place of pixel_values: got "
                    f"{tuple(image_features.shape)} {'without' if pixel_values is None else 'beside'} pixel_values"
                )
            return image_features if len(image_features) else None
        if pixel_values is None or pixel_values.numel() == 0:
            return None
        if self.vision_encoder is None:
            raise ValueError("this model was built without a vision encoder: give vision_model_path to use pictures")
        pictures = pixel_values.reshape(-1, *pixel_values.shape[-3:])  # (N, 3, H, W)
        if pictures.dtype == torch.uint8:
            pictures = self.processor.normalize(pictures)
        features = self.get_image_embeddings(pictures, self.vision_encoder)[:, -self.config.patches :]  # (N, P, V)
        return features if pixel_values.ndim == 4 else features.view(*pixel_values.shape[:2], *features.shape[1:])

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Beams repeat rows, so all pictures of a row must be repeated with it.
        pictures = model_kwargs.pop("pixel_values", None)
        if expand_size > 1 and pictures is not None:
            mask = self.find_pictures(input_ids)
            self.check_pictures(mask, pictures.shape[:-3])
            rows = pictures.flatten(0, -4).split((mask.sum(dim=1) // len(self.config.image_ids)).tolist())
            pictures = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {"pixel_values": pictures}

"""The two kinds of encoder that `scripts.train_clip` trains: their parts, and how they see, read and learn.

    clip      has a class token among the patches; reads captions forwards, up to their end; projects both into the
              shared space with one matrix each; contrasts each caption with those of the other pictures
    siglip    has only patches, and a head that attends to them; reads captions in both directions and pools their last
              position, padding or not; classifies for each caption and each picture whether they belong together

CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020; SigLIP: Zhai et al. 2023, https://arxiv.org/abs/2303.15343

Shapes: B batch, T tokens, P patches, V width of the ViT, E of the shared space.
"""

import math

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from model.families import FAMILIES
from model.processing import ImageProcessor
from scripts.train_clip.captions import END_OF_CAPTION


def heads(width: int) -> int:
    return max(1, width // 64)  # 64 wide, as in CLIP


def build_config(args, vocab_size: int) -> dict:
    """Returns the content of config.json: both towers, in the classic form that every version of Transformers reads."""
    if args.kind == "siglip":
        name, top, both = "SiglipModel", {}, {"hidden_act": "gelu_pytorch_tanh"}
        reads = {"vocab_size": vocab_size, "projection_size": args.projection_dim}
    else:
        space, reads = {"projection_dim": args.projection_dim}, {"vocab_size": vocab_size}
        name, both = "CLIPModel", space | {"hidden_act": "gelu"}
        top = space | {"logit_scale_init_value": math.log(1 / 0.07)}

    def tower(half, width, layers):
        common = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {"model_type": f"{args.kind}_{half}_model"} | common | {"num_attention_heads": heads(width)} | both

    vision = tower("vision", args.hidden_size, args.num_hidden_layers) | {"num_channels": 3}
    text = tower("text", args.text_hidden_size, args.text_num_hidden_layers) | reads
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_CAPTION)
    return {
        "model_type": args.kind,
        "architectures": [name],
        **top,
        "vision_config": vision | {"image_size": args.image_size, "patch_size": args.patch_size},
        "text_config": text | ends | {"max_position_embeddings": args.max_text_len},
    }


def build_model(config: dict):
    if config["model_type"] == "clip":
        return CLIPModel(CLIPConfig(**config))
    model = SiglipModel(SiglipConfig(**config))
    with torch.no_grad():  # nearly all pairs are wrong: a start at "no" saves the steps that would learn this
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    return model


def build_processor(kind: str, edge: int) -> ImageProcessor:
    """edge: of the pictures, in pixels."""
    family = FAMILIES[kind]
    return ImageProcessor((edge, edge) if family.squash else edge, (edge, edge), **family.pixels)


def folder_configs(config: dict, processor: ImageProcessor, vision_only: bool) -> dict[str, dict]:
    """Returns {name: content of name.json} of the encoder's folder, as Transformers' classes of this kind write it."""
    pixels = processor.to_dict()
    if config["model_type"] == "siglip":
        pixels = {key: value for key, value in pixels.items() if "crop" not in key}  # it squashes pictures
        pixels["image_processor_type"] = "SiglipImageProcessor"
    if vision_only and config["model_type"] == "siglip":
        config = {"architectures": ["SiglipVisionModel"]} | config["vision_config"]
    elif vision_only:
        config = {key: value for key, value in config.items() if key != "text_config"}
    return {"config": config, "preprocessor_config": pixels}


def embed_patches(embeddings, pixels, kept):
    """The embeddings of CLIP or SigLIP, of some patches only: those that are dropped would take most of the time.

    pixels: float (B, 3, S, S); kept: int64 (B, K), numbers of patches. Returns (B, first + K, V), with positions.
    """
    conv, positions = embeddings.patch_embedding, embeddings.position_embedding.weight
    edge = conv.kernel_size[0]
    side, picture = pixels.shape[-1] // edge, torch.arange(len(kept), device=kept.device)[:, None]
    grid = pixels.unflatten(3, (side, edge)).unflatten(2, (side, edge))  # (B, 3, row, edge, column, edge)
    patches = grid.permute(0, 2, 4, 1, 3, 5)[picture, kept // side, kept % side]  # (B, K, 3, edge, edge)
    h = F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias)  # (B, K, V)
    if not hasattr(embeddings, "class_embedding"):  # SigLIP
        return h + positions[kept]
    h = h + positions[kept + 1]
    return torch.cat([(embeddings.class_embedding + positions[0]).expand(len(h), 1, -1), h], dim=1)


def encode_pictures(model, pixels, patch_pool: str = "mean", mask_ratio: float = 0.0):
    """float (B, 3, S, S) → unit vectors of the picture (B, 1, E), from the class token or from SigLIP's head over all
    patches; and of the mean of the patches, or with "max" of each patch: (B, 1 or P, E).

    A share mask_ratio of the patches, different ones for each picture, is dropped: there is less to compute, and
    pictures are harder to memorize (FLIP, Li et al. 2023, https://arxiv.org/abs/2212.00794).
    """
    vision, siglip = model.vision_model, model.config.model_type == "siglip"
    first = 0 if siglip else 1  # patch, after the class token
    if mask_ratio:
        B, P = len(pixels), vision.embeddings.num_patches
        kept = torch.rand(B, P, device=pixels.device).argsort(dim=1)[:, : round(P * (1 - mask_ratio))]
        h = embed_patches(vision.embeddings, pixels, kept)
    else:
        h = vision.embeddings(pixels)  # (B, first + P, V), with positions
    h = vision.encoder(inputs_embeds=h if siglip else vision.pre_layrnorm(h)).last_hidden_state
    patches = h[:, first:] if patch_pool == "max" else h[:, first:].mean(dim=1, keepdim=True)
    if siglip:  # the vector of a patch is the output of the head when it can attend to this patch only
        each = vision.head(vision.post_layernorm(patches).flatten(0, 1)[:, None])
        whole = vision.head(vision.post_layernorm(h))
        h = torch.cat([whole[:, None], each.unflatten(0, patches.shape[:2])], dim=1)
    else:
        h = model.visual_projection(vision.post_layernorm(torch.cat([h[:, :1], patches], dim=1)))
    h = F.normalize(h.float(), dim=-1)
    return h[:, :1], h[:, 1:]


def encode_texts(model, ids):
    """int64 (B, T) → unit vectors (B, E)."""
    if model.config.model_type == "siglip":  # it also reads the padding, always as much as in training
        return F.normalize(model.text_model(input_ids=ids).pooler_output.float(), dim=-1)
    ids = ids[:, : int((ids != END_OF_CAPTION).sum(dim=1).max()) + 1]  # no padding beyond the longest caption
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def contrastive_loss(pictures, texts, right, scale, bias=None):
    """Returns the loss of unit vectors (B, P, E) and (M, E), and how often a picture's best caption is right.

    A picture scores with a caption as its best vector of P does. right: bool (B, M), which captions are right for which
    pictures: those picked for a picture, and others that happen to be captions of it too.

    Without a bias it is CLIP's loss, InfoNCE in both directions. With a bias it is SigLIP's: sigmoid(logit + bias) is
    the probability that picture and caption belong together, separately for each of the B × M pairs; the loss is the
    sum over all pairs, divided by B.
    """
    logits = scale * (pictures @ texts.T).amax(dim=1)  # (B, M)
    if bias is None:
        targets = [each / each.sum(dim=1, keepdim=True) for each in (right, right.T)]
        loss = (F.cross_entropy(logits, targets[0]) + F.cross_entropy(logits.T, targets[1])) / 2
    else:
        loss = F.binary_cross_entropy_with_logits(logits + bias, right.float(), reduction="sum") / len(logits)
    return loss, right.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()

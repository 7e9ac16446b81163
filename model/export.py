"""Writes the parts of exported folders, and folders of our own architecture. Used by scripts.convert_vlm.

A folder contains weights as safetensors, a tokenizer with the chat template, the encoder and its preprocessing.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from transformers import PretrainedConfig

import model as model_package
from common.files import write_json, write_safely
from model.families import family_of
from model.files import read_json
from model.processing import DEFAULT_SYSTEM, IMAGE_TAG, NO_THOUGHT
from model.processor import HIDE
from model.tokenizer import thinks
from model.weights import SIDECAR, STAGES, save_weights, tokenizer_hash, weights_name

CODE = ("model_vlm.py", "model_minimind.py", "config.py", "attention.py", "feed_forward.py", "encoders.py")
CODE += ("families.py", "tokenizer.py", "processing.py", "processor.py", "rgb.py", "files.py", "defaults.py")
AUTO_MAP = {
    "AutoConfig": "model_vlm.VLMConfig",
    "AutoModelForCausalLM": "model_vlm.MiniMindVLM",
    "AutoModelForImageTextToText": "model_vlm.MiniMindVLM",
    "AutoProcessor": "processor.MiniMindVProcessor",
}

# A message is a text, in which <image> is a picture, or a list of parts, one line each, in which only "image" is one.
# "generation" tags enclose the text to train on, for TRL and return_assistant_tokens_mask. For engines without this
# tag, such as minijinja, programs remove it if it is written exactly like this, without "-".
TEMPLATE = r"""
{#- Unseen behind "<" stands U+E000: what people type is no special token. The tokenizer takes it out again. -#}
{%- macro said(message) -%}
  {%- if message.content is string -%}
    {{- message.content | replace("<|", "<HIDE|") -}}
  {%- else -%}
    {%- for part in message.content -%}
      {{- PART -}}
      {{- "" if loop.last else "\n" -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
DEFAULT{%- for message in messages -%}
  {{- "<|im_start|>" + message.role + "\n" -}}
  {%- if message.role == "assistant" -%}
ANSWER  {%- else -%}
    {{- said(message) + "<|im_end|>" -}}
  {%- endif -%}
  {{- "\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\nTHOUGHT" }}{%- endif -%}
"""
SEEN = '"TAG" if part.type != "text" else part.text | replace("<|", "<HIDE|") | replace("TAG", "<HIDEimage>")'
READ = 'part.text | replace("<|", "<HIDE|") if part.type == "text" else raise_exception("it sees no pictures")'
DEFAULT = r"""{%- if messages[0].role != "system" -%}{{ "<|im_start|>system\nSYSTEM<|im_end|>\n" }}{%- endif -%}
"""
ANSWER = r"""    {% generation %}{{- said(message) + "<|im_end|>" -}}{% endgeneration %}
"""
AFTER_THOUGHT = r"""    {%- set parts = said(message).split("</think>") -%}
    {%- set thought = parts[0].split("<think>")[-1].strip("\n") if parts | length > 1 else "" -%}
    {%- set answer = parts[-1].lstrip("\n") + "<|im_end|>" -%}
    {%- if thought -%}
      {% generation %}{{- "<think>\n" + thought + "\n</think>\n\n" + answer -}}{% endgeneration %}
    {%- else -%}
      {{- "THOUGHT" -}}{% generation %}{{- answer -}}{% endgeneration %}
    {%- endif -%}
"""


def chat_template(thinks: bool, sees: bool = True) -> str:
    """The chat template (Jinja) that does the same as `encode_chat`, for other programs.

    thinks: of MiniMind-3, whose chats have no default system turn, and whose answers begin with a thought, usually an
    empty one. sees: <image> is a picture; False: ordinary text.
    """
    template = TEMPLATE.replace("PART", SEEN if sees else READ)
    template = template.replace("DEFAULT", "" if thinks else DEFAULT).replace("SYSTEM", DEFAULT_SYSTEM)
    template = template.replace("ANSWER", AFTER_THOUGHT if thinks else ANSWER)
    template = template.replace("THOUGHT", NO_THOUGHT.encode("unicode_escape").decode() if thinks else "")
    # The character itself: some Jinja engines, such as older ones of transformers.js, reject "\ue000".
    return template.replace("TAG", IMAGE_TAG).replace("HIDE", HIDE)


# ---------------------------------------------------------------------------- files


def exact(value: torch.Tensor) -> torch.Tensor:
    """Converts to fp16 if that is lossless, as for all weights that training saved; otherwise keeps the dtype."""
    half = value.half()
    return (half if torch.equal(half.to(value.dtype), value) else value).contiguous()


def write_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes a .safetensors file. Raises OSError."""
    state = {key: exact(value.detach().cpu()) for key, value in state.items()}
    # Not save_file, which makes files that only their owner may read. Transformers requires the format.
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    write_safely(path, lambda file: file.write(weights))


def write_tokenizer_config(folder: Path, pad_token: str, thinks: bool = False, sees: bool = True) -> None:
    """Writes tokenizer_config.json and the chat template: in its own file for Transformers, and inside for
    transformers.js."""
    template = chat_template(thinks, sees)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": pad_token,
        "unk_token": pad_token,
        "padding_side": "left",  # all rows of a batch end where their answers begin
        "model_max_length": 32768,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def edit_tokenizer(source: Path, target: Path, change) -> None:
    """Writes change(tokenizer.json) in the library's format, so undoing a change restores the sha256."""
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    changed = json.dumps(change(json.loads(text)), indent=2, ensure_ascii=False)
    (target / "tokenizer.json").write_text(changed + text[len(text.rstrip()) :], encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer, tokenizer_path, to: str, image: dict | None = None) -> None:
    """Writes a tokenizer that stock Transformers can use: text from users stays plain text.

    image: an additional token for pictures; None for a text-only model. Raises ValueError for an unsupported tokenizer.
    """

    def change(ours):
        if ours.get("normalizer"):
            raise ValueError(
                f"--to {to}: {tokenizer_path}/tokenizer.json has a normalizer, which MiniMind does not use"
            )
        added = [token | {"normalized": False} for token in ours["added_tokens"]]  # matched before HIDE is removed
        without = {"type": "Replace", "pattern": {"String": HIDE}, "content": ""}
        return ours | {"added_tokens": added + ([image] if image else []), "normalizer": without}

    edit_tokenizer(Path(tokenizer_path), folder, change)
    write_tokenizer_config(folder, tokenizer.pad_token, thinks(tokenizer), sees=image is not None)


def restore_tokenizer(folder: Path, to: Path, saver: str) -> None:
    """The inverse of `write_tokenizer`. saver: the object that saves a tokenizer, for the FileNotFoundError."""

    def change(theirs):
        added = [token for token in theirs["added_tokens"] if token["content"] != IMAGE_TAG]
        return theirs | {"added_tokens": added, "normalizer": None}

    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"--weights {folder}: no tokenizer.json there\nSave it too: {saver}.save_pretrained(FOLDER)"
        )
    edit_tokenizer(folder, to, change)
    write_tokenizer_config(to, read_json(folder / "tokenizer_config.json")["pad_token"])
    if (folder / SIDECAR).is_file():
        write_json(to / SIDECAR, read_json(folder / SIDECAR) | {"tokenizer": {"sha256": tokenizer_hash(to)}})


def token_ids(tokenizer) -> dict[str, int]:
    bos, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}


# ---------------------------------------------------------------------------- the encoder


def encoder_state(encoder) -> dict[str, torch.Tensor]:
    """The weights of the vision tower under the names in its files; names in memory differ in some versions."""
    if family_of(encoder.config.model_type).renamed:
        with tempfile.TemporaryDirectory() as temporary:
            encoder.save_pretrained(temporary)
            return safetensors.torch.load_file(Path(temporary) / "model.safetensors")
    return prefixed(encoder.state_dict())


def prefixed(state: dict) -> dict[str, torch.Tensor]:
    """Renames weights of CLIP or SigLIP to the names in their files."""
    named = {"vision_model." + re.sub(r"^vision_model\.", "", key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if "position_ids" not in key}  # a buffer


def encoder_config(encoder) -> dict:
    """The encoder's config.json: the fields of its own class, except those for training and for backbones."""
    skip, known = re.compile("_|initializer|out_|stage_|.*drop"), encoder.config.to_dict()
    common = PretrainedConfig().to_dict()
    known = {key: value for key, value in known.items() if key not in common and not skip.match(key)}
    return {"model_type": encoder.config.model_type} | known


def write_encoder(folder: Path, state: dict, config: dict, preprocessor: dict) -> None:
    """Writes a folder for --vision_model_path. state, config, preprocessor: contents of its files."""
    folder.mkdir()
    write_weights(folder / "model.safetensors", state)
    write_json(folder / "config.json", {"architectures": [family_of(config["model_type"]).tower]} | config)
    write_json(folder / "preprocessor_config.json", preprocessor)


def has_eyes(model) -> bool:
    """Whether a model has a vision encoder; False for a language model."""
    return hasattr(model, "vision_encoder")


def write_parts(folder: Path, model, tokenizer, tokenizer_path) -> None:
    """Writes the tokenizer and, if there is one, the encoder; the same files for a .pth and a Transformers folder."""
    shutil.copyfile(Path(tokenizer_path) / "tokenizer.json", folder / "tokenizer.json")  # keeps its sha256
    write_tokenizer_config(folder, tokenizer.pad_token, thinks(tokenizer), has_eyes(model))
    if has_eyes(model):
        eyes = model.vision_encoder
        description = encoder_config(eyes), model.processor.to_dict()
        write_encoder(folder / "vision_encoder", encoder_state(eyes), *description)


# ---------------------------------------------------------------------------- our architecture


def write_pth(folder: Path, model, tokenizer, tokenizer_path, sidecar: dict) -> None:
    """Writes weights as training does, together with the tokenizer and encoder that eval_vlm.py needs."""
    write_parts(folder, model, tokenizer, tokenizer_path)
    stage = sidecar.get("stage") if sidecar.get("stage") in STAGES.values() else "sft_vlm"
    stage = stage if has_eyes(model) else "llm"
    save_weights(folder / weights_name(stage, model.config), model, sidecar)


def write_transformers(folder: Path, model, tokenizer, tokenizer_path, sidecar: dict) -> None:
    """Writes MiniMindVLM with its code. The encoder is a subfolder, where `from_pretrained` finds it."""
    write_parts(folder, model, tokenizer, tokenizer_path)
    config = {"model_type": "minimind-v", "architectures": ["MiniMindVLM"], "auto_map": AUTO_MAP, "dtype": "float32"}
    config |= sidecar["config"] | token_ids(tokenizer)
    config |= {"image_ids": model.config.image_ids, "tie_word_embeddings": True}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", token_ids(tokenizer) | {"max_new_tokens": 512})
    state = {key: value for key, value in model.text_state_dict().items() if key != "lm_head.weight"}  # tied
    write_weights(folder / "model.safetensors", state)
    for name in CODE:
        shutil.copyfile(Path(model_package.__file__).with_name(name), folder / name)
    pixels = {key: getattr(model.processor, key) for key in ("size", "crop_size", "image_mean", "image_std")}
    processor = {
        "processor_class": "MiniMindVProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "placeholders": model.config.image_special_token,
        "pixels": pixels | {"resample": int(model.processor.resample)},
    }
    write_json(folder / "processor_config.json", processor)

"""What exported folders consist of, and the one of our own architecture. Used by scripts.convert_vlm.

Weights are safetensors; the tokenizer knows the chat format; the encoder and its preprocessing are there.
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
# What stands between "generation" is what a model is to learn: TRL and return_assistant_tokens_mask look for it. Where
# an engine does not know the tag, as minijinja, programs cut it out, written just like this, without "-".
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
    """What `encode_chat` does, for other programs. thinks: as MiniMind-3, whose chats begin without a system turn, and
    answers with a thought, mostly an empty one. sees: or else <image> is a text like any other."""
    template = TEMPLATE.replace("PART", SEEN if sees else READ)
    template = template.replace("DEFAULT", "" if thinks else DEFAULT).replace("SYSTEM", DEFAULT_SYSTEM)
    template = template.replace("ANSWER", AFTER_THOUGHT if thinks else ANSWER)
    template = template.replace("THOUGHT", NO_THOUGHT.encode("unicode_escape").decode() if thinks else "")
    # The character itself: some Jinja engines, as older ones of transformers.js, refuse "\ue000".
    return template.replace("TAG", IMAGE_TAG).replace("HIDE", HIDE)


# ---------------------------------------------------------------------------- files


def exact(value: torch.Tensor) -> torch.Tensor:
    """In fp16 where that loses nothing, as with all weights of training, else as it is."""
    half = value.half()
    return (half if torch.equal(half.to(value.dtype), value) else value).contiguous()


def write_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    state = {key: exact(value.detach().cpu()) for key, value in state.items()}
    # Not save_file, whose file nobody but its owner may read. Transformers wants to know the format.
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    write_safely(path, lambda file: file.write(weights))


def write_tokenizer_config(folder: Path, pad_token: str, thinks: bool = False, sees: bool = True) -> None:
    """The chat template too: once in a file of its own, where Transformers looks first, once for transformers.js."""
    template = chat_template(thinks, sees)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": pad_token,
        "unk_token": pad_token,
        "padding_side": "left",  # so that all rows of a batch end where their answers begin
        "model_max_length": 32768,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def edit_tokenizer(source: Path, target: Path, change) -> None:
    """Writes change(tokenizer.json) as the library writes it: changed and changed back, it has the sha256 it had."""
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    changed = json.dumps(change(json.loads(text)), indent=2, ensure_ascii=False)
    (target / "tokenizer.json").write_text(changed + text[len(text.rstrip()) :], encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer, tokenizer_path, to: str, image: dict | None = None) -> None:
    """Such that what people typed is plain text to a stock tokenizer too. image: a token more; None: it is not asked
    about pictures."""

    def change(ours):
        if ours.get("normalizer"):
            raise ValueError(f"--to {to}: {tokenizer_path}/tokenizer.json has a normalizer, MiniMind's have none")
        added = [token | {"normalized": False} for token in ours["added_tokens"]]  # found before HIDE is taken out
        without = {"type": "Replace", "pattern": {"String": HIDE}, "content": ""}
        return ours | {"added_tokens": added + ([image] if image else []), "normalizer": without}

    edit_tokenizer(Path(tokenizer_path), folder, change)
    write_tokenizer_config(folder, tokenizer.pad_token, thinks(tokenizer), sees=image is not None)


def restore_tokenizer(folder: Path, to: Path, saver: str) -> None:
    """saver: what saves it, for the FileNotFoundError."""

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
    """The vision tower under the names of files, which not all versions of Transformers use in memory."""
    if family_of(encoder.config.model_type).renamed:
        with tempfile.TemporaryDirectory() as temporary:
            encoder.save_pretrained(temporary)
            return safetensors.torch.load_file(Path(temporary) / "model.safetensors")
    return prefixed(encoder.state_dict())


def prefixed(state: dict) -> dict[str, torch.Tensor]:
    """A CLIP or SigLIP under the names of its files."""
    named = {"vision_model." + re.sub(r"^vision_model\.", "", key): value for key, value in state.items()}
    return {key: value for key, value in named.items() if "position_ids" not in key}  # a buffer


def encoder_config(encoder) -> dict:
    """Its config.json: what its class has beyond all others, but for training and for what a backbone gives."""
    skip, known = re.compile("_|initializer|out_|stage_|.*drop"), encoder.config.to_dict()
    common = PretrainedConfig().to_dict()
    known = {key: value for key, value in known.items() if key not in common and not skip.match(key)}
    return {"model_type": encoder.config.model_type} | known


def write_encoder(folder: Path, state: dict, config: dict, preprocessor: dict) -> None:
    """A folder for --vision_model_path."""
    folder.mkdir()
    write_weights(folder / "model.safetensors", state)
    write_json(folder / "config.json", {"architectures": [family_of(config["model_type"]).tower]} | config)
    write_json(folder / "preprocessor_config.json", preprocessor)


def has_eyes(model) -> bool:
    """Or is it a language model alone?"""
    return hasattr(model, "vision_encoder")


def write_parts(folder: Path, model, tokenizer, tokenizer_path) -> None:
    """Tokenizer and encoder, if it has one, which have the same files beside a .pth as in a Transformers folder."""
    shutil.copyfile(Path(tokenizer_path) / "tokenizer.json", folder / "tokenizer.json")  # its sha256 stays
    write_tokenizer_config(folder, tokenizer.pad_token, thinks(tokenizer), has_eyes(model))
    if has_eyes(model):
        eyes = model.vision_encoder
        description = encoder_config(eyes), model.processor.to_dict()
        write_encoder(folder / "vision_encoder", encoder_state(eyes), *description)


# ---------------------------------------------------------------------------- our architecture


def write_pth(folder: Path, model, tokenizer, tokenizer_path, sidecar: dict) -> None:
    """The weights as training leaves them, with the tokenizer and encoder that eval_vlm.py needs beside them."""
    write_parts(folder, model, tokenizer, tokenizer_path)
    stage = sidecar.get("stage") if sidecar.get("stage") in STAGES.values() else "sft_vlm"
    stage = stage if has_eyes(model) else "llm"
    save_weights(folder / weights_name(stage, model.config), model, sidecar)


def write_transformers(folder: Path, model, tokenizer, tokenizer_path, sidecar: dict) -> None:
    """MiniMindVLM with its code. The encoder is a folder in it, where `from_pretrained` finds it."""
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

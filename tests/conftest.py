"""A world of seconds: a random CLIP of 16 patches, a small tokenizer, a few pictures with rows about them."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing import load_tokenizer
from scripts import train_tokenizer

COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "black": "黑", "white": "白"}


def no_space(*args, **options):
    """In place of a function that writes: what the system says when the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def turn(role, content):
    return {"role": role, "content": content}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """In this process and those it starts: with `pytest -n 2` another one has the other core."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """`datasets` keeps its Arrow files here, not in the home folder; in this process and those it starts."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets_cache"))
    if "datasets" in sys.modules:  # it has read the environment already
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A whole CLIP with random weights: 32×32 pixels in 16 patches, width 32; the old-style preprocessor file."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 32,
                "size": 32,
                "resample": 3,
                "do_resize": True,
                "do_center_crop": True,
                "do_normalize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with pictures/ (one plain colour each) and rows.jsonl, val.jsonl: captions, several turns, two pictures,
    no picture, English and Chinese."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pictures").mkdir()
    rows = []
    for english, chinese in COLOURS.items():
        Image.new("RGB", (40, 36), english).save(folder / "pictures" / f"{english}.png")
        rows.append(
            {
                "conversations": [
                    turn("user", "What colour is this?\n<image>"),
                    turn("assistant", f"It is {english}."),
                ],
                "image": f"{english}.png",
            }
        )
        rows.append(
            {
                "conversations": [
                    turn("user", "<image>\n这是什么颜色？"),
                    turn("assistant", f"这是{chinese}色。"),
                    turn("user", "确定吗？"),
                    turn("assistant", "是的。"),
                ],
                "image": f"{english}.png",
            }
        )
    rows.append(
        {
            "conversations": [
                turn("user", "<image>\n<image>\nWhich colours are these?"),
                turn("assistant", "They are red and blue."),
            ],
            "image": "red.png, blue.png",
        }
    )
    rows.append({"conversations": [turn("user", "Say hello."), turn("assistant", "Hello, how are you?")]})
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "val.jsonl", rows[:4])
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("tokenizer")
    rows = map(json.loads, (world / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    texts = [text for row in rows for text in train_tokenizer.texts_of(row["conversations"])]
    train_tokenizer.save(train_tokenizer.train(texts, 300), folder)  # not main, which reads as `trained` does below
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder, "@" * 16)


def lively(model, seed=0):
    """Random weights so large that a wrong position, mask or picture shows; those of a fresh model hide it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(mean=float(weight.ndim == 1), std=0.2)  # vectors scale, about 1
    return model


def small_config(clip_folder, **kwargs):
    small = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 512}
    return VLMConfig.for_encoder(clip_folder, **(small | kwargs))


@pytest.fixture
def make_vlm(clip_folder):
    """make_vlm(use_moe=True, ...) → a small random MiniMindVLM with eyes, in eval mode."""

    def make(**kwargs):
        torch.manual_seed(1)
        return MiniMindVLM(small_config(clip_folder, **kwargs), clip_folder).eval()

    return make


@pytest.fixture
def flags(clip_folder, tokenizer_folder, world, tmp_path):
    """Command-line flags of a training of seconds, from scratch, on the CPU."""
    return [
        *("--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")),
        *("--tokenizer_path", str(tokenizer_folder), "--vision_model_path", str(clip_folder)),
        *("--out_dir", str(tmp_path / "out"), "--from_weight", "none", "--device", "cpu", "--num_workers", "0"),
        *("--hidden_size", "64", "--num_hidden_layers", "2", "--batch_size", "4"),
    ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, world, clip_folder, tokenizer_folder):
    """Flags that find a model which has learned the colours of the little world by heart."""
    import train_sft_vlm  # not above: with it come data sets, which no Transformers of 2025 can stand beside

    out = tmp_path_factory.mktemp("out")
    common = [
        *("--tokenizer_path", str(tokenizer_folder), "--vision_model_path", str(clip_folder), "--out_dir", str(out)),
        *("--device", "cpu", "--hidden_size", "64", "--num_workers", "0", "--batch_size", "8"),
    ]
    train_sft_vlm.main(
        [
            *common,
            *("--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")),
            *("--from_weight", "none", "--num_hidden_layers", "2", "--epochs", "100"),
            *("--learning_rate", "5e-3", "--projector_learning_rate", "5e-3", "--save_interval", "1000"),
        ]
    )
    return common

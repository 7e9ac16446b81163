"""model/generations.py: minimind-3v in the format of the hubs, with a small random SigLIP and tokenizer."""

import io
import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import eval_vlm
import train_pretrain_vlm
import train_sft_vlm
import web_demo_vlm
from dataset.lm_dataset import VLMDataset
from inference.chat import Stop, stream
from inference.generate import answer_batches, ask, collate_prompts
from inference.scoring import questions_of
from model import build
from model.attention import RMSNorm
from model.build import build_model
from model.export import chat_template
from model.model_vlm import MiniMindVLM
from model.processing import ImageProcessor, encode_chat, load_tokenizer
from model.processor import MiniMindVProcessor
from scripts import inspect_data, train_llm
from scripts.convert_vlm import __main__ as convert_vlm
from tests.conftest import lively, turn, write_rows
from tests.test_loop import same, stopped_and_resumed
from tests.test_model_minimind import OTHER
from train_sft_vlm import parse_args
from trainer.optimizer import ATTENTION

P, PAD = 16, 12  # placeholders of a picture, and their id
VOCABULARY = 322
EMPTY = "<think>\n\n</think>\n\n"
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """32×32 pixels in 16 patches, width 32, no class token; as the hubs have it."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    lively(SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=8, **small))).half().save_pretrained(folder)
    about = {"image_processor_type": "SiglipImageProcessor", "do_convert_rgb": None, "resample": 2}
    about |= {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory, world):
    """With the special tokens of MiniMind-3 under the same ids, and two tokens that are added but not special."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|{i}|>" for i in range(3, PAD)), "<|image_pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["  indented\n\n  text"] * 9 + [(world / "rows.jsonl").read_text()], trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    assert tokenizer.get_vocab_size() == VOCABULARY and tokenizer.token_to_id("<|image_pad|>") == PAD
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    about |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def words(words_folder):
    return load_tokenizer(words_folder, "<|image_pad|>" * P)


@pytest.fixture
def parts(siglip_folder, words_folder):
    return ["--tokenizer_path", str(words_folder), "--vision_model_path", str(siglip_folder), "--device", "cpu"]


def shapes_of(use_moe: bool, sees=True) -> dict:
    """Names and shapes as in the public files, at width 64, 2 layers, 8 heads and 4 of keys, each 16 wide."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, 64), "model.norm.weight": (64,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.q_proj.weight": (128, 64), f"{layer}.self_attn.o_proj.weight": (64, 128)}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (64, 64) for name in "kv"}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (16,) for name in "qk"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
        for expert in [f"experts.{e}." for e in range(4)] if use_moe else [""]:
            shapes |= {f"{layer}.mlp.{expert}{name}_proj.weight": (192, 64) for name in ("gate", "up")}
            shapes |= {f"{layer}.mlp.{expert}down_proj.weight": (64, 192)}
        shapes |= {f"{layer}.mlp.gate.weight": (4, 64)} if use_moe else {}
    if sees:
        shapes |= {"vision_proj.mlp.0.weight": (32,), "vision_proj.mlp.0.bias": (32,)}
        shapes |= {"vision_proj.mlp.1.weight": (64, 32), "vision_proj.mlp.1.bias": (64,)}
        shapes |= {"vision_proj.mlp.3.weight": (64, 64), "vision_proj.mlp.3.bias": (64,)}
    return shapes


def public_state(use_moe=False, sees=True) -> dict:
    torch.manual_seed(3)
    state = {
        key: (torch.randn(shape) * 0.2 + (len(shape) == 1 and "bias" not in key)).half()
        for key, shape in shapes_of(use_moe, sees).items()
    }
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


@pytest.fixture
def public(tmp_path, parts):
    """public(use_moe) → (path of a file as the hubs have it, the model that is read from it, its tokenizer)."""

    def make(use_moe=False, sees=True):
        name = f"{'sft_vlm' if sees else 'llm'}_64{'_moe' if use_moe else ''}.pth"
        path = tmp_path / "hub" / name
        path.parent.mkdir(exist_ok=True)
        torch.save(public_state(use_moe, sees), path)
        model, tokenizer, _ = build_model(parse_args(parts), path)
        return path, model.eval(), tokenizer

    return make


def flat(pieces):
    return [token for piece, _, _ in pieces for token in piece]


# ---------------------------------------------------------------------------- what it is


@KINDS
def test_the_generation_supplies_facts_that_shapes_do_not_contain(public, use_moe):
    config = public(use_moe)[1].config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 16)
    assert (config.rms_norm_eps, config.qk_norm, config.norm_in_fp32) == (1e-6, True, True)
    assert (config.num_experts_per_tok, config.aux_loss_alpha, config.seq_aux) == (1, 5e-4, False)
    assert (config.n_shared_experts, config.n_routed_experts, config.use_moe) == (0, 4, use_moe)
    assert (config.projector, config.image_ids, config.image_token) == ("mlp", [PAD] * P, "<|image_pad|>")


@KINDS
def test_its_decoder_is_a_qwen3(public, use_moe):
    """An implementation of others: logits, and with experts the loss that keeps them busy."""
    _, model, _ = public(use_moe)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    shape |= {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    torch.manual_seed(0)
    if use_moe:
        experts = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True, "decoder_sparse_step": 1}
        theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, moe_intermediate_size=192)).eval()
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=192)).eval()
    ours = {key: value for key, value in model.text_state_dict().items() if not key.startswith("vision_proj.")}
    if use_moe and any(key.endswith("experts.gate_up_proj") for key in theirs.state_dict()):  # Transformers 5
        for i in range(2):
            stack = {
                name: [ours.pop(f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight") for e in range(4)]
                for name in ("gate", "up", "down")
            }
            both = [torch.cat(pair) for pair in zip(stack["gate"], stack["up"])]
            ours[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(both)
            ours[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack(stack["down"])
    theirs.load_state_dict(ours)
    ids = torch.randint(0, VOCABULARY, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=2e-5, rtol=1e-5)


def test_the_one_expert_of_a_token_counts_in_full_and_the_gate_learns_by_the_balance_alone(public):
    _, model, _ = public(use_moe=True)
    gate, x = model.model.layers[0].mlp.gate.train(), torch.randn(2, 30, 64)
    experts, weights, aux_loss = gate(x)
    assert torch.equal(weights, torch.ones(2, 30, 1))
    scores = torch.nn.functional.linear(x, gate.weight).softmax(-1).view(60, 4)
    share = torch.nn.functional.one_hot(experts.flatten(), 4).float().mean(0)
    torch.testing.assert_close(aux_loss, 5e-4 * 4 * (share * scores.mean(0)).sum())


def test_norms_scale_before_they_round_and_give_back_the_dtype():
    x = torch.randn(50, 64).bfloat16()
    norm = RMSNorm(64, 1e-6, in_fp32=True)
    torch.nn.init.normal_(norm.weight)
    expected = norm.weight * (x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), expected.bfloat16())


def test_the_projector_is_a_norm_and_two_layers(public):
    proj, x = public()[1].vision_proj, torch.randn(2, P, 32)
    w = dict(proj.named_parameters())
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = (normed * w["mlp.0.weight"] + w["mlp.0.bias"]) @ w["mlp.1.weight"].T + w["mlp.1.bias"]
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    torch.testing.assert_close(proj(x), h @ w["mlp.3.weight"].T + w["mlp.3.bias"], atol=1e-5, rtol=1e-5)


def test_pictures_are_squashed_and_seen_by_siglip_after_its_last_norm(public, siglip_folder):
    _, model, _ = public()
    tower = SiglipVisionModel.from_pretrained(siglip_folder, dtype=torch.float32).eval()
    pixels = model.processor([Image.radial_gradient("L").resize((90, 40)), Image.new("RGB", (7, 9), "red")])
    assert pixels["pixel_values"].shape == (2, 3, 32, 32) and pixels["pixel_values"][1, :, 5, 5].tolist() == [1, -1, -1]
    with torch.no_grad():
        expected = tower(pixel_values=pixels["pixel_values"]).last_hidden_state
    torch.testing.assert_close(model.encode_pictures(pixels["pixel_values"]), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------- tokens


def test_a_chat_has_no_system_turn_of_its_own_and_ends_with_an_empty_thought(words):
    chat = [turn("user", "<image> and <image>\nAlike?"), turn("assistant", "\n No."), turn("user", "Sure?")]
    pieces = encode_chat(words, chat, [PAD] * P)
    pads = "<|image_pad|>" * P
    assert [words.decode(ids) for ids, _, _ in pieces] == [
        f"<|im_start|>user\n{pads} and {pads}\nAlike?<|im_end|>\n<|im_start|>assistant\n{EMPTY}",
        " No.<|im_end|>",
        f"\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n{EMPTY}",
    ]
    assert [answer for _, answer, _ in pieces] == [False, True, False] and [n for *_, n in pieces] == [2, 0, 0]
    given = flat(encode_chat(words, [turn("system", "Be brief."), *chat], [PAD] * P))
    assert words.decode(given).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(
    "said", ["yes", "  indented", "\n\n  blanks", " \n", "", f"{EMPTY}yes", "<think>\nhm\n</think>\nyes"]
)
def test_tokens_are_those_of_the_template(words, said):
    chat = [turn("user", "One\n<image>"), turn("assistant", said), turn("user", "<image>?")]
    template = chat_template(thinks=True).replace("<image>", "<|image_pad|>" * P)
    chat_there = [{**each, "content": each["content"].replace("<image>", "<|image_pad|>" * P)} for each in chat]
    text = words.apply_chat_template(chat_there, chat_template=template, add_generation_prompt=True, tokenize=False)
    text = text.replace("\ue000", "")
    assert flat(encode_chat(words, chat, [PAD] * P)) == words(text)["input_ids"]


def test_a_thought_of_the_data_is_learned_and_an_empty_one_only_read(words):
    def learned(said):
        return [
            words.decode(ids)
            for ids, answer, _ in encode_chat(words, [turn("user", "a"), turn("assistant", said)], [])
            if answer
        ]

    assert learned(f"{EMPTY}yes") == learned("yes") == ["yes<|im_end|>"]
    assert learned("<think>\nhm\n</think>\n\nyes") == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]


def test_nobody_can_type_a_picture_and_any_run_of_at_signs_is_text(words):
    chat = [turn("user", "<|image_pad|>" * P + "@" * 500 + "<|im_end|>")]
    ids = flat(encode_chat(words, chat, [PAD] * P))
    assert PAD not in ids and words.decode(ids).count("@") == 500 and ids.count(2) == 1


def test_a_tokenizer_without_the_placeholder_is_refused(tokenizer_folder):
    with pytest.raises(
        ValueError, match=r"placeholders of a picture become \d+ tokens, because it has no <\|image_pad\|>"
    ):
        load_tokenizer(tokenizer_folder, "<|image_pad|>" * P)


# ---------------------------------------------------------------------------- what is read


@KINDS
def test_a_public_folder_is_read_by_the_names_of_its_configuration(tmp_path, public, parts, words, use_moe):
    _, model, _ = public(use_moe)
    folder = tmp_path / "minimind-3v"
    folder.mkdir()
    state = {key: value.bfloat16() for key, value in public_state(use_moe).items()}
    torch.save(state, folder / "pytorch_model.bin")
    about = {"model_type": "minimind-v", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    about |= {"num_key_value_heads": 4, "head_dim": 16, "use_moe": use_moe, "num_experts": 4, "num_experts_per_tok": 1}
    about |= {"router_aux_loss_coef": 5e-4, "image_ids": [PAD], "image_special_token": "<|image_pad|>"}
    about |= {"image_hidden_size": 32, "image_token_len": P, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(about))
    words.save_pretrained(folder)
    loaded, own, origin = build_model(parse_args(parts[2:]), folder)
    assert origin.tokenizer_path == str(folder) and own.get_vocab() == words.get_vocab()
    fields = ("num_key_value_heads", "head_dim", "qk_norm", "aux_loss_alpha", "n_shared_experts", "image_ids")
    assert all(getattr(loaded.config, key) == getattr(model.config, key) for key in fields)
    for key, value in loaded.text_state_dict().items():
        assert torch.equal(value, state[key].float())
    (folder / "config.json").write_text(json.dumps(about | {"image_token_len": 49}))
    with pytest.raises(ValueError, match="gives 16 patches, .*minimind-3v was trained with 49"):
        build_model(parse_args(parts[2:]), folder)


@pytest.mark.parametrize(("part", "what"), [("tokenizer", "llm"), ("vision_model", "encoder")])
def test_a_part_that_is_not_where_it_usually_is_is_named_with_how_to_fetch_it(public, parts, part, what, monkeypatch):
    path, _, _ = public()
    monkeypatch.chdir(path.parent)
    at = parts.index(f"--{part}_path")
    fetch = f"Download it: python -m scripts.download --generation 3v --what {what}, or pass"
    with pytest.raises(FileNotFoundError, match=f"is a minimind-3v, but its {part} is not in ./model/.*\n{fetch}"):
        build_model(parse_args(parts[:at] + parts[at + 2 :]), path)


def test_a_language_model_of_it_gets_eyes(public):
    _, model, _ = public(sees=False)
    assert isinstance(model, MiniMindVLM) and model.config.projector == "mlp"


def test_unsupported_generations_are_named_with_an_alternative(tmp_path, parts):
    states = {
        "v3-alpha": (public_state() | {"vision_proj.mlp.0.weight": torch.zeros(64, 128)}, "Use minimind-3v of"),
        "v3-beta": (public_state() | {"vision_proj.mlp.0.weight": torch.zeros(3072)}, "Use minimind-3v of"),
        "the first MiniMind-V": (
            {"tok_embeddings.weight": torch.zeros(9, 64), "layers.0.attention.wq.weight": torch.zeros(64, 64)}
            | {"layers.0.attention.wk.weight": torch.zeros(32, 64)},
            "Use MiniMind2-V: python -m scripts.download --what vlm",
        ),
    }
    for name, (state, later) in states.items():
        path = tmp_path / "some.pth"
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"some.pth is of {name}.*\n{later}"):
            build_model(parse_args(parts), path)


def test_eyes_and_words_of_the_other_generation_are_refused(public, parts, clip_folder, words_folder, monkeypatch):
    path, _, _ = public()
    with pytest.raises(ValueError, match="the model was trained with a SigLIP: pass its --vision_model_path"):
        build_model(parse_args([*parts, "--vision_model_path", str(clip_folder)]), path)
    mine = build.tokenizer_hash(words_folder)
    monkeypatch.setattr(build, "LATER_TOKENIZER", mine)
    assert "warning" not in build_model(parse_args(parts), path)[2].note
    monkeypatch.setattr(build, "LATER_TOKENIZER", "")
    monkeypatch.setattr(build, "PUBLIC_TOKENIZER", mine)
    fetch = "python -m scripts.download --generation 3v"
    with pytest.raises(ValueError, match=f"(?s)the tokenizer of an earlier generation .*To download that: {fetch}"):
        build_model(parse_args(parts), path)


# ---------------------------------------------------------------------------- what is done with it


def rows_flags(world, tmp_path) -> list[str]:
    return [
        *("--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")),
        *("--out_dir", str(tmp_path / "out"), "--num_workers", "0", "--batch_size", "7"),  # two steps
    ]


@KINDS
def test_both_stages_train_it_resume_and_write_what_is_asked(
    public, parts, world, tmp_path, use_moe, monkeypatch, capsys
):
    """From a language model; the second stage stops after a step, and ends as one that did not."""
    path, before, _ = public(use_moe, sees=False)
    common = [*parts, *rows_flags(world, tmp_path)]
    run = train_pretrain_vlm.main([*common, "--from_weight", str(path), "--trainable", "first_last_layer"])
    assert run.state.step == 2 and run.model.config.aux_loss_alpha == 5e-4
    first = tmp_path / "out" / path.name.replace("llm", "pretrain_vlm")
    sidecar = json.loads(first.with_suffix(".json").read_text())
    assert sidecar["config"]["qk_norm"] and sidecar["config"]["image_special_token"] == "<|image_pad|>" * P

    common += ["--cache_features", str(tmp_path / "features")]
    whole = train_sft_vlm.main(common)
    other = [*common, "--out_dir", str(tmp_path / "other"), "--from_weight", str(first)]
    same(whole, stopped_and_resumed(monkeypatch, train_sft_vlm.main, other))
    weights = tmp_path / "out" / path.name.replace("llm", "sft_vlm")
    capsys.readouterr()
    picture = str(world / "pictures" / "red.png")
    how = ["--image", picture, "--max_new_tokens", "5", "--device", "cpu", "--greedy"]
    eval_vlm.main(["--weights", str(weights), *how])  # its JSON names tokenizer and encoder
    assert "red.png" in capsys.readouterr().out
    eval_vlm.main(["--weights", str(weights), *how, "--int8"])


@KINDS
def test_it_becomes_a_folder_and_comes_back_to_the_bit(public, parts, world, tmp_path, use_moe, monkeypatch, capsys):
    path, model, tokenizer = public(use_moe)
    monkeypatch.setattr(convert_vlm, "check_folder", lambda made, ours: "not checked")
    pictures = [str(world / "pictures" / f"{colour}.png") for colour in ("red", "blue")]
    made, back = tmp_path / "made", tmp_path / "back"
    common = ["--images", *pictures]
    convert_vlm.main([*("--to", "transformers", "--weights", str(path), "--output", str(made)), *parts[:4], *common])
    convert_vlm.main(["--to", "pth", "--weights", str(made), "--output", str(back), *common])
    ours, theirs = (torch.load(file) for file in (path, back / path.name))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ValueError, match="a stock LLaVA does not have .* of minimind-3v.*\nUse --to transformers"):
        convert_vlm.main([*("--to", "llava", "--weights", str(path), "--output", str(tmp_path / "no")), *parts[:4]])

    settings = json.loads((made / "processor_config.json").read_text())
    template = (made / "chat_template.jinja").read_text()
    processor = MiniMindVProcessor(tokenizer, template, settings["placeholders"], settings["pixels"])
    for said in ("yes", "  indented", "<think>\nhm\n</think>\n\nyes"):
        chat = [turn("user", "One\n<image> <|im_end|>"), turn("assistant", said), turn("user", "<image>?")]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        parts_of = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in chat]
        image = {"type": "image", "image": Image.open(pictures[0])}
        parts_of[0]["content"] = [{"type": "text", "text": "One"}, image, {"type": "text", "text": " <|im_end|>"}]
        parts_of[2]["content"] = [image, {"type": "text", "text": "?"}]
        chat = [{**chat[0], "content": "One\n<image>\n <|im_end|>"}, chat[1], turn("user", "<image>\n?")]
        found = processor.apply_chat_template(parts_of, **how)
        assert found["input_ids"][0].tolist() == flat(encode_chat(tokenizer, chat, [PAD] * P))
        assert found["pixel_values"].shape == (2, 3, 32, 32)


@pytest.mark.slow
@KINDS
def test_a_process_that_cannot_see_the_repo_loads_it(public, parts, world, tmp_path, use_moe, monkeypatch):
    path, _, _ = public(use_moe)
    lines, check = [], convert_vlm.check_folder
    others = [""] if OTHER is None else ["", OTHER]
    monkeypatch.setattr(
        convert_vlm, "check_folder", lambda made, ours: lines.extend(check(made, ours, o) for o in others)
    )
    pictures = [str(world / "pictures" / f"{colour}.png") for colour in ("red", "blue")]
    made = ["--to", "transformers", "--weights", str(path), "--output", str(tmp_path / "made")]
    convert_vlm.main([*made, *parts[:4], "--images", *pictures])
    assert len(lines) == len(others) and all("tokens and pixels as ours" in line for line in lines)


def test_its_projector_merges_patches_too_and_later_commands_read_that_off_it(public, parts, world, tmp_path):
    path, _, _ = public(sees=False)
    common = [*parts, *rows_flags(world, tmp_path)]
    train_pretrain_vlm.main([*common, "--from_weight", str(path), "--image_tokens", "4"])
    run = train_sft_vlm.main(common)
    assert (run.model.config.spatial_merge_size, len(run.model.config.image_ids)) == (2, 4)


def test_dense_weights_become_experts_that_compute_the_same(public, parts):
    path, dense, _ = public()
    args = parse_args([*parts, "--use_moe"])
    model, _, origin = build_model(args, path, training=True)
    assert "each expert starts as its dense feed-forward" in origin.note and model.config.num_experts_per_tok == 1
    ids = torch.randint(PAD + 1, VOCABULARY, (2, 20))
    torch.testing.assert_close(model.eval()(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------- what it thinks


THOUGHTS = {
    "A cat.": "A cat.",
    "<think>\nhm\n</think>\n\nA cat.\n": "A cat.",
    f"{EMPTY}<think>hm": "",
    "A cat, <think>\n\na <b>?\n</think>sitting.": "A cat, sitting.",
}


@pytest.mark.parametrize("said", THOUGHTS)
def test_answers_are_returned_without_thoughts(words, said):
    """Whatever a model says, as an answer alone, in a batch, and as the page streams it."""
    ids = torch.tensor([words(said)["input_ids"]])
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(image_ids=[PAD] * P))

    def generate(input_ids, streamer=None, **flags):
        if streamer:
            for tokens in (input_ids, *ids[0].split(1)):
                streamer.put(tokens)
            streamer.end()
        return torch.cat([input_ids, ids], dim=1)

    model.generate = generate
    args = web_demo_vlm.parse_args([])
    args.greedy, args.num_beams = True, 1
    chat = [turn("user", "What?")]
    assert ask(model, words, chat, [], args) == THOUGHTS[said]
    batch = collate_prompts([{"number": 7, "ids": [1], "pictures": None}], 0)
    assert [*answer_batches(model, words, [batch], args, model.device, torch.float32)] == [({7: THOUGHTS[said]}, {})]
    shown = [*stream(model, words, chat, [], args, Stop(60))]
    assert shown[-1] == THOUGHTS[said] and not any("hm" in text or "think" in text for text in shown)


def test_scores_compare_answers_without_thoughts(words, siglip_folder, tmp_path):
    rows = [
        {"conversations": [turn("user", "Is it?"), turn("assistant", said)]} for said in THOUGHTS if "hm" not in said
    ]
    rows += [{"conversations": [turn("user", "Is it?"), turn("assistant", "<think>\n为什么\n</think>\n\nYes.")]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = VLMDataset(path, None, words, ImageProcessor.from_pretrained(siglip_folder), 500, [PAD] * P)
    questions = questions_of(data, {})
    assert [each.references for each in questions] == [["A cat."], ["A cat, sitting."], ["Yes."]]
    assert {each.language for each in questions} == {"en"}


# ---------------------------------------------------------------------------- where else it is used


def test_two_pictures_without_text_between_them_are_two(public, words):
    """In the public code they would be one run of placeholders, and so one picture."""
    _, model, _ = public()
    ids = torch.tensor([flat(encode_chat(words, [turn("user", "<image><image>Alike?")], [PAD] * P))])
    assert ids.eq(PAD).sum() == 2 * P
    red, blue = model.processor([Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")])["pixel_values"]
    with torch.no_grad():
        alike, other = (model(ids, pixel_values=torch.stack([red, second])).logits for second in (red, blue))
    at = ids[0].tolist().index(PAD) + P  # where the second one begins
    assert torch.equal(alike[:, :at], other[:, :at]) and not torch.allclose(alike[:, at:], other[:, at:])


def test_queries_and_keys_stay_in_half_precision(public):
    _, model, _ = public()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(torch.arange(20, 50)[None], use_cache=True).past_key_values
    assert {cache.layers[0].keys.dtype, cache.layers[0].values.dtype} == {torch.bfloat16}


@KINDS
def test_scores_and_captions_are_of_the_answers_that_it_gives_alone(public, parts, world, tmp_path, use_moe):
    path, model, words = public(use_moe)
    asks = ["--weights", str(path), *parts, "--max_new_tokens", "6", "--num_workers", "0"]
    args = eval_vlm.parse_args([*asks, "--greedy"])
    pictures = sorted((world / "pictures").iterdir())
    said = [ask(model, words, [turn("user", "What?\n<image>")], [Image.open(each)], args) for each in pictures]
    rows = [
        {"image": picture.name, "conversations": [turn("user", "What?\n<image>"), turn("assistant", text)]}
        for picture, text in zip(pictures, said)
    ]
    output, captions = tmp_path / "scores.json", tmp_path / "captions.jsonl"
    rows = ["--data_path", str(write_rows(tmp_path / "rows.jsonl", rows)), "--images_path", str(world / "pictures")]
    eval_vlm.main([*asks, *rows, "--output", str(output)])
    assert [each["answer"] for each in json.loads(output.read_text())["answers"]] == said
    eval_vlm.main([*asks, "--captions", str(captions), "--image_dir", str(world / "pictures"), "--prompt", "What?"])
    assert [json.loads(line)["answer"] for line in captions.read_text().splitlines()] == said


def test_public_rows_are_looked_at_with_its_own_encoder_and_tokenizer(public, parts, tmp_path, monkeypatch, capsys):
    """Parquet of two columns; rows of text alone have a small black picture."""
    path, _, _ = public()
    monkeypatch.chdir(tmp_path)
    chats = [
        [turn("user", "<image>\nWhat?"), turn("assistant", "\n\nIt is red.")],
        [turn("user", "@@@@?"), turn("assistant", "Hi.")],
    ]
    files = [io.BytesIO(), io.BytesIO()]
    for file, size in zip(files, (40, 8)):
        Image.new("RGB", (size, size)).save(file, "PNG")
    columns = {"conversations": [*map(json.dumps, chats)], "image_bytes": [file.getvalue() for file in files]}
    pq.write_table(pa.table(columns), "sft_i2t.parquet")
    look = ["sft_i2t.parquet", "--from_weight", str(path), *parts[:4]]
    inspect_data.main(look)
    out, page = capsys.readouterr().out, (tmp_path / "out/inspect.html").read_text()
    assert "1  rows had no <image> and a picture of at most 8×8" in out
    assert page.count(f'chip">&lt;|image_pad|&gt;×{P}<') == 1 and "×196" not in page and "CLIP" not in out + page
    with pytest.raises(FileNotFoundError, match="--vision_model_path nowhere"):
        inspect_data.main([*look, "--vision_model_path", "nowhere"])


@KINDS
def test_its_language_model_trains_on_text_and_resumes(public, parts, world, tmp_path, use_moe, monkeypatch):
    """The dense one at last becomes experts."""
    path, _, _ = public(use_moe, sees=False)
    rows = [{"conversations": [turn("user", f"Say {n}."), turn("assistant", f"\n{n}")]} for n in range(14)]
    flags = [*parts[:2], "--device", "cpu", "--data_path", str(write_rows(tmp_path / "rows.jsonl", rows))]
    flags += [*rows_flags(world, tmp_path)[4:], "--from_weight", str(path)]
    whole = train_llm.main(flags)
    config = json.loads((tmp_path / "out" / path.with_suffix(".json").name).read_text())["config"]
    assert config["qk_norm"] and config["norm_in_fp32"] and "projector" not in config
    other = [*flags, "--out_dir", str(tmp_path / "other")]
    same(whole, stopped_and_resumed(monkeypatch, train_llm.main, other))
    if not use_moe:
        config = train_llm.main([*flags, "--use_moe"]).model.config
        assert (config.use_moe, config.num_experts_per_tok, config.n_shared_experts) == (True, 1, 0)


@KINDS
@pytest.mark.parametrize("level, parts_of_it", [("projector", ()), ("attention", ATTENTION)])
def test_nothing_else_learns_also_in_bfloat16(public, parts, world, tmp_path, use_moe, level, parts_of_it):
    path, _, _ = public(use_moe)
    flags = [*parts, *rows_flags(world, tmp_path), "--from_weight", str(path), "--accumulation_steps", "2"]
    train_sft_vlm.main([*flags, "--trainable", level, "--dtype", "bfloat16"])
    before, after = torch.load(path), torch.load(tmp_path / "out" / path.name)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if any(part in key for part in ("vision_proj.", *parts_of_it))}

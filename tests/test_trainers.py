"""The training programs of others on an exported LLaVA, an example of each to copy from: Trainer of Transformers, PEFT,
TRL, which also takes our own architecture. What they save, eval_vlm.py asks."""

import json

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import eval_vlm
from model.build import Origin
from model.export import write_transformers
from model.llava import write_llava
from model.model_vlm import MiniMindVLM
from model.weights import make_sidecar
from tests.conftest import COLOURS, small_config

pytestmark = pytest.mark.slow
PROMPT = "What colour is this?"
EXPECTED = {f"{colour}.png": f"It is {colour}." for colour in COLOURS}
HOW = {"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
HOW |= {"learning_rate": 5e-3, "per_device_train_batch_size": 6, "num_train_epochs": 80}


@pytest.fixture(autouse=True)
def autocast():
    """TRL trains in bfloat16 and may leave it switched on for all that the process computes later."""
    yield
    torch.set_autocast_enabled("cpu", False)


@pytest.fixture
def export(tokenizer, tokenizer_folder, clip_folder, tmp_path, monkeypatch):
    """export(write_llava) → (model, processor) of a folder that was made of a small model that knows nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(write):
        torch.manual_seed(0)
        model = MiniMindVLM(small_config(clip_folder, vocab_size=len(tokenizer)), clip_folder)
        origin = Origin(str(tokenizer_folder), str(clip_folder), model.vision_encoder)
        (tmp_path / "made").mkdir()
        write(tmp_path / "made", model, tokenizer, tokenizer_folder, make_sidecar(model, origin))
        trust = {"trust_remote_code": write is write_transformers}
        model = AutoModelForImageTextToText.from_pretrained("made", dtype=torch.float32, **trust)
        return model, AutoProcessor.from_pretrained("made", **trust)

    return make


@pytest.fixture
def rows(world):
    """Pictures and conversations as TRL wants them."""
    return [
        {
            "images": [Image.open(world / "pictures" / f"{colour}.png")],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"It is {colour}."}]},
            ],
        }
        for colour in COLOURS
    ]


@pytest.fixture
def answers(world, capsys):
    """answers(folder) → what eval_vlm.py gets from it about each colour."""

    def ask(folder):
        capsys.readouterr()
        question = ["--image_dir", str(world / "pictures"), "--prompt", f"<image>\n{PROMPT}", "--max_new_tokens", "12"]
        eval_vlm.main(["--load", "1", "--weights", folder, *question, "--greedy", "--json", "--device", "cpu"])
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        return {line["picture"].split("/")[-1]: line["answer"] for line in lines}

    return ask


def collator(processor):
    """Rows → a batch, in which only what the assistant says is learned."""

    def collate(rows):
        chats = []
        for row in rows:
            (picture,), (asked, answer) = row["images"], row["messages"]
            asked = {"role": "user", "content": [{"type": "image", "image": picture}, *asked["content"][1:]]}
            chats.append([asked, answer])
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
        batch = processor.apply_chat_template(chats, **how, processor_kwargs={"padding": True})
        answered = torch.as_tensor(batch.pop("assistant_masks")).bool()
        return batch | {"labels": batch["input_ids"].masked_fill(~answered, -100)}

    return collate


def test_the_trainer_of_transformers(export, rows, answers):
    model, processor = export(write_llava)
    how = TrainingArguments(**HOW, remove_unused_columns=False)
    trainer = Trainer(model, how, collator(processor), rows, processing_class=processor)
    trainer.train()
    trainer.save_model("mine")
    assert answers("mine") == EXPECTED


def test_peft_trains_a_lora_that_is_merged_and_loaded_again(export, rows, answers):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, processor = export(write_llava)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    which = r".*language_model.*_proj"  # not the encoder's
    lora = get_peft_model(model, LoraConfig(r=32, target_modules=which, modules_to_save=["multi_modal_projector"]))
    how = TrainingArguments(**HOW, remove_unused_columns=False)
    Trainer(lora, how, collator(processor), rows).train()
    lora.save_pretrained("adapter")

    base = AutoModelForImageTextToText.from_pretrained("made")
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    merged = PeftModel.from_pretrained(base, "adapter").merge_and_unload()
    merged.save_pretrained("mine")
    processor.save_pretrained("mine")
    batch = collator(processor)(rows)
    with torch.no_grad():
        trained, exported = (one.eval()(**batch).logits for one in (lora, merged))
    torch.testing.assert_close(exported, trained, atol=1e-3, rtol=1e-3)
    assert answers("mine") == EXPECTED


def test_trl(export, rows, answers):
    from trl import SFTConfig, SFTTrainer

    model, processor = export(write_llava)
    how = SFTConfig(**HOW, max_length=None, assistant_only_loss=True)  # no picture is cut off, no question learned
    trainer = SFTTrainer(model, how, train_dataset=Dataset.from_list(rows), processing_class=processor)
    trainer.train()
    trainer.save_model("mine")
    assert answers("mine") == EXPECTED


def test_trl_on_our_own_architecture(export, rows, answers):
    """Whose processor does not tell answers from questions: the rows do."""
    from trl import SFTConfig, SFTTrainer

    model, processor = export(write_transformers)
    pairs = [{"images": r["images"], "prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
    how = SFTConfig(**HOW, max_length=None)
    trainer = SFTTrainer(model, how, train_dataset=Dataset.from_list(pairs), processing_class=processor)
    trainer.train()
    trainer.save_model("mine")
    assert answers("mine") == EXPECTED

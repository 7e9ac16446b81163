"""common/cli.py: error messages, and the command lines of the public MiniMind-V."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import eval_vlm
import train_pretrain_vlm
import train_sft_vlm
import web_demo_vlm
from common.cli import run_main
from scripts import inspect_data
from scripts.convert_vlm import __main__ as convert_vlm
from scripts.download import __main__ as download
from scripts.quickstart import __main__ as quickstart
from tests.conftest import no_space

ROOT = Path(__file__).parent.parent

MISTAKES = """
train_sft_vlm --lr 3          → --lr is not a flag of train_sft_vlm.py; did you mean --learning_rate? (--help lists all)
train_sft_vlm -lr 3           → -lr is not a flag of train_sft_vlm.py; did you mean --learning_rate? (--help lists all)
train_sft_vlm --epoch=3       → --epoch is not a flag of train_sft_vlm.py; did you mean --epochs? (--help lists all)
eval_vlm --batch-size 3       → --batch-size is not a flag of eval_vlm.py; did you mean --batch_size? (--help lists all)
convert_vlm --image a         → --image is not a flag of convert_vlm.py; did you mean --images? (--help lists all)
eval_vlm --output_dir a       → --output_dir is not a flag of eval_vlm.py; did you mean --out_dir? (--help lists all)
eval_vlm --qqqq               → --qqqq is not a flag of eval_vlm.py (--help lists all)
eval_vlm photo.jpg            → photo.jpg: expected a flag before this value (--help lists all)
convert_vlm --out_dir a       → the following arguments are required: --to
inspect_data --samples 3      → the following arguments are required: PATH
train_sft_vlm --epochs many   → --epochs: invalid positive int value: 'many'
train_sft_vlm --epochs 0      → --epochs: must be above 0, got 0
train_sft_vlm --num_workers x → --num_workers: invalid int value: 'x'
train_sft_vlm --use_moe 2     → --use_moe: expected nothing, 1 or 0, got 2
train_sft_vlm --out_dir       → --out_dir: expected one argument
"""


@pytest.mark.parametrize("line", MISTAKES.strip().splitlines())
def test_an_error_takes_one_line_and_names_the_nearest_flag(line, capsys):
    typed, message = line.split("→")
    script, *flags = typed.split()
    scripts = (convert_vlm, eval_vlm, inspect_data, train_sft_vlm)
    script = next(module for module in scripts if script in module.__name__.split("."))
    with pytest.raises(SystemExit) as end:
        script.parse_args(flags)
    assert (end.value.code, *capsys.readouterr()) == (2, "", f"error: {message.strip()}\n")


def test_values_may_begin_with_a_dash():
    args = eval_vlm.parse_args(["--image", "a b.jpg", "--prompt", "--what is this?"])
    assert (args.image, args.prompt) == (["a b.jpg"], "--what is this?")
    with pytest.raises(SystemExit):
        train_sft_vlm.parse_args(["--weight_decay", "-x"])
    assert train_sft_vlm.parse_args(["--weight_decay", "-0.5"]).weight_decay == -0.5


def test_abbreviated_flags_are_rejected(capsys):
    with pytest.raises(SystemExit):
        train_sft_vlm.parse_args(["--optim", "muon"])
    assert "did you mean --optimizer?" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train_sft_vlm, eval_vlm, web_demo_vlm, quickstart, download, convert_vlm])
def test_use_moe_takes_no_value_or_0_or_1(script):
    more = ["--to", "llava"] if script is convert_vlm else []
    for given, expected in ([], False), (["0"], False), (["1"], True), (["True"], True), (["False"], False):
        flags = ["--use_moe", *given] if given else []
        assert script.parse_args([*more, *flags]).use_moe is expected
    assert script.parse_args(["--use_moe", *more]).use_moe is True


# What users of the public MiniMind-V have typed so far, in its scripts of 2025.
PUBLIC_TRAINING = """--save_dir out/mine --epochs 2 --batch_size 4 --learning_rate 1e-6 --device cuda:0 --dtype bfloat16
    --num_workers 8 --accumulation_steps 1 --grad_clip 1.0 --log_interval 100 --save_interval 100 --hidden_size 512
    --num_hidden_layers 8 --max_seq_len 1536 --use_moe 0 --data_path dataset/sft_data.jsonl --images_path dataset/images
    --from_weight pretrain_vlm --from_resume 1 --use_compile 1 --use_wandb --wandb_project MiniMind-V-SFT"""


@pytest.mark.parametrize("script", [train_pretrain_vlm, train_sft_vlm])
def test_command_lines_of_the_public_trainings_run(script):
    args = script.parse_args(PUBLIC_TRAINING.split())
    assert (args.out_dir, args.device, args.use_moe, args.from_resume) == ("out/mine", "cuda:0", False, True)
    assert (args.compile, args.from_weight, args.use_wandb) == (True, "pretrain_vlm", True)
    assert not hasattr(args, "save_dir") and not hasattr(args, "use_compile")
    assert script.parse_args(["--save_dir=out/mine", "--from_resume", "0"]).out_dir == "out/mine"
    older = script.parse_args(["--dim", "768", "--n_layers", "16", "--use_moe", "False", "--warmup_iters", "0"])
    assert (older.hidden_size, older.num_hidden_layers, older.use_moe) == (768, 16, False)
    for flag in "--load_from", "--weights":
        assert script.parse_args([flag, "out/llm_512.pth"]).from_weight == "out/llm_512.pth"


def test_freeze_llm_is_trainable():
    for given, expected in ("0", "all"), ("1", "first_last_layer"), ("2", "projector"):
        assert train_sft_vlm.parse_args(["--freeze_llm", given]).trainable == expected
        assert train_pretrain_vlm.parse_args([f"--freeze_llm={given}"]).trainable == expected


def test_command_lines_of_the_public_eval_run():
    typed = "--load_from model --save_dir out --weight pretrain_vlm --hidden_size 512 --num_hidden_layers 8 --use_moe 0"
    typed += " --max_new_tokens 512 --temperature 0.65 --top_p 0.85 --image_dir ./dataset/eval_images/ --device cuda"
    args = eval_vlm.parse_args(typed.split())
    assert (args.weights, args.out_dir, args.load) == ("pretrain_vlm", "out", 0)
    assert eval_vlm.parse_args(["--weight", "pretrain_vlm", "--load_from", "./model"]).weights == "pretrain_vlm"
    assert eval_vlm.parse_args(["--load_from=MiniMind2-V"]).weights == "MiniMind2-V"
    assert web_demo_vlm.parse_args(["--load_from", "MiniMind2-V"]).weights == "MiniMind2-V"


@pytest.mark.parametrize(
    "script, typed, instead",
    [
        (train_sft_vlm, "--save_weight mine", "--out_dir DIR"),
        (train_sft_vlm, "--ddp", "torchrun --nproc_per_node N"),
        (train_sft_vlm, "--visual_encoder clip", "--vision_model_path DIR"),
        (eval_vlm, "--show_speed 1", "--json"),
        (eval_vlm, "--stream True", "answers stream"),
        (eval_vlm, "--lora_name None", "no LoRA"),
    ],
)
def test_public_flags_without_an_equivalent_get_one_line_that_says_what_to_do(script, typed, instead, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(typed.split())
    error = capsys.readouterr().err
    assert error.startswith(f"error: {typed.split()[0]} is not a flag of ") and instead in error
    assert len(error) <= 2 * 80 and error.count("\n") == 1


def test_a_full_disk_gets_the_same_message_on_every_system(capsys):
    with pytest.raises(SystemExit):
        run_main(no_space)
    error = capsys.readouterr().err
    assert error.startswith("\nerror: the disk is full; nothing was overwritten\n") and "Errno" not in error


ENDS = [("pass", 0, ""), ("raise cli.Stopped", 130, ""), ("raise ValueError('no')", 2, "error: no\n")]
ENDS += [("raise KeyboardInterrupt", 130, "stopped. To resume"), ("raise TypeError('a bug')", 1, "in main\n")]
FULL_DEVICE = Path("/dev/full")  # each write to it fails as on a full disk


def ended(tmp_path, end: str, ranks: int, stdout=subprocess.PIPE):
    """A script that prints, does `end` and has an exit handler; as one of so many ranks."""
    script = tmp_path / "ends.py"
    lines = ["import atexit", "from common import cli", "atexit.register(print, 'Python ends')"]
    script.write_text("\n".join([*lines, "def main():", "    print('done')", f"    {end}", "cli.run_main(main)"]))
    of_rank = {"WORLD_SIZE": str(ranks), "RANK": "0", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.run([sys.executable, script], env=os.environ | of_rank, **pipes, text=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("end, status, error", ENDS)
def test_a_rank_ends_before_python_does(tmp_path, end, status, error, ranks):
    """A thread of gloo may still free a tensor, which aborts a process in which Python is ending."""
    end = ended(tmp_path, end, ranks)
    assert (end.returncode, end.stdout) == (status, "done\n" + "Python ends\n" * (ranks == 1))
    assert error in end.stderr and ("Traceback" in end.stderr) == (status == 1)


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="no /dev/full")
def test_a_rank_whose_output_is_lost_says_so(tmp_path):
    with FULL_DEVICE.open("w") as full:
        end = ended(tmp_path, "pass", 2, full)
    assert end.returncode == 2 and end.stderr == "error: the disk is full; nothing was overwritten\n"

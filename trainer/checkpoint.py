"""The files of a run: weights to use, and a checkpoint to resume from."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common.distributed import is_main, say
from common.files import write_safely
from model.build import load_weights
from model.weights import check_values, read_weights, save_weights


@dataclass
class State:
    """The progress of a run. Together with the flags, the weights and the optimizer it determines all later steps."""

    step: int = 0  # steps done
    rows: int = 0  # rows trained on
    broken: int = 0  # rows skipped because their pictures could not be read
    batches_per_step: int = 0  # over all ranks
    total_steps: int = 0  # of the whole run


# Flags that may change when a run is resumed: they do not affect what the model learns.
# fmt: off
FREE = {
    "from_resume", "from_weight", "tokenizer_path", "vision_model_path", "images_path",
    "out_dir", "on_bad_row", "device", "num_workers", "accumulation_steps",
    "compile", "gradient_checkpointing", "log_interval", "save_interval", "val_path",
    "val_images_path", "val_interval", "use_wandb", "tracker", "wandb_project",
    "cache_features", "cache_dtype",  # where they are; whether and how features are rounded is recorded below
}
# fmt: on


class Checkpoint:
    """The files of a run: fp16 weights to use, and everything needed to resume (fp32 weights, optimizer, position)."""

    def __init__(self, path, args, metadata: dict, rows: int):
        """path: of the weights, e.g. out/sft_vlm_512.pth; metadata: for their JSON; rows: of the training data."""
        self.path, self.metadata = Path(path), metadata
        self.flags = {key: value for key, value in vars(args).items() if key not in FREE} | {"rows of data": rows}
        self.flags |= {f"sha256 of {key}": metadata[key].get("sha256") for key in ("tokenizer", "vision_model")}
        self.flags["features kept as"] = args.cache_dtype if getattr(args, "cache_features", None) else None
        self.resume_path = self.path.with_suffix(".resume.pt")

    def save(self, model, optimizer, scaler, state: State) -> None:
        if not is_main():
            return
        resume = {
            "weights": model.text_state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "state": asdict(state),
            "flags": self.flags,
        }
        # The file to resume from comes first: if writing stops in between, the weights can be written from it.
        write_safely(self.resume_path, lambda file: torch.save(resume, file))
        save_weights(self.path, model, self.metadata | asdict(state))

    def put_aside(self) -> None:
        """Renames an earlier run's checkpoint: if this run stops before its first save, it must not resume from it."""
        if is_main() and self.resume_path.is_file():
            old = self.resume_path.with_suffix(".old.pt")
            self.resume_path.replace(old)
            say(f"an earlier run's checkpoint is now {old}; to resume that run, rename it back and use --from_resume")

    def load(self, model, optimizer, scaler) -> State:
        """Restores all three and returns the state; step 0 if there is no checkpoint.

        Raises ValueError if the run is finished, was started with other flags, or has weights that are not finite.
        """
        if not self.resume_path.is_file():
            say(f"nothing to resume at {self.resume_path}: starting at step 0")
            return State()
        saved = read_weights(self.resume_path)
        changed = {
            key: f"{key} was {saved['flags'].get(key)}, is {value}"
            for key, value in self.flags.items()
            if saved["flags"].get(key) != value
        }
        state = State(**saved["state"])
        if [*changed] == ["epochs"] and 0 < state.total_steps <= state.step:
            raise ValueError(
                f"--from_resume: {self.resume_path} is from a finished run. To train further from its weights,\n"
                f"replace --from_resume by --from_weight {self.path} --epochs {self.flags['epochs']}"
            )
        if changed:
            raise ValueError(
                f"--from_resume: {self.resume_path} was made with other flags: {'; '.join(changed.values())}"
            )
        check_values(saved["weights"], self.resume_path)
        load_weights(model, saved["weights"], self.resume_path)
        parts = [group["part"] for group in optimizer.param_groups]
        optimizer.load_state_dict(saved["optimizer"])
        for group, part in zip(optimizer.param_groups, parts):
            group["part"] = part  # missing in older checkpoints
        if saved["scaler"]:  # empty unless the run uses fp16
            scaler.load_state_dict(saved["scaler"])
        return state

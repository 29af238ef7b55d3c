"""Checkpoints that a killed training goes on from, without anything being unpickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_OPTIMIZER = "optimizer.safetensors"
_SCHEDULE = "schedule.json"
_RANDOM = "random_state_{}.safetensors"
_STATE = "trainer_state.json"


def latest_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint of a training; None if there is none.

    The trainer's state is written last; a kill while it is written leaves JSON that cannot be read.
    """
    found = sorted(
        directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.split("-")[1])
    )
    for path in reversed(found):
        try:
            json.loads((path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


class SafeCheckpoints:
    """A mixin of `transformers.Trainer`: optimizer and random state in safetensors, the schedule in JSON."""

    args: Any
    optimizer: Any
    lr_scheduler: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        state = self.optimizer.state_dict()
        tensors = {
            f"{parameter}.{name}": torch.as_tensor(value).contiguous()
            for parameter, values in state["state"].items()
            for name, value in values.items()
        }
        save_file(tensors, Path(output_dir) / _OPTIMIZER)
        rest = {"param_groups": state["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        (Path(output_dir) / _SCHEDULE).write_text(json.dumps(rest), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        rest = json.loads((Path(checkpoint) / _SCHEDULE).read_text(encoding="utf-8"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(Path(checkpoint) / _OPTIMIZER).items():
            parameter, name = key.split(".")
            state.setdefault(int(parameter), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
        self.lr_scheduler.load_state_dict(rest["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        # Each process writes its own; the main one may not have made the folder yet.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(states, Path(output_dir) / _RANDOM.format(self.args.process_index))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load_file(Path(checkpoint) / _RANDOM.format(self.args.process_index))
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])

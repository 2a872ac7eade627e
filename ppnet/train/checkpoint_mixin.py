"""The Trainer methods that write and read checkpoints, on top of `ppnet.train.checkpointing`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ppnet.errors import CheckpointError
from ppnet.files import atomic_directory
from ppnet.train import checkpointing

if TYPE_CHECKING:
    from transformers import Trainer

    class Base(Trainer):
        """What a mixin finds in the Trainer it is put before; set by the time its methods run."""

        args: Any
        model: Any
        optimizer: Any
        lr_scheduler: Any
        state: Any
else:
    Base = object

logger = logging.get_logger(__name__)


class CheckpointMixin(Base):
    """Checkpoints of a `transformers.Trainer` as safetensors and JSON, complete or absent, resumed bit for bit.

    Put it before the Trainer among the base classes. Resuming is exact for the same machine, thread count, library
    versions and arguments, as long as the data collator draws no random numbers. The step number orders checkpoints, so
    give a branch that starts from an older checkpoint its own `output_dir`.
    """

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains; `resume_from_checkpoint` is a path, or True for the newest complete checkpoint of `output_dir`.

        Raises:
            CheckpointError: there is no complete checkpoint, or the given one is damaged, foreign or only weights.
            TrainingError: a loss or gradient norm is NaN or infinite.
        """
        if self.args.should_save:
            checkpointing.remove_leftovers(self.args.output_dir)
        path: str | None = None
        if resume_from_checkpoint is True:
            newest = checkpointing.last_good_checkpoint(self.args.output_dir)
            if newest is None:
                raise CheckpointError(
                    f"resume_from_checkpoint: True, but {self.args.output_dir!r} holds no complete checkpoint; call "
                    "train() to start from the beginning."
                )
            path = str(newest)
        elif resume_from_checkpoint:
            path = str(resume_from_checkpoint)
        if path is not None:
            self._check_resumable(path)
        return super().train(path, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer looks at max_steps after a step only, so a finished run that is resumed would do one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _check_resumable(self, path: str) -> None:
        manifest = checkpointing.verify_checkpoint(path)
        if not manifest.get("resumable"):
            raise CheckpointError(
                f"{path}: was saved with save_only_model=True and has no optimizer state; load its weights with "
                "from_pretrained and start a new run."
            )
        saved, own = manifest.get("puppet"), self._puppet_options()
        if (saved is None) != (own is None):
            has = (
                "has gates, this model has none: ppnet.wrap it" if own is None else "has no gates, this model has some"
            )
            raise CheckpointError(f"{path}: the saved model {has}; resume with the model of the saved run.")
        saved, own = saved or {}, own or {}
        changed = sorted(key for key in saved.keys() | own.keys() if saved.get(key) != own.get(key))
        if changed:
            logger.warning(f"Resuming with other PuppetConfig options than the saved run's: {', '.join(changed)}.")
        if manifest.get("world_size") != self.args.world_size:
            logger.warning(
                f"Resuming with {self.args.world_size} processes what {manifest.get('world_size')} saved: the result "
                "will not be that of an uninterrupted run."
            )

    def _puppet_options(self) -> dict[str, Any] | None:
        puppet = getattr(self.model, "puppet", None)
        # Through JSON, so that tuples compare equal to what a manifest holds.
        return None if puppet is None else json.loads(json.dumps(puppet.config.to_dict()))

    # ---- saving ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise CheckpointError(
                "save_strategy: ppnet.train writes checkpoints from one process that holds the whole model, which "
                "FSDP and DeepSpeed do not; set save_strategy='no' and save through them, or use PuppetCallback with "
                "their trainer."
            )
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        states = self._gather_rng_states()
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == target or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            checkpointing.check_finite_weights(self.model)
            try:
                self._write_checkpoint(target, states)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{target}: could not be written ({error}). The last good checkpoint is "
                    f"{checkpointing.last_good_checkpoint(run_dir)}; free disk space or lower save_total_limit, then "
                    "resume."
                ) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            protected = {target, Path(self.state.best_model_checkpoint or target)}
            checkpointing.rotate(run_dir, self.args.save_total_limit, protected)

    def _write_checkpoint(self, target: Path, rng_states: list[Any]) -> None:
        with atomic_directory(target) as work:
            self.save_model(str(work), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(work))
                self._save_scaler(str(work))
                checkpointing.write_json(work / checkpointing.RNG_STATE, rng_states)
            self._export_callbacks()
            self.state.save_to_json(str(work / "trainer_state.json"))
            checkpointing.write_manifest(
                work,
                step=self.state.global_step,
                resumable=not self.args.save_only_model,
                world_size=self.args.world_size,
                puppet=self._puppet_options(),
                **self._manifest_facts(),
            )

    @staticmethod
    def _read_manifest(path: str) -> dict[str, Any]:
        return checkpointing.verify_checkpoint(path)

    def _manifest_facts(self) -> dict[str, Any]:
        """More JSON values for the manifest, for subclasses."""
        return {}

    def _export_callbacks(self) -> None:
        exported: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                exported.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: s[0] if len(s) == 1 else s for name, s in exported.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes weights, config, tokenizer and arguments; every file appears under its name only when complete."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        work = Path(tempfile.mkdtemp(prefix=".save.", suffix=".tmp", dir=folder))
        try:
            if not hasattr(model, "save_pretrained"):
                raise CheckpointError(
                    f"model: {type(model).__name__} has no save_pretrained; train a transformers PreTrainedModel."
                )
            model.save_pretrained(str(work), state_dict=state_dict)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(work))
            checkpointing.write_json(work / "training_args.json", json.loads(self.args.to_json_string()))
            for file in [file for file in work.rglob("*") if file.is_file()]:
                final = folder / file.relative_to(work)
                final.parent.mkdir(parents=True, exist_ok=True)
                file.replace(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpointing.save_optimizer(self.optimizer, self.model, Path(output_dir))
        checkpointing.write_json(Path(output_dir) / checkpointing.SCHEDULER, self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            checkpointing.write_json(Path(output_dir) / checkpointing.SCALER, scaler.state_dict())

    def _gather_rng_states(self) -> list[Any]:
        """The generator states of all processes, by rank."""
        own = checkpointing.rng_state()
        if self.args.world_size <= 1:
            return [own]
        states: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(states, own)
        return states

    # ---- resuming -------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpointing.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpointing.load_optimizer(self.optimizer, self.model, Path(checkpoint))
            self.lr_scheduler.load_state_dict(checkpointing.read_json(Path(checkpoint) / checkpointing.SCHEDULER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(checkpointing.read_json(Path(checkpoint) / checkpointing.SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = checkpointing.read_json(Path(checkpoint) / checkpointing.RNG_STATE)
        if self.args.process_index < len(states):
            checkpointing.set_rng_state(states[self.args.process_index])

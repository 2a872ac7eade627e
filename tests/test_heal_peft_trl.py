"""Healing with PEFT's adapters, and small models in TRL's trainers with the dense teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from helpers import tiny
from plans import batch, logits, random_plan
from test_distill import Logs
from tiny_folders import TEXT, write_folders
from training import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

import ppnet
from ppnet.compact import compact
from ppnet.errors import CheckpointError, PPNetError, TrainingError
from ppnet.train import Distillation, DistillationMixin, kl_reference

IDS = torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_lora_heals_compacted_models_and_is_merged(model_type: str, tmp_path: Path) -> None:
    """Layers of different widths; Conv1D in gpt2."""
    pytest.importorskip("peft")
    teacher = tiny(model_type)
    student = compact(teacher, random_plan(teacher))
    student.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    logs = Logs()
    healed = ppnet.heal(student, teacher, IDS, steps=40, batch_size=4, learning_rate=1e-2, lora=4, callbacks=[logs])
    assert healed is student and logs.rows[-1]["distillation_kl"] < 0.8 * logs.rows[0]["distillation_kl"]
    after = student.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    linear = {f"{leaf.name}.weight" for site in ppnet.families.structure_of(teacher).sites for leaf in site.leaves}
    assert changed and changed <= linear
    assert not student.lm_head.weight.requires_grad and sum(p.requires_grad for p in student.parameters()) > 20
    for name in changed:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) <= 4
    ppnet.save(student, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch()), logits(student, batch()))
    assert ppnet.accelerate(student)  # refuses models with adapters


def test_lora_takes_a_config_and_refuses_what_is_none() -> None:
    peft = pytest.importorskip("peft")
    teacher = tiny("llama")
    student = compact(teacher, random_plan(teacher))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    ppnet.heal(student, teacher, IDS, steps=3, lora=config)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)}
    for wrong, word in ((0, "rank must be at least 1, got 0"), ("yes", "neither a rank nor a peft"), (True, "True is")):
        with pytest.raises(PPNetError, match=word):
            ppnet.heal(student, teacher, IDS, steps=1, lora=wrong)
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PPNetError, match="adapters are attached already"):
        ppnet.heal(adapted, teacher, IDS, steps=1, lora=2)


# ---- TRL -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # TRL reports its use otherwise
    return pytest.importorskip("trl")


@pytest.fixture
def models(tmp_path: Path) -> Any:
    """The dense model's folder, the model, and a small one that was saved and loaded, so that it names itself."""
    folder = write_folders(tmp_path)["dense"]
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    ppnet.save(compact(teacher, random_plan(teacher)), tmp_path / "small")
    return folder, teacher, ppnet.load(tmp_path / "small")


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(folder / "run"), "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, **more}  # fmt: skip


def prompts() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{"prompt": "the cat sat "}, {"prompt": "the dog sat "}] * 4)


def with_padding() -> Any:
    words = tiny_folders.tokenizer()
    words.pad_token = words.eos_token
    return words


def test_mixin_before_trls_sft_trainer(trl: Any, models: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    _, teacher, student = models
    kind = type("Healer", (DistillationMixin, trl.SFTTrainer), {})
    run = kind(
        model=student, teacher=teacher, distillation=Distillation(weight=0.5, direction="reverse", hidden=0.1),
        args=trl.SFTConfig(**options(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                                     max_length=32)),
        train_dataset=datasets.Dataset.from_list([{"text": TEXT}] * 8), processing_class=with_padding(),
    )  # fmt: skip
    run.train()
    row = run.state.log_history[0]
    expected = 0.5 * row["nll"] + 0.5 * row["distillation_kl"] + 0.1 * row["hidden_loss"]
    assert row["loss"] == pytest.approx(expected, rel=1e-3) and row["distillation_kl"] > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_trls_distillation_trainer_takes_compacted_students(trl: Any, models: Any, tmp_path: Path) -> None:
    _, teacher, student = models
    before = [{name: value.clone() for name, value in m.state_dict().items()} for m in (student, teacher)]
    arguments = options(tmp_path, per_device_train_batch_size=2, max_completion_length=6, learning_rate=1e-3)
    trl.DistillationTrainer(
        model=student, teacher_model=teacher, args=trl.DistillationConfig(**arguments), train_dataset=prompts(),
        processing_class=with_padding(),
    ).train()  # fmt: skip
    after = [m.state_dict() for m in (student, teacher)]
    assert any(not torch.equal(after[0][name], value) for name, value in before[0].items())
    assert all(torch.equal(after[1][name], value) for name, value in before[1].items())


def test_grpo_with_the_teacher_as_reference(trl: Any, models: Any, tmp_path: Path) -> None:
    folder, teacher, student = models
    data = prompts()

    def trainer() -> Any:
        arguments = options(tmp_path, per_device_train_batch_size=4, num_generations=4, max_completion_length=6)
        return trl.GRPOTrainer(
            model=student, reward_funcs=lambda completions, **kwargs: [float("a" in text) for text in completions],
            args=trl.GRPOConfig(beta=0.1, **arguments), train_dataset=data, processing_class=with_padding(),
        )  # fmt: skip

    def same(reference: Any, model: Any) -> bool:
        own, theirs = reference.state_dict(), model.state_dict()
        return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)

    with kl_reference(student, folder):
        run = trainer()
    assert same(run.ref_model, teacher) and student.config._name_or_path == str(tmp_path / "small")
    run.train()
    assert run.state.log_history[0]["kl"] > 0.01 and same(run.ref_model, teacher)
    # The trap: by itself TRL takes the folder that the student came from, whatever is meant.
    assert same(trainer().ref_model, ppnet.load(tmp_path / "small"))


def test_reference_errors(models: Any, tmp_path: Path) -> None:
    folder, _, student = models
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere"), kl_reference(student, tmp_path / "nowhere"):
        pass
    ppnet.save(tiny("llama"), tmp_path / "other")
    with pytest.raises(TrainingError, match="vocabulary of 96, the model of 40"):
        kl_reference(student, tmp_path / "other").__enter__()
    with pytest.raises(ZeroDivisionError), kl_reference(student, folder):
        raise ZeroDivisionError
    assert student.config._name_or_path == str(tmp_path / "small")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TrainingError, match="PEFT adapters"):
        kl_reference(adapted, folder).__enter__()

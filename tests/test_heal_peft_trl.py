"""Healing with PEFT's adapters, and small models in TRL's trainers with the dense teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny
from plans import batch, logits, random_plan
from test_heal import Logs
from training import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

import ppnet
from ppnet.compact import compact
from ppnet.errors import PPNetError

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

"""The shipped modelling files: compacted models reload anywhere, with and without ppnet, to identical logits."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import MODEL_TYPES, auto_class, tiny
from plans import batch, logits, random_plan
from safetensors.torch import save_file
from transformers import AutoModel, LlamaForSequenceClassification

import ppnet
from ppnet.compact import compact
from ppnet.errors import UnsupportedModelError
from ppnet.families import FAMILIES
from ppnet.shipped import shipped


@pytest.fixture(autouse=True)
def registered():
    ppnet.register()


RELOAD = """
import json, sys
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    classes = json.loads((folder / "config.json").read_text())["auto_map"]
    decoder = "AutoModelForCausalLM" in classes
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
    try:
        auto.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded without its code")
    data = load_file(folder / "expected" / "data.safetensors")
    model = auto.from_pretrained(folder, trust_remote_code=True)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model(**inputs).logits
    assert torch.equal(found, data["logits"]), (folder.name, (found - data["logits"]).abs().max())
    for cache in (None, "static") if decoder else ():
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False, cache_implementation=cache)
        assert torch.equal(made, data["generated"]), (folder.name, cache)
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == model.config.tie_word_embeddings
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(bare).__name__.startswith("PPNet") and type(bare).__name__.endswith("Model")
    head = model.get_output_embeddings() if decoder else model.cls
    with torch.no_grad():
        assert torch.equal(head(bare(**inputs).last_hidden_state), data["logits"])
    model.save_pretrained(folder / "again")
    again = auto.from_pretrained(folder / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, data["logits"])
    assert json.loads((folder / "again" / "config.json").read_text())["auto_map"].keys() == classes.keys()
    assert {"AutoConfig", "AutoModel"} < classes.keys()
    print(folder.name)
assert not [name for name in sys.modules if name.split(".")[0] == "ppnet"]
"""


@pytest.mark.parametrize("tie", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def test_reloads_in_a_fresh_process_without_ppnet(tie, tmp_path):
    folders = tmp_path / "folders"
    for model_type in MODEL_TYPES:
        model = tiny(model_type, tie_word_embeddings=tie)
        small = compact(model, random_plan(model))
        folder = folders / f"{model_type}-{tie}"
        small.save_pretrained(folder)
        (folder / "expected").mkdir()
        with torch.no_grad():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            expected = {
                **batch(),
                "logits": small(**batch()).logits,
            }
            if FAMILIES[model_type].decoder:
                expected["generated"] = small.generate(**batch(), max_new_tokens=8, do_sample=False)
            torch.set_num_threads(threads)
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected" / "data.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", RELOAD, str(folders)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert len(run.stdout.split()) == len(MODEL_TYPES)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_reloads_with_ppnet_without_any_flag(model_type, tie, tmp_path):
    model = tiny(model_type, tie_word_embeddings=tie)
    small = compact(model, random_plan(model))
    small.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    reloaded = auto_class(model_type).from_pretrained(tmp_path)
    assert type(reloaded) is type(small)
    assert torch.equal(logits(reloaded, batch()), logits(small, batch()))
    output, embedding = reloaded.get_output_embeddings().weight, reloaded.get_input_embeddings().weight
    assert (output.data_ptr() == embedding.data_ptr()) == tie
    assert type(AutoModel.from_pretrained(tmp_path)).__name__.endswith("Model")
    fresh = auto_class(model_type).from_config(reloaded.config)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in small.parameters()]


def test_register_is_lazy():
    script = (
        "import sys, ppnet; ppnet.register(); ppnet.register(); "
        "heavy = [m for m in sys.modules if '.modeling_' in m and m.split('.')[-1] in "
        "('modeling_llama', 'modeling_gpt2', 'modeling_qwen3', 'modeling_ppnet_llama')]; assert not heavy, heavy; "
        "from transformers import AutoConfig; c = AutoConfig.for_model('ppnet_llama'); "
        "assert type(c).__name__ == 'PPNetLlamaConfig', type(c)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr[-4000:]


def test_other_heads_are_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"a LlamaForSequenceClassification .* supported are LlamaForCausalLM"
    ):
        shipped("llama").for_stock(LlamaForSequenceClassification)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_one_compiled_graph(model_type):
    model = tiny(model_type)
    small = compact(model, random_plan(model))
    ids = batch()["input_ids"]
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, small(ids, use_cache=False).logits)

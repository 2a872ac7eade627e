"""Saving and loading: models come back with their gates and plans; damaged and foreign folders are named as such."""

import json
import logging
import struct

import pytest
import torch
from helpers import WITH_SLOW_TYPES, auto_class, tiny
from plans import batch, logits, plan_of, random_plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, set_seed

import ppnet
from ppnet.checkpoint import load, save
from ppnet.compact import compact
from ppnet.errors import CheckpointError


def gated(model_type: str, **config):
    model = ppnet.wrap(tiny(model_type), ppnet.PuppetConfig(**config))
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for gate in model.puppet.parameters():
            gate.add_(torch.randn(gate.shape, generator=source) * 0.3)
    return model


class Tokenizer:
    """The one method that saving needs of a tokenizer."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_compacted_model_round_trip(model_type, tmp_path):
    model = tiny(model_type)
    small = compact(model, random_plan(model))
    save(small, tmp_path / "small", Tokenizer())
    reloaded = load(tmp_path / "small")
    assert type(reloaded) is type(small) and reloaded.ppnet_plan == small.ppnet_plan
    assert torch.equal(logits(reloaded, batch()), logits(small, batch()))
    assert (tmp_path / "small" / "tokenizer.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_gated_model_round_trip(model_type, preset, tmp_path, caplog):
    model = gated(model_type, preset=preset, hierarchy="pooled")
    save(model, tmp_path / "gated")
    with caplog.at_level(logging.WARNING, logger="transformers"):
        reloaded = load(tmp_path / "gated")
    assert "puppet" not in caplog.text
    assert type(reloaded) is type(model)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in reloaded.state_dict().items())
    assert reloaded.puppet.config == model.puppet.config
    plan = ppnet.plan(model, 0.8)
    assert ppnet.plan(reloaded, 0.8).kept == plan.kept
    assert torch.equal(logits(compact(reloaded, plan), batch()), logits(compact(model, plan), batch()))
    dense = auto_class(model_type).from_pretrained(tmp_path / "gated")
    assert torch.equal(logits(dense, batch()), logits(ppnet.unwrap(model), batch()))


def test_sharded_gated_and_dense_models(tmp_path):
    model = gated("qwen3")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert torch.equal(load(tmp_path / "shards").puppet.s_out, model.puppet.s_out)
    dense = tiny("gpt2")
    save(dense, tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense"), batch()), logits(dense, batch()))
    half = load(tmp_path / "shards", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.puppet.s_out.dtype == torch.float32


def test_stock_and_bare_compacted_models(tmp_path):
    model = tiny("mistral")
    small = compact(model, plan_of(model, lambda site: range(3)))
    save(small, tmp_path / "stock")
    reloaded = load(tmp_path / "stock")
    assert type(reloaded).__name__ == "MistralForCausalLM" and reloaded.ppnet_plan == small.ppnet_plan
    bare = compact(tiny("llama").model, random_plan(tiny("llama").model))
    save(bare, tmp_path / "bare")
    assert type(load(tmp_path / "bare")) is type(bare)


def test_saving_again_replaces_and_never_deletes_strangers(tmp_path):
    model = tiny("llama")
    small = compact(model, random_plan(model))
    save(small, tmp_path / "model", Tokenizer())
    save(small, tmp_path / "model", Tokenizer())
    with pytest.raises(CheckpointError, match=r"also holds tokenizer\.json.*pass tokenizer="):
        save(model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    save(model, tmp_path / "model")
    assert not list((tmp_path / "model").glob("modeling_*")) and not (tmp_path / "model" / "ppnet_plan.json").exists()
    assert type(load(tmp_path / "model")) is type(model)
    (tmp_path / "model" / "checkpoint-100").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"also holds checkpoint-100, notes\.txt"):
        save(model, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, tmp_path / "model" / "notes.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    model = tiny("llama")
    save(model, tmp_path / "model")
    small = compact(model, random_plan(model))

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(small.ppnet_plan), "save", lambda self, path: full(path))
    with pytest.raises(OSError, match="No space left"):
        save(small, tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert torch.equal(logits(load(tmp_path / "model"), batch()), logits(model, batch()))


@pytest.fixture
def folder(tmp_path):
    save(gated("llama"), tmp_path / "gated")
    return tmp_path / "gated"


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_folders_that_are_not_models(tmp_path):
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config\.json \(found nothing\)"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model_type 'electra'; supported are bert, .*gpt2, .*llama"):
        load(tmp_path)


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    sizes = f"{len(whole) - 10:,} bytes, its header announces {len(whole):,}"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is truncated: {sizes}"):
        load(folder)
    file.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="truncated: 100 bytes, its header alone needs"):
        load(folder)
    file.write_bytes(whole[:3])
    with pytest.raises(CheckpointError, match="truncated: 3 bytes"):
        load(folder)
    file.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)
    file.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)
    file.write_bytes(struct.pack("<Q", 4) + b"junk")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)


def test_weights_of_another_model(folder, tmp_path):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if "layers.1.mlp.up" not in n}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys .*layers\.1\.mlp\.up_proj"):
        load(folder)
    save_file({**weights, "model.extra": torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected keys \['model\.extra'\]"):
        load(folder)
    save_file({**weights, "model.norm.weight": torch.zeros(7)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
        load(folder)


def test_damaged_gates(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if n != "puppet.theta"}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"puppet\.theta is missing \(1 in all\)"):
        load(folder)
    save_file({**weights, "puppet.s_gate": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"puppet\.s_gate is of another shape"):
        load(folder)
    save_file(weights, file, {"format": "pt"})
    edit(folder / "config.json", lambda config: config["ppnet"].update(hierarchy="pooled"))
    with pytest.raises(CheckpointError, match=r"\(5 in all\)|\(4 in all\)"):
        load(folder)
    edit(folder / "config.json", lambda config: config["ppnet"].update(colour="red"))
    with pytest.raises(CheckpointError, match=r"entry 'ppnet' .* is damaged: .*colour"):
        load(folder)
    edit(folder / "config.json", lambda config: config.update(architectures=["Nobody"]))
    with pytest.raises(CheckpointError, match="names the class 'Nobody'"):
        load(folder)


def test_damaged_shards_and_plans(tmp_path):
    model = tiny("llama")
    small = compact(model, random_plan(model))
    small.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
        load(tmp_path / "shards")
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        load(tmp_path / "shards")
    save(small, tmp_path / "small")
    random_plan(model, seed=5).save(tmp_path / "small" / "ppnet_plan.json")
    with pytest.raises(CheckpointError, match=r"keeps \d+ units of layers\.\d\.\w+, the model has \d+"):
        load(tmp_path / "small")
    random_plan(tiny("mistral")).save(tmp_path / "small" / "ppnet_plan.json")
    with pytest.raises(CheckpointError, match="made for 'mistral', the model is a 'llama'"):
        load(tmp_path / "small")


# ---- gates that were left behind -------------------------------------------------------------------------------------


def assert_loads_without_gates(path, expected):
    with pytest.warns(UserWarning, match=r"config\.json has options of gates, but the gates were not saved") as caught:
        model = load(path)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not hasattr(model, "puppet") and not hasattr(model.config, "ppnet")
    assert torch.equal(logits(model, batch()), logits(expected, batch()))
    return model


def test_a_gated_folder_saved_without_its_gates(folder, tmp_path, recwarn):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(tmp_path / "plain")
    assert_loads_without_gates(tmp_path / "plain", plain)
    set_seed(0)
    fresh = type(plain)(load(folder).config).eval()
    save(fresh, tmp_path / "fresh")
    model = assert_loads_without_gates(tmp_path / "fresh", fresh)
    recwarn.clear()
    save(model, tmp_path / "again")
    load(tmp_path / "again")
    assert not [warning for warning in recwarn if "gates" in str(warning.message)]


@pytest.mark.parametrize("shape", ["stock", "shipped", "dense"])
def test_a_gated_folder_compacted_without_its_gates(folder, tmp_path, shape, recwarn):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plans = {
        "stock": lambda: plan_of(plain, lambda site: range(3 if site.kind == "neuron" else site.units)),
        "shipped": lambda: random_plan(plain),
        "dense": lambda: plan_of(plain, lambda site: range(site.units)),
    }
    small = compact(plain, plans[shape]())
    assert (type(small) is type(plain)) == (shape != "shipped")
    assert hasattr(plain.config, "ppnet") and not hasattr(small.config, "ppnet")
    recwarn.clear()
    save(small, tmp_path / "small")
    reloaded = load(tmp_path / "small")
    assert not [warning for warning in recwarn if "gates" in str(warning.message)]
    assert torch.equal(logits(reloaded, batch()), logits(small, batch())) and reloaded.ppnet_plan == small.ppnet_plan


def test_a_compacted_folder_never_gets_gates(folder, tmp_path):
    small = compact(load(folder), random_plan(tiny("llama")))
    save(small, tmp_path / "small")
    options = json.loads((folder / "config.json").read_text())["ppnet"]
    edit(tmp_path / "small" / "config.json", lambda config: config.update(ppnet=options))
    assert_loads_without_gates(tmp_path / "small", small)


def test_gating_a_compacted_model_forgets_its_plan(tmp_path):
    small = compact(tiny("mistral"), plan_of(tiny("mistral"), lambda site: range(3)))
    ppnet.wrap(small)
    save(small, tmp_path / "gated")
    assert not hasattr(small, "ppnet_plan") and not (tmp_path / "gated" / "ppnet_plan.json").exists()
    assert ppnet.inspect(load(tmp_path / "gated")).gated


# ---- damaged configs, odd folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"hidden_size": "wide"}, "hidden_size.* expected int"),
        ({"hidden_size": 33}, "not a multiple"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"dtype": "florp"}, "florp"),
        ({"vocab_size": -1}, "negative dimension"),
    ],
)
def test_configs_that_describe_no_model(folder, entries, words):
    edit(folder / "config.json", lambda config: config.update(entries))
    with pytest.raises(CheckpointError, match=rf"(?s)config\.json does not describe a LlamaForCausalLM .*{words}"):
        load(folder)


def test_architectures_that_are_no_list(folder):
    edit(folder / "config.json", lambda config: config.update(architectures=7))
    with pytest.raises(CheckpointError, match="names the class 7 under architectures"):
        load(folder)


def test_saving_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for model in (tiny("llama"), gated("llama")):
        save(model, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and not (tmp_path / "disk" / "model").is_symlink()
        assert hasattr(load(tmp_path / "disk" / "model"), "puppet") == hasattr(model, "puppet")
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["model"]


@pytest.mark.parametrize("name", [".", "../here"])
def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="is the current working directory, which saving would replace"):
        save(tiny("llama"), name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"] and not list((tmp_path / "here").iterdir())

"""Tasks of lm-evaluation-harness from local files, on model objects and on folders; values computed here once more."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from refusals import refused
from tiny_folders import TEXT, model, puppet, run_command, tokenizer, write_folders

import ppnet
from ppnet.errors import DataError, PPNetError, UnsupportedModelError
from ppnet.evaluate import lm_eval

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'ppnet[eval]'")

QUESTIONS = [
    {"question": "the cat sat on the ", "choices": ["mat", "log", "the"], "label": 0},
    {"question": "the dog sat on ", "choices": ["a", "the mat", "zzzz"], "label": 1},
    {"question": "and the ", "choices": ["dog", "q", "cat sat"], "label": 2},
    {"question": "sat on the mat, and ", "choices": ["the", "on"], "label": 0},
    {"question": "the ", "choices": ["x", "log.", "m"], "label": 1},
    {"question": "on the log", "choices": [",", "."], "label": 1},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 3}}
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two tasks and their data."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "choice.jsonl").write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    (path / "text.jsonl").write_text(json.dumps({"text": TEXT}))
    (path / "choice.yaml").write_text(CHOICE.format(file=path / "choice.jsonl"))
    (path / "rolling.yaml").write_text(ROLLING.format(file=path / "text.jsonl"))
    return path


def nll(model, words, context, answer, first=()):
    """Of an answer's tokens, after a context."""
    ids = torch.tensor([[*first, *words(context)["input_ids"], *words(answer)["input_ids"]]])
    with torch.no_grad():
        likely = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    answers = len(words(answer)["input_ids"])
    return -float(likely.gather(1, ids[0, 1:, None])[-answers:].sum())


def accuracy(model, words):
    best = [
        min(range(len(q["choices"])), key=lambda i: nll(model, words, q["question"], q["choices"][i]))
        for q in QUESTIONS
    ]
    return sum(choice == q["label"] for choice, q in zip(best, QUESTIONS, strict=True)) / len(QUESTIONS)


def test_a_dense_model(folder):
    dense, words = model().train(), tokenizer()
    (found,) = lm_eval(dense, words, "tiny_choice", include_path=folder, bootstrap_iters=100)
    assert dense.training
    assert found.metrics["acc"] == pytest.approx(accuracy(dense.eval(), words)) and found.stderr["acc"] > 0
    assert found.samples == len(QUESTIONS) and found.version.startswith("3") and found.higher_is_better == {"acc": True}
    assert found.to_dict()["metrics"] == found.metrics and "tiny_choice (version 3" in str(found)
    (rolling,) = lm_eval(dense, words, ["tiny_rolling"], include_path=folder)
    # The text's tokens after the one that the harness puts before them.
    expected = nll(dense, words, "", TEXT, first=[words.bos_token_id])
    assert rolling.metrics["byte_perplexity"] == pytest.approx(math.exp(expected / len(TEXT)), rel=1e-4)
    assert rolling.stderr == {}
    (two,) = lm_eval(dense, words, "tiny_choice", include_path=folder, limit=2)
    assert two.samples == 2


def test_sizes_of_a_gated_model(folder):
    """At a size: what its compacted model gives; other sizes answer otherwise."""
    gated, words = puppet().eval(), tokenizer()
    run = partial(lm_eval, tokenizer=words, tasks=["tiny_choice", "tiny_rolling"], include_path=folder)
    values = {}
    for size in (1.0, 0.7):
        with ppnet.resize(gated, size):
            values[size] = {one.task: one.metrics for one in run(gated)}
            assert values[size]["tiny_choice"]["acc"] == pytest.approx(accuracy(gated, words))
        small = {one.task: one.metrics for one in run(ppnet.compact(gated, size))}
        for task, metrics in values[size].items():
            assert small[task] == pytest.approx(metrics, rel=1e-4)
    assert values[1.0]["tiny_rolling"] != pytest.approx(values[0.7]["tiny_rolling"], rel=1e-3)
    with ppnet.resize(ppnet.accelerate(gated), 0.7):
        fast = {one.task: one.metrics for one in run(gated)}
    assert fast["tiny_rolling"] == pytest.approx(values[0.7]["tiny_rolling"], rel=1e-4)


def test_the_command(folder, tmp_path, capsys):
    folders = write_folders(tmp_path)
    options = ("--tasks", "tiny_choice,tiny_rolling", "--task-folder", folder)
    code, out, err = run_command(capsys, "eval", folders["puppet"], *options, "--sizes", "1,0.7", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["size"], row["task"]) for row in rows] == [
        (size, task) for size in (1.0, 0.7) for task in ("tiny_choice", "tiny_rolling")
    ]
    gated = puppet().eval()
    with ppnet.resize(gated, 0.7) as resized:
        expected = [
            one.metrics for one in lm_eval(gated, tokenizer(), ["tiny_choice", "tiny_rolling"], include_path=folder)
        ]
    assert [row["metrics"] for row in rows[2:]] == [pytest.approx(metrics, rel=1e-4) for metrics in expected]
    assert rows[2]["params"] == resized.cost.params
    code, out, _ = run_command(capsys, "eval", folders["dense"], *options)
    assert code == 0 and "as it is" in out and "byte_perplexity" in out
    for command, message in (
        (("--tasks", "none", "--task-folder", folder), "not among the task files"),
        ((*options, "--data", folders["text"]), "data: has no meaning with --tasks"),
        (("--data", folders["text"], "--limit", 2), "limit: 2.0 has a meaning only with --tasks"),
        ((), "data: none; give --data FILE"),
    ):
        code, _, err = run_command(capsys, "eval", folders["dense"], *command)
        assert code == 1 and message in err


def test_refusals(folder, tmp_path):
    dense = model()
    with refused(dense, DataError, r"tasks: \['other'\] not among the task files.*tiny_choice, tiny_rolling"):
        lm_eval(dense, tokenizer(), ["tiny_choice", "other"], include_path=folder)
    with refused(dense, DataError, "include_path: .* is not a folder"):
        lm_eval(dense, tokenizer(), "tiny_choice", include_path=tmp_path / "none")
    from helpers import tiny

    with pytest.raises(UnsupportedModelError, match="is an encoder"):
        lm_eval(tiny("bert"), tokenizer(), "tiny_choice", include_path=folder)


def test_without_the_harness(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PPNetError, match=r"is not installed.*pip install 'ppnet\[eval\]'"):
        lm_eval(model(), tokenizer(), "tiny_choice", include_path=folder)

"""lm-eval: what the adapter relies on, and that its scores are those of the model in memory."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import random
from statistics import fmean

import pytest
import torch

pytest.importorskip("lm_eval")

import numpy
from conftest import WORDS, tiny_llama, word_tokenizer
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llm_pruner.errors import (
    InvalidDataError,
    LoadError,
    MissingDependencyError,
    NonFiniteError,
    ProcessGroupError,
    UnknownNameError,
)
from llm_pruner.evaluation.tasks import HolisticEvaluator, choice_losses
from llm_pruner.lm_eval.harness import run_tasks
from llm_pruner.lm_eval.task_items import LmEvalTasks
from llm_pruner.lm_eval.task_results import compare_results
from llm_pruner.utils import format_prompt

POSITIONS = 128


def choice_items(number: int = 24) -> list[dict]:
    """Items of 2 to 4 choices of different lengths; every sixth is too long for the model."""
    draw = random.Random(3)
    made = []
    for n in range(number):
        choices: list[str] = []
        while len(choices) < 2 + n % 3:
            choices += {" ".join(draw.sample(WORDS, draw.randint(1, 3)))} - set(choices)
        length = POSITIONS + 20 if n % 6 == 5 else 3 + n % 5
        prompt = " ".join(draw.choices(WORDS, k=length))
        reference = draw.choice(choices)
        made.append({"task": "pick", "prompt": prompt, "reference": reference, "choices": choices})
    return made


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def items():
    return choice_items()


@pytest.fixture
def definition(items, tmp_path):
    """A task of lm-eval over `items`, prompts rendered as the built-in scorer renders them."""
    rows = [
        {
            "text": format_prompt(item["prompt"]),
            "options": item["choices"],
            "gold": item["choices"].index(item["reference"]),
        }
        for item in items
    ]
    write_rows(tmp_path / "pick.jsonl", rows)
    metric = {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": "pick",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pick.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **metric}, {"metric": "acc_norm", **metric}],
        "metadata": {"version": 2.5},
    }


@pytest.fixture
def arc(tmp_path):
    """A folder with rows in the layout of ARC's own dataset."""
    draw = random.Random(5)
    rows = [
        {
            "id": str(n),
            "question": " ".join(draw.sample(WORDS, 6)),
            "choices": {"text": draw.sample(WORDS, 4), "label": list("ABCD")},
            "answerKey": draw.choice("ABCD"),
        }
        for n in range(20)
    ]
    write_rows(tmp_path / "arc_easy.jsonl", rows)
    return tmp_path, rows


def answering(tmp_path, output_type="generate_until", **more):
    """A task of lm-eval that generates, with two filters."""
    rows = [{"text": " ".join(WORDS[n : n + 4]), "target": WORDS[n % 3]} for n in range(6)]
    write_rows(tmp_path / "say.jsonl", rows)
    return {
        "task": "say",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "say.jsonl")}},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "text",
        "doc_to_target": "target",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "all", "filter": [{"function": "take_first"}]},
            {"name": "word", "filter": [
                {"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"},
            ]},
        ],
        **more,
    }  # fmt: skip


def slow_scores(model, tokenizer, items):
    """Of every choice one forward pass; the beginning of a long prompt is cut off."""
    plain, norm = [], []
    for item in items:
        losses = []
        prompt = tokenizer(format_prompt(item["prompt"]))["input_ids"]
        for choice in item["choices"]:
            answer = tokenizer(choice)["input_ids"]
            ids = torch.tensor([(prompt + answer)[-(POSITIONS + 1) :]])
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits[0, -len(answer) :].log_softmax(-1)
            losses.append(-float(logits.gather(1, ids[0, -len(answer) :, None]).sum()))
        rates = [loss / len(choice) for loss, choice in zip(losses, item["choices"], strict=True)]
        gold = item["choices"].index(item["reference"])
        plain.append(float(losses.index(min(losses)) == gold))
        norm.append(float(rates.index(min(rates)) == gold))
    return plain, norm


def test_both_backends_score_every_item_as_a_slow_loop_does(llama, tokenizer, items, definition):
    plain, norm = slow_scores(llama, tokenizer, items)
    assert 0 < sum(plain) < len(plain)
    assert plain != norm
    options = {"batch_size": 5}
    ours = HolisticEvaluator(llama, tokenizer, **options)
    theirs = HolisticEvaluator(llama, tokenizer, tasks=[definition], backend="lm-eval", **options)
    means = theirs.run_benchmark()
    assert means == ours.run_benchmark(items) == {"pick": fmean(plain), "mean": fmean(plain)}
    for evaluator in (ours, theirs):
        assert evaluator.item_scores == {"pick": plain}
        assert evaluator.norm_scores == {"pick": norm}
        assert evaluator.counts == {"pick": len(items)}
    assert theirs.task_results["pick"].scores == {"acc": plain, "acc_norm": norm}


def test_norm_scores_are_of_items_with_choices_alone(llama, tokenizer, items):
    number = {"task": "sum", "prompt": "the cat", "reference": "3"}
    evaluator = HolisticEvaluator(llama, tokenizer, max_new_tokens=4)
    evaluator.run_benchmark([number, *items[:4]])
    assert list(evaluator.item_scores) == ["sum", "pick"]
    assert list(evaluator.norm_scores) == ["pick"]
    assert evaluator.norm_scores["pick"] == slow_scores(llama, tokenizer, items[:4])[1]


def lm_eval_alone(model, tokenizer, definition, **options):
    """What lm-eval finds without the adapter."""
    return simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer)),
        tasks=[copy.deepcopy(definition)],
        task_manager=TaskManager(include_defaults=False),
        **options,
    )


def test_the_likelihoods_are_those_of_lm_eval(llama, tokenizer, items, definition):
    """What a score hides; of truncated prompts, too."""
    ours = choice_losses(llama, tokenizer, items, 5)
    found = lm_eval_alone(llama, tokenizer, definition, bootstrap_iters=0)
    theirs = [[-one[0][0] for one in sample["resps"]] for sample in found["samples"]["pick"]]
    assert [len(losses) for losses in theirs] == [len(item["choices"]) for item in items]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_means_errors_and_settings_are_those_that_lm_eval_reports(llama, tokenizer, definition):
    """The shape of its results, as the adapter reads them."""
    limit = 9
    found = lm_eval_alone(llama, tokenizer, definition, limit=limit, bootstrap_iters=10)
    result = run_tasks(llama, tokenizer, [definition], limit=limit)["pick"]
    for metric in ("acc", "acc_norm"):
        theirs = found["results"]["pick"]
        assert result.means[metric] == pytest.approx(theirs[f"{metric},none"])
        assert result.stderr[metric] == pytest.approx(theirs[f"{metric}_stderr,none"])
        assert found["higher_is_better"]["pick"][metric] is True
        assert all(type(score) is float for score in result.scores[metric])
    assert found["n-samples"]["pick"] == {"original": 24, "effective": limit}
    assert result.version == str(found["versions"]["pick"]) == "2.5"
    assert result.items == [sample["doc_hash"] for sample in found["samples"]["pick"]]
    assert len(set(result.items)) == limit == len(result.item_scores)
    assert result.settings == {
        "num_fewshot": found["n-shot"]["pick"],
        "limit": limit,
        "seed": found["config"]["fewshot_seed"],
        "apply_chat_template": False,
        "lm_eval": found["lm_eval_version"],
    }
    counts = [2 + n % 3 for n in range(limit)]
    assert result.floors["acc"] == pytest.approx(fmean(1 / count for count in counts))
    assert run_tasks(llama, tokenizer, [definition], limit=1)["pick"].stderr["acc"] == 0


def test_two_models_of_one_name_have_their_own_scores(tokenizer, definition):
    """No cache of answers, which would be stale."""
    one, other = tiny_llama(), tiny_llama()
    for parameter in other.model.layers[0].parameters():
        parameter.data.mul_(-2)
    assert one.config._name_or_path == other.config._name_or_path
    first = run_tasks(one, tokenizer, [definition])["pick"]
    second = run_tasks(other, tokenizer, [definition])["pick"]
    assert first.scores != second.scores
    assert run_tasks(one, tokenizer, [definition])["pick"] == first
    assert second.scores["acc"] == slow_scores(other, tokenizer, choice_items())[0]


def test_a_comparison_is_two_runs_and_a_paired_bootstrap(llama, tokenizer, arc, definition):
    folder, _ = arc
    pruned = tiny_llama(3)
    settings = {"limit": 15, "num_fewshot": 2, "batch_size": 4}
    results = [
        run_tasks(model, tokenizer, ["arc_easy"], folder, **settings) for model in (llama, pruned)
    ]
    lines = compare_results(*results)
    before, after = (result["arc_easy"] for result in results)
    assert [line.name for line in lines] == ["arc_easy (acc)", "arc_easy (acc_norm)"]
    for line, metric in zip(lines, before.scores, strict=True):
        gains = [b - a for a, b in zip(before.scores[metric], after.scores[metric], strict=True)]
        draws = torch.randint(15, (1000, 15), generator=torch.Generator().manual_seed(0))
        means = sorted(fmean(gains[row] for row in drawn) for drawn in draws.tolist())
        assert means[24] <= line.low + 1e-9 <= means[25] + 2e-9
        assert means[974] <= line.high + 1e-9 <= means[975] + 2e-9
        assert line.change == pytest.approx(fmean(gains))
        assert (line.group, line.count, line.floor) == ("tasks", 15, 0.25)
        assert line.higher_is_better is True
        assert "2 examples" in line.note
    assert any(line.change for line in lines)
    assert all(line.low <= line.change <= line.high for line in lines)
    shorter = run_tasks(llama, tokenizer, ["arc_easy"], folder, limit=14)
    with pytest.raises(InvalidDataError, match="differ in items"):
        compare_results(results[0], shorter)
    with pytest.raises(InvalidDataError, match=r"different tasks \(arc_easy; \)"):
        compare_results(results[0], {})


def test_a_shipped_task_reads_local_rows(llama, tokenizer, arc):
    """Its own prompts and metrics; twenty rows are scored as a slow loop scores them."""
    folder, rows = arc
    items = [
        {
            "prompt": row["question"],
            "choices": row["choices"]["text"],
            "reference": row["choices"]["text"]["ABCD".index(row["answerKey"])],
        }
        for row in rows
    ]
    plain, norm = slow_scores(llama, tokenizer, items)
    result = run_tasks(llama, tokenizer, ["arc_easy"], folder)["arc_easy"]
    assert result.scores == {"acc": plain, "acc_norm": norm}
    assert result.settings["num_fewshot"] == 0
    assert result.version == "1.0"
    write_rows(folder / "arc_easy.jsonl", rows[::-1])  # read again, not out of a cache
    again = run_tasks(llama, tokenizer, ["arc_easy"], folder)["arc_easy"]
    assert again.scores == {"acc": plain[::-1], "acc_norm": norm[::-1]}


def test_examples_are_other_rows_of_the_file(llama, tokenizer, arc, monkeypatch):
    folder, rows = arc
    seen = []
    score = HFLM.loglikelihood

    def spy(self, requests, **options):
        seen.extend(request.args[0] for request in requests)
        return score(self, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", spy)
    result = run_tasks(llama, tokenizer, ["arc_easy"], folder, num_fewshot=3)["arc_easy"]
    assert result.settings["num_fewshot"] == 3
    questions = [row["question"] for row in rows]
    assert len(seen) == 4 * len(rows)
    for place, context in enumerate(seen):
        asked = [part.split("\n")[0].strip() for part in context.split("Question:")[1:]]
        assert len(set(asked)) == 4
        assert set(asked) <= set(questions)
        assert asked[-1] == questions[place // 4]
    first = list(seen)
    seen.clear()
    run_tasks(llama, tokenizer, ["arc_easy"], folder, num_fewshot=3, seed=7)
    assert seen != first
    seen.clear()
    run_tasks(llama, tokenizer, ["arc_easy"], folder, num_fewshot=3)
    assert seen == first


def test_generated_answers_and_filters(llama, tokenizer, tmp_path):
    task = answering(tmp_path)
    result = run_tasks(llama, tokenizer, [task], batch_size=2)["say"]
    assert list(result.scores) == ["exact_match (all)", "exact_match (word)"]
    assert result.floors == {}
    expected = []
    for row in map(json.loads, (tmp_path / "say.jsonl").read_text().splitlines()):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        for _ in range(3):
            with torch.no_grad():
                new = llama(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, new[None, None]], 1)
        words = tokenizer.decode(ids[0, -3:], skip_special_tokens=True).split()
        expected.append(float(words[:1] == [row["target"]]))
    assert result.scores["exact_match (word)"] == expected


def test_model_tokenizer_and_random_numbers_are_as_before(tokenizer, definition):
    model, own = tiny_llama().train(), copy.deepcopy(tokenizer)
    own.pad_token = None
    seeds = torch.manual_seed, random.seed, numpy.random.seed
    for seed in seeds:
        seed(3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_tasks(model, own, [definition], limit=2)
    drawn = torch.rand(1).item(), random.random(), numpy.random.rand()
    for seed in seeds:
        seed(3)
    assert drawn == (torch.rand(1).item(), random.random(), numpy.random.rand())
    assert own.pad_token is None
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert "data_files" in definition["dataset_kwargs"]


def test_nan_is_an_error_and_not_the_winner(llama, tokenizer, definition, tmp_path):
    llama.model.norm.weight.data[0] = math.nan
    for task in (definition, answering(tmp_path)):
        with pytest.raises(NonFiniteError, match="NaN"):
            run_tasks(llama, tokenizer, [task])
    assert not llama._forward_hooks


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_infinite_likelihoods_are_named(llama, tokenizer, definition, monkeypatch):
    monkeypatch.setattr(
        HFLM, "loglikelihood", lambda self, asked: [(-math.inf, False)] * len(asked)
    )
    with pytest.raises(NonFiniteError, match=r"'pick'.* 24 of 24 items is NaN or infinite"):
        run_tasks(llama, tokenizer, [definition])


@pytest.mark.parametrize(
    ("tasks", "options", "error", "message"),
    [
        (["arc_eazy"], {}, UnknownNameError, "no task 'arc_eazy'. Did you mean 'arc_easy' or"),
        (["§"], {}, UnknownNameError, r"no task '§'. All \d+: lm-eval ls tasks"),
        ([], {}, InvalidDataError, "must be a list of one or more"),
        ("arc_easy", {}, InvalidDataError, "must be a list of one or more"),
        (["arc_easy"], {"limit": 0}, InvalidDataError, "limit=0 must be at least 1"),
        (["arc_easy"], {"batch_size": 0}, InvalidDataError, "batch_size=0"),
        (["arc_easy"], {"num_fewshot": -1}, InvalidDataError, "num_fewshot=-1 must be at least 0"),
    ],
)
def test_what_cannot_be_run_is_refused(llama, tokenizer, tasks, options, error, message):
    with pytest.raises(error, match=message):
        run_tasks(llama, tokenizer, tasks, **options)


def test_data_that_cannot_be_had(llama, tokenizer, tmp_path, definition):
    with pytest.raises(LoadError, match=r"No items of task 'hellaswag'.*hellaswag.jsonl"):
        run_tasks(llama, tokenizer, ["hellaswag"], tmp_path)
    with pytest.raises(InvalidDataError, match="'mmlu' is a group of tasks"):
        run_tasks(llama, tokenizer, ["mmlu"], tmp_path)
    write_rows(tmp_path / "arc_easy.jsonl", [{"prompt": "the cat", "reference": "sat"}])
    with pytest.raises(LoadError, match=r"'arc_easy' from folder .*UndefinedError: 'question'"):
        run_tasks(llama, tokenizer, ["arc_easy"], tmp_path)
    with pytest.raises(LoadError, match=r"Cannot load task 'sciq': .*Without a network"):
        run_tasks(llama, tokenizer, ["sciq"])
    (tmp_path / "pick.jsonl").unlink()
    with pytest.raises(LoadError, match=r"'pick'.*pick.jsonl"):
        run_tasks(llama, tokenizer, [definition])
    with pytest.raises(LoadError, match="without 'task'"):
        run_tasks(llama, tokenizer, [{"dataset_path": "json"}])


def test_tasks_that_do_not_fit(llama, tokenizer, definition, tmp_path):
    long = {"until": ["\n"], "do_sample": False, "max_gen_toks": POSITIONS}
    with pytest.raises(InvalidDataError, match=r"\(say\).*tokens to generate \(128\).*takes 128"):
        run_tasks(llama, tokenizer, [answering(tmp_path, generation_kwargs=long)])
    with pytest.raises(InvalidDataError, match=r"\(pick\)"):
        run_tasks(llama, tokenizer, [{**definition, "fewshot_split": "test"}], num_fewshot=24)
    metrics = [{"metric": "word_perplexity"}]
    text = answering(tmp_path, "loglikelihood_rolling", metric_list=metrics, filter_list=None)
    with pytest.raises(InvalidDataError, match=r"'say' has no score in \[0, 1\].*word_perplexity"):
        run_tasks(llama, tokenizer, [text])


def test_every_backend_takes_its_own_data(llama, tokenizer, items, definition, tmp_path):
    with pytest.raises(UnknownNameError, match=r"backend 'lm_eval'. Did you mean 'lm-eval'"):
        HolisticEvaluator(llama, tokenizer, backend="lm_eval")
    for data in (None, tmp_path):
        with pytest.raises(InvalidDataError, match="must be a list of items"):
            HolisticEvaluator(llama, tokenizer).run_benchmark(data)
    theirs = HolisticEvaluator(llama, tokenizer, tasks=[definition], backend="lm-eval")
    with pytest.raises(InvalidDataError, match="has the items of its tasks"):
        theirs.run_benchmark(items)


def test_settings_reach_lm_eval(llama, tokenizer, arc):
    settings = {"limit": 5, "num_fewshot": 1, "seed": 3}
    evaluator = HolisticEvaluator(
        llama, tokenizer, tasks=["arc_easy"], backend="lm-eval", settings=settings
    )
    evaluator.run_benchmark(arc[0])
    found = evaluator.task_results["arc_easy"].settings
    assert {name: found[name] for name in settings} == settings
    assert evaluator.counts == {"arc_easy": 5}


def test_without_lm_eval(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llm_pruner\[eval\]'"):
        run_tasks(llama, tokenizer, ["arc_easy"])


def test_a_process_that_gets_no_results(llama, tokenizer, definition, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ProcessGroupError, match="first process"):
        run_tasks(llama, tokenizer, [definition], limit=2)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no users') }}", "{{ 1 / 0 }}", "{% if %}"]
)
def test_a_chat_template_that_fails_is_named(llama, definition, template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(LoadError, match="The chat template of the tokenizer fails"):
        run_tasks(llama, tokenizer, [definition], apply_chat_template=True)


def test_a_chat_template_is_rendered_as_lm_eval_does(llama, definition):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "cat {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}mat: {% endif %}"
    )
    found = run_tasks(llama, tokenizer, [definition], apply_chat_template=True, limit=4)["pick"]
    lm = HFLM(pretrained=llama, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
    direct = simple_evaluate(
        lm,
        tasks=[definition],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        limit=4,
        bootstrap_iters=0,
    )
    assert found.means["acc"] == direct["results"]["pick"]["acc,none"]
    samples = sorted(direct["samples"]["pick"], key=lambda sample: sample["doc_id"])
    assert found.scores["acc"] == [sample["acc"] for sample in samples]


def right_chances(model, tokenizer, rows):
    """The probability of the right answer among the choices, from losses of choices."""
    items = [
        {
            "prompt": row["question"],
            "choices": row["choices"]["text"],
            "reference": row["choices"]["text"]["ABCD".index(row["answerKey"])],
        }
        for row in rows
    ]
    found = []
    for item, losses in zip(items, choice_losses(model, tokenizer, items, 4), strict=True):
        chances = [math.exp(-loss) for loss in losses]
        found.append(chances[item["choices"].index(item["reference"])] / sum(chances))
    return found


def test_items_of_tasks_are_scored_alone_as_in_the_whole_task(arc, items, tmp_path):
    model, tokenizer = tiny_llama(), word_tokenizer()
    tasks = LmEvalTasks([str(arc[0] / "arc_easy.jsonl")])
    whole = run_tasks(model, tokenizer, ["arc_easy"], arc[0])["arc_easy"]
    assert tasks.results(model, tokenizer)["arc_easy"].scores == whole.scores
    drawn = random.Random(1).sample(tasks.items, 7)
    rows = [arc[1][item["doc"]] for item in drawn]
    assert tasks(model, tokenizer, drawn) == pytest.approx(right_chances(model, tokenizer, rows))
    assert [item["reference"] for item in tasks.items] == [
        row["choices"]["text"]["ABCD".index(row["answerKey"])] for row in arc[1]
    ]
    few = LmEvalTasks([str(arc[0] / "arc_easy.jsonl")], limit=5)
    assert len(few.items) == 5
    assert repr(few) != repr(tasks)


def test_layers_are_chosen_by_the_scores_of_a_task(arc):
    from llm_pruner import get_strategy, register_objective
    from llm_pruner.search.objectives import OBJECTIVES

    model, tokenizer = tiny_llama(), word_tokenizer()
    tasks = LmEvalTasks([str(arc[0] / "arc_easy.jsonl")])
    register_objective("arc of this test")(tasks)
    try:
        pruner = get_strategy("ablation")(model, tokenizer, objective="arc of this test")
        scores = pruner.compute_layer_scores(tasks.items)
    finally:
        del OBJECTIVES["arc of this test"]
    full = fmean(right_chances(model, tokenizer, arc[1]))
    for layer in (2, 5):
        cut = fmean(right_chances(pruner.layers.remove([layer]), tokenizer, arc[1]))
        assert scores[layer] == pytest.approx((cut - full) / full)


MUTUAL = {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}
CHOOSING = {  # what differs from `definition`
    "index": {},
    "text": {"doc_to_target": "{{options[gold]}}"},
    "contexts": {"doc_to_text": "gold", "doc_to_choice": "options", "doc_to_target": "text"},
    "without the question, too": {"metric_list": [MUTUAL]},
}


@pytest.mark.parametrize("kind", CHOOSING)
def test_the_chance_of_a_choice_is_the_one_that_lm_eval_has_for_its_brier_score(
    kind, llama, tokenizer, definition, tmp_path
):
    brier = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}
    task = {**definition, **CHOOSING[kind]}
    task["metric_list"] = [*task["metric_list"], brier]
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "two.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pick.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "two.jsonl", [row for row in rows if len(row["options"]) == 3])
    (tmp_path / "pick.yaml").write_text(json.dumps(task))
    tasks = LmEvalTasks([str(tmp_path / "pick.yaml")])
    found = lm_eval_alone(llama, tokenizer, {**task, "metric_list": [brier]}, bootstrap_iters=0)
    theirs = []
    for sample in sorted(found["samples"]["pick"], key=lambda sample: sample["doc_id"]):
        gold, chances = sample["brier_score"]
        theirs.append(chances[gold])
    assert len(theirs) == 8
    assert tasks(llama, tokenizer, tasks.items) == pytest.approx(theirs, abs=1e-6)


def test_other_tasks_are_scored_by_their_first_metric(llama, tokenizer, tmp_path):
    task = answering(tmp_path)
    (tmp_path / "say.yaml").write_text(json.dumps(task))
    tasks = LmEvalTasks([str(tmp_path / "say.yaml")])
    found = run_tasks(llama, tokenizer, [task])["say"]
    assert tasks(llama, tokenizer, tasks.items[1:4]) == found.item_scores[1:4]
    assert found.likelihoods == []

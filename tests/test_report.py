"""The report: tables, spread over seeds, repeated seeds, published figures, plots, command line."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from user_llm.evals.measured import Measured
from user_llm.report import __main__ as command_line
from user_llm.report import plots
from user_llm.report.build import write_report
from user_llm.report.published import PUBLISHED


@pytest.fixture
def painted():
    """A test that requests this fixture looks at real pictures."""


@pytest.fixture(autouse=True)
def unpainted(request, monkeypatch):
    """All other tests put plots together but do not paint them, which takes most of a report's time. Each picture is a number."""
    if "painted" not in request.fixturenames:
        numbers = itertools.count()
        monkeypatch.setattr(plots, "_png", lambda figure: b"%d" % next(numbers))


def values_of_targets():
    """Return what 30 targets had: recall@10 0.4 of the 10 after 0 to 10 events, 0.6 of the 20 after more than 500."""
    hits = np.repeat([1.0, 0.0, 1.0, 0.0], [4, 6, 12, 8])
    numbers = {
        "history_length": np.repeat([0, 10, 501, 9000], [5, 5, 10, 10]),
        "item_popularity": np.repeat([4, 10], 15),
        "boundary_tie": np.repeat([1, 0], [5, 25]),
    }
    metrics = {"recall@10": hits, "recall@10/unseen": np.ones(30), "ndcg@10": hits / 2}
    return Measured(np.arange(30), np.arange(30), metrics, numbers)


def make_run(directory, *, seed=0, dataset="toy", values=None, split="leave_last_out", width=8):
    """Write a finished run; `values` maps methods to recall@10."""
    phase = directory / "user_llm"
    phase.mkdir(parents=True)
    values = values or {"popularity": 0.1, "user_llm": 0.5}
    facts = {"dataset": dataset, "task": "next_item", "seed": seed, "split": split, "n": 30}
    rows = [
        {**facts, "method": method, "metric": metric, "value": value * scale, "config_hash": "abc"}
        for method, value in values.items()
        for metric, scale in (("mrr", 0.3), ("recall@10", 1), ("recall@10/unseen", 1.1))
    ]
    config = {
        "config_hash": "abc",
        "command": ["python", "-m", "user_llm.main", "--config=a b.py"],
        "versions": {"jax": "0.10.2"},
        "config": {"seed": seed, "width": width},
    }
    metrics = [
        {"step": 0, "kind": "eval", "recall@10": 0.0},
        {"step": 10, "kind": "train", "loss": 3.0, "gate/0": 0.01, "gate/1": -0.02},
        {"step": 20, "kind": "train", "loss": None, "gate/0": 0.02, "gate/1": -0.03},
        {"step": 20, "kind": "eval", "recall@10": 0.5},
    ]
    (directory / "results.json").write_text(json.dumps(rows))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "audit.json").write_text(json.dumps({"tie_share": 0.25, "users": 30}))
    (phase / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    sample = {"task": "next_item", "user": 7, "history": ["Emma", "Up"], "prompt": "Next:", "wanted": "A *b*"}
    answers = ({"method": "user_llm", "answer": "X; Y", "attended": [["Emma", 1, 0.625]]},
               {"method": "text_prompt_10", "answer": "<b>", "attended": []})  # fmt: skip
    (phase / "samples.json").write_text(json.dumps([sample | answer for answer in answers]))
    values_of_targets().save(epath.Path(phase) / "values", "next_item", "user_llm")
    return directory


def test_one_run(painted, tmp_path):
    path = write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.md"
    report = path.read_text()
    for line in (
        "## toy: next_item (leave_last_out)",
        "| method | recall@10 | mrr | n | seeds |",
        "| user_llm | 0.5000 | 0.1500 | 30 | 0 |",
        "| user_llm | 0.5500 | 30 | 0 |",
        "`run`: config `abc`, seed `0`, jax `0.10.2`",
        "python -m user_llm.main '--config=a b.py'",
        "| tie_share | 0.2500 |",
        "| users | 30 |",
        "| method | 0-10 | 501+ |",
        "| user_llm | 0.4000 (10) | 0.6000 (20) |",
        "| method | 4-10 |",
        "| user_llm | 0.5333 (30) |",
        "| user_llm | tied | 5 | 0.8000 | 1.0000 | 0.4000 |",
        "| user_llm | untied | 25 | 0.4800 | 1.0000 | 0.2400 |",
        "### toy: next_item, user 7",
        r"Wanted: A \*b\*. Latest events, newest first: Emma; Up.",
        "| user_llm | X; Y | Emma (1, 0.62) |",
        r"| text_prompt_10 | \<b\> |  |",
    ):
        assert line in report.splitlines(), line
    assert "±" not in report
    assert report.index("Nothing filtered") < report.index("History removed")
    for plot in ("loss.png", "gates.png", "history_length.png", "item_popularity.png"):
        assert f"({plot})" in report
        assert (path.parent / plot).read_bytes().startswith(b"\x89PNG")


def test_seeds_give_mean_and_sample_spread(tmp_path):
    values = (0.4, 0.5, 0.9)
    runs = [
        make_run(tmp_path / f"s{seed}", seed=seed, values={"encoder": value, "user_llm": 0.5})
        for seed, value in enumerate(values)
    ]
    report = write_report(*runs, out=tmp_path / "all").read_text()
    # Mean 0.6, sample standard deviation sqrt((0.04 + 0.01 + 0.09) / 2).
    assert "| encoder | 0.6000 ± 0.2646 | 0.1800 ± 0.0794 | 30 | 0, 1, 2 |" in report
    assert "| user_llm | 0.4000 (30) | 0.6000 (60) |" in report
    assert not (tmp_path / "s0" / "report.md").exists()
    assert (tmp_path / "all" / "loss.png").exists()


def test_a_repeated_seed_counts_once_and_is_told(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    report = write_report(*runs, runs[0]).read_text()
    assert "| user_llm | 0.5000 | 0.1500 | 30 | 0 |" in report
    assert "±" not in report
    assert f"`{runs[1]}` repeats 6 rows of `{runs[0]}` (same seed): counted once." in report
    assert "| user_llm | 0.4000 (10) | 0.6000 (20) |" in report and "(60)" not in report


def test_a_baseline_shared_by_two_runs_counts_once(tmp_path):
    first = make_run(tmp_path / "a", values={"popularity": 0.1, "encoder": 0.2})
    second = make_run(tmp_path / "b", values={"popularity": 0.1, "user_llm": 0.3})
    report = write_report(first, second).read_text()
    for method, value in (("popularity", 0.1), ("encoder", 0.2), ("user_llm", 0.3)):
        assert f"| {method} | {value:.4f} | {value * 0.3:.4f} | 30 | 0 |" in report
    assert "repeats 3 rows" in report


def test_one_seed_with_two_values_is_refused(tmp_path):
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", values={"popularity": 0.1, "user_llm": 0.6})
    (first / "report.md").write_text("earlier")
    with pytest.raises(ValueError, match=r"differ for seed 0 in user_llm mrr .* one run per seed"):
        write_report(first, second)
    assert (first / "report.md").read_text() == "earlier"


@pytest.mark.parametrize(
    ("dataset", "split", "shown"),
    [
        ("ml-20m", "leave_last_out", True),
        ("ml-1m", "leave_last_out", True),
        ("ml-20m", "global_time", False),
        ("ml-latest-small", "leave_last_out", False),
        ("toy", "leave_last_out", False),
    ],
)
def test_published_figures_only_beside_their_own_dataset(tmp_path, dataset, split, shown):
    report = write_report(make_run(tmp_path / "run", dataset=dataset, split=split)).read_text()
    assert ("Published on" in report) == shown
    assert ("HSTU-large" in report) == shown
    assert ("0.1540" in report) == (dataset == "ml-20m" and shown)  # User-LLM as SeqLLM cites it.


def test_every_published_figure_has_its_source():
    for header, rows in PUBLISHED.values():
        for row in rows:
            assert len(row) == len(header)
            assert "arXiv" in row[-1] or "github.com" in row[-1]


def test_published_figures_stand_beside_their_own_task(tmp_path):
    run = make_run(tmp_path / "run", dataset="ml-20m")
    rows = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps([row | {"task": "favorite", "metric": "accuracy"} for row in rows[:1]]))
    report = write_report(run).read_text()
    assert "| User-LLM | 0.7870 |" in report and "HSTU" not in report and "0.1540" not in report


COSTS = {
    "facts": {"size": "small", "command": "python launch/benchmark_cost.py --rounds=3"},
    "rows": [
        {
            "method": method, "events": events, "serving": serving, "prompt_tokens": 5, "flops_formula": flops, "flops_hlo": hlo,
            "flops_ratio": 2e9 / flops, "prefill_ratio": 3.0, "decode_ratio": None, "state_bytes": 8192,
        }
        for events in (50, 200)
        for method, serving, flops, hlo in (("user_llm", "user_kv_stored", 1e6, 1.01e6), ("text_prompt_all", "recomputed", 2e9, None))
    ],
}  # fmt: skip


def test_costs_beside_results_and_alone(painted, tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COSTS))
    run = make_run(tmp_path / "run")
    for workdirs in ((run,), ()):
        report = write_report(*workdirs, costs=path, out=tmp_path / "out").read_text()
        assert "python launch/benchmark_cost.py --rounds=3" in report and "![FLOPs" in report
        assert "| 200 | user_llm | user_kv_stored | 5 | 1.0 | 1.010 | 2,000.0 | 3.0 |  | 8,192 |" in report
        assert "| 50 | text_prompt_all | recomputed | 5 | 2,000.0 |  | 1.0 | 3.0 |  | 8,192 |" in report
        assert ("## Runs" in report) == bool(workdirs)
        assert (tmp_path / "out" / "cost.png").read_bytes().startswith(b"\x89PNG")
    path.write_text('{"facts": {}}')
    with pytest.raises(ValueError, match="is not what launch/benchmark_cost.py writes"):
        write_report(run, costs=path)
    with pytest.raises(ValueError, match="Nothing to report"):
        write_report()


@pytest.mark.parametrize("width", [8, 16])
def test_runs_of_different_configs_are_told(tmp_path, width):
    first = make_run(tmp_path / "a", seed=0)
    second = make_run(tmp_path / "b", seed=1, width=width)
    report = write_report(first, second).read_text()
    assert ("differ in more than the seed" in report) == (width != 8)


def test_datasets_are_not_pooled(tmp_path):
    runs = [make_run(tmp_path / name, dataset=name) for name in ("x", "y")]
    report = write_report(*runs).read_text()
    assert "## x: next_item" in report and "## y: next_item" in report
    assert "| x: user_llm | 0.4000 (10) | 0.6000 (20) |" in report
    assert report.split("## y: next_item")[1].split("\n\n")[1] == "Of `y`."


def test_results_alone_are_enough(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "user_llm")
    for name in ("config.json", "audit.json"):
        (run / name).unlink()
    report = write_report(run).read_text()
    assert "| user_llm | 0.5000" in report
    assert set(re.findall(r"\w+\.png", report)) == {"answer.png"} and "## Data audit" not in report


def test_a_run_without_gates_has_no_gate_plot(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "user_llm" / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    assert "gates.png" not in write_report(run).read_text()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no results.json"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "results.json").write_text('[{"dataset": "toy", "task": "next_item"}]')
    with pytest.raises(ValueError, match="row 1: no 'method'"):
        write_report(run)
    (run / "results.json").write_text('[{"dataset":\n')
    with pytest.raises(ValueError, match=r"results\.json, line 2: not JSON"):
        write_report(run)


@pytest.mark.slow
def test_command_line(tmp_path):
    runs = [str(make_run(tmp_path / f"s{seed}", seed=seed)) for seed in (0, 1)]
    command = [sys.executable, "-m", "user_llm.report", *runs, f"--out={tmp_path / 'all'}"]
    subprocess.run(command, check=True, capture_output=True)
    assert "| user_llm | 0.5000 ± 0.0000" in (tmp_path / "all" / "report.md").read_text()


def test_command_line_fails_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line.flags, "FLAGS", SimpleNamespace(out=None, cost="", reference="", metric=""))
    with pytest.raises(SystemExit, match="^error: .* holds no results.json") as stop:
        command_line.main(["report", str(tmp_path)])
    assert stop.value.__suppress_context__


def with_values(directory, seed, methods, metric="recall@10", task="next_item"):
    """Give a run the values of its targets; `methods` maps to (users, values)."""
    rows = json.loads((directory / "results.json").read_text())
    for method, (users, values) in methods.items():
        measured = Measured(np.array(users), np.array(users) + 5, {metric: np.array(values, float)})
        measured.save(epath.Path(directory) / "user_llm" / "values", task, method)
        rows.append({
            "dataset": "toy", "task": task, "method": method, "metric": metric, "value": float(np.mean(values)), "n": len(users),
            "seed": seed, "split": "leave_last_out", "config_hash": "abc",
        })  # fmt: skip
    (directory / "results.json").write_text(json.dumps(rows))
    return directory


def test_methods_are_compared_on_the_same_users_of_all_seeds(tmp_path):
    runs = []
    for seed in (0, 1):
        methods = {"encoder": ([1, 2], [0, 1]), "user_llm": ([1, 2], [seed, 1]), "user_llm/generate": ([1], [1])}
        if seed == 1:
            methods["user_llm_lora"] = ([1, 2], [0, 0])
        runs.append(with_values(make_run(tmp_path / f"s{seed}", seed=seed, values={"popularity": 0.1}), seed, methods))
    report = write_report(*runs, out=tmp_path / "out").read_text()
    assert "## toy: next_item, compared" in report
    assert "| method | recall@10 | 95% | against user_llm | 95% | n | seeds |" in report
    # Of two users the first has a mean of 0.5 over seeds, the second of 1.
    assert "| user_llm | 0.7500 | 0.5000 to 1.0000 |  |  | 4 | 0, 1 |" in report
    assert "| encoder | 0.5000 | 0.0000 to 1.0000 | -0.2500 | -0.5000 to 0.0000 | 4 | 0, 1 |" in report
    # On the one user that it was measured with, for whom the reference has 0 and 1.
    assert "| user_llm/generate † | 1.0000 | 1.0000 to 1.0000 | +0.5000 | 0.5000 to 0.5000 | 2 | 0, 1 |" in report
    assert "† Not measured on all targets of user_llm: value and difference are of those that both have." in report
    # Against the one seed that it shares.
    assert "| user_llm_lora † | 0.0000 | 0.0000 to 0.0000 | -1.0000 | -1.0000 to -1.0000 | 2 | 1 |" in report


def test_the_reference_and_the_metric_can_be_chosen(tmp_path):
    """By hand: written titles are of user 2 alone, who is a hit for all; user 3, whom nobody else has, is left out."""
    methods = {"encoder": ([1, 2], [0, 1]), "user_llm": ([1, 2], [1, 1]), "user_llm/generate": ([2], [1]), "apart": ([3], [1])}
    run = with_values(make_run(tmp_path / "run", values={"popularity": 0.1}), 0, methods)
    report = write_report(run, reference="encoder").read_text()
    assert "| method | recall@10 | 95% | against encoder | 95% | n | seeds |" in report
    assert "| user_llm | 1.0000 | 1.0000 to 1.0000 | +0.5000 | 0.0000 to 1.0000 | 2 | 0 |" in report
    assert "Measured on other users and left out: apart." in report
    report = write_report(run, reference="user_llm/generate").read_text()
    assert "| encoder | 1.0000 | 1.0000 to 1.0000 | 0.0000 | 0.0000 to 0.0000 | 1 | 0 |" in report.replace("+0.0000", "0.0000")
    run = with_values(run, 0, {"encoder": ([1, 2], [0, 1]), "user_llm": ([1, 2], [0.5, 1])}, metric="ndcg@10")
    assert "| user_llm | 0.7500 |" not in write_report(run, out=tmp_path / "first").read_text()
    assert (
        "| method | ndcg@10 | 95% | against user_llm |" in write_report(run, metric="ndcg@10", out=tmp_path / "out").read_text()
    )


@pytest.mark.parametrize(("chosen", "named"), [({"reference": "encodr"}, "reference"), ({"metric": "recall"}, "metric")])
def test_a_reference_or_metric_that_no_run_has_is_refused_with_those_there_are(tmp_path, chosen, named):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"No run has the {named} .*: choose one of (popularity, user_llm|mrr, recall@10)"):
        write_report(run, **chosen)


def test_a_reference_without_values_of_targets_is_refused(tmp_path):
    run = with_values(make_run(tmp_path / "run"), 0, {"encoder": ([1, 2], [0, 1])})
    with pytest.raises(ValueError, match="No run has popularity's values of single targets by recall@10: choose another"):
        write_report(run, reference="popularity")


def test_targets_that_occur_twice_are_compared_one_by_one(tmp_path):
    """By hand: two targets of user 1 at one position, of which the method has both and then user 2's."""
    run = make_run(tmp_path / "run", values={"popularity": 0.1})
    run = with_values(run, 0, {"user_llm": ([1, 1, 2], [1, 0, 1]), "encoder": ([2, 1, 1], [0, 1, 1])})
    report = write_report(run).read_text()
    assert "| user_llm | 0.6667 |" in report and re.search(
        r"\| encoder \| 0.6667 \| .* \| [+]0.0000 \| .* \| 3 \| 0 \|", report
    )


def test_without_the_default_method_the_others_are_compared_with_the_llm_that_ranks_by_itself(tmp_path):
    methods = {name: ([1, 2], [0, 1]) for name in ("encoder", "user_llm_alone", "user_llm_lora")}
    run = with_values(make_run(tmp_path / "run", values={"popularity": 0.1}), 0, methods)
    assert (
        "| method | recall@10 | 95% | against user_llm_alone | 95% | n |" in write_report(run, out=tmp_path / "out").read_text()
    )


def test_one_method_alone_is_compared_with_nothing(tmp_path):
    run = with_values(make_run(tmp_path / "run"), 0, {"counting": ([1, 2], [1, 0])}, metric="accuracy", task="favorite")
    assert "compared" not in write_report(run).read_text()


def test_the_page_holds_all_that_it_shows(tmp_path):
    run = make_run(tmp_path / "run")
    page = write_report(run).with_suffix(".html").read_text()
    assert "<td>user_llm</td>" in page and "<h2>toy: next_item (leave_last_out)</h2>" in page
    images = re.findall(r'src="([^"]*)"', page)
    assert len(images) == 5 and all(image.startswith("data:image/png;base64,") for image in images)
    shown = [base64.b64decode(image.partition(",")[2]) for image in images[:2]]
    assert shown == [(run / name).read_bytes() for name in ("answer.png", "history_length.png")]
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_what_a_run_is_called_is_text_and_not_html(tmp_path):
    page = write_report(make_run(tmp_path / "run", dataset="<script>x</script>")).with_suffix(".html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_report_opens_with_the_answer_and_ends_with_hashes(tmp_path):
    """By hand: of two users the reference hits both, the encoder none; written answers are measured on one user alone."""
    methods = {"encoder": ([1, 2], [0, 0]), "user_llm": ([1, 2], [1, 1]), "user_llm/generate": ([1], [1])}
    run = with_values(make_run(tmp_path / "run", values={"popularity": 0.1}), 0, methods)
    parts = write_report(run).read_text().split("\n\n")
    assert parts[:3] == [
        "# Report",
        "On toy (next_item), user_llm has the highest recall@10 of 2 methods: 1.0000 (95% interval 1.0000 to 1.0000); the next, "
        "encoder, has 0.0000. The difference is 1.0000 (1.0000 to 1.0000).",
        "![methods by their first metric, with intervals](answer.png)",
    ]
    assert parts[3].startswith("† hollow: not measured on all targets")
    assert [part for part in parts if part.startswith("## ")] == [
        "## toy: next_item (leave_last_out)", "## toy: next_item, compared", "## Samples", "## Data audit", "## Training", "## Runs",
    ]  # fmt: skip
    table = next(part for part in parts if part.startswith("| method | recall@10 | mrr"))
    assert "| user_llm/generate † | 1.0000" in table and "| user_llm | 1.0000" in table


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (
            {"user_llm": ([1, 2], [1, 0]), "encoder": ([1, 2], [0, 1])},
            "the next, encoder, has 0.5000. The difference is 0.0000 (-1.0000 to 1.0000), which chance may explain.",
        ),
        (
            {"user_llm": ([1, 2], [0, 0]), "encoder": ([1, 2], [1, 1])},
            "encoder has the highest recall@10 of 2 methods: 1.0000 (95% interval 1.0000 to 1.0000); user_llm has 0.0000. "
            "The difference is 1.0000 (1.0000 to 1.0000).",
        ),
        ({"encoder": ([1, 2], [1, 0])}, "On toy (next_item), encoder has recall@10 0.5000 (95% interval 0.0000 to 1.0000)."),
    ],
)
def test_the_answer_says_what_chance_may_explain_and_who_is_best(tmp_path, methods, sentence):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "user_llm")
    (run / "results.json").write_text("[]")
    assert sentence in write_report(with_values(run, 0, methods)).read_text()


@pytest.mark.parametrize("metric", ["perplexity", "perplexity/with_user"])
def test_less_is_better_for_perplexity(tmp_path, metric):
    run = make_run(tmp_path / "run", values={"llm": 30.0, "user_llm": 20.0})
    rows = [row | {"metric": metric, "task": "general_text"} for row in json.loads((run / "results.json").read_text())[1::3]]
    (run / "results.json").write_text(json.dumps(rows))
    assert (
        f"user_llm has the lowest {metric} of 2 methods: 20.0000; the next, llm, has 30.0000." in write_report(run).read_text()
    )


def test_targets_seen_have_a_column_and_a_plot_where_a_run_says_so(painted, tmp_path):
    directory = make_run(tmp_path / "run", values={"popularity": 0.1, "encoder": 0.4, "user_llm": 0.5})
    assert "targets seen" not in write_report(directory).read_text() and not (directory / "learning.png").exists()
    rows, seen = json.loads((directory / "results.json").read_text()), {"encoder": 12_000, "user_llm": 1_234_567}
    rows = [row | ({"targets_seen": seen[row["method"]]} if row["method"] in seen else {}) for row in rows]
    (directory / "results.json").write_text(json.dumps(rows))
    lines = [{"step": step, "kind": "eval", "recall@10": 0.1 * step, "targets_seen": 100 * step} for step in range(3)]
    (directory / "user_llm" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = write_report(directory).read_text()
    for line in (
        "| method | recall@10 | mrr | n | seeds | training targets seen |",
        "| popularity | 0.1000 | 0.0300 | 30 | 0 |  |",
        "| encoder | 0.4000 | 0.1200 | 30 | 0 | 12,000 |",
        "| user_llm | 0.5000 | 0.1500 | 30 | 0 | 1,234,567 |",
        "| user_llm | 0.5500 | 30 | 0 |",
    ):
        assert line in report.splitlines(), line
    assert "(learning.png)" in report and (directory / "learning.png").read_bytes().startswith(b"\x89PNG")

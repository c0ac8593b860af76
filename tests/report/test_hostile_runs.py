"""A run's folder is data: whatever stands in it is shown as text or refused in one sentence, and nothing outside is read or written."""

import html
import io
import json
import os
import re
import resource
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

from user_llm.common.printable import printable
from user_llm.report.build import write_report
from user_llm.report.markdown import code, command, say, table, text

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_report import make_run, painted, unpainted, with_values  # noqa: F401 (two are fixtures)

SECRET = "the-secret-of-another-file"
HOSTILE = [
    "![x](../secret.txt)", "![x](/etc/passwd)", "![x](answer.png)", "[x](javascript:alert(1))", "<javascript:alert(1)>",
    "<img src=x onerror=alert(1)>", "</td></table><script>alert(1)</script>", "&lt;script&gt;", "a | b", "`a` ``b``", "```", "~~~",
    "# title", "- item", "1. item", "1) item", "---", "===", "> quote", "* item", "+ item", "_emphasis_", "__a__", "*a*", "~~a~~", "$x$",
    "\\", "\\|", "a\\", "$\\frac{", "$", "{}", "{0.__class__}", "{{ 7 * 7 }}", "%s", "https://example.org", "www.example.org",
    "x@example.org", "line\n\n# next", "\n| a | b |\n|---|---|", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b]8;;https://e\x1b\\link",
    "\u202etxt.exe\u202c", "\u2066a\u2069", "zero\u200bwidth", "\ud800", "\x00", "\x9b31m", "\u2028", "../../x", "/x", "..", "con.", "_x",
    "x" * 100_000, "Fr\u00e4ulein \u65e5\u672c \U0001f642",
]  # fmt: skip


def shown(markdown: str) -> tuple[set[str], str]:
    """Return the tags and the text of the HTML that GitHub's kind of Markdown gives."""
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    return set(re.findall(r"<(\w+)", page)), html.unescape(re.sub(r"<[^>]*>", "", page)).strip()


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_every_text_is_shown_as_it_reads(name):
    expected = printable(name)
    assert shown(text(name)) == ({"p"} if expected else set(), expected)
    assert shown(say("a {}", name)) == ({"p"}, f"a {expected}".strip())
    tags, inner = shown(code(name))
    assert tags == {"p", "code"} and inner == (expected or "-").replace("|", "\u2502")
    assert shown(command(name)) == ({"pre", "code"}, printable(name, 10_000))
    tags, inner = shown(table([name, "b"], [[name, 1.5]]))
    assert tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert (
        inner.split("\n") == [line for line in (expected, "b", "", "", "", "", "", "", expected, "1.5000")]
        or inner.count(expected) >= 2
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("\x1b[2J\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text\x1b]8;;https://x\x1b\\link", "textlink"),
        ("\x1b", ""),
        ("a\x1b[", "a"),
        ("\x1b]unended", "unended"),
        ("a\r\nb\tc\u2028d", "a b c d"),
        ("\u202eabc\u2066\ufeff\u200b\u00ad", "abc"),
        ("\u0646\u200c\u0627", "\u0646\u200c\u0627"),
        ("\x93quoted\x94 \x9b31m", "quoted 31m"),
        ("\ud800", "\ufffd"),
        ("x" * 2000, "x" * 999 + "…"),
    ],
)
def test_printable_leaves_what_people_read(value, expected):
    assert printable(value) == expected


@pytest.mark.parametrize(
    "name",
    [
        "</td><script>alert(1)</script>|$\\frac{\x1b[31m`",
        pytest.param("![x](../secret.txt)", marks=pytest.mark.slow),
        pytest.param("../../x\n# x", marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_hostile_names_are_text_in_the_report_and_write_nothing_elsewhere(painted, tmp_path, name):  # noqa: F811
    (tmp_path / "secret.txt").write_text(SECRET)
    names = {name: 0.25, **{other[:2000]: 0.5 for other in HOSTILE}}
    run = make_run(tmp_path / "place" / "run", values=names, dataset=name)
    rows = [row | {"task": name, "split": name, "config_hash": name} for row in json.loads((run / "results.json").read_text())]
    (run / "results.json").write_text(json.dumps([*rows, *(rows[0] | {"metric": other} for other in HOSTILE)]))
    (run / "audit.json").write_text(
        json.dumps({name: name, "nested": {name: [*HOSTILE]}} | {other: other for other in HOSTILE})
    )
    config = {"command": ["x", name], "versions": {other: other for other in HOSTILE}, "git": name, "config": {name: name}}
    (run / "config.json").write_text(json.dumps(config))
    sample = {"task": name, "method": name, "user": 1, "history": HOSTILE, "wanted": name, "answer": name}
    (run / "user_llm" / "samples.json").write_text(json.dumps([sample | {"attended": [[name, 1, 0.5]]}]))
    metrics = [{"step": 1, "kind": "train", "loss": 1.0, f"gate/{name}": 0.5}, {"step": 2, "kind": name, name: None}]
    (run / "user_llm" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    before = {path for path in tmp_path.rglob("*") if run not in path.parents}
    path = write_report(run)
    assert {path for path in tmp_path.rglob("*") if run not in path.parents} == before
    written = {"answer.png", "loss.png", "gates.png", "report.md", "report.html"}
    assert {found.name for found in run.iterdir() if found.is_file()} == written | {"results.json", "audit.json", "config.json"}
    report, page = path.read_text(), path.with_suffix(".html").read_text()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", report + page)
    assert SECRET not in page and "<script" not in page and len(re.findall("<img ", page)) == 3
    assert all(source.startswith("data:image/png;base64,") for source in re.findall('<img src="([^"]*)', page))
    assert all(printable(other) in html.unescape(page) for other in (name, *HOSTILE))


def test_only_pictures_of_the_report_are_embedded(tmp_path):
    """Even where Markdown got through: an image of another name is left out, and so is every link and tag."""
    from user_llm.report.markdown import Markdown
    from user_llm.report.page import write_page

    (tmp_path / "secret.png").write_text(SECRET)
    raw = Markdown(
        "![a](secret.png) ![b](mine.png) [c](https://example.org) <b>d</b> <https://example.org>\n\n<script>e</script>"
    )
    write_page(tmp_path / "page.html", raw, {"mine.png": b"mine"})
    page = (tmp_path / "page.html").read_text()
    assert re.findall('<img src="([^"]*)', page) == ["data:image/png;base64,bWluZQ=="]
    assert "<a " not in page and "<b>" not in page and "<script" not in page and "secret.png" not in page


def array_of(name, value):
    """Return an .npy of a zip member by hand, whose header may lie."""
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return name, file.getvalue()


def values_file(path, **changes):
    arrays = {"task": np.array("next_item"), "method": np.array("user_llm"), "users": np.arange(3), "positions": np.arange(3)}
    arrays |= {"recall@10": np.ones(3)} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            archive.writestr(f"{name}.npy", array_of(name, value)[1])


def lying_header(path):
    values_file(path)
    data = array_of("users", np.arange(3))[1].replace(b"(3,)", b"(3000000000000000,)")[:-24]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.npy", data)


def pickled(path):
    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "ran"),))

    values_file(path, users=np.array([Runs()], object))


def elsewhere(path):
    outside = next(folder for folder in path.parents if folder.name == "place").parent / "outside" / path.name
    outside.parent.mkdir()
    outside.write_bytes(path.read_bytes() if path.exists() else b"[]")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def change(key, value):
    """Return what puts a value into the first row of a file of rows, or into an object."""

    def edit(path):
        found = json.loads(path.read_text())
        (found[0] if isinstance(found, list) else found)[key] = value
        path.write_text(json.dumps(found))

    return edit


def write(content):
    return lambda path: path.write_bytes(content)


VALUES = "user_llm/values/next_item.user_llm.npz"
DEEP = b"[" * 100_000
FAULTS = [
    *(("results.json", change(key, value)) for key, value in [
        ("value", "0.5"), ("value", None), ("value", True), ("value", [1]), ("value", float("nan")), ("value", float("inf")),
        ("value", 10**400), ("n", 1.5), ("n", "3"), ("n", 2**80), ("seed", None), ("seed", {}), ("method", 5), ("method", None),
        ("dataset", ["x"]), ("metric", {}), ("split", 1), ("task", None), ("config_hash", 7),
    ]),
    *(("results.json", write(content)) for content in [
        b"", b"{}", b"null", b"5", b'"x"', b"[1]", b"[[]]", b"[{}]", DEEP, b"[" + b"1" * 10_000 + b"]", b"\xff\xfe", b"not json",
        b'[{"dataset": "toy"}]', b"\x00" * 100,
    ]),
    ("results.json", pipe), ("results.json", elsewhere),
    *((name, write(content)) for name in ("config.json", "audit.json") for content in (b"[]", b"5", DEEP, b"{", b"\xff")),
    *(("config.json", change(*pair)) for pair in [("command", "x"), ("command", [1]), ("versions", []), ("config", 3)]),
    ("config.json", elsewhere), ("audit.json", elsewhere), ("audit.json", pipe), ("audit.json", change("x", float("nan"))),
    *(("user_llm/samples.json", write(content)) for content in (b"{}", b"[{}]", b"[5]", DEEP, b"\xff")),
    *(("user_llm/samples.json", change(*pair)) for pair in [
        ("user", "7"), ("history", "Emma"), ("history", [1]), ("attended", [["Emma", 1]]), ("attended", [["Emma", 1, "x"]]),
        ("attended", {}), ("answer", None), ("method", []), ("wanted", 3),
    ]),
    ("user_llm/samples.json", elsewhere), ("user_llm/samples.json", pipe),
    *(("user_llm/metrics.jsonl", write(line + b'\n{"step": 2, "kind": "eval"}\n')) for line in (
        b"[]", b"5", b"{}", b'{"step": "1", "kind": "train"}', b'{"step": 1, "kind": 2}', b'{"step": 1, "kind": "train", "loss": "x"}',
        b'{"step": 1, "kind": "train", "loss": NaN}', b'{"step": 1, "kind": "train", "loss": 1e999}', DEEP, b"\xff",
    )),
    ("user_llm/metrics.jsonl", elsewhere), ("user_llm/metrics.jsonl", pipe),
    *((VALUES, lambda path, changes=changes: values_file(path, **changes)) for changes in (
        {"users": np.arange(2)}, {"users": np.array(3)}, {"users": np.ones((3, 1), int)}, {"users": np.array(["a", "b", "c"])},
        {"positions": np.ones(3)}, {"recall@10": np.array([0.0, np.nan, 1.0])}, {"recall@10": np.array([0.0, np.inf, 1.0])},
        {"recall@10": np.ones(2)}, {"recall@10": np.array([1j, 0, 0])}, {"task": np.array(5)}, {"method": np.array(["a", "b"])},
        {"number/history_length": np.ones(3)}, {"number/history_length": np.arange(2)}, {"users": np.zeros(0, int)},
    )),
    *((VALUES, write(content)) for content in (b"", b"PK\x05\x06" + b"\0" * 18, b"\x93NUMPY", array_of("x", np.ones(3))[1], b"\0" * 1000)),
    (VALUES, lying_header), (VALUES, pickled), (VALUES, elsewhere), (VALUES, pipe),
    (VALUES, lambda path: path.write_bytes(path.read_bytes()[:-60])),
]  # fmt: skip


@pytest.mark.parametrize(("file", "fault"), FAULTS, ids=range(len(FAULTS)))
def test_what_no_run_writes_is_one_sentence_with_the_file(tmp_path, file, fault):
    run = make_run(tmp_path / "place" / "run")
    (run / "report.md").write_text("earlier")
    fault(run / file)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as refused:
        write_report(run)
    sentence = str(refused.value)
    assert str(run / file) in sentence and sentence.endswith(".") and len(sentence) < 600 and "\n" not in sentence
    assert (run / "report.md").read_text() == "earlier" and not (run / "user_llm" / "values" / "ran").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB


def test_links_in_a_run_are_not_written_through(tmp_path):
    run = make_run(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.write_text("kept")
    names = ("report.md", "report.html", "answer.png", "loss.png")
    for name in [*names, *(f"{name}.tmp" for name in names)]:
        (run / name).symlink_to(outside)
    write_report(run)
    assert outside.read_text() == "kept" and not any((run / name).is_symlink() for name in names)


def test_methods_without_the_metrics_of_others_do_not_stop_the_report(tmp_path):
    run = with_values(make_run(tmp_path / "run"), 0, {"a": ([1, 2], [0, 1])}, metric="mrr")
    run = with_values(run, 0, {"b": ([1, 2], [0, 1])}, metric="odd/one")
    report = write_report(run).read_text()
    assert "| b |" in report and "| a |" in report and "odd" in report


@pytest.mark.slow
def test_more_phases_and_methods_than_a_plot_can_show(painted, tmp_path):  # noqa: F811
    run = make_run(tmp_path / "run", values={f"method {i}": i / 40 for i in range(40)})
    for i in range(14):
        (run / f"phase{i}").mkdir()
        (run / f"phase{i}" / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0, "gate/0": 0.5}\n')
    assert "| method 39 | " in write_report(run).read_text()

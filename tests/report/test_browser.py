"""The page in a real browser: headless Chromium, driven by selenium; skipped, with the reason, where one of them is missing."""

import json
import sys
from pathlib import Path

import pytest

from user_llm.report.build import write_report

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_hostile_runs import HOSTILE
from test_report import make_run

SECRET = "the-secret-of-another-file"
SCRIPTS = [
    "<script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "<svg onload=\"document.title='ran'\">",
    "</style><script>document.title='ran'</script>",
    "[x](javascript:document.title='ran')",
    "![x](secret.txt)",
    "<iframe src=secret.txt></iframe>",
    "<object data=secret.txt></object>",
    "<link rel=stylesheet href=secret.txt>",
    "<meta http-equiv=refresh content='0;url=secret.txt'>",
]


@pytest.mark.slow
def test_a_hostile_run_runs_nothing_and_shows_no_file(tmp_path, browser):
    (tmp_path / "run").mkdir()
    names = [*SCRIPTS, *HOSTILE[:-2]]
    run = make_run(tmp_path / "run" / "of", values={name: 0.5 for name in names}, dataset=SCRIPTS[0])
    (run / "secret.txt").write_text(SECRET)
    (run / "audit.json").write_text(json.dumps({name: name for name in names}))
    sample = {"task": SCRIPTS[1], "method": SCRIPTS[2], "user": 1, "history": names, "wanted": SCRIPTS[3], "answer": SCRIPTS[4]}
    (run / "user_llm" / "samples.json").write_text(json.dumps([sample | {"attended": [[SCRIPTS[5], 1, 0.5]]}]))
    (run / "config.json").write_text(json.dumps({"command": names, "git": SCRIPTS[6], "versions": {}, "config": {}}))
    page = write_report(run).with_suffix(".html")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "User-LLM report"
    assert browser.execute_script("return document.images.length") == 3
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 100)")
    elements = browser.execute_script("return [...new Set([...document.querySelectorAll('*')].map(e => e.localName))]")
    assert not {"script", "svg", "iframe", "object", "a", "base", "form"} & set(elements)
    # Only what the browser loaded of itself: the page.
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        )
        == 0
    )
    text = browser.execute_script("return document.body.innerText")
    assert SECRET not in text and all(name in text for name in SCRIPTS)


@pytest.mark.slow
def test_the_policy_holds_where_html_gets_through(tmp_path, browser):
    """The page's second line of defence: HTML put into a finished page neither runs nor loads anything, and the style still counts."""
    page = write_report(make_run(tmp_path / "run")).with_suffix(".html")
    (tmp_path / "run" / "secret.css").write_text("body { max-width: 1px; }")
    hostile = "<script>document.title='ran'</script><img src='loss.png' onerror=\"document.title='ran'\"><link rel=stylesheet href=secret.css>"
    page.write_text(page.read_text().replace("<h1>", f"{hostile}<h1>"))
    browser.get(page.as_uri())
    assert browser.title == "User-LLM report"
    assert browser.execute_script("return getComputedStyle(document.body).maxWidth") == "960px"
    assert browser.execute_script("return document.querySelector('img').naturalWidth") == 0
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refused) >= 3 and all("Content Security Policy" in message for message in refused)

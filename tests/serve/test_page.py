"""The page in a real browser, against a real server of a tiny model; skipped, with the reason, where there is no browser."""

import dataclasses
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_dataset, make_models

import user_llm
from user_llm.serve.app import make_app
from user_llm.serve.engine import Engine
from user_llm.serve.keys import Keys, add_key, read_keys
from user_llm.serve.limits import Limits
from user_llm.serve.metrics import Metrics
from user_llm.serve.state import State
from user_llm.serve.store import open_store

pytestmark = pytest.mark.slow
HOSTILE = ["<script>document.title='ran'</script>", "<img src=x onerror=\"document.title='ran'\">", '</ol><h1>Big</h1> & "so"']
SECONDS = 30  # that the page may take for anything


@dataclasses.dataclass
class Served:
    """A server in a thread, whose keys a test may set."""

    url: str
    state: State
    keys: list[Keys | None]


@pytest.fixture(scope="module")
def served(make_timelines, drawn, tmp_path_factory) -> Iterator[Served]:
    """A server of a tiny model whose titles hold markup. Each step of its decoder takes 20 ms, as long as a larger model's."""
    dataset = make_dataset(make_timelines)
    titles = ["", *HOSTILE, *dataset.catalogue.titles[1 + len(HOSTILE) :]]
    dataset = dataclasses.replace(dataset, catalogue=dataclasses.replace(dataset.catalogue, titles=titles))
    made = make_models(dataset, drawn, tmp_path_factory.mktemp("models"))("cross")
    limits, slow = Limits(rows=2, context=128, batch=2), lambda name, value: time.sleep(0.02 if name == "step" else 0)
    store = open_store(f"sqlite:{tmp_path_factory.mktemp('store')}/users.db")
    state = State("tiny", Engine(user_llm.load(made.directory), limits, slow), store, limits, Metrics())
    keys: list[Keys | None] = [None]
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(state, lambda: keys[0]), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    state.engine.wait()
    yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}/", state, keys)
    server.should_exit = True
    thread.join()


class Page:
    """The page as somebody uses it.

    Args:
      driver: the browser.
      url: of the server.
    """

    def __init__(self, driver: Any, url: str):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys as Key

        self.driver, self.key, self._chains = driver, Key, lambda: ActionChains(driver, duration=0)
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get(url)
        driver.execute_script("sessionStorage.clear()")
        driver.get(url)

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *given)

    def text(self, selector: str) -> str:
        return self.run("document.querySelector(arguments[0]).textContent", selector)

    def count(self, selector: str) -> int:
        return self.run("document.querySelectorAll(arguments[0]).length", selector)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys: str) -> None:
        self._chains().send_keys(*keys).perform()

    def tab_to(self, selector: str) -> None:
        """Press the tabulator until an element has the focus, which must be seen."""
        for _ in range(60):
            self.press(self.key.TAB)
            if self.run("document.activeElement.matches(arguments[0])", selector):
                assert self.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", selector
                return
        raise AssertionError(f"{selector} cannot be reached.")

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        end = time.monotonic() + SECONDS
        while not (found := holds()):
            assert time.monotonic() < end, f"{what}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def ready(self) -> None:
        self.until(lambda: self.text("#about").endswith("· ready") and self.count("#samples button"), "the page is ready")

    def chosen(self) -> str:
        """Wait until a user is shown with all that is known of the user, and return the id."""
        self.until(
            lambda: self.count("#history li") and self.count("#ranking tr") and self.count("#bars li"), "a user is shown"
        )
        return self.text("#name")

    def watch(self) -> None:
        """Note how long both answers are whenever they change, and where what is below them stands."""
        self.run(
            """(() => {
              window.seen = {no: [], yes: []};
              for (const [name, lengths] of Object.entries(window.seen)) {
                const text = document.querySelector(`[data-with=${name}] .text`);
                new MutationObserver(() => lengths.push([text.textContent.length, document.body.scrollHeight]))
                  .observe(text, {childList: true});
              }
            })()"""
        )

    def answered(self) -> None:
        self.until(lambda: self.run("document.getElementById('stop').disabled"), "both answers have ended")


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    """The page, opened anew. Whatever a test does, nothing but the server is asked, and no script of a title has run."""
    served.keys[0] = None
    yield (page := Page(browser, served.url))
    assert browser.title == "User-LLM"
    asked = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and all(url.startswith(served.url) for url in asked)
    assert not page.count("main img, main script, main h1")


def users(served: Served) -> int:
    return served.state.store.counts().users


def test_a_walk(page, served, browser):
    page.ready()
    assert page.text("#about").startswith("tiny · trained on toy, 9 items")
    page.click("#samples button")
    user = page.chosen()
    assert user.startswith("page-") and users(served) == 1
    assert page.run("[...document.querySelectorAll('#samples button')].map(button => button.ariaPressed)")[:2] == [
        "true",
        "false",
    ]
    titles = page.run("[...document.querySelectorAll('#history span:first-child')].map(span => span.textContent)")
    ranked = page.run("[...document.querySelectorAll('#ranking tr')].map(row => row.cells[1].textContent)")
    catalogue = served.state.engine.model.vocabulary.catalogue.titles[1:]
    assert set(titles) <= set(catalogue) and sorted(titles + ranked) == sorted(
        catalogue
    )  # the rest of the catalogue: unseen only
    page.click("#unseen")
    page.until(lambda: page.count("#ranking tr") == 9, "seen items are recommended")
    page.click("#k")
    page.press(page.key.BACKSPACE, page.key.BACKSPACE, "3", page.key.ENTER)
    page.until(lambda: page.count("#ranking tr") == 3, "three items are recommended")
    # Both answers grow while they are written, and nothing moves.
    page.watch()
    page.run("document.getElementById('temperature').value = 1")  # at 0, this model writes bytes that are no characters
    page.click("#go")
    page.answered()
    seen = page.run("window.seen")
    for name in ("no", "yes"):
        lengths = [length for length, _ in seen[name]]
        assert len(set(lengths)) > 5 and lengths == sorted(lengths), lengths
        assert len({height for _, height in seen[name]}) == 1
        assert page.text(f"[data-with={name}] .state") in ("ended", "cut off at the most tokens")
    assert page.text("[data-with=no] .text") != page.text("[data-with=yes] .text")
    # Which events were looked at: each with a bar, of which the first is the longest.
    widths = page.run("[...document.querySelectorAll('.bar > span')].map(bar => bar.getBoundingClientRect().width)")
    assert len(widths) == min(len(titles), 6) and widths[0] > 0 and widths == sorted(widths, reverse=True)
    page.click("#delete")
    page.until(lambda: page.text("#said") == f"{user} is deleted.", "the user is deleted")
    assert users(served) == 0 and not page.count("#ranking tr, #bars li, #history li")
    assert browser.get_log("browser") == []


def test_titles_stay_text(page, browser):
    page.ready()
    for part, title in zip(("SCRIPT", "onerror", "big"), HOSTILE, strict=True):
        page.click("#item")
        page.press(part)
        page.until(lambda title=title: page.text("#items") == title, title)
        page.press(page.key.ENTER)
        page.until(lambda title=title: page.count("#history li") and title in page.text("#history"), title)
    page.chosen()
    page.until(lambda: page.count("#bars li") == 3, "three events were looked at")
    assert all(title in page.text("#bars") for title in HOSTILE)
    page.click("#delete")
    page.until(lambda: page.text("#said").endswith("is deleted."), "the user is deleted")
    assert browser.get_log("browser") == []


def test_the_keyboard_alone(page, served):
    page.ready()
    page.tab_to("#samples button")
    page.press(page.key.ENTER)
    user = page.chosen()
    before = page.count("#history li")
    page.tab_to("#item")
    page.press("film")
    page.until(lambda: page.count("#items li") > 2, "items are found")
    page.press(page.key.ARROW_DOWN)
    second = page.text("#items li[aria-selected=true]")
    assert second == page.run(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).textContent"
    )
    page.press(page.key.ENTER)
    page.until(lambda: page.count("#history li") == before + 1, "an event was added")
    assert page.text("#history li span") == second and page.text("#name") == user
    assert page.run("document.activeElement.id") == "item"
    page.press("film")
    page.until(lambda: not page.run("document.getElementById('items').hidden"), "the list opens")
    page.press(page.key.ESCAPE)
    assert page.run("document.getElementById('items').hidden")
    page.run("document.getElementById('temperature').value = 1")
    page.run("document.getElementById('tokens').value = 100")
    page.tab_to("#question")
    page.press(page.key.ENTER)
    page.until(lambda: page.text("[data-with=yes] .text"), "the answer has begun")
    page.press(page.key.ESCAPE)
    page.answered()
    assert page.text("[data-with=yes] .state") == page.text("[data-with=no] .state") == "stopped"
    page.until(lambda: served.state.engine.writing == 0, "the rows are free")
    page.run("document.getElementById('name').scrollIntoView()")
    page.driver.execute_script("document.activeElement.blur()")
    page.tab_to("#delete")
    page.press(page.key.ENTER)
    page.until(lambda: page.text("#said") == f"{user} is deleted.", "the user is deleted")
    assert page.run("document.activeElement.matches('#samples button')") and users(served) == 0


ROWS = [
    {"user": "u", "item": "40", "rating": 3, "timestamp": 3600},
    {"user": "u", "item": "50", "rating": 4, "timestamp": 7200},
]
PASTED = {
    "a list": json.dumps(ROWS),
    "lines": "\n".join(map(json.dumps, ROWS)),
    "csv": 'user,item,"rating",timestamp\r\nu,40,3,3600\r\nu,"50",4,7200\r\n',
}


@pytest.mark.parametrize("form", PASTED)
def test_events_are_pasted(page, form, served):
    page.ready()
    paste(page, PASTED[form])
    user = page.chosen()
    assert page.run("[...document.querySelectorAll('#history li')].map(line => line.innerText.replace(/\\s+/g, ' '))") == [
        "Film 5 (2000) rating 4 · 1970-01-01 02:00", "Film 4 (2000) rating 3 · 1970-01-01 01:00",
    ]  # fmt: skip
    # The page deletes whom it has made when another is chosen, and restores whom it shows when it is loaded again.
    page.click("#samples button")
    page.until(lambda: page.text("#name") not in ("", user), "the sample is shown")
    page.chosen()
    assert users(served) == 1
    sample = page.text("#name")
    page.driver.refresh()
    assert page.chosen() == sample
    page.click("#delete")
    page.until(lambda: page.text("#said").endswith("is deleted."), "the user is deleted")
    assert users(served) == 0


def paste(page: Page, text: str) -> None:
    page.run("document.querySelector('details').open = true")
    page.run("document.getElementById('events').value = arguments[0]", text)
    page.click("#paste button")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1", "The JSON list cannot be read"),
        ("item,rating\n1", "Row 1 of the CSV has 1 fields, and its header 2."),
        ('a,b\n1,"2', "The CSV has a quote that does not end."),
        (
            json.dumps([ROWS[0], ROWS[1] | {"user": "v"}]),
            "These are events of 2 users by their column “user”: paste those of one.",
        ),
        (json.dumps([ROWS[0] | {"rating": 99}]), "Event 1: "),
        ("7", "A CSV has a header and at least one row below it."),
    ],
)
def test_bad_events_are_refused_in_a_sentence(page, text, sentence, served):
    page.ready()
    paste(page, text)
    page.until(lambda: page.text("#user > .error").startswith(sentence), sentence)
    assert users(served) == 0 and page.run("document.getElementById('events').value") == text


def test_some_events_are_refused(page, served):
    page.ready()
    paste(page, json.dumps([ROWS[0], ROWS[1] | {"rating": 99}]))
    page.until(lambda: page.text("#user > .error").startswith("1 of 2 events were refused. Event 2: "), "the reason is shown")
    assert page.count("#history li") == 1 and page.text("#said") == "1 stored."
    page.click("#delete")
    page.until(lambda: users(served) == 0, "the user is deleted")


def test_a_user_of_the_server_is_opened_and_deleted_only_when_asked_again(page, served):
    page.ready()
    page.click("#id")
    page.press("some one/ü", page.key.ENTER)
    page.until(lambda: page.text("#user > .error"), "there is no such user")
    page.run("fetch('/v1/users/u%201/events', {method: 'POST', body: arguments[0]})", json.dumps([ROWS[0] | {"user": "u 1"}]))
    page.until(lambda: users(served) == 1, "the user is stored")
    page.driver.execute_script("document.getElementById('id').value = ''")
    page.click("#id")
    page.press("u 1", page.key.ENTER)
    assert page.chosen() == "u 1"
    page.click("#samples button")
    page.until(lambda: page.text("#name").startswith("page-"), "the sample is shown")
    assert users(served) == 2  # a user whom the page has not made stays
    page.click("#id")
    page.press("u 1", page.key.ENTER)
    page.until(lambda: page.text("#name") == "u 1" and users(served) == 1, "the user is shown again")
    page.click("#delete")
    page.driver.switch_to.alert.dismiss()
    assert users(served) == 1
    page.click("#delete")
    page.driver.switch_to.alert.accept()
    page.until(lambda: users(served) == 0, "the user is deleted")


def test_keys(page, served, browser, tmp_path):
    key = add_key(tmp_path / "keys", "reader:read")
    writing = add_key(tmp_path / "keys", "writer:read,write")
    served.keys[0] = read_keys(tmp_path / "keys")
    browser.refresh()
    page.until(lambda: page.text("#about") == "This server answers those who have a key.", "a key is asked for")
    give(page, "wrong")
    page.until(lambda: page.text("#about").startswith("A key is needed"), "the key is wrong")
    give(page, key)
    page.ready()
    page.click("#samples button")
    page.until(lambda: page.text("#user > .error") == "This key does not have the scope 'write'.", "the key may only read")
    give(page, writing)
    page.ready()
    page.click("#samples button")
    page.chosen()
    page.click("#go")
    page.answered()
    assert page.text("[data-with=yes] .text") and not page.text("[data-with=yes] .error")
    assert page.run("[JSON.stringify(localStorage), document.cookie, location.search + location.hash]") == ["{}", "", ""]
    page.click("#delete")
    page.until(lambda: users(served) == 0, "the user is deleted")
    # What the browser says of itself about an answer of 401 or 403 is all that it says.
    assert all(entry["source"] == "network" for entry in browser.get_log("browser"))


def give(page: Page, key: str) -> None:
    page.click("#key")
    page.press(key, page.key.ENTER)


def test_errors_stand_beside_what_caused_them(page, served):
    page.ready()
    page.click("#go")
    page.until(lambda: page.text("[data-with=yes] .error") == "Choose a user first.", "there is no user")
    page.answered()
    assert page.text("[data-with=no] .text") and not page.text("[data-with=no] .error")
    page.run("document.getElementById('tokens').value = 4000")
    page.click("#go")
    page.until(lambda: "4000: at least 1 can be written" in page.text("[data-with=no] .error"), "the answer is too long")


def test_a_model_of_conversations(page, served, browser, monkeypatch):
    """Where the tokenizer has a chat template, the question is a message of a conversation."""
    tokenizer, asked = served.state.engine.model.tokenizer, []
    real = type(tokenizer).chat
    monkeypatch.setitem(
        vars(tokenizer), "chat_template", "{% for one in messages %}{{ one.role }}: {{ one.content }}{% endfor %}"
    )
    monkeypatch.setattr(
        type(tokenizer),
        "chat",
        lambda self, messages: asked.append(messages) or real(self, messages),
    )
    browser.refresh()
    page.ready()
    page.run("document.getElementById('temperature').value = 1")
    page.click("#question")
    page.press(" Why?", page.key.ENTER)
    page.until(lambda: page.text("[data-with=no] .state") in ("ended", "cut off at the most tokens"), "the answer has ended")
    assert page.text("[data-with=no] .text") and not page.text("[data-with=no] .error")
    assert asked == [[{"role": "user", "content": "What would you recommend? Why?"}]]


@pytest.mark.parametrize("width", [1200, 390])
def test_no_part_is_wider_than_the_window(page, width, served):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.ready()
        page.click("#samples button")
        page.chosen()
        seen, whole = page.run("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
        assert page.run("innerWidth") == width and whole == seen
        page.click("#delete")
        page.until(lambda: users(served) == 0, "the user is deleted")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

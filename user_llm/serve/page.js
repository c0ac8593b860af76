// The page: it asks the server that it came from, and nobody else. Whatever comes from there is put into the page as text, never as HTML.

import { ask, pathOf, pieces, send } from "/page_server.js";
import { ofOneUser, parse } from "/page_events.js";

const $ = (id) => document.getElementById(id);
const element = (name, text = "", properties = {}) => Object.assign(document.createElement(name), { textContent: text }, properties);
const errorOf = (id) => document.querySelector(`#${id} .error`);
const TICKS = { s: 1, ms: 1e3, us: 1e6, ns: 1e9 }; // in a second

let about = null; // what /v1/description says
let user = null; // {id, made, sample}: `made` says whether this page made the user, `sample` from which sample
let history = []; // the user's events, as they are stored

// ---------------------------------------------------------------- work, and its errors

/** Do some work whose errors are shown at `place`. Work of the same name that is still going on is given up. */
const going = {};
async function attempt(name, place, work) {
  going[name]?.abort();
  const control = (going[name] = new AbortController());
  place.textContent = "";
  try {
    await work(control.signal);
  } catch (error) {
    if (error.status === 401) $("key-form").hidden = false;
    if (going[name] === control && error.name !== "AbortError") place.textContent = error.message;
  }
}

/** Do some work that changes the user, when the changes before it are done. Its errors are shown in the section of the user. */
let turn = Promise.resolve();
function inTurn(work) {
  turn = turn.then(() => attempt("change", errorOf("user"), work));
  return turn;
}

// ---------------------------------------------------------------- beginning

async function begin() {
  try {
    about = await ask("/v1/description");
    const { samples } = await ask("/v1/samples");
    errorOf("key-form").textContent = "";
    $("samples").replaceChildren(...samples.map(sampleButton));
    describe();
    await Promise.all([restore(), untilReady()]);
  } catch (error) {
    if (error.status === 401) $("key-form").hidden = false;
    if (error.status === 401) errorOf("key-form").textContent = sessionStorage.getItem("key") ? error.message : "";
    $("about").textContent = error.status === 401 ? "This server answers those who have a key." : error.message;
  }
}

function describe() {
  const { item, time, numbers, texts } = about.columns;
  $("columns").textContent = `The columns are ${[item, time, ...numbers.map((one) => one.column), ...texts].join(", ")}.`;
  $("numbers").replaceChildren(...numbers.map(numberField));
  $("question").value ||= about.chat || !about.instruction ? "What would you recommend?" : `${about.instruction}\n`;
}

async function untilReady() {
  const what = `${about.model} · trained on ${about.dataset}, ${about.items.toLocaleString("en")} items`;
  while (!(await fetch("/ready").catch(() => ({}))).ok) {
    $("about").textContent = `${what} · getting ready, answers wait until then`;
    await new Promise((done) => setTimeout(done, 2000));
  }
  $("about").textContent = `${what} · ready`;
}

function numberField({ column, allowed, required, typical }) {
  const field = element(allowed.length ? "select" : "input", "", { name: column, required });
  if (allowed.length) field.append(...(required ? [] : [""]).concat(allowed).map((value) => element("option", value)));
  else Object.assign(field, { type: "number", step: "any" });
  if (required) field.value = typical;
  const label = element("label", column);
  label.append(field);
  return label;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  begin();
});

// ---------------------------------------------------------------- the user

function sampleButton({ name, events }) {
  const button = element("button", name, { type: "button", ariaPressed: "false" });
  button.addEventListener("click", () => inTurn(() => store(events, { sample: name })));
  return button;
}

/** Store events for the user who is shown; for a user of the page's own making where there is none, or the events are a sample's. */
async function store(events, { sample } = {}) {
  const fresh = sample || !user;
  const id = fresh ? `page-${Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("")}` : user.id;
  const answer = await ask(pathOf(id, "/events"), { method: "POST", body: events });
  await show(fresh ? { id, made: true, sample } : { ...user, sample: null });
  const { stored, repeated, refused, unknown_items: unknown, reasons } = answer;
  say(`${stored} stored${repeated ? `, ${repeated} there already` : ""}${unknown ? `, ${unknown} of items that the model does not know` : ""}.`);
  if (refused) throw new Error(`${refused} of ${events.length} events were refused. Event ${reasons[0].index + 1}: ${reasons[0].reason}`);
}

/** Show a user. A user whom the page has made before, and who is shown no longer, is deleted. */
async function show(next) {
  const before = user;
  user = next;
  sessionStorage.setItem("user", JSON.stringify(user));
  if (before?.made && before.id !== next?.id) await ask(pathOf(before.id), { method: "DELETE" });
  for (const button of $("samples").children) button.ariaPressed = String(button.textContent === user?.sample);
  for (const hint of document.querySelectorAll(".nobody")) hint.hidden = Boolean(user);
  $("chosen").hidden = !user;
  if (!user) {
    for (const name of ["look", "recommend", "explain", "ask"]) going[name]?.abort();
    history = [];
    for (const id of ["history", "bars", "ranking"]) $(id).replaceChildren();
    return;
  }
  $("name").textContent = user.id;
  $("kept").textContent = user.made ? "This page has made this user, and deletes it when you choose another." : "";
  await look();
  recommend();
  explain();
}

function look() {
  return attempt("look", errorOf("user"), async (signal) => {
    const [{ events, counted, unknown }, stored] = await Promise.all([
      ask(pathOf(user.id), { signal }),
      ask(pathOf(user.id, "/events?limit=100"), { signal }),
    ]);
    history = stored.events;
    $("count").textContent = `${events} event${events === 1 ? "" : "s"}, of which the model keeps ${counted}${unknown ? ` and does not know ${unknown}` : ""}`;
    const ids = [...new Set(history.map((event) => String(event[about.columns.item])))];
    const { items } = await ask(`/v1/items?${new URLSearchParams(ids.map((id) => ["id", id]))}`, { signal });
    const titles = new Map(items.map(({ id, title }) => [id, title]));
    $("history").replaceChildren(...history.toReversed().map((event) => line(event, titles)));
  });
}

function line(event, titles) {
  const { item, time, numbers } = about.columns;
  const values = numbers.filter(({ column }) => event[column] !== undefined).map(({ column }) => `${column} ${event[column]}`);
  const shown = element("li");
  shown.append(
    element("span", titles.get(String(event[item])) ?? `${event[item]} (not in the catalogue)`),
    element("span", [...values, timeOf(event[time])].join(" · ")),
  );
  return shown;
}

function timeOf(value) {
  const { timed, unit } = about.columns;
  const date = new Date(Number.isFinite(Number(value)) ? (1000 * Number(value)) / TICKS[unit] : value);
  return timed && !Number.isNaN(date.getTime()) ? date.toISOString().slice(0, 16).replace("T", " ") : String(value);
}

const say = (sentence) => ($("said").textContent = sentence);

async function restore() {
  const saved = JSON.parse(sessionStorage.getItem("user") ?? "null");
  if (!saved || user) return;
  try {
    await ask(pathOf(saved.id));
    await show(saved);
  } catch (error) {
    if (error.status !== 404) throw error;
    sessionStorage.removeItem("user");
  }
}

$("open").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = $("id").value.trim();
  inTurn(async () => {
    await ask(pathOf(id));
    await show({ id, made: user?.made && user.id === id });
    $("id").value = "";
    say("");
  });
});

$("delete").addEventListener("click", () => {
  const { id, made } = user;
  if (!made && !confirm(`Delete the user ${id}, with all events?`)) return;
  inTurn(async () => {
    await ask(pathOf(id), { method: "DELETE" });
    user = null;
    await show(null);
    say(`${id} is deleted.`);
    $("samples").querySelector("button")?.focus();
  });
});

// ---------------------------------------------------------------- events that are picked or pasted

let found = Promise.resolve([]); // the items that the list shows, or is about to show
let active = 0; // the place of the one that Enter picks

function search() {
  active = 0;
  const part = $("item").value.trim();
  found = new Promise((done) => {
    attempt("search", errorOf("user"), async (signal) => {
      signal.addEventListener("abort", () => done([]));
      const { items } = await ask(`/v1/items?${new URLSearchParams({ q: part, limit: 8 })}`, { signal });
      $("items").replaceChildren(...items.map(({ title }, place) => element("li", title, { role: "option", id: `item-${place}` })));
      [...$("items").children].forEach((option, place) => option.addEventListener("click", () => pick(place)));
      mark(0, items.length > 0);
      done(items);
    }).then(() => done([]));
  });
}

function mark(place, open) {
  active = place;
  $("items").hidden = !open;
  $("item").ariaExpanded = String(open);
  [...$("items").children].forEach((option, other) => (option.ariaSelected = String(other === place)));
  if (open) {
    $("item").setAttribute("aria-activedescendant", `item-${place}`);
    $("items").children[place].scrollIntoView({ block: "nearest" });
  } else $("item").removeAttribute("aria-activedescendant");
}

async function pick(place) {
  const part = $("item").value.trim();
  const item = (await found)[place ?? active];
  mark(0, false);
  if (!item) {
    if (part) errorOf("user").textContent = `No title holds “${part}”.`;
    return;
  }
  $("item").value = "";
  found = Promise.resolve([]);
  const { columns } = about;
  const given = [...$("numbers").querySelectorAll("select, input")].filter((field) => field.value !== "");
  const values = Object.fromEntries(given.map((field) => [field.name, Number(field.value)]));
  inTurn(() => {
    const last = Math.max(0, ...history.map((event) => Number(event[columns.time])).filter(Number.isFinite));
    return store([{ [columns.item]: item.id, [columns.time]: columns.timed ? new Date().toISOString() : last + 1, ...values }]);
  });
}

$("item").addEventListener("input", search);
$("item").addEventListener("blur", () => mark(0, false));
$("items").addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
$("item").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const count = $("items").children.length;
  if (step && $("items").hidden) search();
  else if (step) mark((active + step + count) % count, true);
  else if (event.key === "Escape" && !$("items").hidden) {
    mark(0, false);
    event.stopPropagation();
  } else return;
  event.preventDefault();
});
$("pick").addEventListener("submit", (event) => {
  event.preventDefault();
  pick();
});

$("paste").addEventListener("submit", (event) => {
  event.preventDefault();
  inTurn(async () => {
    await store(ofOneUser(parse($("events").value), about.columns.user));
    $("events").value = "";
  });
});

// ---------------------------------------------------------------- recommendations and events looked at

function recommend() {
  return attempt("recommend", errorOf("recommendations"), async (signal) => {
    if (!user) return;
    if (!about.recommends) throw new Error("This model was not trained to recommend items.");
    const wanted = new URLSearchParams({ k: $("k").value, seen: !$("unseen").checked });
    const { items } = await ask(pathOf(user.id, `/recommendations?${wanted}`), { signal });
    $("ranking").replaceChildren(
      ...items.map(({ rank, title, score }) => {
        const row = element("tr");
        const number = { className: "number" };
        row.append(element("td", rank, number), element("td", title), element("td", score.toFixed(2), number));
        return row;
      }),
    );
  });
}

function explain() {
  return attempt("explain", errorOf("explain"), async (signal) => {
    if (!user) return;
    if (!about.explains) throw new Error("In this model each event is a user token of its own, and nothing chooses among them.");
    const { events } = await ask(pathOf(user.id, "/explain?k=100"), { signal });
    const most = Math.max(...events.map(({ weight }) => weight));
    $("bars").replaceChildren(
      ...events.map(({ title, weight, events_ago: ago }) => {
        const row = element("li", "", { title: ago === 1 ? "The latest event" : `${ago} events ago` });
        const bar = element("span", "", { className: "bar", ariaHidden: "true" });
        bar.append(element("span"));
        bar.firstChild.style.width = `${(100 * weight) / (most || 1)}%`;
        row.append(element("span", title), bar, element("span", `${(100 * weight).toFixed(1)}%`, { className: "number" }));
        return row;
      }),
    );
  });
}

$("choice").addEventListener("submit", (event) => {
  event.preventDefault();
  recommend();
});
$("unseen").addEventListener("change", recommend);
$("k").addEventListener("change", () => $("k").reportValidity() && recommend());

// ---------------------------------------------------------------- texts

const SIDES = [...document.querySelectorAll(".answer")].map((side) => ({
  user: side.dataset.with === "yes",
  text: side.querySelector(".text"),
  state: side.querySelector(".state"),
  error: side.querySelector(".error"),
}));
const ENDS = { stop: "ended", length: "as long as it may be" };

function askBoth() {
  const settings = { model: about.model, stream: true, seed: 0, max_tokens: Number($("tokens").value), temperature: Number($("temperature").value) };
  const asked = about.chat ? { messages: [{ role: "user", content: $("question").value }] } : { prompt: $("question").value };
  return attempt("ask", errorOf("question-form"), async (signal) => {
    writing(true);
    await Promise.all(SIDES.map((side) => answer(side, { ...settings, ...asked }, signal)));
    if (!signal.aborted) writing(false);
  });
}

async function answer(side, body, signal) {
  side.text.replaceChildren();
  side.error.textContent = side.state.textContent = "";
  try {
    if (side.user && !user) throw new Error("Choose a user first.");
    side.state.textContent = "writing …";
    side.text.ariaBusy = "true"; // assistive technology reads the text when it is whole
    const path = about.chat ? "/v1/chat/completions" : "/v1/completions";
    const response = await send(path, { method: "POST", body: side.user ? { ...body, user: user.id } : body, signal });
    let end = "";
    for await (const { choices: [choice] } of pieces(response)) {
      if (signal.aborted) return; // a later question has the place
      const below = side.text.scrollHeight - side.text.scrollTop - side.text.clientHeight;
      side.text.append(choice.delta?.content ?? choice.text ?? "");
      if (below < 8) side.text.scrollTop = side.text.scrollHeight;
      end = choice.finish_reason ?? end;
    }
    side.state.textContent = ENDS[end] ?? "";
  } catch (error) {
    if (signal.aborted) return;
    side.state.textContent = "";
    side.error.textContent = error.message;
  } finally {
    if (going.ask.signal === signal) side.text.ariaBusy = "false";
  }
}

function writing(now) {
  if (!now && document.activeElement === $("stop")) $("go").focus();
  $("stop").disabled = !now;
}

function stop() {
  if ($("stop").disabled) return;
  going.ask.abort();
  writing(false);
  for (const side of SIDES) if (side.state.textContent === "writing …") side.state.textContent = "stopped";
}

$("question-form").addEventListener("submit", (event) => {
  event.preventDefault();
  askBoth();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("question-form").requestSubmit();
});
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());

begin();

// The page: it asks the server that it came from, and nobody else. Whatever comes from there is put into the page as text, never as HTML.

import { SIDES, clear, settle, write } from "/page_answers.js";
import { ofOneUser, parse } from "/page_events.js";
import { makePicker } from "/page_picker.js";
import { ask, pathOf } from "/page_server.js";

const $ = (id) => document.getElementById(id);
const element = (name, text = "", properties = {}) => Object.assign(document.createElement(name), { textContent: text }, properties);
const errorOf = (id) => document.querySelector(`#${id} .error`);
const TICKS = { s: 1, ms: 1e3, us: 1e6, ns: 1e9 }; // in a second

let about = null; // what /v1/description says
let user = null; // {id, made, sample}: `made` says whether this page made the user, `sample` from which sample
let history = []; // the user's events, as they are stored

// ---------------------------------------------------------------- work, and its errors

/** Return what some work returns; its errors are shown at `place`. Work of the same name that is still going on is given up. */
const going = {};
async function attempt(name, place, work) {
  going[name]?.abort();
  const control = (going[name] = new AbortController());
  place.textContent = "";
  try {
    return await work(control.signal);
  } catch (error) {
    if (going[name] === control && error.name !== "AbortError") fail(place, error);
  }
}

/** Show an error, and the field for a key where it is one of keys. */
function fail(place, error) {
  place.textContent = error.message;
  if (error.status === 401 || error.status === 403) $("key-form").hidden = false;
}

/** Do some work that changes the user, when the changes before it are done. Its errors are shown in the section of the user. */
let turn = Promise.resolve();
function inTurn(work) {
  turn = turn.then(() => attempt("change", errorOf("user"), work));
  return turn;
}

// ---------------------------------------------------------------- beginning

async function begin() {
  $("about").textContent = "Asking the server …";
  try {
    about = await ask("/v1/description");
    const { samples } = await ask("/v1/samples");
    $("samples").replaceChildren(...samples.map(sampleButton));
    describe();
    await Promise.all([inTurn(restore), untilReady()]);
  } catch (error) {
    if (error.status === 401 && !sessionStorage.getItem("key")) error.message = "This server answers those who have a key.";
    fail($("about"), error);
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

function numberField({ column, allowed, required, high }) {
  const field = element(allowed.length ? "select" : "input", "", { name: column, required });
  if (allowed.length) field.append(...(required ? [] : [""]).concat(allowed).map((value) => element("option", value)));
  else Object.assign(field, { type: "number", step: "any" });
  if (required) field.value = high;
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
  if (refused) throw new Error(`${refused} of ${events.length} events were refused. Event ${reasons[0].place + 1}: ${reasons[0].reason}`);
}

/** Show a user. A user whom the page has made before, and who is shown no longer, is deleted. */
async function show(next) {
  const before = user;
  user = next;
  sessionStorage.setItem("user", JSON.stringify(user));
  if (before?.made && before.id !== next?.id) await remove(before.id);
  if (before?.id !== next?.id) {
    stop();
    SIDES.forEach(clear);
  }
  for (const button of $("samples").children) button.ariaPressed = String(button.textContent === user?.sample);
  for (const hint of document.querySelectorAll(".nobody")) hint.hidden = Boolean(user);
  $("chosen").hidden = !user;
  if (!user) {
    for (const name of ["look", "recommend", "explain"]) going[name]?.abort();
    history = [];
    for (const id of ["history", "bars", "ranking"]) $(id).replaceChildren();
    return;
  }
  $("name").textContent = user.id;
  $("kept").textContent = user.made ? "This page has made this user. It deletes the user when you choose another, but not when you close the page." : "";
  await look();
  recommend();
  explain();
}

async function remove(id) {
  try {
    await ask(pathOf(id), { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) throw error; // somebody else has deleted the user
  }
}

function look() {
  return attempt("look", errorOf("user"), async (signal) => {
    const [{ events, counted, unknown }, stored] = await Promise.all([
      ask(pathOf(user.id), { signal }),
      ask(pathOf(user.id, "/events?limit=100"), { signal }),
    ]);
    history = stored.events;
    $("count").textContent = [
      `${events} event${events === 1 ? "" : "s"}`,
      ...(unknown ? [`${unknown} of items that the model does not know`] : []),
      ...(counted < events - unknown ? [`the model looks at the latest ${counted}`] : []),
    ].join(", ");
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
    await remove(id);
    user.made = false; // there is nothing left to delete
    await show(null);
    say(`${id} is deleted.`);
    $("samples").querySelector("button")?.focus();
  });
});

// ---------------------------------------------------------------- events that are picked or pasted

const pick = makePicker(
  $("item"),
  $("items"),
  async (q) => {
    const answer = await attempt("search", errorOf("user"), (signal) => ask(`/v1/items?${new URLSearchParams({ q, limit: 8 })}`, { signal }));
    return answer?.items ?? [];
  },
  (item, part) => {
    if (item) inTurn(() => store([eventOf(item.id)]));
    else if (part) errorOf("user").textContent = `No title holds “${part}”.`;
  },
);

/** Return an event of an item, with the numbers that stand beside the field. It happens at this moment, or after the other events. */
function eventOf(id) {
  const { item, time, timed } = about.columns;
  const given = [...$("numbers").querySelectorAll("select, input")].filter((field) => field.value !== "");
  const orders = history.map((event) => Number(event[time])).filter(Number.isFinite);
  const at = timed ? new Date().toISOString() : 1 + Math.max(0, ...orders);
  return { [item]: id, [time]: at, ...Object.fromEntries(given.map((field) => [field.name, Number(field.value)])) };
}

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
  clear(side);
  try {
    if (side.user && !user) throw new Error("Choose a user first.");
    const path = about.chat ? "/v1/chat/completions" : "/v1/completions";
    await write(side, path, side.user ? { ...body, user: user.id } : body, signal);
  } catch (error) {
    if (signal.aborted) return; // somebody has stopped it, or another question has the place
    settle(side, "");
    fail(side.error, error);
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
  for (const side of SIDES) settle(side, "stopped");
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

// The places of the two answers, and how an answer is written there as it comes.

import { send } from "/page_server.js";

export const SIDES = [...document.querySelectorAll(".answer")].map((side) => ({
  user: side.dataset.with === "yes",
  text: side.querySelector(".text"),
  state: side.querySelector(".state"),
  error: side.querySelector(".error"),
}));
const WRITING = "writing …";
const ENDS = { stop: "ended", length: "cut off at the most tokens" };

/** Write the answer to a request at a side. An aborted signal ends it without a word: the side is then somebody else's. */
export async function write(side, path, body, signal) {
  side.state.textContent = WRITING;
  side.text.ariaBusy = "true"; // assistive technology reads the text when it is whole
  let end = "";
  for await (const { choices: [choice] } of pieces(await send(path, { method: "POST", body, signal }))) {
    const below = side.text.scrollHeight - side.text.scrollTop - side.text.clientHeight;
    side.text.append(choice.delta?.content ?? choice.text ?? "");
    if (below < 8) side.text.scrollTop = side.text.scrollHeight;
    end = choice.finish_reason ?? end;
  }
  settle(side, ENDS[end] ?? "");
}

/** Empty a side. */
export function clear(side) {
  side.text.replaceChildren();
  side.error.textContent = side.state.textContent = "";
}

/** Say how the writing at a side has ended; say nothing where nothing is being written. */
export function settle(side, state) {
  if (side.state.textContent === WRITING) side.state.textContent = state;
  side.text.ariaBusy = "false";
}

/** Yield the values of a stream of server-sent events. */
async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer has broken off.");
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const read = JSON.parse(data);
      if (read.error) throw new Error(read.error.message);
      yield read;
    }
  }
}

// How the page asks its server.

/** What the server has refused: the message is its sentence. */
export class Refused extends Error {
  constructor(status, body) {
    const reason = body?.reasons?.[0];
    super(body?.error?.message ?? (reason ? `Event ${reason.place + 1}: ${reason.reason}` : `The server has answered ${status}.`));
    this.status = status;
  }
}

/** Return the response to a request; throw `Refused` where the server refuses, whose message is the server's sentence. */
export async function send(path, { body, ...options } = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, body: body && JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  throw new Refused(response.status, await response.json().catch(() => null));
}

export const ask = async (path, options) => (await send(path, options)).json();

/** Return the path of a user. */
export function pathOf(id, rest = "") {
  if (id === "." || id === "..") throw new Error("A browser cannot ask for a user of this name.");
  return `/v1/users/${encodeURIComponent(id)}${rest}`;
}

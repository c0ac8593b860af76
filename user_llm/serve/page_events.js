// Reads the events that somebody pastes.

/** Return the events of a text: a JSON list, JSON lines, one JSON object, or CSV. */
export function parse(text) {
  const trimmed = text.replace(/^\ufeff/, "").trim();
  if (!/^[[{]/.test(trimmed)) return csv(trimmed);
  try {
    return [JSON.parse(trimmed)].flat();
  } catch (whole) {
    if (trimmed.startsWith("[")) throw new Error(`The JSON list cannot be read: ${whole.message}.`);
  }
  return trimmed.split("\n").filter((row) => row.trim()).map((row, place) => {
    try {
      return JSON.parse(row);
    } catch (error) {
      throw new Error(`Line ${place + 1} is no JSON: ${error.message}.`);
    }
  });
}

function csv(text) {
  const rows = [[""]];
  let quoted = false;
  for (let at = 0; at < text.length; at++) {
    const row = rows.at(-1);
    const sign = text[at];
    if (sign === '"' && quoted && text[at + 1] === '"') row[row.length - 1] += text[++at];
    else if (sign === '"') quoted = !quoted;
    else if (sign === "," && !quoted) row.push("");
    else if (sign === "\n" && !quoted) rows.push([""]);
    else if (sign !== "\r" || quoted) row[row.length - 1] += sign;
  }
  if (quoted) throw new Error("The CSV has a quote that does not end.");
  const [header, ...lines] = rows.filter((row) => row.length > 1 || row[0] !== "");
  if (!lines.length) throw new Error("A CSV has a header and at least one row below it.");
  const ragged = lines.findIndex((row) => row.length !== header.length);
  if (ragged >= 0) throw new Error(`Row ${ragged + 1} of the CSV has ${lines[ragged].length} fields, and its header ${header.length}.`);
  return lines.map((row) => Object.fromEntries(header.map((name, place) => [name.trim(), row[place]])));
}

/** Return events without their column of users, as they are stored under the id that the page shows. */
export function ofOneUser(events, column) {
  const users = new Set(events.map((event) => String(event?.[column])));
  if (users.size > 1) throw new Error(`These are events of ${users.size} users by their column “${column}”: paste those of one.`);
  return events.map((event) => (event && typeof event === "object" ? { ...event, [column]: undefined } : event)); // JSON leaves it out
}

// A field that finds items by a part of their titles, with a list below it from which one is picked.

/**
 * Let a field and its list pick items.
 *
 * `find(part)` returns a promise of the items, {id, title}, whose titles hold a part. `picked(item, part)` is called with the item that
 * was picked, or with none where no title holds the part. Returns a function that picks the item which the list marks.
 */
export function makePicker(field, list, find, picked) {
  let found = Promise.resolve([]); // the items that the list shows, or is about to show
  let active = 0; // the place of the item that is marked

  function search() {
    const mine = (found = find(field.value.trim()));
    mine.then((items) => found === mine && draw(items));
  }

  function draw(items) {
    list.replaceChildren(
      ...items.map(({ title }, place) => {
        const option = Object.assign(document.createElement("li"), { textContent: title, role: "option", id: `${list.id}-${place}` });
        option.addEventListener("click", () => pick(place));
        return option;
      }),
    );
    mark(0, items.length > 0 && document.activeElement === field);
  }

  function mark(place, open) {
    active = place;
    list.hidden = !open;
    field.ariaExpanded = String(open);
    [...list.children].forEach((option, other) => (option.ariaSelected = String(other === place)));
    if (open) {
      field.setAttribute("aria-activedescendant", `${list.id}-${place}`);
      list.children[place].scrollIntoView({ block: "nearest" });
    } else field.removeAttribute("aria-activedescendant");
  }

  async function pick(place) {
    const part = field.value.trim();
    const item = (await found)[place ?? active];
    found = Promise.resolve([]);
    mark(0, false);
    if (item) field.value = "";
    picked(item, part);
  }

  field.addEventListener("input", search);
  field.addEventListener("blur", () => mark(0, false));
  list.addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
  field.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const count = list.children.length;
    if (step && list.hidden) search();
    else if (step) mark((active + step + count) % count, true);
    else if (event.key === "Escape" && !list.hidden) {
      mark(0, false);
      event.stopPropagation();
    } else return;
    event.preventDefault();
  });
  return () => pick();
}

// What every part of the page does with its elements.

export const $ = (id) => document.getElementById(id);

export function wrap(tag, ...content) {
  const element = document.createElement(tag);
  element.append(...content);
  return element;
}

export function sentence(text) { return text.charAt(0).toUpperCase() + text.slice(1); }

/** The number in a field; null where it is empty. */
export function number(id) { return $(id).value.trim() === "" ? null : Number($(id).value); }

/** A radio button that looks like a part of a bar. */
export function choice(name, value, title, checked) {
  const label = document.createElement("label"), input = document.createElement("input");
  Object.assign(input, { type: "radio", name, value, checked });
  label.append(input, wrap("span", title));
  return label;
}

/** Arrow keys within a group of which one element has the focus. */
export function rove(group, choose) {
  $(group).addEventListener("keydown", (event) => {
    const all = [...$(group).children], i = all.indexOf(document.activeElement);
    const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || i < 0) return;
    event.preventDefault();
    const j = (to + all.length) % all.length;
    choose(j);
    $(group).children[j].focus();
  });
}

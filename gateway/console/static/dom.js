// Builds elements. Text is only ever set as text, so nothing that an engine or a model says can become markup.

/**
 * @param {string} tag
 * @param {Record<string, string | boolean | number>} attributes  false: not there; true: there, empty
 * @param {...(Node | string | null)} children  null is left out
 */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for a drawing. */
export function drawing(tag, attributes = {}, ...children) {
  return fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) made.setAttribute(name, value === true ? '' : String(value));
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const shown = new WeakMap();

/** Draws anew only when what is drawn says something new: whoever reads or selects is not disturbed each second. */
export function redraw(place, data, draw) {
  const text = JSON.stringify(data);
  if (shown.get(place) === text) return;
  shown.set(place, text);
  place.replaceChildren(...draw(data));
}

export const byId = (id) => document.getElementById(id);

// Elements. Text only ever becomes a text node, so nothing that a server, a passage or a model says can be markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "click") element.addEventListener("click", value);
    else if (/^on|^style$|^srcdoc$/i.test(name)) throw new Error(`${name} is not set from here`);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  // Numbers and strings become text nodes.
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const el = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);

export const svg = (name, attributes = {}, ...children) => filled(document.createElementNS(SVG, name), attributes, children);

let made = 0;
// An id that nothing else on the page has.
export const freshId = (stem) => `${stem}-${++made}`;

// Says it to screen readers, once; the same words twice in a row are said twice.
export function announce(words) {
  const place = byId("announce");
  place.textContent = place.textContent === words ? `${words}\u00a0` : words;
}

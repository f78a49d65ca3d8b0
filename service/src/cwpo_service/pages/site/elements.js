// Elements of the page. All text goes through textContent: nothing here makes HTML of text.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with these attributes, properties (`.value`), listeners (`onclick`) and children. */
export function element(tag, attributes = {}, ...children) {
  return furnished(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return furnished(document.createElementNS(SVG, tag), attributes, children);
}

/** Put these in place of all that is in the node. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null));
}

function furnished(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith(".")) node[name.slice(1)] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

/** What went wrong, for the reader: one paragraph that screen readers announce. */
export function problem(error) {
  return element("p", { class: "problem", role: "alert" }, error.message);
}

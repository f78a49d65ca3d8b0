// The distribution of a dataset's confidences.

import { element, svg } from "./elements.js";
import { count, percent } from "./numbers.js";

const WIDTH = 480;
const HEIGHT = 170;
const BASE = HEIGHT - 26;
const GAP = 3;

/** A figure of the counts of rows in equal intervals of confidence, with its figures as a table. */
export function histogram(counts, rows) {
  const most = Math.max(...counts, 1);
  const step = WIDTH / counts.length;
  const bars = counts.map((value, at) => {
    const height = value ? Math.max(2, (BASE - 8) * (value / most)) : 0;
    return svg(
      "rect",
      { class: "column", x: at * step + GAP / 2, y: BASE - height, width: step - GAP, height, rx: "2" },
      svg("title", {}, `${interval(at, counts.length)}: ${count(value)}`),
    );
  });
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((tick) =>
    svg(
      "text",
      { class: "tick", x: tick * WIDTH, y: HEIGHT - 6, "text-anchor": { 0: "start", 1: "end" }[tick] ?? "middle" },
      String(tick),
    ),
  );
  const label = `Confidences of ${count(rows)} rows, from 0 to 1`;
  return element(
    "figure",
    {},
    svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "plot wide", role: "img", "aria-label": label },
      svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: BASE, y2: BASE }),
      ...bars,
      ...ticks,
    ),
    table(counts, rows),
  );
}

const interval = (at, bins) => `${(at / bins).toFixed(2)} to ${((at + 1) / bins).toFixed(2)}`;

function table(counts, rows) {
  const lines = counts.map((value, at) =>
    element(
      "tr",
      {},
      element("td", {}, interval(at, counts.length)),
      element("td", {}, count(value)),
      element("td", {}, percent(rows ? value / rows : 0, 1)),
    ),
  );
  const head = ["Confidence", "Rows", "Share"].map((name) => element("th", { scope: "col" }, name));
  return element(
    "details",
    {},
    element("summary", {}, "The figures"),
    element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...lines)),
  );
}

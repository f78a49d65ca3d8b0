// The calibration plot: what confidence promises, and what it keeps.

import { element, svg } from "./elements.js";
import { count, percent } from "./numbers.js";

const SIZE = 320;
const LEFT = 44;
const BOTTOM = 40;
const TOP = 10;
const RIGHT = 10;

// Both axes run from 0 to 1, or from a half where no bin lies below.
function scales(low) {
  const share = (value) => (value - low) / (1 - low);
  return {
    x: (value) => LEFT + share(value) * (SIZE - LEFT - RIGHT),
    y: (value) => SIZE - BOTTOM - share(value) * (SIZE - BOTTOM - TOP),
  };
}

/** A figure of the bins of held-out pairs, with its figures as a table. */
export function calibrationPlot(bins) {
  const calibrated = bins.some((bin) => bin.mean_calibrated_confidence != null);
  const low = bins.some((bin) => bin.accuracy < 0.5) ? 0 : 0.5;
  const { x, y } = scales(low);
  const ticks = low ? [0.5, 0.6, 0.7, 0.8, 0.9, 1] : [0, 0.25, 0.5, 0.75, 1];
  const points = (name, kind) =>
    bins.map((bin) =>
      svg("circle", { class: kind, cx: x((1 + bin[name]) / 2), cy: y(bin.accuracy), r: "5" }),
    );
  const plot = svg(
    "svg",
    { viewBox: `0 0 ${SIZE} ${SIZE}`, class: "plot", role: "img", "aria-label": "Promised against kept accuracy of ten groups of held-out pairs" },
    ...ticks.flatMap((tick) => grid(tick, low, x, y)),
    svg("line", { class: "diagonal", x1: x(low), y1: y(low), x2: x(1), y2: y(1) }),
    ...(calibrated ? points("mean_calibrated_confidence", "calibrated") : []),
    ...points("mean_confidence", "raw"),
    axis("promised accuracy", { x: x((1 + low) / 2), y: SIZE - 4 }),
    axis("accuracy", { x: 0, y: 0, transform: `translate(11 ${y((1 + low) / 2)}) rotate(-90)` }),
  );
  return element("figure", {}, plot, caption(calibrated), table(bins, calibrated));
}

function grid(tick, low, x, y) {
  const label = String(tick);
  return [
    svg("line", { class: "grid", x1: x(low), x2: x(1), y1: y(tick), y2: y(tick) }),
    svg("text", { class: "tick", x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, label),
    svg("text", { class: "tick", x: x(tick), y: SIZE - BOTTOM + 18, "text-anchor": "middle" }, label),
  ];
}

function axis(text, place) {
  return svg("text", { class: "axis", "text-anchor": "middle", ...place }, text);
}

function caption(calibrated) {
  return element(
    "figcaption",
    {},
    element("span", { class: "key raw" }, "confidence"),
    calibrated ? element("span", { class: "key calibrated" }, "calibrated") : null,
    " On the line, confidence keeps what it promises; below it, it promises too much.",
  );
}

function table(bins, calibrated) {
  const head = ["Pairs", "Promised", calibrated ? "Calibrated" : null, "Kept"].filter(Boolean);
  const rows = bins.map((bin) =>
    [
      count(bin.pairs),
      percent((1 + bin.mean_confidence) / 2, 1),
      calibrated ? percent((1 + (bin.mean_calibrated_confidence ?? 0)) / 2, 1) : null,
      percent(bin.accuracy, 1),
    ].filter((cell) => cell !== null),
  );
  return element(
    "details",
    {},
    element("summary", {}, "The figures"),
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))))),
    ),
  );
}

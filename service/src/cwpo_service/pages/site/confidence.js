// A confidence, as a bar that reads at a glance.

import { element } from "./elements.js";

const WORDS = [
  [0.1, "a coin toss"],
  [0.35, "leaning"],
  [0.7, "fairly sure"],
  [0.9, "sure"],
  [Infinity, "very sure"],
];

/** A confidence in words. */
export const inWords = (confidence) => WORDS.find(([below]) => confidence < below)[1];

/** The bar, its value and its words. */
export function confidenceBar(confidence, label = "Confidence") {
  const share = element("span", { class: "share" });
  share.style.width = `${100 * confidence}%`;
  return element(
    "div",
    { class: "confidence" },
    element(
      "div",
      {
        class: "bar",
        role: "meter",
        "aria-label": label,
        "aria-valuemin": "0",
        "aria-valuemax": "1",
        "aria-valuenow": confidence.toFixed(3),
        "aria-valuetext": `${confidence.toFixed(2)}, ${inWords(confidence)}`,
      },
      share,
    ),
    element("span", { class: "value", "aria-hidden": "true" }, confidence.toFixed(2)),
    element("span", { class: "words", "aria-hidden": "true" }, inWords(confidence)),
  );
}

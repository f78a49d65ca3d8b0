// The annotator's card.

import { calibrationPlot } from "./calibration.js";
import { byId, element, fill, problem } from "./elements.js";
import { bytes, count, percent, plural } from "./numbers.js";
import { get } from "./service.js";

const OBJECTIVES = {
  bt: "Bradley–Terry",
  dpo: "DPO, implicit reward",
  "sft+dpo": "SFT, then DPO; implicit reward",
  pairrm: "pairwise comparison",
};

export async function showAnnotator() {
  const card = byId("card");
  card.setAttribute("aria-busy", "true");
  try {
    const [model, known] = await Promise.all([get("model"), get("model/card")]);
    fill(card, drawn(model, known));
  } catch (error) {
    fill(card, problem(error));
  } finally {
    card.removeAttribute("aria-busy");
  }
}

function drawn(model, card) {
  return [
    element(
      "div",
      { class: "panel identity" },
      element("h2", {}, model.name),
      element("p", { class: "revision" }, "revision ", element("code", {}, model.revision)),
      facts([
        ["Base model", card.base_model],
        ["Objective", OBJECTIVES[card.objective] ?? card.objective],
        ["Trained on", card.labelled_pairs == null ? null : plural(card.labelled_pairs, "labelled pair")],
        ["Data fingerprint", card.data_fingerprint == null ? null : element("code", {}, card.data_fingerprint)],
        ["Runs on", `${model.device}, ${model.dtype}, backend ${model.backend}`],
      ]),
    ),
    element("div", { class: "tiles" }, tiles(model, card)),
    element(
      "div",
      { class: "two-columns even" },
      calibration(card.held_out),
      element("div", {}, drift(model, card.drift), certificates(model)),
    ),
    limits(model),
  ];
}

function facts(rows) {
  const known = rows.filter(([, value]) => value != null);
  return element(
    "dl",
    { class: "facts" },
    ...known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}

function tiles(model, { held_out }) {
  if (!held_out) {
    return [element("p", { class: "note" }, "No accuracy is recorded: this annotator has no annotator.json, or none was measured.")];
  }
  return [
    tile(percent(held_out.accuracy, 1), "accuracy", `on ${plural(held_out.pairs, "held-out pair")}`),
    tile(held_out.mean_confidence.toFixed(2), "mean confidence", "on the same pairs"),
    held_out.ece == null ? null : tile(held_out.ece.toFixed(3), "calibration error", "0 is perfect"),
    held_out.calibrated_ece == null
      ? null
      : tile(held_out.calibrated_ece.toFixed(3), "calibrated", `at temperature ${model.temperature?.toFixed(2) ?? "–"}`),
  ];
}

function tile(value, name, note) {
  return element(
    "div",
    { class: "tile" },
    element("strong", {}, value),
    element("span", {}, name),
    element("small", {}, note),
  );
}

function calibration(held_out) {
  const bins = held_out?.bins;
  return element(
    "div",
    { class: "panel" },
    element("h2", {}, "Calibration"),
    bins?.length
      ? calibrationPlot(bins)
      : element("p", { class: "note" }, "No plot is recorded. Annotators that are trained from now on have one."),
  );
}

function drift(model, { distance, annotations, fewest }) {
  return element(
    "div",
    { class: "panel" },
    element("h2", {}, "Drift now"),
    distance == null ? null : gauge(distance),
    element("p", { class: "note" }, driftInWords(model, distance, annotations, fewest)),
  );
}

function gauge(distance) {
  const share = element("span", { class: "share" });
  share.style.width = `${100 * Math.min(1, distance)}%`;
  return element(
    "div",
    { class: "gauge" },
    element("strong", {}, distance.toFixed(3)),
    element(
      "div",
      {
        class: "bar",
        role: "meter",
        "aria-label": "Drift",
        "aria-valuemin": "0",
        "aria-valuemax": "1",
        "aria-valuenow": distance.toFixed(3),
      },
      share,
    ),
  );
}

function driftInWords(model, distance, annotations, fewest) {
  if (!model.confidence_quantiles) {
    return "Unknown: the annotator has no quantiles of confidence to compare with.";
  }
  if (distance == null) {
    return `Known after ${count(fewest)} annotations; ${count(annotations)} so far.`;
  }
  return `The last ${plural(annotations, "confidence")} differ by ${distance.toFixed(2)} on average from those on held-out pairs. Far from 0, the input is not like the data that the annotator knows, and neither accuracy nor certificates hold.`;
}

function certificates({ certificates: found, certificates_void: reason }) {
  const lines = found.map((each) =>
    element(
      "li",
      {},
      element("strong", {}, `At most ${percent(each.max_error)} of labels with a confidence above ${each.threshold.toFixed(2)} are wrong`),
      ` — with a probability of ${percent(1 - each.delta)}. Above it are ${percent(each.coverage)} of the pairs it was found on: ${plural(each.pairs, "pair")}, ${plural(each.errors, "wrong label")}.`,
    ),
  );
  return element(
    "div",
    { class: "panel" },
    element("h2", {}, "Certificates"),
    found.length
      ? element("ul", { class: "certificates" }, ...lines)
      : element("p", { class: "note" }, "None. ", element("code", {}, "cwpo evaluate annotator … --max-error 0.1 --certify"), " finds one."),
    found.length && reason != null ? element("p", { class: "problem" }, `They do not hold at present: ${reason}.`) : null,
    found.length
      ? element("p", { class: "note" }, "They hold for data like that they were found on, and for no other.")
      : null,
  );
}

function limits(model) {
  return element(
    "div",
    { class: "panel" },
    element("h2", {}, "Limits"),
    facts([
      ["A text", `${count(model.max_length)} tokens, prompt and response together`],
      ["A request", `${plural(model.max_triplets, "triplet")}, ${bytes(model.max_body_bytes)}`],
      [
        "A dataset as one file",
        model.max_merged_rows == null ? null : `${count(model.max_merged_rows)} rows, ${bytes(model.max_merged_bytes)}`,
      ],
    ]),
    element(
      "p",
      { class: "note" },
      "A label is a guess about what people prefer, made from their labels; it is not the truth, and it knows nothing of data that differs from those.",
    ),
  );
}

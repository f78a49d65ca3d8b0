// The playground: a prompt and its responses, put in order.

import { confidenceBar, inWords } from "./confidence.js";
import { byId, element, fill, problem } from "./elements.js";
import { EXAMPLES } from "./examples.js";
import { percent, signed } from "./numbers.js";
import { post } from "./service.js";

const FEWEST = 2;
const MOST = 64;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

let comparisons = 0;

export function startPlayground() {
  fill(byId("examples"), element("span", { class: "hint" }, "Try"), EXAMPLES.map(chip));
  byId("add-response").addEventListener("click", () => {
    addResponse("");
    fields().at(-1).focus();
  });
  byId("playground-form").addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  byId("playground-form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) compare();
  });
  show(EXAMPLES[0]);
}

/** Letter of a response: A to Z, then AA, AB, as in a spreadsheet. */
const letter = (at) => (at < 26 ? LETTERS[at] : LETTERS[Math.floor(at / 26) - 1] + LETTERS[at % 26]);
const fields = () => [...byId("responses").querySelectorAll("textarea")];

function chip(example) {
  const choose = () => {
    show(example);
    compare();
  };
  return element("button", { type: "button", class: "chip", onclick: choose }, example.name);
}

function show(example) {
  byId("prompt").value = example.prompt;
  fill(byId("responses"));
  example.responses.forEach(addResponse);
  fill(byId("ranking"), invitation());
}

function invitation() {
  return element(
    "div",
    { class: "empty" },
    element("p", { class: "big" }, "The order appears here."),
    element(
      "p",
      {},
      "Confidence runs from 0, a coin toss, to 1. Training by it lets the labels that are sure count for more.",
    ),
  );
}

function addResponse(text) {
  const remove = element("button", { type: "button", class: "remove", onclick: () => removeResponse(field) }, "Remove");
  const field = element(
    "div",
    { class: "response" },
    element("label", { class: "field" }, element("span"), element("textarea", { rows: "4", spellcheck: "false", ".value": text })),
    remove,
  );
  byId("responses").append(field);
  number();
}

function removeResponse(field) {
  const next = field.nextElementSibling ?? field.previousElementSibling;
  field.remove();
  number();
  next.querySelector("textarea").focus();
}

function number() {
  const all = [...byId("responses").children];
  all.forEach((field, at) => {
    field.querySelector("span").textContent = `Response ${letter(at)}`;
    const remove = field.querySelector(".remove");
    remove.hidden = all.length <= FEWEST;
    remove.setAttribute("aria-label", `Remove response ${letter(at)}`);
  });
  byId("add-response").disabled = all.length >= MOST;
}

async function compare() {
  const turn = ++comparisons;
  const region = byId("ranking");
  const responses = fields().map((field) => field.value);
  region.setAttribute("aria-busy", "true");
  try {
    const ranking = await rankingOf(byId("prompt").value, responses);
    if (turn === comparisons) fill(region, drawn(ranking, responses));
  } catch (error) {
    if (turn === comparisons) fill(region, problem(error));
  } finally {
    if (turn === comparisons) region.removeAttribute("aria-busy");
  }
}

/** The order of the responses. Two are annotated as a triplet, which every annotator can. */
async function rankingOf(prompt, responses) {
  if (responses.length > 2) {
    const { rankings } = await post("rank", { items: [{ prompt, responses }], truncation: "prompt_left" });
    return orThrow(rankings[0]);
  }
  const [response_a, response_b] = responses;
  const triplets = [{ prompt, response_a, response_b }];
  const { annotations } = await post("annotate", { triplets, truncation: "prompt_left" });
  const label = orThrow(annotations[0]);
  return {
    order: label.preferred === "b" ? [1, 0] : [0, 1],
    scores: [label.score_a, label.score_b],
    confidence: [label.confidence],
    calibrated_confidence: label.calibrated_confidence == null ? null : [label.calibrated_confidence],
    truncated: label.truncated,
  };
}

function orThrow(item) {
  if (item.error) throw new Error(item.error.detail);
  return item;
}

function drawn(ranking, responses) {
  const calibrated = ranking.calibrated_confidence ?? null;
  const rows = ranking.order.flatMap((at, place) => {
    const step = place < ranking.confidence.length ? stepBetween(ranking, calibrated, place) : null;
    return [place === 0 ? best(at, ranking, responses) : other(at, ranking, responses, place), step];
  });
  const [first, second] = ranking.order;
  const confidence = ranking.confidence[0];
  const isTie = ranking.scores[first] === ranking.scores[second];
  return [
    element(
      "h2",
      { class: "verdict" },
      isTie ? "No difference" : `${letter(first)} is better`,
      element("small", {}, isTie ? "the scores are equal" : inWords(confidence)),
    ),
    element("ol", { class: "ranking" }, ...rows),
    element("p", { class: "note" }, meaning(calibrated ? calibrated[0] : confidence, calibrated !== null)),
    ranking.truncated
      ? element("p", { class: "note" }, "The prompt was too long: its beginning was left out.")
      : null,
  ];
}

function meaning(confidence, isCalibrated) {
  const odds = percent((1 + confidence) / 2);
  return isCalibrated
    ? `Calibrated on people’s labels, the chance that the first step is right is ${odds}.`
    : `By the annotator’s own scores, the chance that the first step is right is ${odds}. How far to trust that, its card says.`;
}

function best(at, ranking, responses) {
  return item(at, ranking, responses, "best", 1);
}

function other(at, ranking, responses, place) {
  return item(at, ranking, responses, null, place + 1);
}

function item(at, ranking, responses, kind, place) {
  return element(
    "li",
    { class: kind, value: String(place) },
    element("span", { class: "letter", "aria-label": `Response ${letter(at)}` }, letter(at)),
    element("p", { class: "text" }, responses[at]),
    element("span", { class: "score", title: "raw score of the annotator" }, signed(ranking.scores[at])),
  );
}

function stepBetween(ranking, calibrated, place) {
  const [upper, lower] = [ranking.order[place], ranking.order[place + 1]].map(letter);
  return element(
    "li",
    { class: "step" },
    confidenceBar(ranking.confidence[place], `Confidence that ${upper} is better than ${lower}`),
    calibrated
      ? element("span", { class: "calibrated" }, `calibrated ${calibrated[place].toFixed(2)}`)
      : null,
  );
}


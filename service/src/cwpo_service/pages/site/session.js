// The part where a person answers: two responses side by side, by keys or by hand.

import { download } from "./downloads.js";
import { byId, element, fill, problem } from "./elements.js";
import { count, plural } from "./numbers.js";
import { promptText } from "./prompts.js";
import { post } from "./service.js";

// Whoever answers, until the page is closed.
let reviewer = "";
let session = null;

/** Ask for a name, and hand out rows of the review. */
export function startSession(review) {
  session = { review, row: null, isBusy: false, parts: parts() };
  const { head, body, note, foot } = session.parts;
  fill(byId("session"), element("p", {}, element("a", { href: "#review" }, "All reviews")), head, note, body, foot);
  drawHead(review.progress);
  drawFoot(review.progress);
  if (reviewer) call("next");
  else askForName();
  addEventListener("keydown", onKey);
}

export function endSession() {
  removeEventListener("keydown", onKey);
  session = null;
}

function parts() {
  return {
    head: element("div", { class: "session-head" }),
    note: element("div"),
    body: element("div"),
    foot: element("div"),
  };
}

function askForName() {
  const name = element("input", { id: "reviewer", autocomplete: "nickname", maxlength: "64", required: true });
  const begin = (event) => {
    event.preventDefault();
    reviewer = name.value.trim();
    if (reviewer) call("next");
  };
  fill(
    session.parts.body,
    element(
      "form",
      { class: "panel who", onsubmit: begin },
      element("label", { class: "field" }, element("span", {}, "Your name"), name),
      element("button", { class: "primary", type: "submit" }, "Begin"),
      element("p", { class: "note" }, "It is kept with each of your answers, and the time. Several people can answer at once: each gets other rows."),
    ),
  );
  name.focus();
}

async function call(what, body = {}) {
  const own = session;
  if (own.isBusy) return;
  own.isBusy = true;
  fill(own.parts.note);
  try {
    const step = await post(`reviews/${own.review.id}/${what}`, { reviewer, ...body });
    if (own !== session) return;
    own.row = step.row;
    // Which response stands on the left is drawn by lot, so that no side is favoured.
    own.isSwapped = Math.random() < 0.5;
    drawHead(step.progress);
    drawFoot(step.progress);
    drawRow();
  } catch (error) {
    if (own === session) fill(own.parts.note, problem(error));
  } finally {
    own.isBusy = false;
  }
}

const undo = () => call("undo");

function answer(side) {
  if (session.row === null) return;
  const [left, right] = session.isSwapped ? ["b", "a"] : ["a", "b"];
  const preferred = { left, right, neither: "tie" }[side];
  call("answers", { number: session.row.number, preferred });
}

const KEYS = { 1: () => answer("left"), 2: () => answer("right"), 0: () => answer("neither"), u: undo };

function onKey(event) {
  const isTyped = event.target.closest?.("input, textarea, select, dialog");
  if (isTyped || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !reviewer) return;
  const act = KEYS[event.key.toLowerCase()];
  if (act === undefined) return;
  event.preventDefault();
  act();
}

function drawRow() {
  const { row, isSwapped, parts } = session;
  if (row === null) {
    fill(
      parts.body,
      element(
        "div",
        { class: "panel empty" },
        element("p", { class: "big" }, "Nothing is left for you. Thank you!"),
        element("p", {}, "Others may still hold the last rows; what they leave comes back within ten minutes."),
        element("div", { class: "actions" }, button("Undo", "u", undo), button("Look again", null, () => call("next"))),
      ),
    );
    return;
  }
  const [left, right] = isSwapped ? [row.response_b, row.response_a] : [row.response_a, row.response_b];
  const question = element("p", { class: "question", tabindex: "-1" }, promptText(row.prompt));
  fill(
    parts.body,
    question,
    element("div", { class: "answers" }, side("left", "1", left), side("right", "2", right)),
    element("div", { class: "verdicts" }, button("No difference", "0", () => answer("neither")), button("Undo", "u", undo)),
  );
  question.focus({ preventScroll: true });
}

function side(name, key, text) {
  const title = name === "left" ? "First is better" : "Second is better";
  return element(
    "div",
    { class: "answer" },
    element("p", { class: "text", tabindex: "0", "aria-label": name === "left" ? "First response" : "Second response" }, text),
    button(title, key, () => answer(name)),
  );
}

function button(text, key, act) {
  const hint = key === null ? null : element("kbd", { "aria-hidden": "true" }, key);
  return element("button", { type: "button", onclick: act, "aria-keyshortcuts": key }, text, hint);
}

function drawHead({ rows, rows_done }) {
  const bar = element("span", { class: "share" });
  bar.style.width = `${rows ? (100 * rows_done) / rows : 100}%`;
  fill(
    session.parts.head,
    element(
      "div",
      {
        class: "bar",
        role: "progressbar",
        "aria-label": "Rows done",
        "aria-valuemin": "0",
        "aria-valuemax": String(rows),
        "aria-valuenow": String(rows_done),
      },
      bar,
    ),
    element("span", { class: "hint", role: "status" }, `${count(rows_done)} of ${plural(rows, "row")}`),
  );
}

function drawFoot({ reviewers, answers }) {
  const { review, parts } = session;
  const names = Object.entries(reviewers).map(([name, given]) => element("li", {}, `${name}: ${count(given)}`));
  const path = `reviews/${review.id}/answers`;
  fill(
    parts.foot,
    element("ul", { class: "people", "aria-label": "Answers of each person" }, ...names),
    answers
      ? element(
          "p",
          { class: "note" },
          download(path, `${review.id}.answers.jsonl`, "Download the answers", (error) => fill(parts.note, problem(error))),
        )
      : null,
    answers
      ? element("p", { class: "note" }, element("code", {}, `cwpo review import ${review.id}.answers.jsonl -o labelled.jsonl`), " makes labelled pairs of them.")
      : null,
  );
}

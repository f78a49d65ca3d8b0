// Reviews: a new one, all of them, and the one that is answered.

import { byId, element, fill } from "./elements.js";
import { moment, percent, plural } from "./numbers.js";
import { get, post } from "./service.js";
import { endSession, startSession } from "./session.js";

export function startReviews() {
  byId("review-form").addEventListener("submit", (event) => {
    event.preventDefault();
    create();
  });
}

// Counts what was shown, so that a review that comes late is not begun.
let shown = 0;

export function leaveReview() {
  shown += 1;
  endSession();
}

/** Show all reviews, or the one with this id. */
export async function showReview(id) {
  leaveReview();
  const turn = shown;
  const note = byId("review-problem");
  byId("reviews").hidden = Boolean(id);
  byId("session").hidden = !id;
  note.hidden = true;
  try {
    if (!id) return await list();
    const review = await get(`reviews/${id}`);
    if (turn === shown) startSession(review);
  } catch (error) {
    if (turn !== shown) return;
    note.textContent = error.message;
    note.hidden = false;
    byId("reviews").hidden = true;
    byId("session").hidden = true;
  }
}

async function list() {
  const [{ reviews }, { jobs }] = [await get("reviews"), await get("jobs?limit=100")];
  const done = jobs.filter((job) => job.state.startsWith("completed"));
  fill(
    byId("review-job"),
    done.map((job) =>
      element("option", { value: job.id }, `${moment(job.created_at)} · ${plural(job.progress.rows_annotated, "row")}`),
    ),
  );
  byId("review-form").querySelector("button").disabled = done.length === 0;
  fill(byId("review-note"), done.length ? null : element("p", { class: "note" }, "A job has to be done first."));
  fill(byId("review-list"), reviews.length ? reviews.map(item) : element("li", { class: "note" }, "None yet."));
}

function item(review) {
  const { rows, rows_done } = review.progress;
  const drawn = review.spread ? "" : ", drawn at random: the annotator has no embeddings";
  return element(
    "li",
    {},
    element(
      "a",
      { href: `#review/${review.id}` },
      element("span", { class: "pill" }, percent(rows ? rows_done / rows : 1)),
      element("span", { class: "when" }, moment(review.created_at)),
      element("span", { class: "hint" }, `${plural(rows, "row")} below ${review.below}${drawn}`),
    ),
  );
}

async function create() {
  const note = byId("review-note");
  fill(note, element("p", { class: "note" }, "Selecting rows …"));
  try {
    const review = await post("reviews", {
      job_id: byId("review-job").value,
      below: Number(byId("review-below").value),
      most: Number(byId("review-most").value),
      answers_per_row: Number(byId("review-answers").value),
    });
    fill(note);
    location.hash = `review/${review.id}`;
  } catch (error) {
    fill(note, element("p", { class: "problem" }, error.message));
  }
}

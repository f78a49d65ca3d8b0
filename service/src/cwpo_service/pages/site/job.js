// One job: its progress, what can be done with it, and what it made.

import { confidenceBar } from "./confidence.js";
import { download } from "./downloads.js";
import { byId, element, fill, problem } from "./elements.js";
import { follow, hasEnded } from "./events.js";
import { histogram } from "./histogram.js";
import { bytes, count, duration, moment, percent, plural } from "./numbers.js";
import { promptText } from "./prompts.js";
import { get, post, request } from "./service.js";

export const STATES = {
  validating: "reading",
  queued: "queued",
  running: "running",
  finalizing: "finishing",
  completed: "done",
  completed_with_errors: "done, rows rejected",
  failed: "failed",
  cancelling: "cancelling",
  cancelled: "cancelled",
};
const STOPPABLE = new Set(["validating", "queued", "running", "finalizing"]);
const DONE = new Set(["completed", "completed_with_errors"]);

/** Whether there is a dataset: one that was cancelled has what was finished by then. */
const hasResults = (job) =>
  DONE.has(job.state) || (job.state === "cancelled" && job.progress.rows_annotated > 0);

let watching = null;

export function leaveJob() {
  watching?.abort();
  watching = null;
}

/** Show the job, and follow it until it ends; `onchange` is called when its state changes. */
export async function showJob(id, onchange) {
  leaveJob();
  const own = (watching = new AbortController());
  const parts = {
    head: element("div"),
    progress: element("div", { role: "status" }),
    actions: element("div", { class: "actions" }),
    note: element("div"),
    results: element("div"),
  };
  fill(byId("job"), Object.values(parts));
  let state = null;
  const show = (job) => {
    if (own.signal.aborted) return;
    fill(parts.progress, progress(job));
    if (job.state === state) return;
    fill(parts.head, head(job));
    fill(parts.actions, actions(job, parts, () => showJob(id, onchange), onchange));
    if (state !== null) onchange();
    state = job.state;
    if (hasResults(job)) showResults(job, parts);
  };
  try {
    await follow(id, show, own.signal);
  } catch (error) {
    if (!own.signal.aborted) fill(parts.note, problem(error));
  }
}

function head(job) {
  return [
    element(
      "h2",
      { class: "job-title" },
      element("span", { class: "pill", "data-state": job.state }, STATES[job.state] ?? job.state),
      element("code", {}, job.id),
    ),
    element(
      "p",
      { class: "note" },
      [
        `submitted ${moment(job.created_at)}`,
        job.finished_at ? `ended ${moment(job.finished_at)}` : null,
        job.model ? `annotator ${job.model.name}, revision ${job.model.revision}` : null,
      ]
        .filter(Boolean)
        .join(" · "),
    ),
    job.error ? element("p", { class: "problem" }, job.error) : null,
  ];
}

function progress(job) {
  const { rows_done, rows_total, rows_failed, rows_per_second, eta_seconds } = job.progress;
  const share = rows_total ? rows_done / rows_total : DONE.has(job.state) ? 1 : 0;
  const bar = element("span", { class: "share" });
  bar.style.width = `${100 * share}%`;
  const words = [
    rows_total == null ? plural(rows_done, "row") : `${count(rows_done)} of ${plural(rows_total, "row")}`,
    rows_failed ? `${count(rows_failed)} rejected` : null,
    rows_per_second ? `${count(Math.round(rows_per_second))} rows/s` : null,
    eta_seconds && !hasEnded(job) ? `${duration(eta_seconds)} left` : null,
  ];
  return [
    element(
      "div",
      {
        class: "bar thick",
        role: "progressbar",
        "aria-label": "Progress",
        "aria-valuemin": "0",
        "aria-valuemax": "100",
        "aria-valuenow": String(Math.round(100 * share)),
      },
      bar,
    ),
    element("p", { class: "note" }, words.filter(Boolean).join(" · ")),
    job.waiting ? element("p", { class: "note" }, `Waiting for its annotator: ${job.waiting.reason}`) : null,
  ];
}

function actions(job, parts, again, onchange) {
  const act = async (call) => {
    fill(parts.note);
    try {
      await call();
    } catch (error) {
      fill(parts.note, problem(error));
    }
  };
  const button = (text, call) => element("button", { type: "button", onclick: () => act(call) }, text);
  if (STOPPABLE.has(job.state)) {
    return [button("Cancel", () => post(`jobs/${job.id}/cancel`))];
  }
  const found = [];
  if (job.state === "failed" || job.state === "cancelled") {
    found.push(
      button("Resume", async () => {
        await post(`jobs/${job.id}/resume`);
        again();
        onchange();
      }),
    );
  }
  if (hasEnded(job)) found.push(deletion(job, act, onchange));
  return found;
}

/** A button that deletes the job when it is pressed twice. */
function deletion(job, act, onchange) {
  let isSure = false;
  const press = () => {
    if (!isSure) {
      isSure = true;
      button.textContent = "Delete it with its results?";
      return;
    }
    act(async () => {
      await request(`jobs/${job.id}`, { method: "DELETE" });
      location.hash = "jobs";
      onchange();
    });
  };
  const button = element("button", { type: "button", onclick: press, onblur: () => {
    isSure = false;
    button.textContent = "Delete";
  } }, "Delete");
  return button;
}

async function showResults(job, parts) {
  const onproblem = (error) => fill(parts.note, problem(error));
  try {
    const dataset = await get(`jobs/${job.id}/parts`);
    const found = await get(`jobs/${job.id}/confidences`).catch((error) => error);
    fill(parts.results, downloads(job, dataset, onproblem), distribution(found));
  } catch (error) {
    onproblem(error);
  }
}

function downloads(job, dataset, onproblem) {
  const folder = `jobs/${job.id}`;
  const file = (format) =>
    download(`${folder}/results?format=${format}`, `${job.id}.${format}`, format === "parquet" ? "Parquet" : "JSONL", onproblem);
  return element(
    "section",
    {},
    element("h3", {}, "Dataset"),
    element("p", { class: "note" }, `${plural(dataset.rows, "row")}, ${bytes(dataset.bytes)}`),
    element(
      "div",
      { class: "actions" },
      job.merge === "never" ? [] : [file("parquet"), file("jsonl")],
      job.progress.rows_failed
        ? download(`${folder}/errors`, `${job.id}.errors.jsonl`, `${plural(job.progress.rows_failed, "rejected row")}`, onproblem)
        : [],
    ),
    partList(job, dataset, onproblem),
  );
}

function partList(job, dataset, onproblem) {
  const body = element("ul", { class: "parts" });
  const add = (page) => {
    body.append(...page.parts.map((part) =>
      element(
        "li",
        {},
        part.url
          ? element("a", { href: part.url, rel: "noreferrer" }, part.name)
          : plainLink(download(`jobs/${job.id}/parts/${part.name}`, `${job.id}.${part.name}`, part.name, onproblem)),
        element("span", { class: "hint" }, `${plural(part.rows, "row")}, ${bytes(part.bytes)}`),
      ),
    ));
    more.hidden = page.next_cursor == null;
    more.dataset.cursor = page.next_cursor ?? "";
  };
  const next = () => get(`jobs/${job.id}/parts?cursor=${more.dataset.cursor}`).then(add, onproblem);
  const more = element("button", { type: "button", class: "link", onclick: next }, "More parts");
  add(dataset);
  return element("details", {}, element("summary", {}, "Parts, to read one by one"), body, more);
}

function plainLink(link) {
  link.className = "";
  return link;
}

function distribution(found) {
  if (found instanceof Error) return element("p", { class: "note" }, found.message);
  const sure = found.counts.slice(found.counts.length / 2).reduce((sum, value) => sum + value, 0);
  return element(
    "section",
    {},
    element("h3", {}, "Confidence"),
    histogram(found.counts, found.rows),
    found.rows ? element("p", { class: "note" }, `${percent(sure / found.rows)} of the rows have a confidence above 0.5.`) : null,
    rows("Most confident", found.most_confident),
    rows("Least confident", found.least_confident),
  );
}

function rows(title, found) {
  if (found.length === 0) return null;
  return element(
    "details",
    { class: "extremes" },
    element("summary", {}, title),
    ...found.map((row) =>
      element(
        "div",
        { class: "extreme" },
        confidenceBar(row.confidence, `Confidence of row ${row.id}`),
        element("p", { class: "prompt" }, promptText(row.prompt)),
        element("p", { class: "chosen" }, element("span", { class: "tag" }, row.preferred === "tie" ? "tie" : "chosen"), row.chosen),
        element("p", { class: "rejected" }, element("span", { class: "tag" }, row.preferred === "tie" ? "tie" : "rejected"), row.rejected),
      ),
    ),
  );
}

// Jobs: a new one, all of them, and how each is.

import { byId, element, fill } from "./elements.js";
import { hasEnded } from "./events.js";
import { leaveJob, showJob, STATES } from "./job.js";
import { count, moment, percent, plural } from "./numbers.js";
import { get, post } from "./service.js";
import { upload } from "./uploads.js";

let uploading = null;
let opened = false;

export function startJobs() {
  byId("upload-form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  byId("files").addEventListener("change", nameFiles);
  byId("stop-upload").addEventListener("click", () => uploading?.abort());
  byId("more-jobs").addEventListener("click", (event) => list(event.target.dataset.cursor));
  const drop = byId("drop");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
    });
  }
  drop.addEventListener("drop", (event) => {
    byId("files").files = event.dataTransfer.files;
    nameFiles();
  });
}

/** Show all jobs, and the one with this id. */
export async function showJobs(id) {
  fill(byId("job"), id ? null : element("p", { class: "note" }, "Choose a job, or start one."));
  const shown = id ? showJob(id, list) : leaveJob();
  await list();
  await offerCertificates();
  await shown;
}

export const leaveJobs = leaveJob;

async function list(cursor) {
  const note = byId("jobs-problem");
  try {
    const page = await get(`jobs?limit=20${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
    note.hidden = true;
    byId("jobs-columns").hidden = false;
    const items = page.jobs.map(item);
    if (cursor) byId("job-list").append(...items);
    else fill(byId("job-list"), items.length ? items : element("li", { class: "note" }, "None yet."));
    byId("more-jobs").hidden = page.next_cursor == null;
    byId("more-jobs").dataset.cursor = page.next_cursor ?? "";
  } catch (error) {
    note.textContent = error.message;
    note.hidden = false;
    byId("jobs-columns").hidden = error.reason === "no_jobs" || error.status === 401;
  }
}

function item(job) {
  const { rows_done, rows_total } = job.progress;
  const share = rows_total ? ` · ${percent(rows_done / rows_total)}` : "";
  const current = location.hash === `#jobs/${job.id}` ? "true" : null;
  return element(
    "li",
    {},
    element(
      "a",
      { href: `#jobs/${job.id}`, "aria-current": current },
      element("span", { class: "pill", "data-state": job.state }, STATES[job.state] ?? job.state),
      element("span", { class: "when" }, moment(job.created_at)),
      element(
        "span",
        { class: "hint" },
        hasEnded(job) ? plural(rows_done, "row") : `${count(rows_done)} rows${share}`,
      ),
    ),
  );
}

async function offerCertificates() {
  const choice = byId("max-error");
  if (opened) return;
  opened = true;
  const { certificates } = await get("model").catch(() => ({ certificates: [] }));
  byId("max-error-field").hidden = certificates.length === 0;
  for (const { max_error } of certificates) {
    choice.append(element("option", { value: String(max_error) }, `a column for at most ${percent(max_error)} errors`));
  }
}

function nameFiles() {
  const names = [...byId("files").files].map((file) => file.name);
  byId("chosen-files").textContent = names.length ? names.join(", ") : "Choose files, or drop them here";
}

async function start() {
  const files = [...byId("files").files];
  const state = byId("upload-state");
  if (files.length === 0) {
    say("Choose a file first.", true);
    return;
  }
  if (uploading !== null) return;
  uploading = new AbortController();
  byId("stop-upload").hidden = false;
  try {
    const ids = [];
    for (const file of files) {
      const sent = await upload(file, (share) => say(`${file.name}: ${percent(share)} sent`), uploading.signal);
      ids.push(sent.id);
    }
    const job = await post("jobs", { ...(ids.length === 1 ? { file_id: ids[0] } : { file_ids: ids }), ...options() });
    byId("upload-form").reset();
    nameFiles();
    fill(state);
    location.hash = `jobs/${job.id}`;
  } catch (error) {
    say(error.name === "AbortError" ? "The upload was stopped; nothing was kept." : error.message, true);
  } finally {
    uploading = null;
    byId("stop-upload").hidden = true;
  }
}

function options() {
  const asked = { truncation: byId("truncation").value };
  if (byId("pairs").value) asked.pairs = byId("pairs").value;
  if (byId("max-error").value) asked.max_error = Number(byId("max-error").value);
  return asked;
}

function say(text, isProblem = false) {
  fill(byId("upload-state"), element("p", { class: isProblem ? "problem" : "note" }, text));
}

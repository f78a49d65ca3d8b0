// The page: which of its parts is shown, and how the service is.

import { showAnnotator } from "./annotator.js";
import { byId } from "./elements.js";
import { leaveJobs, showJobs, startJobs } from "./jobs.js";
import { startPlayground } from "./playground.js";
import { leaveReview, showReview, startReviews } from "./reviews.js";

const nothing = () => {};
const VIEWS = {
  playground: { title: "Playground", show: nothing, leave: nothing },
  jobs: { title: "Jobs", show: showJobs, leave: leaveJobs },
  review: { title: "Review", show: showReview, leave: leaveReview },
  annotator: { title: "Annotator", show: showAnnotator, leave: nothing },
};
const LOOK_MS = 10_000;

let current = null;

/** Show the part that the address names, such as #jobs/job-0123; returns whether it is another. */
function show() {
  const [asked, id] = location.hash.slice(1).split("/");
  const name = Object.hasOwn(VIEWS, asked) ? asked : "playground";
  const isOther = name !== current;
  if (isOther && current !== null) VIEWS[current].leave();
  current = name;
  for (const view of document.querySelectorAll(".view")) view.hidden = view.id !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[name].title} · cwpo`;
  VIEWS[name].show(id);
  return isOther;
}

async function look() {
  const [state, text] = await health();
  byId("status").dataset.state = state;
  byId("status-text").textContent = text;
  if (state === "unknown") clearInterval(looking);
}

async function health() {
  try {
    const answer = await fetch("health/ready");
    if (answer.ok) return ["ready", "ready"];
    // With --health-port, probes have a port of their own.
    if (answer.status === 404) return ["unknown", "on line"];
    return ["waiting", (await answer.json()).reason ?? "not ready"];
  } catch {
    return ["away", "no answer"];
  }
}

addEventListener("hashchange", () => {
  if (show()) byId(`${current}-title`).focus();
});
startPlayground();
startJobs();
startReviews();
show();
const looking = setInterval(() => document.hidden || look(), LOOK_MS);
look();

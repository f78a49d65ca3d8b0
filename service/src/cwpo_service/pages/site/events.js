// Server-sent events of a job. EventSource cannot send an API key, so they are read from fetch.

import { request } from "./service.js";

const PAUSE_MS = 1000;
const FINAL = new Set(["completed", "completed_with_errors", "failed", "cancelled"]);

export const hasEnded = (job) => FINAL.has(job.state);

/** Call `onjob` with the job as it stands, after each change, and at last as it ended. */
export async function follow(id, onjob, signal) {
  let seen = null;
  for (;;) {
    try {
      const headers = seen === null ? {} : { "Last-Event-ID": seen };
      const answer = await request(`jobs/${id}/events`, { headers, signal });
      if (answer.status === 204) return;
      for await (const event of eventsOf(answer.body)) {
        seen = event.id;
        const job = JSON.parse(event.data);
        onjob(job);
        if (hasEnded(job)) return;
      }
    } catch (error) {
      // A lost connection is taken up again where it broke; a refusal is not.
      if (signal.aborted) return;
      const isLost = error instanceof TypeError || error.status === 0 || error.status === 503;
      if (!isLost || seen === null) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    if (signal.aborted) return;
  }
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(
        block.split("\n").map((line) => [line.slice(0, line.indexOf(": ")), line.slice(line.indexOf(": ") + 2)]),
      );
      if (fields.data !== undefined) yield fields;
    }
  }
}

// Calls of the service that this page comes from.

import { askForKey } from "./key.js";

// The key is here and nowhere else: not in storage, not in a cookie, not in an address.
let key = null;

/** What the service refused, as its problem document says it; status 0 without any answer. */
export class ServiceError extends Error {
  constructor(message, status, reason) {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

/** Whether a key was given, without which links to files work by themselves. */
export const hasKey = () => key !== null;

/** The headers of a call. */
export const authorization = () => (key === null ? {} : { Authorization: `Bearer ${key}` });

/** The answer of a call; asks for an API key if the service wants one. Throws ServiceError. */
export async function request(path, options = {}) {
  const sent = key;
  let answer;
  try {
    answer = await fetch(path, {
      ...options,
      headers: { ...options.headers, ...authorization() },
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service does not answer. Is it still running?", 0, "unreachable");
  }
  if (answer.status === 401) {
    await newKey(sent);
    return request(path, options);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

/** The JSON of an answer. */
export async function get(path, options) {
  return (await request(path, options)).json();
}

/** Send JSON, and read the JSON of the answer. */
export async function post(path, body) {
  const sent = body === undefined
    ? {}
    : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return get(path, { method: "POST", ...sent });
}

/** Ask for a key in place of the one that was refused, once for all calls that wait for it. */
export async function newKey(refused) {
  if (key !== refused) return;
  const given = await askForKey(refused !== null);
  if (given === null) {
    throw new ServiceError("The service wants an API key, and none was given.", 401, "unauthorized");
  }
  key = given;
}

async function refusal(answer) {
  const text = await answer.text();
  return refusalOf(answer.status, text);
}

/** The error that an answer with this status and body is. */
export function refusalOf(status, text) {
  try {
    const problem = JSON.parse(text);
    return new ServiceError(problem.detail ?? problem.title, status, problem.reason);
  } catch {
    return new ServiceError(`The service answered with status ${status}.`, status, "unknown");
  }
}

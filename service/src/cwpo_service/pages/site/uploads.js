// Uploads, with their progress, which fetch does not tell.

import { authorization, get, newKey, refusalOf, ServiceError } from "./service.js";

const TYPES = [
  [/\.(jsonl|ndjson)$/i, "application/x-ndjson"],
  [/\.(jsonl|ndjson)\.gz$/i, "application/gzip"],
  [/\.parquet$/i, "application/vnd.apache.parquet"],
];

/** The uploaded file. `onprogress` gets the share that is sent. */
export async function upload(file, onprogress, signal) {
  const type = TYPES.find(([pattern]) => pattern.test(file.name))?.[1];
  if (type === undefined) {
    throw new ServiceError(`${file.name}: choose a .jsonl, .jsonl.gz or .parquet file.`, 0, "invalid");
  }
  // So that a key is asked for before the file is sent.
  await get("model");
  for (;;) {
    const sent = authorization();
    const answer = await send(file, type, sent, onprogress, signal);
    if (answer.status !== 401) return read(answer);
    await newKey(sent.Authorization?.slice("Bearer ".length) ?? null);
  }
}

function read({ status, responseText }) {
  if (status !== 201) throw refusalOf(status, responseText);
  return JSON.parse(responseText);
}

function send(file, type, headers, onprogress, signal) {
  return new Promise((resolve, reject) => {
    const call = new XMLHttpRequest();
    call.open("POST", "files");
    for (const [name, value] of Object.entries({ ...headers, "Content-Type": type })) {
      call.setRequestHeader(name, value);
    }
    call.upload.onprogress = ({ loaded, total }) => onprogress(total ? loaded / total : 1);
    call.onload = () => resolve(call);
    call.onerror = () => reject(new ServiceError("The service does not answer. Is it still running?", 0, "unreachable"));
    call.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => call.abort());
    call.send(file);
  });
}

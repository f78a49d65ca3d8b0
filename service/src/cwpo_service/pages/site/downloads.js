// Links to files, which need the API key where there is one.

import { element } from "./elements.js";
import { hasKey, request } from "./service.js";

/** A link that downloads the file; `onproblem` gets what the service refuses. */
export function download(path, name, text, onproblem) {
  const fetched = async (event) => {
    if (!hasKey()) return;
    event.preventDefault();
    try {
      const content = await (await request(path)).blob();
      const url = URL.createObjectURL(content);
      element("a", { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (error) {
      onproblem(error);
    }
  };
  return element("a", { class: "button", href: path, download: name, onclick: fetched }, text);
}

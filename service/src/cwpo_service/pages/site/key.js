// The dialog that asks for an API key.

import { byId } from "./elements.js";

let waiting = null;

/** The key that the reader gives; null if there is none. One dialog for all who ask meanwhile. */
export function askForKey(wasRefused) {
  waiting ??= ask(wasRefused).finally(() => {
    waiting = null;
  });
  return waiting;
}

function ask(wasRefused) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  const note = byId("key-problem");
  note.hidden = !wasRefused;
  note.textContent = wasRefused ? "The service does not know this key." : "";
  input.value = "";
  return new Promise((resolve) => {
    let given = null;
    const submit = (event) => {
      event.preventDefault();
      given = input.value.trim();
      dialog.close();
    };
    const cancel = () => dialog.close();
    byId("key-form").addEventListener("submit", submit);
    byId("key-cancel").addEventListener("click", cancel);
    dialog.addEventListener(
      "close",
      () => {
        byId("key-form").removeEventListener("submit", submit);
        byId("key-cancel").removeEventListener("click", cancel);
        input.value = "";
        resolve(given || null);
      },
      { once: true },
    );
    dialog.showModal();
  });
}

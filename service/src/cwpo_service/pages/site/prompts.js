// Prompts as text.

/** A prompt, which is a text or the messages of a chat. */
export function promptText(prompt) {
  if (typeof prompt === "string") return prompt;
  if (prompt.length === 1) return prompt[0].content;
  return prompt.map(({ role, content }) => `${role}: ${content}`).join("\n\n");
}

// Numbers as people read them.

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (value) => whole.format(value);
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
export const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** A score with a real minus sign. */
export const signed = (value) => value.toFixed(2).replace("-", "−");

/** Bytes in the largest unit that fits. */
export function bytes(value) {
  if (value < 1000) return plural(value, "byte");
  return `${short.format(value).replace("K", " k").replace("M", " M").replace("B", " G").replace("T", " T")}B`;
}

/** Seconds as the largest units. */
export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

/** A moment of the service, in the reader's time. */
export const moment = (text) =>
  new Date(text).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });

// Numbers as people read them. Pure.

export const DASH = "\u2013";
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (value) => (value == null ? DASH : whole.format(value));

export function fixed(value, digits) {
  return value == null ? DASH : value.toFixed(digits);
}

export function millis(value) {
  if (value == null) return DASH;
  return value < 10 ? value.toFixed(1) : whole.format(value);
}

export function micros(value) {
  return value < 1000 ? `${whole.format(value)} us` : `${(value / 1000).toFixed(value < 1e4 ? 2 : 1)} ms`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${value >= 100 || at === 0 ? whole.format(value) : value.toFixed(1)} ${units[at]}`;
}

export function percent(part, total) {
  if (!total) return DASH;
  const share = (100 * part) / total;
  return `${share === 0 || share === 100 ? share : share.toFixed(share < 10 || share > 99 ? 2 : 1)}%`;
}

export function duration(seconds) {
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const hours = Math.floor(seconds / 3600);
  const days = Math.floor(hours / 24);
  const clock = `${two(hours % 24)}:${two((seconds / 60) % 60)}:${two(seconds % 60)}`;
  return days ? `${days}d ${clock}` : clock;
}

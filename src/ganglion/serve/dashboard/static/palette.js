// Colours of the canvases, read from style.css so that both themes have one source.

const NAMES = [
  "ground", "panel", "raised", "line", "line-strong", "text", "soft", "faint", "accent", "good", "warn",
  "bad", "encode", "prefill", "denoise", "plan-prefill", "plan-decode", "plan-state", "plan-cached", "other", "dim-0", "dim-1", "dim-2", "dim-3",
];
// What a span computes ends up in pages of one kind: they share a colour.
const KIND_OF_PAGE = {
  robots: { feature: "encode", kv: "prefill", state: "denoise" },
  planners: { feature: "plan-prefill", kv: "plan-decode", state: "plan-state" },
};
const NUM_VERSION_COLOURS = 4; // of the lines' colours: neighbours differ
const OWNER_HUES = [205, 28, 332, 95, 268, 50, 175, 0, 240, 130, 300, 15];

export const palette = {};

export function loadPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const name of NAMES) palette[name] = style.getPropertyValue(`--${name}`).trim();
}

export const spanColour = (kind) => palette[kind] ?? palette.other;
export const pageColour = ({ kind, who }) => palette[KIND_OF_PAGE[who]?.[kind]] ?? palette.other;

export const versionColour = (version) => palette[`dim-${version % NUM_VERSION_COLOURS}`];

export function ownerColour(card) {
  const isLight = matchMedia("(prefers-color-scheme: light)").matches;
  return `hsl(${OWNER_HUES[(card - 1) % OWNER_HUES.length]} ${isLight ? "70% 45%" : "85% 70%"})`;
}

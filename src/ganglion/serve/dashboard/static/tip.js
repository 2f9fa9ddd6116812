// The one tooltip of the page.

import { element } from "./dom.js";

const tip = document.getElementById("tip");
let owner = null;

export function showTip(source, event, title, rows) {
  owner = source;
  const list = element("dl");
  for (const [name, value] of rows) list.append(element("dt", {}, name), element("dd", {}, String(value)));
  const heading = element("h3", {}, title);
  tip.replaceChildren(heading, list);
  tip.hidden = false;
  const { offsetWidth: wide, offsetHeight: high } = tip;
  const x = Math.min(event.clientX + 14, innerWidth - wide - 8);
  const y = event.clientY + 16 + high > innerHeight ? event.clientY - high - 12 : event.clientY + 16;
  tip.style.transform = `translate(${Math.max(8, x)}px, ${Math.max(8, y)}px)`;
}

export function hideTip(source) {
  if (owner !== source) return;
  owner = null;
  tip.hidden = true;
}

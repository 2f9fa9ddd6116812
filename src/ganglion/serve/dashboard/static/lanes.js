// One arm's chunks under way: a row for each that may overlap, drawn like the engine's steps by a beam that wraps
// around. The stripe below a flow step has the colour of the context version that it read; a diamond marks where a
// chunk went over to a newer one.

import { palette, spanColour, versionColour } from "./palette.js";
import { Surface } from "./surface.js";
import { hideTip, showTip } from "./tip.js";

const BLANK_SHARE = 0.05;
const MAX_ROW_PX = 26;
const STRIPE_PX = 3;
const MARK_PX = 3;
const MIN_SEGMENT_PX = 3; // narrower flow steps are not set apart
const MIN_LABEL_PX = 9;

export class Lanes {
  #chunks;
  #card;
  #name = "";
  #degree = 1;
  #boxes = [];

  constructor(canvas, card, chunks) {
    this.#chunks = chunks;
    this.#card = card;
    this.surface = new Surface(canvas, (pen, width, height) => this.#draw(pen, width, height));
    canvas.addEventListener("pointermove", (event) => this.#onMove(canvas, event));
    canvas.addEventListener("pointerleave", () => hideTip(canvas));
  }

  show(name, degree) {
    this.#name = name;
    this.#degree = degree;
    this.surface.redraw();
  }

  #draw(pen, width, height) {
    const { nowS, windowS } = this.#chunks;
    const oldestS = nowS - windowS * (1 - BLANK_SHARE);
    const shown = this.#chunks.of(this.#card).filter((chunk) => chunk.endS > oldestS);
    const numRows = Math.max(1, this.#degree, ...shown.map((chunk) => chunk.slot + 1));
    const high = Math.min(MAX_ROW_PX, height / numRows);
    const top = (height - numRows * high) / 2;
    const view = { pen, width, high, oldestS, nowS, windowS };
    this.#boxes = [];
    for (let row = 0; row < numRows; row += 1) {
      pen.globalAlpha = 1;
      pen.fillStyle = palette.raised;
      pen.beginPath();
      pen.roundRect(0, top + row * high + 1, width, high - 2, 3);
      pen.fill();
    }
    for (const chunk of shown) this.#drawPublication(view, chunk, top, numRows);
    for (const chunk of shown) this.#drawChunk(view, chunk, top + chunk.slot * high + 1);
    pen.globalAlpha = 1;
    pen.fillStyle = palette.text;
    pen.fillRect(toX(view, nowS), 0, 1, height);
  }

  // From here on all chunks under way may read what this one perceived.
  #drawPublication({ pen, ...view }, chunk, top, numRows) {
    const first = chunk.parts.find((part) => part.kind === "denoise");
    const seen = chunk.parts.findLast((part) => part.kind !== "denoise");
    if (!first || !seen || !first.isOwn || seen.endS < view.oldestS) return;
    pen.globalAlpha = 0.55;
    pen.fillStyle = versionColour(first.version);
    pen.fillRect(toX(view, seen.endS), top, 1, numRows * view.high);
  }

  #drawChunk(view, chunk, y) {
    const { pen } = view;
    const high = view.high - 2;
    for (const [x, wide] of stretches(view, chunk.startS, chunk.endS)) {
      pen.globalAlpha = 1;
      pen.fillStyle = palette["line-strong"];
      pen.beginPath();
      pen.roundRect(x, y, Math.max(1.5, wide), high, 2.5);
      pen.fill();
      this.#boxes.push({ x, y, wide, high, chunk });
    }
    for (const part of chunk.parts) {
      for (const [x, wide] of stretches(view, part.startS, part.endS)) drawPart(view, part, x, y, wide, high);
    }
    for (const part of chunk.parts) {
      if (part.isSwitch && part.startS > view.oldestS) drawMark(pen, toX(view, part.startS), y, high);
    }
    this.#drawLabel(view, chunk, y, high);
  }

  #drawLabel(view, chunk, y, high) {
    const first = chunk.parts.find((part) => part.kind === "denoise");
    const { pen } = view;
    if (high < MIN_LABEL_PX || !first || first.startS < view.oldestS) return;
    const [[x, wide]] = stretches(view, first.startS, chunk.endS);
    const label = `#${chunk.request}`;
    this.surface.font(Math.min(9.5, high - 2), 650);
    const labelPx = pen.measureText(label).width + 6;
    if (labelPx + 6 > wide) return;
    pen.globalAlpha = 1;
    pen.fillStyle = spanColour("denoise");
    pen.fillRect(x + 3, y, labelPx, high - STRIPE_PX);
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    pen.fillStyle = palette.ground;
    pen.fillText(label, x + 6, y + (high - STRIPE_PX) / 2 + 0.5);
  }

  #onMove(canvas, event) {
    const [x, y] = [event.offsetX, event.offsetY];
    const hit = this.#boxes.findLast((box) => x >= box.x && x <= box.x + Math.max(3, box.wide) && y >= box.y && y <= box.y + box.high);
    if (!hit) {
      hideTip(canvas);
      return;
    }
    const { chunk } = hit;
    const flow = chunk.parts.filter((part) => part.kind === "denoise");
    const last = flow.at(-1);
    const numDone = last ? last.firstUnit + last.numUnits : 0;
    showTip(canvas, event, `Chunk ${chunk.request} \u00b7 ${this.#name}`, [
      ["answers observation", chunk.seq],
      ["newest one it read", last ? last.contextSeq : chunk.seq],
      ["context versions read", versions(flow) || "\u2013"],
      ["flow steps", last ? `${numDone} of ${numDone + last.numLeft}` : "perceiving"],
      ["on the engine", `${((chunk.endS - chunk.startS) * 1000).toFixed(1)} ms`],
      ["end", chunk.isDone ? "sent" : chunk.isOver ? "dropped" : "under way"],
    ]);
  }

  close() {
    this.surface.close();
  }
}

function drawPart({ pen }, part, x, y, wide, high) {
  pen.globalAlpha = 1;
  pen.fillStyle = spanColour(part.kind);
  pen.fillRect(x, y, Math.max(1, wide), high);
  if (part.kind !== "denoise") return;
  pen.fillStyle = versionColour(part.version);
  pen.fillRect(x, y + high - STRIPE_PX, Math.max(1, wide), STRIPE_PX);
  const segment = wide / part.numUnits;
  if (segment < MIN_SEGMENT_PX) return;
  pen.fillStyle = palette.panel;
  pen.globalAlpha = 0.75;
  for (let unit = 1; unit <= part.numUnits; unit += 1) pen.fillRect(x + unit * segment - 0.8, y, 0.8, high);
}

function drawMark(pen, x, y, high) {
  const middle = y + (high - STRIPE_PX) / 2;
  const size = Math.min(MARK_PX, high / 3);
  pen.globalAlpha = 1;
  pen.fillStyle = palette.text;
  pen.strokeStyle = palette.ground;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(x, middle - size);
  pen.lineTo(x + size, middle);
  pen.lineTo(x, middle + size);
  pen.lineTo(x - size, middle);
  pen.closePath();
  pen.fill();
  pen.stroke();
}

const toX = ({ width, windowS }, timeS) => (((timeS % windowS) + windowS) % windowS) * (width / windowS);

// Where [startS, endS] lies on the canvas: one stretch, or two when the beam wrapped around within it.
function stretches(view, startS, endS) {
  const from = Math.max(startS, view.oldestS);
  if (endS <= from) return [];
  const [x, wide] = [toX(view, from), ((endS - from) / view.windowS) * view.width];
  if (x + wide <= view.width) return [[x, wide]];
  return [[x, view.width - x], [0, x + wide - view.width]];
}

function versions(flow) {
  const read = [...new Set(flow.map((part) => part.version))];
  return read.map((version) => `v${version}`).join(" \u2192 ");
}

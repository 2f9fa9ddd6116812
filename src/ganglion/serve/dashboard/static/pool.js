// The page pool as a map: each large page a tile, cut into its small pages; colour = kind, ring = owner.

import { setFacts, setLegend } from "./dom.js";
import { bytes, count, percent } from "./format.js";
import { ownerColour, pageColour, palette } from "./palette.js";
import { Surface } from "./surface.js";
import { hideTip, showTip } from "./tip.js";

const GAP_PX = 4;
const MAX_TILE_PX = 104;
const MIN_TILE_PX = 9;
const MIN_FREE_PX = 6;
const MAX_FREE_PX = 16;
const MAX_FREE_DRAWN = 600;
const RING_PX = 9; // smaller pages get a stripe
const STRIPE_PX = 4; // smaller ones nothing
const CACHED = "cached";
const SHARED = "shared";
const REQUEST = "request "; // as the ledger names what one request of a language model owns

export class Pool {
  #pool = null;
  #tiles = new Map(); // large page -> its live pages
  #boxes = [];
  #cards = new Map(); // session -> {card, name}
  #cardsKey = "";
  #lit = null;

  constructor({ canvas, facts, legend, share }, onHover) {
    Object.assign(this, { facts, legend, share, onHover });
    this.surface = new Surface(canvas, (pen, width, height) => this.#draw(pen, width, height));
    canvas.addEventListener("pointermove", (event) => this.#onMove(canvas, event));
    canvas.addEventListener("pointerleave", () => {
      hideTip(canvas);
      this.onHover(null);
    });
  }

  show(pool, arms) {
    const key = arms.map((arm) => `${arm.card}:${arm.session_id}`).join();
    if (key !== this.#cardsKey) {
      this.#cardsKey = key;
      this.#cards = new Map(arms.map((arm) => [arm.session_id, { card: arm.card, name: arm.session?.robot_id ?? arm.robot.robot_id }]));
      this.surface.redraw();
    }
    if (pool === undefined) return;
    this.#pool = pool;
    this.#tiles = new Map();
    for (const [large, place, layout, owner, numRefs] of pool?.pages ?? []) {
      if (!this.#tiles.has(large)) this.#tiles.set(large, []);
      this.#tiles.get(large).push({ large, place, layout, owner: pool.owners[owner], numRefs });
    }
    this.#showFacts();
    this.surface.redraw();
  }

  light(sessionId) {
    if (this.#lit === sessionId) return;
    this.#lit = sessionId;
    this.surface.redraw();
  }

  #showFacts() {
    const pool = this.#pool;
    if (!pool) {
      setFacts(this.facts, [["", "this service keeps no pages"]]);
      return;
    }
    const totalBytes = pool.num_large_pages * pool.large_page_bytes;
    const sizeOf = (layout) => pool.large_page_bytes / layout.pages_per_large;
    const usedBytes = pool.layouts.reduce((sum, layout) => sum + layout.num_used * sizeOf(layout), 0);
    const cachedBytes = pool.layouts.reduce((sum, layout) => sum + layout.num_cached * sizeOf(layout), 0);
    setFacts(this.facts, [
      ["used", bytes(usedBytes)],
      ["cached", bytes(cachedBytes)],
      ["free", bytes(totalBytes - usedBytes - cachedBytes)],
      ["hit rate", percent(pool.num_hits, pool.num_hits + pool.num_misses)],
    ]);
    const [used, cached] = this.share.children;
    used.style.width = `${(100 * usedBytes) / totalBytes}%`;
    cached.style.width = `${(100 * cachedBytes) / totalBytes}%`;
    setLegend(this.legend, [
      ...pool.layouts.map((layout) => ({
        colour: pageColour(layout),
        name: layout.name,
        value: `${count(layout.num_used)}${layout.num_cached ? ` + ${count(layout.num_cached)} cached` : ""}`,
      })),
      { colour: palette.soft, shape: "is-ring", name: "ring or stripe: its owner" },
      { colour: palette["line-strong"], name: `free large pages (${bytes(pool.large_page_bytes)})`, value: count(pool.num_free_large_pages) },
    ]);
  }

  #draw(pen, width, height) {
    this.#boxes = [];
    const pool = this.#pool;
    if (!pool) return;
    const larges = [...this.#tiles.keys()].sort((a, b) => a - b);
    const numFree = pool.num_large_pages - larges.length;
    const numDrawnFree = Math.min(numFree, MAX_FREE_DRAWN);
    const leastFreeHigh = numFree ? Math.ceil(numDrawnFree / perRow(MIN_FREE_PX, width)) * cellPx(MIN_FREE_PX) + GAP_PX : 0;
    const tilesHigh = height - leastFreeHigh;
    const tile = tileSize(larges.length, width, tilesHigh);
    const columns = Math.max(1, Math.floor((width + GAP_PX) / (tile + GAP_PX)));
    larges.forEach((large, at) => {
      const x = (at % columns) * (tile + GAP_PX);
      const y = Math.floor(at / columns) * (tile + GAP_PX);
      if (y + tile <= tilesHigh + 1) this.#drawTile(pen, large, x, y, tile);
    });
    const rows = Math.ceil(larges.length / columns);
    const freeTop = rows ? Math.min(tilesHigh, rows * (tile + GAP_PX)) + GAP_PX : 0;
    drawFree(pen, numDrawnFree, freeTop, width, height);
  }

  #drawTile(pen, large, x, y, tile) {
    const pages = this.#tiles.get(large);
    const layout = this.#pool.layouts[pages[0].layout];
    const columns = Math.ceil(Math.sqrt(layout.pages_per_large));
    const rows = Math.ceil(layout.pages_per_large / columns);
    pen.globalAlpha = 1;
    pen.fillStyle = palette.raised;
    pen.strokeStyle = palette["line-strong"];
    pen.lineWidth = 1;
    pen.beginPath();
    pen.roundRect(x + 0.5, y + 0.5, tile - 1, tile - 1, 4);
    pen.fill();
    pen.stroke();
    const inner = tile - 5;
    const [wide, high] = [inner / columns, inner / rows];
    const gap = Math.min(wide, high) >= 5 ? 1 : Math.min(wide, high) >= 3 ? 0.5 : 0;
    for (const page of pages) {
      const box = {
        x: x + 2.5 + (page.place % columns) * wide,
        y: y + 2.5 + Math.floor(page.place / columns) * high,
        wide, high, page, layout,
      };
      this.#drawPage(pen, box, gap);
      this.#boxes.push(box);
    }
  }

  #drawPage(pen, { x, y, wide, high, page, layout }, gap) {
    const isDim = this.#lit !== null && page.owner !== this.#lit;
    const isCached = page.owner === CACHED;
    const [w, h] = [wide - gap, high - gap];
    pen.globalAlpha = (isCached ? 0.38 : 1) * (isDim ? 0.22 : 1);
    pen.fillStyle = pageColour(layout);
    pen.fillRect(x + gap / 2, y + gap / 2, w, h);
    if (isCached || Math.min(w, h) < STRIPE_PX) return;
    const owner = this.#cards.get(page.owner);
    if (!owner && page.owner !== SHARED) return;
    const colour = owner ? ownerColour(owner.card) : palette.text;
    if (Math.min(w, h) < RING_PX) {
      pen.fillStyle = colour;
      pen.fillRect(x + gap / 2, y + gap / 2 + 0.7 * h, w, 0.3 * h);
      return;
    }
    const line = Math.min(2, Math.max(1, Math.min(w, h) / 7));
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect(x + (gap + line) / 2, y + (gap + line) / 2, w - line, h - line);
  }

  #onMove(canvas, event) {
    const [x, y] = [event.offsetX, event.offsetY];
    const hit = this.#boxes.find((box) => x >= box.x && x < box.x + box.wide && y >= box.y && y < box.y + box.high);
    if (!hit) {
      hideTip(canvas);
      this.onHover(null);
      return;
    }
    const { page, layout } = hit;
    showTip(canvas, event, `${layout.name} page`, [
      ["large page", `${count(page.large)}, place ${page.place + 1} of ${layout.pages_per_large}`],
      ["owner", this.#cards.get(page.owner)?.name ?? page.owner],
      ["references", count(page.numRefs)],
      ["size", bytes(this.#pool.large_page_bytes / layout.pages_per_large)],
    ]);
    const isKnown = this.#cards.has(page.owner) || page.owner.startsWith(REQUEST);
    this.onHover(isKnown ? page.owner : null);
  }
}

const cellPx = (side) => side + Math.max(2, Math.round(side / 5));
const perRow = (side, width) => Math.floor((width + cellPx(side) - side) / cellPx(side));

// As large as the space below the tiles allows.
function drawFree(pen, numFree, top, width, height) {
  let side = MAX_FREE_PX;
  while (side > MIN_FREE_PX && top + Math.ceil(numFree / perRow(side, width)) * cellPx(side) > height) side -= 1;
  const columns = perRow(side, width);
  pen.globalAlpha = 1;
  pen.fillStyle = palette.raised;
  pen.strokeStyle = palette.line;
  pen.lineWidth = 1;
  for (let at = 0; at < numFree; at += 1) {
    pen.beginPath();
    pen.roundRect((at % columns) * cellPx(side) + 0.5, top + Math.floor(at / columns) * cellPx(side) + 0.5, side - 1, side - 1, 2);
    pen.fill();
    pen.stroke();
  }
}

function tileSize(numTiles, width, height) {
  for (let tile = MAX_TILE_PX; tile > MIN_TILE_PX; tile -= 1) {
    const columns = Math.floor((width + GAP_PX) / (tile + GAP_PX));
    const rows = Math.floor((height + GAP_PX) / (tile + GAP_PX));
    if (columns * rows >= numTiles) return tile;
  }
  return MIN_TILE_PX;
}

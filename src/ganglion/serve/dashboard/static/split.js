// Who had each lane in the last seconds: columns of a tenth of a second, robots' part from below, planners' above it.

import { fixed } from "./format.js";
import { palette } from "./palette.js";
import { Surface } from "./surface.js";
import { hideTip, showTip } from "./tip.js";

const WINDOW_S = 10;
const COLUMN_S = 0.1;
const LATE_COLUMNS = 3; // steps are told a little later than they are run
const NUM_COLUMNS = WINDOW_S / COLUMN_S;
const LABEL_PX = 46;
const SHARE_PX = 112;
const GAP_PX = 4;
const ROBOTS = 0;
const PREFILL = 1;
const DECODE = 2;

export class Split {
  #columns = new Map(); // number of the column -> per lane: seconds of [robots, planners' prompts, planners' answers]
  #nowS = 0;
  #numLanes = 1;
  #hasRobots = false;

  constructor(canvas) {
    this.surface = new Surface(canvas, (pen, width, height) => this.#draw(pen, width, height));
    canvas.addEventListener("pointermove", (event) => this.#onMove(canvas, event));
    canvas.addEventListener("pointerleave", () => hideTip(canvas));
  }

  clear() {
    this.#columns.clear();
    this.#nowS = 0;
    this.#hasRobots = false;
  }

  note({ now_s: nowS, steps, turns }) {
    if (nowS < this.#nowS) this.clear(); // another server
    this.#nowS = nowS;
    this.#hasRobots ||= steps.length > 0;
    for (const { pieces } of steps) {
      for (const piece of pieces) {
        this.#numLanes = Math.max(this.#numLanes, piece.lane + 1);
        this.#add(piece.lane, ROBOTS, piece.start_s, piece.run_us);
      }
    }
    for (const turn of turns) {
      const numTokens = turn.num_prefill + turn.num_decode;
      const prefillUs = numTokens ? (turn.run_us * turn.num_prefill) / numTokens : 0;
      for (let lane = 0; lane < this.#numLanes; lane += 1) {
        this.#add(lane, PREFILL, turn.start_s, prefillUs);
        this.#add(lane, DECODE, turn.start_s + prefillUs / 1e6, turn.run_us - prefillUs);
      }
    }
    const oldest = Math.floor((nowS - WINDOW_S) / COLUMN_S) - LATE_COLUMNS - 1;
    for (const at of this.#columns.keys()) if (at < oldest) this.#columns.delete(at);
    this.surface.redraw();
  }

  #add(lane, who, startS, runUs) {
    let fromS = startS;
    const endS = startS + runUs / 1e6;
    while (fromS < endS) {
      const at = Math.floor(fromS / COLUMN_S + 1e-9);
      const untilS = Math.min(endS, (at + 1) * COLUMN_S);
      if (untilS <= fromS) return; // rounding
      if (!this.#columns.has(at)) this.#columns.set(at, []);
      const lanes = this.#columns.get(at);
      lanes[lane] ??= [0, 0, 0];
      lanes[lane][who] += untilS - fromS;
      fromS = untilS;
    }
  }

  // [robots, prompts, answers] as shares of the window.
  #shares(lane) {
    const sums = [0, 0, 0];
    const last = this.#lastColumn();
    for (let at = last - NUM_COLUMNS + 1; at <= last; at += 1) {
      const parts = this.#columns.get(at)?.[lane];
      if (parts) parts.forEach((seconds, who) => (sums[who] += seconds));
    }
    return sums.map((seconds) => seconds / WINDOW_S);
  }

  #lastColumn() {
    return Math.floor(this.#nowS / COLUMN_S) - LATE_COLUMNS;
  }

  #draw(pen, width, height) {
    const high = (height - GAP_PX * (this.#numLanes - 1)) / this.#numLanes;
    const spanPx = Math.max(0, width - LABEL_PX - SHARE_PX);
    const wide = spanPx / NUM_COLUMNS;
    const last = this.#lastColumn();
    const colours = [palette.denoise, palette["plan-prefill"], palette["plan-decode"]];
    this.surface.font(10.5);
    pen.textBaseline = "middle";
    for (let lane = 0; lane < this.#numLanes; lane += 1) {
      const top = lane * (high + GAP_PX);
      pen.textAlign = "left";
      pen.fillStyle = palette.raised;
      pen.beginPath();
      pen.roundRect(LABEL_PX, top, spanPx, high, 4);
      pen.fill();
      pen.fillStyle = palette.faint;
      pen.fillText(`lane ${lane}`, 0, top + high / 2);
      for (let column = 0; column < NUM_COLUMNS; column += 1) {
        const parts = this.#columns.get(last - NUM_COLUMNS + 1 + column)?.[lane];
        if (!parts) continue;
        let y = top + high;
        parts.forEach((seconds, who) => {
          const part = Math.min(seconds / COLUMN_S, 1) * high;
          pen.fillStyle = colours[who];
          pen.fillRect(LABEL_PX + column * wide, Math.max(top, y - part), Math.max(1, wide - 0.6), Math.min(part, y - top));
          y = Math.max(top, y - part);
        });
      }
      const [robots, prompts, answers] = this.#shares(lane);
      pen.textAlign = "right";
      pen.fillStyle = palette.denoise;
      if (this.#hasRobots) pen.fillText(percentOf(robots), width - 52, top + high / 2);
      pen.fillStyle = palette["plan-decode"];
      pen.fillText(percentOf(prompts + answers), width, top + high / 2);
    }
  }

  #onMove(canvas, event) {
    const high = canvas.clientHeight / this.#numLanes;
    const lane = Math.min(this.#numLanes - 1, Math.floor(event.offsetY / high));
    const [robots, prompts, answers] = this.#shares(lane);
    showTip(canvas, event, `Lane ${lane}, last ${WINDOW_S} s`, [
      ["robots", percentOf(robots)],
      ["planners: prompts", percentOf(prompts)],
      ["planners: answers", percentOf(answers)],
      ["neither", percentOf(Math.max(0, 1 - robots - prompts - answers))],
    ]);
  }
}

const percentOf = (share) => `${fixed(100 * share, share < 0.0995 ? 1 : 0)}%`;

// One arm's queue of actions: what was executed on the left, what waits on the right, now in between.

import { palette } from "./palette.js";
import { Surface } from "./surface.js";

const PAST_TICKS = 24;
const MAX_LINES = 4;
const BAR_PX = 9;

export class Queue {
  #policy = { horizon: 50, action_low: [], action_high: [] };
  #tick = 0;
  #rows = [];
  #actions = new Map(); // tick -> its action row, as it was last announced

  constructor(canvas) {
    this.surface = new Surface(canvas, (pen, width, height) => this.#draw(pen, width, height));
  }

  set policy(policy) {
    this.#policy = policy;
    this.surface.redraw();
  }

  show(tick, rows) {
    if (tick < this.#tick) this.#actions.clear(); // the robot started anew
    const isSame = tick === this.#tick && rows.length === this.#rows.length && rows[0]?.[0] === this.#rows[0]?.[0];
    this.#tick = tick;
    this.#rows = rows;
    rows.forEach((row, at) => this.#actions.set(tick + at, row));
    for (const known of this.#actions.keys()) {
      if (known < tick - PAST_TICKS || known >= tick + rows.length) this.#actions.delete(known);
    }
    if (!isSame) this.surface.redraw();
  }

  #draw(pen, width, height) {
    const futureTicks = Math.max(this.#policy.horizon, this.#rows.length);
    const step = width / (PAST_TICKS + futureTicks);
    const nowX = PAST_TICKS * step;
    const barTop = height - BAR_PX;
    const gap = step > 4 ? 1.2 : 0.6;

    for (let at = -PAST_TICKS; at < futureTicks; at += 1) {
      const isKnown = this.#actions.has(this.#tick + at);
      pen.fillStyle = isKnown ? palette.accent : palette.line;
      pen.globalAlpha = isKnown && at < 0 ? 0.26 : 1;
      pen.beginPath();
      pen.roundRect(nowX + at * step, barTop, Math.max(1, step - gap), BAR_PX, 1.2);
      pen.fill();
    }
    this.#drawLines(pen, { step, nowX, bottom: barTop - 5, futureTicks });
    pen.globalAlpha = 1;
    pen.fillStyle = palette.text;
    pen.fillRect(Math.round(nowX) - 1, 0, 1, height);
  }

  #drawLines(pen, { step, nowX, bottom, futureTicks }) {
    const { action_low: low, action_high: high } = this.#policy;
    const numLines = Math.min(MAX_LINES, this.#rows[0]?.length ?? [...this.#actions.values()][0]?.length ?? 0);
    pen.lineWidth = 1.3;
    pen.lineJoin = "round";
    pen.globalAlpha = 0.5;
    pen.fillStyle = palette.line;
    pen.fillRect(0, bottom / 2, nowX + futureTicks * step, 1);
    for (let dim = 0; dim < numLines; dim += 1) {
      const [least, most] = [low[dim] ?? -1, high[dim] ?? 1];
      pen.strokeStyle = palette[`dim-${dim}`];
      for (const [from, to, alpha] of [[-PAST_TICKS, 0, 0.35], [0, futureTicks, 0.95]]) {
        pen.globalAlpha = alpha;
        pen.beginPath();
        let isDown = false;
        for (let at = from; at <= to && at < futureTicks; at += 1) {
          const row = this.#actions.get(this.#tick + at);
          if (!row) {
            isDown = false;
            continue;
          }
          const share = Math.min(1, Math.max(0, (row[dim] - least) / (most - least || 1)));
          const [x, y] = [nowX + (at + 0.5) * step, 1 + (1 - share) * (bottom - 2)];
          if (isDown) pen.lineTo(x, y);
          else pen.moveTo(x, y);
          isDown = true;
        }
        pen.stroke();
      }
    }
  }

  close() {
    this.surface.close();
  }
}

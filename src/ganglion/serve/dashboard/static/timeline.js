// The last engine steps: an oscilloscope whose beam writes pieces into lanes and wraps around, so that what is
// drawn stands still; below it each step's run time against its budget.

import { element, setFacts, setLegend } from "./dom.js";
import { count, fixed, micros } from "./format.js";
import { palette, spanColour } from "./palette.js";
import { Surface } from "./surface.js";
import { hideTip, showTip } from "./tip.js";

const WINDOWS_S = [0.25, 0.5, 1, 2];
const MAX_STEPS = 2000;
const NUM_BARS = 120;
const FACTS_S = 2;
const BLANK_SHARE = 0.05; // of the window, ahead of the beam
const AXIS_PX = 18;
const LABEL_PX = 46;
const MIN_UPRIGHT_PX = 10; // narrower pieces get no label at all
const MAX_NAMES = 16;
const KINDS = ["encode", "prefill", "denoise"];
const PLANNER_KINDS = [
  ["plan-prefill", "planners: prompts"],
  ["plan-decode", "planners: answers"],
];
const ALL_LANES = -1; // lanes wait for a step of a language model, whatever cores it runs on

// Where there are robots it is theirs.
const budgetOf = (steps) => (steps.findLast((step) => !step.turn) ?? steps.at(-1))?.budget_us ?? 0;

// A step of a language model, as the steps of the robots' engine are drawn.
function asStep(turn) {
  const { turn: step, model, start_s, run_us, budget_us, num_waiting, num_rows, num_prefill, num_decode } = turn;
  const kind = num_prefill > num_decode ? "plan-prefill" : "plan-decode";
  const piece = { model, stage: model, kind, lane: ALL_LANES, num_rows, num_units: num_prefill + num_decode, start_s, run_us, rows: [], turn };
  return { step, start_s, run_us, budget_us, num_waiting, pieces: [piece], turn };
}

export class Timeline {
  #steps = [];
  #nowS = 0;
  #numLanes = 1;
  #windowS = 0.5;
  #boxes = [];
  #bars = [];
  #nameOf = new Map();

  constructor({ timeline, budget, facts, legend, choice }) {
    this.facts = facts;
    this.legend = legend;
    this.surface = new Surface(timeline, (pen, width, height) => this.#drawLanes(pen, width, height));
    this.budget = new Surface(budget, (pen, width, height) => this.#drawBars(pen, width, height));
    this.#hover(timeline, () => this.#boxes);
    this.#hover(budget, () => this.#bars);
    for (const seconds of WINDOWS_S) {
      const button = element("button", { type: "button" }, seconds < 1 ? `${seconds * 1000} ms` : `${seconds} s`);
      button.addEventListener("click", () => this.#choose(seconds, choice));
      button.dataset.seconds = seconds;
      choice.append(button);
    }
    this.#choose(this.#windowS, choice);
  }

  show({ now_s: nowS, steps: robotSteps, turns, arms }) {
    if (nowS < this.#nowS) this.#steps = []; // another server
    const steps = [...robotSteps, ...turns.map(asStep)].sort((one, other) => one.start_s - other.start_s);
    const isMoving = steps.length > 0 || this.#steps.length > 0;
    this.#nowS = nowS;
    this.#steps.push(...steps);
    this.#steps.splice(0, this.#steps.length - MAX_STEPS);
    for (const step of steps) {
      for (const piece of step.pieces) this.#numLanes = Math.max(this.#numLanes, piece.lane + 1);
    }
    this.#nameOf = new Map(arms.map((arm) => [arm.card, arm.session?.robot_id ?? arm.robot.robot_id]));
    if (isMoving) this.surface.redraw();
    if (steps.length) this.budget.redraw();
    this.#showFacts(steps.at(-1) ?? this.#steps.at(-1));
  }

  #choose(seconds, choice) {
    this.#windowS = seconds;
    for (const button of choice.children) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.seconds) === seconds));
    }
    this.surface.redraw();
  }

  #showFacts(last) {
    const recent = this.#steps.filter((step) => step.start_s > this.#nowS - FACTS_S);
    const busy = (of) => `${fixed((100 * of.reduce((sum, step) => sum + step.run_us, 0)) / (FACTS_S * 1e6), 0)}%`;
    const [robots, planners] = [recent.filter((step) => !step.turn), recent.filter((step) => step.turn)];
    const hasRobots = this.#steps.some((step) => !step.turn);
    const hasPlanners = this.#steps.some((step) => step.turn);
    const sorted = recent.map((step) => step.run_us).sort((a, b) => a - b);
    setFacts(this.facts, [
      ["steps/s", fixed(recent.length / FACTS_S, 1)],
      ...(hasRobots && hasPlanners ? [["robots", busy(robots)], ["planners", busy(planners)]] : [["busy", busy(recent)]]),
      ["p50", sorted.length ? micros(sorted[sorted.length >> 1]) : "\u2013"],
      ["waiting", count(last?.num_waiting ?? 0)],
    ]);
    setLegend(this.legend, [
      ...(hasRobots || !hasPlanners ? KINDS.map((kind) => ({ colour: spanColour(kind), name: kind })) : []),
      ...(hasPlanners ? PLANNER_KINDS.map(([kind, name]) => ({ colour: spanColour(kind), name })) : []),
      { colour: palette.warn, shape: "is-dash", name: last ? `budget ${micros(budgetOf(this.#steps))}` : "budget" },
      { name: hasPlanners ? (hasRobots ? "label: rows \u00d7 units, or tokens" : "label: tokens") : "label: rows \u00d7 units" },
    ]);
  }

  #drawLanes(pen, width, height) {
    const spanPx = width - LABEL_PX;
    const laneTop = (lane) => 2 + (lane * (height - AXIS_PX - 2)) / this.#numLanes;
    const laneHigh = (height - AXIS_PX - 2) / this.#numLanes - 4;
    const toX = (timeS) => LABEL_PX + ((((timeS % this.#windowS) + this.#windowS) % this.#windowS) / this.#windowS) * spanPx;
    this.#boxes = [];
    this.surface.font(10.5);
    pen.textBaseline = "middle";
    for (let lane = 0; lane < this.#numLanes; lane += 1) {
      pen.fillStyle = palette.raised;
      pen.beginPath();
      pen.roundRect(LABEL_PX, laneTop(lane), spanPx, laneHigh, 4);
      pen.fill();
      pen.fillStyle = palette.faint;
      pen.fillText(`lane ${lane}`, 0, laneTop(lane) + laneHigh / 2);
    }
    this.#drawAxis(pen, height, spanPx);
    const oldestS = this.#nowS - this.#windowS * (1 - BLANK_SHARE);
    for (const step of this.#steps) {
      for (const piece of step.pieces) {
        if (piece.start_s < oldestS || piece.start_s > this.#nowS) continue;
        const x = toX(piece.start_s);
        const wide = Math.max(1.5, (piece.run_us / 1e6 / this.#windowS) * spanPx);
        const lanes = piece.lane === ALL_LANES ? [...Array(this.#numLanes).keys()] : [piece.lane];
        for (const lane of lanes) {
          const box = { x, y: laneTop(lane) + 2, wide: Math.min(wide, width - x), high: laneHigh - 4, step, piece };
          this.#drawPiece(pen, box);
          this.#boxes.push(box);
        }
      }
    }
    const beamX = toX(this.#nowS);
    pen.globalAlpha = 1;
    pen.fillStyle = palette.text;
    pen.fillRect(beamX, 0, 1, height - AXIS_PX);
  }

  #drawAxis(pen, height, spanPx) {
    pen.textAlign = "center";
    pen.fillStyle = palette.faint;
    const stepMs = (this.#windowS * 1000) / 5;
    for (let mark = 0; mark <= 5; mark += 1) {
      const x = LABEL_PX + (mark / 5) * spanPx;
      pen.textAlign = mark === 0 ? "left" : mark === 5 ? "right" : "center";
      pen.fillText(`${Math.round(mark * stepMs)} ms`, x, height - AXIS_PX / 2 + 2);
      pen.globalAlpha = 0.6;
      pen.fillRect(Math.min(x, LABEL_PX + spanPx - 1), height - AXIS_PX - 1, 1, 3);
      pen.globalAlpha = 1;
    }
    pen.textAlign = "left";
  }

  #drawPiece(pen, { x, y, wide, high, piece }) {
    pen.globalAlpha = 0.92;
    pen.fillStyle = spanColour(piece.kind);
    pen.beginPath();
    pen.roundRect(x, y, Math.max(1, wide - 0.8), high, Math.min(3, wide / 3));
    pen.fill();
    const label = piece.turn ? String(piece.num_units) : `${piece.num_rows}\u00d7${piece.num_units}`;
    this.surface.font(10.5, 600);
    const labelPx = pen.measureText(label).width + 5;
    const isUpright = labelPx > wide;
    if (isUpright && (wide < MIN_UPRIGHT_PX || labelPx > high)) return;
    pen.save();
    pen.globalAlpha = 1;
    pen.fillStyle = palette.ground;
    pen.textAlign = "center";
    pen.translate(x + wide / 2, y + high / 2 + 0.5);
    if (isUpright) pen.rotate(-Math.PI / 2);
    pen.fillText(label, 0, 0);
    pen.restore();
  }

  #drawBars(pen, width, height) {
    const steps = this.#steps.slice(-NUM_BARS);
    const budgetUs = budgetOf(steps);
    const topUs = Math.max(budgetUs * 1.25, ...steps.map((step) => step.run_us)) || 1;
    const toHigh = (us) => (us / topUs) * (height - 3);
    const wide = (width - LABEL_PX) / NUM_BARS;
    this.#bars = [];
    steps.forEach((step, at) => {
      const x = width - (steps.length - at) * wide;
      let y = height;
      const modelUs = step.pieces.reduce((sum, piece) => sum + piece.run_us, 0);
      const squeeze = modelUs > step.run_us ? step.run_us / modelUs : 1; // lanes run side by side
      const parts = step.pieces.map((piece) => [spanColour(piece.kind), piece.run_us * squeeze]);
      parts.push([palette.faint, step.run_us - modelUs * squeeze]);
      for (const [colour, us] of parts) {
        const high = toHigh(us);
        pen.fillStyle = colour;
        pen.globalAlpha = step.run_us > step.budget_us ? 1 : 0.75;
        pen.fillRect(x, y - high, Math.max(1, wide - 1.2), high);
        y -= high;
      }
      if (step.run_us > step.budget_us) {
        pen.fillStyle = palette.bad;
        pen.fillRect(x, y - 2, Math.max(1, wide - 1.2), 2);
      }
      this.#bars.push({ x, y: 0, wide, high: height, step, piece: null });
    });
    pen.globalAlpha = 1;
    this.budget.font(10.5);
    pen.textBaseline = "middle";
    const budgetY = height - toHigh(budgetUs);
    pen.fillStyle = palette.faint;
    if (budgetY < height - 20) pen.fillText("run time", 0, height - 7);
    if (!budgetUs) return;
    pen.strokeStyle = palette.warn;
    pen.setLineDash([4, 3]);
    pen.beginPath();
    pen.moveTo(LABEL_PX, Math.round(budgetY) + 0.5);
    pen.lineTo(width, Math.round(budgetY) + 0.5);
    pen.stroke();
    pen.setLineDash([]);
    pen.fillStyle = palette.warn;
    pen.fillText(micros(budgetUs), 0, Math.min(height - 6, Math.max(6, budgetY)));
  }

  #hover(canvas, boxes) {
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = [event.offsetX, event.offsetY];
      const hit = boxes().findLast((box) => x >= box.x && x <= box.x + Math.max(3, box.wide) && y >= box.y && y <= box.y + box.high);
      if (hit) this.#tip(canvas, event, hit);
      else hideTip(canvas);
    });
    canvas.addEventListener("pointerleave", () => hideTip(canvas));
  }

  #tip(canvas, event, { step, piece }) {
    if (step.turn) {
      const { turn } = step;
      showTip(canvas, event, `${turn.model} \u00b7 turn ${count(turn.turn)}`, [
        ["sequences", count(turn.num_rows)],
        ["tokens of prompts", count(turn.num_prefill)],
        ["tokens of answers", count(turn.num_decode)],
        ["layers", turn.num_layers ? `${turn.first_layer + 1} to ${turn.first_layer + turn.num_layers}` : "none"],
        ["run", micros(step.run_us)],
        ["budget", micros(step.budget_us)],
        ["waiting sequences", count(step.num_waiting)],
      ]);
      return;
    }
    if (!piece) {
      const rows = [["run", micros(step.run_us)], ["budget", micros(step.budget_us)], ["waiting requests", count(step.num_waiting)]];
      for (const each of step.pieces) rows.push([`${each.stage} ${each.num_rows}\u00d7${each.num_units}`, micros(each.run_us)]);
      showTip(canvas, event, `Step ${count(step.step)}`, rows);
      return;
    }
    const names = [...new Set(piece.rows.map(([card]) => this.#nameOf.get(card) ?? "a closed session"))];
    if (names.length > MAX_NAMES) names.splice(MAX_NAMES, names.length, `and ${names.length - MAX_NAMES} more`);
    showTip(canvas, event, `${piece.stage} \u00b7 ${piece.kind}`, [
      ["rows \u00d7 units", `${piece.num_rows} \u00d7 ${piece.num_units}`],
      ["run", micros(piece.run_us)],
      ["step", count(step.step)],
      ["model", piece.model],
      ["arms", names.join(", ")],
    ]);
  }
}

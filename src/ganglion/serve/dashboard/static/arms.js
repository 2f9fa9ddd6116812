// The cards: one for each arm, made and removed as sessions come and go.

import { element, setText, setValue } from "./dom.js";
import { count, DASH, fixed, millis } from "./format.js";
import { Lanes } from "./lanes.js";
import { Link } from "./link.js";
import { ownerColour } from "./palette.js";
import { Queue } from "./queue.js";

const MAX_AGE_MS = 250; // older than this an action counts as missed
const EXECUTIONS = {
  sync: "stands still until the chunk of its newest observation is there",
  naive: "runs the newest chunk, each action at its own tick",
  blend: "averages overlapping chunks",
  rtc: "new chunks are guided to the one that runs",
  "rtc-identity": "new chunks are guided to the one that runs, without the network's Jacobian",
  prefix: "new chunks begin with the actions that run anyway",
  rolled: "new chunks begin where the arm will be when they arrive",
};

class Arm {
  #order;
  #state = null;
  #isSending = false;
  #error = null;
  #isDecoding = false;
  #nextJpeg = null;
  #isSeen = true;
  #hasView = false;

  constructor(card, { chunks, order, onHover }) {
    this.#order = order;
    this.card = card;
    this.link = new Link(card, (impair) => order({ impair: { session_id: this.sessionId, ...impair } }));
    this.#build(card);
    this.queue = new Queue(this.parts.queue);
    this.lanes = new Lanes(this.parts.lanes, card, chunks);
    this.seen = new IntersectionObserver(([entry]) => {
      this.#isSeen = entry.isIntersecting;
    });
    this.seen.observe(this.root);
    this.root.addEventListener("pointerenter", () => onHover(this.sessionId));
    this.root.addEventListener("pointerleave", () => onHover(null));
  }

  #build(card) {
    const parts = {
      view: element("canvas", { width: 224, height: 224, role: "img", "aria-label": "live view" }),
      blank: element("div", { class: "arm-blank" }, "waiting for the first view"),
      solved: element("span", { class: "arm-solved" }, "\u2713 solved"),
      name: element("span", { class: "arm-name" }),
      task: element("span", { class: "arm-task" }),
      execution: element("span", { class: "chip" }),
      score: element("span", { class: "arm-score" }),
      text: element("input", {
        class: "order-text", id: `order-${card}`, spellcheck: "false", autocomplete: "off", enterkeyhint: "send",
      }),
      giveBack: element("button", { type: "button", title: "let the arm follow its own instruction again" }, "Give back"),
      badge: element("span", { class: "badge" }, "operator override"),
      note: element("span"),
      queue: element("canvas", { class: "queue", role: "img", "aria-label": "queue of actions" }),
      left: element("span"),
      ahead: element("span"),
      lanes: element("canvas", { class: "lanes", role: "img", "aria-label": "chunks under way" }),
      context: element("span"),
    };
    const gauges = element("dl", { class: "gauges" });
    this.gauges = {};
    for (const [key, name, title] of [
      ["rate", "Rate", "control ticks a second, measured by the robot"],
      ["age", "Obs. age", "age of the observation behind the action that runs now"],
      ["latency", "Latency", "observation sent to chunk received, newest chunk"],
      ["misses", "Misses", "control ticks without an action whose observation is at most 250 ms old"],
      ["holds", "Holds", "control ticks at which the queue was dry and the arm held still"],
    ]) {
      this.gauges[key] = element("dd", {}, DASH);
      gauges.append(element("div", { title }, element("dt", {}, name), this.gauges[key]));
    }
    const form = element(
      "form",
      { class: "order" },
      element("label", { class: "only-read", for: `order-${card}` }, "Instruction"),
      element("div", { class: "order-line" }, parts.text, parts.giveBack),
      element("div", { class: "order-state", "aria-live": "polite" }, parts.badge, parts.note),
    );
    this.root = element(
      "article",
      { class: "arm" },
      element("div", { class: "arm-view" }, parts.view, parts.blank, parts.solved),
      element(
        "div",
        { class: "arm-body" },
        element("div", { class: "arm-head" }, element("i", { class: "arm-dot" }), parts.name, parts.execution, parts.task, parts.score),
        form,
        gauges,
        element("div", { class: "queue-box" }, element("div", { class: "queue-caption" }, parts.left, parts.ahead), parts.queue),
      ),
      this.link.root,
      element(
        "div",
        { class: "arm-lanes" },
        element("div", { class: "queue-caption" }, element("span", {}, "Chunks under way"), parts.context),
        parts.lanes,
      ),
    );
    this.root.dataset.card = card;
    this.parts = parts;
    this.pen = parts.view.getContext("2d", { alpha: false });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    parts.text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") parts.text.blur();
    });
    parts.text.addEventListener("blur", () => this.#showOrder());
    parts.giveBack.addEventListener("click", () => this.#send({ clear_prompt: { session_id: this.sessionId } }));
  }

  show(state, degree, isMoving) {
    const isNew = this.#state === null;
    this.#state = state;
    this.sessionId = state.session_id;
    if (isNew) this.root.dataset.session = state.session_id;
    this.root.style.setProperty("--owner", ownerColour(this.card));
    const { session, robot } = state;
    const told = robot?.telemetry ?? null;
    setText(this.parts.name, session?.robot_id ?? robot.robot_id);
    setText(this.parts.task, robot ? [robot.task, robot.world].filter(Boolean).join(" \u00b7 ") : "no side channel");
    setText(this.parts.score, told?.num_episodes ? `${told.num_successes}/${told.num_episodes} solved` : "");
    this.root.classList.toggle("is-stale", Boolean(told?.is_stale));
    this.parts.solved.hidden = !told?.is_success;
    if (!robot && this.#hasView) this.#blank();
    setText(this.parts.blank, robot ? "waiting for the first view" : "this robot sends no views");
    this.parts.blank.hidden = this.#hasView;
    this.#showGauges(session, robot, told);
    this.#showQueue(robot, told);
    this.#showLanes(session, degree, isMoving);
    this.link.show(robot?.impair ?? null);
    this.#showOrder();
  }

  #showGauges(session, robot, told) {
    const rate = told?.rate_hz ?? null;
    const isSlow = rate !== null && robot.control_hz && rate < 0.9 * robot.control_hz;
    setValue(this.gauges.rate, fixed(rate, 1), rate === null ? "" : "Hz", isSlow ? "is-warn" : "");
    const age = told?.obs_age_ms ?? null;
    setValue(this.gauges.age, millis(age), age === null ? "" : "ms", age > MAX_AGE_MS ? "is-bad" : "");
    const latency = told?.latency_ms ?? session?.infer_ms ?? null;
    setValue(this.gauges.latency, millis(latency), latency === null ? "" : "ms");
    setValue(this.gauges.misses, count(told?.num_misses), "", told?.num_misses ? "is-warn" : "");
    setValue(this.gauges.holds, count(told?.num_holds), "", told?.num_holds ? "is-warn" : "");
  }

  #showQueue(robot, told) {
    const numLeft = told?.queue.length ?? 0;
    const seconds = robot?.control_hz ? ` \u00b7 ${(numLeft / robot.control_hz).toFixed(1)} s` : "";
    setText(this.parts.left, "Action queue");
    setText(this.parts.ahead, told ? (numLeft ? `${numLeft} left${seconds}` : "dry, holding") : "");
    this.parts.ahead.classList.toggle("is-dry", Boolean(told) && numLeft === 0);
    if (told) this.queue.show(told.tick, told.queue);
  }

  #showLanes(session, degree, isMoving) {
    const { execution, context } = this.parts;
    execution.hidden = !session;
    setText(execution, session?.execution ?? "");
    execution.title = EXECUTIONS[session?.execution] ?? "";
    setText(context, session ? `${session.in_flight.length} of ${degree} \u00b7 context v${session.context_version}` : "");
    context.title = `chunks under way, of at most so many; newest version of what the arm perceived. Time it waited for chunks over time it executed: ${fixed(session?.wait_ratio, 2)}`;
    if (isMoving && this.#isSeen) this.lanes.show(this.parts.name.textContent, degree);
  }

  #showOrder() {
    const state = this.#state;
    if (!state) return;
    const { session, robot } = state;
    const { text, giveBack, badge, note } = this.parts;
    const prompt = session ? session.prompt : robot.prompt;
    const isOverridden = Boolean(session?.is_prompt_overridden);
    const isEditing = document.activeElement === text;
    this.root.classList.toggle("is-overridden", isOverridden);
    text.disabled = !session;
    if (!isEditing && !this.#isSending && text.value !== prompt) {
      text.value = prompt;
      text.title = prompt;
    }
    giveBack.hidden = badge.hidden = !isOverridden;
    const reply = robot?.telemetry?.reply_prompt ?? null;
    const isEdited = isEditing && text.value.trim() !== prompt;
    const [words, tone] = this.#orderNote({ session, prompt, reply, isEdited });
    setText(note, words);
    note.className = tone;
    note.title = this.#error ? [this.#error.message, this.#error.next_step].filter(Boolean).join("; ") : "";
  }

  #orderNote({ session, prompt, reply, isEdited }) {
    if (!session) return ["its first observation is still to come", ""];
    if (this.#isSending) return ["sending\u2026", ""];
    if (this.#error) return [this.#error.message, "is-bad"];
    if (isEdited) return ["Enter applies, Esc reverts", ""];
    if (reply === null) return ["", ""];
    return reply === prompt ? ["\u2713 followed by the newest chunk", "is-followed"] : ["waiting for the next chunk\u2026", ""];
  }

  async #submit() {
    const prompt = this.parts.text.value.trim();
    if (!prompt) {
      this.#error = { message: "write an instruction, or give it back" };
      this.#showOrder();
      return;
    }
    const isDone = await this.#send({ set_prompt: { session_id: this.sessionId, prompt } });
    if (isDone && this.#state.session) {
      // What the server accepted, until its next state says the same.
      Object.assign(this.#state.session, { prompt, is_prompt_overridden: true });
      this.parts.text.blur();
      this.#showOrder();
    }
  }

  async #send(order) {
    this.#isSending = true;
    this.#error = null;
    this.#showOrder();
    this.#error = await this.#order(order);
    this.#isSending = false;
    this.#showOrder();
    return this.#error === null;
  }

  // Newest wins: at most one picture is decoded at a time, and none that nobody can see.
  async showView(jpeg) {
    if (!this.#isSeen) return;
    this.#nextJpeg = jpeg;
    if (this.#isDecoding) return;
    this.#isDecoding = true;
    while (this.#nextJpeg) {
      const bytes = this.#nextJpeg;
      this.#nextJpeg = null;
      try {
        const image = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
        const { view, blank } = this.parts;
        if (view.width !== image.width || view.height !== image.height) {
          Object.assign(view, { width: image.width, height: image.height });
        }
        this.pen.drawImage(image, 0, 0);
        image.close();
        this.#hasView = blank.hidden = true;
      } catch {
        setText(this.parts.blank, "the robot's picture cannot be read");
      }
    }
    this.#isDecoding = false;
  }

  #blank() {
    this.#hasView = false;
    this.pen.clearRect(0, 0, this.parts.view.width, this.parts.view.height);
  }

  close() {
    this.seen.disconnect();
    this.queue.close();
    this.lanes.close();
    this.root.remove();
  }
}

export class Arms {
  #arms = new Map();
  #policy = null;

  constructor(grid, links) {
    this.grid = grid;
    this.make = (card) => new Arm(card, links);
  }

  set policy(policy) {
    this.#policy = policy;
    for (const arm of this.#arms.values()) arm.queue.policy = policy;
  }

  show(states, degree, isMoving) {
    const cards = new Set(states.map((state) => state.card));
    for (const [card, arm] of this.#arms) {
      if (cards.has(card)) continue;
      arm.close();
      this.#arms.delete(card);
    }
    for (const state of states) {
      let arm = this.#arms.get(state.card);
      if (!arm) {
        arm = this.make(state.card);
        this.#arms.set(state.card, arm);
        this.grid.append(arm.root);
        if (this.#policy) arm.queue.policy = this.#policy;
      }
      arm.show(state, degree, isMoving);
    }
  }

  showView(card, jpeg) {
    this.#arms.get(card)?.showView(jpeg);
  }

  // Another server: its card numbers mean other arms.
  clear() {
    for (const arm of this.#arms.values()) arm.close();
    this.#arms.clear();
  }

  light(sessionId) {
    for (const arm of this.#arms.values()) arm.root.classList.toggle("is-lit", arm.sessionId === sessionId);
  }
}

// Every chunk of the last seconds, put together from the rows of engine steps: when it perceived, when each flow step
// ran, and which version of its robot's context that step read. Draws nothing.

const KEEP_S = 5;
const WINDOWS_S = [0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1, 1.5, 2.5, 4];
const SPANS_SHOWN = 2; // at least so many chunks' lengths in a window,
const LAUNCHES_SHOWN = 3; // and so many launches
const SLACK = 2.5; // a window is kept until it is that much too wide
const SAMPLE = 20; // of an arm

export class Chunks {
  #byCard = new Map(); // card -> its chunks, oldest first
  #byRequest = new Map();
  #nowS = 0;
  windowS = 0.5;

  get nowS() {
    return this.#nowS;
  }

  of(card) {
    return this.#byCard.get(card) ?? [];
  }

  // Returns whether anything changed.
  note({ now_s: nowS, steps, arms }) {
    if (nowS < this.#nowS) this.clear(); // another server
    const isMoving = steps.length > 0 || this.#byRequest.size > 0;
    this.#nowS = nowS;
    for (const step of steps) for (const piece of step.pieces) this.#notePiece(piece);
    for (const { card, session } of arms) this.#end(card, new Set(session?.in_flight));
    this.#forget(new Set(arms.map((arm) => arm.card)));
    if (steps.length) this.#chooseWindow();
    return isMoving;
  }

  clear() {
    this.#byCard.clear();
    this.#byRequest.clear();
    this.#nowS = 0;
  }

  #notePiece({ kind, start_s: startS, run_us: runUs, num_units: numUnits, rows }) {
    const endS = startS + runUs / 1e6;
    for (const [card, request, seq, firstUnit, numLeft, version, contextSeq] of rows) {
      if (!card) continue;
      const chunk = this.#byRequest.get(request) ?? this.#open(card, request, seq, startS);
      const isFlow = kind === "denoise";
      const before = chunk.parts.at(-1);
      const isSwitch = isFlow && before?.kind === "denoise" && before.version !== version;
      const isOwn = contextSeq === seq;
      chunk.parts.push({ kind, startS, endS, firstUnit, numUnits, numLeft, version, contextSeq, isSwitch, isOwn });
      chunk.endS = Math.max(chunk.endS, endS);
      if (isFlow && numLeft === 0) chunk.isOver = chunk.isDone = true;
    }
  }

  #open(card, request, seq, startS) {
    const chunks = this.#byCard.get(card) ?? [];
    const taken = new Set(chunks.filter((each) => !each.isOver || each.endS > startS).map((each) => each.slot));
    let slot = 0;
    while (taken.has(slot)) slot += 1;
    const chunk = { request, seq, slot, startS, endS: startS, parts: [], isOver: false, isDone: false };
    chunks.push(chunk);
    this.#byCard.set(card, chunks);
    this.#byRequest.set(request, chunk);
    return chunk;
  }

  // What the engine dropped has no last flow step.
  #end(card, inFlight) {
    for (const chunk of this.of(card)) if (!inFlight.has(chunk.request)) chunk.isOver = true;
  }

  #forget(cards) {
    const oldestS = this.#nowS - KEEP_S;
    for (const [card, chunks] of this.#byCard) {
      while (chunks.length && (!cards.has(card) || (chunks[0].isOver && chunks[0].endS < oldestS))) {
        this.#byRequest.delete(chunks.shift().request);
      }
      if (!chunks.length) this.#byCard.delete(card);
    }
  }

  // One window for all arms, so that their lanes can be compared.
  #chooseWindow() {
    const spans = [];
    const gaps = [];
    for (const chunks of this.#byCard.values()) {
      const recent = chunks.slice(-SAMPLE);
      recent.forEach((chunk, at) => {
        if (chunk.isDone) spans.push(chunk.endS - chunk.startS);
        if (at) gaps.push(chunk.startS - recent[at - 1].startS);
      });
    }
    if (!spans.length) return;
    const leastS = Math.max(SPANS_SHOWN * median(spans), gaps.length ? LAUNCHES_SHOWN * median(gaps) : 0);
    if (leastS <= this.windowS && this.windowS <= SLACK * leastS) return;
    const fit = WINDOWS_S.find((windowS) => windowS >= leastS) ?? WINDOWS_S.at(-1);
    if (fit > this.windowS || this.windowS > SLACK * leastS) this.windowS = fit;
  }
}

const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

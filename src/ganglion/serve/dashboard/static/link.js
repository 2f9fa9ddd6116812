// Three sliders that make one arm's link to the server worse: delay, jitter, loss. The arm's own side does it.

import { element, setText } from "./dom.js";

const SLIDERS = [
  { key: "delay_ms", name: "Delay", most: 1000, step: 10, say: (value) => `${value} ms`, title: "added to the round trip, half on each way" },
  { key: "jitter_ms", name: "Jitter", most: 500, step: 10, say: (value) => `+${value} ms`, title: "up to so much more, drawn anew for each message" },
  { key: "loss", name: "Loss", most: 50, step: 1, say: (value) => `${value}%`, title: "share of the messages that never arrive, on either way" },
];
const toSlider = (key, value) => (key === "loss" ? Math.round(value * 100) : value);
const fromSlider = (key, value) => (key === "loss" ? value / 100 : value);
const MIN_GAP_MS = 120;

export class Link {
  #send;
  #asked = null; // what the sliders say and the server has not confirmed
  #isSending = false;

  // send(impair) resolves to null or an error
  constructor(card, send) {
    this.#send = send;
    this.inputs = {};
    this.values = {};
    this.note = element("span", {}, "Link");
    this.clear = element("button", { type: "button", title: "the link as it is" }, "Mend");
    this.clear.addEventListener("click", () => this.#ask({ delay_ms: 0, jitter_ms: 0, loss: 0 }));
    const lines = SLIDERS.map(({ key, name, most, step, title }) => {
      const id = `${key}-${card}`;
      this.inputs[key] = element("input", { type: "range", id, min: "0", max: String(most), step: String(step), value: "0" });
      this.inputs[key].addEventListener("input", () => this.#ask(this.#read()));
      this.values[key] = element("output", { for: id });
      return element("div", { class: "link-line", title }, element("label", { for: id }, name), this.inputs[key], this.values[key]);
    });
    this.root = element("div", { class: "arm-link" }, element("div", { class: "queue-caption" }, this.note, this.clear), ...lines);
  }

  // impair: what the server asked of the arm, or null when the arm cannot
  show(impair) {
    const isAble = impair !== null;
    this.root.classList.toggle("is-fixed", !isAble);
    for (const { key } of SLIDERS) this.inputs[key].disabled = !isAble;
    if (isAble && this.#asked === null) this.#write(impair);
    const now = this.#read();
    const isBad = isAble && Object.values(now).some((value) => value > 0);
    this.root.classList.toggle("is-bad-link", isBad);
    this.clear.hidden = !isBad;
    if (!isAble) setText(this.note, "Link \u00b7 fixed");
    else if (!this.note.className) setText(this.note, isBad ? "Link \u00b7 disturbed" : "Link");
    for (const { key, say } of SLIDERS) {
      setText(this.values[key], say(Number(this.inputs[key].value)));
      this.inputs[key].parentElement.classList.toggle("is-set", now[key] > 0);
    }
  }

  #read() {
    return Object.fromEntries(SLIDERS.map(({ key }) => [key, fromSlider(key, Number(this.inputs[key].value))]));
  }

  #write(impair) {
    for (const { key } of SLIDERS) this.inputs[key].value = String(toSlider(key, impair[key]));
  }

  // One order at a time; while it travels the newest wish waits.
  async #ask(wish) {
    this.#asked = wish;
    this.#write(wish);
    this.show(wish);
    if (this.#isSending) return;
    this.#isSending = true;
    let sent = null;
    let error = null;
    while (sent !== this.#asked) {
      sent = this.#asked;
      [error] = await Promise.all([this.#send(sent), new Promise((resolve) => setTimeout(resolve, MIN_GAP_MS))]);
    }
    this.#isSending = false;
    this.#asked = null;
    this.note.className = error ? "is-bad" : "";
    if (error) setText(this.note, error.message);
    this.note.title = error ? [error.message, error.next_step].filter(Boolean).join("; ") : "";
  }
}

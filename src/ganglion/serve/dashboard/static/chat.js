// A conversation with one of the language models, over the same /v1/chat/completions that agents use.

import { element, setText } from "./dom.js";
import { count, fixed, millis } from "./format.js";

const URL_PATH = "/v1/chat/completions";
const MAX_TOKENS = 256;

export class Chat {
  #messages = []; // of the conversation, as the interface takes them
  #running = null; // AbortController of the answer under way

  constructor(panel) {
    this.parts = Object.fromEntries([...panel.querySelectorAll("[data-part]")].map((each) => [each.dataset.part, each]));
    const { form, text, clear } = this.parts;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) this.#running.abort();
      else this.#ask();
    });
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.#running) this.#ask();
    });
    clear.addEventListener("click", () => this.#clear());
  }

  setModels(models) {
    const { model } = this.parts;
    const before = model.value;
    model.replaceChildren(...models.map(({ name }) => element("option", { value: name }, name)));
    if (models.some(({ name }) => name === before)) model.value = before;
  }

  async #ask() {
    const { text, log, model } = this.parts;
    const content = text.value.trim();
    if (!content || !model.value) return;
    text.value = "";
    this.#messages.push({ role: "user", content });
    log.append(element("li", { class: "is-user" }, content));
    const answer = element("li", { class: "is-assistant is-open" });
    log.append(answer);
    this.#scroll();
    this.#setRunning(new AbortController());
    const told = { text: "", usage: null, startMs: performance.now(), firstMs: null };
    try {
      await this.#stream(model.value, told, answer);
      this.#messages.push({ role: "assistant", content: told.text });
      this.#say(told, "");
    } catch (error) {
      const isStopped = error.name === "AbortError";
      if (told.text) this.#messages.push({ role: "assistant", content: told.text });
      else this.#messages.pop();
      if (!isStopped) log.append(element("li", { class: "is-error" }, error.message));
      if (isStopped) this.#say(told, "stopped");
    } finally {
      answer.classList.remove("is-open");
      if (!told.text) answer.remove();
      this.#setRunning(null);
      this.#scroll();
    }
  }

  async #stream(model, told, answer) {
    const reply = await fetch(URL_PATH, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model,
        messages: this.#messages,
        max_tokens: MAX_TOKENS,
        stream: true,
        stream_options: { include_usage: true },
      }),
      signal: this.#running.signal,
    });
    if (!reply.ok) throw new Error(await refusal(reply));
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) this.#take(event, told, answer);
    }
  }

  #take(event, told, answer) {
    const data = event.split("\n").find((line) => line.startsWith("data: "));
    if (!data || data === "data: [DONE]") return;
    const body = JSON.parse(data.slice(6));
    if (body.error) throw new Error(body.error.message);
    told.usage = body.usage ?? told.usage;
    const piece = body.choices?.[0]?.delta?.content;
    if (!piece) return;
    told.firstMs ??= performance.now();
    told.text += piece;
    const isAtEnd = this.#isAtEnd();
    answer.append(piece);
    if (isAtEnd) this.#scroll();
  }

  #say({ usage, startMs, firstMs }, what) {
    const facts = what ? [what] : [];
    if (firstMs !== null) facts.push(`first token ${millis(firstMs - startMs)} ms`);
    if (usage) {
      const seconds = (performance.now() - firstMs) / 1000;
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      facts.push(`${count(usage.prompt_tokens)} in${cached ? ` (${count(cached)} cached)` : ""}`, `${count(usage.completion_tokens)} out`);
      if (firstMs !== null && usage.completion_tokens > 1) facts.push(`${fixed((usage.completion_tokens - 1) / seconds, 1)} tok/s`);
    }
    setText(this.parts.note, facts.join(" \u00b7 "));
  }

  #clear() {
    this.#running?.abort();
    this.#messages = [];
    this.parts.log.replaceChildren();
    setText(this.parts.note, "");
    this.parts.text.focus();
  }

  #setRunning(controller) {
    this.#running = controller;
    setText(this.parts.send, controller ? "Stop" : "Send");
  }

  #isAtEnd() {
    const { log } = this.parts;
    return log.scrollHeight - log.scrollTop - log.clientHeight < 24;
  }

  #scroll() {
    this.parts.log.scrollTop = this.parts.log.scrollHeight;
  }
}

async function refusal(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the server answered ${reply.status}`;
  }
}

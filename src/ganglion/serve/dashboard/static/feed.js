// The websocket to the server: reconnects by itself, sleeps while nobody looks, matches answers to orders.

const FIRST_PAUSE_MS = 500;
const MAX_PAUSE_MS = 5000;
const HIDDEN_GRACE_MS = 3000;
const SILENCE_MS = 5000;
const ORDER_TIMEOUT_MS = 5000;

export class Feed {
  #handlers;
  #socket = null;
  #orders = new Map();
  #nextOrder = 1;
  #pauseMs = FIRST_PAUSE_MS;
  #timer = 0;
  #silence = 0;
  #hidden = 0;

  // handlers: onHello(hello), onState(state), onView(card, jpeg), onLink("connecting" | "open" | "lost", retryAtMs)
  constructor(handlers) {
    this.#handlers = handlers;
    document.addEventListener("visibilitychange", () => this.#onVisibility());
    this.#connect();
  }

  // Resolves to null, or to the error {code, message, next_step}.
  order(body) {
    return new Promise((resolve) => {
      if (this.#socket?.readyState !== WebSocket.OPEN) {
        resolve({ code: "offline", message: "not connected to the server", next_step: "" });
        return;
      }
      const id = this.#nextOrder++;
      const timer = setTimeout(() => this.#settle(id, { code: "timeout", message: "the server did not answer", next_step: "" }), ORDER_TIMEOUT_MS);
      this.#orders.set(id, { resolve, timer });
      this.#socket.send(JSON.stringify({ id, ...body }));
    });
  }

  retryNow() {
    if (this.#socket) return;
    this.#pauseMs = FIRST_PAUSE_MS;
    this.#connect();
  }

  #connect() {
    clearTimeout(this.#timer);
    const url = new URL("/v1/dashboard", location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#handlers.onLink("connecting");
    this.#watchSilence();
    socket.onmessage = ({ data }) => {
      this.#watchSilence();
      if (typeof data === "string") this.#onText(JSON.parse(data));
      else this.#handlers.onView(new DataView(data).getUint32(0), new Uint8Array(data, 4));
    };
    socket.onclose = () => this.#onClose(socket);
  }

  #onText(message) {
    if (message.kind === "state") this.#handlers.onState(message);
    else if (message.kind === "answer") this.#settle(message.id, message.error);
    else if (message.kind === "hello") {
      this.#pauseMs = FIRST_PAUSE_MS;
      this.#handlers.onHello(message);
      this.#handlers.onLink("open");
    }
  }

  #settle(id, error) {
    const order = this.#orders.get(id);
    if (!order) return;
    clearTimeout(order.timer);
    this.#orders.delete(id);
    order.resolve(error);
  }

  #onClose(socket) {
    if (socket !== this.#socket) return;
    this.#socket = null;
    clearTimeout(this.#silence);
    for (const id of [...this.#orders.keys()]) {
      this.#settle(id, { code: "offline", message: "the connection was lost", next_step: "" });
    }
    if (document.hidden) return;
    const pauseMs = this.#pauseMs * (0.8 + 0.4 * Math.random());
    this.#pauseMs = Math.min(MAX_PAUSE_MS, this.#pauseMs * 2);
    this.#timer = setTimeout(() => this.#connect(), pauseMs);
    this.#handlers.onLink("lost", performance.now() + pauseMs);
  }

  // A server that dies without closing its socket says nothing: neither may we wait for ever.
  #watchSilence() {
    clearTimeout(this.#silence);
    this.#silence = setTimeout(() => this.#drop(), SILENCE_MS);
  }

  #drop() {
    const socket = this.#socket;
    if (!socket) return;
    socket.close();
    this.#onClose(socket);
  }

  // While the tab is hidden robots need not render for it.
  #onVisibility() {
    clearTimeout(this.#hidden);
    if (document.hidden) {
      this.#hidden = setTimeout(() => this.#drop(), HIDDEN_GRACE_MS);
    } else if (!this.#socket) {
      this.retryNow();
    }
  }
}

// The page's composition root: one feed, the cards, the planners, the engine's two panels, the header.

import { Arms } from "./arms.js";
import { Chat } from "./chat.js";
import { Chunks } from "./chunks.js";
import { setText, setValue } from "./dom.js";
import { Feed } from "./feed.js";
import { count, DASH, duration, fixed, millis, percent } from "./format.js";
import { Pace } from "./pace.js";
import { loadPalette } from "./palette.js";
import { Planners } from "./planners.js";
import { Pool } from "./pool.js";
import { redrawAll } from "./surface.js";
import { Timeline } from "./timeline.js";

let retryTimer = 0;

const at = (id) => document.getElementById(id);
const totals = Object.fromEntries([...at("totals").querySelectorAll("dd")].map((each) => [each.dataset.total, each]));

loadPalette();
matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => {
  loadPalette();
  redrawAll();
});

const chunks = new Chunks();
const pace = new Pace(at("pace"));
const arms = new Arms(at("arms"), { chunks, order: (body) => feed.order(body), onHover: (session) => pool.light(session) });
const pool = new Pool(
  { canvas: at("pool"), facts: at("pool-facts"), legend: at("pool-legend"), share: at("pool-share") },
  (owner) => {
    arms.light(owner);
    planners.light(owner);
    pool.light(owner);
  },
);
const planners = new Planners(at("planners"), { split: at("split"), onHover: (owner) => pool.light(owner) });
const chat = new Chat(at("chat"));
const timeline = new Timeline({
  timeline: at("timeline"),
  budget: at("budget"),
  facts: at("timeline-facts"),
  legend: at("timeline-legend"),
  choice: at("timeline-window"),
});

const feed = new Feed({ onHello, onState, onView: (card, jpeg) => arms.showView(card, jpeg), onLink });

at("retry").addEventListener("click", () => feed.retryNow());
at("run-command").textContent = `ganglion run --url ${location.origin.replace(/^http/, "ws")} --world metaworld:drawer-open`;

function onHello({ policy, models, version }) {
  arms.clear();
  chunks.clear();
  planners.clear();
  planners.hasRobots = policy !== null;
  chat.setModels(models);
  document.body.dataset.serves = policy ? (models.length ? "both" : "policy") : "language";
  arms.policy = policy;
  const panel = at("policy");
  panel.hidden = false;
  if (policy) {
    setText(panel.querySelector(".policy-name"), policy.name);
    setText(panel.querySelector(".policy-version"), policy.version.slice(0, 12));
    panel.title = `${policy.family}: chunks of ${policy.horizon} actions, ${policy.num_flow_steps} flow steps, ${policy.control_hz} Hz; ganglion ${version}`;
  } else {
    setText(panel.querySelector(".policy-name"), models.map(({ name }) => name).join(", "));
    setText(panel.querySelector(".policy-version"), models.length === 1 ? models[0].version.slice(0, 12) : "");
    panel.title = `${models.map((model) => `${model.name}: ${model.family}, up to ${model.max_tokens} tokens`).join("; ")}; ganglion ${version}`;
  }
}

function onState(state) {
  document.body.dataset.link = state.is_ready ? "open" : "waiting";
  setText(at("link").lastElementChild, state.is_ready ? "serving" : state.stage);
  const isMoving = chunks.note(state);
  pace.show(state);
  arms.show(state.arms, state.pace?.degree ?? 1, isMoving);
  at("engine").hidden = false;
  at("no-arms").hidden = state.arms.length > 0;
  planners.show(state);
  timeline.show(state);
  pool.show(state.pool, state.arms);
  showTotals(state);
}

function showTotals({ totals: sum, language, uptime_s: uptimeS }) {
  setValue(totals.arms, count(sum.num_arms));
  setValue(totals.chunks, fixed(sum.chunk_hz, 1));
  setValue(totals.latency, millis(sum.latency_p50_ms), sum.latency_p50_ms === null ? "" : "ms");
  const missed = percent(sum.num_misses, sum.num_ticks);
  setValue(totals.misses, missed, "", sum.num_ticks && sum.num_misses / sum.num_ticks >= 0.01 ? "is-bad" : "");
  totals.misses.title = `${count(sum.num_misses)} of ${count(sum.num_ticks)} ticks; ${count(sum.num_holds)} holds; ${count(sum.num_errors)} errors`;
  setValue(totals.solved, sum.num_episodes ? `${sum.num_successes}/${sum.num_episodes}` : DASH);
  if (language) {
    setValue(totals.requests, count(language.num_under_way));
    setValue(totals.tokens, fixed(language.tokens_per_s, language.tokens_per_s < 100 ? 1 : 0));
    setValue(totals.first, millis(language.first_token_p50_ms), language.first_token_p50_ms === null ? "" : "ms");
    setValue(totals.cached, percent(language.num_cached_tokens, language.num_prompt_tokens));
  }
  setValue(totals.uptime, duration(uptimeS));
}

function onLink(link, retryAtMs) {
  clearInterval(retryTimer);
  if (link === "lost") {
    document.body.dataset.link = "lost";
    setText(at("link").lastElementChild, "disconnected");
    const say = () => {
      const seconds = Math.max(0, Math.ceil((retryAtMs - performance.now()) / 1000));
      setText(at("notice").firstElementChild, `No connection to the server. Trying again ${seconds ? `in ${seconds} s` : "now"}.`);
    };
    say();
    retryTimer = setInterval(say, 500);
    at("notice").hidden = false;
  } else if (link === "open") {
    at("notice").hidden = true;
  }
}

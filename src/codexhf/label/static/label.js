"use strict";
// Keys and buttons send JSON; the server renders every page. Nothing here writes markup.

const main = document.querySelector("main");
const status = document.querySelector(".status");
const data = main.dataset;
let busy = false;
let finished = false;
let shownFor = 0; // milliseconds during which the page was in sight
let since = document.hidden ? null : performance.now();

document.addEventListener("visibilitychange", () => {
  if (document.hidden && since !== null) { shownFor += performance.now() - since; since = null; }
  if (!document.hidden && since === null) since = performance.now();
});
const seconds = () => (shownFor + (since === null ? 0 : performance.now() - since)) / 1000;
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

function say(text, error = false) {
  status.textContent = text;
  status.classList.toggle("error", error);
}

// Send until there is an answer. The request id makes a repeated label one label.
async function send(path, body) {
  for (;;) {
    let response;
    try {
      response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    } catch {
      say("Not saved: the server does not answer. Trying again; leave the page open.", true);
      await new Promise((resolve) => setTimeout(resolve, 1000));
      continue;
    }
    const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
    if (response.ok) return answer;
    say(`${answer.error} Nothing was saved. Reload the page to go on.`, true);
    return null;
  }
}

const next = () => location.reload();

async function choose(button) {
  if (busy || finished) return;
  busy = true;
  document.querySelectorAll(".choices button").forEach((b) => { b.disabled = true; });
  button.classList.add("chosen");
  say("Saving…");
  const answer = await send("/api/label", {
    request: newId(), pair: data.pair, version: Number(data.version), left: data.left, choice: button.dataset.choice,
    seconds: Math.min(seconds(), 86400), comment: document.querySelector("#comment").value, adjudicates: data.adjudicates === "1",
  });
  busy = false;
  if (answer === null) return;
  finished = true;
  if (answer.reveal.length === 0) return next();
  document.querySelector("#comment").disabled = true; // what is written from here on would be lost
  for (const side of [0, 1]) {
    const line = document.querySelector(`[data-verdict="${side}"]`);
    line.textContent = answer.reveal.map((row) => `${row[0]}: ${row[side + 1]}`).join(" · ");
    line.hidden = false;
  }
  say("Saved.");
  document.querySelector(".choices").classList.add("saved");
  document.querySelector("[data-undo]").disabled = false;
  const button2 = document.querySelector("[data-next]");
  button2.hidden = button2.disabled = false;
  button2.focus();
}

async function undo() {
  if (busy) return;
  busy = true;
  const answer = await send("/api/undo", { request: newId(), tab: data.tab || newId() });
  busy = false;
  if (answer === null) return;
  if (!answer.saved) return say("There is no label to take back.");
  next();
}

function comparing() {
  const comment = document.querySelector("#comment");
  const keys = document.querySelector("#keys");
  const byKey = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", b: "bad", s: "skip" };
  if (keys) {
    keys.checked = localStorage.getItem("keys") !== "off";
    keys.addEventListener("change", () => localStorage.setItem("keys", keys.checked ? "on" : "off"));
  }
  document.querySelectorAll("[data-choice]").forEach((b) => b.addEventListener("click", () => choose(b)));
  document.querySelectorAll("[data-undo]").forEach((b) => b.addEventListener("click", undo));
  document.querySelectorAll("[data-next]").forEach((b) => b.addEventListener("click", next));
  document.addEventListener("keydown", (event) => {
    if (event.target === comment) {
      if (event.key === "Escape") comment.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || (keys && !keys.checked)) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key === "u") { event.preventDefault(); undo(); return; }
    if (!comment) return;
    if (key === "c") { event.preventDefault(); comment.focus(); return; }
    const button = document.querySelector(`[data-choice="${byKey[key]}"]`);
    if (button) { event.preventDefault(); choose(button); }
  });
}

function writing() {
  const text = document.querySelector("#completion");
  const line = document.querySelector("#check");
  const save = document.querySelector("[data-save]");
  let timer = null;
  let running = false;
  let again = false;

  async function check() {
    if (running) { again = true; return; }
    running = true;
    line.textContent = "Running the tests…";
    line.className = "verdict";
    const answer = await send("/api/check", { pair: data.pair, completion: text.value });
    running = false;
    if (again) { again = false; check(); return; }
    if (answer === null) return;
    line.textContent = answer.detail;
    line.classList.add(answer.verdict === "pass" ? "pass" : "fail");
  }
  const later = () => { clearTimeout(timer); timer = setTimeout(check, 600); };
  if (data.tested === "1") {
    text.addEventListener("input", later);
    if (text.value.trim()) check();
  }

  async function keep() {
    if (busy || finished) return;
    if (!text.value.trim()) return say("Write an answer first.", true);
    busy = save.disabled = true;
    say("Saving…");
    const answer = await send("/api/demonstration", {
      request: newId(), pair: data.pair, started_from: data.started, completion: text.value, seconds: Math.min(seconds(), 86400),
    });
    busy = save.disabled = false;
    if (answer === null) return;
    finished = save.disabled = true;
    say(answer.verdict && answer.verdict !== "pass" ? `Saved, but ${answer.detail}. It will be left out of the export.` : "Saved.");
    setTimeout(() => { location.href = `${data.started === "nothing" ? "/write" : "/compare"}?tab=${data.tab}`; }, answer.verdict && answer.verdict !== "pass" ? 2500 : 400);
  }
  save.addEventListener("click", keep);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) keep();
  });
  text.focus();
}

if (main.id === "write") writing(); else comparing();

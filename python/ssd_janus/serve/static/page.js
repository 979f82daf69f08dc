// The page of `ssd-janus serve`: asks the server for pictures and shows their rows as they come.
"use strict";

const KEY = "ssd-janus key";
const element = id => document.getElementById(id);
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
const bytes = count => count < 1e9 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e9).toFixed(2)} GB`;

const inBytes = text => String.fromCharCode(...new TextEncoder().encode(text)); // UTF-8, as headers carry it

let offers = null; // what GET v1/plans says
let run = null; // the AbortController of what is being drawn

/** An answer that is no success, with the server's own message. */
class Refused extends Error {
  constructor(status, body, retryAfter) {
    const message = body?.error?.message ?? `the server answered with status ${status}`;
    super(retryAfter ? `${message}. Try again in ${retryAfter} s.` : message);
    this.status = status;
  }
}

/** fetch with the key; throws `Refused`, or an Error that says that there is no server. */
async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = {...options.headers, ...(key ? {Authorization: `Bearer ${inBytes(key)}`} : {})};
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  throw new Refused(response.status, await response.json().catch(() => null), response.headers.get("Retry-After"));
}

/** The data of server-sent events, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the connection to the server broke");
    }
    if (part.done) return;
    const blocks = (text + part.value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter(line => line.startsWith("data:")).map(line => line.slice(5).trimStart());
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

/** One picture of the page, drawn with one plan. */
class Picture {
  constructor(policy, budget, prompt, seed) {
    Object.assign(this, {policy, budget, prompt, seed, row: 0});
    this.label = budget === null || policy === "full" ? policy : `${policy}, ${percent(budget)}`;
    this.figure = element("picture").content.cloneNode(true).querySelector("figure");
    this.part = selector => this.figure.querySelector(selector);
    const [width, height] = offers.size.split("x").map(Number);
    const canvas = this.canvas = this.part("canvas");
    Object.assign(canvas, {width, height, ariaLabel: `${prompt}, drawn with ${this.label}`});
    this.part(".frame").style.setProperty("--rows", offers.rows);
    this.part(".frame").style.setProperty("--ratio", `${width} / ${height}`);
    this.part("progress").max = offers.rows;
    this.part("progress").ariaLabel = `rows of ${this.label}`;
    this.part("h2").textContent = this.label;
    const plan = this.part(".plan");
    plan.href = `v1/plans/${policy}` + (budget === null ? "" : `?budget=${budget}`);
    plan.addEventListener("click", event => {
      if (!sessionStorage.getItem(KEY)) return; // the browser may follow it by itself
      event.preventDefault();
      this.savePlan().catch(showError);
    });
    this.say("waits");
  }

  say(state) {
    this.part(".state").textContent = state;
  }

  /** Draw it, row by row. */
  async draw(signal) {
    const body = {prompt: this.prompt, seed: this.seed, policy: this.policy, stream: true,
      partial_images: offers.rows - 1};
    if (this.budget !== null) body.budget = this.budget;
    const response = await ask("v1/images/generations",
      {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal});
    for await (const event of events(response)) {
      if (event.error) throw new Refused(500, event);
      await this.show(event);
      if (event.type.endsWith("completed")) return;
    }
    throw new Error("the server ended before the picture was done");
  }

  /** Paint the rows of an event that are drawn; below them the frame shows through. */
  async show(event) {
    const png = new Blob([Uint8Array.from(atob(event.b64_json), letter => letter.charCodeAt(0))], {type: "image/png"});
    const {width, height} = this.canvas;
    const done = event.partial_image_index === undefined;
    this.row = done ? offers.rows : event.partial_image_index + 1;
    const drawn = Math.round(height * this.row / offers.rows);
    const bitmap = await createImageBitmap(png, {colorSpaceConversion: "none"});
    this.canvas.getContext("2d").drawImage(bitmap, 0, 0, width, drawn, 0, 0, width, drawn);
    bitmap.close();
    this.seconds = event.seconds;
    const saved = 1 - event.cache_bytes / event.full_cache_bytes;
    this.part("progress").value = this.row;
    this.part(".seconds").textContent = event.seconds.toFixed(1);
    this.part(".cache").textContent = bytes(event.cache_bytes);
    this.part(".saved").textContent = percent(saved);
    this.part(".kept").textContent = percent(event.plan_budget, 1);
    this.say(done ? "done" : `row ${this.row} of ${offers.rows}`);
    if (done) {
      const save = this.part(".save");
      const words = this.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
      save.href = URL.createObjectURL(png);
      save.download = `${words.join("-").slice(0, 60)}-${this.label.replace(", ", "-")}-${this.seed}.png`;
      save.hidden = false;
    }
  }

  /** The plan as a file, where the server wants the key for it. */
  async savePlan() {
    const url = URL.createObjectURL(await (await ask(this.part(".plan").getAttribute("href"))).blob());
    Object.assign(document.createElement("a"), {href: url, download: `${this.label.replace(", ", "-")}.json`}).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }

  stop() {
    if (this.row < offers.rows) this.say(this.row ? `stopped at row ${this.row} of ${offers.rows}` : "not drawn");
  }

  remove() {
    URL.revokeObjectURL(this.part(".save").href);
    this.figure.remove();
  }
}

let pictures = [];

function say(text) {
  element("status").textContent = text;
}

function showError(error) {
  if (error.status === 401) {
    element("key-form").hidden = false;
    element("key").focus();
    if (!sessionStorage.getItem(KEY)) return; // the form says it
  }
  element("alert").textContent = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  element("alert").hidden = false;
}

function hideError() {
  element("alert").hidden = true;
  element("alert").textContent = "";
}

/** Draw what the form asks for, in place of what is being drawn. */
async function draw() {
  run?.abort();
  hideError();
  const typed = element("seed").value.trim();
  if (!/^\d*$/.test(typed) || Number(typed) > Number.MAX_SAFE_INTEGER) {
    element("seed").focus();
    return showError(new Error(`seed must be a whole number up to ${Number.MAX_SAFE_INTEGER}, got ${typed}`));
  }
  if (!offers && !await load()) return;
  const own = run = new AbortController();
  const seed = typed ? Number(typed) : crypto.getRandomValues(new Uint32Array(1))[0];
  const prompt = element("prompt").value, policy = element("policy").value;
  const plans = [[policy, element("budget").value ? Number(element("budget").value) : null]];
  if (!element("beside").disabled && element("beside").checked) plans.push(["full", 1]);
  const turns = plans.length > 1 && element("turns").checked;
  for (const picture of pictures) picture.remove();
  pictures = plans.map(plan => new Picture(...plan, prompt, seed));
  element("pictures").replaceChildren(...pictures.map(picture => picture.figure));
  pictures[0].part(".frame").scrollIntoView({block: "nearest"});
  element("cancel").disabled = false;
  const how = (plans.length < 2 ? "" : turns ? " one after the other" : " together") + ` with seed ${seed}`;
  say(`Drawing${how}.`);
  const mine = pictures;
  try {
    if (turns) for (const picture of mine) await picture.draw(own.signal);
    else await Promise.all(mine.map(picture => picture.draw(own.signal)));
    const results = mine.map(picture => `${picture.label} in ${picture.seconds.toFixed(1)} s`);
    say(`Drawn${how}: ${results.join("; ")}.`);
  } catch (error) {
    const cancelled = own.signal.aborted;
    own.abort(); // the other picture, too
    for (const picture of mine) picture.stop();
    if (mine.every(picture => !picture.row)) for (const picture of mine) picture.remove();
    if (run === own) say(cancelled ? "Cancelled." : "");
    if (!cancelled) showError(error);
  } finally {
    if (run === own) {
      run = null;
      if (document.activeElement === element("cancel")) element("prompt").focus();
      element("cancel").disabled = true;
    }
  }
}

/** Ask which policies and budgets there are; whether the server said so. */
async function load() {
  try {
    offers = await (await ask("v1/plans")).json();
  } catch (error) {
    showError(error);
    return false;
  }
  hideError();
  element("key-form").hidden = true;
  element("model").textContent = `draws ${offers.model}, ${offers.size.replace("x", " × ")}`;
  document.title = `${offers.model} – ssd-janus`;
  element("policy").replaceChildren(...offers.data.map(({policy}) => new Option(policy)));
  element("policy").value = offers.default.policy;
  choose();
  return true;
}

/** Show the budgets of the chosen policy, the last one again where it has it. */
function choose() {
  const {policy, about, budgets} = offers.data.find(offer => offer.policy === element("policy").value);
  const before = Number(element("budget").value) || offers.default.budget;
  const wanted = [before, offers.default.budget].find(budget => budgets.includes(budget)) ?? budgets[0] ?? "";
  element("budget").replaceChildren(...budgets.length
    ? budgets.map(budget => new Option(percent(budget), budget)) : [new Option("its own", "")]);
  element("budget").value = wanted;
  element("budget").disabled = budgets.length < 2;
  element("about").textContent = about.replaceAll("`", "");
  const comparable = policy !== "full" && offers.data.some(offer => offer.policy === "full");
  element("beside").disabled = element("turns").disabled = !comparable;
}

function cancel() {
  run?.abort();
}

element("form").addEventListener("submit", event => {
  event.preventDefault();
  draw();
});
element("prompt").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("form").requestSubmit();
});
element("key-form").addEventListener("submit", async event => {
  event.preventDefault();
  sessionStorage.setItem(KEY, element("key").value);
  if (await load()) element("prompt").focus();
});
element("policy").addEventListener("change", choose);
element("cancel").addEventListener("click", cancel);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") cancel();
});
load();

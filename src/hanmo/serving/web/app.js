// The page: one list of turns, shown either as a conversation (models with a chat template) or as one growing text.
// Whatever a model writes is set as text, never as HTML.

import { ApiError, fetchModel, fetchTasks, streamAnswer } from "./api.js";
import { TaskView } from "./tasks.js";

const DEFAULTS = { system: "", temperature: 0.7, top_p: 0.9, max_tokens: 256, seed: "" };
const FOLLOW_PIXELS = 80; // the view follows the answer while the reader is this close to its end

const $ = (id) => document.getElementById(id);
const strings = await (await fetch("strings.json")).json();

const state = {
  language: stored("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"),
  settings: { ...DEFAULTS, ...stored("settings") },
  model: null,
  turns: [], // {role: "user" | "assistant", text, note, element}
  abort: null, // AbortController of the answer being written
  view: "talk", // or "tasks"
};

// Storage may be forbidden by the browser; the page then simply forgets.
function stored(name) {
  try {
    return JSON.parse(localStorage.getItem(`hanmo.${name}`));
  } catch {
    return null;
  }
}

function store(name, value) {
  try {
    localStorage.setItem(`hanmo.${name}`, JSON.stringify(value));
  } catch {
    // see stored()
  }
}

const taskView = new TaskView({ t, button, showProblem, hideProblem, language: () => state.language });

// Language ------------------------------------------------------------------------------------------------------------

function t(key, values = {}) {
  const text = strings[state.language][key];
  if (typeof text !== "string") return text; // a list, or names by key
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function translate() {
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-i18n]")) element.textContent = t(element.dataset.i18n);
  for (const element of document.querySelectorAll("[data-i18n-label]"))
    element.setAttribute("aria-label", t(element.dataset.i18nLabel));
  for (const element of document.querySelectorAll("[data-i18n-placeholder]"))
    element.placeholder = t(element.dataset.i18nPlaceholder);
  $("language").textContent = t("other");
  $("language").lang = state.language === "zh" ? "en" : "zh-CN";
  if (state.model) $("model-name").textContent = state.model.id;
  const items = strings[state.language][chatting() ? "chatStarters" : "writeStarters"].map((text) => {
    const item = document.createElement("li");
    item.append(button(text, () => send(text)));
    return item;
  });
  $("starters").replaceChildren(...items);
  $("greeting").textContent = t(chatting() ? "chatGreeting" : "writeGreeting");
  $("tab-talk").textContent = t(chatting() ? "chat" : "write");
  taskView.translate();
  render();
}

function switchLanguage() {
  state.language = state.language === "zh" ? "en" : "zh";
  store("language", state.language);
  hideProblem();
  translate();
}

// What is shown -------------------------------------------------------------------------------------------------------

function chatting() {
  return state.model?.chat ?? true;
}

function button(text, action, className = "") {
  const element = document.createElement("button");
  element.type = "button";
  element.className = className;
  element.textContent = text;
  element.addEventListener("click", () => action(element));
  return element;
}

/** Show one of the two views; where the model has only one of them, there is no choice. */
function show(view) {
  const tasks = state.model?.tasks.length > 0;
  const talks = state.model?.writes ?? true;
  state.view = tasks && (view === "tasks" || !talks) ? "tasks" : "talk";
  $("views").hidden = !(tasks && talks);
  for (const name of ["talk", "tasks"]) {
    const chosen = name === state.view;
    $(name).hidden = !chosen;
    $(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    if ($("views").hidden) $(name).removeAttribute("role");
    else $(name).setAttribute("role", "tabpanel");
    $(name).setAttribute("aria-labelledby", `tab-${name}`);
  }
  document.querySelector("footer").hidden = state.view === "tasks";
  $("open-settings").hidden = state.view === "tasks";
  hideProblem();
  render();
}

/** Build everything anew; while an answer grows only its own text node changes (see answer()). */
function render() {
  const busy = state.abort !== null;
  $("welcome").hidden = state.turns.length > 0 || !state.model;
  $("clear").hidden = state.turns.length === 0 || state.view === "tasks";
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("log").className = chatting() ? "chat" : "manuscript";
  $("log").replaceChildren(...(chatting() ? state.turns.map(message) : manuscript()));
  for (const element of document.querySelectorAll("[data-chat-only]")) element.hidden = !chatting();
  const placeholder = chatting() ? "chatPlaceholder" : state.turns.length ? "writeMorePlaceholder" : "writePlaceholder";
  $("input").placeholder = t(placeholder);
  updateSend();
}

function updateSend() {
  const goesOn = !chatting() && state.turns.length > 0 && $("input").value === "";
  $("send").textContent = t(chatting() ? "send" : "continue");
  $("send").disabled = !state.model || !($("input").value.trim() || goesOn);
}

function message(turn, index) {
  const article = document.createElement("article");
  article.className = turn.role;
  const who = document.createElement("h2");
  who.className = "unseen";
  who.textContent = t(turn.role === "user" ? "you" : "model");
  turn.element = document.createElement("p");
  turn.element.dir = "auto";
  turn.element.textContent = turn.text;
  article.append(who, turn.element);
  if (turn.role === "assistant") article.append(tools(turn, index, () => turn.text));
  return article;
}

function manuscript() {
  if (state.turns.length === 0) return [];
  const sheet = document.createElement("article");
  const text = document.createElement("p");
  text.dir = "auto";
  for (const turn of state.turns) {
    turn.element = document.createElement("span");
    turn.element.className = turn.role;
    turn.element.textContent = turn.text;
    text.append(turn.element);
  }
  sheet.append(text);
  const last = state.turns.length - 1;
  if (state.turns[last].role === "assistant") sheet.append(tools(state.turns[last], last, prompt));
  return [sheet];
}

/** Under an answer: why it ended, copy, and for the last one "again". */
function tools(turn, index, text) {
  const row = document.createElement("div");
  row.className = "tools";
  if (state.abort !== null && index === state.turns.length - 1) return row;
  const copy = async (element) => {
    await navigator.clipboard.writeText(text());
    element.textContent = t("copied");
    setTimeout(() => (element.textContent = t("copy")), 1500);
  };
  row.append(button(t("copy"), copy, "quiet"));
  if (index === state.turns.length - 1) row.append(button(t("regenerate"), regenerate, "quiet"));
  if (turn.note) {
    const note = document.createElement("span");
    note.textContent = t(turn.note);
    row.append(note);
  }
  return row;
}

function showFigures(figures) {
  const parts = [];
  if (figures) {
    parts.push(figures.tokens ? t("tokens", { count: figures.tokens }) : t("thinking"));
    if (figures.speed) parts.push(t("speed", { speed: figures.speed.toFixed(1) }));
  }
  $("figures").textContent = parts.join(" · ");
}

function showProblem(error) {
  const known = {
    offline: "errorOffline",
    broken: "errorBroken",
    server_busy: "errorBusy",
    server_stopping: "errorStopping",
    context_length_exceeded: "errorLong",
  };
  const values = { message: error.message, context: state.model?.context_length };
  $("problem").textContent = t(known[error.code] ?? "errorOther", values);
  $("problem").hidden = false;
  $("problem").scrollIntoView({ block: "nearest" });
}

function hideProblem() {
  $("problem").hidden = true;
}

function nearEnd() {
  const page = document.scrollingElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < FOLLOW_PIXELS;
}

function scrollToEnd() {
  document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
}

// Asking --------------------------------------------------------------------------------------------------------------

function prompt() {
  return state.turns.map((turn) => turn.text).join("");
}

function requestBody() {
  const { system, seed, temperature, top_p, max_tokens } = state.settings;
  const body = { model: state.model.id, temperature, top_p, max_tokens };
  if (seed !== "") body.seed = Number(seed);
  if (!chatting()) return ["/v1/completions", { ...body, prompt: prompt() }];
  const messages = state.turns.map((turn) => ({ role: turn.role, content: turn.text }));
  if (system.trim()) messages.unshift({ role: "system", content: system });
  return ["/v1/chat/completions", { ...body, messages }];
}

function send(text) {
  if (state.abort || !state.model) return;
  if (text) state.turns.push({ role: "user", text });
  if (state.turns.length === 0) return;
  $("input").value = "";
  grow();
  answer();
}

function regenerate() {
  if (state.abort) return;
  state.turns.pop();
  answer();
}

/** Let the model write the next turn; what it wrote before an error or a stop is kept. */
async function answer() {
  const [path, body] = requestBody();
  const turn = { role: "assistant", text: "", note: "", element: null };
  state.turns.push(turn);
  state.abort = new AbortController();
  hideProblem();
  render();
  const live = document.createTextNode("");
  turn.element.append(live);
  turn.element.closest("article").setAttribute("aria-busy", "true"); // read out once it is whole
  turn.element.classList.add("writing");
  scrollToEnd();
  let first = null;
  showFigures({ tokens: 0 });
  try {
    for await (const chunk of streamAnswer(path, body, state.abort.signal)) {
      if (chunk.usage?.completion_tokens) {
        first ??= { time: performance.now(), tokens: chunk.usage.completion_tokens };
        const tokens = chunk.usage.completion_tokens;
        const seconds = (performance.now() - first.time) / 1000;
        showFigures({ tokens, speed: seconds > 0.2 ? (tokens - first.tokens) / seconds : 0 });
      }
      if (chunk.text) {
        const follow = nearEnd();
        turn.text += chunk.text;
        live.appendData(chunk.text);
        if (follow) scrollToEnd();
      }
      if (chunk.finishReason === "length") {
        turn.note = "endLength";
        turn.text = turn.text.replace(/\uFFFD$/, ""); // the limit may cut a character in two
      }
    }
    $("announce").textContent = t("answerDone");
  } catch (error) {
    if (error.name === "AbortError") turn.note = "endStopped";
    else showProblem(error instanceof ApiError ? error : new ApiError(null, String(error)));
    if (!first) showFigures(null);
    if (!turn.text) giveBack();
  }
  const follow = nearEnd();
  state.abort = null;
  render();
  if (follow) scrollToEnd();
  $("input").focus();
}

/** Nothing was written: take the empty turn away and put the question back into the input, unless that is in use. */
function giveBack() {
  state.turns.pop();
  if (state.turns.at(-1)?.role !== "user" || $("input").value) return;
  $("input").value = state.turns.pop().text;
  grow();
}

function clear() {
  state.abort?.abort();
  state.turns = [];
  hideProblem();
  showFigures(null);
  render();
  $("input").focus();
}

// Settings ------------------------------------------------------------------------------------------------------------

function showSettings() {
  for (const [name, value] of Object.entries(state.settings)) {
    $(name).value = value;
    const output = document.querySelector(`output[for=${name}]`);
    if (output) output.textContent = Number(value).toFixed(2);
  }
}

function readSetting(event) {
  const field = event.target;
  if (!(field.id in DEFAULTS) || !field.checkValidity()) return;
  const optional = field.id === "system" || field.id === "seed";
  if (field.value === "" && !optional) return;
  state.settings[field.id] = optional ? field.value : Number(field.value);
  store("settings", state.settings);
  const output = document.querySelector(`output[for=${field.id}]`);
  if (output) output.textContent = Number(field.value).toFixed(2);
}

function resetSettings() {
  state.settings = { ...DEFAULTS };
  store("settings", state.settings);
  showSettings();
}

// The input -----------------------------------------------------------------------------------------------------------

/** The input is as high as its text, up to the limit of the style sheet. */
function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  updateSend();
}

function onKey(event) {
  // While an input method is composing (Chinese, Japanese...), Enter belongs to it; Safari says so by key code 229.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!$("send").disabled) $("composer").requestSubmit();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send($("input").value);
});
$("input").addEventListener("keydown", onKey);
$("input").addEventListener("input", grow);
$("stop").addEventListener("click", () => state.abort?.abort());
$("clear").addEventListener("click", clear);
$("language").addEventListener("click", switchLanguage);
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("input", readSetting);
$("settings").addEventListener("close", showSettings); // a value that was refused gives way to the one in force
$("settings").addEventListener("click", (event) => event.target === $("settings") && $("settings").close());
$("reset").addEventListener("click", resetSettings);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) state.abort?.abort();
});

for (const name of ["talk", "tasks"]) $(`tab-${name}`).addEventListener("click", () => show(name));
$("views").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  show(state.view === "talk" ? "tasks" : "talk");
  $(`tab-${state.view}`).focus();
});

showSettings();
translate();
try {
  state.model = await fetchModel();
  if (state.model.tasks.length > 0) taskView.show(state.model, await fetchTasks());
  translate();
  show(location.hash === "#tasks" ? "tasks" : "talk");
} catch (error) {
  showProblem(error);
}

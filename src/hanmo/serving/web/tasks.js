// The tasks of the model: a form for one text, and its answer as a table, as marks in the text, or as a text.
// Whatever comes from the model or the reader is set as text, never as HTML.

import { ApiError, runTask } from "./api.js";

const MOST_LABELS = 20; // rows of a table of probabilities
const OPTIONAL = new Set(["pair"]); // texts of a record that are mostly left out
const HUES = 8; // colours of marks, as the style sheet has them
const SEPARATORS = /[,，、;；\n]/;

const $ = (id) => document.getElementById(id);

function element(tag, { className = "", text = "", ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export class TaskView {
  /** page: {t, button, showProblem, hideProblem, language} of the page around the form. */
  constructor(page) {
    this.page = page;
    this.tasks = [];
    this.model = null;
    this.abort = null;
    this.answered = null; // {row, text, seconds}: shown again in another language
    $("task").addEventListener("change", () => this.choose());
    $("task-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    $("task-form").addEventListener("input", () => this.update());
    $("task-form").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("task-run").disabled)
        $("task-form").requestSubmit();
      if (event.key === "Escape") this.abort?.abort();
    });
    $("task-stop").addEventListener("click", () => this.abort?.abort());
  }

  /** What the server can do, once it is known. */
  show(model, tasks) {
    this.model = model;
    this.tasks = tasks;
    $("task").replaceChildren(...tasks.map((task) => element("option", { value: task.id })));
    this.choose();
  }

  task() {
    return this.tasks.find((task) => task.id === $("task").value);
  }

  named(table, key, other = key) {
    return this.page.t(table)[key] ?? other;
  }

  translate() {
    for (const option of $("task").options) option.textContent = this.named("taskNames", option.value);
    $("task-text").placeholder = this.page.t("taskTextPlaceholder");
    this.describe();
    this.render();
  }

  choose() {
    this.answered = null;
    const others = this.task().input.filter((name) => name !== "text");
    $("task-more").replaceChildren(
      ...others.map((name) => {
        const field = element("textarea", { rows: "3", name, autocomplete: "off" });
        if (!OPTIONAL.has(name))
          return element("label", { className: "field" }, element("span", { "data-input": name }), field);
        const label = element("span", { className: "unseen", "data-input": name });
        const inside = element("label", { className: "field" }, label, field);
        return element("details", {}, element("summary", { "data-input": name }), inside);
      }),
    );
    this.describe();
    this.render();
  }

  describe() {
    const task = this.task();
    if (!task) return;
    $("task-help").textContent = this.page.language() === "zh" ? task.description_zh : task.description;
    $("task-text-name").textContent = this.named("textNames", task.id, this.page.t("taskText"));
    for (const name of $("task-more").querySelectorAll("[data-input]"))
      name.textContent = this.named("inputNames", name.dataset.input);
    for (const field of document.querySelectorAll("[data-asked]")) field.hidden = !task.asked;
    for (const field of document.querySelectorAll("[data-asked-labels]")) field.hidden = !task.needs_labels;
    this.update();
  }

  labels() {
    return $("task-labels")
      .value.split(SEPARATORS)
      .map((label) => label.trim())
      .filter(Boolean);
  }

  update() {
    const lacks = this.task()?.needs_labels && this.labels().length === 0;
    $("task-run").disabled = !this.task() || lacks || !$("task-text").value.trim();
  }

  body() {
    const task = this.task();
    const input = { text: $("task-text").value };
    for (const field of $("task-more").querySelectorAll("textarea"))
      if (field.value.trim()) input[field.name] = field.value;
    const body = { model: this.model.id, input };
    if (task.needs_labels) body.labels = this.labels();
    if (task.asked && $("task-instruction").value.trim()) body.instruction = $("task-instruction").value;
    return body;
  }

  async run() {
    if (this.abort) return;
    const body = this.body();
    const begun = performance.now();
    this.abort = new AbortController();
    this.answered = null;
    this.page.hideProblem();
    this.render();
    try {
      const row = await runTask(this.task().id, body, this.abort.signal);
      this.answered = { row, text: body.input.text, seconds: (performance.now() - begun) / 1000 };
    } catch (error) {
      if (error.name !== "AbortError")
        this.page.showProblem(error instanceof ApiError ? error : new ApiError(null, String(error)));
    }
    this.abort = null;
    this.render();
    if (this.answered) $("task-result").scrollIntoView({ block: "nearest" });
  }

  // What is shown -----------------------------------------------------------------------------------------------------

  render() {
    const busy = this.abort !== null;
    $("task-run").hidden = busy;
    $("task-stop").hidden = !busy;
    $("task").disabled = busy;
    $("task-result").setAttribute("aria-busy", String(busy));
    const seconds = this.answered?.seconds.toFixed(this.answered.seconds < 1 ? 3 : 1);
    $("task-figures").textContent = busy
      ? this.page.t("taskWorking")
      : this.answered
        ? this.page.t("taskTime", { seconds })
        : "";
    $("task-result").replaceChildren(...(this.answered ? this.answer() : []));
  }

  answer() {
    const { row, text } = this.answered;
    if (row.labels) return this.verdict(row);
    if (row.tokens) return this.marked(text, row);
    return this.plain(row);
  }

  /** Labels with their probabilities as bars. */
  verdict({ labels, probabilities = {} }) {
    const rows = Object.entries(probabilities);
    if (rows.length === 0) return [element("p", { className: "said", text: labels.join(", ") || this.page.t("noLabel") })];
    const body = rows.slice(0, MOST_LABELS).map(([label, share]) => this.bar(label, share, labels.includes(label)));
    const parts = [this.table(["label", "probability"], body, "bars")];
    if (rows.length > MOST_LABELS)
      parts.push(element("p", { className: "aside", text: this.page.t("others", { count: rows.length - MOST_LABELS }) }));
    return parts;
  }

  bar(label, share, chosen) {
    const name = element("th", { scope: "row", text: label });
    if (chosen) name.append(element("span", { className: "unseen", text: ` (${this.page.t("chosen")})` }));
    const filled = element("span", { className: "filled" });
    filled.style.width = `${100 * share}%`;
    const number = element("span", { className: "number", text: `${(100 * share).toFixed(1)} %` });
    const bar = element("span", { className: "bar", "aria-hidden": "true" }, filled);
    const cell = element("td", {}, element("div", { className: "share" }, bar, number));
    return element("tr", { className: chosen ? "chosen" : "" }, name, cell);
  }

  table(names, rows, className = "") {
    const head = names.map((name) => element("th", { scope: "col", text: this.page.t(name) }));
    return element(
      "table",
      { className },
      element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...rows),
    );
  }

  /** Tokens with tags: spans are marked in the text and listed; other tags stand above each token. */
  marked(text, { tokens, tags = [], spans, arguments: roles }) {
    const places = placesOf(text, tokens);
    const found = (spans ?? roles)?.map((span) => ({ ...span, kind: span.type ?? span.role }));
    if (!found) return [element("p", { className: "tagged" }, ...tagged(text, places, tags))];
    if (found.length === 0) return [element("p", { className: "said", text: this.page.t("noSpans") })];
    const kinds = [...new Set(found.map((span) => span.kind))];
    const sheet = element("p", { className: "marked", dir: "auto" }, ...marks(text, places, found, kinds));
    if (kinds.every((kind) => kind === "")) return [sheet];
    const rows = found.map((span) => {
      const words = text.slice(places[span.start][0], places[span.end - 1][1]);
      return element("tr", {}, element("td", { text: words }), element("td", { text: span.kind }));
    });
    return [sheet, this.table(["found", "kind"], rows)];
  }

  /** Whatever else a task answers: texts as texts, numbers beside their names. */
  plain(row) {
    const parts = [];
    const facts = [];
    for (const [name, value] of Object.entries(row)) {
      if (name === "index") continue;
      if (name === "answers" && row.programs) continue; // what was written around them
      if (Array.isArray(value)) parts.push(...value.filter((item) => typeof item === "string").flatMap((item) => this.text(name, item)));
      else if (name === "answer" && value === null) parts.push(element("p", { className: "said", text: this.page.t("noAnswer") }));
      else if (typeof value === "string") parts.push(...this.text(name, value));
      else if (name === "rules") facts.push(...Object.entries(value).map(([rule, holds]) => [rule, this.fact(holds)]));
      else if (value !== null && typeof value !== "object") facts.push([name, this.fact(value)]);
    }
    if (facts.length > 0) {
      const pairs = facts.flatMap(([name, value]) => [
        element("dt", { text: this.named("fieldNames", name) }),
        element("dd", { text: value }),
      ]);
      parts.push(element("dl", {}, ...pairs));
    }
    return parts;
  }

  fact(value) {
    if (typeof value === "boolean") return this.page.t(value ? "yes" : "no");
    return Number.isInteger(value) || typeof value !== "number" ? String(value) : value.toFixed(3);
  }

  text(name, value) {
    const copy = this.page.button(
      this.page.t("copy"),
      async (made) => {
        await navigator.clipboard.writeText(value);
        made.textContent = this.page.t("copied");
        setTimeout(() => (made.textContent = this.page.t("copy")), 1500);
      },
      "quiet",
    );
    const head = element("div", { className: "row" }, element("h2", { text: this.named("fieldNames", name) }), copy);
    return [head, element("p", { className: name === "programs" ? "said program" : "said", dir: "auto", text: value })];
  }
}

/** Where each token stands in the text, [start, end]; they come in its order. */
function placesOf(text, tokens) {
  let at = 0;
  return tokens.map((token) => {
    const found = text.indexOf(token, at);
    const start = found < 0 ? at : found;
    at = start + (found < 0 ? 0 : token.length);
    return [start, at];
  });
}

/** The text with its spans as marks; after each mark stands its kind. */
function marks(text, places, spans, kinds) {
  const parts = [];
  let at = 0;
  for (const { start, end, kind } of [...spans].sort((a, b) => a.start - b.start)) {
    const [from, to] = [places[start][0], places[end - 1][1]];
    parts.push(text.slice(at, from));
    const mark = element("mark", { className: `hue-${kinds.indexOf(kind) % HUES}`, text: text.slice(from, to) });
    if (kind) mark.append(element("small", { text: kind }));
    parts.push(mark);
    at = to;
  }
  return [...parts, text.slice(at)];
}

/** The text with the tag of each token above it. */
function tagged(text, places, tags) {
  const parts = [];
  let at = 0;
  places.forEach(([from, to], number) => {
    parts.push(text.slice(at, from));
    parts.push(element("ruby", { text: text.slice(from, to) }, element("rt", { text: tags[number] })));
    at = to;
  });
  return [...parts, text.slice(at)];
}

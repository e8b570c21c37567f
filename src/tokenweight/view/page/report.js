"use strict";
// Everything is computed and drawn when the page is written; the script switches between the weightings, and tells of
// the token that is pointed at. Every weighting at every stop of its slider is a setting of the page, with a number.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const stops = data.schemes.map((scheme) => scheme.start);
let current = data.schemes.findIndex((scheme) => scheme.label === "Dense");
const settingOf = (scheme) => data.schemes[scheme].first + stops[scheme];

// An element with attributes, and children that are elements or text; text is never read as markup.
function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// The rows of a run: the chosen one, in which one walks with the arrow keys, and the card about a token of it.
class Reader {
  constructor({ place, rows }) {
    const article = $(`text-${place}`);
    this.card = $(`card-${place}`);
    this.card.hidden = false;
    this.rows = [...article.querySelectorAll(".row")].map((element, i) => ({ ...rows[i], element, tokens: [...element.querySelectorAll(".t")] }));
    for (const { tokens } of this.rows) tokens.forEach((token) => token.setAttribute("tabindex", -1));
    const choice = article.querySelector(".choice");
    if (choice) choice.hidden = false;
    choice?.addEventListener("change", (event) => this.open(Number(event.target.value)));
    const on = (name, act) => article.addEventListener(name, (event) => {
      const token = event.target.closest(".passage .t");
      if (token) act(this.row.tokens.indexOf(token), event);
    });
    on("keydown", (i, event) => this.walk(event));
    on("focusin", (i) => this.select(i));
    on("click", (i) => this.focus(i));
    on("pointerover", (i) => this.tell(i));
    for (const { element } of this.rows) element.addEventListener("pointerleave", () => this.tell(this.selected));
    this.open(0);
  }

  open(number) {
    this.rows.forEach(({ element }, i) => (element.hidden = i !== number));
    this.row = this.rows[number];
    this.paint();
    this.select(this.row.selected);
    this.reveal(this.row.selected);
  }

  paint() {
    const looks = this.row.looks[settingOf(current)];
    this.row.tokens.forEach((token, i) => (token.className = `t ${data.looks[looks.charCodeAt(i) - 97]}`));
    if (this.selected !== undefined) this.tell(this.selected);
  }

  select(i) {
    const before = this.row.element.querySelector("[tabindex='0']");
    before?.setAttribute("tabindex", -1);
    before?.removeAttribute("aria-describedby");
    this.selected = i;
    this.row.tokens[i].setAttribute("tabindex", 0);
    this.row.tokens[i].setAttribute("aria-describedby", this.card.id);
    this.tell(i);
  }

  focus(i) {
    this.row.tokens[i].focus({ preventScroll: true });
    this.reveal(i);
  }

  // Scrolls the passage alone, not the page.
  reveal(i) {
    const passage = this.row.element.querySelector(".passage");
    const token = this.row.tokens[i].getBoundingClientRect(), box = passage.getBoundingClientRect();
    if (token.top < box.top || token.bottom > box.bottom) passage.scrollTop += token.top - box.top - box.height / 3;
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    const line = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if ((!step && !line) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const to = step ? this.selected + step : this.inNextLine(line);
    this.focus(Math.max(0, Math.min(this.row.tokens.length - 1, to)));
  }

  // The token of the next line, above or below, that is nearest to the selected one.
  inNextLine(step) {
    const from = this.row.tokens[this.selected].getBoundingClientRect();
    let [best, distance, top] = [this.selected, Infinity, null];
    for (let i = this.selected + step; this.row.tokens[i]; i += step) {
      const box = this.row.tokens[i].getClientRects()[0];
      if (!box || Math.abs(box.top - from.top) < from.height / 2) continue;
      top ??= box.top;
      if (Math.abs(box.top - top) > from.height / 2) break;
      const away = Math.abs(box.left - from.left);
      if (away < distance) [best, distance] = [i, away];
    }
    return best;
  }

  // What is known of token i, on the card.
  tell(i) {
    const { start, length, long, short, ago, weights, tokens } = this.row;
    const known = long[i] !== null, difference = short[i] - long[i];
    this.earlier?.removeAttribute("data-earlier");
    this.earlier = tokens[i - ago[i]];
    if (ago[i] && this.earlier) this.earlier.setAttribute("data-earlier", "");
    const facts = [
      ["position", `${start + i} of ${length}`],
      ["loss, long", known ? long[i].toFixed(4) : "not predicted"],
      ["loss, short", known ? short[i].toFixed(4) : "not predicted"],
      ["short − long", known ? (difference < 0 ? "−" : "+") + Math.abs(difference).toFixed(4) : "–"],
      ["seen before", this.seenBefore(i, ago[i])],
    ].flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
    const rows = data.schemes.map(({ label }, scheme) => {
      const weight = weights[settingOf(scheme)][i];
      return make("tr", scheme === current ? { class: "current" } : {}, make("th", { scope: "row" }, label),
        make("td", {}, known ? String(weight) : "–"), make("td", {}, make("meter", { class: "weight", max: 8, value: weight, "aria-hidden": true })));
    });
    const piece = tokens[i].textContent.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
    this.card.replaceChildren(make("p", { class: "piece" }, piece || "part of a character, which the next tokens complete"),
      make("dl", {}, ...facts), make("table", {}, make("caption", {}, "weight by scheme"), make("tbody", {}, ...rows)));
  }

  seenBefore(i, ago) {
    if (ago === null) return "–";
    if (ago > i) return `${ago} tokens ago, before this passage`;
    const jump = make("button", { type: "button" }, `${ago} tokens ago, at ${this.row.start + i - ago}`);
    jump.addEventListener("click", () => this.focus(i - ago));
    return jump;
  }
}

const readers = data.runs.map((run) => new Reader(run));

function follow() {
  const { setting, stops: values } = data.schemes[current];
  $("setting").hidden = setting === null;
  $("slider").max = Math.max(0, values.length - 1);
  $("slider").value = stops[current];
  $("slider").setAttribute("aria-valuetext", values[stops[current]]);
  $("slider-name").textContent = setting;
  $("slider-value").textContent = values[stops[current]];
  for (const node of document.querySelectorAll("[data-setting]")) node.hidden = Number(node.dataset.setting) !== settingOf(current);
  readers.forEach((reader) => reader.paint());
}

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("controls").addEventListener("input", ({ target }) => {
  if (target.name === "scheme") current = Number(target.value);
  else stops[current] = Number(target.value);
  follow();
});
$("controls").hidden = false;
follow();

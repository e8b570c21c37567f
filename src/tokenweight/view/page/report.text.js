// A passage of tinted tokens, in which one walks with the arrow keys, and the card that tells of a token.

// Control characters, line separators, bidirectional controls, invisible characters and non-characters are shown as
// escapes; joiners, which some scripts and emoji need, are not.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff]/g;
const legible = (text) => text.replace(HIDDEN, (hidden) => `\\u${hidden.charCodeAt(0).toString(16).padStart(4, "0")}`);
const onOneLine = (text) => legible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");

// How a token of this weight looks: as show.tint says, in steps of a quarter of a doubling.
function tint(weight) {
  if (weight === 0) return "t zero";
  const level = Math.round(4 * Math.max(-2, Math.min(2, Math.log2(weight))));
  if (level === 0) return "t";
  return `t ${level > 0 ? "up" : "down"} l${Math.abs(level)}${weight >= 2 ? " far" : ""}`;
}

// The reader of a run: choice of row, summary, passage, card. `current()` gives the scheme and the value of each.
class Reader {
  constructor(article, run, current) {
    this.article = article;
    this.run = run;
    this.current = current;
    const title = make("h3", {}, make("span", { class: `swatch s${run.place % 6}` }), run.name);
    this.summary = make("p", { class: "summary", role: "status" });
    this.passage = make("div", { class: "passage", dir: "auto", role: "group", "aria-label": `Tokens of ${run.name}` });
    this.card = make("aside", { class: "card", id: `card-${run.place}`, "aria-label": "The token" });
    const choose = this.rowChoice();
    this.where = make("p", { class: "quiet" });
    article.replaceChildren(title, ...(choose ? [choose] : []), this.where, this.summary, make("div", { class: "spread" }, this.passage, this.card));
    this.passage.addEventListener("keydown", (event) => this.walk(event));
    this.passage.addEventListener("focusin", (event) => event.target.dataset.t && this.select(Number(event.target.dataset.t)));
    this.passage.addEventListener("click", (event) => event.target.dataset.t && this.focus(Number(event.target.dataset.t)));
    this.passage.addEventListener("pointerover", (event) => event.target.dataset.t && this.tell(Number(event.target.dataset.t)));
    this.passage.addEventListener("pointerleave", () => this.tell(this.selected));
    this.open(0);
  }

  rowChoice() {
    if (this.run.rows.length < 2) return null;
    const options = this.run.rows.map((row, i) => make("option", { value: i }, `row ${row.number}`));
    const select = make("select", {}, ...options);
    select.addEventListener("change", () => this.open(Number(select.value)));
    return make("label", { class: "choice" }, "Row ", select);
  }

  open(number) {
    const row = (this.row = this.run.rows[number]);
    const stop = row.start + row.pieces.length;
    this.where.textContent = `Row ${row.number}: tokens ${row.start} to ${stop - 1} of ${row.long.length}`;
    this.passage.replaceChildren();
    this.tokens = row.pieces.map((piece, i) => {
      const lead = piece.trim() ? piece.match(/^ */)[0] : ""; // the space before a word stays untinted
      const token = make("span", { "data-t": row.start + i, tabindex: -1 });
      token.piece = legible(piece.slice(lead.length));
      this.passage.append(lead, token);
      return token;
    });
    const gains = row.difference.slice(row.start, stop).map(Math.abs);
    this.selected = row.start + gains.indexOf(Math.max(...gains));
    this.paint();
    this.select(this.selected);
    this.reveal(this.selected);
  }

  paint() {
    const { scheme, values } = this.current();
    const weights = weigh(scheme, values[scheme], this.row);
    for (const token of this.tokens) {
      const t = Number(token.dataset.t);
      const look = this.row.mask[t] ? tint(weights[t]) : "t zero";
      const text = look.includes("up") ? token.piece.replaceAll("\n", "⏎\n") : token.piece;
      if (token.className !== look) token.className = look;
      if (token.textContent !== text) token.textContent = text;
    }
    this.summary.textContent = summarize(this.row, weights);
    this.mark();
    this.tell(this.selected);
  }

  token(t) {
    return this.tokens[t - this.row.start];
  }

  mark() {
    this.token(this.selected)?.classList.add("selected");
  }

  select(t) {
    const before = this.token(this.selected);
    before?.classList.remove("selected");
    before?.setAttribute("tabindex", -1);
    before?.removeAttribute("aria-describedby");
    this.selected = t;
    this.token(t).setAttribute("tabindex", 0);
    this.token(t).setAttribute("aria-describedby", this.card.id);
    this.mark();
    this.tell(t);
  }

  focus(t) {
    this.token(t).focus({ preventScroll: true });
    this.reveal(t);
  }

  // Scrolls the passage alone, not the page.
  reveal(t) {
    const token = this.token(t).getBoundingClientRect(), box = this.passage.getBoundingClientRect();
    if (token.top < box.top || token.bottom > box.bottom) this.passage.scrollTop += token.top - box.top - box.height / 3;
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    const line = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if ((!step && !line) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const [first, last] = [this.row.start, this.row.start + this.tokens.length - 1];
    const to = step ? this.selected + step : this.inNextLine(line);
    this.focus(Math.max(first, Math.min(last, to)));
  }

  // The token of the next line, above or below, that is nearest to the selected one.
  inNextLine(step) {
    const from = this.token(this.selected).getBoundingClientRect();
    let [best, distance, top] = [this.selected, Infinity, null];
    for (let t = this.selected + step; this.token(t); t += step) {
      const box = this.token(t).getClientRects()[0];
      if (!box || Math.abs(box.top - from.top) < from.height / 2) continue;
      top ??= box.top;
      if (Math.abs(box.top - top) > from.height / 2) break;
      const away = Math.abs(box.left - from.left);
      if (away < distance) [best, distance] = [t, away];
    }
    return best;
  }

  // What is known of token t, on the card.
  tell(t) {
    const { scheme, values } = this.current();
    const row = this.row, i = t - row.start, seen = row.seen[i];
    this.earlier?.classList.remove("earlier");
    this.earlier = seen === null ? null : this.token(seen);
    this.earlier?.classList.add("earlier");
    const fact = (name, ...value) => [make("dt", {}, name), make("dd", {}, ...value)];
    const loss = (number) => (number === null ? "not predicted" : number.toFixed(4));
    const facts = [
      ...fact("position", `${t} of ${row.long.length}`),
      ...fact("loss, long", loss(row.long[t])),
      ...fact("loss, short", loss(row.short[t])),
      ...fact("short − long", row.mask[t] ? (row.difference[t] < 0 ? "−" : "+") + Math.abs(row.difference[t]).toFixed(4) : "–"),
      ...fact("seen before", ...this.seenBefore(t, seen)),
    ];
    const weights = data.schemes.map(({ name, label }) => {
      const weight = weigh(name, values[name], row)[t];
      return make("tr", name === scheme ? { class: "current" } : {}, make("th", { scope: "row" }, label),
        make("td", { class: "number" }, row.mask[t] ? weight.toFixed(3) : "–"), make("td", {}, bar(Math.min(1, weight / 8), "weight")));
    });
    const caption = make("caption", {}, "weight by scheme");
    this.card.replaceChildren(make("p", { class: "piece" }, onOneLine(row.pieces[i]) || "part of a character, which the next tokens complete"),
      make("dl", {}, ...facts), make("table", {}, caption, make("tbody", {}, ...weights)));
  }

  seenBefore(t, seen) {
    if (seen === null) return ["–"];
    const ago = `${t - seen} tokens ago`;
    if (!this.token(seen)) return [`${ago}, before this passage`];
    const jump = make("button", { type: "button" }, `${ago}, at ${seen}`);
    jump.addEventListener("click", () => this.focus(seen));
    return [jump];
  }
}

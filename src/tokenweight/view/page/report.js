// The page: the switch of schemes and its slider, and everything that follows them.

const $ = (id) => document.getElementById(id);
const scoredRuns = data.runs.filter((run) => run.kind === "scored");
const values = Object.fromEntries(data.schemes.map((scheme) => [scheme.name, scheme.value ?? null]));
let scheme = "dense";
const current = () => ({ scheme, values });

function showControls() {
  const { setting, low, high, step } = data.schemes.find(({ name }) => name === scheme);
  $("setting").hidden = setting === undefined;
  if (setting === undefined) return;
  const slider = $("slider");
  Object.assign(slider, { min: low, max: high, step });
  slider.value = values[scheme];
  $("slider-name").textContent = setting;
  $("slider-value").textContent = Number(slider.value).toFixed(2);
}

const middle = (bin) => (bin.first + bin.stop) / 2;

function showPositions() {
  const sizes = [...new Set(scoredRuns.map((run) => run.size).filter(Boolean))];
  showChart($("positions"), {
    title: "Weight by position", x: "position in the document", y: "mean weight", zero: true,
    note: sizes.length ? `Inside the first window (${sizes.join(", ")} tokens) the short context is all there is: a model that scores itself leaves its tokens without a difference.` : "",
    marks: sizes.map((size) => ({ x: size, label: "first window ends" })),
    series: scoredRuns.map((run) => {
      const means = weightByPosition(run, scheme, values[scheme]);
      return { name: run.name, place: run.place, points: run.positions.map((bin, i) => ({ x: middle(bin), y: means[i] })) };
    }),
    spans: new Map(scoredRuns.flatMap((run) => run.positions.map((bin) => [middle(bin), `${bin.first} to ${bin.stop - 1}`]))),
  });
}

function showHistogram() {
  const sizes = scoredRuns.every((run) => run.size);
  const { edges: shared } = scoredRuns[0].histogram;
  showChart($("histogram"), {
    title: "Differences of the losses", x: "short − long, nats", y: "share of the tokens, %, logarithmic", log: true,
    area: shared[1] - shared[0],
    spans: new Map(shared.slice(1).map((edge, i) => [(shared[i] + edge) / 2, `${short(shared[i])} to ${short(edge)}`])),
    note: `${sizes ? "Tokens beyond the first window. " : ""}Right of 0 the long context helps, left of 0 it misleads. The outermost bars hold what lies beyond them, too.`,
    series: scoredRuns.map((run) => {
      const { edges, counts } = run.histogram;
      const total = sum(counts) || 1;
      return { name: run.name, place: run.place, points: counts.map((count, i) => ({ x: (edges[i] + edges[i + 1]) / 2, y: (100 * count) / total })) };
    }),
  });
}

function showKinds() {
  const tables = scoredRuns.filter((run) => run.kinds.length).map((run) => {
    const share = (part, of) => make("span", { class: "share" }, bar(part, of), `${(100 * part).toFixed(1)} %`);
    const rows = weightByKind(run, scheme, values[scheme]).map((kind) =>
      [kind.kind, share(kind.token_share, "tokens"), share(kind.weight_share, "weight"), kind.mean_weight.toFixed(3)]);
    return table(run.name, ["kind", "of the tokens", "of the weight", "mean weight"], rows);
  });
  $("kinds").replaceChildren(...tables);
}

function showTraining() {
  const runs = data.runs.filter((run) => run.kind === "training");
  const first = ["loss", "unweighted_loss", "grad_norm", "learning_rate"];
  const names = [...new Set([...first, ...runs.flatMap((run) => Object.keys(run.curves))])];
  const titles = { loss: "Loss by step", unweighted_loss: "Loss without weights", grad_norm: "Norm of the gradient" };
  const units = { loss: "nats, weighted: not to be compared between weightings", unweighted_loss: "nats" };
  for (const name of names) {
    const series = runs.filter((run) => run.curves[name]).map((run) => ({ name: run.name, place: run.place, points: run.curves[name].map(([x, y]) => ({ x, y })) }));
    if (!series.length) continue;
    const figure = make("figure");
    $("training").append(figure);
    const words = name.replaceAll("_", " ");
    showChart(figure, { title: titles[name] ?? words[0].toUpperCase() + words.slice(1), x: "step", y: units[name] ?? "", series });
  }
}

function showEvaluation(run) {
  const [losses, changes] = [make("figure"), make("figure")];
  $(`bins-${run.place}`).append(losses);
  const names = run.bins.map((bin) => `${bin.first} to ${bin.stop - 1}`);
  const points = (model, point) => run.bins.map((bin, i) => ({ x: i, ...point(bin.entries[model]) }));
  const about = { x: "position in the document", names };
  showChart(losses, { ...about, title: "Loss by position", y: "nats",
    series: run.models.map((name, i) => ({ name, place: i, points: points(i, (entry) => ({ y: entry.value })) })) });
  if (run.models.length < 2) return;
  $(`bins-${run.place}`).append(changes);
  showChart(changes, { ...about, title: `Change from ${run.models[0]}`, y: "nats, with 95 % intervals; less is better", dots: true, zero: true,
    series: run.models.slice(1).map((name, i) => ({ name, place: i + 1, points: points(i + 1, ({ change, low, high }) => ({ y: change, low, high })) })) });
}

if (scoredRuns.length) {
  const readers = scoredRuns.map((run) => new Reader($(`text-${run.place}`), run, current));
  const follow = () => {
    showControls();
    readers.forEach((reader) => reader.paint());
    showPositions();
    showKinds();
  };
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("input", (event) => {
    if (event.target.name === "scheme") scheme = event.target.value;
    else values[scheme] = Number(event.target.value);
    follow();
  });
  showHistogram();
  follow();
}
if (data.runs.some((run) => run.kind === "training")) showTraining();
data.runs.filter((run) => run.kind === "evaluation").forEach(showEvaluation);

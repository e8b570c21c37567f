"use strict";
// The weightings of tokenweight, in float64 from the same float32 differences: equal scores are equal here too.

const data = JSON.parse(document.getElementById("data").textContent);

// Rows as they are stored become rows to compute with: `difference` is short - long, rounded as float32 is.
for (const run of data.runs.filter((run) => run.kind === "scored")) {
  for (const row of run.rows) {
    row.mask = row.long.map((loss) => loss !== null);
    row.num = row.mask.filter(Boolean).length;
    row.difference = row.long.map((loss, t) => (loss === null ? 0 : Math.fround(row.short[t] - loss)));
    row.weights = new Map();
  }
}

const formulas = {
  uniform: (row) => row.mask.map(Number),
  dense: (row, interpolation) => {
    const weights = normalize(row.difference.map(Math.abs), row);
    return weights.map((weight, t) => (row.mask[t] ? interpolation + (1 - interpolation) * weight : 0));
  },
  sparse: (row, keep) => keepTop(row.difference.map(Math.abs), row, keep),
  longce: (row, cap) => row.difference.map((d, t) => (row.mask[t] ? Math.exp(Math.min(d, Math.log(cap))) : 0)),
  ppmi: (row, keep) => keepTop(row.difference.map((d) => Math.max(d, 0)), row, keep),
  npmi: (row, keep) => keepTop(row.difference.map((d) => Math.max(-d, 0)), row, keep),
};

// The weight of every token of a row; what was computed last is kept, since hovering asks for all schemes.
function weigh(scheme, value, row) {
  const known = row.weights.get(scheme);
  if (known && known.value === value) return known.weights;
  const weights = formulas[scheme](row, value);
  row.weights.set(scheme, { value, weights });
  return weights;
}

function normalize(scores, row) {
  const total = sum(scores);
  return scores.map((score, t) => (total > 0 ? (score / total) * row.num : Number(row.mask[t])));
}

// Of equal scores those are kept that come first in the order of `tieOrder`, as in selection.py.
function keepTop(scores, row, keep) {
  if (scores.every((score) => score <= 0)) return row.mask.map(Number);
  const numKept = Math.max(1, Math.floor(row.num * keep));
  const rank = tieOrder(scores.length);
  const places = scores.map((_, t) => t).filter((t) => row.mask[t]);
  places.sort((a, b) => scores[b] - scores[a] || rank[a] - rank[b]);
  const weights = new Array(scores.length).fill(0);
  for (const t of places.slice(0, numKept)) weights[t] = row.num / numKept;
  return weights;
}

const ranks = new Map();

// The place of each position in selection.py's order of equal scores, for seed 0: a hash in 63 bits.
function tieOrder(length) {
  if (ranks.has(length)) return ranks.get(length);
  const top = (1n << 63n) - 1n;
  const hashes = Array.from({ length }, (_, t) => {
    let x = ((BigInt(t) + 1n) * 0x1e3779b97f4a7c15n) & top;
    x = ((x ^ (x >> 30n)) * 0x3f58476d1ce4e5b9n) & top;
    x = ((x ^ (x >> 27n)) * 0x14d049bb133111ebn) & top;
    return x ^ (x >> 31n);
  });
  const order = hashes.map((_, t) => t);
  order.sort((a, b) => (hashes[a] < hashes[b] ? -1 : hashes[a] > hashes[b] ? 1 : a - b));
  const rank = new Array(length);
  order.forEach((t, place) => (rank[t] = place));
  ranks.set(length, rank);
  return rank;
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

// What is said of a row in one line, as show.summary says it.
function summarize(row, weights) {
  if (!row.num) return "no token of this row is predicted";
  const total = sum(weights);
  const squares = sum(weights.map((weight) => weight * weight));
  const numZero = weights.filter((weight, t) => row.mask[t] && weight === 0).length;
  const effective = squares ? (total * total) / squares : 0;
  const share = (number) => `${((100 * number) / row.num).toFixed(1)} %`;
  const counted = `${effective.toFixed(1)} of ${row.num} (${share(effective)})`;
  return `mean weight ${(total / row.num).toFixed(2)} · ${share(numZero)} weigh 0 · effective tokens ${counted}`;
}

// Mean weight in each bin of positions: null where none counts.
function weightByPosition(run, scheme, value) {
  const sums = run.positions.map(() => 0);
  for (const row of run.rows) {
    weigh(scheme, value, row).forEach((weight, t) => {
      const position = row.places ? row.places[t] : t;
      if (row.mask[t]) sums[run.positions.findIndex((bin) => bin.first <= position && position < bin.stop)] += weight;
    });
  }
  return sums.map((total, number) => total / run.positions[number].num_tokens);
}

// Share of the weight and mean weight of each kind of token.
function weightByKind(run, scheme, value) {
  const sums = run.kinds.map(() => 0);
  let total = 0;
  for (const row of run.rows) {
    weigh(scheme, value, row).forEach((weight, t) => {
      total += weight;
      run.kinds.forEach((kind, number) => {
        if ((row.kinds[t] >> kind.bit) & 1) sums[number] += weight;
      });
    });
  }
  return run.kinds.map((kind, number) => ({
    ...kind,
    weight_share: total ? sums[number] / total : 0,
    mean_weight: sums[number] / kind.num_tokens,
  }));
}

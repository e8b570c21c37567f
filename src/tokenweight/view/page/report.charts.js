// Small charts as SVG: lines, steps, and points with intervals; below each a table with the same numbers.

const SVG = "http://www.w3.org/2000/svg";

// An element with attributes, and children that are elements or text; text is never read as markup.
function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

// A number in at most four significant digits, without an exponent where people read none.
function short(number) {
  if (number === null || number === undefined || !Number.isFinite(number)) return "–";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return number.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return size >= 1000 ? Math.round(number).toLocaleString("en") : String(Number(number.toPrecision(4)));
}

// A bar as long as a share of its room; the number stands beside it.
function bar(share, of) {
  const length = make("span", { class: `length ${of}` });
  length.style.width = `${100 * share}%`;
  return make("span", { class: "bar", "aria-hidden": "true" }, length);
}

// About `num` round numbers from low to high.
function ticks(low, high, num) {
  const raw = (high - low) / num || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

const nameOf = (chart, x) => (chart.names ? chart.names[x] : chart.spans?.get(x) ?? short(x));

// A table whose rows may be laid below each other where the page is narrow: roles keep it a table for screen readers.
function table(caption, heads, rows) {
  const head = make("tr", { role: "row" }, ...heads.map((text) => make("th", { scope: "col", role: "columnheader" }, text)));
  const lines = rows.map(([first, ...cells]) =>
    make("tr", { role: "row" }, make("th", { scope: "row", role: "rowheader" }, first),
      ...cells.map((cell, i) => make("td", { role: "cell", "data-label": heads[i + 1] }, cell))));
  return make("table", { class: "stacked", role: "table" }, make("caption", {}, caption),
    make("thead", { role: "rowgroup" }, head), make("tbody", { role: "rowgroup" }, ...lines));
}

// A chart in a figure. `chart` has title, note, x, y (names of the axes), unit of a table's first column, and series:
// name, place (color) and points {x, y, low, high}; and perhaps: log (logarithmic y), area, zero (y = 0 is shown),
// marks (vertical lines {x, label}), dots (points that no line joins), names (of x = 0, 1, 2 …),
// spans (what an x stands for, in the table).
function showChart(figure, chart) {
  const open = figure.querySelector("details")?.open;
  const drawing = make("div", { class: "drawing" });
  const heads = [chart.x, ...chart.series.map((series) => series.name)];
  const xs = [...new Set(chart.series.flatMap((series) => series.points.map((point) => point.x)))].sort((a, b) => a - b);
  const cell = (point) => {
    if (!point) return "–";
    return point.low === undefined || point.low === null ? short(point.y) : `${short(point.y)} [${short(point.low)}, ${short(point.high)}]`;
  };
  const found = chart.series.map((series) => new Map(series.points.map((point) => [point.x, point])));
  const numbers = table(`${chart.title}: ${chart.y}`, heads, xs.map((x) => [nameOf(chart, x), ...found.map((points) => cell(points.get(x)))]));
  const details = make("details", {}, make("summary", {}, "Numbers"), numbers);
  details.open = Boolean(open);
  const keys = chart.series.map((series) =>
    make("span", { class: "key" }, make("span", { class: `swatch s${series.place % 6}` }), series.name));
  figure.replaceChildren(make("figcaption", {}, make("strong", {}, chart.title), " ", make("span", { class: "quiet" }, chart.y)),
    make("div", { class: "keys" }, ...(keys.length > 1 ? keys : [])), drawing,
    ...(chart.note ? [make("p", { class: "quiet" }, chart.note)] : []), details);
  figure.chart = chart;
  drawChart(drawing, chart);
  resized.observe(figure);
}

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const drawing = target.querySelector(".drawing");
    if (drawing && drawing.drawnWidth !== drawing.clientWidth) drawChart(drawing, target.chart);
  }
});

function drawChart(drawing, chart) {
  const width = (drawing.drawnWidth = drawing.clientWidth) || 320;
  const height = 230, left = 52, right = 24, top = 14, bottom = 40;
  const points = chart.series.flatMap((series) => series.points).filter((point) => point.y !== null);
  const said = chart.series.map((series) => series.name).join(", ");
  drawing.replaceChildren();
  const svg = draw(drawing, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
    "aria-label": `${chart.title}, ${chart.y} by ${chart.x}, of ${said}. The table below has the numbers.` });
  const shown = chart.log ? points.filter((point) => point.y > 0) : points;
  if (!shown.length) {
    draw(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no token to show");
    return;
  }
  const room = chart.area ? chart.area / 2 : chart.names ? 0.5 : 0;
  const xs = points.flatMap((point) => [point.x - room, point.x + room]);
  const [xLow, xHigh] = [Math.min(...xs), Math.max(...xs)];
  const value = chart.log ? Math.log10 : (y) => y;
  const ys = shown.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]).map(value);
  if (chart.zero) ys.push(0);
  let [yLow, yHigh] = [Math.min(...ys), Math.max(...ys)];
  // Of a constant, a mean weight of 1 for instance, what differs is rounding: it is drawn flat.
  const differs = yHigh - yLow > 1e-6 * Math.max(Math.abs(yLow), Math.abs(yHigh));
  const margin = (differs ? yHigh - yLow : Math.abs(yHigh) || 1) * 0.08;
  yLow -= chart.zero && yLow === 0 ? 0 : margin;
  yHigh += margin;
  const toX = (x) => left + ((x - xLow) / (xHigh - xLow || 1)) * (width - left - right);
  const toY = (y) => height - bottom - ((value(y) - yLow) / (yHigh - yLow)) * (height - top - bottom);
  drawAxes(svg, chart, { width, height, left, right, bottom, xLow, xHigh, yLow, yHigh, toX, toY });
  for (const mark of chart.marks ?? []) {
    draw(svg, "line", { class: "mark", x1: toX(mark.x), x2: toX(mark.x), y1: top, y2: height - bottom });
    draw(svg, "text", { x: toX(mark.x) + 4, y: top + 4, class: "small" }, mark.label);
  }
  chart.series.forEach((series) => drawSeries(svg, chart, series, toX, toY, height - bottom));
}

function drawAxes(svg, chart, box) {
  const exact = chart.log ? ticks(box.yLow, box.yHigh, 4).filter(Number.isInteger).map((power) => 10 ** power) : ticks(box.yLow, box.yHigh, 4);
  for (const y of exact) {
    draw(svg, "line", { class: y === 0 ? "axis" : "grid", x1: box.left, x2: box.width - box.right, y1: box.toY(y), y2: box.toY(y) });
    draw(svg, "text", { x: box.left - 6, y: box.toY(y) + 4, "text-anchor": "end" }, short(y));
  }
  const wide = box.width > 420 ? 8 : 4;
  const every = chart.names ? Math.ceil(chart.names.length / (wide / 2)) : 1;
  const places = chart.names ? [...chart.names.keys()].filter((x) => x % every === 0) : ticks(box.xLow, box.xHigh, wide);
  for (const x of places) {
    draw(svg, "text", { x: box.toX(x), y: box.height - box.bottom + 16, "text-anchor": "middle" }, chart.names ? chart.names[x] : short(x));
  }
  draw(svg, "text", { x: (box.left + box.width - box.right) / 2, y: box.height - 6, "text-anchor": "middle", class: "name" }, chart.x);
}

function drawSeries(svg, chart, series, toX, toY, floor) {
  const color = `s${series.place % 6}`;
  const points = series.points.filter((point) => point.y !== null && (!chart.log || point.y > 0));
  if (chart.area) {
    for (const point of points) {
      const x = toX(point.x - chart.area / 2);
      draw(svg, "rect", { class: `column ${color}`, x, y: toY(point.y), width: Math.max(1, toX(point.x + chart.area / 2) - x - 0.5), height: Math.max(0, floor - toY(point.y)) });
    }
    return;
  }
  const path = points.map((point, i) => `${i ? "L" : "M"}${toX(point.x).toFixed(1)} ${toY(point.y).toFixed(1)}`).join("");
  if (!chart.dots) draw(svg, "path", { class: `line ${color}`, d: path });
  for (const point of points.length <= 40 ? points : []) {
    if (point.low !== undefined && point.low !== null) {
      draw(svg, "line", { class: `line ${color}`, x1: toX(point.x), x2: toX(point.x), y1: toY(point.low), y2: toY(point.high) });
    }
    const dot = draw(svg, "circle", { class: `dot ${color}`, cx: toX(point.x), cy: toY(point.y), r: chart.dots ? 4 : 2.5 });
    draw(dot, "title", {}, `${series.name}, ${chart.x} ${nameOf(chart, point.x)}: ${short(point.y)}`);
  }
}

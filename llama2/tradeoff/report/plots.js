"use strict";
// The plots that the page draws when a reader changes its setting; the arithmetic is in page.js.

/** About 60 whole numbers from first to last, evenly spaced on a logarithmic axis. */
function steps(first, last) {
  const step = (_, i) => Math.round(first * (last / first) ** (i / 59));
  return [...new Set(Array.from({ length: 60 }, step))];
}

/** The plots by name: of each count of heads, most first, a line of [x, y] and where its dot is. */
function curves(data, setting) {
  const { context, gpu } = setting;
  const batch = setting.batch ?? data.shown_batch;
  const found = [...data.counts]
    .reverse()
    .map((heads) => [heads, deployment(data, setting, heads)])
    .filter(([, d]) => d);
  const lines = (draw) => found.map(([heads, d]) => ({ heads, ...draw(d) }));
  const speeds = (first, last, crossover, y) => ({
    points: last < first ? [] : steps(first, last).map((x) => [x, y(x)]),
    dot: crossover >= first && crossover <= last ? [crossover, y(crossover)] : null,
  });
  const contexts = steps(64, Math.max(131072, context));
  return {
    "speed-batch": {
      title: `tokens per second at a context of ${fixed(context, 0)} tokens`,
      xlabel: "batch, sequences",
      marked: { x: setting.batch },
      lines: lines((d) => {
        const y = (x) => d.tokensPerSecond(x, context);
        return speeds(1, d.largestBatch(context), d.crossoverBatch(context), y);
      }),
    },
    "speed-context": {
      title: `tokens per second at a batch of ${fixed(batch, 0)}`,
      xlabel: "context, tokens",
      marked: { x: context },
      lines: lines((d) => {
        const y = (x) => d.tokensPerSecond(batch, x);
        return speeds(64, d.largestContext(batch), d.crossoverContext(batch), y);
      }),
    },
    memory: {
      title: `GiB per GPU at a batch of ${fixed(batch, 0)}`,
      xlabel: "context, tokens",
      marked: { x: context, y: gpu.memory_bytes / GIB },
      lines: lines((d) => ({
        points: contexts.map((x) => [x, (d.fixedBytes + batch * x * d.kvBytes) / GIB]),
        dot: null,
      })),
    },
  };
}

function ticks(low, high) {
  const decades = Math.log10(high / low);
  const factors = decades < 0.9 ? [1, 1.5, 2, 3, 5, 7] : decades < 2.5 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    found.push(...factors.map((factor) => factor * 10 ** power));
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

function tickName(value) {
  const [divisor, unit] = value >= 1e6 ? [1e6, "M"] : value >= 1e3 ? [1e3, "k"] : [1, ""];
  return `${+(value / divisor).toPrecision(3)}${unit}`;
}

/** One plot as the text of an SVG element, both axes logarithmic. */
function plotSvg(plot, colours) {
  const [width, height, left, top, right, bottom] = [400, 290, 52, 28, 380, 244];
  const open = `<svg viewBox="0 0 ${width} ${height}" role="img"`;
  const all = plot.lines.flatMap((line) => line.points);
  const { x: markX, y: markY } = plot.marked;
  if (!all.length) {
    const text = `<text x="200" y="145" text-anchor="middle">nothing fits</text>`;
    return `${open}>${text}</svg>`;
  }
  const range = (values) => [Math.min(...values), Math.max(...values) * 1.05];
  const [xLow, xHigh] = range(all.map(([x]) => x));
  const [yLow, yHigh] = range([...all.map(([, y]) => y), ...(markY ? [markY] : [])]);
  const scale = (low, high, from, to) => (value) =>
    (from + ((to - from) * Math.log(value / low)) / Math.log(high / low)).toFixed(1);
  const x = scale(xLow, xHigh, left, right);
  const y = scale(yLow, yHigh, bottom, top);
  const line = (x1, y1, x2, y2, kind) =>
    `<line class="${kind}" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
  const label = (at, up, text, anchor = "middle") =>
    `<text x="${at}" y="${up}" text-anchor="${anchor}">${text}</text>`;
  const xTick = (v) =>
    line(x(v), top, x(v), bottom, "grid") + label(x(v), bottom + 17, tickName(v));
  const yTick = (v) =>
    line(left, y(v), right, y(v), "grid") + label(left - 6, +y(v) + 4, tickName(v), "end");
  const parts = [
    ...ticks(xLow, xHigh).map(xTick),
    ...ticks(yLow, yHigh).map(yTick),
    markX >= xLow && markX <= xHigh ? line(x(markX), top, x(markX), bottom, "mark") : "",
    markY ? line(left, y(markY), right, y(markY), "mark") : "",
    label((left + right) / 2, 16, plot.title),
    label((left + right) / 2, height - 8, plot.xlabel),
  ];
  for (const { heads, points, dot } of plot.lines) {
    if (!points.length) continue;
    const path = points.map(([px, py]) => `${x(px)},${y(py)}`).join(" ");
    const [endX, endY] = points[points.length - 1];
    const told = `${heads} heads, to ${fixed(endX, 0)}: ${fixed(endY, endY < 100 ? 1 : 0)}`;
    parts.push(
      `<g stroke="${colours[heads]}" fill="${colours[heads]}"><title>${told}</title>` +
        `<polyline fill="none" stroke-width="2" points="${path}"/>` +
        line(x(endX), y(endY) - 5, x(endX), +y(endY) + 5, "end") +
        (dot ? `<circle cx="${x(dot[0])}" cy="${y(dot[1])}" r="4"/>` : "") +
        "</g>",
    );
  }
  return `${open} aria-label="${plot.title}">${parts.join("")}</svg>`;
}

"use strict";
// What the page computes when a reader changes its setting. The arithmetic is that of
// llama2/accounting.py, roofline.py and recommend.py, operation by operation, so that both give the
// same doubles; Python embeds the numbers that it starts from as `DATA` (report/interactive.py), and
// plots.js before this file.

const MISSING = "–";
const GIB = 2 ** 30;

// ---- arithmetic: accounting.py and roofline.py

function kvParameters(shape, heads) {
  return 2 * shape.num_layers * shape.hidden_size * heads * shape.head_dim;
}

function layersParameters(shape, heads) {
  const qAndO = 2 * shape.hidden_size * shape.num_q_heads * shape.head_dim;
  const ffn = 3 * shape.hidden_size * shape.intermediate_size;
  return shape.num_layers * (qAndO + ffn) + kvParameters(shape, heads);
}

function numParameters(shape, heads) {
  const norms = (2 * shape.num_layers + 1) * shape.hidden_size;
  const embeddings = shape.tie_word_embeddings ? 1 : 2;
  const embedding = shape.vocab_size * shape.hidden_size;
  return layersParameters(shape, heads) + norms + embeddings * embedding;
}

function flopsPerToken(shape, heads, context) {
  const weights = layersParameters(shape, heads) + shape.vocab_size * shape.hidden_size;
  return 2 * weights + 4 * shape.num_layers * shape.num_q_heads * shape.head_dim * context;
}

/** The model with `heads` key/value heads on setting.tp GPUs; null where they cannot share it. */
function deployment(data, setting, heads) {
  const { shape } = data;
  const { gpu, tp, cache } = setting;
  if (heads % tp && tp % heads) return null;
  const headsPerRank = Math.ceil(heads / tp);
  const kv = kvParameters(shape, heads);
  const partOfARank = (whole, kvProjections) =>
    (whole - kvProjections) / tp + (kvProjections / heads) * headsPerRank;
  const weightBytes = partOfARank(numParameters(shape, heads), kv) * data.weight_bytes_per_value;
  const perHead = shape.head_dim * cache.bytes_per_value + cache.bytes_per_scale;
  const kvBytes = 2 * shape.num_layers * perHead * headsPerRank;
  const room = gpu.memory_bytes - data.reserved_bytes - weightBytes;
  // Far below 2 ** 53: no quotient is rounded up to a whole number.
  const fitting = (bytes) => Math.max(0, Math.floor(room / bytes));
  const seconds = (batch, context) => {
    const bytes = weightBytes + batch * context * kvBytes;
    const flops = batch * partOfARank(flopsPerToken(shape, heads, context), 2 * kv);
    return Math.max(bytes / gpu.bytes_per_s, flops / gpu.flops_per_s);
  };
  return {
    headsPerRank,
    kvBytes,
    fixedBytes: weightBytes + data.reserved_bytes,
    largestBatch: (context) => fitting(kvBytes * context),
    largestContext: (batch) => fitting(kvBytes * batch),
    crossoverBatch: (context) => Math.ceil(weightBytes / (kvBytes * context)),
    crossoverContext: (batch) => Math.ceil(weightBytes / (kvBytes * batch)),
    tokensPerSecond: (batch, context) => batch / seconds(batch, context),
  };
}

// ---- the rule: recommend.py

/** Every count of heads in the setting, fewest first; null is Python's None. */
function candidates(data, setting) {
  const { context, batch } = setting;
  const mha = deployment(data, setting, data.shape.num_q_heads);
  const baseBatch = batch ?? mha.largestBatch(context);
  const base = baseBatch ? mha.tokensPerSecond(baseBatch, context) : null;
  return data.counts.map((heads) => {
    const share = heads / data.shape.num_q_heads;
    const found = deployment(data, setting, heads);
    const none = { heads, share, verdict: "cannot be shared by tp", speed: null, speedUp: null };
    if (!found) return none;
    const largest = found.largestBatch(context);
    const own = batch ?? largest;
    const fits = own > 0 && own <= largest;
    const speed = fits ? found.tokensPerSecond(own, context) : null;
    return {
      heads,
      share,
      verdict: fits ? "fits" : "does not fit",
      batch: own,
      kvBytes: found.kvBytes,
      largestBatch: largest,
      crossoverBatch: found.crossoverBatch(context),
      speed,
      speedUp: fits && base ? speed / base : null,
    };
  });
}

function pick(found, setting) {
  const fitting = found.filter((each) => each.speed !== null && each.share >= setting.least);
  const best = Math.max(...fitting.map((each) => each.speed));
  return fitting.filter((each) => each.speed >= setting.keep * best).pop() ?? null;
}

/** Changes to a setting without a pick, one of which gives it a pick. */
function whatWouldFit(data, setting, found) {
  const { context } = setting;
  const wanted = setting.batch ?? 1;
  const least = found.find((each) => each.kvBytes && each.share >= setting.least);
  const smallest = deployment(data, setting, least.heads);
  const offers = [];
  const longest = smallest.largestContext(wanted);
  if (longest) offers.push(`a context of ${fixed(longest, 0)} at batch ${fixed(wanted, 0)}`);
  const largest = smallest.largestBatch(context);
  if (largest) offers.push(`a batch of ${fixed(largest, 0)} at context ${fixed(context, 0)}`);
  const ranks = data.counts.find((tp) => {
    const wider = { ...setting, tp, batch: wanted };
    return pick(candidates(data, wider), wider);
  });
  if (ranks) offers.push(`tp=${ranks}`);
  const fewer = found.filter((each) => each.speed !== null).pop();
  if (fewer) offers.push(`${fewer.heads} heads, below the least share`);
  return offers;
}

// ---- words: wording.py and decision.py

/** Python's f"{x:,.{digits}f}", which rounds ties to even, as toFixed does not. */
function fixed(x, digits) {
  let text = x.toFixed(digits);
  const exact = x.toFixed(digits + 60); // a tie ends long before
  const cut = exact.length - 60 - (digits ? 0 : 1);
  const isTie = /^\.?50*$/.test(exact.slice(cut));
  if (isTie && /[02468]$/.test(exact.slice(0, cut))) text = exact.slice(0, cut);
  const [whole, fraction] = text.split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",");
  return fraction === undefined ? grouped : `${grouped}.${fraction}`;
}

/** Two decimals at most. */
function short(x) {
  return fixed(x, 2).replace(/\.?0+$/, "");
}

function shareName(share) {
  if (share && Number.isInteger(1 / share)) return share < 1 ? `1/${1 / share}` : "all";
  return `${short(100 * share)} %`;
}

function headsName(heads, queryHeads) {
  if (heads === queryHeads) return `MHA (${heads})`;
  return heads === 1 ? "MQA (1)" : `GQA (${heads})`;
}

/** The cells that depend on the setting, by the keys of their columns. */
function cells(data, setting, each, chosen) {
  const { tp } = setting;
  const shared = each.verdict !== "cannot be shared by tp";
  const notes = [
    each === chosen ? "the pick" : null,
    each.heads === data.common_heads ? "most released models" : null,
    each.verdict === "does not fit" ? "does not fit" : null,
    shared ? null : `cannot be shared by ${tp} GPUs`,
    shared && each.heads < tp ? `costs what ${tp} heads cost` : null,
  ];
  return {
    note: notes.filter(Boolean).join("; "),
    speed_up: each.speedUp === null ? MISSING : `${fixed(each.speedUp, 2)}×`,
    tokens_per_s: each.speed === null ? MISSING : fixed(each.speed, 0),
    kib_per_token: shared ? short(each.kvBytes / 1024) : MISSING,
    largest_batch: shared ? fixed(each.largestBatch, 0) : MISSING,
    crossover_batch: shared ? fixed(each.crossoverBatch, 0) : MISSING,
  };
}

function settingName(data, setting) {
  const gpus = setting.tp > 1 ? `${setting.tp} × ${setting.gpu.name}` : setting.gpu.name;
  const batch = setting.batch ? `batch ${fixed(setting.batch, 0)}` : "the largest batch that fits";
  return (
    `${data.shape_name} on ${gpus} with ${fixed(setting.context, 0)} tokens per sequence, ` +
    `${batch} and a cache in ${setting.cache.name}`
  );
}

function pickSentence(data, setting, found, chosen) {
  const name = settingName(data, setting);
  if (!chosen) {
    const least = shareName(setting.least);
    const offers = whatWouldFit(data, setting, found);
    const fitting = offers.length ? ` What would fit: ${offers.join(", or ")}.` : "";
    return `No count with at least ${least} of the query heads fits: ${name}.${fitting}`;
  }
  const heads = headsName(chosen.heads, data.shape.num_q_heads);
  const speed = speedName(chosen, found[found.length - 1]);
  return `Take ${heads}: ${speed}. Predicted for ${name}.`;
}

/** The speed of a count that fits, relative to MHA's only if MHA fits. */
function speedName(each, mha) {
  const speed = `${fixed(each.speed, 0)} tokens per second`;
  if (each === mha) return speed;
  if (mha.verdict === "fits") {
    return `${fixed(each.speedUp, 2)} times as many tokens per second as MHA`;
  }
  const most = mha.largestBatch;
  const sequences = most > 1 ? "sequences" : "sequence";
  const fits = most ? `fits at most ${fixed(most, 0)} ${sequences}` : "does not fit";
  return `${speed} at batch ${fixed(each.batch, 0)}; MHA ${fits}`;
}

/** The fewest heads above MQA's with published figures; "" where they are picked or do not fit. */
function publishedSentence(data, found, chosen) {
  const each = found.find(({ heads }) => heads === data.published_heads);
  if (!chosen || !each || each === chosen || each.speed === null) return "";
  const name = ({ heads }) => headsName(heads, data.shape.num_q_heads);
  const speed = speedName(each, found[found.length - 1]);
  return (
    `The speed rule picks ${name(chosen)}. Apart from MQA, ${name(each)} has the fewest heads ` +
    `with published quality figures: ${speed}.`
  );
}

function ruleSentence(setting) {
  return (
    `The rule takes the most key/value heads that decode at least ${short(100 * setting.keep)} % ` +
    `as fast as the fastest count with at least ${shareName(setting.least)} of the query heads.`
  );
}

// ---- the page

/**
 * The setting that texts by the names of options give, those of the fields or of the address, and
 * the same as texts again. An Error names what is wrong.
 */
function parseSetting(data, texts) {
  const names = Object.keys(data.setting);
  for (const name of Object.keys(texts)) {
    if (!names.includes(name)) {
      throw new Error(`address: expected ${names.join("=, ")}= after the #; got ${name}`);
    }
  }
  const wanted = { ...data.setting, ...texts };
  const choice = (name, among) => {
    if (Object.hasOwn(among, wanted[name])) return among[wanted[name]];
    const known = Object.keys(among).join(", ");
    throw new Error(`${name}: expected one of ${known}; got ${wanted[name]}`);
  };
  const number = (name, isValid, expected) => {
    const value = Number(wanted[name]);
    if (String(wanted[name]).trim() && isValid(value)) return value;
    throw new Error(`${name}: expected ${expected}; got ${wanted[name]}`);
  };
  const isSize = (value) => Number.isSafeInteger(value) && value >= 1;
  const isTp = (value) => isSize(value) && data.shape.num_q_heads % value === 0;
  const setting = {
    context: number("context", isSize, "a whole number from 1 on"),
    batch:
      wanted.batch === "max" ? null : number("batch", isSize, "a whole number from 1 on, or max"),
    gpu: choice("gpu", data.gpus),
    tp: number("tp", isTp, `a divisor of the ${data.shape.num_q_heads} query heads`),
    cache: choice("kv-cache-dtype", data.caches),
    keep: number("keep", (value) => value > 0 && value <= 1, "a share above 0, up to 1"),
    least: number("least-share", (value) => value >= 0 && value <= 1, "a share from 0 to 1"),
  };
  const { context, batch, tp, keep, least } = setting;
  const numbers = { context, batch: batch ?? "max", tp, keep, "least-share": least };
  return { ...setting, texts: { ...wanted, ...numbers } };
}

/** The command whose page opens with a setting, without a study. */
function commandOf(data, { texts }) {
  const options = { ...texts, gpu: data.gpu_options[texts.gpu] };
  const told = Object.entries(options).map(([name, value]) => `--${name} ${value}`);
  const start = `llama2 tradeoff --preset none --out DIR --shape ${data.shape_option}`;
  return [start, ...told].join(" ");
}

function show(data, setting) {
  const found = candidates(data, setting);
  const chosen = pick(found, setting);
  document.getElementById("pick").textContent = pickSentence(data, setting, found, chosen);
  document.getElementById("published").textContent = publishedSentence(data, found, chosen);
  const evidence = document.getElementById("evidence");
  if (evidence) evidence.textContent = chosen ? data.evidence[chosen.heads] : "";
  document.getElementById("command").textContent = commandOf(data, setting);
  document.getElementById("rule").textContent = ruleSentence(setting);
  for (const row of document.querySelectorAll("#decision tbody tr")) {
    const each = found.find(({ heads }) => String(heads) === row.dataset.key);
    row.classList.toggle("marked", each === chosen);
    const texts = cells(data, setting, each, chosen);
    for (const [key, text] of Object.entries(texts)) {
      row.querySelector(`[data-key="${key}"]`).textContent = text;
    }
  }
  for (const [name, plot] of Object.entries(curves(data, setting))) {
    document.querySelector(`#plot-${name} .plot`).innerHTML = plotSvg(plot, data.colours);
  }
}

function start(data) {
  const form = document.getElementById("setting");
  const message = document.getElementById("message");
  const fill = ({ texts }) => {
    for (const field of form.elements) {
      const text = String(texts[field.name]);
      field.value = text;
      if (field.value === text) continue;
      field.add(new Option(text)); // a choice that the page was not written with
      field.value = text;
    }
  };
  /** Shows what the address says in full, or the setting that the page was written with. */
  const fromHash = () => {
    const hash = location.hash.slice(1);
    let setting = parseSetting(data, {});
    message.textContent = "";
    try {
      setting = parseSetting(data, Object.fromEntries(new URLSearchParams(hash)));
    } catch (error) {
      message.textContent =
        `The page ignores what follows the # in its address. ${error.message}`;
    }
    fill(setting);
    show(data, setting);
  };
  form.addEventListener("input", () => {
    try {
      const setting = parseSetting(data, Object.fromEntries(new FormData(form)));
      show(data, setting);
      history.replaceState(null, "", `#${new URLSearchParams(setting.texts)}`);
      message.textContent = "";
    } catch (error) {
      message.textContent = error.message;
    }
  });
  const isSection = () => location.hash && document.getElementById(location.hash.slice(1));
  addEventListener("hashchange", () => isSection() || fromHash());
  form.hidden = false;
  for (const heads of [...data.counts].reverse()) {
    const name = document.createElement("span");
    name.style.setProperty("--colour", data.colours[heads]);
    name.textContent = headsName(heads, data.shape.num_q_heads);
    document.getElementById("legend").append(name);
  }
  if (isSection()) show(data, parseSetting(data, {}));
  else fromHash();
}

const words = { cells, commandOf, fixed, pickSentence, publishedSentence, ruleSentence };
if (typeof module === "undefined") start(DATA);
else module.exports = { candidates, curves, parseSetting, pick, ...words }; // for tests

"use strict";
// The selection of tokens by the rule of training: keytoken_kernels/selection/reference.py in JavaScript.
// Numbers are rounded to float32 wherever torch has them in float32, so that the result is equal, ties included.
const KeyTokenSelect = (() => {
  const f32 = Math.fround;
  const UNITS = 1e9;

  // Score that the top `ratio` of the sorted scores reach, interpolated in float32 as torch.quantile does.
  function quantile(sorted, ratio) {
    const last = sorted.length - 1;
    const rank = f32(f32(1 - ratio) * last);
    const low = Math.floor(rank);
    const rest = f32(rank - low);
    const a = sorted[low];
    const b = sorted[Math.min(low + 1, last)];
    const step = f32(b - a);
    // One rounding for product and sum together, as torch's vectorised lerp has it.
    return rest < 0.5 ? f32(a + rest * step) : f32(b + f32(rest - 1) * step);
  }

  function mix(x) {
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return (x ^ (x >>> 16)) >>> 0;
  }

  // What breaks ties of rule "count": different for every row and position.
  function positionHash(rowKey, column, seed) {
    return mix(mix(((rowKey << 16) | column) >>> 0) ^ seed);
  }

  function keptCount(size, ratio) {
    const share = BigInt(Math.trunc(ratio * UNITS));
    return Number((BigInt(size) * share + BigInt(UNITS - 1)) / BigInt(UNITS));
  }

  function segmentsOf(scope, groups) {
    const members = new Map();
    groups.forEach((group, row) => {
      const key = scope === "response" ? row : scope === "group" ? group : 0;
      if (!members.has(key)) members.set(key, []);
      members.get(key).push(row);
    });
    return [...members.values()];
  }

  // Places of one segment that one signal selects.
  function topOf(places, batch, signal, options) {
    const values = Float32Array.from(places, (place) => signal.scores[place]);
    if (signal.ratio === 0 || !values.length || values.some(Number.isNaN)) return [];
    if (options.rule !== "count") {
      const threshold = quantile(Float32Array.from(values).sort(), signal.ratio);
      return places.filter((_, at) => values[at] >= threshold);
    }
    const kept = keptCount(values.length, signal.ratio);
    const hashes = places.map((place) => {
      const row = batch.rowOf[place];
      return positionHash(batch.rowKeys[row], place - batch.offsets[row], options.seed);
    });
    const order = places.map((_, at) => at);
    order.sort((x, y) => values[y] - values[x] || hashes[y] - hashes[x]);
    return order.slice(0, kept).map((at) => places[at]);
  }

  // batch: offsets [B + 1], rowOf [N], counted [N], groups [B], rowKeys [B]; N tokens of B answers.
  // signals, by precedence: {name, scores [N], applies [B], ratio, weight}.
  // options: scope, rule, floor (null for none), seed.
  function select(batch, signals, options) {
    const total = batch.offsets[batch.offsets.length - 1];
    const weights = new Float32Array(total);
    const masks = {};
    for (const signal of signals) masks[signal.name] = new Uint8Array(total);
    for (const rows of segmentsOf(options.scope, batch.groups)) {
      for (const signal of signals) {
        const places = [];
        for (const row of rows) {
          if (!signal.applies[row]) continue;
          for (let at = batch.offsets[row]; at < batch.offsets[row + 1]; at += 1) {
            if (batch.counted[at]) places.push(at);
          }
        }
        for (const place of topOf(places, batch, signal, options)) {
          if (options.floor === null || signal.scores[place] >= f32(options.floor)) {
            masks[signal.name][place] = 1;
          }
        }
      }
    }
    for (const signal of [...signals].reverse()) {
      const mask = masks[signal.name];
      for (let at = 0; at < total; at += 1) if (mask[at]) weights[at] = signal.weight;
    }
    return { masks, weights };
  }

  // log p(real) - log p(view), or its magnitude.
  function difference(real, view, absolute) {
    return Float32Array.from(real, (value, at) => {
      const score = f32(value - view[at]);
      return absolute ? Math.abs(score) : score;
    });
  }

  return { select, quantile, positionHash, keptCount, difference };
})();
if (typeof module !== "undefined") module.exports = KeyTokenSelect;

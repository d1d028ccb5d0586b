"use strict";
// What the page holds, unpacked: answers, tokens, prompts, and the selection that is in force.
const Lens = { SIGNALS: ["visual", "temporal", "entropy"] };

(() => {
  const raw = JSON.parse(document.getElementById("data").textContent);

  function bytes(text) {
    const binary = atob(text);
    const array = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i += 1) array[i] = binary.charCodeAt(i);
    return array.buffer;
  }

  const offsets = new Uint32Array(raw.answers.length.length + 1);
  raw.answers.length.forEach((length, row) => { offsets[row + 1] = offsets[row] + length; });
  const total = offsets[offsets.length - 1];
  const columns = {};
  for (const [name, text] of Object.entries(raw.columns)) columns[name] = new Float32Array(bytes(text));

  // Characters that nobody can see, or that turn the text around, are spelled out.
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const visible = (text) =>
    text.replace(HIDDEN, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  Object.assign(Lens, {
    raw, offsets, total, columns,
    answers: raw.answers,
    words: new Uint32Array(bytes(raw.words)),
    flags: new Uint8Array(bytes(raw.flags)),
    vocabulary: raw.vocabulary.map(visible),
    classes: raw.classes,
    prompts: raw.prompts.map((prompt) => ({ ...prompt, text: visible(prompt.text).trim() })),
    state: { export: 0, compare: raw.compare, colour: "temporal", layout: "list", outcome: "all", query: "",
             answer: null, token: null, tab: "histogram", settings: null },
    masks: {}, weights: null,
  });

  Lens.rowsOf = (exportNumber) => {
    const rows = [];
    raw.answers.export.forEach((number, row) => { if (number === exportNumber) rows.push(row); });
    return rows;
  };
  Lens.textOf = (row) => {
    let text = "";
    for (let at = offsets[row]; at < offsets[row + 1]; at += 1) text += Lens.vocabulary[Lens.words[at]];
    return text;
  };
  Lens.value = (name, at) => {
    const column = columns[name];
    return column === undefined ? NaN : column[at];
  };

  // The settings of training for one export; what an export does not say is a common choice, and is shown as such.
  Lens.settingsOf = (number) => {
    const given = raw.exports[number].selection;
    const ratio = (name) => (given ? given[`${name}_ratio`] : 0);
    return {
      ratios: { visual: ratio("visual"), temporal: ratio("temporal"), entropy: ratio("entropy") },
      on: { visual: ratio("visual") > 0, temporal: ratio("temporal") > 0, entropy: ratio("entropy") > 0 },
      scope: given ? given.scope : "response",
      rule: (given && given.rule) || "quantile",
      floor: given && given.floor !== undefined ? given.floor : null,
      sign: "trained",
    };
  };

  // Scores of a signal: those of training, or plain differences of log-probs with or without their sign.
  function scoresOf(name, sign, slice) {
    const first = (...names) => names.map(slice).find((found) => found && found.some((x) => !Number.isNaN(x)));
    if (name === "entropy") return first("uncertainty", "truncated_entropy", "entropy");
    const trained = sign === "trained" ? first(name) : null;
    if (trained) return trained;
    const [real, view] = [first("log_prob"), first(name === "visual" ? "log_prob_masked" : "log_prob_shuffled")];
    return real && view ? KeyTokenSelect.difference(real, view, sign !== "signed") : null;
  }

  // Select anew among the answers of one export; the result lies at the places of its tokens.
  Lens.selectRows = (number, settings) => {
    const rows = Lens.rowsOf(number);
    const about = raw.exports[number];
    const local = new Uint32Array(rows.length + 1);
    rows.forEach((row, i) => { local[i + 1] = local[i] + raw.answers.length[row]; });
    const size = local[rows.length];
    const start = rows.length ? offsets[rows[0]] : 0; // the answers of an export stand together
    const slice = (name) => (columns[name] ? columns[name].subarray(start, start + size) : null);
    const rowOf = new Uint32Array(size);
    rows.forEach((_, i) => rowOf.fill(i, local[i], local[i + 1]));
    const batch = {
      offsets: local, rowOf,
      counted: Uint8Array.from(Lens.flags.subarray(start, start + size), (bits) => (bits >> 6) & 1),
      groups: rows.map((row) => raw.answers.prompt[row]),
      rowKeys: rows.map((row, i) => raw.answers.rowKey[row] ?? i),
    };
    // Scores multiplied by advantages exist for answers that teach something only, and differences for all.
    const conditioned = about.selection && about.selection.advantage_conditioned;
    const advantages = slice("advantage");
    const teaches = rows.map((_, i) => !advantages || advantages.subarray(local[i], local[i + 1]).some((a) => a !== 0));
    const signals = [];
    for (const name of about.precedence) {
      if (!settings.on[name]) continue;
      const scores = scoresOf(name, settings.sign, slice);
      if (!scores) continue;
      const multiplied = conditioned && (settings.sign === "trained" || name === "entropy");
      signals.push({
        name, scores, ratio: settings.ratios[name],
        applies: rows.map((row, i) => (raw.answers[name][row] && (!multiplied || teaches[i]) ? 1 : 0)),
        weight: about.selection ? about.selection[`${name}_weight`] ?? 1 : 1,
      });
    }
    const found = KeyTokenSelect.select(batch, signals, {
      scope: settings.scope, rule: settings.rule, floor: settings.floor, seed: about.tieSeed ?? 0,
    });
    return { start, size, ...found };
  };

  // Whether an export has what a signal is made of.
  Lens.hasSignal = (number, name) => {
    const rows = Lens.rowsOf(number);
    if (!rows.length) return false;
    const [start, end] = [offsets[rows[0]], offsets[rows[rows.length - 1] + 1]];
    return scoresOf(name, "trained", (key) => (columns[key] ? columns[key].subarray(start, end) : null)) !== null
      && rows.some((row) => raw.answers[name][row]);
  };

  // How many tokens the rule selects as training recorded it, and how many otherwise.
  Lens.agreement = (number) => {
    const about = raw.exports[number];
    if (!about.selection) return null;
    const settings = Lens.settingsOf(number);
    const found = Lens.selectRows(number, settings);
    let same = 0, other = 0;
    Lens.SIGNALS.forEach((name, bit) => {
      if (!settings.on[name]) return;
      for (let i = 0; i < found.size; i += 1) {
        const bits = Lens.flags[found.start + i];
        if (!((bits >> (3 + bit)) & 1)) continue;
        const now = found.masks[name] ? found.masks[name][i] : 0;
        if (now === ((bits >> bit) & 1)) same += 1; else other += 1;
      }
    });
    return { same, other };
  };

  Lens.reselect = () => {
    const { state } = Lens;
    Lens.masks = {};
    // Both sides of a comparison have their own settings of training until a control is moved.
    const untouched = JSON.stringify(state.settings) === JSON.stringify(Lens.settingsOf(state.export));
    for (const name of Lens.SIGNALS) Lens.masks[name] = new Uint8Array(total);
    for (const number of new Set([state.export, state.compare])) {
      if (number === null) continue;
      const found = Lens.selectRows(number, untouched ? Lens.settingsOf(number) : state.settings);
      for (const name of Lens.SIGNALS) if (found.masks[name]) Lens.masks[name].set(found.masks[name], found.start);
    }
  };
  Lens.selected = (at) => Lens.masks.visual[at] | (Lens.masks.temporal[at] << 1) | (Lens.masks.entropy[at] << 2);
})();

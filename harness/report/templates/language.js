// Shows a page in another language and back. The page is written in English; a table gives each of its texts in the other language,
// looked up by the text itself, every blank made one. What varies in a text is a slot of the table:
//   {n}, {n1} ...       a quantity with its unit, if it has one
//   {word}, {word1} ... a text of the table again
//   {1}, {2} ...        the elements inside a sentence, in their order; the other language may have another order
//   {any other name}    whatever stands there, and it stays as it is
// "(s)" is an s or nothing. What the page quotes (names, code, logs, answers) is never looked up, only marked as English.
const speaking = (table) => {
  "use strict";
  const [ENGLISH, OTHER] = ["en", "zh"];
  const root = document.documentElement;
  let spoken = ENGLISH;
  const QUOTED = "bdi:not(.why > *, .lead > *, .judged > *, .told > *), code, pre, q, data, script, style, .strip, .names, [translate=no]";
  const ATTRIBUTES = ["aria-label", "title", "placeholder"];
  const LETTER = /[A-Za-z]/;
  const FAR_EAST = /[\u3040-\u9fff\uac00-\ud7af]/;
  const MOST_LETTERS = 2000; // of a text with slots: a longer one is no text of ours, and would take long to try
  const PART = "\ufffc"; // an element within a sentence
  const UNITS = "(?:[KMGT]iB|bytes|tokens/s|GB/s|ms|s|min|h|J|%)(?:/s)?(?![\\w/])";
  const SHAPES = {
    n: `[≥±÷×+−-]?(?:≥ )?\\d[\\d,.]*(?: ?${UNITS})?(?: \\d+ (?:s|min)\\b)?`,
    word: `[^${PART}]+?`,
    name: `[^${PART}]+?`,
    part: PART,
  };
  const kind = (slot) => (/^\d/.test(slot) ? "part" : /^n\d?$/.test(slot) ? "n" : /^word\d?$/.test(slot) ? "word" : "name");
  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, slot) => values[slot]);
  const flat = (text) => text.replace(/\s+/g, " ").trim();

  // A text with slots is tried where its longest piece of plain text stands.
  const slotted = [];
  for (const [english, other] of Object.entries(table)) {
    if (!/\{|\(s\)/.test(english)) continue;
    const slots = [...english.matchAll(/\{(\w+)\}/g)].map((match) => match[1]);
    const pieces = english.split(/\{\w+\}|\(s\)/);
    const source = english
      .split(/(\{\w+\}|\(s\))/)
      .map((piece) => (piece === "(s)" ? "s?" : piece.startsWith("{") ? `(${SHAPES[kind(piece.slice(1, -1))]})` : piece.replace(/[.*+?^$()|[\]\\]/g, "\\$&")));
    const longest = pieces.reduce((a, b) => (b.length > a.length ? b : a));
    slotted.push({ longest, pattern: new RegExp(`^${source.join("")}$`), slots, other });
  }
  const filled = (text) => {
    if (text.length > MOST_LETTERS) return;
    for (const { longest, pattern, slots, other } of slotted) {
      const found = text.includes(longest) && pattern.exec(text);
      if (!found) continue;
      const values = {};
      slots.forEach((slot, i) => {
        const means = kind(slot);
        values[slot] = means === "part" ? PART + slot + PART : means === "word" ? phrase(found[i + 1]) : found[i + 1];
      });
      if (slots.every((slot) => values[slot] !== undefined)) return fill(other, values);
    }
  };
  const joined = (text, between, mark) => {
    const parts = text.split(between);
    if (parts.length < 2) return;
    const said = parts.map(phrase);
    return said.includes(undefined) ? undefined : said.join(mark);
  };
  const cache = new Map();
  const phrase = (text) => {
    if (!cache.has(text)) {
      const known = Object.hasOwn(table, text) ? table[text] : undefined;
      // Sentences that a semicolon parts are told apart first: a slot would reach over it.
      cache.set(text, known ?? joined(text, "; ", "；") ?? filled(text) ?? joined(text, /(?<=\.) /, "") ?? joined(text, ", ", "，"));
    }
    return cache.get(text);
  };

  // What was changed: of each node the text, the attributes and the children it had.
  const english = new Map();
  const keep = (node, what, value) => {
    if (!english.has(node)) english.set(node, {});
    english.get(node)[what] ??= { value };
  };
  const setAttribute = (element, name, value) => {
    keep(element, name, element.getAttribute(name));
    element.setAttribute(name, value);
  };
  // What stays in English says so, for those who hear it.
  const mark = (element) => {
    const text = element.textContent;
    if (!element.childElementCount && !element.hasAttribute("lang") && LETTER.test(text) && !FAR_EAST.test(text)) setAttribute(element, "lang", "en");
  };
  const translateText = (node) => {
    const said = phrase(flat(node.data));
    if (said === undefined) return mark(node.parentElement);
    keep(node, "#text", node.data);
    node.data = node.data.match(/^\s*/)[0] + said + node.data.match(/\s*$/)[0];
  };
  const translateSentence = (element, nodes) => {
    const parts = nodes.filter((node) => node.nodeType === Node.ELEMENT_NODE);
    const texts = nodes.filter((node) => node.nodeType === Node.TEXT_NODE);
    if (!parts.length || parts.length + texts.length < nodes.length || !texts.some((node) => node.data.trim())) return false;
    const said = phrase(flat(nodes.map((node) => (parts.includes(node) ? PART : node.data)).join("")));
    if (said === undefined) return false;
    const pieces = said.split(new RegExp(`${PART}(\\d+)${PART}`));
    keep(element, "#children", nodes);
    element.replaceChildren(...pieces.map((piece, i) => (i % 2 ? parts[piece - 1] : piece)).filter(Boolean));
    parts.forEach(translate);
    return true;
  };
  const translate = (element) => {
    if (element.matches(QUOTED)) {
      mark(element);
      return;
    }
    for (const name of ATTRIBUTES) {
      const said = element.hasAttribute(name) ? phrase(flat(element.getAttribute(name))) : undefined;
      if (said !== undefined) setAttribute(element, name, said);
    }
    const nodes = [...element.childNodes];
    if (translateSentence(element, nodes)) return;
    for (const node of nodes) {
      if (node.nodeType === Node.ELEMENT_NODE) translate(node);
      else if (node.nodeType === Node.TEXT_NODE && LETTER.test(node.data)) translateText(node);
    }
  };
  const translated = (element) => {
    if (spoken !== ENGLISH) translate(element);
  };
  const restore = () => {
    for (const [node, had] of english) {
      for (const [what, { value }] of Object.entries(had)) {
        if (what === "#text") node.data = value;
        else if (what === "#children") node.replaceChildren(...value);
        else if (value === null) node.removeAttribute(what);
        else node.setAttribute(what, value);
      }
    }
    english.clear();
  };

  // Which language is spoken: that of the link, else the one chosen last, else the reader's own. Where a file may keep nothing, a choice
  // lasts as long as the page.
  const usual = () => {
    try {
      return localStorage.getItem("fitmatrix-language") ?? navigator.language;
    } catch {
      return navigator.language;
    }
  };
  const speak = (asked, retell) => {
    const language = (asked || usual()).startsWith(OTHER) ? OTHER : ENGLISH;
    if (language === spoken) return;
    restore();
    spoken = language;
    root.lang = language === OTHER ? "zh-Hans" : ENGLISH;
    for (const button of document.querySelectorAll("[data-lang]")) button.setAttribute("aria-pressed", button.dataset.lang === language);
    retell();
    translated(root);
  };
  const remember = (language) => {
    try {
      localStorage.setItem("fitmatrix-language", language);
    } catch {}
  };
  return {
    speak,
    remember,
    translated,
    say: (text, values) => fill((spoken === OTHER && table[text]) || text, values),
    inEnglish: (element, name) => english.get(element)?.[name]?.value ?? element.getAttribute(name),
  };
};

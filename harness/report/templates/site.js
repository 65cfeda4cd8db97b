// Filters the tables of the index by what is typed, and leaves of the ways to run a model the best that fits a card. What has no line
// on the index of a site of many is found by its name all the same. Without it all rows are there, some on further pages. The theme and the language are chosen as on the page of a machine.
(() => {
  "use strict";
  const SAY = {
    auto: "◐ auto",
    light: "☀ light",
    dark: "☾ dark",
    rows: "{n} of {n1} rows",
    models: "{n} of {n1} models fit",
  };
  const GIB = 2 ** 30;
  const MIB = 2 ** 20;
  const FOUND = 50; // names of other pages that are shown at most
  const THEMES = ["auto", "light", "dark"];
  const root = document.documentElement;
  root.classList.add("scripted-page");
  const kept = (name) => {
    try {
      return localStorage.getItem(name);
    } catch {} // where a file may keep nothing
  };
  const keep = (name, value) => {
    try {
      localStorage.setItem(name, value);
    } catch {}
  };
  let theme = kept("fitmatrix-theme");
  if (!THEMES.includes(theme)) theme = "auto";
  root.dataset.theme = theme;

  const start = () => {
    const tongue = speaking(JSON.parse(document.getElementById("zh").textContent));
    const say = (key, values) => tongue.say(SAY[key], values);
    const tellers = []; // what writes texts anew in another language
    const button = document.getElementById("theme");
    tellers.push(() => (button.textContent = say(theme)));
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      root.dataset.theme = theme;
      keep("fitmatrix-theme", theme);
      button.textContent = say(theme);
    });
    const retell = () => tellers.forEach((tell) => tell());
    for (const choice of document.querySelectorAll("[data-lang]"))
      choice.addEventListener("click", () => {
        tongue.remember(choice.dataset.lang);
        tongue.speak(choice.dataset.lang, retell);
      });
    filterRows(say, tellers);
    openDoor(say, tellers, tongue);
    if (typeof openPlanner === "function") openPlanner(tongue, tellers); // of the page that has it
    tongue.speak(/[#&]lang=(en|zh)(?=&|$)/.exec(location.hash)?.[1] ?? "", retell);
    retell();
  };

  const unpacked = async (block) => {
    const bytes = Uint8Array.from(atob(block.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return new Response(stream).text();
  };

  // The pages of all that is listed, read when something is first looked for.
  let names;
  const lookElsewhere = async (words) => {
    const [list, block] = ["elsewhere", "names"].map((id) => document.getElementById(id));
    if (!block) return;
    names ??= unpacked(block).then((text) => text.split("\n").map((line) => line.split("\t")));
    const found = words.length ? (await names).filter(([name]) => words.every((word) => name.toLowerCase().includes(word))) : [];
    list.hidden = !found.length;
    list.replaceChildren(
      ...found.slice(0, FOUND).map(([name, page]) => {
        const [item, link, text] = ["li", "a", "bdi"].map((tag) => document.createElement(tag));
        link.href = page;
        text.textContent = name;
        link.append(text);
        item.append(link);
        return item;
      }),
    );
  };

  const filterRows = (say, tellers) => {
    const field = document.getElementById("filter");
    if (!field) return;
    const said = field.parentElement.querySelector("output");
    const rows = [...document.querySelectorAll("table.list tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
    const filter = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const [row, text] of rows) {
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      said.textContent = words.length ? say("rows", { n: shown, n1: rows.length }) : "";
      lookElsewhere(words);
    };
    field.parentElement.hidden = false;
    field.addEventListener("input", filter);
    tellers.push(filter);
  };

  // What the driver keeps of a card, as harness.machine.gpus.reserve counts it.
  const free = (size) => size - Math.min(Math.max(size * 0.015, 256 * MIB), 768 * MIB);

  const openDoor = async (say, tellers, tongue) => {
    const door = document.getElementById("door");
    if (!door) return;
    const [card, vram, ram] = ["card", "vram", "ram"].map((name) => document.getElementById(name));
    const said = door.querySelector("output");
    const rest = document.getElementById("more-ways");
    const ways = document.querySelector("table.ways tbody");
    if (rest) {
      try {
        const more = document.createElement("template");
        more.innerHTML = await unpacked(rest);
        ways.append(more.content);
        tongue.translated(ways);
      } catch {} // too old a browser: the pages of the models list all
    }
    const byModel = new Map();
    for (const row of document.querySelectorAll("table.ways tbody tr")) byModel.set(row.dataset.of, [...(byModel.get(row.dataset.of) ?? []), row]);
    const bytes = (field) => (field.value === "" ? undefined : Number(field.value) * GIB);
    const update = () => {
      const nothing = vram.value === "" && ram.value === ""; // is asked: then everything fits
      const room = { VRAM: nothing ? Infinity : free(bytes(vram) ?? 0), RAM: bytes(ram) ?? Infinity };
      let fitting = 0;
      for (const rows of byModel.values()) {
        const fits = rows.filter((row) => Number(row.dataset.need) <= room[row.dataset.kind]);
        const sound = fits.filter((row) => "sound" in row.dataset);
        const usable = (sound.length ? sound : fits).sort((a, b) => b.dataset.speed - a.dataset.speed);
        const best = usable.find((row) => row.dataset.kind === "VRAM") ?? usable[0];
        for (const row of rows) row.hidden = row !== best;
        fitting += best !== undefined;
      }
      said.textContent = say("models", { n: fitting, n1: byModel.size });
    };
    card.addEventListener("change", () => {
      if (card.value) vram.value = Math.round((card.value / GIB) * 10) / 10;
      update();
    });
    for (const field of [vram, ram])
      field.addEventListener("input", () => {
        if (field === vram) card.value = "";
        update();
      });
    door.addEventListener("submit", (event) => event.preventDefault());
    door.hidden = false;
    tellers.push(update);
    if (rest) update();
  };

  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();

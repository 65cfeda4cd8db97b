// The planner: `fitmatrix plan` itself, run by Python in a worker, and its answer drawn. A page from disk may load scripts alone, so
// Python and our sources come as scripts that hand over files; they are asked for when the page is opened, and kept by the worker.
const openPlanner = (() => {
  "use strict";
  const SAY = {
    loading: "Loading Python for the browser, once: {n} MiB",
    starting: "Starting Python",
    planning: "Planning",
    answered: "Answered in {n} ms",
    unloaded: "The planner's files beside this page did not load: open it from its folder or its site, whole.",
    failed: "The planner itself failed, please report it: {name}",
    no_json: "This is no JSON: paste a whole config.json.",
    too_long: "This has {n} KiB, and a config.json has at most 1024: paste that file alone.",
    no_model: "No model of this name is known here: choose one of the list, or paste its config.json.",
    fits: "fits",
    tight: "fits barely",
    too_big: "too big",
    nothing: "Nothing fits",
    weights: "weights",
    kv: "KV cache",
    activations: "activations",
    overhead: "overhead",
    loading_more: "more while loading",
    worst: "up to, at worst",
    capacity: "of {n} GiB free",
    capacity_unknown: "size not given",
    speed: "Speed",
    ready: "Ready in",
    ready_again: "{first}, again in {again}",
    context: "Longest context",
    tokens: "{n} tokens",
    measured: "Measured",
    synthetic: "synthetic weights",
    none: "No measurement of this model yet. The command that makes one, and the one that shares it:",
    every: "Every way",
    every_way: "Every way of loading",
    big: "What is too big",
    others: "Why other ways cannot be taken",
    line: "On the command line",
    same: "The same program gives the same answer there:",
    precision: "precision",
    placement: "placement",
    verdict: "verdict",
    until: "ready at first",
    again: "ready again",
    ready_is: "ready",
    means: "Ready is load and first token: at first from the disk, again while the page cache holds the files.",
    each_time: "Ready is load and first token, from the disk each time: the page cache has no room for the files.",
    rate: "tokens/s",
    copy: "copy",
    copy_code: "copy the code",
    copy_command: "copy the command",
  };
  const GIB = 2 ** 30;
  const MOST_CONFIG = 1 << 20; // letters
  const PARTS = ["weights", "kv", "activation", "overhead"];
  const SHOWN = ["fits", "tight", "too_big"];
  const LOOKS = { fits: "works", tight: "broken", too_big: "too-big" };

  // What runs in the worker, by its source: no file of its own could be loaded from disk.
  const work = () => {
    const GLUE = `
import contextlib, gc, io, json, os
from harness.cli.entry import main

os.environ["LANGUAGE"] = "C"  # else argparse looks for a translation of each of its words, in files that are not there

def ask(words):
    """Run a command; return its exit status, what it printed and what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(words))
        except SystemExit as ended:
            status = ended.code
    return json.dumps([status, out.getvalue(), err.getvalue()])

ask(["plan", "smollm2-135m", "--ram", "8GiB", "--json"])
gc.freeze()
`;
    const BASE = "https://planner.invalid/"; // where Pyodide looks for its files; nothing is there, and nothing is asked
    const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const unpacked = (text) => new Response(new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    const start = async (packed) => {
      const names = Object.keys(packed);
      const files = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await unpacked(packed[name])])));
      const served = { "pyodide.asm.wasm": "application/wasm", "python_stdlib.zip": "application/zip" };
      self.fetch = async (place) => {
        const name = String(place?.url ?? place).replace(BASE, "");
        return new Response(files[name], { status: name in served ? 200 : 404, headers: { "content-type": served[name] ?? "text/plain" } });
      };
      self.importScripts = () => {
        throw new TypeError("as in a worker of modules"); // by which Pyodide knows that it is one
      };
      const imported = (name) => import(URL.createObjectURL(new Blob([files[name]], { type: "text/javascript" })));
      const [{ loadPyodide }, module] = await Promise.all(["pyodide.mjs", "pyodide.asm.mjs"].map(imported));
      const python = await loadPyodide({ indexURL: BASE, packageBaseUrl: BASE, lockFileContents: new TextDecoder().decode(files["pyodide-lock.json"]), createPyodideModule: module.default });
      const [where] = python.runPython("import site; site.getsitepackages()").toJs();
      python.unpackArchive(files["msgspec.whl"], "wheel");
      python.unpackArchive(files["fitmatrix.zip"], "zip", { extractDir: where });
      python.runPython(GLUE);
      return python;
    };
    let python;
    self.onmessage = async ({ data }) => {
      try {
        if (data.packed) {
          python = await start(data.packed);
          self.postMessage({ ready: true });
          return;
        }
        if (data.config !== undefined) {
          python.FS.mkdirTree("/pasted");
          python.FS.writeFile("/pasted/config.json", data.config);
        }
        const ask = python.globals.get("ask");
        const [status, out, err] = JSON.parse(ask(data.words));
        self.postMessage({ number: data.number, status, out, err });
      } catch (error) {
        self.postMessage({ number: data.number, failed: String(error) });
      }
    };
  };

  // Numbers as harness.core.units writes them.
  const significant = (value, digits = 3) => {
    if (value === 0) return "0";
    const power = Number(value.toExponential(digits - 1).split("e")[1]);
    return value.toLocaleString("en-US", { minimumFractionDigits: Math.max(digits - 1 - power, 0), maximumFractionDigits: Math.max(digits - 1 - power, 0) });
  };
  const gib = (bytes) => significant(bytes / GIB);
  const seconds = (value) => {
    if (value < 1) return `${significant(value * 1000)} ms`;
    if (value < 100) return `${significant(value)} s`;
    if (value < 3600) return `${Math.floor(value / 60)} min ${String(Math.floor(value % 60)).padStart(2, "0")} s`;
    return `${Math.floor(value / 3600)} h ${String(Math.floor((value % 3600) / 60)).padStart(2, "0")} min`;
  };
  const span = (low, high, write) => (write(low) === write(high) ? write(low) : `${write(low)}–${write(high)}`);
  const needed = (tier) => span(tier.needed_bytes, tier.needed_high_bytes, gib);

  const make = (name, properties = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) key in element ? (element[key] = value) : element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const draw = (name, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const quoted = (text, name = "span") => make(name, { translate: false }, text);
  const code = (text, label) => {
    const button = make("button", { type: "button", className: "copy", "aria-label": label }, SAY.copy);
    button.addEventListener("click", () => navigator.clipboard?.writeText(text));
    return make("div", { className: "code" }, button, make("pre", { tabIndex: 0 }, make("code", {}, text)));
  };
  const badge = (verdict) => {
    const look = LOOKS[verdict] ?? "invalid";
    const icon = draw("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, draw("use", { href: `#i-${look}` }));
    return make("span", { className: `badge s-${look}` }, icon, SAY[verdict] ?? verdict);
  };
  const way = (plan) => [plan.precision, [plan.placement, plan.kv === "dynamic" ? "" : `KV ${plan.kv}`, plan.attention ?? ""].filter(Boolean).join(", ")];

  // A tier's bar: what is needed by component, what may come on top at worst, and a line where the memory ends.
  const bar = (tier) => {
    const end = Math.max(tier.capacity_bytes ?? 0, tier.needed_high_bytes) || 1;
    const x = (bytes) => (bytes / end) * 1000;
    const drawing = draw("svg", { class: "bar parts", viewBox: "0 0 1000 14", preserveAspectRatio: "none", "aria-hidden": "true" });
    drawing.append(draw("rect", { class: "track", width: x(tier.capacity_bytes ?? end), height: 14 }));
    let at = 0;
    const rest = tier.needed_bytes - PARTS.reduce((sum, part) => sum + tier[`${part}_bytes`], 0);
    for (const [part, size] of [...PARTS.map((name) => [name, tier[`${name}_bytes`]]), ["more", rest]]) {
      if (size <= 0) continue;
      drawing.append(draw("rect", { class: `p-${part}`, x: x(at), width: x(size), height: 14 }));
      at += size;
    }
    if (tier.needed_high_bytes > at) drawing.append(draw("rect", { class: "p-worst", x: x(at), width: x(tier.needed_high_bytes - at), height: 14 }));
    if (tier.capacity_bytes) drawing.append(draw("path", { class: "limit", d: `M${Math.min(x(tier.capacity_bytes), 999)} -3V17` }));
    return drawing;
  };

  return (tongue, tellers) => {
    const known = JSON.parse(document.getElementById("known").textContent);
    const form = document.getElementById("ask");
    const [model, card, vram, ram, context, config, file, said, answer] = ["model", "card", "vram", "ram", "context", "config", "file", "said", "answer"].map((name) =>
      document.getElementById(name),
    );
    const byName = new Map(known.models.flatMap((one) => [one.name, one.hub_id].filter(Boolean).map((name) => [name.toLowerCase(), one])));
    const say = (key, values = {}) => tongue.say(SAY[key], values);
    let [worker, asked, shown, number, busy, waiting, status] = [undefined, undefined, undefined, 0, false, false, () => ""];

    const tell = (key, values) => {
      status = () => say(key, values);
      said.textContent = status();
    };

    // What is asked, as the words of the command; nothing, if something is wrong with it.
    const question = () => {
      const pasted = config.value.trim();
      const found = byName.get(model.value.trim().toLowerCase());
      if (pasted.length > MOST_CONFIG) return void tell("too_long", { n: Math.round(pasted.length / 1024) });
      if (pasted) {
        try {
          JSON.parse(pasted);
        } catch {
          return void tell("no_json");
        }
      } else if (!found) return void tell("no_model");
      const gpu = card.value === "size" ? `${vram.value}GiB` : card.value;
      const options = [
        ...(gpu && gpu !== "GiB" ? ["--gpu", gpu] : []),
        ...(ram.value ? ["--ram", `${ram.value}GiB`] : []),
        ...(context.value ? ["--context", context.value] : []),
      ];
      if (!options.includes("--gpu") && !options.includes("--ram")) options.push("--ram", "32GiB");
      const named = pasted ? "/pasted/config.json" : found.name;
      return { words: ["plan", named, ...options], shown: pasted ? "config.json" : found.name, options, config: pasted || undefined, model: pasted ? undefined : found };
    };
    const next = () => {
      if (!worker || busy || !waiting) return;
      waiting = false;
      asked = question();
      if (!asked) return;
      busy = true;
      number += 1;
      asked.at = performance.now();
      tell("planning");
      worker.postMessage({ number, words: [...asked.words, "--json"], config: asked.config });
    };
    const ask = () => {
      vram.parentElement.hidden = card.value !== "size";
      waiting = true;
      keep();
      next();
    };
    const heard = ({ data }) => {
      if (data.ready) {
        busy = false;
        waiting = true;
        return next();
      }
      busy = false;
      if (data.failed) tell("failed", { name: data.failed.trim().split("\n").filter((line) => /^\w/.test(line)).at(-1) ?? data.failed });
      else if (data.out) {
        tell("answered", { n: Math.round(performance.now() - asked.at) });
        shown = { asked, ...JSON.parse(data.out) };
        render();
      } else {
        shown = undefined;
        answer.replaceChildren(make("p", { className: "note" }, data.err.replace(/^fitmatrix: /, "").replace("/pasted/", "").trim()));
        status = () => "";
        said.textContent = "";
        tongue.translated(answer);
      }
      next();
    };

    // Drawing

    const readyIn = ({ disk, page_cache: cached }) => {
      const [first, again] = [disk, cached].map((spent) => spent && seconds(spent.best));
      return again ? tongue.say(SAY.ready_again, { first, again }) : quoted(first);
    };
    const figures = (plan) => {
      const list = make("dl", { className: "facts plan" });
      const add = (name, value) => list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
      const speed = plan.decode_tok_s;
      if (speed) add(SAY.speed, quoted(`${significant(speed.best, 2)} tokens/s (${significant(speed.low, 2)}–${significant(speed.high, 2)})`));
      if (plan.ready_s) add(SAY.ready, readyIn(plan.ready_s));
      if (plan.max_context_tokens) add(SAY.context, tongue.say(SAY.tokens, { n: plan.max_context_tokens.toLocaleString("en-US") }));
      return list;
    };
    const tierName = (name) => (name === "cpu" ? "RAM" : name.startsWith("gpu") ? `GPU ${name.slice(4)}` : name);
    const memory = (plan) => {
      const parts = Object.entries(plan.tiers).filter(([name]) => name !== "disk");
      return make(
        "div",
        { className: "room tiers" },
        ...parts.map(([name, tier]) => {
          const has = tier.capacity_bytes === null ? say("capacity_unknown") : say("capacity", { n: gib(tier.capacity_bytes) });
          return make("div", {}, make("p", {}, make("b", {}, quoted(`${tierName(name)} ${needed(tier)} GiB`)), make("span", {}, has)), bar(tier));
        }),
        make("ul", { className: "legend plain" }, ...["weights", "kv", "activations", "overhead", "loading_more", "worst"].map((key, i) => make("li", {}, make("i", { className: `p-${[...PARTS, "more", "worst"][i]}` }), SAY[key]))),
      );
    };
    const headline = (plan, said) => {
      const [precision, rest] = way(plan);
      return make("p", { className: "say" }, quoted(shown.asked.shown, "bdi"), ": ", make("b", {}, quoted(precision)), ", ", make("b", {}, quoted(rest)), " ", badge(said));
    };
    const why = (text) => make("p", { className: "why" }, make("bdi", {}, text));
    const command = () => `fitmatrix ${shown.asked.words.map((word) => (/[^\w./:=-]/.test(word) ? `'${word}'` : word)).join(" ").replace("/pasted/", "")}`;
    const recommended = () => {
      const best = shown.plans.find((plan) => plan.case === shown.recommended);
      if (best) {
        const script = best.code?.replace("/pasted", "DIR");
        return make(
          "div",
          { className: `answer s-${LOOKS[best.verdict]}` },
          headline(best, best.verdict),
          memory(best),
          figures(best),
          ...(best.bound_by ? [why(best.bound_by)] : []),
          ...(best.why ? [why(best.why)] : []),
          ...(script ? [code(script.trim(), SAY.copy_code)] : []),
        );
      }
      const near = shown.plans.filter((plan) => plan.verdict === "too_big").slice(0, 3);
      return make("div", { className: "answer s-too-big" }, make("p", { className: "say" }, quoted(shown.asked.shown, "bdi"), ": ", make("b", {}, SAY.nothing)), ...(shown.nearest ? [why(shown.nearest)] : near.map((plan) => why(plan.why))));
    };

    // The results of this model that come nearest: the same way first, then the memory that is most alike.
    const receipts = () => {
      const best = shown.plans.find((plan) => plan.case === shown.recommended) ?? shown.plans[0];
      const names = [shown.asked.model?.name, shown.asked.model?.hub_id].filter(Boolean).map((name) => name.toLowerCase());
      const size = shown.machine.tiers.find((tier) => tier.kind === "gpu")?.total_bytes ?? 0;
      const far = (row) => [row.precision !== best.precision, row.placement !== best.placement, Math.abs((row.card_bytes ?? 0) - size)];
      const rows = known.measured.filter((row) => names.includes(row.model.toLowerCase()));
      const order = (a, b) => far(a).reduce((found, value, i) => found || value - far(b)[i], 0);
      return rows.sort(order).slice(0, 3);
    };
    const measured = () => {
      const rows = receipts();
      const part = make("section", { className: "block", "aria-label": SAY.measured }, make("h2", {}, SAY.measured));
      if (!rows.length) {
        const best = shown.plans.find((plan) => plan.case === shown.recommended);
        const named = best ? { precision: best.precision, placement: best.placement, kv: best.kv === "dynamic" ? "" : best.kv, attention: best.attention } : {};
        const cases = Object.entries(named).map(([name, value]) => (value ? ` --${name} ${value}` : "")).join("");
        const model = shown.asked.model ? shown.asked.model.name : "DIR --weights synthetic";
        part.append(make("p", {}, SAY.none), code(`pytest cases/ --model ${model}${cases}\nfitmatrix share fitmatrix-results`, SAY.copy_command));
        return part;
      }
      const items = rows.map((row) => {
        const link = make("a", { href: row.page }, quoted(`${row.memory} ${row.kind}${row.speed ? `, ${row.speed}` : ""}`));
        return make("li", {}, make("b", {}, quoted(`${row.precision}, ${row.placement}`)), " ", link, " ", make("span", { className: "muted" }, quoted(row.on), ...(row.synthetic ? [", ", make("span", {}, SAY.synthetic)] : [])));
      });
      part.append(make("ul", { className: "plain receipts" }, ...items));
      return part;
    };

    // Rows that say the same are one, with their placements joined, as in the terminal.
    const ways = () => {
      const tiers = [...new Set(shown.plans.flatMap((plan) => Object.keys(plan.tiers)))].filter((name) => name !== "disk");
      const rows = new Map();
      const told = shown.plans.filter((one) => SHOWN.includes(one.verdict) && one.decode_tok_s);
      const again = told.some((plan) => plan.verdict !== "too_big" && plan.ready_s.page_cache);
      for (const plan of told) {
        const [precision, placement] = way(plan);
        const cells = [...tiers.map((name) => (plan.tiers[name] ? needed(plan.tiers[name]) : "")), ...[plan.ready_s.disk, ...(again ? [plan.ready_s.page_cache] : [])].map((spent) => (spent ? seconds(spent.best) : "")), span(plan.decode_tok_s.low, plan.decode_tok_s.high, (value) => significant(value, 2))];
        const key = JSON.stringify([precision, plan.verdict, cells]);
        const row = rows.get(key) ?? { precision, verdict: plan.verdict, cells, placements: [], cases: [] };
        row.placements.push(placement);
        row.cases.push(plan.case);
        rows.set(key, row);
      }
      const [good, big] = [[...rows.values()].filter((row) => row.verdict !== "too_big"), [...rows.values()].filter((row) => row.verdict === "too_big")];
      const head = [SAY.precision, SAY.placement, SAY.verdict, ...tiers.map((name) => `${tierName(name)}, GiB`), ...(again ? [SAY.until, SAY.again] : [SAY.ready_is]), SAY.rate];
      const drawn = (chosen) => {
        const heads = head.map((text, i) => make("th", { scope: "col", className: i < 3 ? "words" : "" }, text));
        const lines = chosen.map((row) => {
          const line = make("tr", { className: row.cases.includes(shown.recommended) ? "chosen" : "" }, make("th", { scope: "row" }, quoted(row.precision)));
          line.append(make("td", { className: "words" }, quoted(row.placements.join(", "))), make("td", { className: "words" }, badge(row.verdict)));
          line.append(...row.cells.map((text, i) => make("td", { "data-label": head[i + 3] }, quoted(text))));
          line.dataset.cases = row.cases.join(" ");
          return line;
        });
        const table = make("table", { className: "figures ways plans" }, make("caption", { className: "sr" }, SAY.every_way), make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
        return make("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": SAY.every_way }, table);
      };
      const part = make("section", { className: "block", "aria-label": SAY.every }, make("h2", {}, SAY.every), make("p", { className: "muted" }, again ? SAY.means : SAY.each_time));
      if (good.length) part.append(drawn(good));
      if (big.length) part.append(make("details", { className: "fold", open: !good.length }, make("summary", {}, SAY.big), drawn(big)));
      const reasons = [...new Set(shown.plans.filter((plan) => plan.verdict === "invalid").map((plan) => plan.why))];
      if (reasons.length) part.append(make("details", { className: "fold" }, make("summary", {}, SAY.others), make("ul", {}, ...reasons.map((text) => make("li", { className: "why" }, make("bdi", {}, text))))));
      return part;
    };
    const notes = (...told) => told.flat().filter(Boolean).map(why);
    const render = () => {
      if (!shown) return;
      const same = make("section", { className: "block", "aria-label": SAY.line }, make("h2", {}, SAY.line), make("p", {}, SAY.same), code(command(), SAY.copy_command), ...notes(shown.machine.assumed));
      answer.replaceChildren(recommended(), ...notes(shown.model.history, shown.model.notes), measured(), ways(), same);
      tongue.translated(answer);
    };

    // What is asked stands in the address, so that an answer can be sent to somebody.
    const FIELDS = { model, card, vram, ram, context };
    const keep = () => {
      const words = Object.entries(FIELDS).filter(([, field]) => field.value);
      const hash = new URLSearchParams(words.map(([name, field]) => [name, field.value]));
      history.replaceState(null, "", `#${hash}`);
    };
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in FIELDS) FIELDS[name].value = value;
    if (card.selectedIndex < 0) card.value = "";

    let typed;
    form.addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(ask, 200);
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      ask();
    });
    file.addEventListener("change", async () => {
      const [chosen] = file.files;
      if (!chosen) return;
      if (chosen.size > MOST_CONFIG) {
        config.value = "";
        file.value = "";
        return tell("too_long", { n: Math.round(chosen.size / 1024) });
      }
      config.value = await chosen.text();
      ask();
    });
    tellers.push(() => {
      said.textContent = status();
      render();
    });

    const parts = {};
    globalThis.takeParts = (more) => Object.assign(parts, more);
    const loaded = (name) =>
      new Promise((done, failed) => {
        const script = make("script", { src: `planner/${name}` });
        script.onload = done;
        script.onerror = failed;
        document.head.append(script);
      });
    const begin = async () => {
      busy = true;
      tell("loading", { n: Math.round(known.bytes / 2 ** 20) });
      try {
        await Promise.all(["python.js", "fitmatrix.js"].map(loaded));
      } catch {
        return tell("unloaded");
      }
      tell("starting");
      worker = new Worker(URL.createObjectURL(new Blob([`(${work})()`], { type: "text/javascript" })));
      worker.onmessage = heard;
      worker.postMessage({ packed: parts });
    };
    form.hidden = false;
    vram.parentElement.hidden = card.value !== "size";
    begin();
  };
})();

// Filters and orders the cases, opens the details that a cell leads to, and copies code. The state is the URL's fragment: the anchor of
// a case, then what is filtered by. Without scripts the page can still be read and its links followed.
(() => {
  "use strict";
  const SAY = {
    copied: "copied",
    press: "press Ctrl+C",
    count: "{shown} of {all} cases",
    fastest: "{shown} of {all} cases; the fastest that works: {name}, {speed}",
    none: "No case matches.",
    name: "{model}: {precision} / {place}",
    short: "{precision} / {place}",
    more: "show more ({left} left)",
    unreadable: "This browser is too old to unpack the details: use a newer one.",
    copy: "copy",
    auto: "◐ auto",
    light: "☀ light",
    dark: "☾ dark",
  };
  const LANGUAGES = ["en", "zh"];
  const KEYS = ["model", "precision", "placement", "outcome", "fits", "figures", "order"];
  const GIB = 2 ** 30;
  const CARDS = 40;
  const AT_ONCE = 2;
  const idly = window.requestIdleCallback ?? ((work) => setTimeout(work, 0, { timeRemaining: () => 10 }));
  const root = document.documentElement;
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("scripted-page");

  // The theme is set before anything is painted. Where a file may keep nothing, it lasts as long as the page.
  const THEMES = ["auto", "light", "dark"];
  let theme = "auto";
  try {
    theme = localStorage.getItem("fitmatrix-theme") ?? theme;
  } catch {}
  const show = (name) => {
    theme = THEMES.includes(name) ? name : "auto";
    root.dataset.theme = theme;
  };
  show(theme);

  const start = () => {
    const tongue = speaking(JSON.parse(one("#zh").textContent));
    const say = (key, values) => tongue.say(SAY[key], values);
    const form = one("#filters");
    const flat = one("#flat");
    const tip = one("#tip");
    const said = one("#said");

    // The fragment.
    const options = (key) => form.elements[key] && [...form.elements[key].options].map((option) => option.value);
    const allowed = (key, value) => {
      if (!form?.elements[key] || !value) return false;
      return key === "fits" ? Number(value) > 0 && Number.isFinite(Number(value)) : options(key).includes(value);
    };
    const decoded = (text) => {
      try {
        return decodeURIComponent(text);
      } catch {
        return "";
      }
    };
    const read = () => {
      const state = { anchor: "" };
      for (const part of location.hash.slice(1).split("&")) {
        const [key, value] = part.split("=");
        if (value === undefined) state.anchor ||= decoded(key);
        else if (key === "lang" && LANGUAGES.includes(value)) state.lang = value;
        else if (KEYS.includes(key) && allowed(key, decoded(value))) state[key] = decoded(value);
      }
      return state;
    };
    const write = (state, how) => {
      const pairs = [...KEYS, "lang"].filter((key) => state[key]).map((key) => `${key}=${encodeURIComponent(state[key])}`);
      const hash = "#" + [state.anchor, ...pairs].filter(Boolean).join("&");
      if (hash !== location.hash) history[how ?? "pushState"](null, "", hash);
    };

    // All cases of the page, read from its cells when it is first needed; most figures of most cases never are.
    class Item {
      off = false;
      constructor(cell, link, names) {
        Object.assign(this, names);
        const looks = cell.className.split(" ");
        this.cell = cell;
        this.link = link;
        this.look = looks.find((look) => look.startsWith("s-")).slice(2);
        this.planned = looks.includes("plan");
        this.measured = this.look === "works" || looks.includes("unsound");
        this.sound = this.look === "works";
      }
      figureIn(place) {
        return Number(one(place, this.cell)?.value ?? NaN);
      }
      get anchor() {
        return this.link.getAttribute("href").slice(1);
      }
      get speed() {
        return (this.tokens ??= this.measured ? this.figureIn("data[data-key=decode_tok_s]") : NaN);
      }
      // What ran out of memory or time took less than it needs.
      get need() {
        return (this.bytes ??= this.planned || this.measured ? this.figureIn(".need data") : NaN);
      }
      get place() {
        return tongue.inEnglish(this.link, "aria-label")?.split(", ").at(-1) ?? one("span", this.cell).textContent;
      }
    }
    // What is drawn of each case in the charts.
    const marked = (element) => {
      const marks = new Map();
      for (const drawn of all(".overview :is(a, [data-of])", element)) {
        const anchor = drawn.dataset.of ?? drawn.getAttribute("href").slice(1);
        const mark = drawn.closest("li") ?? drawn;
        if (marks.has(anchor)) marks.get(anchor).push(mark);
        else marks.set(anchor, [mark]);
      }
      return marks;
    };
    const indexed = (element) => {
      const block = element.closest(".block");
      const model = one("h2 bdi", block).textContent;
      const table = one(".matrix", element);
      const [groups, limits] = table?.tHead.rows ?? [];
      const rows = table ? [...table.tBodies[0].rows] : [];
      const cellsOf = (row) => [...row.cells].slice(1);
      const heads = table ? cellsOf(groups).map((head) => [head, head.colSpan]) : [];
      const placements = heads.flatMap(([head, span]) => Array(span).fill(head.firstChild.textContent));
      // Below the row of common headings the cells of a column stand under each other.
      const lines = [...(limits ? [[...limits.cells]] : groups ? [cellsOf(groups)] : []), ...rows.map(cellsOf)];
      const columns = placements.map((_, x) => lines.map((line) => line[x]));
      const names = rows.map((row) => row.cells[0].firstChild.textContent);
      const cases = rows.flatMap((row, y) =>
        cellsOf(row).flatMap((cell, x) => {
          const link = cell.firstElementChild;
          if (link.localName !== "a") return [];
          return [new Item(cell, link, { model, precision: names[y], placement: placements[x], x, y })];
        }),
      );
      const folds = all(".fold", element);
      const folded = folds.flatMap((fold) => all(".cell", fold)).map((cell) => {
        const [precision, place] = [one("b", cell).textContent, one("span", cell).textContent];
        return new Item(cell, cell.firstElementChild, { model, precision, placement: place.split("@")[0] });
      });
      const packed = Boolean(one(".packed", element));
      const marks = marked(element);
      return { element, block, table, rows, columns, heads, limited: Boolean(limits), folds, marks, packed, cases: [...cases, ...folded] };
    };
    let index;
    const indexOf = () => (index ??= all(".workload").map(indexed));

    // Filtering: what has no match disappears, by row, by column, by workload, by block.
    const matches = (item, state) =>
      (!state.model || item.model === state.model) &&
      (!state.precision || item.precision === state.precision) &&
      (!state.placement || item.placement === state.placement) &&
      (!state.outcome || item.look === state.outcome) &&
      (!state.fits || item.need <= state.fits * GIB) &&
      (!state.figures || item.planned === (state.figures === "predicted"));
    const hide = (element, hidden) => {
      if (element.hidden !== hidden) element.hidden = hidden;
    };
    const narrow = (part, found) => {
      const kept = new Set(found);
      const columns = new Set(found.map((item) => item.x));
      const rows = new Set(found.map((item) => item.y));
      for (const item of part.cases) {
        const off = !kept.has(item);
        if (item.off === off) continue; // most cells of a page of thousands stay as they are
        item.off = off;
        if (item.x === undefined) hide(item.cell, off);
        else for (const place of [item.cell, ...(part.marks.get(item.anchor) ?? [])]) place.classList.toggle("off", off);
      }
      for (const item of part.packed ? [] : part.cases) hide(document.getElementById(item.anchor), item.off);
      for (const fold of part.folds) hide(fold, !one(".cell:not([hidden])", fold));
      part.rows.forEach((row, y) => hide(row, !rows.has(y)));
      if (part.table) hide(part.table.parentElement, !found.some((item) => item.x !== undefined));
      part.columns.forEach((cells, x) => {
        if (cells[0].hidden === columns.has(x)) for (const cell of cells) cell.hidden = !columns.has(x);
      });
      if (part.limited) narrowHeads(part, columns);
    };
    // A heading over the columns of several limits is as wide as those that are left.
    const narrowHeads = (part, columns) => {
      let x = 0;
      for (const [head, span] of part.heads) {
        const shown = [...Array(span).keys()].filter((i) => columns.has(x + i)).length;
        hide(head, !shown);
        head.colSpan = shown || 1;
        x += span;
      }
    };
    // On a page of hundreds of blocks the first that match are shown at once, and what is far below them when there is time.
    let unfinished = [];
    let active = false;
    // What is folded because all is fine is open while a filter looks into it.
    const unfolded = new Set();
    const unfold = (fold) => {
      if (active && !fold.open) unfolded.add(fold);
      if (active || unfolded.delete(fold)) fold.open = active;
    };
    const finish = ([block, parts], ordered) => {
      const some = parts.some(([, kept]) => kept.length);
      const fold = one(":scope > .model", block);
      if (fold) unfold(fold);
      if (block !== form.closest(".block")) hide(block, !some || ordered);
      if (links.has(block.id)) hide(links.get(block.id), !some);
      for (const [part, kept] of parts) {
        hide(part.element, !kept.length || ordered);
        if (kept.length && !ordered) narrow(part, kept);
      }
      return some;
    };
    const finishSome = (most) => {
      let shown = 0;
      while (unfinished.length && shown < most) shown += finish(...unfinished.shift());
    };
    const finishIdly = (deadline) => {
      while (unfinished.length && deadline.timeRemaining() > 2) finishSome(1);
      if (unfinished.length) idly(finishIdly);
    };
    const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link.closest("li")]));
    let filtered = false;
    const filter = (state) => {
      active = KEYS.some((key) => key !== "order" && state[key]);
      if (!active && !filtered && !state.order) return;
      const found = [];
      const blocks = new Map();
      for (const part of indexOf()) {
        const kept = part.cases.filter((item) => matches(item, state));
        for (const item of kept) found.push(item);
        if (!blocks.has(part.block)) blocks.set(part.block, []);
        blocks.get(part.block).push([part, kept]);
      }
      unfinished = [...blocks].map((entry) => [entry, Boolean(state.order)]);
      finishSome(state.order ? Infinity : AT_ONCE);
      idly(finishIdly);
      filtered = active || Boolean(state.order);
      order(state, found);
      tell(found);
    };
    const nameOf = (item) => say(form.elements.model ? "name" : "short", item);
    const tell = (found) => {
      const output = one("output", form);
      const total = (index ?? []).reduce((sum, part) => sum + part.cases.length, 0);
      if (!found || found.length === total) return void (output.textContent = "");
      const sound = found.filter((item) => item.sound && item.speed > 0);
      const best = sound.reduce((a, b) => (a && a.speed >= b.speed ? a : b), null);
      const speed = best && one("data[data-key=decode_tok_s]", best.cell).textContent;
      const values = { shown: found.length, all: total, name: best && nameOf(best), speed };
      output.textContent = say(found.length ? (best ? "fastest" : "count") : "none", values);
    };

    // In an order of one's own the cells stand as cards, the first of them at once.
    const ORDERS = { fastest: (a, b) => b.sound - a.sound || b.speed - a.speed, least: (a, b) => a.need - b.need };
    let queue = [];
    const order = (state, found) => {
      restore();
      one(".cards", flat).replaceChildren();
      flat.hidden = !state.order;
      queue = [];
      if (!state.order) return;
      const known = state.order === "fastest" ? (item) => item.speed > 0 : (item) => item.need >= 0;
      const last = found.filter((item) => !known(item));
      queue = [...found.filter(known).sort(ORDERS[state.order]), ...last];
      more();
    };
    const more = () => {
      for (const item of queue.splice(0, CARDS)) {
        const card = document.createElement("li");
        card.className = item.cell.className.replace(/\boff\b/, "");
        const name = document.createElement("p");
        name.className = "name";
        name.textContent = nameOf(item);
        card.append(name, ...[...item.cell.childNodes].map((node) => node.cloneNode(true)));
        one(".cards", flat).append(card);
      }
      const button = one(".more", flat);
      hide(button, !queue.length);
      button.textContent = say("more", { left: queue.length });
    };

    // Details: unpacked when one of them is first asked for, and moved beside its card in an order of one's own. A line that begins
    // with a mark is the number of a pattern and what stands in its slots.
    const MARK = "\u0001";
    const inflated = async (block) => {
      const bytes = Uint8Array.from(atob(block.textContent), (letter) => letter.charCodeAt(0));
      return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).text();
    };
    let patterns;
    const unpacked = async (block) => {
      patterns ??= inflated(one("#patterns")).then((text) => text.split("\n").map((pattern) => pattern.split(MARK)));
      const [text, known] = await Promise.all([inflated(block), patterns]);
      const whole = (line) => {
        if (!line.startsWith(MARK)) return line;
        const [, number, ...slots] = line.split(MARK);
        return known[parseInt(number, 16)].map((piece, i) => piece + (slots[i] ?? "")).join("");
      };
      return text.split("\n").map(whole).join("\n");
    };
    const unpack = async (workload) => {
      const packed = workload && one(".packed", workload);
      if (!packed) return;
      finishSome(Infinity);
      try {
        const html = await unpacked(one("script", packed));
        if (!packed.classList.contains("packed")) return; // asked for twice at once
        packed.classList.remove("packed");
        packed.innerHTML = html;
        tongue.translated(packed);
        const part = index?.find((part) => part.element === workload);
        if (part) [part.packed, part.marks] = [false, marked(workload)];
        for (const item of part?.cases ?? []) {
          hide(document.getElementById(item.anchor), item.off);
          for (const mark of part.marks.get(item.anchor) ?? []) mark.classList.toggle("off", item.x !== undefined && Boolean(item.off));
        }
      } catch {
        packed.textContent = say("unreadable");
      }
    };
    const moved = [];
    const restore = () => {
      for (const [details, place] of moved.splice(0)) place.replaceWith(details);
    };
    const linkIn = (place, anchor) => one(`${place} .cell > a[href="#${CSS.escape(anchor)}"]`);
    const reveal = async (anchor) => {
      if (!anchor) return;
      if (!document.getElementById(anchor)) await unpack(linkIn(".workload", anchor)?.closest(".workload"));
      const target = document.getElementById(anchor);
      if (!target) return;
      finishSome(Infinity);
      while (queue.length && !linkIn("#flat", anchor)) more();
      const card = linkIn("#flat", anchor)?.closest("li");
      if (card && !target.closest("#flat")) {
        const [place, item] = [document.createComment(""), document.createElement("li")];
        target.replaceWith(place);
        moved.push([target, place]);
        item.className = "opened";
        item.append(target);
        card.after(item);
      }
      for (let part = target; part; part = part.parentElement) {
        part.hidden &&= false;
        if (part.localName === "details") part.open = true;
      }
      const fold = one(":scope > .model", target);
      if (fold) fold.open = true;
      target.scrollIntoView();
      one("summary", target)?.focus({ preventScroll: true });
    };
    const close = (details) => {
      details.open = false;
      write({ ...read(), anchor: "" }, "replaceState");
      const link = linkIn("#flat", details.id) ?? linkIn(".workload", details.id);
      link?.closest("details")?.setAttribute("open", "");
      (link ?? one("summary", details)).focus();
    };

    // One way in for links, back and forward, and a copied URL.
    let last = "";
    const apply = () => {
      const state = read();
      tongue.speak(state.lang, retell);
      if (form) {
        for (const key of KEYS) if (form.elements[key]) form.elements[key].value = state[key] ?? "";
        const filters = JSON.stringify({ ...state, anchor: "", lang: "" });
        if (filters !== last) filter(state);
        last = filters;
      }
      return reveal(state.anchor);
    };
    const given = () => {
      const state = { anchor: "", lang: read().lang };
      for (const key of KEYS) {
        const typed = form.elements[key]?.value;
        const value = key === "fits" ? typed.trim().replace(",", ".") : typed;
        if (value && allowed(key, value)) state[key] = value;
      }
      return state;
    };
    addEventListener("hashchange", apply);
    form?.addEventListener("change", () => {
      write(given());
      apply();
    });
    form?.addEventListener("submit", (event) => {
      event.preventDefault();
      write(given());
      apply();
    });
    form?.addEventListener("reset", (event) => {
      event.preventDefault();
      write({ anchor: "", lang: read().lang });
      apply();
      form.elements[0].focus();
    });
    one(".more", flat ?? document)?.addEventListener("click", more);

    document.addEventListener("click", async (event) => {
      const { target } = event;
      const link = target.closest("a[href^='#']");
      if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey) {
        event.preventDefault();
        const anchor = decoded(link.getAttribute("href").slice(1)); // a link in a drawing has no hash
        write({ ...read(), anchor });
        await reveal(anchor);
        return;
      }
      if (target.closest(".unpack")) {
        const workload = target.closest(".workload");
        await unpack(workload);
        one(".cases summary", workload)?.focus();
      }
      const button = target.closest("button.copy");
      if (button) await copied(button);
    });

    // Keys: arrows, Home and End between the cells of a matrix; Escape closes.
    const usable = (cell) => cell && !cell.hidden && !cell.classList.contains("off") && one(":scope > a", cell);
    const neighbor = (cell, key) => {
      const row = [...cell.parentElement.cells];
      const [x, y] = [cell.cellIndex, cell.parentElement.sectionRowIndex];
      const column = [...cell.closest("tbody").rows].filter((line) => !line.hidden || line === cell.parentElement).map((line) => line.cells[x]);
      const paths = {
        ArrowLeft: row.slice(0, x).reverse(),
        ArrowRight: row.slice(x + 1),
        Home: row,
        End: [...row].reverse(),
        ArrowUp: column.slice(0, column.indexOf(cell)).reverse(),
        ArrowDown: column.slice(column.indexOf(cell) + 1),
      };
      return paths[key]?.find(usable);
    };
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const { target, key } = event;
      if (key === "Escape") {
        if (!tip.hidden) return void (tip.hidden = true);
        const opened = target.closest(".case[open]") ?? one(`.case[open][id="${CSS.escape(read().anchor)}"]`);
        if (opened && !target.closest("form")) close(opened);
        return;
      }
      const cell = target.closest(".matrix td.cell");
      const next = cell && neighbor(cell, key);
      if (!next) return;
      event.preventDefault();
      one("a", next).focus();
    });

    // The whole reason of a cell, where the pointer or the focus is; Escape takes it away.
    let held;
    const explain = (cell) => {
      const reason = cell && one(".why", cell);
      held?.removeAttribute("aria-describedby");
      tip.hidden = !reason;
      if (!reason) return;
      tip.textContent = reason.textContent;
      held = one("a", cell);
      held.setAttribute("aria-describedby", "tip");
      const [box, own] = [cell.getBoundingClientRect(), tip.getBoundingClientRect()];
      const left = Math.min(box.left, root.clientWidth - own.width - 8);
      const below = box.bottom + 2 + own.height <= innerHeight;
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${below ? box.bottom - 2 : Math.max(4, box.top - own.height + 2)}px`;
    };
    let waiting;
    document.addEventListener("pointerover", (event) => {
      clearTimeout(waiting);
      if (event.target.closest("#tip")) return;
      const cell = event.target.closest(".cell");
      if (!cell) tip.hidden = true;
      else waiting = setTimeout(explain, 250, cell); // so that it does not stand in the way of a pointer that passes
    });
    document.addEventListener("focusin", (event) => explain(event.target.closest(".cell > a")?.parentElement));
    document.addEventListener("focusout", () => explain(null));
    const follow = () => tip.hidden || explain(document.activeElement.closest(".cell"));
    addEventListener("scroll", follow, { passive: true, capture: true });

    // Copying.
    const select = (text) => {
      getSelection().selectAllChildren(text);
      return document.execCommand("copy");
    };
    const copy = async (text) => {
      try {
        await navigator.clipboard.writeText(text.textContent);
        return true;
      } catch {
        return select(text);
      }
    };
    const copied = async (button) => {
      button.firstChild.data = said.textContent = say((await copy(one("pre", button.parentElement))) ? "copied" : "press");
      setTimeout(() => {
        button.firstChild.data = say("copy");
        said.textContent = "";
      }, 2000);
    };

    // The theme.
    const button = one("#theme");
    button.addEventListener("click", () => {
      show(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
      button.textContent = say(theme);
      try {
        localStorage.setItem("fitmatrix-theme", theme);
      } catch {}
    });

    // The language: what the page says of itself is said anew, and the cards are made anew from its cells.
    const retell = () => {
      button.textContent = say(theme);
      tip.hidden = true;
      if (!last) return; // nothing is filtered yet
      const state = read();
      filter(state);
      if (state.order) reveal(state.anchor);
    };
    for (const choice of all("[data-lang]"))
      choice.addEventListener("click", () => {
        tongue.remember(choice.dataset.lang);
        write({ ...read(), lang: choice.dataset.lang }, "replaceState");
        tongue.speak(choice.dataset.lang, retell);
      });

    button.textContent = say(theme);
    apply();
    if (form) idly(() => indexOf().forEach((part) => part.cases.forEach((item) => item.need + item.speed)));
  };
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();

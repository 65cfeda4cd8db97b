// Opens the details that a cell leads to, and copies code. Without it the page can still be read and its links followed.
(() => {
  const reveal = () => {
    const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    if (!target) return;
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView();
    target.querySelector("summary")?.focus({ preventScroll: true });
  };
  addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    // A second click on the same cell changes no hash.
    if (event.target.closest("a")?.getAttribute("href") === location.hash) reveal();
  });
  reveal();

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
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    const word = button.textContent;
    button.addEventListener("click", async () => {
      button.textContent = (await copy(button.parentElement.querySelector("pre"))) ? "copied" : "press Ctrl+C";
      setTimeout(() => (button.textContent = word), 2000);
    });
  }
})();

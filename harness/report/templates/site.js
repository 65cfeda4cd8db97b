// Filters the tables of the index by what is typed. Without it all rows are there.
(() => {
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
    said.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  };
  field.parentElement.hidden = false;
  field.addEventListener("input", filter);
  filter();
})();

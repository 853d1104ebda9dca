"use strict";
(() => {
  const FEWEST = 8; // rows from which on a table can be filtered

  // A column is sorted by its cells' data-value where they have one, as numbers; else by their text. What has no value comes last, and so do
  // rows that say in one cell across columns why they have no figures.
  const keyOf = cell => {
    if (!cell || cell.colSpan > 1) return null;
    const value = cell.dataset.value;
    if (value === undefined) return cell.textContent.trim();
    return value === "" ? null : Number(value);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  const sortable = table => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const headers = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    const sort = (column, direction) => {
      const rows = direction === "none" ? original : [...original].sort((x, y) => {
        const [a, b] = [keyOf(x.cells[column]), keyOf(y.cells[column])];
        if (a === null || b === null) return (a === null) - (b === null);
        return direction === "ascending" ? compare(a, b) : compare(b, a);
      });
      headers.forEach((header, i) => header.setAttribute("aria-sort", i === column ? direction : "none"));
      body.append(...rows);
    };
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const numbers = original.some(row => row.cells[column]?.dataset.value);
        const [first, second] = numbers ? ["descending", "ascending"] : ["ascending", "descending"];
        const now = header.getAttribute("aria-sort");
        sort(column, now === "none" ? first : now === first ? second : "none");
      });
    });
  };

  const filterable = (table, number) => {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < FEWEST) return;
    const bar = document.createElement("div"), label = document.createElement("label");
    const input = document.createElement("input"), count = document.createElement("span");
    bar.className = "filter";
    input.type = "search";
    input.id = `filter-${number}`;
    label.htmlFor = input.id;
    label.textContent = "Filter";
    count.setAttribute("role", "status");
    const region = table.closest(".scroll");
    input.setAttribute("aria-label", `Filter ${region.getAttribute("aria-label")}`);
    const texts = rows.map(row => row.textContent.toLowerCase());
    const update = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !words.every(word => texts[i].includes(word));
        shown += !row.hidden;
      });
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    };
    input.addEventListener("input", update);
    bar.append(label, input, count);
    region.before(bar);
    update();
  };

  // What a mark of a chart stands for, beside it, while the pointer or the focus is on it.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);
  const show = mark => {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = mark.getBoundingClientRect(), width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, width - tip.offsetWidth - 8));
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 0 ? above : box.bottom + 6) + scrollY}px`;
  };
  const markOf = event => event.target.closest && event.target.closest("[data-tip]");
  const hide = () => { tip.hidden = true; };
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, e => { const m = markOf(e); if (m) show(m); else hide(); });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });

  document.querySelectorAll("table.sortable").forEach((table, number) => { sortable(table); filterable(table, number); });
})();

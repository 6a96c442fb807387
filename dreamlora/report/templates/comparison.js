(() => {
  "use strict";

  // Tables: a button in every heading sorts by its column, first ascending, then descending; gaps stay at the end.
  function compare(a, b) {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  }

  function sort(table, column, heading) {
    const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = direction === "ascending" ? 1 : -1;
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", direction);
    const body = table.tBodies[0];
    const key = (row) => row.cells[column].dataset.key;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * compare(x, y);
    });
    body.append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    if (table.tBodies[0].rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = heading.textContent;
      button.addEventListener("click", () => sort(table, column, heading));
      heading.textContent = "";
      heading.setAttribute("aria-sort", "none");
      heading.append(button);
    });
  }

  // Samples: without this script all of them are visible, one below the other.
  const controls = document.getElementById("controls");
  if (!controls) return;
  const slider = document.getElementById("step");
  const stepOutput = document.getElementById("step-told");
  const prompt = document.getElementById("prompt");
  const all = document.getElementById("all-steps");
  const views = [...document.querySelectorAll(".view")];
  const steps = [...views[0].querySelectorAll(".row")].map((row) => row.dataset.step);

  function show() {
    const step = steps[slider.value];
    const text = step === "0" ? "base model" : `step ${step}`;
    stepOutput.textContent = all.checked ? "all" : text;
    slider.setAttribute("aria-valuetext", text);
    slider.disabled = all.checked;
    views.forEach((view, index) => {
      view.hidden = prompt.value !== "" && prompt.value !== String(index);
      for (const row of view.querySelectorAll(".row")) row.hidden = !all.checked && row.dataset.step !== step;
    });
  }

  controls.addEventListener("submit", (event) => event.preventDefault());
  for (const field of [slider, prompt, all]) field.addEventListener("input", show);
  controls.hidden = false;
  show();
})();

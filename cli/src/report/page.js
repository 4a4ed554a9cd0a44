"use strict";
(() => {
  for (const section of document.querySelectorAll("section")) {
    const field = section.querySelector(".filter");
    if (!field) continue;
    const rows = [...section.querySelectorAll("[data-name]")];
    const count = section.querySelector(".count");
    const show = () => {
      const wanted = field.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.dataset.name.toLowerCase().includes(wanted);
        row.style.display = row.hidden ? "none" : "";
        if (!row.hidden) shown += 1;
      }
      count.textContent = `${shown} of ${rows.length}`;
    };
    field.addEventListener("input", show);
    show();
    const button = section.querySelector(".sort");
    if (button) {
      button.addEventListener("click", () => {
        const pressed = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(pressed));
        const key = (row) => (row.dataset.value === "" ? Infinity : Number(row.dataset.value));
        const order = pressed ? [...rows].sort((a, b) => key(a) - key(b)) : rows;
        rows[0]?.parentNode.append(...order);
      });
    }
  }
  const tip = document.getElementById("tip");
  const tell = (event) => {
    const from = event.target.closest?.("[data-tip]");
    tip.hidden = !from;
    tip.textContent = from ? from.dataset.tip : "";
  };
  for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, tell);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tip.hidden = true;
  });
  document.documentElement.dataset.ready = "yes";
})();

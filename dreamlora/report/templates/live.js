(() => {
  "use strict";
  const bar = document.getElementById("live");
  const status = bar.querySelector("span");
  const button = bar.querySelector("button");
  const version = bar.dataset.version;
  const key = "dreamlora live";
  const seconds = 1;
  const loadedAt = new Date().toLocaleTimeString();
  let paused = false;

  const details = () => [...document.querySelectorAll("details")];
  const fields = () => [...document.querySelectorAll("input[id], select[id]")];
  const sideways = () => [...document.querySelectorAll(".wide")];

  // What the reader has opened, chosen and scrolled to outlives the reload.
  function keep() {
    sessionStorage.setItem(key, JSON.stringify({
      top: window.scrollY,
      left: sideways().map((element) => element.scrollLeft),
      open: details().filter((element) => element.open).map((element) => element.querySelector("summary").textContent),
      fields: fields().map((field) => [field.id, field.type === "checkbox" ? field.checked : field.value]),
      focus: document.activeElement ? document.activeElement.id : "",
    }));
  }

  function restore(kept) {
    for (const element of details()) {
      element.open = element.open || kept.open.includes(element.querySelector("summary").textContent);
    }
    for (const [id, value] of kept.fields) {
      const field = document.getElementById(id);
      if (!field) continue;
      if (field.type === "checkbox") field.checked = value;
      else field.value = value;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    sideways().forEach((element, index) => { element.scrollLeft = kept.left[index] || 0; });
    const focused = kept.focus && document.getElementById(kept.focus);
    if (focused) focused.focus({ preventScroll: true });
    window.scrollTo(0, kept.top);
  }

  function say(text) {
    if (status.textContent !== text) status.textContent = text;
  }

  async function look() {
    if (!paused && !document.hidden) {
      try {
        const answer = await fetch("/live", { cache: "no-store" });
        const newest = (await answer.json()).version;
        if (newest !== version && !paused) {
          keep();
          location.reload();
          return;
        }
        say(`Live, as of ${loadedAt}.`);
      } catch {
        say(`Not live any more: the program that showed it has ended. As of ${loadedAt}.`);
      }
    }
    setTimeout(look, seconds * 1000);
  }

  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    button.setAttribute("aria-pressed", String(paused));
    say(paused ? `Paused, as of ${loadedAt}.` : `Live, as of ${loadedAt}.`);
  });

  const kept = sessionStorage.getItem(key);
  sessionStorage.removeItem(key);
  if (kept) {
    history.scrollRestoration = "manual";
    restore(JSON.parse(kept));
  }
  say(`Live, as of ${loadedAt}.`);
  setTimeout(look, seconds * 1000);
})();

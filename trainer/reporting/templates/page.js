"use strict";
const TEXTS = {{ {"copy": _("Copy"), "copied": _("Copied"), "scroll": _("Scroll sideways to see the rest →")} | tojson }};

for (const pre of document.querySelectorAll("pre")) {
  const box = document.createElement("div"), button = document.createElement("button");
  box.className = "code";
  button.type = "button";
  button.textContent = TEXTS.copy;
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(pre);  // for a copy by hand, if the browser refuses
    await navigator.clipboard.writeText(pre.textContent.trim());
    button.textContent = TEXTS.copied;
    setTimeout(() => { button.textContent = TEXTS.copy; }, 2000);
  });
  pre.replaceWith(box);
  box.append(pre, button);
}

const scrolling = [...document.querySelectorAll(".scroll, .fit, pre")].map(box => {
  const hint = document.createElement("p");
  hint.className = "small hint";
  hint.textContent = TEXTS.scroll;
  (box.closest(".code") ?? box).before(hint);
  return [box, hint];
});
function showHints() {
  for (const [box, hint] of scrolling) hint.hidden = box.scrollWidth <= box.clientWidth + 1;
}
addEventListener("resize", showHints);
addEventListener("toggle", showHints, true);  // of <details>, whose content has no width while it is closed
showHints();

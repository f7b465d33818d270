// Explorers: sliders choose among frames that were drawn when the book was built.
document.querySelectorAll("figure.xp").forEach((fig) => {
  const spec = JSON.parse(fig.querySelector("script.xp-spec").textContent);
  const urls = Array.from(fig.querySelectorAll(".xp-all a"), (a) => a.getAttribute("href"));
  const img = fig.querySelector(".xp-img"), live = fig.querySelector(".xp-live"), form = fig.querySelector("form");
  const sliders = Array.from(form.querySelectorAll("input"));   // form.elements would list the <output>s too
  form.hidden = false;
  form.addEventListener("submit", (e) => e.preventDefault());
  form.addEventListener("input", () => {
    let i = 0;
    sliders.forEach((s, k) => {
      const value = spec.values[k][+s.value];
      s.setAttribute("aria-valuetext", value);
      s.parentNode.querySelector("output").textContent = value;
      i = i * spec.values[k].length + +s.value;
    });
    img.src = urls[i];
    img.alt = live.textContent = spec.texts[i];
  });
  let warm = false;                                             // frames travel when a reader is about to move, not before
  const fetchFrames = () => { if (!warm) { warm = true; urls.forEach((u) => { new Image().src = u; }); } };
  form.addEventListener("focusin", fetchFrames);
  form.addEventListener("pointerenter", fetchFrames);
});

// What the theme leaves for assistive technology to stumble over.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".search-button-field[aria-label]").forEach((b) => b.setAttribute("aria-label", b.innerText.trim() || b.ariaLabel));
  const quiet = (b) => b.querySelectorAll("svg").forEach((v) => { v.setAttribute("aria-hidden", "true"); v.querySelectorAll("title").forEach((t) => t.remove()); });
  document.querySelectorAll(".theme-switch-button").forEach((b) => { quiet(b); new MutationObserver(() => quiet(b)).observe(b, { childList: true, subtree: true }); });
  document.querySelectorAll('[role="doc-biblioentry"]').forEach((e) => e.setAttribute("role", "listitem"));
  document.querySelectorAll('.citation-list [role="doc-backlink"]').forEach((e) => e.removeAttribute("role"));
  document.querySelectorAll(".bd-sidebar-primary details > summary, .sidebar-primary__section details > summary").forEach((s) => {
    const link = s.closest("li")?.querySelector("a");
    if (!s.innerText.trim()) s.setAttribute("aria-label", `Pages of ${link ? link.innerText.trim() : "this chapter"}`);
  });
  const logo = document.querySelector(".sidebar-primary-items__start > .sidebar-primary-item:first-child");
  if (logo && !logo.closest("nav,header,aside")) { logo.setAttribute("role", "region"); logo.setAttribute("aria-label", "Book title"); }
  // A region that scrolls sideways must be reachable by keyboard.
  document.querySelectorAll("div.highlight pre, .table-scroll, div.math, .cell_output .output").forEach((e) => { if (e.scrollWidth > e.clientWidth) e.tabIndex = 0; });
});

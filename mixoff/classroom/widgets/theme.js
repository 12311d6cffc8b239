// Put before each widget's module by Python: a module without imports cannot share it otherwise.
function isDark(el) {
  const lab = el.closest("[data-jp-theme-light]") || document.body;
  if (lab.dataset.jpThemeLight) return lab.dataset.jpThemeLight === "false";
  if (document.documentElement.getAttribute("theme") === "dark" || document.body.dataset.theme === "dark") return true;
  return !document.body.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches;
}


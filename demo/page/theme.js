// Light, dark, or as the system is.

const NAMES = { auto: "as the system", light: "light", dark: "dark" };

export function setUpTheme(button) {
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = "◐ " + theme.charAt(0).toUpperCase() + theme.slice(1);
    button.setAttribute("aria-label", `Colors: ${NAMES[theme]}`);
  };
  let theme = "auto";
  try {
    theme = localStorage.getItem("theme") ?? "auto";
  } catch { /* storage is switched off */ }
  if (!(theme in NAMES)) theme = "auto";
  show(theme);
  button.onclick = () => {
    const names = Object.keys(NAMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    show(theme);
    try {
      localStorage.setItem("theme", theme);
    } catch { /* the choice holds until the page is closed */ }
  };
}

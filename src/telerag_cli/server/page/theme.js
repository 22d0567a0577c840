// A classic script in the head: a chosen theme has to be there before the first paint.
try {
  const theme = localStorage.getItem("telerag.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // This browser keeps nothing for pages; the system's theme it is.
}

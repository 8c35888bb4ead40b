// Typeset the equations that pymdownx.arithmatex has marked, on every page that the theme loads.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
document$.subscribe(() => {
  if (MathJax.typesetPromise) MathJax.typesetPromise();
});

// Ctrl+Enter, or Cmd+Enter, generates from wherever the keyboard is.
document.addEventListener(
  "keydown",
  (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const button = document.querySelector("#generate");
    if (!button || button.disabled) return;
    event.preventDefault();
    event.stopPropagation();
    document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
    setTimeout(() => button.click(), 50);
  },
  true,
);

// A phone shows the keyboard for numbers where they are asked for; gradio has no such attribute.
document.addEventListener("focusin", (event) => {
  for (const mode of ["numeric", "decimal"]) {
    if (event.target.closest?.(`.keyboard-${mode}`)) event.target.inputMode = mode;
  }
});

// Texts of a run are never parsed as HTML: every one goes through textContent.
function element(tag, className, text, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== null && text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

const PAGE = 25;
const rows = read("samples");
const numCorrect = (row) => row.rollouts.filter((rollout) => rollout.is_correct).length;
const searched = rows.map((row) =>
  [row.prompt_id, row.source, row.prompt, row.answer, row.teacher, row.trace, ...row.rollouts.map((r) => r.text)].join("\n").toLowerCase());
const tests = {
  all: (row) => row.rollouts.length > 0 && numCorrect(row) === row.rollouts.length,
  some: (row) => numCorrect(row) > 0 && numCorrect(row) < row.rollouts.length,
  none: (row) => row.rollouts.length > 0 && numCorrect(row) === 0,
  error: (row) => [...row.rollouts, row.trace_verdict].some((verdict) => verdict?.error),
  truncated: (row) => row.rollouts.some((rollout) => rollout.finish === "length"),
};

function mark(verdict) {
  return verdict.is_correct ? element("span", "right-mark", "✓ correct") : element("span", "wrong-mark", "✗ wrong");
}

function problem(verdict) {
  return verdict.error ? [element("div", "error", `verifier: ${verdict.error}`)] : [];
}

function rolloutBlock(rollout, index) {
  const facts = `reward ${rollout.reward} · ${rollout.num_tokens} tokens · ${rollout.finish === "length" ? "truncated" : "stopped"} · version ${rollout.policy_version ?? "?"}`;
  const block = element("div", "", null, element("h4", "", null, `Rollout ${index + 1}`, mark(rollout), element("small", "", facts)), ...problem(rollout));
  block.append(element("pre", rollout.is_correct ? "right" : "wrong", rollout.text));
  return block;
}

function traceBlock(row) {
  const verdict = row.trace_verdict;
  const facts = [row.teacher, verdict && `reward ${verdict.reward}`].filter(Boolean).join(" · ");
  const title = element("h4", "", null, "Teacher's trace", ...(verdict ? [mark(verdict)] : []), element("small", "", facts));
  return [title, ...(verdict ? problem(verdict) : []), ...(row.trace ? [element("pre", "trace", row.trace)] : [])];
}

function details(row) {
  const cell = element("td", "open");
  cell.colSpan = 8;
  cell.append(element("h4", "", null, "Prompt", element("small", "", [row.prompt_id, row.source].filter(Boolean).join(" · "))));
  cell.append(element("pre", "", row.prompt), element("h4", "", "Answer"), element("pre", "", row.answer));
  cell.append(element("div", "grid", null, ...row.rollouts.map(rolloutBlock)));
  if (row.trace || row.trace_verdict) cell.append(...traceBlock(row));
  return element("tr", "", null, cell);
}

function tableRow(row) {
  const tier = element("td", "", null, row.tier ? element("span", `badge ${row.tier}`, row.tier) : "–");
  const correct = row.rollouts.length ? `${numCorrect(row)}/${row.rollouts.length}` : "–";
  const line = element("tr", "row", null, element("td", "", row.step), tier, element("td", "", correct),
    element("td", "text", row.prompt), element("td", "text answer", row.answer), element("td", "", row.dropped ? `${row.treatment}: ${row.dropped}` : row.treatment),
    element("td", "", row.teacher ?? "–"), element("td", "", row.policy_version ?? "–"));
  let opened = null;
  const toggle = () => {
    if (opened) { opened.remove(); opened = null; } else { opened = details(row); line.after(opened); }
    line.setAttribute("aria-expanded", String(opened !== null));
  };
  line.tabIndex = 0;
  line.setAttribute("aria-expanded", "false");
  line.addEventListener("click", toggle);
  line.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
  return line;
}

function startTable() {
  const form = document.getElementById("filters");
  const byId = (id) => document.getElementById(id);
  let first = 0;
  for (const step of new Set(rows.map((row) => row.step))) form.elements.step.append(element("option", "", step));
  const matches = (row, index) => {
    const { step, tier, correct, text } = Object.fromEntries(new FormData(form));
    return (!step || String(row.step) === step) && (!tier || row.tier === tier)
      && (!correct || tests[correct](row)) && (!text || searched[index].includes(text.toLowerCase()));
  };
  const show = () => {
    const found = rows.filter(matches);
    byId("rows").replaceChildren(...found.slice(first, first + PAGE).map(tableRow));
    byId("where").textContent = found.length ? `${first + 1}–${Math.min(first + PAGE, found.length)} of ${found.length}` : "nothing matches";
    byId("back").disabled = first === 0;
    byId("next").disabled = first + PAGE >= found.length;
  };
  form.addEventListener("input", () => { first = 0; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("back").addEventListener("click", () => { first -= PAGE; show(); });
  byId("next").addEventListener("click", () => { first += PAGE; show(); });
  show();
}

if (rows.length) startTable();

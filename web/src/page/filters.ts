// The filters at the side: the values of each column with their counts, and ranges of numbers.

import type { Info } from "../engine";
import type { Client } from "../protocol";
import { quoted } from "../search/filters";
import type { Columns, Json } from "../site/documents";
import { byId, element } from "./dom";
import { state } from "./state";

const MAX_VALUES = 30;
type Bound = "gte" | "lte";

export class Filters {
  private turn = 0;

  constructor(
    private readonly client: Client,
    private readonly info: Info,
    private readonly onChange: () => void,
  ) {}

  async show(): Promise<void> {
    const turn = ++this.turn;
    const parts = Object.entries(this.info.kinds).map(([name, kind]) => {
      if (kind === "number") return this.range(name);
      return kind === "string" || kind === "boolean" ? this.values(name) : null;
    });
    const made = (await Promise.all(parts)).filter((part) => part !== null);
    if (turn !== this.turn) return;
    const focused = (document.activeElement as HTMLElement | null)?.dataset.filter;
    const filters = byId("filters");
    filters.replaceChildren(...made);
    if (focused) filters.querySelector<HTMLElement>(`[data-filter="${CSS.escape(focused)}"]`)?.focus();
  }

  private set(name: string, condition: Json | null): void {
    if (condition === null) delete state.where[quoted(name)];
    else state.where[quoted(name)] = condition;
    this.onChange();
  }

  private async values(name: string): Promise<HTMLFieldSetElement | null> {
    const { [quoted(name)]: own, ...others } = state.where;
    const found = await this.client.call("facets", [quoted(name), others, MAX_VALUES + 1]);
    const chosen = Array.isArray(own) ? own : [];
    if (found.length > MAX_VALUES || (found.length < 2 && !chosen.length)) return null; // a column of names, or without a choice
    const choose = (value: Json, on: boolean) => {
      const now = on ? [...chosen, value] : chosen.filter((each) => each !== value);
      this.set(name, now.length ? now : null);
    };
    const labels = found.map(({ value, count }) =>
      element(
        "label",
        {},
        element("input", {
          type: "checkbox",
          checked: chosen.includes(value),
          "data-filter": `${name}=${value}`,
          onchange: (event) => choose(value, (event.target as HTMLInputElement).checked),
        }),
        String(value),
        element("span", { className: "count" }, String(count)),
      ),
    );
    return element("fieldset", {}, legendOf(name), element("div", { className: "values" }, ...labels));
  }

  private range(name: string): HTMLFieldSetElement {
    const own = (state.where[quoted(name)] ?? {}) as Columns;
    const change = (bound: Bound) => (event: Event) => {
      const { value } = event.target as HTMLInputElement;
      const { [bound]: _, ...rest } = own;
      const next = value === "" ? rest : { ...rest, [bound]: Number(value) };
      this.set(name, Object.keys(next).length ? next : null);
    };
    const input = (bound: Bound, label: string) =>
      element("input", {
        type: "number",
        step: "any",
        value: String(own[bound] ?? ""),
        placeholder: label,
        "aria-label": `${name}, ${label}`,
        "data-filter": `${name}.${bound}`,
        onchange: change(bound),
      });
    return element("fieldset", {}, legendOf(name), element("div", { className: "range" }, input("gte", "from"), input("lte", "to")));
  }
}

const legendOf = (name: string) => element("legend", {}, name.replaceAll("_", " "));


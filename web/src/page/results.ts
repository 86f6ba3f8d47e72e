// The grid of results, the query as chips, and the dialog of one item.

import type { Info } from "../engine";
import type { Client } from "../protocol";
import type { Hit, Page, SearchOptions } from "../search/catalog";
import { stringifyJson } from "../../../unidiff_sdk/serve/static/json.js";
import { idText } from "../site/ids";
import { byId, element } from "./dom";
import { dropImage, hasWhere, isQuery, state, writeAddress } from "./state";
import type { Thumbnails } from "./thumbnails";

const PAGE_SIZE = 24;
const PRICE_DIGITS = 2;

export class Results {
  private turn = 0;
  private more = false;
  private loading = false;

  constructor(
    private readonly client: Client,
    private readonly info: Info,
    private readonly thumbnails: Thumbnails,
    private readonly onSearch: () => void,
  ) {
    const end = byId("more");
    new IntersectionObserver(() => {
      // An entry may be older than the results that were added since, so the current position decides.
      const isVisible = end.getBoundingClientRect().top < window.innerHeight;
      if (isVisible && this.more && !this.loading) void this.load(false);
    }).observe(end);
  }

  /** Show the results of the current state. */
  async refresh({ address = true } = {}): Promise<void> {
    if (address) writeAddress();
    byId<HTMLInputElement>("text").value = state.q;
    byId("mix").hidden = !(state.q && state.image);
    byId<HTMLInputElement>("weight").value = String(state.weight);
    byId("rerank-choice").hidden = !(this.info.reranks && state.q);
    byId<HTMLInputElement>("rerank").checked = state.rerank;
    document.title = state.q ? `${state.q} – ${this.info.name}` : this.info.name;
    this.showQuery();
    this.onSearch();
    window.scrollTo(0, 0);
    await this.load(true);
  }

  private async load(first: boolean): Promise<void> {
    const mine = first ? ++this.turn : this.turn;
    const results = byId("results");
    this.loading = true;
    try {
      const page = await this.page(first ? 0 : results.children.length);
      if (mine !== this.turn) return; // another search was started meanwhile
      if (first) results.replaceChildren();
      results.append(...page.hits.map((hit) => this.card(hit)));
      this.more = page.more;
      if (first || results.children.length) byId("status").textContent = this.summary(page, first);
    } catch (error) {
      if (mine === this.turn) byId("status").textContent = error instanceof Error ? error.message : String(error);
    } finally {
      if (mine === this.turn) this.loading = false;
    }
  }

  private page(offset: number): Promise<Page> {
    if (!isQuery()) return this.client.call("browse", [state.where, PAGE_SIZE, offset]);
    const options: SearchOptions = { limit: PAGE_SIZE, offset, where: state.where, like: state.like, unlike: state.unlike };
    if (state.q) options.text = state.q;
    if (state.image) options.image = state.image.pixels;
    if (state.q && state.image) options.weights = { text: state.weight, image: 1 - state.weight };
    if (state.rerank && state.q && this.info.reranks) options.rerank = true;
    return this.client.call("search", [options]);
  }

  private summary(page: Page, first: boolean): string {
    const count = byId("results").children.length;
    if (!count) return hasWhere() ? "Nothing matches these filters." : "Nothing found.";
    if (!isQuery()) return `${this.info.items.toLocaleString()} items${hasWhere() ? ", filtered" : ""}`;
    const long = page.truncated ? " The text is longer than the encoder reads, so its end was ignored." : "";
    return `${count}${page.more ? "+" : ""} results${first ? ` in ${page.took_ms.toFixed(0)} ms` : ""}.${long}`;
  }

  private card(hit: Hit): HTMLLIElement {
    const price = typeof hit.columns.price === "number" ? hit.columns.price.toFixed(PRICE_DIGITS) : null;
    const facts = [hit.columns.brand, price].filter((fact) => typeof fact === "string").join(" · ");
    const act = (label: string, title: string, action: () => void) => element("button", { type: "button", title, onclick: action }, label);
    return element(
      "li",
      { className: "card" },
      element("button", { type: "button", className: "frame", "aria-label": `Show ${captionOf(hit)}`, onclick: () => this.showItem(hit) }, this.thumbnails.image(hit.thumbnail, "")),
      element("p", {}, captionOf(hit)),
      facts ? element("span", { className: "facts" }, facts) : null,
      element(
        "div",
        { className: "tools" },
        act("More like this", "Search for similar items", () => this.approach("like", hit)),
        act("Not this", "Avoid items like this", () => this.approach("unlike", hit)),
      ),
    );
  }

  private approach(how: "like" | "unlike", hit: Hit): void {
    const id = idText(hit.id);
    const other = how === "like" ? "unlike" : "like";
    state[other] = state[other].filter((each) => each !== id);
    if (!state[how].includes(id)) state[how].push(id);
    byId<HTMLDialogElement>("item").close();
    void this.refresh();
  }

  private showQuery(): void {
    const chip = (label: string, remove: () => void, ...content: (Node | string)[]) => {
      const onclick = () => {
        remove();
        void this.refresh();
      };
      return element("button", { type: "button", "aria-label": `Remove ${label}`, onclick }, ...content, element("span", { "aria-hidden": "true" }, "✕"));
    };
    const { image } = state;
    const chips = image ? [chip("image", dropImage, element("img", { src: image.url, alt: "" }), "image")] : [];
    for (const how of ["like", "unlike"] as const) {
      const label = how === "like" ? "like" : "not like";
      for (const id of state[how]) {
        const thumbnail = this.client.call("thumbnails", [[id]]).then(([position]) => position ?? null);
        const remove = () => (state[how] = state[how].filter((each) => each !== id));
        chips.push(chip(`${label} ${id}`, remove, this.thumbnails.image(thumbnail, ""), label));
      }
    }
    byId("query").replaceChildren(...chips);
  }

  private showItem(hit: Hit): void {
    const dialog = byId<HTMLDialogElement>("item");
    const shown = (value: unknown) => (typeof value === "object" ? stringifyJson(value) : String(value));
    const rows = Object.entries(hit.columns).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, shown(value))]);
    dialog.replaceChildren(
      element(
        "div",
        { className: "title" },
        element("h2", { id: "item-title" }, captionOf(hit)),
        element("button", { type: "button", className: "button icon", "aria-label": "Close", onclick: () => dialog.close() }, "✕"),
      ),
      element(
        "div",
        { className: "detail" },
        this.thumbnails.image(hit.thumbnail, captionOf(hit)),
        element(
          "div",
          {},
          element("dl", {}, element("dt", {}, "id"), element("dd", {}, String(hit.id)), ...rows),
          element("div", { className: "actions" }, element("button", { type: "button", className: "primary", onclick: () => this.approach("like", hit) }, "More like this")),
        ),
      ),
    );
    dialog.showModal();
  }
}

export const captionOf = (hit: Hit) => hit.text ?? String(hit.id);

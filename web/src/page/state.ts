// What is searched for. It lives in the address, so that links and the back button work.

import type { Rgb } from "../model/images";
import type { Columns } from "../site/documents";

export interface SearchState {
  q: string;
  like: string[];
  unlike: string[];
  where: Columns;
  weight: number;
  rerank: boolean;
  /** Too large for the address. */
  image: { pixels: Rgb; url: string } | null;
}

const HALF = 0.5;

export const state: SearchState = { q: "", like: [], unlike: [], where: {}, weight: HALF, rerank: false, image: null };

export function dropImage(): void {
  if (state.image) URL.revokeObjectURL(state.image.url);
  state.image = null;
}

export const hasWhere = () => Object.keys(state.where).length > 0;
export const isQuery = () => Boolean(state.q || state.image || state.like.length || state.unlike.length);

export function readAddress(): void {
  const parameters = new URLSearchParams(location.search);
  state.q = parameters.get("q") ?? "";
  state.like = parameters.getAll("like");
  state.unlike = parameters.getAll("unlike");
  state.weight = Number(parameters.get("weight")) || HALF;
  state.rerank = parameters.has("rerank");
  state.where = columnsOf(parameters.get("where"));
}

/** An object in JSON; an empty one, if someone edited the address. */
function columnsOf(json: string | null): Columns {
  try {
    const value = JSON.parse(json ?? "{}") as unknown;
    return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Columns) : {};
  } catch {
    return {};
  }
}

export function writeAddress(): void {
  const parameters = new URLSearchParams();
  const engine = new URLSearchParams(location.search).get("engine");
  if (engine) parameters.set("engine", engine);
  if (state.q) parameters.set("q", state.q);
  for (const id of state.like) parameters.append("like", id);
  for (const id of state.unlike) parameters.append("unlike", id);
  if (hasWhere()) parameters.set("where", JSON.stringify(state.where));
  if (state.weight !== HALF) parameters.set("weight", String(state.weight));
  if (state.rerank) parameters.set("rerank", "");
  const address = parameters.size ? `?${parameters}` : location.pathname;
  if (address !== location.search) history.pushState(null, "", address);
}

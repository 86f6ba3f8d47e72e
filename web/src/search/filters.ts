// The filter language of unidiff_sdk/store/filters.py: a dictionary that selects items by their columns.

import type { Columns, Json } from "../site/documents";

export class FilterError extends Error {
  override name = "FilterError";
}

export type Predicate = (columns: Columns) => boolean;

const MAX_DEPTH = 32;
const MAX_COMPARISONS = 1024;
const MAX_CHOICES = 65_536;
const MAX_SEARCH_TEXT = 10_000;
const OPERATORS = ["eq", "ne", "in", "gt", "gte", "lt", "lte", "contains", "near", "box", "exists", "null"];
const EARTH_RADIUS = 6_371_008.8; // meters

const isObject = (value: Json | undefined): value is Columns => typeof value === "object" && value !== null && !Array.isArray(value);
const isNumber = (value: Json | undefined): value is number => typeof value === "number" && Number.isFinite(value);
const shown = (value: Json | undefined) => (JSON.stringify(value) ?? "undefined").slice(0, 60);

/** A function that says whether the columns of an item match. */
export function parseFilter(where: Json): Predicate {
  const state = { comparisons: 0 };
  const predicate = parseClause(where, 1, state);
  if (state.comparisons > MAX_COMPARISONS) {
    throw new FilterError(`The filter has ${state.comparisons} clauses; at most ${MAX_COMPARISONS} are allowed. Split it into several queries.`);
  }
  return predicate;
}

interface State {
  comparisons: number;
}

function parseClause(where: Json | undefined, depth: number, state: State): Predicate {
  if (!isObject(where)) throw new FilterError(`A filter is an object such as {"price": {"lt": 80}}, not ${shown(where)}.`);
  if (depth > MAX_DEPTH) throw new FilterError(`The filter is nested more than ${MAX_DEPTH} deep. Flatten it.`);
  const keys = Object.keys(where);
  if (depth > 1 && !keys.length) throw new FilterError('An empty filter inside "and", "or" or "not" is ambiguous. Remove it.');
  const parts = keys.map((key) => parseKey(key, where[key]!, depth, state));
  return (columns) => parts.every((part) => part(columns));
}

function parseKey(key: string, condition: Json, depth: number, state: State): Predicate {
  if (!key) throw new FilterError('The keys of a filter are names of columns, not "".');
  if (key === "not") {
    const part = parseClause(condition, depth + 1, state);
    return (columns) => !part(columns);
  }
  if (key !== "and" && key !== "or") return parseColumn(key, condition, state);
  if (!Array.isArray(condition) || !condition.length) {
    throw new FilterError(`"${key}" needs a list of filters such as {"${key}": [{…}, {…}]}, not ${shown(condition)}.`);
  }
  const parts = condition.map((member) => parseClause(member, depth + 1, state));
  return key === "and" ? (columns) => parts.every((part) => part(columns)) : (columns) => parts.some((part) => part(columns));
}

function parseColumn(key: string, condition: Json, state: State): Predicate {
  const read = columnReader(key);
  const operators = isObject(condition) ? condition : { [Array.isArray(condition) ? "in" : "eq"]: condition };
  const names = Object.keys(operators);
  if (!names.length) throw new FilterError(`The condition on "${key}" is empty. Valid operators: ${OPERATORS.join(", ")}.`);
  const tests = names.map((operator) => parseComparison(key, operator, operators[operator]!, state));
  return (columns) => {
    const found = read(columns);
    return tests.every((test) => test(found));
  };
}

// --- columns

/** A column as a filter names it: a name with a dot or a bracket, or of a connective, is quoted. */
export const quoted = (name: string) => (/[.[\]]/u.test(name) || ["and", "or", "not"].includes(name) ? `"${name}"` : name);

const SEGMENT = /"[^"\\]+"(?:\[\d*\])*|[^."\\]+/gu;
// Only such a segment may end with the positions of elements. Any other one is a name, with its brackets.
const NAME_AND_ELEMENTS = /^("[^"\\]+"|[A-Za-z0-9_-]+)((?:\[\d*\])*)$/u;
const POSITION_DIGITS = 9;

/** A name, a position in a list, or null for all its elements. */
type Step = string | number | null;

/** A function that returns what a column leads to: no value, one, or with `[]` one for each element of a list. */
export function columnReader(key: string): (columns: Columns) => Json[] {
  const segments = key.match(SEGMENT) ?? [];
  if (segments.join(".") !== key) {
    throw new FilterError(`${shown(key)} is not a column. A dot separates two names, quotes must be balanced, and a name has no backslash.`);
  }
  const steps = segments.flatMap((segment) => stepsOf(segment, key));
  return (columns) => steps.reduce<Json[]>((found, step) => found.flatMap((value) => follow(value, step)), [columns]);
}

function stepsOf(segment: string, key: string): Step[] {
  const [, name = segment, elements = ""] = NAME_AND_ELEMENTS.exec(segment) ?? [];
  const positions = Array.from(elements.matchAll(/\[(\d*)\]/gu), ([, position]) => position!);
  if (positions.some((position) => position.length > POSITION_DIGITS)) {
    throw new FilterError(`${shown(key)}: a position in a list has at most ${POSITION_DIGITS} digits.`);
  }
  return [name.replace(/^"|"$/gu, ""), ...positions.map((position) => (position ? Number(position) : null))];
}

function follow(value: Json, step: Step): Json[] {
  if (typeof step === "string") return isObject(value) && Object.hasOwn(value, step) ? [value[step]!] : [];
  if (!Array.isArray(value)) return [];
  return step === null ? value : value.slice(step, step + 1);
}

// --- comparisons

/** Of all values that a column leads to. */
type Test = (found: Json[]) => boolean;

/** The elements of lists, and the other values. All numbers are 64-bit floats. */
export const elementsOf = (found: Json[]): Json[] => found.flatMap((value) => value).map((each) => (typeof each === "bigint" ? Number(each) : each));

const some =
  (test: (element: Json) => boolean): Test =>
  (found) =>
    elementsOf(found).some(test);
const not =
  (test: Test): Test =>
  (found) =>
    !test(found);

const isNull = some((element) => element === null);
const exists: Test = (found) => found.some((value) => value !== null && !(Array.isArray(value) && !value.length));

function parseComparison(key: string, operator: string, value: Json, state: State): Test {
  state.comparisons += operator === "in" && Array.isArray(value) ? comparisonsOf(value) : 1;
  switch (operator) {
    case "eq":
      return equals(key, value);
    case "ne":
      return not(equals(key, value));
    case "in":
      return isOneOf(key, value);
    case "gt":
    case "gte":
    case "lt":
    case "lte":
      return isBounded(key, operator, value);
    case "contains":
      return containsWords(key, value);
    case "near":
      return isNear(key, value);
    case "box":
      return isInBox(key, value);
    case "exists":
    case "null": {
      if (typeof value !== "boolean") throw new FilterError(`"${operator}" on "${key}" needs true or false, not ${shown(value)}.`);
      const test = operator === "null" ? isNull : exists;
      return value ? test : not(test);
    }
  }
  throw new FilterError(`Unknown operator ${shown(operator)} on "${key}". Valid operators: ${OPERATORS.join(", ")}. Filters are joined by and, or, not.`);
}

/** Python looks up all strings of a list in one comparison. */
function comparisonsOf(choices: Json[]): number {
  const strings = choices.filter((choice) => typeof choice === "string").length;
  return choices.length - strings + (strings ? 1 : 0);
}

function scalar(key: string, value: Json): string | number | boolean {
  if (typeof value === "string" || typeof value === "boolean" || isNumber(value)) return value;
  throw new FilterError(`"${key}" is compared with ${shown(value)}. A value is a string, a finite number, true or false.`);
}

function equals(key: string, value: Json): Test {
  if (value === null) return isNull;
  const operand = scalar(key, value);
  return some((element) => element === operand);
}

function isOneOf(key: string, values: Json): Test {
  if (!Array.isArray(values) || !values.length) throw new FilterError(`"in" on "${key}" needs a list of at least one value, not ${shown(values)}.`);
  const choices = new Set<Json>(values.map((value) => scalar(key, value)));
  if (choices.size > MAX_CHOICES) throw new FilterError(`"in" on "${key}" lists ${choices.size} values; at most ${MAX_CHOICES} are allowed.`);
  return some((element) => choices.has(element));
}

type Comparison = "gt" | "gte" | "lt" | "lte";

function isBounded(key: string, operator: Comparison, bound: Json): Test {
  if (isNumber(bound)) return some((element) => isNumber(element) && compares(element, operator, bound));
  const moment = typeof bound === "string" ? parseDate(bound) : null;
  if (moment === null) {
    throw new FilterError(`"${operator}" on "${key}" needs a finite number or a date such as "2026-03-01" or "2026-03-01T12:30:00+01:00", not ${shown(bound)}.`);
  }
  return some((element) => {
    const stored = typeof element === "string" ? parseDate(element) : null;
    return stored !== null && compares(stored, operator, moment);
  });
}

function compares<T extends number | bigint>(value: T, operator: Comparison, bound: T): boolean {
  if (operator === "gt") return value > bound;
  if (operator === "gte") return value >= bound;
  return operator === "lt" ? value < bound : value <= bound;
}

const DATE = /^(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,6})\d*)?)?(Z|[+-]\d\d:?\d\d)?)?$/u;

/** Microseconds since 1970 in UTC; null if the text is no date. Without a time zone, it is UTC. */
export function parseDate(text: string): bigint | null {
  const match = DATE.exec(text);
  if (!match) return null;
  const [year, month, day, hour, minute, second] = [1, 2, 3, 4, 5, 6].map((group) => Number(match[group] ?? 0)) as [number, number, number, number, number, number];
  const date = new Date(0);
  date.setUTCFullYear(year, month - 1, day);
  date.setUTCHours(hour, minute, second);
  const exact = date.getUTCMonth() === month - 1 && date.getUTCDate() === day && hour < 24 && minute < 60 && second < 60;
  if (!exact || year < 1) return null;
  return (BigInt(date.getTime()) - BigInt(offsetOf(match[8]) * 60_000)) * 1000n + BigInt((match[7] ?? "").padEnd(6, "0"));
}

/** A time zone such as "+02:00" in minutes. */
function offsetOf(zone: string | undefined): number {
  if (!zone || zone === "Z") return 0;
  const minutes = Number(zone.slice(1, 3)) * 60 + Number(zone.slice(-2));
  return zone.startsWith("-") ? -minutes : minutes;
}

const WORD = /[\p{L}\p{N}]+/gu;
const wordsOf = (text: string) => (text.match(WORD) ?? []).map((word) => word.toLowerCase());

function containsWords(key: string, value: Json): Test {
  const words = typeof value === "string" ? wordsOf(value) : [];
  if (typeof value !== "string" || !words.length) throw new FilterError(`"contains" on "${key}" needs a string with at least one word, not ${shown(value)}.`);
  if (value.length > MAX_SEARCH_TEXT) throw new FilterError(`"contains" on "${key}" has ${value.length} characters; at most ${MAX_SEARCH_TEXT} are allowed. Shorten it.`);
  return some((element) => {
    if (typeof element !== "string") return false;
    const present = new Set(wordsOf(element));
    return words.every((word) => present.has(word));
  });
}

// --- places

function namedNumbers(key: string, operator: string, value: Json, names: string[]): number[] {
  const numbers = isObject(value) && Object.keys(value).length === names.length ? names.map((name) => value[name]) : [];
  if (numbers.length !== names.length || !numbers.every(isNumber)) {
    throw new FilterError(`"${operator}" on "${key}" needs the numbers {${names.map((name) => `"${name}": …`).join(", ")}}, not ${shown(value)}.`);
  }
  return numbers as number[];
}

const place = (test: (lat: number, lon: number) => boolean): Test =>
  some((element) => isObject(element) && isNumber(element.lat) && isNumber(element.lon) && test(element.lat, element.lon));

const radians = (degrees: number) => (degrees * Math.PI) / 180;

function isNear(key: string, value: Json): Test {
  const [lat, lon, radius] = namedNumbers(key, "near", value, ["lat", "lon", "radius"]) as [number, number, number];
  if (!(Math.abs(lat) <= 90 && Math.abs(lon) <= 180 && radius > 0)) {
    throw new FilterError(`"near" on "${key}" is ${shown(value)}. lat must be from -90 to 90, lon from -180 to 180 and radius above 0, in meters.`);
  }
  return place((otherLat, otherLon) => {
    const [phi, other] = [radians(lat), radians(otherLat)];
    const half = Math.sin((phi - other) / 2) ** 2 + Math.cos(phi) * Math.cos(other) * Math.sin(radians(lon - otherLon) / 2) ** 2;
    return 2 * EARTH_RADIUS * Math.asin(Math.sqrt(half)) <= radius;
  });
}

function isInBox(key: string, value: Json): Test {
  const [west, east, south, north] = namedNumbers(key, "box", value, ["west", "east", "south", "north"]) as [number, number, number, number];
  if (!([west, east].every((x) => Math.abs(x) <= 180) && -90 <= south && south <= north && north <= 90)) {
    throw new FilterError(`"box" on "${key}" is ${shown(value)}. west and east must be from -180 to 180, south and north from -90 to 90 with south below north.`);
  }
  return place((lat, lon) => south <= lat && lat <= north && (west <= east ? west <= lon && lon <= east : lon >= west || lon <= east));
}

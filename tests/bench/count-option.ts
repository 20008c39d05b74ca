/** Reads options that are counts, as parseArgs gave them. */
export function countsOf<Name extends string>(options: Readonly<Partial<Record<Name, unknown>>>) {
  return function countOf(name: Name, least = 1): number {
    const value = Number(options[name]);
    if (!Number.isInteger(value) || value < least)
      throw new RangeError(`--${name}: expected an integer from ${least}, got ${options[name]}`);
    return value;
  };
}

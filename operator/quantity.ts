/** A Kubernetes quantity (`1.5Gi`, `500m`, `2e3`, 2) as a number; NaN for what is none. */
export function parseQuantity(quantity: number | string): number {
  const [, number, exponent, unit] =
    /^([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)(?:[eE]([+-]?\d+)|(n|u|m|k|M|G|T|P|E|[KMGTPE]i))?$/.exec(
      `${quantity}`,
    ) ?? [];
  if (number === undefined) return Number.NaN;
  if (exponent !== undefined) return Number(`${number}e${exponent}`);
  // Decimal units as an exponent, which is rounded once; binary ones are exact.
  if (unit?.endsWith('i')) return Number(number) * 1024 ** ('KMGTPE'.indexOf(unit[0]!) + 1);
  return Number(`${number}e${unit === undefined ? 0 : decimalExponents[unit]}`);
}

const decimalExponents: Record<string, number> = {
  n: -9,
  u: -6,
  m: -3,
  k: 3,
  M: 6,
  G: 9,
  T: 12,
  P: 15,
  E: 18,
};

/** What bringing things back costs, as measured while serving: running means, in which a new measure weighs a quarter. */

const weightOfNew = 0.25;
/** Shorter steps say more about their fixed part than about a token. */
const fewestTokens = 16;

export class MeasuredCosts {
  /** A guess until the first prompt was computed. */
  prefillSecondsPerToken = 1e-3;
  #hasPrefill = false;

  /** A step in which most tokens were a prompt's. */
  observePrefill(seconds: number, numTokens: number): void {
    if (numTokens < fewestTokens || seconds <= 0) return;
    const measured = seconds / numTokens;
    this.prefillSecondsPerToken = this.#hasPrefill
      ? this.prefillSecondsPerToken + weightOfNew * (measured - this.prefillSecondsPerToken)
      : measured;
    this.#hasPrefill = true;
  }
}

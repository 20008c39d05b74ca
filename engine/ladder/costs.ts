/**
 * What bringing things back costs, as measured while serving: fading means, in which what came earlier weighs less with every
 * new measure. Computing costs more the further back it has to look, so it is a line over the position:
 *
 *   seconds a token = base + slope × position
 *
 * fitted by least squares. That is why of a conversation the head is cheap to compute and the tail is worth a copy
 * (Pensieve: Yu et al., 2025, §4).
 */

/** Of what came before, at each new measure. */
const fading = 0.9;
/** Shorter steps say more about their fixed part than about a token. */
const fewestTokens = 16;
/** A slope is believed only from positions that are this far apart: their standard deviation, in tokens. */
const spreadTokens = 64;
/** Guesses until the first measure. */
const guessedSecondsPerToken = 1e-3;
const guessedSecondsPerByte = 1 / 4e9;

export class MeasuredCosts {
  /** Sums over steps, each faded: 1, position, seconds a token, and their products. */
  #weight = 0;
  #x = 0;
  #y = 0;
  #xx = 0;
  #xy = 0;
  #base = guessedSecondsPerToken;
  #slope = 0;
  #copySeconds = 0;
  #copyBytes = 0;

  /**
   * A step in which most tokens were a prompt's.
   * @param position  mean of its tokens' positions
   */
  observePrefill(seconds: number, numTokens: number, position: number): void {
    if (numTokens < fewestTokens || seconds <= 0) return;
    const y = seconds / numTokens;
    this.#weight = fading * this.#weight + 1;
    this.#x = fading * this.#x + position;
    this.#y = fading * this.#y + y;
    this.#xx = fading * this.#xx + position * position;
    this.#xy = fading * this.#xy + position * y;
    const meanX = this.#x / this.#weight;
    const meanY = this.#y / this.#weight;
    const variance = this.#xx / this.#weight - meanX * meanX;
    const slope = variance < spreadTokens ** 2 ? 0 : (this.#xy / this.#weight - meanX * meanY) / variance;
    // Looking back further never makes it cheaper, and at the beginning it costs something: neither is left to noise.
    this.#slope = Math.min(Math.max(0, slope), meanY / Math.max(1, meanX));
    this.#base = meanY - this.#slope * meanX;
  }

  /** A copy between device and host arena, in either direction. */
  observeCopy(seconds: number, numBytes: number): void {
    this.#copySeconds = fading * this.#copySeconds + seconds;
    this.#copyBytes = fading * this.#copyBytes + numBytes;
  }

  /** Above 0. */
  prefillSeconds(numTokens: number, position: number): number {
    return numTokens * Math.max(1e-9, this.#base + this.#slope * position);
  }

  /** Above 0. */
  copySeconds(numBytes: number): number {
    const perByte = this.#copyBytes > 0 ? this.#copySeconds / this.#copyBytes : guessedSecondsPerByte;
    return Math.max(1e-9, numBytes * perByte);
  }
}
